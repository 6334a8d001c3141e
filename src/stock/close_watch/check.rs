//! A check: everything that is watched against the kernel's table.
//!
//! A table is read while it changes, and may leave out a socket that was there all the time. So what
//! is missing in it is asked for once more, by itself where the kernel takes such questions, by a
//! second reading where not. What is in the table speaks for itself.
//!
//! A connection that its peer reset is in no table, though a descriptor may hold what is left of it. A
//! check takes it for gone, which it is; its notice comes only when the descriptor is closed.

use std::collections::HashMap;

use super::kernel::Kernel;
use super::table::{Identity, Table};
use crate::event::TcpInfo;
use crate::host::sock_diag::{self, Query};
use crate::host::{Key, Seen, proc_tcp};

/// So many questions cost about what a dump does (measured: 3 µs each, 0.8 ms for a table with
/// 262 144 empty places).
const FEW: usize = 256;

/// What a check is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// Sockets that were closed and that the kernel has not got rid of. What it has got rid of comes
    /// as a notice, and with more to tell.
    Orphans,
    /// Everything that is not open.
    All,
}

/// A connection that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) key: Key,
    pub(super) identity: Identity,
    pub(super) tcp: Option<TcpInfo>,
}

/// Finds what has ended, of what is in the table when the check begins. Takes no lock for longer
/// than one question.
pub(super) fn ended(kernel: &Kernel, table: &Table, depth: Depth) -> Vec<Ended> {
    let entries = table.entries();
    let (known, unknown): (Vec<_>, Vec<_>) = entries
        .into_iter()
        .partition(|(_, identity)| identity.is_cookie());
    // No notice is sure to tell of those without a cookie: a notice has not always addresses.
    if kernel.believes_query() {
        let mut ended = by_query(kernel, &known, depth);
        ended.extend(by_dump(kernel, &unknown, Depth::All).unwrap_or_default());
        ended
    } else if kernel.believes_proc() {
        // There are no cookies where nothing was ever asked for.
        by_proc(&unknown)
    } else {
        Vec::new()
    }
}

type Entry = (Key, Identity);

fn by_query(kernel: &Kernel, entries: &[Entry], depth: Depth) -> Vec<Ended> {
    if entries.len() > FEW
        && let Some(ended) = by_dump(kernel, entries, depth)
    {
        return ended;
    }
    let ask = |(key, identity): &Entry| {
        let seen = kernel.get(key, true)?;
        Verdict::of(*identity, seen.as_ref()).ended(*key, *identity, depth)
    };
    entries.iter().filter_map(ask).collect()
}

fn by_dump(kernel: &Kernel, entries: &[Entry], depth: Depth) -> Option<Vec<Ended>> {
    if entries.is_empty() {
        return Some(Vec::new());
    }
    let read = |look: &mut Look<'_>| {
        let states = match depth {
            Depth::Orphans => sock_diag::CLOSING,
            Depth::All => sock_diag::ALL,
        };
        // A socket of its own: a dump is long, and new connections must not wait for it.
        let mut query = Query::open().ok()?;
        let info = depth == Depth::Orphans;
        query.dump(states, info, |seen| look.at(seen)).ok()
    };
    let mut look = Look::new(entries, false);
    read(&mut look)?;
    if depth == Depth::All {
        for (verdict, (key, identity)) in look.verdicts.iter_mut().zip(entries) {
            if matches!(verdict, Verdict::Missing | Verdict::Closed(None)) {
                *verdict = match kernel.get(key, true) {
                    Some(seen) => Verdict::of(*identity, seen.as_ref()),
                    None => Verdict::Open,
                };
            }
        }
        // One that is bound to a device is not found by such a question.
        let doubtful = |at: &usize| !entries[*at].1.is_cookie();
        if look.missing().iter().any(doubtful) {
            read(&mut look)?;
        }
    }
    Some(look.ended(depth))
}

fn by_proc(entries: &[Entry]) -> Vec<Ended> {
    let mut look = Look::new(entries, true);
    for _ in 0..2 {
        if proc_tcp::read(|seen| look.at(seen)).is_err() {
            return Vec::new();
        }
        if look.missing().is_empty() {
            break;
        }
    }
    look.ended(Depth::All)
}

/// What a table says of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Missing,
    Closed(Option<TcpInfo>),
    Open,
}

impl Verdict {
    fn of(identity: Identity, seen: Option<&Seen>) -> Self {
        let same = |seen: &&Seen| match seen.cookie {
            Some(cookie) if identity.is_cookie() => cookie == identity.get(),
            _ => true,
        };
        match seen.filter(same) {
            None => Self::Missing,
            Some(seen) if seen.is_closed() => Self::Closed(seen.tcp),
            Some(_) => Self::Open,
        }
    }

    fn ended(self, key: Key, identity: Identity, depth: Depth) -> Option<Ended> {
        let tcp = match self {
            Self::Closed(tcp) if depth == Depth::All || tcp.is_some() => tcp,
            Self::Missing if depth == Depth::All => None,
            _ => return None,
        };
        Some(Ended { key, identity, tcp })
    }
}

/// A look at a table, row by row.
struct Look<'a> {
    entries: &'a [Entry],
    verdicts: Vec<Verdict>,
    by_key: HashMap<Key, usize>,
}

impl<'a> Look<'a> {
    fn new(entries: &'a [Entry], unscoped: bool) -> Self {
        let mut verdicts = vec![Verdict::Missing; entries.len()];
        let mut by_key = HashMap::with_capacity(entries.len());
        for (at, (key, _)) in entries.iter().enumerate() {
            let key = if unscoped { key.unscoped() } else { *key };
            if let Some(before) = by_key.insert(key, at)
                && entries[before].1 != entries[at].1
            {
                // Two that this table does not tell apart: nothing can be said of them.
                verdicts[before] = Verdict::Open;
                verdicts[at] = Verdict::Open;
            }
        }
        Self {
            entries,
            verdicts,
            by_key,
        }
    }

    fn at(&mut self, seen: &Seen) {
        let Some(&at) = self.by_key.get(&seen.key) else {
            return;
        };
        // A socket may be met twice, in two states; that it was open once is what counts. What is
        // wrong with that the next look will find.
        let verdict = Verdict::of(self.entries[at].1, Some(seen));
        match (self.verdicts[at], verdict) {
            (Verdict::Open, _) | (_, Verdict::Missing) => {}
            _ => self.verdicts[at] = verdict,
        }
    }

    fn missing(&self) -> Vec<usize> {
        let verdicts = self.verdicts.iter().enumerate();
        verdicts
            .filter_map(|(at, verdict)| (*verdict == Verdict::Missing).then_some(at))
            .collect()
    }

    fn ended(&self, depth: Depth) -> Vec<Ended> {
        let each = self.entries.iter().zip(&self.verdicts);
        each.filter_map(|((key, identity), verdict)| verdict.ended(*key, *identity, depth))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Tuple;

    const ESTABLISHED: u8 = 1;
    const FIN_WAIT1: u8 = 4;
    const TIME_WAIT: u8 = 6;
    const CLOSE_WAIT: u8 = 8;

    fn key(local: &str) -> Key {
        Key::from(&Tuple {
            local: local.parse().unwrap(),
            peer: "[fe80::2]:2".parse().unwrap(),
        })
    }

    fn cookie(cookie: u64) -> Identity {
        Identity::cookie(cookie).unwrap()
    }

    fn row(key: Key, cookie: Option<u64>, state: u8, held: bool) -> Seen {
        let mut info = [0; 168];
        info[0] = state;
        Seen {
            key,
            cookie,
            state,
            held,
            inode: u64::from(held),
            tcp: TcpInfo::parse(&info).filter(|_| state != TIME_WAIT),
        }
    }

    #[test]
    fn what_a_row_says() {
        let key = key("[fe80::1%1]:1");
        // The row's cookie, its state, whether it is held; and what has ended, at each depth.
        let cases = [
            (7, ESTABLISHED, true, [false, false]),
            (7, CLOSE_WAIT, true, [false, false]),
            // Shut down, and held.
            (7, FIN_WAIT1, true, [false, false]),
            // Not held, in a table without inodes.
            (7, ESTABLISHED, false, [false, false]),
            (7, FIN_WAIT1, false, [true, true]),
            // Its notice is under way.
            (7, TIME_WAIT, false, [false, true]),
            // Another one has its place.
            (8, ESTABLISHED, true, [false, true]),
        ];
        for (its, state, held, expected) in cases {
            let seen = row(key, Some(its), state, held);
            let ended = [Depth::Orphans, Depth::All].map(|depth| {
                let verdict = Verdict::of(cookie(7), Some(&seen));
                verdict.ended(key, cookie(7), depth).is_some()
            });
            assert_eq!(ended, expected, "{its} {state} {held}");
        }
        let missing = Verdict::of(cookie(7), None);
        assert_eq!(missing.ended(key, cookie(7), Depth::Orphans), None);
        assert!(missing.ended(key, cookie(7), Depth::All).is_some());
    }

    #[test]
    fn one_row_that_shows_it_open_outweighs_the_others() {
        let entries = [(key("[fe80::1%1]:1"), cookie(7))];
        let open = row(entries[0].0, Some(7), ESTABLISHED, true);
        let closed = row(entries[0].0, Some(7), FIN_WAIT1, false);
        let other = row(entries[0].0, Some(8), ESTABLISHED, true);
        for rows in [[open, closed, other], [other, closed, open]] {
            let mut look = Look::new(&entries, false);
            assert_eq!(look.missing(), [0]);
            rows.iter().for_each(|seen| look.at(seen));
            assert_eq!(look.ended(Depth::All), []);
        }
    }

    #[test]
    fn what_a_table_does_not_tell_apart_is_not_ended_by_it() {
        let (one, other) = (key("[fe80::1%1]:1"), key("[fe80::1%2]:1"));
        let entries = [(one, Identity::ours(1)), (other, Identity::ours(2))];
        let scoped = Look::new(&entries, false);
        assert_eq!(scoped.ended(Depth::All).len(), 2);
        let mut unscoped = Look::new(&entries, true);
        unscoped.at(&row(one.unscoped(), None, TIME_WAIT, false));
        assert_eq!(unscoped.ended(Depth::All), []);
    }
}
