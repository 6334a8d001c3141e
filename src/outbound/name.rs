//! A name for one call: go-conntrack's `DialNameToContext`.
//!
//! A dialer or connector has a name of its own. A [`DialName`] overrides it for what is dialled in a
//! piece of code, by a task-scoped value that a spawned task does not inherit, or for one HTTP
//! request, as an extension that the [`RequestLayer`](crate::RequestLayer) looks for.

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use crate::config::{ConfigError, valid_name};
use crate::event::Direction;
use crate::outbound::scope_of_exporter;
use crate::record::{Recorder, Scope};

tokio::task_local! {
    static NAME: Arc<str>;
}

/// The name under which connections are counted, for one call.
///
/// Such a name is *learned*: its series appear with its first use. Name it in
/// [`Conntrack::declare_dialer`](crate::Conntrack::declare_dialer) to have its zeros from the start.
/// At most 256 names are learned per `Conntrack`; more are counted under `_other`.
///
/// # Example
///
/// ```no_run
/// # async fn run(dialer: otel_conntrack::Dialer) -> Result<(), Box<dyn std::error::Error>> {
/// use otel_conntrack::DialName;
///
/// let google = DialName::new("google")?;
/// let stream = google.scope(dialer.connect("www.google.com:443")).await?;
/// assert_eq!(stream.record().name(), "google");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DialName(Arc<str>);

impl DialName {
    /// # Errors
    ///
    /// When the name is empty, longer than 100 bytes, or has control characters.
    pub fn new(name: &str) -> Result<Self, ConfigError> {
        valid_name("dial name", name)?;
        Ok(Self(name.into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Runs a future; what it dials itself goes under this name. The innermost name wins.
    pub async fn scope<F: Future>(&self, future: F) -> F::Output {
        NAME.scope(self.0.clone(), future).await
    }

    /// The same for one synchronous piece of code, such as one poll.
    pub fn sync_scope<R>(&self, run: impl FnOnce() -> R) -> R {
        NAME.sync_scope(self.0.clone(), run)
    }
}

impl fmt::Display for DialName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where an attempt is recorded: under the caller's name if there is one, else the dialer's own.
pub(crate) fn scope_of_call(recorder: &Recorder, own: &Arc<Scope>) -> (Recorder, Arc<Scope>) {
    if let Some(unread) = scope_of_exporter() {
        return unread;
    }
    let Ok(scope) = NAME.try_with(|name| recorder.learned(Direction::Outbound, name)) else {
        return (recorder.clone(), own.clone());
    };
    // What is switched off for the dialer is off for its calls, whatever they are called.
    if !scope.is_declared() {
        if !own.spans() {
            scope.set_spans(false);
        }
        if !own.metrics() {
            scope.set_metrics(false);
        }
    }
    (recorder.clone(), scope)
}
