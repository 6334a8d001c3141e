//! One application on each way to serve it: our server, hyper by hand, axum and tonic.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "compiled into every test that includes it, and each uses a part"
)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use axum::routing::{any, get};
use bytes::Bytes;
use http_body_util::BodyExt;
use http_body_util::StreamBody;
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use otel_conntrack::{
    ConnectionEventKind as Kind, ConnectionId, ConnectionRecord, ConnectionState, Conntrack,
    DrainHandle, EventReceiver, ListenerBuilder, ScopeStats, ServerBuilder, ServerLayer,
    ServerService, channel,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

/// Who serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    Ours,
    Hyper,
    Axum,
    Tonic,
}

/// An application on a listener called `site`, and what happens on it.
pub struct Site {
    pub host: Host,
    pub conntrack: Conntrack,
    pub address: SocketAddr,
    pub drain: DrainHandle,
    pub server: JoinHandle<()>,
    /// Says the path of each request whose handler began.
    pub entered: mpsc::UnboundedReceiver<String>,
    /// `/wait` and each piece of `/stream` take one.
    pub go: Arc<Semaphore>,
    events: EventReceiver,
    /// The states of each connection so far, by order of accept.
    pub seen: Vec<(ConnectionId, Vec<ConnectionState>)>,
}

impl Site {
    pub async fn new(host: Host) -> Self {
        Self::with(host, |listener| listener).await
    }

    pub async fn with(host: Host, set: fn(ListenerBuilder) -> ListenerBuilder) -> Self {
        // As those do that are hyper's.
        let ours = |server: ServerBuilder<TcpListener, Router>| {
            server.http(|mut http| {
                http.http2().enable_connect_protocol();
                http
            })
        };
        Self::assembled(host, set, ours).await
    }

    /// Our server, with these settings.
    pub async fn ours(
        listener: impl FnOnce(ListenerBuilder) -> ListenerBuilder,
        server: impl FnOnce(ServerBuilder<TcpListener, Router>) -> ServerBuilder<TcpListener, Router>,
    ) -> Self {
        Self::assembled(Host::Ours, listener, server).await
    }

    async fn assembled(
        host: Host,
        set: impl FnOnce(ListenerBuilder) -> ListenerBuilder,
        ours: impl FnOnce(ServerBuilder<TcpListener, Router>) -> ServerBuilder<TcpListener, Router>,
    ) -> Self {
        let (observer, events) = channel(1 << 20);
        let conntrack = Conntrack::builder().observer(observer).build().unwrap();
        let (app, entered, go) = app();
        let listener = conntrack.listener("site");
        let listener = match host {
            Host::Ours => listener,
            _ => listener.http(),
        };
        let listener = set(listener).bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let drain = listener.drain_handle();
        let signal = drain.signal();
        let server = match host {
            Host::Ours => {
                let server = ours(conntrack.serve(listener, app)).build().unwrap();
                tokio::spawn(server.run())
            }
            Host::Hyper => tokio::spawn(by_hand(listener, app)),
            Host::Axum => {
                let app = app.layer(ServerLayer::new());
                let app = app.into_make_service_with_connect_info::<ConnectionRecord>();
                let server = axum::serve(listener, app).with_graceful_shutdown(signal);
                tokio::spawn(async { server.await.unwrap() })
            }
            Host::Tonic => {
                let routes = tonic::service::Routes::from(app);
                let server = tonic::transport::Server::builder()
                    .accept_http1(true)
                    .layer(ServerLayer::new())
                    .add_routes(routes)
                    .serve_with_incoming_shutdown(listener.incoming(), signal);
                tokio::spawn(async { server.await.unwrap() })
            }
        };
        Self {
            host,
            conntrack,
            address,
            drain,
            server,
            entered,
            go,
            events,
            seen: Vec::new(),
        }
    }

    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// A connection with these bytes sent on it.
    pub async fn send(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = self.connect().await;
        stream.write_all(bytes).await.unwrap();
        stream
    }

    /// Waits until the connections have gone through exactly these states, in order.
    pub async fn goes_through(&mut self, expected: &[&[ConnectionState]]) {
        let mut last = None;
        loop {
            let seen: Vec<_> = self.seen.iter().map(|(_, states)| &states[..]).collect();
            if seen == expected {
                return;
            }
            for (seen, expected) in seen.iter().zip(expected) {
                assert!(
                    expected.starts_with(seen),
                    "{seen:?}, not {expected:?} ({last:?})"
                );
            }
            assert!(seen.len() <= expected.len(), "{seen:?}");
            let event = tokio::time::timeout(Duration::from_secs(20), self.events.recv());
            let Ok(event) = event.await else {
                panic!("{seen:?} so far, waiting for {expected:?}");
            };
            let event = event.unwrap().connection().unwrap();
            let Some(id) = event.connection else { continue };
            let mut add = |state| match self.seen.iter_mut().find(|(known, _)| *known == id) {
                Some((_, states)) => states.push(state),
                None => self.seen.push((id, vec![state])),
            };
            match &event.kind {
                Kind::Accepted { .. } => add(ConnectionState::New),
                Kind::StateChanged { to, .. } => add(*to),
                Kind::Closed { .. } => add(ConnectionState::Closed),
                _ => {}
            }
            last = Some(event.kind);
        }
    }

    /// What was seen is forgotten.
    pub fn forget(&mut self) {
        self.seen.clear();
    }

    pub fn stats(&self) -> ScopeStats {
        self.conntrack.stats().listener("site").unwrap().clone()
    }
}

async fn by_hand(mut listener: otel_conntrack::Listener, app: Router) {
    let drain = listener.drain_handle();
    loop {
        let (stream, _) = tokio::select! {
            () = drain.signal() => return,
            accepted = listener.accept() => accepted,
        };
        let service = TowerToHyperService::new(app.clone());
        let service = ServerService::new(service, &stream.record());
        let signal = drain.signal();
        tokio::spawn(async move {
            let mut http = auto::Builder::new(TokioExecutor::new());
            http.http2().enable_connect_protocol();
            let connection = http.serve_connection_with_upgrades(TokioIo::new(stream), service);
            tokio::pin!(connection);
            tokio::select! {
                ended = connection.as_mut() => { let _ = ended; }
                () = signal => {
                    connection.as_mut().graceful_shutdown();
                    let _ = connection.await;
                }
            }
        });
    }
}

/// The application, the paths that were entered, and what lets handlers go on.
pub fn app() -> (Router, mpsc::UnboundedReceiver<String>, Arc<Semaphore>) {
    let (enter, entered) = mpsc::unbounded_channel();
    let go = Arc::new(Semaphore::new(0));
    let (wait, pieces) = (go.clone(), go.clone());
    let app = Router::new()
        .route("/", any(async || "hi"))
        .route(
            "/wait",
            any(async move || {
                wait.acquire().await.unwrap().forget();
                "waited"
            }),
        )
        .route("/stream", get(async move || stream(pieces)))
        .route("/close", get(async || ([("connection", "close")], "bye")))
        .route("/read", any(async |body: Bytes| body.len().to_string()))
        .route("/upgrade", any(upgrade))
        .route("/large", get(async || Bytes::from_static(&LARGE)))
        .route("/panic", get(panics))
        .fallback(tunnel)
        .layer(axum::middleware::from_fn(
            move |request: Request, next: axum::middleware::Next| {
                let _ = enter.send(request.uri().path().to_owned());
                next.run(request)
            },
        ));
    (app, entered, go)
}

/// More than the kernel's buffers hold between two ends.
pub static LARGE: [u8; 32 << 20] = [b'x'; 32 << 20];

async fn panics() -> &'static str {
    panic!("a handler that panics, as it should")
}

/// A `CONNECT` to `echo` is granted; nothing else is found.
async fn tunnel(request: Request) -> Response {
    let granted = request.method() == http::Method::CONNECT
        && request.uri().host().is_some_and(|host| host == "echo");
    if granted {
        let mut response = upgrade(request).await;
        *response.status_mut() = http::StatusCode::OK;
        response.headers_mut().clear();
        return response;
    }
    let mut response = Response::new(Body::empty());
    *response.status_mut() = http::StatusCode::NOT_FOUND;
    response
}

/// Three pieces, each when it may.
fn stream(go: Arc<Semaphore>) -> Response {
    let pieces = futures_util::stream::unfold((go, 0), |(go, n)| async move {
        if n == 3 {
            return None;
        }
        go.acquire().await.unwrap().forget();
        let piece = Frame::data(Bytes::from_static(b"piece"));
        Some((Ok::<_, Infallible>(piece), (go, n + 1)))
    });
    Response::new(Body::new(StreamBody::new(pieces).boxed_unsync()))
}

/// Says back what it is told, once it is no HTTP any more.
async fn upgrade(mut request: Request) -> Response {
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        if let Ok(upgraded) = upgrade.await {
            let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        }
    });
    Response::builder()
        .status(101)
        .header("connection", "upgrade")
        .header("upgrade", "echo")
        .body(Body::empty())
        .unwrap()
}

/// Reads until this was read.
pub async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut read = Vec::new();
    while !String::from_utf8_lossy(&read).ends_with(end) {
        let n = stream.read_buf(&mut read).await.unwrap();
        assert!(
            n > 0,
            "{:?} ended before {end:?}",
            String::from_utf8_lossy(&read)
        );
    }
    String::from_utf8(read).unwrap()
}

/// Reads until the peer has closed, or reset.
pub async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut read = Vec::new();
    let _ = stream.read_to_end(&mut read).await;
    String::from_utf8(read).unwrap()
}
