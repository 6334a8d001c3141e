//! `--once`: a table for a person.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::time::{Duration, Instant};

use super::Failure;
use super::settings::Settings;
use crate::config::ConfigError;
use crate::event::Direction;
use crate::host::ports::service_names;
use crate::host::{Connections, Snapshot};

/// Watches for as long as it takes to know what is long-term, and prints what is there.
pub(super) fn print(settings: &Settings) -> Result<(), Failure> {
    let failed = |error: std::io::Error| {
        let help =
            "it can't be read; allow netlink (AF_NETLINK) or /proc/net/tcp, or give --proc-root";
        Failure::Run(ConfigError::new("the host's TCP table", "once", help).with_source(error))
    };
    let mut scanner = settings.monitor().scanner().map_err(Failure::Usage)?;
    let mut snapshot = scanner.scan().map_err(failed)?;
    let end = Instant::now() + settings.duration;
    if std::io::stderr().is_terminal() && settings.duration > Duration::from_secs(1) {
        let seconds = settings.duration.as_secs();
        eprintln!("watching for {seconds} s; --duration 0 for a table at once");
    }
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        std::thread::sleep(left.min(settings.period));
        snapshot = scanner.scan().map_err(failed)?;
    }
    let table = render(&snapshot, &service_names(), settings.duration);
    // Who reads may have gone, as `head` does.
    let _ = std::io::stdout().write_all(table.as_bytes());
    Ok(())
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
    for row in rows {
        let cells = row.iter().zip(&widths);
        let line: Vec<_> = cells.map(|(cell, wide)| format!("{cell:<wide$}")).collect();
        out.push_str(line.join("  ").trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_each_other() {
        let rows = [["a", "bb", "c"], ["aaa", "b", ""]];
        let rows: Vec<_> = rows
            .iter()
            .map(|row| row.map(String::from).to_vec())
            .collect();
        assert_eq!(aligned(&rows), "a    bb  c\naaa  b\n");
    }
}
