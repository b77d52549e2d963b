//! Bodies on their way: a request has no place among those in flight before its body is whole, so that
//! clients who write slowly take none from others.
//!
//! What they may take meanwhile is memory, and there is so much of it for all of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::gate::{Gate, Permit};

/// Counts the bodies on their way, and the bytes of them that are here.
#[derive(Debug, Default)]
pub struct Arrivals {
    gate: Arc<Gate>,
    bytes: AtomicU64,
}

/// A body on its way, or one that is whole and waits for a place.
#[derive(Debug)]
pub struct Arriving {
    all: Arc<Arrivals>,
    bytes: u64,
    _place: Option<Permit>,
}

impl Arrivals {
    /// Another one comes.
    pub fn begin(self: &Arc<Self>) -> Arriving {
        Arriving {
            all: Arc::clone(self),
            bytes: 0,
            _place: self.gate.enter(usize::MAX),
        }
    }

    /// Resolves when none is on its way.
    pub async fn none(&self) {
        self.gate.empty().await;
    }
}

impl Arriving {
    /// Notes that more of it is here; whether there is room for that among `bytes_max` of all.
    pub fn grow(&mut self, bytes: u64, bytes_max: u64) -> bool {
        self.bytes += bytes;
        let before = self.all.bytes.fetch_add(bytes, SeqCst);
        before.saturating_add(bytes) <= bytes_max
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        self.all.bytes.fetch_sub(self.bytes, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_are_counted_over_all_bodies_and_given_back() {
        let arrivals = Arc::new(Arrivals::default());
        let (mut first, mut second) = (arrivals.begin(), arrivals.begin());
        assert!(first.grow(60, 100) && second.grow(40, 100));
        assert!(!second.grow(1, 100));
        drop(second);
        assert!(first.grow(40, 100));
        let waiting = tokio::spawn({
            let arrivals = Arc::clone(&arrivals);
            async move { arrivals.none().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(first);
        waiting.await.expect("no panic");
        assert!(arrivals.begin().grow(100, 100));
    }
}
