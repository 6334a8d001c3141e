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
#[path = "exporter_program/program.rs"]
mod program;

use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use program::{BOUND, Exporter, File, Scrape, Server, ended, request, request_with};
use support::receiver::Receiver;

const LONGTERM: &str = "netstat_tcp_longterm_connections_total";

fn longterm(scrape: &Scrape, port: &str, version: &str) -> Option<f64> {
    scrape.value(LONGTERM, &[("port", port), ("tcp_version", version)])
}

// === metrics ===

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

/// A load balancer's spare connections, or somebody who means harm.
#[test]
fn silent_clients_hold_up_neither_a_scrape_nor_the_health() {
    let exporter = Exporter::start(&["--duration", "0"]);
    let connect = || TcpStream::connect(exporter.address).unwrap();
    let _silent: Vec<_> = (0..50).map(|_| connect()).collect();
    let begun = Instant::now();
    for path in ["/-/healthy", "/metrics", "/"] {
        assert_eq!(exporter.get(path).0, 200);
    }
    assert!(begun.elapsed() < Duration::from_secs(5));
}

// === pages ===

#[test]
fn the_page_has_every_setting_its_origin_and_no_markup_of_others() {
    let file = File::new("<b>&'.conf", "# ours\nport 1-65535\nduration=7\nsimple\n");
    let listen = ("LISTEN", "127.0.0.1:0");
    let arguments = ["--conf", file.path(), "--duration", "8"];
    let exporter = Exporter::start_with(&arguments, &[listen, ("SIMPLE", "false")]);
    let (status, head, page) = exporter.get("/");
    assert_eq!(status, 200);
    assert!(head.contains("text/html"), "{head}");
    let row = |name: &str| {
        let begin = format!("<tr><td>{name}</td>");
        let line = page.lines().find(|line| line.starts_with(&begin)).unwrap();
        line.replace("<tr>", "")
            .replace("</tr>", "")
            .replace("<td>", "|")
            .replace("</td>", "")
    };
    let path = file
        .path()
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    let path = path.replace('\'', "&#39;");
    assert_eq!(row("duration"), "|duration|8||flag --duration");
    assert_eq!(row("simple"), "|simple|false||environment variable SIMPLE");
    assert_eq!(row("port"), format!("|port|1-65535|1-65535|{path}:2"));
    assert_eq!(row("tcpv6"), "|tcpv6|true||default");
    assert_eq!(row("config"), format!("|config|{path}||flag --config"));
    assert_eq!(
        row("listen"),
        format!(
            "|listen|127.0.0.1:0|{}|environment variable LISTEN",
            exporter.address
        )
    );
    assert!(!page.contains("<b>"), "{page}");
    let (status, _, text) = exporter.get("/-/healthy");
    assert_eq!((status, &*text), (200, "healthy\n"));
    assert_eq!(exporter.get("/nothing").0, 404);
    let (status, head, _) = request(exporter.address, "POST /metrics HTTP/1.1");
    assert!(
        status == 405 && head.to_lowercase().contains("allow: get, head"),
        "{head}"
    );
    let (status, _, body) = request(exporter.address, "HEAD /metrics HTTP/1.1");
    assert_eq!((status, &*body), (200, ""));
}

/// Not even a directory's name that means harm, said in a file of such a name; nor why it can't be read.
#[test]
fn no_value_of_a_file_becomes_markup() {
    let harm = "<img src=x onerror=alert(1)>&amp;\"'";
    let root = std::env::temp_dir().join(format!("conntrack-{}-{harm}", std::process::id()));
    let table = root.join("net/tcp");
    std::fs::create_dir_all(table.parent().unwrap()).unwrap();
    std::fs::write(&table, "heading\n").unwrap();
    let text = format!("proc-root {}\nlisten=0\nperiod 0.1\n", root.display());
    let file = File::new("<script>'.conf", &text);
    let exporter = Exporter::start_with(&["--config", file.path()], &[("TCPV6", "true")]);
    let page = exporter.get("/").2;
    assert!(
        page.contains("&lt;img src=x onerror=alert(1)&gt;&amp;amp;&quot;&#39;"),
        "{page}"
    );
    std::fs::remove_file(&table).unwrap();
    let page = exporter.until("a failure", |_| {
        let page = exporter.get("/").2;
        page.contains("The last scan failed").then_some(page)
    });
    assert!(
        !page.contains("<img") && !page.contains("<script>"),
        "{page}"
    );
    std::fs::remove_dir_all(root).unwrap();
    // A value that can't be used gets no further than the terminal, on one line.
    let file = File::new("markup.conf", "allow-host <b>\u{1b}[31m\n");
    let said = String::from_utf8(ended(&["--conf", file.path()], &[]).stderr).unwrap();
    assert!(said.contains("<b>") && !said.contains('\u{1b}'), "{said}");
}

/// DNS rebinding: a web site whose name comes to mean 127.0.0.1 reads what is served there.
#[test]
fn on_the_loopback_it_answers_only_to_names_that_are_its_own() {
    let exporter = Exporter::start(&["--allow-host", "Ops.example,node1"]);
    let ask = |headers: &str| request_with(exporter.address, "GET /metrics HTTP/1.1", headers);
    for host in [
        "127.0.0.1:9690",
        "[::1]",
        "localhost:1",
        "a.localhost",
        "ops.example",
        "NODE1:80",
    ] {
        assert_eq!(ask(&format!("Host: {host}\r\n")).0, 200, "{host}");
    }
    for path in ["/", "/metrics", "/-/healthy", "/nothing"] {
        let line = format!("GET {path} HTTP/1.1");
        let host = "Host: evil.example\r\n";
        let (status, _, text) = request_with(exporter.address, &line, host);
        assert!(
            status == 421 && text.contains("--allow-host"),
            "{status} {text}"
        );
    }
    assert_eq!(ask("Host: localhost\r\nHost: evil.example\r\n").0, 400);
    // A load balancer's check, which no browser sends.
    let (status, _, _) = request_with(exporter.address, "GET /-/healthy HTTP/1.0", "");
    assert_eq!(status, 200);
    // Who listens for others is asked under whatever name they know it by, unless told its names.
    let name = "Host: exporter.monitoring.svc:9690\r\n";
    for (arguments, status) in [
        (&["--listen", "0.0.0.0:0"][..], 200),
        (&["--listen", "0.0.0.0:0", "--allow-host", "x"], 421),
    ] {
        let exporter = Exporter::start(arguments);
        let address = ([127, 0, 0, 1], exporter.address.port()).into();
        assert_eq!(
            request_with(address, "GET /metrics HTTP/1.1", name).0,
            status
        );
    }
}

#[test]
fn a_browser_may_do_nothing_with_an_answer_but_show_it() {
    let exporter = Exporter::start(&[]);
    for path in ["/", "/metrics", "/-/healthy", "/nothing"] {
        let (_, head, page) = exporter.get(path);
        let head = head.to_lowercase();
        for word in [
            "x-content-type-options: nosniff",
            "cache-control: no-store",
            "default-src 'none'",
            "frame-ancestors 'none'",
        ] {
            assert!(head.contains(word), "{word} is not in {head}");
        }
        // The one style that there is may be used.
        if let Some((_, rest)) = page.split_once("<style>") {
            let (style, rest) = rest.split_once("</style>").unwrap();
            let policy = format!("style-src 'sha256-{}'", sha256(style)).to_lowercase();
            assert!(head.contains(&policy), "{policy} is not in {head}");
            assert!(!rest.contains("<style") && !page.contains("style="));
        }
    }
    assert!(exporter.get("/").2.contains("<style>"));
}

/// In base 64.
fn sha256(text: &str) -> String {
    let suite = rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
    let hash = suite
        .tls13()
        .unwrap()
        .common
        .hash_provider
        .hash(text.as_bytes());
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for three in hash.as_ref().chunks(3) {
        let bits = three.iter().chain(&[0, 0]).take(3);
        let bits = bits.fold(0, |all, byte| all << 8 | usize::from(*byte));
        for digit in 0..4 {
            let digit = DIGITS[bits >> (18 - 6 * digit) & 63] as char;
            out.push(digit);
        }
    }
    out.truncate(hash.as_ref().len().div_ceil(3) * 4 - 1);
    out + "="
}

/// Bug 5 of the seed: a read that failed set everything to 0, with no word of why.
#[test]
fn a_table_that_goes_away_is_told_and_its_numbers_stay() {
    let root = std::env::temp_dir().join(format!("conntrack-exporter-proc-{}", std::process::id()));
    let table = root.join("net/tcp");
    let text = "heading\n\
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
    let text = "heading\n\
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

// === beginning and end ===

/// Bug 8 of the seed: the port was another than it said, and `--conf` was no flag.
#[test]
fn the_default_is_9690_on_the_loopback_and_help_says_so() {
    let help = ended(&["--help"], &[]);
    let text = String::from_utf8(help.stdout).unwrap();
    assert!(help.status.success());
    for word in [
        "[default: 9690] [env: LISTEN]",
        "--conf",
        "--simple",
        "127.0.0.1",
        "[env: GROUP_BY]",
    ] {
        assert!(text.contains(word), "{word} is not in {text}");
    }
}

/// Bug 9 of the seed: it ended silently, with 0.
#[test]
fn an_address_in_use_is_an_error_that_says_so() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (arguments, variables, origin) in [
        (&["--listen", &*address][..], &[][..], "flag --listen"),
        (&[], &[("LISTEN", &*address)], "environment variable LISTEN"),
    ] {
        let output = ended(arguments, variables);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        for word in [origin, &*address, "in use", "give another"] {
            assert!(said.contains(word), "{said}");
        }
    }
    // An address that is not this host's.
    let output = ended(&["--listen", "192.0.2.1:1"], &[]);
    assert_eq!(output.status.code(), Some(1));
}

/// Who reads its words may go: it serves and ends as ever.
#[test]
fn it_goes_on_though_nobody_hears_it() {
    let mut exporter = Exporter::start(&[]);
    exporter.mute();
    exporter.scrape();
    exporter.signal("TERM");
    assert!(exporter.wait().0.success());
}

#[test]
fn what_is_not_understood_is_exit_code_2_and_named() {
    let file = File::new("unknown.conf", "simple\nnothing 1\n");
    let in_file = format!("{}:2", file.path());
    for (arguments, variables, words) in [
        (&["--nothing"][..], &[][..], ["--nothing", "Usage"]),
        (
            &["--simple=2"],
            &[],
            ["simple (flag --simple)", "true or false"],
        ),
        (&["--otlp", "http://x"], &[], ["write --otlp=URL", "Usage"]),
        (
            &["--port", "70000"],
            &[],
            ["port (flag --port)", "1 to 65535"],
        ),
        (
            &[],
            &[("PORT", "x y")],
            ["environment variable PORT", "/etc/services"],
        ),
        (
            &[],
            &[("DURATION", "soon")],
            ["environment variable DURATION", "whole seconds"],
        ),
        (
            &["--config", file.path()],
            &[],
            [&in_file, "no such setting"],
        ),
        (
            &["--config", "/nothing"],
            &[],
            ["flag --config", "/nothing"],
        ),
        (&["--otlp=ftp://x"], &[], ["otlp", "http"]),
        (
            &[],
            &[("RUST_LOG", "a=b=c")],
            ["RUST_LOG", "otel_conntrack=debug"],
        ),
        (
            &["--otlp"],
            &[("OTEL_METRIC_EXPORT_INTERVAL", "x")],
            ["OTEL_METRIC_EXPORT_INTERVAL", "x"],
        ),
    ] {
        let output = ended(arguments, variables);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            output.status.code(),
            Some(2),
            "{arguments:?} {variables:?}: {said}"
        );
        for word in words {
            assert!(said.contains(word), "{word} is not in {said}");
        }
    }
}

#[test]
fn it_stops_when_it_is_told_to_also_while_somebody_is_connected() {
    for signal in ["TERM", "INT"] {
        let exporter = Exporter::start(&[]);
        // One that says nothing, and one between two requests.
        let _silent = TcpStream::connect(exporter.address).unwrap();
        let mut idle = TcpStream::connect(exporter.address).unwrap();
        std::io::Write::write_all(
            &mut idle,
            b"GET /-/healthy HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        )
        .unwrap();
        let mut answer = [0; 12];
        std::io::Read::read_exact(&mut idle, &mut answer).unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
        exporter.signal(signal);
        let begun = Instant::now();
        let address = exporter.address;
        let (status, said) = exporter.wait();
        assert!(
            status.success() && said.ends_with("stopped"),
            "{status}: {said}"
        );
        assert!(begun.elapsed() < Duration::from_secs(10));
        // The address is free again.
        drop(TcpListener::bind(address).unwrap());
    }
}

#[test]
fn a_table_for_people_is_printed_once() {
    let server = Server::start("127.0.0.1:0", 4).unwrap();
    let port = server.port();
    let output = ended(&["--once", "--duration", "0", "--port", &port], &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    let mut lines = text.lines();
    let heading: Vec<_> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(heading, ["PORT", "IP", "ESTABLISHED", ">=0s", "OLDEST"]);
    let row: Vec<_> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(row, ["in", &port, "ipv4", "4", "4", ">=0s"]);
    assert!(
        text.contains("4 established (ipv4)") && text.contains("rows by netlink"),
        "{text}"
    );
    // With a duration it watches for as long.
    let begun = Instant::now();
    let output = ended(&["--once", "--duration", "1", "--port", &port], &[]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(1));
    let row: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..5], ["in", &port, "ipv4", "4", "4"]);
}

/// A table that is there for one look: a pipe says when that was.
#[test]
fn a_table_is_printed_though_later_looks_failed() {
    let root = std::env::temp_dir().join(format!("conntrack-exporter-once-{}", std::process::id()));
    let table = root.join("net/tcp");
    std::fs::create_dir_all(table.parent().unwrap()).unwrap();
    let arguments = [
        "--once",
        "--duration",
        "1",
        "--period",
        "0.1",
        "--proc-root",
    ];
    let arguments = [&arguments[..], &[root.to_str().unwrap()]].concat();
    // None at all: that is an error.
    let output = ended(&arguments, &[]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        output.stdout.is_empty() && said.contains("--proc-root"),
        "{said}"
    );

    assert!(
        Command::new("mkfifo")
            .arg(&table)
            .status()
            .unwrap()
            .success()
    );
    let child = program::command(&arguments, &[])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // Waits for the one who reads.
    let mut pipe = std::fs::OpenOptions::new()
        .write(true)
        .open(&table)
        .unwrap();
    std::fs::remove_file(&table).unwrap();
    let text = "heading\n\
        1: 0100007F:0050 0100007F:03E8 01 00000000:00000000 00:00000000 00000000 0 0 2\n";
    std::io::Write::write_all(&mut pipe, text.as_bytes()).unwrap();
    drop(pipe);
    let output = child.wait_with_output().unwrap();
    let [out, said] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(output.status.success(), "{said}");
    let row: Vec<_> = out
        .lines()
        .nth(1)
        .unwrap()
        .split_whitespace()
        .take(4)
        .collect();
    assert_eq!(row[2..], ["ipv4", "1"], "{out}");
    assert!(
        said.contains("looks at the table failed") && said.contains(" s ago"),
        "{said}"
    );
    std::fs::remove_dir_all(root).unwrap();
}

#[test]
fn a_signal_ends_the_watch_for_a_table_at_once() {
    use std::os::unix::process::ExitStatusExt;
    let arguments = ["--once", "--duration", "600"];
    for (signal, number) in [("TERM", 15), ("INT", 2)] {
        let mut child = program::command(&arguments, &[]).spawn().unwrap();
        let kill = format!("kill -{signal} {}", child.id());
        assert!(
            Command::new("sh")
                .args(["-c", &kill])
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(child.wait().unwrap().signal(), Some(number));
    }
    // The first process of a container, which signals don't end by themselves.
    let unshare = ["-rpf", "--kill-child"];
    let may = Command::new("unshare").args(unshare).arg("true").output();
    if !may.is_ok_and(|output| output.status.success()) {
        eprintln!("unshare is not allowed here, so there was no first process");
        return;
    }
    let mut command = Command::new("unshare");
    command
        .args(unshare)
        .arg(env!("CARGO_BIN_EXE_conntrack-exporter"));
    let mut child = command.args(arguments).env_clear().spawn().unwrap();
    let children = format!("/proc/{0}/task/{0}/children", child.id());
    let end = Instant::now() + BOUND;
    let status = loop {
        // Until it hears: it may not have begun.
        let first = std::fs::read_to_string(&children).unwrap_or_default();
        if !first.trim().is_empty() {
            let kill = format!("kill -TERM {first}");
            let _ = Command::new("sh").args(["-c", &kill]).status();
        }
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < end, "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(128 + 15));
}

#[test]
fn the_example_of_a_file_is_one() {
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/examples/deploy/conntrack-exporter.conf"
    );
    let output = ended(&["--once", "--config", file, "--duration", "0"], &[]);
    assert!(output.status.success(), "{output:?}");
    // And what is a comment there is a setting too.
    let text = std::fs::read_to_string(file).unwrap();
    let is_setting = |line: &&str| {
        let line = line.strip_prefix("# ").unwrap_or_default();
        [
            "simple",
            "port 443,8080-8090,https",
            "listen 0.0.0.0:9690",
            "allow-host exporter.internal,node1",
            "rows 1000",
            "limit 2000000",
        ]
        .contains(&line)
    };
    let all = text
        .lines()
        .filter(is_setting)
        .map(|line| &line[2..])
        .collect::<Vec<_>>();
    assert_eq!(all.len(), 6, "{text}");
    let file = File::new("all.conf", &all.join("\n"));
    let output = ended(&["--once", "--conf", file.path(), "--duration", "0"], &[]);
    assert!(output.status.success(), "{output:?}");
}

/// The manifest's flags and variables are the program's; and what is built is the same everywhere.
#[test]
fn the_files_for_containers_and_services_are_the_programs() {
    let read = |name: &str| {
        let path = format!("{}/examples/deploy/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(path).unwrap()
    };
    let sidecar = read("sidecar.yaml");
    let (_, list) = sidecar.split_once("args: [").unwrap();
    let (list, _) = list.split_once(']').unwrap();
    let arguments: Vec<_> = list
        .split(',')
        .map(|one| one.trim().trim_matches('"'))
        .collect();
    assert!(arguments.contains(&"--port=3838"), "{list}");
    let (_, listen) = sidecar.split_once("name: LISTEN, value: \"").unwrap();
    let (listen, _) = listen.split_once('"').unwrap();
    let all = [&arguments[..], &["--once", "--duration", "0"]].concat();
    let output = ended(&all, &[("LISTEN", listen)]);
    assert!(output.status.success(), "{output:?}");
    let built = "--no-default-features --features exporter,otlp-tls";
    for name in ["Containerfile", "conntrack-exporter.service"] {
        assert!(read(name).contains(built), "{name}");
    }
}

/// What a sidecar listens on: one socket for both families.
#[test]
fn an_address_of_ipv6_for_all_is_one_of_ipv4_too() {
    if TcpListener::bind("[::1]:0").is_err() {
        eprintln!("this host has no IPv6");
        return;
    }
    let exporter = Exporter::start(&["--listen", "[::]:0"]);
    let port = exporter.address.port();
    for address in ["127.0.0.1", "::1"] {
        let address = (address.parse::<std::net::IpAddr>().unwrap(), port).into();
        assert_eq!(
            request(address, "GET /metrics HTTP/1.1").0,
            200,
            "{address}"
        );
    }
}

#[test]
fn documents_come_from_the_program() {
    let text = |arguments: &[&str]| {
        let output = ended(arguments, &[]);
        assert!(output.status.success(), "{arguments:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(text(&["--completions", "bash"]).contains("conntrack-exporter"));
    assert!(text(&["--man"]).contains(".TH"));
    assert_eq!(
        text(&["--version"]).trim(),
        concat!("conntrack-exporter ", env!("CARGO_PKG_VERSION"))
    );
}
