//! Where notices do not come.

use super::*;

fn without(notices: bool, query: bool, proc: bool) -> Options {
    Options {
        notices,
        query,
        proc,
        ..Options::default()
    }
}

/// Opens, looks, closes some, looks.
fn exact_at_a_look(world: &World, connections: usize) {
    let mut open: Vec<_> = (0..connections).map(|_| pair("127.0.0.1:0")).collect();
    let ids: Vec<_> = open.iter().map(|(client, _)| world.watch(client)).collect();
    assert_eq!(world.stats().source, CloseWatchSource::Table);
    let checks = world.stats().checks;
    until(|| {
        world.watch.look();
        world.stats().checks > checks
    });
    assert_eq!(world.stats().watched, connections as u64);

    let mut closed = Vec::new();
    for at in (0..connections).rev().step_by(3) {
        let (client, _server) = open.swap_remove(at);
        drop(client);
        closed.push(ids[at]);
    }
    let checks = world.stats().checks;
    until(|| {
        world.watch.look();
        world.stats().checks > checks
    });
    // One look is enough.
    assert_eq!(world.stats().watched, open.len() as u64);
    let mut ended: Vec<_> = closed.iter().map(|_| world.end().id).collect();
    ended.sort_unstable();
    closed.sort_unstable();
    assert_eq!(ended, closed);

    drop(open);
    until(|| {
        world.watch.look();
        world.stats().watched == 0
    });
    while world.ends.try_recv().is_ok() {}
    assert_eq!(
        world.stats().ended_by_check,
        world.scope.stats().closed_total()
    );
    world.is_quiet();
}

#[test]
fn by_the_kernels_table_few_one_by_one() {
    let world = World::new(without(false, true, false));
    exact_at_a_look(&world, 30);
}

#[test]
fn by_the_kernels_table_many_by_a_dump() {
    let world = World::new(without(false, true, false));
    exact_at_a_look(&world, 400);
}

#[test]
fn by_proc() {
    let world = World::new(without(false, false, true));
    exact_at_a_look(&world, 30);
}

#[test]
fn by_proc_over_ipv6_and_mapped() {
    let world = World::new(without(false, false, true));
    for (client, _server) in [pair("[::1]:0"), mapped_pair()] {
        let tuple = tuple(&client);
        let id = world.watch(&client);
        assert_eq!(world.stats().source, CloseWatchSource::Table);
        world.watch.look();
        assert!(world.is_open(&tuple));
        drop(client);
        until(|| {
            world.watch.look();
            !world.is_open(&tuple)
        });
        assert_eq!(world.end().id, id);
    }
    world.is_quiet();
}

#[test]
fn by_nothing_but_addresses_that_are_used_again() {
    let world = World::new(without(false, false, false));
    let (client, _server) = pair("127.0.0.1:0");
    let tuple = tuple(&client);
    let first = world.watch(&client);
    assert_eq!(world.stats().source, CloseWatchSource::Reuse);
    drop(client);
    world.watch.look();
    assert!(world.is_open(&tuple));
    let second = world.watch_as(&tuple);
    let end = world.end();
    assert_eq!((end.id, end.reason), (first, CloseReason::Unknown));
    assert_eq!(world.watch.find(&tuple).unwrap().id, second);
    assert_eq!(world.stats().ended_by_reuse, 1);
    assert_eq!(world.stats().watched, 1);
}

/// As where the socket can be bound and the kernel's module is missing.
#[test]
fn a_listener_that_is_told_nothing_gives_up() {
    let options = Options {
        proof: Duration::from_millis(20),
        provoke: || Ok(u64::MAX),
        ..Options::default()
    };
    let world = World::new(options);
    let (client, _server) = pair("127.0.0.1:0");
    let tuple = tuple(&client);
    world.watch(&client);
    until(|| !world.watch.kernel.listens());
    assert_eq!(world.stats().source, CloseWatchSource::Table);
    drop(client);
    until(|| {
        world.watch.look();
        !world.is_open(&tuple)
    });
    // It is not tried again at once.
    let (client, _server) = pair("127.0.0.1:0");
    world.watch(&client);
    assert!(!world.watch.kernel.listens());
    assert_eq!(world.stats().source, CloseWatchSource::Table);
}

/// A table that shows nothing of ours may be that of another world.
#[test]
fn a_table_that_never_showed_a_connection_of_ours_is_not_believed() {
    for options in [without(false, true, false), without(false, false, true)] {
        let world = World::new(options);
        let nowhere = Tuple {
            local: "192.0.2.1:1".parse().unwrap(),
            peer: "192.0.2.2:2".parse().unwrap(),
        };
        world.watch_as(&nowhere);
        assert_eq!(world.stats().source, CloseWatchSource::Reuse);
        world.watch.look();
        assert!(world.is_open(&nowhere));

        // Once it showed one, what it does not show is gone.
        let (client, _server) = pair("127.0.0.1:0");
        world.watch(&client);
        assert_eq!(world.stats().source, CloseWatchSource::Table);
        until(|| {
            world.watch.look();
            !world.is_open(&nowhere)
        });
        assert!(world.is_open(&tuple(&client)));
    }
}

#[test]
fn the_recorder_looks_before_a_snapshot_and_tells_the_source() {
    let world = World::new(without(false, true, false));
    assert_eq!(world.recorder.stats().close_watch, None);
    let (client, _server) = pair("127.0.0.1:0");
    world.watch(&client);
    let stats = world.recorder.stats();
    assert_eq!(stats.open(), 1);
    drop(client);
    // The last look was just now, so this one may have to wait for its turn.
    until(|| world.recorder.stats().open() == 0);
    let watch = world.recorder.stats().close_watch.unwrap();
    assert_eq!(watch.source.as_str(), "table");
    assert_eq!((watch.watched, watch.ended_by_check), (0, 1));
}

/// Observers may ask for a snapshot, also about an end that a snapshot found.
#[test]
fn a_snapshot_within_a_snapshot_does_not_hang() {
    struct Asker(std::sync::OnceLock<Recorder>, AtomicU64);
    impl Observer for Asker {
        fn on_connection_event(&self, event: &ConnectionEvent) {
            if matches!(event.kind, ConnectionEventKind::Closed { .. })
                && let Some(recorder) = self.0.get()
            {
                self.1.store(recorder.stats().open() + 1, Relaxed);
            }
        }
    }
    let asker = Arc::new(Asker(std::sync::OnceLock::new(), AtomicU64::new(0)));
    let observers = Composed::new(vec![asker.clone()]);
    let recorder = Recorder::new(observers, 0, Arc::default());
    asker.0.set(recorder.clone()).unwrap();
    let scope = recorder.declared(Direction::Outbound, "test");
    let watch = Watch::new(LIMIT, without(false, true, false));
    let (client, _server) = pair("127.0.0.1:0");
    let attempt = recorder.attempt(&scope, Target::new("127.0.0.1", 1), IoLayer::Wire);
    watch.watch(&tuple(&client), attempt.established(None, None, true));
    drop(client);
    until(|| recorder.stats().open() == 0);
    assert_eq!(asker.1.load(Relaxed), 1);
}
