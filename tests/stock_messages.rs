//! The canary: hyper-util's pool still says what `stock/pool_events` understands, in that order.
//!
//! It breaks when an update of hyper-util changes a message. Then adapt `stock/pool_events/message.rs`,
//! and the machine if the order changed.

#![allow(clippy::unwrap_used)]

#[path = "support/stock.rs"]
mod support;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use otel_conntrack::stock::pool_events::{PoolEvents, PoolMessage, TARGET, parse};
use support::{Memory, Server, of, plain};
use tokio::sync::Notify;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

/// The version that cargo locked, and what to do about it.
fn changed() -> String {
    let lock = include_str!("../Cargo.lock");
    let version = lock
        .split("[[package]]")
        .find(|package| package.contains("name = \"hyper-util\""))
        .and_then(|package| package.split("version = \"").nth(1))
        .and_then(|rest| rest.split('"').next())
        .unwrap();
    format!(
        "hyper-util {version} changed its pool messages (0.1.21 is understood), adapt stock/pool_events"
    )
}

fn version() -> String {
    changed().split(' ').nth(1).unwrap().to_owned()
}

/// Each message as it was said, with its level.
#[derive(Clone, Default)]
struct Raw {
    said: Arc<Mutex<Vec<String>>>,
    heard: Arc<Notify>,
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        assert_eq!(field.name(), "message", "{}: a field of its own", changed());
        self.0 = format!("{value:?}");
    }
}

impl<S: Subscriber> Layer<S> for Raw {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        let level = event.metadata().level();
        self.said
            .lock()
            .unwrap()
            .push(format!("{level} {}", text.0));
        self.heard.notify_waiters();
    }
}

struct Canary {
    raw: Raw,
    server: Server,
    pool_events: PoolEvents,
    memory: Arc<Memory>,
}

impl Canary {
    /// Runs one scenario on one thread, so that the order of messages is always the same.
    fn run<F: Future<Output = ()>>(scenario: impl FnOnce(Self) -> F) {
        let raw = Raw::default();
        let memory = Arc::new(Memory::default());
        let pool_events = PoolEvents::new(memory.clone());
        let subscriber = tracing_subscriber::registry()
            .with(pool_events.layer())
            .with(
                raw.clone()
                    .with_filter(Targets::new().with_target(TARGET, Level::TRACE)),
            );
        let _guard = tracing::subscriber::set_default(subscriber);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let server = Server::start().await;
            scenario(Self {
                raw,
                server,
                pool_events,
                memory,
            })
            .await;
        });
    }

    fn client(&self) -> reqwest::ClientBuilder {
        plain()
    }

    async fn get(&self, client: &reqwest::Client, path: &str) {
        let response = client.get(self.server.url(path)).send().await.unwrap();
        response.text().await.unwrap();
    }

    /// Waits until this was said.
    async fn heard(&self, text: &str) {
        let text = self.text(text);
        let wait = async {
            loop {
                let heard = self.raw.heard.notified();
                if self.raw.said.lock().unwrap().contains(&text) {
                    return;
                }
                heard.await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(10), wait)
            .await
            .is_err()
        {
            panic!(
                "{}: never said {text:?} but {:#?}",
                changed(),
                self.raw.said.lock().unwrap()
            );
        }
    }

    fn text(&self, pattern: &str) -> String {
        pattern.replace("KEY", &format!("(\"http\", {})", self.server.addr))
    }

    /// Forgets what was said so far, after it was exactly this.
    fn said(&self, what: &str, expected: &[&str]) {
        let expected: Vec<_> = expected.iter().map(|text| self.text(text)).collect();
        let said = std::mem::take(&mut *self.raw.said.lock().unwrap());
        for text in &said {
            let (message, _) = parse(text.split_once(' ').unwrap().1);
            assert_ne!(
                message,
                PoolMessage::Unknown,
                "{}: {what} says {text:?}",
                changed()
            );
        }
        assert_eq!(said, expected, "{}: {what}", changed());
    }

    /// What became of it in our words.
    fn became(&self, expected: &[&str]) {
        assert!(self.pool_events.flush(Duration::from_secs(10)));
        assert_eq!(self.memory.names(&self.server.key), expected);
        let snapshot = of(&self.pool_events, &self.server.key);
        self.memory.sums_to(&snapshot);
        assert_eq!(snapshot.unmatched, 0);
        assert_eq!(self.pool_events.snapshot().unknown_messages, 0);
    }
}

const NEW: &[&str] = &[
    "TRACE checkout waiting for idle connection: KEY",
    "TRACE checkout dropped for KEY",
];
const PUT: &[&str] = &[
    "TRACE put; add idle connection for KEY",
    "DEBUG pooling idle connection for KEY",
];

#[test]
fn a_new_connection_is_waited_for_and_then_pooled_and_reused() {
    Canary::run(|canary| async move {
        let client = canary.client().build().unwrap();
        canary.get(&client, "").await;
        canary.heard("DEBUG pooling idle connection for KEY").await;
        canary.said("a new connection", &[NEW, PUT].concat());
        canary.get(&client, "").await;
        canary.heard("DEBUG pooling idle connection for KEY").await;
        let reuse = [
            "TRACE take? KEY: expiration = Some(90s)",
            "DEBUG reuse idle connection for KEY",
        ];
        canary.said("a reuse", &[&reuse[..], PUT].concat());
        canary.became(&[
            "IdleConnWaitIn",
            "IdleConnWaitOut(own_dial_or_cancelled)",
            "IdleConnIn",
            "IdleConnOut(reused)",
            "IdleConnIn",
        ]);
    });
}

#[test]
fn the_second_idle_connection_hits_max_idle_1() {
    Canary::run(|canary| async move {
        let client = canary.client().pool_max_idle_per_host(1).build().unwrap();
        let state = canary.server.state.clone();
        let both = async {
            tokio::join!(canary.get(&client, "held"), canary.get(&client, "held"));
        };
        let release = async {
            while state.requests.load(std::sync::atomic::Ordering::SeqCst) < 2 {
                state.entered.notified().await;
            }
            state.release.notify_waiters();
        };
        tokio::join!(both, release);
        canary
            .heard("TRACE max idle per host for KEY, dropping connection")
            .await;
        let full = [
            "TRACE put; add idle connection for KEY",
            "TRACE max idle per host for KEY, dropping connection",
        ];
        canary.said(
            "two concurrent requests with max_idle=1",
            &[&[NEW[0], NEW[0], NEW[1], NEW[1]], PUT, &full].concat(),
        );
        canary.became(&[
            "IdleConnWaitIn",
            "IdleConnWaitIn",
            "IdleConnWaitOut(own_dial_or_cancelled)",
            "IdleConnWaitOut(own_dial_or_cancelled)",
            "IdleConnIn",
            "ProtocolLearned(http1)",
            "MaxIdleConnsPerHostHit",
        ]);
    });
}

#[test]
fn the_idle_interval_evicts_an_expired_connection() {
    Canary::run(|canary| async move {
        let client = canary.client().pool_idle_timeout(Duration::from_millis(50));
        let client = client.build().unwrap();
        canary.get(&client, "").await;
        canary
            .heard("TRACE pool empty, canceling idle interval")
            .await;
        let evict = [
            "TRACE idle interval checking for expired",
            "TRACE idle interval evicting expired for KEY",
            "TRACE pool empty, canceling idle interval",
        ];
        canary.said("an idle timeout", &[NEW, PUT, &evict].concat());
        canary.became(&[
            "IdleConnWaitIn",
            "IdleConnWaitOut(own_dial_or_cancelled)",
            "IdleConnIn",
            "IdleConnOut(idle_timeout)",
        ]);
    });
}

#[test]
fn an_expired_connection_is_found_at_checkout() {
    Canary::run(|canary| async move {
        // The interval looks every 90 ms at most, so this is expired well before.
        let client = canary
            .client()
            .pool_idle_timeout(Duration::from_nanos(1_500));
        let client = client.build().unwrap();
        canary.get(&client, "").await;
        canary.heard("DEBUG pooling idle connection for KEY").await;
        canary.said("a new connection", &[NEW, PUT].concat());
        canary.get(&client, "").await;
        let expired = [
            "TRACE take? KEY: expiration = Some(1.5µs)",
            "TRACE removing expired connection for KEY",
        ];
        canary.heard("DEBUG pooling idle connection for KEY").await;
        canary.said("an expired one at checkout", &[&expired, NEW, PUT].concat());
        canary.became(&[
            "IdleConnWaitIn",
            "IdleConnWaitOut(own_dial_or_cancelled)",
            "IdleConnIn",
            "IdleConnOut(idle_timeout)",
            "IdleConnWaitIn",
            "IdleConnWaitOut(own_dial_or_cancelled)",
            "IdleConnIn",
        ]);
    });
}

#[test]
fn a_connection_that_its_peer_closed_is_found_at_checkout() {
    Canary::run(|canary| async move {
        let client = canary.client().pool_idle_timeout(None).build().unwrap();
        canary.get(&client, "").await;
        canary.heard("DEBUG pooling idle connection for KEY").await;
        canary.said("a new connection", &[NEW, PUT].concat());
        canary.server.state.close_all.notify_waiters();
        let server = &canary.server;
        server.until("closed", || server.open() == 0).await;
        // The server's end is closed; the client's task has to see that. One thread: it runs next.
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(of(&canary.pool_events, &canary.server.key).idle, 1);
        canary.get(&client, "").await;
        canary.heard("DEBUG pooling idle connection for KEY").await;
        let closed = [
            "TRACE take? KEY: expiration = None",
            "TRACE removing closed connection for KEY",
        ];
        canary.said("a closed one at checkout", &[&closed, NEW, PUT].concat());
        canary.became(&[
            "IdleConnWaitIn",
            "IdleConnWaitOut(own_dial_or_cancelled)",
            "IdleConnIn",
            "IdleConnOut(peer_closed)",
            "IdleConnWaitIn",
            "IdleConnWaitOut(own_dial_or_cancelled)",
            "IdleConnIn",
        ]);
    });
}

#[test]
fn a_connection_that_its_peer_closed_is_found_by_the_idle_interval() {
    Canary::run(|canary| async move {
        let client = canary
            .client()
            .pool_idle_timeout(Duration::from_millis(120));
        let client = client.build().unwrap();
        canary.get(&client, "").await;
        canary.heard("DEBUG pooling idle connection for KEY").await;
        canary.server.state.close_all.notify_waiters();
        canary
            .heard("TRACE pool empty, canceling idle interval")
            .await;
        let evict = [
            "TRACE idle interval checking for expired",
            "TRACE idle interval evicting closed for KEY",
            "TRACE pool empty, canceling idle interval",
        ];
        canary.said("closed while idle", &[NEW, PUT, &evict].concat());
        canary.became(&[
            "IdleConnWaitIn",
            "IdleConnWaitOut(own_dial_or_cancelled)",
            "IdleConnIn",
            "IdleConnOut(peer_closed)",
        ]);
    });
}

#[test]
fn connection_close_and_an_aborted_request_are_silent() {
    Canary::run(|canary| async move {
        let client = canary.client().build().unwrap();
        canary.get(&client, "close").await;
        let server = &canary.server;
        server.until("closed", || server.open() == 0).await;
        canary.said("`connection: close`", NEW);
        let request = client.get(canary.server.url("held")).send();
        tokio::select! {
            _ = request => unreachable!("nobody releases it"),
            () = async {
                while server.state.requests.load(std::sync::atomic::Ordering::SeqCst) < 2 {
                    server.state.entered.notified().await;
                }
            } => {}
        }
        server.until("aborted", || server.open() == 0).await;
        canary.said("an aborted request", NEW);
        canary.became(&[
            "IdleConnWaitIn",
            "IdleConnWaitOut(own_dial_or_cancelled)",
            "IdleConnWaitIn",
            "IdleConnWaitOut(own_dial_or_cancelled)",
        ]);
    });
}

#[test]
fn a_dropped_client_says_so_without_a_key() {
    Canary::run(|canary| async move {
        let client = canary.client().build().unwrap();
        canary.get(&client, "").await;
        canary.heard("DEBUG pooling idle connection for KEY").await;
        drop(client);
        canary
            .heard("TRACE pool closed, canceling idle interval")
            .await;
        canary.said(
            "a dropped client",
            &[NEW, PUT, &["TRACE pool closed, canceling idle interval"]].concat(),
        );
        let snapshot = of(&canary.pool_events, &canary.server.key);
        assert_eq!(
            (snapshot.idle, snapshot.certainty.as_str()),
            (1, "upper_bound")
        );
        assert_eq!(canary.pool_events.snapshot().pools_closed, 1);
    });
}

#[test]
fn a_connection_that_outlives_its_client_says_so() {
    Canary::run(|canary| async move {
        let client = canary.client().build().unwrap();
        let response = client.get(canary.server.url("")).send().await.unwrap();
        // reqwest's client, not its responses, hold the pool; but a connection whose response is not
        // read yet is not back in it.
        drop(client);
        let _ = response.text().await.unwrap();
        let server = &canary.server;
        server.until("closed", || server.open() == 0).await;
        let said = canary.raw.said.lock().unwrap().clone();
        // Depending on whether hyper saw the body's end before the response was handed out.
        let gone = [NEW, &["TRACE pool dropped, dropping pooled (KEY)"]].concat();
        let back = [NEW, PUT, &["TRACE pool closed, canceling idle interval"]].concat();
        let texts = |of: Vec<&str>| of.iter().map(|text| canary.text(text)).collect::<Vec<_>>();
        assert!(
            said == texts(gone) || said == texts(back),
            "{}: a client dropped before its connection came back says {said:#?}",
            changed()
        );
    });
}

#[test]
fn a_freed_connection_goes_straight_to_a_waiter() {
    Canary::run(|canary| async move {
        // Dials that never end: only a freed connection can serve the second request.
        let connector = support_connector::Once::new(canary.server.addr);
        let client: hyper_util::client::legacy::Client<_, http_body_util::Empty<bytes::Bytes>> =
            hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
                .build(connector);
        let url: hyper::Uri = canary.server.url("held").parse().unwrap();
        let state = canary.server.state.clone();
        let first = tokio::spawn(client.get(url.clone()));
        state.entered.notified().await;
        let second = tokio::spawn(client.get(canary.server.url("").parse().unwrap()));
        tokio::task::yield_now().await;
        state.release.notify_waiters();
        let read = |response: hyper::Response<hyper::body::Incoming>| async {
            use http_body_util::BodyExt;
            response.into_body().collect().await.unwrap();
        };
        read(first.await.unwrap().unwrap()).await;
        read(second.await.unwrap().unwrap()).await;
        canary.heard("DEBUG pooling idle connection for KEY").await;
        let hand_over = [
            NEW[0],
            PUT[0],
            "TRACE put; found waiter for KEY",
            "DEBUG reuse idle connection for KEY",
        ];
        canary.said("a hand-over", &[NEW, &hand_over, PUT].concat());
        canary.became(&[
            "IdleConnWaitIn",
            "IdleConnWaitOut(own_dial_or_cancelled)",
            "IdleConnWaitIn",
            "ProtocolLearned(http1)",
            "IdleConnWaitOut(delivered_idle)",
            "ConnReused",
            "IdleConnIn",
        ]);
    });
}

mod support_connector {
    //! A connector whose first dial succeeds, and whose other ones never end.

    use std::net::SocketAddr;
    use std::pin::Pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Poll};

    use hyper_util::rt::TokioIo;
    use tokio::net::TcpStream;

    #[derive(Clone)]
    pub(super) struct Once(SocketAddr, Arc<AtomicUsize>);

    impl Once {
        pub(super) fn new(addr: SocketAddr) -> Self {
            Self(addr, Arc::default())
        }
    }

    impl tower_service::Service<hyper::Uri> for Once {
        type Response = TokioIo<TcpStream>;
        type Error = std::io::Error;
        type Future = Pin<Box<dyn Future<Output = std::io::Result<Self::Response>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: hyper::Uri) -> Self::Future {
            let first = self.1.fetch_add(1, Ordering::SeqCst) == 0;
            let addr = self.0;
            Box::pin(async move {
                if !first {
                    std::future::pending::<()>().await;
                }
                Ok(TokioIo::new(TcpStream::connect(addr).await?))
            })
        }
    }
}

#[test]
fn http2_stays_in_the_list_when_it_is_reused() {
    Canary::run(|canary| async move {
        let client = canary.client().http2_prior_knowledge().build().unwrap();
        canary.pool_events.negotiated_h2(&canary.server.key);
        canary.get(&client, "").await;
        canary.said("a new HTTP/2 connection", &[NEW[0], PUT[0], PUT[1], NEW[1]]);
        for _ in 0..3 {
            canary.get(&client, "").await;
            let reuse = [
                "TRACE take? KEY: expiration = Some(90s)",
                "DEBUG reuse idle connection for KEY",
            ];
            canary.said("a reuse of HTTP/2", &reuse);
        }
        canary.became(&[
            "ProtocolLearned(http2)",
            "IdleConnWaitIn",
            "IdleConnIn",
            "IdleConnWaitOut(shared_h2)",
            "H2ConnShared",
            "H2ConnShared",
            "H2ConnShared",
        ]);
        let snapshot = of(&canary.pool_events, &canary.server.key);
        assert_eq!((snapshot.idle, snapshot.shared), (0, 1));
        assert_eq!(snapshot.certainty.as_str(), "exact");
    });
}

#[test]
fn http2_that_nobody_told_of_is_found_out_and_marked() {
    Canary::run(|canary| async move {
        let client = canary.client().http2_prior_knowledge().build().unwrap();
        canary.get(&client, "").await;
        let snapshot = of(&canary.pool_events, &canary.server.key);
        assert_eq!(
            (snapshot.idle, snapshot.certainty.as_str()),
            (1, "assumed_http1")
        );
        for _ in 0..3 {
            canary.get(&client, "").await;
        }
        let snapshot = of(&canary.pool_events, &canary.server.key);
        assert_eq!((snapshot.idle, snapshot.shared), (0, 1));
        assert_eq!(snapshot.protocol.as_str(), "http2");
        assert_eq!(snapshot.certainty.as_str(), "approximate");
    });
}

#[test]
fn concurrent_http2_requests_share_one_dial() {
    Canary::run(|canary| async move {
        let client = canary.client().http2_prior_knowledge().build().unwrap();
        tokio::join!(
            canary.get(&client, ""),
            canary.get(&client, ""),
            canary.get(&client, "")
        );
        let refused = "TRACE HTTP/2 connecting already in progress for KEY";
        let reuse = "DEBUG reuse idle connection for KEY";
        canary.said(
            "concurrent HTTP/2 dials",
            &[
                &[NEW[0], NEW[0], refused, NEW[0], refused],
                PUT,
                &[NEW[1], reuse, reuse],
            ]
            .concat(),
        );
        canary.became(&[
            "IdleConnWaitIn",
            "IdleConnWaitIn",
            "ProtocolLearned(http2)",
            "H2DialCoalesced",
            "IdleConnWaitIn",
            "H2DialCoalesced",
            "IdleConnIn",
            "IdleConnWaitOut(shared_h2)",
            "IdleConnWaitOut(shared_h2)",
            "IdleConnWaitOut(shared_h2)",
        ]);
        let snapshot = of(&canary.pool_events, &canary.server.key);
        assert_eq!(
            (snapshot.shared, snapshot.waiting, snapshot.handed),
            (1, 0, 0)
        );
        assert_eq!(snapshot.certainty.as_str(), "exact");
    });
}

#[test]
fn every_message_in_hyper_utils_source_is_known() {
    // The source that cargo built, so that a message no scenario above reaches can't change unseen.
    let version = version();
    let home = std::env::var("CARGO_HOME")
        .unwrap_or_else(|_| format!("{}/.cargo", std::env::var("HOME").unwrap_or_default()));
    let registries = std::fs::read_dir(format!("{home}/registry/src"));
    let path = format!("hyper-util-{version}/src/client/legacy/pool.rs");
    let Some(source) = registries
        .into_iter()
        .flatten()
        .flatten()
        .find_map(|registry| std::fs::read_to_string(registry.path().join(&path)).ok())
    else {
        // Vendored, or a registry of another kind: the scenarios have to do.
        eprintln!(
            "NOT CHECKED: {path} is not in cargo's registry, so a new message would go unseen"
        );
        return;
    };
    let (known, unknown) = messages(&source);
    assert_eq!(unknown, [""; 0], "{}: these are new", changed());
    assert_eq!(known.len(), 19, "{}: it has {known:#?}", changed());
}

/// The texts that a source says, known and unknown ones.
fn messages(source: &str) -> (BTreeSet<&str>, Vec<&str>) {
    let source = source.split("#[cfg(test)]\nmod tests").next().unwrap();
    let macros = ["trace!(", "debug!(", "warn!(", "info!(", "error!("];
    let said = macros
        .iter()
        .flat_map(|name| source.split(name).skip(1))
        .map(|after| after.split('"').nth(1).unwrap());
    let (mut known, mut unknown) = (BTreeSet::new(), Vec::new());
    for literal in said {
        let text = literal
            .replacen("expiration = {:?}", "expiration = Some(90s)", 1)
            .replacen("{:?}", "(\"http\", a.example:80)", 1);
        match parse(&text) {
            (PoolMessage::Unknown, _) => unknown.push(literal),
            _ => {
                known.insert(literal);
            }
        }
    }
    (known, unknown)
}

#[test]
fn a_message_that_is_new_or_reworded_would_be_noticed() {
    let source = r#"
        debug!("pooling idle connection for {:?}", key);
        trace!("pooling idle connection for {:?} again", key);
        warn!("the pool is tired");
        trace!(
            "put; add idle connection for {:?}", key
        );
        #[cfg(test)]
mod tests { trace!("of no interest"); }
    "#;
    let (known, unknown) = messages(source);
    assert_eq!(known.len(), 2, "{known:?}");
    let new = [
        "pooling idle connection for {:?} again",
        "the pool is tired",
    ];
    assert_eq!(unknown, new);
}
