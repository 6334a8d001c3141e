//! Proxies, from code and from the environment.

use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Version};
use http_body_util::Empty;
use otel_conntrack::{Conntrack, FailureReason, HttpVersions, TransportError, TransportErrorKind};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::hostile::{Behaviour, Hostile};
use super::peers::Answers;
use super::proxy::{Kind, OK, Proxy};
use super::{ask, child, get, site, text, transport};

const BASIC: &str = "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==";
const ALADDIN: &str = "Aladdin:open%20sesame";

/// A server for these names, with ALPN, and a client that trusts it.
fn pair(names: &[&str], alpn: &[&str]) -> (Arc<ServerConfig>, ClientConfig) {
    let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    let chain = vec![made.cert.der().clone()];
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let mut roots = RootCertStore::empty();
    roots.add(chain[0].clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut server = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from(key))
        .unwrap();
    server.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    (Arc::new(server), client)
}

#[track_caller]
fn has_no_secret(error: &TransportError) {
    for text in [
        error.to_string(),
        format!("{error:?}"),
        format!("{:?}", error.kind()),
    ] {
        for secret in ["Aladdin", "sesame", "QWxh"] {
            assert!(!text.contains(secret), "{text}");
        }
    }
}

#[tokio::test]
async fn a_forwarding_proxy_serves_all_hosts_on_one_connection() {
    let proxy = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) =
        transport(|t| t.http_proxy(format!("http://{ALADDIN}@{}", proxy.address)));
    for url in ["http://a.test/x", "http://u:p@b.test:81/y"] {
        assert_eq!(ask(&transport, url).await, "ok");
    }
    assert_eq!(proxy.accepted(), 1);
    let heads: Vec<_> = proxy.seen().into_iter().map(|seen| seen.head).collect();
    assert!(
        heads[0].starts_with("GET http://a.test/x HTTP/1.1\r\n"),
        "{}",
        heads[0]
    );
    assert!(heads[0].contains("\r\nhost: a.test\r\n"), "{}", heads[0]);
    assert!(
        heads[1].starts_with("GET http://b.test:81/y HTTP/1.1\r\n"),
        "{}",
        heads[1]
    );
    assert!(heads[1].contains("\r\nhost: b.test:81\r\n"), "{}", heads[1]);
    for head in heads {
        assert!(
            head.contains(&format!("\r\nproxy-authorization: {BASIC}\r\n")),
            "{head}"
        );
    }
    let stats = transport.stats();
    assert_eq!((stats.idle, stats.hosts.len()), (1, 1));
    let target = stats.hosts[0].target.as_ref().unwrap().to_string();
    assert_eq!(target, proxy.address.to_string());
}

#[tokio::test]
async fn a_407_of_a_forwarding_proxy_is_an_answer() {
    let proxy = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) = transport(|t| t.http_proxy(format!("http://{}", proxy.address)));
    let response = transport.send(get("http://a.test/407")).await.unwrap();
    assert_eq!(response.status(), 407);
}

#[tokio::test]
async fn a_tunnel_belongs_to_its_host_and_speaks_what_the_host_does() {
    for (alpn, version) in [
        (&["h2", "http/1.1"][..], Version::HTTP_2),
        (&["http/1.1"], Version::HTTP_11),
    ] {
        let (server, trust) = pair(&["a.test", "b.test"], alpn);
        let destination = site::tls(server).await;
        let proxy = Proxy::start(OK, destination).await;
        let told = super::told::Told::default();
        let (_conntrack, transport) = transport(|t| {
            t.https_proxy(format!("http://{ALADDIN}@{}", proxy.address))
                .tls(trust)
                .observer(told.clone())
        });
        for url in [
            "https://a.test/",
            "https://b.test:444/",
            "https://a.test/again",
        ] {
            let response = transport.send(get(url)).await.unwrap();
            assert_eq!(response.version(), version);
            let snapshot = response.body().connection().snapshot();
            assert_eq!(
                snapshot.peer.unwrap().to_string(),
                proxy.address.to_string()
            );
            assert!(snapshot.tls.is_some());
            assert!(text(response.into_body()).await.starts_with("GET "));
        }
        let asked = proxy.asked();
        assert_eq!(asked.len(), 2, "{asked:?}");
        assert!(
            asked[0].starts_with("CONNECT a.test:443 HTTP/1.1\r\n"),
            "{}",
            asked[0]
        );
        assert!(
            asked[1].starts_with("CONNECT b.test:444 HTTP/1.1\r\n"),
            "{}",
            asked[1]
        );
        assert!(asked[0].contains(BASIC));
        let key = told.all()[0].key.clone();
        let via = format!("https://a.test:443 via http://{}", proxy.address);
        assert_eq!(key.to_string(), via);
    }
}

#[tokio::test]
async fn tls_goes_through_tls_to_the_proxy() {
    let (server, trust) = pair(&["a.test", "127.0.0.1"], &["h2", "http/1.1"]);
    let destination = site::tls(server.clone()).await;
    // It would take h2 as well, and must not be asked to.
    let proxy = Proxy::start_with(OK, destination, Some(server.clone())).await;
    let (_conntrack, over_tls) = transport(|t| {
        t.all_proxy(format!("https://{}", proxy.address))
            .tls(trust.clone())
    });
    let response = over_tls.send(get("https://a.test/")).await.unwrap();
    assert_eq!(response.version(), Version::HTTP_2);
    assert!(
        text(response.into_body())
            .await
            .starts_with("GET https://a.test/")
    );

    // Plain http is forwarded over TLS to the proxy.
    let forward = site::tls(server).await;
    let (_conntrack, transport) =
        transport(|t| t.all_proxy(format!("https://{forward}")).tls(trust));
    let head = ask(&transport, "http://b.test/x").await;
    assert!(head.starts_with("GET http://b.test/x HTTP/1\n"), "{head}");
}

#[tokio::test]
async fn socks_proxies_are_told_a_name_or_an_address_as_their_scheme_says() {
    let destination = site::plain().await;
    let local = || Answers::new(&["127.0.0.9"]);
    for (scheme, user, kind, asked) in [
        ("socks5", "", Kind::Socks5(0), "socks5 @127.0.0.9:80"),
        (
            "socks5",
            "Ali:pw@",
            Kind::Socks5(0),
            "socks5 Ali:pw@127.0.0.9:80",
        ),
        ("socks5h", "", Kind::Socks5(0), "socks5 @a.test:80"),
        ("socks4", "", Kind::Socks4, "socks4 @127.0.0.9:80"),
        ("socks4a", "Ali@", Kind::Socks4, "socks4 Ali@a.test:80"),
    ] {
        for versions in [HttpVersions::Auto, HttpVersions::Http2] {
            let proxy = Proxy::start(kind, destination).await;
            let (_conntrack, transport) = transport(|t| {
                t.all_proxy(format!("{scheme}://{user}{}", proxy.address))
                    .resolver(local())
                    .http_versions(versions)
            });
            for _ in 0..2 {
                let head = ask(&transport, "http://a.test/x").await;
                if versions == HttpVersions::Http2 {
                    assert!(head.starts_with("GET http://a.test/x HTTP/2\n"), "{head}");
                } else {
                    assert!(head.starts_with("GET /x HTTP/1\nhost: a.test\n"), "{head}");
                }
            }
            assert_eq!(proxy.asked(), [asked], "{scheme}");
        }
    }
}

#[tokio::test]
async fn a_proxy_that_refuses_is_a_dial_error_that_says_so_without_credentials() {
    let (server, trust) = pair(&["a.test"], &[]);
    let destination = site::tls(server).await;
    for (scheme, kind, words) in [
        (
            "http",
            Kind::Connect("407 Proxy Authentication Required"),
            ["did not accept", "user"],
        ),
        (
            "http",
            Kind::Connect("403 Forbidden"),
            ["403", "a.test:443"],
        ),
        ("socks5h", Kind::Socks5(2), ["not allowed", "a.test:443"]),
    ] {
        let proxy = Proxy::start(kind, destination).await;
        let (conntrack, transport) = transport(|t| {
            t.all_proxy(format!("{scheme}://{ALADDIN}@{}", proxy.address))
                .tls(trust.clone())
        });
        let error = transport.send(get("https://a.test/")).await.unwrap_err();
        assert!(
            matches!(error.kind(), TransportErrorKind::Dial(_)),
            "{error:?}"
        );
        assert_eq!(error.reason(), FailureReason::AccessDenied, "{error}");
        assert!(!error.is_sent() && !error.is_timeout());
        let text = error.to_string();
        for word in words {
            assert!(text.contains(word), "{text}");
        }
        assert!(text.contains(&proxy.address.to_string()), "{text}");
        has_no_secret(&error);
        assert_eq!(conntrack.stats().open(), 0);
        assert_eq!(transport.stats().dialing, 0);
    }
}

#[tokio::test]
async fn hosts_in_no_proxy_are_asked_directly() {
    let destination = site::plain().await;
    let proxy = Proxy::start(Kind::Socks5(0), destination).await;
    let (_conntrack, transport) = transport(|t| {
        t.all_proxy(format!("socks5h://{}", proxy.address))
            .no_proxy("localhost, 127.0.0.0/8")
    });
    let url = format!("http://{destination}/");
    assert!(ask(&transport, &url).await.starts_with("GET / "));
    assert!(proxy.asked().is_empty());
    assert!(
        ask(&transport, "http://a.test/")
            .await
            .starts_with("GET / ")
    );
    assert_eq!(proxy.asked().len(), 1);
}

#[tokio::test]
async fn a_bad_proxy_is_an_error_of_the_builder_without_credentials() {
    let conntrack = Conntrack::builder().build().unwrap();
    let built = conntrack
        .transport("x")
        .http_proxy("ftp://Aladdin:sesame@p")
        .build();
    let text = built.unwrap_err().to_string();
    assert!(text.contains("http") && !text.contains("sesame"), "{text}");
}

#[tokio::test]
async fn connect_goes_to_a_forwarding_proxy_with_credentials_and_a_port() {
    let proxy = Hostile::start(Behaviour::Ok).await;
    let (_conntrack, transport) =
        transport(|t| t.http_proxy(format!("http://{ALADDIN}@{}", proxy.address)));
    let request = Request::builder()
        .method(Method::CONNECT)
        .uri("http://u:p@a.test")
        .body(Empty::<bytes::Bytes>::new());
    let response = transport.send(request.unwrap()).await.unwrap();
    assert_eq!(response.status(), 200);
    let head = &proxy.seen()[0].head;
    assert!(head.starts_with("CONNECT a.test:80 HTTP/1.1\r\n"), "{head}");
    assert!(head.contains(BASIC), "{head}");
}

#[test]
fn the_environment_names_the_proxies() {
    const THIS: &str = "proxies::the_environment_names_the_proxies";
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    if child::role().is_some() {
        // The child: asks for both hosts.
        return runtime.block_on(async {
            let conntrack = Conntrack::builder().build().unwrap();
            let transport = match conntrack.transport("x").build() {
                Ok(transport) => transport,
                Err(error) => return println!("<{error}>"),
            };
            let direct = std::env::var("DIRECT").unwrap();
            for url in ["http://a.test/x", &direct] {
                println!("<{}>", ask(&transport, url).await);
            }
            let quiet = conntrack.transport("y").no_env_proxy();
            let error = quiet
                .resolver(Answers::new(&["127.0.0.1"]))
                .build()
                .unwrap()
                .send(get("http://a.test:1/"))
                .await
                .unwrap_err();
            println!("<{}>", error.reason());
        });
    }
    let (proxy, direct) = runtime.block_on(async { (site::plain().await, site::plain().await) });
    // Their tasks need a thread that runs them.
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let served = std::thread::spawn(move || runtime.block_on(stopped));
    let bound = Duration::from_secs(30);
    let direct = format!("http://{direct}/y");
    let variables = [
        ("http_proxy", format!("http://{proxy}")),
        ("no_proxy", "127.0.0.1".to_owned()),
        ("DIRECT", direct.clone()),
    ];
    let variables: Vec<_> = variables
        .iter()
        .map(|(name, value)| (*name, &**value))
        .collect();
    let told = child::run(THIS, "client", &variables, bound).well().stdout;
    assert!(told.contains("<GET http://a.test/x HTTP/1\n"), "{told}");
    assert!(told.contains("<GET /y HTTP/1\n"), "{told}");
    assert!(told.contains("<connection_refused>"), "{told}");

    let bad = [("ALL_PROXY", "ftp://u:secret@p"), ("DIRECT", &direct)];
    let told = child::run(THIS, "client", &bad, bound).well().stdout;
    assert!(
        told.contains("ALL_PROXY") && !told.contains("secret"),
        "{told}"
    );
    let _ = stop.send(());
    let _ = served.join();
}
