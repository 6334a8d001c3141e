//! An observer that keeps what it is told, and can be waited for.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use otel_conntrack::{Observer, PoolEvent, PoolEventKind as Kind};
use tokio::sync::watch;

/// The pool events that were told, in order. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Told {
    events: Arc<Mutex<Vec<PoolEvent>>>,
    count: Arc<watch::Sender<usize>>,
}

impl Observer for Told {
    fn on_pool_event(&self, event: &PoolEvent) {
        self.events.lock().unwrap().push(event.clone());
        self.count.send_modify(|count| *count += 1);
    }
}

impl Told {
    pub(crate) fn all(&self) -> Vec<PoolEvent> {
        self.events.lock().unwrap().clone()
    }

    /// One line for each.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.all().iter().map(line).collect()
    }

    pub(crate) fn clear(&self) {
        self.events.lock().unwrap().clear();
    }

    pub(crate) fn count(&self, begin: &str) -> usize {
        let lines = self.lines();
        lines.iter().filter(|line| line.starts_with(begin)).count()
    }

    /// Waits until so many lines begin like this.
    pub(crate) async fn wait(&self, n: usize, begin: &str) {
        let mut count = self.count.subscribe();
        let come = count.wait_for(|_| self.count(begin) >= n);
        let come = tokio::time::timeout(Duration::from_secs(60), come).await;
        assert!(come.is_ok(), "{n} {begin} never come: {:#?}", self.lines());
    }
}

impl Told {
    /// Waits until the event of this number is there.
    pub(crate) async fn wait_for_sequence(&self, sequence: u64) {
        let mut count = self.count.subscribe();
        let last = || self.events.lock().unwrap().last().map_or(0, |e| e.sequence);
        let come = count.wait_for(|_| last() >= sequence);
        let come = tokio::time::timeout(Duration::from_secs(60), come).await;
        assert!(come.is_ok(), "{sequence} never comes after {}", last());
    }
}

/// An event as one line.
pub(crate) fn line(event: &PoolEvent) -> String {
    let name = event.kind.name();
    match &event.kind {
        Kind::GotConn {
            reused,
            was_idle,
            idle_time,
            waited,
        } => {
            assert_eq!(*was_idle, idle_time.is_some());
            let mut line = format!("{name} {}", if *reused { "reused" } else { "new" });
            if *was_idle {
                line.push_str(" idle");
            }
            if waited.is_some() {
                line.push_str(" waited");
            }
            line
        }
        Kind::IdleConnWaitIn { waiting } | Kind::ConnsPerHostWaitIn { waiting } => {
            format!("{name} {waiting}")
        }
        Kind::IdleConnWaitOut { outcome, .. } | Kind::ConnsPerHostWaitOut { outcome, .. } => {
            format!("{name} {outcome}")
        }
        Kind::IdleConnIn { idle } => format!("{name} {idle}"),
        Kind::IdleConnOut { reason, .. } => match reason {
            Some(reason) => format!("{name} {reason}"),
            None => format!("{name} reused"),
        },
        Kind::PutIdleConn {
            reason: Some(reason),
        } => format!("{name} {reason}"),
        Kind::Got1xxResponse { status } => format!("{name} {status}"),
        _ => name.to_owned(),
    }
}
