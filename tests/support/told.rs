//! What the crate says through `tracing`: every event of the target `otel_conntrack`, in this process.
//!
//! A subscriber can be installed once per process, so [`listen`] installs one on its first call and starts a new list on
//! each. Tests that use it take turns.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "compiled into every test that includes it, and each uses a part"
)]

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, Once};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

/// One event: its level, and its fields as text.
#[derive(Clone, Debug)]
pub struct Said {
    pub level: Level,
    pub message: String,
    pub fields: BTreeMap<String, String>,
}

static SAID: Mutex<Vec<Said>> = Mutex::new(Vec::new());

/// What is said from now on.
pub struct Told(());

pub fn listen() -> Told {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let subscriber = tracing_subscriber::registry().with(Ear);
        tracing::subscriber::set_global_default(subscriber).unwrap();
    });
    SAID.lock().unwrap().clear();
    Told(())
}

impl Told {
    pub fn all(&self) -> Vec<Said> {
        SAID.lock().unwrap().clone()
    }

    /// The warnings about `what`: `spans` or `metrics`.
    pub fn warnings(&self, what: &str) -> Vec<Said> {
        self.of(Level::WARN, what)
    }

    /// The good news about `what`.
    pub fn recoveries(&self, what: &str) -> Vec<Said> {
        self.of(Level::INFO, what)
    }

    fn of(&self, level: Level, what: &str) -> Vec<Said> {
        let all = self.all().into_iter();
        all.filter(|said| said.level == level && said.message.starts_with(what))
            .collect()
    }
}

struct Ear;

impl<S: Subscriber> Layer<S> for Ear {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() != "otel_conntrack" {
            return;
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        SAID.lock().unwrap().push(Said {
            level: *event.metadata().level(),
            message: fields.0.remove("message").unwrap_or_default(),
            fields: fields.0,
        });
    }
}

#[derive(Default)]
struct Fields(BTreeMap<String, String>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }
}
