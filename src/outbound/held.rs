//! [`Held`]: a response's body that holds something until it has ended.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

pin_project! {
    /// A body and a guard. The guard is dropped when the body has ended, failed, or is dropped.
    pub(crate) struct Held<B, G> {
        #[pin]
        pub(crate) body: B,
        guard: Option<G>,
    }
}

impl<B: Body, G> Held<B, G> {
    /// A response without content ends with its head; nobody polls such a body.
    pub(crate) fn new(body: B, guard: Option<G>) -> Self {
        let guard = guard.filter(|_| !body.is_end_stream());
        Self { body, guard }
    }
}

impl<B: Body, G> Body for Held<B, G> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut this = self.project();
        let frame = ready!(this.body.as_mut().poll_frame(cx));
        // The pool has an HTTP/1 connection back when the body is at its end, which a reader who
        // knows the length may never ask for.
        if !matches!(frame, Some(Ok(_))) || this.body.is_end_stream() {
            *this.guard = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B: Default, G> Default for Held<B, G> {
    fn default() -> Self {
        Self {
            body: B::default(),
            guard: None,
        }
    }
}
