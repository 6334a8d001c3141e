//! What it costs to look at a host with many connections, against what was promised.
//!
//! ```text
//! cargo bench --bench host             # 50 000 established rows
//! cargo bench --bench host -- --quick  # 4 000, to see that it runs; bars that need the size are not held
//! ```
//!
//! The rows are both ends of real connections on the loopback. A process may not hold so many
//! descriptors, so this program starts itself several times: half of the children serve, half connect.
//! A tenth of the rows have the local port of the first server, which the filtered scan asks for.
//!
//! - Processor time is that of the scanning thread, in the kernel too; the median of the scans.
//! - Neighbours on the machine cost processor time too, by its caches. So what does the same work is
//!   measured in the same run: a dump of the kernel's table and reading `/proc/net/tcp`, both to throw
//!   away what comes, and `ss -tan`. The bar was set where those took 34, 74 and 119 ms, so it is held to
//!   a scan's time scaled by the dump's, which is most of a scan.
//! - Allocations are counted over one scan, once everything has been seen before. There are some for
//!   the snapshot's rows and the files that are read, and none more for more sockets.
//! - The exporter's memory is what the kernel says of the real program after some scrapes
//!   (`VmRSS`, the binary's own pages included). A scrape's time is told while the exporter scans.
//!
//! Each line has the figure, the bar, and whether it holds; the last line is JSON. It exits with 1 where
//! a bar does not hold.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use otel_conntrack::host::{Monitor, Scanner};
use rustix::time::{ClockId, clock_gettime};
use socket2::SockRef;

mod support;

use support::median;

struct Counting;

/// Allocations so far, of this process.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to the system's allocator as it came; the count is an atomic.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

// === children ===

/// Serves `n` connections on each of as many ports, says the ports, and `ready` once all are there.
fn serve(counts: &[usize]) {
    let bind = |_: &usize| TcpListener::bind("127.0.0.1:0").expect("a free port");
    let listeners: Vec<_> = counts.iter().map(bind).collect();
    for listener in &listeners {
        println!("{}", listener.local_addr().expect("it is bound"));
    }
    let mut held = Vec::new();
    for (listener, count) in listeners.iter().zip(counts) {
        held.extend((0..*count).map(|_| listener.accept().expect("a client").0));
    }
    println!("ready");
    until_told();
}

/// Connects so many times to each.
fn connect(to: &[(SocketAddr, usize)]) {
    let mut held = Vec::new();
    for (address, count) in to {
        for _ in 0..*count {
            let stream = TcpStream::connect(address).expect("a server");
            // Its end leaves nothing behind that others would have to walk over.
            let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            held.push(stream);
        }
    }
    println!("ready");
    until_told();
}

/// The parent closes the pipe, or is gone.
fn until_told() {
    let _ = std::io::stdin().read(&mut [0]);
}

struct Part {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Part {
    fn start(arguments: &[String]) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let lines = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, lines }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("it lives");
        line.trim().to_owned()
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// So many established rows; gives back the port that a tenth of them have as their own.
fn crowd(rows: usize) -> (Vec<Part>, u16) {
    let tenth = rows / 10;
    // Connections by server: the first has the tenth on a port of its own.
    let (one, two) = (rows / 4, rows / 2 - rows / 4);
    let counts = [vec![tenth, one - tenth], vec![two]];
    let (mut parts, mut clients, mut port) = (Vec::new(), Vec::new(), 0);
    for counts in &counts {
        let mut arguments = vec!["--serve".to_owned()];
        arguments.extend(counts.iter().map(ToString::to_string));
        let mut server = Part::start(&arguments);
        let mut arguments = vec!["--connect".to_owned()];
        for count in counts {
            let address: SocketAddr = server.line().parse().expect("an address");
            if port == 0 {
                port = address.port();
            }
            arguments.push(format!("{address}={count}"));
        }
        parts.push(server);
        clients.push(Part::start(&arguments));
    }
    parts.extend(clients);
    for part in &mut parts {
        assert_eq!(part.line(), "ready");
    }
    (parts, port)
}

// === figures ===

/// Milliseconds that this thread has kept a processor busy.
fn processor() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
}

/// Asks the kernel for both families, as sock_diag(7) has it, and does nothing with the answer.
fn dump() -> usize {
    use rustix::net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send,
        socket_with,
    };
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(netlink::SOCK_DIAG),
    );
    let socket = socket.expect("the kernel answers");
    let (mut buffer, mut length) = (vec![0; 32 * 1024], 0);
    for family in [2, 10] {
        let mut request = [0; 72];
        let mut put =
            |at: usize, value: &[u8]| request[at..at + value.len()].copy_from_slice(value);
        put(0, &72_u32.to_ne_bytes());
        // SOCK_DIAG_BY_FAMILY; NLM_F_REQUEST | NLM_F_DUMP.
        put(4, &20_u16.to_ne_bytes());
        put(6, &0x301_u16.to_ne_bytes());
        put(16, &[family, 6]);
        put(20, &u32::MAX.to_ne_bytes());
        send(&socket, &request, SendFlags::empty()).expect("it is asked");
        loop {
            let (part, _) = recv(&socket, &mut *buffer, RecvFlags::empty()).expect("it answers");
            length += part;
            // NLMSG_DONE.
            if buffer[4..6] == 3_u16.to_ne_bytes() {
                break;
            }
        }
    }
    length
}

/// Milliseconds of processor time that `ss -tan` takes.
fn ss() -> Option<f64> {
    let children = || {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        let (_, fields) = stat.rsplit_once(')')?;
        let ticks = |n| fields.split_whitespace().nth(n)?.parse::<f64>().ok();
        // Hundredths of a second.
        Some((ticks(13)? + ticks(14)?) * 10.0)
    };
    let before = children()?;
    let run = || {
        let mut ss = Command::new("ss");
        ss.arg("-tan").stdout(Stdio::null()).status().ok()
    };
    const TIMES: u8 = 4;
    for _ in 0..TIMES {
        run()?;
    }
    Some((children()? - before) / f64::from(TIMES))
}

/// The median, and the best and the worst, of a call's processor time.
fn time(times: usize, mut call: impl FnMut()) -> (f64, f64, f64) {
    let mut took: Vec<_> = (0..times)
        .map(|_| {
            let begin = processor();
            call();
            processor() - begin
        })
        .collect();
    let (middle, ..) = median(&mut took);
    (middle, took[0], took[times - 1])
}

struct Report {
    quick: bool,
    json: Vec<String>,
    broken: bool,
}

impl Report {
    /// `bar`: at most; none where it is not promised, or not of this size.
    fn line(&mut self, what: &str, value: f64, unit: &str, bar: Option<f64>) {
        let verdict = match bar {
            None => String::new(),
            Some(bar) if value <= bar => format!("bar {bar} {unit}: holds"),
            Some(bar) => {
                self.broken = true;
                format!("bar {bar} {unit}: DOES NOT HOLD")
            }
        };
        println!("{what:<44} {value:>10.3} {unit:<6} {verdict}");
        self.json.push(format!("{what:?}: {value:.3}"));
    }

    fn of_size(&self, bar: f64) -> Option<f64> {
        (!self.quick).then_some(bar)
    }
}

fn scanner(port: Option<u16>, netlink: bool) -> Scanner {
    let mut settings = Monitor::builder().netlink(netlink);
    if let Some(port) = port {
        settings = settings.ports(port.to_string().parse().expect("a port"));
    }
    settings.scanner().expect("nothing is wrong with it")
}

fn scan(scanner: &mut Scanner) -> u64 {
    scanner.scan().expect("the table is there").established()
}

/// Gives back how long a scan takes.
fn scans(report: &mut Report, rows: usize, port: u16) -> f64 {
    let times = if report.quick { 5 } else { 21 };
    let mut full = scanner(None, true);
    let mut some = scanner(Some(port), true);
    let mut proc = scanner(None, false);
    let there = scan(&mut full);
    assert!(there >= rows as u64, "{there} of {rows} rows");
    assert_eq!(scan(&mut some), rows as u64 / 10);
    scan(&mut proc);

    let (whole, best, worst) = time(times, || assert!(scan(&mut full) >= rows as u64));
    println!("{there} established rows; a scan's best {best:.1} ms, worst {worst:.1} ms");
    report.line("one scan", whole, "ms", None);
    let (bare, ..) = time(times, || assert!(dump() >= rows * 88));
    let bar = report.of_size(45.0);
    let scaled = whole * 34.0 / bare;
    report.line(
        "  scaled to where a bare dump takes 34 ms",
        scaled,
        "ms",
        bar,
    );
    report.line("a bare dump", bare, "ms", None);
    if let Some(ss) = ss() {
        let scaled = whole * 119.0 / ss;
        report.line("  scaled to where ss -tan takes 119 ms", scaled, "ms", None);
        report.line("ss -tan", ss, "ms", None);
    }
    let (filtered, ..) = time(times, || {
        assert_eq!(scan(&mut some), rows as u64 / 10);
    });
    report.line("one scan of a tenth, by port", filtered, "ms", None);
    let third = report.of_size(1.0 / 3.0);
    report.line("  that of the whole", filtered / whole, "", third);
    let (bare, ..) = time(times.min(5), || {
        let mut file = std::fs::File::open("/proc/net/tcp").expect("it is Linux");
        let mut buffer = vec![0; 1 << 16];
        while file.read(&mut buffer).expect("it can be read") > 0 {}
    });
    report.line("reading /proc/net/tcp and nothing else", bare, "ms", None);
    let (by_proc, ..) = time(times.min(5), || {
        scan(&mut proc);
    });
    report.line("one scan of /proc/net/tcp", by_proc, "ms", None);

    let allocations = |scanner: &mut Scanner| {
        let before = ALLOCATIONS.load(Relaxed);
        scan(scanner);
        (ALLOCATIONS.load(Relaxed) - before) as f64
    };
    let (few, many) = (allocations(&mut some), allocations(&mut full));
    report.line("allocations of a scan of a tenth", few, "", None);
    // A row of the snapshot may be one more, and a list of rows that grows.
    let more = few + 20.0;
    report.line("allocations of a scan of all", many, "", Some(more));
    let scan = full.scan().expect("the table is there").scan;
    let each = scan.tracked_bytes as f64 / scan.tracked as f64;
    report.line("bytes kept per socket", each, "B", Some(64.0));
    whole
}

fn looks(report: &mut Report) {
    let monitor = Monitor::builder()
        .period(Duration::from_millis(100))
        .start()
        .expect("it scans");
    let (mut worst, mut looks, first) = (Duration::ZERO, 0_u64, monitor.scans());
    while monitor.scans() < first + 10 {
        let begin = Instant::now();
        std::hint::black_box(monitor.snapshot());
        worst = worst.max(begin.elapsed());
        looks += 1;
    }
    let took = monitor.snapshot().scan.took;
    println!(
        "{looks} looks during 10 scans, of {:.1} ms the last",
        took.as_secs_f64() * 1e3
    );
    // A scheduler's slice is in it: two processors, three busy threads.
    report.line(
        "the longest look at a snapshot",
        worst.as_secs_f64() * 1e3,
        "ms",
        None,
    );
}

fn exporter(report: &mut Report, rows: usize, scan: f64) {
    let Some(program) = option_env!("CARGO_BIN_EXE_conntrack-exporter") else {
        println!("the exporter was not built: its memory is not measured");
        return;
    };
    let mut child = Command::new(program)
        .args(["--listen", "127.0.0.1:0"])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the exporter");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    let address = loop {
        let line = lines
            .next()
            .expect("it says where it listens")
            .expect("text");
        if let Some((_, address)) = line.split_once("http://") {
            break address.trim_end_matches('/').to_owned();
        }
    };
    let mut took = Vec::new();
    let begin = Instant::now();
    // Some periods long, so scans are under way now and then.
    while begin.elapsed() < Duration::from_secs(if report.quick { 2 } else { 8 }) {
        let begin = Instant::now();
        let mut stream = TcpStream::connect(&address).expect("it listens");
        let request =
            format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("it answers");
        took.push(begin.elapsed().as_secs_f64() * 1e3);
        assert!(
            text.contains("netstat_tcp_longterm_connections_total"),
            "{text}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id()));
    let status = status.unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    let _ = child.kill();
    let _ = child.wait();
    report.line(
        "the exporter's memory",
        kib.expect("it lives") / 1_024.0,
        "MiB",
        Some(20.0),
    );
    let (middle, ..) = median(&mut took);
    println!("{} scrapes with {rows} rows", took.len());
    report.line("a scrape, with its connect, the median", middle, "ms", None);
    // One that waited for a scan would take as long.
    let longest = took[took.len() - 1];
    report.line("  the longest", longest, "ms", report.of_size(scan.round()));
}

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((role, counts)) if role == "--serve" => {
            let counts: Vec<_> = counts
                .iter()
                .map(|n| n.parse().expect("a number"))
                .collect();
            return serve(&counts);
        }
        Some((role, to)) if role == "--connect" => {
            let one = |to: &String| {
                let (address, count) = to.split_once('=').expect("address=count");
                (
                    address.parse().expect("an address"),
                    count.parse().expect("a number"),
                )
            };
            return connect(&to.iter().map(one).collect::<Vec<_>>());
        }
        _ => {}
    }
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let rows = if quick { 4_000 } else { 50_000 };
    let mut report = Report {
        quick,
        json: Vec::new(),
        broken: false,
    };
    let (parts, port) = crowd(rows);
    let scan = scans(&mut report, rows, port);
    looks(&mut report);
    exporter(&mut report, rows, scan);
    drop(parts);
    println!("{{{}}}", report.json.join(", "));
    if report.broken {
        std::process::exit(1);
    }
}
