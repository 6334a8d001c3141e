//! The waterfall drawing: exact texts, so that a change of the drawing is a change that somebody looked at.

mod support;

use support::receiver::{ReceivedEvent, ReceivedSpan, Value};
use support::waterfall::print_waterfall;

const US: u64 = 1_000;
const MS: u64 = 1_000_000;
const S: u64 = 1_000_000_000;

/// When every trace here begins.
const T0: u64 = 1_700_000_000 * S;

/// A span of trace 1; `start` and `end` count from the beginning.
fn span(id: u64, parent: Option<u64>, name: &str, start: u64, end: u64) -> ReceivedSpan {
    ReceivedSpan {
        trace_id: format!("{:032x}", 1),
        span_id: format!("{id:016x}"),
        parent_span_id: parent.map(|id| format!("{id:016x}")),
        name: name.to_owned(),
        start: T0 + start,
        end: T0 + end,
        ..ReceivedSpan::default()
    }
}

fn in_trace(id: &str, mut span: ReceivedSpan) -> ReceivedSpan {
    span.trace_id = id.to_owned();
    span
}

fn with(mut span: ReceivedSpan, key: &str, value: Value) -> ReceivedSpan {
    span.attributes.insert(key.to_owned(), value);
    span
}

fn with_event(mut span: ReceivedSpan, name: &str, time: u64) -> ReceivedSpan {
    span.events.push(ReceivedEvent {
        name: name.to_owned(),
        time: T0 + time,
        ..ReceivedEvent::default()
    });
    span
}

fn str(value: &str) -> Value {
    Value::Str(value.to_owned())
}

#[track_caller]
fn assert_drawing(spans: &[ReceivedSpan], highlight: &[&str], expected: &str) {
    let drawn = print_waterfall(spans, highlight);
    assert!(drawn == expected, "drawn:\n{drawn}\nexpected:\n{expected}");
    for line in drawn.lines() {
        assert!(line.chars().count() <= 100, "too long: {line}");
    }
    let mut reversed = spans.to_vec();
    reversed.reverse();
    assert_eq!(
        print_waterfall(&reversed, highlight),
        drawn,
        "depends on the order of arrival"
    );
}

/// A request that waited for a connection, and the set-up of that connection in a trace of its own.
fn request_and_setup() -> Vec<ReceivedSpan> {
    let request = "4bf92f3577b34da6a3ce929d0e0e4736";
    let setup = "9a1bc2d3e4f5061728394a5b6c7d8e9f";
    let get = with_event(
        span(1, None, "GET /orders", 0, 12_300 * US),
        "connection.acquired",
        8_200 * US,
    );
    let wait = span(
        2,
        Some(1),
        "wait_for_connection db.example:5432",
        100 * US,
        8_200 * US,
    );
    let wait = with(wait, "conntrack.wait.outcome", str("delivered_new"));
    let query = span(3, Some(1), "SELECT orders", 8_500 * US, 12_300 * US);
    let query = with(query, "error.type", str("timed_out"));
    let connection = span(
        4,
        None,
        "connection_setup db.example:5432",
        200 * US,
        8_100 * US,
    );
    let connection = with(connection, "conntrack.connection.id", Value::Int(7));
    vec![
        in_trace(
            setup,
            span(
                6,
                Some(4),
                "tcp connect [2001:db8::1]:5432",
                1_200 * US,
                1_320 * US,
            ),
        ),
        in_trace(
            setup,
            span(5, Some(4), "dns lookup db.example", 200 * US, 1_200 * US),
        ),
        in_trace(
            setup,
            span(
                7,
                Some(4),
                "tcp connect 192.0.2.7:5432",
                1_320 * US,
                8_100 * US,
            ),
        ),
        in_trace(setup, connection),
        in_trace(request, query),
        in_trace(request, wait),
        in_trace(request, get),
    ]
}

#[test]
fn traces_are_drawn_one_after_the_other_each_as_a_tree() {
    let highlight = ["conntrack.connection.id", "conntrack.wait.outcome"];
    assert_drawing(
        &request_and_setup(),
        &highlight,
        "\
── trace 4bf92f35 · 3 spans · 12.3 ms
GET /orders                            12.3 ms ████████████████████████
│  · connection.acquired +8.20 ms
├─ wait_for_connection db.example:5432 8.10 ms ████████████████         wait.outcome=delivered_new
└─ SELECT orders                       3.80 ms                 ████████ ✗ timed_out

── trace 9a1bc2d3 · 4 spans · 7.90 ms
connection_setup db.example:5432  7.90 ms ████████████████████████ connection.id=7
├─ dns lookup db.example          1.00 ms ████
├─ tcp connect [2001:db8::1]:5432  120 µs    █
└─ tcp connect 192.0.2.7:5432     6.78 ms    █████████████████████
",
    );
}

#[test]
fn without_spans_it_says_so() {
    assert_drawing(&[], &["server.port"], "(no spans)\n");
}

#[test]
fn siblings_and_their_children_keep_their_lines_apart() {
    let spans = [
        span(1, None, "root", 0, 100 * MS),
        with_event(span(2, Some(1), "first", 0, 50 * MS), "in first", 10 * MS),
        with_event(span(3, Some(2), "first.a", 0, 25 * MS), "in first.a", MS),
        with_event(
            span(4, Some(2), "first.b", 25 * MS, 50 * MS),
            "in first.b",
            30 * MS,
        ),
        with_event(
            span(5, Some(1), "second", 50 * MS, 100 * MS),
            "in second",
            60 * MS,
        ),
        with_event(
            span(6, Some(5), "second.a", 75 * MS, 75 * MS),
            "in second.a",
            75 * MS,
        ),
    ];
    assert_drawing(
        &spans,
        &[],
        "\
── trace 00000000 · 6 spans · 100 ms
root            100 ms ████████████████████████
├─ first       50.0 ms ████████████
│  │  · in first +10.0 ms
│  ├─ first.a  25.0 ms ██████
│  │     · in first.a +1.00 ms
│  └─ first.b  25.0 ms       ██████
│        · in first.b +5.00 ms
└─ second      50.0 ms             ████████████
   │  · in second +10.0 ms
   └─ second.a    0 ns                   █
         · in second.a +0 ns
",
    );
}

#[test]
fn durations_take_three_digits_and_a_fitting_unit() {
    let drawn = [
        0,
        850,
        999,
        1_000,
        3_456,
        34_560,
        120 * US,
        999_499,
        999_500,
        3_420 * US,
        9_995 * US,
        34_250 * US,
        120 * MS,
        999_499_999,
        999_500_000,
        1_200 * MS,
        59_949 * MS,
        59_950 * MS,
        125 * S,
        3_599_499 * MS,
        3_599_500 * MS,
        11_075 * S,
        100 * 3_600 * S,
        u64::MAX - T0,
    ]
    .map(|duration| {
        let drawn = print_waterfall(&[span(1, None, "x", 0, duration)], &[]);
        drawn
            .lines()
            .next()
            .unwrap_or_default()
            .rsplit("· ")
            .next()
            .unwrap_or_default()
            .to_owned()
    });
    assert_eq!(
        drawn,
        [
            "0 ns", "850 ns", "999 ns", "1.00 µs", "3.46 µs", "34.6 µs", "120 µs", "999 µs",
            "1.00 ms", "3.42 ms", "10.0 ms", "34.3 ms", "120 ms", "999 ms", "1.0 s", "1.2 s",
            "59.9 s", "1m00s", "2m05s", "59m59s", "1h00m", "3h04m", "4d", "193828d"
        ]
    );
}

#[test]
fn bars_show_offset_and_length_and_are_never_empty() {
    let spans = [
        span(1, None, "whole", 0, 24 * MS),
        span(2, Some(1), "third column", 2 * MS, 3 * MS),
        span(3, Some(1), "begun columns", 5_500 * US, 6_500 * US),
        span(4, Some(1), "instant", 12 * MS, 12 * MS),
        span(5, Some(1), "at the end", 24 * MS, 24 * MS),
        span(6, Some(1), "ends early", 13 * MS, 12 * MS),
    ];
    assert_drawing(
        &spans,
        &[],
        "\
── trace 00000000 · 6 spans · 24.0 ms
whole            24.0 ms ████████████████████████
├─ third column  1.00 ms   █
├─ begun columns 1.00 ms      ██
├─ instant          0 ns             █
├─ ends early       0 ns              █
└─ at the end       0 ns                        █
",
    );
}

#[test]
fn a_trace_without_length_still_has_bars() {
    assert_drawing(
        &[span(1, None, "instant", 0, 0)],
        &[],
        "\
── trace 00000000 · 1 span · 0 ns
instant         0 ns █
",
    );
}

#[test]
fn six_events_are_shown_and_the_rest_is_counted() {
    let many = (0..9).fold(span(1, None, "busy", 10 * MS, 20 * MS), |span, n| {
        with_event(span, &format!("event {n}"), 18 * MS - n * MS)
    });
    let mut dropped = with_event(span(2, None, "cut", 20 * MS, 30 * MS), "kept", 20 * MS);
    dropped.dropped_events = 120;
    let mut both = many.clone();
    both.span_id = format!("{:016x}", 3);
    both.start = T0 + 30 * MS;
    both.end = T0 + 40 * MS;
    both.dropped_events = 5;
    assert_drawing(
        &[many, dropped, both],
        &[],
        "\
── trace 00000000 · 3 spans · 30.0 ms
busy         10.0 ms ████████
   · event 8 +0 ns
   · event 7 +1.00 ms
   · event 6 +2.00 ms
   · event 5 +3.00 ms
   · event 4 +4.00 ms
   · event 3 +5.00 ms
   … 3 more
cut          10.0 ms         ████████
   · kept +0 ns
   … 120 dropped
busy         10.0 ms                 ████████
   · event 8 -20.0 ms
   · event 7 -19.0 ms
   · event 6 -18.0 ms
   · event 5 -17.0 ms
   · event 4 -16.0 ms
   · event 3 -15.0 ms
   … 3 more, 5 dropped
",
    );
}

#[test]
fn a_failure_shows_its_type_or_its_message() {
    let typed = with(
        span(1, None, "typed", 0, MS),
        "error.type",
        str("connection_refused"),
    );
    let typed = ReceivedSpan {
        status_error: Some("no listener".to_owned()),
        ..typed
    };
    let told = ReceivedSpan {
        status_error: Some("went wrong".to_owned()),
        ..span(2, None, "told", 0, MS)
    };
    let bare = ReceivedSpan {
        status_error: Some(String::new()),
        ..span(3, None, "bare", 0, MS)
    };
    assert_drawing(
        &[typed, told, bare],
        &["error.type"],
        "\
── trace 00000000 · 3 spans · 1.00 ms
bare         1.00 ms ████████████████████████ ✗ error
told         1.00 ms ████████████████████████ ✗ went wrong
typed        1.00 ms ████████████████████████ ✗ connection_refused
",
    );
}

#[test]
fn a_child_without_its_parent_is_a_root_that_says_so() {
    let spans = [
        span(2, Some(1), "orphan", 0, 10 * MS),
        span(3, Some(2), "its child", 2 * MS, 4 * MS),
        span(5, Some(4), "another orphan", 5 * MS, 6 * MS),
    ];
    assert_drawing(
        &spans,
        &[],
        "\
── trace 00000000 · 3 spans · 10.0 ms
orphan         10.0 ms ████████████████████████ (parent not here)
└─ its child   2.00 ms     ██████
another orphan 1.00 ms             ███          (parent not here)
",
    );
}

#[test]
fn circles_and_twins_are_drawn_once_each() {
    let spans = [
        span(1, Some(2), "chicken", 0, 10 * MS),
        span(2, Some(1), "egg", 2 * MS, 4 * MS),
        span(3, Some(3), "own parent", 5 * MS, 6 * MS),
        span(4, None, "sent twice", 7 * MS, 9 * MS),
        span(4, None, "sent twice", 7 * MS, 9 * MS),
        span(5, Some(4), "child of twins", 7 * MS, 8 * MS),
    ];
    assert_drawing(
        &spans,
        &[],
        "\
── trace 00000000 · 6 spans · 10.0 ms
sent twice        2.00 ms                 ██████
└─ child of twins 1.00 ms                 ████
sent twice        2.00 ms                 ██████
chicken           10.0 ms ████████████████████████ (parent not here)
└─ egg            2.00 ms     ██████
own parent        1.00 ms             ███          (parent not here)
",
    );
}

#[test]
fn attributes_are_short_and_what_finds_no_room_gets_its_own_lines() {
    let small = with(
        span(1, None, "small", 0, MS),
        "conntrack.reused",
        Value::Bool(true),
    );
    let small = with(small, "network.protocol.version", str("1.1"));
    let large = with(
        span(2, None, "large", MS, 2 * MS),
        "error.type",
        str("connection_reset_by_peer"),
    );
    let large = with(large, "conntrack.connection.id", Value::Int(12));
    let large = with(
        large,
        "network.peer.address",
        str("2001:0db8:0000:0000:0000:0000:0000:0001"),
    );
    let large = with(
        large,
        "conntrack.close.reason",
        str("max_idle_conns_per_host"),
    );
    let large = with(
        large,
        "conntrack.pools",
        Value::List(vec![str("a"), Value::Double(0.5)]),
    );
    let large = with(large, "url.full", str(&"http://example/".repeat(9)));
    let large = with(large, "not.asked", str("for"));
    let large = with_event(large, "closed", 2 * MS);
    let highlight = [
        "conntrack.connection.id",
        "network.peer.address",
        "network.protocol.version",
        "conntrack.reused",
        "conntrack.close.reason",
        "url.full",
        "conntrack.pools",
        "not.there",
    ];
    assert_drawing(
        &[small, large],
        &highlight,
        "\
── trace 00000000 · 2 spans · 2.00 ms
small        1.00 ms ████████████             protocol.version=1.1  reused=true
large        1.00 ms             ████████████ ✗ connection_reset_by_peer  connection.id=12
   peer.address=2001:0db8:0000:0000:0000:0000:0000:0001  close.reason=max_idle_conns_per_host
   url.full=http://example/http://example/http://example/http://example/http://example/http://examp…
   pools=[a, 0.5]
   · closed +1.00 ms
",
    );
}

#[test]
fn long_names_and_deep_trees_stay_within_the_terminal() {
    let mut spans = vec![span(1, None, &"a very long name ".repeat(5), 0, MS)];
    spans.extend((2..14).map(|id| span(id, Some(id - 1), &format!("level {id}"), 0, MS)));
    spans.push(with_event(
        span(14, Some(13), "multi\nline\tname", 0, MS),
        &"e".repeat(120),
        0,
    ));
    assert_drawing(
        &spans,
        &[],
        "\
── trace 00000000 · 14 spans · 1.00 ms
a very long name a very long name a very lo… 1.00 ms ████████████████████████
└─ level 2                                   1.00 ms ████████████████████████
   └─ level 3                                1.00 ms ████████████████████████
      └─ level 4                             1.00 ms ████████████████████████
         └─ level 5                          1.00 ms ████████████████████████
            └─ level 6                       1.00 ms ████████████████████████
               └─ level 7                    1.00 ms ████████████████████████
                  └─ level 8                 1.00 ms ████████████████████████
                     └─ level 9              1.00 ms ████████████████████████
…                    └─ level 10             1.00 ms ████████████████████████
…                    └─ level 11             1.00 ms ████████████████████████
…                    └─ level 12             1.00 ms ████████████████████████
…                    └─ level 13             1.00 ms ████████████████████████
…                    └─ multi�line�name      1.00 ms ████████████████████████
…                       · eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee…
",
    );
}

#[test]
fn trees_deeper_than_the_stack_are_drawn() {
    let spans: Vec<_> = (0..50_000)
        .map(|id| span(id + 1, Some(id), "level", id, 60_000))
        .collect();
    let drawn = print_waterfall(&spans, &[]);
    assert_eq!(drawn.lines().count(), 50_001);
}

#[test]
fn traces_whose_ids_begin_alike_get_longer_prefixes() {
    let spans = [
        in_trace(
            "00000000000000000000000000000001",
            span(1, None, "late", MS, 2 * MS),
        ),
        in_trace(
            "00000000000000000000000000000012",
            span(2, None, "early", 0, MS),
        ),
    ];
    assert_drawing(
        &spans,
        &[],
        "\
── trace 0000000000000000000000000000001 · 1 span · 1.00 ms
early        1.00 ms ████████████████████████

── trace 0000000000000000000000000000000 · 1 span · 1.00 ms
late         1.00 ms ████████████████████████
",
    );
}
