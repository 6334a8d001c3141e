//! Set-up: phases, failures, proxies, attribution.

use std::sync::Arc;

use opentelemetry_sdk::trace::SpanData;
use otel_conntrack::stock::{ConnectEvents, DnsTimer};
use otel_conntrack::{FailureReason, ReqwestBuilderExt, names};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tracing::Dispatch;
use tracing_subscriber::layer::SubscriberExt;

use super::support::otel::{Spans, attribute, is_child, is_root};
use super::support::peers::{dialer, failures, watched};
use super::support::tls;
use super::support::web::{Web, text};
use super::{Hosts, plain, traced};

/// This thread hears hyper-util's connector.
fn listening() -> tracing::subscriber::DefaultGuard {
    tracing::dispatcher::set_default(&subscriber())
}

fn subscriber() -> Dispatch {
    Dispatch::new(tracing_subscriber::registry().with(ConnectEvents::layer()))
}

fn names_of(spans: &[SpanData]) -> Vec<String> {
    let mut names: Vec<_> = spans.iter().map(|span| span.name.to_string()).collect();
    names.sort();
    names
}

#[track_caller]
fn within(parent: &SpanData, children: &[&SpanData]) {
    for child in children {
        assert!(is_child(child, parent), "{child:#?}");
        assert!(child.start_time >= parent.start_time, "{child:#?}");
        assert!(child.end_time <= parent.end_time, "{child:#?}");
        assert!(child.start_time <= child.end_time, "{child:#?}");
    }
}

/// Accepts one connection at a time, with TLS, and answers every request on it.
async fn tls_server(name: &str) -> (u16, Arc<rustls::ClientConfig>) {
    let (server, trust) = tls::pair(name);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let acceptor = tokio_rustls::TlsAcceptor::from(server);
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            if let Ok(stream) = acceptor.accept(stream).await {
                tokio::spawn(answer(stream));
            }
        }
    });
    (port, trust)
}

/// HTTP/1.1, to whatever ends like a request without content.
async fn answer<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin>(mut stream: T) {
    let mut got = Vec::new();
    while let Ok(1..) = stream.read_buf(&mut got).await {
        if got.ends_with(b"\r\n\r\n") {
            got.clear();
            let head = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi";
            if stream.write_all(head).await.is_err() {
                return;
            }
        }
    }
}

#[tokio::test]
async fn look_up_each_address_and_tls_are_phases_of_the_set_up() {
    let _listening = listening();
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let (port, trust) = tls_server("shop.test").await;
    // Nobody listens on the first one.
    let hosts = Hosts::default().with("shop.test", &["127.0.0.2", "127.0.0.1"]);
    let client = plain()
        .tls_backend_preconfigured((*trust).clone())
        .tls_info(true)
        .dns_resolver(DnsTimer::new(hosts))
        .conntrack(&conntrack, "shop")
        .unwrap()
        .build()
        .unwrap();
    let url = format!("https://shop.test:{port}/");
    assert_eq!(
        client.get(url).send().await.unwrap().text().await.unwrap(),
        "hi"
    );

    let set_up = spans.one("connection_setup");
    assert!(is_root(&set_up));
    assert_eq!(set_up.name, format!("connection_setup shop.test:{port}"));
    let live = conntrack.connections();
    assert_eq!(live.len(), 1);
    for (key, value) in [
        (names::CONNECTION_ID, live[0].id.to_string()),
        (names::NAME, "shop".into()),
        (names::SERVER_ADDRESS, "shop.test".into()),
        (names::SERVER_PORT, port.to_string()),
        (names::URL_SCHEME, "https".into()),
        (names::PEER_ADDRESS, "127.0.0.1".into()),
        (names::PEER_PORT, port.to_string()),
        (names::TLS_VERSION, "1.3".into()),
    ] {
        assert_eq!(attribute(&set_up, key), Some(value), "{key}");
    }
    let dns = spans.one("dns lookup shop.test");
    let first = spans.one("tcp connect 127.0.0.2");
    let second = spans.one("tcp connect 127.0.0.1");
    let tls = spans.one("tls handshake shop.test");
    within(&set_up, &[&dns, &first, &second, &tls]);
    let told = attribute(&dns, names::DNS_ANSWERS);
    assert_eq!(told.as_deref(), Some(r#"["127.0.0.2","127.0.0.1"]"#));
    let told = attribute(&first, names::ERROR_TYPE);
    assert_eq!(told.as_deref(), Some("connection_refused"));
    assert_eq!(attribute(&second, names::ERROR_TYPE), None);
    assert!(dns.end_time <= first.start_time && first.end_time <= second.start_time);
    assert!(second.end_time <= tls.start_time);
    assert_eq!(spans.all().len(), 5);
}

#[tokio::test]
async fn what_nobody_hears_is_no_phase() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let address = Web::answering(|_| text("hi")).await;
    // Neither the layer nor a timed resolver: the application's own resolver is asked as before.
    let hosts = Hosts::default().with("shop.test", &["127.0.0.1"]);
    let client = plain()
        .dns_resolver(hosts)
        .conntrack(&conntrack, "shop")
        .unwrap()
        .build()
        .unwrap();
    let url = format!("http://shop.test:{}/", address.port());
    client.get(url).send().await.unwrap();
    let expected = [format!("connection_setup shop.test:{}", address.port())];
    assert_eq!(names_of(&spans.all()), expected);
}

#[tokio::test]
async fn each_failure_has_its_reason_and_ends_the_phase_that_failed() {
    let _listening = listening();
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = closed.local_addr().unwrap();
    drop(closed);
    let (tls_port, _) = tls_server("shop.test").await;
    let hosts = Hosts::default().with("shop.test", &["127.0.0.1"]);
    // A client that trusts somebody else.
    let (_, stranger) = tls::pair("shop.test");
    let client = plain()
        .tls_backend_preconfigured((*stranger).clone())
        .dns_resolver(DnsTimer::new(hosts))
        .conntrack(&conntrack, "shop")
        .unwrap()
        .build()
        .unwrap();
    for (url, phase, reason) in [
        (
            format!("http://{nobody}/"),
            "tcp connect",
            "connection_refused",
        ),
        (
            format!("https://shop.test:{tls_port}/"),
            "tls handshake",
            "tls_certificate_invalid",
        ),
        (
            "http://nowhere.test/".into(),
            "dns lookup",
            "host_not_found",
        ),
    ] {
        let before = spans.all().len();
        client.get(&url).send().await.unwrap_err();
        let new = spans.all().split_off(before);
        let set_up = new
            .iter()
            .find(|span| span.name.starts_with("connection_setup"));
        let set_up = set_up.unwrap();
        let told = attribute(set_up, names::ERROR_TYPE);
        assert_eq!(told.as_deref(), Some(reason), "{url}");
        let phase = new
            .iter()
            .find(|span| span.name.starts_with(phase))
            .unwrap();
        let told = attribute(phase, names::ERROR_TYPE);
        assert_eq!(told.as_deref(), Some(reason), "{url}");
    }
    let stats = dialer(&conntrack, "shop");
    assert_eq!((stats.attempts, stats.established, stats.open), (3, 0, 0));
}

#[tokio::test]
async fn a_connect_that_is_given_up_is_cancelled() {
    let (conntrack, mut events) = watched();
    // It accepts and says nothing, so TLS never gets an answer.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/", silent.local_addr().unwrap());
    let (_, trust) = tls::pair("shop.test");
    let client = plain()
        .tls_backend_preconfigured((*trust).clone())
        .conntrack(&conntrack, "shop")
        .unwrap()
        .build()
        .unwrap();
    let request = tokio::spawn(client.get(url).send());
    let (_stream, _) = silent.accept().await.unwrap();
    assert_eq!(dialer(&conntrack, "shop").connecting, 1);
    request.abort();
    events.until("SetupFailed").await;
    let stats = dialer(&conntrack, "shop");
    assert_eq!((stats.connecting, stats.open), (0, 0));
    assert_eq!(failures(&stats), [(FailureReason::Cancelled.as_str(), 1)]);
}

/// Many connects at a time, on several threads, to hosts of many names: what is under a set-up is
/// its own.
#[test]
fn what_is_seen_belongs_to_the_right_set_up() {
    const HOSTS: usize = 32;
    let of_threads = subscriber();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .on_thread_start(move || {
            // For as long as the thread lives.
            std::mem::forget(tracing::dispatcher::set_default(&of_threads));
        })
        .build()
        .unwrap();
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    runtime.block_on(async {
        let mut hosts = Hosts::default();
        let mut urls = Vec::new();
        for n in 0..HOSTS {
            let ip = format!("127.0.1.{}", n + 1);
            let listener = TcpListener::bind((ip.as_str(), 0)).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(answer(stream));
                }
            });
            hosts = hosts.with(&format!("host{n}.test"), &[&ip]);
            urls.push(format!("http://host{n}.test:{port}/"));
        }
        let client = plain()
            .dns_resolver(DnsTimer::new(hosts))
            .pool_max_idle_per_host(0)
            .conntrack(&conntrack, "many")
            .unwrap()
            .build()
            .unwrap();
        let mut requests = JoinSet::new();
        for _ in 0..8 {
            for url in urls.clone() {
                let client = client.clone();
                requests.spawn(async move { client.get(url).send().await.unwrap().text().await });
            }
        }
        while let Some(done) = requests.join_next().await {
            assert_eq!(done.unwrap().unwrap(), "hi");
        }
    });
    let all = spans.all();
    let mut seen = 0;
    for set_up in all
        .iter()
        .filter(|s| s.name.starts_with("connection_setup"))
    {
        let host = attribute(set_up, names::SERVER_ADDRESS).unwrap();
        let n: usize = host
            .strip_prefix("host")
            .unwrap()
            .strip_suffix(".test")
            .unwrap()
            .parse()
            .unwrap();
        let under: Vec<_> = all.iter().filter(|span| is_child(span, set_up)).collect();
        let under: Vec<_> = under
            .into_iter()
            .filter(|span| !span.name.starts_with("connection "))
            .cloned()
            .collect();
        let names = names_of(&under);
        assert_eq!(names.len(), 2, "{names:?}");
        assert_eq!(names[0], format!("dns lookup {host}"));
        assert!(
            names[1].starts_with(&format!("tcp connect 127.0.1.{}:", n + 1)),
            "{names:?}"
        );
        seen += 1;
    }
    assert_eq!(seen, HOSTS * 8);
}

/// A proxy that forwards and tunnels.
async fn proxy() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut got = Vec::new();
                while !got.ends_with(b"\r\n\r\n") {
                    if stream.read_buf(&mut got).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                let head = String::from_utf8(got).unwrap();
                let Some(target) = head.strip_prefix("CONNECT ") else {
                    let body = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nvia";
                    stream.write_all(body).await.unwrap();
                    let _ = stream.read_buf(&mut Vec::new()).await;
                    return;
                };
                let target = target.split(' ').next().unwrap();
                let port = target.rsplit(':').next().unwrap().parse::<u16>().unwrap();
                let mut origin = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut origin).await;
            });
        }
    });
    address
}

#[tokio::test]
async fn through_a_proxy_the_peer_is_the_proxy_and_no_tls_time_is_guessed() {
    let _listening = listening();
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let proxy = proxy().await;
    let (port, trust) = tls_server("shop.test").await;
    let client = plain()
        .proxy(reqwest::Proxy::all(format!("http://{proxy}")).unwrap())
        .tls_backend_preconfigured((*trust).clone())
        .conntrack(&conntrack, "shop")
        .unwrap()
        .build()
        .unwrap();
    let forwarded = client.get("http://shop.test/").send().await.unwrap();
    assert_eq!(forwarded.text().await.unwrap(), "via");
    let tunnelled = client.get(format!("https://shop.test:{port}/"));
    assert_eq!(tunnelled.send().await.unwrap().text().await.unwrap(), "hi");

    let mut set_ups = spans.named("connection_setup");
    set_ups.sort_by_key(|span| span.start_time);
    assert_eq!(set_ups.len(), 2);
    for (set_up, port) in set_ups.iter().zip([80, port]) {
        assert_eq!(
            attribute(set_up, names::SERVER_ADDRESS).as_deref(),
            Some("shop.test")
        );
        assert_eq!(
            attribute(set_up, names::SERVER_PORT),
            Some(port.to_string())
        );
        let peer = attribute(set_up, names::PEER_PORT);
        assert_eq!(peer, Some(proxy.port().to_string()));
    }
    // The tunnel's own handshake lies between the connection and TLS, and nobody tells them apart.
    let all = names_of(&spans.all());
    assert!(!all.iter().any(|name| name.starts_with("tls")), "{all:?}");
    assert_eq!(spans.named("tcp connect").len(), 2);
}

#[tokio::test]
async fn an_exporters_connections_are_not_seen() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let address = Web::answering(|_| text("hi")).await;
    let client = plain()
        .conntrack(&conntrack, "exporter")
        .unwrap()
        .build()
        .unwrap();
    // As the SDK's threads are.
    let suppressed = opentelemetry::Context::enter_telemetry_suppressed_scope();
    client
        .get(format!("http://{address}/"))
        .send()
        .await
        .unwrap();
    drop(suppressed);
    assert_eq!(dialer(&conntrack, "exporter").attempts, 0);
    assert!(spans.all().is_empty() && conntrack.connections().is_empty());
}

#[tokio::test]
async fn a_bad_name_is_refused_where_it_is_given() {
    let conntrack = otel_conntrack::Conntrack::builder().build().unwrap();
    for name in ["", "a\nb", &"x".repeat(101)] {
        let error = plain().conntrack(&conntrack, name).unwrap_err();
        assert_eq!(error.setting(), "client name");
        let error = conntrack.reqwest_requests(name).unwrap_err();
        assert_eq!(error.setting(), "client name");
    }
}

/// reqwest's own timer is outside of every layer: only who knows of it can tell it from a caller
/// that gave up.
#[tokio::test]
async fn a_connect_timeout_of_reqwests_own_is_told_as_one_if_it_is_known() {
    let (conntrack, mut events) = watched();
    // It accepts and says nothing, so TLS never gets an answer.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/", silent.local_addr().unwrap());
    let (_, trust) = tls::pair("shop.test");
    let timeout = std::time::Duration::from_millis(50);
    let told = conntrack.reqwest("known").connect_timeout(timeout);
    let untold = conntrack.reqwest("unknown");
    for (layer, reason) in [
        (told.layer().unwrap(), "timed_out"),
        (untold.layer().unwrap(), "cancelled"),
    ] {
        let client = plain()
            .connect_timeout(timeout)
            .tls_backend_preconfigured((*trust).clone())
            .connector_layer(layer)
            .build()
            .unwrap();
        assert!(client.get(&url).send().await.unwrap_err().is_timeout());
        events.until(&format!("SetupFailed {reason}")).await;
    }
}

/// A name for one call, over the layer's own: the connection is idle until a request has it, too.
#[tokio::test]
async fn a_dial_name_holds_for_a_stock_client() {
    let (conntrack, _events) = watched();
    let address = Web::answering(|_| text("hi")).await;
    let client = plain()
        .conntrack(&conntrack, "own")
        .unwrap()
        .build()
        .unwrap();
    let client = reqwest_middleware::ClientBuilder::new(client)
        .with(conntrack.reqwest_requests("own").unwrap())
        .build();
    let name = otel_conntrack::DialName::new("special").unwrap();
    let request = client.get(format!("http://{address}/")).send();
    let response = name.scope(request).await.unwrap();
    let record = response
        .extensions()
        .get::<otel_conntrack::ConnectionRecord>();
    assert!(!record.unwrap().poison(), "reqwest lets nobody do that");
    assert_eq!(response.text().await.unwrap(), "hi");
    let stats = dialer(&conntrack, "special");
    assert_eq!((stats.established, stats.idle, stats.requests), (1, 1, 1));
    assert_eq!(dialer(&conntrack, "own").attempts, 0);
}

#[test]
fn the_blocking_client_has_the_same_line() {
    tls::install();
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", server.local_addr().unwrap());
    let peer = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let (mut stream, _) = server.accept().unwrap();
        let mut got = [0; 1_024];
        assert!(stream.read(&mut got).unwrap() > 0);
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")
            .unwrap();
        // Until the client's end of stream.
        while stream.read(&mut got).unwrap_or(0) > 0 {}
    });
    let (tell, closed) = std::sync::mpsc::channel();
    let hooks = otel_conntrack::Hooks::new().on_closed(move |_| tell.send(()).unwrap());
    let conntrack = otel_conntrack::Conntrack::builder()
        .observer(hooks)
        .build()
        .unwrap();
    let client = reqwest::blocking::Client::builder()
        .no_proxy()
        .conntrack(&conntrack, "blocking")
        .unwrap()
        .build()
        .unwrap();
    assert_eq!(client.get(url).send().unwrap().text().unwrap(), "hi");
    assert_eq!(dialer(&conntrack, "blocking").open, 1);
    drop(client);
    peer.join().unwrap();
    closed.recv().unwrap();
    assert_eq!(dialer(&conntrack, "blocking").open, 0);
}
