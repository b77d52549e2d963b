//! A page about the server itself, made so often in a second and no more, whoever asks.
//!
//! Such pages take no place among the requests in flight, for a server that is full has to be looked at most of all. So what they cost
//! is bounded here: who asks once the second's share is spent is given what was made last, and shares its bytes.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::allowance::Allowance;

/// What is made last, and how often it may be made anew.
#[derive(Debug, Default)]
pub(super) struct Page(Mutex<Made>);

#[derive(Debug, Default)]
struct Made {
    allowance: Allowance,
    /// Empty before the first.
    last: Bytes,
}

impl Page {
    /// What `make` says now, or said when it was asked last if that was `per_s_max` times in a second. One at a time is made; whoever
    /// else asks waits for it.
    pub(super) fn get(&self, per_s_max: u32, make: impl FnOnce() -> String) -> Bytes {
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let second = Duration::from_secs(1);
        let anew = made.allowance.take(per_s_max, second, Instant::now());
        if anew.is_ok() || made.last.is_empty() {
            made.last = make().into();
        }
        made.last.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_too_often_shares_what_was_made_last() {
        let (page, began) = (Page::default(), Instant::now());
        let mut made = 0;
        let mut get = || {
            page.get(2, || {
                made += 1;
                made.to_string()
            })
        };
        assert_eq!(get(), "1");
        assert_eq!(get(), "2", "always anew at first");
        let last = (0..1000).map(|_| get()).last().expect("a thousand");
        // However slow this machine is.
        let at_most = 2 + 2 * (began.elapsed().as_secs() + 1);
        let last: u64 = std::str::from_utf8(&last).unwrap().parse().unwrap();
        assert!((2..=at_most).contains(&last), "{last} of {at_most}");
    }
}
