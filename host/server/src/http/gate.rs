//! How many requests are in flight: decided at once, never waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use tokio::sync::Notify;

/// Counts the requests in flight.
#[derive(Debug, Default)]
pub struct Gate {
    inside: AtomicUsize,
    left: Notify,
    closed: AtomicBool,
}

/// A place among the requests in flight, given back when dropped. Clones share one place.
#[derive(Debug, Clone)]
pub struct Permit {
    _place: Arc<Place>,
    /// A second place, behind another gate.
    _also: Option<Arc<Place>>,
}

impl Permit {
    /// This place and that of another gate, given back together.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self {
            _also: Some(other._place),
            ..self
        }
    }
}

#[derive(Debug)]
struct Place(Arc<Gate>);

impl Gate {
    /// A place, unless `places_max` are taken.
    pub fn enter(self: &Arc<Self>, places_max: usize) -> Option<Permit> {
        let entered = self.inside.fetch_update(SeqCst, SeqCst, |inside| {
            (inside < places_max).then_some(inside + 1)
        });
        entered.ok().map(|_| Permit {
            _place: Arc::new(Place(Arc::clone(self))),
            _also: None,
        })
    }

    /// Whether nobody would get one of `places_max` places now.
    pub fn is_full(&self, places_max: usize) -> bool {
        self.inside.load(SeqCst) >= places_max
    }

    /// Nobody is to be let in any more: the server is stopping.
    pub fn close(&self) {
        self.closed.store(true, SeqCst);
    }

    /// Whether the server is stopping.
    pub fn is_closed(&self) -> bool {
        self.closed.load(SeqCst)
    }

    /// Resolves when nobody is inside.
    pub async fn empty(&self) {
        loop {
            let left = self.left.notified();
            if self.inside.load(SeqCst) == 0 {
                return;
            }
            left.await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.0.inside.fetch_sub(1, SeqCst) == 1 {
            self.0.left.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn places_are_limited_shared_by_clones_and_given_back() {
        let gate = Arc::new(Gate::default());
        let first = gate.enter(2).expect("room for two");
        let second = gate.enter(2).expect("room for two");
        assert!(gate.enter(2).is_none());
        let clone = first.clone();
        drop(first);
        assert!(gate.enter(2).is_none(), "the clone still holds the place");
        drop(clone);
        assert!(gate.enter(2).is_some());
        let waiting = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { gate.empty().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(second);
        waiting.await.expect("no panic");
    }
}
