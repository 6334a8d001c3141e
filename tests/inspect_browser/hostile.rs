//! What comes from outside is text: names, hosts, server names, query strings, whatever is in them.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use otel_conntrack::{ServerTls, Target};
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::browser::{Tab, wanted};
use crate::support::tls;
use crate::{Shop, assert_quiet, until};

const HOSTILE: [&str; 9] = [
    "<img src=x onerror=alert(1)>",
    "\"'><script>alert(2)</script>",
    "</script></main></style><script>alert(3)</script>",
    "javascript:alert(4)",
    "' onfocus='alert(5)' autofocus='",
    "<svg onload=alert(6)><!--",
    "&lt;b&gt; &amp;quot; {{7}} ${8} %3Cscript%3E",
    "<iframe srcdoc=\"<script>parent.alert(9)</script>\">",
    "<base href=//evil.example><style>*{display:none}</style>",
];

/// An odd but valid name.
const SERVER_NAME: &str = "x_y--z.xn--bcher-kva.example";

/// What no text of ours makes: elements that load or run something, and attributes that do.
const MADE: &str = "[...document.querySelectorAll('*')].filter(element =>
    ['img', 'iframe', 'object', 'embed', 'base', 'meta[http-equiv]'].some(name => element.matches(name))
    || element.matches('script, style') && !element.nonce
    || [...element.attributes].some(({ name }) => name.startsWith('on') || ['autofocus', 'srcdoc', 'style'].includes(name))
    || element.matches('[href^=\"javascript:\" i]')).map(element => element.outerHTML)";

#[tokio::test]
async fn hostile_texts_are_shown_and_do_nothing() {
    if !wanted() {
        return;
    }
    let mut shop = Shop::with(|page| page.actions(true).title(HOSTILE[2])).await;
    shop.ask(3).await;
    let mut kept = Vec::new();
    for name in HOSTILE {
        let (near, far) = tokio::io::duplex(64);
        let accepted = shop
            .conntrack
            .track_accepted(name, near, None, None)
            .unwrap();
        kept.push((accepted, far));
        let (near, far) = tokio::io::duplex(64);
        let dial = async { Ok::<_, io::Error>(near) };
        let host = Target::from((name, 443));
        let dialed = shop.conntrack.track_dial(name, host, dial).await.unwrap();
        kept.push((dialed, far));
        let dial = async { Err::<tokio::io::DuplexStream, _>(io::Error::other(name)) };
        let failed = shop
            .conntrack
            .track_dial(name, Target::from((name, 1)), dial);
        assert!(failed.await.is_err());
    }
    // Hosts may have what names may not.
    let (near, _far) = tokio::io::duplex(64);
    let dial = async { Ok::<_, io::Error>(near) };
    let turned = Target::from(("a\u{202e}\r\n\0\u{1b}[2Jb", 1));
    let _turned = shop
        .conntrack
        .track_dial("turned", turned, dial)
        .await
        .unwrap();

    let tab = Tab::open().await;
    for path in ["/", "/connections", "/pools", "/closed"] {
        tab.goto(&shop.url(path)).await;
        // As it was sent, and as the script made it.
        for moment in ["sent", "live"] {
            if moment == "live" {
                tab.until("document.getElementById('status').textContent === 'live'")
                    .await;
            }
            assert_eq!(
                tab.eval(MADE).await,
                Value::Array(Vec::new()),
                "{path}, {moment}"
            );
            let text = tab.eval("document.body.textContent").await;
            let text = text.as_str().unwrap();
            assert!(text.contains(HOSTILE[2]), "{path} has a title");
            if path == "/pools" {
                continue;
            }
            for hostile in HOSTILE {
                assert!(text.contains(hostile), "{path}, {moment}: {hostile}");
            }
            if path == "/connections" {
                assert!(text.contains(r"a\u{202e}\r\n\u{0}\u{1b}[2Jb"), "{text}");
            }
        }
    }
    // Each by its own page, and by its name's link.
    for name in HOSTILE {
        let id = shop.ids(name)[0];
        tab.goto(&shop.url(&format!("/connections/{id}"))).await;
        assert_eq!(tab.eval(MADE).await, Value::Array(Vec::new()), "{name}");
        assert!(
            tab.eval("document.body.textContent")
                .await
                .as_str()
                .unwrap()
                .contains(name)
        );
        tab.goto(&shop.url("/")).await;
        let link = format!(
            "[...document.querySelectorAll('tbody th a')].find(a => a.textContent === {name:?}).href"
        );
        let link = tab.eval(&link).await;
        tab.goto(link.as_str().unwrap()).await;
        assert_eq!(tab.eval(MADE).await, Value::Array(Vec::new()), "{name}");
        assert_eq!(
            tab.eval("document.querySelector('[name=name]').value")
                .await,
            format!("={name}")
        );
        assert!(
            tab.eval("document.querySelectorAll('tbody tr').length")
                .await
                .as_u64()
                >= Some(1)
        );
    }
    assert_quiet(&tab);
    let asked = tab.requests();
    let own = |url: &&String| !url.starts_with(&shop.page) && !url.starts_with("data:");
    assert_eq!(asked.iter().find(own), None);
}

#[tokio::test]
async fn a_hostile_query_is_refused_in_its_own_words() {
    if !wanted() {
        return;
    }
    let shop = Shop::open().await;
    let tab = Tab::open().await;
    for hostile in HOSTILE {
        let hostile_query = form_urlencoded::byte_serialize(hostile.as_bytes()).collect::<String>();
        for query in [
            format!("sort={hostile_query}"),
            format!("{hostile_query}=1"),
        ] {
            tab.goto(&shop.url(&format!("/connections?{query}"))).await;
            assert_eq!(tab.document().await.0, 400);
            assert_eq!(tab.eval(MADE).await, Value::Array(Vec::new()), "{query}");
            let shown = tab
                .eval("document.querySelector('main').children.length")
                .await;
            // What is wrong, why, and the way back.
            assert_eq!(shown, 3, "{query}");
        }
    }
    // The refusals themselves are all there is to say.
    let complaints = tab.complaints();
    let refused = |said: &String| said.contains("400");
    assert!(complaints.iter().all(refused), "{complaints:?}");
    assert!(!complaints.is_empty());
}

#[tokio::test]
async fn an_odd_server_name_is_shown_as_it_was_sent() {
    if !wanted() {
        return;
    }
    let shop = Shop::open().await;
    let (server, client) = tls::pair(SERVER_NAME);
    let listener = shop
        .conntrack
        .listener("secure")
        .bind("127.0.0.1:0")
        .await
        .unwrap();
    let address = listener.local_addr().unwrap();
    let answer = tower::service_fn(|_: Request<_>| async {
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"hello"))))
    });
    let serving = shop.conntrack.serve(listener, answer);
    let serving = serving.tls(ServerTls::from_config(server)).build().unwrap();
    tokio::spawn(serving.run());
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from(SERVER_NAME).unwrap();
    let stream = TlsConnector::from(Arc::clone(&client))
        .connect(name, stream)
        .await;
    let _stream = stream.unwrap();
    let known = || {
        let all = shop.conntrack.connections();
        all.iter().any(|connection| connection.tls.is_some())
    };
    until("its TLS is known", known).await;
    let id = shop.ids("secure")[0];
    let tab = shop.show(&format!("/connections/{id}")).await;
    let said = "[...document.querySelectorAll('dt')].find(dt => dt.textContent === 'sni').nextElementSibling.textContent";
    assert_eq!(tab.eval(said).await, SERVER_NAME);
    tab.goto(&shop.url("/connections")).await;
    let row = crate::row(&tab, "1 of 1", "Id", &id.to_string()).await;
    assert_eq!(row["TLS"], "1.3");
    assert_quiet(&tab);
}
