//! Connections: many, one, and those that have ended.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::event::{ConnectionState, Direction, Endpoint, TcpInfo, TlsFacts};
use crate::inspect::query::Filter;
use crate::inspect::table::Table;
use crate::inspect::view::{Link, TraceView, unix};
use crate::record::stats::ConnectionSnapshot;
use crate::record::timeline::Moment;
use crate::record::{Connection, Recorder};

#[derive(Serialize)]
pub(in crate::inspect) struct Connections {
    #[serde(skip)]
    pub(in crate::inspect) filter: Filter,
    pub(in crate::inspect) query: String,
    /// Open or being set up.
    pub(in crate::inspect) total: usize,
    pub(in crate::inspect) matching: usize,
    pub(in crate::inspect) page: usize,
    pub(in crate::inspect) pages: usize,
    /// How old the look is by which they were found; the rows themselves are of now.
    pub(in crate::inspect) found: f64,
    pub(in crate::inspect) connections: Vec<Row>,
}

#[derive(Serialize)]
pub(in crate::inspect) struct Row {
    pub(in crate::inspect) id: String,
    pub(in crate::inspect) direction: Direction,
    pub(in crate::inspect) name: Arc<str>,
    /// What was asked for; of an accepted connection, the peer's address.
    pub(in crate::inspect) host: Option<String>,
    pub(in crate::inspect) local: Option<Endpoint>,
    pub(in crate::inspect) peer: Option<Endpoint>,
    pub(in crate::inspect) protocol: Option<&'static str>,
    pub(in crate::inspect) tls: Option<TlsFacts>,
    pub(in crate::inspect) state: ConnectionState,
    pub(in crate::inspect) age: f64,
    pub(in crate::inspect) idle: Option<f64>,
    pub(in crate::inspect) active: Option<f64>,
    pub(in crate::inspect) requests: u64,
    pub(in crate::inspect) in_flight: u32,
    pub(in crate::inspect) bytes_read: u64,
    pub(in crate::inspect) bytes_written: u64,
    pub(in crate::inspect) rtt: Option<f64>,
    pub(in crate::inspect) retransmits: Option<u32>,
}

impl Connections {
    pub(in crate::inspect) fn take(table: &Table, filter: Filter) -> Self {
        let found = table.find(&filter);
        let rows = found.connections.iter().filter_map(|connection| {
            let snapshot = connection.snapshot();
            // It changed since it was found.
            let matches = snapshot.is_there()
                && filter.state.is_none_or(|state| state == snapshot.state)
                && (filter.idle_longer_than.is_none() || snapshot.idle_for.is_some());
            matches.then(|| {
                Row::new(
                    &snapshot,
                    connection.tcp_info(),
                    connection.started.elapsed(),
                )
            })
        });
        Self {
            connections: rows.collect(),
            query: filter.query(),
            total: found.total,
            matching: found.matching,
            page: found.page,
            pages: found.pages,
            found: table.taken.elapsed().as_secs_f64(),
            filter: Filter {
                page: found.page,
                ..filter
            },
        }
    }
}

impl Row {
    /// An attempt under way is as old as `since_start`; one that failed lasted as long as its set-up.
    fn new(snapshot: &ConnectionSnapshot, tcp: Option<TcpInfo>, since_start: Duration) -> Self {
        let lasted = snapshot.failed.and(snapshot.setup).unwrap_or(since_start);
        let host = match (&snapshot.target, &snapshot.peer) {
            (Some(target), _) => Some(target.to_string()),
            (None, Some(Endpoint::Ip(peer))) => Some(peer.ip().to_string()),
            (None, peer) => peer.as_ref().map(ToString::to_string),
        };
        let tcp = tcp.or(snapshot.last_tcp);
        Self {
            id: snapshot.id.to_string(),
            direction: snapshot.direction,
            name: snapshot.name.clone(),
            host,
            local: snapshot.local.clone(),
            peer: snapshot.peer.clone(),
            protocol: snapshot.protocol.map(|protocol| protocol.as_str()),
            tls: snapshot.tls.clone(),
            state: snapshot.state,
            age: snapshot.age.unwrap_or(lasted).as_secs_f64(),
            idle: snapshot.idle_for.map(|idle| idle.as_secs_f64()),
            active: snapshot.active_for.map(|active| active.as_secs_f64()),
            requests: snapshot.requests,
            in_flight: snapshot.in_flight,
            bytes_read: snapshot.bytes_read,
            bytes_written: snapshot.bytes_written,
            rtt: tcp.map(|tcp| tcp.rtt.as_secs_f64()),
            retransmits: tcp.map(|tcp| tcp.retransmits),
        }
    }
}

// === one connection ===

#[derive(Serialize)]
pub(in crate::inspect) struct One {
    #[serde(flatten)]
    pub(in crate::inspect) row: Row,
    /// The attempt's start, or the accept.
    pub(in crate::inspect) started: f64,
    pub(in crate::inspect) setup: Option<f64>,
    pub(in crate::inspect) close_reason: Option<&'static str>,
    pub(in crate::inspect) closed_by: Option<&'static str>,
    pub(in crate::inspect) failure: Option<&'static str>,
    /// Its set-up span's.
    pub(in crate::inspect) trace: Option<TraceView>,
    /// Requests that run on it, the earliest first: of an accepted connection those with a trace, of a
    /// transport's all. `in_flight` says how many there are.
    pub(in crate::inspect) serving: Vec<Serving>,
    pub(in crate::inspect) tcp: Option<Tcp>,
    pub(in crate::inspect) timeline: Vec<TimelineRow>,
    pub(in crate::inspect) timeline_dropped: u64,
}

#[derive(Serialize)]
pub(in crate::inspect) struct Serving {
    /// Its number in its pool.
    pub(in crate::inspect) request: Option<u64>,
    pub(in crate::inspect) since: Option<f64>,
    pub(in crate::inspect) trace: Option<TraceView>,
}

#[derive(Serialize)]
pub(in crate::inspect) struct TimelineRow {
    /// Since the start.
    pub(in crate::inspect) at: f64,
    pub(in crate::inspect) event: &'static str,
    pub(in crate::inspect) detail: Option<String>,
}

/// The kernel's `TCP_INFO`.
#[derive(Serialize)]
pub(in crate::inspect) struct Tcp {
    pub(in crate::inspect) state: &'static str,
    pub(in crate::inspect) rtt: f64,
    pub(in crate::inspect) rtt_variance: f64,
    pub(in crate::inspect) retransmits: u32,
    pub(in crate::inspect) lost: u32,
    pub(in crate::inspect) unacked: u32,
    pub(in crate::inspect) congestion_window: u32,
    pub(in crate::inspect) delivery_rate: Option<u64>,
    /// The rate says how much was asked of the way, which may be faster.
    pub(in crate::inspect) app_limited: bool,
    pub(in crate::inspect) bytes_acked: Option<u64>,
    pub(in crate::inspect) bytes_received: Option<u64>,
    pub(in crate::inspect) not_sent: Option<u32>,
}

impl From<TcpInfo> for Tcp {
    fn from(tcp: TcpInfo) -> Self {
        Self {
            state: tcp.state.as_str(),
            rtt: tcp.rtt.as_secs_f64(),
            rtt_variance: tcp.rtt_variance.as_secs_f64(),
            retransmits: tcp.retransmits,
            lost: tcp.lost,
            unacked: tcp.unacked,
            congestion_window: tcp.congestion_window,
            delivery_rate: tcp.delivery_rate,
            app_limited: tcp.app_limited,
            bytes_acked: tcp.bytes_acked,
            bytes_received: tcp.bytes_received,
            not_sent: tcp.not_sent,
        }
    }
}

impl One {
    pub(in crate::inspect) fn new(
        recorder: &Recorder,
        connection: &Connection,
        link: &Link<'_>,
    ) -> Self {
        let snapshot = connection.snapshot();
        let now = connection.started.elapsed();
        let tcp = connection.tcp_info().or(snapshot.last_tcp);
        // Of an outbound connection its pool knows.
        let pools = recorder.live_pools().into_iter();
        let pools = pools.filter(|_| snapshot.direction == Direction::Outbound);
        let held = pools.flat_map(|pool| pool.holders_of(connection.id));
        let held = held.map(|holder| Serving {
            request: Some(holder.request.0),
            since: holder.held_for.map(|held| held.as_secs_f64()),
            trace: holder.trace.map(|trace| TraceView::new(trace, link)),
        });
        let serving = connection.all_serving().into_iter().map(|serving| Serving {
            request: None,
            since: serving
                .since
                .map(|since| now.saturating_sub(since).as_secs_f64()),
            trace: Some(TraceView::new(serving.trace, link)),
        });
        Self {
            started: unix(snapshot.started),
            setup: snapshot.setup.map(|setup| setup.as_secs_f64()),
            close_reason: snapshot.closed.map(|(reason, _)| reason.as_str()),
            closed_by: snapshot.closed.map(|(_, initiator)| initiator.as_str()),
            failure: snapshot.failed.map(|reason| reason.as_str()),
            trace: snapshot.trace.map(|trace| TraceView::new(trace, link)),
            serving: serving.chain(held).take(64).collect(),
            tcp: tcp.map(Tcp::from),
            timeline: snapshot
                .timeline
                .iter()
                .map(|entry| TimelineRow {
                    at: entry.at.as_secs_f64(),
                    event: entry.moment.as_str(),
                    detail: match entry.moment {
                        Moment::LimitHit { max, idle, .. } => {
                            Some(format!("limit {max}, {idle} idle"))
                        }
                        _ => None,
                    },
                })
                .collect(),
            timeline_dropped: snapshot.timeline_dropped,
            row: Row::new(&snapshot, tcp, now),
        }
    }
}

// === closed ===

#[derive(Serialize)]
pub(in crate::inspect) struct Closed {
    #[serde(skip)]
    pub(in crate::inspect) filter: Filter,
    pub(in crate::inspect) page: usize,
    /// There are older ones.
    pub(in crate::inspect) more: bool,
    /// Newest first; how many are remembered is the builder's `history`, and the page looks at the last
    /// 10 000 of them.
    pub(in crate::inspect) connections: Vec<ClosedRow>,
}

#[derive(Serialize)]
pub(in crate::inspect) struct ClosedRow {
    #[serde(flatten)]
    pub(in crate::inspect) row: Row,
    /// When it ended.
    pub(in crate::inspect) ended: f64,
    pub(in crate::inspect) reason: &'static str,
    /// Who ended it; none of an attempt that failed.
    pub(in crate::inspect) by: Option<&'static str>,
    pub(in crate::inspect) failed: bool,
}

impl Closed {
    pub(in crate::inspect) fn take(recorder: &Recorder, filter: Filter) -> Self {
        let with = |connection: &Connection, part: &str| match (
            &connection.target,
            connection.accepted_from(),
        ) {
            (Some(target), _) => target.host.to_lowercase().contains(part),
            (None, Some(Endpoint::Ip(peer))) => peer.ip().to_string().contains(part),
            (None, _) => false,
        };
        let all = recorder.newest_history();
        let mut matching = all.iter().filter(|connection| {
            let scope = &connection.scope;
            filter.name.as_ref().is_none_or(|name| name.is(&scope.name))
                && filter
                    .direction
                    .is_none_or(|direction| direction == scope.direction)
                && filter
                    .host
                    .as_ref()
                    .is_none_or(|part| with(connection, part))
        });
        let start = (filter.page - 1).saturating_mul(filter.rows);
        if start > 0 {
            matching.nth(start - 1);
        }
        let connections = matching.by_ref().take(filter.rows);
        let connections =
            connections.filter_map(|connection| ClosedRow::new(&connection.snapshot()));
        Self {
            connections: connections.collect(),
            more: matching.next().is_some(),
            page: filter.page,
            filter,
        }
    }
}

impl ClosedRow {
    fn new(snapshot: &ConnectionSnapshot) -> Option<Self> {
        let lasted = snapshot.setup.unwrap_or_default() + snapshot.age.unwrap_or_default();
        let (reason, by) = match (snapshot.closed, snapshot.failed) {
            (Some((reason, by)), _) => (reason.as_str(), Some(by.as_str())),
            (None, Some(failed)) => (failed.as_str(), None),
            (None, None) => return None,
        };
        Some(Self {
            ended: unix(snapshot.started + lasted),
            reason,
            by,
            failed: snapshot.closed.is_none(),
            row: Row::new(snapshot, None, Duration::ZERO),
        })
    }
}
