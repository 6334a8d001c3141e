//! [`Held`]: a response's body that holds something until it has ended, and [`held_body`], which makes a
//! public type of one.

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

/// A public body whose guard is nobody else's business.
macro_rules! held_body {
    ($(#[$meta:meta])* $name:ident holds $guard:ty) => {
        pin_project_lite::pin_project! {
            $(#[$meta])*
            pub struct $name<B> {
                #[pin]
                held: $crate::exchange::held::Held<B, $guard>,
            }
        }

        impl<B: http_body::Body> http_body::Body for $name<B> {
            type Data = B::Data;
            type Error = B::Error;

            fn poll_frame(
                self: std::pin::Pin<&mut Self>,
                cx: &mut std::task::Context<'_>,
            ) -> std::task::Poll<Option<Result<http_body::Frame<B::Data>, B::Error>>> {
                self.project().held.poll_frame(cx)
            }

            fn is_end_stream(&self) -> bool {
                self.held.is_end_stream()
            }

            fn size_hint(&self) -> http_body::SizeHint {
                self.held.size_hint()
            }
        }

        impl<B: Default> Default for $name<B> {
            fn default() -> Self {
                Self {
                    held: $crate::exchange::held::Held::default(),
                }
            }
        }

        impl<B: std::fmt::Debug> std::fmt::Debug for $name<B> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($name))
                    .field("body", &self.held.body)
                    .finish_non_exhaustive()
            }
        }
    };
}

pub(crate) use held_body;
