//! What becomes of a URL: the `Host` header, the path, the user in it.

use bytes::Bytes;
use http::Request;
use http_body_util::Empty;
use otel_conntrack::{FailureReason, HttpVersions, TransportErrorKind};

use super::peers::Answers;
use super::{ask, get, site, text, transport};

#[tokio::test]
async fn the_host_header_is_the_urls_without_user_and_default_port() {
    let address = site::plain().await;
    let (_conntrack, transport) = transport(|t| t.resolver(Answers::new(&["127.0.0.1"])));
    let port = address.port();
    for (url, line, host) in [
        (
            format!("http://a.test:{port}/p?q=1#f"),
            "GET /p?q=1 HTTP/1",
            format!("a.test:{port}"),
        ),
        (
            format!("http://A.Test:{port}"),
            "GET / HTTP/1",
            format!("a.test:{port}"),
        ),
        (
            format!("http://user:pw@a.test:{port}/"),
            "GET / HTTP/1",
            format!("a.test:{port}"),
        ),
        (
            format!("http://127.0.0.1:{port}/?q"),
            "GET /?q HTTP/1",
            format!("127.0.0.1:{port}"),
        ),
    ] {
        let head = ask(&transport, &url).await;
        assert_eq!(head, format!("{line}\nhost: {host}\n"), "{url}");
    }
}

#[tokio::test]
async fn default_ports_and_brackets_are_as_they_should_be() {
    let socket = std::env::temp_dir().join(format!("conntrack-urls-{}.sock", std::process::id()));
    let _ = std::fs::remove_file(&socket);
    site::unix(&socket);
    let (_conntrack, transport) = transport(|t| t.unix_socket(&socket));
    for (url, host) in [
        ("http://a.test/", "a.test"),
        ("http://a.test:80/", "a.test"),
        ("http://a.test:443/", "a.test:443"),
        ("http://[::1]/", "[::1]"),
        ("http://[2001:DB8::1]:8080/", "[2001:db8::1]:8080"),
    ] {
        let head = ask(&transport, url).await;
        assert!(head.contains(&format!("\nhost: {host}\n")), "{url}: {head}");
    }
    let _ = std::fs::remove_file(&socket);
}

#[tokio::test]
async fn an_ipv6_address_is_dialled() {
    let address = site::at("[::1]:0").await;
    let (_conntrack, transport) = transport(|t| t);
    let head = ask(&transport, &format!("http://{address}/")).await;
    assert_eq!(head, format!("GET / HTTP/1\nhost: {address}\n"));
}

#[tokio::test]
async fn a_callers_host_stays() {
    let address = site::plain().await;
    for versions in [HttpVersions::Http1, HttpVersions::Http2] {
        let (_conntrack, transport) = transport(|t| t.http_versions(versions));
        let request = Request::get(format!("http://u:p@{address}/x"))
            .header("host", "other.test")
            .body(Empty::<Bytes>::new());
        let head = text(transport.send(request.unwrap()).await.unwrap().into_body()).await;
        if versions == HttpVersions::Http2 {
            assert_eq!(head, "GET http://other.test/x HTTP/2\n");
        } else {
            assert_eq!(head, "GET /x HTTP/1\nhost: other.test\n");
        }
        // No user on HTTP/2 either.
        let head = ask(&transport, &format!("http://u:p@{address}/x")).await;
        assert!(
            head.contains(&address.to_string()) && !head.contains("u:p"),
            "{head}"
        );
    }
}

#[tokio::test]
async fn what_is_no_url_of_a_server_is_refused_and_given_back() {
    let (conntrack, transport) = transport(|t| t);
    for url in ["/path", "ftp://a.test/", "http://a.test:0/"] {
        let mut error = transport.send(get(url)).await.unwrap_err();
        assert!(
            matches!(error.kind(), TransportErrorKind::InvalidUrl),
            "{url}: {error}"
        );
        assert_eq!(error.reason(), FailureReason::InvalidArgument);
        let request = error.take_request::<Empty<Bytes>>().unwrap();
        assert_eq!(request.uri(), url);
    }
    assert_eq!(transport.stats().event("GetConn"), 0);
    assert_eq!(conntrack.stats().dialer("test").unwrap().attempts, 0);
}
