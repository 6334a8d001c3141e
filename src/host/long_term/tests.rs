use std::collections::HashMap;

use proptest::prelude::*;

use super::super::groups::{GroupKey, IpVersion, Label};
use super::super::{Key, Tuple};
use super::*;
use crate::event::Direction;

fn table() -> LongTerm {
    LongTerm::new(usize::MAX, Groups::new(100))
}

/// The connection from this port, over a socket with this number.
fn socket(port: u16, cookie: u64, inode: u32) -> Socket {
    Socket {
        key: Key::from(&Tuple {
            local: "127.0.0.1:80".parse().unwrap(),
            peer: format!("127.0.0.1:{port}").parse().unwrap(),
        }),
        cookie,
        cgroup: 0,
        inode,
        received: 0,
        to_send: 0,
        state: 1,
    }
}

const fn key(port: u16) -> GroupKey {
    GroupKey {
        direction: Direction::Inbound,
        ip: IpVersion::V4,
        port: Some(port),
        label: Label::None,
    }
}

const fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A scan of these sockets, all in one group; the ages that it tells, sorted, in seconds.
fn scan(table: &mut LongTerm, whole: bool, now: u64, sockets: &[Socket]) -> Vec<u64> {
    for socket in sockets {
        table.see(socket, at(now), |_| false, |groups| groups.of(key(80)));
    }
    let mut ages = Vec::new();
    table.finish(whole, at(now), |aged| ages.push(aged.age.as_secs()));
    ages.sort_unstable();
    ages
}

#[test]
fn an_age_is_real_time_however_seldom_one_looks() {
    let (mut table, one) = (table(), [socket(1, 1, 1)]);
    assert_eq!(scan(&mut table, true, 10, &one), [0]);
    assert_eq!(scan(&mut table, true, 11, &one), [1]);
    // Nine scans were missed.
    assert_eq!(scan(&mut table, true, 21, &one), [11]);
}

#[test]
fn one_whole_scan_that_misses_a_socket_costs_it_a_count_and_not_its_age() {
    let (mut table, one) = (table(), [socket(1, 1, 1)]);
    scan(&mut table, true, 0, &one);
    assert!(scan(&mut table, true, 5, &[]).is_empty());
    assert_eq!(scan(&mut table, true, 6, &one), [6]);
    // Two in a row are believed.
    scan(&mut table, true, 7, &[]);
    scan(&mut table, true, 8, &[]);
    assert_eq!(table.len(), 0);
    assert_eq!(scan(&mut table, true, 9, &one), [0]);
}

#[test]
fn what_a_torn_scan_misses_is_counted_and_is_forgotten_in_the_end() {
    let (mut table, one) = (table(), [socket(1, 1, 1)]);
    scan(&mut table, true, 0, &one);
    for now in 1..5 {
        assert_eq!(scan(&mut table, false, now, &[]), [now]);
    }
    assert!(scan(&mut table, false, 5, &[]).is_empty());
    assert_eq!(scan(&mut table, false, 6, &one), [6]);
    for now in 7..17 {
        scan(&mut table, false, now, &[]);
    }
    assert_eq!(table.len(), 0);
}

#[test]
fn a_failed_scan_changes_nothing() {
    let (mut table, two) = (table(), [socket(1, 1, 1), socket(2, 2, 2)]);
    scan(&mut table, true, 0, &two);
    table.see(&two[0], at(1), |_| false, |groups| groups.of(key(80)));
    table.unsee();
    assert_eq!(scan(&mut table, true, 2, &two[1..]), [2]);
    assert_eq!(scan(&mut table, true, 3, &two), [3, 3]);
}

#[test]
fn ports_that_are_used_again_begin_anew() {
    let mut table = table();
    // By cookie, and by inode where there is none.
    scan(&mut table, true, 0, &[socket(1, 1, 1), socket(2, 0, 1)]);
    let again = [socket(1, 2, 1), socket(2, 0, 2)];
    assert_eq!(scan(&mut table, true, 5, &again), [0, 0]);
}

#[test]
fn an_accept_and_a_change_of_table_keep_the_age() {
    let mut table = table();
    // In the accept queue, which has no inode; accepted; read from the other table, and back.
    assert_eq!(scan(&mut table, true, 0, &[socket(1, 0, 0)]), [0]);
    assert_eq!(scan(&mut table, true, 1, &[socket(1, 0, 7)]), [1]);
    assert_eq!(scan(&mut table, true, 2, &[socket(1, 9, 7)]), [2]);
    assert_eq!(scan(&mut table, true, 3, &[socket(1, 0, 7)]), [3]);
    assert_eq!(scan(&mut table, true, 4, &[socket(1, 9, 7)]), [4]);
    assert_eq!(table.len(), 1);
}

#[test]
fn a_row_that_comes_twice_counts_once() {
    let (mut table, one) = (table(), socket(1, 1, 1));
    assert_eq!(scan(&mut table, true, 0, &[one, one]), [0]);
    assert_eq!(scan(&mut table, true, 1, &[one, one]), [1]);
}

#[test]
fn beyond_the_limit_is_counted() {
    let mut table = LongTerm::new(2, Groups::new(100));
    let three: Vec<_> = (1..=3).map(|n| socket(n, n.into(), n.into())).collect();
    assert_eq!(scan(&mut table, true, 0, &three).len(), 2);
    assert_eq!(table.untracked(), 1);
    assert_eq!(scan(&mut table, true, 1, &three), [1, 1]);
    assert_eq!(table.untracked(), 2);
}

#[test]
fn at_most_64_bytes_per_socket_while_it_grows_and_shrinks() {
    let mut table = table();
    let all: Vec<_> = (0..40_000_u32)
        .map(|n| {
            let mut socket = socket(n as u16, n.into(), n);
            socket.key = Key::from(&Tuple {
                local: format!("127.0.{}.1:80", n >> 12).parse().unwrap(),
                peer: format!("127.0.0.1:{}", 1 + (n & 0xfff)).parse().unwrap(),
            });
            socket
        })
        .collect();
    let up = (2..41_usize).map(|thousand| thousand * 1_000);
    for (now, len) in up.clone().chain(up.rev()).enumerate() {
        // Twice: what is missing is forgotten only then.
        for _ in 0..2 {
            scan(&mut table, true, now as u64, &all[..len]);
        }
        assert_eq!(table.len(), len);
        assert!(table.bytes() <= 64 * len, "{} for {len}", table.bytes());
    }
    scan(&mut table, true, 100, &[]);
    scan(&mut table, true, 100, &[]);
    assert!(
        table.len() == 0 && table.bytes() < 4_096,
        "{}",
        table.bytes()
    );
}

/// What happens in one second.
#[derive(Clone, Debug)]
struct Step {
    /// Connections that open anew in these places.
    opens: Vec<u8>,
    closes: Vec<u8>,
    /// Those that a look does not show though they are there.
    hidden: Vec<u8>,
    pause: u64,
    look: Look,
}

#[derive(Clone, Copy, Debug)]
enum Look {
    Whole,
    Torn,
    Failed,
}

fn step() -> impl Strategy<Value = Step> {
    let some = || proptest::collection::vec(0..24_u8, 0..6);
    let look = prop_oneof![
        6 => Just(Look::Whole),
        2 => Just(Look::Torn),
        1 => Just(Look::Failed),
    ];
    (some(), some(), some(), 1..5_u64, look).prop_map(|(opens, closes, hidden, pause, look)| Step {
        opens,
        closes,
        hidden,
        pause,
        look,
    })
}

/// The same in the plainest way: a map, and the rules as they are told.
#[derive(Default)]
struct Model {
    /// By place and number: since when, and what misses have added up to.
    known: HashMap<(u8, u32), (u64, u8)>,
}

impl Model {
    fn scan(&mut self, whole: bool, now: u64, seen: &[(u8, u32)]) -> Vec<(u8, u64)> {
        for socket in seen {
            self.known.entry(*socket).or_insert((now, 0)).1 = 0;
        }
        for (socket, (_, missed)) in &mut self.known {
            if !seen.contains(socket) {
                *missed += if whole { 5 } else { 1 };
            }
        }
        self.known.retain(|_, (_, missed)| *missed < 10);
        let there = self.known.iter().filter(|(_, (_, missed))| *missed < 5);
        let mut ages: Vec<_> = there
            .map(|((place, _), (since, _))| (place % 4, now - since))
            .collect();
        ages.sort_unstable();
        ages
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn it_is_the_plain_thing_made_fast(
        steps in proptest::collection::vec(step(), 1..60),
        cookies: bool,
    ) {
        let (mut table, mut model) = (table(), Model::default());
        let mut open: HashMap<u8, u32> = HashMap::new();
        let (mut now, mut next) = (0, 0);
        for step in steps {
            now += step.pause;
            for place in step.closes {
                open.remove(&place);
            }
            for place in step.opens {
                next += 1;
                open.insert(place, next);
            }
            let shown = open.iter().filter(|(place, _)| !step.hidden.contains(place));
            let shown: Vec<_> = shown.map(|(place, number)| (*place, *number)).collect();
            for (place, number) in &shown {
                let cookie = if cookies { (*number).into() } else { 0 };
                let socket = socket((*place).into(), cookie, *number);
                table.see(&socket, at(now), |_| false, |groups| groups.of(key((place % 4).into())));
            }
            let whole = match step.look {
                Look::Whole => true,
                Look::Torn => false,
                Look::Failed => {
                    table.unsee();
                    // What it saw first is known since then.
                    for socket in &shown {
                        model.known.entry(*socket).or_insert((now, 0)).1 = 0;
                    }
                    continue;
                }
            };
            let mut ages = Vec::new();
            table.finish(whole, at(now), |aged| ages.push((aged.group, aged.age.as_secs())));
            let mut ages: Vec<_> = ages
                .into_iter()
                .map(|(group, age)| (table.groups.key(group).port.unwrap() as u8, age))
                .collect();
            ages.sort_unstable();
            prop_assert_eq!(ages, model.scan(whole, now, &shown));
            prop_assert_eq!(table.len(), model.known.len());
        }
    }
}
