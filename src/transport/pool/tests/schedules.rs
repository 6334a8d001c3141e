//! Random schedules: whatever happens in whatever order, late, twice or not at all, the pool does
//! what the [model](super::model) allows, and in the end nothing is left.

use proptest::prelude::*;

use super::super::*;
use super::model::{Asked, Held, Status, Ticket, World, ms};

#[derive(Clone, Debug)]
enum Action {
    Checkout(usize, bool),
    Cancel(u16),
    Dialled(u16, Shape, Option<u64>),
    DialFailed(u16),
    Returned(u16, Back),
    /// The shell has closed what it was told to close.
    CloseDone(u16),
    /// A socket is closed by whomever.
    Closed(u16, CloseReason),
    Retire(u16, CloseReason),
    Slots(u16, usize),
    Hijacked(u16),
    /// Time passes, and the clock goes off or is late.
    Pass(u64, bool),
    WallClock(i64),
    CloseIdle,
    Shutdown,
    /// Inputs that are too late, or come twice.
    Stale(u16, u8),
}

fn action() -> impl Strategy<Value = Action> {
    let at = any::<u16>;
    let shape = prop_oneof![2 => Just(Shape::H1), 3 => Just(Shape::H2)];
    let lifetime = prop_oneof![2 => Just(None), 1 => (1_u64..60).prop_map(Some)];
    let back = prop_oneof![
        6 => Just(Back::Reusable),
        1 => Just(Back::Spent(CloseReason::ConnectionClose)),
        1 => Just(Back::Spent(CloseReason::RequestCancelled)),
    ];
    let gone = || prop_oneof![Just(CloseReason::PeerClosed), Just(CloseReason::IoError)];
    prop_oneof![
        30 => (0_usize..3, any::<bool>()).prop_map(|(key, rec)| Action::Checkout(key, rec)),
        5 => at().prop_map(Action::Cancel),
        18 => (at(), shape, lifetime).prop_map(|(at, shape, life)| Action::Dialled(at, shape, life)),
        4 => at().prop_map(Action::DialFailed),
        18 => (at(), back).prop_map(|(at, back)| Action::Returned(at, back)),
        10 => at().prop_map(Action::CloseDone),
        3 => (at(), gone()).prop_map(|(at, why)| Action::Closed(at, why)),
        3 => (at(), prop_oneof![Just(CloseReason::Goaway), Just(CloseReason::PeerClosed)])
            .prop_map(|(at, why)| Action::Retire(at, why)),
        8 => (at(), 0_usize..5).prop_map(|(at, max)| Action::Slots(at, max)),
        1 => at().prop_map(Action::Hijacked),
        9 => (0_u64..30, any::<bool>()).prop_map(|(time, tick)| Action::Pass(time, tick)),
        1 => (-40_i64..100).prop_map(Action::WallClock),
        1 => Just(Action::CloseIdle),
        5 => (at(), 0_u8..8).prop_map(|(at, what)| Action::Stale(at, what)),
    ]
}

fn limits() -> impl Strategy<Value = Limits> {
    let few = |from: usize| prop::option::of(from..from + 3);
    (
        (few(0), few(0), few(1), few(0)),
        prop::option::of(5_u64..60),
        prop::option::of(5_u64..60),
        0_usize..3,
        any::<bool>(),
        prop::bool::weighted(0.9),
    )
        .prop_map(|(counts, idle, wait, background, fifo, keep_alive)| {
            let (idle_conns, idle_per_host, conns, waiters) = counts;
            Limits {
                max_idle_conns: idle_conns,
                max_idle_conns_per_host: idle_per_host,
                max_conns_per_host: conns,
                idle_timeout: idle.map(ms),
                wait_timeout: wait.map(ms),
                max_waiters: waiters.map(|n| n * 2),
                max_background_dials: background,
                fifo,
                keep_alive,
                snapshot_interval: ms(10),
            }
        })
}

fn speaks() -> impl Strategy<Value = Speaks> {
    prop_oneof![Just(Speaks::H1), Just(Speaks::H2), Just(Speaks::Unknown)]
}

/// Names of what was, for those who come too late.
#[derive(Default)]
struct Past {
    tickets: Vec<Ticket>,
    dials: Vec<DialIx>,
    held: Vec<Held>,
    conns: Vec<ConnIx>,
}

fn pick<T: Copy>(of: &[T], at: u16) -> Option<T> {
    (!of.is_empty()).then(|| of[usize::from(at) % of.len()])
}

fn run(world: &mut World, past: &mut Past, action: &Action) {
    match action.clone() {
        Action::Checkout(key, recording) => match world.checkout_as(key, recording) {
            Asked::Ready(held) => past.held.push(held),
            Asked::Waits(ticket) => past.tickets.push(ticket),
            Asked::QueueFull | Asked::Closed => {}
        },
        Action::Cancel(at) => {
            if let Some(w) = pick(&world.waiters, at) {
                let (token, ix) = (w.token, w.ix);
                world.cancel(Ticket { token, ix });
            }
        }
        Action::Dialled(at, shape, lifetime) => {
            if let Some(dial) = pick(&world.dials, at) {
                past.dials.push(dial.ix);
                past.conns
                    .extend(world.dialled(dial.ix, shape, lifetime.map(ms)));
            }
        }
        Action::DialFailed(at) => {
            if let Some(dial) = pick(&world.dials, at) {
                past.dials.push(dial.ix);
                world.dial_failed(dial.ix);
            }
        }
        Action::Returned(at, back) => {
            if let Some(held) = pick(&world.held(), at) {
                past.held.push(held);
                world.returned(held, back);
            }
        }
        Action::CloseDone(at) => {
            let closing = world.sockets.iter().filter(|s| s.status == Status::Closing);
            let closing: Vec<_> = closing.map(|s| s.ix).collect();
            if let Some(conn) = pick(&closing, at) {
                world.socket_closed(conn, CloseReason::Shutdown);
            }
        }
        Action::Closed(at, reason) => {
            if let Some(conn) = pick(&world.open(), at) {
                world.socket_closed(conn, reason);
            }
        }
        Action::Retire(at, reason) => {
            if let Some(conn) = pick(&world.open(), at) {
                world.retire(conn, reason);
            }
        }
        Action::Slots(at, max) => {
            if let Some(conn) = pick(&world.open(), at) {
                world.slots(conn, max);
            }
        }
        Action::Hijacked(at) => {
            let held = world.held();
            let h1 = |h: &&Held| {
                let socket = world.socket(h.conn);
                !socket.h2 && socket.status == Status::Active
            };
            let h1: Vec<Held> = held.iter().filter(h1).copied().collect();
            if let Some(held) = pick(&h1, at) {
                world.hijacked(held);
            }
        }
        Action::Pass(time, tick) => {
            world.pass(ms(time));
            if tick {
                world.tick();
            }
        }
        Action::WallClock(jump) => {
            let by = ms(jump.unsigned_abs());
            if jump < 0 {
                world.now.wall -= by;
            } else {
                world.now.wall += by;
            }
        }
        Action::CloseIdle => {
            world.close_idle();
        }
        Action::Shutdown => {
            world.shutdown();
        }
        Action::Stale(at, what) => stale(world, past, at, what),
    }
}

/// What is too late is not heard: the model checks that where the input's object is gone.
fn stale(world: &mut World, past: &Past, at: u16, what: u8) {
    match what {
        0 => {
            if let Some(ticket) = pick(&past.tickets, at)
                && !world.waiters.iter().any(|w| w.token == ticket.token)
            {
                world.cancel(ticket);
            }
        }
        1 | 2 => {
            if let Some(dial) = pick(&past.dials, at) {
                if what == 1 {
                    world.dialled(dial, Shape::H2, None);
                } else {
                    world.dial_failed(dial);
                }
            }
        }
        3 | 4 => {
            if let Some(held) = pick(&past.held, at)
                && !world.held().contains(&held)
            {
                let back = if what == 3 {
                    Back::Reusable
                } else {
                    Back::Spent(CloseReason::IoError)
                };
                world.returned(held, back);
            }
        }
        _ => {
            let gone = |c: &&ConnIx| world.open().iter().all(|open| open != *c);
            let gone: Vec<ConnIx> = past.conns.iter().filter(gone).copied().collect();
            if let Some(conn) = pick(&gone, at) {
                match what {
                    5 => world.socket_closed(conn, CloseReason::PeerClosed),
                    6 => world.retire(conn, CloseReason::Goaway),
                    _ => world.slots(conn, 3),
                };
            }
        }
    }
}

fn play(limits: &Limits, speaks: &[Speaks], actions: &[Action]) -> World {
    let mut world = World::new(limits.clone(), speaks);
    let mut past = Past::default();
    for action in actions {
        run(&mut world, &mut past, action);
        past.held.extend(world.last().delivered.iter().map(|d| d.1));
    }
    world
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(CASES)
    })]

    #[test]
    fn the_pool_does_what_the_model_allows_whatever_happens(
        limits in limits(),
        speaks in prop::collection::vec(speaks(), 3),
        actions in prop::collection::vec(action(), 0..250),
    ) {
        play(&limits, &speaks, &actions).end();
    }

    #[test]
    fn a_pool_that_is_shut_down_serves_nobody_and_is_empty_in_the_end(
        limits in limits(),
        speaks in prop::collection::vec(speaks(), 3),
        before in prop::collection::vec(action(), 0..80),
        after in prop::collection::vec(action(), 0..80),
    ) {
        let actions: Vec<_> = before
            .into_iter()
            .chain([Action::Shutdown])
            .chain(after)
            .collect();
        play(&limits, &speaks, &actions).end();
    }
}

/// How many schedules are tried.
const CASES: u32 = 120;
