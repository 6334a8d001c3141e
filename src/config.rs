//! What settings have in common: their error, and what every source is given.
//!
//! A setting that can't be used is never ignored and never panics: it is a [`ConfigError`] that names
//! the setting, its value and the way out.

use std::fmt;
use std::sync::Arc;

use crate::event::Direction;
use crate::record::{Recorder, Scope};

/// How long a name may be, in bytes.
const LONGEST_NAME: usize = 100;

/// A setting that can't be used: which one, its value, and the way out.
#[derive(Debug)]
pub struct ConfigError {
    setting: String,
    value: String,
    help: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl ConfigError {
    pub(crate) fn new(setting: &str, value: &str, help: &str) -> Self {
        // A value may come from anywhere; its beginning is enough to know it by.
        Self {
            setting: setting.to_owned(),
            value: value.chars().take(200).collect(),
            help: help.to_owned(),
            source: None,
        }
    }

    /// The same under the name that its user knows.
    #[allow(dead_code)] // by features
    pub(crate) fn with_setting(mut self, setting: String) -> Self {
        self.setting = setting;
        self
    }

    #[allow(dead_code)] // by features
    pub(crate) fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The setting: a builder's method or an environment variable.
    pub fn setting(&self) -> &str {
        &self.setting
    }

    /// Its value; never a secret.
    pub fn value(&self) -> &str {
        &self.value
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} = {:?} can't be used: {}",
            self.setting, self.value, self.help
        )?;
        match &self.source {
            Some(source) => write!(f, " ({source})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for ConfigError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| &**source as _)
    }
}

/// A name becomes an attribute's value and a label, so it must be fit for both.
pub(crate) fn valid_name(setting: &str, name: &str) -> Result<(), ConfigError> {
    let help = if name.is_empty() {
        "a name can't be empty; give the name that you want to see in traces and metrics"
    } else if name.len() > LONGEST_NAME {
        "a name can't be longer than 100 bytes; give a shorter one"
    } else if name.chars().any(char::is_control) {
        "a name can't have control characters; leave them out"
    } else {
        return Ok(());
    };
    Err(ConfigError::new(setting, name, help))
}

/// What the builders of listeners, dialers and connectors share: a name, and what is switched on
/// for it.
#[derive(Clone, Debug)]
#[cfg_attr(not(any(feature = "net", feature = "hyper")), allow(dead_code))]
pub(crate) struct Declaration {
    pub(crate) recorder: Recorder,
    name: String,
    spans: Option<bool>,
    metrics: Option<bool>,
}

#[cfg_attr(not(any(feature = "net", feature = "hyper")), allow(dead_code))]
impl Declaration {
    pub(crate) fn new(recorder: Recorder, name: &str) -> Self {
        Self {
            recorder,
            name: name.to_owned(),
            spans: None,
            metrics: None,
        }
    }

    pub(crate) const fn spans(&mut self, on: bool) {
        self.spans = Some(on);
    }

    pub(crate) const fn metrics(&mut self, on: bool) {
        self.metrics = Some(on);
    }

    /// The scope of the name. What was not said stays as it is, for names that several share.
    pub(crate) fn scope(
        &self,
        direction: Direction,
        setting: &str,
    ) -> Result<Arc<Scope>, ConfigError> {
        valid_name(setting, &self.name)?;
        let scope = self.recorder.declared(direction, &self.name);
        if let Some(on) = self.spans {
            scope.set_spans(on);
        }
        if let Some(on) = self.metrics {
            scope.set_metrics(on);
        }
        Ok(scope)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_names_are_errors_that_say_which_and_why() {
        for (name, word) in [
            ("", "empty"),
            (&*"x".repeat(101), "100 bytes"),
            ("a\nb", "control"),
        ] {
            let error = valid_name("listener name", name).unwrap_err();
            assert_eq!(error.setting(), "listener name");
            assert!(error.to_string().contains(word), "{error}");
        }
        assert!(valid_name("listener name", &"é".repeat(50)).is_ok());
    }
}
