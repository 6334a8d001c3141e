//! What the values mean: who has zeros, who is left out, what is summed, what is counted once.

use std::io;

use otel_conntrack::names;
use otel_conntrack::{
    AcceptErrorReason, CloseReason, FailureReason, ProtocolVersion, RejectReason,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::conntrack_for;
use super::support::expected::agree;
use super::support::otel::{Collection, Reader};
use super::support::tls;
use super::support::traffic::{Hosts, Service, accept, dial, dial_as, fail, http};

const LOOPBACK: &str = "127.0.0.1";

#[tokio::test]
async fn declared_names_have_zeros_for_every_reason_before_anything_happens() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let _listener = conntrack.listener("in").bind("127.0.0.1:0").await.unwrap();
    let dialer = conntrack.dialer("out").build().unwrap();
    conntrack.declare_dialer("later").unwrap();

    let now = reader.collect();
    for name in ["out", "later"] {
        let own = [(names::NAME, name)];
        assert_eq!(now.value(&names::DIALER_ATTEMPTS, &own), Some(0));
        assert_eq!(now.value(&names::DIALER_ESTABLISHED, &own), Some(0));
        for reason in FailureReason::ALL {
            let failed = [own[0], (names::ERROR_TYPE, reason.as_str())];
            assert_eq!(now.value(&names::DIALER_FAILED, &failed), Some(0));
        }
        for reason in CloseReason::ALL {
            let closed = [own[0], (names::REASON, reason.as_str())];
            assert_eq!(now.value(&names::DIALER_CLOSED, &closed), Some(0));
        }
        let open = [own[0], (names::DIRECTION, "outbound")];
        assert_eq!(now.value(&names::CONNECTIONS, &open), Some(0));
    }
    let own = (names::NAME, "in");
    assert_eq!(now.value(&names::LISTENER_ACCEPTED, &[own]), Some(0));
    for reason in CloseReason::ALL {
        let closed = [own, (names::REASON, reason.as_str())];
        assert_eq!(now.value(&names::LISTENER_CLOSED, &closed), Some(0));
    }
    for reason in AcceptErrorReason::ALL {
        let errors = [own, (names::REASON, reason.as_str())];
        assert_eq!(now.value(&names::LISTENER_ACCEPT_ERRORS, &errors), Some(0));
    }
    for reason in RejectReason::ALL {
        let rejected = [own, (names::REASON, reason.as_str())];
        assert_eq!(now.value(&names::LISTENER_REJECTED, &rejected), Some(0));
    }
    let open = [own, (names::DIRECTION, "inbound")];
    assert_eq!(now.value(&names::CONNECTIONS, &open), Some(0));
    assert_eq!(now.series(&names::DROPPED, &[]), 11);
    assert_eq!(now.sum(&names::DROPPED, &[]), 0);
    agree(&now, &conntrack, &[]);

    // Nothing about hosts, and nothing about a name that nobody declared or used.
    assert_eq!(now.series(&names::OPEN_CONNECTIONS, &[]), 0);
    let out = now.series(&names::IO, &[(names::DIRECTION, "outbound")]);
    assert_eq!(out, 0);
    drop(dial_as(&dialer, "learned", http("a.test")));
    let now = reader.collect();
    assert_eq!(now.series(&names::OPEN_CONNECTIONS, &[]), 0);
    assert_eq!(
        now.series(&names::CONNECTIONS, &[(names::NAME, "learned")]),
        0
    );
    agree(&now, &conntrack, &[]);
}

#[tokio::test]
async fn names_that_are_switched_off_are_in_no_metric_and_still_in_the_stats() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let listener = conntrack.listener("in").metrics(false);
    let _listener = listener.bind("127.0.0.1:0").await.unwrap();
    let quiet = conntrack.dialer("db").metrics(false).build().unwrap();
    let mut service = Service::new(&conntrack);
    let mut learned = Vec::new();
    for _ in 0..3 {
        service.round();
        // What is off for a dialer is off for the names of its calls.
        learned.push(dial_as(&quiet, "tenant", http("a.test")));
        let now = reader.collect();
        for series in now.points().keys() {
            let name = series.labels.get(names::NAME).map(String::as_str);
            let shown = matches!(name, None | Some("api" | "batch"));
            assert!(shown, "{series:?} is switched off");
        }
        agree(&now, &conntrack, &["in", "db", "tenant"]);
    }
    let stats = conntrack.stats();
    assert_eq!(stats.listener("in").map(|s| s.accepted), Some(6));
    assert_eq!(stats.dialer("tenant").map(|s| s.open), Some(3));
}

#[test]
fn two_names_that_talk_to_one_host_are_summed() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let pipes: Vec<_> = ["api", "batch", "batch"]
        .map(|name| dial(&conntrack, name, http("a.test")))
        .into();
    pipes.iter().for_each(|pipe| pipe.request());
    let running = pipes[0].io.record().request_started();
    let now = reader.collect();
    assert_eq!(states(&now, &[(names::SERVER_ADDRESS, "a.test")]), (1, 2));
    assert_eq!(now.series(&names::OPEN_CONNECTIONS, &[]), 2);
    drop(running);
    drop(pipes);
    // And so are their ends, in the one histogram that knows no name.
    let host = [(names::SERVER_ADDRESS, "a.test")];
    let ended = reader.collect().count(&names::CONNECTION_DURATION, &host);
    assert_eq!(ended, 3);
}

/// Active and idle.
fn states(now: &Collection, some: &[(&str, &str)]) -> (i64, i64) {
    let of = |state| {
        let labels = [some, &[(names::HTTP_CONNECTION_STATE, state)]].concat();
        now.sum(&names::OPEN_CONNECTIONS, &labels)
    };
    (of("active"), of("idle"))
}

#[test]
fn only_connections_whose_requests_are_seen_are_active_or_idle() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let silent = dial(&conntrack, "api", http("a.test"));
    let spoken = dial(&conntrack, "api", http("a.test"));
    assert_eq!(reader.collect().series(&names::OPEN_CONNECTIONS, &[]), 0);
    let request = spoken.io.record().request_started();
    assert_eq!(states(&reader.collect(), &[]), (1, 0));
    let another = spoken.io.record().request_started();
    drop(request);
    assert_eq!(states(&reader.collect(), &[]), (1, 0));
    drop(another);
    let now = reader.collect();
    assert_eq!(states(&now, &[]), (0, 1));
    let api = [(names::NAME, "api")];
    assert_eq!(now.sum(&names::CONNECTIONS, &api), 2);

    // Only the one that was seen has a number of requests and a time of idling.
    drop((silent, spoken));
    let now = reader.collect();
    assert_eq!(now.count(&names::CONNECTION_REQUEST_COUNT, &[]), 1);
    assert_eq!(now.count(&names::IDLE_TIME, &[]), 1);
    assert_eq!(now.count(&names::DURATION, &[]), 2);
}

#[test]
fn the_http_metrics_hold_http_connections_only() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let pipes = [
        dial(&conntrack, "db", ("db.test", 5_432)),
        accept(&conntrack, "in"),
    ];
    pipes.iter().for_each(|pipe| pipe.request());
    let now = reader.collect();
    assert_eq!(now.series(&names::OPEN_CONNECTIONS, &[]), 0);
    drop(pipes);
    let now = reader.collect();
    assert!(!now.metrics().contains(names::OPEN_CONNECTIONS.name));
    assert!(!now.metrics().contains(names::CONNECTION_DURATION.name));
    assert_eq!(now.count(&names::CONNECTION_REQUEST_COUNT, &[]), 2);
}

#[test]
fn a_connection_moves_to_its_protocol_version_when_that_is_known() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let pipes = [0, 1, 2].map(|_| dial(&conntrack, "api", http("a.test")));
    let versions = [ProtocolVersion::Http11, ProtocolVersion::Http2];
    pipes.iter().for_each(|pipe| pipe.request());
    let running = pipes[0].io.record().request_started();
    assert_eq!(states(&reader.collect(), &[]), (1, 2));

    for (pipe, version) in pipes.iter().zip(versions) {
        pipe.io.record().set_protocol(version);
        pipe.io.record().set_protocol(version);
    }
    let now = reader.collect();
    assert_eq!(states(&now, &[(names::PROTOCOL_VERSION, "1.1")]), (1, 0));
    assert_eq!(states(&now, &[(names::PROTOCOL_VERSION, "2")]), (0, 1));
    assert_eq!(states(&now, &[]), (1, 2));
    // 1.1, 2 and not known, each active and idle.
    assert_eq!(now.series(&names::OPEN_CONNECTIONS, &[]), 6);
    agree(&now, &conntrack, &[]);

    // While it runs a request, and after it was closed: the sums stay.
    pipes[0].io.record().set_protocol(ProtocolVersion::Http10);
    let record = pipes[1].io.record();
    let [first, second, third] = pipes;
    drop(second);
    record.set_protocol(ProtocolVersion::Http3);
    let now = reader.collect();
    assert_eq!(states(&now, &[(names::PROTOCOL_VERSION, "1.0")]), (1, 0));
    assert_eq!(states(&now, &[]), (1, 1));
    agree(&now, &conntrack, &[]);
    drop((first, third, running));
    let ended = |version| {
        let version = [(names::PROTOCOL_VERSION, version)];
        reader
            .collect()
            .count(&names::CONNECTION_DURATION, &version)
    };
    assert_eq!((ended("1.0"), ended("1.1"), ended("2")), (1, 0, 1));
}

#[tokio::test]
async fn each_phase_of_a_set_up_is_recorded_once_in_its_histogram() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let (server, trust) = tls::pair("up.test");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = tokio_rustls::TlsAcceptor::from(server);
    let peer = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            if let Ok(mut stream) = acceptor.accept(stream).await {
                let _ = stream.read(&mut [0; 1]).await;
            }
        }
    });
    let dialer = conntrack
        .dialer("api")
        .resolver(Hosts::at(&[LOOPBACK]))
        .tls(trust);
    let dialer = dialer.build().unwrap();

    let mut good = dialer.connect_tls(("up.test", port)).await.unwrap();
    good.write_all(b"x").await.unwrap();
    assert!(dialer.connect_tls((LOOPBACK, port)).await.is_err());
    // Nobody listens on port 1.
    assert!(dialer.connect(("up.test", 1)).await.is_err());
    assert!(dialer.connect(("unknown.test", 1)).await.is_err());
    drop(good);
    peer.abort();

    let now = reader.collect();
    let by =
        |metric, reason: FailureReason| now.count(metric, &[(names::ERROR_TYPE, reason.as_str())]);
    assert_eq!(now.count(&names::SETUP_DURATION, &[]), 4);
    assert_eq!(now.count(&names::DNS_DURATION, &[]), 3);
    assert_eq!(
        now.count(&names::DNS_DURATION, &[(names::DNS_QUESTION, "up.test")]),
        2
    );
    assert_eq!(by(&names::DNS_DURATION, FailureReason::HostNotFound), 1);
    assert_eq!(now.count(&names::TCP_DURATION, &[]), 3);
    assert_eq!(
        by(&names::TCP_DURATION, FailureReason::ConnectionRefused),
        1
    );
    assert_eq!(now.count(&names::TLS_DURATION, &[]), 2);
    assert_eq!(by(&names::TLS_DURATION, FailureReason::TlsCertificate), 1);
    assert_eq!(now.count(&names::DURATION, &[]), 1);
    agree(&now, &conntrack, &[]);
}

#[test]
fn bytes_are_counted_where_they_moved_and_stay_when_the_connection_is_gone() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let mut pipes = [
        (dial(&conntrack, "api", http("a.test")), "api", "outbound"),
        (accept(&conntrack, "in"), "in", "inbound"),
    ];
    for (pipe, ..) in &mut pipes {
        pipe.write(123);
        pipe.read(45);
    }
    fail(&conntrack, "api", http("a.test"), io::ErrorKind::TimedOut);
    let check = |now: &Collection| {
        for (name, direction) in [("api", "outbound"), ("in", "inbound")] {
            for (way, bytes) in [("written", 123), ("read", 45)] {
                let own = [
                    (names::NAME, name),
                    (names::DIRECTION, direction),
                    (names::IO_LAYER, "wire"),
                    (names::IO_DIRECTION, way),
                ];
                assert_eq!(now.sum(&names::IO, &own), bytes, "{own:?}");
                assert_eq!(now.series(&names::IO, &own), 1);
            }
        }
        agree(now, &conntrack, &[]);
    };
    check(&reader.collect());
    drop(pipes);
    check(&reader.collect());
    check(&reader.collect());
}
