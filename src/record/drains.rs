//! Listeners as the record sees them: what can be drained, without knowing what listens.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use crate::record::{Scope, lock};

/// A listener that can be drained.
pub(crate) trait Drains: Send + Sync {
    fn scope(&self) -> &Arc<Scope>;

    /// Whether a drain has begun.
    fn is_draining(&self) -> bool;

    /// Accepts nothing more, waits until everybody is done, and cuts what is left at the deadline:
    /// the counts say how that went. It needs a Tokio runtime with a timer.
    fn drain(self: Arc<Self>, deadline: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// The listeners that there are.
#[derive(Default)]
pub(crate) struct Listeners(Mutex<Vec<Weak<dyn Drains>>>);

impl Listeners {
    pub(crate) fn add(&self, listener: &Arc<impl Drains + 'static>) {
        let listener: Arc<dyn Drains> = listener.clone();
        let mut all = lock(&self.0);
        all.retain(|listener| listener.strong_count() > 0);
        all.push(Arc::downgrade(&listener));
    }

    #[cfg_attr(not(feature = "inspect"), allow(dead_code))]
    pub(crate) fn all(&self) -> Vec<Arc<dyn Drains>> {
        lock(&self.0).iter().filter_map(Weak::upgrade).collect()
    }
}
