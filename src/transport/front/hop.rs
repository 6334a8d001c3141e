//! One request of possibly several: cookies, the transport, and what the response says of its
//! connection.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response};
use tower_service::Service;

use crate::exchange::caller::Caller;
use crate::transport::body::ResponseBody;
use crate::transport::front::error::Failure;
use crate::transport::{RequestHooks, Transport};

/// Sends each request of a chain for the same caller: the one that called `send()`, whatever is
/// current when a later one begins.
#[derive(Clone)]
pub(super) struct Hop {
    pub(super) transport: Transport,
    #[cfg(feature = "reqwest-transport-cookies")]
    pub(super) cookies: Option<Arc<dyn reqwest::cookie::CookieStore>>,
    pub(super) caller: Arc<Caller>,
    /// The caller is a telemetry exporter.
    pub(super) unseen: bool,
    pub(super) hooks: Option<RequestHooks>,
}

impl Service<Request<reqwest::Body>> for Hop {
    type Response = Response<ResponseBody>;
    type Error = Failure;
    type Future = Pin<Box<dyn Future<Output = Result<Response<ResponseBody>, Failure>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<reqwest::Body>) -> Self::Future {
        if let Some(hooks) = &self.hooks {
            request.extensions_mut().insert(hooks.clone());
        }
        #[cfg(feature = "reqwest-transport-cookies")]
        let cookies = cookies::add(self.cookies.as_ref(), &mut request);
        let caller = self.caller.clone();
        let sent = self.transport.send_for(caller, self.unseen, request);
        Box::pin(async move {
            let mut response = sent.await?;
            #[cfg(feature = "reqwest-transport-cookies")]
            if let Some(cookies) = cookies {
                cookies.keep(response.headers());
            }
            let record = response.body().connection().clone();
            let ends = record.0.http_info().cloned();
            let extensions = response.extensions_mut();
            if let Some(ends) = ends {
                extensions.insert(ends);
            }
            extensions.insert(record);
            Ok(response)
        })
    }
}

#[cfg(feature = "reqwest-transport-cookies")]
mod cookies {
    //! What the store has for a request goes with it, what its response sets goes into the store.

    use super::*;
    use http::HeaderMap;
    use http::header::{COOKIE, SET_COOKIE};
    use reqwest::Url;
    use reqwest::cookie::CookieStore;

    pub(super) struct Cookies {
        store: Arc<dyn CookieStore>,
        url: Url,
    }

    /// A request's own `Cookie` stays.
    pub(super) fn add(
        store: Option<&Arc<dyn CookieStore>>,
        request: &mut Request<reqwest::Body>,
    ) -> Option<Cookies> {
        let store = store?.clone();
        let url = Url::parse(&request.uri().to_string()).ok()?;
        let headers = request.headers_mut();
        if !headers.contains_key(COOKIE)
            && let Some(cookies) = store.cookies(&url)
        {
            headers.insert(COOKIE, cookies);
        }
        Some(Cookies { store, url })
    }

    impl Cookies {
        pub(super) fn keep(&self, headers: &HeaderMap) {
            let mut set = headers.get_all(SET_COOKIE).iter().peekable();
            if set.peek().is_some() {
                self.store.set_cookies(&mut set, &self.url);
            }
        }
    }
}
