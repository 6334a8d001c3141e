//! Misdeeds in the TLS handshake, and with what it negotiates.

use std::time::Duration;

use http::Version;
use otel_conntrack::{
    CloseReason, ConnectionState, FailureReason, HttpVersions, Initiator, TransportErrorKind,
};

use crate::hostile::{Behaviour, Certificate, H2Behaviour, Hostile};
use crate::lab::{Failed, get, lab, text};

const BOTH: &[&str] = &["h2", "http/1.1"];

#[tokio::test]
async fn the_version_is_negotiated_by_alpn() {
    use HttpVersions::{Auto, Http1, Http2};
    let expected = |versions, alpn: &[&str]| match versions {
        Auto if alpn.is_empty() => Ok(Version::HTTP_11),
        Http1 if alpn.is_empty() => Ok(Version::HTTP_11),
        Auto | Http2 if alpn.contains(&"h2") => Ok(Version::HTTP_2),
        Auto | Http1 if alpn.contains(&"http/1.1") => Ok(Version::HTTP_11),
        _ => Err(Failed::unsent("Dial", FailureReason::TlsHandshake)),
    };
    for versions in [Auto, Http1, Http2] {
        for alpn in [BOTH, &["h2"], &["http/1.1"], &["spdy/1"], &[]] {
            let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, alpn).await;
            let lab = lab(|t| t.http_versions(versions));
            let got = lab.transport.send(get(&server.uri("/"))).await;
            let got = got.map(|r| r.version()).map_err(|e| Failed::of(&e));
            assert_eq!(got, expected(versions, alpn), "{versions:?} and {alpn:?}");
            let stats = lab.conntrack.stats();
            let failed = stats
                .dialer("test")
                .unwrap()
                .failed(FailureReason::TlsHandshake);
            assert_eq!(failed, u64::from(got.is_err()));
            lab.end(&server).await;
        }
    }
}

#[tokio::test]
async fn a_bad_certificate_fails_the_dial_and_names_the_fault() {
    for (certificate, word) in [
        (Certificate::SelfSigned, "UnknownIssuer"),
        (Certificate::Expired, "expired"),
        (Certificate::WrongName, "elsewhere.invalid"),
    ] {
        let server = Hostile::start_tls(Behaviour::Ok, certificate, BOTH).await;
        let lab = lab(|t| t);
        let error = lab.get(&server.uri("/")).await.unwrap_err();
        let expected = Failed::unsent("Dial", FailureReason::TlsCertificate);
        assert_eq!(Failed::of(&error), expected, "{certificate:?}");
        assert!(error.to_string().contains(word), "{error}");
        let attempts = lab.conntrack.recently_closed();
        assert_eq!(attempts.len(), 1);
        assert_eq!(attempts[0].failed, Some(FailureReason::TlsCertificate));
        assert_eq!(
            (attempts[0].closed, attempts[0].state),
            (None, ConnectionState::Closed)
        );
        assert_eq!(server.requests(), 0);
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn a_name_that_the_certificate_has_is_as_good_as_the_address() {
    let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, BOTH).await;
    let lab = lab(|t| t);
    let url = format!("https://localhost:{}/", server.address.port());
    let response = lab.transport.send(get(&url)).await.unwrap();
    assert_eq!(text(response).await, "ok");
    lab.end(&server).await;
}

#[tokio::test]
async fn a_handshake_that_is_not_answered_times_out() {
    for behaviour in [Behaviour::StallHandshake, Behaviour::NeverRead] {
        for own in [true, false] {
            let server = Hostile::start_tls(behaviour.clone(), Certificate::Good, BOTH).await;
            let soon = Duration::from_millis(80);
            let lab = lab(|t| match own {
                true => t.tls_handshake_timeout(soon),
                false => t.tls_handshake_timeout(None).connect_timeout(soon),
            });
            let error = lab.get(&server.uri("/")).await.unwrap_err();
            let expected = Failed::unsent("Dial", FailureReason::TimedOut);
            assert_eq!(Failed::of(&error), expected, "{behaviour:?}");
            let setting = if own {
                "tls_handshake_timeout = 80ms"
            } else {
                "timeout of 80ms"
            };
            assert!(error.to_string().contains(setting), "{error}");
            if matches!(behaviour, Behaviour::NeverRead) {
                // It does not look whether anybody is there.
                lab.end_alone().await;
            } else {
                lab.end(&server).await;
            }
        }
    }
}

#[tokio::test]
async fn a_handshake_that_breaks_off_fails_the_dial() {
    for (behaviour, reason) in [
        (Behaviour::GarbageHandshake, FailureReason::TlsHandshake),
        (Behaviour::AcceptAndClose, FailureReason::ConnectionReset),
        (Behaviour::AcceptAndReset, FailureReason::ConnectionReset),
    ] {
        let server = Hostile::start_tls(behaviour.clone(), Certificate::Good, BOTH).await;
        let lab = lab(|t| t);
        let failed = lab.fails(&server.uri("/")).await;
        assert_eq!(failed, Failed::unsent("Dial", reason), "{behaviour:?}");
        let stats = lab.conntrack.stats();
        assert_eq!(
            stats.dialer("test").unwrap().failed(reason),
            1,
            "{behaviour:?}"
        );
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn those_who_share_a_dial_share_its_failure() {
    let certificate = Certificate::Expired;
    let server = Hostile::start_tls(Behaviour::Ok, certificate, BOTH).await;
    let lab = lab(|t| t);
    let url = server.uri("/");
    let all = futures_util::future::join_all((0..10).map(|_| lab.get(&url))).await;
    for error in all {
        let error = error.unwrap_err();
        assert!(
            matches!(error.kind(), TransportErrorKind::Dial(_)),
            "{error:?}"
        );
        assert_eq!(error.reason(), FailureReason::TlsCertificate);
    }
    assert_eq!(server.accepted(), 1);
    lab.end(&server).await;
}

#[tokio::test]
async fn a_server_that_speaks_another_version_than_it_chose_breaks_the_protocol() {
    let h2 = Behaviour::H2(H2Behaviour::Ok {
        max_concurrent_streams: None,
    });
    for (behaviour, alpn) in [(h2, "http/1.1"), (Behaviour::CloseAfter(9), "h2")] {
        let server = Hostile::start_tls(behaviour, Certificate::Good, &[alpn]).await;
        let lab = lab(|t| t);
        let failed = lab.fails(&server.uri("/")).await;
        assert_eq!(
            failed,
            Failed::sent("Protocol", FailureReason::Other),
            "{alpn}"
        );
        let broken = (CloseReason::ProtocolError, Initiator::Local);
        assert_eq!(lab.wait_closed(1).await, [broken], "{alpn}");
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_under_tls_ends_as_without() {
    let peer = (CloseReason::PeerClosed, Initiator::Remote);
    let reset = (CloseReason::ConnectionReset, Initiator::Remote);
    for (behaviour, why) in [
        (Behaviour::CloseMidHeader, peer),
        (Behaviour::CloseMidBody, peer),
        (Behaviour::ResetMidHeader, reset),
        (Behaviour::ResetMidBody, reset),
    ] {
        let server = Hostile::start_tls(behaviour.clone(), Certificate::Good, &[]).await;
        let lab = lab(|t| t);
        let failed = lab.fails(&server.uri("/")).await;
        assert_eq!(failed, Failed::CLOSED, "{behaviour:?}");
        assert_eq!(lab.wait_closed(1).await, [why], "{behaviour:?}");
        lab.end(&server).await;
    }
}
