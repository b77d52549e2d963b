//! Memory for decoded pictures, shared by all requests: a few kilobytes decode to a hundred million.
//!
//! A request asks once, for all its pictures: one that held some of them while it waited for room for
//! the others could wait for a request that waits for it.

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::fetch::{Patience, until};

/// What room is counted in, bytes: so that a count of it fits 32 bits.
const UNIT_BYTES: u64 = 1 << 10;

/// Room for so many bytes; who comes first is served first.
#[derive(Debug)]
pub struct Budget {
    units_max: u32,
    units: Arc<Semaphore>,
}

/// Room that was taken, given back when dropped.
#[derive(Debug)]
pub struct Room(OwnedSemaphorePermit);

/// Why there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoRoom {
    /// It would never fit.
    Never,
    /// Not before the request's time was over.
    Late,
    /// The client has left.
    Gone,
}

impl Budget {
    /// Room for so many bytes.
    #[must_use]
    pub fn new(bytes_max: u64) -> Self {
        let units_max = units(bytes_max);
        Self {
            units_max,
            units: Arc::new(Semaphore::new(units_max as usize)),
        }
    }

    /// Takes room, waiting for it. Blocks the thread, which must belong to a runtime.
    ///
    /// # Errors
    /// There is none, and why.
    pub fn take(&self, bytes: u64, patience: &Patience<'_>) -> Result<Room, NoRoom> {
        let wanted = units(bytes);
        if wanted > self.units_max {
            return Err(NoRoom::Never);
        }
        let taking = Arc::clone(&self.units).acquire_many_owned(wanted);
        let end = tokio::time::Instant::from_std(patience.deadline);
        Handle::current().block_on(async {
            tokio::select! {
                // First of all, what is there is taken.
                biased;
                taken = taking => Ok(Room(taken.map_err(|_| NoRoom::Late)?)),
                () = tokio::time::sleep_until(end) => Err(NoRoom::Late),
                () = until(patience.gone) => Err(NoRoom::Gone),
            }
        })
    }
}

impl Room {
    /// A part of this room, to be given back on its own; all of it when there is less.
    #[must_use]
    pub fn split(&mut self, bytes: u64) -> Self {
        let part = (units(bytes) as usize).min(self.0.num_permits());
        Self(self.0.split(part).expect("no more than there is"))
    }
}

fn units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    const LONG: Duration = Duration::from_secs(30);
    const SOON: Duration = Duration::from_millis(50);

    fn within(time: Duration) -> Patience<'static> {
        Patience {
            deadline: Instant::now() + time,
            gone: &|| false,
        }
    }

    #[test]
    fn room_is_waited_for_as_long_as_the_request_and_its_client_have() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _entered = runtime.enter();
        let budget = Budget::new(10 << 10);
        assert_eq!(
            budget.take(11 << 10, &within(LONG)).unwrap_err(),
            NoRoom::Never
        );
        let mut all = budget.take(10 << 10, &within(LONG)).unwrap();
        assert_eq!(budget.take(1, &within(SOON)).unwrap_err(), NoRoom::Late);
        let left = Patience {
            gone: &|| true,
            ..within(LONG)
        };
        assert_eq!(budget.take(1, &left).unwrap_err(), NoRoom::Gone);
        let part = all.split(4 << 10);
        assert_eq!(budget.take(1, &within(SOON)).unwrap_err(), NoRoom::Late);
        drop(part);
        let some = budget.take(4 << 10, &within(SOON)).unwrap();
        assert_eq!(budget.take(1, &within(SOON)).unwrap_err(), NoRoom::Late);
        drop((all, some));
        assert!(budget.take(10 << 10, &within(SOON)).is_ok());
    }

    #[test]
    fn a_large_request_is_not_overtaken_for_ever_by_small_ones() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let budget = Arc::new(Budget::new(8 << 10));
        let served = Arc::new(AtomicBool::new(false));
        let _entered = runtime.enter();
        let first = budget.take(5 << 10, &within(LONG)).unwrap();
        let large = {
            let (budget, served) = (Arc::clone(&budget), Arc::clone(&served));
            let handle = runtime.handle().clone();
            thread::spawn(move || {
                let _entered = handle.enter();
                let room = budget.take(8 << 10, &within(LONG)).unwrap();
                served.store(true, SeqCst);
                drop(room);
            })
        };
        // It waits once small ones find no room beside the first although there is some.
        let began = Instant::now();
        while budget.take(1, &within(Duration::from_millis(1))).is_ok() {
            assert!(began.elapsed() < LONG, "small ones went by the large one");
        }
        assert!(!served.load(SeqCst));
        drop(first);
        large.join().unwrap();
        assert!(served.load(SeqCst));
    }
}
