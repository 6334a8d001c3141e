//! Label sets: made, summed when equal, folded when there are too many.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use opentelemetry::{KeyValue, StringValue, Value};

use crate::event::{Direction, Target};
use crate::record::recorder::OTHER;
use crate::telemetry::names;

/// How many label sets one instrument may have; the SDK's own limit is 2 000.
pub(super) const LABEL_SETS: usize = 1_800;

/// A label set, before it becomes attributes. Equal ones are summed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Labels {
    pub(super) name: Option<Arc<str>>,
    pub(super) direction: Option<Direction>,
    pub(super) host: Option<Host>,
    /// The name that was looked up.
    pub(super) question: Option<Arc<str>>,
    pub(super) version: Option<&'static str>,
    /// Of a measure of a connection's speed.
    pub(super) app_limited: Option<bool>,
    /// Any further attribute with a fixed list of values.
    pub(super) facts: [Option<(&'static str, &'static str)>; 2],
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Host {
    pub(super) address: Arc<str>,
    pub(super) port: Option<u16>,
    pub(super) scheme: Option<Arc<str>>,
}

impl Host {
    pub(super) fn of(target: &Target) -> Self {
        Self {
            address: target.host.clone(),
            port: target.port,
            scheme: None,
        }
    }

    pub(super) fn with_scheme(target: &Target) -> Self {
        Self {
            scheme: target.scheme.clone(),
            ..Self::of(target)
        }
    }

    pub(super) fn other() -> Self {
        Self {
            address: OTHER.into(),
            port: None,
            scheme: None,
        }
    }
}

impl Labels {
    pub(super) fn name(scope: &Arc<str>) -> Self {
        Self {
            name: Some(scope.clone()),
            ..Self::default()
        }
    }

    pub(super) fn fact(mut self, key: &'static str, value: &'static str) -> Self {
        let place = usize::from(self.facts[0].is_some());
        self.facts[place] = Some((key, value));
        self
    }

    pub(super) fn host(mut self, host: Option<Host>) -> Self {
        self.host = host;
        self
    }

    /// What is learned becomes `_other`; what the code fixes stays.
    pub(super) fn folded(&self) -> Self {
        Self {
            name: self.name.as_ref().map(|_| OTHER.into()),
            direction: self.direction,
            host: self.host.as_ref().map(|_| Host::other()),
            question: self.question.as_ref().map(|_| OTHER.into()),
            version: None,
            app_limited: self.app_limited,
            facts: self.facts,
        }
    }

    pub(super) fn attributes(&self) -> Vec<KeyValue> {
        let text = |text: &Arc<str>| Value::String(StringValue::from(text.clone()));
        let mut attributes = Vec::with_capacity(8);
        if let Some(name) = &self.name {
            attributes.push(KeyValue::new(names::NAME, text(name)));
        }
        if let Some(direction) = self.direction {
            attributes.push(KeyValue::new(names::DIRECTION, direction.as_str()));
        }
        if let Some(host) = &self.host {
            attributes.push(KeyValue::new(names::SERVER_ADDRESS, text(&host.address)));
            if let Some(port) = host.port {
                attributes.push(KeyValue::new(names::SERVER_PORT, i64::from(port)));
            }
            if let Some(scheme) = &host.scheme {
                attributes.push(KeyValue::new(names::URL_SCHEME, text(scheme)));
            }
        }
        if let Some(question) = &self.question {
            attributes.push(KeyValue::new(names::DNS_QUESTION, text(question)));
        }
        if let Some(version) = self.version {
            attributes.push(KeyValue::new(names::PROTOCOL_VERSION, version));
        }
        if let Some(limited) = self.app_limited {
            attributes.push(KeyValue::new(names::TCP_APP_LIMITED, limited));
        }
        for (key, value) in self.facts.iter().flatten() {
            attributes.push(KeyValue::new(*key, *value));
        }
        attributes
    }
}

/// Sums by label set, of one instrument in one collection.
#[derive(Default)]
pub(super) struct Sums(pub(super) BTreeMap<Labels, u64>);

impl Sums {
    pub(super) fn add(&mut self, labels: Labels, n: u64) {
        *self.0.entry(labels).or_default() += n;
    }

    /// For what is no sum: the largest counts.
    pub(super) fn most(&mut self, labels: Labels, n: u64) {
        let most = self.0.entry(labels).or_default();
        *most = n.max(*most);
    }
}

/// The label sets that an instrument has reported: they keep their place.
#[derive(Default)]
pub(super) struct Admitted(HashSet<Labels>);

impl Admitted {
    /// The set itself while there is room, else its `_other`.
    pub(super) fn admit(&mut self, labels: Labels) -> (Labels, bool) {
        if self.0.contains(&labels) {
            return (labels, false);
        }
        if self.0.len() < LABEL_SETS {
            self.0.insert(labels.clone());
            return (labels, false);
        }
        (labels.folded(), true)
    }
}
