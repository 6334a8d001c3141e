//! Clocks: what is done now and then, whether or not anything happens.
//!
//! Each job has a thread of its own, so that it works without any async runtime, and so that no job
//! waits for another: a job may come to foreign code, such as a span processor, which takes as long as it
//! likes. The thread sleeps most of the time, and it ends when its clock is dropped.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Something to do now and then.
pub(crate) struct Job {
    pause: Duration,
    jitter: bool,
    run: Box<dyn FnMut() + Send>,
}

impl Job {
    /// So long after it was done, it is done again; for the first time so long after the start.
    pub(crate) fn new(pause: Duration, run: impl FnMut() + Send + 'static) -> Self {
        Self {
            pause,
            jitter: false,
            run: Box::new(run),
        }
    }

    /// Each pause is anything from half of it to one and a half, at random: what else is done now and
    /// then is not always met at the same time.
    #[cfg_attr(not(feature = "otel"), allow(dead_code))]
    pub(crate) const fn with_jitter(mut self) -> Self {
        self.jitter = true;
        self
    }

    /// The next pause.
    fn pause(&self) -> Duration {
        if !self.jitter {
            return self.pause;
        }
        // The standard library's hash keys are the random source that is there anyway.
        let random = RandomState::new().build_hasher().finish() as u32;
        self.pause
            .mul_f64(0.5 + f64::from(random) / f64::from(u32::MAX))
    }
}

/// Stops when dropped, which waits for nobody: a job that is being done is done to its end.
#[derive(Debug)]
pub(crate) struct Clock {
    _stop: Sender<()>,
}

impl Clock {
    /// Starts a thread of this name, of which the system shows 15 letters.
    pub(crate) fn start(name: &str, job: Job) -> std::io::Result<Self> {
        let (stop, stopped) = channel();
        std::thread::Builder::new()
            .name(name.into())
            .spawn(move || run(job, &stopped))?;
        Ok(Self { _stop: stop })
    }
}

fn run(mut job: Job, stopped: &Receiver<()>) {
    while stopped.recv_timeout(job.pause()) == Err(RecvTimeoutError::Timeout) {
        (job.run)();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::TryRecvError;
    use std::time::Instant;

    #[test]
    fn a_job_is_done_again_and_again_until_its_clock_is_dropped() {
        let (tell, told) = channel();
        let job = Job::new(Duration::from_millis(20), move || {
            let _ = tell.send(Instant::now());
        });
        let began = Instant::now();
        let clock = Clock::start("clock", job.with_jitter()).unwrap();
        let first = told.recv().unwrap();
        assert!(first.duration_since(began) >= Duration::from_millis(10));
        let second = told.recv().unwrap();
        assert!(second.duration_since(first) >= Duration::from_millis(10));
        drop(clock);
        // The job goes with it.
        while told.recv().is_ok() {}
        assert_eq!(told.try_recv(), Err(TryRecvError::Disconnected));
    }

    #[test]
    fn a_job_that_blocks_is_waited_for_by_nobody() {
        let (begin, began) = channel();
        let (release, released) = channel::<()>();
        let blocks = Job::new(Duration::from_millis(1), move || {
            let _ = begin.send(());
            let _ = released.recv();
        });
        let (tell, told) = channel();
        let works = Job::new(Duration::from_millis(1), move || {
            let _ = tell.send(());
        });
        let blocked = Clock::start("blocks", blocks).unwrap();
        began.recv().unwrap();
        let _works = Clock::start("works", works).unwrap();
        for _ in 0..3 {
            told.recv().unwrap();
        }
        drop(blocked);
        // Let go, it ends.
        drop(release);
        while began.recv().is_ok() {}
    }

    #[test]
    fn a_pause_with_jitter_is_its_length_give_or_take_a_half() {
        let job = Job::new(Duration::from_secs(10), || {});
        assert_eq!(job.pause(), Duration::from_secs(10));
        let job = job.with_jitter();
        let pauses: Vec<_> = (0..1_000).map(|_| job.pause()).collect();
        let (least, most) = (pauses.iter().min().unwrap(), pauses.iter().max().unwrap());
        assert!(*least >= Duration::from_secs(5) && *least < Duration::from_secs(7));
        assert!(*most <= Duration::from_secs(15) && *most > Duration::from_secs(13));
    }
}
