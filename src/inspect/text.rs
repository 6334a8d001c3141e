//! The page for `curl` and a terminal.
//!
//! Names of hosts and the like come from outside: [`clean`] makes what a terminal or a reader could
//! stumble over visible.

use std::borrow::Cow;
use std::fmt::{self, Write as _};

use crate::event::{Direction, Endpoint};
use crate::inspect::view::{
    Bucket, Closed, Connections, Count, Family, Holder, One, Overview, Page, PoolRow, Pools, Row,
    TraceView, View,
};

/// Longer texts from outside are cut.
const LONGEST: usize = 120;

/// A text from outside, as [`escaped`], and cut where it is too long for a table.
pub(super) fn clean(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(LONGEST) {
        None => escaped(text),
        Some((end, _)) => Cow::Owned(format!("{}…", escaped(&text[..end]))),
    }
}

/// A text from outside, without characters that would do something: control characters, and those that
/// are not seen or turn the direction of writing, are shown as escapes.
pub(super) fn escaped(text: &str) -> Cow<'_, str> {
    let acts = |c: char| {
        let unseen = matches!(
            c,
            '\u{ad}'
                | '\u{61c}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{2069}'
                | '\u{feff}'
        );
        unseen || c.is_control()
    };
    if !text.chars().any(acts) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if acts(c) {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped)
}

/// A time as a person says it.
pub(super) fn time(seconds: f64) -> String {
    match seconds {
        s if s < 0.000_001 => "0s".into(),
        s if s < 0.001 => format!("{:.0}µs", s * 1e6),
        s if s < 1.0 => format!("{:.0}ms", s * 1e3),
        s if s < 60.0 => format!("{s:.1}s"),
        s if s < 3_600.0 => format!("{}m{:02}s", s as u64 / 60, s as u64 % 60),
        s if s < 86_400.0 => format!("{}h{:02}m", s as u64 / 3_600, s as u64 / 60 % 60),
        s => format!("{}d{:02}h", s as u64 / 86_400, s as u64 / 3_600 % 24),
    }
}

/// So many bytes.
pub(super) fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB", "TiB"] {
        if value < 1_024.0 || unit == "TiB" {
            return match unit {
                "B" => format!("{bytes} B"),
                _ if value < 10.0 => format!("{value:.1} {unit}"),
                _ => format!("{value:.0} {unit}"),
            };
        }
        value /= 1_024.0;
    }
    String::new()
}

/// The bound of a bucket, as x/net/trace writes it.
pub(super) fn bound(seconds: f64) -> String {
    match seconds {
        s if s >= 3_600.0 => format!("{}h", s as u64 / 3_600),
        s if s >= 60.0 && s % 60.0 == 0.0 => format!("{}m", s as u64 / 60),
        s => format!("{s}s"),
    }
}

pub(super) fn maybe<T>(value: Option<T>, text: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| "-".into(), text)
}

pub(super) fn render(page: &Page<'_>) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{}: {}", clean(page.title), name(&page.view));
    let _ = match &page.view {
        View::Overview(view) => overview(&mut out, view),
        View::Connections(view) => connections(&mut out, view),
        View::Connection(view) => one(&mut out, view),
        View::Pools(view) => pools(&mut out, view),
        View::Closed(view) => closed(&mut out, view),
    };
    out
}

pub(super) const fn name(view: &View) -> &'static str {
    match view {
        View::Overview(_) => "overview",
        View::Connections(_) => "connections",
        View::Connection(_) => "connection",
        View::Pools(_) => "pools",
        View::Closed(_) => "recently closed and failed",
    }
}

/// Lines whose columns are as wide as their widest cell.
struct Columns {
    lines: Vec<Vec<String>>,
}

impl Columns {
    fn new(head: &[&str]) -> Self {
        Self {
            lines: vec![head.iter().map(|text| (*text).to_owned()).collect()],
        }
    }

    fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.lines.push(cells.into_iter().collect());
    }

    fn write(&self, out: &mut String) -> fmt::Result {
        let mut widths: Vec<usize> = Vec::new();
        for line in &self.lines {
            for (at, cell) in line.iter().enumerate() {
                let width = cell.chars().count();
                match widths.get_mut(at) {
                    Some(most) => *most = width.max(*most),
                    None => widths.push(width),
                }
            }
        }
        for line in &self.lines {
            let last = line.len().saturating_sub(1);
            for (at, (cell, width)) in line.iter().zip(&widths).enumerate() {
                if at == last {
                    out.push_str(cell);
                } else {
                    write!(out, "{cell:width$}  ")?;
                }
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

fn overview(out: &mut String, view: &Overview) -> fmt::Result {
    writeln!(
        out,
        "{} open, {} waiting, watched for {}",
        view.open,
        view.waiting,
        time(view.watched_for)
    )?;
    if !view.listeners.is_empty() {
        writeln!(out, "\nlisteners")?;
        let mut table = Columns::new(&[
            "NAME",
            "OPEN",
            "NEW",
            "OLDEST NEW",
            "ACTIVE",
            "IDLE",
            "HIJACKED",
            "OTHER",
            "HANDSHAKES",
            "OPENED",
            "LIMIT",
            "HITS",
            "ACCEPT QUEUE",
            "REQUESTS",
            "READ",
            "WRITTEN",
            "",
        ]);
        for family in &view.listeners {
            table.row([
                clean(&family.name).into_owned(),
                family.open.to_string(),
                family.new.to_string(),
                maybe(family.oldest_new, time),
                family.active.to_string(),
                family.idle.to_string(),
                family.hijacked.to_string(),
                family.other.to_string(),
                maybe(family.tls_handshakes, |n| n.to_string()),
                family.opened.to_string(),
                maybe(family.max_connections, |limit| limit.to_string()),
                maybe(family.limit_hits, |hits| hits.to_string()),
                maybe(family.accept_queue, |queue| {
                    format!("{}/{}", queue.length, queue.limit)
                }),
                family.requests.to_string(),
                bytes(family.bytes_read),
                bytes(family.bytes_written),
                if family.draining == Some(true) {
                    "draining".into()
                } else {
                    String::new()
                },
            ]);
        }
        table.write(out)?;
    }
    if !view.dialers.is_empty() {
        writeln!(out, "\ndialers")?;
        let mut table = Columns::new(&[
            "NAME",
            "OPEN",
            "ACTIVE",
            "IDLE",
            "OTHER",
            "CONNECTING",
            "ATTEMPTS",
            "OPENED",
            "FAILED",
            "REQUESTS",
            "READ",
            "WRITTEN",
        ]);
        for family in &view.dialers {
            let failed: u64 = family.failures.iter().map(|failure| failure.count).sum();
            table.row([
                clean(&family.name).into_owned(),
                family.open.to_string(),
                family.active.to_string(),
                family.idle.to_string(),
                family.other.to_string(),
                family.connecting.to_string(),
                maybe(family.attempts, |n| n.to_string()),
                family.opened.to_string(),
                failed.to_string(),
                family.requests.to_string(),
                bytes(family.bytes_read),
                bytes(family.bytes_written),
            ]);
        }
        table.write(out)?;
    }
    if !view.pools.is_empty() {
        writeln!(out, "\npools")?;
        pool_table(out, view.pools.iter())?;
    }
    families(out, view)?;
    for family in view.listeners.iter().chain(&view.dialers) {
        let pairs = |counts: &[Count]| {
            let pairs = counts
                .iter()
                .map(|count| format!("{}={}", count.reason, count.count));
            pairs.collect::<Vec<_>>().join(" ")
        };
        for (what, counts) in [("failed", &family.failures), ("closed", &family.closed)] {
            if !counts.is_empty() {
                writeln!(out, "{}: {what} {}", clean(&family.family), pairs(counts))?;
            }
        }
    }
    let dropped: Vec<_> = dropped(view)
        .map(|(what, n)| format!("{what}={n}"))
        .collect();
    if !dropped.is_empty() {
        writeln!(out, "dropped by the telemetry: {}", dropped.join(" "))?;
    }
    Ok(())
}

/// What the telemetry dropped, by what it is called.
pub(super) fn dropped(view: &Overview) -> impl Iterator<Item = (String, u64)> + use<> {
    let dropped = serde_json::to_value(view.dropped).unwrap_or_default();
    let counts = match dropped {
        serde_json::Value::Object(counts) => counts,
        _ => serde_json::Map::new(),
    };
    let counts = counts.into_iter();
    counts.filter_map(|(what, count)| Some((what, count.as_u64().filter(|n| *n > 0)?)))
}

/// The families and buckets of x/net/trace.
fn families(out: &mut String, view: &Overview) -> fmt::Result {
    let all = || view.listeners.iter().chain(&view.dialers);
    let Some(any) = all().next() else {
        return Ok(());
    };
    writeln!(out, "\nfamilies")?;
    let head = |first: &[&str], bounds: &mut dyn Iterator<Item = String>| Columns {
        lines: vec![
            first
                .iter()
                .map(|text| (*text).to_owned())
                .chain(bounds)
                .collect(),
        ],
    };
    let counts = |family: &Family, counts: &mut dyn Iterator<Item = u64>| {
        let name = clean(&family.family).into_owned();
        let counts = counts.map(|count| count.to_string());
        std::iter::once(name).chain(counts).collect::<Vec<_>>()
    };
    let windows = any.recent_errors.iter();
    let mut windows = windows.map(|window| format!("errs<{}", bound(window.within)));
    let mut table = head(&["FAMILY", "LIVE", "ERRORS"], &mut windows);
    for family in all() {
        let recent = family.recent_errors.iter().map(|window| window.count);
        table.row(counts(
            family,
            &mut [family.open, family.errors].into_iter().chain(recent),
        ));
    }
    table.write(out)?;
    type Of = fn(&Family) -> &[Bucket];
    let kinds: [(&str, Of); 2] = [
        ("SET-UP", |f| &f.setup_durations),
        ("LIFE", |f| &f.lifetimes),
    ];
    for (kind, of) in kinds {
        let mut families = all()
            .filter(|family| kind == "LIFE" || family.has_setups())
            .peekable();
        if families.peek().is_none() {
            continue;
        }
        writeln!(out)?;
        let mut bounds = of(any)
            .iter()
            .map(|bucket| format!("≥{}", bound(bucket.from)));
        let mut table = head(&[kind], &mut bounds);
        for family in families {
            table.row(counts(
                family,
                &mut of(family).iter().map(|bucket| bucket.count),
            ));
        }
        table.write(out)?;
    }
    writeln!(out)
}

fn pool_table<'a>(out: &mut String, pools: impl Iterator<Item = &'a PoolRow>) -> fmt::Result {
    let mut table = Columns::new(&[
        "NAME",
        "KIND",
        "ACTIVE",
        "IDLE",
        "DIALING",
        "IN USE",
        "WAITING",
        "FOR SLOTS",
        "OLDEST",
        "LIMITS",
    ]);
    for pool in pools {
        table.row([
            clean(&pool.name).into_owned(),
            pool.kind.into(),
            maybe(pool.active, |n| n.to_string()),
            maybe(pool.idle, |n| known(n, pool.idle_source)),
            maybe(pool.dialing, |n| n.to_string()),
            maybe(pool.in_use, |n| n.to_string()),
            known(pool.waiting, pool.waiting_source),
            pool.waiting_for_slot.to_string(),
            maybe(pool.oldest_wait, time),
            limits(pool),
        ]);
    }
    table.write(out)
}

/// A count with a sign of how it is known, where it is not exact.
pub(super) fn known(count: u64, source: Option<&'static str>) -> String {
    match source {
        None | Some("observed") => count.to_string(),
        Some("upper_bound") => format!("≤{count}"),
        Some(_) => format!("~{count}"),
    }
}

pub(super) fn limits(pool: &PoolRow) -> String {
    let limits = pool.limits.iter().map(|limit| {
        let hits = maybe(limit.hits, |hits| hits.to_string());
        format!("{}={} (hit {hits})", limit.limit, limit.value)
    });
    limits.collect::<Vec<_>>().join(" ")
}

fn connections(out: &mut String, view: &Connections) -> fmt::Result {
    writeln!(
        out,
        "{} of {} connections, page {} of {}{}",
        view.matching,
        view.total,
        view.page,
        view.pages,
        found(view)
    )?;
    let mut table = Columns::new(&ROW);
    for row in &view.connections {
        table.row(cells(row));
    }
    table.write(out)
}

/// How old the look is by which connections were found, where that is worth a word.
pub(super) fn found(view: &Connections) -> String {
    if view.found < 2.0 {
        return String::new();
    }
    format!(", as found {} ago", time(view.found))
}

const ROW: [&str; 17] = [
    "ID",
    "DIR",
    "NAME",
    "HOST",
    "LOCAL",
    "PEER",
    "PROTO",
    "TLS",
    "STATE",
    "AGE",
    "IDLE",
    "REQS",
    "IN FLIGHT",
    "READ",
    "WRITTEN",
    "RTT",
    "RETR",
];

fn cells(row: &Row) -> Vec<String> {
    vec![
        row.id.clone(),
        way(row).into(),
        clean(&row.name).into_owned(),
        host(row),
        end(row.local.as_ref()),
        end(row.peer.as_ref()),
        maybe(row.protocol, str::to_owned),
        tls_version(row),
        row.state.as_str().into(),
        time(row.age),
        maybe(row.idle, time),
        row.requests.to_string(),
        row.in_flight.to_string(),
        bytes(row.bytes_read),
        bytes(row.bytes_written),
        maybe(row.rtt, time),
        maybe(row.retransmits, |n| n.to_string()),
    ]
}

/// Which way it goes.
pub(super) const fn way(row: &Row) -> &'static str {
    match row.direction {
        Direction::Inbound => "in",
        Direction::Outbound => "out",
    }
}

pub(super) fn host(row: &Row) -> String {
    maybe(row.host.as_deref(), |host| clean(host).into_owned())
}

pub(super) fn end(end: Option<&Endpoint>) -> String {
    maybe(end, |end| clean(&end.to_string()).into_owned())
}

pub(super) fn tls_version(row: &Row) -> String {
    let version = row.tls.as_ref().map(|tls| tls.version.unwrap_or("yes"));
    maybe(version, str::to_owned)
}

fn one(out: &mut String, view: &One) -> fmt::Result {
    for (name, cell) in ROW.iter().zip(cells(&view.row)) {
        writeln!(out, "{:<12}{cell}", name.to_lowercase())?;
    }
    for (name, value) in facts(view) {
        writeln!(out, "{name:<12}{value}")?;
    }
    if !view.timeline.is_empty() {
        writeln!(out, "\ntimeline")?;
        for entry in &view.timeline {
            let detail = entry.detail.as_deref().unwrap_or_default();
            writeln!(
                out,
                "{:>12}  {} {detail}",
                format!("{:.6}", entry.at),
                entry.event
            )?;
        }
        if view.timeline_dropped > 0 {
            writeln!(
                out,
                "{} moments between were not kept",
                view.timeline_dropped
            )?;
        }
    }
    Ok(())
}

/// What one connection has beside its row.
pub(super) fn facts(view: &One) -> Vec<(&'static str, String)> {
    let mut facts = vec![("started", date(view.started))];
    let mut put = |name, value: Option<String>| facts.extend(value.map(|value| (name, value)));
    put("set-up", view.setup.map(time));
    put("failed", view.failure.map(str::to_owned));
    put("closed", view.close_reason.map(str::to_owned));
    put("closed by", view.closed_by.map(str::to_owned));
    put("active for", view.row.active.map(time));
    if let Some(tls) = &view.row.tls {
        put(
            "cipher",
            tls.cipher.as_deref().map(|text| clean(text).into_owned()),
        );
        put(
            "alpn",
            tls.alpn.as_deref().map(|text| clean(text).into_owned()),
        );
        put(
            "sni",
            tls.server_name
                .as_deref()
                .map(|text| clean(text).into_owned()),
        );
        put("resumed", tls.resumed.map(|resumed| resumed.to_string()));
    }
    put("trace", view.trace.as_ref().map(trace));
    for serving in &view.serving {
        let since = maybe(serving.since, time);
        let request = serving
            .request
            .map_or_else(String::new, |n| format!("request {n} "));
        let who = maybe(serving.trace.as_ref(), trace);
        put("serves", Some(format!("{request}{who} for {since}")));
    }
    if let Some(tcp) = &view.tcp {
        put("tcp state", Some(tcp.state.into()));
        put("rtt var", Some(time(tcp.rtt_variance)));
        put("lost", Some(tcp.lost.to_string()));
        put("unacked", Some(tcp.unacked.to_string()));
        put("cwnd", Some(tcp.congestion_window.to_string()));
        put(
            "delivery",
            tcp.delivery_rate.map(|rate| {
                let least = if tcp.app_limited { "at least " } else { "" };
                format!("{least}{}/s", bytes(rate))
            }),
        );
        put("acked", tcp.bytes_acked.map(bytes));
        put("received", tcp.bytes_received.map(bytes));
        put("not sent", tcp.not_sent.map(|n| bytes(n.into())));
    }
    facts
}

fn trace(trace: &TraceView) -> String {
    match &trace.link {
        Some(link) => format!("{} {}", trace.trace_id, escaped(link)),
        None => trace.trace_id.clone(),
    }
}

/// A moment, in UTC.
pub(super) fn date(unix: f64) -> String {
    let since = std::time::Duration::try_from_secs_f64(unix).unwrap_or_default();
    httpdate::fmt_http_date(std::time::SystemTime::UNIX_EPOCH + since)
}

fn pools(out: &mut String, view: &Pools) -> fmt::Result {
    if view.pools.is_empty() {
        return writeln!(out, "no pools");
    }
    pool_table(out, view.pools.iter().map(|pool| &pool.row))?;
    for pool in &view.pools {
        let Some(keys) = &pool.keys else {
            writeln!(
                out,
                "\n{}: does not say who has its connections and who waits",
                clean(&pool.row.name)
            )?;
            continue;
        };
        for key in keys {
            write!(out, "\n{}: {}", clean(&pool.row.name), clean(&key.key))?;
            if let (Some(active), Some(idle), Some(dialing)) = (key.active, key.idle, key.dialing) {
                write!(out, ": {active} active, {idle} idle, {dialing} dialing")?;
            }
            writeln!(out)?;
            if let Some(why) = &key.why {
                writeln!(out, "  {why}")?;
            }
            for holder in &key.holders {
                writeln!(out, "  holds  {}", held(holder))?;
            }
            if key.holders_omitted > 0 {
                writeln!(out, "  and {} more hold", key.holders_omitted)?;
            }
            for waiter in &key.waiters {
                writeln!(
                    out,
                    "  waits  {}. request {} for {}: for {} {}",
                    waiter.position,
                    waiter.request,
                    time(waiter.waited),
                    waiter.waits_for.replace('_', " "),
                    maybe(waiter.trace.as_ref(), trace)
                )?;
            }
            if key.waiters_omitted > 0 {
                writeln!(out, "  and {} more wait", key.waiters_omitted)?;
            }
        }
        if pool.keys_omitted > 0 {
            writeln!(out, "  and {} more hosts", pool.keys_omitted)?;
        }
    }
    Ok(())
}

fn held(holder: &Holder) -> String {
    format!(
        "request {} on {} for {} {}",
        holder.request,
        maybe(holder.connection.as_deref(), str::to_owned),
        maybe(holder.held_for, time),
        maybe(holder.trace.as_ref(), trace)
    )
}

fn closed(out: &mut String, view: &Closed) -> fmt::Result {
    let older = if view.more {
        ", and there are older ones"
    } else {
        ""
    };
    writeln!(out, "page {}{older}", view.page)?;
    let mut table = Columns::new(&[
        "ENDED", "ID", "DIR", "NAME", "HOST", "PEER", "REASON", "BY", "AGE", "REQS", "READ",
        "WRITTEN",
    ]);
    for closed in &view.connections {
        let row = &closed.row;
        table.row([
            date(closed.ended),
            row.id.clone(),
            way(row).into(),
            clean(&row.name).into_owned(),
            host(row),
            end(row.peer.as_ref()),
            closed.reason.into(),
            maybe(closed.by, str::to_owned),
            time(row.age),
            row.requests.to_string(),
            bytes(row.bytes_read),
            bytes(row.bytes_written),
        ]);
    }
    table.write(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_act_on_a_terminal_is_shown_as_an_escape() {
        assert_eq!(clean("example.com"), "example.com");
        assert_eq!(clean("a\u{1b}[2J\r\nb"), "a\\u{1b}[2J\\r\\nb");
        assert_eq!(clean("\u{202e}moc"), "\\u{202e}moc");
        let long = "x".repeat(5_000);
        assert_eq!(clean(&long).chars().count(), LONGEST + 1);
        assert_eq!(clean("bücher.example"), "bücher.example");
    }

    #[test]
    fn times_and_sizes_are_said_as_people_say_them() {
        let times = [0.0, 0.000_25, 0.0123, 1.26, 75.0, 7_260.0, 90_000.0];
        let said: Vec<_> = times.into_iter().map(time).collect();
        assert_eq!(
            said,
            ["0s", "250µs", "12ms", "1.3s", "1m15s", "2h01m", "1d01h"]
        );
        let sizes = [0, 1_023, 1_024, 15_000, 3 << 30];
        let said: Vec<_> = sizes.into_iter().map(bytes).collect();
        assert_eq!(said, ["0 B", "1023 B", "1.0 KiB", "15 KiB", "3.0 GiB"]);
        let bounds = [0.0, 0.05, 10.0, 60.0, 100.0, 600.0, 3_600.0, 36_000.0];
        let said: Vec<_> = bounds.into_iter().map(bound).collect();
        assert_eq!(
            said,
            ["0s", "0.05s", "10s", "1m", "100s", "10m", "1h", "10h"]
        );
    }
}
