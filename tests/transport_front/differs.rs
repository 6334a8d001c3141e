//! What differs from a plain reqwest client, as the documentation's table says. Where a test says what
//! reqwest does and that changes, so must the table.

use std::sync::Arc;

use otel_conntrack::{FrontErrorKind, HttpVersions};
use reqwest::Version;
use rustls::ClientConfig;

use super::hostile::{Behaviour, Certificate, Command, Hostile, roots};
use super::site::Site;
use super::{LONG, Ours, front_error};

pub(crate) fn trusting() -> ClientConfig {
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots())
        .with_no_client_auth()
}

#[tokio::test]
async fn a_secret_that_was_left_behind_stays_there() {
    let (site, other) = (Site::start().await, Site::start().await);
    // To another origin, which redirects within itself.
    let url = site.redirect(302, &other.redirect(302, "/next"));
    let headers = [("authorization", "secret"), ("cookie", "secret=1")];
    let with = |request: reqwest::RequestBuilder| {
        let add = |request: reqwest::RequestBuilder, (name, value)| request.header(name, value);
        headers.into_iter().fold(request, add)
    };

    let plain = crate::plain().build().unwrap();
    with(plain.get(&url)).send().await.unwrap();
    let asked = other.asked();
    assert!(!asked[0].contains("secret"), "{asked:?}");
    assert!(
        asked[1].contains("secret"),
        "reqwest keeps it now: {asked:?}"
    );

    let ours = Ours::new(|t| t, |f| f);
    let (_, request) = with(plain.get(&url)).build_split();
    let response = ours.client.execute(request.unwrap()).await.unwrap();
    assert_eq!(response.url().as_str(), other.url("/next"));
    let asked = other.asked();
    assert_eq!(asked.len(), 2);
    for request in asked {
        assert!(!request.contains("secret"), "{request}");
    }
}

#[tokio::test]
async fn a_slow_caller_is_no_slow_server() {
    let server = Hostile::start(Behaviour::Ok).await;
    let ours = Ours::new(|t| t, |f| f.read_timeout(LONG));
    let response = ours.get(&server.uri("/hold-body")).await.unwrap();
    let length = length(&response).unwrap();
    assert_eq!(read_late(response, &server).await.unwrap(), length);
    ours.settled().await;

    let plain = crate::plain().read_timeout(LONG);
    let plain = plain.build().unwrap();
    let response = plain.get(server.uri("/hold-body")).send().await.unwrap();
    let came = read_late(response, &server).await;
    assert!(came.is_err(), "reqwest waits for its caller now");
}

/// Reads a body that is held in the middle, and takes its time there.
async fn read_late(mut response: reqwest::Response, server: &Hostile) -> reqwest::Result<u64> {
    let mut read = response.chunk().await?.map_or(0, |begin| begin.len());
    server.command(Command::Release);
    tokio::time::pause();
    tokio::time::advance(2 * LONG).await;
    tokio::time::resume();
    while let Some(more) = response.chunk().await? {
        read += more.len();
    }
    Ok(read as u64)
}

fn length(response: &reqwest::Response) -> Option<u64> {
    let length = response.headers().get("content-length")?;
    length.to_str().ok()?.parse().ok()
}

#[tokio::test]
async fn a_body_that_timed_out_has_no_connection_any_more() {
    let server = Hostile::start(Behaviour::Ok).await;
    let ours = Ours::new(|t| t.max_conns_per_host(1), |f| f.read_timeout(LONG));
    let mut response = ours.get(&server.uri("/hold-body")).await.unwrap();
    assert!(response.chunk().await.unwrap().is_some());
    // Nothing more comes: the clock jumps to where the time is over.
    tokio::time::pause();
    let error = loop {
        match response.chunk().await {
            Ok(more) => assert!(more.is_some()),
            Err(error) => break error,
        }
    };
    tokio::time::resume();
    assert!(error.is_timeout(), "{error:?}");
    let ours_said: &otel_conntrack::FrontError = super::source(&error);
    assert!(
        matches!(ours_said.kind(), FrontErrorKind::ReadTimeout { timeout } if *timeout == LONG)
    );
    // The response is kept, and yet there is room for the next request.
    let next = ours.get(&server.uri("/")).await.unwrap();
    assert_eq!(next.text().await.unwrap(), "ok");
    assert_eq!(response.chunk().await.unwrap(), None);
    ours.settled().await;
}

#[tokio::test]
async fn a_user_in_a_redirect_goes_nowhere() {
    let (site, other) = (Site::start().await, Site::start().await);
    let to = format!("http://me:secret@{}/next", other.address());
    for versions in [HttpVersions::Auto, HttpVersions::Http2] {
        let ours = Ours::new(|t| t.http_versions(versions), |f| f);
        let response = ours.get(&site.redirect(302, &to)).await.unwrap();
        assert_eq!(response.url().as_str(), to);
        let asked = other.asked().remove(0);
        // Where it came from is in the referer, as the server itself wrote it.
        let asked = asked.lines().filter(|line| !line.starts_with("referer"));
        assert!(!asked.collect::<String>().contains("secret"));
    }
}

#[tokio::test]
async fn a_version_that_is_not_spoken_is_an_error_before_anything_is_sent() {
    let both: &[&str] = &["h2", "http/1.1"];
    let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, both).await;
    let clear = Hostile::start(Behaviour::Ok).await;
    use HttpVersions::{Auto, Http1, Http2};
    for (versions, server, asked, got) in [
        (Auto, &server, Version::HTTP_2, Some(Version::HTTP_2)),
        // The server chooses.
        (Auto, &server, Version::HTTP_11, Some(Version::HTTP_2)),
        (Http1, &server, Version::HTTP_11, Some(Version::HTTP_11)),
        (Http1, &server, Version::HTTP_2, None),
        (Http2, &server, Version::HTTP_11, Some(Version::HTTP_2)),
        (Auto, &clear, Version::HTTP_2, None),
        (Auto, &clear, Version::HTTP_10, Some(Version::HTTP_11)),
        (Auto, &clear, Version::HTTP_3, None),
        (Auto, &clear, Version::HTTP_09, None),
    ] {
        let ours = Ours::new(|t| t.http_versions(versions).tls(trusting()), |f| f);
        let request = ours.client.get(server.uri("/")).version(asked).send();
        match (request.await, got) {
            (Ok(response), Some(got)) => assert_eq!(response.version(), got),
            (Err(error), None) => {
                let FrontErrorKind::Version { version } = front_error(&error) else {
                    panic!("{error}");
                };
                assert_eq!(*version, asked);
                assert_eq!(ours.told.count("GetConn"), 0);
            }
            (came, got) => panic!("{versions:?} {asked:?}: {came:?} {got:?}"),
        }
    }
}
