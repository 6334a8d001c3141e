//! Times that run out, as in a plain reqwest client: on a clock that jumps there when all has come that
//! comes, so that a loaded machine is no slow server.

use std::pin::pin;
use std::time::Duration;

use otel_conntrack::HttpVersions;
use reqwest::Response;

use super::same::{Ask, Came, Front, Plain, both, our_word, same, status, word};
use super::site::Site;
use super::{LONG, Ours};

/// Asks both; when all has come that comes, the clock jumps to where the time is over.
async fn runs_out(name: &str, (plain, front): (Plain, Front), ask: Ask, stuck: bool) {
    let (site, other) = (Site::start().await, Site::start().await);
    let mut came = Vec::new();
    for (n, versions) in [HttpVersions::Auto, HttpVersions::Http2]
        .into_iter()
        .enumerate()
    {
        let builder = crate::plain();
        let builder = match versions {
            HttpVersions::Http2 => builder.http2_prior_knowledge(),
            _ => builder,
        };
        let plain = plain(builder).build().unwrap();
        let ours = Ours::new(|t| t.http_versions(versions), front);
        let sent = ask(&plain, &site, &other).send();
        let sent = async { sent.await.map_err(|error| word(&error)) };
        let theirs = run_out(sent, &site, stuck, 2 * n + 1).await;
        let theirs_asked = site.asked();
        let (_, request) = ask(&plain, &site, &other).build_split();
        let sent = ours.client.execute(request.unwrap());
        let sent = async { sent.await.map_err(|error| our_word(&error)) };
        let our_own = run_out(sent, &site, stuck, 2 * n + 2).await;
        assert_eq!(our_own, theirs, "{name}, {versions:?}");
        assert_eq!(site.asked(), theirs_asked, "{name}, {versions:?}");
        ours.settled().await;
        came.push(our_own);
    }
    for (came, took) in came {
        assert_eq!(took, SHORT, "{name}");
        match came {
            Came::Error(word) => assert_eq!((word, stuck), ("timeout", false), "{name}"),
            Came::Answer { body, .. } => assert_eq!((body, stuck), (Err("timeout"), true)),
        }
    }
}

/// With how long it took on the clock that jumps, in steps of the time that it may take.
async fn run_out(
    sent: impl Future<Output = Result<Response, &'static str>>,
    site: &Site,
    stuck: bool,
    never: usize,
) -> (Came, Duration) {
    let mut sent = pin!(sent);
    let begun = tokio::time::Instant::now();
    let came = if stuck {
        let response = sent.await.unwrap();
        tokio::time::pause();
        Came::of(response).await
    } else {
        tokio::select! {
            _ = &mut sent => panic!("it came"),
            () = site.wait_never(never) => tokio::time::pause(),
        }
        match sent.await {
            Ok(response) => Came::of(response).await,
            Err(word) => Came::Error(word),
        }
    };
    let steps = begun.elapsed().as_secs_f64() / SHORT.as_secs_f64();
    tokio::time::resume();
    (came, SHORT.mul_f64(steps.round()))
}

/// Shorter than other times, and yet longer than anything takes that comes at all.
const SHORT: Duration = LONG.checked_div(2).unwrap();

const NEVER: Ask = |c, s, _| c.get(s.url("/never"));
const STUCK: Ask = |c, s, _| c.get(s.url("/stuck"));
const REDIRECTED: Ask = |c, s, _| c.get(s.redirect(302, "/never"));

#[tokio::test]
async fn a_timeout() {
    let set = both!(.timeout(SHORT));
    runs_out("never", set, NEVER, false).await;
    runs_out("redirected", set, REDIRECTED, false).await;
    runs_out("stuck", set, STUCK, true).await;
}

#[tokio::test]
async fn a_read_timeout() {
    let set = both!(.read_timeout(SHORT));
    runs_out("never", set, NEVER, false).await;
    runs_out("redirected", set, REDIRECTED, false).await;
    runs_out("stuck", set, STUCK, true).await;
}

#[tokio::test]
async fn a_requests_own_timeout() {
    let own: Ask = |c, s, _| c.get(s.url("/never")).timeout(SHORT);
    let own_stuck: Ask = |c, s, _| c.get(s.url("/stuck")).timeout(SHORT);
    let long = both!(.timeout(LONG).read_timeout(LONG));
    runs_out("own", both!(), own, false).await;
    runs_out("own, shorter", long, own, false).await;
    runs_out("own, shorter, stuck", long, own_stuck, true).await;
}

#[tokio::test]
async fn times_that_do_not_run_out() {
    let quick: Ask = |c, s, _| c.get(s.url("/"));
    let longer: Ask = |c, s, _| c.get(s.url("/")).timeout(LONG);
    let long = both!(.timeout(LONG).read_timeout(LONG));
    assert_eq!(status(&same("in time", long, &[quick, longer]).await), 200);
    // Longer than any clock has.
    let max = both!(.timeout(Duration::MAX));
    assert_eq!(status(&same("without end", max, &[quick]).await), 200);
    let ours = Ours::new(
        |t| t,
        |f| f.timeout(Duration::MAX).read_timeout(Duration::MAX),
    );
    let site = Site::start().await;
    let body = ours.get(&site.url("/gzip?chunked")).await.unwrap();
    assert_eq!(body.text().await.unwrap(), super::site::TEXT);
}
