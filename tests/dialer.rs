//! The dialer: the addresses that it tries and what it tells of each, and what is a target. Sockets
//! are in `dialer_sockets.rs`, early ends of set-up in `dialer_endings.rs`, TLS in `dialer_tls.rs`.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "net")]

mod support;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use otel_conntrack::{
    ConnectionEventKind as Kind, ConnectionState, Endpoint, FailureReason, Target,
};
use support::peers::{Answers, Fails, bound, dialer, failures, listen, silent, watched};

// === addresses ===

#[tokio::test]
async fn an_address_that_refuses_gives_way_to_the_next_and_each_is_told_as_a_pair() {
    let (conntrack, mut events) = watched();
    let ([first, _refuses], port) = bound(["127.0.0.1", "127.0.0.2"]);
    let _listener = listen(first);
    let resolver = Answers::new(&["127.0.0.2", "127.0.0.1"]);
    let db = conntrack.dialer("db").resolver(resolver).build().unwrap();
    let stream = db.connect(("db.test", port)).await.unwrap();
    assert_eq!(
        events.lines(),
        [
            "AttemptStarted",
            "DnsStart db.test",
            "DnsDone db.test ok",
            "ConnectStart 127.0.0.2",
            "ConnectDone 127.0.0.2 connection_refused",
            "ConnectStart 127.0.0.1",
            "ConnectDone 127.0.0.1 ok",
            "Established",
        ]
    );
    let snapshot = stream.record().snapshot();
    assert_eq!(
        snapshot.peer,
        Some(Endpoint::Ip(stream.get_ref().peer_addr().unwrap()))
    );
    assert_eq!(
        snapshot.local,
        Some(Endpoint::Ip(stream.get_ref().local_addr().unwrap()))
    );
    assert_eq!(snapshot.target, Some(Target::new("db.test", port)));
    assert_eq!(
        (snapshot.state, snapshot.failed),
        (ConnectionState::Open, None)
    );
    // One attempt, however many addresses.
    let stats = dialer(&conntrack, "db");
    assert_eq!(
        (stats.attempts, stats.established, stats.failed_total()),
        (1, 1, 0)
    );
}

#[tokio::test]
async fn families_alternate_and_what_this_host_can_not_reach_gives_way() {
    let (conntrack, mut events) = watched();
    let ([v4], port) = bound(["127.0.0.1"]);
    let _listener = listen(v4);
    // `::1` has nobody on this port, or the host has no IPv6 at all.
    let resolver = Answers::new(&["::1", "100::1", "127.0.0.1"]);
    let hour = Duration::from_secs(3_600);
    let db = conntrack
        .dialer("db")
        .resolver(resolver)
        .attempt_delay(hour)
        .timeout(None);
    let db = db.build().unwrap();
    let stream = db.connect(("db.test", port)).await.unwrap();
    let lines = events.lines();
    let starts: Vec<_> = lines
        .iter()
        .filter(|l| l.starts_with("ConnectStart"))
        .collect();
    assert_eq!(starts, ["ConnectStart ::1", "ConnectStart 127.0.0.1"]);
    assert!(stream.get_ref().peer_addr().unwrap().is_ipv4());
}

#[tokio::test]
async fn the_first_to_connect_wins_and_the_loser_is_told_as_cancelled() {
    let (conntrack, mut events) = watched();
    let ([second, first], port) = bound(["127.0.0.1", "127.0.0.2"]);
    let _listener = listen(second);
    let _silent = silent(first).await;
    let resolver = Answers::new(&["127.0.0.2", "127.0.0.1"]);
    let db = conntrack.dialer("db").resolver(resolver);
    let db = db.attempt_delay(Duration::from_millis(10)).build().unwrap();
    let stream = db.connect(("db.test", port)).await.unwrap();
    assert_eq!(
        events.lines()[3..],
        [
            "ConnectStart 127.0.0.2",
            "ConnectStart 127.0.0.1",
            "ConnectDone 127.0.0.1 ok",
            "ConnectDone 127.0.0.2 cancelled",
            "Established",
        ]
    );
    drop(stream);
}

#[tokio::test]
async fn when_all_addresses_refuse_there_is_one_reason_and_every_error_is_in_the_text() {
    let (conntrack, mut events) = watched();
    let ([_a, _b], port) = bound(["127.0.0.1", "127.0.0.2"]);
    let resolver = Answers::new(&["127.0.0.1", "127.0.0.2"]);
    let db = conntrack.dialer("db").resolver(resolver).build().unwrap();
    let error = db.connect(("db.test", port)).await.unwrap_err();
    assert_eq!(error.reason(), FailureReason::ConnectionRefused);
    let text = error.to_string();
    assert!(text.contains(&format!("db.test:{port}")), "{text}");
    assert!(text.contains(&format!("127.0.0.2:{port}: ")), "{text}");
    assert_eq!(
        failures(&dialer(&conntrack, "db")),
        [("connection_refused", 1)]
    );
    assert_eq!(
        events.lines().last().unwrap(),
        "SetupFailed connection_refused"
    );
}

#[tokio::test]
async fn however_many_addresses_a_name_has_each_tried_one_is_a_pair() {
    let (conntrack, mut events) = watched();
    let ([_held], port) = bound(["127.0.0.1"]);
    let addresses = vec![IpAddr::V4(Ipv4Addr::LOCALHOST); 100];
    let db = conntrack
        .dialer("db")
        .resolver(Answers(addresses))
        .build()
        .unwrap();
    let error = db.connect(("db.test", port)).await.unwrap_err();
    assert_eq!(error.reason(), FailureReason::ConnectionRefused);
    let lines = events.lines();
    let count = |begin| lines.iter().filter(|line| line.starts_with(begin)).count();
    assert_eq!(count("ConnectStart"), 100);
    assert_eq!(count("ConnectDone 127.0.0.1 connection_refused"), 100);
}

#[tokio::test]
async fn the_answer_is_told_in_the_order_of_the_tries_and_sixteen_of_it_at_most() {
    let (conntrack, mut events) = watched();
    let ([only], port) = bound(["127.0.0.1"]);
    let _listener = listen(only);
    let mut answer = vec!["127.0.0.1"; 2];
    answer.extend(["::1"; 20]);
    let db = conntrack
        .dialer("db")
        .resolver(Answers::new(&answer))
        .build()
        .unwrap();
    let _stream = db.connect(("db.test", port)).await.unwrap();
    let Kind::DnsDone {
        addresses, error, ..
    } = events.until("DnsDone").await.kind
    else {
        panic!("it is a DnsDone")
    };
    let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses.len(), 16);
    assert_eq!(
        addresses[..5],
        ["127.0.0.1", "::1", "127.0.0.1", "::1", "::1"]
    );
    assert_eq!(error, None);
}

#[tokio::test]
async fn a_look_up_that_fails_ends_the_attempt_and_nothing_is_connected_to() {
    let (conntrack, mut events) = watched();
    let fails = Fails(|| std::io::ErrorKind::NotFound.into());
    let db = conntrack.dialer("db").resolver(fails).build().unwrap();
    assert!(db.connect("db.test:1").await.is_err());
    let db = conntrack
        .dialer("db")
        .resolver(Answers(Vec::new()))
        .build()
        .unwrap();
    assert!(db.connect("db.test:1").await.is_err());
    let once = [
        "AttemptStarted",
        "DnsStart db.test",
        "DnsDone db.test host_not_found",
        "SetupFailed host_not_found",
    ];
    assert_eq!(events.lines(), [once, once].concat());
}

// === targets ===

#[tokio::test]
async fn ip_addresses_are_not_looked_up_in_whatever_form_they_come() {
    let (conntrack, mut events) = watched();
    let fails = Fails(|| panic!("nobody asked for a name"));
    let db = conntrack.dialer("db").resolver(fails).build().unwrap();
    let ([v4], port) = bound(["127.0.0.1"]);
    let v4 = listen(v4);
    let address: SocketAddr = v4.local_addr().unwrap();
    db.connect(address).await.unwrap();
    db.connect(address.to_string()).await.unwrap();
    db.connect(("127.0.0.1", port)).await.unwrap();
    db.connect(Target::from(address)).await.unwrap();
    // Whether it answers depends on the host; that it is not looked up does not.
    let _ = db.connect(format!("[::1]:{port}")).await;
    let _ = db.connect(("[::1]", port)).await;
    let lines = events.lines();
    assert_eq!(
        lines
            .iter()
            .filter(|line| line.starts_with("ConnectDone"))
            .count(),
        6
    );
    assert!(
        !lines.iter().any(|line| line.starts_with("Dns")),
        "{lines:?}"
    );
}

#[tokio::test]
async fn what_is_no_target_is_no_attempt() {
    let (conntrack, mut events) = watched();
    let db = conntrack.dialer("db").build().unwrap();
    for target in [
        "",
        "db.test",
        "db.test:",
        ":80",
        "db.test:http",
        "db.test:65536",
        "::1:80",
    ] {
        let error = db.connect(target).await.unwrap_err();
        assert_eq!(error.reason(), FailureReason::InvalidArgument);
        assert!(error.to_string().contains("write `name:443`"), "{error}");
    }
    assert_eq!(dialer(&conntrack, "db").attempts, 0);
    assert!(events.lines().is_empty());

    // A path is a target, only not one of TCP: begun, and failed for one reason.
    assert!(db.connect(Target::unix("/run/db.sock")).await.is_err());
    assert_eq!(
        failures(&dialer(&conntrack, "db")),
        [("invalid_argument", 1)]
    );
}
