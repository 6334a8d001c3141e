//! Real sockets: an echo server is the destination, and tiny proxies are written here.

use std::collections::HashMap;
use std::error::Error;
use std::future::Future;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use http::header::{AUTHORIZATION, HOST};
use tokio::io::{BufStream, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;

const ALADDIN: &str = "Aladdin:open%20sesame";
/// The same in base64, as an HTTP proxy gets it.
const ALADDIN_BASIC: &str = "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==";

// === helpers ===

fn uri(text: &str) -> Uri {
    text.parse().unwrap()
}

fn all(url: &str) -> Proxies {
    Proxies::builder().all(url).build().unwrap()
}

fn route(proxy: &str, destination: &str) -> Route {
    all(proxy).route(&uri(destination))
}

/// Serves one connection.
async fn serve_at<F, O>(
    address: &str,
    handler: impl FnOnce(TcpStream) -> F + Send + 'static,
) -> (SocketAddr, JoinHandle<O>)
where
    F: Future<Output = O> + Send + 'static,
    O: Send + 'static,
{
    let listener = TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    let served = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        handler(stream).await
    });
    (address, served)
}

async fn serve<F, O>(
    handler: impl FnOnce(TcpStream) -> F + Send + 'static,
) -> (SocketAddr, JoinHandle<O>)
where
    F: Future<Output = O> + Send + 'static,
    O: Send + 'static,
{
    serve_at("127.0.0.1:0", handler).await
}

/// The destination.
async fn echo() -> SocketAddr {
    let (address, _) = serve(|mut stream| async move {
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
    })
    .await;
    address
}

async fn assert_echoes(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    stream.write_all(b"through").await.unwrap();
    stream.flush().await.unwrap();
    let mut heard = [0; 7];
    stream.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"through");
}

async fn head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

async fn exactly<const N: usize>(stream: &mut TcpStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await.unwrap();
    bytes
}

async fn until_nul(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    loop {
        match stream.read_u8().await.unwrap() {
            0 => return String::from_utf8(text).unwrap(),
            byte => text.push(byte),
        }
    }
}

async fn short_text(stream: &mut TcpStream) -> String {
    let mut text = vec![0; usize::from(stream.read_u8().await.unwrap())];
    stream.read_exact(&mut text).await.unwrap();
    String::from_utf8(text).unwrap()
}

async fn join(mut stream: TcpStream, destination: SocketAddr) {
    let mut onward = TcpStream::connect(destination).await.unwrap();
    let _ = copy_bidirectional(&mut stream, &mut onward).await;
}

/// An HTTP proxy for one CONNECT. It tells the head that it got.
async fn connect_proxy(
    at: &str,
    answer: &'static [u8],
    destination: SocketAddr,
) -> (SocketAddr, oneshot::Receiver<String>) {
    let (tell, told) = oneshot::channel();
    let (address, _) = serve_at(at, move |mut stream| async move {
        tell.send(head(&mut stream).await).unwrap();
        stream.write_all(answer).await.unwrap();
        if answer.starts_with(b"HTTP/1.1 2") {
            join(stream, destination).await;
        }
    })
    .await;
    (address, told)
}

#[derive(Debug, PartialEq)]
struct Asked {
    host: String,
    port: u16,
    user: String,
    password: String,
}

/// A SOCKS4a proxy for one connection; it grants user ids that begin with `A`, and none at all.
async fn socks4_proxy(destination: SocketAddr) -> (SocketAddr, oneshot::Receiver<Asked>) {
    let (tell, told) = oneshot::channel();
    let (address, _) = serve(move |mut stream| async move {
        let [4, 1, high, low, a, b, c, d] = exactly::<8>(&mut stream).await else {
            panic!("not SOCKS4")
        };
        let user = until_nul(&mut stream).await;
        let host = match [a, b, c, d] {
            [0, 0, 0, 1..=255] => until_nul(&mut stream).await,
            address => IpAddr::from(address).to_string(),
        };
        let granted = user.is_empty() || user.starts_with('A');
        tell.send(Asked {
            host,
            port: u16::from_be_bytes([high, low]),
            user,
            password: String::new(),
        })
        .unwrap();
        if granted {
            stream.write_all(&[0, 90, 0, 0, 0, 0, 0, 0]).await.unwrap();
            join(stream, destination).await;
        } else {
            stream.write_all(&[0, 93, 0, 0, 0, 0, 0, 0]).await.unwrap();
        }
    })
    .await;
    (address, told)
}

/// A SOCKS5 proxy for one connection. With a login, it takes nobody without.
async fn socks5_proxy(
    login: Option<(&'static str, &'static str)>,
    reply: &'static [u8],
    destination: SocketAddr,
) -> (SocketAddr, JoinHandle<Option<Asked>>) {
    serve(move |mut stream| async move {
        let [5, count] = exactly::<2>(&mut stream).await else {
            panic!("not SOCKS5")
        };
        let mut methods = vec![0; usize::from(count)];
        stream.read_exact(&mut methods).await.unwrap();
        let (mut user, mut password) = Default::default();
        match login {
            None => stream.write_all(&[5, 0]).await.unwrap(),
            Some(_) if !methods.contains(&2) => {
                stream.write_all(&[5, 0xff]).await.unwrap();
                return None;
            }
            Some(login) => {
                stream.write_all(&[5, 2]).await.unwrap();
                assert_eq!(stream.read_u8().await.unwrap(), 1);
                user = short_text(&mut stream).await;
                password = short_text(&mut stream).await;
                let right = (&*user, &*password) == login;
                stream.write_all(&[1, u8::from(!right)]).await.unwrap();
                if !right {
                    return None;
                }
            }
        }
        let [5, 1, 0, kind] = exactly::<4>(&mut stream).await else {
            panic!("not CONNECT")
        };
        let host = match kind {
            1 => IpAddr::from(exactly::<4>(&mut stream).await).to_string(),
            3 => short_text(&mut stream).await,
            4 => IpAddr::from(exactly::<16>(&mut stream).await).to_string(),
            _ => panic!("address type {kind}"),
        };
        let port = stream.read_u16().await.unwrap();
        stream.write_all(reply).await.unwrap();
        if reply[1] == 0 {
            tokio::spawn(join(stream, destination));
        }
        Some(Asked {
            host,
            port,
            user,
            password,
        })
    })
    .await
}

const GRANTED: &[u8] = &[5, 0, 0, 1, 127, 0, 0, 1, 0, 80];

/// Dials the proxy and opens a stream through it.
async fn through(route: &Route, host: &str, port: u16) -> Result<TcpStream, ProxyError> {
    let proxy = route.proxy().unwrap();
    let stream = TcpStream::connect((&**proxy.host(), proxy.port()))
        .await
        .unwrap();
    open(stream, route, host, port).await
}

fn assert_no_secret(error: &ProxyError) {
    for text in [error.to_string(), format!("{error:?}")] {
        for secret in ["Aladdin", "sesame", "QWxh"] {
            assert!(!text.contains(secret), "{text}");
        }
    }
}

// === settings ===

#[test]
fn every_scheme_has_its_route() {
    let plain = "http://a.example/";
    let secure = "https://a.example/";
    let proxy = |tls, port| Proxy {
        tls,
        host: "p.example".into(),
        port,
        credentials: None,
    };
    let socks4 = |dns| Route::Socks4 {
        proxy: proxy(false, 1080),
        dns,
    };
    let socks5 = |dns| Route::Socks5 {
        proxy: proxy(false, 1080),
        dns,
    };
    for (url, to_http, to_https) in [
        (
            "p.example",
            Route::Forward(proxy(false, 80)),
            Route::Tunnel(proxy(false, 80)),
        ),
        (
            "HTTP://P.example:3128/",
            Route::Forward(proxy(false, 3128)),
            Route::Tunnel(proxy(false, 3128)),
        ),
        (
            "https://p.example",
            Route::Forward(proxy(true, 443)),
            Route::Tunnel(proxy(true, 443)),
        ),
        ("socks4://p.example", socks4(Dns::Local), socks4(Dns::Local)),
        (
            "socks4a://p.example",
            socks4(Dns::Remote),
            socks4(Dns::Remote),
        ),
        ("SOCKS5://p.example", socks5(Dns::Local), socks5(Dns::Local)),
        (
            "socks5h://p.example",
            socks5(Dns::Remote),
            socks5(Dns::Remote),
        ),
    ] {
        assert_eq!(route(url, plain), to_http, "{url}");
        assert_eq!(route(url, secure), to_https, "{url}");
    }
    assert!(route("socks5://p.example", plain).wants_address());
    assert!(!route("socks5h://p.example", plain).wants_address());
    assert!(!route("http://p.example", secure).wants_address());
}

#[test]
fn each_kind_of_destination_has_its_own_proxy() {
    let proxies = Proxies::builder()
        .http("http://plain.example")
        .all("socks5h://rest.example")
        .build()
        .unwrap();
    let host = |destination: &str| {
        let route = proxies.route(&uri(destination));
        route.proxy().map(|proxy| proxy.host().to_string())
    };
    assert_eq!(host("http://a.example").as_deref(), Some("plain.example"));
    assert_eq!(host("https://a.example").as_deref(), Some("rest.example"));
    assert_eq!(host("ws://a.example"), None);
    assert_eq!(host("/path"), None);
    assert_eq!(
        Proxies::none().route(&uri("http://a.example")),
        Route::Direct
    );

    let only_http = Proxies::builder().http("p.example").build().unwrap();
    assert_eq!(only_http.route(&uri("https://a.example")), Route::Direct);
    let only_no = Proxies::builder().no_proxy("a.example").build().unwrap();
    assert_eq!(only_no.route(&uri("https://b.example")), Route::Direct);
}

#[test]
fn an_ipv6_proxy_is_dialled_without_brackets_and_shown_with_them() {
    let route = route("http://[2001:DB8::1]:3128", "https://a.example");
    let proxy = route.proxy().unwrap();
    assert_eq!((&**proxy.host(), proxy.port()), ("2001:db8::1", 3128));
    assert_eq!(proxy.to_string(), "[2001:db8::1]:3128");
}

#[test]
fn credentials_are_decoded_and_never_shown() {
    let url = format!("http://{ALADDIN}@p.example:3128");
    let proxies = all(&url);
    let plain = proxies.route(&uri("http://a.example"));
    let proxy = plain.proxy().unwrap();
    let authorization = proxy.authorization().unwrap();
    assert_eq!(authorization, ALADDIN_BASIC);
    assert!(authorization.is_sensitive());

    let socks = all(&format!("socks5://{ALADDIN}@p.example"));
    let socks_route = socks.route(&uri("http://a.example"));
    let socks_proxy = socks_route.proxy().unwrap();
    assert_eq!(
        socks_proxy.user_and_password(),
        Some(("Aladdin", "open sesame"))
    );
    assert_eq!(socks_proxy.authorization(), None);

    for text in [
        format!("{proxies:?} {plain:?} {proxy:?} {proxy}"),
        format!("{socks:?} {socks_route:?} {socks_proxy}"),
        format!("{:?}", Proxies::builder().http(&url).all(&url)),
    ] {
        for secret in ["Aladdin", "sesame", "QWxh"] {
            assert!(!text.contains(secret), "{text}");
        }
        assert!(text.contains("p.example"), "{text}");
    }
    // Two users of one proxy don't share connections.
    assert_ne!(plain, route("http://p.example:3128", "http://a.example"));
}

#[test]
fn a_bad_url_is_an_error_with_the_setting_the_value_and_the_way_out() {
    for (url, shown, help) in [
        ("", "", "it has no host"),
        ("http://", "http://", "it has no host"),
        ("http://:3128", "http://:3128", "it has no host"),
        ("http://u:pw@", "http://***@", "it has no host"),
        ("http://u:pw@:80", "http://***@:80", "it has no host"),
        ("http://@p", "http://***@p", "no user before the `@`"),
        ("ftp://p:21", "ftp://p:21", "a proxy is `http`"),
        ("socks://u:pw@p", "socks://***@p", "a proxy is `http`"),
        ("u:pw://p", "u:***", "a proxy is `http`"),
        ("http://p:0", "http://p:0", "from 1 to 65535"),
        ("http://p:65536", "http://p:65536", "from 1 to 65535"),
        ("http://p:99999", "http://p:99999", "from 1 to 65535"),
        ("http://p:", "http://p:", "from 1 to 65535"),
        ("http://p:+80", "http://p:***", "from 1 to 65535"),
        ("user:secret", "user:***", "from 1 to 65535"),
        ("http://user:secret", "http://user:***", "from 1 to 65535"),
        ("http://u:p@w@p:80", "http://***@p:80", "%40"),
        ("http://u:p/w@p:80", "http://***@p:80", "%2F"),
        ("http://u:80/w@p:80", "http://***@p:80", "%2F"),
        ("http://u:p#w@p:80", "http://***@p:80", "%23"),
        ("http://u:p w@p:80", "http://***@p:80", "percent-encode"),
        ("http://p/path", "http://p/path", "no path"),
        ("http://p?x", "http://p?x", "no path"),
        ("http://2001:db8::1", "http://2001:db8::1", "brackets"),
        ("http://[p]:80", "http://[p]:80", "brackets are for"),
        ("http://[::1:80", "http://[::1:80", "brackets are for"),
        ("http://[::1]80", "http://[::1]80", "from 1 to 65535"),
        ("http://p q", "http://p q", "in ASCII"),
        ("http://p\r\nX:1", "http://p\r\nX:1", "in ASCII"),
        ("http://bücher.example", "http://bücher.example", "xn--"),
        (" http://p", " http://p", "a proxy is `http`"),
        ("socks4://u:pw@p", "socks4://***@p", "no password"),
        ("socks4://u%00@p", "socks4://***@p", "NUL"),
    ] {
        let error = Proxies::builder().https(url).build().unwrap_err();
        assert_eq!(error.setting(), "https_proxy", "{url}");
        assert_eq!(error.value(), shown, "{url}");
        assert!(error.to_string().contains(help), "{url}: {error}");
    }
    let long = format!("socks5://{}:pw@p", "u".repeat(256));
    let error = Proxies::builder().all(long).build().unwrap_err();
    assert!(error.to_string().contains("255"), "{error}");
    assert_eq!(error.value(), "socks5://***@p");
}

#[test]
fn a_bad_no_proxy_entry_is_an_error_with_the_way_out() {
    for (list, entry, help) in [
        ("a.example, b.example:80", "b.example:80", "no port"),
        ("[::1]", "[::1]", "no brackets"),
        ("*.example.com", "*.example.com", "`*` stands alone"),
        ("10.0.0.0/33", "10.0.0.0/33", "a network is"),
        ("2001:db8::/129", "2001:db8::/129", "a network is"),
        ("10.0/8", "10.0/8", "a network is"),
        ("a.example b.example", "a.example b.example", "commas"),
        ("bücher.example", "bücher.example", "xn--"),
    ] {
        let error = Proxies::builder().no_proxy(list).build().unwrap_err();
        assert_eq!(error.setting(), "no_proxy");
        assert_eq!(error.value(), entry);
        assert!(error.to_string().contains(help), "{error}");
    }
}

#[test]
fn no_proxy_knows_domains_addresses_networks_and_the_star() {
    let direct = |list: &str, destination: &str| {
        let proxies = Proxies::builder()
            .all("http://p.example")
            .no_proxy(list)
            .build()
            .unwrap();
        proxies.route(&uri(destination)) == Route::Direct
    };
    let list = "localhost, .dotted.example,plain.example,192.0.2.7,10.1.0.0/16,::1,2001:db8::/32,";
    for destination in [
        "http://localhost:8080/",
        "https://dotted.example/",
        "https://a.dotted.example/",
        "https://PLAIN.example/",
        "https://a.b.plain.example/",
        "http://192.0.2.7/",
        "http://10.1.255.255/",
        "http://[::1]:80/",
        "https://[2001:db8:ffff::1]/",
    ] {
        assert!(direct(list, destination), "{destination}");
        assert!(!direct("", destination), "{destination}");
        // The star is for every host; in the matcher alone it misses the addresses.
        assert!(direct("*", destination), "{destination}");
        assert!(direct("x.example, *", destination), "{destination}");
    }
    for destination in [
        "http://other.example/",
        "https://notplain.example/",
        "https://plain.example.org/",
        "http://192.0.2.8/",
        "http://10.2.0.0/",
        "http://[::2]/",
        "https://[2001:db9::1]/",
    ] {
        assert!(!direct(list, destination), "{destination}");
    }
}

// === the environment ===

fn from_vars(vars: &[(&str, &str)]) -> Result<Proxies, ConfigError> {
    let vars: HashMap<_, _> = vars.iter().copied().collect();
    Proxies::from_vars(&|name| vars.get(name).map(OsString::from), |_, _, error| {
        Err(error)
    })
}

fn proxy_of(proxies: &Proxies, destination: &str) -> String {
    match proxies.route(&uri(destination)).proxy() {
        Some(proxy) => proxy.to_string(),
        None => "direct".to_owned(),
    }
}

type Vars = &'static [(&'static str, &'static str)];

/// Environments, and who is the proxy of `http://a.example` and of `https://a.example`.
const ENVIRONMENTS: &[(Vars, &str, &str)] = &[
    (&[], "direct", "direct"),
    (&[("HTTP_PROXY", "p:1")], "p:1", "direct"),
    (&[("http_proxy", "p:1")], "p:1", "direct"),
    (&[("HTTPS_PROXY", "p:1")], "direct", "p:1"),
    (&[("https_proxy", "http://p:1")], "direct", "p:1"),
    (&[("ALL_PROXY", "socks5h://p:1")], "p:1", "p:1"),
    (
        &[("all_proxy", "p:1"), ("https_proxy", "q:2")],
        "p:1",
        "q:2",
    ),
    // Upper case wins, even when it is empty.
    (
        &[("HTTP_PROXY", "up:1"), ("http_proxy", "low:1")],
        "up:1",
        "direct",
    ),
    (
        &[("HTTP_PROXY", ""), ("http_proxy", "low:1")],
        "direct",
        "direct",
    ),
    (
        &[("HTTP_PROXY", ""), ("ALL_PROXY", "all:1")],
        "all:1",
        "all:1",
    ),
    (
        &[("ALL_PROXY", "p:1"), ("NO_PROXY", "b.example")],
        "p:1",
        "p:1",
    ),
    (
        &[("ALL_PROXY", "p:1"), ("no_proxy", "example")],
        "direct",
        "direct",
    ),
    (
        &[
            ("ALL_PROXY", "p:1"),
            ("NO_PROXY", ""),
            ("no_proxy", "a.example"),
        ],
        "p:1",
        "p:1",
    ),
    (
        &[("ALL_PROXY", "p:1"), ("NO_PROXY", "*")],
        "direct",
        "direct",
    ),
    // Another program's dialect does no harm.
    (
        &[("ALL_PROXY", "p:1"), ("NO_PROXY", "*.b.example,[::1]:80")],
        "p:1",
        "p:1",
    ),
    (
        &[("REQUEST_METHOD", "GET"), ("ALL_PROXY", "p:1")],
        "direct",
        "direct",
    ),
    (
        &[("REQUEST_METHOD", ""), ("http_proxy", "p:1")],
        "direct",
        "direct",
    ),
];

#[test]
fn the_environment_is_read_in_the_matchers_order() {
    for (vars, http, https) in ENVIRONMENTS {
        let proxies = from_vars(vars).unwrap();
        assert_eq!(proxy_of(&proxies, "http://a.example"), *http, "{vars:?}");
        assert_eq!(proxy_of(&proxies, "https://a.example"), *https, "{vars:?}");
    }
}

#[test]
fn a_bad_variable_is_an_error_that_names_it() {
    for (vars, setting, value) in [
        (
            &[("HTTP_PROXY", "ftp://u:pw@p")][..],
            "HTTP_PROXY",
            "ftp://***@p",
        ),
        (
            &[("https_proxy", "http://p:0")],
            "https_proxy",
            "http://p:0",
        ),
        (
            &[("ALL_PROXY", "p:70000"), ("HTTP_PROXY", "p:1")],
            "ALL_PROXY",
            "p:70000",
        ),
    ] {
        let error = from_vars(vars).unwrap_err();
        assert_eq!((error.setting(), error.value()), (setting, value));
    }
    // In a CGI program a request's header must not be able to stop it.
    from_vars(&[("REQUEST_METHOD", "GET"), ("HTTP_PROXY", "ftp://p")]).unwrap();
}

/// Runs in a child process that [`the_process_environment_is_read_as_the_matcher_does`] starts.
/// By itself it is the child's part without the child's environment, and holds there too.
#[test]
fn child_with_an_environment() {
    let matcher = Matcher::from_env();
    let ours = Proxies::from_env();
    for destination in ["http://a.example", "https://a.example"] {
        let theirs = matcher.intercept(&uri(destination));
        let theirs = theirs.map_or_else(
            || "direct".to_owned(),
            |intercept| intercept.uri().authority().unwrap().to_string(),
        );
        assert_eq!(proxy_of(&ours, destination), theirs);
        println!("<{destination} {theirs}>");
    }
    println!("<strict {}>", Proxies::try_from_env().is_ok());
}

fn child(vars: &[(&str, &str)]) -> String {
    let path = module_path!().split_once("::").unwrap().1;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "--nocapture"])
        .arg(format!("{path}::child_with_an_environment"));
    for name in [HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY].concat() {
        command.env_remove(name);
    }
    command.env_remove("REQUEST_METHOD");
    let output = command.envs(vars.iter().copied()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{vars:?}: {text}");
    text
}

#[test]
fn the_process_environment_is_read_as_the_matcher_does() {
    for (vars, http, https) in ENVIRONMENTS {
        let text = child(vars);
        for line in [
            format!("<http://a.example {http}>"),
            format!("<https://a.example {https}>"),
            "<strict true>".to_owned(),
        ] {
            assert!(text.contains(&line), "{vars:?}: {text}");
        }
    }
    // Ignored by `from_env`, an error of `try_from_env`.
    let text = child(&[("ALL_PROXY", "ftp://p:21")]);
    assert!(text.contains("<http://a.example direct>"), "{text}");
    assert!(text.contains("<strict false>"), "{text}");
}

// === CONNECT ===

#[tokio::test]
async fn a_tunnel_leads_to_the_destination() {
    let (address, asked) =
        connect_proxy("127.0.0.1:0", b"HTTP/1.1 200 OK\r\n\r\n", echo().await).await;
    let route = route(&format!("http://{address}"), "https://a.example");
    assert_echoes(through(&route, "a.example", 443).await.unwrap()).await;
    assert_eq!(
        asked.await.unwrap(),
        "CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n"
    );
}

#[tokio::test]
async fn an_ipv6_proxy_tunnels_to_an_ipv6_destination() {
    let (address, asked) = connect_proxy("[::1]:0", b"HTTP/1.1 200 OK\r\n\r\n", echo().await).await;
    let route = route(&format!("http://{address}"), "https://[2001:db8::1]");
    // As `Uri::host` gives it.
    assert_echoes(through(&route, "[2001:db8::1]", 8443).await.unwrap()).await;
    let asked = asked.await.unwrap();
    assert!(asked.starts_with("CONNECT [2001:db8::1]:8443 HTTP/1.1\r\nHost: [2001:db8::1]:8443"));
}

#[tokio::test]
async fn a_tunnel_tells_the_proxy_who_we_are() {
    let (address, asked) =
        connect_proxy("127.0.0.1:0", b"HTTP/1.1 200 OK\r\n\r\n", echo().await).await;
    let route = route(&format!("http://{ALADDIN}@{address}"), "https://a.example");
    assert_echoes(through(&route, "a.example", 443).await.unwrap()).await;
    let line = format!("\r\nProxy-Authorization: {ALADDIN_BASIC}\r\n");
    assert!(asked.await.unwrap().contains(&line));
}

#[tokio::test]
async fn any_2xx_opens_a_tunnel_and_interim_answers_are_passed_over() {
    for answer in [
        b"HTTP/1.1 200 Connection established\r\nVia: x\r\nContent-Length: 5\r\n\r\n".as_slice(),
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200\r\n\r\n",
        b"HTTP/1.1 200 OK\n\n",
    ] {
        let (address, _asked) = connect_proxy("127.0.0.1:0", answer, echo().await).await;
        let route = route(&format!("http://{address}"), "https://a.example");
        assert_echoes(through(&route, "a.example", 443).await.unwrap()).await;
    }
    let (address, _) = serve(|mut stream| async move {
        head(&mut stream).await;
        let answer = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.0 200 OK\r\n\r\nhello";
        stream.write_all(answer).await.unwrap();
    })
    .await;
    let route = route(&format!("http://{address}"), "https://a.example");
    let mut stream = through(&route, "a.example", 443).await.unwrap();
    assert_eq!(&exactly::<5>(&mut stream).await, b"hello");
}

#[tokio::test]
async fn a_destination_that_speaks_first_is_heard() {
    const ANSWERS: &[(&str, &[&[u8]])] = &[
        ("http", &[b"HTTP/1.1 200 OK\r\n\r\nhello"]),
        ("socks4a", &[b"\0\x5a\0\0\0\0\0\0hello"]),
        ("socks5h", &[b"\x05\0", b"\x05\0\0\x03\x01x\0\x50hello"]),
    ];
    for (scheme, answers) in ANSWERS {
        let (address, _) = serve(move |mut stream| async move {
            for answer in *answers {
                let mut some = [0; 512];
                assert_ne!(stream.read(&mut some).await.unwrap(), 0);
                stream.write_all(answer).await.unwrap();
            }
        })
        .await;
        let route = route(&format!("{scheme}://{address}"), "https://a.example");
        let mut stream = through(&route, "a.example", 443).await.unwrap();
        assert_eq!(&exactly::<5>(&mut stream).await, b"hello", "{scheme}");
    }
}

#[tokio::test]
async fn an_answer_may_come_in_pieces_and_a_request_is_flushed() {
    let (address, _) = serve(|mut stream| async move {
        stream.set_nodelay(true).unwrap();
        head(&mut stream).await;
        for byte in b"HTTP/1.1 200 OK\r\n\r\n" {
            stream.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        join(stream, echo().await).await;
    })
    .await;
    let route = route(&format!("http://{address}"), "https://a.example");
    // Writes nothing until it is flushed, as TLS may.
    let stream = BufStream::new(TcpStream::connect(address).await.unwrap());
    assert_echoes(open(stream, &route, "a.example", 443).await.unwrap()).await;
}

#[tokio::test]
async fn a_407_asks_for_credentials_or_says_that_they_are_wrong() {
    for (userinfo, tried_one, help) in [
        ("", false, "write them into its URL"),
        ("Aladdin:sesame@", true, "did not accept"),
    ] {
        let answer = b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n";
        let (address, _asked) = connect_proxy("127.0.0.1:0", answer, echo().await).await;
        let route = route(&format!("http://{userinfo}{address}"), "https://a.example");
        let error = through(&route, "a.example", 443).await.unwrap_err();
        assert!(
            matches!(&error, ProxyError::AuthenticationRequired { proxy, tried }
                if *proxy == address.to_string() && *tried == tried_one),
            "{error:?}"
        );
        assert!(error.to_string().contains(help), "{error}");
        assert_no_secret(&error);
    }
}

#[tokio::test]
async fn a_refusal_tells_its_status() {
    for (answer, status) in [
        (
            b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno".as_slice(),
            403,
        ),
        (b"HTTP/1.0 502 Bad Gateway\r\n\r\n", 502),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", 302),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 101),
    ] {
        let (address, _asked) = connect_proxy("127.0.0.1:0", answer, echo().await).await;
        let route = route(&format!("http://{ALADDIN}@{address}"), "https://a.example");
        let error = through(&route, "a.example", 443).await.unwrap_err();
        let status = StatusCode::from_u16(status).unwrap();
        assert_eq!(error.reply(), Some(Reply::Http(status)), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(&address.to_string()), "{text}");
        assert!(text.contains("a.example:443"), "{text}");
        assert!(text.contains(status.as_str()), "{text}");
        assert_no_secret(&error);
    }
}

#[tokio::test]
async fn garbage_is_a_bad_answer() {
    let endless: &[u8] = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(10_000))
        .leak()
        .as_bytes();
    for (scheme, answer, shown) in [
        // It goes on waiting after that, and we don't.
        ("http", b"SSH-2.0-x\r\n".as_slice(), "SSH-2.0"),
        ("http", b"\x15\x03\x01\0\x02\x02\x46", r"\x15\x03\x01"),
        ("http", b"HTTP/2.0 200 OK\r\n\r\n", "HTTP/2."),
        ("http", b"HTTP/1.1 2000 OK\r\n\r\n", "HTTP/1.1 2000 OK"),
        ("http", b"HTTP/1.1 20\r\n\r\n", "HTTP/1.1 20"),
        ("http", b"HTTP/1.1 099 x\r\n\r\n", "HTTP/1.1 099"),
        ("http", b"HTTP/1.x 200 x\r\n\r\n", "HTTP/1.x"),
        ("http", endless, "longer than 8192 bytes"),
        ("socks4a", b"HTTP/1.1 400 Bad Request\r\n\r\n", "HT"),
        ("socks5h", b"HTTP/1.1 400 Bad Request\r\n\r\n", "HT"),
        // A method that nobody offered.
        ("socks5h", b"\x05\x01", r"\x05\x01"),
        ("socks5h", b"\x05\x02", r"\x05\x02"),
        ("socks5h", b"\x05\0\x04\0", r"\x04\x00"),
        ("socks5h", b"\x05\0\x05\0\0\x09", r"\x00\t"),
    ] {
        let (address, served) = serve(move |mut stream| async move {
            let mut some = [0; 512];
            assert_ne!(stream.read(&mut some).await.unwrap(), 0);
            // We may have hung up in the middle of the long one.
            let _ = stream.write_all(answer).await;
            // To the end, which is when we hang up.
            while stream.read(&mut some).await.is_ok_and(|n| n != 0) {}
        })
        .await;
        let route = route(&format!("{scheme}://{address}"), "https://a.example");
        let error = through(&route, "a.example", 443).await.unwrap_err();
        assert!(matches!(&error, ProxyError::BadAnswer { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(shown), "{text}");
        assert!(text.contains(&address.to_string()), "{text}");
        served.await.unwrap();
    }
}

#[tokio::test]
async fn a_proxy_that_closes_at_once_is_an_io_error_with_its_source() {
    for scheme in ["http", "socks4a", "socks5h"] {
        let (address, _) = serve(|mut stream| async move {
            let mut some = [0; 512];
            assert_ne!(stream.read(&mut some).await.unwrap(), 0);
        })
        .await;
        let route = route(&format!("{scheme}://{address}"), "https://a.example");
        let error = through(&route, "a.example", 443).await.unwrap_err();
        let source = error.source().unwrap().downcast_ref::<io::Error>().unwrap();
        assert_eq!(source.kind(), io::ErrorKind::UnexpectedEof);
        assert!(error.to_string().contains("it closed"), "{error}");
        assert!(error.to_string().contains(&address.to_string()), "{error}");
    }
}

#[tokio::test]
async fn giving_a_silent_proxy_up_closes_the_stream() {
    for scheme in ["http", "socks4a", "socks5h"] {
        let (tell, heard) = oneshot::channel();
        let (address, served) = serve(move |mut stream| async move {
            let mut some = [0; 512];
            assert_ne!(stream.read(&mut some).await.unwrap(), 0);
            tell.send(()).unwrap();
            stream.read(&mut some).await.unwrap()
        })
        .await;
        let route = route(&format!("{scheme}://{address}"), "https://a.example");
        tokio::select! {
            _ = through(&route, "a.example", 443) => panic!("nobody answered"),
            heard = heard => heard.unwrap(),
        }
        assert_eq!(served.await.unwrap(), 0, "{scheme}: the stream is closed");

        let (address, _served) = serve(|stream| async move {
            let _held = stream;
            std::future::pending::<()>().await;
        })
        .await;
        let route = self::route(&format!("{scheme}://{address}"), "https://a.example");
        let late = through(&route, "a.example", 443);
        tokio::time::timeout(Duration::from_millis(20), late)
            .await
            .unwrap_err();
    }
}

#[tokio::test]
async fn a_host_can_not_say_something_of_its_own() {
    for scheme in ["http", "socks4a", "socks5h"] {
        for host in ["", "a b", "a\r\nX: 1", "a\0b", "bücher"] {
            let (io, mut proxy) = tokio::io::duplex(64);
            let route = route(&format!("{scheme}://p.example"), "https://a.example");
            let error = open(io, &route, host, 443).await.unwrap_err();
            assert!(matches!(error, ProxyError::Unsupported { .. }), "{error:?}");
            assert_eq!(
                proxy.read(&mut [0; 8]).await.unwrap(),
                0,
                "nothing was sent"
            );
        }
    }
}

// === SOCKS ===

#[tokio::test]
async fn socks4_and_4a_lead_to_the_destination() {
    for (scheme, userinfo, host, asked_for) in [
        ("socks4a", "", "a.example", "a.example"),
        ("socks4a", "Ali@", "192.0.2.1", "192.0.2.1"),
        ("socks4", "Ali@", "localhost", "127.0.0.1"),
    ] {
        let (address, asked) = socks4_proxy(echo().await).await;
        let url = format!("{scheme}://{userinfo}{address}");
        let route = route(&url, "http://a.example");
        assert_echoes(through(&route, host, 8080).await.unwrap()).await;
        let expected = Asked {
            host: asked_for.to_owned(),
            port: 8080,
            user: userinfo.trim_end_matches('@').to_owned(),
            password: String::new(),
        };
        assert_eq!(asked.await.unwrap(), expected);
    }
}

#[tokio::test]
async fn socks4_refuses_with_its_reply_and_has_no_ipv6() {
    let (address, _asked) = socks4_proxy(echo().await).await;
    let wrong = route(&format!("socks4a://sesame@{address}"), "http://a.example");
    let error = through(&wrong, "a.example", 80).await.unwrap_err();
    assert_eq!(error.reply(), Some(Reply::Socks4(93)));
    assert!(error.to_string().contains("another user"), "{error}");
    assert_no_secret(&error);

    let (io, _proxy) = tokio::io::duplex(64);
    let error = open(io, &wrong, "[2001:db8::1]", 80).await.unwrap_err();
    assert!(error.to_string().contains("use `socks5://`"), "{error}");
    assert!(error.to_string().contains("[2001:db8::1]:80"), "{error}");
}

#[tokio::test]
async fn socks5_leads_to_names_and_addresses() {
    for (scheme, host, asked_for) in [
        ("socks5h", "a.example", &["a.example"][..]),
        ("socks5h", "192.0.2.1", &["192.0.2.1"]),
        ("socks5h", "[2001:db8::1]", &["2001:db8::1"]),
        ("socks5", "2001:db8::1", &["2001:db8::1"]),
        ("socks5", "localhost", &["127.0.0.1", "::1"]),
    ] {
        let (address, asked) = socks5_proxy(None, GRANTED, echo().await).await;
        let route = route(&format!("{scheme}://{address}"), "http://a.example");
        assert_echoes(through(&route, host, 8080).await.unwrap()).await;
        let asked = asked.await.unwrap().unwrap();
        assert!(asked_for.contains(&&*asked.host), "{asked:?}");
        assert_eq!(asked.port, 8080);
    }
}

#[tokio::test]
async fn socks5_takes_every_form_of_bound_address() {
    for reply in [
        b"\x05\0\0\x03\0\0\x50".as_slice(),
        b"\x05\0\0\x03\x09a.example\0\x50",
        b"\x05\0\0\x04AAAABBBBCCCCDDDD\0\x50",
    ] {
        let (address, _asked) = socks5_proxy(None, reply, echo().await).await;
        let route = route(&format!("socks5h://{address}"), "http://a.example");
        assert_echoes(through(&route, "a.example", 80).await.unwrap()).await;
    }
}

#[tokio::test]
async fn socks5_logs_in_with_the_right_password_only() {
    let login = Some(("Aladdin", "open sesame"));
    let (address, asked) = socks5_proxy(login, GRANTED, echo().await).await;
    let right = route(
        &format!("socks5h://{ALADDIN}@{address}"),
        "http://a.example",
    );
    assert_echoes(through(&right, "a.example", 80).await.unwrap()).await;
    let asked = asked.await.unwrap().unwrap();
    assert_eq!((&*asked.user, &*asked.password), ("Aladdin", "open sesame"));

    for (userinfo, help) in [
        ("Aladdin:wrong-sesame@", "did not accept"),
        ("", "write them into its URL"),
    ] {
        let (address, _asked) = socks5_proxy(login, GRANTED, echo().await).await;
        let wrong = route(
            &format!("socks5h://{userinfo}{address}"),
            "http://a.example",
        );
        let error = through(&wrong, "a.example", 80).await.unwrap_err();
        assert!(
            matches!(error, ProxyError::AuthenticationRequired { .. }),
            "{error:?}"
        );
        assert!(error.to_string().contains(help), "{error}");
        assert_no_secret(&error);
    }

    // A proxy that wants no password takes one who has one.
    let (address, _asked) = socks5_proxy(None, GRANTED, echo().await).await;
    let open_door = route(
        &format!("socks5h://{ALADDIN}@{address}"),
        "http://a.example",
    );
    assert_echoes(through(&open_door, "a.example", 80).await.unwrap()).await;
}

#[tokio::test]
async fn socks5_takes_the_longest_user_password_and_host_together() {
    let long: &'static str = "x".repeat(255).leak();
    let (address, asked) = socks5_proxy(Some((long, long)), GRANTED, echo().await).await;
    let route = route(
        &format!("socks5h://{long}:{long}@{address}"),
        "http://a.example",
    );
    assert_echoes(through(&route, long, 80).await.unwrap()).await;
    assert_eq!(asked.await.unwrap().unwrap().host, long);

    let (io, _proxy) = tokio::io::duplex(64);
    let error = open(io, &route, &"x".repeat(256), 80).await.unwrap_err();
    assert!(error.to_string().contains("longer than 255"), "{error}");
}

#[tokio::test]
async fn socks5_refuses_with_its_reply_even_when_it_is_cut_short() {
    for (reply, code, text) in [
        (b"\x05\x02\0\x01\0\0\0\0\0\0".as_slice(), 2, "not allowed"),
        (b"\x05\x05\0\x01\0\0\0\0\0\0", 5, "connection refused"),
        (b"\x05\x04", 4, "host unreachable"),
        (b"\x05\xf0\0\x01\0\0\0\0\0\0", 0xf0, "reply 240, unknown"),
    ] {
        let (address, _asked) = socks5_proxy(None, reply, echo().await).await;
        let route = route(&format!("socks5h://{address}"), "http://a.example");
        let error = through(&route, "a.example", 80).await.unwrap_err();
        assert_eq!(error.reply(), Some(Reply::Socks5(code)));
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[tokio::test]
async fn a_name_that_is_not_there_is_an_error_of_the_look_up() {
    for scheme in ["socks4", "socks5"] {
        let (io, _proxy) = tokio::io::duplex(64);
        let route = route(&format!("{scheme}://p.example"), "http://a.example");
        // A label is too long, so that no resolver need be asked.
        let error = open(io, &route, &"x".repeat(64), 80).await.unwrap_err();
        assert!(matches!(error, ProxyError::Resolve { .. }), "{error:?}");
        assert!(error.source().is_some());
        assert!(error.to_string().contains("`socks5h://`"), "{error}");
    }
}

// === forwarding ===

#[tokio::test]
async fn a_forwarded_request_goes_out_in_absolute_form_with_our_credentials() {
    let (address, served) = serve(|mut stream| async move {
        let head = head(&mut stream).await;
        let answer = b"HTTP/1.1 204 No Content\r\n\r\n";
        stream.write_all(answer).await.unwrap();
        head
    })
    .await;
    let destination = uri("http://user:pw@a.example:8080/path?query");
    let route = route(&format!("http://{ALADDIN}@{address}"), "http://a.example");
    let mut request = Request::get(destination)
        .header(HOST, "a.example:8080")
        .body(http_body_util::Empty::<bytes::Bytes>::new())
        .unwrap();
    route.forward_request(&mut request);
    assert!(request.headers()[PROXY_AUTHORIZATION].is_sensitive());

    let stream = TcpStream::connect(address).await.unwrap();
    let stream = open(stream, &route, "a.example", 8080).await.unwrap();
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::NO_CONTENT);

    let head = served.await.unwrap().to_ascii_lowercase();
    assert!(
        head.starts_with("get http://a.example:8080/path?query http/1.1\r\n"),
        "{head}"
    );
    let line = format!("\r\nproxy-authorization: {ALADDIN_BASIC}\r\n").to_ascii_lowercase();
    assert!(head.contains(&line), "{head}");
    assert!(head.contains("\r\nhost: a.example:8080\r\n"), "{head}");
}

#[test]
fn only_a_forwarding_proxy_gets_credentials_in_a_request() {
    for url in ["http", "https", "socks4a", "socks5", "socks5h"] {
        let userinfo = if url == "socks4a" { "Ali" } else { ALADDIN };
        let url = format!("{url}://{userinfo}@p.example");
        let secure = route(&url, "https://a.example");
        let mut request = Request::get("https://a.example/").body(()).unwrap();
        secure.forward_request(&mut request);
        assert!(request.headers().is_empty(), "{url}");
    }

    let plain = route(&format!("http://{ALADDIN}@p.example"), "http://a.example");
    let mut request = Request::get("http://a.example/")
        .header(PROXY_AUTHORIZATION, "Bearer mine")
        .header(AUTHORIZATION, "Bearer theirs")
        .body(())
        .unwrap();
    plain.forward_request(&mut request);
    assert_eq!(request.headers()[PROXY_AUTHORIZATION], "Bearer mine");
    assert_eq!(request.headers()[AUTHORIZATION], "Bearer theirs");
    assert_eq!(request.uri(), "http://a.example/");
}

#[tokio::test]
async fn without_a_handshake_nothing_is_said() {
    for route in [Route::Direct, route("http://p.example", "http://a.example")] {
        let (io, mut proxy) = tokio::io::duplex(64);
        // Any thread may run it.
        let opened = tokio::spawn(async move { open(io, &route, "a.example", 80).await });
        drop(opened.await.unwrap().unwrap());
        assert_eq!(proxy.read(&mut [0; 8]).await.unwrap(), 0);
    }
}
