//! What is the same as in a plain reqwest client: each case is asked by both, and all that comes back
//! and all that the server saw is equal.

use std::net::SocketAddr;

use bytes::Bytes;
use futures_util::stream;
use http::HeaderMap;
use otel_conntrack::{
    FrontError, FrontErrorKind as Kind, HttpVersions, RedirectPolicy, ReqwestFront, TransportError,
    TransportErrorKind,
};
use reqwest::multipart::{Form, Part};
use reqwest::redirect::Policy;
use reqwest::{Client, ClientBuilder, RequestBuilder, Response, StatusCode, Url, Version};

use super::Ours;
use super::site::Site;

pub(crate) type Plain = fn(ClientBuilder) -> ClientBuilder;
pub(crate) type Front = fn(ReqwestFront) -> ReqwestFront;
pub(crate) type Ask = fn(&Client, &Site, &Site) -> RequestBuilder;

/// The same calls on both builders.
macro_rules! both {
    ($($calls:tt)*) => {
        ((|b| b $($calls)*) as Plain, (|b| b $($calls)*) as Front)
    };
}
pub(crate) use both;

/// What came of a request.
#[derive(Debug, PartialEq)]
pub(crate) enum Came {
    Answer {
        status: StatusCode,
        url: Url,
        version: Version,
        headers: Vec<String>,
        length: Option<u64>,
        from: Option<SocketAddr>,
        body: Result<String, &'static str>,
    },
    Error(&'static str),
}

impl Came {
    pub(crate) async fn of(response: Response) -> Self {
        let lines = |headers: &HeaderMap| {
            let known = headers.iter().filter(|(name, _)| *name != "date");
            known
                .map(|(name, value)| format!("{name}: {value:?}"))
                .collect()
        };
        Self::Answer {
            status: response.status(),
            url: response.url().clone(),
            version: response.version(),
            headers: lines(response.headers()),
            length: response.content_length(),
            from: response.remote_addr(),
            body: response.text().await.map_err(|error| {
                assert!(error.is_decode(), "{error:?}");
                if error.is_timeout() {
                    "timeout"
                } else {
                    "broken"
                }
            }),
        }
    }
}

/// One word for what reqwest says.
pub(crate) fn word(error: &reqwest::Error) -> &'static str {
    match error {
        _ if error.is_timeout() => "timeout",
        _ if error.is_redirect() => "redirect",
        _ if error.is_builder() => "builder",
        _ if error.is_connect() => "connect",
        _ => "request",
    }
}

/// The same word for what we say.
pub(crate) fn our_word(error: &reqwest_middleware::Error) -> &'static str {
    let reqwest_middleware::Error::Middleware(error) = error else {
        panic!("{error}");
    };
    if let Some(error) = error.downcast_ref::<FrontError>() {
        return match error.kind() {
            Kind::Timeout { .. } | Kind::ReadTimeout { .. } => "timeout",
            Kind::TooManyRedirects { .. } | Kind::Redirect => "redirect",
            Kind::Scheme | Kind::NotHttps | Kind::InvalidUrl => "builder",
            _ => "request",
        };
    }
    match error.downcast_ref::<TransportError>().unwrap().kind() {
        TransportErrorKind::Dial(_) => "connect",
        _ => "request",
    }
}

/// Asks both, over HTTP/1 and HTTP/2; gives what came last.
pub(crate) async fn same(name: &str, (plain, front): (Plain, Front), asks: &[Ask]) -> Came {
    let (site, other) = (Site::start().await, Site::start().await);
    let mut last = None;
    for versions in [HttpVersions::Auto, HttpVersions::Http2] {
        let h2 = versions == HttpVersions::Http2;
        let builder = crate::plain();
        let builder = if h2 {
            builder.http2_prior_knowledge()
        } else {
            builder
        };
        let plain = plain(builder).build().unwrap();
        let ours = Ours::new(|t| t.http_versions(versions), front);
        let (mut theirs_came, mut ours_came) = (Vec::new(), Vec::new());
        for ask in asks {
            theirs_came.push(match ask(&plain, &site, &other).send().await {
                Ok(response) => Came::of(response).await,
                Err(error) => Came::Error(word(&error)),
            });
        }
        let theirs_asked = (site.asked(), other.asked());
        for ask in asks {
            let (_, request) = ask(&plain, &site, &other).build_split();
            ours_came.push(match ours.client.execute(request.unwrap()).await {
                Ok(response) => Came::of(response).await,
                Err(error) => Came::Error(our_word(&error)),
            });
        }
        let ours_asked = (site.asked(), other.asked());
        assert_eq!(ours_came, theirs_came, "{name}, {versions:?}");
        assert_eq!(ours_asked, theirs_asked, "{name}, {versions:?}");
        ours.settled().await;
        last = ours_came.pop();
    }
    last.unwrap()
}

#[track_caller]
fn body(came: &Came) -> &str {
    match came {
        Came::Answer { body, .. } => body.as_ref().unwrap(),
        Came::Error(error) => panic!("{error}"),
    }
}

#[track_caller]
pub(crate) fn status(came: &Came) -> u16 {
    match came {
        Came::Answer { status, .. } => status.as_u16(),
        Came::Error(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn requests_and_their_bodies() {
    let asks: [(&str, Ask); 11] = [
        ("get", |c, s, _| c.get(s.url("/a?b=c#d"))),
        ("head", |c, s, _| c.head(s.url("/"))),
        ("post without a body", |c, s, _| c.post(s.url("/"))),
        ("text", |c, s, _| c.put(s.url("/")).body("text")),
        ("large", |c, s, _| {
            c.post(s.url("/")).body(vec![b'x'; 1 << 20])
        }),
        ("json", |c, s, _| {
            c.patch(s.url("/")).json(&serde_json::json!({"a": 1}))
        }),
        ("multipart", |c, s, _| {
            let form = Form::new().text("a", "b").part("c", Part::bytes(&b"d"[..]));
            c.post(s.url("/")).multipart(form)
        }),
        ("stream", |c, s, _| {
            let chunks = [Ok::<_, std::io::Error>("one, "), Ok("two")];
            let body = reqwest::Body::wrap_stream(stream::iter(chunks));
            c.post(s.url("/echo")).body(body)
        }),
        ("no content", |c, s, _| c.delete(s.url("/status?204"))),
        ("not modified", |c, s, _| c.get(s.url("/status?304"))),
        ("auth", |c, s, _| {
            c.get(s.url("/"))
                .basic_auth("me", Some("secret"))
                .header("x-more", "1")
        }),
    ];
    for (name, ask) in asks {
        same(name, both!(), &[ask]).await;
    }
    let user: Ask = |c, s, _| c.get(format!("http://me:secret@{}/", s.address()));
    assert!(
        body(&same("user in the URL", both!(), &[user]).await).contains("authorization: Basic")
    );
}

#[tokio::test]
async fn default_headers() {
    let plain: Ask = |c, s, _| c.get(s.url("/"));
    let own: Ask = |c, s, _| {
        c.get(s.url("/"))
            .header("accept", "text/plain")
            .header("user-agent", "mine")
            .header("x-two", "3")
    };
    let came = same("none", both!(), &[plain]).await;
    assert!(body(&came).contains("accept: */*"), "{came:?}");
    let set = both!(.user_agent("shop/1").default_headers({
        let mut headers = HeaderMap::new();
        headers.append("x-two", "1".parse().unwrap());
        headers.append("x-two", "2".parse().unwrap());
        headers.append("accept", "image/png".parse().unwrap());
        headers
    }));
    let came = same("set", set, &[own, plain]).await;
    assert!(body(&came).contains("user-agent: shop/1"), "{came:?}");
    assert!(body(&came).contains("x-two: 2"), "{came:?}");
    same("followed", set, &[|c, s, _| c.get(s.redirect(302, "/"))]).await;
}

#[tokio::test]
async fn redirects_and_methods() {
    for status in ["301", "302", "303", "307", "308", "300", "304", "305"] {
        let asks: Vec<Ask> = match status {
            "301" => asks::<301>(),
            "302" => asks::<302>(),
            "303" => asks::<303>(),
            "307" => asks::<307>(),
            "308" => asks::<308>(),
            "300" => asks::<300>(),
            "304" => asks::<304>(),
            _ => asks::<305>(),
        };
        same(status, both!(), &asks).await;
    }
}

/// Requests that a response of this status redirects.
fn asks<const S: u16>() -> Vec<Ask> {
    vec![
        |c, s, _| c.get(s.redirect(S, "/next?a=b#c")),
        |c, s, _| c.head(s.redirect(S, "/next")),
        |c, s, _| c.post(s.redirect(S, "/next")).body("text"),
        |c, s, _| c.post(s.redirect(S, "/next")).json(&serde_json::json!([1])),
        |c, s, _| c.post(s.redirect(S, "/next")),
        |c, s, _| c.put(s.redirect(S, "/next")).body("text"),
        |c, s, _| c.delete(s.redirect(S, "/next")),
        |c, s, _| {
            // It can't be sent again.
            let chunks = [Ok::<_, std::io::Error>("once")];
            let body = reqwest::Body::wrap_stream(stream::iter(chunks));
            c.post(s.redirect(S, "/next")).body(body)
        },
        |c, s, o| c.post(s.redirect(S, &o.url("/next"))).body("text"),
    ]
}

#[tokio::test]
async fn redirects_and_where_to() {
    let asks: [(&str, Ask); 8] = [
        ("relative", |c, s, _| c.get(s.redirect(302, "../a/./b"))),
        ("query alone", |c, s, _| c.get(s.redirect(302, "?x=y"))),
        ("other scheme-relative", |c, s, o| {
            c.get(s.redirect(302, &format!("//{}/x", o.address())))
        }),
        ("none", |c, s, _| c.get(s.url("/redirect?302"))),
        ("no URL", |c, s, _| c.get(s.redirect(302, "http://[:"))),
        ("other scheme", |c, s, _| {
            c.get(s.redirect(302, "ftp://127.0.0.1/x"))
        }),
        ("mail", |c, s, _| c.get(s.redirect(302, "mailto:me"))),
        ("body of its own", |c, s, _| {
            c.get(s.url("/redirect?302&size=30000&to=/next"))
        }),
    ];
    for (name, ask) in asks {
        same(name, both!(), &[ask]).await;
    }
}

#[tokio::test]
async fn redirects_and_what_is_secret() {
    let to_other: Ask = |c, s, o| {
        c.get(s.redirect(302, &o.url("/next")))
            .bearer_auth("secret")
            .header("cookie", "a=b")
            .header("cookie2", "c")
            .header("proxy-authorization", "d")
            .header("www-authenticate", "e")
            .header("x-harmless", "f")
    };
    let came = same("to another origin", both!(), &[to_other]).await;
    assert!(body(&came).contains("x-harmless: f"), "{came:?}");
    for secret in ["secret", "a=b", "cookie2", "proxy-", "www-"] {
        assert!(!body(&came).contains(secret), "{came:?}");
    }
    let to_same: Ask = |c, s, _| {
        c.get(s.redirect(302, &s.redirect(307, "/next")))
            .bearer_auth("secret")
            .header("cookie", "a=b")
    };
    let came = same("to the same origin", both!(), &[to_same]).await;
    assert!(body(&came).contains("secret") && body(&came).contains("a=b"));
    let there_and_back: Ask = |c, s, o| {
        c.get(s.redirect(302, &o.redirect(302, &s.url("/next"))))
            .bearer_auth("secret")
    };
    let came = same("there and back", both!(), &[there_and_back]).await;
    assert!(!body(&came).contains("secret"), "{came:?}");
}

#[tokio::test]
async fn redirect_policies() {
    let chain: Ask = |c, s, _| {
        let twice = s.redirect(302, &s.redirect(302, "/next"));
        c.get(s.redirect(302, &twice))
    };
    let limited: [(Plain, Front, &str); 4] = [
        (
            |b| b.redirect(Policy::limited(3)),
            |b| b.redirect(RedirectPolicy::limited(3)),
            "200",
        ),
        (
            |b| b.redirect(Policy::limited(2)),
            |b| b.redirect(RedirectPolicy::limited(2)),
            "error",
        ),
        (
            |b| b.redirect(Policy::limited(0)),
            |b| b.redirect(RedirectPolicy::limited(0)),
            "error",
        ),
        (
            |b| b.redirect(Policy::none()),
            |b| b.redirect(RedirectPolicy::none()),
            "302",
        ),
    ];
    for (plain, front, expected) in limited {
        match same(expected, (plain, front), &[chain]).await {
            Came::Error(word) => assert_eq!((word, expected), ("redirect", "error")),
            came => assert_eq!(status(&came).to_string(), expected),
        }
    }
    let to_itself: Ask = |c, s, _| c.get(s.url("/loop"));
    let came = same("to itself", both!(), &[to_itself]).await;
    assert_eq!(came, Came::Error("redirect"));

    let stop: (Plain, Front) = (
        |b| {
            b.redirect(Policy::custom(|a| {
                if a.url().path() == "/next" {
                    a.stop()
                } else {
                    a.follow()
                }
            }))
        },
        |b| {
            b.redirect(RedirectPolicy::custom(|a| {
                if a.url().path() == "/next" {
                    a.stop()
                } else {
                    a.follow()
                }
            }))
        },
    );
    assert_eq!(status(&same("stops", stop, &[chain]).await), 302);
    let fail: (Plain, Front) = (
        |b| {
            b.redirect(Policy::custom(|a| match a.previous().len() {
                1 if a.status() == 302 => Policy::default().redirect(a),
                _ => a.error("not here"),
            }))
        },
        |b| {
            b.redirect(RedirectPolicy::custom(|a| match a.previous().len() {
                1 if a.status() == 302 => RedirectPolicy::default().redirect(a),
                _ => a.error("not here"),
            }))
        },
    );
    assert_eq!(same("fails", fail, &[chain]).await, Came::Error("redirect"));
}

#[tokio::test]
async fn referers() {
    let asks: [Ask; 3] = [
        |c, s, _| c.get(s.redirect(302, "/next")),
        |c, s, o| {
            let url = s
                .redirect(302, &o.url("/next"))
                .replacen("//", "//me:secret@", 1);
            c.get(url + "#fragment")
        },
        |c, s, _| {
            c.get(s.redirect(302, "/next"))
                .header("referer", "http://mine/")
        },
    ];
    let came = same("on", both!(), &asks).await;
    assert!(
        body(&came).contains("referer: http://127.0.0.1"),
        "{came:?}"
    );
    let came = same("off", both!(.referer(false)), &asks).await;
    assert!(body(&came).contains("referer: http://mine/"), "{came:?}");
}

#[tokio::test]
async fn only_https() {
    let asks: [Ask; 2] = [
        |c, s, _| c.get(s.url("/")),
        |c, s, _| c.get(s.url("/").replace("http", "ftp")),
    ];
    for ask in asks {
        let came = same("https only", both!(.https_only(true)), &[ask]).await;
        assert_eq!(came, Came::Error("builder"));
    }
    let ftp: Ask = |c, _, _| c.get("ftp://127.0.0.1/");
    assert_eq!(same("ftp", both!(), &[ftp]).await, Came::Error("builder"));
}

#[tokio::test]
async fn cookies() {
    let set: Ask =
        |c, s, _| c.get(s.url("/cookies?a=1&b=2;%20Path=/deep&c=3;%20Secure&d=4;%20Max-Age=0"));
    let get: Ask = |c, s, _| c.get(s.url("/"));
    let deep: Ask = |c, s, _| c.get(s.url("/deep/er"));
    let own: Ask = |c, s, _| c.get(s.url("/")).header("cookie", "mine=1");
    let other: Ask = |c, _, o| c.get(o.url("/"));
    let came = same("off", both!(), &[set, get]).await;
    assert!(!body(&came).contains("cookie"), "{came:?}");
    let on = both!(.cookie_store(true));
    let came = same("on", on, &[set, get, own, other, deep]).await;
    assert!(
        body(&came).contains("a=1") && body(&came).contains("b=2"),
        "{came:?}"
    );
    // What a redirect sets goes with the next request already; what the caller set goes nowhere else.
    let follow: [Ask; 3] = [
        set,
        |c, s, _| c.get(s.redirect(302, "/next")),
        |c, s, o| {
            c.get(s.redirect(302, &o.url("/next")))
                .header("cookie", "mine=1")
        },
    ];
    same("followed", on, &follow).await;
    let provided: (Plain, Front) = both!(.cookie_provider({
        let jar = reqwest::cookie::Jar::default();
        jar.add_cookie_str("given=1", &"http://127.0.0.1/".parse().unwrap());
        std::sync::Arc::new(jar)
    }));
    assert!(body(&same("provided", provided, &[get]).await).contains("given=1"));
    same(
        "off again",
        both!(.cookie_store(true).cookie_store(false)),
        &[set, get],
    )
    .await;
}

#[tokio::test]
async fn compressed_bodies() {
    let accepted: Ask = |c, s, _| c.get(s.url("/"));
    let all = same("asked for", both!(), &[accepted]).await;
    for coding in ["gzip", "br", "deflate", "zstd"] {
        assert!(body(&all).contains(coding), "{all:?}");
    }
    let own: Ask = |c, s, _| c.get(s.url("/gzip")).header("accept-encoding", "identity");
    same("asked for otherwise", both!(), &[own]).await;
    let asks: [[Ask; 5]; 4] = [
        coding!("gzip"),
        coding!("brotli"),
        coding!("deflate"),
        coding!("zstd"),
    ];
    for (n, asks) in asks.iter().enumerate() {
        let came = same(&format!("coding {n}"), both!(), asks).await;
        assert_eq!(body(&came), super::site::TEXT);
        for wrong in ["empty", "bad", "cut"] {
            let head: [Ask; 2] = match (wrong, n) {
                ("empty", 0) => wrong!("gzip?empty"),
                ("bad", 0) => wrong!("gzip?bad"),
                (_, 0) => wrong!("gzip?cut"),
                ("empty", 1) => wrong!("brotli?empty"),
                ("bad", 1) => wrong!("brotli?bad"),
                (_, 1) => wrong!("brotli?cut"),
                ("empty", 2) => wrong!("deflate?empty"),
                ("bad", 2) => wrong!("deflate?bad"),
                (_, 2) => wrong!("deflate?cut"),
                ("empty", _) => wrong!("zstd?empty"),
                ("bad", _) => wrong!("zstd?bad"),
                (_, _) => wrong!("zstd?cut"),
            };
            same(&format!("coding {n}, {wrong}"), both!(), &head).await;
        }
    }
    let off = both!(.gzip(false).brotli(false).deflate(false).zstd(false));
    let came = same("off", off, &[accepted]).await;
    assert!(!body(&came).contains("accept-encoding"), "{came:?}");
    let off = both!(.no_gzip().no_brotli().no_deflate().no_zstd());
    same("off, whatever is compiled in", off, &[accepted]).await;
    let one = both!(.gzip(false));
    same(
        "one of them",
        one,
        &[accepted, |c, s, _| c.get(s.url("/zstd"))],
    )
    .await;
}

/// Requests for a coding: twice, without a length, without a body, after a redirect, and once more.
macro_rules! coding {
    ($coding:literal) => {
        [
            |c, s, _| c.get(s.url(concat!("/", $coding))),
            |c, s, _| c.get(s.url(concat!("/", $coding, "?chunked"))),
            |c, s, _| c.head(s.url(concat!("/", $coding))),
            |c, s, _| c.get(s.redirect(302, concat!("/", $coding))),
            |c, s, _| c.get(s.url(concat!("/", $coding))),
        ]
    };
}
use coding;

/// Requests for something that can't be decompressed.
macro_rules! wrong {
    ($path:literal) => {
        [
            |c, s, _| c.get(s.url(concat!("/", $path))),
            |c, s, _| c.head(s.url(concat!("/", $path))),
        ]
    };
}
use wrong;

#[tokio::test]
async fn errors() {
    let refused: Ask = |c, _, _| c.get("http://127.0.0.1:1/");
    assert_eq!(
        same("refused", both!(), &[refused]).await,
        Came::Error("connect")
    );
    let version: Ask = |c, s, _| c.get(s.url("/")).version(Version::HTTP_3);
    assert_eq!(
        same("HTTP/3", both!(), &[version]).await,
        Came::Error("request")
    );
    let broken: Ask = |c, s, _| {
        let chunks = [
            Ok(Bytes::from("begin")),
            Err(std::io::Error::other("broken")),
        ];
        let body = reqwest::Body::wrap_stream(stream::iter(chunks));
        c.post(s.url("/unseen")).body(body)
    };
    same("a body that breaks", both!(), &[broken]).await;
}
