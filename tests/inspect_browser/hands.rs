//! Whoever uses it: with a mouse, with a keyboard alone, and without JavaScript.

use serde_json::json;

use crate::browser::{Tab, wanted};
use crate::{Shop, assert_quiet, rows, until};

/// What the first column says.
async fn ids(tab: &Tab) -> Vec<String> {
    let rows = rows(tab, "").await;
    rows.into_iter()
        .map(|mut row| row.remove("Id").unwrap())
        .collect()
}

/// Presses Tab until this has the focus.
async fn tab_to(tab: &Tab, selector: &str) {
    for _ in 0..200 {
        tab.press("Tab").await;
        let there = format!("document.activeElement.matches({selector:?})");
        if tab.eval(&there).await == true {
            let seen = "(style => style.outlineStyle === 'solid' && parseFloat(style.outlineWidth) >= 2)(getComputedStyle(document.activeElement))";
            assert_eq!(
                tab.eval(seen).await,
                true,
                "{selector}: where is the focus?"
            );
            return;
        }
    }
    panic!("Tab never gets to {selector}");
}

#[tokio::test]
async fn the_form_filters_the_heads_sort_and_pages_turn() {
    if !wanted() {
        return;
    }
    let mut shop = Shop::open().await;
    let _customers = (shop.customer().await, shop.customer().await);
    let mut visitors = Vec::new();
    for _ in 0..60 {
        visitors.push(shop.visitor().await);
    }
    shop.ask(2).await;
    let tab = shop.show("/connections").await;

    // All, in pages of fifty, the oldest first.
    let first = ids(&tab).await;
    assert_eq!(first.len(), 50);
    tab.leads_on(tab.click("a[rel=next]")).await;
    let second = ids(&tab).await;
    assert_eq!(second.len(), 14);
    assert!(second.iter().all(|id| !first.contains(id)));
    tab.leads_on(tab.click("a[rel=prev]")).await;
    assert_eq!(ids(&tab).await, first);

    // What is asked for stays in the form, and in the address.
    let choose = "(() => {
        const form = document.querySelector('form[role=search]').elements;
        form.direction.value = 'inbound';
        form.state.value = 'idle';
        form.sort.value = 'requests';
    })()";
    tab.eval(choose).await;
    tab.leads_on(tab.click("form[role=search] button")).await;
    let idle = rows(&tab, "2 of 64").await;
    assert_eq!(idle.len(), 2);
    assert!(idle.iter().all(|row| row["State"] == "idle"));
    let chosen = "(form => [form.direction.value, form.state.value, form.sort.value, location.search])(document.querySelector('form[role=search]').elements)";
    let chosen = tab.eval(chosen).await;
    assert_eq!(
        (&chosen[0], &chosen[1], &chosen[2]),
        (&json!("inbound"), &json!("idle"), &json!("requests"))
    );
    assert!(chosen[3].as_str().unwrap().contains("state=idle"));
    tab.leads_on(tab.click("form[role=search] a")).await;
    assert_eq!(ids(&tab).await.len(), 50);

    // By a head, and the other way round. A second click keeps the filter.
    tab.goto(&shop.url("/connections?name=back")).await;
    let by_age = ids(&tab).await;
    for (sort, order) in [("ascending", "↑"), ("descending", "↓")] {
        tab.leads_on(tab.click("th a[href*='sort=-age'], th[aria-sort=ascending] a"))
            .await;
        let head = tab
            .eval("(th => [th.ariaSort, th.textContent])(document.querySelector('th[aria-sort]'))")
            .await;
        assert_eq!(head, json!([sort, format!("Age {order}")]));
        let mut expected = by_age.clone();
        if sort == "ascending" {
            expected.reverse();
        }
        assert_eq!(ids(&tab).await, expected);
    }
    // What makes no sense is refused in words; the browser notes that it was.
    assert_quiet(&tab);
    tab.goto(&shop.url("/connections?older_than=soon")).await;
    let said = tab.eval("document.querySelector('main').innerText").await;
    assert!(said.as_str().unwrap().contains("30s, 500ms, 5m"), "{said}");
    assert_eq!(tab.document().await.0, 400);
}

#[tokio::test]
async fn a_keyboard_is_enough() {
    if !wanted() {
        return;
    }
    let mut shop = Shop::with(|page| page.actions(true)).await;
    let _customer = shop.customer().await;
    shop.ask(1).await;
    let tab = shop.show("/").await;

    // Past the header.
    tab.press("Tab").await;
    let focused = "document.activeElement.textContent";
    assert_eq!(tab.eval(focused).await, "Skip to the content");
    tab.press("Enter").await;
    tab.until("document.activeElement.id === 'main'").await;
    // To another view, whose filter takes a word and Enter.
    tab.goto(&shop.url("/")).await;
    tab_to(&tab, "nav a[href$='/connections']").await;
    tab.leads_on(tab.press("Enter")).await;
    tab_to(&tab, "input[name=name]").await;
    tab.type_text("SHO").await;
    tab.leads_on(tab.press("Enter")).await;
    assert_eq!(rows(&tab, "1 of 2").await[0]["Name"], "shop");
    // A head sorts.
    tab_to(&tab, "th a[href*='sort=requests']").await;
    tab.leads_on(tab.press("Enter")).await;
    let sorted = tab
        .eval("document.querySelector('th[aria-sort]').textContent")
        .await;
    assert_eq!(sorted, "Requests ↓");
    // A connection opens, and its button closes it.
    tab_to(&tab, "tbody a").await;
    tab.leads_on(tab.press("Enter")).await;
    tab_to(&tab, "main button").await;
    tab.leads_on(tab.press("Enter")).await;
    until("closed", || shop.listener().open == 0).await;
    assert_quiet(&tab);
}

#[tokio::test]
async fn without_javascript_it_is_as_complete() {
    if !wanted() {
        return;
    }
    let mut shop = Shop::with(|page| page.actions(true)).await;
    let _customers = (shop.customer().await, shop.customer().await);
    shop.ask(4).await;
    let tab = Tab::open().await;
    let off = json!({ "value": true });
    tab.call("Emulation.setScriptExecutionDisabled", off).await;
    tab.goto(&shop.url("/")).await;
    assert_eq!(
        tab.eval("document.getElementById('pause').checkVisibility()")
            .await,
        false
    );
    let status = tab
        .eval("document.getElementById('status').textContent")
        .await;
    assert!(status.as_str().unwrap().ends_with(" GMT"), "{status}");
    tab.leads_on(tab.click("main a[href$='/pools']")).await;
    assert_eq!(rows(&tab, "Who waits").await.len(), 2);
    tab.click("details summary").await;
    assert_eq!(
        tab.eval("document.querySelector('details').open").await,
        true
    );
    tab.leads_on(tab.click("nav a[href$='/connections']")).await;
    tab.click("input[name=name]").await;
    tab.type_text("shop").await;
    tab.leads_on(tab.press("Enter")).await;
    assert_eq!(rows(&tab, "2 of 4").await.len(), 2);
    tab.leads_on(tab.click("tbody a")).await;
    tab.leads_on(tab.click("main button")).await;
    until("closed", || shop.listener().open == 1).await;
    tab.goto(&shop.url("/closed")).await;
    assert_eq!(rows(&tab, "").await[0]["Reason"], "operator_request");
    assert!(tab.requests().iter().all(|url| !url.contains("live")));
    assert_quiet(&tab);
}
