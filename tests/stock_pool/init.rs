//! The one call installs it, and the application's own log stays as it is.

use std::time::Duration;

use otel_conntrack::{Conntrack, Observer, PoolEvent};
use tracing_subscriber::Registry;

use super::child::{role, run};
use super::stock::Server;
use super::{Told, client, get, pool, until};

const BOUND: Duration = Duration::from_secs(60);

fn library_is_silent(observer: impl Observer) -> otel_conntrack::Builder {
    Conntrack::builder()
        .environment([("OTEL_SDK_DISABLED", "false")])
        .otlp(false)
        .observer(observer)
}

#[test]
fn init_hears_stock_pools_and_the_log_at_info_has_no_line_of_hyper_util() {
    if role().is_none() {
        let test = "init::init_hears_stock_pools_and_the_log_at_info_has_no_line_of_hyper_util";
        for filter in ["info", "debug,hyper_util=warn", "trace,hyper_util=off"] {
            let ended = run(test, "speaks", &[("RUST_LOG", filter)], BOUND).well();
            assert!(
                ended.stderr.contains("the application's own line"),
                "{ended:?}"
            );
            let pool_lines = ["hyper_util", "pooling", "checkout"];
            let said = pool_lines.iter().find(|text| ended.stderr.contains(**text));
            assert_eq!(said, None, "{}", ended.stderr);
        }
        return;
    }
    let told = Told::default();
    let builder = library_is_silent(told.clone()).stock_pool_events(true);
    let guard = builder.init().unwrap();
    tracing::info!("the application's own line");
    // One layer is installed.
    assert!(guard.stock_pool_layer::<Registry>().is_err());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let server = Server::start().await;
        let client = client();
        for n in 1..=3 {
            get(&client, server.url("")).await;
            // The next one finds it in the list.
            let idle = || pool(&guard).event("IdleConnIn") == n;
            server.until("idle", idle).await;
        }
    });
    until("told", || told.len() as u64 >= 5);
    assert_eq!(pool(&guard).event_with("IdleConnOut", "reused"), 2);
    guard.shutdown_blocking().unwrap();
}

#[test]
fn init_with_a_subscriber_of_ones_own_leaves_the_layer_to_it() {
    if role().is_none() {
        let test = "init::init_with_a_subscriber_of_ones_own_leaves_the_layer_to_it";
        run::<&str>(test, "checks", &[], BOUND).well();
        return;
    }
    struct Nothing;
    impl Observer for Nothing {
        fn on_pool_event(&self, _: &PoolEvent) {}
    }
    let builder = library_is_silent(Nothing).subscriber(false);
    let error = builder.stock_pool_events(true).init().unwrap_err();
    assert_eq!(error.setting(), "stock_pool_events");
    assert!(error.to_string().contains("stock_pool_layer"), "{error}");

    let guard = library_is_silent(Nothing).subscriber(false).init().unwrap();
    assert!(guard.stock_pool_layer::<Registry>().is_ok());
    drop(guard);
    let error = Conntrack::builder().stock_pool_events(true).build();
    assert_eq!(error.unwrap_err().setting(), "stock_pool_events");
}
