//! How many prompt positions fit into a slice of time beside sequences that decode.

use std::time::Duration;

/// Prompt positions of a step that tell what one takes; fewer drown in what reading the weights takes.
const TELLING_POSITIONS: usize = 8;
/// Prompt positions that run beside others whatever they take: a prompt has to get on, and most of what a step takes, it takes
/// for the first position.
const LEAST_POSITIONS: usize = 8;
/// Prompt positions of a first step whose time nobody knows.
const GUESS: usize = 16;
/// Part of a slice that is planned for: with all of it every other step would be longer than that, for a step takes up to a sixth more
/// than those before it. A prompt takes a thirtieth longer for it where decoding takes a fifth of a slice: 1 + 0.2 / 0.85 for 1 + 0.2.
const PLANNED: f64 = 0.85;

/// What steps take, from those so far: so much for those that decode, and so much more for each prompt position beside them.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Microseconds of a step in which nothing but decoding ran, without drafts; 0 before the first.
    base_us: f64,
    /// `None` before the first telling step.
    position_us: Option<f64>,
}

impl Pace {
    /// A step took so long, in which so many sequences decoded and so many prompt positions ran.
    pub(crate) fn note(&mut self, decoding: usize, positions: usize, time: Duration) {
        let us = time.as_secs_f64() * 1e6;
        if positions == 0 {
            self.base_us = us;
            return;
        }
        if positions < TELLING_POSITIONS {
            return;
        }
        let base_us = if decoding > 0 {
            self.base_us.min(us)
        } else {
            0.0
        };
        let new = (us - base_us) / positions as f64;
        // A slower step counts at once, a faster one by and by: a slice is kept to, whatever else the machine does.
        self.position_us = Some(match self.position_us {
            Some(old) if new < old => 0.7 * old + 0.3 * new,
            _ => new,
        });
    }

    /// A step took so long, in which so many sequences decoded with so many draft tokens in all. A draft's row is taken for a prompt
    /// position; whatever it takes, the step without drafts takes no longer, and no less than its share of the rows.
    pub(crate) fn note_drafts(&mut self, decoding: usize, drafted: usize, time: Duration) {
        let us = time.as_secs_f64() * 1e6;
        let least_us = us * decoding as f64 / (decoding + drafted).max(1) as f64;
        let base_us = self.position_us.map_or(self.base_us, |position_us| {
            us - drafted as f64 * position_us
        });
        self.base_us = base_us.clamp(least_us, us);
    }

    /// Prompt positions that add a slice to a step at most.
    pub(crate) fn positions(&self, slice: Duration) -> usize {
        let slice_us = PLANNED * slice.as_secs_f64() * 1e6;
        let fitting = self.position_us.map_or(GUESS, |position_us| {
            (slice_us / position_us.max(1e-3)) as usize
        });
        fitting.max(LEAST_POSITIONS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// 102 ms of it are planned for.
    const SLICE: Duration = ms(120);

    #[test]
    fn a_slice_is_what_prompts_add_at_most() {
        let mut pace = Pace::default();
        assert_eq!(pace.positions(SLICE), GUESS);
        pace.note(0, 50, ms(50));
        assert_eq!(pace.positions(SLICE), 102);
        pace.note(0, 100, ms(400));
        assert_eq!(pace.positions(SLICE), 25, "slower at once");
        pace.note(0, 25, ms(25));
        let next = pace.positions(SLICE);
        assert!(25 < next && next < 102, "faster by and by: {next}");
        pace.note(0, 10, Duration::from_secs(9));
        assert_eq!(pace.positions(SLICE), LEAST_POSITIONS);
    }

    #[test]
    fn what_decoding_takes_is_not_the_prompts() {
        let mut pace = Pace::default();
        pace.note(7, 0, ms(300));
        pace.note(7, 10, ms(310));
        assert_eq!(pace.positions(SLICE), 102);
        pace.note(7, 1, ms(900));
        assert_eq!(pace.positions(SLICE), 102, "too few to tell");
    }

    #[test]
    fn what_decoding_takes_is_seen_behind_drafts() {
        let mut pace = Pace::default();
        pace.note(1, 0, ms(100));
        pace.note(1, 10, ms(200));
        // The sequence has grown; 3 drafts at 10 ms are its own.
        pace.note_drafts(1, 3, ms(430));
        pace.note(1, 10, ms(500));
        assert_eq!(pace.positions(SLICE), 10);
    }

    #[test]
    fn a_step_with_drafts_has_bounds_for_one_without() {
        let check = |base_ms: u64, drafts_ms: u64, want_ms: u64| {
            let mut pace = Pace::default();
            pace.note(1, 0, ms(base_ms));
            pace.note_drafts(1, 3, ms(drafts_ms));
            pace.note(1, 10, ms(want_ms + 100));
            assert_eq!(pace.positions(SLICE), 10, "{base_ms} {drafts_ms}");
        };
        check(100, 300, 100);
        check(100, 800, 200);
        check(400, 300, 300);
    }
}
