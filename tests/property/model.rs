//! The naive model: one scope, as its events alone tell of it.

use std::collections::BTreeMap;
use std::time::SystemTime;

use otel_conntrack::{
    ConnectionEvent, ConnectionEventKind as Kind, ConnectionState, ScopeStats, Target,
};

/// Counts by what happened; a reason that never came is not in it.
type By = BTreeMap<&'static str, u64>;

#[derive(Debug, Default)]
pub(crate) struct Scope {
    pub(crate) sequence: u64,
    pub(crate) connections: BTreeMap<String, Connection>,
    attempts: u64,
    established: u64,
    accepted: u64,
    failed: By,
    closed: By,
    accept_errors: By,
    rejected: By,
    limit_hits: u64,
}

#[derive(Debug)]
pub(crate) struct Connection {
    /// It was established or accepted.
    pub(crate) lived: bool,
    /// The states it was in while it was open, as its timeline should tell them.
    pub(crate) states: Vec<&'static str>,
    target: Option<String>,
    state: ConnectionState,
    last: SystemTime,
    /// Begun and not ended: look-ups, connects, handshakes.
    steps: u64,
}

impl Scope {
    /// Takes the next event.
    pub(crate) fn apply(&mut self, event: &ConnectionEvent) {
        self.sequence += 1;
        assert_eq!(event.sequence, self.sequence);
        match &event.kind {
            Kind::AcceptError { reason } => {
                assert_eq!(event.connection, None);
                *self.accept_errors.entry(reason.as_str()).or_default() += 1;
            }
            Kind::MaxConnectionsHit { .. } => {
                assert_eq!(event.connection, None);
                self.limit_hits += 1;
            }
            Kind::Rejected { reason, .. } => {
                assert_eq!(event.connection, None);
                *self.rejected.entry(reason.as_str()).or_default() += 1;
            }
            _ => self.connection(event),
        }
    }

    fn connection(&mut self, event: &ConnectionEvent) {
        let id = event.connection.expect("it is of a connection").to_string();
        let first = match &event.kind {
            Kind::AttemptStarted { target } => Some(Some(target_text(target))),
            Kind::Accepted { .. } => Some(None),
            _ => None,
        };
        if let Some(target) = first {
            let connection = Connection {
                lived: false,
                states: Vec::new(),
                target,
                state: ConnectionState::Connecting,
                last: event.time,
                steps: 0,
            };
            let before = self.connections.insert(id.clone(), connection);
            assert!(before.is_none(), "{event:?} is a second beginning");
        }
        let connection = self.connections.get_mut(&id);
        let connection = connection.unwrap_or_else(|| panic!("{event:?} comes before the first"));
        assert!(event.time >= connection.last, "{event:?} goes back in time");
        connection.last = event.time;
        assert_ne!(connection.state, ConnectionState::Closed, "{event:?}");

        let connecting = connection.state == ConnectionState::Connecting;
        match &event.kind {
            Kind::AttemptStarted { .. } => self.attempts += 1,
            Kind::DnsStart { .. } | Kind::ConnectStart { .. } | Kind::TlsHandshakeStart { .. } => {
                assert!(connecting, "{event:?}");
                connection.steps += 1;
            }
            Kind::DnsDone { .. } | Kind::ConnectDone { .. } | Kind::TlsHandshakeDone { .. } => {
                assert!(connecting && connection.steps > 0, "{event:?}");
                connection.steps -= 1;
            }
            Kind::Established { .. } => {
                assert!(connecting && connection.target.is_some(), "{event:?}");
                self.established += 1;
                connection.open(event);
            }
            Kind::Accepted { .. } => {
                self.accepted += 1;
                connection.open(event);
            }
            Kind::SetupFailed { reason, .. } => {
                assert!(connecting && connection.steps == 0, "{event:?}");
                connection.state = ConnectionState::Closed;
                *self.failed.entry(reason.as_str()).or_default() += 1;
            }
            Kind::StateChanged { from, to } => {
                assert_eq!(connection.state, *from, "{event:?}");
                let either = matches!(to, ConnectionState::Active | ConnectionState::Idle);
                assert!(either && from != to, "{event:?}");
                connection.state = *to;
                connection.states.push(to.as_str());
            }
            Kind::Closed {
                reason,
                from,
                with_active_requests,
                ..
            } => {
                assert_eq!(connection.state, *from, "{event:?}");
                let active = *from == ConnectionState::Active;
                assert_eq!(*with_active_requests, active, "{event:?}");
                connection.state = ConnectionState::Closed;
                *self.closed.entry(reason.as_str()).or_default() += 1;
            }
            other => panic!("{other:?} is new to this model"),
        }
    }

    fn in_state(&self, state: ConnectionState) -> u64 {
        let all = self.connections.values();
        all.filter(|connection| connection.state == state).count() as u64
    }

    /// Asserts that the counts are the sums of the events up to their sequence number.
    pub(crate) fn agrees_with(&self, stats: &ScopeStats) {
        assert_eq!(stats.sequence, self.sequence);
        let counted = |by: Vec<(&'static str, u64)>| -> By {
            by.into_iter().filter(|(_, n)| *n > 0).collect()
        };
        macro_rules! by {
            ($all:expr) => {
                counted(
                    $all.iter()
                        .map(|(reason, n)| (reason.as_str(), *n))
                        .collect(),
                )
            };
        }
        assert_eq!(stats.attempts, self.attempts, "{stats:#?}");
        assert_eq!(stats.established, self.established, "{stats:#?}");
        assert_eq!(stats.accepted, self.accepted, "{stats:#?}");
        assert_eq!(by!(stats.failed), self.failed, "{stats:#?}");
        assert_eq!(by!(stats.closed), self.closed, "{stats:#?}");
        assert_eq!(by!(stats.accept_errors), self.accept_errors, "{stats:#?}");
        assert_eq!(by!(stats.rejected), self.rejected, "{stats:#?}");
        assert_eq!(stats.limit_hits, self.limit_hits, "{stats:#?}");

        let (active, idle) = (ConnectionState::Active, ConnectionState::Idle);
        let (active, idle) = (self.in_state(active), self.in_state(idle));
        let open = self.in_state(ConnectionState::Open) + active + idle;
        let connecting = self.in_state(ConnectionState::Connecting);
        assert_eq!(stats.connecting, connecting, "{stats:#?}");
        assert_eq!(stats.open, open, "{stats:#?}");
        assert_eq!((stats.active, stats.idle), (active, idle), "{stats:#?}");

        // And what `ScopeStats` promises to be always true.
        let ended = stats.established + stats.failed_total() + stats.connecting;
        assert_eq!(stats.attempts, ended, "{stats:#?}");
        let opened = stats.established + stats.accepted;
        assert_eq!(stats.open, opened - stats.closed_total(), "{stats:#?}");
        self.hosts_agree(stats);
    }

    /// By host: open, active, idle.
    fn hosts_agree(&self, stats: &ScopeStats) {
        let mut hosts: BTreeMap<Option<String>, [u64; 3]> = BTreeMap::new();
        for host in &stats.hosts {
            let target = host.target.as_ref().map(target_text);
            let sums = hosts.entry(target).or_default();
            sums[0] += host.open;
            for (_, active, idle) in &host.by_version {
                sums[1] += active;
                sums[2] += idle;
            }
        }
        hosts.retain(|_, sums| *sums != [0; 3]);
        let mut expected: BTreeMap<Option<String>, [u64; 3]> = BTreeMap::new();
        for connection in self.connections.values() {
            let step = match connection.state {
                ConnectionState::Open => [1, 0, 0],
                ConnectionState::Active => [1, 1, 0],
                ConnectionState::Idle => [1, 0, 1],
                _ => continue,
            };
            let sums = expected.entry(connection.target.clone()).or_default();
            sums.iter_mut().zip(step).for_each(|(sum, n)| *sum += n);
        }
        assert_eq!(hosts, expected, "{stats:#?}");
    }
}

impl Connection {
    fn open(&mut self, event: &ConnectionEvent) {
        assert!(!self.lived && self.steps == 0, "{event:?}");
        self.lived = true;
        self.state = ConnectionState::Open;
        self.states.push("open");
    }
}

fn target_text(target: &Target) -> String {
    match &target.scheme {
        Some(scheme) => format!("{scheme}://{target}"),
        None => target.to_string(),
    }
}
