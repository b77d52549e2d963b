//! So often in a time and no more: a bucket that fills steadily.

use std::time::{Duration, Instant};

/// What is left to take of something. It begins full and never holds more than it may.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowance {
    left: f64,
    filled: Instant,
}

impl Default for Allowance {
    fn default() -> Self {
        Self {
            left: f64::INFINITY,
            filled: Instant::now(),
        }
    }
}

impl Allowance {
    /// Takes one of `most` that come back within `period`.
    ///
    /// # Errors
    /// None is left; how long until one is.
    pub(super) fn take(
        &mut self,
        most: u32,
        period: Duration,
        now: Instant,
    ) -> Result<(), Duration> {
        let (most, per_second) = (f64::from(most), f64::from(most) / period.as_secs_f64());
        let passed = now.saturating_duration_since(self.filled);
        let left = (self.left + passed.as_secs_f64() * per_second).min(most);
        let enough = left >= 1.0;
        *self = Self {
            left: if enough { left - 1.0 } else { left },
            filled: self.filled.max(now),
        };
        if enough {
            return Ok(());
        }
        Err(Duration::from_secs_f64((1.0 - left) / per_second))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_comes_back_steadily() {
        let (mut allowance, start) = (Allowance::default(), Instant::now());
        let mut at = |seconds| {
            let now = start + Duration::from_secs(seconds);
            allowance.take(6, Duration::from_secs(60), now)
        };
        let after = |seconds| Err(Duration::from_secs(seconds));
        for _ in 0..6 {
            assert_eq!(at(0), Ok(()));
        }
        assert_eq!(at(0), after(10), "one every ten seconds");
        assert_eq!(at(4), after(6));
        assert_eq!(at(10), Ok(()));
        assert_eq!(at(10), after(10));
        assert_eq!(
            at(5),
            after(10),
            "a clock that seems to go back gives nothing"
        );
        for _ in 0..6 {
            assert_eq!(at(3600), Ok(()));
        }
        assert_eq!(at(3600), after(10), "an hour fills no more than a minute");
    }
}
