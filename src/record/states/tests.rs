//! Go's rules as a table, and what must hold for any order of events.

use proptest::prelude::*;

use super::*;

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
const HELLO: &[u8] = &[22, 3, 1, 0, 200];

const CALL: Input<'static> = Input::Call {
    http2: false,
    last: false,
};
const LAST_CALL: Input<'static> = Input::Call {
    http2: false,
    last: true,
};
const STREAM: Input<'static> = Input::Call {
    http2: true,
    last: false,
};

fn new(facts: Facts, state: ConnectionState) -> States {
    States {
        state,
        running: 0,
        facts,
    }
}

fn run(machine: &mut States, inputs: &[Input<'_>]) -> Vec<ConnectionState> {
    inputs
        .iter()
        .flat_map(|input| machine.on(*input))
        .flatten()
        .collect()
}

#[test]
fn a_servers_connection_goes_through_gos_states() {
    use Input::{Bytes, Flushed, Hijack, Last, Over, Streams, StreamsLost};
    let table: &[(&str, &[Input<'_>], &[ConnectionState])] = &[
        ("says nothing", &[], &[]),
        (
            "one request",
            &[Bytes(GET), CALL, Over, Flushed],
            &[Active, Idle],
        ),
        (
            "two, one after the other",
            &[
                Bytes(GET),
                CALL,
                Over,
                Flushed,
                Bytes(GET),
                CALL,
                Over,
                Flushed,
            ],
            &[Active, Idle, Active, Idle],
        ),
        (
            "pipelined: the second is read with the first",
            &[Bytes(GET), CALL, Over, Flushed, CALL, Over, Flushed],
            &[Active, Idle, Active, Idle],
        ),
        (
            "pipelined, and not flushed in between",
            &[Bytes(GET), CALL, Over, CALL, Over, Flushed],
            &[Active, Idle],
        ),
        (
            "the next request comes before the response is out",
            &[
                Bytes(GET),
                CALL,
                Over,
                Bytes(GET),
                Flushed,
                CALL,
                Over,
                Flushed,
            ],
            &[Active, Idle],
        ),
        (
            "a head in pieces",
            &[
                Bytes(&GET[..3]),
                Bytes(&GET[3..9]),
                Flushed,
                Bytes(&GET[9..]),
                CALL,
                Over,
                Flushed,
            ],
            &[Active, Idle],
        ),
        (
            "a body of several flushes",
            &[Bytes(GET), CALL, Flushed, Flushed, Over, Flushed],
            &[Active, Idle],
        ),
        (
            "no request at all: 400 and closed",
            &[Bytes(b"BOGUS\r\n\r\n"), Flushed],
            &[Active],
        ),
        (
            "connection: close in the request",
            &[Bytes(GET), LAST_CALL, Over, Flushed],
            &[Active],
        ),
        (
            "connection: close in the response",
            &[Bytes(GET), CALL, Last, Over, Flushed],
            &[Active],
        ),
        (
            "a body of the request arrives late",
            &[Bytes(GET), CALL, Bytes(b"abc"), Over, Flushed],
            &[Active, Idle],
        ),
        (
            "upgraded",
            &[
                Bytes(GET),
                CALL,
                Hijack,
                Over,
                Flushed,
                Bytes(b"frame"),
                Flushed,
            ],
            &[Active, Hijacked],
        ),
        (
            "an upgrade that was not granted",
            &[Bytes(GET), CALL, Over, Flushed],
            &[Active, Idle],
        ),
        (
            "the client leaves during the call",
            &[Bytes(GET), CALL, Over],
            &[Active],
        ),
        (
            "a preface in pieces",
            &[Bytes(&PREFACE[..5]), Bytes(&PREFACE[5..])],
            &[Active, Idle],
        ),
        ("half a preface", &[Bytes(&PREFACE[..8])], &[]),
        (
            "what only began like one",
            &[Bytes(b"PRI"), Bytes(b"NT / HTTP/1.1\r\n")],
            &[Active],
        ),
        (
            "HTTP/2 without streams",
            &[Bytes(PREFACE), Bytes(&[0; 9]), Flushed],
            &[Active, Idle],
        ),
        (
            "two streams at once",
            &[Bytes(PREFACE), STREAM, STREAM, Over, Flushed, Over, Flushed],
            &[Active, Idle, Active, Idle],
        ),
        (
            "a stream that is reset, one after it",
            &[Bytes(PREFACE), STREAM, Over, STREAM, Over],
            &[Active, Idle, Active, Idle, Active, Idle],
        ),
        (
            "settings read with a stream open",
            &[Bytes(PREFACE), STREAM, Bytes(&[0; 9]), Flushed],
            &[Active, Idle, Active],
        ),
        (
            "streams that are told, and their calls",
            &[
                Bytes(PREFACE),
                Streams(1),
                STREAM,
                Streams(2),
                STREAM,
                Over,
                Over,
                Streams(1),
                Streams(0),
                Flushed,
            ],
            &[Active, Idle, Active, Idle],
        ),
        (
            "a tunnel: its call is over at once",
            &[
                Bytes(PREFACE),
                Streams(1),
                STREAM,
                Over,
                Flushed,
                Bytes(b"x"),
            ],
            &[Active, Idle, Active],
        ),
        (
            "another stream beside a tunnel",
            &[
                Bytes(PREFACE),
                Streams(1),
                STREAM,
                Over,
                Streams(2),
                STREAM,
                Over,
                Streams(1),
                Streams(0),
            ],
            &[Active, Idle, Active, Idle],
        ),
        (
            "a handler that runs on after a reset",
            &[
                Bytes(PREFACE),
                Streams(1),
                STREAM,
                Streams(0),
                Flushed,
                Streams(1),
                STREAM,
                Over,
                Over,
                Streams(0),
            ],
            &[Active, Idle, Active, Idle, Active, Idle],
        ),
        (
            "a stream that is refused: nobody is called",
            &[Bytes(PREFACE), Streams(1), Streams(0)],
            &[Active, Idle, Active, Idle],
        ),
        (
            "a request of the user's own beside told streams",
            &[Bytes(PREFACE), Streams(1), CALL, Streams(0), Over, Flushed],
            &[Active, Idle, Active, Idle],
        ),
        (
            "streams that are told no more, during a call",
            &[
                Bytes(PREFACE),
                Streams(1),
                STREAM,
                StreamsLost,
                Over,
                STREAM,
                Over,
            ],
            &[Active, Idle, Active, Idle, Active, Idle],
        ),
        (
            "the same, during a tunnel",
            &[Bytes(PREFACE), Streams(1), STREAM, Over, StreamsLost],
            &[Active, Idle, Active, Idle],
        ),
        (
            "the same, during a call whose stream was reset",
            &[
                Bytes(PREFACE),
                Streams(1),
                STREAM,
                Streams(0),
                StreamsLost,
                Over,
            ],
            &[Active, Idle, Active, Idle, Active, Idle],
        ),
        (
            "plain text only: TLS is no request's first byte here",
            &[Bytes(HELLO)],
            &[Active],
        ),
    ];
    for (name, inputs, states) in table {
        let got = run(&mut new(Facts::served(false), New), inputs);
        assert_eq!(got, *states, "{name}");
    }
}

#[test]
fn ciphertext_tells_nothing_so_calls_do() {
    use Input::{Bytes, Flushed, Over};
    let mut machine = new(Facts::served(true), New);
    assert_eq!(
        run(
            &mut machine,
            &[Bytes(HELLO), Flushed, Bytes(b"\x17\x03\x03")]
        ),
        []
    );
    assert_eq!(run(&mut machine, &[CALL, Over, Flushed]), [Active, Idle]);
    assert_eq!(run(&mut machine, &[Bytes(b"\x17\x03\x03")]), []);
    assert_eq!(run(&mut machine, &[STREAM, Over]), [Active, Idle]);
    // TLS is possible and not spoken.
    let mut machine = new(Facts::served(true), New);
    assert_eq!(run(&mut machine, &[Bytes(GET)]), [Active]);
}

#[test]
fn requests_alone_move_a_connection_that_shows_no_bytes() {
    for from in [Open, Idle] {
        let mut machine = new(Facts::default(), from);
        let got = run(
            &mut machine,
            &[
                Input::Bytes(GET),
                Input::Streams(0),
                CALL,
                CALL,
                Input::Over,
                Input::Flushed,
                Input::StreamsLost,
            ],
        );
        assert_eq!((got, machine.running), (vec![Active], 1));
        assert_eq!(run(&mut machine, &[Input::Over, Input::Over]), [Idle]);
        assert_eq!(machine.running, 0);
    }
}

#[test]
fn after_its_end_it_only_counts() {
    for end in [Hijacked, ConnectionState::Closed] {
        let mut machine = new(Facts::served(false), end);
        let inputs = [
            Input::Bytes(GET),
            CALL,
            Input::Last,
            Input::Hijack,
            Input::Over,
            Input::Flushed,
            Input::Streams(1),
            Input::Streams(0),
            Input::StreamsLost,
        ];
        assert_eq!(run(&mut machine, &inputs), [], "{end}");
        assert_eq!(machine.running, 0);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Bytes(Vec<u8>),
    Flushed,
    Call(bool, bool),
    Over,
    Last,
    Hijack,
    Streams(u32),
    StreamsLost,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => prop_oneof![
            Just(GET.to_vec()),
            Just(PREFACE.to_vec()),
            Just(PREFACE[..7].to_vec()),
            Just(PREFACE[7..].to_vec()),
            Just(HELLO.to_vec()),
            prop::collection::vec(any::<u8>(), 1..40),
        ].prop_map(Step::Bytes),
        3 => Just(Step::Flushed),
        3 => (any::<bool>(), any::<bool>()).prop_map(|(http2, last)| Step::Call(http2, last)),
        3 => Just(Step::Over),
        1 => Just(Step::Last),
        1 => Just(Step::Hijack),
        2 => (0_u32..3).prop_map(Step::Streams),
        1 => Just(Step::StreamsLost),
    ]
}

proptest! {
    #[test]
    fn no_order_of_events_breaks_it(
        maybe_tls in any::<bool>(),
        steps in prop::collection::vec(step(), 0..60),
    ) {
        let mut machine = new(Facts::served(maybe_tls), New);
        let mut state = New;
        let mut open = None;
        for step in &steps {
            let before = machine;
            let input = match step {
                Step::Bytes(bytes) => Input::Bytes(bytes),
                Step::Flushed => Input::Flushed,
                Step::Call(http2, last) => Input::Call { http2: *http2, last: *last },
                Step::Over => Input::Over,
                Step::Last => Input::Last,
                Step::Hijack => Input::Hijack,
                Step::Streams(now) => {
                    open = Some(*now);
                    Input::Streams(*now)
                }
                Step::StreamsLost => {
                    open = None;
                    Input::StreamsLost
                }
            };
            let changes = machine.on(input);
            for change in changes.into_iter().flatten() {
                // Each change is one; nothing comes back to New, nothing leaves Hijacked.
                prop_assert!(change != state || state == Active, "{state} -> {change}");
                prop_assert!(change != New && state != Hijacked);
                state = change;
            }
            prop_assert_eq!(state, machine.state);
            // A stream or request that runs keeps the connection from being idle. Where streams are
            // told they alone decide.
            prop_assert_eq!(machine.facts.has(Facts::STREAMS), open.is_some());
            match open {
                Some(open) if state != Hijacked => {
                    prop_assert_eq!(state == Active, open > 0, "{} with {} open", state, open);
                }
                Some(_) => {}
                None => prop_assert!(machine.running == 0 || machine.state != Idle),
            }
            // What may be passed over without a lock changes nothing.
            let passed_over = match input {
                Input::Bytes(_) => !before.facts.heeds_bytes(before.state),
                Input::Flushed => !before.facts.heeds_flush(),
                Input::Last => !before.facts.heeds_last(),
                _ => false,
            };
            prop_assert!(!passed_over || (machine.state, changes) == (before.state, NONE));
        }
        // At rest nothing is active for ever: whoever was called is idle after the flush, unless the
        // connection ends with it.
        let called = steps.iter().any(|step| matches!(step, Step::Call(..)));
        while machine.running > 0 {
            machine.on(Input::Over);
        }
        machine.on(Input::Flushed);
        if open.is_some() {
            machine.on(Input::Streams(0));
            prop_assert!(machine.state != Active);
        } else if called && machine.state == Active {
            let last = machine.facts.has(Facts::LAST);
            prop_assert!(last || machine.facts.reads_head(machine.state, 0));
        }
    }
}
