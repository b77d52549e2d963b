//! Work on the pool's threads that has many short parallel parts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rayon::Yield;

/// The other threads are waited for this long at most: on a machine that is shared they may not get to run.
const START_MAX: Duration = Duration::from_micros(100);
/// A thread that finds nothing to do for so long goes to sleep after all; few tasks take as long.
const IDLE_MAX: Duration = Duration::from_millis(10);

/// Runs `work` on a thread of the pool, while the others stay awake for its parallel parts.
///
/// From outside, each part would wait to be taken up. From inside, a thread that finds nothing between two parts is asleep within
/// some ten microseconds and takes as long to wake: while sequences decoded, the second of two threads was off its core for an
/// eighth of the time. Awake, they give way to whoever else wants to run after every look around.
/// Meant for one caller at a time, as the engine is: others that come meanwhile may get no thread but their own.
pub fn on_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| {
        let watch = Arc::new(Watch::default());
        let _over = Over(&watch);
        let others = rayon::current_num_threads() - 1;
        for _ in 0..others {
            let watch = Arc::clone(&watch);
            // Nobody waits for its end: when the work is over it may not be its turn to run for a while.
            rayon::spawn(move || watch.stay_awake());
        }
        watch.wait_for(others);
        work()
    })
}

/// Who is awake for a piece of work.
#[derive(Default)]
struct Watch {
    awake: AtomicUsize,
    /// Nobody may begin any more: within another job's wait a thread that stayed awake would keep that job from its end.
    begun: AtomicBool,
    over: AtomicBool,
}

impl Watch {
    fn wait_for(&self, others: usize) {
        let started = Instant::now();
        while self.awake.load(Ordering::Acquire) < others && started.elapsed() < START_MAX {
            std::hint::spin_loop();
        }
        self.begun.store(true, Ordering::Release);
    }

    fn stay_awake(&self) {
        if self.begun.load(Ordering::Acquire) {
            return;
        }
        self.awake.fetch_add(1, Ordering::AcqRel);
        let mut last = Instant::now();
        while !self.over.load(Ordering::Acquire) && last.elapsed() < IDLE_MAX {
            match rayon::yield_now() {
                Some(Yield::Executed) => last = Instant::now(),
                _ => thread::yield_now(),
            }
        }
    }
}

/// Says that the work is over, however it ends.
struct Over<'a>(&'a Watch);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use rayon::prelude::*;

    use super::*;

    #[test]
    fn parts_with_pauses_between_them_are_all_done() {
        for pause in [
            Duration::ZERO,
            Duration::from_micros(50),
            IDLE_MAX + IDLE_MAX / 2,
        ] {
            let sums: Vec<u64> = on_pool(|| {
                let part = |part: u64| {
                    thread::sleep(pause);
                    (0..100).into_par_iter().map(|index| index * part).sum()
                };
                (0..20).map(part).collect()
            });
            assert!(sums.iter().zip(0..).all(|(sum, part)| *sum == 4950 * part));
        }
    }

    /// Whoever began within a job's wait would keep that job, and the work, for `IDLE_MAX`.
    #[test]
    fn nobody_is_held_up_by_one_that_stays_awake() {
        const TIMES: u32 = 40;
        let rounds = (0..5).map(|_| {
            let began = Instant::now();
            for _ in 0..TIMES {
                on_pool(|| {
                    (0..64).into_par_iter().with_max_len(1).for_each(|_| {
                        rayon::join(thread::yield_now, thread::yield_now);
                    });
                });
            }
            began.elapsed()
        });
        let least = rounds.min().unwrap();
        assert!(least < TIMES * IDLE_MAX / 2, "{least:?}");
    }

    #[test]
    fn a_thread_stays_awake_until_the_work_is_over_and_no_longer() {
        let watch = Arc::new(Watch::default());
        let staying = thread::spawn({
            let watch = Arc::clone(&watch);
            move || watch.stay_awake()
        });
        let started = Instant::now();
        while watch.awake.load(Ordering::Acquire) == 0 {
            assert!(started.elapsed() < Duration::from_secs(10), "never began");
        }
        drop(Over(&watch));
        staying.join().unwrap();
        watch.wait_for(0);
        watch.stay_awake();
        assert_eq!(watch.awake.load(Ordering::Acquire), 1, "too late to begin");
    }

    #[test]
    fn several_at_once_all_end() {
        let sum = || (0..1000).into_par_iter().sum::<u64>();
        let all: Vec<_> = (0..4)
            .map(|_| thread::spawn(move || (0..200).map(|_| on_pool(sum)).sum::<u64>()))
            .collect();
        assert!(
            all.into_iter()
                .all(|one| one.join().unwrap() == 200 * 499_500)
        );
    }

    #[test]
    fn a_panic_comes_out_and_leaves_the_pool_as_it_was() {
        let ended = catch_unwind(AssertUnwindSafe(|| on_pool(|| panic!("on purpose"))));
        assert!(ended.is_err());
        assert_eq!(on_pool(|| 1), 1);
    }
}
