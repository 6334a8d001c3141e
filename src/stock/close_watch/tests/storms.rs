//! Many at once, and more than there is room for.

use std::collections::HashSet;
use std::sync::atomic::AtomicBool;

use super::super::listen::Ear;
use super::*;
use crate::host::notices::{self, Datagram, Heard, Notices};

/// The listener is held up while more sockets end than it has room for.
#[test]
fn what_is_lost_in_an_overflow_is_found() {
    const WATCHED: usize = 40;
    let gate: Arc<Mutex<()>> = Arc::default();
    let options = Options {
        receive_buffer: 1,
        ..Options::default()
    };
    let world = World::hearing_with(options, gate.clone());
    let (held_up, _server) = pair("127.0.0.1:0");
    let held_up_tuple = tuple(&held_up);
    let mut expected = HashSet::from([world.watch(&held_up)]);
    let shut = lock(&gate);
    drop(held_up);
    until(|| !world.is_open(&held_up_tuple));

    let mut gone: Vec<_> = (0..2 * WATCHED).map(|_| pair("127.0.0.1:0")).collect();
    expected.extend(gone.iter().map(|(client, _)| world.watch(client)));
    let open = gone.split_off(WATCHED);
    let tuples: Vec<_> = open.iter().map(|(client, _)| tuple(client)).collect();
    // Tells when the kernel has told that many, which it does in its own time.
    let mut witness = Notices::open(4 << 20).unwrap();
    drop(gone);
    for _ in 0..1_000 {
        notices::provoke().unwrap();
    }
    let mut told = 0;
    while told < 1_000 {
        match witness.hear(None).unwrap() {
            Heard::Notices(datagram) => told += datagram.notices().count(),
            _ => break,
        }
    }
    drop(shut);

    let mut ended = HashSet::new();
    for _ in 0..=WATCHED {
        assert!(ended.insert(world.end().id), "it ended twice");
    }
    let stats = world.stats();
    println!("{stats:?}");
    assert!(stats.overflows >= 1 && stats.resyncs >= 1);
    assert!(stats.ended_by_check >= 1);
    assert_eq!(stats.watched, WATCHED as u64);
    assert!(tuples.iter().all(|tuple| world.is_open(tuple)));

    drop(open);
    for _ in 0..WATCHED {
        assert!(ended.insert(world.end().id), "it ended twice");
    }
    assert_eq!(ended, expected);
    world.is_quiet();
}

/// Against the truth: what each thread opened ends once, whoever saw it, and nothing before it was
/// closed.
#[test]
fn many_threads_that_open_and_close_see_each_end_once() {
    let _alone = lock(&ALONE);
    const THREADS: usize = 8;
    const EACH: usize = 100;
    let options = Options {
        // Small, so that there are overflows among it.
        receive_buffer: 16 * 1024,
        ..Options::default()
    };
    let world = World::new(options);
    let over = AtomicBool::new(false);
    let mut ended = HashSet::new();
    let mut expected = HashSet::new();
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !over.load(Relaxed) {
                notices::provoke().unwrap();
            }
        });
        threads.spawn(|| {
            while !over.load(Relaxed) {
                world.watch.look();
            }
        });
        let workers: Vec<_> = (0..THREADS)
            .map(|worker| {
                let (watch, recorder, scope) = (&world.watch, &world.recorder, &world.scope);
                threads.spawn(move || {
                    let mut ids = Vec::new();
                    let mut open = Vec::new();
                    for round in 0..EACH {
                        let (client, server) = match (worker + round) % 3 {
                            0 => pair("[::1]:0"),
                            1 => pair("127.0.0.1:0"),
                            _ => mapped_pair(),
                        };
                        let attempt = recorder.attempt(scope, Target::new("h", 1), IoLayer::Wire);
                        let guard = attempt.established(None, None, true);
                        ids.push(guard.connection().id);
                        let tuple = tuple(&client);
                        watch.watch(&tuple, guard);
                        open.push((tuple, client, server));
                        for (tuple, ..) in &open {
                            assert!(watch.find(tuple).is_some(), "it is open");
                        }
                        if open.len() == 7 {
                            let (_, client, server) = open.swap_remove(round % 7);
                            if round % 2 == 0 {
                                reset(client);
                            }
                            drop(server);
                        }
                    }
                    ids
                })
            })
            .collect();
        for worker in workers {
            expected.extend(worker.join().unwrap());
        }
        for _ in 0..THREADS * EACH {
            assert!(ended.insert(world.end().id), "it ended twice");
        }
        over.store(true, Relaxed);
    });
    println!("{:?}", world.stats());
    assert_eq!(ended, expected);
    world.is_quiet();
}

/// As many as this machine makes within a second.
#[test]
fn foreign_ends_are_counted_and_leave_nothing_behind() {
    let world = World::hearing();
    let (client, _server) = pair("127.0.0.1:0");
    world.watch(&client);
    let begun = Instant::now();
    let mut provoked = 0_u64;
    std::thread::scope(|threads| {
        let storm = || {
            let mut provoked = 0_u64;
            while begun.elapsed() < Duration::from_secs(1) {
                notices::provoke().unwrap();
                provoked += 1;
            }
            provoked
        };
        let storms = [threads.spawn(storm), threads.spawn(storm)];
        provoked = storms.into_iter().map(|storm| storm.join().unwrap()).sum();
    });
    drop(client);
    world.end();
    // Each is heard, or is in an overflow; but for those that the kernel had no memory to tell.
    until(|| {
        let stats = world.stats();
        stats.foreign_notices >= provoked - provoked / 10 || stats.overflows > 0
    });
    println!("{provoked} in a second: {:?}", world.stats());
    assert!(world.stats().foreign_notices > 0);
    world.is_quiet();
}

/// What the listener does with one, less the system call.
#[test]
fn a_foreign_notice_is_cheap() {
    const TIMES: u32 = 200_000;
    let world = World::new(Options {
        notices: false,
        ..Options::default()
    });
    let open: Vec<_> = (0..100).map(|_| pair("127.0.0.1:0")).collect();
    for (client, _) in &open {
        world.watch(client);
    }
    let notice = notices::example();
    let mut ear = Ear::new(&world.watch, false);
    let begun = Instant::now();
    for _ in 0..TIMES {
        ear.take(&Datagram::new(&notice));
    }
    println!("{:?} each", begun.elapsed() / TIMES);
    let stats = world.stats();
    assert_eq!(stats.foreign_notices, u64::from(TIMES));
    assert_eq!((stats.malformed_notices, stats.watched), (0, 100));
}
