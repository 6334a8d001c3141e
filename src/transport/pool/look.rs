//! A look at who holds connections and who waits, for people.

use super::*;
use crate::record::pool::PoolLook;
use crate::record::pool::look::{ConnectionsLook, HolderLook, KeyLook, WaiterLook, WhatFor};

impl Pool {
    /// Of each key at most so many who hold, and as many who wait.
    pub(crate) fn look(&mut self, most: usize, now: Now) -> PoolLook {
        let first_wait = |k: &Key| {
            let first = &self.waiters[k.waiting.front()? as usize];
            Some(now.mono.saturating_sub(first.since.mono))
        };
        let keys = self.keys.iter();
        let keys = keys.map(|(at, k)| (at as u32, first_wait(k), k.active.len()));
        PoolLook::new(keys.collect(), |key| self.look_at(key, most, now))
    }

    /// The requests that hold this connection.
    pub(crate) fn holders_of(&self, id: ConnectionId, now: Now) -> Vec<HolderLook> {
        let mut conns = self.conns.iter().map(|(_, c)| c);
        let found = conns.find(|c| c.id == id);
        found.map_or_else(Vec::new, |c| c.looks(now).collect())
    }

    fn look_at(&mut self, key: u32, most: usize, now: Now) -> KeyLook {
        let (mut holders, mut shown) = (Vec::new(), 0);
        let mut next = self.keys[key as usize].active.front();
        while let Some(conn) = next.filter(|_| holders.len() < most) {
            next = List::after(&mut self.conns, conn, |c| &mut c.of_key);
            let c = &self.conns[conn as usize];
            holders.extend(c.looks(now).take(most - holders.len()));
            shown += 1;
        }
        let mut waiters = Vec::new();
        let mut next = self.keys[key as usize].waiting.front();
        while let Some(waiter) = next.filter(|_| waiters.len() < most) {
            next = List::after(&mut self.waiters, waiter, |w| &mut w.of_key);
            let w = &self.waiters[waiter as usize];
            waiters.push(WaiterLook {
                request: w.request,
                waited: now.mono.saturating_sub(w.since.mono),
                what_for: if w.of_slots.is_on() {
                    WhatFor::Slot
                } else if w.dial.is_some() {
                    WhatFor::OwnDial
                } else {
                    WhatFor::OthersDial
                },
                trace: w.asker.trace,
            });
        }
        let k = &self.keys[key as usize];
        KeyLook {
            key: k.key.clone(),
            connections: Some(ConnectionsLook {
                active: k.active.len(),
                idle: k.idle.len(),
                dialing: k.dialing,
                slots_taken: k.permits,
            }),
            holders,
            holders_omitted: k.active.len() - shown,
            waiters,
            waiting: k.waiting.len(),
            waiting_for_slot: k.slots.len(),
            waiting_for_dial: k.dialers,
        }
    }
}

impl Conn {
    fn looks(&self, now: Now) -> impl Iterator<Item = HolderLook> + '_ {
        self.holders.iter().map(move |holder| HolderLook {
            request: holder.request,
            connection: Some(self.id),
            held_for: Some(now.mono.saturating_sub(holder.since)),
            trace: holder.trace,
        })
    }
}
