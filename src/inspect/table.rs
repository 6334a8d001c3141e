//! All connections at a glance: what they are found and sorted by, in one block of memory.
//!
//! With 100 000 connections a look at each record takes tens of milliseconds, because they lie all over
//! the memory. So one look makes a [`Table`], which serves every reader for a while, and the records
//! themselves are asked only for the rows that are shown.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::event::{ConnectionId, ConnectionState, Direction, Endpoint};
use crate::inspect::budget::spent;
use crate::inspect::query::{Filter, Sort};
use crate::record::scope::is_folded;
use crate::record::{Connection, Recorder, Scope};

pub(super) struct Table {
    rows: Vec<Row>,
    scopes: Vec<Arc<Scope>>,
    /// By scope and slot.
    targets: Vec<Vec<Option<Arc<str>>>>,
    /// Of connections whose target has no slot of its own.
    more_targets: Vec<Arc<str>>,
    instance: u32,
    pub(super) taken: Instant,
    /// How long it took.
    pub(super) cost: Duration,
}

/// One connection. Times are in nanoseconds, `NONE` for none.
struct Row {
    number: u64,
    age: u64,
    idle: u64,
    active: u64,
    requests: u64,
    read: u64,
    written: u64,
    host: Host,
    in_flight: u32,
    scope: u32,
    state: ConnectionState,
}

const NONE: u64 = u64::MAX;

/// Whom it is with.
#[derive(Clone, Copy)]
enum Host {
    Unknown,
    /// The slot of its scope.
    Slot(u32),
    More(u32),
    Peer(IpAddr),
}

/// A page of what was found.
pub(super) struct Found {
    pub(super) connections: Vec<Arc<Connection>>,
    /// Which page it is: the last one, if a later one was asked for.
    pub(super) page: usize,
    pub(super) pages: usize,
    /// How many there are on all pages.
    pub(super) matching: usize,
    /// How many there are at all.
    pub(super) total: usize,
}

impl Table {
    pub(super) fn take(recorder: &Recorder) -> Self {
        let (taken, before) = (Instant::now(), spent());
        let scopes = recorder.scopes();
        let mut table = Self {
            rows: Vec::new(),
            targets: scopes.iter().map(|scope| hosts(scope)).collect(),
            more_targets: Vec::new(),
            instance: recorder.instance(),
            scopes,
            taken,
            cost: Duration::ZERO,
        };
        for (at, scope) in table.scopes.iter().enumerate() {
            let (rows, more) = (&mut table.rows, &mut table.more_targets);
            scope.each_connection(|connection| {
                rows.extend(Row::of(connection, at as u32, more, taken));
            });
        }
        table.cost = spent().saturating_sub(before);
        table
    }

    pub(super) fn find(&self, filter: &Filter) -> Found {
        let wanted: Vec<bool> = self
            .scopes
            .iter()
            .map(|scope| {
                let named = filter.name.as_ref().is_none_or(|name| name.is(&scope.name));
                named && filter.direction.is_none_or(|d| d == scope.direction)
            })
            .collect();
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(NONE - 1);
        let older = filter.older_than.map(nanos);
        let idle = filter.idle_longer_than.map(nanos);
        let names = self.name_ranks();
        let hosts = (filter.sort == Sort::Host).then(|| self.host_ranks());
        let mut with = filter.host.as_deref().map(|part| With::new(self, part));
        let mut found: Vec<(Key, u32)> = Vec::new();
        for (at, row) in self.rows.iter().enumerate() {
            let matches = wanted[row.scope as usize]
                && filter.state.is_none_or(|state| state == row.state)
                && older.is_none_or(|least| row.age > least)
                && idle.is_none_or(|least| row.idle != NONE && row.idle > least)
                && with.as_mut().is_none_or(|with| with.is(row));
            if matches {
                found.push((
                    self.key(row, filter.sort, &names, hosts.as_ref()),
                    at as u32,
                ));
            }
        }
        let matching = found.len();
        let order = |a: &(Key, u32), b: &(Key, u32)| {
            let by_key = if filter.descending {
                b.0.cmp(&a.0)
            } else {
                a.0.cmp(&b.0)
            };
            let number = |at: u32| self.rows[at as usize].number;
            by_key.then_with(|| number(a.1).cmp(&number(b.1)))
        };
        let pages = matching.div_ceil(filter.rows).max(1);
        let page = filter.page.min(pages);
        let skip = (page - 1) * filter.rows;
        let end = (skip + filter.rows).min(matching);
        if end < matching {
            found.select_nth_unstable_by(end, order);
            found.truncate(end);
        }
        found.sort_unstable_by(order);
        // What was closed since is missing.
        let connection = |(_, at): &(Key, u32)| {
            let row = &self.rows[*at as usize];
            let id = ConnectionId {
                instance: self.instance,
                number: row.number,
            };
            self.scopes[row.scope as usize].find(id)
        };
        Found {
            connections: found[skip..].iter().filter_map(connection).collect(),
            page,
            pages,
            matching,
            total: self.rows.len(),
        }
    }

    fn key(&self, row: &Row, sort: Sort, names: &[u64], hosts: Option<&HostRanks>) -> Key {
        // What has no such time comes last where the longest come first.
        let time = |time: u64| Key(0, u128::from(time.wrapping_add(1)));
        let number = |n: u64| Key(0, n.into());
        match sort {
            Sort::Age => time(row.age),
            Sort::Idle => time(row.idle),
            Sort::Active => time(row.active),
            Sort::Requests => number(row.requests),
            Sort::InFlight => number(row.in_flight.into()),
            Sort::Read => number(row.read),
            Sort::Written => number(row.written),
            Sort::State => {
                let mut text = [0; 16];
                let state = row.state.as_str().as_bytes();
                text[..state.len()].copy_from_slice(state);
                Key(0, u128::from_be_bytes(text))
            }
            Sort::Name => number(names[row.scope as usize]),
            Sort::Host => hosts.map_or(Key(0, 0), |ranks| ranks.key(row)),
        }
    }

    /// The place of each scope by its name.
    fn name_ranks(&self) -> Vec<u64> {
        let mut order: Vec<usize> = (0..self.scopes.len()).collect();
        order.sort_by(|a, b| self.scopes[*a].name.cmp(&self.scopes[*b].name));
        let mut ranks = vec![0; order.len()];
        for (rank, scope) in order.into_iter().enumerate() {
            ranks[scope] = rank as u64;
        }
        ranks
    }

    fn host_ranks(&self) -> HostRanks {
        let known = self
            .targets
            .iter()
            .enumerate()
            .flat_map(|(scope, targets)| {
                let slots = targets.iter().enumerate();
                slots.map(move |(slot, host)| ((scope, slot), host.clone().unwrap_or_default()))
            });
        let more = self.more_targets.iter().enumerate();
        let more = more.map(|(at, host)| ((usize::MAX, at), host.clone()));
        let mut all: Vec<_> = known.chain(more).collect();
        all.sort_by(|a, b| a.1.cmp(&b.1));
        let mut ranks = HostRanks {
            slots: self.targets.iter().map(|t| vec![0; t.len()]).collect(),
            more: vec![0; self.more_targets.len()],
        };
        for (rank, ((scope, at), _)) in all.into_iter().enumerate() {
            match ranks.slots.get_mut(scope) {
                Some(slots) => slots[at] = rank as u64,
                None => ranks.more[at] = rank as u64,
            }
        }
        ranks
    }
}

/// Which rows are with a host that has this part, in lower case. Names are looked at once each.
struct With<'a> {
    part: &'a str,
    slots: Vec<Vec<bool>>,
    more: Vec<bool>,
    /// For addresses as text.
    buffer: String,
}

impl<'a> With<'a> {
    fn new(table: &Table, part: &'a str) -> Self {
        let has = |host: &Arc<str>| host.to_lowercase().contains(part);
        let slots = table.targets.iter().map(|targets| {
            let targets = targets.iter();
            targets.map(|host| host.as_ref().is_some_and(has)).collect()
        });
        Self {
            part,
            slots: slots.collect(),
            more: table.more_targets.iter().map(has).collect(),
            buffer: String::new(),
        }
    }

    fn is(&mut self, row: &Row) -> bool {
        match row.host {
            Host::Unknown => false,
            Host::Slot(slot) => {
                let slots = &self.slots[row.scope as usize];
                slots.get(slot as usize).copied().unwrap_or_default()
            }
            Host::More(at) => self.more[at as usize],
            Host::Peer(ip) => {
                self.buffer.clear();
                let _ = write!(self.buffer, "{ip}");
                self.buffer.contains(self.part)
            }
        }
    }
}

/// By what rows are compared: what kind of thing it is, and its value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key(u8, u128);

/// The places of hosts by their names.
struct HostRanks {
    slots: Vec<Vec<u64>>,
    more: Vec<u64>,
}

impl HostRanks {
    fn key(&self, row: &Row) -> Key {
        match row.host {
            Host::Unknown => Key(0, 0),
            Host::Peer(ip) => Key(1, mapped(ip).to_bits()),
            Host::Slot(slot) => {
                let slots = &self.slots[row.scope as usize];
                Key(
                    2,
                    slots.get(slot as usize).copied().unwrap_or_default().into(),
                )
            }
            Host::More(at) => Key(2, self.more[at as usize].into()),
        }
    }
}

const fn mapped(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

fn hosts(scope: &Scope) -> Vec<Option<Arc<str>>> {
    let targets = scope.targets().into_iter();
    targets
        .map(|target| target.map(|target| target.host))
        .collect()
}

impl Row {
    fn of(
        connection: &Connection,
        scope: u32,
        more: &mut Vec<Arc<str>>,
        now: Instant,
    ) -> Option<Self> {
        let state = connection.state();
        let there = match state {
            ConnectionState::Closed => false,
            // One that is being accepted in this moment is not counted yet.
            ConnectionState::Connecting => connection.scope.direction == Direction::Outbound,
            _ => true,
        };
        if !there {
            return None;
        }
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(NONE - 1);
        let since_start = now.saturating_duration_since(connection.started);
        let (read, written) = connection.bytes();
        let host = match &connection.target {
            Some(_) if !is_folded(connection.host_slot) => Host::Slot(connection.host_slot),
            Some(target) => {
                more.push(target.host.clone());
                Host::More(more.len() as u32 - 1)
            }
            None => match connection.ends.get().and_then(|ends| ends.peer.as_ref()) {
                Some(Endpoint::Ip(peer)) => Host::Peer(peer.ip()),
                _ => Host::Unknown,
            },
        };
        Some(Self {
            number: connection.id.number,
            age: nanos(connection.age_at(since_start)),
            idle: connection.idle_for(since_start).map_or(NONE, nanos),
            active: connection.active_for(since_start).map_or(NONE, nanos),
            requests: connection.requests(),
            read,
            written,
            host,
            in_flight: connection.in_flight(),
            scope,
            state,
        })
    }
}
