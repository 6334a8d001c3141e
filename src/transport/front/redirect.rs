//! Which redirects are followed: reqwest's policies, which can be made here but not there, and what
//! a request that follows one may carry.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{
    AUTHORIZATION, COOKIE, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHORIZATION, REFERER,
    WWW_AUTHENTICATE,
};
use http::{Request, StatusCode};
use reqwest::Url;
use tower_http::follow_redirect::policy as tower;

use crate::transport::body::BoxError;
use crate::transport::front::builder::Settings;
use crate::transport::front::error::{Failure, FrontError, FrontErrorKind};

/// Which redirects are followed. The counterpart of [`reqwest::redirect::Policy`], which only reqwest
/// itself can ask.
///
/// The default follows 10. A `301`, `302` or `303` turns a POST into a GET without a body; a `307`
/// or `308` sends the body again, if it is bytes; one that streams can't be had again, so its
/// response is the answer, as is one without a `Location` that can be followed.
#[derive(Clone)]
pub struct RedirectPolicy(Kind);

#[derive(Clone)]
enum Kind {
    None,
    Limited(usize),
    Custom(Arc<Custom>),
}

type Custom = dyn Fn(RedirectAttempt<'_>) -> RedirectAction + Send + Sync;

impl RedirectPolicy {
    /// Follows so many redirects of a request; one more is the error
    /// [`TooManyRedirects`](FrontErrorKind::TooManyRedirects).
    pub const fn limited(max: usize) -> Self {
        Self(Kind::Limited(max))
    }

    /// Follows none: the response that redirects is the answer.
    pub const fn none() -> Self {
        Self(Kind::None)
    }

    /// Asks a function. It has to see to loops itself: how many URLs were asked is in
    /// [`RedirectAttempt::previous`].
    ///
    /// ```
    /// use otel_conntrack::RedirectPolicy;
    ///
    /// // Not to other hosts.
    /// let policy = RedirectPolicy::custom(|attempt| {
    ///     let from = attempt.previous().last().and_then(|url| url.host_str());
    ///     if attempt.url().host_str() == from {
    ///         RedirectPolicy::default().redirect(attempt)
    ///     } else {
    ///         attempt.stop()
    ///     }
    /// });
    /// ```
    pub fn custom<F>(policy: F) -> Self
    where
        F: Fn(RedirectAttempt<'_>) -> RedirectAction + Send + Sync + 'static,
    {
        Self(Kind::Custom(Arc::new(policy)))
    }

    /// What this policy says of a redirect: for policies that are made of others.
    pub fn redirect(&self, attempt: RedirectAttempt<'_>) -> RedirectAction {
        match &self.0 {
            Kind::None => attempt.stop(),
            // The first URL is the caller's own.
            Kind::Limited(max) if attempt.previous.len() > *max => {
                RedirectAction(Action::TooMany(*max))
            }
            Kind::Limited(_) => attempt.follow(),
            Kind::Custom(policy) => policy(attempt),
        }
    }
}

impl Default for RedirectPolicy {
    fn default() -> Self {
        Self::limited(10)
    }
}

impl fmt::Debug for RedirectPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::None => f.write_str("RedirectPolicy::none()"),
            Kind::Limited(max) => write!(f, "RedirectPolicy::limited({max})"),
            Kind::Custom(_) => f.write_str("RedirectPolicy::custom(..)"),
        }
    }
}

/// A redirect that may be followed.
#[derive(Debug)]
pub struct RedirectAttempt<'a> {
    status: StatusCode,
    next: &'a Url,
    previous: &'a [Url],
}

impl RedirectAttempt<'_> {
    /// The status of the response that redirects.
    pub const fn status(&self) -> StatusCode {
        self.status
    }

    /// Where to.
    pub const fn url(&self) -> &Url {
        self.next
    }

    /// The URLs that were asked, the caller's own first.
    pub const fn previous(&self) -> &[Url] {
        self.previous
    }

    /// Follow it.
    pub const fn follow(self) -> RedirectAction {
        RedirectAction(Action::Follow)
    }

    /// Don't: the response that redirects is the answer.
    pub const fn stop(self) -> RedirectAction {
        RedirectAction(Action::Stop)
    }

    /// Fail the request with this error, as the source of a
    /// [`FrontErrorKind::Redirect`].
    pub fn error(
        self,
        error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> RedirectAction {
        RedirectAction(Action::Fail(error.into()))
    }
}

/// What is done about a redirect.
#[derive(Debug)]
pub struct RedirectAction(Action);

#[derive(Debug)]
enum Action {
    Follow,
    Stop,
    TooMany(usize),
    Fail(BoxError),
}

/// One request on its way through redirects.
#[derive(Clone)]
pub(super) struct Follow {
    settings: Arc<Settings>,
    /// The body, where it can be sent again.
    again: Option<Bytes>,
    previous: Vec<Url>,
    /// It was once sent to another origin.
    left: bool,
}

impl Follow {
    pub(super) const fn new(settings: Arc<Settings>, again: Option<Bytes>) -> Self {
        Self {
            settings,
            again,
            previous: Vec::new(),
            left: false,
        }
    }
}

impl tower::Policy<reqwest::Body, Failure> for Follow {
    fn redirect(&mut self, attempt: &tower::Attempt<'_>) -> Result<tower::Action, Failure> {
        let url = |uri: &http::Uri| Url::parse(&uri.to_string()).ok();
        let (Some(previous), Some(next)) = (url(attempt.previous()), url(attempt.location()))
        else {
            // Both were URLs before they became URIs; if not, there is nothing to follow.
            return Ok(tower::Action::Stop);
        };
        self.previous.push(previous.clone());
        let asked = self.settings.redirect.redirect(RedirectAttempt {
            status: attempt.status(),
            next: &next,
            previous: &self.previous,
        });
        match asked.0 {
            Action::Follow => self.settings.check_url(&next)?,
            Action::Stop => return Ok(tower::Action::Stop),
            Action::TooMany(max) => {
                let kind = FrontErrorKind::TooManyRedirects { max };
                return Err(FrontError::new(kind, previous).into());
            }
            Action::Fail(source) => {
                let error = FrontError::new(FrontErrorKind::Redirect, previous);
                return Err(error.with_source(source).into());
            }
        }
        Ok(tower::Action::Follow)
    }

    fn on_request(&mut self, request: &mut Request<reqwest::Body>) {
        let Some(previous) = self.previous.last() else {
            return;
        };
        let next = Url::parse(&request.uri().to_string()).ok();
        let next = next.as_ref();
        // Each request begins with the headers of the first.
        self.left |= next.is_none_or(|next| next.origin() != previous.origin());
        let headers = request.headers_mut();
        if self.left {
            strip(headers);
        }
        if self.settings.referer
            && let Some(referer) = next.and_then(|next| referer(previous, next))
        {
            headers.insert(REFERER, referer);
        }
    }

    fn clone_body(&self, _: &reqwest::Body) -> Option<reqwest::Body> {
        self.again.clone().map(Into::into)
    }
}

/// What is for the first origin alone.
fn strip(headers: &mut HeaderMap) {
    const COOKIE2: HeaderName = HeaderName::from_static("cookie2");
    for secret in [
        AUTHORIZATION,
        COOKIE,
        COOKIE2,
        PROXY_AUTHORIZATION,
        WWW_AUTHENTICATE,
    ] {
        headers.remove(secret);
    }
}

/// Not from `https` to `http`; and without user and fragment.
fn referer(previous: &Url, next: &Url) -> Option<HeaderValue> {
    if next.scheme() == "http" && previous.scheme() == "https" {
        return None;
    }
    let mut referer = previous.clone();
    let _ = referer.set_username("");
    let _ = referer.set_password(None);
    referer.set_fragment(None);
    HeaderValue::from_str(referer.as_str()).ok()
}
