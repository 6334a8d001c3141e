//! The parsers beneath: booleans, numbers, durations, lists, percent-encoding.

use std::time::Duration;

use super::{EnvError, MAX_NUMBER};

pub(super) const BAD_RATIO: &str =
    "must be a number from 0 to 1; set it to one such as 0.25, or unset it for 1";

/// The entries of a comma-separated list, trimmed, with their positions. Empty ones are passed
/// over: a comma at the end is common and harmless.
pub(super) fn entries(list: &str) -> impl Iterator<Item = (usize, &str)> {
    list.split(',')
        .map(str::trim)
        .enumerate()
        .filter(|(_, entry)| !entry.is_empty())
}

pub(super) fn parse_boolean(setting: &str, value: &str) -> Result<bool, EnvError> {
    if value.eq_ignore_ascii_case("true") {
        Ok(true)
    } else if value.eq_ignore_ascii_case("false") {
        Ok(false)
    } else {
        Err(EnvError::new(
            setting,
            value,
            "must be true or false; leave it unset for false",
        ))
    }
}

/// A comma-separated list of `supported`, or `none` alone. Empty entries are passed over, but not
/// if they are all.
pub(super) fn parse_choices(
    name: &str,
    list: &str,
    supported: &[&'static str],
) -> Result<Vec<&'static str>, EnvError> {
    let refuse = |fault: &str| {
        let supported = supported.join(", ");
        EnvError::new(
            name,
            list,
            format!(
                "{fault}; supported are {supported} and, alone, none: set it to these, or unset it"
            ),
        )
    };
    let mut chosen = Vec::new();
    let mut none = false;
    for (_, entry) in entries(list) {
        match supported
            .iter()
            .find(|known| known.eq_ignore_ascii_case(entry))
        {
            Some(known) => chosen.push(*known),
            None if entry.eq_ignore_ascii_case("none") => none = true,
            None => return Err(refuse(&format!("{entry:?} is not supported"))),
        }
    }
    match (none, chosen.is_empty()) {
        (true, false) => Err(refuse("none excludes all others")),
        (false, true) => Err(refuse("the list is empty")),
        _ => Ok(chosen),
    }
}

pub(super) fn parse_number(value: &str, least: u64, most: u64) -> Option<u64> {
    // `u64::from_str` takes a plus sign, which nobody means.
    if !value.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    value
        .parse()
        .ok()
        .filter(|number| (least..=most).contains(number))
}

pub(super) fn parse_millis(
    setting: &str,
    value: &str,
    least: u64,
    default: Duration,
) -> Result<Duration, EnvError> {
    parse_number(value, least, MAX_NUMBER)
        .map(Duration::from_millis)
        .ok_or_else(|| {
            let default = default.as_millis();
            let help = format!(
                "must be a whole number of milliseconds from {least} to {MAX_NUMBER}; \
                 leave it unset for {default}"
            );
            EnvError::new(setting, value, help)
        })
}

pub(super) fn parse_size(setting: &str, value: &str, default: usize) -> Result<usize, EnvError> {
    parse_number(value, 1, MAX_NUMBER)
        .and_then(|size| usize::try_from(size).ok())
        .ok_or_else(|| {
            let help = format!(
                "must be a whole number from 1 to {MAX_NUMBER}; leave it unset for {default}"
            );
            EnvError::new(setting, value, help)
        })
}

pub(super) fn checked_ratio(ratio: f64) -> Option<f64> {
    // Not a number is in no range. Adding zero turns minus zero into zero.
    (0.0..=1.0).contains(&ratio).then_some(ratio + 0.0)
}

/// Strict percent-decoding: `%` must begin an escape, and the result must be UTF-8. `+` is a plus
/// sign.
pub(super) fn percent_decode(text: &str) -> Result<String, &'static str> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let digits = rest
            .split_at_checked(2)
            .and_then(|(digits, after)| Some((hex(digits[0])?, hex(digits[1])?, after)));
        let Some((high, low, after)) = digits else {
            return Err("has a `%` that is not followed by two hexadecimal digits");
        };
        decoded.push(high << 4 | low);
        rest = after;
    }
    String::from_utf8(decoded).map_err(|_| "is not UTF-8 once it is percent-decoded")
}

pub(super) fn hex(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

/// A token of RFC 9110, section 5.6.2.
pub(super) fn is_token(text: &str) -> bool {
    let special = b"!#$%&'*+-.^_`|~";
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || special.contains(&byte))
}
