//! A well-behaved HTTP server, by hyper: HTTP/1 and HTTP/2, over TCP, TLS or a Unix socket.
//!
//! - `/echo`: the request's body, as it comes, with its trailers
//! - `/length`: how long the request's body was
//! - else: the request's head, line by line

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response, Version};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio_rustls::TlsAcceptor;

type Body = BoxBody<Bytes, hyper::Error>;

pub(crate) async fn plain() -> SocketAddr {
    at("127.0.0.1:0").await
}

pub(crate) async fn at(address: &str) -> SocketAddr {
    let listener = TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tokio::spawn(serve(tcp));
        }
    });
    address
}

pub(crate) async fn tls(config: Arc<ServerConfig>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = TlsAcceptor::from(config);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let handshake = acceptor.accept(tcp);
            tokio::spawn(async move {
                if let Ok(stream) = handshake.await {
                    serve(stream).await;
                }
            });
        }
    });
    address
}

pub(crate) fn unix(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
}

async fn serve(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
    let service = service_fn(|request| async { Ok::<_, Infallible>(answer(request).await) });
    let builder = auto::Builder::new(TokioExecutor::new());
    let _ = builder.serve_connection(TokioIo::new(io), service).await;
}

async fn answer(request: Request<Incoming>) -> Response<Body> {
    let full = |text: String| {
        let body = Full::new(Bytes::from(text));
        Response::new(body.map_err(|never| match never {}).boxed())
    };
    match request.uri().path() {
        "/echo" => {
            let trailer = request.headers().get("trailer").cloned();
            let mut response = Response::new(request.into_body().boxed());
            if let Some(trailer) = trailer {
                response.headers_mut().insert("trailer", trailer);
            }
            response
        }
        "/length" => match request.into_body().collect().await {
            Ok(body) => full(body.to_bytes().len().to_string()),
            Err(_) => full("broken".to_owned()),
        },
        _ => {
            let version = match request.version() {
                Version::HTTP_2 => "HTTP/2",
                _ => "HTTP/1",
            };
            let mut text = format!("{} {} {version}\n", request.method(), request.uri());
            for (name, value) in request.headers() {
                text.push_str(&format!("{name}: {}\n", value.to_str().unwrap()));
            }
            full(text)
        }
    }
}
