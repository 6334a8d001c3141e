//! What benchmarks share.
#![allow(dead_code, unreachable_pub, missing_docs)]

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanProcessor};
use otel_conntrack::opentelemetry::Context;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

/// Drops spans when they end.
#[derive(Debug, Default)]
pub struct Sink;

impl SpanProcessor for Sink {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, _: SpanData) {}

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// Median, and the 95 % interval of the median, by order statistics.
pub fn median(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    // The ranks of a binomial(n, 1/2) interval; for 15 values, the 4th and the 12th.
    let margin = (1.96 * (n as f64).sqrt() / 2.0).ceil() as usize;
    let low = (n / 2).saturating_sub(margin);
    let high = (n / 2 + margin).min(n - 1);
    (values[n / 2], values[low], values[high])
}

/// Two workers, as this kind of machine has cores.
pub fn multi_thread() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("threads")
}

/// Runs this program again under callgrind with these arguments; none without `valgrind`.
pub fn instructions(arguments: &[&str]) -> Option<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().ok()?)
        .args(arguments)
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = text.lines().find(|line| line.contains("Collected :"))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// Seconds that this process has kept processors busy.
pub fn processor() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The program's name is in parentheses, and may be anything.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let ticks = |n| fields.split_whitespace().nth(n)?.parse::<f64>().ok();
    (ticks(11).unwrap_or_default() + ticks(12).unwrap_or_default()) / 100.0
}

/// A client's socket.
pub async fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).await.expect("it listens");
    stream.set_nodelay(true).expect("a TCP socket");
    stream
}

/// A request, and its answer, which is `hello`, read whole.
pub async fn ask<T: AsyncRead + AsyncWrite + Unpin>(stream: &mut T) {
    let request = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n";
    stream.write_all(request).await.expect("it reads");
    let (mut answer, mut have) = ([0; 512], 0);
    while !answer[..have].ends_with(b"hello") {
        let n = stream.read(&mut answer[have..]).await.expect("it answers");
        assert!(n > 0, "it answers");
        have += n;
    }
}
