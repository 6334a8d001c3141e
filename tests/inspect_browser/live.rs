//! The page keeps up without a reload, and leaves alone what the reader is doing.

use crate::browser::{Tab, wanted};
use crate::{Shop, assert_quiet, row, until};

/// That the script has taken over.
const LIVE: &str = "document.getElementById('status').textContent === 'live'";

/// Another update.
async fn updated(tab: &Tab) {
    let before = tab.events();
    tab.event(before, |e| {
        e["method"] == "Network.eventSourceMessageReceived"
    })
    .await;
}

/// How many rows the first table has.
fn has_rows(rows: usize) -> String {
    format!("document.querySelectorAll('tbody tr').length === {rows}")
}

#[tokio::test]
async fn rows_come_and_go_and_focus_and_selection_stay() {
    if !wanted() {
        return;
    }
    let shop = Shop::open().await;
    let first = shop.customer().await;
    let stays = shop.customer().await;
    let tab = shop.show("/connections").await;
    tab.until(LIVE).await;
    let narrow =
        serde_json::json!({ "width": 600, "height": 600, "deviceScaleFactor": 1, "mobile": false });
    tab.call("Emulation.setDeviceMetricsOverride", narrow).await;
    // Would not outlive a reload.
    let [gone, kept] = shop.ids("shop")[..] else {
        panic!("two are there")
    };
    tab.eval(&format!(
        "window.stays = true;
         const link = document.querySelector(\"a[href$='/{kept}']\");
         link.focus();
         getSelection().selectAllChildren(link);
         document.querySelector('.wide').scrollLeft = 40;"
    ))
    .await;

    let more = shop.customer().await;
    tab.until(&has_rows(3)).await;
    let newest = shop.ids("shop")[2].to_string();
    assert_eq!(row(&tab, "3 of 3", "Id", &newest).await["State"], "idle");
    drop(first);
    tab.until(&has_rows(2)).await;
    tab.until(&format!("!document.querySelector(\"a[href$='/{gone}']\")"))
        .await;
    // The one that is looked at becomes active: its row changes under the focus.
    let mut stays = stays;
    crate::serve(&mut stays).await;
    tab.until(&format!(
        "document.querySelector('[data-key=\"{kept}\"]').cells[12].textContent === '2'"
    ))
    .await;
    let kept = kept.to_string();
    let state = "[window.stays, document.activeElement.textContent, getSelection().toString(), document.querySelector('.wide').scrollLeft]";
    let expected = serde_json::json!([true, kept, kept, 40]);
    assert_eq!(tab.eval(state).await, expected);

    // Rows change places under the focus.
    tab.goto(&shop.url("/connections?sort=requests")).await;
    tab.until(LIVE).await;
    let other = newest;
    tab.eval(&format!(
        "document.querySelector(\"a[href$='/{other}']\").focus()"
    ))
    .await;
    let mut more = more;
    for _ in 0..3 {
        crate::serve(&mut more).await;
    }
    tab.until(&format!(
        "document.querySelector('tbody tr').dataset.key === '{other}'"
    ))
    .await;
    assert_eq!(tab.eval("document.activeElement.textContent").await, other);
    assert_quiet(&tab);
}

#[tokio::test]
async fn what_was_unfolded_stays_so() {
    if !wanted() {
        return;
    }
    let mut shop = Shop::open().await;
    shop.ask(3).await;
    let tab = shop.show("/pools").await;
    tab.until(LIVE).await;
    tab.click("details summary").await;
    tab.until("document.querySelector('details').open").await;
    shop.ask(1).await;
    tab.until("document.querySelectorAll('tbody tr').length >= 5")
        .await;
    assert_eq!(
        tab.eval("document.querySelector('details').open").await,
        true
    );
    // All go, and so do their rows.
    for call in shop.calls.drain(..) {
        call.answer(crate::support::web::nothing());
    }
    for _ in 0..2 {
        let call = shop.web.call().await;
        call.answer(crate::support::web::nothing());
    }
    until("idle", || shop.pool.stats().in_use == 0).await;
    tab.until("!document.querySelector('.why')").await;
    assert_eq!(
        tab.eval("document.querySelector('details').open").await,
        true
    );
    assert_quiet(&tab);
}

#[tokio::test]
async fn paused_it_stands_still_and_resumed_it_catches_up() {
    if !wanted() {
        return;
    }
    let shop = Shop::open().await;
    let _first = shop.customer().await;
    let (paused, other) = (
        shop.show("/connections").await,
        shop.show("/connections").await,
    );
    paused.until(LIVE).await;
    other.until(LIVE).await;
    paused.click("#pause").await;
    paused
        .until("document.getElementById('status').textContent === 'paused'")
        .await;
    assert_eq!(
        paused
            .eval("document.getElementById('pause').textContent")
            .await,
        "Resume"
    );
    let updates = paused.count("Network.eventSourceMessageReceived");

    let _second = shop.customer().await;
    other.until(&has_rows(2)).await;
    // As many as the one that stands still would have had by now.
    updated(&other).await;
    assert_eq!(paused.count("Network.eventSourceMessageReceived"), updates);
    assert_eq!(paused.eval(&has_rows(1)).await, true);

    paused.click("#pause").await;
    paused.until(&has_rows(2)).await;
    paused.until(LIVE).await;
    assert_eq!(
        paused
            .eval("document.getElementById('pause').textContent")
            .await,
        "Pause"
    );
    assert_quiet(&paused);
    assert_quiet(&other);
}
