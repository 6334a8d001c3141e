//! Whoever looks: in the light and in the dark, through a screen reader, over a slow line; and pictures of it.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use otel_conntrack::Target;
use serde::Deserialize;
use serde_json::json;

use crate::browser::{Node, Tab, wanted};
use crate::{Shop, assert_quiet, until};

const LIVE: &str = "document.getElementById('status').textContent === 'live'";

/// A page is no larger than that.
const LARGEST: usize = 60 * 1024;

// === colours ===

/// How texts stand out from what is behind them, by WCAG's formula.
const CONTRAST: &str = r#"(() => {
    const parse = colour => { const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number); return [r, g, b, a]; };
    const over = ([r, g, b, a], back) => [r, g, b].map((c, at) => c * a + back[at] * (1 - a));
    const behind = element => {
        if (!element) return [255, 255, 255];
        const colour = parse(getComputedStyle(element).backgroundColor);
        return colour[3] === 1 ? colour : over(colour, behind(element.parentElement));
    };
    const luminance = colour => {
        const [r, g, b] = colour.map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const ratio = (a, b) => { const [x, y] = [luminance(a), luminance(b)]; return (Math.max(x, y) + .05) / (Math.min(x, y) + .05); };
    const found = [];
    const measure = (element, text, style, key, least) => {
        const back = behind(element);
        const contrast = ratio(over(parse(style[key]), back), back);
        found.push({ text, contrast, least });
    };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
        if (!text || !element.checkVisibility() || element.closest('.skip, .unseen')) continue;
        measure(element, text, getComputedStyle(element), 'color', 4.5);
    }
    for (const element of document.querySelectorAll('input, select')) measure(element, element.name, getComputedStyle(element), 'color', 4.5);
    for (const element of document.querySelectorAll('[placeholder]')) measure(element, element.placeholder, getComputedStyle(element, '::placeholder'), 'color', 4.5);
    for (const element of document.querySelectorAll('#status')) measure(element, '●', getComputedStyle(element, '::before'), 'color', 3);
    for (const element of document.querySelectorAll('path')) measure(element, 'a line', getComputedStyle(element), 'stroke', 3);
    return { found, page: getComputedStyle(document.body).backgroundColor };
})()"#;

#[derive(Deserialize)]
struct Colours {
    found: Vec<Measured>,
    page: String,
}

#[derive(Deserialize)]
struct Measured {
    text: String,
    contrast: f64,
    least: f64,
}

async fn prefers(tab: &Tab, scheme: &str) {
    let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
    tab.call("Emulation.setEmulatedMedia", features).await;
}

#[tokio::test]
async fn texts_stand_out_in_the_light_and_in_the_dark() {
    if !wanted() {
        return;
    }
    let mut shop = Shop::with(|page| page.actions(true)).await;
    let _customers = (shop.customer().await, shop.visitor().await);
    shop.ask(4).await;
    let refused =
        async { Err::<tokio::io::DuplexStream, _>(io::Error::from(io::ErrorKind::TimedOut)) };
    let dial = shop
        .conntrack
        .track_dial("db", Target::from(("db", 1)), refused);
    assert!(dial.await.is_err());
    drop(shop.customer().await);
    until("closed", || shop.listener().open == 2).await;
    let one = format!("/connections/{}", shop.ids("backend")[0]);
    let tab = Tab::open().await;
    let mut pages = BTreeSet::new();
    for scheme in ["light", "dark"] {
        prefers(&tab, scheme).await;
        for path in ["/", "/connections", "/pools", "/closed", &one] {
            tab.goto(&shop.url(path)).await;
            tab.until(LIVE).await;
            let colours = tab.eval(CONTRAST).await;
            let colours: Colours = serde_json::from_value(colours).unwrap();
            assert!(colours.found.len() > 20, "{path}: {}", colours.found.len());
            let faint = colours.found.iter().filter(|m| m.contrast < m.least);
            let faint: Vec<_> = faint.map(|m| (&m.text, m.contrast)).collect();
            assert!(faint.is_empty(), "{path} in the {scheme}: {faint:?}");
            pages.insert((scheme, colours.page));
        }
    }
    let pages: Vec<_> = pages
        .into_iter()
        .map(|(scheme, page)| format!("{scheme} {page}"))
        .collect();
    assert_eq!(pages, ["dark rgb(13, 17, 23)", "light rgb(255, 255, 255)"]);
    assert_quiet(&tab);
}

// === a screen reader ===

fn named<'a>(tree: &'a [Node], role: &str) -> Vec<&'a str> {
    let of_role = tree.iter().filter(|node| node.role == role);
    of_role.map(|node| &*node.name).collect()
}

#[tokio::test]
async fn a_screen_reader_finds_its_way() {
    if !wanted() {
        return;
    }
    let mut shop = Shop::with(|page| page.actions(true)).await;
    let _customer = shop.customer().await;
    shop.ask(4).await;
    let one = format!("/connections/{}", shop.ids("shop")[0]);
    let tab = Tab::open().await;
    for (path, view, tables) in [
        ("/", "Overview", 6),
        ("/connections", "Connections", 1),
        ("/pools", "Pools", 3),
        ("/closed", "Closed and failed", 1),
        (&one, "", 0),
    ] {
        tab.goto(&shop.url(path)).await;
        tab.until(LIVE).await;
        let tree = tab.accessibility().await;
        for role in ["banner", "main", "status"] {
            assert_eq!(named(&tree, role).len(), 1, "{path}: {role}");
        }
        assert_eq!(named(&tree, "navigation"), ["Views"], "{path}");
        let current = "[...document.querySelectorAll('nav [aria-current=page]')].map(a => a.textContent).join()";
        assert_eq!(tab.eval(current).await, view, "{path}");
        // Headings lead from one level to the next.
        let levels = "[...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])";
        let levels: Vec<u64> = serde_json::from_value(tab.eval(levels).await).unwrap();
        assert_eq!(levels[0], 1, "{path}");
        assert!(
            levels.windows(2).all(|two| two[1] <= two[0] + 1),
            "{path}: {levels:?}"
        );
        // What can be used, and what holds something, says what it is.
        for role in [
            "link",
            "button",
            "textbox",
            "combobox",
            "table",
            "columnheader",
            "rowheader",
            "image",
            "heading",
            "region",
            "search",
            "DisclosureTriangle",
        ] {
            let names = named(&tree, role);
            assert!(
                names.iter().all(|name| !name.trim().is_empty()),
                "{path}: a {role} without a name"
            );
        }
        assert!(
            named(&tree, "table").len() >= tables,
            "{path}: {:?}",
            named(&tree, "table")
        );
        if tables > 0 && path != "/closed" {
            assert!(
                named(&tree, "columnheader").len() >= 5 * tables.min(2),
                "{path}"
            );
            assert!(
                !named(&tree, "rowheader").is_empty() || path == "/closed",
                "{path}"
            );
        }
        if path == "/connections" {
            assert_eq!(named(&tree, "search").len(), 1);
            let fields = ["Name", "Host", "Older than", "Idle longer than"];
            assert_eq!(named(&tree, "textbox"), fields);
            assert_eq!(named(&tree, "combobox"), ["Direction", "State", "Sort by"]);
            let sorted = "[...document.querySelectorAll('th[aria-sort]')].map(th => [th.textContent, th.ariaSort]).join()";
            assert_eq!(tab.eval(sorted).await, "Age ↓,descending");
        }
    }
    // The state of the page is said once, and not with every update.
    tab.goto(&shop.url("/")).await;
    tab.until(LIVE).await;
    tab.eval("window.said = 0, new MutationObserver(all => said += all.length).observe(document.getElementById('status'), { subtree: true, childList: true, characterData: true })").await;
    let before = tab.events();
    let _another = shop.customer().await;
    tab.until("document.querySelector('tbody td').textContent === '2'")
        .await;
    tab.event(before, |e| {
        e["method"] == "Network.eventSourceMessageReceived"
    })
    .await;
    assert_eq!(tab.eval("window.said").await, 0);
    assert_quiet(&tab);
}

// === a slow line ===

#[tokio::test]
async fn every_page_is_small_also_with_long_names_and_many_rows() {
    if !wanted() {
        return;
    }
    let mut shop = Shop::with(|page| page.actions(true)).await;
    shop.ask(60).await;
    let mut kept = Vec::new();
    for n in 0..60 {
        let name = format!("{}{}", "n".repeat(99), n % 8);
        let host = format!("{n}.{}.example", "h".repeat(200));
        let (near, far) = tokio::io::duplex(64);
        let dial = async { Ok::<_, io::Error>(near) };
        let dialed = shop
            .conntrack
            .track_dial(&name, Target::from((host.clone(), 443)), dial);
        kept.push((dialed.await.unwrap(), far));
        let dial =
            async { Err::<tokio::io::DuplexStream, _>(io::Error::from(io::ErrorKind::TimedOut)) };
        let dial = shop
            .conntrack
            .track_dial(&name, Target::from((host, 443)), dial);
        assert!(dial.await.is_err());
    }
    let one = format!("/connections/{}", shop.ids("backend")[0]);
    let tab = Tab::open().await;
    for path in ["/", "/connections", "/pools", "/closed", &one] {
        tab.goto(&shop.url(path)).await;
        let (_, html) = tab.document().await;
        println!("{path}: {} bytes", html.len());
        assert!(html.len() < LARGEST, "{path}: {} bytes", html.len());
        // The document is all that was asked for: no style, script, font or picture beside it.
        tab.until(LIVE).await;
    }
    let asked = tab.requests();
    let more = |url: &&String| !url.contains("live=1") && !url.starts_with("data:");
    assert_eq!(asked.iter().filter(more).count(), 5, "{asked:?}");
    assert_quiet(&tab);
}

// === pictures ===

#[tokio::test]
async fn pictures_are_kept_of_what_an_operator_sees() {
    if !wanted() {
        return;
    }
    let mut shop = Shop::open().await;
    let mut customers = Vec::new();
    for _ in 0..8 {
        customers.push(shop.customer().await);
    }
    shop.ask(12).await;
    let pictures = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../inspect-screenshots");
    let tab = Tab::open().await;
    for scheme in ["light", "dark"] {
        prefers(&tab, scheme).await;
        for (path, name) in [
            ("/", "overview"),
            ("/connections", "connections"),
            ("/pools", "pools"),
        ] {
            tab.goto(&shop.url(path)).await;
            tab.until(LIVE).await;
            // Nothing is cut off on the right of a small screen's window.
            let cut = "document.documentElement.scrollWidth > innerWidth";
            assert_eq!(tab.eval(cut).await, false, "{path}");
            let file = pictures.join(format!("{name}-{scheme}.png"));
            tab.picture(&file).await;
            let picture = std::fs::read(&file).unwrap();
            assert!(picture.starts_with(b"\x89PNG") && picture.len() > 10_000);
        }
    }
    assert_quiet(&tab);
}
