//! Connections that their server closes while they are idle, in a race with the next request (hyper #2136, #3553).

use futures_util::future::join_all;
use otel_conntrack::{FailureReason, TransportBuilder};

use crate::hostile::{Behaviour, Certificate, Command, H2Behaviour, Hostile};
use crate::lab::{Failed, Lab, Seeded, get, lab, lab_h2, post, text, turns, until};

const fn as_it_is(builder: TransportBuilder) -> TransportBuilder {
    builder
}

/// What may become of a request with a body that is not sent again.
fn post_ended(error: &otel_conntrack::TransportError) {
    assert_eq!(Failed::of(error), Failed::CLOSED, "{error}");
}

/// Requests on connections that live for a few answers each.
async fn race(server: Hostile, seed: u64) {
    let lab = lab(as_it_is);
    let url = server.uri("/");
    let workers = (0..8).map(|worker| {
        let (lab, server, url) = (&lab, &server, &url);
        async move {
            let mut random = Seeded::new(seed * 100 + worker);
            for _ in 0..30 {
                let answers = 1 + random.below(3) as u64;
                server.set(match random.below(2) {
                    0 => Behaviour::CloseAfter(answers),
                    _ => Behaviour::ResetAfter(answers),
                });
                if random.below(3) == 0 {
                    match lab.transport.send(post(url, 10)).await {
                        Ok(response) => assert_eq!(text(response).await, "ok"),
                        Err(error) => post_ended(&error),
                    }
                } else {
                    assert_eq!(lab.get(url).await.unwrap(), "ok");
                }
                turns(random.below(4)).await;
            }
        }
    });
    join_all(workers).await;
    lab.end(&server).await;
}

#[tokio::test]
async fn no_get_fails_because_its_idle_connection_was_closed() {
    for seed in 1..=3 {
        race(Hostile::start(Behaviour::Ok).await, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_get_fails_because_its_idle_connection_was_closed_in_another_thread() {
    for seed in 4..=6 {
        race(Hostile::start(Behaviour::Ok).await, seed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_get_fails_because_its_idle_tls_connection_was_closed() {
    let server = Hostile::start_tls(Behaviour::Ok, Certificate::Good, &["http/1.1"]).await;
    race(server, 7).await;
}

/// As many requests as `lab` has connections for, right after the command.
async fn after(command: &Command, lab: &Lab, server: &Hostile, rounds: u64) {
    let url = server.uri("/");
    for round in 0..rounds {
        server.command(command.clone());
        turns(round as usize % 8).await;
        for answer in join_all((0..4).map(|_| lab.get(&url))).await {
            assert_eq!(answer.unwrap(), "ok", "{command:?}");
        }
        // Spares too have to be there before the next command, which ends them.
        until("settled", || {
            let stats = lab.transport.stats();
            stats.dialing == 0 && stats.in_use == 0
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_get_fails_because_all_idle_connections_are_closed_at_this_moment() {
    for command in [Command::CloseIdle, Command::DropIdle] {
        let server = Hostile::start(Behaviour::Ok).await;
        let lab = lab(as_it_is);
        after(&command, &lab, &server, 60).await;
        lab.end(&server).await;
    }
}

#[tokio::test]
async fn a_get_on_a_spare_that_the_server_closed_is_sent_again() {
    for command in [Command::CloseIdle, Command::DropIdle, Command::ResetAll] {
        for wait in 0..8 {
            let server = Hostile::start(Behaviour::Ok).await;
            let lab = lab(as_it_is);
            let mut given_up = Box::pin(lab.transport.send(get(&server.uri("/"))));
            assert!(futures_util::poll!(&mut given_up).is_pending());
            drop(given_up);
            until("a spare", || lab.transport.stats().idle == 1).await;
            server.wait_accepted(1).await;
            server.command(command.clone());
            turns(wait).await;
            assert_eq!(
                lab.get(&server.uri("/")).await.unwrap(),
                "ok",
                "{command:?}"
            );
            lab.end(&server).await;
        }
    }
}

#[tokio::test]
async fn a_post_on_a_closed_connection_is_sent_on_another_or_fails_as_sent() {
    for command in [Command::CloseIdle, Command::DropIdle, Command::ResetAll] {
        let (mut failed, mut succeeded) = (0, 0);
        for wait in 0..12 {
            let server = Hostile::start(Behaviour::Ok).await;
            let lab = lab(as_it_is);
            assert_eq!(lab.get(&server.uri("/")).await.unwrap(), "ok");
            lab.wait_unused().await;
            server.command(command.clone());
            turns(wait).await;
            match lab.transport.send(post(&server.uri("/"), 10)).await {
                Ok(response) => {
                    assert_eq!(text(response).await, "ok");
                    succeeded += 1;
                }
                Err(error) => {
                    post_ended(&error);
                    assert_eq!(error.reason(), FailureReason::ConnectionReset);
                    failed += 1;
                }
            }
            lab.end(&server).await;
        }
        assert!(succeeded > 0, "{command:?}: {failed} failed");
    }
}

#[tokio::test]
async fn a_get_on_an_http2_connection_that_just_got_its_goaway_is_sent_on_another() {
    for wait in 0..12 {
        let behaviour = H2Behaviour::Ok {
            max_concurrent_streams: None,
        };
        let server = Hostile::start(Behaviour::H2(behaviour)).await;
        let lab = lab_h2(as_it_is);
        let url = server.uri("/");
        assert_eq!(lab.get(&url).await.unwrap(), "ok");
        server.command(Command::GoAway);
        turns(wait).await;
        for answer in join_all((0..3).map(|_| lab.get(&url))).await {
            assert_eq!(answer.unwrap(), "ok");
        }
        lab.end(&server).await;
    }
}
