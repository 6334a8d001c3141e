//! The thread that scans, and what it saw last.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{MonitorBuilder, Scanner, Snapshot};
use crate::config::ConfigError;

/// One part of so many of the time is spent scanning, at most.
const SHARE: u32 = 10;

/// How long the end of a scan is waited for at the end of a monitor.
const ENDING: Duration = Duration::from_secs(1);

/// Reads the host's TCP table on a thread of its own. From [`Monitor::builder`]; clones are the same
/// monitor, and the thread ends with the last of them.
///
/// Who looks takes what the last scan left, under a lock that is held for a few nanoseconds: nobody
/// ever waits for a scan.
///
/// ```
/// # #[cfg(target_os = "linux")] {
/// use std::net::{TcpListener, TcpStream};
/// use otel_conntrack::host::Monitor;
///
/// let listener = TcpListener::bind("127.0.0.1:0")?;
/// let port = listener.local_addr()?.port();
/// let _client = TcpStream::connect(listener.local_addr()?)?;
/// let monitor = Monitor::builder().ports(port.to_string().parse()?).start()?;
/// assert_eq!(monitor.snapshot().established(), 1);
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Monitor {
    pub(super) latest: Latest,
    /// For its drop.
    _thread: Arc<Thread>,
}

/// What was seen last, for those who must not keep the thread alive.
#[derive(Clone)]
pub(super) struct Latest(Arc<Shared>);

/// Where a scan counts.
const WHOLE: usize = 0;
const TORN: usize = 1;
const FAILED: usize = 2;

const fn kind(snapshot: &Snapshot) -> usize {
    if snapshot.scan.torn.is_some() {
        TORN
    } else {
        WHOLE
    }
}

struct Shared {
    snapshot: Mutex<Arc<Snapshot>>,
    failure: Mutex<Option<Arc<str>>>,
    /// Whole, torn and failed ones.
    scans: [AtomicU64; 3],
    last_failed: AtomicBool,
    stop: Mutex<Stop>,
    wake: Condvar,
}

/// Of the thread.
#[derive(Default)]
struct Stop {
    asked: bool,
    done: bool,
}

impl Monitor {
    pub(super) fn start(settings: MonitorBuilder) -> Result<Self, ConfigError> {
        Self::with(Scanner::new(settings.clone())?, settings)
    }

    /// The settings are for another scanner, should this one break.
    pub(super) fn with(
        mut scanner: Scanner,
        settings: MonitorBuilder,
    ) -> Result<Self, ConfigError> {
        let first = scanner.scan().map_err(|error| {
            let help = "the table can't be read; allow netlink (AF_NETLINK) or /proc/net/tcp, or name \
                        another /proc";
            ConfigError::new("host", "/proc/net/tcp", help).with_source(error)
        })?;
        let scans: [AtomicU64; 3] = Default::default();
        scans[kind(&first)].store(1, Relaxed);
        let latest = Latest(Arc::new(Shared {
            snapshot: Mutex::new(Arc::new(first)),
            failure: Mutex::default(),
            scans,
            last_failed: AtomicBool::new(false),
            stop: Mutex::default(),
            wake: Condvar::new(),
        }));
        let shared = latest.0.clone();
        let thread = std::thread::Builder::new()
            .name("conntrack-host".to_owned())
            .spawn(move || {
                let _done = Done(&shared);
                shared.run(scanner, &settings);
            })
            .map_err(|error| {
                ConfigError::new("host", "its thread", "the system has no thread for it")
                    .with_source(error)
            })?;
        Ok(Self {
            _thread: Arc::new(Thread {
                shared: latest.0.clone(),
                handle: Some(thread),
            }),
            latest,
        })
    }

    /// What the last scan saw; a failed one leaves the one before. Never waits for a scan.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.latest.snapshot()
    }

    /// How many scans there were; those that were torn or failed are among them.
    pub fn scans(&self) -> u64 {
        self.latest.scans().iter().sum()
    }

    /// How many scans may have left something out. No age was lost.
    pub fn torn_scans(&self) -> u64 {
        self.latest.scans()[TORN]
    }

    /// How many scans failed altogether. No age was lost; snapshots stay as they were.
    pub fn failed_scans(&self) -> u64 {
        self.latest.scans()[FAILED]
    }

    /// Why the last scan failed; none if it did not.
    pub fn failure(&self) -> Option<Arc<str>> {
        lock(&self.latest.0.failure).clone()
    }
}

impl Latest {
    pub(super) fn snapshot(&self) -> Arc<Snapshot> {
        lock(&self.0.snapshot).clone()
    }

    /// Whole, torn and failed ones: each of them never goes down.
    pub(super) fn scans(&self) -> [u64; 3] {
        self.0.scans.each_ref().map(|count| count.load(Relaxed))
    }
}

impl Shared {
    fn run(&self, mut scanner: Scanner, settings: &MonitorBuilder) {
        let period = settings.period;
        let mut next = Instant::now() + period;
        while !self.stopped_until(next) {
            let begin = Instant::now();
            let scan = catch_unwind(AssertUnwindSafe(|| scanner.scan()));
            let scan = scan.unwrap_or_else(|_| {
                // Never, as far as we know. What it knew may be wrong, ages too.
                if let Ok(another) = Scanner::new(settings.clone()) {
                    scanner = another;
                }
                Err(std::io::Error::other("the scan panicked; this is a bug"))
            });
            let kind = match scan {
                Ok(snapshot) => {
                    let kind = kind(&snapshot);
                    let before = std::mem::replace(&mut *lock(&self.snapshot), Arc::new(snapshot));
                    drop(before);
                    if self.last_failed.swap(false, Relaxed) {
                        *lock(&self.failure) = None;
                    }
                    kind
                }
                Err(error) => {
                    self.last_failed.store(true, Relaxed);
                    *lock(&self.failure) = Some(error.to_string().into());
                    FAILED
                }
            };
            self.scans[kind].fetch_add(1, Relaxed);
            let end = Instant::now();
            let rest = end.duration_since(begin) * (SHARE - 1);
            // On the beat; what was missed is not made up for.
            next = (next + period).max(end + rest);
        }
    }

    fn stopped_until(&self, next: Instant) -> bool {
        let mut stop = lock(&self.stop);
        loop {
            let left = next.saturating_duration_since(Instant::now());
            if stop.asked || left.is_zero() {
                return stop.asked;
            }
            let waited = self.wake.wait_timeout(stop, left);
            stop = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

struct Thread {
    shared: Arc<Shared>,
    handle: Option<JoinHandle<()>>,
}

impl Drop for Thread {
    fn drop(&mut self) {
        let mut stop = lock(&self.shared.stop);
        stop.asked = true;
        self.shared.wake.notify_all();
        // As long as a scan; but who ends must not hang where a table does, as one of FUSE may.
        let waited = self
            .shared
            .wake
            .wait_timeout_while(stop, ENDING, |stop| !stop.done);
        let done = waited.unwrap_or_else(PoisonError::into_inner).0.done;
        if let Some(handle) = self.handle.take()
            && done
        {
            let _ = handle.join();
        }
    }
}

/// Says that the thread is done, however it ends.
struct Done<'a>(&'a Shared);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        lock(&self.0.stop).done = true;
        self.0.wake.notify_all();
    }
}

/// Plain assignments only are done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor")
            .field("scans", &self.scans())
            .finish_non_exhaustive()
    }
}
