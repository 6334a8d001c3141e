//! What the pool promises, one by one: for each bug in Go's `http.Transport` (golang/go) that is
//! decided in a pool's logic, that this one does not have it. Every step here is checked by the
//! [model](model) as well, and [random schedules](schedules) are left to it alone.

mod model;
mod schedules;

use super::*;
use model::{Asked, Held, Status, Ticket, World, ms, unlimited};

const H1: &[Speaks] = &[Speaks::H1, Speaks::H1];
const H2: &[Speaks] = &[Speaks::H2];
const UNKNOWN: &[Speaks] = &[Speaks::Unknown];

fn at_most(max_conns_per_host: usize) -> Limits {
    Limits {
        max_conns_per_host: Some(max_conns_per_host),
        ..unlimited()
    }
}

fn idle_for(timeout: u64) -> Limits {
    Limits {
        idle_timeout: Some(ms(timeout)),
        ..unlimited()
    }
}

impl World {
    /// The one dial that the last input started.
    #[track_caller]
    fn dial(&self) -> DialIx {
        match self.last().dials[..] {
            [dial] => dial,
            ref dials => panic!("not one dial: {dials:?}"),
        }
    }

    /// A request that dials and has the connection, with so long to live.
    fn connected_for(&mut self, key: usize, shape: Shape, lifetime: Option<u64>) -> Held {
        let ticket = self.checkout(key).waits();
        let dial = self.dial();
        self.dialled(dial, shape, lifetime.map(ms));
        self.given(ticket)
    }

    fn connected(&mut self, key: usize, shape: Shape) -> Held {
        self.connected_for(key, shape, None)
    }

    /// What the last input gave to a request.
    #[track_caller]
    fn given(&self, ticket: Ticket) -> Held {
        let mut given = self.last().delivered.iter();
        let found = given.find(|(token, ..)| *token == ticket.token);
        found.expect("it has a connection now").1
    }

    fn give_back(&mut self, held: Held) {
        self.returned(held, Back::Reusable);
    }
}

// === limits ===

/// golang/go #29889: the count went down while the slot was handed on.
#[test]
fn a_slot_that_is_handed_to_a_waiter_stays_taken() {
    let mut world = World::new(at_most(1), H1);
    let first = world.connected(0, Shape::H1);
    world.checkout(0).waits();
    assert!(world.last().dials.is_empty());
    world.socket_closed(first.conn, CloseReason::PeerClosed);
    assert_eq!(world.last().dials.len(), 1);
    assert_eq!(world.permits_of(0), 1);
    world.checkout(0).waits();
    assert!(world.last().dials.is_empty(), "the slot is taken");
    world.end();
}

/// golang/go #34941, #61474, #38172: the count of HTTP/2 connections went below zero, or never
/// down, and requests hung.
#[test]
fn an_http2_connections_permit_is_given_back_once_however_it_ends() {
    let mut world = World::new(at_most(1), H2);
    for round in 0..4 {
        let held = world.connected(0, Shape::H2);
        world.slots(held.conn, 10);
        let other = world.checkout(0).ready();
        let last = if round % 2 == 0 {
            world.retire(held.conn, CloseReason::Goaway);
            world.give_back(other);
            world.socket_closed(held.conn, CloseReason::Goaway);
            held
        } else {
            world.socket_closed(held.conn, CloseReason::PeerClosed);
            world.returned(held, Back::Spent(CloseReason::PeerClosed));
            other
        };
        assert_eq!(world.pool.permits(), 0);
        world.returned(last, Back::Spent(CloseReason::PeerClosed));
        world.returned(last, Back::Reusable);
        world.socket_closed(held.conn, CloseReason::PeerClosed);
        world.retire(held.conn, CloseReason::Goaway);
        assert_eq!(world.pool.permits(), 0);
    }
    world.end();
}

/// golang/go #42650: at the limit, healthy connections were closed and dialled again.
#[test]
fn at_the_limit_connections_are_handed_on_and_not_dialled_again() {
    let limits = Limits {
        max_idle_conns: Some(1),
        max_idle_conns_per_host: Some(1),
        ..at_most(2)
    };
    let mut world = World::new(limits, H1);
    let mut has = vec![world.connected(0, Shape::H1), world.connected(0, Shape::H1)];
    for _ in 0..20 {
        world.checkout(0).waits();
    }
    for _ in 0..20 {
        let held = has.remove(0);
        let step = world.returned(held, Back::Reusable);
        assert!(step.closes.is_empty() && step.dials.is_empty());
        has.push(step.delivered[0].1);
    }
    assert_eq!(world.count("ConnReused"), 20);
    assert_eq!(world.open().len(), 2);
    world.end();
}

/// golang/go #24822: under concurrency connections were closed though the idle quota had room.
#[test]
fn concurrent_requests_leave_as_many_idle_connections_as_are_allowed_and_use_them_again() {
    let limits = Limits {
        max_idle_conns_per_host: Some(4),
        ..unlimited()
    };
    let mut world = World::new(limits, H1);
    let mut has: Vec<Held> = (0..5).map(|_| world.connected(0, Shape::H1)).collect();
    for _ in 0..3 {
        for held in has.drain(..).skip(1) {
            world.give_back(held);
            assert!(world.last().closes.is_empty());
        }
        has = (0..4).map(|_| world.checkout(0).ready()).collect();
        has.push(world.connected(0, Shape::H1));
    }
    for held in has {
        world.give_back(held);
    }
    assert_eq!(world.count("MaxIdleConnsPerHostHit"), 1);
    world.end();
}

/// golang/go #32336: requests waited on though the slot that they waited for was free.
#[test]
fn a_slot_goes_to_the_first_request_that_still_waits() {
    let mut world = World::new(at_most(1), H1);
    let first = world.connected(0, Shape::H1);
    let waits: Vec<Ticket> = (0..4).map(|_| world.checkout(0).waits()).collect();
    world.cancel(waits[0]);
    world.returned(first, Back::Spent(CloseReason::IoError));
    assert_eq!(world.last().closes.len(), 1);
    assert!(world.last().dials.is_empty(), "its socket is still open");
    world.socket_closed(first.conn, CloseReason::IoError);
    let dial = world.dial();
    // A failed dial is its request's own failure, and its slot the next one's.
    let step = world.dial_failed(dial);
    assert_eq!(step.failed, [(waits[1].token, WaitOutcome::DialFailed)]);
    let dial = world.dial();
    world.dialled(dial, Shape::H1, None);
    let held = world.given(waits[2]);
    world.give_back(held);
    world.given(waits[3]);
    world.end();
}

/// A slot may become free while a dial is under way that could serve everybody. When it turns out
/// that it can't, who waits for a slot takes the free one.
#[test]
fn a_slot_that_became_free_during_a_shared_dial_is_taken_when_the_dial_serves_only_one() {
    for shape in [Shape::H1, Shape::H2] {
        let mut world = World::new(at_most(2), H2);
        let full: Vec<Held> = (0..2)
            .map(|_| {
                let held = world.connected(0, Shape::H2);
                world.slots(held.conn, 1);
                held
            })
            .collect();
        let waits = [world.checkout(0).waits(), world.checkout(0).waits()];
        world.socket_closed(full[0].conn, CloseReason::PeerClosed);
        let dial = world.dial();
        world.socket_closed(full[1].conn, CloseReason::PeerClosed);
        assert!(world.last().dials.is_empty(), "one dial may serve both");
        let conn = world.dialled(dial, shape, None).unwrap();
        world.given(waits[0]);
        if shape == Shape::H2 {
            world.slots(conn, 1);
        }
        let dial = world.dial();
        world.dialled(dial, shape, None);
        world.given(waits[1]);
        world.end();
    }
}

/// golang/go counts an upgraded connection no more; its socket is as open as any.
#[test]
fn an_upgraded_connection_holds_its_permit_until_it_is_closed_and_serves_nobody_else() {
    let mut world = World::new(at_most(1), H1);
    let held = world.connected(0, Shape::H1);
    world.hijacked(held);
    let waits = world.checkout(0).waits();
    world.retire(held.conn, CloseReason::MaxLifetime);
    world.give_back(held);
    assert!(world.last().is_nothing());
    let step = world.socket_closed(held.conn, CloseReason::PeerClosed);
    assert_eq!(step.told()[0], "PutIdleConn");
    let dial = world.dial();
    world.dialled(dial, Shape::H1, None);
    world.given(waits);
    world.end();
}

#[test]
fn as_many_requests_wait_without_a_dial_as_may_and_the_next_is_turned_away() {
    let limits = Limits {
        max_waiters: Some(2),
        ..at_most(1)
    };
    let mut world = World::new(limits, H1);
    world.checkout(0).waits();
    let waits = [world.checkout(0).waits(), world.checkout(0).waits()];
    assert_eq!(world.checkout(0), Asked::QueueFull);
    world.cancel(waits[0]);
    world.checkout(0).waits();
    assert_eq!(world.checkout(0), Asked::QueueFull);
    world.end();
}

// === HTTP/2 ===

/// golang/go #27753, #13957: each of the concurrent requests dialled, and all connections but one
/// were thrown away.
#[test]
fn concurrent_requests_share_one_dial_while_the_server_may_speak_http2() {
    for speaks in [UNKNOWN, H2] {
        let mut world = World::new(unlimited(), speaks);
        let first = world.checkout(0).waits();
        let dial = world.dial();
        let others: Vec<Ticket> = (0..9).map(|_| world.checkout(0).waits()).collect();
        let conn = world.dialled(dial, Shape::H2, None).unwrap();
        world.given(first);
        assert!(
            world.last().dials.is_empty(),
            "its settings will tell how many it serves"
        );
        world.slots(conn, 100);
        for ticket in others {
            world.given(ticket);
        }
        assert_eq!(world.open().len(), 1);
        world.end();
    }
}

#[test]
fn those_who_shared_a_dial_dial_themselves_when_the_server_speaks_http1() {
    let mut world = World::new(at_most(3), UNKNOWN);
    world.checkout(0).waits();
    let dial = world.dial();
    for _ in 0..4 {
        world.checkout(0).waits();
    }
    world.dialled(dial, Shape::H1, None);
    assert_eq!(world.last().dials.len(), 2, "as many as may");
    world.end();
}

#[test]
fn those_who_share_a_dial_share_its_failure() {
    let mut world = World::new(unlimited(), H2);
    let tickets: Vec<Ticket> = (0..3).map(|_| world.checkout(0).waits()).collect();
    let dial = world.dials[0].ix;
    let step = world.dial_failed(dial);
    let all = tickets.iter().map(|t| (t.token, WaitOutcome::DialFailed));
    assert_eq!(step.failed, all.collect::<Vec<_>>());
    assert_eq!(step.keys_gone, 1);
    world.end();
}

/// golang/go #13774, #27044: what to do over the peer's stream limit, wait or open another
/// connection.
#[test]
fn over_the_stream_limit_a_request_opens_a_connection_or_waits_where_it_may_not() {
    for (limit, dials) in [(2, 1), (1, 0)] {
        let mut world = World::new(at_most(limit), H2);
        let held = world.connected(0, Shape::H2);
        world.slots(held.conn, 2);
        world.checkout(0).ready();
        let waits = [world.checkout(0).waits(), world.checkout(0).waits()];
        assert_eq!(world.dials.len(), dials);
        world.give_back(held);
        assert_eq!(world.given(waits[0]).conn, held.conn);
        world.slots(held.conn, 3);
        assert_eq!(world.given(waits[1]).conn, held.conn);
        world.end();
    }
}

/// A peer that allows no stream for now, beside one that does: a name can be that of both.
#[test]
fn a_connection_without_streams_hides_no_other_and_serves_when_it_has_some() {
    for fifo in [false, true] {
        let limits = Limits { fifo, ..at_most(2) };
        let mut world = World::new(limits, H2);
        let useless = world.connected(0, Shape::H2);
        world.slots(useless.conn, 1);
        let useful = world.connected(0, Shape::H1);
        for held in if fifo {
            [useless, useful]
        } else {
            [useful, useless]
        } {
            world.give_back(held);
        }
        world.slots(useless.conn, 0);
        assert_eq!(world.checkout(0).ready().conn, useful.conn);
        let waits = world.checkout(0).waits();
        world.slots(useless.conn, 1);
        assert_eq!(world.given(waits).conn, useless.conn);
        world.end();
    }
}

#[test]
fn a_connection_is_not_told_as_reused_when_its_peer_allows_no_stream() {
    let mut world = World::new(at_most(1), H2);
    let held = world.connected(0, Shape::H2);
    world.slots(held.conn, 0);
    world.checkout(0).waits();
    let step = world.returned(held, Back::Reusable);
    assert_eq!(step.told(), ["PutIdleConn", "IdleConnIn"]);
    world.end();
}

#[test]
fn after_goaway_requests_go_elsewhere_and_the_last_one_closes_the_connection() {
    let mut world = World::new(unlimited(), H2);
    let held = world.connected(0, Shape::H2);
    world.slots(held.conn, 10);
    let other = world.checkout(0).ready();
    world.retire(held.conn, CloseReason::Goaway);
    world.checkout(0).waits();
    assert_eq!(world.last().dials.len(), 1);
    assert!(world.returned(held, Back::Reusable).closes.is_empty());
    let step = world.returned(other, Back::Reusable);
    assert_eq!(step.closes, [(held.conn, CloseReason::Goaway)]);
    world.end();
}

#[test]
fn a_cancelled_stream_does_not_close_what_others_use() {
    let mut world = World::new(unlimited(), H2);
    let held = world.connected(0, Shape::H2);
    world.slots(held.conn, 2);
    world.returned(held, Back::Spent(CloseReason::RequestCancelled));
    assert_eq!(world.checkout(0).ready().conn, held.conn);
    world.end();
}

// === queues ===

/// golang/go #33849, #43966, #50798: dead entries stayed in the queues until the next event of
/// their key, with all that they held.
#[test]
fn cancelled_waiters_are_gone_at_once_from_wherever_they_are() {
    let mut world = World::new(at_most(1), H1);
    let first = world.connected(0, Shape::H1);
    let mut waits: Vec<Ticket> = (0..50).map(|_| world.checkout(0).waits()).collect();
    while waits.len() > 1 {
        let middle = waits.remove(waits.len() / 2);
        world.cancel(middle);
        assert_eq!(world.pool.waiters.len(), waits.len());
        assert_eq!(world.pool.keys[0].slots.len(), waits.len());
    }
    world.give_back(first);
    world.given(waits[0]);
    world.end();
}

/// dotnet/runtime #66990: cancelled requests stayed in the queue, and each burned a connect attempt.
#[test]
fn cancelled_requests_start_no_dial_when_their_turn_comes() {
    let mut world = World::new(at_most(1), H1);
    let first = world.connected(0, Shape::H1);
    let waits: Vec<Ticket> = (0..20).map(|_| world.checkout(0).waits()).collect();
    for ticket in waits {
        world.cancel(ticket);
    }
    let step = world.socket_closed(first.conn, CloseReason::PeerClosed);
    assert!(step.dials.is_empty());
    world.end();
}

/// golang/go #61708: an entry was left behind when a close and a request's end raced.
#[test]
fn a_close_and_a_requests_end_leave_nothing_behind_in_either_order() {
    let mut world = World::new(unlimited(), H1);
    for close_first in [true, false] {
        let held = world.connected(0, Shape::H1);
        for close in [close_first, !close_first] {
            if close {
                world.socket_closed(held.conn, CloseReason::ConnectionReset);
            } else {
                world.returned(held, Back::Spent(CloseReason::ConnectionReset));
            }
        }
        assert!(world.pool.conns.is_empty() && world.pool.keys.is_empty());
        assert_eq!(world.last().keys_gone, 1);
    }
    world.end();
}

/// golang/go #22537, #34511, #79664: the last one used is used first, and most of a cluster idles.
#[test]
fn idle_connections_are_used_newest_first_or_oldest_first_as_asked() {
    for fifo in [false, true] {
        let limits = Limits {
            fifo,
            ..unlimited()
        };
        let mut world = World::new(limits, H1);
        let has: Vec<Held> = (0..3).map(|_| world.connected(0, Shape::H1)).collect();
        for held in &has {
            world.give_back(*held);
        }
        let mut used: Vec<ConnIx> = (0..3).map(|_| world.checkout(0).ready().conn).collect();
        if !fifo {
            used.reverse();
        }
        assert_eq!(used, has.iter().map(|h| h.conn).collect::<Vec<_>>());
        world.end();
    }
}

#[test]
fn a_wait_ends_when_its_time_is_up() {
    let limits = Limits {
        wait_timeout: Some(ms(10)),
        ..at_most(1)
    };
    let mut world = World::new(limits, H1);
    world.connected(0, Shape::H1);
    let early = world.checkout(0).waits();
    world.pass(ms(6));
    let late = world.checkout(0).waits();
    world.pass(ms(4));
    let step = world.tick();
    assert_eq!(step.failed, [(early.token, WaitOutcome::TimedOut)]);
    world.pass(ms(6));
    let step = world.tick();
    assert_eq!(step.failed, [(late.token, WaitOutcome::TimedOut)]);
    world.end();
}

#[test]
fn a_request_that_hit_the_limit_says_so_even_if_it_shared_a_dial_later() {
    let mut world = World::new(at_most(2), H1);
    let first = [
        world.connected(0, Shape::H1).conn,
        world.connected(0, Shape::H1).conn,
    ];
    let waits: Vec<Ticket> = (0..3).map(|_| world.checkout(0).waits()).collect();
    for conn in first {
        world.socket_closed(conn, CloseReason::PeerClosed);
    }
    // The second one's dial brings a stream for the first one, whose dial goes to the third.
    let dial = world.dial();
    let conn = world.dialled(dial, Shape::H2, None).unwrap();
    world.given(waits[0]);
    // The model compares the reason with the limit hit.
    world.slots(conn, 2);
    world.given(waits[1]);
    world.end();
}

// === dials that nobody waits for ===

/// golang/go #66442: a dial was given up when another connection was free first, so that nearly
/// every connection was new. #76784: it no longer is, and dials to a black hole pile up.
#[test]
fn a_dial_that_lost_its_race_goes_on_but_only_so_many_do() {
    let limits = Limits {
        max_background_dials: 2,
        ..unlimited()
    };
    let mut world = World::new(limits, H1);
    let mut held = world.connected(0, Shape::H1);
    for lost in 1..=2 {
        let waits: Vec<Ticket> = (0..lost).map(|_| world.checkout(0).waits()).collect();
        for ticket in waits {
            world.give_back(held);
            held = world.given(ticket);
        }
        assert_eq!(world.pool.background_dials(), lost);
        assert!(world.last().cancelled.is_empty());
    }
    // These two take over what goes on, so the third's dial is the only new one.
    let waits: Vec<Ticket> = (0..3).map(|_| world.checkout(0).waits()).collect();
    assert_eq!(world.dials.len(), 3);
    for ticket in waits {
        world.give_back(held);
        held = world.given(ticket);
    }
    assert_eq!(world.last().cancelled.len(), 1);
    assert_eq!(world.pool.background_dials(), 2);
    let spare = world.dials.iter().find(|d| !d.cancelled).unwrap().ix;
    let spare = world.dialled(spare, Shape::H1, None).unwrap();
    assert!(world.is_idle(spare), "the work is not lost");
    let next = world.checkout(0).ready();
    assert_eq!(next.conn, spare);
    assert_eq!(world.last().told(), ["GetConn", "IdleConnOut", "GotConn"]);
    world.end();
}

/// golang/go #50984: the progress of a dial was lost with its request.
#[test]
fn a_cancelled_requests_dial_is_taken_over_by_who_has_none_or_becomes_a_spare() {
    let mut world = World::new(at_most(1), H1);
    let first = world.checkout(0).waits();
    let dial = world.dial();
    let second = world.checkout(0).waits();
    world.cancel(first);
    assert!(world.last().cancelled.is_empty() && world.last().dials.is_empty());
    assert_eq!(world.last().told().last(), Some(&"ConnsPerHostWaitOut"));
    world.cancel(second);
    assert_eq!(world.pool.background_dials(), 1);
    let third = world.checkout(0).waits();
    assert!(world.last().dials.is_empty(), "it takes over what goes on");
    assert_eq!(world.pool.background_dials(), 0);
    world.dialled(dial, Shape::H1, None);
    world.given(third);
    world.end();
}

#[test]
fn a_connection_that_a_cancelled_dial_brings_all_the_same_is_used() {
    let limits = Limits {
        max_background_dials: 0,
        ..unlimited()
    };
    let mut world = World::new(limits, UNKNOWN);
    let ticket = world.checkout(0).waits();
    let dial = world.dial();
    assert_eq!(world.cancel(ticket).cancelled, [dial]);
    let waits = world.checkout(0).waits();
    world.dialled(dial, Shape::H2, None);
    world.given(waits);
    world.end();
}

// === time ===

/// golang/go #34387, #70515, #66763: the idle timer closed a connection that a request had just got.
#[test]
fn the_idle_timer_never_closes_what_a_request_has() {
    for shape in [Shape::H1, Shape::H2] {
        let mut world = World::new(idle_for(10), H2);
        let held = world.connected(0, shape);
        world.give_back(held);
        world.pass(ms(9));
        let held = world.checkout(0).ready();
        world.pass(ms(1));
        assert!(world.tick().closes.is_empty());
        world.pass(ms(100));
        assert!(world.tick().closes.is_empty());
        world.give_back(held);
        assert!(world.is_idle(held.conn));
        world.end();
    }
}

#[test]
fn what_was_idle_for_too_long_is_not_used_though_the_timer_is_late_or_the_machine_slept() {
    for slept in [false, true] {
        let mut world = World::new(idle_for(10), H1);
        let held = world.connected(0, Shape::H1);
        world.give_back(held);
        if slept {
            world.now.wall += ms(3_600_000);
        } else {
            world.pass(ms(10));
        }
        world.checkout(0).waits();
        let closes = &world.last().closes;
        assert_eq!(*closes, [(held.conn, CloseReason::IdleTimeout)]);
        assert!(world.tick().closes.is_empty(), "it is closed once");
        world.end();
    }
}

/// golang/go #25621: a poll as often as the idle timeout left one connection more each time.
#[test]
fn polling_as_often_as_the_idle_timeout_leaves_no_connections_behind() {
    for tick_first in [true, false] {
        let mut world = World::new(idle_for(10), H1);
        for _ in 0..5 {
            // The one before is not used again: it is closed in this moment, whoever comes first.
            if tick_first {
                world.tick();
            }
            let held = world.connected(0, Shape::H1);
            world.tick();
            for conn in world.open() {
                if conn != held.conn {
                    assert_eq!(world.socket(conn).status, Status::Closing);
                    world.socket_closed(conn, CloseReason::IdleTimeout);
                }
            }
            assert_eq!(world.permits_of(0), 1);
            world.give_back(held);
            world.pass(ms(10));
        }
        world.end();
    }
}

/// golang/go #16808, #69205: HTTP/2 connections had another idle timeout, or none.
#[test]
fn an_http2_connection_idles_from_its_last_streams_end() {
    let mut world = World::new(idle_for(10), H2);
    let held = world.connected(0, Shape::H2);
    world.slots(held.conn, 2);
    let other = world.checkout(0).ready();
    world.give_back(held);
    world.pass(ms(50));
    assert!(world.tick().closes.is_empty(), "a stream is open");
    world.give_back(other);
    world.pass(ms(9));
    assert!(world.tick().closes.is_empty());
    world.pass(ms(1));
    let step = world.tick();
    assert_eq!(step.closes, [(held.conn, CloseReason::IdleTimeout)]);
    world.end();
}

/// golang/go #23427, #54429: there was no end to a connection's life, so no way back to balance.
#[test]
fn a_connection_at_its_lifes_end_is_closed_when_no_request_has_it() {
    for idle in [true, false] {
        let mut world = World::new(unlimited(), H1);
        let held = world.connected_for(0, Shape::H1, Some(10));
        if idle {
            world.give_back(held);
        }
        world.pass(ms(10));
        world.tick();
        if !idle {
            assert!(world.last().closes.is_empty());
            world.give_back(held);
        }
        let closes = &world.last().closes;
        assert_eq!(*closes, [(held.conn, CloseReason::MaxLifetime)]);
        world.end();
    }
}

#[test]
fn a_connection_at_its_lifes_end_serves_nobody_though_the_timer_is_late() {
    let mut world = World::new(at_most(1), H2);
    let held = world.connected_for(0, Shape::H1, Some(10));
    world.checkout(0).waits();
    world.pass(ms(10));
    let step = world.returned(held, Back::Reusable);
    assert_eq!(step.closes, [(held.conn, CloseReason::MaxLifetime)]);
    world.socket_closed(held.conn, CloseReason::MaxLifetime);
    let dial = world.dial();
    let conn = world.dialled(dial, Shape::H2, Some(ms(10))).unwrap();
    world.checkout(0).waits();
    world.pass(ms(10));
    assert!(world.slots(conn, 10).delivered.is_empty());
    world.end();
}

// === closing ===

/// golang/go #13975, #14607: `CloseIdleConnections` left connections open.
#[test]
fn close_idle_closes_what_idles_and_what_comes_back_until_the_next_request() {
    let mut world = World::new(unlimited(), H1);
    let has: Vec<Held> = (0..3).map(|_| world.connected(0, Shape::H1)).collect();
    let lost = world.checkout(0).waits();
    world.cancel(lost);
    world.give_back(has[0]);
    let step = world.close_idle();
    assert_eq!((step.closes.len(), step.cancelled.len()), (1, 1));
    let step = world.returned(has[1], Back::Reusable);
    assert_eq!(step.closes, [(has[1].conn, CloseReason::Shutdown)]);
    world.checkout(1).waits();
    world.give_back(has[2]);
    assert!(world.is_idle(has[2].conn));
    world.end();
}

#[test]
fn a_connection_that_will_be_closed_is_put_back_with_the_reason() {
    let limits = [
        Limits {
            max_idle_conns_per_host: Some(0),
            ..unlimited()
        },
        Limits {
            keep_alive: false,
            ..unlimited()
        },
        unlimited(),
    ];
    let reasons = [
        CloseReason::MaxIdleConnsPerHost,
        CloseReason::ConnectionClose,
        CloseReason::Shutdown,
    ];
    for (limits, why) in limits.into_iter().zip(reasons) {
        let mut world = World::new(limits, H2);
        let held = world.connected(0, Shape::H2);
        if why == CloseReason::Shutdown {
            world.close_idle();
        }
        let step = world.returned(held, Back::Reusable);
        assert_eq!(step.closes, [(held.conn, why)]);
        assert!(matches!(
            step.events[0].kind,
            PoolEventKind::PutIdleConn { reason: Some(reason) } if reason == why
        ));
        world.end();
    }
}
