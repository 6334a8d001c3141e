//! Pools: who holds, who waits, in order, and why.

use maud::{Markup, html};

use crate::inspect::html::overview::sparkline;
use crate::inspect::html::{Frame, action, td, trace_link, unseen};
use crate::inspect::text::{clean, known, maybe, time};
use crate::inspect::view::{Pool, PoolKeyView, PoolRow, Pools};

/// Hosts on the page at most, over all pools. JSON has more.
const MOST_HOSTS: usize = 16;
/// Rows on the page at most, over all hosts, as long as each has a few.
const MOST_ROWS: usize = 150;
const FEW_ROWS: usize = 4;

pub(super) fn pool_table<'a>(
    pools: impl Iterator<Item = &'a PoolRow> + Clone,
    frame: &Frame<'_>,
) -> Markup {
    let inferred = pools
        .clone()
        .any(|pool| pool.idle_source.is_some_and(|source| source != "observed"));
    let n = |n: Option<u64>| td(maybe(n, |n| n.to_string()));
    html! {
        div.wide {
            table {
                (unseen("Connections and requests by pool"))
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
                    @for (key, pool) in keyed(pools, |pool| &pool.name) {
                        tr data-key=(key) {
                            th scope="row" {
                                a href={ (frame.base) "/pools" } { (clean(&pool.name)) }
                                @if pool.kind == "transport" && frame.token.is_some() {
                                    " " (action(frame, "close-idle", &[("pool", &pool.name)], "Close idle"))
                                }
                            }
                            td { (pool.kind.replace('_', " ")) }
                            (n(pool.active)) (td(maybe(pool.idle, |n| known(n, pool.idle_source)))) (n(pool.dialing)) (n(pool.in_use))
                            td.n.z[pool.waiting == 0].busy[pool.waiting > 0] { (known(pool.waiting, pool.waiting_source)) }
                            (td(maybe(pool.oldest_wait, time))) (td(pool.waiting_max))
                            td { (sparkline(&pool.trend.waiting, "requests waiting")) }
                            td { ul { @for limit in &pool.limits { li {
                                (limit.limit) " " b { (limit.value) }
                                @if let Some(hits) = limit.hits.filter(|hits| *hits > 0) { ", hit " (hits) " times" }
                            } } } }
                        }
                    }
                }
            }
        }
        @if inferred { p.dim { "~ is what follows from what a stock pool prints, ≤ is at most so many." } }
    }
}

pub(super) fn pools(view: &Pools, frame: &Frame<'_>) -> Markup {
    let keys = |pool: &Pool| pool.keys.as_ref().map_or(0, Vec::len);
    let hosts = view.pools.iter().map(keys).sum::<usize>().min(MOST_HOSTS);
    let rows = (MOST_ROWS / 2 / hosts.max(1)).max(FEW_ROWS);
    let mut left = hosts;
    let shares = view.pools.iter().map(|pool| {
        let share = keys(pool).min(left);
        left -= share;
        share
    });
    let shares: Vec<_> = shares.collect();
    let pools = keyed(&view.pools, |pool| &pool.row.name);
    html! {
        @if view.pools.is_empty() { p.dim { "No pools." } }
        @else { (pool_table(view.pools.iter().map(|pool| &pool.row), frame)) }
        @for ((key, pool), share) in pools.into_iter().zip(shares) { (pool_detail(&key, pool, share, rows, frame)) }
    }
}

/// A key for each, by which the script knows it again: its name, and a number if that is not the first
/// of its name.
fn keyed<'a, T>(
    all: impl IntoIterator<Item = &'a T>,
    name: fn(&T) -> &str,
) -> Vec<(String, &'a T)> {
    let mut keyed: Vec<(String, &T)> = Vec::new();
    for one in all {
        let same = keyed.iter().filter(|(_, other)| name(other) == name(one));
        let key = match same.count() {
            0 => clean(name(one)).into_owned(),
            n => format!("{n} {}", clean(name(one))),
        };
        keyed.push((key, one));
    }
    keyed
}

fn pool_detail(key: &str, pool: &Pool, hosts: usize, rows: usize, frame: &Frame<'_>) -> Markup {
    let keys = pool.keys.as_deref().unwrap_or_default();
    let omitted = pool.keys_omitted + keys.len() - hosts;
    html! {
        section data-key=(key) {
            h2 { (clean(&pool.row.name)) }
            @if pool.keys.is_none() { p.dim { "It does not say who has its connections, and who waits." } }
            @else if keys.is_empty() { p.dim { "Nobody holds anything, and nobody waits." } }
            @for key in &keys[..hosts] { (key_detail(key, rows, frame)) }
            @if omitted > 0 { p.dim { "And " (omitted) " more hosts." } }
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

fn key_detail(key: &PoolKeyView, rows: usize, frame: &Frame<'_>) -> Markup {
    html! {
        article data-key=(clean(&key.key)) {
            h3 { (clean(&key.key)) }
            @if let Some(why) = &key.why { p.why { (why) "." } }
            @if let (Some(active), Some(idle), Some(dialing)) = (key.active, key.idle, key.dialing) {
                p { (active) " active, " (idle) " idle, " (dialing) " dialing" }
            }
            div.pair {
                @if !key.waiters.is_empty() { (waiters(key, rows)) }
                @if !key.holders.is_empty() { (holders(key, rows, frame)) }
            }
        }
    }
}

fn waiters(key: &PoolKeyView, rows: usize) -> Markup {
    let shown = &key.waiters[..key.waiters.len().min(rows)];
    let omitted = key.waiters_omitted + key.waiters.len() - shown.len();
    html! {
        div.wide { table {
            caption { "Who waits, in order" }
            thead { tr {
                th.n scope="col" { "Place" } th.n scope="col" { "Request" } th.n scope="col" { "For" }
                th scope="col" { "Waits for" } th scope="col" { "Trace" }
            } }
            tbody { @for waiter in shown { tr data-key=(waiter.request) {
                (td(waiter.position)) (td(waiter.request)) (td(time(waiter.waited)))
                td { (waiter.waits_for.replace('_', " ")) }
                td { @if let Some(trace) = &waiter.trace { (trace_link(trace)) } }
            } } }
        }
        @if omitted > 0 { p.dim { "And " (omitted) " more wait." } } }
    }
}

fn holders(key: &PoolKeyView, rows: usize, frame: &Frame<'_>) -> Markup {
    let shown = &key.holders[..key.holders.len().min(rows)];
    let omitted = key.holders_omitted + key.holders.len() - shown.len();
    html! {
        div.wide { table {
            caption { "Who holds" }
            thead { tr {
                th.n scope="col" { "Request" } th scope="col" { "Connection" } th.n scope="col" { "For" }
                th scope="col" { "Trace" }
            } }
            tbody { @for holder in shown { tr data-key=(holder.request) {
                (td(holder.request))
                td { @if let Some(id) = &holder.connection {
                    a href={ (frame.base) "/connections/" (id) } { (id) }
                } }
                (td(maybe(holder.held_for, time)))
                td { @if let Some(trace) = &holder.trace { (trace_link(trace)) } }
            } } }
        }
        @if omitted > 0 { p.dim { "And " (omitted) " more hold." } } }
    }
}
