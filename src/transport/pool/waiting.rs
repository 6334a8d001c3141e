//! Requests that wait: who dials, who shares a dial, who queues for a slot, and what becomes of a
//! dial that lost its request.

use super::*;

impl Pool {
    /// Whether a dial may be started for a request of this key now, and would not be shared.
    pub(super) fn may_dial(&self, key: u32) -> bool {
        let k = &self.keys[key as usize];
        !Self::shares(k)
            && self
                .limits
                .max_conns_per_host
                .is_none_or(|most| k.permits < most)
    }

    /// Whether a request that needs a connection waits for what is coming instead of dialling.
    pub(super) const fn shares(k: &Key) -> bool {
        match k.speaks {
            Speaks::H1 => false,
            Speaks::H2 | Speaks::Unknown => k.dialing > 0 || k.settling > 0,
        }
    }

    /// Finds a dial for a waiter that has none.
    pub(super) fn seek(&mut self, waiter: u32, now: Now) {
        let key = self.waiters[waiter as usize].key;
        let k = &mut self.keys[key as usize];
        if let Some(dial) = k.orphans.front() {
            k.orphans
                .remove(&mut self.dials, dial, |d| &mut d.of_orphans);
            self.background -= 1;
            self.owns(waiter, dial);
            return;
        }
        if Self::shares(k) {
            let w = &mut self.waiters[waiter as usize];
            // The limit, if it was hit, tells more.
            if w.reason == WaitReason::NoIdleConnection {
                w.reason = WaitReason::SharedDial;
            }
            return;
        }
        match self.limits.max_conns_per_host {
            Some(limit) if k.permits >= limit => self.queue_for_slot(waiter, limit, now),
            _ => {
                k.permits += 1;
                k.dialing += 1;
                self.permits += 1;
                let serial = self.next_serial();
                let at = self.dials.insert(Dial {
                    serial,
                    key,
                    owner: None,
                    cancelled: false,
                    of_orphans: Link::default(),
                }) as u32;
                self.outputs
                    .push(Output::Dial(DialIx { at, serial }, KeyIx(key)));
                self.owns(waiter, at);
            }
        }
    }

    /// Finds dials for all waiters of a key that have none.
    pub(super) fn seek_all(&mut self, key: u32, now: Now) {
        // A slot may be free for long, but what was under way would have served many.
        self.serve_slots(key, now);
        let k = &self.keys[key as usize];
        let settled = k.waiting.len() == k.dialers + k.slots.len();
        if settled || Self::shares(k) && k.orphans.is_empty() {
            return;
        }
        let mut next = k.waiting.front();
        while let Some(waiter) = next {
            next = List::after(&mut self.waiters, waiter, |w| &mut w.of_key);
            let w = &self.waiters[waiter as usize];
            if w.dial.is_none() && !w.of_slots.is_on() {
                self.seek(waiter, now);
            }
        }
    }

    pub(super) fn owns(&mut self, waiter: u32, dial: u32) {
        self.dials[dial as usize].owner = Some(waiter);
        let w = &mut self.waiters[waiter as usize];
        w.dial = Some(dial);
        self.keys[w.key as usize].dialers += 1;
    }

    pub(super) fn queue_for_slot(&mut self, waiter: u32, limit: usize, now: Now) {
        let w = &self.waiters[waiter as usize];
        let (key, who) = (w.key, Who::of(w.request, &w.asker));
        let recording = w.asker.recording;
        let k = &mut self.keys[key as usize];
        k.slots
            .push_back(&mut self.waiters, waiter, |w| &mut w.of_slots);
        let waiting = k.slots.len();
        let mut hit = LimitHit {
            at: now,
            limit,
            in_flight: None,
            active: k.active.len(),
            idle: k.idle.len(),
            dialing: k.dialing,
            waiting: k.waiting.len(),
            held_by: Vec::new(),
        };
        let hit = recording.then(|| {
            hit.held_by = self.holders(key);
            Box::new(hit)
        });
        let w = &mut self.waiters[waiter as usize];
        w.reason = WaitReason::MaxConnsPerHost;
        // The first hit tells why the wait began.
        w.hit = w.hit.take().or(hit);
        self.emit(key, None, who, now, Row::SLOT_WAIT_IN, || {
            PoolEventKind::ConnsPerHostWaitIn { waiting }
        });
        self.limit_hit(key, PoolLimit::MaxConnsPerHost, limit, who, None, now);
    }

    /// Requests that hold a key's slots, by a connection or by a dial; sampled ones first.
    pub(super) fn holders(&mut self, key: u32) -> Vec<TraceRef> {
        let mut found = Vec::new();
        let mut next = self.keys[key as usize].active.front();
        for _ in 0..HOLDER_SCAN {
            let Some(conn) = next else { break };
            next = List::after(&mut self.conns, conn, |c| &mut c.of_key);
            let room = HOLDER_SCAN.saturating_sub(found.len());
            let holders = self.conns[conn as usize].holders.iter();
            found.extend(holders.filter_map(|h| h.trace).take(room));
        }
        let mut next = self.keys[key as usize].waiting.front();
        for _ in 0..HOLDER_SCAN {
            let Some(waiter) = next else { break };
            next = List::after(&mut self.waiters, waiter, |w| &mut w.of_key);
            let w = &self.waiters[waiter as usize];
            found.extend(w.asker.trace.filter(|_| w.dial.is_some()));
        }
        found.sort_by_key(|trace| !trace.sampled);
        found.truncate(HOLDERS);
        found
    }

    /// Gives the slots that are free to those who wait for one.
    pub(super) fn serve_slots(&mut self, key: u32, now: Now) {
        while let Some(waiter) = self.keys[key as usize].slots.front() {
            let k = &self.keys[key as usize];
            if self
                .limits
                .max_conns_per_host
                .is_some_and(|most| k.permits >= most)
                || Self::shares(k)
            {
                break;
            }
            self.leave_slots(waiter, WaitOutcome::SlotFreed, now);
            self.seek(waiter, now);
        }
    }

    pub(super) fn leave_slots(&mut self, waiter: u32, outcome: WaitOutcome, now: Now) {
        let w = &self.waiters[waiter as usize];
        let (key, who) = (w.key, Who::of(w.request, &w.asker));
        let k = &mut self.keys[key as usize];
        if k.slots
            .remove(&mut self.waiters, waiter, |w| &mut w.of_slots)
        {
            let waiting = k.slots.len();
            self.emit(key, None, who, now, Row::slot_wait_out(outcome), || {
                PoolEventKind::ConnsPerHostWaitOut { waiting, outcome }
            });
        }
    }

    /// A waiter leaves its queues; without a connection it is told why.
    pub(super) fn leave(
        &mut self,
        waiter: u32,
        outcome: WaitOutcome,
        conn: Option<u32>,
        now: Now,
    ) -> Option<Wait> {
        self.leave_slots(waiter, outcome, now);
        let w = &self.waiters[waiter as usize];
        let key = w.key;
        let k = &mut self.keys[key as usize];
        k.waiting
            .remove(&mut self.waiters, waiter, |w| &mut w.of_key);
        let waiting = k.waiting.len();
        self.hosts[k.host as usize].waits(-1, now.mono);
        self.waiting
            .remove(&mut self.waiters, waiter, |w| &mut w.of_all);
        let w = self.waiters.remove(waiter as usize);
        let who = Who::of(w.request, &w.asker);
        self.emit(key, None, who, now, Row::idle_wait_out(outcome), || {
            PoolEventKind::IdleConnWaitOut { waiting, outcome }
        });
        let k = &self.keys[key as usize];
        let wait = Wait {
            key: k.key.clone(),
            host: k.host,
            outcome,
            since: w.since,
            depth: w.depth,
            reason: w.reason,
            hit: w.hit,
        };
        let token = w.asker.token;
        let mut cancelled = None;
        match conn {
            Some(conn) => {
                let waited = now.mono.saturating_sub(w.since.mono);
                let grant = self.grant(conn, who, Some(waited), now);
                self.outputs.push(Output::Deliver(token, grant, wait));
            }
            // Who cancels is there to be told.
            None if outcome == WaitOutcome::Cancelled => cancelled = Some(wait),
            None => self.outputs.push(Output::Fail(token, wait)),
        }
        if let Some(dial) = w.dial {
            self.keys[key as usize].dialers -= 1;
            self.orphaned(dial, now);
        }
        cancelled
    }

    pub(super) fn deliver(&mut self, waiter: u32, conn: u32, outcome: WaitOutcome, now: Now) {
        self.leave(waiter, outcome, Some(conn), now);
    }

    /// A dial has lost its request: another one takes it over, or it goes on in the background.
    pub(super) fn orphaned(&mut self, dial: u32, now: Now) {
        let d = &mut self.dials[dial as usize];
        d.owner = None;
        if d.cancelled {
            return;
        }
        let key = d.key;
        let k = &self.keys[key as usize];
        if let Some(waiter) = k.slots.front() {
            self.leave_slots(waiter, WaitOutcome::SlotFreed, now);
            self.owns(waiter, dial);
            return;
        }
        if k.waiting.len() > k.dialers {
            // One that shares it becomes its owner.
            let mut next = k.waiting.front();
            while let Some(waiter) = next {
                if self.waiters[waiter as usize].dial.is_none() {
                    self.owns(waiter, dial);
                    return;
                }
                next = List::after(&mut self.waiters, waiter, |w| &mut w.of_key);
            }
        }
        let k = &mut self.keys[key as usize];
        k.orphans
            .push_back(&mut self.dials, dial, |d| &mut d.of_orphans);
        self.background += 1;
        if self.background > self.limits.max_background_dials {
            self.cancel_dial(dial);
        }
    }

    pub(super) fn cancel_dial(&mut self, dial: u32) {
        let d = &mut self.dials[dial as usize];
        if std::mem::replace(&mut d.cancelled, true) {
            return;
        }
        let (key, serial) = (d.key, d.serial);
        let orphans = &mut self.keys[key as usize].orphans;
        if orphans.remove(&mut self.dials, dial, |d| &mut d.of_orphans) {
            self.background -= 1;
        }
        self.outputs
            .push(Output::CancelDial(DialIx { at: dial, serial }));
    }

    pub(super) fn take_dial(&mut self, dial: DialIx) -> Option<Dial> {
        self.dials
            .get(dial.place())
            .filter(|d| d.serial == dial.serial)?;
        let key = self.dials[dial.place()].key;
        let k = &mut self.keys[key as usize];
        if k.orphans
            .remove(&mut self.dials, dial.at, |d| &mut d.of_orphans)
        {
            self.background -= 1;
        }
        k.dialing -= 1;
        Some(self.dials.remove(dial.place()))
    }
}
