//! The limit as a tower layer: over `http::Request` and over `reqwest::Request`.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http_body::Body;
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::error::{InFlightError, InFlightLimitError};
use super::key::UrlRef;
use super::shell::{Begun, Place, Waiting};
use super::{Admission, InFlightLimit};
use crate::exchange::held::{Held, held_body};

impl<S> Layer<S> for InFlightLimit {
    type Service = InFlightService<S>;

    fn layer(&self, inner: S) -> InFlightService<S> {
        InFlightService {
            inner,
            limit: self.clone(),
        }
    }
}

/// A client under an [`InFlightLimit`]: a tower `Service` of the requests that the client takes,
/// `http::Request` or `reqwest::Request`.
///
/// A request that finds no place free waits in the call's future, not in `poll_ready`: only its URL
/// says which queue it belongs in. While it waits it keeps nothing that `poll_ready` reserved in what is
/// inside, such as a permit of tower's `ConcurrencyLimit`: that would starve requests to other hosts. It
/// makes a clone ready once it has its place.
#[derive(Clone, Debug)]
pub struct InFlightService<S> {
    inner: S,
    limit: InFlightLimit,
}

impl<S> InFlightService<S> {
    /// The client inside.
    pub const fn get_ref(&self) -> &S {
        &self.inner
    }

    fn begin<Q>(&mut self, admission: Admission, request: Q) -> InFlightFuture<S, Q>
    where
        S: Service<Q> + Clone,
    {
        let state = match admission {
            Some(Begun::Waits(waiting)) => {
                // What is ready may hold a permit that others need, so it goes. A clone of it reserves
                // nothing, neither the one that stays here.
                let service = self.inner.clone();
                self.inner = service.clone();
                State::Waits {
                    waiting,
                    then: Some((service, request)),
                }
            }
            Some(Begun::Refused(error)) => State::Refused { error: Some(error) },
            Some(Begun::Goes(place)) => State::Runs {
                inner: self.inner.call(request),
                place: Some(place),
            },
            None => State::Runs {
                inner: self.inner.call(request),
                place: None,
            },
        };
        InFlightFuture { state }
    }
}

impl<S, B, R> Service<http::Request<B>> for InFlightService<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>> + Clone,
    R: Body,
{
    type Response = http::Response<InFlightBody<R>>;
    type Error = InFlightError<S::Error>;
    type Future = InFlightFuture<S, http::Request<B>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(InFlightError::Inner)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let admission = self.limit.enter(UrlRef::Http(request.uri()));
        self.begin(admission, request)
    }
}

#[cfg(feature = "reqwest")]
impl<S> Service<reqwest::Request> for InFlightService<S>
where
    S: Service<reqwest::Request, Response = reqwest::Response> + Clone,
{
    type Response = reqwest::Response;
    type Error = InFlightError<S::Error>;
    type Future = InFlightFuture<S, reqwest::Request>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(InFlightError::Inner)
    }

    fn call(&mut self, request: reqwest::Request) -> Self::Future {
        let admission = self.limit.enter(UrlRef::Reqwest(request.url()));
        self.begin(admission, request)
    }
}

pin_project! {
    /// The response of an [`InFlightService`].
    ///
    /// Cancel-safe: dropped while it waits, the request leaves the queue; dropped later, it gives its
    /// place back.
    #[must_use = "futures do nothing unless polled"]
    pub struct InFlightFuture<S, Q>
    where
        S: Service<Q>,
    {
        #[pin]
        state: State<S, Q>,
    }
}

pin_project! {
    #[project = Projected]
    enum State<S, Q>
    where
        S: Service<Q>,
    {
        Waits {
            waiting: Waiting,
            then: Option<(S, Q)>,
        },
        Readies {
            then: Option<(S, Q)>,
            place: Option<Place>,
        },
        // The place is given back after the request is given up, so it is declared after it.
        Runs {
            #[pin]
            inner: S::Future,
            place: Option<Place>,
        },
        Refused {
            error: Option<InFlightLimitError>,
        },
    }
}

type Answer<S, Q> =
    Result<(<S as Service<Q>>::Response, Option<Place>), InFlightError<<S as Service<Q>>::Error>>;

impl<S: Service<Q>, Q> InFlightFuture<S, Q> {
    /// The response's head, and the place that its body holds.
    fn poll_head(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answer<S, Q>> {
        let mut state = self.project().state;
        loop {
            let next = match state.as_mut().project() {
                Projected::Waits { waiting, then } => {
                    let place = ready!(Pin::new(waiting).poll(cx))?;
                    State::Readies {
                        then: then.take(),
                        place: Some(place),
                    }
                }
                Projected::Readies { then, place } => {
                    let Some((service, _)) = then else {
                        return Poll::Pending;
                    };
                    let ready = ready!(service.poll_ready(cx));
                    let (then, place) = (then.take(), place.take());
                    if let Err(error) = ready {
                        // The request first, then its place.
                        drop(then);
                        drop(place);
                        return Poll::Ready(Err(InFlightError::Inner(error)));
                    }
                    let Some((mut service, request)) = then else {
                        return Poll::Pending;
                    };
                    State::Runs {
                        inner: service.call(request),
                        place,
                    }
                }
                Projected::Runs { inner, place } => {
                    let answer = ready!(inner.poll(cx));
                    let place = place.take();
                    return Poll::Ready(match answer {
                        Ok(response) => Ok((response, place)),
                        Err(error) => Err(InFlightError::Inner(error)),
                    });
                }
                Projected::Refused { error } => {
                    return match error.take() {
                        Some(error) => Poll::Ready(Err(error.into())),
                        None => Poll::Pending,
                    };
                }
            };
            state.set(next);
        }
    }
}

impl<S, B, R> Future for InFlightFuture<S, http::Request<B>>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    R: Body,
{
    type Output = Result<http::Response<InFlightBody<R>>, InFlightError<S::Error>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_head(cx).map_ok(|(response, place)| {
            response.map(|body| InFlightBody {
                held: Held::new(body, place),
            })
        })
    }
}

#[cfg(feature = "reqwest")]
impl<S> Future for InFlightFuture<S, reqwest::Request>
where
    S: Service<reqwest::Request, Response = reqwest::Response>,
{
    type Output = Result<reqwest::Response, InFlightError<S::Error>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_head(cx)
            .map_ok(|(response, place)| super::hold_place(response, place))
    }
}

impl<S: Service<Q>, Q> fmt::Debug for InFlightFuture<S, Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waits = matches!(self.state, State::Waits { .. });
        f.debug_struct("InFlightFuture")
            .field("waits", &waits)
            .finish_non_exhaustive()
    }
}

held_body! {
    /// A response's body. Its request gives its place back when the body has ended, failed, or was
    /// dropped.
    InFlightBody holds Place
}
