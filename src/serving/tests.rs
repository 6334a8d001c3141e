//! Clients of all kinds, over real sockets. Whatever is waited for is an event: an answer, an end.

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{Either, Full};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::*;

/// Nothing here takes so long.
const SOON: Duration = Duration::from_secs(30);
/// Times out in the course of a test.
const BRIEF: Duration = Duration::from_millis(100);
const GET: &str = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";

type Frames = mpsc::UnboundedReceiver<Bytes>;

/// A body that comes as it is sent; its drop is told.
struct Streamed {
    frames: Frames,
    _gone: Option<oneshot::Sender<Infallible>>,
}

impl Body for Streamed {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let next = ready!(self.frames.poll_recv(cx));
        Poll::Ready(next.map(|bytes| Ok(Frame::data(bytes))))
    }
}

struct Server {
    address: SocketAddr,
    /// The next answer; without one it is `ok`.
    answers: mpsc::UnboundedSender<Streamed>,
    stop: oneshot::Sender<Infallible>,
    task: JoinHandle<()>,
}

impl Server {
    async fn start(bounds: Bounds) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (answers, next) = mpsc::unbounded_channel();
        let next = Arc::new(std::sync::Mutex::new(next));
        let answer = move |_| {
            let body = match next.lock().unwrap().try_recv() {
                Ok(streamed) => Either::Left(streamed),
                Err(_) => Either::Right(Full::new(Bytes::from_static(b"ok"))),
            };
            std::future::ready(Response::new(body))
        };
        let (stop, stopped) = oneshot::channel::<Infallible>();
        let stopped = async {
            let _ = stopped.await;
        };
        let task = tokio::spawn(serve(listener, bounds, answer, stopped));
        Self {
            address,
            answers,
            stop,
            task,
        }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// The next answer is what is sent here, and ends with the sender.
    fn stream(&self) -> (mpsc::UnboundedSender<Bytes>, oneshot::Receiver<Infallible>) {
        let (sender, frames) = mpsc::unbounded_channel();
        let (_gone, gone) = oneshot::channel();
        let streamed = Streamed {
            frames,
            _gone: Some(_gone),
        };
        self.answers.send(streamed).ok().unwrap();
        (sender, gone)
    }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, what).await.expect("it hangs")
}

/// Reads until this is there.
async fn until(stream: &mut TcpStream, end: &str) -> String {
    let mut text = String::new();
    soon(async {
        while !text.contains(end) {
            let byte = stream.read_u8().await;
            text.push(
                byte.unwrap_or_else(|error| panic!("{error} after {text:?}"))
                    .into(),
            );
        }
    })
    .await;
    text
}

/// A request and its answer, on a connection that stays.
async fn ask(stream: &mut TcpStream) -> String {
    stream.write_all(GET.as_bytes()).await.unwrap();
    until(stream, "\r\n\r\nok").await
}

/// Waits until the other end has closed.
async fn ends(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    // A reset is an end too.
    let _ = soon(stream.read_to_end(&mut rest)).await;
}

#[tokio::test]
async fn silent_clients_hold_up_nobody() {
    let server = Server::start(Bounds::new(4)).await;
    let mut silent = Vec::new();
    for _ in 0..4 {
        let mut one = server.connect().await;
        ask(&mut one).await;
        silent.push(one);
    }
    let begun = Instant::now();
    let mut new = server.connect().await;
    ask(&mut new).await;
    // Who was silent for longest went, and nobody else.
    ends(&mut silent[0]).await;
    for other in &mut silent[1..] {
        ask(other).await;
    }
    // More than there are places, who never say anything, or half of a head.
    let mut mute = Vec::new();
    for _ in 0..4 {
        mute.push(server.connect().await);
        let mut half = server.connect().await;
        half.write_all(b"GET / HT").await.unwrap();
        mute.push(half);
    }
    ask(&mut server.connect().await).await;
    for gone in silent.iter_mut().chain([&mut new]) {
        ends(gone).await;
    }
    // Less than anything that they are allowed.
    assert!(begun.elapsed() < Duration::from_secs(5));
}

/// More at once than there are places, and all of them mean it.
#[tokio::test]
async fn a_crowd_is_answered_to_the_last() {
    let server = Server::start(Bounds::new(2)).await;
    let mut crowd = Vec::new();
    for _ in 0..20 {
        crowd.push(server.connect().await);
    }
    for one in &mut crowd {
        ask(one).await;
    }
}

#[tokio::test]
async fn who_is_served_is_not_cut_for_who_comes() {
    let server = Server::start(Bounds::new(1)).await;
    let (frames, _gone) = server.stream();
    let mut first = server.connect().await;
    first.write_all(GET.as_bytes()).await.unwrap();
    until(&mut first, "\r\n\r\n").await;
    let mut second = server.connect().await;
    second.write_all(GET.as_bytes()).await.unwrap();
    frames.send(Bytes::from_static(b"all of it")).unwrap();
    until(&mut first, "all of it").await;
    drop(frames);
    // Its answer's last bytes, and then it makes room.
    until(&mut first, "0\r\n\r\n").await;
    ends(&mut first).await;
    until(&mut second, "ok").await;
}

#[tokio::test]
async fn a_head_that_does_not_end_and_a_silence_that_is_too_long_end_the_connection() {
    let bounds = Bounds::new(8);
    let server = Server::start(Bounds {
        head: BRIEF,
        ..bounds
    })
    .await;
    let mut nothing = server.connect().await;
    ends(&mut nothing).await;
    let mut half = server.connect().await;
    half.write_all(b"GET / HTTP/1.1\r\nHo").await.unwrap();
    ends(&mut half).await;
    // Between requests a client may be silent for longer than that.
    let server = Server::start(Bounds {
        silence: BRIEF,
        ..bounds
    })
    .await;
    let mut silent = server.connect().await;
    ask(&mut silent).await;
    ends(&mut silent).await;
}

#[tokio::test]
async fn a_head_that_is_too_long_is_refused() {
    let server = Server::start(Bounds::new(8)).await;
    let mut long = server.connect().await;
    // It may be refused before all of it is sent.
    let head = format!(
        "{}Cookie: {}",
        &GET[..GET.len() - 2],
        "x".repeat(8 * LONGEST_HEAD)
    );
    let _ = soon(long.write_all(head.as_bytes())).await;
    let begun = Instant::now();
    ends(&mut long).await;
    // Not for the time that it took.
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_reader_that_does_not_read_is_not_waited_for() {
    let server = Server::start(Bounds {
        stall: BRIEF,
        ..Bounds::new(8)
    })
    .await;
    let (frames, gone) = server.stream();
    frames.send(Bytes::from(vec![0; 64 << 20])).unwrap();
    let mut stream = server.connect().await;
    stream.write_all(GET.as_bytes()).await.unwrap();
    soon(gone).await.unwrap_err();
    drop(frames);
}

#[tokio::test]
async fn an_old_connection_finishes_what_it_does_within_a_bound() {
    let old = Bounds {
        life: Some(Duration::ZERO),
        ..Bounds::new(8)
    };
    let server = Server::start(old).await;
    // An answer that is made at once is the last one.
    let mut at_once = server.connect().await;
    assert!(ask(&mut at_once).await.contains("connection: close"));
    ends(&mut at_once).await;
    // One that takes its time gets there.
    let (frames, _gone) = server.stream();
    let mut slow = server.connect().await;
    slow.write_all(GET.as_bytes()).await.unwrap();
    until(&mut slow, "\r\n\r\n").await;
    for part in ["one", "two", "three"] {
        frames.send(Bytes::from_static(part.as_bytes())).unwrap();
        until(&mut slow, part).await;
    }
    drop(frames);
    until(&mut slow, "0\r\n\r\n").await;
    ends(&mut slow).await;
    // One that takes for ever does not.
    let server = Server::start(Bounds {
        grace: BRIEF,
        ..old
    })
    .await;
    let (_frames, gone) = server.stream();
    let mut endless = server.connect().await;
    endless.write_all(GET.as_bytes()).await.unwrap();
    soon(gone).await.unwrap_err();
    ends(&mut endless).await;
}

#[tokio::test]
async fn at_the_end_requests_are_finished_and_nobody_else_is_waited_for() {
    let server = Server::start(Bounds {
        closing: SOON * 2,
        ..Bounds::new(8)
    })
    .await;
    let mut new = server.connect().await;
    let mut silent = server.connect().await;
    ask(&mut silent).await;
    let (frames, _gone) = server.stream();
    let mut busy = server.connect().await;
    busy.write_all(GET.as_bytes()).await.unwrap();
    until(&mut busy, "\r\n\r\n").await;
    drop(server.stop);
    ends(&mut new).await;
    ends(&mut silent).await;
    frames.send(Bytes::from_static(b"the rest")).unwrap();
    drop(frames);
    until(&mut busy, "the rest").await;
    ends(&mut busy).await;
    soon(server.task).await.unwrap();
    assert!(TcpStream::connect(server.address).await.is_err());
}

#[tokio::test]
async fn the_end_is_not_waited_for_beyond_its_bound() {
    let server = Server::start(Bounds {
        closing: BRIEF,
        ..Bounds::new(8)
    })
    .await;
    let (_frames, gone) = server.stream();
    let mut busy = server.connect().await;
    busy.write_all(GET.as_bytes()).await.unwrap();
    until(&mut busy, "\r\n\r\n").await;
    drop(server.stop);
    soon(server.task).await.unwrap();
    soon(gone).await.unwrap_err();
    ends(&mut busy).await;
}
