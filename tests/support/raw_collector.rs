//! A collector that keeps what is on the wire: paths, headers and bodies as they came, nothing decoded.
//!
//! It speaks HTTP/1 and HTTP/2 on one port and answers every request with success, so that both OTLP transports can send
//! to it. A request is kept before it is answered: who has the answer to an export finds its request here.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "compiled into every test that includes it, and each uses a part"
)]

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::thread;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// Stops when it is dropped.
pub struct RawCollector {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<RawRequest>>>,
    running: Option<(oneshot::Sender<Infallible>, thread::JoinHandle<()>)>,
}

/// One request as it came.
#[derive(Clone)]
pub struct RawRequest {
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl fmt::Debug for RawRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawRequest")
            .field("path", &self.path)
            .field("headers", &self.headers)
            .field("body", &format_args!("{} bytes", self.body.len()))
            .finish()
    }
}

impl RawRequest {
    /// All values of a header, in order.
    pub fn values(&self, name: &str) -> Vec<&str> {
        let values = self.headers.get_all(name).into_iter();
        values.map(|value| value.to_str().unwrap()).collect()
    }

    /// It is about spans, else about metrics.
    pub fn is_traces(&self) -> bool {
        self.path.ends_with("/v1/traces") || self.path.ends_with("TraceService/Export")
    }
}

impl RawCollector {
    pub fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::<Mutex<Vec<RawRequest>>>::default();
        let (stop, stopped) = oneshot::channel();
        let kept = requests.clone();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                tokio::spawn(serve(TcpListener::from_std(listener).unwrap(), kept));
                // An error means that the sender is gone: the sign to end.
                let _ = stopped.await;
            });
        });
        Self {
            address,
            requests,
            running: Some((stop, thread)),
        }
    }

    /// `http://127.0.0.1:port`, for both transports.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn requests(&self) -> Vec<RawRequest> {
        self.requests.lock().unwrap().clone()
    }

    /// The requests about spans, and those about metrics; fails if one kind did not come.
    pub fn both(&self) -> [Vec<RawRequest>; 2] {
        let (traces, metrics): (Vec<_>, Vec<_>) =
            self.requests().into_iter().partition(RawRequest::is_traces);
        assert!(!traces.is_empty(), "no spans came");
        assert!(!metrics.is_empty(), "no metrics came");
        [traces, metrics]
    }
}

impl Drop for RawCollector {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

async fn serve(listener: TcpListener, requests: Arc<Mutex<Vec<RawRequest>>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let requests = requests.clone();
        tokio::spawn(async move {
            let answer = service_fn(move |request| answer(request, requests.clone()));
            // How an exporter's connection ends is its own business.
            let _ = auto::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), answer)
                .await;
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    requests: Arc<Mutex<Vec<RawRequest>>>,
) -> Result<Response<impl hyper::body::Body<Data = Bytes, Error = Infallible>>, hyper::Error> {
    let grpc = request.version() == Version::HTTP_2;
    let (head, body) = request.into_parts();
    let request = RawRequest {
        path: head.uri.path().to_owned(),
        headers: head.headers,
        body: body.collect().await?.to_bytes(),
    };
    requests.lock().unwrap().push(request);
    // An empty message is a whole answer in OTLP; gRPC puts five bytes in front of it and a status behind it.
    let (content, kind): (&[u8], _) = if grpc {
        (&[0; 5], "application/grpc")
    } else {
        (&[], "application/x-protobuf")
    };
    let trailers = grpc.then(|| {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        Ok(trailers)
    });
    let body = Full::new(Bytes::from_static(content)).with_trailers(async move { trailers });
    let mut response = Response::new(body);
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    Ok(response)
}
