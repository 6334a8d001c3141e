//! How tests look at a [`ConfigError`]: it names the setting, the value and the way out, and never a secret.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "compiled into every test that includes it, and each uses a part"
)]

use std::error::Error;

use otel_conntrack::{Builder, ConfigError};

/// Stands for what must never be shown.
pub const SECRET: &str = "s3cret";

/// Setting, value and way out, each as a part of the text.
pub type Expected<'a> = (&'a str, &'a str, &'a str);

/// The error says all of this, on one line, and no secret.
#[track_caller]
pub fn assert_error(error: &ConfigError, (setting, value, way_out): Expected<'_>) {
    let text = error.to_string();
    assert_eq!(error.setting(), setting, "{text}");
    assert_eq!(error.value(), value, "{text}");
    assert!(text.starts_with(setting), "{text}");
    assert!(text.contains(&format!("{value:?}")), "{text}");
    let (_, help) = text.split_once("can't be used: ").unwrap();
    assert!(help.contains(way_out), "{text:?} has no {way_out:?}");
    assert!(!text.contains('\n'), "{text}");
    assert_no_secret(error);
}

#[track_caller]
fn assert_no_secret(error: &ConfigError) {
    let mut texts = vec![
        error.to_string(),
        format!("{error:?}"),
        format!("{error:#?}"),
    ];
    let mut source = error.source();
    while let Some(cause) = source {
        texts.extend([cause.to_string(), format!("{cause:?}")]);
        source = cause.source();
    }
    for text in texts {
        assert!(!text.contains(SECRET), "{text}");
    }
}

/// Why the one call failed.
#[track_caller]
pub fn refused(builder: Builder) -> ConfigError {
    match builder.init() {
        Ok(_) => panic!("this was taken"),
        Err(error) => error,
    }
}
