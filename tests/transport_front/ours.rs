//! What only the front has: the transport's limits, queue, events and errors under reqwest's API.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, poll};
use http::Extensions;
use opentelemetry::Context;
use opentelemetry::trace::{TraceContextExt, Tracer, TracerProvider};
use otel_conntrack::{
    ConnectionRecord, Conntrack, FrontErrorKind, Hooks, HttpVersions, RedirectPolicy, RequestHooks,
    TransportBuilder, TransportError, TransportErrorKind, TransportMiddleware,
};
use reqwest_middleware::{ClientBuilder, Middleware, Next};
use rustls::ClientConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;

use super::differs::trusting;
use super::hostile::{Behaviour, Certificate, Command, Hostile};
use super::otel::Spans;
use super::site::{Site, TEXT};
use super::{LONG, Ours, front_error, transport_error};

#[tokio::test]
async fn a_request_over_the_limit_waits_for_its_turn() {
    let server = Hostile::start(Behaviour::Ok).await;
    let ours = Ours::new(|t| t.max_conns_per_host(1), |f| f);
    let held = tokio::spawn(ours.client.get(server.uri("/hold")).send());
    server.wait_requests(1).await;
    let mut second = Box::pin(ours.get_owned(server.uri("/")));
    assert!(poll!(&mut second).is_pending());
    let stats = ours.transport.stats();
    assert_eq!((stats.waiting, stats.waiting_for_slot), (1, 1));
    assert_eq!(stats.event("MaxConnsPerHostHit"), 1);
    // One that is given up leaves the queue.
    let mut third = Box::pin(ours.get_owned(server.uri("/")));
    assert!(poll!(&mut third).is_pending());
    assert_eq!(ours.transport.stats().waiting, 2);
    drop(third);
    assert_eq!(ours.transport.stats().waiting, 1);
    server.command(Command::Release);
    assert_eq!(held.await.unwrap().unwrap().text().await.unwrap(), "ok");
    assert_eq!(second.await.unwrap().text().await.unwrap(), "ok");
    assert_eq!(server.accepted(), 1);
    ours.settled().await;
}

impl Ours {
    async fn get_owned(&self, url: String) -> Result<reqwest::Response, reqwest_middleware::Error> {
        self.get(&url).await
    }
}

#[tokio::test]
async fn a_wait_that_is_too_long_is_an_error_that_gives_the_request_back() {
    let server = Hostile::start(Behaviour::NeverAnswer).await;
    let wait = Duration::from_secs(1);
    let ours = Ours::new(|t| t.max_conns_per_host(1).wait_timeout(wait), |f| f);
    let held = tokio::spawn(ours.client.get(server.uri("/")).send());
    server.wait_requests(1).await;
    let mut error = ours
        .client
        .post(server.uri("/x"))
        .body("mine")
        .send()
        .await
        .unwrap_err();
    let kind = transport_error(&error);
    assert!(
        matches!(kind, TransportErrorKind::WaitTimedOut { timeout, ahead: 1 } if *timeout == wait)
    );
    let reqwest_middleware::Error::Middleware(inner) = &mut error else {
        panic!("{error}");
    };
    let inner = inner.downcast_mut::<TransportError>().unwrap();
    assert!(!inner.is_sent() && inner.is_timeout());
    let request = inner.take_request::<reqwest::Body>().unwrap();
    assert_eq!(request.uri().path(), "/x");
    assert_eq!(request.body().as_bytes(), Some(&b"mine"[..]));
    held.abort();
    server.wait_open(0).await;
}

#[tokio::test]
async fn a_redirect_on_the_only_connection_has_it_again() {
    let site = Site::start().await;
    let ours = Ours::new(|t| t.max_conns_per_host(1).wait_timeout(LONG), |f| f);
    // Its own body is read on in the background, so that the connection can serve the next request.
    let long = site.url("/redirect?302&size=30000&to=/next");
    for url in [site.redirect(302, &site.redirect(307, "/next")), long] {
        let response = ours.get(&url).await.unwrap();
        assert_eq!(response.url().as_str(), site.url("/next"));
        response.bytes().await.unwrap();
    }
    // More than is read on: another connection.
    let endless = site.url("/redirect?302&size=10000000&to=/next");
    ours.get(&endless).await.unwrap().bytes().await.unwrap();
    ours.settled().await;
    assert_eq!(ours.told.count("GotConn new"), 2);
    assert_eq!(ours.told.count("GotConn"), 7);
    assert_eq!(ours.transport.stats().idle, 1);
}

#[tokio::test]
async fn each_request_of_a_chain_is_told_to_its_hooks() {
    let site = Site::start().await;
    let ours = Ours::new(|t| t, |f| f);
    let got = Arc::new(AtomicUsize::new(0));
    let counts = got.clone();
    let hooks = Hooks::new().on_got_conn(move |_| {
        counts.fetch_add(1, Ordering::Relaxed);
    });
    let response = ours
        .client
        .get(site.redirect(302, "/next"))
        .with_extension(RequestHooks::new(hooks))
        .send();
    response.await.unwrap();
    ours.get(&site.url("/")).await.unwrap();
    assert_eq!(got.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn the_caller_is_who_sent_whatever_is_current_later() {
    let site = Site::start().await;
    let spans = Spans::default();
    let provider = spans.provider();
    let conntrack = Conntrack::builder().tracer_provider(provider.clone());
    let conntrack = conntrack.build().unwrap();
    let transport = conntrack.transport("test").no_env_proxy().build().unwrap();
    let client = transport.reqwest().build().unwrap();
    let tracer = provider.tracer("test");
    let context = Context::new().with_span(tracer.start("caller"));
    let mut sent = Box::pin(client.get(site.redirect(302, "/next")).send());
    {
        let _current = context.clone().attach();
        assert!(poll!(&mut sent).is_pending());
    }
    sent.await.unwrap().bytes().await.unwrap();
    context.span().end();
    let caller = spans.one("caller");
    let acquired = caller
        .events
        .iter()
        .filter(|e| e.name == "connection.acquired");
    assert_eq!(acquired.count(), 2, "{:?}", caller.events);
}

#[tokio::test]
async fn a_body_that_is_over_has_no_connection_though_the_response_is_kept() {
    let site = Site::start().await;
    let ours = Ours::new(|t| t, |f| f);
    for path in [
        "/gzip?chunked",
        "/brotli?chunked",
        "/deflate?chunked",
        "/zstd?chunked",
        "/gzip",
        "/",
    ] {
        let mut response = ours.get(&site.url(path)).await.unwrap();
        let mut text = Vec::new();
        while let Some(more) = response.chunk().await.unwrap() {
            text.extend(more);
        }
        if path != "/" {
            assert_eq!(text, TEXT.as_bytes());
        }
        ours.settled().await;
        assert_eq!(
            (ours.transport.stats().idle, ours.transport.stats().in_use),
            (1, 0),
            "{path}"
        );
    }
    assert_eq!(ours.told.count("GotConn new"), 1);
}

#[tokio::test]
async fn bodies_stream_both_ways() {
    let site = Site::start().await;
    let ours = Ours::new(|t| t, |f| f);
    let (more, body) = mpsc::channel::<Result<Bytes, std::io::Error>>(1);
    more.send(Ok(Bytes::from("one"))).await.unwrap();
    let body = reqwest::Body::wrap_stream(ReceiverStream::new(body));
    let response = ours.client.post(site.url("/echo")).body(body).send();
    let mut echo = Box::pin(response.await.unwrap().bytes_stream());
    for text in ["one", "two", "three"] {
        if text != "one" {
            more.send(Ok(Bytes::from(text))).await.unwrap();
        }
        assert_eq!(echo.next().await.unwrap().unwrap(), text);
    }
    drop(more);
    assert!(echo.next().await.is_none());
    ours.settled().await;
}

#[tokio::test]
async fn an_upgraded_connection_is_the_callers() {
    let server = Hostile::start(Behaviour::Ok).await;
    let ours = Ours::new(|t| t, |f| f);
    let request = ours.client.get(server.uri("/upgrade"));
    let request = request
        .header("connection", "upgrade")
        .header("upgrade", "echo");
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), 101);
    let mut io = response.upgrade().await.unwrap();
    io.write_all(b"hello").await.unwrap();
    let mut echo = [0; 5];
    io.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"hello");
    assert_eq!(ours.transport.stats().in_use, 1);
    drop(io);
    server.wait_open(0).await;
}

#[tokio::test]
async fn the_response_says_which_connection_it_came_on() {
    let both: &[&str] = &["h2", "http/1.1"];
    let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, both).await;
    let ours = Ours::new(|t| t.tls(trusting()), |f| f.https_only(true));
    let mut ids = Vec::new();
    for _ in 0..2 {
        let response = ours.get(&server.uri("/")).await.unwrap();
        assert_eq!(response.remote_addr(), Some(server.address));
        let record: &ConnectionRecord = response.extensions().get().unwrap();
        let snapshot = record.snapshot();
        assert_eq!(snapshot.tls.unwrap().alpn.as_deref(), Some("h2"));
        ids.push(record.id());
        assert_eq!(response.text().await.unwrap(), "ok");
    }
    assert_eq!(ids[0], ids[1]);
}

#[tokio::test]
async fn redirects_that_are_not_followed_say_why() {
    let site = Site::start().await;
    let url = site.redirect(302, &site.redirect(302, "/next"));
    let ours = Ours::new(|t| t, |f| f.redirect(RedirectPolicy::limited(1)));
    let error = ours.get(&url).await.unwrap_err();
    assert!(matches!(
        front_error(&error),
        FrontErrorKind::TooManyRedirects { max: 1 }
    ));
    assert!(error.to_string().contains("too many redirects"), "{error}");
    // The text has no path nor query.
    assert!(!error.to_string().contains("redirect?"), "{error}");

    let policy = RedirectPolicy::custom(|attempt| attempt.error("not there"));
    let ours = Ours::new(|t| t, |f| f.redirect(policy));
    let error = ours.get(&url).await.unwrap_err();
    assert!(matches!(front_error(&error), FrontErrorKind::Redirect));
    let reqwest_middleware::Error::Middleware(error) = error else {
        panic!("{error}");
    };
    assert_eq!(error.root_cause().to_string(), "not there");
    ours.settled().await;
}

#[tokio::test]
async fn only_https_holds_for_redirects_too() {
    let clear = Site::start().await;
    let (secure, trusts) = https_redirect(&clear.url("/")).await;
    let set = |only| Ours::new(|t| t.tls(trusts.clone()), |f| f.https_only(only));
    let error = set(true).get(&secure).await.unwrap_err();
    assert!(
        matches!(front_error(&error), FrontErrorKind::NotHttps),
        "{error}"
    );
    assert!(clear.asked().is_empty());
    let response = set(false).get(&secure).await.unwrap();
    assert_eq!(response.url().as_str(), clear.url("/"));
    // From there to here, where one comes from is nobody's business.
    let asked = clear.asked();
    assert!(
        asked.len() == 1 && !asked[0].contains("referer"),
        "{asked:?}"
    );
}

/// An `https` URL that redirects to another one, and who trusts it.
async fn https_redirect(to: &str) -> (String, Arc<ClientConfig>) {
    let answer = format!("HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n");
    let (server, client) = super::tls::pair("127.0.0.1");
    let server = TlsAcceptor::from(server);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let mut io = server.accept(tcp).await.unwrap();
            let _ = io.read(&mut [0; 4_096]).await;
            let _ = io.write_all(answer.as_bytes()).await;
            let _ = io.read(&mut [0; 1]).await;
        }
    });
    (url, client)
}

/// Counts, and asks on.
struct Counts(AtomicUsize);

#[async_trait::async_trait]
impl Middleware for Counts {
    async fn handle(
        &self,
        request: reqwest::Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> reqwest_middleware::Result<reqwest::Response> {
        self.0.fetch_add(1, Ordering::Relaxed);
        next.run(request, extensions).await
    }
}

#[tokio::test]
async fn it_is_the_last_of_several_middlewares() {
    crate::tls::install();
    let site = Site::start().await;
    let conntrack = Conntrack::builder().build().unwrap();
    let transport = conntrack.transport("test").no_env_proxy().build().unwrap();
    let (before, after) = (Arc::new(Counts(0.into())), Arc::new(Counts(0.into())));
    // What the client itself is told does not count.
    let client = reqwest::Client::builder()
        .user_agent("never")
        .build()
        .unwrap();
    let client = ClientBuilder::new(client)
        .with_arc(before.clone())
        .with(TransportMiddleware::new(transport.clone()))
        .with_arc(after.clone())
        .build();
    let text = client
        .get(site.redirect(302, "/next"))
        .send()
        .await
        .unwrap();
    let text = text.text().await.unwrap();
    assert!(
        text.contains("accept: */*") && !text.contains("never"),
        "{text}"
    );
    assert_eq!(before.0.load(Ordering::Relaxed), 1);
    assert_eq!(after.0.load(Ordering::Relaxed), 0);
    assert_eq!(transport.stats().event("GotConn"), 2);
}

#[tokio::test]
async fn settings_that_can_not_be_used_are_named() {
    let conntrack = Conntrack::builder().build().unwrap();
    let transport = conntrack.transport("test").no_env_proxy().build().unwrap();
    let front = || transport.reqwest();
    for (front, setting, value) in [
        (front().timeout(Duration::ZERO), "timeout", "0s"),
        (front().read_timeout(Duration::ZERO), "read_timeout", "0s"),
        (
            front().user_agent("a\nb"),
            "user_agent",
            "(no header value)",
        ),
    ] {
        let error = front.build().unwrap_err();
        assert_eq!((error.setting(), error.value()), (setting, value));
    }
    let set = front().timeout(Duration::from_secs(1)).timeout(None);
    assert!(format!("{set:?}").contains("timeout: None"));
    set.build().unwrap();
}

#[tokio::test]
async fn the_counts_agree_after_many_requests_of_all_kinds() {
    let (site, other) = (Site::start().await, Site::start().await);
    for versions in [HttpVersions::Auto, HttpVersions::Http2] {
        let pool = |t: TransportBuilder| t.max_conns_per_host(3).http_versions(versions);
        let ours = Arc::new(Ours::new(pool, |f| f.cookie_store(true)));
        let tasks = (0..200_usize).map(|n| {
            let (ours, site, other) = (ours.clone(), site.clone(), other.clone());
            tokio::spawn(async move {
                let url = match n % 7 {
                    0 => site.url("/gzip?chunked"),
                    1 => site.redirect(302, &other.url("/zstd")),
                    2 => other.redirect(307, &other.redirect(303, "/next")),
                    3 => site.url("/loop"),
                    4 => site.url("/redirect?301&size=20000&to=/cookies?a=b"),
                    5 => site.url("/brotli?bad"),
                    _ => site.url("/stuck"),
                };
                let mut sent = Box::pin(ours.client.post(url).body("text").send());
                // Some are given up on the way.
                if n % 3 == 0 {
                    for _ in 0..n % 11 {
                        if poll!(&mut sent).is_ready() {
                            return;
                        }
                        tokio::task::yield_now().await;
                    }
                    return;
                }
                match sent.await {
                    // Some are not read to their end, and some can't be.
                    Ok(mut response) if n % 7 == 6 || n % 5 == 0 => drop(response.chunk().await),
                    Ok(response) => drop(response.bytes().await),
                    Err(error) => assert_eq!(n % 7, 3, "{error}"),
                }
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.unwrap();
        }
        ours.settled().await;
        let told = &ours.told;
        for (enters, leaves) in [
            ("ConnsPerHostWaitIn", "ConnsPerHostWaitOut"),
            ("IdleConnWaitIn", "IdleConnWaitOut"),
        ] {
            assert_eq!(told.count(enters), told.count(leaves), "{enters}");
        }
        let stats = ours.transport.stats();
        for host in &stats.hosts {
            assert!(host.in_use <= 3, "{stats:?}");
        }
        #[cfg(target_os = "linux")]
        {
            let mine = crate::audit::dialled_to(&[site.address(), other.address()]);
            crate::audit::comes_clean(&ours.conntrack, mine).await;
        }
        assert!(ours.transport.shutdown(LONG).await.is_empty());
    }
}
