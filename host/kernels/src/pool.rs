//! Work on the pool's threads that has many short parallel parts.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rayon::Yield;

/// The other threads are waited for this long at most: on a machine that is shared they may not get to run.
const START_MAX: Duration = Duration::from_micros(100);
/// A thread that finds nothing to do for so long goes to sleep after all: longer than any task of a product takes.
const IDLE_MAX: Duration = Duration::from_millis(10);

/// Runs `work` on a thread of the pool, the others staying awake until it is over.
///
/// From outside, each parallel part would wait to be taken up. From inside, a thread that finds nothing between two parts is
/// asleep within some ten microseconds, and waking it takes as long again: with hundreds of parts in a token that was a
/// tenth of a step. Awake, they give way to whoever else wants to run after every look around.
pub fn on_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let watch = Watch::default();
    rayon::scope(|scope| {
        let others = rayon::current_num_threads() - 1;
        for _ in 0..others {
            scope.spawn(|_| watch.stay_awake());
        }
        watch.wait_for(others);
        let _over = Over(&watch.over);
        work()
    })
}

/// Who is awake for a piece of work.
#[derive(Default)]
struct Watch {
    awake: AtomicUsize,
    /// Nobody may begin any more: within another job a thread that stayed awake would keep that job from its end.
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
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
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

    #[test]
    fn several_at_once_do_not_wait_for_each_other() {
        let all: Vec<_> = (0..4)
            .map(|_| {
                thread::spawn(|| {
                    (0..200)
                        .map(|_| on_pool(|| (0..1000).into_par_iter().sum::<u64>()))
                        .sum::<u64>()
                })
            })
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
