//! The page at an address of its own, on a thread of its own: it answers also while the application's
//! runtime is stuck, and takes nothing of its threads. Its connections are not tracked.

use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use axum::body::Body;
use tokio::sync::oneshot;

use crate::config::ConfigError;
use crate::inspect::Inspector;
use crate::inspect::config::Inspect;
use crate::record::Recorder;
use crate::serving::{self, Bounds};

/// A page that is open has a connection, and its browser may have some more.
const BOUNDS: Bounds = Bounds::new(64);
/// Threads that make pages.
const MAKERS: usize = 2;

/// Serving; ends when dropped, and then the address is free.
pub(crate) struct Serving {
    address: SocketAddr,
    stop: Option<oneshot::Sender<Infallible>>,
    thread: Option<JoinHandle<()>>,
}

impl Serving {
    pub(crate) fn start(
        recorder: &Recorder,
        inspect: &Inspect,
    ) -> Result<Option<Self>, ConfigError> {
        let Some(listener) = inspect.bind()? else {
            return Ok(None);
        };
        let address = inspect.address.as_deref().unwrap_or_default();
        let refused = |error: std::io::Error| {
            ConfigError::new("inspect", address, "its thread could not be started")
                .with_source(error)
        };
        let bound = listener.local_addr().map_err(refused)?;
        listener.set_nonblocking(true).map_err(refused)?;
        let inspector = Inspector::new(recorder, inspect)?;
        let (stop, stopped) = oneshot::channel::<Infallible>();
        let (begun, begins) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("conntrack-inspect".into())
            // A runtime must not end within another, whatever goes wrong here: it lives on its thread.
            .spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .max_blocking_threads(MAKERS)
                    .thread_name("conntrack-inspect")
                    .build();
                let runtime = match runtime {
                    Ok(runtime) => {
                        let _ = begun.send(Ok(()));
                        runtime
                    }
                    Err(error) => {
                        let _ = begun.send(Err(error));
                        return;
                    }
                };
                runtime.block_on(async {
                    tokio::select! {
                        _ = stopped => {}
                        () = accept(listener, inspector) => {}
                    }
                });
                // Pages that are being made are nobody's by now.
                runtime.shutdown_background();
            })
            .map_err(refused)?;
        let ended = || std::io::Error::other("it ended at once");
        begins
            .recv()
            .unwrap_or_else(|_| Err(ended()))
            .map_err(refused)?;
        Ok(Some(Self {
            address: bound,
            stop: Some(stop),
            thread: Some(thread),
        }))
    }

    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.stop.take());
        // It ends at its next await. Dropped on the thread itself, it can't be waited for.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

async fn accept(listener: TcpListener, inspector: Arc<Inspector>) {
    // In the runtime, which it was bound outside of.
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else {
        return;
    };
    let answer = move |request: http::Request<hyper::body::Incoming>| {
        inspector.clone().answer(request.map(Body::new))
    };
    serving::serve(listener, BOUNDS, answer, std::future::pending()).await;
}
