//! Connections: who gets one that is ready, and what becomes of one that a request is done with.

use super::*;

impl Pool {
    pub(super) fn conn(&mut self, conn: ConnIx) -> Option<&mut Conn> {
        self.conns
            .get_mut(conn.place())
            .filter(|c| c.serial == conn.serial)
    }

    /// A connection that can serve a request of this key at once, taken out of the idle list.
    pub(super) fn ready(&mut self, key: u32, now: Now) -> Option<u32> {
        loop {
            let k = &self.keys[key as usize];
            let conn = k.open.front().or_else(|| self.first_idle(key))?;
            let c = &self.conns[conn as usize];
            let reason = if c.expires.is_some_and(|at| at <= now.mono) {
                CloseReason::MaxLifetime
            } else if c.state == State::Idle
                && self
                    .limits
                    .idle_timeout
                    .is_some_and(|timeout| now.since(&c.idle_since) >= timeout)
            {
                CloseReason::IdleTimeout
            } else {
                return Some(conn);
            };
            let serial = c.serial;
            self.retire(ConnIx { at: conn, serial }, reason, now);
        }
    }

    /// The idle connection to use first.
    pub(super) fn first_idle(&self, key: u32) -> Option<u32> {
        let idle = &self.keys[key as usize].idle;
        let (mut next, step): (_, fn(&Link) -> Option<u32>) = if self.limits.fifo {
            (idle.front(), Link::next)
        } else {
            (idle.back(), Link::prev)
        };
        // One whose peer allows no stream at all is of no use now.
        while let Some(c) = next.map(|conn| &self.conns[conn as usize])
            && c.h2
            && c.max_streams == 0
        {
            next = step(&c.of_key);
        }
        next
    }

    /// A request has the connection from now on.
    pub(super) fn grant(
        &mut self,
        conn: u32,
        who: Who,
        waited: Option<Duration>,
        now: Now,
    ) -> Grant {
        let c = &self.conns[conn as usize];
        let was_idle = c.state == State::Idle;
        // A spare that was never used is no reuse.
        let idle_time = was_idle.then(|| now.mono.saturating_sub(c.idle_since.mono));
        if was_idle {
            self.leave_idle(conn, None, now);
            let c = &mut self.conns[conn as usize];
            c.state = State::Active;
            let k = &mut self.keys[c.key as usize];
            self.hosts[k.host as usize].active += 1;
            k.active.push_back(&mut self.conns, conn, |c| &mut c.of_key);
        }
        let c = &mut self.conns[conn as usize];
        c.streams += 1;
        c.requests += 1;
        let reused = c.requests > 1;
        let request = who.request.unwrap_or(RequestId(0));
        c.holders.push(Holder {
            request,
            trace: who.trace,
            told: who.told,
            since: now.mono,
        });
        let (key, id, serial) = (c.key, c.id, c.serial);
        let k = &mut self.keys[key as usize];
        if c.h2 && c.streams >= c.max_streams {
            k.open.remove(&mut self.conns, conn, |c| &mut c.of_open);
        }
        self.hosts[k.host as usize].in_use += 1;
        self.emit(key, Some(id), who, now, Row::got_conn(reused), || {
            PoolEventKind::GotConn {
                reused,
                was_idle,
                idle_time,
                waited,
            }
        });
        Grant {
            conn: ConnIx { at: conn, serial },
            request,
            reused,
            was_idle,
        }
    }

    /// An active connection lost a request: it serves the next, idles, or is closed.
    pub(super) fn settle(&mut self, conn: u32, now: Now) {
        let c = &self.conns[conn as usize];
        let (h2, unused, key) = (c.h2, c.streams == 0, c.key);
        if let Some(reason) = c.retired {
            let k = &mut self.keys[key as usize];
            k.open.remove(&mut self.conns, conn, |c| &mut c.of_open);
            self.unsettle(conn);
            if unused {
                self.close(conn, reason, None);
            }
            self.seek_all(key, now);
            return;
        }
        if h2 {
            if unused && c.max_streams > 0 && !self.keys[key as usize].waiting.is_empty() {
                self.reused(conn, now);
            }
            self.feed(conn, None, now);
        } else if let Some(waiter) = self.keys[key as usize].waiting.front() {
            self.reused(conn, now);
            self.deliver(waiter, conn, WaitOutcome::DeliveredIdle, now);
        }
        if self.conns[conn as usize].streams == 0 {
            self.free(conn, now);
        }
    }

    pub(super) fn reused(&mut self, conn: u32, now: Now) {
        let (key, id) = (self.conns[conn as usize].key, self.conns[conn as usize].id);
        self.emit(key, Some(id), Who::default(), now, Row::CONN_REUSED, || {
            PoolEventKind::ConnReused
        });
    }

    /// Gives the free streams of an HTTP/2 connection to those who wait; what is left is open to
    /// the next. `owner` is whose dial brought the connection.
    pub(super) fn feed(&mut self, conn: u32, owner: Option<u32>, now: Now) {
        let key = self.conns[conn as usize].key;
        loop {
            let c = &self.conns[conn as usize];
            if c.streams >= c.max_streams || c.retired.is_some() {
                let k = &mut self.keys[key as usize];
                k.open.remove(&mut self.conns, conn, |c| &mut c.of_open);
                return;
            }
            let Some(waiter) = self.keys[key as usize].waiting.front() else {
                break;
            };
            let outcome = if owner == Some(waiter) {
                WaitOutcome::DeliveredNew
            } else {
                WaitOutcome::SharedH2
            };
            self.deliver(waiter, conn, outcome, now);
        }
        if !self.conns[conn as usize].of_open.is_on() {
            let k = &mut self.keys[key as usize];
            k.open.push_back(&mut self.conns, conn, |c| &mut c.of_open);
        }
    }

    /// Nobody has the connection and nobody waits for it.
    pub(super) fn free(&mut self, conn: u32, now: Now) {
        let c = &self.conns[conn as usize];
        if c.state != State::Active {
            return;
        }
        let key = c.key;
        if let Some(waiter) = self.keys[key as usize].waiting.front()
            && !c.h2
        {
            self.deliver(waiter, conn, WaitOutcome::DeliveredNew, now);
            return;
        }
        let id = self.conns[conn as usize].id;
        let idle = self.keys[key as usize].idle.len();
        if let Some(reason) = self.unwanted(conn) {
            let limit = self.limits.max_idle_conns_per_host;
            let by = limit
                .filter(|_| reason == CloseReason::MaxIdleConnsPerHost)
                .map(|max| ClosedBy {
                    limit: PoolLimit::MaxIdleConnsPerHost,
                    max,
                    idle,
                });
            if let Some(by) = by {
                self.limit_hit(key, by.limit, by.max, Who::default(), Some(id), now);
            }
            self.close(conn, reason, by);
            return;
        }
        let k = &mut self.keys[key as usize];
        k.active.remove(&mut self.conns, conn, |c| &mut c.of_key);
        k.idle.push_back(&mut self.conns, conn, |c| &mut c.of_key);
        self.idle
            .push_back(&mut self.conns, conn, |c| &mut c.of_idle);
        let host = &mut self.hosts[k.host as usize];
        host.active -= 1;
        host.idle += 1;
        let c = &mut self.conns[conn as usize];
        c.state = State::Idle;
        c.idle_since = now;
        let idle = idle + 1;
        self.emit(key, Some(id), Who::default(), now, Row::IDLE_IN, || {
            PoolEventKind::IdleConnIn { idle }
        });
        if let Some(timeout) = self.limits.idle_timeout {
            self.arm(now.mono + timeout);
        }
        if let Some(limit) = self.limits.max_idle_conns
            && self.idle.len() > limit
            && let Some(oldest) = self.idle.front()
        {
            let (key, id) = (
                self.conns[oldest as usize].key,
                self.conns[oldest as usize].id,
            );
            let which = PoolLimit::MaxIdleConns;
            self.limit_hit(key, which, limit, Who::default(), Some(id), now);
            let by = ClosedBy {
                limit: which,
                max: limit,
                idle: limit,
            };
            self.evict(oldest, CloseReason::MaxIdleConns, Some(by), now);
        }
    }

    /// Why a connection that no request has would not be kept idle.
    pub(super) fn unwanted(&self, conn: u32) -> Option<CloseReason> {
        let c = &self.conns[conn as usize];
        let idle = self.keys[c.key as usize].idle.len();
        if self.closed || self.idle_closed {
            Some(CloseReason::Shutdown)
        } else if !self.limits.keep_alive && c.requests > 0 {
            // A spare that was never used may be tried even then: it was dialled for a request.
            Some(CloseReason::ConnectionClose)
        } else {
            let limit = self.limits.max_idle_conns_per_host;
            limit
                .is_some_and(|limit| idle >= limit)
                .then_some(CloseReason::MaxIdleConnsPerHost)
        }
    }

    /// Why an active connection that has just lost a request will be closed, though it could serve
    /// another.
    pub(super) fn useless(&self, conn: u32) -> Option<CloseReason> {
        let c = &self.conns[conn as usize];
        let served = c.max_streams > 0 && !self.keys[c.key as usize].waiting.is_empty();
        (c.state == State::Active && c.streams == 0 && !served)
            .then(|| self.unwanted(conn))
            .flatten()
    }

    pub(super) fn evict(&mut self, conn: u32, reason: CloseReason, by: Option<ClosedBy>, now: Now) {
        self.leave_idle(conn, Some(reason), now);
        self.close(conn, reason, by);
    }

    /// Takes a connection out of the idle lists.
    pub(super) fn leave_idle(&mut self, conn: u32, reason: Option<CloseReason>, now: Now) {
        let c = &mut self.conns[conn as usize];
        // Whoever called says what it is now.
        c.state = State::Closing;
        let (key, id) = (c.key, c.id);
        let k = &mut self.keys[key as usize];
        k.idle.remove(&mut self.conns, conn, |c| &mut c.of_key);
        self.idle.remove(&mut self.conns, conn, |c| &mut c.of_idle);
        let idle = k.idle.len();
        self.hosts[k.host as usize].idle -= 1;
        self.emit(
            key,
            Some(id),
            Who::default(),
            now,
            Row::idle_out(reason),
            || PoolEventKind::IdleConnOut { idle, reason },
        );
    }

    /// Has the shell close a connection.
    pub(super) fn close(&mut self, conn: u32, reason: CloseReason, by: Option<ClosedBy>) {
        self.withdraw(conn);
        let c = &mut self.conns[conn as usize];
        c.state = State::Closing;
        let serial = c.serial;
        self.outputs
            .push(Output::Close(ConnIx { at: conn, serial }, reason, by));
    }

    /// Takes a connection that is not idle out of every list.
    pub(super) fn withdraw(&mut self, conn: u32) {
        self.unsettle(conn);
        let c = &self.conns[conn as usize];
        if let Some(expires) = c.expires {
            self.lifetimes.remove(&(expires, conn));
        }
        let k = &mut self.keys[c.key as usize];
        k.open.remove(&mut self.conns, conn, |c| &mut c.of_open);
        if k.active.remove(&mut self.conns, conn, |c| &mut c.of_key) {
            self.hosts[k.host as usize].active -= 1;
        }
    }

    pub(super) fn unsettle(&mut self, conn: u32) {
        let c = &mut self.conns[conn as usize];
        if std::mem::take(&mut c.settling) {
            self.keys[c.key as usize].settling -= 1;
        }
    }

    /// Frees the place of a closed connection that no request has.
    pub(super) fn forget(&mut self, conn: u32) {
        let c = &self.conns[conn as usize];
        if c.state == State::Closed && c.streams == 0 {
            let key = self.conns.remove(conn as usize).key;
            self.keys[key as usize].conns -= 1;
            self.gone_if_unused(key);
        }
    }

    pub(super) fn gone_if_unused(&mut self, key: u32) {
        let Some(k) = self.keys.get(key as usize) else {
            return;
        };
        if k.conns == 0 && k.dialing == 0 && k.waiting.is_empty() {
            self.keys.remove(key as usize);
            self.outputs.push(Output::KeyGone(KeyIx(key)));
        }
    }
}
