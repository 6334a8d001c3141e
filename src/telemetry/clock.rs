//! The clock: what is done now and then, whether or not anything happens.
//!
//! A thread of its own for all of it, so that it works without any async runtime. It sleeps most of
//! the time, and it ends when the last `Conntrack` is dropped. Without anything to do there is none.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// Something to do now and then; each time is short.
pub(crate) struct Job {
    pause: Duration,
    jitter: bool,
    run: Box<dyn FnMut() + Send>,
}

impl Job {
    /// So long after it was done, it is done again.
    pub(crate) fn new(pause: Duration, run: impl FnMut() + Send + 'static) -> Self {
        Self {
            pause,
            jitter: false,
            run: Box::new(run),
        }
    }

    /// Each pause is anything from half of it to one and a half, at random: what else is done now and
    /// then is not always met at the same time.
    pub(crate) const fn with_jitter(mut self) -> Self {
        self.jitter = true;
        self
    }

    fn next(&self, now: Instant) -> Instant {
        let pause = if self.jitter {
            // The standard library's hash keys are the random source that is there anyway.
            let random = RandomState::new().build_hasher().finish() as u32;
            self.pause
                .mul_f64(0.5 + f64::from(random) / f64::from(u32::MAX))
        } else {
            self.pause
        };
        now + pause
    }
}

/// Stops when dropped.
pub(crate) struct Clock {
    _stop: Sender<()>,
}

impl Clock {
    /// Starts it, if there is anything to do.
    pub(crate) fn start(jobs: Vec<Job>) -> std::io::Result<Option<Self>> {
        if jobs.is_empty() {
            return Ok(None);
        }
        let (stop, stopped) = channel();
        std::thread::Builder::new()
            .name("conntrack-clock".into())
            .spawn(move || run(jobs, &stopped))?;
        Ok(Some(Self { _stop: stop }))
    }
}

fn run(jobs: Vec<Job>, stopped: &Receiver<()>) {
    let now = Instant::now();
    let mut jobs: Vec<_> = jobs.into_iter().map(|job| (job.next(now), job)).collect();
    while let Some(first) = jobs.iter().map(|(at, _)| *at).min() {
        let left = first.saturating_duration_since(Instant::now());
        if stopped.recv_timeout(left) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        let now = Instant::now();
        for (at, job) in jobs.iter_mut().filter(|(at, _)| *at <= now) {
            (job.run)();
            // From its end on: one that takes long leaves time for others all the same.
            *at = job.next(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::TryRecvError;

    fn tell(sender: Sender<Instant>) -> impl FnMut() + Send {
        move || {
            let _ = sender.send(Instant::now());
        }
    }

    #[test]
    fn each_job_is_done_again_and_again_until_the_clock_is_dropped() {
        let (fast, fasts) = channel();
        let (slow, slows) = channel();
        let began = Instant::now();
        let clock = Clock::start(vec![
            Job::new(Duration::from_millis(1), tell(fast)),
            Job::new(Duration::from_millis(20), tell(slow)).with_jitter(),
        ]);
        let clock = clock.unwrap().unwrap();
        let first = slows.recv().unwrap();
        assert!(first.duration_since(began) >= Duration::from_millis(10));
        let second = slows.recv().unwrap();
        assert!(second.duration_since(first) >= Duration::from_millis(10));
        assert!(fasts.recv().is_ok());
        drop(clock);
        // The jobs go with it.
        for times in [fasts, slows] {
            while times.recv().is_ok() {}
            assert_eq!(times.try_recv(), Err(TryRecvError::Disconnected));
        }
    }

    #[test]
    fn nothing_to_do_needs_no_clock() {
        assert!(Clock::start(Vec::new()).unwrap().is_none());
    }

    #[test]
    fn a_pause_with_jitter_is_its_length_give_or_take_a_half() {
        let job = Job::new(Duration::from_secs(10), || {}).with_jitter();
        let now = Instant::now();
        let pauses: Vec<_> = (0..1_000).map(|_| job.next(now) - now).collect();
        let (least, most) = (pauses.iter().min().unwrap(), pauses.iter().max().unwrap());
        assert!(*least >= Duration::from_secs(5) && *least < Duration::from_secs(7));
        assert!(*most <= Duration::from_secs(15) && *most > Duration::from_secs(13));
    }
}
