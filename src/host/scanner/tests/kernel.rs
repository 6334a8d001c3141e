//! A kernel that plays tricks: busy, out of room, of another age, in a sandbox, or talking nonsense.
//! What was seen before is kept through all of it.
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::io::Errno;

use super::super::linux::RETRY;
use super::super::*;
use crate::host::netlink::{INET_DIAG_CGROUP_ID, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, V4};
use crate::host::sock_diag::{Kernel, Query};

/// A question as it came.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Asked {
    kind: u16,
    sequence: u32,
    family: u8,
    states: u32,
}

const BOTH: u16 = 18;
const BY_FAMILY: u16 = 20;

impl Asked {
    fn read(request: &[u8]) -> Self {
        let four = |at: usize| u32::from_ne_bytes(*request[at..].first_chunk().unwrap());
        let kind = u16::from_ne_bytes([request[4], request[5]]);
        Self {
            kind,
            sequence: four(8),
            family: request[16],
            states: four(if kind == BOTH { 16 + 52 } else { 16 + 4 }),
        }
    }

    const fn is_for_listeners(&self) -> bool {
        self.states == 1 << LISTEN
    }
}

/// `127.0.0.1:local` to `127.0.0.1:peer`.
#[derive(Clone, Copy, Debug)]
struct Row {
    local: u16,
    peer: u16,
    state: u8,
    /// Its inode too.
    cookie: u64,
    cgroup: u64,
}

const fn listener(port: u16) -> Row {
    Row {
        local: port,
        peer: 0,
        state: LISTEN,
        cookie: 1_000 + port as u64,
        cgroup: 0,
    }
}

const fn client(local: u16, peer: u16) -> Row {
    Row {
        local,
        peer,
        state: ESTABLISHED,
        cookie: peer as u64,
        cgroup: 0,
    }
}

fn message(asked: &Asked, kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((16 + payload.len() as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(asked.sequence.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend(payload);
    bytes
}

impl Row {
    fn encode(&self, asked: &Asked) -> Vec<u8> {
        let mut bytes = vec![0; 72];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &[V4, self.state]);
        put(4, &self.local.to_be_bytes());
        put(6, &self.peer.to_be_bytes());
        put(8, &[127, 0, 0, 1]);
        put(24, &[127, 0, 0, 1]);
        put(44, &self.cookie.to_ne_bytes());
        put(68, &(self.cookie as u32).to_ne_bytes());
        if self.cgroup != 0 {
            bytes.extend(12_u16.to_ne_bytes());
            bytes.extend(INET_DIAG_CGROUP_ID.to_ne_bytes());
            bytes.extend(self.cgroup.to_ne_bytes());
        }
        message(asked, asked.kind, 2, &bytes)
    }
}

type Parts = Vec<io::Result<Vec<u8>>>;
type Trick = Box<dyn FnMut(&Asked, Parts) -> io::Result<Parts> + Send>;

/// What it has and does; the tests' side of it.
#[derive(Default)]
struct State {
    rows: Vec<Row>,
    trick: Option<Trick>,
    refuses: Option<Errno>,
    asked: Vec<Asked>,
    opened: u32,
    parts: VecDeque<io::Result<Vec<u8>>>,
}

#[derive(Clone, Default)]
struct Tricky(Arc<Mutex<State>>);

impl Tricky {
    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.0.lock().unwrap());
    }

    fn plays(&self, trick: impl FnMut(&Asked, Parts) -> io::Result<Parts> + Send + 'static) {
        self.set(|state| state.trick = Some(Box::new(trick)));
    }

    fn is_honest(&self) {
        self.set(|state| state.trick = None);
    }

    fn scanner(&self, settings: MonitorBuilder) -> Scanner {
        let mut scanner = settings.scanner().unwrap();
        scanner.reader.query = Query::to(Box::new(self.clone()));
        scanner
    }
}

impl fmt::Debug for Tricky {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tricky")
    }
}

impl Kernel for Tricky {
    fn open(&mut self) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        state.opened += 1;
        state.parts.clear();
        state.refuses.map_or(Ok(()), |errno| Err(errno.into()))
    }

    fn send(&self, request: &[u8]) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        let asked = Asked::read(request);
        state.asked.push(asked);
        // A dump is under way on this socket.
        if !state.parts.is_empty() {
            return Err(Errno::BUSY.into());
        }
        let rows = state.rows.iter().filter(|row| {
            asked.states >> row.state & 1 == 1 && (asked.kind == BOTH || asked.family == V4)
        });
        let mut parts: Parts = rows.map(|row| Ok(row.encode(&asked))).collect();
        parts.push(Ok(message(&asked, NLMSG_DONE, 2, &0_i32.to_ne_bytes())));
        if let Some(trick) = &mut state.trick {
            parts = trick(&asked, parts)?;
        }
        state.parts = parts.into();
        Ok(())
    }

    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        let part = self.0.lock().unwrap().parts.pop_front();
        let part = part.unwrap_or_else(|| Err(Errno::AGAIN.into()))?;
        into[..part.len()].copy_from_slice(&part);
        Ok(part.len())
    }
}

/// As the kernel says no.
fn refusal(asked: &Asked, errno: Errno) -> Parts {
    let number = (-errno.raw_os_error()).to_ne_bytes();
    vec![Ok(message(asked, NLMSG_ERROR, 0, &number))]
}

/// Time passes.
fn later(scanner: &mut Scanner, seconds: u64) {
    scanner.begun = scanner
        .begun
        .checked_sub(Duration::from_secs(seconds))
        .unwrap();
}

/// Established, and the age of the oldest in seconds: inbound, of a port.
fn inbound(snapshot: &Snapshot, port: u16) -> (u64, u64) {
    let mut rows = snapshot.connections.iter();
    let row = rows.find(|row| row.direction == Direction::Inbound && row.port == Some(port));
    row.map_or((0, 0), |row| (row.established, row.oldest.as_secs()))
}

fn server() -> (Tricky, Scanner) {
    let kernel = Tricky::default();
    kernel.set(|state| state.rows = vec![listener(80), client(80, 1), client(80, 2)]);
    let mut scanner = kernel.scanner(Monitor::builder());
    let snapshot = scanner.scan().unwrap();
    assert_eq!(snapshot.scan.source, Source::Netlink);
    assert_eq!((inbound(&snapshot, 80), snapshot.scan.rows), ((2, 0), 3));
    assert_eq!(snapshot.listening.len(), 1);
    (kernel, scanner)
}

#[test]
fn one_that_is_busy_or_out_of_room_is_asked_once_more_at_once() {
    for errno in [Errno::BUSY, Errno::NOBUFS, Errno::AGAIN, Errno::NOMEM] {
        let (kernel, mut scanner) = server();
        later(&mut scanner, 10);
        let mut first = true;
        kernel.plays(move |asked, parts| {
            let busy = std::mem::take(&mut first);
            Ok(if busy { refusal(asked, errno) } else { parts })
        });
        let opened = kernel.0.lock().unwrap().opened;
        let snapshot = scanner.scan().unwrap();
        assert_eq!(inbound(&snapshot, 80), (2, 10), "{errno}");
        assert_eq!(snapshot.scan.torn, None);
        // Whatever was left of the first answer is not heard.
        let state = kernel.0.lock().unwrap();
        assert_eq!(state.opened, opened + 1);
        assert!(state.asked.iter().all(|asked| asked.kind == BOTH));
    }
}

#[test]
fn an_error_whose_number_is_none_is_an_error() {
    for number in [i32::MIN, -70_000, -4_096, 1, i32::MAX] {
        let (kernel, mut scanner) = server();
        scanner.reader.net = "/nothing/like/it".into();
        kernel.plays(move |asked, _| {
            let payload = number.to_ne_bytes();
            Ok(vec![Ok(message(asked, NLMSG_ERROR, 0, &payload))])
        });
        assert!(scanner.scan().is_err(), "{number}");
        kernel.is_honest();
        later(&mut scanner, 10);
        assert_eq!(inbound(&scanner.scan().unwrap(), 80), (2, 10));
    }
}

#[test]
fn one_that_stays_busy_is_asked_again_at_the_next_scan() {
    let (kernel, mut scanner) = server();
    scanner.reader.net = "/nothing/like/it".into();
    kernel.plays(|_, _| Err(Errno::NOBUFS.into()));
    let error = scanner.scan().unwrap_err().to_string();
    assert!(
        error.contains("/nothing/like/it/tcp") && error.contains("netlink"),
        "{error}"
    );
    kernel.is_honest();
    later(&mut scanner, 10);
    let snapshot = scanner.scan().unwrap();
    assert_eq!(inbound(&snapshot, 80), (2, 10));
    assert_eq!(
        (snapshot.scan.source, snapshot.scan.torn),
        (Source::Netlink, None)
    );
}

#[test]
fn one_that_does_not_know_the_question_for_both_is_asked_by_family() {
    let (kernel, mut scanner) = server();
    kernel.plays(|asked, parts| {
        Ok(match asked.kind {
            BOTH => refusal(asked, Errno::INVAL),
            _ if asked.family == V4 => parts,
            // Built without IPv6.
            _ => refusal(asked, Errno::NOENT),
        })
    });
    for age in [0, 10] {
        later(&mut scanner, age);
        let snapshot = scanner.scan().unwrap();
        assert_eq!(inbound(&snapshot, 80), (2, age));
        assert_eq!(
            (snapshot.scan.source, snapshot.scan.torn),
            (Source::Netlink, None)
        );
    }
    // It was asked in vain once.
    let state = kernel.0.lock().unwrap();
    let both = state.asked.iter().filter(|asked| asked.kind == BOTH);
    assert_eq!(both.count(), 2 + 1);
    let families = state.asked.iter().filter(|asked| asked.kind == BY_FAMILY);
    assert_eq!(families.count(), 2 * 2 * 2);
}

/// An overrun, in the middle of an answer: whoever is missing is counted, with his age, and what can't
/// be known by rows that are missing is that of the last whole scan.
#[test]
fn an_answer_that_breaks_off_costs_nothing() {
    for errno in [Errno::NOBUFS, Errno::AGAIN, Errno::INTR] {
        let (kernel, mut scanner) = server();
        later(&mut scanner, 10);
        kernel.plays(move |asked, mut parts| {
            if !asked.is_for_listeners() {
                parts.truncate(1);
                parts.push(Err(errno.into()));
            }
            Ok(parts)
        });
        let snapshot = scanner.scan().unwrap();
        assert_eq!(inbound(&snapshot, 80), (2, 10));
        assert!(snapshot.scan.torn.is_some());
        assert!(
            snapshot
                .states
                .contains(&(TcpState::Established, IpVersion::V4, 2))
        );
        kernel.is_honest();
        later(&mut scanner, 10);
        let snapshot = scanner.scan().unwrap();
        assert_eq!(
            (inbound(&snapshot, 80), snapshot.scan.torn),
            ((2, 20), None)
        );
    }
}

#[test]
fn a_table_that_changed_under_the_dump_is_no_proof_that_something_is_gone() {
    let (kernel, mut scanner) = server();
    kernel.plays(|asked, mut parts| {
        if !asked.is_for_listeners() {
            // One is missing, and the end says why.
            parts.remove(0).unwrap();
            let done = message(asked, NLMSG_DONE, 2 | NLM_F_DUMP_INTR, &0_i32.to_ne_bytes());
            *parts.last_mut().unwrap() = Ok(done);
        }
        Ok(parts)
    });
    later(&mut scanner, 10);
    let snapshot = scanner.scan().unwrap();
    assert_eq!(inbound(&snapshot, 80), (2, 10));
    assert!(snapshot.scan.torn.is_some());
    // Not for ever.
    for _ in 0..STALE {
        scanner.scan().unwrap();
    }
    let snapshot = scanner.scan().unwrap();
    assert_eq!(inbound(&snapshot, 80).0, 1);
    assert!(
        snapshot
            .states
            .contains(&(TcpState::Established, IpVersion::V4, 1))
    );
}

#[test]
fn a_sandbox_that_forbids_netlink_is_read_by_proc_and_ages_go_over_and_back() {
    let (kernel, mut scanner) = server();
    let name = format!("conntrack-refused-{}", std::process::id());
    let net = std::env::temp_dir().join(name);
    std::fs::create_dir_all(&net).unwrap();
    let line = |row: &Row| {
        format!(
            "0: 0100007F:{:04X} 0100007F:{:04X} {:02X} 0:0 0:0 0 0 0 {}\n",
            row.local, row.peer, row.state, row.cookie as u32
        )
    };
    let rows: String = kernel.0.lock().unwrap().rows.iter().map(line).collect();
    std::fs::write(net.join("tcp"), format!("  sl  local_address\n{rows}")).unwrap();
    scanner.reader.net = net.clone();
    kernel.set(|state| state.refuses = Some(Errno::PERM));
    // The next question meets it.
    kernel.plays(|_, _| Err(Errno::BADF.into()));
    later(&mut scanner, 10);
    let snapshot = scanner.scan().unwrap();
    assert_eq!(snapshot.scan.source, Source::Proc);
    // /proc tells the word of the machine, which is written for little-endian ones here.
    if cfg!(target_endian = "little") {
        assert_eq!(inbound(&snapshot, 80), (2, 10));
    }
    // It is not asked each time.
    let opened = kernel.0.lock().unwrap().opened;
    scanner.scan().unwrap();
    assert_eq!(kernel.0.lock().unwrap().opened, opened);
    kernel.set(|state| state.refuses = None);
    kernel.is_honest();
    later(&mut scanner, 10);
    scanner.reader.refused = Instant::now().checked_sub(RETRY);
    let snapshot = scanner.scan().unwrap();
    assert_eq!(snapshot.scan.source, Source::Netlink);
    assert_eq!(inbound(&snapshot, 80), (2, 20));
    std::fs::remove_dir_all(net).unwrap();
}

#[test]
fn who_was_seen_before_his_listener_becomes_inbound_when_it_is_seen() {
    let kernel = Tricky::default();
    kernel.set(|state| state.rows = vec![client(8_080, 1), client(8_080, 2)]);
    let mut scanner = kernel.scanner(Monitor::builder());
    let snapshot = scanner.scan().unwrap();
    assert_eq!(
        (inbound(&snapshot, 8_080).0, snapshot.established()),
        (0, 2)
    );
    kernel.set(|state| state.rows.push(listener(8_080)));
    later(&mut scanner, 10);
    let snapshot = scanner.scan().unwrap();
    assert_eq!(inbound(&snapshot, 8_080), (2, 10));
    assert_eq!(snapshot.connections.len(), 1, "{:?}", snapshot.connections);
    // A torn look at the listeners takes nobody's direction, not that of one who comes meanwhile
    // either.
    kernel.set(|state| state.rows.push(client(8_080, 3)));
    kernel.plays(|asked, parts| {
        Ok(if asked.is_for_listeners() {
            vec![Ok(message(
                asked,
                NLMSG_DONE,
                2 | NLM_F_DUMP_INTR,
                &0_i32.to_ne_bytes(),
            ))]
        } else {
            parts
        })
    });
    let snapshot = scanner.scan().unwrap();
    assert_eq!(inbound(&snapshot, 8_080), (3, 10));
    assert_eq!(snapshot.listening.len(), 1);
}

/// A server that is drained, say, which was so before we came.
#[test]
fn clients_of_a_server_that_nobody_saw_are_no_label_each() {
    let range = client_ports();
    let kernel = Tricky::default();
    let ports = range.clone().take(500);
    kernel.set(|state| state.rows = ports.map(|peer| client(8_080, peer)).collect());
    for group_by in [GroupBy::Nothing, GroupBy::Cgroup] {
        let mut scanner = kernel.scanner(Monitor::builder().group_by(group_by));
        let snapshot = scanner.scan().unwrap();
        let rows: Vec<_> = snapshot.connections.iter().collect();
        assert_eq!(rows.len(), 1, "{rows:?}");
        assert_eq!((rows[0].port, rows[0].established), (None, 500));
    }
    // A client of a server whose port a client might have, as gRPC's often is.
    kernel.set(|state| state.rows = vec![client(*range.end(), *range.start())]);
    let mut scanner = kernel.scanner(Monitor::builder());
    let snapshot = scanner.scan().unwrap();
    assert_eq!(snapshot.connections[0].port, Some(*range.start()));
}

#[test]
fn a_cgroup_that_was_not_told_at_first_is_taken_when_it_is() {
    let kernel = Tricky::default();
    kernel.set(|state| state.rows = vec![listener(80), client(80, 1)]);
    let mut scanner = kernel.scanner(Monitor::builder().group_by(GroupBy::Cgroup));
    let groups = |snapshot: &Snapshot| -> Vec<_> {
        let rows = snapshot.connections.iter();
        rows.map(|row| row.group.as_deref().unwrap().to_owned())
            .collect()
    };
    assert_eq!(groups(&scanner.scan().unwrap()), ["unknown"]);
    kernel.set(|state| state.rows[1].cgroup = u64::MAX);
    let snapshot = scanner.scan().unwrap();
    assert_eq!(groups(&snapshot), [format!("cgroup:{}", u64::MAX)]);
}

#[test]
fn a_row_that_makes_no_sense_is_counted_and_the_rest_is_read() {
    let (kernel, mut scanner) = server();
    kernel.plays(|asked, mut parts| {
        if !asked.is_for_listeners() {
            // Of no family, too short, and longer than what came.
            parts.insert(0, Ok(message(asked, asked.kind, 2, &[0; 72])));
            parts.insert(1, Ok(message(asked, asked.kind, 2, &[V4; 20])));
            let mut long = message(asked, asked.kind, 2, &[V4; 72]);
            long[0] += 100;
            parts.insert(2, Ok(long));
        }
        Ok(parts)
    });
    let snapshot = scanner.scan().unwrap();
    assert_eq!((inbound(&snapshot, 80).0, snapshot.scan.malformed), (2, 3));
    let torn = snapshot.scan.torn.unwrap();
    assert!(torn.contains("3 rows"), "{torn}");
}

#[test]
fn a_scan_that_panics_is_a_failed_one_and_the_next_goes_on() {
    let (kernel, scanner) = server();
    let settings = Monitor::builder().period(Duration::from_millis(100));
    let monitor = Monitor::with(scanner, settings).unwrap();
    kernel.plays(|_, _| panic!("a bug, made for this test"));
    let until = |done: &dyn Fn() -> bool| {
        let end = Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(Instant::now() < end, "it never came");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    // What follows is another scanner, of the real kernel.
    until(&|| monitor.failed_scans() == 1);
    until(&|| monitor.scans() > monitor.failed_scans() + 2);
    assert_eq!((monitor.failed_scans(), monitor.failure()), (1, None));
}

proptest! {
    /// Whatever comes: no panic, no hang, and afterwards a whole scan is right.
    #[test]
    fn no_answer_is_too_wild(
        parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..8),
        cut in 0_usize..100,
        flip in proptest::collection::vec((0_usize..300, any::<u8>()), 0..8),
    ) {
        let (kernel, mut scanner) = server();
        scanner.reader.net = "/nothing/like/it".into();
        kernel.plays(move |_, honest| {
            // Real ones, bent; between them what is none.
            let mut all: Parts = parts.iter().cloned().map(Ok).collect();
            all.extend(honest.into_iter().map(|part| {
                let mut part = part?;
                for (at, byte) in &flip {
                    if let Some(place) = part.get_mut(*at) {
                        *place ^= byte;
                    }
                }
                part.truncate(part.len() - cut.min(part.len()));
                Ok(part)
            }));
            Ok(all)
        });
        let _ = scanner.scan();
        kernel.is_honest();
        scanner.reader.refused = None;
        later(&mut scanner, 10);
        let snapshot = scanner.scan().unwrap();
        prop_assert_eq!(snapshot.scan.source, Source::Netlink);
        prop_assert!(inbound(&snapshot, 80).0 >= 2);
        prop_assert_eq!(snapshot.scan.torn, None);
    }
}
