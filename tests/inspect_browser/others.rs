//! Other sites' pages, in the same browser: they can neither read this one nor act through it.

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::Shop;
use crate::browser::{FOREIGN, Tab, wanted};

/// What an attacker's page tries, and what came of it.
const ATTACK: &str = r#"(async target => {
    const element = (name, attributes) => new Promise(done => {
        const element = Object.assign(document.createElement(name), attributes);
        element.onload = () => {
            let seen = null;
            try { seen = element.contentDocument && element.contentDocument.body.innerText; } catch {}
            done(name === 'iframe' ? seen || 'unreadable' : 'loaded');
        };
        element.onerror = () => done('refused');
        document.body.append(element);
    });
    const ask = (path, options) => fetch(target + path, options).then(
        async answer => `${answer.type} ${answer.status} ${await answer.text()}`, () => 'refused');
    const events = new Promise(done => {
        const source = new EventSource(target + '/?live=1');
        source.onmessage = event => done(event.data);
        source.onerror = () => { source.close(); done('refused'); };
    });
    const post = { method: 'POST', body: new URLSearchParams({ name: 'shop', direction: 'inbound', token: '' }) };
    return {
        read: await ask('/?format=json'),
        'read without cors': await ask('/?format=json', { mode: 'no-cors' }),
        events: await events,
        image: await element('img', { src: target + '/' }),
        script: await element('script', { src: target + '/?format=json' }),
        frame: await element('iframe', { src: target + '/' }),
        act: await ask('/actions/close-idle', post),
        'act without cors': await ask('/actions/close-idle', { ...post, mode: 'no-cors' }),
    };
})"#;

/// A form that sends itself.
fn form(target: &str) -> String {
    format!(
        "(() => {{
           document.body.innerHTML = `<form method=post action={target}/actions/close-idle>
             <input name=name value=shop><input name=direction value=inbound><input name=token value=''></form>`;
           document.forms[0].submit();
         }})()"
    )
}

/// A site whose every page is empty.
async fn site() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = stream.read(&mut [0; 4_096]).await;
                let answer = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\n\r\n<!doctype html><title>evil</title><body>";
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    port
}

/// Asserts that nothing was read and nothing done.
fn assert_in_vain(outcome: &Value, shop: &Shop) {
    let outcome = outcome.as_object().unwrap();
    assert_eq!(outcome.len(), 8);
    for (what, came) in outcome {
        let came = came.as_str().unwrap();
        let nothing = ["refused", "unreadable", "opaque 0 "].contains(&came);
        assert!(nothing, "{what}: {came}");
    }
    let stats = shop.listener();
    assert_eq!((stats.open, stats.idle), (1, 1));
}

#[tokio::test]
async fn another_sites_page_reads_nothing_and_does_nothing() {
    if !wanted() {
        return;
    }
    let shop = Shop::with(|page| page.actions(true)).await;
    let _customer = shop.customer().await;
    let port = site().await;
    // Somewhere else; on this host; and under a name that the page itself would answer to.
    for site in [FOREIGN, "127.0.0.1", "app.localhost"] {
        let tab = Tab::open().await;
        tab.goto(&format!("http://{site}:{port}/")).await;
        let outcome = tab.eval(&format!("{ATTACK}({:?})", shop.page)).await;
        assert_in_vain(&outcome, &shop);
        tab.leads_on(async { drop(tab.eval(&form(&shop.page)).await) })
            .await;
        let (status, refusal) = tab.document().await;
        assert_eq!(status, 403, "{site}: {refusal}");
        assert!(refusal.contains("another site"), "{site}: {refusal}");
        assert_eq!(shop.listener().idle, 1);
        // A link is for people, and leads here. Who opened it gets no hold of it.
        tab.goto(&format!("http://{site}:{port}/")).await;
        tab.eval(&format!(
            "(() => {{ document.body.innerHTML = '<a href=\"{}/\">x</a>'; }})()",
            shop.page
        ))
        .await;
        tab.leads_on(tab.click("a")).await;
        assert_eq!(tab.document().await.0, 200);
        assert_eq!(
            tab.eval("[window.opener, document.title]").await,
            json!([null, "shop · overview"])
        );
    }
}

#[tokio::test]
async fn a_name_that_came_to_mean_loopback_gets_nothing() {
    if !wanted() {
        return;
    }
    let shop = Shop::with(|page| page.actions(true)).await;
    let _customer = shop.customer().await;
    let port = shop.conntrack.inspect_addr().unwrap().port();
    let site = format!("http://{FOREIGN}:{port}");
    let tab = Tab::open().await;
    // The first answer comes from the attacker's own host; then the name is rebound to ours, and to the
    // browser all is one site.
    let first = json!({ "patterns": [{ "urlPattern": format!("{site}/attack") }] });
    tab.call("Fetch.enable", first).await;
    let before = tab.events();
    tab.leads_on(async {
        let going = tab.call("Page.navigate", json!({ "url": format!("{site}/attack") }));
        let serving = async {
            let paused = tab
                .event(before, |e| e["method"] == "Fetch.requestPaused")
                .await;
            let page = json!({
                "requestId": paused["params"]["requestId"], "responseCode": 200,
                "responseHeaders": [{ "name": "content-type", "value": "text/html" }],
                // <!doctype html><body>
                "body": "PCFkb2N0eXBlIGh0bWw+PGJvZHk+",
            });
            tab.call("Fetch.fulfillRequest", page).await;
        };
        tokio::join!(going, serving);
    })
    .await;
    assert_eq!(tab.eval("document.body.innerText").await, "");
    let outcome = tab.eval(&format!("{ATTACK}({site:?})")).await;
    let outcome = outcome.as_object().unwrap();
    for (what, came) in outcome {
        let came = came.as_str().unwrap();
        let told = came.starts_with("basic 421 ") && !came.contains("shop");
        let nothing = ["refused", "unreadable"].contains(&came) || told;
        assert!(nothing, "{what}: {came}");
    }
    let read = outcome["read"].as_str().unwrap();
    assert!(read.contains("allow_host"), "{read}");
    tab.leads_on(async { drop(tab.eval(&form(&site)).await) })
        .await;
    assert_eq!(tab.document().await.0, 421);
    assert_eq!((shop.listener().open, shop.listener().idle), (1, 1));
    tab.goto(&format!("{site}/")).await;
    assert_eq!(tab.document().await.0, 421);
}
