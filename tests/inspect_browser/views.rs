//! Each view says what the record says.

use std::io;

use otel_conntrack::Target;
use tokio::io::DuplexStream;

use crate::browser::wanted;
use crate::{Shop, assert_cells, assert_quiet, row, rows, until};

#[tokio::test]
async fn the_overview_has_the_numbers_of_every_listener_dialer_and_pool() {
    if !wanted() {
        return;
    }
    let mut shop = Shop::open().await;
    let _customers = (
        shop.customer().await,
        shop.customer().await,
        shop.visitor().await,
        shop.waiter(9).await,
    );
    shop.ask(5).await;
    let tab = shop.show("/").await;

    let listener = row(&tab, "Inbound connections", "Name", "shop").await;
    let cells = [
        ("Open", "4"),
        ("Active", "1"),
        ("Idle", "2"),
        ("New", "1"),
        ("Hijacked", "0"),
        ("Limit", "100"),
        ("Limit hits", "0"),
        ("Opened", "4"),
        ("Requests", "3"),
    ];
    assert_cells(&listener, &cells);
    assert!(listener["Accept queue"].starts_with("0 of "));
    let dialer = row(&tab, "Outbound connections", "Name", "backend").await;
    let cells = [
        ("Open", "2"),
        ("Active", "2"),
        ("Attempts", "2"),
        ("Requests", "2"),
    ];
    assert_cells(&dialer, &cells);
    let pool = row(&tab, "Connections and requests by pool", "Name", "backend").await;
    let cells = [
        ("Kind", "transport"),
        ("Active", "2"),
        ("Idle", "0"),
        ("In use", "2"),
        ("Waiting", "3"),
        ("Most waiting", "3"),
    ];
    assert_cells(&pool, &cells);
    assert!(pool["Limits"].contains("max_conns_per_host"), "{pool:?}");
    let families: Vec<_> = rows(&tab, "Live connections").await;
    let named: Vec<_> = families
        .iter()
        .map(|row| (&*row["Family"], &*row["Live"]))
        .collect();
    assert_eq!(
        named,
        [
            ("net.ServerConn.shop", "4"),
            ("net.ClientConn.backend", "2")
        ]
    );
    let setups = rows(&tab, "Set-up times").await;
    let total: u64 = setups[0]
        .values()
        .filter_map(|n| n.parse::<u64>().ok())
        .sum();
    assert_eq!(total, 2, "{setups:?}");
    let said = tab
        .eval("document.querySelector('main p').textContent")
        .await;
    let said = said.as_str().unwrap();
    assert!(
        said.starts_with("6 connections open, 3 requests waiting"),
        "{said}"
    );
    assert_quiet(&tab);
}

#[tokio::test]
async fn connections_and_each_of_them_are_shown_as_they_are() {
    if !wanted() {
        return;
    }
    let mut shop = Shop::open().await;
    let customer = shop.customer().await;
    shop.ask(1).await;
    let tab = shop.show("/connections").await;

    let all = rows(&tab, "").await;
    assert_eq!(all.len(), 2);
    let inbound = shop.ids("shop")[0].to_string();
    let peer = customer.local_addr().unwrap().to_string();
    let of_inbound = row(&tab, "2 of 2", "Id", &inbound).await;
    let cells = [
        ("Dir", "in"),
        ("Name", "shop"),
        ("Host", "127.0.0.1"),
        ("Local", &shop.address.to_string()),
        ("Peer", &peer),
        ("Protocol", "1.1"),
        ("TLS", "-"),
        ("State", "idle"),
        ("Active for", "-"),
        ("Requests", "1"),
        ("In flight", "0"),
    ];
    assert_cells(&of_inbound, &cells);
    let outbound = shop.ids("backend")[0].to_string();
    let of_outbound = row(&tab, "2 of 2", "Id", &outbound).await;
    let backend = shop.web.address.to_string();
    let cells = [
        ("Dir", "out"),
        ("Host", &*backend),
        ("Peer", &backend),
        ("State", "active"),
        ("Idle for", "-"),
        ("In flight", "1"),
        ("Retransmits", "0"),
    ];
    assert_cells(&of_outbound, &cells);
    assert!(of_outbound["RTT"].ends_with("µs") || of_outbound["RTT"].ends_with("ms"));

    // By its id, to itself: what it serves now, in whose trace, and its own trace and timeline.
    tab.leads_on(tab.click(&format!("a[href$='/{outbound}']")))
        .await;
    let shown = tab.eval("document.querySelector('main').innerText").await;
    let shown = shown.as_str().unwrap();
    for part in [
        &*outbound,
        &backend,
        "1 in flight",
        "established",
        "timeline",
    ] {
        let (shown, part) = (shown.to_lowercase(), part.to_lowercase());
        assert!(shown.contains(&part), "{part} is not in {shown}");
    }
    let links = tab
        .eval("[...document.querySelectorAll('main a[rel=noreferrer]')].map(a => [a.textContent, a.getAttribute('href')])")
        .await;
    let links: Vec<[String; 2]> = serde_json::from_value(links).unwrap();
    let [own, request] = &links[..] else {
        panic!("{links:?}")
    };
    assert_eq!(request[0], "00000000000000010000000000000001");
    for [trace, link] in [own, request] {
        let begin = format!("http://localhost:16686/trace/{trace}?span=");
        let whole = link.starts_with(&begin) && link.ends_with(r#"&a='"><script>"#);
        assert!(whole, "{link}");
    }
    // An accepted one, to the requests that it serves now.
    let _waiter = shop.waiter(7).await;
    let serving = shop.ids("shop")[1].to_string();
    tab.goto(&shop.url(&format!("/connections/{serving}")))
        .await;
    let trace = "00000000000000070000000000000007";
    let served = tab
        .eval("document.querySelector('ol li a').getAttribute('href')")
        .await;
    let begin = format!("http://localhost:16686/trace/{trace}?span=0000000000000007");
    assert!(served.as_str().unwrap().starts_with(&begin), "{served}");
    assert_quiet(&tab);
}

#[tokio::test]
async fn the_pools_view_says_who_holds_who_waits_in_order_and_why() {
    if !wanted() {
        return;
    }
    let mut shop = Shop::open().await;
    shop.ask(5).await;
    let tab = shop.show("/pools").await;

    let held = rows(&tab, "Who holds").await;
    let mut on: Vec<_> = held.iter().map(|row| row["Connection"].clone()).collect();
    let mut ids: Vec<_> = shop
        .ids("backend")
        .iter()
        .map(ToString::to_string)
        .collect();
    on.sort();
    ids.sort();
    assert_eq!(on, ids);
    let waiting = rows(&tab, "Who waits").await;
    let places: Vec<_> = waiting
        .iter()
        .map(|row| (&*row["Place"], &*row["Waits for"], &row["Trace"][16..]))
        .collect();
    let why = "slot";
    assert_eq!(
        places,
        [
            ("1", why, "0000000000000003"),
            ("2", why, "0000000000000004"),
            ("3", why, "0000000000000005"),
        ]
    );
    let said = tab.eval("document.querySelector('.why').textContent").await;
    let said = said.as_str().unwrap();
    assert!(
        said.starts_with("3 requests wait") && said.contains("max_conns_per_host = 2 is reached"),
        "{said}"
    );
    assert_quiet(&tab);
}

#[tokio::test]
async fn what_was_closed_and_what_failed_is_told_with_its_reason() {
    if !wanted() {
        return;
    }
    let shop = Shop::open().await;
    drop(shop.customer().await);
    until("closed", || shop.listener().open == 0).await;
    let refused =
        async { Err::<DuplexStream, _>(io::Error::from(io::ErrorKind::ConnectionRefused)) };
    let dial = shop
        .conntrack
        .track_dial("db", Target::from(("db.internal", 5432)), refused);
    assert!(dial.await.is_err());
    let tab = shop.show("/closed").await;

    let closed = rows(&tab, "").await;
    assert_eq!(closed.len(), 2, "{closed:?}");
    let cells = [
        ("Dir", "out"),
        ("Name", "db"),
        ("Host", "db.internal:5432"),
        ("Reason", "connection_refused"),
        ("By", "-"),
    ];
    assert_cells(&closed[0], &cells);
    let cells = [
        ("Dir", "in"),
        ("Name", "shop"),
        ("Reason", "peer_closed"),
        ("By", "remote"),
        ("Requests", "1"),
    ];
    assert_cells(&closed[1], &cells);
    assert_quiet(&tab);
}
