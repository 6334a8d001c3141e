//! The thread that scans, and what it saw last.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{MonitorBuilder, Scanner, Snapshot};
use crate::config::ConfigError;

/// One part of so many of the time is spent scanning, at most.
const SHARE: u32 = 10;

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

struct Shared {
    snapshot: Mutex<Arc<Snapshot>>,
    failure: Mutex<Option<Arc<str>>>,
    scans: AtomicU64,
    torn: AtomicU64,
    failed: AtomicU64,
    last_failed: AtomicBool,
    stop: Mutex<bool>,
    wake: Condvar,
}

impl Monitor {
    pub(super) fn start(settings: MonitorBuilder) -> Result<Self, ConfigError> {
        let period = settings.period;
        let mut scanner = Scanner::new(settings)?;
        let first = scanner.scan().map_err(|error| {
            let help = "the table can't be read; allow netlink (AF_NETLINK) or /proc/net/tcp, or name \
                        another /proc";
            ConfigError::new("host", "/proc/net/tcp", help).with_source(error)
        })?;
        let latest = Latest(Arc::new(Shared {
            torn: AtomicU64::new(first.scan.torn.is_some().into()),
            snapshot: Mutex::new(Arc::new(first)),
            failure: Mutex::default(),
            scans: AtomicU64::new(1),
            failed: AtomicU64::new(0),
            last_failed: AtomicBool::new(false),
            stop: Mutex::new(false),
            wake: Condvar::new(),
        }));
        let shared = latest.0.clone();
        let thread = std::thread::Builder::new()
            .name("conntrack-host".to_owned())
            .spawn(move || shared.run(scanner, period))
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
        self.latest.scans()
    }

    /// How many scans may have left something out. No age was lost.
    pub fn torn_scans(&self) -> u64 {
        self.latest.0.torn.load(Relaxed)
    }

    /// How many scans failed altogether. No age was lost; snapshots stay as they were.
    pub fn failed_scans(&self) -> u64 {
        self.latest.0.failed.load(Relaxed)
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

    pub(super) fn scans(&self) -> u64 {
        self.0.scans.load(Relaxed)
    }

    /// Torn and failed ones.
    #[cfg_attr(not(feature = "otel"), allow(dead_code))]
    pub(super) fn imperfect(&self) -> [u64; 2] {
        [&self.0.torn, &self.0.failed].map(|count| count.load(Relaxed))
    }
}

impl Shared {
    fn run(&self, mut scanner: Scanner, period: Duration) {
        let mut next = Instant::now() + period;
        while !self.stopped_until(next) {
            let begin = Instant::now();
            match scanner.scan() {
                Ok(snapshot) => {
                    self.torn
                        .fetch_add(snapshot.scan.torn.is_some().into(), Relaxed);
                    let before = std::mem::replace(&mut *lock(&self.snapshot), Arc::new(snapshot));
                    drop(before);
                    if self.last_failed.swap(false, Relaxed) {
                        *lock(&self.failure) = None;
                    }
                }
                Err(error) => {
                    self.failed.fetch_add(1, Relaxed);
                    self.last_failed.store(true, Relaxed);
                    *lock(&self.failure) = Some(error.to_string().into());
                }
            }
            self.scans.fetch_add(1, Relaxed);
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
            if *stop || left.is_zero() {
                return *stop;
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
        *lock(&self.shared.stop) = true;
        self.shared.wake.notify_all();
        if let Some(handle) = self.handle.take() {
            // As long as a scan.
            let _ = handle.join();
        }
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
