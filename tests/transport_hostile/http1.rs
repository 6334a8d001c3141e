//! Misdeeds in HTTP/1.1.

use std::time::Duration;

use http_body_util::{BodyExt, StreamBody};
use otel_conntrack::{CloseReason, FailureReason, HttpVersions, Initiator};

use crate::hostile::{Behaviour, Command, H2Behaviour, Hostile, REQUEST_TIMEOUT};
use crate::lab::{Failed, lab, post, text};

const PEER_CLOSED: (CloseReason, Initiator) = (CloseReason::PeerClosed, Initiator::Remote);
const RESET: (CloseReason, Initiator) = (CloseReason::ConnectionReset, Initiator::Remote);
const BROKEN: (CloseReason, Initiator) = (CloseReason::ProtocolError, Initiator::Local);
const TIMED_OUT: (CloseReason, Initiator) = (CloseReason::TimedOut, Initiator::Local);

/// More than both socket buffers take, so that its sender gets stuck.
const HUGE: usize = 16 << 20;
const SOON: Duration = Duration::from_millis(100);

#[tokio::test]
async fn a_connection_closed_after_an_answer_costs_no_request() {
    for (behaviour, why) in [
        (Behaviour::CloseAfter(1), PEER_CLOSED),
        (Behaviour::ResetAfter(1), RESET),
    ] {
        let server = Hostile::start(behaviour).await;
        let lab = lab(|t| t);
        for n in 1..=3 {
            assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
            assert_eq!(lab.wait_closed(n).await, vec![why; n]);
        }
        assert_eq!(server.accepted(), 3);
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn a_get_is_sent_again_if_its_reused_connection_ends_without_an_answer() {
    for (behaviour, why) in [
        (Behaviour::CloseOnNextRequest, PEER_CLOSED),
        (Behaviour::ResetOnNextRequest, RESET),
    ] {
        let server = Hostile::start(behaviour).await;
        let lab = lab(|t| t);
        for _ in 0..2 {
            assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
        }
        assert_eq!((server.accepted(), server.requests()), (2, 3));
        assert_eq!(lab.wait_closed(1).await, [why]);
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn a_post_and_a_get_that_may_not_be_sent_again_fail_as_sent() {
    for (behaviour, why) in [
        (Behaviour::CloseOnNextRequest, PEER_CLOSED),
        (Behaviour::ResetOnNextRequest, RESET),
    ] {
        for again in [false, true] {
            let server = Hostile::start(behaviour.clone()).await;
            let lab = lab(|t| t.retry_idempotent(again));
            assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
            let failed = if again {
                let failed = lab.transport.send(post(&server.uri("/"), 10)).await;
                Failed::of(&failed.unwrap_err())
            } else {
                lab.fails(&server.uri("/")).await
            };
            assert_eq!(failed, Failed::CLOSED);
            assert_eq!(lab.wait_closed(1).await, [why]);
            assert_eq!((server.accepted(), server.requests()), (1, 2));
            lab.end(&server).await;
        }
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_fails_the_request_and_ends_the_connection() {
    for (behaviour, path, why) in [
        (Behaviour::CloseMidHeader, "/", PEER_CLOSED),
        (Behaviour::ResetMidHeader, "/", RESET),
        (Behaviour::CloseMidBody, "/", PEER_CLOSED),
        (Behaviour::CloseMidBody, "/chunked/9", PEER_CLOSED),
        (Behaviour::ResetMidBody, "/", RESET),
        (Behaviour::ResetMidBody, "/chunked/9", RESET),
        (Behaviour::AcceptAndClose, "/", PEER_CLOSED),
    ] {
        let server = Hostile::start(behaviour.clone()).await;
        let lab = lab(|t| t);
        let url = server.uri(path);
        let error = lab.get(&url).await.unwrap_err();
        let failed = Failed::of(&error);
        if !matches!(behaviour, Behaviour::AcceptAndClose) || failed.sent {
            assert_eq!(failed, Failed::CLOSED, "{behaviour:?}");
            assert_eq!(lab.wait_closed(1).await, [why], "{behaviour:?}");
        }
        assert_eq!(error.target(), server.uri(""));
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn connections_that_are_reset_as_they_are_accepted_are_tried_a_few_times() {
    let server = Hostile::start(Behaviour::AcceptAndReset).await;
    let lab = lab(|t| t);
    let failed = lab.fails(&server.uri("/")).await;
    // Whether the reset or the request is faster.
    let unsent = Failed::unsent("ConnectionClosed", FailureReason::ConnectionReset);
    let undialled = Failed::unsent("Dial", FailureReason::ConnectionReset);
    assert!(
        [Failed::CLOSED, unsent, undialled].contains(&failed),
        "{failed:?}"
    );
    lab.wait_unused().await;
    assert!(
        (1..=8).contains(&server.accepted()),
        "{}",
        server.accepted()
    );
    lab.end(&server).await;
}

#[tokio::test]
async fn what_is_not_http_is_a_broken_protocol() {
    for behaviour in [
        Behaviour::Garbage,
        Behaviour::EndlessHeaders,
        Behaviour::HugeStatusLine,
    ] {
        let server = Hostile::start(behaviour.clone()).await;
        let lab = lab(|t| t);
        let failed = lab.fails(&server.uri("/")).await;
        assert_eq!(
            failed,
            Failed::sent("Protocol", FailureReason::Other),
            "{behaviour:?}"
        );
        assert_eq!(lab.wait_closed(1).await, [BROKEN], "{behaviour:?}");
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn an_answer_that_does_not_come_times_out() {
    let slow = Behaviour::SlowHead {
        every: Duration::from_millis(30),
    };
    for (behaviour, body) in [
        (Behaviour::NeverAnswer, 0),
        (Behaviour::NeverAnswer, HUGE),
        (Behaviour::StallHandshake, 0),
        (slow, 0),
    ] {
        let server = Hostile::start(behaviour.clone()).await;
        let lab = lab(|t| t.response_header_timeout(SOON));
        let error = lab
            .transport
            .send(post(&server.uri("/"), body))
            .await
            .unwrap_err();
        let expected = Failed::sent("ResponseHeaderTimeout", FailureReason::TimedOut);
        assert_eq!(Failed::of(&error), expected, "{behaviour:?}");
        assert_eq!(lab.wait_closed(1).await, [TIMED_OUT], "{behaviour:?}");
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn a_request_that_nobody_reads_times_out_and_its_socket_is_closed() {
    let server = Hostile::start(Behaviour::NeverRead).await;
    let lab = lab(|t| t.response_header_timeout(SOON).max_conns_per_host(1));
    let error = lab
        .transport
        .send(post(&server.uri("/"), HUGE))
        .await
        .unwrap_err();
    let expected = Failed::sent("ResponseHeaderTimeout", FailureReason::TimedOut);
    assert_eq!(Failed::of(&error), expected);
    assert_eq!(lab.wait_closed(1).await, [TIMED_OUT]);
    // What is unread keeps the server from seeing it.
    lab.end_alone().await;
}

#[tokio::test]
async fn a_slow_answer_is_an_answer() {
    let every = Duration::from_micros(100);
    let server = Hostile::start(Behaviour::SlowHead { every }).await;
    let lab = lab(|t| t);
    assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
    assert_eq!(lab.transport.stats().idle, 1);
    lab.end(&server).await;
}

#[tokio::test]
async fn an_answer_before_the_request_ends_is_given_and_the_connection_used_again_if_the_server_reads_on()
 {
    let server = Hostile::start(Behaviour::AnswerBeforeRequestEnds {
        status: 413,
        keep_reading: true,
    })
    .await;
    let lab = lab(|t| t);
    for _ in 0..2 {
        let response = lab
            .transport
            .send(post(&server.uri("/"), 200_000))
            .await
            .unwrap();
        assert_eq!(response.status(), 413);
        assert_eq!(text(response).await, "ok");
        lab.wait_unused().await;
    }
    assert_eq!((server.accepted(), lab.closed()), (1, vec![]));
    lab.end(&server).await;
}

#[tokio::test]
async fn an_answer_before_the_request_ends_is_given_and_the_connection_closed_if_the_server_reads_nothing()
 {
    let server = Hostile::start(Behaviour::AnswerBeforeRequestEnds {
        status: 413,
        keep_reading: false,
    })
    .await;
    let lab = lab(|t| t.max_conns_per_host(1));
    for n in 1..=2 {
        let response = lab
            .transport
            .send(post(&server.uri("/"), HUGE))
            .await
            .unwrap();
        assert_eq!(response.status(), 413);
        assert_eq!(text(response).await, "ok");
        lab.wait_unused().await;
        let cancelled = (CloseReason::RequestCancelled, Initiator::Local);
        assert_eq!(lab.wait_closed(n).await, vec![cancelled; n]);
    }
    lab.end_alone().await;
}

#[tokio::test]
async fn bytes_on_an_idle_connection_end_it_and_answer_nobody() {
    for bytes in [
        REQUEST_TIMEOUT,
        b"x",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno",
    ] {
        let server = Hostile::start(Behaviour::BytesOnIdle(bytes.to_vec())).await;
        let lab = lab(|t| t);
        assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
        assert_eq!(lab.wait_closed(1).await, [BROKEN]);
        assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
        assert_eq!(server.accepted(), 2);
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn a_body_without_end_goes_on_until_it_is_dropped() {
    let server = Hostile::start(Behaviour::EndlessBody).await;
    let lab = lab(|t| t);
    let response = lab
        .transport
        .send(crate::lab::get(&server.uri("/")))
        .await
        .unwrap();
    let mut body = response.into_body();
    let mut bytes = 0;
    while bytes < 100_000 {
        bytes += body
            .frame()
            .await
            .unwrap()
            .unwrap()
            .into_data()
            .unwrap()
            .len();
    }
    drop(body);
    assert_eq!(
        lab.wait_closed(1).await,
        [(CloseReason::RequestCancelled, Initiator::Local)]
    );
    lab.end(&server).await;
}

#[tokio::test]
async fn a_last_answer_ends_its_connection_in_good_order() {
    let last = (CloseReason::ConnectionClose, Initiator::Local);
    for (path, why) in [
        ("/close", last),
        ("/http10", PEER_CLOSED),
        ("/until-close", PEER_CLOSED),
    ] {
        let server = Hostile::start(Behaviour::Ok).await;
        let lab = lab(|t| t);
        assert_eq!(lab.get(&server.uri(path)).await.unwrap(), "ok");
        let closed = lab.wait_closed(1).await;
        assert!([why, last].contains(&closed[0]), "{path}: {closed:?}");
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn a_server_that_ends_idle_connections_ends_them_for_its_own_reason() {
    for (command, why) in [
        (Command::CloseIdle, PEER_CLOSED),
        (Command::DropIdle, PEER_CLOSED),
        (Command::CloseAll, PEER_CLOSED),
        (Command::ResetAll, RESET),
        (Command::SendBytes(b"?".to_vec()), BROKEN),
    ] {
        let server = Hostile::start(Behaviour::Ok).await;
        let lab = lab(|t| t);
        assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
        lab.wait_unused().await;
        server.command(command.clone());
        assert_eq!(lab.wait_closed(1).await, [why], "{command:?}");
        let stats = lab.transport.stats();
        assert_eq!(stats.idle, 0);
        let reason = why.0.as_str();
        assert_eq!(
            stats.event_with("IdleConnOut", reason),
            1,
            "{command:?}: {stats:?}"
        );
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn a_server_that_ends_all_connections_fails_what_runs() {
    for (command, why) in [(Command::CloseAll, PEER_CLOSED), (Command::ResetAll, RESET)] {
        for path in ["/hold", "/hold-body"] {
            let server = Hostile::start(Behaviour::Ok).await;
            let lab = lab(|t| t);
            let url = server.uri(path);
            let (error, ()) = tokio::join!(lab.get(&url), async {
                server.wait_requests(1).await;
                server.command(command.clone());
            });
            assert_eq!(Failed::of(&error.unwrap_err()), Failed::CLOSED);
            assert_eq!(lab.wait_closed(1).await, [why]);
            lab.end(&server).await;
        }
    }
}

#[tokio::test]
async fn a_body_that_the_server_does_not_want_is_not_sent() {
    let server = Hostile::start(Behaviour::Ok).await;
    let lab = lab(|t| t.expect_continue_timeout(Duration::from_secs(60)));
    let mut request = post(&server.uri("/expect-reject"), 10);
    let expect = http::HeaderValue::from_static("100-continue");
    request.headers_mut().insert("expect", expect);
    let response = lab.transport.send(request).await.unwrap();
    assert_eq!(response.status(), 417);
    assert_eq!(text(response).await, "");
    let closed = lab.wait_closed(1).await;
    let good_order = [CloseReason::ConnectionClose, CloseReason::PeerClosed];
    assert!(good_order.contains(&closed[0].0), "{closed:?}");
    lab.end(&server).await;
}

#[tokio::test]
async fn a_body_that_fails_fails_its_request_and_ends_the_connection() {
    for (behaviour, versions) in [
        (Behaviour::Ok, HttpVersions::Auto),
        (Behaviour::NeverAnswer, HttpVersions::Auto),
        (
            Behaviour::H2(H2Behaviour::Ok {
                max_concurrent_streams: None,
            }),
            HttpVersions::Http2,
        ),
    ] {
        let server = Hostile::start(behaviour.clone()).await;
        let lab = lab(|t| t.http_versions(versions));
        let frames = [
            Ok(hyper::body::Frame::data(bytes::Bytes::from_static(b"half"))),
            Err("no more"),
        ];
        let body = StreamBody::new(futures_util::stream::iter(frames));
        let request = http::Request::post(server.uri("/")).body(body).unwrap();
        let error = lab.transport.send(request).await.unwrap_err();
        let expected = Failed::sent("RequestBody", FailureReason::Other);
        assert_eq!(Failed::of(&error), expected, "{behaviour:?}");
        lab.wait_unused().await;
        if versions == HttpVersions::Auto {
            let cancelled = (CloseReason::RequestCancelled, Initiator::Local);
            assert_eq!(lab.wait_closed(1).await, [cancelled], "{behaviour:?}");
        } else {
            assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
            assert_eq!((server.accepted(), lab.closed()), (1, vec![]));
        }
        lab.end(&server).await;
    }
}
