//! The dialer's sockets: options that are really set, local addresses, Unix sockets; and settings
//! that can't be.
#![allow(clippy::unwrap_used)]
#![cfg(feature = "net")]

mod support;

use std::time::Duration;

use otel_conntrack::{Conntrack, Endpoint, FailureReason, Keepalive};
use socket2::SockRef;
use support::peers::{Answers, bound, listen, watched};

#[test]
fn settings_that_can_not_be_are_errors_that_name_them() {
    let conntrack = Conntrack::builder().build().unwrap();
    let cases = [
        (conntrack.dialer(""), "dialer name"),
        (conntrack.dialer(&"x".repeat(101)), "dialer name"),
        (conntrack.dialer("d\nb"), "dialer name"),
        (
            conntrack.dialer("db").timeout(Duration::ZERO),
            "dialer timeout",
        ),
        (
            conntrack
                .dialer("db")
                .attempt_delay(Duration::from_millis(9)),
            "dialer attempt_delay",
        ),
    ];
    for (builder, setting) in cases {
        let error = builder.build().unwrap_err();
        assert_eq!(error.setting(), setting);
        assert!(
            error.to_string().starts_with(&format!("{setting} = ")),
            "{error}"
        );
    }
    assert!(conntrack.stats().scopes.is_empty());
}

#[tokio::test]
async fn socket_options_are_really_set() {
    let conntrack = Conntrack::builder().build().unwrap();
    let ([open], port) = bound(["127.0.0.1"]);
    let listener = listen(open);
    let keepalive = Keepalive::new(Duration::from_secs(42)).interval(Duration::from_secs(7));
    let db = conntrack
        .dialer("db")
        .nodelay(false)
        .keepalive(keepalive.retries(3))
        .send_buffer_size(32_768)
        .receive_buffer_size(65_536)
        .user_timeout(Duration::from_millis(4_321))
        .local_address("127.0.0.9".parse().unwrap())
        .build()
        .unwrap();
    let stream = db.connect(("127.0.0.1", port)).await.unwrap();
    let (_accepted, peer) = listener.accept().await.unwrap();
    assert_eq!(peer.ip().to_string(), "127.0.0.9");

    let socket = SockRef::from(stream.get_ref());
    assert!(!socket.tcp_nodelay().unwrap());
    assert!(socket.keepalive().unwrap());
    assert_eq!(
        socket.tcp_keepalive_time().unwrap(),
        Duration::from_secs(42)
    );
    assert_eq!(
        socket.tcp_keepalive_interval().unwrap(),
        Duration::from_secs(7)
    );
    assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
    #[cfg(target_os = "linux")]
    {
        // Linux doubles the sizes, for its own book-keeping.
        assert_eq!(socket.send_buffer_size().unwrap(), 2 * 32_768);
        assert_eq!(socket.recv_buffer_size().unwrap(), 2 * 65_536);
        assert_eq!(
            socket.tcp_user_timeout().unwrap(),
            Some(Duration::from_millis(4_321))
        );
    }
}

#[tokio::test]
async fn by_default_small_writes_are_sent_at_once_and_nothing_else_is_set() {
    let conntrack = Conntrack::builder().build().unwrap();
    let ([open], port) = bound(["127.0.0.1"]);
    let listener = listen(open);
    let db = conntrack.dialer("db").build().unwrap();
    let stream = db.connect(("127.0.0.1", port)).await.unwrap();
    let plain = tokio::net::TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let (ours, plain) = (SockRef::from(stream.get_ref()), SockRef::from(&plain));
    assert!(ours.tcp_nodelay().unwrap());
    assert!(!ours.keepalive().unwrap());
    assert_eq!(
        ours.send_buffer_size().unwrap(),
        plain.send_buffer_size().unwrap()
    );
}

#[tokio::test]
async fn with_a_local_address_the_other_family_is_not_tried() {
    let (conntrack, mut events) = watched();
    let ([open], port) = bound(["127.0.0.1"]);
    let _listener = listen(open);
    let here = "127.0.0.1".parse().unwrap();
    let both = conntrack
        .dialer("db")
        .resolver(Answers::new(&["::1", "127.0.0.1"]));
    let stream = both
        .local_address(here)
        .build()
        .unwrap()
        .connect(("db.test", port))
        .await;
    assert!(stream.is_ok());
    assert!(!events.lines().contains(&"ConnectStart ::1".to_owned()));

    let other = conntrack
        .dialer("db")
        .resolver(Answers::new(&["::1"]))
        .local_address(here);
    let error = other
        .build()
        .unwrap()
        .connect(("db.test", port))
        .await
        .unwrap_err();
    assert_eq!(error.reason(), FailureReason::HostNotFound);
}

#[tokio::test]
async fn a_local_address_that_is_not_ours_fails_the_attempt_for_that_reason() {
    let (conntrack, mut events) = watched();
    let ([open], port) = bound(["127.0.0.1"]);
    let _listener = listen(open);
    // TEST-NET-1 is nobody's.
    let db = conntrack
        .dialer("db")
        .local_address("192.0.2.1".parse().unwrap())
        .build()
        .unwrap();
    let error = db.connect(("127.0.0.1", port)).await.unwrap_err();
    assert_eq!(error.reason(), FailureReason::AddressNotAvailable);
    events
        .until("ConnectDone 127.0.0.1 address_not_available")
        .await;
}

// === Unix sockets ===

#[cfg(unix)]
#[tokio::test]
async fn unix_sockets_are_dialled_by_their_path() {
    let (conntrack, mut events) = watched();
    let directory = std::env::temp_dir().join(format!("otel-conntrack-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("db.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let db = conntrack.dialer("db").build().unwrap();

    let stream = db.connect_unix(&path).await.unwrap();
    let snapshot = stream.record().snapshot();
    assert_eq!(
        snapshot.peer,
        Some(Endpoint::Unix(path.to_string_lossy().into()))
    );
    assert_eq!(snapshot.target.unwrap().port, None);
    drop(stream);
    let missing = db
        .connect_unix(directory.join("missing.sock"))
        .await
        .unwrap_err();
    assert_eq!(missing.reason(), FailureReason::HostNotFound);
    drop(listener);
    let abandoned = db.connect_unix(&path).await.unwrap_err();
    assert_eq!(abandoned.reason(), FailureReason::ConnectionRefused);
    std::fs::remove_dir_all(&directory).unwrap();
    assert_eq!(
        events.lines(),
        [
            "AttemptStarted",
            "Established",
            "Closed dropped local",
            "AttemptStarted",
            "SetupFailed host_not_found",
            "AttemptStarted",
            "SetupFailed connection_refused",
        ]
    );
}
