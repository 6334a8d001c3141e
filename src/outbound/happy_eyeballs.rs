//! Happy Eyeballs, version 2 (RFC 8305): the order of addresses and the race between them.
//!
//! Addresses of both families alternate, beginning with the family of the first one (section 4).
//! One attempt is started after the other, each 250 ms after the last or as soon as one fails
//! (section 5); the first that connects wins and the others are dropped. The resolver here answers
//! with both families at once, so the resolution delay of section 3 has nothing to wait for.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};

/// Section 5's recommended connection attempt delay.
pub(crate) const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// The order in which addresses are tried.
pub(crate) fn interleave(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let Some(first) = addresses.first() else {
        return Vec::new();
    };
    let (mut ours, mut theirs): (Vec<_>, Vec<_>) = addresses
        .iter()
        .copied()
        .partition(|a| a.is_ipv4() == first.is_ipv4());
    ours.reverse();
    theirs.reverse();
    let mut order = Vec::with_capacity(addresses.len());
    while !ours.is_empty() || !theirs.is_empty() {
        order.extend(ours.pop());
        order.extend(theirs.pop());
    }
    order
}

/// Tries the addresses; gives back the first stream, or every error in the order of the tries.
///
/// Cancel-safe in the sense that matters: dropping it drops every attempt under way.
pub(crate) async fn race<T, F>(
    addresses: Vec<SocketAddr>,
    delay: Duration,
    connect: impl Fn(SocketAddr) -> F,
) -> Result<T, Vec<(SocketAddr, io::Error)>>
where
    F: Future<Output = io::Result<T>>,
{
    let attempt = |index: usize| {
        let future = connect(addresses[index]);
        async move { (index, future.await) }
    };
    let mut running = FuturesUnordered::new();
    let mut errors = Vec::new();
    let mut next = 0;
    loop {
        if next < addresses.len() {
            running.push(attempt(next));
            next += 1;
        } else if running.is_empty() {
            errors.sort_by_key(|(index, _)| *index);
            return Err(errors.into_iter().map(|(i, e)| (addresses[i], e)).collect());
        }
        // Until one ends, or it is time for the next address.
        loop {
            let ended = if next < addresses.len() {
                tokio::select! {
                    biased;
                    Some(ended) = running.next() => ended,
                    () = tokio::time::sleep(delay) => break,
                }
            } else {
                match running.next().await {
                    Some(ended) => ended,
                    None => break,
                }
            };
            match ended {
                (_, Ok(stream)) => return Ok(stream),
                (index, Err(error)) => errors.push((index, error)),
            }
            if next < addresses.len() || running.is_empty() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use tokio::time::Instant;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn families_alternate_from_the_first() {
        let all = ["::1", "::2", "::3", "1.1.1.1", "2.2.2.2"].map(ip);
        let order = interleave(&all);
        assert_eq!(order, ["::1", "1.1.1.1", "::2", "2.2.2.2", "::3"].map(ip));
        assert_eq!(
            interleave(&[ip("1.1.1.1"), ip("::1")]),
            [ip("1.1.1.1"), ip("::1")]
        );
        assert!(interleave(&[]).is_empty());
    }

    fn addresses(n: u16) -> Vec<SocketAddr> {
        (1..=n)
            .map(|port| SocketAddr::from(([127, 0, 0, 1], port)))
            .collect()
    }

    /// Each address does what its port says: after so many milliseconds, connect or fail.
    async fn run(plan: &[(u64, bool)]) -> (Vec<(u16, u64)>, Result<u16, Vec<u16>>, u64) {
        let begin = Instant::now();
        let started = RefCell::new(Vec::new());
        let outcome = race(addresses(plan.len() as u16), ATTEMPT_DELAY, |address| {
            let port = address.port();
            started
                .borrow_mut()
                .push((port, begin.elapsed().as_millis() as u64));
            let (after, connects) = plan[port as usize - 1];
            async move {
                tokio::time::sleep(Duration::from_millis(after)).await;
                if connects {
                    Ok(port)
                } else {
                    Err(io::ErrorKind::ConnectionRefused.into())
                }
            }
        })
        .await
        .map_err(|errors| errors.iter().map(|(address, _)| address.port()).collect());
        (
            started.into_inner(),
            outcome,
            begin.elapsed().as_millis() as u64,
        )
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_address_starts_after_the_delay_and_the_first_to_connect_wins() {
        let (started, outcome, took) = run(&[(10_000, true), (100, true), (1, true)]).await;
        assert_eq!(started, [(1, 0), (2, 250)]);
        assert_eq!((outcome, took), (Ok(2), 350));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_starts_the_next_address_at_once() {
        let (started, outcome, took) = run(&[(20, false), (30, false), (5, true)]).await;
        assert_eq!(started, [(1, 0), (2, 20), (3, 50)]);
        assert_eq!((outcome, took), (Ok(3), 55));
    }

    #[tokio::test(start_paused = true)]
    async fn when_all_fail_every_error_is_given_in_order() {
        let (_, outcome, took) = run(&[(400, false), (10, false)]).await;
        assert_eq!((outcome, took), (Err(vec![1, 2]), 400));
    }

    #[tokio::test(start_paused = true)]
    async fn no_address_is_no_error_and_no_hang() {
        let (started, outcome, _) = run(&[]).await;
        assert_eq!((started, outcome), (vec![], Err(vec![])));
    }
}
