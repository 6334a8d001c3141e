//! Received spans as text: what an example prints at its end, so that a terminal shows what Jaeger would.
//!
//! One block per trace, the earliest first; one line per span, under its parent and by start time, 100 columns at most:
//!
//! ```text
//! ── trace 4bf92f35 · 3 spans · 12.3 ms
//! GET /orders                            12.3 ms ████████████████████████
//! │  · connection.acquired +8.20 ms
//! ├─ wait_for_connection db.example:5432 8.10 ms ████████████████         wait.outcome=delivered_new
//! └─ SELECT orders                       3.80 ms                 ████████ ✗ timed_out
//! ```
//!
//! The bar spans the whole trace: where it starts and how long it is, in proportion. Notes stand behind it: what failed,
//! that a parent has not arrived, and the attributes asked for; what finds no room there goes to lines of its own. The same
//! spans give the same text, in whatever order they arrived.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "compiled into every test and example that includes it, and each uses a part"
)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write;

use super::receiver::{ReceivedEvent, ReceivedSpan};

const COLUMNS: usize = 100;
const BAR_COLUMNS: usize = 24;
const DURATION_COLUMNS: usize = 7;
/// Tree and name share a column as wide as its widest line, within these bounds.
const NAME_COLUMNS: (usize, usize) = (12, 44);
/// A deeper tree loses its left part, so that the names stay readable.
const TREE_COLUMNS: usize = 24;
const MOST_EVENTS: usize = 6;

/// Draws the spans. Of each span it also prints the attributes whose keys are in `highlight`, in that order.
///
/// Keys are shortened: without `conntrack.`, and no more than their last two parts (`network.peer.address` becomes
/// `peer.address`).
pub fn print_waterfall(spans: &[ReceivedSpan], highlight: &[&str]) -> String {
    let mut by_id = BTreeMap::<&str, Vec<&ReceivedSpan>>::new();
    for span in spans {
        by_id.entry(&span.trace_id).or_default().push(span);
    }
    if by_id.is_empty() {
        return "(no spans)\n".to_owned();
    }
    let digits = distinct_prefix(&by_id.keys().copied().collect::<Vec<_>>());
    let mut traces: Vec<_> = by_id.into_values().map(Trace::new).collect();
    // Stable: traces that start together stay in the order of their ids.
    traces.sort_by_key(|trace| trace.start);
    let blocks: Vec<_> = traces
        .iter()
        .map(|trace| trace.draw(digits, highlight))
        .collect();
    blocks.join("\n")
}

/// One trace: its spans by start time.
struct Trace<'a> {
    spans: Vec<&'a ReceivedSpan>,
    start: u64,
    end: u64,
}

impl<'a> Trace<'a> {
    fn new(mut spans: Vec<&'a ReceivedSpan>) -> Self {
        spans.sort_by_key(|span| (span.start, Reverse(span.end), &span.name, &span.span_id));
        let start = spans
            .iter()
            .map(|span| span.start)
            .min()
            .unwrap_or_default();
        let end = spans.iter().map(|span| span.end).max().unwrap_or_default();
        Self { spans, start, end }
    }

    fn draw(&self, digits: usize, highlight: &[&str]) -> String {
        let rows = self.rows();
        let widest = rows
            .iter()
            .map(|row| width(&row.head()))
            .max()
            .unwrap_or_default();
        let name_columns = widest.clamp(NAME_COLUMNS.0, NAME_COLUMNS.1);
        let note_columns = COLUMNS - (name_columns + DURATION_COLUMNS + BAR_COLUMNS + 3);
        let id = self.spans.first().map_or("", |span| &span.trace_id);
        let mut text = format!(
            "── trace {} · {} · {}\n",
            id.chars().take(digits).collect::<String>(),
            counted(self.spans.len(), "span"),
            humanised(self.end.saturating_sub(self.start)),
        );
        for row in &rows {
            let mut notes = row.notes(highlight).into_iter().peekable();
            line(
                &mut text,
                &format!(
                    "{:<name_columns$} {:>DURATION_COLUMNS$} {:<BAR_COLUMNS$} {}",
                    clipped(&row.head(), name_columns),
                    humanised(row.span.end.saturating_sub(row.span.start)),
                    self.bar(row.span),
                    fill(&mut notes, note_columns),
                ),
            );
            while let Some(note) = notes.next() {
                // A note wider than a line is cut by `line`: it must not stay in the queue.
                let room = COLUMNS.saturating_sub(width(&row.under) + width(&note) + 2);
                let more = fill(&mut notes, room);
                let gap = if more.is_empty() { "" } else { "  " };
                line(&mut text, &format!("{}{note}{gap}{more}", row.under));
            }
            for event in row.events() {
                line(&mut text, &format!("{}{event}", row.under));
            }
        }
        text
    }

    /// The span's place in the trace: begun columns count, and there is always one.
    fn bar(&self, span: &ReceivedSpan) -> String {
        let whole = u128::from(self.end.saturating_sub(self.start)).max(1);
        let columns = |time: u64| u128::from(time.saturating_sub(self.start)) * BAR_COLUMNS as u128;
        let begin = (columns(span.start) / whole).min(BAR_COLUMNS as u128 - 1) as usize;
        let end = columns(span.end).div_ceil(whole).min(BAR_COLUMNS as u128) as usize;
        " ".repeat(begin) + &"█".repeat(end.saturating_sub(begin).max(1))
    }

    /// The spans as a tree, from the top down. Every span comes once, whatever the parents say.
    fn rows(&self) -> Vec<Row<'a>> {
        let ids: HashSet<_> = self
            .spans
            .iter()
            .map(|span| span.span_id.as_str())
            .collect();
        let mut children = HashMap::<&str, Vec<usize>>::new();
        let mut roots = Vec::new();
        for (index, span) in self.spans.iter().enumerate() {
            match span.parent_span_id.as_deref() {
                Some(parent) if ids.contains(parent) => {
                    children.entry(parent).or_default().push(index);
                }
                _ => roots.push(index),
            }
        }
        let mut rows = Vec::with_capacity(self.spans.len());
        let mut placed = vec![false; self.spans.len()];
        // Whoever is not under a root is in a circle of parents, which is cut at its earliest span.
        for root in roots.into_iter().chain(0..self.spans.len()) {
            // Depth first by hand, since a received tree may be deeper than the stack: (span, line to it, line past it).
            let mut waiting = vec![(root, String::new(), String::new())];
            while let Some((index, lead, past)) = waiting.pop() {
                if std::mem::replace(&mut placed[index], true) {
                    continue;
                }
                let span = self.spans[index];
                // Taken out, so that of two spans with one id the first gets the children.
                let mut below = children.remove(span.span_id.as_str()).unwrap_or_default();
                below.retain(|child| !placed[*child]);
                let under = clipped_left(&format!(
                    "{past}{}",
                    if below.is_empty() { "   " } else { "│  " }
                ));
                let last = below.last().copied();
                waiting.extend(below.into_iter().rev().map(|child| {
                    let (lead, beside) = if Some(child) == last {
                        ("└─ ", "   ")
                    } else {
                        ("├─ ", "│  ")
                    };
                    (
                        child,
                        clipped_left(&format!("{past}{lead}")),
                        clipped_left(&format!("{past}{beside}")),
                    )
                }));
                let parentless = lead.is_empty() && span.parent_span_id.is_some();
                rows.push(Row {
                    span,
                    lead,
                    under,
                    parentless,
                });
            }
        }
        rows
    }
}

/// A span's place in the drawing.
struct Row<'a> {
    span: &'a ReceivedSpan,
    /// The tree before its name.
    lead: String,
    /// The tree before the lines under it.
    under: String,
    parentless: bool,
}

impl Row<'_> {
    fn head(&self) -> String {
        format!("{}{}", self.lead, self.span.name)
    }

    fn notes(&self, highlight: &[&str]) -> Vec<String> {
        let attribute = |key| self.span.attributes.get(key).map(ToString::to_string);
        let error_type = attribute("error.type");
        let mut notes = Vec::new();
        if error_type.is_some() || self.span.status_error.is_some() {
            let message = self
                .span
                .status_error
                .clone()
                .filter(|message| !message.is_empty());
            let error = error_type.or(message).unwrap_or_else(|| "error".to_owned());
            notes.push(format!("✗ {error}"));
        }
        if self.parentless {
            notes.push("(parent not here)".to_owned());
        }
        let shown = highlight.iter().filter(|key| **key != "error.type");
        notes.extend(shown.filter_map(|key| {
            let value = attribute(*key)?;
            Some(format!("{}={value}", short_key(key)))
        }));
        notes
    }

    fn events(&self) -> Vec<String> {
        let mut events: Vec<&ReceivedEvent> = self.span.events.iter().collect();
        events.sort_by_key(|event| event.time);
        let mut lines: Vec<_> = events
            .iter()
            .take(MOST_EVENTS)
            .map(|event| {
                let sign = if event.time < self.span.start {
                    '-'
                } else {
                    '+'
                };
                let offset = humanised(event.time.abs_diff(self.span.start));
                format!("· {} {sign}{offset}", event.name)
            })
            .collect();
        match (
            events.len().saturating_sub(MOST_EVENTS),
            self.span.dropped_events,
        ) {
            (0, 0) => {}
            (more, 0) => lines.push(format!("… {more} more")),
            (0, dropped) => lines.push(format!("… {dropped} dropped")),
            (more, dropped) => lines.push(format!("… {more} more, {dropped} dropped")),
        }
        lines
    }
}

/// As many digits as tell the traces apart, at least 8.
fn distinct_prefix(ids: &[&str]) -> usize {
    let longest = ids.iter().map(|id| id.len()).max().unwrap_or_default();
    let distinct = |digits: &usize| {
        let prefixes: HashSet<_> = ids
            .iter()
            .map(|id| id.get(..*digits).unwrap_or(id))
            .collect();
        prefixes.len() == ids.len()
    };
    (8..longest).find(distinct).unwrap_or(longest)
}

/// Three digits and a unit; from a minute on `2m05s`, from an hour on `3h04m`, from 100 hours on `4d`.
fn humanised(ns: u64) -> String {
    const SECOND: u64 = 1_000_000_000;
    let three_digits = |unit: u64| {
        let rounded = |parts: u64| {
            (u128::from(ns) * u128::from(parts) + u128::from(unit / 2)) / u128::from(unit)
        };
        match (rounded(100), rounded(10)) {
            (hundredths @ ..1000, _) => format!("{}.{:02}", hundredths / 100, hundredths % 100),
            (_, tenths @ ..1000) => format!("{}.{}", tenths / 10, tenths % 10),
            _ => rounded(1).to_string(),
        }
    };
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..999_500 => format!("{} µs", three_digits(1_000)),
        999_500..999_500_000 => format!("{} ms", three_digits(1_000_000)),
        999_500_000..59_950_000_000 => {
            let tenths = (ns + SECOND / 20) / (SECOND / 10);
            format!("{}.{} s", tenths / 10, tenths % 10)
        }
        59_950_000_000..3_599_500_000_000 => {
            let seconds = (ns + SECOND / 2) / SECOND;
            format!("{}m{:02}s", seconds / 60, seconds % 60)
        }
        3_599_500_000_000..360_000_000_000_000 => {
            let minutes = (ns + SECOND / 2) / SECOND / 60;
            format!("{}h{:02}m", minutes / 60, minutes % 60)
        }
        _ => format!("{}d", ns / SECOND / 86_400),
    }
}

fn short_key(key: &str) -> &str {
    let key = key.strip_prefix("conntrack.").unwrap_or(key);
    match key.rmatch_indices('.').nth(1) {
        Some((dot, _)) => &key[dot + 1..],
        None => key,
    }
}

/// Takes notes for as long as they fit into the columns, and joins them.
fn fill(notes: &mut std::iter::Peekable<impl Iterator<Item = String>>, columns: usize) -> String {
    let mut text = String::new();
    loop {
        let gap = if text.is_empty() { "" } else { "  " };
        let left = columns.saturating_sub(width(&text) + width(gap));
        match notes.next_if(|note| width(note) <= left) {
            Some(note) => {
                text.push_str(gap);
                text.push_str(&note);
            }
            None => return text,
        }
    }
}

/// Ends a line of the drawing: within its columns, without control characters or blanks at the end.
fn line(text: &mut String, line: &str) {
    let printable = line.replace(char::is_control, "�");
    let _ = writeln!(text, "{}", clipped(printable.trim_end(), COLUMNS));
}

fn clipped(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    text.chars().take(columns - 1).chain(['…']).collect()
}

fn clipped_left(tree: &str) -> String {
    let extra = width(tree).saturating_sub(TREE_COLUMNS);
    if extra == 0 {
        return tree.to_owned();
    }
    ['…']
        .into_iter()
        .chain(tree.chars().skip(extra + 1))
        .collect()
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Columns, where every character takes one: true for what names and attributes are made of here.
fn width(text: &str) -> usize {
    text.chars().count()
}
