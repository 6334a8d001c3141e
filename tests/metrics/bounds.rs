//! Bounds: however many hosts there are, label sets stay few, sums stay exact, and what was folded
//! is told.

use std::collections::BTreeSet;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::Uri;
use hyper_util::client::legacy::connect::{Connected, Connection};
use otel_conntrack::names;
use otel_conntrack::{Conntrack, Target, TrackedIo};
use tower::{Service, service_fn};

use super::conntrack_for;
use super::support::otel::{Collection, Reader};
use super::support::traffic::{Hosts, Pipe, dial, dial_as, fail, http, now};

const OTHER: &str = "_other";
/// What DESIGN and the README promise.
const HOSTS_PER_NAME: usize = 200;
const LABEL_SETS: usize = 1_800;

/// One connection to each of many hosts: 3 bytes out, a request, and a failed attempt besides.
fn many(conntrack: &Conntrack, hosts: usize, name: impl Fn(usize) -> String) -> Vec<Pipe> {
    let one = |n: usize| {
        let (name, host) = (name(n), http(&format!("h{n}.test")));
        let mut pipe = dial(conntrack, &name, host.clone());
        pipe.write(3);
        pipe.request();
        fail(conntrack, &name, host, io::ErrorKind::TimedOut);
        pipe
    };
    (0..hosts).map(one).collect()
}

/// The SDK's own overflow would lose values, so nothing may come near it.
fn within_bounds(now: &Collection) {
    for metric in names::METRICS {
        let series = now.series(metric, &[]);
        assert!(series < 2_000, "{} has {series} series", metric.name);
        // The overflow's attribute is in no table, so taking the collection has refused it.
    }
}

/// Asserts the totals of everything that knows a host.
fn totals(now: &Collection, opened: i64, open: i64) {
    let (closed, idle) = (opened - open, [(names::HTTP_CONNECTION_STATE, "idle")]);
    let written = [(names::IO_DIRECTION, "written")];
    assert_eq!(now.sum(&names::IO, &written), 3 * opened);
    assert_eq!(now.sum(&names::IO, &[]), 3 * opened);
    assert_eq!(now.sum(&names::OPEN_CONNECTIONS, &idle), open);
    assert_eq!(now.sum(&names::OPEN_CONNECTIONS, &[]), open);
    assert_eq!(now.sum(&names::CONNECTIONS, &[]), open);
    assert_eq!(now.sum(&names::DIALER_ATTEMPTS, &[]), 2 * opened);
    let count = |metric| i64::try_from(now.count(metric, &[])).unwrap();
    assert_eq!(count(&names::SETUP_DURATION), 2 * opened);
    for metric in [
        &names::CONNECTION_DURATION,
        &names::IDLE_TIME,
        &names::CONNECTION_REQUEST_COUNT,
        &names::DURATION,
    ] {
        assert_eq!(count(metric), closed, "{}", metric.name);
    }
}

fn label_sets_dropped(now: &Collection) -> i64 {
    now.sum(&names::DROPPED, &[(names::DROPPED_ITEM, "label_set")])
}

#[test]
fn of_3000_hosts_under_one_name_200_stand_alone_and_the_rest_is_summed() {
    let (reader, delta) = (Reader::cumulative(), Reader::delta());
    let conntrack = conntrack_for(&[&reader, &delta]);
    let mut pipes = many(&conntrack, 3_000, |_| "api".to_owned());
    // Once more, for a host in either half.
    pipes.push(dial(&conntrack, "api", http("h0.test")));
    pipes.push(dial(&conntrack, "api", http("h2999.test")));
    for pipe in &mut pipes[3_000..] {
        pipe.write(3);
        pipe.request();
        fail(&conntrack, "api", http("h0.test"), io::ErrorKind::TimedOut);
    }
    let first = reader.collect();
    within_bounds(&first);
    totals(&first, 3_002, 3_002);
    let alone: BTreeSet<_> = (0..HOSTS_PER_NAME).map(|n| format!("h{n}.test")).collect();
    for metric in [&names::IO, &names::OPEN_CONNECTIONS, &names::SETUP_DURATION] {
        let mut hosts = first.values_of(metric, names::SERVER_ADDRESS);
        assert!(hosts.remove(OTHER), "{}", metric.name);
        assert_eq!(hosts, alone, "{}", metric.name);
    }
    let other = [(names::SERVER_ADDRESS, OTHER)];
    assert_eq!(first.sum(&names::IO, &other), 3 * 2_801);
    assert_eq!(first.sum(&names::OPEN_CONNECTIONS, &other), 2_801);
    // Each attempt that had to be folded: 2 800 hosts twice, and one of them a third time.
    assert_eq!(label_sets_dropped(&first), 5_601);

    drop(pipes.split_off(1_000));
    let second = reader.collect();
    within_bounds(&second);
    totals(&second, 3_002, 1_000);
    assert_eq!(second.sum(&names::OPEN_CONNECTIONS, &other), 800);
    drop(pipes);
    totals(&reader.collect(), 3_002, 0);
    // A reader of deltas that comes late has it all, once.
    assert_eq!(delta.collect().sum(&names::IO, &[]), 3 * 3_002);
    assert_eq!(delta.collect().sum(&names::IO, &[]), 0);
}

#[test]
fn of_3000_hosts_over_20_names_each_instrument_folds_what_is_too_much_for_it() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let mut pipes = many(&conntrack, 3_000, |n| format!("api-{}", n % 20));
    for _ in 0..2 {
        let now = reader.collect();
        within_bounds(&now);
        totals(&now, 3_000, 3_000);
        for metric in [&names::IO, &names::OPEN_CONNECTIONS, &names::SETUP_DURATION] {
            let folded = now.series(metric, &[(names::SERVER_ADDRESS, OTHER)]);
            let alone = now.series(metric, &[]) - folded;
            assert_eq!(alone, LABEL_SETS, "{}", metric.name);
        }
    }
    drop(pipes.split_off(1_500));
    let now = reader.collect();
    within_bounds(&now);
    totals(&now, 3_000, 1_500);
    drop(pipes);
    let now = reader.collect();
    totals(&now, 3_000, 0);
    assert!(label_sets_dropped(&now) > 0);
}

#[test]
fn names_that_come_with_calls_are_bounded_and_their_sum_is_exact() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let dialer = conntrack.dialer("own").build().unwrap();
    let mut pipes: Vec<_> = (0..600)
        .map(|n| dial_as(&dialer, &format!("tenant-{}", n % 300), ("h.test", 1)))
        .collect();
    for open in [600, 0] {
        pipes.truncate(open);
        let now = reader.collect();
        within_bounds(&now);
        assert_eq!(now.sum(&names::DIALER_ATTEMPTS, &[]), 600);
        assert_eq!(now.sum(&names::CONNECTIONS, &[]), open as i64);
        let names = now.values_of(&names::DIALER_ATTEMPTS, names::NAME);
        // Those that were learned, the dialer's own, and one for the rest.
        assert_eq!(names.len(), 256 + 2);
        let other = [(names::NAME, OTHER)];
        assert_eq!(now.sum(&names::DIALER_ATTEMPTS, &other), 2 * 44);
        let dropped = now.sum(&names::DROPPED, &[(names::DROPPED_ITEM, "name")]);
        assert!(dropped >= 44, "{dropped}");
    }
}

#[test]
fn the_places_of_gauges_that_died_go_to_those_that_are_alive() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    for generation in 0..3 {
        let pipes: Vec<_> = (0..LABEL_SETS / 2)
            .map(|n| {
                let host = http(&format!("h{n}-{generation}.test"));
                let pipe = dial(&conntrack, &format!("api-{}", n % 20), host);
                pipe.request();
                pipe
            })
            .collect();
        let now = reader.collect();
        within_bounds(&now);
        // Each host with both states.
        let series = now.series(&names::OPEN_CONNECTIONS, &[]);
        assert_eq!(series, LABEL_SETS);
        let hosts = now.values_of(&names::OPEN_CONNECTIONS, names::SERVER_ADDRESS);
        assert!(!hosts.contains(OTHER), "in generation {generation}");
        drop(pipes);
    }
}

#[test]
fn what_an_observable_alone_has_to_fold_is_told_as_well() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader, &Reader::cumulative()]);
    // 50 hosts under each name, and 1 000 label sets in a histogram: neither is too much. Bytes
    // have two series per host, and that is.
    let pipes: Vec<_> = (0..1_000)
        .map(|n| {
            let host = Target::new(format!("h{n}.test"), 1);
            dial(&conntrack, &format!("db-{}", n % 20), host)
        })
        .collect();
    assert_eq!(label_sets_dropped(&reader.collect()), 0);
    for _ in 0..3 {
        let now = reader.collect();
        within_bounds(&now);
        // Told by the collection after the one that had to.
        assert_eq!(label_sets_dropped(&now), 200);
    }
    drop(pipes);
    assert_eq!(label_sets_dropped(&reader.collect()), 200);
}

#[tokio::test]
async fn what_the_histograms_have_to_fold_is_told_for_each_of_them() {
    // Bytes would be folded too, and told with the rest.
    let reader = Reader::without(names::IO.name);
    let conntrack = conntrack_for(&[&reader]);
    let dialers: Vec<_> = (0..10)
        .map(|n| {
            conntrack
                .dialer(&format!("api-{n}"))
                .resolver(Hosts::at(&["127.0.0.1"]))
        })
        .map(|dialer| dialer.build().unwrap())
        .collect();
    for n in 0..2_000 {
        let host = format!("unknown.h{n}.test");
        assert!(dialers[n % 10].connect((host, 1)).await.is_err());
    }
    let now = reader.collect();
    within_bounds(&now);
    for (metric, key) in [
        (&names::DNS_DURATION, names::DNS_QUESTION),
        (&names::SETUP_DURATION, names::SERVER_ADDRESS),
    ] {
        assert_eq!(now.count(metric, &[]), 2_000, "{}", metric.name);
        assert_eq!(now.count(metric, &[(key, OTHER)]), 200, "{}", metric.name);
    }
    assert_eq!(label_sets_dropped(&now), 400);
}

#[test]
fn more_names_than_label_sets_are_folded_too() {
    let (reader, delta) = (Reader::cumulative(), Reader::delta());
    let conntrack = conntrack_for(&[&reader, &delta]);
    for n in 0..1_900 {
        conntrack.declare_dialer(&format!("tenant-{n}")).unwrap();
    }
    let mut grown = 0;
    for round in 1..=2 {
        for n in (0..1_900).rev() {
            let name = format!("tenant-{n}");
            fail(&conntrack, &name, ("h", 1), io::ErrorKind::TimedOut);
        }
        let now = reader.collect();
        within_bounds(&now);
        assert_eq!(now.sum(&names::DIALER_ATTEMPTS, &[]), 1_900 * round);
        assert_eq!(now.sum(&names::DIALER_FAILED, &[]), 1_900 * round);
        let now = delta.collect();
        assert_eq!(now.sum(&names::DIALER_ATTEMPTS, &[]), 1_900);
        grown += now.sum(&names::DIALER_FAILED, &[]);
        assert_eq!(grown, 1_900 * round);
    }
}

#[test]
fn hosts_that_are_not_http_stay_out_of_the_http_metrics_also_when_they_are_folded() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let mut pipes: Vec<_> = (0..300)
        .map(|n| dial(&conntrack, "db", (format!("db{n}.test"), 5_432)))
        .collect();
    pipes.iter().for_each(Pipe::request);
    let now = reader.collect();
    assert_eq!(now.series(&names::OPEN_CONNECTIONS, &[]), 0);
    // And when the same name has both, the sum holds the one kind only.
    pipes.push(dial(&conntrack, "db", http("web.test")));
    pipes.push(dial(&conntrack, "db", http("shop.test")));
    pipes.iter().for_each(Pipe::request);
    let now = reader.collect();
    let other = [(names::SERVER_ADDRESS, OTHER)];
    assert_eq!(now.sum(&names::OPEN_CONNECTIONS, &other), 2);
    assert_eq!(now.sum(&names::OPEN_CONNECTIONS, &[]), 2);
    assert_eq!(now.sum(&names::CONNECTIONS, &[]), 302);
}

/// What a TLS connector yields, as far as it matters here.
struct Plaintext;

impl Connection for Plaintext {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl hyper::rt::Write for Plaintext {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[test]
fn plaintext_bytes_are_not_called_wire_because_their_host_is_folded() {
    let reader = Reader::cumulative();
    let conntrack = conntrack_for(&[&reader]);
    let connect = service_fn(|_: Uri| async { Ok::<_, io::Error>(Plaintext) });
    let mut connector = conntrack.connector("api").wrap(connect).unwrap();
    let mut open: Vec<TrackedIo<Plaintext>> = Vec::new();
    for n in 0..300 {
        for (scheme, bytes) in [("https", 5), ("http", 2)] {
            let uri = format!("{scheme}://h{n}.test/").parse().unwrap();
            let mut io = now(connector.call(uri)).unwrap();
            let mut cx = Context::from_waker(std::task::Waker::noop());
            let sent = vec![0; bytes];
            let wrote = hyper::rt::Write::poll_write(Pin::new(&mut io), &mut cx, &sent);
            assert!(wrote.is_ready());
            open.push(io);
        }
    }
    let layer = |now: &Collection, layer| now.sum(&names::IO, &[(names::IO_LAYER, layer)]);
    let now = reader.collect();
    assert_eq!(
        (layer(&now, "plaintext"), layer(&now, "wire")),
        (1_500, 600)
    );
    drop(open);
    let now = reader.collect();
    assert_eq!(
        (layer(&now, "plaintext"), layer(&now, "wire")),
        (1_500, 600)
    );
}
