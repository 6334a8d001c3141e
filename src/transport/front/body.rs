//! The response's body with the front's two times.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use reqwest::Url;
use tokio::time::{Instant, Sleep};

use crate::transport::body::BoxError;
use crate::transport::front::error::{FrontError, FrontErrorKind};

/// The time for a whole request, from `send()` to the end of the response's body.
pub(super) struct Deadline {
    timeout: Duration,
    sleep: Pin<Box<Sleep>>,
}

impl Deadline {
    /// It begins now.
    pub(super) fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            sleep: Box::pin(tokio::time::sleep(timeout)),
        }
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<FrontErrorKind> {
        let timeout = self.timeout;
        let passed = self.sleep.as_mut().poll(cx);
        passed.map(|()| FrontErrorKind::Timeout { timeout })
    }
}

/// The time in which something has to come.
pub(super) struct ReadTimeout {
    timeout: Duration,
    /// Made when something was waited for first.
    sleep: Option<Pin<Box<Sleep>>>,
    waits: bool,
}

impl ReadTimeout {
    pub(super) const fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            sleep: None,
            waits: false,
        }
    }

    /// Nothing is there: the time begins, or goes on.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<FrontErrorKind> {
        let timeout = self.timeout;
        let sleep = match &mut self.sleep {
            Some(sleep) => sleep,
            None => {
                self.waits = true;
                self.sleep.insert(Box::pin(tokio::time::sleep(timeout)))
            }
        };
        if !self.waits {
            self.waits = true;
            let now = Instant::now();
            // What is too long for the clock is no limit at all.
            let Some(until) = now.checked_add(timeout) else {
                return Poll::Pending;
            };
            sleep.as_mut().reset(until);
        }
        let passed = sleep.as_mut().poll(cx);
        passed.map(|()| FrontErrorKind::ReadTimeout { timeout })
    }

    /// Something came.
    const fn came(&mut self) {
        self.waits = false;
    }
}

pin_project! {
    /// A response's body that fails when its time is over. What fails or ends lets go of its
    /// connection, also if the response is kept.
    pub(super) struct Timed<B> {
        #[pin]
        body: Option<B>,
        url: Url,
        deadline: Option<Deadline>,
        read: Option<ReadTimeout>,
    }
}

impl<B> Timed<B> {
    pub(super) fn new(
        body: B,
        url: Url,
        deadline: Option<Deadline>,
        read_timeout: Option<Duration>,
    ) -> Self {
        Self {
            body: Some(body),
            url,
            deadline,
            read: read_timeout.map(ReadTimeout::new),
        }
    }
}

impl<B> Body for Timed<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut this = self.project();
        let Some(body) = this.body.as_mut().as_pin_mut() else {
            return Poll::Ready(None);
        };
        // The deadline comes first: a body that always has something would outrun it. What may take
        // long is only the wait for more, so that a caller may take its time between two reads.
        let expired = match this.deadline.as_mut().map(|deadline| deadline.poll(cx)) {
            Some(Poll::Ready(kind)) => kind,
            _ => match body.poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    if let Some(read) = this.read {
                        read.came();
                    }
                    return Poll::Ready(Some(Ok(frame)));
                }
                Poll::Ready(over) => {
                    this.body.set(None);
                    return Poll::Ready(over.map(|result| result.map_err(Into::into)));
                }
                Poll::Pending => match this.read.as_mut().map(|read| read.poll(cx)) {
                    Some(Poll::Ready(kind)) => kind,
                    _ => return Poll::Pending,
                },
            },
        };
        this.body.set(None);
        let error = FrontError::new(expired, this.url.clone());
        Poll::Ready(Some(Err(error.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.body {
            Some(body) => body.size_hint(),
            None => SizeHint::with_exact(0),
        }
    }
}
