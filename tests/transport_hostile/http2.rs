//! Misdeeds in HTTP/2, in clear text.

use std::time::Duration;

use futures_util::future::join_all;
use http_body_util::BodyExt;
use otel_conntrack::{CloseReason, FailureReason, Initiator};

use crate::hostile::{Behaviour, Command, H2Behaviour, Hostile, h2_error};
use crate::lab::{Failed, get, lab_h2, post, text, until};

const GOAWAY: (CloseReason, Initiator) = (CloseReason::Goaway, Initiator::Remote);
const BROKEN: (CloseReason, Initiator) = (CloseReason::ProtocolError, Initiator::Local);
const PEER_CLOSED: (CloseReason, Initiator) = (CloseReason::PeerClosed, Initiator::Remote);
const SOON: Duration = Duration::from_millis(100);
const LATE: Failed = Failed::sent("ResponseHeaderTimeout", FailureReason::TimedOut);

async fn server(behaviour: H2Behaviour) -> Hostile {
    Hostile::start(Behaviour::H2(behaviour)).await
}

const fn streams(most: u32) -> H2Behaviour {
    H2Behaviour::Ok {
        max_concurrent_streams: Some(most),
    }
}

#[tokio::test]
async fn a_goaway_at_once_fails_the_request_as_one_that_was_not_processed() {
    for error in [h2_error::NO_ERROR, h2_error::ENHANCE_YOUR_CALM] {
        let server = server(H2Behaviour::GoAwayAtOnce(error)).await;
        let lab = lab_h2(|t| t);
        let failed = lab.fails(&server.uri("/")).await;
        // Whether the request or the GOAWAY is faster.
        let expected = Failed::CLOSED.retryable();
        let sent = failed.sent;
        assert_eq!(failed, Failed { sent, ..expected });
        let n = server.accepted() as usize;
        assert!((1..=8).contains(&n), "{n}");
        assert_eq!(lab.wait_closed(n).await, vec![GOAWAY; n]);
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn a_goaway_lets_open_streams_end_and_new_requests_go_elsewhere() {
    let server = server(H2Behaviour::GoAwayKeepOpenStreams).await;
    let lab = lab_h2(|t| t);
    let url = server.uri("/");
    let (first, second) = tokio::join!(lab.get(&url), async {
        server.wait_requests(1).await;
        // Once the client knows, nothing new goes there.
        let answer = lab.get(&url);
        let release = async {
            server.wait_accepted(2).await;
            server.wait_requests(2).await;
            server.command(Command::Release);
        };
        tokio::join!(answer, release).0
    });
    assert_eq!(
        (first.unwrap(), second.unwrap()),
        ("ok".into(), "ok".into())
    );
    assert_eq!(lab.wait_closed(2).await, [GOAWAY; 2]);
    lab.end(&server).await;
}

#[tokio::test]
async fn a_goaway_after_each_answer_costs_a_connection_and_no_request() {
    let server = server(H2Behaviour::GoAwayAfter(1)).await;
    let lab = lab_h2(|t| t);
    for n in 1..=3 {
        assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
        assert_eq!(lab.wait_closed(n).await, vec![GOAWAY; n]);
    }
    assert_eq!(server.accepted(), 3);
    lab.end(&server).await;
}

#[tokio::test]
async fn a_goaway_on_an_idle_connection_ends_it() {
    let server = server(streams(10)).await;
    let lab = lab_h2(|t| t);
    assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
    lab.wait_unused().await;
    server.command(Command::GoAway);
    assert_eq!(lab.wait_closed(1).await, [GOAWAY]);
    assert_eq!(lab.transport.stats().event_with("IdleConnOut", "goaway"), 1);
    assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
    lab.end(&server).await;
}

#[tokio::test]
async fn a_reset_stream_fails_its_request_and_leaves_the_connection() {
    for (error, retryable) in [
        (h2_error::REFUSED_STREAM, true),
        (h2_error::INTERNAL_ERROR, false),
        (h2_error::CANCEL, false),
        (h2_error::ENHANCE_YOUR_CALM, false),
        (h2_error::NO_ERROR, false),
    ] {
        let server = server(H2Behaviour::ResetStreams(error)).await;
        let lab = lab_h2(|t| t.retry_idempotent(false));
        for _ in 0..2 {
            let failed = lab.fails(&server.uri("/")).await;
            let expected = Failed::sent("StreamReset", FailureReason::Other);
            assert_eq!(
                failed,
                Failed {
                    retryable,
                    ..expected
                },
                "{error}"
            );
        }
        server.set(Behaviour::H2(streams(10)));
        assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
        assert_eq!((server.accepted(), lab.closed()), (1, vec![]));
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn a_flood_of_resets_fails_every_request_once_and_leaks_nothing() {
    let server = server(H2Behaviour::ResetStreams(h2_error::INTERNAL_ERROR)).await;
    let lab = lab_h2(|t| t);
    let url = server.uri("/");
    for _ in 0..5 {
        let all = join_all((0..200).map(|_| lab.fails(&url))).await;
        for failed in all {
            assert_eq!(failed, Failed::sent("StreamReset", FailureReason::Other));
        }
    }
    assert_eq!(server.requests(), 1_000);
    let stats = lab.transport.stats();
    assert_eq!((stats.in_use, stats.waiting), (0, 0));
    lab.end(&server).await;
}

#[tokio::test]
async fn a_refused_stream_is_tried_again_a_bounded_number_of_times() {
    let server = server(streams(10)).await;
    let lab = lab_h2(|t| t);
    assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
    let refused = H2Behaviour::ResetStreams(h2_error::REFUSED_STREAM);
    server.set(Behaviour::H2(refused));
    let failed = lab.fails(&server.uri("/")).await;
    assert_eq!(failed.kind, "StreamReset");
    assert!(failed.retryable);
    assert!(
        (2..=9).contains(&server.requests()),
        "{}",
        server.requests()
    );
    assert_eq!(server.accepted(), 1);
    lab.end(&server).await;
}

#[tokio::test]
async fn a_broken_frame_breaks_the_protocol() {
    let server = server(H2Behaviour::FrameTooLarge).await;
    let lab = lab_h2(|t| t);
    let failed = lab.fails(&server.uri("/")).await;
    assert_eq!(failed, Failed::sent("Protocol", FailureReason::Other));
    assert_eq!(lab.wait_closed(1).await, [BROKEN]);
    lab.end(&server).await;
}

#[tokio::test]
async fn a_server_that_does_not_speak_http2_breaks_the_protocol() {
    let server = Hostile::start(Behaviour::Ok).await;
    let lab = lab_h2(|t| t);
    let failed = lab.fails(&server.uri("/")).await;
    // Whether the request was on its way by then is a race; it is not tried again.
    assert_eq!(
        (failed.kind, failed.reason),
        ("Protocol", FailureReason::Other)
    );
    assert_eq!(failed.sent, !failed.retryable);
    assert_eq!(lab.wait_closed(1).await, [BROKEN]);
    lab.end(&server).await;
}

#[tokio::test]
async fn a_connection_closed_after_the_preface_fails_the_request() {
    let server = server(H2Behaviour::CloseAtOnce).await;
    let lab = lab_h2(|t| t);
    let failed = lab.fails(&server.uri("/")).await;
    // Whether the request or the close is faster.
    let Failed {
        sent, retryable, ..
    } = failed;
    assert_eq!(
        failed,
        Failed {
            sent,
            retryable,
            ..Failed::CLOSED
        }
    );
    assert_ne!(sent, retryable);
    let n = server.accepted() as usize;
    assert_eq!(lab.wait_closed(n).await, vec![PEER_CLOSED; n]);
    lab.end(&server).await;
}

#[tokio::test]
async fn what_is_never_answered_times_out_and_a_silent_connection_is_given_up() {
    for (behaviour, gives_up) in [
        (H2Behaviour::NeverSettings, true),
        (H2Behaviour::NoPingAck, false),
        (H2Behaviour::Hold, false),
    ] {
        let server = server(behaviour.clone()).await;
        let lab = lab_h2(|t| t.response_header_timeout(SOON));
        assert_eq!(lab.fails(&server.uri("/")).await, LATE, "{behaviour:?}");
        if gives_up {
            let why = (CloseReason::TimedOut, Initiator::Local);
            assert_eq!(lab.wait_closed(1).await, [why], "{behaviour:?}");
        } else {
            assert_eq!(lab.closed(), [], "{behaviour:?}");
        }
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn a_peer_that_answers_no_ping_is_dropped_whether_it_is_used_or_not() {
    let why = (CloseReason::KeepAliveTimeout, Initiator::Local);
    let ping = Duration::from_millis(30);
    for used in [true, false] {
        let server = server(streams(10)).await;
        let lab = lab_h2(|t| t.keep_alive_ping(ping, ping));
        assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
        server.set(Behaviour::H2(H2Behaviour::NoPingAck));
        if used {
            let failed = lab.fails(&server.uri("/")).await;
            let expected = Failed::sent("ConnectionClosed", FailureReason::TimedOut);
            assert_eq!(failed, expected);
        }
        assert_eq!(lab.wait_closed(1).await, [why], "used: {used}");
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn a_body_without_a_window_waits_for_it() {
    let server = server(H2Behaviour::ZeroWindow).await;
    let lab = lab_h2(|t| t);
    let url = server.uri("/");
    let (answer, ()) = tokio::join!(lab.transport.send(post(&url, 100_000)), async {
        server.wait_requests(1).await;
        server.command(Command::Release);
    });
    assert_eq!(text(answer.unwrap()).await, "ok");
    lab.end(&server).await;
}

#[tokio::test]
async fn a_body_without_a_window_times_out_and_the_connection_serves_others() {
    let server = server(H2Behaviour::ZeroWindow).await;
    let lab = lab_h2(|t| t.response_header_timeout(SOON));
    let error = lab.transport.send(post(&server.uri("/"), 100_000)).await;
    assert_eq!(Failed::of(&error.unwrap_err()), LATE);
    assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
    assert_eq!((server.accepted(), lab.closed()), (1, vec![]));
    lab.end(&server).await;
}

#[tokio::test]
async fn a_server_that_reads_nothing_gets_no_more_than_its_time() {
    let server = Hostile::start(Behaviour::NeverRead).await;
    let lab = lab_h2(|t| t.response_header_timeout(SOON).max_conns_per_host(1));
    let error = lab.transport.send(post(&server.uri("/"), 16 << 20)).await;
    assert_eq!(Failed::of(&error.unwrap_err()), LATE);
    let why = (CloseReason::TimedOut, Initiator::Local);
    assert_eq!(lab.wait_closed(1).await, [why]);
    lab.end_alone().await;
}

#[tokio::test]
async fn a_server_that_allows_no_stream_makes_requests_wait_and_then_fail() {
    let server = server(streams(0)).await;
    let lab = lab_h2(|t| {
        t.response_header_timeout(SOON)
            .wait_timeout(SOON)
            .max_conns_per_host(1)
    });
    // The first is sent before the settings come.
    assert_eq!(lab.fails(&server.uri("/")).await, LATE);
    let failed = lab.fails(&server.uri("/")).await;
    assert_eq!(
        failed,
        Failed::unsent("WaitTimedOut", FailureReason::TimedOut)
    );
    lab.end(&server).await;
}

#[tokio::test]
async fn a_limit_of_streams_that_sinks_and_rises_is_kept() {
    let server = server(streams(4)).await;
    let lab = lab_h2(|t| t.max_conns_per_host(1));
    assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
    server.command(Command::MaxConcurrentStreams(1));
    assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
    server.set(Behaviour::H2(H2Behaviour::Hold));
    let url = server.uri("/");
    let all = join_all((0..3).map(|_| lab.get(&url)));
    let watch = async {
        for n in 3..=5 {
            server.wait_requests(n).await;
            assert_eq!(lab.transport.stats().in_use, 1);
            server.command(Command::Release);
        }
    };
    let (all, ()) = tokio::join!(all, watch);
    assert!(all.into_iter().all(|answer| answer.unwrap() == "ok"));
    server.set(Behaviour::H2(H2Behaviour::Hold));
    server.command(Command::MaxConcurrentStreams(3));
    let all = join_all((0..3).map(|_| lab.get(&url)));
    let watch = async {
        server.wait_requests(8).await;
        server.command(Command::Release);
    };
    let (all, ()) = tokio::join!(all, watch);
    assert!(all.into_iter().all(|answer| answer.unwrap() == "ok"));
    assert_eq!(server.accepted(), 1);
    lab.end(&server).await;
}

#[tokio::test]
async fn a_connection_that_ends_fails_all_its_streams_wherever_they_are() {
    for command in [Command::CloseAll, Command::ResetAll] {
        for behaviour in [H2Behaviour::Hold, H2Behaviour::HoldBody] {
            let server = server(behaviour).await;
            let lab = lab_h2(|t| t);
            let url = server.uri("/");
            let all = join_all((0..5).map(|_| lab.fails(&url)));
            let (all, ()) = tokio::join!(all, async {
                server.wait_requests(5).await;
                server.command(command.clone());
            });
            for failed in all {
                assert_eq!(failed, Failed::CLOSED);
            }
            let (why, _) = lab.wait_closed(server.accepted() as usize).await[0];
            let reset = matches!(command, Command::ResetAll);
            let expected = if reset {
                CloseReason::ConnectionReset
            } else {
                CloseReason::PeerClosed
            };
            assert_eq!(why, expected);
            lab.end(&server).await;
        }
    }
}

#[tokio::test]
async fn a_dropped_answer_resets_its_stream_and_leaves_the_connection() {
    let server = server(H2Behaviour::HoldBody).await;
    let lab = lab_h2(|t| t);
    for _ in 0..3 {
        let response = lab.transport.send(get(&server.uri("/"))).await.unwrap();
        let mut body = response.into_body();
        assert!(body.frame().await.unwrap().is_ok());
        drop(body);
    }
    lab.wait_unused().await;
    assert_eq!((server.accepted(), lab.closed()), (1, vec![]));
    let stats = lab.transport.stats();
    assert_eq!((stats.idle, stats.active), (1, 0));
    lab.end(&server).await;
}

#[tokio::test]
async fn a_shutdown_cuts_an_http2_connection_at_its_deadline() {
    let server = server(H2Behaviour::Hold).await;
    let lab = lab_h2(|t| t);
    let request = tokio::spawn(lab.transport.send(get(&server.uri("/"))));
    server.wait_requests(1).await;
    let cut = lab.transport.shutdown(Duration::from_millis(20)).await;
    assert_eq!(cut.len(), 1);
    assert_eq!(
        Failed::of(&request.await.unwrap().unwrap_err()).kind,
        "ConnectionClosed"
    );
    until("closed", || lab.conntrack.stats().open() == 0).await;
    lab.end(&server).await;
}
