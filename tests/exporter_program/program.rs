//! The real program in a process of its own, and what it says.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

pub const BOUND: Duration = Duration::from_secs(30);

/// The program, without any variable of this process that it would take for a setting.
pub fn command(arguments: &[&str], variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_conntrack-exporter"));
    command
        .args(arguments)
        .env_clear()
        .envs(variables.iter().copied());
    command
}

/// Runs it to its end.
pub fn ended(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    command(arguments, variables)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// It runs, on a free port of 127.0.0.1 unless told otherwise.
pub struct Exporter {
    child: Child,
    pub address: SocketAddr,
    lines: Option<std::io::Lines<BufReader<std::process::ChildStderr>>>,
}

impl Exporter {
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_with(arguments, &[])
    }

    #[allow(
        clippy::zombie_processes,
        reason = "one that says nothing fails the test"
    )]
    pub fn start_with(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let listens = |argument: &&str| argument.contains("listen");
        let listen: &[&str] = if arguments.iter().any(listens) || !variables.is_empty() {
            &[]
        } else {
            &["--listen", "0"]
        };
        let all = [arguments, listen].concat();
        let mut child = command(&all, variables)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = String::new();
        loop {
            let line = lines
                .next()
                .unwrap_or_else(|| panic!("it ended: {said}"))
                .unwrap();
            if let Some((_, address)) = line.split_once("listening on http://") {
                let address = address.trim_end_matches('/').parse().unwrap();
                return Self {
                    child,
                    address,
                    lines: Some(lines),
                };
            }
            said.push_str(&line);
        }
    }

    /// Nobody reads what it says from here on.
    pub fn mute(&mut self) {
        self.lines = None;
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The status and the body; the head too.
    pub fn get(&self, path: &str) -> (u16, String, String) {
        request(self.address, &format!("GET {path} HTTP/1.1"))
    }

    pub fn scrape(&self) -> Scrape {
        let (status, _, text) = self.get("/metrics");
        assert_eq!(status, 200, "{text}");
        Scrape(text)
    }

    /// Scrapes until it is so.
    #[track_caller]
    pub fn until<T>(&self, what: &str, mut is: impl FnMut(&Scrape) -> Option<T>) -> T {
        let end = Instant::now() + BOUND;
        loop {
            let scrape = self.scrape();
            if let Some(found) = is(&scrape) {
                return found;
            }
            assert!(Instant::now() < end, "{what}: {}", scrape.0);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn signal(&self, signal: &str) {
        let kill = format!("kill -{signal} {}", self.id());
        assert!(
            Command::new("sh")
                .args(["-c", &kill])
                .status()
                .unwrap()
                .success()
        );
    }

    /// Waits for its end; what it said since it began to listen.
    pub fn wait(mut self) -> (ExitStatus, String) {
        let end = Instant::now() + BOUND;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < end, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        let said = self
            .lines
            .take()
            .into_iter()
            .flatten()
            .map_while(Result::ok)
            .collect::<Vec<_>>();
        (status, said.join("\n"))
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn request(address: SocketAddr, line: &str) -> (u16, String, String) {
    request_with(address, line, "Host: localhost\r\n")
}

/// With these headers.
pub fn request_with(address: SocketAddr, line: &str, headers: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(BOUND)).unwrap();
    let request = format!("{line}\r\n{headers}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_owned(), body.to_owned())
}

/// The text format.
pub struct Scrape(pub String);

impl Scrape {
    /// The series of this name: labels and value.
    pub fn series(&self, name: &str) -> Vec<(BTreeMap<String, String>, f64)> {
        let line = |line: &str| {
            let rest = line.strip_prefix(name)?;
            let (labels, value) = match rest.strip_prefix('{') {
                Some(rest) => rest.split_once("} ")?,
                None => ("", rest.strip_prefix(' ')?),
            };
            let pair = |pair: &str| {
                let (key, value) = pair.split_once("=\"").unwrap();
                (key.to_owned(), value.trim_end_matches('"').to_owned())
            };
            let labels = labels
                .split("\",")
                .filter(|pair| !pair.is_empty())
                .map(pair);
            Some((labels.collect(), value.parse().unwrap()))
        };
        self.0.lines().filter_map(line).collect()
    }

    /// The one with these labels, whatever others it has.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let has = |found: &BTreeMap<String, String>| {
            labels
                .iter()
                .all(|(key, value)| found.get(*key).is_some_and(|it| it == value))
        };
        let mut series = self
            .series(name)
            .into_iter()
            .filter(|(found, _)| has(found));
        let value = series.next().map(|(_, value)| value);
        assert!(
            series.next().is_none(),
            "{name} {labels:?} is there twice: {}",
            self.0
        );
        value
    }
}

/// A server and its clients, both ends held.
pub struct Server {
    pub listener: TcpListener,
    _alone: Option<socket2::Socket>,
    pub ends: Vec<(TcpStream, TcpStream)>,
}

impl Server {
    /// None where the host lacks the family.
    pub fn start(address: &str, clients: usize) -> Option<Self> {
        let (listener, _alone) = crate::alone::listen(address)?;
        let mut server = Self {
            listener,
            _alone,
            ends: Vec::new(),
        };
        (0..clients).for_each(|_| server.connect());
        Some(server)
    }

    pub fn connect(&mut self) {
        let client = TcpStream::connect(self.listener.local_addr().unwrap()).unwrap();
        self.ends.push((client, self.listener.accept().unwrap().0));
    }

    pub fn port(&self) -> String {
        self.listener.local_addr().unwrap().port().to_string()
    }
}

/// A file that is gone with the test.
pub struct File(PathBuf);

impl File {
    pub fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("conntrack-{}-{name}", std::process::id()));
        std::fs::write(&path, text).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
