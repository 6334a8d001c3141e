//! A web server whose every answer is the test's own, and clients with tracked connections.

use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::client::legacy::{self, Builder, Error, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use otel_conntrack::{Conntrack, RequestBody};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::{StreamExt, wrappers::UnboundedReceiverStream};
use tower::{Layer, ServiceExt, util::BoxCloneService};

/// A body of the server's.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Listens for HTTP/1 and HTTP/2.
pub struct Web {
    pub address: SocketAddr,
    calls: mpsc::UnboundedReceiver<Call>,
    leave: watch::Sender<bool>,
}

/// A request that waits for its answer. Dropped, its connection breaks.
pub struct Call {
    pub request: Request<Incoming>,
    answer: oneshot::Sender<Response<Body>>,
}

impl Web {
    pub async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, calls) = mpsc::unbounded_channel();
        let (leave, left) = watch::channel(false);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // Small frames wait for no acknowledgement.
                stream.set_nodelay(true).unwrap();
                let (sender, mut left) = (sender.clone(), left.clone());
                let service = service_fn(move |request| {
                    let (answer, answered) = oneshot::channel();
                    let _ = sender.send(Call { request, answer });
                    answered
                });
                tokio::spawn(async move {
                    let http = auto::Builder::new(TokioExecutor::new());
                    let io = TokioIo::new(stream);
                    let mut connection = std::pin::pin!(http.serve_connection(io, service));
                    tokio::select! {
                        _ = &mut connection => {}
                        () = async { drop(left.wait_for(|left| *left).await) } => {
                            connection.as_mut().graceful_shutdown();
                            let _ = connection.await;
                        }
                    }
                });
            }
        });
        Self {
            address,
            calls,
            leave,
        }
    }

    /// One that answers every request like this.
    pub async fn answering(answer: fn(&Request<Incoming>) -> Response<Body>) -> SocketAddr {
        let mut web = Self::new().await;
        let address = web.address;
        tokio::spawn(async move {
            loop {
                let call = web.call().await;
                let response = answer(&call.request);
                call.answer(response);
            }
        });
        address
    }

    /// The next request.
    pub async fn call(&mut self) -> Call {
        self.calls.recv().await.expect("the server is still there")
    }

    /// Ends every connection as soon as no request runs on it.
    pub fn leave(&self) {
        self.leave.send_replace(true);
    }
}

impl Call {
    pub fn answer(self, response: Response<Body>) {
        // A client that is gone needs none.
        let _ = self.answer.send(response);
    }
}

/// 204, which has no body.
pub fn nothing() -> Response<Body> {
    Response::builder()
        .status(204)
        .body(Empty::new().boxed_unsync())
        .unwrap()
}

/// A body of known length.
pub fn text(text: &'static str) -> Response<Body> {
    Response::new(Full::new(Bytes::from(text)).boxed_unsync())
}

/// A body that comes from here, and ends when the sender is dropped.
pub fn stream() -> (mpsc::UnboundedSender<&'static str>, Response<Body>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let frames = UnboundedReceiverStream::new(receiver)
        .map(|text: &'static str| Ok(Frame::data(Bytes::from(text))));
    (
        sender,
        Response::new(StreamBody::new(frames).boxed_unsync()),
    )
}

/// A client under a request layer.
pub type Client = BoxCloneService<Request<Full<Bytes>>, Response<RequestBody<Incoming>>, Error>;

/// A client for each way to have its connections tracked: around hyper-util's connector, and with
/// the dialer as connector. Their names are `connector` and `dialer`.
pub fn clients(conntrack: &Conntrack, builder: &Builder) -> [(&'static str, Client); 2] {
    let around = conntrack
        .connector("connector")
        .wrap(HttpConnector::new())
        .unwrap();
    let dialer = conntrack.dialer("dialer").build().unwrap();
    let (over_around, over_dialer) = (around.request_layer(), dialer.request_layer());
    [
        (
            "connector",
            over_around.layer(builder.build(around)).boxed_clone(),
        ),
        (
            "dialer",
            over_dialer.layer(builder.build(dialer)).boxed_clone(),
        ),
    ]
}

/// hyper-util's client, with its defaults.
pub fn builder() -> Builder {
    legacy::Client::builder(TokioExecutor::new())
}

/// A GET for this server.
pub fn get(address: SocketAddr) -> Request<Full<Bytes>> {
    Request::get(format!("http://{address}/"))
        .body(Full::default())
        .unwrap()
}
