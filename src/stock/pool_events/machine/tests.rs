//! The machine alone: by hand, by random inputs, and against a model of hyper-util's pool.

use super::*;
use proptest::prelude::*;
use std::collections::VecDeque;

fn said(message: PoolMessage) -> Input {
    Input::Message {
        message,
        from_list: false,
        at_once: false,
    }
}

const FROM_LIST: Input = Input::Message {
    message: PoolMessage::Reuse,
    from_list: true,
    at_once: false,
};
const TAKE: PoolMessage = PoolMessage::Take {
    idle_timeout: Some(Duration::from_secs(10)),
};

/// Feeds a machine and holds what every sequence of events has to fulfil.
struct Fed {
    machine: Machine,
    now: Instant,
    idle: u32,
    waiting: u32,
    events: Vec<StockPoolEventKind>,
}

impl Fed {
    fn new(machine: Machine) -> Self {
        Self {
            machine,
            now: Instant::now(),
            idle: 0,
            waiting: 0,
            events: Vec::new(),
        }
    }

    fn on(&mut self, input: Input) {
        use StockPoolEventKind as Kind;
        let events = &mut self.events;
        let before = events.len();
        let now = self.now;
        self.machine
            .on(input, &|| now, &mut |kind, _| events.push(kind));
        for kind in &self.events[before..] {
            match *kind {
                Kind::IdleConnIn { idle, .. } => {
                    self.idle += 1;
                    assert_eq!(idle, self.idle);
                }
                Kind::IdleConnOut { idle, .. } => {
                    self.idle -= 1;
                    assert_eq!(idle, self.idle);
                }
                Kind::IdleConnWaitIn { waiting } => {
                    self.waiting += 1;
                    assert_eq!(waiting, self.waiting);
                }
                Kind::IdleConnWaitOut { waiting, .. } => {
                    self.waiting -= 1;
                    assert_eq!(waiting, self.waiting);
                }
                _ => {}
            }
        }
        assert_eq!(self.idle, self.machine.idle + self.machine.shared);
        assert_eq!(self.waiting, self.machine.waiting);
        assert_eq!(self.machine.sequence, self.events.len() as u64);
    }

    fn all(&mut self, messages: &[PoolMessage]) {
        for message in messages {
            self.on(said(*message));
        }
    }

    fn pooled(&mut self) {
        self.all(&[PoolMessage::PutAdd, PoolMessage::Pooling]);
    }
}

fn any_input() -> impl Strategy<Value = Input> {
    use PoolMessage::*;
    prop_oneof![
        20 => (prop::sample::select(vec![
            CheckoutDropped, CheckoutWaiting, EvictingClosed, EvictingExpired, FoundWaiter,
            Http2AlreadyConnecting, Http2Existing, MaxIdlePerHost, PoolDropped, Pooling, PutAdd,
            PutCanceledWaiter, RemovingClosed, RemovingExpired, Reuse, Reuse, TAKE, Unknown,
        ]), any::<bool>(), any::<bool>()).prop_map(|(message, from_list, at_once)| {
            Input::Message { message, from_list, at_once }
        }),
        1 => Just(Input::NegotiatedH2),
        1 => Just(Input::SomePoolClosed),
        1 => (0_u64..20).prop_map(|refused| Input::DialsItself { refused }),
    ]
}

/// What hyper-util's pool does for HTTP/1, with the moments between an act and its message.
#[derive(Default)]
struct Pool {
    idle: u32,
    queue: VecDeque<u32>,
    handed: Vec<u32>,
    next: u32,
    /// Messages that other threads will say sometime.
    late: Vec<Input>,
    /// The message that the thread with the pool's mutex will say before it lets go.
    locked: Option<Input>,
}

impl Pool {
    fn act(&mut self, act: u8, pick: usize, fed: &mut Fed) {
        let needs_mutex = matches!(act, 0 | 1 | 4);
        if needs_mutex && let Some(input) = self.locked.take() {
            fed.on(input);
        }
        match act {
            // A checkout.
            0 if self.idle > 0 => {
                fed.on(said(TAKE));
                self.idle -= 1;
                self.late.push(FROM_LIST);
            }
            0 => {
                fed.on(said(PoolMessage::CheckoutWaiting));
                self.queue.push_back(self.next);
                self.next += 1;
            }
            // A connection comes back.
            1 => {
                fed.on(said(PoolMessage::PutAdd));
                self.locked = Some(said(match self.queue.pop_front() {
                    Some(waiter) => {
                        self.handed.push(waiter);
                        PoolMessage::FoundWaiter
                    }
                    None if self.idle >= 3 => PoolMessage::MaxIdlePerHost,
                    None => {
                        self.idle += 1;
                        PoolMessage::Pooling
                    }
                }));
                // It is in the list only once that is said: the mutex is still held.
                if self.queue.is_empty() && self.locked == Some(said(PoolMessage::Pooling)) {
                    fed.on(said(PoolMessage::Pooling));
                    self.locked = None;
                }
            }
            // A request takes up what it was given, or is dropped with it.
            2 if !self.handed.is_empty() => {
                self.handed.swap_remove(pick % self.handed.len());
                self.late.push(said(match pick % 3 {
                    0 => PoolMessage::CheckoutDropped,
                    _ => PoolMessage::Reuse,
                }));
            }
            // A request stops waiting.
            3 if !self.queue.is_empty() => {
                self.queue.remove(pick % self.queue.len());
                self.late.push(said(PoolMessage::CheckoutDropped));
            }
            // The interval.
            4 if self.idle > 0 => {
                self.idle -= 1;
                fed.on(said(PoolMessage::EvictingExpired));
            }
            5 => {
                if let Some(input) = self.locked.take() {
                    fed.on(input);
                }
            }
            _ if !self.late.is_empty() => {
                let input = self.late.swap_remove(pick % self.late.len());
                fed.on(input);
            }
            _ => {}
        }
    }

    fn quiesce(&mut self, fed: &mut Fed) {
        if let Some(input) = self.locked.take() {
            fed.on(input);
        }
        for input in std::mem::take(&mut self.late) {
            fed.on(input);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn whatever_is_said_gauges_are_the_sum_of_events_and_never_negative(
        inputs in prop::collection::vec((any_input(), 0_u64..30), 0..200), folded in any::<bool>()
    ) {
        let machine = if folded { Machine::folded() } else { Machine::new() };
        let mut fed = Fed::new(machine);
        for (input, seconds) in inputs {
            fed.now += Duration::from_secs(seconds);
            fed.on(input);
        }
    }

    #[test]
    fn whatever_the_order_of_messages_http1_is_exact_when_all_is_said(
        acts in prop::collection::vec((0_u8..8, any::<usize>()), 0..300)
    ) {
        let mut fed = Fed::new(Machine::new());
        let mut pool = Pool::default();
        for (n, (act, pick)) in acts.into_iter().enumerate() {
            pool.act(act, pick, &mut fed);
            // What left is told late, what entered at once.
            prop_assert!(fed.machine.idle >= pool.idle);
            if n % 17 == 0 {
                pool.quiesce(&mut fed);
                let machine = &fed.machine;
                prop_assert_eq!(machine.idle, pool.idle);
                prop_assert_eq!(machine.shared, 0);
                let waiting = u32::try_from(pool.queue.len()).unwrap();
                let handed = u32::try_from(pool.handed.len()).unwrap();
                prop_assert!(machine.waiting <= waiting);
                prop_assert_eq!(machine.waiting + machine.handed, waiting + handed);
                if handed == 0 && waiting == 0 {
                    prop_assert_eq!(machine.waiting, 0);
                }
            }
        }
        // Everybody leaves.
        while !pool.queue.is_empty() {
            pool.act(3, 1, &mut fed);
        }
        while !pool.handed.is_empty() {
            pool.act(2, 1, &mut fed);
        }
        pool.quiesce(&mut fed);
        prop_assert_eq!(fed.machine.idle, pool.idle);
        prop_assert_eq!((fed.machine.waiting, fed.machine.handed), (0, 0));
        prop_assert_eq!(fed.machine.unmatched, 0);
        prop_assert!(fed.machine.protocol != StockProtocol::Http2);
        prop_assert!(!fed.machine.approximate);
    }
}

#[test]
fn a_waiter_that_is_faster_than_the_message_of_its_hand_over_is_counted_once() {
    let mut fed = Fed::new(Machine::new());
    fed.all(&[
        PoolMessage::CheckoutWaiting,
        PoolMessage::CheckoutWaiting,
        PoolMessage::PutAdd,
        PoolMessage::Reuse,
        PoolMessage::FoundWaiter,
    ]);
    assert_eq!((fed.machine.waiting, fed.machine.handed), (1, 0));
    assert_eq!(fed.machine.protocol, StockProtocol::Http1);
}

#[test]
fn a_stream_from_a_waiters_queue_proves_http2() {
    let mut fed = Fed::new(Machine::new());
    fed.all(&[PoolMessage::CheckoutWaiting, PoolMessage::CheckoutWaiting]);
    fed.pooled();
    fed.all(&[PoolMessage::CheckoutDropped, PoolMessage::Reuse]);
    assert_eq!(fed.machine.protocol, StockProtocol::Http2);
    assert_eq!((fed.machine.idle, fed.machine.shared), (0, 1));
    assert_eq!(fed.machine.waiting, 0);
    assert_eq!(fed.machine.certainty(), Certainty::Exact);
}

#[test]
fn http2_waiters_of_a_failed_dial_leave_when_the_next_dial_begins() {
    let mut fed = Fed::new(Machine::new());
    let wait = |fed: &mut Fed, refused: bool| {
        let before = fed.machine.refused();
        fed.on(said(PoolMessage::CheckoutWaiting));
        fed.on(match refused {
            false => Input::DialsItself { refused: before },
            true => Input::Message {
                message: PoolMessage::Http2AlreadyConnecting,
                from_list: false,
                at_once: true,
            },
        });
    };
    for refused in [false, true, true, true] {
        wait(&mut fed, refused);
    }
    // Its dial failed; the others are told so, but not we.
    fed.all(&[PoolMessage::CheckoutDropped]);
    assert_eq!(fed.machine.waiting, 3);
    // The next one's thread was refused meanwhile: it waits for the new dial.
    let refused = fed.machine.refused();
    fed.on(said(PoolMessage::CheckoutWaiting));
    wait(&mut fed, true);
    fed.on(Input::DialsItself { refused });
    assert_eq!(fed.machine.waiting, 2);
    let failed = StockPoolEventKind::IdleConnWaitOut {
        waiting: 0,
        outcome: StockWaitOutcome::DialFailed,
    };
    assert_eq!(fed.machine.counts[failed.row()], 3);
}

#[test]
fn connections_of_a_dropped_client_are_taken_out_once_no_pool_could_hold_them() {
    let mut fed = Fed::new(Machine::new());
    fed.pooled();
    fed.pooled();
    fed.on(Input::SomePoolClosed);
    assert_eq!(fed.machine.certainty(), Certainty::UpperBound);
    // A client that lives reuses one, which tells the timeout, and gives it back.
    fed.all(&[TAKE]);
    fed.on(FROM_LIST);
    fed.pooled();
    fed.now += Duration::from_secs(20);
    fed.on(Input::Tick);
    assert_eq!(fed.machine.idle, 2);
    fed.now += Duration::from_secs(2);
    fed.on(Input::Tick);
    assert_eq!(fed.machine.idle, 1);
    assert_eq!(fed.machine.certainty(), Certainty::AssumedHttp1);
    assert!(matches!(
        fed.events.last(),
        Some(StockPoolEventKind::IdleConnOut {
            reason: IdleOutReason::PoolClosed,
            ..
        })
    ));
}

/// A client elsewhere was dropped. The two that live hold one connection each, and use it.
#[test]
fn connections_of_two_clients_that_live_are_never_taken_out() {
    let mut fed = Fed::new(Machine::new());
    fed.pooled();
    fed.pooled();
    fed.on(Input::SomePoolClosed);
    for _ in 0..2 {
        fed.all(&[TAKE]);
        fed.on(FROM_LIST);
        fed.pooled();
    }
    for _ in 0..3 {
        fed.now += Duration::from_secs(22);
        fed.on(Input::Tick);
        assert_eq!(fed.machine.idle, 2);
        // Nobody said that both live at the same time.
        assert_eq!(fed.machine.certainty(), Certainty::UpperBound);
        for _ in 0..2 {
            fed.all(&[TAKE]);
            fed.on(FROM_LIST);
            fed.pooled();
        }
    }
    // Both are in use at once: nothing in the list can be gone.
    fed.all(&[TAKE]);
    fed.on(FROM_LIST);
    fed.all(&[TAKE]);
    fed.on(FROM_LIST);
    assert_eq!(fed.machine.certainty(), Certainty::AssumedHttp1);
    fed.pooled();
    fed.pooled();
    fed.now += Duration::from_secs(1_000);
    fed.on(Input::Tick);
    assert_eq!(fed.machine.idle, 2);
    assert_eq!(fed.machine.certainty(), Certainty::AssumedHttp1);
}

#[test]
fn what_is_uncertain_is_taken_out_once_the_lists_are_quiet() {
    let mut fed = Fed::new(Machine::new());
    for _ in 0..3 {
        fed.pooled();
    }
    fed.on(Input::SomePoolClosed);
    // One of three is gone; those that live are used, one after the other.
    for _ in 0..5 {
        fed.all(&[TAKE]);
        fed.on(FROM_LIST);
        fed.pooled();
    }
    fed.now += Duration::from_secs(22);
    fed.on(Input::Tick);
    assert_eq!(fed.machine.idle, 3);
    // Then they expire.
    fed.all(&[PoolMessage::EvictingExpired, PoolMessage::EvictingExpired]);
    assert_eq!(fed.machine.idle, 1);
    assert_eq!(fed.machine.certainty(), Certainty::UpperBound);
    fed.now += Duration::from_secs(22);
    fed.on(Input::Tick);
    assert_eq!((fed.machine.idle, fed.machine.has_suspects()), (0, false));
}

#[test]
fn an_http2_connection_that_gives_streams_is_not_taken_out() {
    let mut fed = Fed::new(Machine::new());
    fed.on(Input::NegotiatedH2);
    fed.pooled();
    fed.on(Input::SomePoolClosed);
    assert_eq!(fed.machine.certainty(), Certainty::UpperBound);
    fed.all(&[TAKE]);
    fed.on(FROM_LIST);
    assert_eq!(fed.machine.certainty(), Certainty::Exact);
    fed.now += Duration::from_secs(1_000);
    fed.on(Input::Tick);
    assert_eq!(fed.machine.shared, 1);
}

#[test]
fn nothing_is_taken_out_where_a_list_keeps_its_connections_forever() {
    let mut fed = Fed::new(Machine::new());
    fed.pooled();
    fed.pooled();
    fed.all(&[PoolMessage::Take { idle_timeout: None }]);
    fed.on(FROM_LIST);
    fed.pooled();
    fed.on(Input::SomePoolClosed);
    fed.now += Duration::from_secs(1_000_000);
    fed.on(Input::Tick);
    assert_eq!(fed.machine.idle, 2);
    assert_eq!(fed.machine.certainty(), Certainty::UpperBound);
}

#[test]
fn a_change_of_certainty_alone_is_published() {
    let mut fed = Fed::new(Machine::new());
    fed.all(&[TAKE]);
    let (before, guess) = (fed.machine.mark(), fed.machine.certainty());
    assert_eq!(guess, Certainty::Approximate);
    // What was a guess is told now; no event says so.
    let events = fed.events.len();
    fed.on(Input::NegotiatedH2);
    assert_eq!(fed.events.len(), events);
    assert_eq!(fed.machine.certainty(), Certainty::Exact);
    assert_ne!(fed.machine.mark(), before);
}

#[test]
fn what_expires_after_a_client_was_dropped_is_not_taken_out_twice() {
    let mut fed = Fed::new(Machine::new());
    for _ in 0..3 {
        fed.pooled();
    }
    fed.on(Input::SomePoolClosed);
    // The client that lives gets two more, and its old one expires.
    fed.pooled();
    fed.pooled();
    fed.all(&[PoolMessage::EvictingExpired]);
    fed.now += Duration::from_secs(200);
    fed.on(Input::Tick);
    assert_eq!(fed.machine.idle, 2);
}

#[test]
fn a_stream_taken_up_within_a_put_is_not_mistaken_for_a_later_hand_over() {
    let mut fed = Fed::new(Machine::new());
    fed.all(&[
        PoolMessage::CheckoutWaiting,
        PoolMessage::PutAdd,
        PoolMessage::Reuse,
        PoolMessage::Pooling,
        PoolMessage::CheckoutWaiting,
        PoolMessage::PutAdd,
        PoolMessage::FoundWaiter,
    ]);
    assert_eq!((fed.machine.waiting, fed.machine.handed), (0, 1));
}

#[test]
fn a_list_that_was_filled_before_we_listened_is_marked() {
    let mut fed = Fed::new(Machine::new());
    fed.all(&[TAKE]);
    fed.on(FROM_LIST);
    assert_eq!(fed.machine.certainty(), Certainty::Approximate);
    // That it was HTTP/2 was a guess, and a wrong one.
    fed.all(&[
        PoolMessage::CheckoutWaiting,
        PoolMessage::PutAdd,
        PoolMessage::FoundWaiter,
    ]);
    assert_eq!(fed.machine.protocol, StockProtocol::Http1);
    assert_eq!((fed.machine.idle, fed.machine.shared), (1, 0));
    assert_eq!(fed.machine.certainty(), Certainty::Approximate);
}

#[test]
fn told_of_http2_while_http1_connections_are_idle_both_are_spoken() {
    let mut fed = Fed::new(Machine::new());
    fed.pooled();
    fed.on(Input::NegotiatedH2);
    assert_eq!(fed.machine.protocol, StockProtocol::Mixed);
    assert_eq!(fed.machine.certainty(), Certainty::Approximate);
}

#[test]
fn every_row_has_a_place_of_its_own() {
    use StockPoolEventKind as Kind;
    let mut kinds = vec![
        Kind::ConnReused,
        Kind::H2ConnNotKept,
        Kind::H2DialCoalesced,
        Kind::H2ConnShared,
        Kind::IdleConnIn {
            idle: 0,
            shared: false,
        },
        Kind::IdleConnWaitIn { waiting: 0 },
        Kind::MaxIdleConnsPerHostHit,
        Kind::PoolGone,
    ];
    for reason in IdleOutReason::ALL {
        kinds.push(Kind::IdleConnOut {
            idle: 0,
            shared: false,
            reason: *reason,
        });
    }
    for outcome in StockWaitOutcome::ALL {
        kinds.push(Kind::IdleConnWaitOut {
            waiting: 0,
            outcome: *outcome,
        });
    }
    let mut rows: Vec<_> = kinds.iter().map(Kind::row).collect();
    rows.sort_unstable();
    assert_eq!(rows, (0..ROWS).collect::<Vec<_>>());
    assert_eq!(
        Kind::IdleConnIn {
            idle: 0,
            shared: false
        }
        .row(),
        ROW_IDLE_CONN_IN
    );
}
