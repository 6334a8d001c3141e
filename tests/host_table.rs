//! The host's table against real sockets: what is counted, by what, since when, and what becomes of it
//! when a table is torn, wrong or away.
//!
//! Each test looks at ports of its own, so other programs on this host don't matter.
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a test may panic, in its helpers too"
)]
#![cfg(all(feature = "host", target_os = "linux"))]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use otel_conntrack::host::{
    Connections, GroupBy, IpVersion, Monitor, MonitorBuilder, Ports, Scanner, Snapshot, Source,
};
use otel_conntrack::{Direction, TcpState};

#[path = "support/alone.rs"]
mod alone;

/// A server, its clients, and both ends of each connection.
struct Server {
    listener: TcpListener,
    _alone: Option<socket2::Socket>,
    ends: Vec<(TcpStream, TcpStream)>,
}

impl Server {
    /// None where the host lacks the family.
    fn start(address: &str, clients: usize) -> Option<Self> {
        let (listener, _alone) = alone::listen(address)?;
        let mut server = Self {
            listener,
            _alone,
            ends: Vec::new(),
        };
        let to = server.address();
        (0..clients).for_each(|_| server.connect(to));
        Some(server)
    }

    fn v4(clients: usize) -> Self {
        Self::start("127.0.0.1:0", clients).unwrap()
    }

    fn connect(&mut self, to: SocketAddr) {
        let client = TcpStream::connect(to).unwrap();
        self.ends.push((client, self.listener.accept().unwrap().0));
    }

    fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    fn port(&self) -> u16 {
        self.address().port()
    }

    fn settings(&self) -> MonitorBuilder {
        Monitor::builder().ports(Ports::new([self.port()..=self.port()]).unwrap())
    }
}

fn scan(scanner: &mut Scanner) -> Snapshot {
    scanner.scan().unwrap()
}

fn once(settings: MonitorBuilder) -> Snapshot {
    scan(&mut settings.scanner().unwrap())
}

/// The row of a direction and port, whatever else is on this host.
fn row(snapshot: &Snapshot, direction: Direction, port: u16) -> Option<&Connections> {
    let mut rows = snapshot.connections.iter();
    rows.find(|row| row.direction == direction && row.port == Some(port))
}

fn inbound(snapshot: &Snapshot, port: u16) -> u64 {
    row(snapshot, Direction::Inbound, port).map_or(0, |row| row.established)
}

/// Looks again and again; a bound says when it is too late.
#[track_caller]
fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "it never came");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn both_ends_are_counted_by_the_servers_port_in_and_out() {
    let server = Server::v4(5);
    // A wide filter has the clients' ends too.
    for ports in [Ports::ALL, "1024-65535".parse().unwrap()] {
        let snapshot = once(Monitor::builder().ports(ports));
        for direction in [Direction::Inbound, Direction::Outbound] {
            let row = row(&snapshot, direction, server.port()).unwrap();
            assert_eq!((row.established, row.ip), (5, IpVersion::V4), "{row:?}");
        }
        // The clients' own ports, which the kernel chose, are nowhere.
        for (client, _) in &server.ends {
            let port = client.local_addr().unwrap().port();
            assert_eq!(row(&snapshot, Direction::Outbound, port), None);
            assert_eq!(row(&snapshot, Direction::Inbound, port), None);
        }
    }
}

#[test]
fn the_kernels_filter_both_tables_and_ss_agree() {
    let (mut server, other) = (Server::v4(7), Server::v4(3));
    let closed = server.ends.pop().unwrap();
    drop(closed);
    let port = server.port();
    let by = |netlink| {
        let snapshot = once(server.settings().netlink(netlink));
        assert_eq!(snapshot.scan.source == Source::Netlink, netlink);
        assert_eq!(inbound(&snapshot, other.port()), 0);
        assert_eq!(snapshot.connections.len(), 1, "{:?}", snapshot.connections);
        (inbound(&snapshot, port), snapshot.established())
    };
    assert_eq!(by(true), (6, 6));
    assert_eq!(by(false), (6, 6));
    let filter = format!("sport = :{port}");
    let ss = Command::new("ss")
        .args(["-Htn", "state", "established", &filter])
        .output();
    match ss {
        Ok(ss) => assert_eq!(String::from_utf8_lossy(&ss.stdout).lines().count(), 6),
        Err(error) => eprintln!("ss is not there, so it was not asked: {error}"),
    }
}

#[test]
fn ranges_of_ports_reach_the_kernel() {
    let (one, two) = (Server::v4(1), Server::v4(2));
    let mut ports = [one.port(), two.port()];
    ports.sort_unstable();
    let text = format!("{},{}-{},1-2", ports[0], ports[1], ports[1]);
    let snapshot = once(Monitor::builder().ports(text.parse().unwrap()));
    assert_eq!(
        (
            inbound(&snapshot, one.port()),
            inbound(&snapshot, two.port())
        ),
        (1, 2)
    );
    assert_eq!(snapshot.established(), 3);
}

/// Bug 1 of the seed: what is IPv6 was told as IPv4.
#[test]
fn ipv6_is_ipv6_and_ipv4_over_an_ipv6_socket_is_ipv4() {
    let Some(six) = Server::start("[::1]:0", 2) else {
        eprintln!("this host has no IPv6");
        return;
    };
    for netlink in [true, false] {
        let snapshot = once(six.settings().netlink(netlink));
        let row = row(&snapshot, Direction::Inbound, six.port()).unwrap();
        assert_eq!((row.established, row.ip), (2, IpVersion::V6));
        assert_eq!(
            once(six.settings().netlink(netlink).ipv6(false)).established(),
            0
        );
    }
    let Some(mut both) = Server::start("[::]:0", 0) else {
        return;
    };
    let mapped = SocketAddr::new("127.0.0.1".parse().unwrap(), both.port());
    both.connect(mapped);
    for ipv6 in [true, false] {
        let snapshot = once(both.settings().ipv6(ipv6));
        let row = row(&snapshot, Direction::Inbound, both.port()).unwrap();
        assert_eq!((row.established, row.ip), (1, IpVersion::V4));
    }
}

/// Bugs 3 and 4 of the seed: two peers with one name were one. Nothing is looked up here (bug 2).
#[test]
fn peers_are_told_by_their_addresses() {
    let server = Server::v4(0);
    let from = |ip: &str| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        let socket = socket.unwrap();
        socket
            .bind(&format!("{ip}:0").parse::<SocketAddr>().unwrap().into())
            .unwrap();
        socket.connect(&server.address().into()).unwrap();
        (socket, server.listener.accept().unwrap())
    };
    let _ends = [from("127.0.0.1"), from("127.0.0.2"), from("127.0.1.1")];
    let by = GroupBy::Subnet { v4: 24, v6: 64 };
    let snapshot = once(server.settings().group_by(by));
    let groups: Vec<_> = snapshot
        .connections
        .iter()
        .map(|row| (row.group.as_deref().unwrap(), row.established))
        .collect();
    assert_eq!(groups, [("127.0.0.0/24", 2), ("127.0.1.0/24", 1)]);
}

#[test]
fn the_cgroup_is_the_one_of_who_made_the_socket() {
    let server = Server::v4(1);
    let snapshot = once(server.settings().group_by(GroupBy::Cgroup));
    let group = snapshot.connections[0].group.clone().unwrap();
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::"));
    let mounted = std::fs::read_to_string("/proc/self/mountinfo")
        .is_ok_and(|mounts| mounts.contains(" - cgroup2 "));
    match own {
        Some(path) if mounted && group.starts_with('/') => assert_eq!(&*group, path),
        // Older than 5.9, no cgroups of version 2, or not to be seen from here.
        _ => assert!(
            *group == *"unknown" || group.starts_with("cgroup:"),
            "{group}"
        ),
    }
}

/// Bug of the seed: its `duration` counted looks, not seconds.
#[test]
fn long_term_is_a_matter_of_seconds_not_of_looks() {
    let server = Server::v4(3);
    let duration = Duration::from_millis(300);
    let mut scanner = server.settings().duration(duration).scanner().unwrap();
    let begun = Instant::now();
    let mut looks = 0_u32;
    let age = until(|| {
        let snapshot = scan(&mut scanner);
        looks += 1;
        let row = row(&snapshot, Direction::Inbound, server.port())
            .unwrap()
            .clone();
        assert_eq!(row.ages.iter().sum::<u64>(), 3);
        assert!(row.oldest <= begun.elapsed());
        assert_eq!(row.long_term > 0, row.oldest >= duration, "{row:?}");
        (row.long_term == 3).then_some(row.oldest)
    });
    assert!(looks > 1 && age >= duration && begun.elapsed() >= duration);
}

#[test]
fn the_accept_queue_is_told_by_port() {
    let server = Server::v4(0);
    let _clients: Vec<_> = (0..3)
        .map(|_| TcpStream::connect(server.address()).unwrap())
        .collect();
    let snapshot = once(server.settings());
    let listening = snapshot.listening[..].first().unwrap();
    assert_eq!((listening.port, listening.length), (Some(server.port()), 3));
    assert!(listening.limit.is_some_and(|limit| limit >= 3));
    // Not accepted yet, and open for their clients.
    assert_eq!(inbound(&snapshot, server.port()), 3);
    let states = |state| {
        let rows = snapshot.states.iter().filter(|(found, ..)| *found == state);
        rows.map(|(.., count)| count).sum::<u64>()
    };
    assert_eq!(
        (states(TcpState::Listen), states(TcpState::Established)),
        (1, 3)
    );
    // /proc says less.
    let listening = once(server.settings().netlink(false)).listening[0];
    assert_eq!((listening.length, listening.limit), (3, None));
}

#[test]
fn what_is_the_watchers_own_is_left_out_with_its_other_end() {
    let (own, other) = (Server::v4(2), Server::v4(1));
    let snapshot = once(Monitor::builder().leave_out_port(own.port()));
    for direction in [Direction::Inbound, Direction::Outbound] {
        assert_eq!(row(&snapshot, direction, own.port()), None);
        assert!(row(&snapshot, direction, other.port()).is_some());
    }
    assert!(
        snapshot
            .listening
            .iter()
            .all(|row| row.port != Some(own.port()))
    );
    // All of this process's.
    let snapshot = once(other.settings().leave_out_self(true));
    assert_eq!((snapshot.established(), snapshot.listening.len()), (0, 0));
}

/// Bug 7 of the seed: series of what is gone stayed for ever.
#[test]
fn what_is_gone_is_gone_and_a_drained_server_keeps_its_direction() {
    let mut server = Server::v4(4);
    let mut scanner = Monitor::builder().scanner().unwrap();
    assert_eq!(inbound(&scan(&mut scanner), server.port()), 4);
    let (port, ends) = (server.port(), std::mem::take(&mut server.ends));
    drop(server);
    // Nobody listens there any more; they are still what they were.
    let snapshot = scan(&mut scanner);
    assert_eq!(inbound(&snapshot, port), 4);
    drop(ends);
    until(|| {
        let snapshot = scan(&mut scanner);
        let rows =
            [Direction::Inbound, Direction::Outbound].map(|d| row(&snapshot, d, port).is_some());
        (rows == [false; 2]).then_some(())
    });
}

#[test]
fn rows_are_bounded_and_the_rest_is_summed() {
    let servers: Vec<_> = (0..12).map(|_| Server::v4(2)).collect();
    let ports = servers.iter().map(|server| server.port()..=server.port());
    let settings = Monitor::builder().ports(Ports::new(ports).unwrap()).rows(5);
    let snapshot = once(settings);
    assert_eq!(
        (snapshot.connections.len(), snapshot.established()),
        (6, 24)
    );
    assert_eq!(snapshot.connections.last().unwrap().port, None);
    assert_eq!(snapshot.connections.last().unwrap().established, 14);
}

#[test]
fn beyond_the_limit_is_counted_and_nothing_else_suffers() {
    let server = Server::v4(5);
    let snapshot = once(server.settings().limit(3));
    assert_eq!((snapshot.established(), snapshot.scan.untracked), (3, 2));
}

#[test]
fn a_monitor_sees_what_comes_and_goes_and_never_makes_one_wait() {
    let mut server = Server::v4(1);
    let settings = server.settings().period(Duration::from_millis(100));
    let monitor = settings.start().unwrap();
    let port = server.port();
    assert_eq!(inbound(&monitor.snapshot(), port), 1);
    let to = server.address();
    server.connect(to);
    until(|| (inbound(&monitor.snapshot(), port) == 2).then_some(()));
    server.ends.clear();
    until(|| (inbound(&monitor.snapshot(), port) == 0).then_some(()));
    // The last clone ends the thread, which has nothing to say any more.
    let (latest, clone) = (monitor.snapshot(), monitor.clone());
    drop(monitor);
    until(|| (!Arc::ptr_eq(&latest, &clone.snapshot())).then_some(()));
    assert_eq!(
        (clone.torn_scans(), clone.failed_scans(), clone.failure()),
        (0, 0, None)
    );
    drop(clone);
    let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = threads.filter_map(|t| std::fs::read_to_string(t.path().join("comm")).ok());
    // Other tests of this program may have one of their own.
    assert!(names.filter(|name| name.trim() == "conntrack-host").count() < 4);
}

// === tables that are wrong ===

/// A `/proc` of our own.
struct Proc(PathBuf);

const HEADING: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

/// `127.0.0.1:local` to `127.0.0.1:peer`.
fn line(local: u16, peer: u16, state: u8, inode: u32) -> String {
    format!(
        "   0: 0100007F:{local:04X} 0100007F:{peer:04X} {state:02X} 00000000:00000000 00:00000000 00000000  0 0 {inode} 1 0 100 0 0 10 0\n"
    )
}

impl Proc {
    fn new(test: &str) -> Self {
        let name = format!("conntrack-proc-{}-{test}", std::process::id());
        let root = std::env::temp_dir().join(name);
        std::fs::create_dir_all(root.join("net")).unwrap();
        Self(root)
    }

    fn write(&self, lines: &[String]) {
        let text = format!("{HEADING}{}", lines.concat());
        std::fs::write(self.0.join("net/tcp"), text).unwrap();
    }

    fn scanner(&self) -> Scanner {
        let settings = Monitor::builder()
            .duration(Duration::ZERO)
            .proc_root(&self.0);
        settings.scanner().unwrap()
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Bug 5 of the seed: a read that failed set all ages to 0.
#[test]
fn a_table_that_can_not_be_read_costs_no_age() {
    let proc = Proc::new("away");
    let lines = [line(80, 0, 10, 1), line(80, 1000, 1, 2)];
    proc.write(&lines);
    let mut scanner = proc.scanner();
    let begun = Instant::now();
    assert_eq!(inbound(&scan(&mut scanner), 80), 1);
    let first = Instant::now();
    std::fs::remove_file(proc.0.join("net/tcp")).unwrap();
    for _ in 0..20 {
        let error = scanner.scan().unwrap_err();
        assert!(error.to_string().contains("net/tcp"), "{error}");
    }
    proc.write(&lines);
    let least = first.elapsed();
    let snapshot = scan(&mut scanner);
    let oldest = row(&snapshot, Direction::Inbound, 80).unwrap().oldest;
    // Milliseconds are what is kept.
    assert!(
        oldest + Duration::from_millis(2) >= least && oldest <= begun.elapsed(),
        "{oldest:?}"
    );
    until(|| {
        let snapshot = scan(&mut scanner);
        (row(&snapshot, Direction::Inbound, 80)?.oldest >= Duration::from_millis(50)).then_some(())
    });
}

/// go-netstat gave the whole table up for one line, and panicked at a state that it did not know.
#[test]
fn lines_that_make_no_sense_are_skipped_and_counted() {
    let proc = Proc::new("malformed");
    let good = [
        line(80, 0, 10, 1),
        line(80, 1000, 1, 2),
        line(80, 1001, 1, 3),
    ];
    let mut lines = good.to_vec();
    lines.insert(1, "   1: 0100007F:0050 0100007F\n".to_owned());
    lines.insert(2, "\u{0}\u{1}nothing like it\n".to_owned());
    lines.insert(3, format!("{}\n", "x".repeat(500)));
    // NEW_SYN_RECV, and a state that there is not.
    lines.push(line(80, 1002, 12, 4));
    lines.push(line(80, 1003, 0xff, 5));
    // Cut off.
    lines.push(line(80, 1004, 1, 6)[..60].to_owned());
    proc.write(&lines);
    let mut scanner = proc.scanner();
    let snapshot = scan(&mut scanner);
    assert_eq!(inbound(&snapshot, 80), 2);
    assert_eq!((snapshot.scan.malformed, snapshot.scan.rows), (4, 5));
    assert!(
        snapshot
            .scan
            .torn
            .as_ref()
            .is_some_and(|why| why.contains("4 rows"))
    );
    // What is missing where rows could not be read is counted as it was: it may be one of them.
    lines.retain(|line| *line != good[2]);
    proc.write(&lines);
    let snapshot = scan(&mut scanner);
    assert_eq!((inbound(&snapshot, 80), snapshot.scan.malformed), (2, 8));
    // A whole look that misses it is believed.
    proc.write(&good[..2]);
    let snapshot = scan(&mut scanner);
    assert_eq!((inbound(&snapshot, 80), snapshot.scan.torn), (1, None));
}

#[test]
fn a_port_that_was_asked_for_is_a_servers_though_nobody_listens_any_more() {
    let proc = Proc::new("asked");
    // 80 is nobody's choice but a server's; 40000 may be a client's.
    proc.write(&[line(80, 1000, 1, 2), line(40_000, 443, 1, 3)]);
    let settings = Monitor::builder().proc_root(&proc.0);
    let snapshot = once(settings.clone().ports("80,40000".parse().unwrap()));
    assert_eq!(inbound(&snapshot, 80), 1);
    let client = row(&snapshot, Direction::Outbound, 443).map(|row| row.established);
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let range: Vec<u16> = range
        .split_whitespace()
        .map(|port| port.parse().unwrap())
        .collect();
    assert_eq!(client.is_some(), (range[0]..=range[1]).contains(&40_000));
    // Not asked for, so nothing speaks for a server.
    assert_eq!(inbound(&once(settings), 80), 0);
}

#[test]
fn a_port_that_is_used_again_begins_anew() {
    let proc = Proc::new("again");
    proc.write(&[line(80, 0, 10, 1), line(80, 1000, 1, 2)]);
    let mut scanner = proc.scanner();
    scan(&mut scanner);
    until(|| {
        let snapshot = scan(&mut scanner);
        (row(&snapshot, Direction::Inbound, 80)?.oldest >= Duration::from_millis(5)).then_some(())
    });
    proc.write(&[line(80, 0, 10, 1), line(80, 1000, 1, 3)]);
    let snapshot = scan(&mut scanner);
    let row = row(&snapshot, Direction::Inbound, 80).unwrap();
    assert_eq!((row.established, row.oldest), (1, Duration::ZERO));
}

#[test]
fn the_network_of_the_first_process_goes_before_the_readers_own() {
    let proc = Proc::new("first");
    proc.write(&[line(80, 0, 10, 1)]);
    std::fs::create_dir_all(proc.0.join("1/net")).unwrap();
    let text = format!("{HEADING}{}{}", line(81, 0, 10, 1), line(81, 9, 1, 2));
    std::fs::write(proc.0.join("1/net/tcp"), text).unwrap();
    let snapshot = scan(&mut proc.scanner());
    assert_eq!((inbound(&snapshot, 81), snapshot.listening.len()), (1, 1));
    assert_eq!(snapshot.scan.source, Source::Proc);
    // What is not there is not told.
    assert_eq!(snapshot.tcp.retransmits, None);
}

/// In a real `/proc` its `net` is that of who looks: nobody asked for that one.
#[test]
fn a_first_process_that_is_hidden_is_an_error_and_not_the_readers_own_network() {
    let proc = Proc::new("hidden");
    proc.write(&[line(80, 0, 10, 1)]);
    std::fs::rename(proc.0.join("net"), proc.0.join("self-net")).unwrap();
    std::os::unix::fs::symlink("self-net", proc.0.join("net")).unwrap();
    let start = || Monitor::builder().proc_root(&proc.0).start();
    let error = start().unwrap_err().to_string();
    assert!(error.contains("1/net/tcp"), "{error}");
    // Seen, and still not to be read.
    std::fs::create_dir(proc.0.join("1")).unwrap();
    let error = start().unwrap_err().to_string();
    assert!(error.contains("1/net/tcp"), "{error}");
}

#[test]
fn a_file_that_is_no_table_is_an_error_and_costs_no_age() {
    let proc = Proc::new("other");
    let lines = [line(80, 0, 10, 1), line(80, 1000, 1, 2)];
    proc.write(&lines);
    let mut scanner = proc.scanner();
    assert_eq!(inbound(&scan(&mut scanner), 80), 1);
    let first = Instant::now();
    for other in ["", "nothing like it\n"] {
        std::fs::write(proc.0.join("net/tcp"), other).unwrap();
        let error = scanner.scan().unwrap_err().to_string();
        assert!(error.contains("does not begin as"), "{error}");
    }
    proc.write(&lines);
    let least = first.elapsed();
    let snapshot = scan(&mut scanner);
    let row = row(&snapshot, Direction::Inbound, 80).unwrap();
    assert!(row.oldest + Duration::from_millis(2) >= least);
    // Half of the table is no whole one.
    std::fs::write(proc.0.join("net/tcp6"), "").unwrap();
    let snapshot = scan(&mut scanner);
    assert_eq!(inbound(&snapshot, 80), 1);
    assert!(snapshot.scan.torn.is_some());
}

#[test]
fn nothing_to_read_is_an_error_at_once() {
    let proc = Proc::new("nothing");
    let error = Monitor::builder().proc_root(&proc.0).start().unwrap_err();
    assert!(error.to_string().contains("net/tcp"), "{error}");
}
