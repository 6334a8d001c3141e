//! The set-up span and its phases.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::FutureExt;
use opentelemetry_sdk::trace::SpanData;
use otel_conntrack::FailureReason;
use otel_conntrack::names;
use tokio::net::{TcpListener, UnixListener};

use super::support::otel::{Spans, attribute, is_child, is_root};
use super::support::tls;
use super::support::traffic::{Hosts, accept, dial, dial_as, fail, hold};
use super::{checked, one, traced};

/// The children hang under the parent and lie within its time.
#[track_caller]
fn within(parent: &SpanData, children: &[&SpanData]) {
    for child in children {
        assert!(is_child(child, parent), "{child:#?}");
        assert!(child.start_time >= parent.start_time, "{child:#?}");
        assert!(child.end_time <= parent.end_time, "{child:#?}");
    }
}

#[track_caller]
fn failed(span: &SpanData, reason: FailureReason) {
    let told = attribute(span, names::ERROR_TYPE);
    assert_eq!(told.as_deref(), Some(reason.as_str()), "{}", span.name);
}

#[tokio::test]
async fn a_set_up_is_a_root_with_look_up_every_address_and_tls_under_it() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let (server, trust) = tls::pair("shop.test");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let peer = tokio::spawn(async move {
        let acceptor = tokio_rustls::TlsAcceptor::from(server);
        let (stream, _) = listener.accept().await.unwrap();
        acceptor.accept(stream).await.unwrap()
    });
    // Nobody listens on the first one.
    let hosts = Hosts::at(&["127.0.0.2", "127.0.0.1"]);
    let dialer = conntrack.dialer("shop").resolver(hosts).tls(trust);
    let dialer = dialer.build().unwrap();
    let stream = dialer.connect_tls(("shop.test", address.port()));
    let stream = stream.await.unwrap();

    let set_up = one(&spans, "connection_setup");
    assert!(is_root(&set_up));
    let target = format!("connection_setup shop.test:{}", address.port());
    assert_eq!(set_up.name, target);
    let record = stream.record();
    let trace = record.trace().unwrap();
    let context = &set_up.span_context;
    assert_eq!(trace.trace_id, context.trace_id().to_bytes());
    assert_eq!(trace.span_id, context.span_id().to_bytes());
    assert!(trace.sampled);
    let local = stream.get_ref().get_ref().0.local_addr().unwrap();
    for (key, value) in [
        (names::CONNECTION_ID, record.id().to_string()),
        (names::NAME, "shop".into()),
        (names::DIRECTION, "outbound".into()),
        (names::SERVER_ADDRESS, "shop.test".into()),
        (names::SERVER_PORT, address.port().to_string()),
        (names::NETWORK_TRANSPORT, "tcp".into()),
        (names::NETWORK_TYPE, "ipv4".into()),
        (names::PEER_ADDRESS, "127.0.0.1".into()),
        (names::PEER_PORT, address.port().to_string()),
        (names::LOCAL_ADDRESS, "127.0.0.1".into()),
        (names::LOCAL_PORT, local.port().to_string()),
        (names::TLS_VERSION, "1.3".into()),
        (names::TLS_RESUMED, "false".into()),
    ] {
        assert_eq!(attribute(&set_up, key), Some(value), "{key}");
    }
    let dns = one(&spans, "dns lookup shop.test");
    let first = one(&spans, "tcp connect 127.0.0.2");
    let second = one(&spans, "tcp connect 127.0.0.1");
    let tls = one(&spans, "tls handshake shop.test");
    within(&set_up, &[&dns, &first, &second, &tls]);
    assert_eq!(spans.all().len(), 5);
    assert_eq!(
        attribute(&dns, names::DNS_ANSWERS).as_deref(),
        Some(r#"["127.0.0.2","127.0.0.1"]"#)
    );
    failed(&first, FailureReason::ConnectionRefused);
    assert_eq!(attribute(&second, names::ERROR_TYPE), None);
    assert!(dns.end_time <= first.start_time);
    assert!(first.end_time <= second.start_time);
    assert!(second.end_time <= tls.start_time);
    assert_eq!(attribute(&tls, names::TLS_VERSION).as_deref(), Some("1.3"));
    peer.await.unwrap();
}

#[tokio::test]
async fn a_failed_set_up_says_why_and_which_step_it_was() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let dialer = conntrack.dialer("api").resolver(Hosts::at(&["127.0.0.1"]));
    let dialer = dialer.build().unwrap();

    dialer.connect("unknown.test:1").await.unwrap_err();
    let set_up = one(&spans, "connection_setup unknown.test:1");
    let dns = one(&spans, "dns lookup unknown.test");
    within(&set_up, &[&dns]);
    failed(&set_up, FailureReason::HostNotFound);
    failed(&dns, FailureReason::HostNotFound);

    // Nobody listens on port 1.
    dialer.connect(("down.test", 1)).await.unwrap_err();
    let set_up = one(&spans, "connection_setup down.test");
    let tcp = one(&spans, "tcp connect 127.0.0.1");
    within(&set_up, &[&tcp, &one(&spans, "dns lookup down.test")]);
    failed(&set_up, FailureReason::ConnectionRefused);
    failed(&tcp, FailureReason::ConnectionRefused);

    // An address is not looked up; and its brackets stay where it has colons.
    let _ = dialer.connect(SocketAddr::from(([0; 16], 0))).await;
    let set_up = one(&spans, "connection_setup [::]:0");
    within(&set_up, &[&one(&spans, "tcp connect [::]:0")]);

    // A set-up that failed has no life; the record keeps the reference for those who link to it.
    assert!(spans.named("connection ").is_empty());
    let all = conntrack.recently_closed();
    assert!(all.iter().all(|gone| gone.trace.is_some()) && all.len() == 3);
}

#[tokio::test]
async fn a_certificate_that_nobody_trusts_fails_the_handshake_only() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let ((server, _), (_, trust)) = (tls::pair("shop.test"), tls::pair("shop.test"));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let peer = tokio::spawn(async move {
        let acceptor = tokio_rustls::TlsAcceptor::from(server);
        let (stream, _) = listener.accept().await.unwrap();
        acceptor.accept(stream).await.unwrap_err()
    });
    let hosts = Hosts::at(&["127.0.0.1"]);
    let dialer = conntrack.dialer("shop").resolver(hosts).tls(trust);
    let dialer = dialer.build().unwrap();
    dialer.connect_tls(("shop.test", port)).await.unwrap_err();
    peer.await.unwrap();

    let set_up = one(&spans, "connection_setup");
    let tls = one(&spans, "tls handshake shop.test");
    let tcp = one(&spans, "tcp connect");
    within(&set_up, &[&tls, &tcp]);
    failed(&set_up, FailureReason::TlsCertificate);
    failed(&tls, FailureReason::TlsCertificate);
    assert_eq!(attribute(&tls, names::TLS_VERSION), None);
    assert_eq!(attribute(&tcp, names::ERROR_TYPE), None);
}

#[tokio::test(start_paused = true)]
async fn a_step_that_is_cut_off_ends_as_its_set_up_does() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let dialer = conntrack.dialer("api").resolver(Hosts::silent());
    let dialer = dialer.timeout(Duration::from_secs(7)).build().unwrap();

    dialer.connect("late.test:1").await.unwrap_err();
    let set_up = one(&spans, "connection_setup late.test");
    let dns = one(&spans, "dns lookup late.test");
    within(&set_up, &[&dns]);
    failed(&set_up, FailureReason::TimedOut);
    failed(&dns, FailureReason::TimedOut);

    assert!(dialer.connect("dropped.test:1").now_or_never().is_none());
    let set_up = one(&spans, "connection_setup dropped.test");
    let dns = one(&spans, "dns lookup dropped.test");
    within(&set_up, &[&dns]);
    failed(&set_up, FailureReason::Cancelled);
    failed(&dns, FailureReason::Cancelled);
}

#[test]
fn what_others_dial_has_a_set_up_without_invented_phases() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let pipe = dial(&conntrack, "db", ("db.test", 5_432));
    assert!(is_root(&one(&spans, "connection_setup db.test:5432")));
    fail(&conntrack, "db", ("db.test", 1), io::ErrorKind::TimedOut);
    failed(
        &one(&spans, "connection_setup db.test:1"),
        FailureReason::TimedOut,
    );
    drop(hold(&conntrack, "db", ("db.test", 2)));
    failed(
        &one(&spans, "connection_setup db.test:2"),
        FailureReason::Cancelled,
    );
    assert_eq!(spans.all().len(), 3);
    drop(pipe);
    assert_eq!(checked(&spans).len(), 4);
}

#[tokio::test]
async fn an_accepted_connection_has_a_set_up_named_after_its_listener() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let mut listener = conntrack
        .listener("http")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let address = listener.local_addr().unwrap();
    let client = tokio::net::TcpStream::connect(address).await.unwrap();
    let (stream, peer) = listener.accept().await;
    assert_eq!(peer, client.local_addr().unwrap());

    let set_up = one(&spans, "connection_setup http");
    assert!(is_root(&set_up));
    for (key, value) in [
        (names::CONNECTION_ID, stream.record().id().to_string()),
        (names::DIRECTION, "inbound".into()),
        (names::PEER_PORT, peer.port().to_string()),
        (names::LOCAL_PORT, address.port().to_string()),
    ] {
        assert_eq!(attribute(&set_up, key), Some(value), "{key}");
    }
    drop(stream);
    assert!(is_child(&one(&spans, "connection http"), &set_up));
}

#[tokio::test]
async fn unix_sockets_are_named_by_their_path() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let name = format!("conntrack-{}.sock", std::process::id());
    let path = std::env::temp_dir().join(name);
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let dialer = conntrack.dialer("docker").build().unwrap();
    let stream = dialer.connect_unix(&path).await.unwrap();
    listener.accept().await.unwrap();
    let text = path.display().to_string();
    let set_up = one(&spans, &format!("connection_setup {text}"));
    assert_eq!(attribute(&set_up, names::SERVER_PORT), None);
    assert_eq!(
        attribute(&set_up, names::NETWORK_TRANSPORT).as_deref(),
        Some("unix")
    );
    assert_eq!(attribute(&set_up, names::PEER_ADDRESS), Some(text.clone()));
    drop(stream);
    assert!(is_child(
        &one(&spans, &format!("connection {text}")),
        &set_up
    ));
    std::fs::remove_file(&path).unwrap();
}

#[tokio::test]
async fn names_that_are_switched_off_have_no_spans_and_the_others_do() {
    let spans = Spans::default();
    let conntrack = traced(&spans).build().unwrap();
    let listener = conntrack.listener("in").spans(false);
    let _listener = listener.bind("127.0.0.1:0").await.unwrap();
    let quiet = conntrack.dialer("quiet").spans(false).build().unwrap();
    let inbound = accept(&conntrack, "in");
    let outbound = dial(&conntrack, "quiet", ("a.test", 1));
    let learned = dial_as(&quiet, "tenant", ("a.test", 2));
    fail(&conntrack, "quiet", ("a.test", 3), io::ErrorKind::TimedOut);
    for pipe in [&inbound, &outbound, &learned] {
        pipe.request();
        assert_eq!(pipe.io.record().trace(), None);
        assert!(pipe.io.record().snapshot().timeline.is_empty());
    }
    drop((inbound, outbound, learned));
    assert_eq!(spans.all().len(), 0);
    drop(dial(&conntrack, "loud", ("a.test", 1)));
    assert_eq!(checked(&spans).len(), 2);
    assert_eq!(
        conntrack.stats().dialer("quiet").map(|s| s.attempts),
        Some(2)
    );
}
