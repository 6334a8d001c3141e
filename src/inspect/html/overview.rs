//! The overview: listeners, dialers and pools; the families of x/net/trace.

use std::fmt::Write as _;

use maud::{Markup, html};

use crate::event::Direction;
use crate::inspect::html::pools::pool_table;
use crate::inspect::html::{Frame, action, td, unseen};
use crate::inspect::query::{Filter, Name};
use crate::inspect::text::{self, bound, bytes, clean, maybe, time};
use crate::inspect::view::{Bucket, Count, Family, Overview};

pub(super) fn overview(view: &Overview, frame: &Frame<'_>) -> Markup {
    html! {
        p.sum {
            b { (view.open) } " connections open, "
            @if view.waiting > 0 { a.busy href={ (frame.base) "/pools" } { b { (view.waiting) } " requests waiting" } }
            @else { b { "0" } " requests waiting" }
            ", watched for " (time(view.watched_for)) "."
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
                (unseen(caption))
                thead { tr {
                    th scope="col" { "Name" }
                    @for head in ["Open", "Active", "Idle", "Other"] { th.n scope="col" { (head) } }
                    @if inbound {
                        @for head in ["New", "Oldest new", "Hijacked", "Handshakes", "Limit", "Limit hits", "Accept queue"] {
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
                                @if frame.token.is_some() { " " (actions(family, frame)) }
                            }
                            (td(family.open)) (td(family.active)) (td(family.idle)) (td(family.other))
                            @if inbound {
                                (td(family.new)) (td(maybe(family.oldest_new, time))) (td(family.hijacked))
                                (td(maybe(family.tls_handshakes, |n| n.to_string())))
                                (td(maybe(family.max_connections, |n| n.to_string())))
                                (td(maybe(family.limit_hits, |n| n.to_string())))
                                (td(maybe(family.accept_queue, |queue| format!("{} of {}", queue.length, queue.limit))))
                            } @else {
                                (td(family.connecting)) (td(maybe(family.attempts, |n| n.to_string())))
                            }
                            (td(family.opened)) (td(family.requests))
                            (td(bytes(family.bytes_read))) (td(bytes(family.bytes_written)))
                            td { (sparkline(&family.trend.open, "open connections")) }
                            td.bad.w { (counts(&family.failures)) }
                            td.w { (counts(&family.closed)) }
                        }
                    }
                }
            }
        }
    }
}

/// Unfolded first, so that no slip of the hand closes what is in use: there is no way back.
fn actions(family: &Family, frame: &Frame<'_>) -> Markup {
    let of = [
        ("name", &*family.name),
        ("direction", family.direction.as_str()),
    ];
    html! {
        details {
            summary { "Actions" }
            p { (action(frame, "close-idle", &of, "Close idle connections")) }
            @if family.draining == Some(false) {
                p { (action(frame, "drain", &[("listener", &family.name)], "Drain")) " nobody new comes in; who is there has 30 s" }
            }
        }
    }
}

fn names(family: &Family) -> String {
    Filter {
        name: Some(Name::Exactly(family.name.to_string())),
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
                    @for bucket in &any.recent_errors { th.n scope="col" { "errs<" (bound(bucket.within)) } }
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
                                td.n.z[bucket.count == 0].bad[bucket.count > 0] { (bucket.count) }
                            }
                            (td(family.errors))
                            td { (sparkline(&family.trend.opened, "connections opened")) }
                            td { (sparkline(&family.trend.errors, "errors")) }
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
                    @for bucket in bounds { th.n scope="col" { "≥" (bound(bucket.from)) } }
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
pub(super) fn sparkline(values: &[u64], of: &str) -> Markup {
    let most = values.iter().copied().max().unwrap_or(0);
    let last = values.last().copied().unwrap_or(0);
    html! {
        svg width="120" height="18" role="img" aria-label={ (of) ": now " (last) ", at most " (most) } {
            path d=(steps(values, most)) {}
        }
        " " span.dim { "max " (most) }
    }
}

/// An outline in steps of two moments each, of which the higher one is shown. What does not change takes
/// no bytes: there may be many of them.
fn steps(values: &[u64], most: u64) -> String {
    let step = |pair: &[u64]| pair.iter().copied().max().unwrap_or(0);
    let steps: Vec<u64> = values.rchunks(2).map(step).rev().take(60).collect();
    let left = 120 - 2 * steps.len();
    let mut path = format!("M{left} 18");
    let mut before = None;
    for (at, value) in steps.iter().enumerate() {
        let height = (u128::from(*value) * 16).div_ceil(most.max(1).into());
        let y = 18 - height;
        if before.replace(y) != Some(y) {
            let _ = write!(path, "H{}V{y}", left + 2 * at);
        }
    }
    path.push_str("H120V18");
    path
}

fn dropped(view: &Overview) -> Markup {
    let mut dropped = text::dropped(view).peekable();
    html! {
        @if dropped.peek().is_some() {
            h2 { "Dropped by the telemetry" }
            dl { @for (what, count) in dropped { dt { (what) } dd { (count) } } }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_a_step_where_something_changed() {
        assert_eq!(steps(&[], 0), "M120 18H120V18");
        assert_eq!(steps(&[0; 120], 0), "M0 18H0V18H120V18");
        // One moment in two is enough to be seen, and a little is not nothing.
        let path = steps(&[0, 0, 1, 0, 500, 1_000], 1_000);
        assert_eq!(path, "M114 18H114V18H116V17H118V2H120V18");
        assert_eq!(
            steps(&[u64::MAX; 300], u64::MAX).len(),
            "M0 18H0V2H120V18".len()
        );
    }
}
