//! `conntrack-exporter` as people run it: the real program, real connections, real scrapes, and the bugs
//! of tcp_established_exporter that it must not have.
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a test may panic, in its helpers too"
)]
#![cfg(all(feature = "exporter", target_os = "linux"))]

mod support;

#[path = "support/alone.rs"]
mod alone;
#[path = "exporter_program/ends.rs"]
mod ends;
#[path = "exporter_program/files.rs"]
mod files;
#[path = "exporter_program/once.rs"]
mod once;
#[path = "exporter_program/pages.rs"]
mod pages;
#[path = "exporter_program/program.rs"]
mod program;

use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::time::{Duration, Instant, UNIX_EPOCH};

use program::{BOUND, Exporter, File, Scrape, Server, ended, request, request_with};
use support::receiver::Receiver;

const LONGTERM: &str = "netstat_tcp_longterm_connections_total";

fn longterm(scrape: &Scrape, port: &str, version: &str) -> Option<f64> {
    scrape.value(LONGTERM, &[("port", port), ("tcp_version", version)])
}

// === metrics ===

/// As the seed's, by its client's default collectors.
#[test]
fn what_the_exporter_itself_takes_is_told_under_the_usual_names() {
    let exporter = Exporter::start(&[]);
    let scrape = exporter.scrape();
    let value = |name: &str| scrape.value(name, &[]).unwrap();
    let memory = value("process_resident_memory_bytes");
    assert!(memory > 1e6 && memory < value("process_virtual_memory_bytes"));
    assert!(value("process_open_fds") >= 3.0);
    assert!(value("process_max_fds") >= value("process_open_fds"));
    assert!(value("process_threads") >= 2.0);
    let started = UNIX_EPOCH + Duration::from_secs_f64(value("process_start_time_seconds"));
    assert!(started.elapsed().unwrap() < Duration::from_secs(60));
    let processor = |scrape: &Scrape| scrape.value("process_cpu_seconds_total", &[]).unwrap();
    let before = processor(&scrape);
    exporter.until("work", |scrape| (processor(scrape) > before).then_some(()));
}

/// Bugs 1 and 4 of the seed: IPv6 was told as IPv4; and it counted polls.
#[test]
fn long_lived_connections_are_told_by_port_and_version_once_they_are_long() {
    let four = Server::start("127.0.0.1:0", 3).unwrap();
    let six = Server::start("[::1]:0", 2);
    let exporter = Exporter::start(&["--duration", "1", "--period", "0.1"]);
    let begun = Instant::now();
    exporter.until("three of IPv4", |scrape| {
        let value = longterm(scrape, &four.port(), "4").unwrap();
        // From its first scan on, which was before it listened.
        assert!(
            value == 0.0 || begun.elapsed() > Duration::from_millis(500),
            "{value}"
        );
        (value == 3.0).then_some(())
    });
    match &six {
        Some(six) => exporter.until("two of IPv6", |scrape| {
            assert_eq!(longterm(scrape, &six.port(), "4"), Some(0.0));
            (longterm(scrape, &six.port(), "6") == Some(2.0)).then_some(())
        }),
        None => eprintln!("this host has no IPv6"),
    }
    let scrape = exporter.scrape();
    // Exactly these labels.
    for (labels, _) in scrape.series(LONGTERM) {
        assert_eq!(labels.keys().collect::<Vec<_>>(), ["port", "tcp_version"]);
    }
    assert!(scrape.0.contains(&format!("# TYPE {LONGTERM} gauge")));
    let labels = [
        ("conntrack_direction", "inbound"),
        ("conntrack_host_port", &four.port()),
        ("network_type", "ipv4"),
    ];
    let both = [
        "conntrack_host_connections",
        "conntrack_host_longterm_connections",
    ];
    assert_eq!(both.map(|name| scrape.value(name, &labels)), [Some(3.0); 2]);
    // Its own scrapes are nowhere.
    let own = exporter.address.port().to_string();
    assert!(!scrape.0.contains(&format!("\"{own}\"")), "{}", scrape.0);
}

#[test]
fn simple_is_one_gauge_without_labels_for_the_ports_that_were_asked_for() {
    let (one, two) = (
        Server::start("127.0.0.1:0", 2),
        Server::start("127.0.0.1:0", 3),
    );
    let (one, two) = (one.unwrap(), two.unwrap());
    let other = Server::start("127.0.0.1:0", 4).unwrap();
    let ports = format!("{},{}", one.port(), two.port());
    let exporter = Exporter::start(&["--simple", "--port", &ports, "--duration", "0"]);
    let scrape = exporter.scrape();
    assert_eq!(scrape.series(LONGTERM), [(Default::default(), 5.0)]);
    assert!(!scrape.0.contains(&format!("\"{}\"", other.port())));
    // What ss says of them.
    let count = |port: &str| {
        let ss = Command::new("ss")
            .args(["-Htn", "state", "established", &format!("sport = :{port}")])
            .output();
        ss.ok()
            .map(|ss| String::from_utf8_lossy(&ss.stdout).lines().count())
    };
    match count(&one.port()).zip(count(&two.port())) {
        Some((one, two)) => assert_eq!(one + two, 5),
        None => eprintln!("ss is not there, so it was not asked"),
    }
}

/// Bug 7 of the seed: each ephemeral port was a series, and none ever went away.
#[test]
fn ports_that_come_and_go_leave_nothing_behind() {
    let mut server = Server::start("127.0.0.1:0", 20).unwrap();
    let port = server.port();
    let exporter = Exporter::start(&["--duration", "0", "--period", "0.1"]);
    let scrape = exporter.scrape();
    assert_eq!(longterm(&scrape, &port, "4"), Some(20.0));
    for (client, _) in &server.ends {
        let ephemeral = format!("\"{}\"", client.local_addr().unwrap().port());
        assert!(!scrape.0.contains(&ephemeral), "{ephemeral} is a label");
    }
    for _ in 0..5 {
        server.ends.clear();
        exporter.until("zero", |scrape| {
            (longterm(scrape, &port, "4") == Some(0.0)).then_some(())
        });
        (0..7).for_each(|_| server.connect());
        exporter.until("seven", |scrape| {
            (longterm(scrape, &port, "4") == Some(7.0)).then_some(())
        });
    }
    drop(server);
    exporter.until("no series", |scrape| {
        (!scrape.0.contains(&format!("\"{port}\""))).then_some(())
    });
}

/// An idle WebSocket is a connection that says nothing for long.
#[test]
fn a_connection_that_was_upgraded_and_is_silent_is_there_all_the_time() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port().to_string();
    let url = format!("ws://{}/", server.local_addr().unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _sockets = runtime.block_on(async {
        server.set_nonblocking(true).unwrap();
        let server = tokio::net::TcpListener::from_std(server).unwrap();
        let client = async {
            let stream = tokio::net::TcpStream::connect(
                url.strip_prefix("ws://").unwrap().trim_end_matches('/'),
            );
            tokio_tungstenite::client_async(&*url, stream.await.unwrap())
                .await
                .unwrap()
        };
        let accept = async {
            let (stream, _) = server.accept().await.unwrap();
            tokio_tungstenite::accept_async(stream).await.unwrap()
        };
        let ends = tokio::join!(client, accept);
        (server, ends)
    });
    let exporter = Exporter::start(&["--port", &port, "--duration", "1", "--period", "0.1"]);
    exporter.until("a user", |scrape| {
        (longterm(scrape, &port, "4") == Some(1.0)).then_some(())
    });
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(500) {
        assert_eq!(longterm(&exporter.scrape(), &port, "4"), Some(1.0));
    }
}

#[test]
fn states_queues_ages_and_the_kernels_counts_are_told() {
    let server = Server::start("127.0.0.1:0", 2).unwrap();
    let waiting = TcpStream::connect(server.listener.local_addr().unwrap()).unwrap();
    let port = server.port();
    let by = ["--port", &port, "--group-by", "subnet/8"];
    let exporter = Exporter::start(&by);
    let scrape = exporter.scrape();
    let of_port = [("conntrack_host_port", &*port)];
    let length = scrape.value("conntrack_host_accept_queue_length", &of_port);
    assert_eq!(length, Some(1.0), "{}", scrape.0);
    assert!(scrape.value("conntrack_host_accept_queue_limit", &of_port) >= Some(1.0));
    let state = |state| {
        let labels = [
            ("network_connection_state", state),
            ("network_transport", "tcp"),
            ("network_type", "ipv4"),
        ];
        scrape.value("system_network_connection_count", &labels)
    };
    assert_eq!(
        (state("established"), state("listen")),
        (Some(3.0), Some(1.0))
    );
    let group = [("conntrack_host_group", "127.0.0.0/8")];
    assert_eq!(
        scrape.value("conntrack_host_connections", &group),
        Some(3.0)
    );
    // A histogram, as far as Prometheus goes.
    let age = "conntrack_host_connection_age_seconds";
    assert_eq!(scrape.value(&format!("{age}_count"), &[]), Some(3.0));
    assert_eq!(
        scrape.value(&format!("{age}_bucket"), &[("le", "+Inf")]),
        Some(3.0)
    );
    assert_eq!(
        scrape.value(&format!("{age}_bucket"), &[("le", "3600")]),
        Some(3.0)
    );
    assert!(scrape.0.contains(&format!("# TYPE {age} histogram")));
    for name in [
        "conntrack_host_tcp_retransmits_total",
        "conntrack_host_tcp_segments_sent_total",
    ] {
        assert!(scrape.value(name, &[]).is_some(), "{name}: {}", scrape.0);
    }
    let whole = [("conntrack_host_scan_result", "whole")];
    assert!(scrape.value("conntrack_host_scans_total", &whole) >= Some(1.0));
    drop(waiting);
}

#[test]
fn what_goes_beyond_the_bounds_is_summed_or_counted() {
    let servers = [2, 3].map(|clients| Server::start("127.0.0.1:0", clients).unwrap());
    let ports = servers.each_ref().map(Server::port).join(",");
    let exporter = Exporter::start(&["--port", &ports, "--rows", "1"]);
    let name = "conntrack_host_connections";
    let scrape = exporter.scrape();
    let series = scrape.series(name);
    let sum: f64 = series.iter().map(|(_, value)| value).sum();
    assert_eq!(sum, 5.0, "{}", scrape.0);
    let of_ports = servers.iter().filter(|server| {
        let labels = [("conntrack_host_port", &*server.port())];
        scrape.value(name, &labels).is_some_and(|value| value > 0.0)
    });
    assert!(of_ports.count() <= 1, "{}", scrape.0);

    let exporter = Exporter::start(&["--port", &ports, "--limit", "4"]);
    let scrape = exporter.scrape();
    let sum: f64 = scrape.series(name).iter().map(|(_, value)| value).sum();
    let dropped = [("conntrack_dropped_item", "untracked")];
    let dropped = scrape.value("conntrack_host_dropped_total", &dropped);
    assert!(sum == 4.0 && dropped >= Some(1.0), "{}", scrape.0);
}

#[test]
fn metrics_go_out_by_otlp_and_that_connection_is_left_out() {
    let receiver = Receiver::start_on_own_thread();
    let server = Server::start("127.0.0.1:0", 2).unwrap();
    let port = server.port();
    let endpoint = receiver.grpc_endpoint();
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &*endpoint),
        ("OTEL_METRIC_EXPORT_INTERVAL", "100"),
        ("LISTEN", "0"),
        ("DURATION", "0"),
        ("PERIOD", "0.1"),
    ];
    let exporter = Exporter::start_with(&[], &variables);
    let store = receiver.wait_for_blocking("long-term connections", BOUND, |store| {
        let points = store.latest("conntrack.host.longterm_connections");
        points.iter().any(|point| {
            point
                .attributes
                .get("conntrack.host.port")
                .and_then(|port| port.as_str())
                == Some(&port)
                && point.attributes["conntrack.direction"].as_str() == Some("inbound")
                && point.value.as_i64() == Some(2)
        })
    });
    assert!(
        store
            .metric_names()
            .contains("conntrack.host.connection.age")
    );
    assert!(
        store
            .metric_names()
            .contains("system.network.connection.count")
    );
    // The way to the receiver: its own end is ours, so nobody is outbound there. The receiver's end is
    // another program's business.
    let to = receiver.grpc_addr().port().to_string();
    let labels = [
        ("conntrack_direction", "outbound"),
        ("conntrack_host_port", &*to),
    ];
    for _ in 0..5 {
        let scrape = exporter.scrape();
        assert_eq!(scrape.value("conntrack_host_connections", &labels), None);
    }
    let (_, _, page) = exporter.get("/");
    let words = "sent to the endpoint of OTEL_EXPORTER_OTLP_ENDPOINT every 100ms";
    assert!(page.contains(words) && !page.contains(&endpoint), "{page}");
    exporter.signal("TERM");
    let (status, said) = exporter.wait();
    assert!(status.success(), "{said}");
    assert!(!said.contains("not sent") && said.contains(words), "{said}");
}

/// What is told is what is so: nothing is sent, and what is wrong about traces is another program's.
#[test]
fn where_nothing_is_sent_by_otlp_the_page_says_so_and_why() {
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9");
    let traces = ("OTEL_TRACES_SAMPLER", "nonsense");
    for (variable, words) in [
        (
            ("OTEL_SDK_DISABLED", "true"),
            "off: OTEL_SDK_DISABLED is true",
        ),
        (
            ("OTEL_METRICS_EXPORTER", "none"),
            "off: OTEL_METRICS_EXPORTER is none",
        ),
    ] {
        let variables = [endpoint, traces, variable, ("LISTEN", "0")];
        let exporter = Exporter::start_with(&[], &variables);
        let (_, _, page) = exporter.get("/");
        assert!(page.contains(words), "{words} is not in {page}");
    }
}

/// Bug 2 and 6 of the seed: a look waited for name servers; and two threads shared a map.
#[test]
fn many_scrapers_at_once_all_get_whole_answers() {
    let server = Server::start("127.0.0.1:0", 10).unwrap();
    let port = server.port();
    let exporter = Exporter::start(&["--duration", "0", "--period", "0.1", "--port", &port]);
    let (address, port) = (exporter.address, &port);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(move || {
                for _ in 0..20 {
                    let (status, _, text) = request(address, "GET /metrics HTTP/1.1");
                    assert_eq!(status, 200);
                    assert_eq!(longterm(&Scrape(text), port, "4"), Some(10.0));
                }
            });
        }
    });
    // It is asked for nothing but the table: no socket but the listener is left.
    exporter.until("no socket of its own", |_| {
        let files = std::fs::read_dir(format!("/proc/{}/fd", exporter.id())).unwrap();
        let targets = files
            .flatten()
            .filter_map(|file| std::fs::read_link(file.path()).ok());
        let sockets = targets
            .filter(|to| to.to_string_lossy().starts_with("socket:"))
            .count();
        // Netlink, the listener, the pair for signals, and this scrape that may not be closed yet.
        (sockets <= 5).then_some(())
    });
}

// === scans ===

/// Bug 5 of the seed: a read that failed set everything to 0, with no word of why.
#[test]
fn a_table_that_goes_away_is_told_and_its_numbers_stay() {
    let root = std::env::temp_dir().join(format!("conntrack-exporter-proc-{}", std::process::id()));
    let table = root.join("net/tcp");
    let text = "  sl  local_address\n\
        0: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1\n\
        1: 0100007F:0050 0100007F:03E8 01 00000000:00000000 00:00000000 00000000 0 0 2\n\
        2: no such line\n";
    std::fs::create_dir_all(table.parent().unwrap()).unwrap();
    std::fs::write(&table, text).unwrap();
    let root_text = root.to_str().unwrap();
    let exporter = Exporter::start(&[
        "--proc-root",
        root_text,
        "--period",
        "0.1",
        "--duration",
        "0",
    ]);
    let malformed = [("conntrack_dropped_item", "malformed_row")];
    let scrape = exporter.scrape();
    assert!(scrape.value("conntrack_host_dropped_total", &malformed) >= Some(1.0));
    std::fs::remove_file(&table).unwrap();
    let failed = [("conntrack_host_scan_result", "failed")];
    exporter.until("a sick one", |scrape| {
        assert_eq!(longterm(scrape, "80", "4"), Some(1.0));
        let (status, _, why) = exporter.get("/-/healthy");
        let is_sick = status == 503 && why.contains("net/tcp");
        assert!(is_sick || status == 200, "{status} {why}");
        let failed = scrape.value("conntrack_host_scans_total", &failed);
        (is_sick && failed > Some(1.0)).then_some(())
    });
    assert!(exporter.get("/").2.contains("The last scan failed"));
    std::fs::write(&table, text).unwrap();
    exporter.until("a healthy one", |_| {
        (exporter.get("/-/healthy").0 == 200).then_some(())
    });
    exporter.signal("TERM");
    let (status, said) = exporter.wait();
    assert!(
        status.success() && said.contains("the table can't be read"),
        "{said}"
    );
    std::fs::remove_dir_all(root).unwrap();
}

/// A pipe instead of the table holds a scan up for as long as one likes.
#[test]
fn a_scrape_never_waits_for_a_scan_and_neither_does_the_end() {
    let root = std::env::temp_dir().join(format!("conntrack-exporter-pipe-{}", std::process::id()));
    let table = root.join("net/tcp");
    std::fs::create_dir_all(table.parent().unwrap()).unwrap();
    let text = "  sl  local_address\n\
        1: 0100007F:0050 0100007F:03E8 01 00000000:00000000 00:00000000 00000000 0 0 2\n";
    std::fs::write(&table, text).unwrap();
    let root_text = root.to_str().unwrap();
    let period = ["--period", "0.1", "--duration", "0", "--port", "80"];
    let exporter = Exporter::start(&[&["--proc-root", root_text][..], &period].concat());
    let pipe = root.join("net/pipe");
    assert!(
        Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    std::fs::rename(&pipe, &table).unwrap();
    let whole = [("conntrack_host_scan_result", "whole")];
    let scans = |scrape: &Scrape| scrape.value("conntrack_host_scans_total", &whole).unwrap();
    // It opens only if somebody reads; and while we write nothing, he waits.
    let open = || {
        let mut options = std::fs::OpenOptions::new();
        const O_NONBLOCK: i32 = 0o4000;
        options.write(true).custom_flags(O_NONBLOCK);
        options.open(&table).ok()
    };
    let mut writer = exporter.until("a scan that hangs", |_| open());
    let stuck = scans(&exporter.scrape());
    for _ in 0..20 {
        let scrape = exporter.scrape();
        assert_eq!(
            (scans(&scrape), longterm(&scrape, "80", "4")),
            (stuck, Some(1.0))
        );
    }
    std::io::Write::write_all(&mut writer, text.as_bytes()).unwrap();
    drop(writer);
    exporter.until("its end", |scrape| (scans(scrape) > stuck).then_some(()));
    // And it ends though a scan hangs.
    let _writer = exporter.until("another that hangs", |_| open());
    exporter.signal("TERM");
    let (status, said) = exporter.wait();
    assert!(status.success() && said.ends_with("stopped"), "{said}");
    std::fs::remove_dir_all(root).unwrap();
}
