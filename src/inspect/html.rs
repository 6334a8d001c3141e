//! The page for people: one document without anything from elsewhere.
//!
//! maud escapes whatever is put into it, and [`clean`] takes the rest out of texts from outside. What
//! changes stands in `main`, which the script replaces; without the script the page is as complete,
//! and a reload brings it up to date.

mod overview;
mod pools;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::event::{ConnectionState, Direction};
use crate::inspect::query::{Filter, STATES, Sort, text as duration};
use crate::inspect::text::{
    bytes, clean, date, end, facts, found, host, maybe, time, tls_version, way,
};
use crate::inspect::view::{Closed, Connections, One, Page, Row, TraceView, View};

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
                @if let View::Closed(view) = &page.view {
                    (closed_form(base, &view.filter))
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
        View::Overview(view) => overview::overview(view, frame),
        View::Connections(view) => connections(view, frame),
        View::Connection(view) => one(view, frame),
        View::Pools(view) => pools::pools(view, frame),
        View::Closed(view) => closed(view, frame),
    }
}

/// A page that says why there is none.
pub(super) fn error(status: http::StatusCode, text: &str, base: &str, nonce: &str) -> String {
    let home = if base.is_empty() { "/" } else { base };
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                title { (status) }
                link rel="icon" href="data:,";
                style nonce=(nonce) { (PreEscaped(STYLE)) }
            }
            body { main {
                h1 { (status) }
                p { (clean(text)) }
                p { a href=(home) { "Overview" } }
            } }
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

/// A number. What is nothing stands back, so that what is something stands out.
fn td(value: impl ToString) -> Markup {
    let value = value.to_string();
    let nothing = matches!(&*value, "0" | "~0" | "≤0" | "-" | "0 B");
    html! { td.n.z[nothing] { (value) } }
}

/// A caption for who can't see the heading above it.
fn unseen(caption: &str) -> Markup {
    html! { caption { span.unseen { (caption) } } }
}

// === connections ===

fn field(name: &str, text: &str, value: Option<String>, hint: &str) -> Markup {
    html! {
        label { (text) input name=(name) value=(value.unwrap_or_default()) placeholder=(hint) size="12" autocomplete="off"; }
    }
}

/// Which connections, open or closed.
fn whose(filter: &Filter) -> Markup {
    html! {
        (field("name", "Name", filter.name.as_ref().map(ToString::to_string), ""))
        label { "Direction" select name="direction" {
            option value="" { "any" }
            @for direction in [Direction::Inbound, Direction::Outbound] {
                option value=(direction) selected[filter.direction == Some(direction)] { (direction) }
            }
        } }
        (field("host", "Host", filter.host.clone(), ""))
    }
}

fn filter_form(base: &str, filter: &Filter) -> Markup {
    html! {
        div #filter {
            form method="get" action={ (base) "/connections" } role="search" aria-label="Filter" {
                (whose(filter))
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

fn closed_form(base: &str, filter: &Filter) -> Markup {
    html! {
        div #filter {
            form method="get" action={ (base) "/closed" } role="search" aria-label="Filter" {
                (whose(filter))
                button type="submit" { "Filter" }
                a href={ (base) "/closed" } { "Clear" }
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
                    (view.matching) " of " (view.total) " connections, page " (view.page) " of " (view.pages) (found(view))
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
        th scope="row" { a href={ (frame.base) "/connections/" (row.id) } { (row.id) } }
        td { (way(row)) }
        td.t { (clean(&row.name)) }
        td.t { (host(row)) }
        td.t { (end(row.local.as_ref())) }
        td.t { (end(row.peer.as_ref())) }
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
    let more = facts
        .iter()
        .filter(|(name, _)| !matches!(*name, "trace" | "serves" | "active for"));
    let facts = [
        ("state", row.state.as_str().to_owned()),
        ("direction", row.direction.as_str().to_owned()),
        ("name", clean(&row.name).into_owned()),
        ("host", host(row)),
        ("local", end(row.local.as_ref())),
        ("peer", end(row.peer.as_ref())),
        ("protocol", maybe(row.protocol, str::to_owned)),
        ("tls", tls_version(row)),
        ("age", time(row.age)),
        ("idle for", maybe(row.idle, time)),
        ("active for", maybe(row.active, time)),
        ("requests", row.requests.to_string()),
        ("in flight", row.in_flight.to_string()),
        ("read", bytes(row.bytes_read)),
        ("written", bytes(row.bytes_written)),
        ("rtt", maybe(row.rtt, time)),
        ("retransmits", maybe(row.retransmits, |n| n.to_string())),
    ];
    let fact = |name: &str, value: &str| html! { div { dt { (name) } dd { (value) } } };
    html! {
        h2 { "Connection " (row.id) " · " (clean(&row.name)) }
        @if open { p { (action(frame, "close", &[("id", &row.id)], "Close this connection")) } }
        dl.cols {
            @for (name, value) in &facts { (fact(name, value)) }
            @for (name, value) in more { (fact(name, value)) }
            @if let Some(trace) = &view.trace { div { dt { "trace" } dd { (trace_link(trace)) } } }
        }
        h2 { "Requests that it serves now" }
        @if row.in_flight == 0 { p.dim { "None." } }
        @else {
            p { (row.in_flight) " in flight"
                @if let Some(active) = row.active { ", active for " (time(active)) } "." }
            ol {
                @for serving in &view.serving {
                    li {
                        @if let Some(request) = serving.request { "request " (request) " " }
                        @if let Some(trace) = &serving.trace { (trace_link(trace)) }
                        @if let Some(since) = serving.since { " for " (time(since)) } }
                }
            }
        }
        h2 { "Timeline" }
        @if view.timeline.is_empty() { p.dim { "Kept for connections whose spans are sampled, or for all by " code { "Inspect::timelines" } "." } }
        @else {
            div.wide { table {
                (unseen("What happened, in seconds since the start"))
                thead { tr { th.n scope="col" { "Second" } th scope="col" { "What" } } }
                tbody { @for entry in &view.timeline { tr {
                    td.n { (format!("{:.6}", entry.at)) }
                    td { (entry.event) @if let Some(detail) = &entry.detail { " (" (detail) ")" } }
                } } }
            } }
            @if view.timeline_dropped > 0 { p.dim { (view.timeline_dropped) " moments between were not kept." } }
        }
    }
}

fn trace_link(trace: &TraceView) -> Markup {
    html! {
        @match &trace.link {
            Some(link) => a href=(link) rel="noreferrer" { (trace.trace_id) },
            None => code { (trace.trace_id) }
        }
        @if !trace.sampled { " " span.dim { "not sampled" } }
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
                    th scope="row" { a href={ (frame.base) "/connections/" (row.id) } { (row.id) } }
                    td { (way(row)) }
                    td.t { (clean(&row.name)) }
                    td.t { (host(row)) }
                    td.t { (end(row.peer.as_ref())) }
                    td class=[closed.failed.then_some("bad")] { (closed.reason) }
                    td { (maybe(closed.by, str::to_owned)) }
                    (td(time(row.age))) (td(row.requests))
                    (td(bytes(row.bytes_read))) (td(bytes(row.bytes_written)))
                }
            } }
        } }
        @if view.page > 1 || view.more {
            p {
                @if view.page > 1 {
                    a rel="prev" href={ (frame.base) "/closed?" (view.filter.at_page(view.page - 1)) } { "Newer ones" } " "
                }
                @if view.more {
                    a rel="next" href={ (frame.base) "/closed?" (view.filter.at_page(view.page + 1)) } { "Older ones" }
                }
            }
        }
    }
}
