//! One scan: from the kernel's table to a [`Snapshot`].

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cgroups::Cgroups;
use super::groups::{GroupKey, Groups, IpVersion, Label};
use super::long_term::LongTerm;
use super::snapshot::{Connections, Listening, Scan, Snapshot, Source};
use super::{GroupBy, Monitor, MonitorBuilder, Read, Socket, TcpCounters, counters};
use crate::config::ConfigError;
use crate::event::{Direction, TcpState};

#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
use linux::Reader;
#[cfg(not(target_os = "linux"))]
mod elsewhere;
#[cfg(not(target_os = "linux"))]
use elsewhere::Reader;

/// How many listening ports are told apart.
const LISTENING: usize = 500;

/// For so many torn scans what rows add up to is that of the last whole one.
const STALE: u8 = 10;

/// Of the kernel's numbers of states.
const STATES: usize = 12;
const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;

/// Reads the host's table when it is told to. From [`MonitorBuilder::scanner`]; a
/// [`Monitor`](super::Monitor) is one on a thread of its own.
///
/// Between scans it keeps at most 64 bytes per connection; a scan allocates for what it finds new and
/// for its snapshot's rows, never per connection.
pub struct Scanner {
    settings: MonitorBuilder,
    reader: Reader,
    table: LongTerm,
    view: View,
    cgroups: Cgroups,
    begun: Instant,
    malformed: u64,
    /// The last one with nothing missing, and how many scans ago it was.
    whole: Option<(Counts, u8)>,
    tcp: TcpCounters,
}

/// What is counted row by row: it can't be made up for where rows are missing.
#[derive(Clone, Default)]
struct Counts {
    states: Vec<(TcpState, IpVersion, u64)>,
    listening: Vec<Listening>,
}

/// What a row is judged by, and what is summed while rows come.
struct View {
    wanted: Bits,
    /// Listened on, of this scan so far.
    listened: Bits,
    /// Of the last whole scan, and of those that were torn since.
    listened_before: Bits,
    /// What the kernel gives to clients.
    clients: RangeInclusive<u16>,
    ipv6: bool,
    own_port: Option<u16>,
    group_by: GroupBy,
    /// Ports that were asked for and that the kernel gives to no client are a server's, though nobody
    /// may listen there any more.
    servers: Bits,
    states: [[u64; STATES]; 2],
    queues: BTreeMap<u16, Listening>,
    tallies: Vec<Tally>,
}

/// Takes the rows of one scan.
struct Feed<'a> {
    view: &'a mut View,
    table: &'a mut LongTerm,
    now: Duration,
}

impl Feed<'_> {
    /// A table begins, for the first time or anew: what came before does not count.
    fn begin(&mut self) {
        self.view.begin();
    }

    fn row(&mut self, socket: &Socket) {
        self.view.row(self.table, socket, self.now);
    }
}

/// A bit per port.
struct Bits(Box<[u64; 1024]>);

impl Bits {
    fn none() -> Self {
        Self(Box::new([0; 1024]))
    }

    fn set(&mut self, port: u16) {
        self.0[usize::from(port >> 6)] |= 1 << (port & 63);
    }

    fn has(&self, port: u16) -> bool {
        self.0[usize::from(port >> 6)] >> (port & 63) & 1 == 1
    }

    fn add(&mut self, others: &Self) {
        for (word, other) in self.0.iter_mut().zip(&*others.0) {
            *word |= other;
        }
    }
}

/// The sums of a group.
#[derive(Clone, Copy, Default)]
struct Tally {
    established: u64,
    long_term: u64,
    ages: [u64; Connections::AGES.len() + 1],
    age_sum: Duration,
    oldest: Duration,
}

impl Scanner {
    /// Checks the settings; nothing is read yet.
    ///
    /// # Errors
    ///
    /// A setting that can't be used, or a system that is not Linux.
    pub fn new(settings: MonitorBuilder) -> Result<Self, ConfigError> {
        settings.check()?;
        let ports = match settings.own_port {
            None => settings.ports.clone(),
            // Checked: something is left.
            Some(port) => settings.ports.without(port).unwrap_or_default(),
        };
        let (mut wanted, mut servers) = (Bits::none(), Bits::none());
        let clients = client_ports();
        for port in (0..=u16::MAX).filter(|port| ports.contains(*port)) {
            wanted.set(port);
            if !settings.ports.is_all() && !clients.contains(&port) {
                servers.set(port);
            }
        }
        let reader = Reader::new(&settings, ports.program()).map_err(|error| {
            let help = "the host's TCP table is read on Linux only";
            ConfigError::new("host", std::env::consts::OS, help).with_source(error)
        })?;
        Ok(Self {
            view: View {
                wanted,
                listened: Bits::none(),
                listened_before: Bits::none(),
                clients,
                ipv6: settings.ipv6,
                own_port: settings.own_port,
                group_by: settings.group_by,
                servers,
                states: Default::default(),
                queues: BTreeMap::new(),
                tallies: Vec::new(),
            },
            table: LongTerm::new(settings.limit, Groups::new(settings.groups)),
            reader,
            settings,
            cgroups: Cgroups::default(),
            begun: Instant::now(),
            malformed: 0,
            whole: None,
            tcp: TcpCounters::default(),
        })
    }

    /// Reads the table now. Takes less than a microsecond per row, on the calling thread.
    ///
    /// # Errors
    ///
    /// Nothing could be read, neither by netlink nor in `/proc`. All ages are kept: the next scan goes
    /// on where this one failed.
    pub fn scan(&mut self) -> io::Result<Snapshot> {
        let begin = Instant::now();
        let now = begin.duration_since(self.begun);
        let mut feed = Feed {
            view: &mut self.view,
            table: &mut self.table,
            now,
        };
        let (source, read) = match self.reader.read(&mut feed) {
            Ok(read) => read,
            Err(error) => {
                self.table.unsee();
                return Err(error);
            }
        };
        if let Some(own) = self.reader.own_since() {
            self.table.forget(|inode| own.contains(&inode));
        }
        self.malformed += read.malformed;
        let torn = match (&read.torn, read.malformed) {
            (Some(error), _) => Some(error.to_string().into()),
            (None, 0) => None,
            (None, n) => Some(format!("{n} rows could not be read").into()),
        };
        self.view.ends(torn.is_none());
        self.view
            .sum(&mut self.table, torn.is_none(), now, self.settings.duration);
        Ok(self.snapshot(begin, source, torn, &read))
    }

    fn snapshot(
        &mut self,
        begin: Instant,
        source: Source,
        torn: Option<Arc<str>>,
        read: &Read,
    ) -> Snapshot {
        let connections = self.connections(begin);
        // Where rows may be missing, as opposed to some that made no sense.
        let Counts { states, listening } = self.counts(read.torn.is_none());
        // A file that can't be read now, for want of a descriptor say, leaves what it said before.
        self.tcp = counters::read(self.reader.net()).or(&self.tcp);
        let at = Instant::now();
        Snapshot {
            ipv6: self.view.ipv6,
            connections,
            listening,
            states,
            tcp: self.tcp,
            scan: Scan {
                at,
                took: at.duration_since(begin),
                source,
                torn,
                rows: read.rows,
                malformed: self.malformed,
                tracked: self.table.len(),
                tracked_bytes: self.table.bytes(),
                untracked: self.table.untracked(),
            },
        }
    }

    fn counts(&mut self, whole: bool) -> Counts {
        if !whole
            && let Some((counts, ago)) = &mut self.whole
            && *ago < STALE
        {
            *ago += 1;
            return counts.clone();
        }
        let counts = Counts {
            states: self.view.states(),
            listening: self.view.listening(),
        };
        // After too many torn ones the last of them is as good as any.
        self.whole = Some((counts.clone(), if whole { 0 } else { STALE }));
        counts
    }

    fn connections(&mut self, now: Instant) -> Vec<Connections> {
        let tallies = self.table.groups.keys().zip(&self.view.tallies);
        let mut rows: Vec<_> = tallies
            .filter(|(_, tally)| tally.established > 0)
            .map(|(key, tally)| Connections {
                direction: key.direction,
                port: key.port,
                ip: key.ip,
                group: match key.label {
                    Label::None => None,
                    Label::Subnet(address, bits) => Some(subnet(address, key.ip, bits)),
                    Label::Cgroup(id) => Some(self.cgroups.name(id, now)),
                    Label::Other => Some("_other".into()),
                },
                established: tally.established,
                long_term: tally.long_term,
                ages: tally.ages,
                age_sum: tally.age_sum,
                oldest: tally.oldest,
            })
            .collect();
        rows.sort_by(|a, b| {
            let key = |row: &Connections| (row.direction, row.port.is_none(), row.port, row.ip);
            (key(a), &a.group).cmp(&(key(b), &b.group))
        });
        rows
    }
}

impl View {
    fn begin(&mut self) {
        self.listened.0.fill(0);
        self.states = Default::default();
        self.queues.clear();
    }

    fn row(&mut self, table: &mut LongTerm, socket: &Socket, now: Duration) {
        let (local, peer) = socket.key.ports();
        let ip = if socket.key.is_ipv4() {
            IpVersion::V4
        } else {
            IpVersion::V6
        };
        if socket.state == LISTEN {
            // Also for directions, so whatever is looked at.
            self.listened.set(local);
        }
        let wanted = self.wanted.has(local)
            // A server on `[::]` has IPv4 clients too.
            && (self.ipv6 || ip == IpVersion::V4 || socket.state == LISTEN)
            && !self.is_other_end_of_ours(socket, peer);
        if !wanted || usize::from(socket.state) >= STATES {
            return;
        }
        self.states[ip as usize][usize::from(socket.state)] += 1;
        match socket.state {
            LISTEN => self.listens(local, socket),
            ESTABLISHED => {
                let inbound = self.listened.has(local)
                    || self.listened_before.has(local)
                    || self.servers.has(local);
                let knew_too_little = |key: &GroupKey| {
                    let was_outbound = inbound && key.direction == Direction::Outbound;
                    was_outbound || (key.label == Label::Cgroup(0) && socket.cgroup != 0)
                };
                table.see(socket, now, knew_too_little, |groups| {
                    groups.of(self.key(socket, ip, inbound))
                });
            }
            _ => {}
        }
    }

    fn key(&self, socket: &Socket, ip: IpVersion, inbound: bool) -> GroupKey {
        let (local, peer) = socket.key.ports();
        let key = GroupKey {
            direction: if inbound {
                Direction::Inbound
            } else {
                Direction::Outbound
            },
            ip,
            port: Some(if inbound { local } else { peer }),
            label: label(self.group_by, socket, ip),
        };
        // A client of a server whose listener was gone before we came, as a rule: its port is the
        // kernel's choice, and so is the next one's.
        if !inbound && self.clients.contains(&peer) && !self.clients.contains(&local) {
            return key.without_port();
        }
        key
    }

    /// The scan is over, and was whole or not.
    fn ends(&mut self, whole: bool) {
        if whole {
            std::mem::swap(&mut self.listened_before, &mut self.listened);
        } else {
            self.listened_before.add(&self.listened);
        }
    }

    /// Who scrapes us from this host has the other end of our connection.
    fn is_other_end_of_ours(&self, socket: &Socket, peer: u16) -> bool {
        self.own_port == Some(peer) && socket.key.is_to_itself()
    }

    fn listens(&mut self, port: u16, socket: &Socket) {
        let queue = self.queues.entry(port).or_insert(Listening {
            port: Some(port),
            length: 0,
            limit: None,
        });
        queue.length += u64::from(socket.received);
        if socket.to_send > 0 {
            *queue.limit.get_or_insert(0) += u64::from(socket.to_send);
        }
    }

    fn sum(&mut self, table: &mut LongTerm, whole: bool, now: Duration, duration: Duration) {
        self.tallies.clear();
        self.tallies
            .resize(table.groups.numbers(), Tally::default());
        let tallies = &mut self.tallies;
        table.finish(whole, now, |socket| {
            let tally = &mut tallies[socket.group.index()];
            tally.established += 1;
            tally.long_term += u64::from(socket.age >= duration);
            let seconds = |bound: &u64| Duration::from_secs(*bound);
            let bucket = Connections::AGES
                .iter()
                .position(|bound| socket.age <= seconds(bound));
            tally.ages[bucket.unwrap_or(Connections::AGES.len())] += 1;
            tally.age_sum += socket.age;
            tally.oldest = tally.oldest.max(socket.age);
        });
    }

    fn listening(&self) -> Vec<Listening> {
        let mut rows: Vec<_> = self.queues.values().take(LISTENING).copied().collect();
        let rest = self.queues.values().skip(LISTENING).copied();
        rows.extend(
            rest.reduce(|sum, row| Listening {
                port: None,
                length: sum.length + row.length,
                limit: sum.limit.zip(row.limit).map(|(a, b)| a + b),
            })
            .map(|rest| Listening { port: None, ..rest }),
        );
        rows
    }

    fn states(&self) -> Vec<(TcpState, IpVersion, u64)> {
        let mut rows = Vec::new();
        for ip in [IpVersion::V4, IpVersion::V6] {
            for (number, count) in (0..).zip(self.states[ip as usize]) {
                if count > 0
                    && let Some(state) = TcpState::from_kernel(number)
                {
                    rows.push((state, ip, count));
                }
            }
        }
        rows
    }
}

/// The ports that the kernel gives to clients (ip(7)).
fn client_ports() -> RangeInclusive<u16> {
    let read = || {
        let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
        let mut words = text.split_ascii_whitespace().map(str::parse);
        Some(words.next()?.ok()?..=words.next()?.ok()?)
    };
    read().unwrap_or(32_768..=60_999)
}

fn label(group_by: GroupBy, socket: &Socket, ip: IpVersion) -> Label {
    match group_by {
        GroupBy::Nothing => Label::None,
        GroupBy::Cgroup => Label::Cgroup(socket.cgroup),
        GroupBy::Subnet { v4, v6 } => {
            let (bits, whole) = match ip {
                // The last four bytes of a mapped address.
                IpVersion::V4 => (v4, 96 + u32::from(v4)),
                IpVersion::V6 => (v6, u32::from(v6)),
            };
            let address = u128::from_be_bytes(*socket.key.peer());
            let kept = address & u128::MAX.checked_shl(128 - whole).unwrap_or(0);
            Label::Subnet(kept.to_be_bytes(), bits)
        }
    }
}

fn subnet(address: [u8; 16], ip: IpVersion, bits: u8) -> Arc<str> {
    let [.., a, b, c, d] = address;
    match ip {
        IpVersion::V4 => format!("{}/{bits}", Ipv4Addr::new(a, b, c, d)).into(),
        IpVersion::V6 => format!("{}/{bits}", Ipv6Addr::from(address)).into(),
    }
}

impl fmt::Debug for Scanner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scanner")
            .field("settings", &self.settings)
            .field("tracked", &self.table.len())
            .finish_non_exhaustive()
    }
}

impl Monitor {
    /// Settings, to end with [`start`](MonitorBuilder::start).
    pub fn builder() -> MonitorBuilder {
        MonitorBuilder::default()
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
