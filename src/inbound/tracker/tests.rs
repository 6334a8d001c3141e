//! What the record makes of a server's connection, as trackers are told it, and what a storm leaves
//! behind. The rest is in `tests/state_trackers.rs`.

use super::*;
use crate::observer::Composed;
use crate::record::Recorder;
use crate::record::recorder::Spoken;

type Log = Arc<Mutex<Vec<ConnectionState>>>;

/// A listener's scope with these trackers behind each other: one that notes, and the two of this file.
struct World {
    recorder: Recorder,
    told: Log,
    stats: StatsTracker,
    connections: ConnTracker,
}

impl World {
    fn new() -> Self {
        let (told, stats) = (Log::default(), StatsTracker::default());
        let connections = ConnTracker::default();
        let notes = told.clone();
        let trackers = compose_trackers([
            Arc::new(move |_: &InboundConnection, state| lock(&notes).push(state)) as SharedTracker,
            Arc::new(stats.clone()),
            Arc::new(connections.clone()),
        ]);
        let observer = Arc::new(tracker_observer(trackers));
        Self {
            recorder: Recorder::new(Composed::new(vec![observer]), 0, Arc::default()),
            told,
            stats,
            connections,
        }
    }

    fn accept(&self) -> crate::record::handle::ConnectionGuard {
        let scope = self.recorder.declared(Direction::Inbound, "http");
        self.recorder
            .accepted(&scope, None, None, Some(Spoken::Http))
    }

    fn told(&self) -> Vec<&'static str> {
        std::mem::take(&mut *lock(&self.told))
            .iter()
            .map(|state| state.as_str())
            .collect()
    }
}

#[test]
fn a_hijacked_connection_is_told_nothing_more_and_its_end_is_not_counted_as_a_close() {
    let world = World::new();
    let guard = world.accept();
    let connection = guard.connection();
    connection.bytes_seen(b"GET /chat HTTP/1.1\r\nupgrade: chat\r\n\r\n");
    connection.called(false, false);
    assert_eq!(world.connections.count(), 1);
    connection.hijacked();
    assert_eq!(world.told(), ["new", "active", "hijacked"]);
    assert_eq!(world.connections.count(), 0);
    assert!(world.stats.connections().is_empty());

    connection.request_finished();
    connection.flushed();
    connection.bytes_seen(b"not HTTP any more");
    drop(guard);
    assert_eq!(world.told(), [""; 0]);
    let stats = world.stats.stats();
    let now = (stats.accepted, stats.active, stats.idle);
    let ever = (stats.hijacked_total, stats.closed_total);
    assert_eq!((now, ever), ((0, 0, 0), (1, 0)));
}

#[test]
fn http2_is_told_as_gos_server_tells_it() {
    let world = World::new();
    let guard = world.accept();
    let connection = guard.connection();
    connection.bytes_seen(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    assert_eq!(world.told(), ["new", "active", "idle"]);
    connection.called(true, false);
    connection.called(true, false);
    connection.request_finished();
    assert_eq!(world.told(), ["active"]);
    connection.request_finished();
    assert_eq!(world.told(), ["idle"]);
    drop(guard);
    assert_eq!(world.told(), ["closed"]);
    let stats = world.stats.stats();
    assert_eq!((stats.active_total, stats.idle_total), (2, 2));
    assert_eq!(world.connections.count(), 0);
}

#[test]
fn a_connection_that_says_nothing_goes_from_new_to_closed() {
    let world = World::new();
    drop(world.accept());
    assert_eq!(world.told(), ["new", "closed"]);
}

#[test]
fn what_a_storm_made_the_trackers_take_is_given_back_and_nothing_is_forgotten() {
    const MANY: u64 = 50_000;
    let (stats, connections) = (StatsTracker::default(), ConnTracker::default());
    let tell = |number, state| {
        let connection = InboundConnection::new(ConnectionId::from_parts(1, number), "http", None);
        stats.track(&connection, state);
        connections.track(&connection, state);
    };
    let room = || {
        let room = lock(&stats.0).states.capacity();
        (room, lock(&connections.0.left).connections.capacity())
    };
    (0..MANY).for_each(|number| tell(number, ConnectionState::New));
    assert!(room().0 >= MANY as usize && room().1 >= MANY as usize);
    (10..MANY).for_each(|number| tell(number, ConnectionState::Closed));
    assert!(room().0 <= KEPT && room().1 <= KEPT, "{:?}", room());
    assert_eq!((stats.connections().len(), connections.count()), (10, 10));
    assert!((0..10).all(|n| {
        let id = ConnectionId::from_parts(1, n);
        stats.connections().contains_key(&id)
    }));
    (0..10).for_each(|number| tell(number, ConnectionState::Closed));
    assert_eq!((stats.stats().accepted, connections.count()), (0, 0));
}

#[test]
fn a_few_connections_that_come_and_go_move_nothing() {
    let mut storm = Storm::default();
    for count in (0..=KEPT).chain((0..=KEPT).rev()) {
        assert_eq!(storm.passed(count), None);
    }
    storm.passed(80_000);
    assert_eq!(storm.passed(10_001), None);
    assert_eq!(storm.passed(10_000), Some(20_000));
    // And again only after most of that is gone, too.
    assert_eq!(storm.passed(9_999), None);
    assert_eq!(storm.passed(2_500), Some(5_000));
    assert_eq!(storm.passed(0), Some(KEPT / 2));
    assert_eq!(storm.passed(0), None);
}
