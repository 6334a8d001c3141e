//! A look at who holds connections and who waits, for people.

use super::*;
use crate::record::pool::PoolLook;
use crate::record::pool::look::{HolderLook, KeyLook, LOOK_AT, WaiterLook};

impl Pool {
    pub(crate) fn look(&mut self, now: Now) -> PoolLook {
        let keys: Vec<_> = self
            .keys
            .iter()
            .map(|(at, k)| {
                let first = k.waiting.front().map(|first| &self.waiters[first as usize]);
                let wait = first.map(|waiter| now.mono.saturating_sub(waiter.since.mono));
                (at as u32, wait, k.active.len())
            })
            .collect();
        PoolLook::new(keys.into_iter(), |key| self.look_at(key, now))
    }

    fn look_at(&mut self, key: u32, now: Now) -> KeyLook {
        let (mut holders, mut holding) = (Vec::new(), 0);
        let mut next = self.keys[key as usize].active.front();
        // What is not shown is only counted, and not all of it is looked at.
        while let Some(conn) = next.filter(|_| holders.len() < LOOK_AT) {
            next = List::after(&mut self.conns, conn, |c| &mut c.of_key);
            let c = &self.conns[conn as usize];
            holding += c.holders.len();
            let room = LOOK_AT - holders.len();
            holders.extend(c.holders.iter().take(room).map(|holder| HolderLook {
                request: holder.request,
                connection: Some(c.id),
                held_for: Some(now.mono.saturating_sub(holder.since)),
                trace: holder.trace,
            }));
        }
        while let Some(conn) = next {
            next = List::after(&mut self.conns, conn, |c| &mut c.of_key);
            holding += self.conns[conn as usize].holders.len();
        }
        let mut waiters = Vec::new();
        let mut next = self.keys[key as usize].waiting.front();
        while let Some(waiter) = next.filter(|_| waiters.len() < LOOK_AT) {
            next = List::after(&mut self.waiters, waiter, |w| &mut w.of_key);
            let w = &self.waiters[waiter as usize];
            waiters.push(WaiterLook {
                request: w.request,
                waited: now.mono.saturating_sub(w.since.mono),
                why: w.reason,
                dials: w.dial.is_some(),
                trace: w.asker.trace,
            });
        }
        let k = &self.keys[key as usize];
        KeyLook {
            key: k.key.clone(),
            active: k.active.len(),
            idle: k.idle.len(),
            dialing: k.dialing,
            holders_omitted: holding - holders.len(),
            holders,
            waiters_omitted: k.waiting.len() - waiters.len(),
            waiters,
        }
    }
}
