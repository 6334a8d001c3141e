//! Where it is served: a thread of its own that ends with the `Conntrack`, or a router.

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use axum::Router;
use otel_conntrack::{Conntrack, Inspect};

use crate::inspect::ask::{anywhere, ask, curl, events, html, json, paged, post};
use crate::support::traffic::accept;

#[test]
fn it_answers_while_the_runtime_of_the_application_is_stuck() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (conntrack, page) = paged(anywhere());
        let _listener = conntrack
            .listener("http")
            .bind("127.0.0.1:0")
            .await
            .unwrap();
        let _open = accept(&conntrack, "http");
        // Nothing else runs on this thread meanwhile.
        assert!(curl(page, "/").contains("1 open"));
    });
}

#[test]
fn it_ends_with_the_last_clone_and_its_address_is_free() {
    let (conntrack, page) = paged(anywhere());
    let clone = conntrack.clone();
    assert_eq!(clone.inspect_addr(), Some(page));
    let viewer = std::thread::spawn(move || events(page, "/?live=1", 1));
    viewer.join().unwrap();
    drop(conntrack);
    assert_eq!(ask(page, "/", &[]).status, 200);
    drop(clone);
    let again = TcpListener::bind(page);
    assert!(again.is_ok(), "{again:?}");
}

#[tokio::test]
async fn it_ends_when_it_is_dropped_on_a_runtime_too() {
    let (conntrack, page) = paged(anywhere());
    drop(conntrack);
    assert!(TcpListener::bind(page).is_ok());
}

#[test]
fn its_own_connections_are_seen_by_nobody() {
    let (conntrack, page) = paged(anywhere());
    for _ in 0..3 {
        assert_eq!(json(page, "/connections")["total"], 0);
    }
    assert_eq!(conntrack.stats().scopes.len(), 0);
}

#[test]
fn an_address_that_is_no_good_is_refused_when_it_is_built() {
    let built = |inspect: Inspect| Conntrack::builder().inspect(inspect).build();
    let error = built(Inspect::at("0.0.0.0:0")).unwrap_err().to_string();
    assert!(
        error.contains("inspect = \"0.0.0.0:0\"") && error.contains("loopback"),
        "{error}"
    );
    let error = built(Inspect::new()).unwrap_err().to_string();
    assert!(error.contains("Inspect::at"), "{error}");
    let error = Conntrack::builder()
        .build()
        .unwrap()
        .inspect_router_with(anywhere())
        .unwrap_err();
    assert!(error.to_string().contains("Builder::inspect"), "{error}");
    assert!(built(Inspect::at("0.0.0.0:0").allow_non_loopback(true)).is_ok());
}

/// A router, served; the receiver's end stops it.
fn served(
    router: Router,
) -> (
    SocketAddr,
    tokio::sync::oneshot::Sender<()>,
    std::thread::JoinHandle<()>,
) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let end = async {
                let _ = stopped.await;
            };
            axum::serve(listener, router)
                .with_graceful_shutdown(end)
                .await
                .unwrap();
        });
    });
    (address, stop, thread)
}

#[test]
fn a_router_works_wherever_it_is_mounted() {
    let conntrack = Conntrack::builder().build().unwrap();
    let pipe = accept(&conntrack, "http");
    let id = pipe.io.record().id();
    let inspect = || {
        conntrack
            .inspect_router_with(Inspect::new().title("shop").actions(true))
            .unwrap()
    };
    let router = Router::new()
        .nest("/debug/connections", inspect())
        .nest("/a", Router::new().nest_service("/b", inspect()));
    let (address, stop, thread) = served(router);
    for base in ["/debug/connections", "/a/b"] {
        for (path, part) in [
            ("", format!("href=\"{base}/pools\"")),
            ("?format=html", format!("<a href=\"{base}\" aria-current")),
            ("/connections", format!("href=\"{base}/connections/{id}\"")),
            (
                &format!("/connections/{id}"),
                format!("action=\"{base}/actions/close\""),
            ),
            ("/closed", format!("href=\"{base}/closed\"")),
        ] {
            let answer = html(address, &format!("{base}{path}"));
            assert_eq!(answer.status, 200, "{base}{path}");
            assert!(answer.body.contains(&part), "{base}{path} has no {part}");
        }
        assert!(curl(address, &format!("{base}/connections")).contains(&id.to_string()));
        assert!(events(address, &format!("{base}?live=1"), 1).contains("data: "));
        let one = html(address, &format!("{base}/connections/{id}"));
        let form = format!("token={}&id={id}", one.token().unwrap());
        let close = post(address, &format!("{base}/actions/close"), &form, &[]);
        assert_eq!(close.status, 409, "a pipe can't be closed: {}", close.body);
    }
    assert_eq!(ask(address, "/", &[]).status, 404, "the application's own");
    stop.send(()).unwrap();
    thread.join().unwrap();
}

#[test]
fn a_tower_service_it_is_too() {
    let conntrack = Conntrack::builder().build().unwrap();
    let router = conntrack.inspect_router().unwrap();
    let request = http::Request::get("/connections").header("host", "localhost");
    let request = request.body(axum::body::Body::empty()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let answer = runtime
        .block_on(tower::ServiceExt::oneshot(router, request))
        .unwrap();
    assert_eq!(answer.status(), 200);
}

#[test]
fn an_open_page_holds_a_graceful_shutdown_up_for_a_while_and_no_longer() {
    let conntrack = Conntrack::builder().build().unwrap();
    let (address, stop, thread) = served(conntrack.inspect_router().unwrap());
    let viewer = std::thread::spawn(move || {
        // To its end.
        ask(address, "/?live=1", &[]).body
    });
    events(address, "/?live=1", 1);
    let begin = Instant::now();
    stop.send(()).unwrap();
    thread.join().unwrap();
    assert!(
        begin.elapsed() < Duration::from_secs(45),
        "{:?}",
        begin.elapsed()
    );
    assert!(viewer.join().unwrap().contains("data: "));
}
