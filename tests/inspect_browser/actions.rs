//! What an operator can do from the page, where the code allows it, and wherever it is mounted.

use axum::Router;
use otel_conntrack::{CloseReason, Inspect};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::browser::{Tab, wanted};
use crate::support::web::nothing;
use crate::{Shop, assert_quiet, row, rows, until};

#[tokio::test]
async fn one_connection_all_idle_ones_and_a_listener_are_closed_by_a_click() {
    if !wanted() {
        return;
    }
    let mut shop = Shop::with(|page| page.actions(true)).await;
    let mut one = shop.customer().await;
    let (mut idle, mut new) = (shop.customer().await, shop.visitor().await);
    let id = shop.ids("shop")[0];
    let tab = shop.show(&format!("/connections/{id}")).await;
    tab.leads_on(tab.click("main button")).await;
    assert_eq!(one.read(&mut [0]).await.unwrap(), 0);
    // It is shown as it is now, and offers nothing any more.
    tab.until("document.querySelector('main').innerText.includes('operator_request')")
        .await;
    tab.until("!document.querySelector('main button')").await;

    tab.goto(&shop.url("/")).await;
    // A listener's take two steps, so that no slip of the hand does it.
    let close_idle = "form[action$='close-idle']:has([value=inbound]) button";
    let seen = format!("document.querySelector({close_idle:?}).checkVisibility()");
    assert_eq!(tab.eval(&seen).await, false);
    tab.click("th details summary").await;
    tab.until(&seen).await;
    tab.leads_on(tab.click(close_idle)).await;
    assert_eq!(idle.read(&mut [0]).await.unwrap(), 0);
    until("closed", || shop.listener().open == 1).await;
    let closed = shop.listener().closed(CloseReason::OperatorRequest);
    assert_eq!((closed, shop.listener().new), (2, 1));

    // A pool's own.
    shop.ask(1).await;
    shop.calls.remove(0).answer(nothing());
    until("idle", || shop.pool.stats().idle == 1).await;
    tab.goto(&shop.url("/pools")).await;
    tab.leads_on(tab.click("form[action$='close-idle'] button"))
        .await;
    until("closed", || shop.pool.stats().idle == 0).await;

    // Nobody new comes in, and who is served may finish.
    tab.goto(&shop.url("/")).await;
    let drain = "form[action$='drain'] button";
    tab.click("th details summary").await;
    tab.until(&format!(
        "document.querySelector({drain:?}).checkVisibility()"
    ))
    .await;
    let mut served = shop.waiter(1).await;
    tab.leads_on(tab.click(drain)).await;
    let draining = "document.querySelector('tbody th').textContent.includes('draining')";
    assert_eq!(tab.eval(draining).await, true);
    assert_eq!(new.read(&mut [0]).await.unwrap(), 0);
    // It is over with the last one, and is not offered again.
    served.shutdown().await.unwrap();
    assert_eq!(served.read(&mut [0]).await.unwrap(), 0);
    drop(served);
    tab.until(&format!("!document.querySelector({drain:?})"))
        .await;
    until("it is shut", || {
        std::net::TcpStream::connect(shop.address).is_err()
    })
    .await;
    assert_quiet(&tab);
}

#[tokio::test]
async fn where_the_code_does_not_allow_it_nothing_is_offered() {
    if !wanted() {
        return;
    }
    let mut shop = Shop::open().await;
    let _customer = shop.customer().await;
    shop.ask(1).await;
    shop.calls.remove(0).answer(nothing());
    until("idle", || shop.pool.stats().idle == 1).await;
    let one = format!("/connections/{}", shop.ids("shop")[0]);
    let tab = Tab::open().await;
    for path in ["/", "/connections", "/pools", "/closed", &one] {
        tab.goto(&shop.url(path)).await;
        let offers = "document.querySelectorAll('main button, main form, [name=token]').length";
        assert_eq!(tab.eval(offers).await, 0, "{path}");
    }
    assert_quiet(&tab);
}

#[tokio::test]
async fn mounted_under_a_path_it_is_the_same() {
    if !wanted() {
        return;
    }
    let shop = Shop::open().await;
    let (mut first, _second) = (shop.customer().await, shop.customer().await);
    let page = Inspect::new().actions(true);
    let page = shop.conntrack.inspect_router_with(page).unwrap();
    let app = Router::new().nest("/debug/connections", page);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!(
        "http://{}/debug/connections",
        listener.local_addr().unwrap()
    );
    tokio::spawn(async move { axum::serve(listener, app).await });

    let tab = Tab::open().await;
    tab.goto(&base).await;
    assert_eq!(
        row(&tab, "Inbound connections", "Name", "shop").await["Open"],
        "2"
    );
    tab.until("document.getElementById('status').textContent === 'live'")
        .await;
    // Every link leads on.
    let links = "[...document.querySelectorAll('a[href]:not(.skip)')].map(a => a.href)";
    let links: Vec<String> = serde_json::from_value(tab.eval(links).await).unwrap();
    assert!(links.len() >= 5);
    for link in links {
        assert!(link.starts_with(&base), "{link}");
        tab.goto(&link).await;
        assert_eq!(tab.document().await.0, 200, "{link}");
    }
    tab.goto(&format!("{base}/connections")).await;
    tab.click("input[name=host]").await;
    tab.type_text("127.0.0").await;
    tab.leads_on(tab.press("Enter")).await;
    let _third = shop.customer().await;
    tab.until("document.querySelectorAll('tbody tr').length === 3")
        .await;
    tab.leads_on(tab.click("tbody a")).await;
    tab.leads_on(tab.click("main button")).await;
    assert_eq!(first.read(&mut [0]).await.unwrap(), 0);
    let at = tab.eval("location.href").await;
    assert_eq!(
        at,
        format!(
            "{base}/connections/{}",
            shop.conntrack.recently_closed()[0].id
        )
    );
    tab.goto(&format!("{base}/closed")).await;
    assert_eq!(rows(&tab, "").await[0]["Reason"], "operator_request");
    assert_quiet(&tab);
    // Not the one in the tab.
    assert!(TcpStream::connect(shop.address).await.is_ok());
}
