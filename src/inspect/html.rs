//! The page for people: one document without anything from elsewhere.
//!
//! maud escapes whatever is put into it, and [`clean`] takes the rest out of texts from outside. What
//! changes stands in `main`, which the script replaces; without the script the page is as complete,
//! and a reload brings it up to date.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::event::{ConnectionState, Direction};
use crate::inspect::query::{Filter, STATES, Sort, text as duration};
use crate::inspect::text::{bound, bytes, clean, date, facts, limits, maybe, time, tls_version};
use crate::inspect::view::{
    Bucket, Closed, Connections, Count, Family, Holder, One, Overview, Page, Pool, PoolKeyView,
    PoolRow, Pools, Row, Trace, View,
};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// What the document needs beside the view.
pub(super) struct Frame<'a> {
    /// Where the page is mounted, without a slash at the end.
    pub(super) base: &'a str,
    /// Allows the script and the style of this document, and nothing else.
    pub(super) nonce: &'a str,
    /// There where actions are offered.
    pub(super) token: Option<&'a str>,
}

/// The whole document.
pub(super) fn document(page: &Page<'_>, frame: &Frame<'_>) -> String {
    let (base, title) = (frame.base, clean(page.title));
    let name = super::text::name(&page.view);
    let tab = |path: &str, text: &str, current: bool| {
        html! {
            li { a href=(path) aria-current=[current.then_some("page")] { (text) } }
        }
    };
    let at = |path: &str| format!("{base}{path}");
    // A router has no slash after the place where it is mounted.
    let home = if base.is_empty() { "/" } else { base };
    let on = |view: fn(&View) -> bool| view(&page.view);
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width,initial-scale=1";
                title { (title) " · " (name) }
                // No request for an icon.
                link rel="icon" href="data:,";
                style nonce=(frame.nonce) { (PreEscaped(STYLE)) }
            }
            body {
                a.skip href="#main" { "Skip to the content" }
                header {
                    h1 { (title) }
                    nav aria-label="Views" {
                        ul {
                            (tab(home, "Overview", on(|v| matches!(v, View::Overview(_)))))
                            (tab(&at("/connections"), "Connections", on(|v| matches!(v, View::Connections(_)))))
                            (tab(&at("/pools"), "Pools", on(|v| matches!(v, View::Pools(_)))))
                            (tab(&at("/closed"), "Closed and failed", on(|v| matches!(v, View::Closed(_)))))
                        }
                    }
                    span #status role="status" { (date(page.generated)) }
                    button #pause type="button" hidden { "Pause" }
                }
                @if let View::Connections(view) = &page.view {
                    (filter_form(base, &view.filter))
                }
                main #main tabindex="-1" { (content(page, frame)) }
                script nonce=(frame.nonce) { (PreEscaped(SCRIPT)) }
            }
        }
    }
    .into_string()
}

/// What changes.
pub(super) fn content(page: &Page<'_>, frame: &Frame<'_>) -> Markup {
    match &page.view {
        View::Overview(view) => overview(view, frame),
        View::Connections(view) => connections(view, frame),
        View::Connection(view) => one(view, frame),
        View::Pools(view) => pools(view, frame),
        View::Closed(view) => closed(view, frame),
    }
}

/// A page that says why there is none.
pub(super) fn error(status: http::StatusCode, text: &str, nonce: &str) -> String {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                title { (status) }
                link rel="icon" href="data:,";
                style nonce=(nonce) { (PreEscaped(STYLE)) }
            }
            body { main { h1 { (status) } p { (clean(text)) } } }
        }
    }
    .into_string()
}

/// A button that does something, on pages that may.
fn action(frame: &Frame<'_>, path: &str, of: &[(&str, &str)], text: &str) -> Markup {
    html! {
        @if let Some(token) = frame.token {
            form.one method="post" action={ (frame.base) "/actions/" (path) } {
                input type="hidden" name="token" value=(token);
                @for (name, value) in of {
                    input type="hidden" name=(name) value=(value);
                }
                button type="submit" { (text) }
            }
        }
    }
}

fn td(value: impl ToString) -> Markup {
    html! { td.n { (value.to_string()) } }
}

fn overview(view: &Overview, frame: &Frame<'_>) -> Markup {
    html! {
        p {
            b { (view.open) } " connections open, "
            b class=[(view.waiting > 0).then_some("busy")] { (view.waiting) } " requests waiting, up "
            (time(view.uptime)) "."
        }
        h2 { "Listeners" }
        @if view.listeners.is_empty() { p.dim { "None." } }
        @else { (family_table(&view.listeners, frame, "Inbound connections by listener")) }
        h2 { "Dialers" }
        @if view.dialers.is_empty() { p.dim { "None." } }
        @else { (family_table(&view.dialers, frame, "Outbound connections by dialer")) }
        h2 { "Pools" }
        @if view.pools.is_empty() { p.dim { "None." } }
        @else { (pool_table(view.pools.iter(), frame)) }
        (families(view))
        (dropped(view))
    }
}

fn family_table(families: &[Family], frame: &Frame<'_>, caption: &str) -> Markup {
    let inbound = families
        .iter()
        .any(|family| family.direction == Direction::Inbound);
    html! {
        div.wide {
            table {
                caption { (caption) }
                thead { tr {
                    th scope="col" { "Name" }
                    @for head in ["Open", "Active", "Idle"] { th.n scope="col" { (head) } }
                    @if inbound {
                        @for head in ["New", "Oldest new", "Hijacked", "Limit", "Limit hits", "Accept queue"] {
                            th.n scope="col" { (head) }
                        }
                    } @else {
                        @for head in ["Connecting", "Attempts"] { th.n scope="col" { (head) } }
                    }
                    @for head in ["Opened", "Requests", "Read", "Written"] { th.n scope="col" { (head) } }
                    th scope="col" { "Last 10 min: open" }
                    th scope="col" { "Failed" }
                    th scope="col" { "Closed" }
                } }
                tbody {
                    @for family in families {
                        tr data-key=(clean(&family.family)) {
                            th scope="row" {
                                a href={ (frame.base) "/connections?" (names(family)) } { (clean(&family.name)) }
                                @if family.draining == Some(true) { " " span.busy { "draining" } }
                                @if family.draining == Some(false) {
                                    " " (action(frame, "drain", &[("listener", &family.name)], "Drain"))
                                }
                                @if family.idle > 0 {
                                    " " (action(
                                        frame,
                                        "close-idle",
                                        &[("name", &family.name), ("direction", family.direction.as_str())],
                                        "Close idle",
                                    ))
                                }
                            }
                            (td(family.open)) (td(family.active)) (td(family.idle))
                            @if inbound {
                                (td(family.new)) (td(maybe(family.oldest_new, time))) (td(family.hijacked))
                                (td(maybe(family.max_connections, |n| n.to_string())))
                                (td(maybe(family.limit_hits, |n| n.to_string())))
                                (td(maybe(family.accept_queue, |[n, most]| format!("{n} of {most}"))))
                            } @else {
                                (td(family.connecting)) (td(maybe(family.attempts, |n| n.to_string())))
                            }
                            (td(family.opened)) (td(family.requests))
                            (td(bytes(family.bytes_read))) (td(bytes(family.bytes_written)))
                            td { (sparkline(&family.trend.open, "open connections")) }
                            td.bad { (counts(&family.failures)) }
                            td { (counts(&family.closed)) }
                        }
                    }
                }
            }
        }
    }
}

fn names(family: &Family) -> String {
    Filter {
        name: Some(family.name.to_string()),
        direction: Some(family.direction),
        ..Filter::default()
    }
    .query()
}

fn counts(counts: &[Count]) -> Markup {
    html! {
        @for (n, count) in counts.iter().enumerate() {
            @if n > 0 { ", " }
            (count.reason) " " (count.count)
        }
    }
}

/// The families and buckets of x/net/trace: `/debug/events` and the latencies of `/debug/requests`.
fn families(view: &Overview) -> Markup {
    let all = || view.listeners.iter().chain(&view.dialers);
    let Some(any) = all().next() else {
        return html! {};
    };
    html! {
        h2 { "Families" }
        div.wide {
            table {
                caption { "Live connections, and errors of late: failed set-ups and accepts, and connections that ended by an error" }
                thead { tr {
                    th scope="col" { "Family" }
                    th.n scope="col" { "Live" }
                    @for bucket in &any.recent_errors { th.n scope="col" { "errs<" (bound(bucket.seconds)) } }
                    th.n scope="col" { "errors" }
                    th scope="col" { "Last 10 min: opened" }
                    th scope="col" { "Last 10 min: errors" }
                } }
                tbody {
                    @for family in all() {
                        tr data-key=(clean(&family.family)) {
                            th scope="row" { (clean(&family.family)) }
                            (td(family.open))
                            @for bucket in &family.recent_errors {
                                td.n class=[(bucket.count > 0).then_some("bad")] { (bucket.count) }
                            }
                            (td(family.errors))
                            td { (sparkline(&family.trend.opened, "connections opened")) }
                            td { (sparkline(&family.trend.trouble, "errors")) }
                        }
                    }
                }
            }
        }
        @if all().any(Family::has_setups) {
            (histograms("Set-up times: how many took at least so long, and not as long as the next bucket",
                all().filter(|family| family.has_setups()).map(|family| (family, &family.setup_durations[..]))))
        }
        (histograms("Lives of closed connections, likewise",
            all().map(|family| (family, &family.lifetimes[..]))))
    }
}

fn histograms<'a>(
    caption: &str,
    families: impl Iterator<Item = (&'a Family, &'a [Bucket])>,
) -> Markup {
    let mut families = families.peekable();
    let bounds = families.peek().map_or(&[][..], |(_, buckets)| *buckets);
    html! {
        div.wide {
            table {
                caption { (caption) }
                thead { tr {
                    th scope="col" { "Family" }
                    @for bucket in bounds { th.n scope="col" { "≥" (bound(bucket.seconds)) } }
                    th scope="col" { "Shape" }
                } }
                tbody {
                    @for (family, buckets) in families {
                        tr data-key=(clean(&family.family)) {
                            th scope="row" { (clean(&family.family)) }
                            @for bucket in buckets { (td(bucket.count)) }
                            td { (bars(buckets)) }
                        }
                    }
                }
            }
        }
    }
}

fn bars(buckets: &[Bucket]) -> Markup {
    let most = buckets.iter().map(|bucket| bucket.count).max().unwrap_or(0);
    html! {
        svg width=(buckets.len() * 8) height="18" aria-hidden="true" {
            @for (at, bucket) in buckets.iter().enumerate().filter(|(_, bucket)| bucket.count > 0) {
                @let height = (bucket.count * 16).div_ceil(most.max(1));
                rect x=(at * 8) y=(18 - height) width="6" height=(height) {}
            }
        }
    }
}

/// The last minutes as a line; its words are for who doesn't see it.
fn sparkline(values: &[u64], of: &str) -> Markup {
    let most = values.iter().copied().max().unwrap_or(0);
    let last = values.last().copied().unwrap_or(0);
    let points = values.iter().enumerate().map(|(at, value)| {
        let x = at + 120 - values.len().min(120);
        let y = 17.0 - 16.0 * *value as f64 / most.max(1) as f64;
        format!("{x},{y:.0}")
    });
    let points: Vec<_> = points.collect();
    html! {
        svg width="120" height="18" role="img" aria-label={ (of) ": now " (last) ", at most " (most) } {
            polyline points=(points.join(" ")) {}
        }
        " " span.dim { "max " (most) }
    }
}

fn dropped(view: &Overview) -> Markup {
    let dropped = serde_json::to_value(view.dropped).unwrap_or_default();
    let dropped = dropped.as_object().into_iter().flatten();
    let some: Vec<_> = dropped
        .filter(|(_, count)| count.as_u64() != Some(0))
        .collect();
    html! {
        @if !some.is_empty() {
            h2 { "Dropped by the telemetry" }
            dl { @for (name, count) in some { dt { (name) } dd { (count.to_string()) } } }
        }
    }
}

fn pool_table<'a>(pools: impl Iterator<Item = &'a PoolRow>, frame: &Frame<'_>) -> Markup {
    let n = |n: Option<u64>| td(maybe(n, |n| n.to_string()));
    html! {
        div.wide {
            table {
                caption { "Connections and requests by pool" }
                thead { tr {
                    th scope="col" { "Name" }
                    th scope="col" { "Kind" }
                    @for head in ["Active", "Idle", "Dialing", "In use", "Waiting", "Oldest wait", "Most waiting"] {
                        th.n scope="col" { (head) }
                    }
                    th scope="col" { "Last 10 min: waiting" }
                    th scope="col" { "Limits" }
                } }
                tbody {
                    @for (at, pool) in pools.enumerate() {
                        tr data-key={ (at) "-" (clean(&pool.name)) } {
                            th scope="row" {
                                a href={ (frame.base) "/pools" } { (clean(&pool.name)) }
                                @if pool.kind == "transport" && pool.idle.unwrap_or(0) > 0 {
                                    " " (action(frame, "close-idle", &[("pool", &pool.name)], "Close idle"))
                                }
                            }
                            td { (pool.kind.replace('_', " ")) }
                            (n(pool.active)) (n(pool.idle)) (n(pool.dialing)) (n(pool.in_use))
                            td.n class=[(pool.waiting > 0).then_some("busy")] { (pool.waiting) }
                            (td(maybe(pool.oldest_wait, time))) (td(pool.waiting_max))
                            td { (sparkline(&pool.trend.trouble, "requests waiting")) }
                            td { (limits(pool)) }
                        }
                    }
                }
            }
        }
    }
}

// === connections ===

fn filter_form(base: &str, filter: &Filter) -> Markup {
    let field = |name: &str, text: &str, value: Option<String>, hint: &str| {
        html! {
            label { (text) input name=(name) value=(value.unwrap_or_default()) placeholder=(hint) size="12"; }
        }
    };
    html! {
        section #filter aria-label="Filter" {
            form method="get" action={ (base) "/connections" } role="search" {
                (field("name", "Name", filter.name.clone(), ""))
                label { "Direction" select name="direction" {
                    option value="" { "any" }
                    @for direction in [Direction::Inbound, Direction::Outbound] {
                        option value=(direction) selected[filter.direction == Some(direction)] { (direction) }
                    }
                } }
                (field("host", "Host", filter.host.clone(), ""))
                label { "State" select name="state" {
                    option value="" { "any" }
                    @for state in STATES {
                        option value=(state) selected[filter.state == Some(state)] { (state) }
                    }
                } }
                (field("older_than", "Older than", filter.older_than.map(duration), "5m"))
                (field("idle_longer_than", "Idle longer than", filter.idle_longer_than.map(duration), "30s"))
                label { "Sort by" select name="sort" {
                    @for sort in Sort::ALL {
                        option value=(sort.as_str()) selected[filter.sort == sort] { (sort.as_str().replace('_', " ")) }
                    }
                } }
                button type="submit" { "Filter" }
                a href={ (base) "/connections" } { "Clear" }
            }
        }
    }
}

fn connections(view: &Connections, frame: &Frame<'_>) -> Markup {
    let head = |sort: Option<Sort>, text: &str, number: bool| {
        let class = number.then_some("n");
        let Some(sort) = sort else {
            return html! { th scope="col" class=[class] { (text) } };
        };
        let sorted = (view.filter.sort == sort).then_some(if view.filter.descending {
            "descending"
        } else {
            "ascending"
        });
        html! {
            th scope="col" class=[class] aria-sort=[sorted] {
                a href={ (frame.base) "/connections?" (view.filter.sorted_by(sort)) } { (text) }
                @match sorted { Some("descending") => " ↓", Some(_) => " ↑", None => "" }
            }
        }
    };
    html! {
        div.wide {
            table #connections {
                caption {
                    (view.matching) " of " (view.total) " connections, page " (view.page) " of " (view.pages)
                }
                thead { tr {
                    th scope="col" { "Id" }
                    th scope="col" { "Dir" }
                    (head(Some(Sort::Name), "Name", false))
                    (head(Some(Sort::Host), "Host", false))
                    th scope="col" { "Local" }
                    th scope="col" { "Peer" }
                    th scope="col" { "Protocol" }
                    th scope="col" { "TLS" }
                    (head(Some(Sort::State), "State", false))
                    (head(Some(Sort::Age), "Age", true))
                    (head(Some(Sort::Idle), "Idle for", true))
                    (head(Some(Sort::Active), "Active for", true))
                    (head(Some(Sort::Requests), "Requests", true))
                    (head(Some(Sort::InFlight), "In flight", true))
                    (head(Some(Sort::Read), "Read", true))
                    (head(Some(Sort::Written), "Written", true))
                    (head(None, "RTT", true))
                    (head(None, "Retransmits", true))
                } }
                tbody { @for row in &view.connections { tr data-key=(row.id) { (cells(row, frame)) } } }
            }
        }
        @if view.pages > 1 {
            p {
                @if view.page > 1 {
                    a rel="prev" href={ (frame.base) "/connections?" (view.filter.at_page(view.page - 1)) } { "Previous page" } " "
                }
                @if view.page < view.pages {
                    a rel="next" href={ (frame.base) "/connections?" (view.filter.at_page(view.page + 1)) } { "Next page" }
                }
            }
        }
    }
}

fn cells(row: &Row, frame: &Frame<'_>) -> Markup {
    let class = match row.state {
        ConnectionState::Active => Some("active"),
        ConnectionState::Connecting | ConnectionState::New => Some("busy"),
        _ => None,
    };
    html! {
        td { a href={ (frame.base) "/connections/" (row.id) } { (row.id) } }
        td { (match row.direction { Direction::Inbound => "in", Direction::Outbound => "out" }) }
        td.t { (clean(&row.name)) }
        td.t { (maybe(row.host.as_deref(), |host| clean(host).into_owned())) }
        td.t { (maybe(row.local.as_ref(), |end| clean(&end.to_string()).into_owned())) }
        td.t { (maybe(row.peer.as_ref(), |end| clean(&end.to_string()).into_owned())) }
        td { (maybe(row.protocol, str::to_owned)) }
        td { (tls_version(row)) }
        td class=[class] { (row.state) }
        (td(time(row.age))) (td(maybe(row.idle, time))) (td(maybe(row.active, time)))
        (td(row.requests)) (td(row.in_flight))
        (td(bytes(row.bytes_read))) (td(bytes(row.bytes_written)))
        (td(maybe(row.rtt, time))) (td(maybe(row.retransmits, |n| n.to_string())))
    }
}

fn one(view: &One, frame: &Frame<'_>) -> Markup {
    let row = &view.row;
    let open = view.close_reason.is_none() && view.failure.is_none();
    let facts = facts(view);
    let plain = facts
        .iter()
        .filter(|(name, _)| !matches!(*name, "trace" | "serves"));
    html! {
        h2 { "Connection " (row.id) " · " (clean(&row.name)) }
        @if open { p { (action(frame, "close", &[("id", &row.id)], "Close this connection")) } }
        div.wide { table {
            caption { "Now" }
            thead { tr { @for head in [
                "Id", "Dir", "Name", "Host", "Local", "Peer", "Protocol", "TLS", "State", "Age", "Idle for",
                "Active for", "Requests", "In flight", "Read", "Written", "RTT", "Retransmits",
            ] { th scope="col" { (head) } } } }
            tbody { tr { (cells(row, frame)) } }
        } }
        h2 { "Facts" }
        dl {
            @for (name, value) in plain { dt { (name) } dd { (value) } }
            @if let Some(trace) = &view.trace { dt { "trace" } dd { (trace_link(trace)) } }
        }
        h2 { "Requests that it serves now" }
        @if row.in_flight == 0 { p.dim { "None." } }
        @else {
            p { (row.in_flight) " in flight"
                @if let Some(active) = row.active { ", active for " (time(active)) } "." }
            ol {
                @for serving in &view.serving {
                    li { (trace_link(&serving.trace))
                        @if let Some(since) = serving.since { " for " (time(since)) } }
                }
            }
        }
        h2 { "Timeline" }
        @if view.timeline.is_empty() { p.dim { "Kept for connections whose spans are sampled." } }
        @else {
            div.wide { table {
                caption { "Seconds since the start" }
                thead { tr { th.n scope="col" { "At" } th scope="col" { "What" } } }
                tbody { @for entry in &view.timeline { tr {
                    td.n { (format!("{:.6}", entry.at)) }
                    td { (entry.event) @if let Some(detail) = &entry.detail { " (" (detail) ")" } }
                } } }
            } }
            @if view.timeline_dropped > 0 { p.dim { (view.timeline_dropped) " moments between were not kept." } }
        }
    }
}

fn trace_link(trace: &Trace) -> Markup {
    html! {
        @match &trace.link {
            Some(link) => a href=(link) rel="noreferrer" { (trace.trace_id) },
            None => code { (trace.trace_id) }
        }
        @if !trace.sampled { " " span.dim { "not sampled" } }
    }
}

// === pools ===

fn pools(view: &Pools, frame: &Frame<'_>) -> Markup {
    html! {
        @if view.pools.is_empty() { p.dim { "No pools." } }
        @else { (pool_table(view.pools.iter().map(|pool| &pool.row), frame)) }
        @for (at, pool) in view.pools.iter().enumerate() { (pool_detail(at, pool, frame)) }
    }
}

fn pool_detail(at: usize, pool: &Pool, frame: &Frame<'_>) -> Markup {
    html! {
        section data-key={ (at) "-" (clean(&pool.row.name)) } {
            h2 { (clean(&pool.row.name)) }
            @match &pool.keys {
                None => p.dim { "It does not say who has its connections, and who waits." },
                Some(keys) if keys.is_empty() => p.dim { "Nobody holds anything, and nobody waits." },
                Some(keys) => { @for key in keys { (key_detail(key, frame)) } }
            }
            @if pool.keys_omitted > 0 { p.dim { "And " (pool.keys_omitted) " more hosts." } }
            @if !pool.row.events.is_empty() {
                details { summary { "Events so far" }
                    dl { @for event in &pool.row.events {
                        dt { (event.event) @if let Some(reason) = event.reason { " " (reason) } }
                        dd { (event.count) }
                    } }
                }
            }
        }
    }
}

fn key_detail(key: &PoolKeyView, frame: &Frame<'_>) -> Markup {
    html! {
        article data-key=(clean(&key.key)) {
            h3 { (clean(&key.key)) }
            p { (key.active) " active, " (key.idle) " idle, " (key.dialing) " dialing" }
            @if let Some(why) = &key.why { p.why { (why) "." } }
            @if !key.holders.is_empty() { (holders(&key.holders, frame)) }
            @if key.holders_omitted > 0 { p.dim { "And " (key.holders_omitted) " more." } }
            @if !key.waiters.is_empty() {
                div.wide { table {
                    caption { "Who waits, in order" }
                    thead { tr {
                        th.n scope="col" { "Place" } th.n scope="col" { "Request" } th.n scope="col" { "Waits for" }
                        th scope="col" { "Why" } th scope="col" { "Trace" }
                    } }
                    tbody { @for waiter in &key.waiters { tr data-key=(waiter.request) {
                        (td(waiter.position)) (td(waiter.request)) (td(time(waiter.waited)))
                        td { (waiter.reason) @if waiter.dialing { ", dial under way" } }
                        td { @if let Some(trace) = &waiter.trace { (trace_link(trace)) } }
                    } } }
                } }
            }
            @if key.waiters_omitted > 0 { p.dim { "And " (key.waiters_omitted) " more wait." } }
        }
    }
}

fn holders(holders: &[Holder], frame: &Frame<'_>) -> Markup {
    html! {
        div.wide { table {
            caption { "Who holds" }
            thead { tr {
                th.n scope="col" { "Request" } th scope="col" { "Connection" } th.n scope="col" { "For" }
                th scope="col" { "Trace" }
            } }
            tbody { @for holder in holders { tr data-key=(holder.request) {
                (td(holder.request))
                td { @if let Some(id) = &holder.connection {
                    a href={ (frame.base) "/connections/" (id) } { (id) }
                } }
                (td(maybe(holder.held_for, time)))
                td { @if let Some(trace) = &holder.trace { (trace_link(trace)) } }
            } } }
        } }
    }
}

// === closed ===

fn closed(view: &Closed, frame: &Frame<'_>) -> Markup {
    html! {
        div.wide { table {
            caption { (view.connections.len()) " of the last connections that were closed and attempts that failed, newest first" }
            thead { tr {
                @for head in ["Ended", "Id", "Dir", "Name", "Host", "Peer", "Reason", "By"] { th scope="col" { (head) } }
                @for head in ["Age", "Requests", "Read", "Written"] { th.n scope="col" { (head) } }
            } }
            tbody { @for closed in &view.connections {
                @let row = &closed.row;
                tr data-key=(row.id) {
                    td { (date(closed.ended)) }
                    td { a href={ (frame.base) "/connections/" (row.id) } { (row.id) } }
                    td { (match row.direction { Direction::Inbound => "in", Direction::Outbound => "out" }) }
                    td.t { (clean(&row.name)) }
                    td.t { (maybe(row.host.as_deref(), |host| clean(host).into_owned())) }
                    td.t { (maybe(row.peer.as_ref(), |end| clean(&end.to_string()).into_owned())) }
                    td class=[closed.failed.then_some("bad")] { (closed.reason) }
                    td { (maybe(closed.by, str::to_owned)) }
                    (td(time(row.age))) (td(row.requests))
                    (td(bytes(row.bytes_read))) (td(bytes(row.bytes_written)))
                }
            } }
        } }
    }
}
