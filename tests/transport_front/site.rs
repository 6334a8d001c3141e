//! A well-behaved HTTP server, HTTP/1 and HTTP/2, that keeps what it was asked.
//!
//! - `/redirect?S&to=URL`: status S to this place, which is the rest of the query; `&size=N` before
//!   `&to` is the body's size
//! - `/cookies?NAME=VALUE; ...`: sets a cookie
//! - `/gzip`, `/brotli`, `/deflate`, `/zstd`: [`TEXT`], compressed, with its length; `?chunked` without,
//!   `?empty` nothing at all, `?bad` something else, `?cut` half of it
//! - `/status?S`: this status
//! - `/stuck`: the head and the first half of a body, and never the rest
//! - `/loop`: 302 to itself
//! - `/never`: no answer
//! - `/unseen`: is not kept, for requests that may come or not
//! - `/echo`: the request's body, as it comes
//! - else: the request as it came

use std::convert::Infallible;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::LONG;

type Body = BoxBody<Bytes, hyper::Error>;

/// What compressed bodies say.
pub(crate) const TEXT: &str = "see every connection, see every connection, see every connection";

/// Gone with its runtime.
#[derive(Clone)]
pub(crate) struct Site {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    /// How many requests came that are never answered.
    never: Arc<watch::Sender<usize>>,
}

impl Site {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let site = Self {
            address: listener.local_addr().unwrap(),
            asked: Arc::default(),
            never: Arc::default(),
        };
        let served = site.clone();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let site = served.clone();
                tokio::spawn(async move {
                    let service = service_fn(|request| {
                        let site = site.clone();
                        async move { Ok::<_, Infallible>(site.answer(request).await) }
                    });
                    let builder = auto::Builder::new(TokioExecutor::new());
                    let _ = builder.serve_connection(TokioIo::new(tcp), service).await;
                });
            }
        });
        site
    }

    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// To this place, by a response of this status.
    pub(crate) fn redirect(&self, status: u16, to: &str) -> String {
        self.url(&format!("/redirect?{status}&to={to}"))
    }

    /// The requests since the last call.
    pub(crate) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }

    /// Waits until so many requests came in all that are never answered.
    pub(crate) async fn wait_never(&self, n: usize) {
        let mut never = self.never.subscribe();
        let come = tokio::time::timeout(LONG, never.wait_for(|come| *come >= n)).await;
        assert!(come.is_ok(), "it does not come");
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let (head, body) = request.into_parts();
        if head.uri.path() == "/echo" {
            self.asked.lock().unwrap().push(told(&head, "..."));
            return Response::new(body.boxed());
        }
        let query = head.uri.query().unwrap_or_default().to_owned();
        let multipart = head.headers.get(header::CONTENT_TYPE);
        let multipart = multipart.is_some_and(|value| value.as_bytes().starts_with(b"multipart"));
        let body = match body.collect().await {
            Ok(body) => body.to_bytes(),
            Err(_) => Bytes::from("broken"),
        };
        let body = if multipart || body.len() > 200 {
            format!("{} bytes", body.len())
        } else {
            String::from_utf8_lossy(&body).into_owned()
        };
        let told = told(&head, &body);
        if head.uri.path() != "/unseen" {
            self.asked.lock().unwrap().push(told.clone());
        }
        match head.uri.path() {
            "/redirect" if query.starts_with('3') => redirect(&query),
            "/cookies" => {
                let mut response = full("kept");
                for cookie in query.split('&') {
                    let cookie = cookie.replace("%20", " ");
                    let cookie = HeaderValue::from_str(&cookie).unwrap();
                    response.headers_mut().append(header::SET_COOKIE, cookie);
                }
                response
            }
            "/status" => {
                let mut response = full("");
                *response.status_mut() = query.parse().unwrap();
                response
            }
            "/stuck" => {
                let half = stream::iter([Ok(Frame::data(Bytes::from("half")))]);
                let mut response = Response::new(BodyExt::boxed(StreamBody::new(
                    half.chain(stream::pending()),
                )));
                let headers = response.headers_mut();
                headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("8"));
                response
            }
            "/loop" => redirect("302&to=/loop"),
            "/never" => {
                self.never.send_modify(|n| *n += 1);
                std::future::pending().await
            }
            path => match compressed(path) {
                Some(bytes) => encoded(&path[1..], &query, bytes),
                None => full(&told),
            },
        }
    }
}

/// The request, line by line.
fn told(head: &http::request::Parts, body: &str) -> String {
    let mut text = format!("{} {} {:?}\n", head.method, head.uri, head.version);
    for (name, value) in &head.headers {
        let mut value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        // The boundary is made by chance.
        if let Some(at) = value.find("boundary=") {
            value.truncate(at);
        }
        // A store gives them in any order.
        if name == header::COOKIE {
            let mut cookies: Vec<_> = value.split("; ").collect();
            cookies.sort_unstable();
            value = cookies.join("; ");
        }
        text.push_str(&format!("{name}: {value}\n"));
    }
    text.push_str(body);
    text
}

fn redirect(query: &str) -> Response<Body> {
    let (status, to) = query.split_once("&to=").unwrap_or((query, ""));
    let (status, size) = status.split_once("&size=").unwrap_or((status, "0"));
    let mut response = full(&"x".repeat(size.parse().unwrap()));
    *response.status_mut() = StatusCode::from_bytes(status.as_bytes()).unwrap();
    if !to.is_empty() {
        let to = HeaderValue::from_str(to).unwrap();
        response.headers_mut().insert(header::LOCATION, to);
    }
    response
}

fn compressed(path: &str) -> Option<Vec<u8>> {
    use flate2::{Compression, write};
    let (level, text) = (Compression::default(), TEXT.as_bytes());
    Some(match path {
        "/gzip" => {
            let mut encoder = write::GzEncoder::new(Vec::new(), level);
            encoder.write_all(text).unwrap();
            encoder.finish().unwrap()
        }
        "/deflate" => {
            let mut encoder = write::ZlibEncoder::new(Vec::new(), level);
            encoder.write_all(text).unwrap();
            encoder.finish().unwrap()
        }
        "/brotli" => {
            let mut bytes = Vec::new();
            brotli::CompressorWriter::new(&mut bytes, 4_096, 5, 22)
                .write_all(text)
                .unwrap();
            bytes
        }
        "/zstd" => zstd::encode_all(text, 1).unwrap(),
        _ => return None,
    })
}

fn encoded(coding: &str, query: &str, bytes: Vec<u8>) -> Response<Body> {
    let bytes = match query {
        "empty" => Vec::new(),
        "bad" => b"this is not compressed at all".to_vec(),
        "cut" => bytes[..bytes.len() / 2].to_vec(),
        _ => bytes,
    };
    let body = if query == "chunked" {
        // The last bytes come in a chunk of their own.
        let (begin, end) = bytes.split_at(bytes.len() - 1);
        let chunks = [begin.to_vec(), end.to_vec()].map(|c| Ok(Frame::data(Bytes::from(c))));
        BodyExt::boxed(StreamBody::new(stream::iter(chunks)))
    } else {
        Full::new(Bytes::from(bytes))
            .map_err(|e| match e {})
            .boxed()
    };
    let mut response = Response::new(body);
    let coding = if coding == "brotli" { "br" } else { coding };
    let coding = HeaderValue::from_str(coding).unwrap();
    response
        .headers_mut()
        .insert(header::CONTENT_ENCODING, coding);
    response
}

fn full(text: &str) -> Response<Body> {
    let body = Full::new(Bytes::from(text.to_owned()));
    Response::new(body.map_err(|never| match never {}).boxed())
}
