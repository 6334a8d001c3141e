//! Counting and telling, in one step; snapshots; when to be woken.

use super::*;

impl Pool {
    pub(super) fn arm(&mut self, at: Duration) {
        if self.armed.is_none_or(|armed| at < armed) {
            self.armed = Some(at);
            self.outputs.push(Output::Arm(at));
        }
    }

    /// Counts what happened, takes its sequence number, and keeps its event if anybody listens.
    pub(super) fn emit(
        &mut self,
        key: u32,
        connection: Option<ConnectionId>,
        who: Who,
        now: Now,
        row: Row,
        kind: impl FnOnce() -> PoolEventKind,
    ) {
        let k = &self.keys[key as usize];
        self.sequence += 1;
        self.hosts[k.host as usize].rows[row.index()] += 1;
        if self.observed || who.told {
            self.events.push(PoolEvent {
                time: now.wall,
                sequence: self.sequence,
                inferred: false,
                pool: self.name.clone(),
                key: k.key.clone(),
                connection,
                request: who.request,
                trace: who.trace,
                kind: kind(),
            });
        }
    }

    /// Tells of something that only hooks want to know, if the request's connection is still its.
    pub(crate) fn tell(&mut self, conn: ConnIx, request: RequestId, now: Now, kind: PoolEventKind) {
        let Some(c) = self.conn(conn) else { return };
        let Some(holder) = c.holders.iter().find(|h| h.request == request) else {
            return;
        };
        let who = Who::holding(holder);
        let (key, id) = (c.key, c.id);
        self.emit(key, Some(id), who, now, Row::HOOK, || kind);
    }

    pub(super) fn limit_hit(
        &mut self,
        key: u32,
        which: PoolLimit,
        limit: usize,
        who: Who,
        connection: Option<ConnectionId>,
        now: Now,
    ) {
        let snapshot = if self.observed || who.told {
            let due = self.snapshots[which.index()]
                .is_none_or(|last| now.mono.saturating_sub(last) >= self.limits.snapshot_interval);
            due.then(|| {
                self.snapshots[which.index()] = Some(now.mono);
                Arc::new(self.snapshot(key, now))
            })
        } else {
            None
        };
        self.emit(key, connection, who, now, Row::hit(which), || match which {
            PoolLimit::MaxConnsPerHost => PoolEventKind::MaxConnsPerHostHit { limit, snapshot },
            PoolLimit::MaxIdleConns => PoolEventKind::MaxIdleConnsHit { limit, snapshot },
            PoolLimit::MaxIdleConnsPerHost => {
                let limit = Some(limit);
                PoolEventKind::MaxIdleConnsPerHostHit { limit, snapshot }
            }
        });
    }

    /// The pool now, seen from one key. The kernel's part is the shell's.
    pub(super) fn snapshot(&mut self, key: u32, now: Now) -> PoolSnapshot {
        let others = self
            .keys
            .iter()
            .map(|(at, _)| at as u32)
            .filter(|at| *at != key);
        let keys: Vec<_> = std::iter::once(key)
            .chain(others)
            .take(SNAPSHOT_KEYS)
            .map(|at| {
                let k = &self.keys[at as usize];
                KeySnapshot {
                    key: k.key.clone(),
                    active: k.active.len(),
                    idle: k.idle.len(),
                    dialing: k.dialing,
                    idle_conn_wait: k.waiting.len(),
                    conns_per_host_wait: k.slots.len(),
                    in_flight: 0,
                }
            })
            .collect();
        let mut active = Vec::new();
        let mut next = self.keys[key as usize].active.front();
        while let Some(conn) = next.filter(|_| active.len() < SNAPSHOT_ACTIVE) {
            next = List::after(&mut self.conns, conn, |c| &mut c.of_key);
            let c = &self.conns[conn as usize];
            active.push(ActiveSnapshot {
                connection: c.id,
                age: now.mono.saturating_sub(c.since),
                requests: c.requests,
                held_by: c
                    .holders
                    .iter()
                    .filter_map(|h| h.trace)
                    .take(HOLDERS)
                    .collect(),
                tcp: None,
            });
        }
        PoolSnapshot {
            keys_omitted: self.keys.len() - keys.len(),
            keys,
            active_omitted: self.keys[key as usize].active.len() - active.len(),
            active,
            in_flight: Vec::new(),
            in_flight_omitted: 0,
        }
    }
}
