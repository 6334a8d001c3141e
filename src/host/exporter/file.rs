//! The config file: a setting per line, `key value` or `key=value`; what may stand alone means true.
//! Blank lines and lines that begin with `#` are nothing.

use std::path::Path;

use super::specs::{SETTINGS, Spec};
use crate::config::ConfigError;

/// How long a file may be.
const LONGEST: u64 = 1 << 20;

/// A line of it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Line {
    pub(super) number: usize,
    pub(super) name: &'static str,
    pub(super) value: String,
}

/// Reads it; `origin` is where its name was said.
pub(super) fn read(path: &Path, origin: &str) -> Result<Vec<Line>, ConfigError> {
    let setting = format!("config ({origin})");
    let wrong = |help: &str| ConfigError::new(&setting, &path.display().to_string(), help);
    let file = std::fs::File::open(path).map_err(|error| {
        wrong("the file can't be read; give one that is there").with_source(error)
    })?;
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(file, LONGEST + 1), &mut bytes).map_err(
        |error| wrong("the file can't be read; give one that is there").with_source(error),
    )?;
    if bytes.len() as u64 > LONGEST {
        return Err(wrong("it is longer than 1 MiB; give a file of settings"));
    }
    let text =
        String::from_utf8(bytes).map_err(|_| wrong("it is no text in UTF-8; write it so"))?;
    parse(&text, &path.display().to_string())
}

/// Reads its text; `name` is for errors.
pub(super) fn parse(text: &str, name: &str) -> Result<Vec<Line>, ConfigError> {
    let mut lines: Vec<Line> = Vec::new();
    // Some editors put a mark before the first character.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (key, value) = match line.find(|c: char| c == '=' || c.is_whitespace()) {
            None => (line, None),
            Some(at) => {
                // `key = value` too.
                let value = line[at..].trim_start();
                let value = value.strip_prefix('=').unwrap_or(value).trim();
                (&line[..at], Some(value))
            }
        };
        let wrong = |help: &str| Err(ConfigError::new(&format!("{name}:{number}"), line, help));
        let Some(spec) = SETTINGS.iter().find(|spec| spec.name == key) else {
            return wrong(&unknown(key));
        };
        if let Some(before) = lines.iter().find(|line| line.name == spec.name) {
            let help = format!(
                "{key} is on line {} already; keep one of them",
                before.number
            );
            return wrong(&help);
        }
        let value = match value {
            Some(value) if !value.is_empty() => value,
            None if spec.alone => "true",
            _ => {
                return wrong(&format!(
                    "{key} needs a value; write `{key} {}`",
                    spec.default
                ));
            }
        };
        lines.push(Line {
            number,
            name: spec.name,
            value: value.to_owned(),
        });
    }
    Ok(lines)
}

fn unknown(key: &str) -> String {
    if matches!(key, "config" | "conf") {
        return "a file can't name another; put everything into one".to_owned();
    }
    let known: Vec<_> = SETTINGS.iter().map(|Spec { name, .. }| *name).collect();
    format!("there is no such setting; there are {}", known.join(", "))
}

/// What holds of every text: it is read to lines that read the same again, or the error says where.
#[cfg(any(test, fuzzing))]
pub(super) fn hold(text: &str) -> Vec<Line> {
    let lines = match parse(text, "x") {
        Ok(lines) => lines,
        Err(error) => {
            let place = error.setting().strip_prefix("x:").expect("the name");
            let number: usize = place.parse().expect("the line's number");
            let line = text.lines().nth(number - 1).expect("a line of the text");
            assert!(line.contains(error.value()), "{error}");
            return Vec::new();
        }
    };
    for line in &lines {
        assert!(!line.value.is_empty() && line.value.trim() == line.value);
        assert!(SETTINGS.iter().any(|spec| spec.name == line.name));
        let twice = lines.iter().filter(|other| other.name == line.name);
        assert_eq!(twice.count(), 1, "{} is there twice", line.name);
    }
    // A value that begins with `=` needs another before it; and each line has its number again.
    let mut again = String::new();
    for line in &lines {
        let empty = line.number - 1 - again.lines().count();
        again.push_str(&"\n".repeat(empty));
        again.push_str(&format!("{} = {}\n", line.name, line.value));
    }
    assert_eq!(parse(&again, "x").ok().as_ref(), Some(&lines));
    lines
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    #[test]
    fn lines_are_read_as_the_seeds_are_and_a_little_more() {
        let text = "\u{feff}# comment\n\nsimple true\r\nport=443,8080\n  duration = 10 \ntcpv6\nlisten\t9690\n";
        let lines = parse(text, "x").unwrap();
        let read: Vec<_> = lines
            .iter()
            .map(|line| (line.number, line.name, &*line.value))
            .collect();
        let expected = [
            (3, "simple", "true"),
            (4, "port", "443,8080"),
            (5, "duration", "10"),
            (6, "tcpv6", "true"),
            (7, "listen", "9690"),
        ];
        assert_eq!(read, expected);
    }

    #[test]
    fn a_line_that_makes_no_sense_is_an_error_with_its_place() {
        for (text, setting, word) in [
            ("\nnothing 1", "x:2", "there are simple, tcpv6, port"),
            ("port", "x:1", "needs a value"),
            ("port=", "x:1", "needs a value"),
            ("simple =", "x:1", "needs a value"),
            ("simple\nsimple false", "x:2", "line 1"),
            ("config y", "x:1", "name another"),
            ("=", "x:1", "no such setting"),
        ] {
            let error = parse(text, "x").unwrap_err();
            assert_eq!(error.setting(), setting, "{text:?}");
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn a_file_that_can_not_be_read_is_an_error_that_names_it() {
        for path in ["/nothing/like/it", "/"] {
            let error = read(Path::new(path), "flag --config").unwrap_err();
            assert_eq!(error.setting(), "config (flag --config)");
            assert_eq!(error.value(), path);
        }
    }

    /// A line and, if it is a setting, what it means.
    fn line() -> impl Strategy<Value = (String, Option<(&'static str, String)>)> {
        let names: Vec<_> = SETTINGS
            .iter()
            .map(|spec| (spec.name, spec.alone))
            .collect();
        let space = "[ \t\u{a0}]{0,3}";
        let value = "[!-~é][ -~é]{0,20}[!-~é]|[!-<>-~é]";
        let between = prop_oneof!["[ \t]{1,3}", "[ \t]{0,2}=[ \t]{0,2}"];
        let setting = (select(names), space, between, value, space, any::<bool>());
        let setting = setting.prop_map(|((name, alone), before, between, value, after, short)| {
            if alone && short {
                return (
                    format!("{before}{name}{after}"),
                    Some((name, "true".to_owned())),
                );
            }
            // The first one is the sign between them.
            let between = if value.starts_with('=') {
                "="
            } else {
                &*between
            };
            let line = format!("{before}{name}{between}{value}{after}");
            (line, Some((name, value)))
        });
        let nothing = prop_oneof![Just(String::new()), "[ \t]{0,3}", "[ \t]{0,3}#[ -~é]{0,20}"];
        prop_oneof![setting, nothing.prop_map(|line| (line, None))]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn no_file_is_too_wild(
            text: String,
            near in "((simple|tcpv6|port|allow-host|duration|conf|#|=|[ \t\r\u{a0}\u{feff}]|1|é){0,6}\n){0,12}",
        ) {
            hold(&text);
            hold(&near);
        }

        #[test]
        fn what_is_written_is_what_is_read(
            lines in proptest::collection::vec(line(), 0..20),
            end in prop_oneof!["\n", "\r\n"],
            mark: bool,
        ) {
            let mut text = String::from(if mark { "\u{feff}" } else { "" });
            let mut expected = Vec::new();
            let mut twice = None;
            for (number, (line, setting)) in (1..).zip(lines) {
                text.push_str(&line);
                text.push_str(&end);
                let Some((name, value)) = setting else {
                    continue;
                };
                if expected.iter().any(|line: &Line| line.name == name) {
                    twice = twice.or_else(|| Some(format!("x:{number}")));
                }
                expected.push(Line { number, name, value });
            }
            match (parse(&text, "x"), twice) {
                (Ok(lines), None) => prop_assert_eq!(lines, expected),
                (Err(error), Some(place)) => prop_assert_eq!(error.setting(), place),
                (read, twice) => prop_assert!(false, "{:?} {:?} {:?}", text, read, twice),
            }
            hold(&text);
        }
    }
}
