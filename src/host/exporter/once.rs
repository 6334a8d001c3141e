//! `--once`: a table for a person.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::time::{Duration, Instant};

use super::run::Signals;
use super::settings::Settings;
use super::{Failure, say};
use crate::config::ConfigError;
use crate::event::Direction;
use crate::host::ports::service_names;
use crate::host::{Connections, Snapshot};

/// Watches for as long as it takes to know what is long-term, and prints what is there.
///
/// A signal ends it as it ends any program.
pub(super) fn print(settings: &Settings) -> Result<(), Failure> {
    if std::process::id() == 1 {
        end_by_signals();
    }
    let mut scanner = settings.monitor().scanner().map_err(Failure::Usage)?;
    if std::io::stderr().is_terminal() && settings.duration > Duration::from_secs(1) {
        let seconds = settings.duration.as_secs();
        say(format_args!(
            "watching for {seconds} s; --duration 0 for a table at once"
        ));
    }
    let watched = watch(settings.duration, settings.period, || scanner.scan())?;
    if let Some(note) = watched.note() {
        say(note);
    }
    let table = render(&watched.snapshot, &service_names(), settings.duration);
    // Who reads may have gone, as `head` does.
    let _ = std::io::stdout().write_all(table.as_bytes());
    Ok(())
}

/// The kernel keeps signals from the first process of a container, unless that asks for them.
fn end_by_signals() {
    let wait = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let signal = runtime.and_then(|runtime| {
            let _inside = runtime.enter();
            let signals = Signals::new()?;
            Ok(runtime.block_on(signals.wait()))
        });
        if let Ok(signal) = signal {
            // What a shell makes of a program that was ended by it.
            std::process::exit(128 + signal);
        }
    };
    // Without it, SIGKILL is left.
    let _ = std::thread::Builder::new()
        .name("conntrack-signal".to_owned())
        .spawn(wait);
}

/// What came of watching.
struct Watched {
    /// The last that could be taken.
    snapshot: Snapshot,
    looks: u32,
    failed: u32,
    /// Of the last look that failed.
    why: Option<std::io::Error>,
    /// Whether that was the last of all.
    stale: bool,
}

impl Watched {
    /// What is to be known about the table, if some looks failed.
    fn note(&self) -> Option<String> {
        let Self { looks, failed, .. } = self;
        let why = self.why.as_ref()?;
        let age = self.snapshot.scan.at.elapsed().as_secs_f64();
        let so = if self.stale {
            format!("this is what was there {age:.1} s ago")
        } else {
            "the last one did not".to_owned()
        };
        Some(format!(
            "{failed} of {looks} looks at the table failed, {so}: {why}"
        ))
    }
}

/// A look each `period`, one at the end of `duration`; one that fails loses nothing.
fn watch(
    duration: Duration,
    period: Duration,
    mut look: impl FnMut() -> std::io::Result<Snapshot>,
) -> Result<Watched, Failure> {
    // From the first look on: what was there then has been there for as long at the last.
    let mut end = None;
    let (mut snapshot, mut why) = (None, None);
    let (mut looks, mut failed) = (0, 0);
    loop {
        let is_last = match end {
            Some(end) => Instant::now() >= end,
            None => duration.is_zero(),
        };
        looks += 1;
        let looked = look();
        let stale = looked.is_err();
        match looked {
            Ok(seen) => snapshot = Some(seen),
            Err(error) => {
                failed += 1;
                why = Some(error);
            }
        }
        let end = *end.get_or_insert_with(|| Instant::now() + duration);
        if !is_last {
            std::thread::sleep(end.saturating_duration_since(Instant::now()).min(period));
            continue;
        }
        let Some(snapshot) = snapshot else {
            let help = "it can't be read; allow netlink (AF_NETLINK) or /proc/net/tcp, or give --proc-root";
            let error = ConfigError::new("the host's TCP table", "once", help);
            return Err(Failure::Run(match why {
                Some(why) => error.with_source(why),
                None => error,
            }));
        };
        return Ok(Watched {
            snapshot,
            looks,
            failed,
            why,
            stale,
        });
    }
}

fn render(snapshot: &Snapshot, services: &HashMap<u16, String>, duration: Duration) -> String {
    let port = |port: Option<u16>| match port {
        Some(port) => match services.get(&port) {
            Some(name) => format!("{port} ({name})"),
            None => port.to_string(),
        },
        None => "other".to_owned(),
    };
    let long_term = format!(">={}s", duration.as_secs());
    let mut rows = vec![
        ["", "PORT", "IP", "ESTABLISHED", &long_term, "OLDEST"]
            .map(String::from)
            .to_vec(),
    ];
    let grouped = snapshot.connections.iter().any(|row| row.group.is_some());
    if grouped {
        rows[0].push("GROUP".to_owned());
    }
    // What people look for first: the many.
    let mut connections: Vec<_> = snapshot.connections.iter().collect();
    connections.sort_by_key(|row| (row.direction, std::cmp::Reverse(row.established)));
    for row in connections {
        let Connections { direction, .. } = row;
        let mut cells = vec![
            match direction {
                Direction::Inbound => "in",
                Direction::Outbound => "out",
            }
            .to_owned(),
            port(row.port),
            row.ip.as_str().to_owned(),
            row.established.to_string(),
            row.long_term.to_string(),
            format!(">={}s", row.oldest.as_secs()),
        ];
        cells.extend(grouped.then(|| row.group.as_deref().unwrap_or("").to_owned()));
        rows.push(cells);
    }
    let mut out = aligned(&rows);
    let queued = snapshot.listening.iter();
    let mut rows = vec![["LISTENING", "WAITING", "LIMIT"].map(String::from).to_vec()];
    rows.extend(queued.map(|row| {
        let limit = row
            .limit
            .map_or_else(|| "?".to_owned(), |limit| limit.to_string());
        vec![port(row.port), row.length.to_string(), limit]
    }));
    out.push('\n');
    out.push_str(&aligned(&rows));
    out.push('\n');
    for (state, ip, count) in &snapshot.states {
        // Writing to a `String` can't fail.
        let _ = write!(out, "{count} {state} ({}), ", ip.as_str());
    }
    let scan = &snapshot.scan;
    let _ = writeln!(
        out,
        "{} rows by {} in {:.1} ms{}",
        scan.rows,
        scan.source.as_str(),
        scan.took.as_secs_f64() * 1e3,
        scan.torn
            .as_ref()
            .map(|why| format!("; may be incomplete: {why}"))
            .unwrap_or_default()
    );
    out
}

/// Columns as wide as their widest cell.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let wide = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(wide).collect();
    let mut out = String::new();
    // A cgroup's name is its maker's, and may not be fit for a terminal.
    let plain = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    for row in rows {
        let cells = row.iter().zip(&widths);
        let line: Vec<_> = cells.map(|(cell, wide)| format!("{cell:<wide$}")).collect();
        out.extend(line.join("  ").trim_end().chars().map(plain));
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_that_fails_ends_nothing_unless_all_do() {
        let mut scanner = crate::host::Monitor::builder().scanner().unwrap();
        let mut watched = |fails: &dyn Fn(u32) -> bool| {
            let mut looks = 0;
            watch(Duration::from_millis(30), Duration::from_millis(10), || {
                looks += 1;
                if fails(looks) {
                    return Err(std::io::Error::other("no such table"));
                }
                scanner.scan()
            })
        };
        assert_eq!(watched(&|_| false).ok().unwrap().note(), None);
        let note = watched(&|look| look == 1).ok().unwrap().note().unwrap();
        assert!(
            note.starts_with("1 of ") && note.contains("the last one did not"),
            "{note}"
        );
        let note = watched(&|look| look > 1).ok().unwrap().note().unwrap();
        assert!(
            note.contains(" s ago") && note.ends_with("no such table"),
            "{note}"
        );
        match watched(&|_| true) {
            Err(Failure::Run(error)) => assert!(error.to_string().contains("--proc-root")),
            _ => panic!("nothing was there to be printed"),
        }
    }

    #[test]
    fn columns_stand_under_each_other() {
        let rows = [["a", "bb", "c"], ["aaa", "b", ""]];
        let rows: Vec<_> = rows
            .iter()
            .map(|row| row.map(String::from).to_vec())
            .collect();
        assert_eq!(aligned(&rows), "a    bb  c\naaa  b\n");
        let wild = [vec!["a\u{1b}[31m\n".to_owned()]];
        assert_eq!(aligned(&wild), "a\u{fffd}[31m\n");
    }
}
