//! Unix sockets.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use http::Version;
use otel_conntrack::{Endpoint, FailureReason, HttpVersions};

use super::{ask, get, site, text, transport};

/// A path of its own, removed in the end.
struct Socket(PathBuf);

impl Socket {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("conntrack-{}-{n}.sock", std::process::id());
        Self(std::env::temp_dir().join(name))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[tokio::test]
async fn requests_go_to_the_socket_whatever_host_they_name() {
    for (versions, version) in [
        (HttpVersions::Auto, Version::HTTP_11),
        (HttpVersions::Http1, Version::HTTP_11),
        (HttpVersions::Http2, Version::HTTP_2),
    ] {
        let socket = Socket::new();
        site::unix(&socket.0);
        let (conntrack, transport) =
            transport(|t| t.unix_socket(&socket.0).http_versions(versions));
        for n in 0..3 {
            let response = transport.send(get("http://docker/x?y")).await.unwrap();
            assert_eq!(response.version(), version);
            let record = response.body().connection().clone();
            let snapshot = record.snapshot();
            let path = socket.0.to_str().unwrap();
            assert_eq!(snapshot.peer, Some(Endpoint::Unix(path.into())));
            assert_eq!(snapshot.target.unwrap().to_string(), path);
            assert_eq!(snapshot.requests, n + 1);
            let head = text(response.into_body()).await;
            if version == Version::HTTP_2 {
                assert!(head.starts_with("GET http://docker/x?y HTTP/2\n"), "{head}");
            } else {
                assert!(head.starts_with("GET /x?y HTTP/1\n"), "{head}");
                assert!(head.contains("host: docker\n"), "{head}");
            }
        }
        let stats = conntrack.stats();
        let dialer = stats.dialer("test").unwrap();
        assert_eq!((dialer.established, dialer.open), (1, 1));
    }
}

#[tokio::test]
async fn a_socket_that_is_not_there_is_an_error_with_its_path() {
    let socket = Socket::new();
    let (_conntrack, transport) = transport(|t| t.unix_socket(&socket.0));
    let error = transport.send(get("http://docker/")).await.unwrap_err();
    assert_eq!(error.reason(), FailureReason::HostNotFound, "{error}");
    assert!(error.to_string().contains(socket.0.to_str().unwrap()));
    // It may come later.
    site::unix(&socket.0);
    assert!(
        ask(&transport, "http://docker/")
            .await
            .starts_with("GET / ")
    );
}

#[tokio::test]
async fn a_unix_socket_and_a_proxy_contradict_each_other() {
    let conntrack = otel_conntrack::Conntrack::builder().build().unwrap();
    let both = conntrack
        .transport("x")
        .unix_socket("/x")
        .all_proxy("http://p");
    assert!(
        both.build()
            .unwrap_err()
            .to_string()
            .contains("unix_socket")
    );
}
