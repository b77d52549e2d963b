//! The native eviction algorithms. Each is a rank: the entry of the smallest goes first.
//!
//! Sources: SIEVE, Zhang et al., NSDI 2024; GreedyDual-Size-Frequency, Cherkasova, HPL-98-69R1.

use std::collections::{BTreeMap, HashMap};

use super::strategy::Algorithm;

/// What the ranks are made of; ticks count the calls that change an order.
#[derive(Debug, Clone)]
struct Place {
    rank: (u64, u64),
    inserted_tick: u64,
    used_tick: u64,
    hits: u64,
    /// Microseconds saved per byte held.
    worth: f64,
    /// GDSF's age of the cache when this entry was last used.
    age: f64,
    /// SIEVE's mark: hit since the hand came by.
    visited: bool,
}

/// In which order entries go.
#[derive(Debug, Default)]
pub(super) struct Order {
    algorithm: Algorithm,
    tick: u64,
    /// GDSF: the rank of the last victim, so that old entries lose to new ones in the end.
    age: f64,
    /// SIEVE: the rank at which the search goes on.
    hand: (u64, u64),
    places: HashMap<u64, Place>,
    queue: BTreeMap<(u64, u64), u64>,
}

impl Order {
    /// Another algorithm over the same entries, with what is known of their past.
    pub(super) fn switch(&mut self, algorithm: Algorithm) {
        self.algorithm = algorithm;
        self.hand = (0, 0);
        self.queue.clear();
        for (id, place) in &mut self.places {
            place.rank = rank(algorithm, place);
            self.queue.insert(place.rank, *id);
        }
    }

    pub(super) fn insert(&mut self, id: u64, bytes: u64, cost_us: u64) {
        self.tick += 1;
        let mut place = Place {
            rank: (0, 0),
            inserted_tick: self.tick,
            used_tick: self.tick,
            hits: 1,
            worth: cost_us.max(1) as f64 / bytes.max(1) as f64,
            age: self.age,
            visited: false,
        };
        place.rank = rank(self.algorithm, &place);
        self.queue.insert(place.rank, id);
        self.places.insert(id, place);
    }

    pub(super) fn hit(&mut self, id: u64) {
        self.tick += 1;
        let Some(place) = self.places.get_mut(&id) else {
            return;
        };
        place.used_tick = self.tick;
        place.hits += 1;
        place.age = self.age;
        place.visited = true;
        let rank = rank(self.algorithm, place);
        if rank != place.rank {
            self.queue.remove(&place.rank);
            self.queue.insert(rank, id);
            place.rank = rank;
        }
    }

    pub(super) fn remove(&mut self, id: u64) {
        if let Some(place) = self.places.remove(&id) {
            self.queue.remove(&place.rank);
        }
    }

    /// The entry to go next. The caller removes it.
    pub(super) fn victim(&mut self) -> Option<u64> {
        let (rank, id) = match self.algorithm {
            Algorithm::Sieve => self.sieve()?,
            _ => self
                .queue
                .first_key_value()
                .map(|(rank, id)| (*rank, *id))?,
        };
        if self.algorithm == Algorithm::Gdsf {
            self.age = self.age.max(f64::from_bits(rank.0));
        }
        Some(id)
    }

    /// From the hand towards the newest, then from the oldest: the first entry not hit since the
    /// hand came by. Every entry passed loses its mark, so the second round ends.
    fn sieve(&mut self) -> Option<((u64, u64), u64)> {
        loop {
            let next = self.queue.range(self.hand..).next();
            let (rank, id) = next.or_else(|| self.queue.first_key_value())?;
            let (rank, id) = (*rank, *id);
            self.hand = (rank.0, rank.1 + 1);
            let place = self.places.get_mut(&id)?;
            if !std::mem::take(&mut place.visited) {
                return Some((rank, id));
            }
        }
    }

    /// Every entry, the next to go first.
    pub(super) fn ids(&self) -> impl Iterator<Item = u64> {
        self.queue.values().copied()
    }
}

/// Ticks differ between entries, so ranks do too.
fn rank(algorithm: Algorithm, place: &Place) -> (u64, u64) {
    match algorithm {
        Algorithm::Lru => (0, place.used_tick),
        Algorithm::Fifo | Algorithm::Sieve => (0, place.inserted_tick),
        Algorithm::Lfu => (place.hits, place.used_tick),
        Algorithm::Gdsf => {
            // Not negative, so the bits order as the numbers do.
            let priority = place.age + place.hits as f64 * place.worth;
            (priority.to_bits(), place.used_tick)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Inserts 1, 2, 3 (100 bytes, 100 us each), applies hits, and names all victims in turn.
    fn victims(algorithm: Algorithm, hits: &[u64]) -> Vec<u64> {
        let mut order = Order::default();
        order.switch(algorithm);
        for id in 1..=3 {
            order.insert(id, 100, 100);
        }
        for id in hits {
            order.hit(*id);
        }
        drain(&mut order)
    }

    fn drain(order: &mut Order) -> Vec<u64> {
        let next = || {
            let id = order.victim()?;
            order.remove(id);
            Some(id)
        };
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn each_algorithm_evicts_in_its_own_order() {
        let check = |algorithm, hits: &[u64], want: [u64; 3]| {
            assert_eq!(victims(algorithm, hits), want, "{algorithm:?} {hits:?}");
        };
        check(Algorithm::Fifo, &[1, 1, 2], [1, 2, 3]);
        check(Algorithm::Lru, &[2, 1], [3, 2, 1]);
        check(Algorithm::Lfu, &[1, 1, 3, 2], [3, 2, 1]);
        // 1 is passed over once, then the hand is past it.
        check(Algorithm::Sieve, &[1], [2, 3, 1]);
        check(Algorithm::Sieve, &[1, 2, 3], [1, 2, 3]);
        check(Algorithm::Gdsf, &[1, 1, 2], [3, 2, 1]);
    }

    #[test]
    fn gdsf_keeps_what_is_dear_and_small() {
        let mut order = Order::default();
        order.switch(Algorithm::Gdsf);
        order.insert(1, 1000, 10);
        order.insert(2, 10, 10);
        order.insert(3, 1000, 100_000);
        assert_eq!(drain(&mut order), [1, 2, 3]);
    }

    #[test]
    fn gdsf_lets_old_favourites_go_in_the_end() {
        let mut order = Order::default();
        order.switch(Algorithm::Gdsf);
        order.insert(0, 100, 100);
        (0..9).for_each(|_| order.hit(0));
        let mut evicted = Vec::new();
        for id in 1..40 {
            order.insert(id, 100, 200);
            if id > 2 {
                evicted.extend(order.victim());
                order.remove(*evicted.last().unwrap());
            }
        }
        assert!(evicted.contains(&0), "{evicted:?}");
    }

    #[test]
    fn switching_keeps_the_past() {
        let mut order = Order::default();
        for id in 1..=3 {
            order.insert(id, 1, 1);
        }
        order.hit(1);
        order.switch(Algorithm::Lfu);
        assert_eq!(drain(&mut order), [2, 3, 1]);
    }
}
