//! How many positions fit into a slice of time.

use std::time::Duration;

/// Steps of fewer positions say little: what reading the weights takes is most of it.
const TELLING_POSITIONS: usize = 8;
/// Positions of a first step whose time nobody knows.
const GUESS: usize = 32;

/// What a position takes, from the steps so far.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// `None` before the first telling step.
    position_us: Option<f64>,
}

impl Pace {
    /// A step of so many positions took so long.
    pub(crate) fn note(&mut self, positions: usize, time: Duration) {
        if positions < TELLING_POSITIONS {
            return;
        }
        let new = time.as_secs_f64() * 1e6 / positions as f64;
        // A slower step counts at once, a faster one by and by: a slice is kept to, whatever else the machine does.
        self.position_us = Some(match self.position_us {
            Some(old) if new < old => 0.7 * old + 0.3 * new,
            _ => new,
        });
    }

    /// Positions, all told, of a step that is to take a slice: enough to learn from at least.
    pub(crate) fn positions(&self, slice: Duration) -> usize {
        let fitting = self
            .position_us
            .map(|position_us| (slice.as_secs_f64() * 1e6 / position_us) as usize);
        fitting.unwrap_or(GUESS).max(TELLING_POSITIONS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_kept_to() {
        let slice = Duration::from_millis(100);
        let mut pace = Pace::default();
        assert_eq!(pace.positions(slice), GUESS);
        pace.note(50, Duration::from_millis(50));
        assert_eq!(pace.positions(slice), 100);
        pace.note(100, Duration::from_millis(400));
        assert_eq!(pace.positions(slice), 25, "slower at once");
        pace.note(25, Duration::from_millis(25));
        let next = pace.positions(slice);
        assert!(25 < next && next < 100, "faster by and by: {next}");
        pace.note(10, Duration::from_secs(9));
        assert_eq!(pace.positions(slice), TELLING_POSITIONS);
    }
}
