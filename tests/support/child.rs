//! A test that runs a part of itself in a process of its own: for real environment variables, and for how a process ends.
//!
//! The child is this very test binary, told to run one test. That test looks at [`role`] first: none means that it is the
//! parent.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "compiled into every test that includes it, and each uses a part"
)]

use std::ffi::OsStr;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::Command;

const ROLE: &str = "CONNTRACK_TEST_ROLE";
const LEAVING: &str = "== leaving ==";

/// What this process is to be, if it is a child.
pub fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// Called by a child right before its part is over: from here on its end is timed.
pub fn leaving() {
    println!("{LEAVING}");
}

/// How a child ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    /// From [`leaving`] to the end.
    pub took: Option<Duration>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// Fails, with all that the child said, if it did.
    #[track_caller]
    pub fn well(self) -> Self {
        assert!(self.status.success(), "{self:#?}");
        self
    }
}

/// Runs the test of this name in a child with these variables and none of OpenTelemetry's else; kills it and fails if it
/// takes longer.
pub fn run<V: AsRef<OsStr> + Copy>(
    test: &str,
    role: &str,
    variables: &[(&str, V)],
    bound: Duration,
) -> Ended {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    let inherited = std::env::vars_os().map(|(name, _)| name);
    for name in inherited.filter(|name| name.to_string_lossy().starts_with("OTEL_")) {
        command.env_remove(name);
    }
    command.env_remove("RUST_LOG");
    command
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let ended = runtime.block_on(async { tokio::time::timeout(bound, watch(command)).await });
    ended.unwrap_or_else(|_| panic!("{test} as {role} is not over after {bound:?}"))
}

async fn watch(mut command: Command) -> Ended {
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut errors = child.stderr.take().unwrap();
    let (mut stdout, mut stderr, mut left) = (String::new(), String::new(), None);
    let out = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            // libtest begins the line with the test's name.
            if line.ends_with(LEAVING) {
                left = Some(Instant::now());
            }
            stdout.push_str(&line);
            stdout.push('\n');
        }
    };
    let (status, (), read) = tokio::join!(
        async { (child.wait().await.unwrap(), Instant::now()) },
        out,
        errors.read_to_string(&mut stderr)
    );
    read.unwrap();
    let (status, end) = status;
    assert!(
        stdout.contains("1 passed") || !status.success(),
        "no such test: {stdout}"
    );
    Ended {
        status,
        took: left.map(|left| end.saturating_duration_since(left)),
        stdout,
        stderr,
    }
}
