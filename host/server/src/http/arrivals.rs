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
    /// Bytes of all bodies on their way that one key's holder sends.
    own: Option<Arc<AtomicU64>>,
    bytes: u64,
    _place: Option<Permit>,
}

impl Arrivals {
    /// Another one comes; `own` counts those of whoever sends it, if that is known.
    pub fn begin(self: &Arc<Self>, own: Option<Arc<AtomicU64>>) -> Arriving {
        Arriving {
            all: Arc::clone(self),
            own,
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
    /// Notes that more of it is here; whether there is room for that among `bytes_max` of all, of which one key has half at most.
    pub fn grow(&mut self, bytes: u64, bytes_max: u64) -> bool {
        self.bytes += bytes;
        let fits = |counted: &AtomicU64, bytes_max: u64| {
            counted.fetch_add(bytes, SeqCst).saturating_add(bytes) <= bytes_max
        };
        let own = self.own.as_deref();
        let own_fits = own.is_none_or(|own| fits(own, bytes_max / 2));
        fits(&self.all.bytes, bytes_max) && own_fits
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        self.all.bytes.fetch_sub(self.bytes, SeqCst);
        if let Some(own) = &self.own {
            own.fetch_sub(self.bytes, SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_are_counted_over_all_bodies_and_given_back() {
        let arrivals = Arc::new(Arrivals::default());
        let (mut first, mut second) = (arrivals.begin(None), arrivals.begin(None));
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
        assert!(arrivals.begin(None).grow(100, 100));
    }

    #[test]
    fn one_key_has_half_at_most() {
        let arrivals = Arc::new(Arrivals::default());
        let own = || Some(Arc::default());
        let alice: Option<Arc<AtomicU64>> = own();
        let (mut first, mut second) = (arrivals.begin(alice.clone()), arrivals.begin(alice));
        assert!(first.grow(30, 100) && second.grow(20, 100));
        assert!(!second.grow(1, 100));
        assert!(arrivals.begin(own()).grow(49, 100), "another one has room");
        drop((first, second));
        assert!(arrivals.begin(None).grow(100, 100), "all is given back");
    }
}
