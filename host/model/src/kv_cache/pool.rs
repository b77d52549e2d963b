//! Blocks of keys and values, counted against a limit and shared by reference.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::f16;
use memmap2::MmapMut;

use crate::config::ModelConfig;
use crate::error::ModelError;

/// Positions a block holds.
pub(crate) const BLOCK_POSITIONS: usize = 64;

/// Where blocks come from: at most so many at a time, each as large as the model's shape makes it.
pub struct KvPool {
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    value_bytes: u64,
    /// Blocks hold f16; otherwise they only count what tensors hold.
    has_values: bool,
    shared: Arc<Shared>,
}

/// What blocks that are alive know of their pool.
struct Shared {
    blocks_max: AtomicUsize,
    blocks_used: AtomicUsize,
    spare: Mutex<Spare>,
}

/// Memory of blocks that are not alive any more, for those to come: the 757 tokens of a picture fill 288 MiB at the full shape, and a
/// virtual machine took half a second of their ten seconds of prefill to hand that out. With blocks alive no more than the limit.
#[derive(Default)]
struct Spare {
    pages: Vec<MmapMut>,
    /// Not between [`KvPool::return_spare_memory`] and the next block.
    is_kept: bool,
}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            blocks_max: AtomicUsize::new(usize::MAX),
            blocks_used: AtomicUsize::new(0),
            spare: Mutex::default(),
        })
    }

    fn spare(&self) -> MutexGuard<'_, Spare> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks that may be alive beside those that are.
    fn blocks_left(&self) -> usize {
        let blocks_max = self.blocks_max.load(Ordering::Relaxed);
        blocks_max.saturating_sub(self.blocks_used.load(Ordering::Relaxed))
    }
}

/// Rotated keys and values of up to 64 positions in every layer. Never written again once it is shared.
pub struct KvBlock {
    /// (layers, kv_heads, keys and values, 64, head_dim), or nothing: what a head reads of a block lies together.
    values: Option<MmapMut>,
    shared: Arc<Shared>,
}

impl KvPool {
    /// Of f16 in plain memory with `has_values`, else of as many bytes as tensors of `value_bytes` take. No limit yet.
    pub(crate) fn new(config: &ModelConfig, has_values: bool, value_bytes: u64) -> Self {
        Self {
            layers: config.layers,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            value_bytes,
            has_values,
            shared: Shared::new(),
        }
    }

    /// Positions that a block holds.
    pub fn block_positions(&self) -> usize {
        BLOCK_POSITIONS
    }

    /// Memory of a block.
    pub fn block_bytes(&self) -> u64 {
        (self.block_values() as u64) * self.value_bytes
    }

    /// Memory of one number.
    pub(crate) fn value_bytes(&self) -> u64 {
        self.value_bytes
    }

    /// Whether blocks can be shared between sequences: where they hold the values themselves.
    pub fn can_share(&self) -> bool {
        self.has_values
    }

    /// Blocks alive, shared ones once.
    pub fn blocks_used(&self) -> usize {
        self.shared.blocks_used.load(Ordering::Relaxed)
    }

    /// Blocks that can be alive at once.
    pub fn blocks_max(&self) -> usize {
        self.shared.blocks_max.load(Ordering::Relaxed)
    }

    /// Another limit. What is alive stays.
    pub fn set_blocks_max(&self, blocks_max: usize) {
        self.shared.blocks_max.store(blocks_max, Ordering::Relaxed);
        let mut spare = self.shared.spare();
        let kept = spare.pages.len().min(self.shared.blocks_left());
        let beyond = spare.pages.split_off(kept);
        drop(spare);
        drop(beyond); // the system takes its time, which nobody who waits for the lock should
    }

    /// Gives the system memory of blocks that are not alive any more, and of those that end until there is a new one.
    pub fn return_spare_memory(&self) {
        let spare = std::mem::take(&mut *self.shared.spare());
        drop(spare.pages);
    }

    fn block_values(&self) -> usize {
        self.layers * self.layer_values()
    }

    /// Values of one layer in a block.
    pub(super) fn layer_values(&self) -> usize {
        2 * self.kv_heads * self.head_values()
    }

    /// Keys of one head in a block, or values.
    pub(super) fn head_values(&self) -> usize {
        BLOCK_POSITIONS * self.head_dim
    }

    pub(super) fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    pub(super) fn head_dim(&self) -> usize {
        self.head_dim
    }

    pub(super) fn layers(&self) -> usize {
        self.layers
    }

    /// A block of positions that mean nothing.
    ///
    /// # Errors
    /// [`ModelError::KvFull`] when as many as may be are alive, or the system has no memory for one more.
    pub(super) fn take(&self) -> Result<KvBlock, ModelError> {
        let blocks_max = self.blocks_max();
        let below = |used: usize| (used < blocks_max).then_some(used + 1);
        self.shared
            .blocks_used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, below)
            .map_err(|_| ModelError::KvFull { blocks_max })?;
        // Counted until it is dropped.
        let mut block = KvBlock {
            values: None,
            shared: Arc::clone(&self.shared),
        };
        if self.has_values {
            let bytes = self.block_bytes();
            let mut spare = self.shared.spare();
            spare.is_kept = true;
            let used = spare.pages.pop();
            drop(spare);
            let pages = used
                .map_or_else(|| self.pages(), Ok)
                .inspect_err(|error| tracing::warn!(%error, bytes, "no memory for a KV block"))
                .map_err(|_| ModelError::KvFull { blocks_max })?;
            block.values = Some(pages);
        }
        if cfg!(debug_assertions) {
            block.values_mut().fill(f16::NAN); // nobody reads what was not written
        }
        Ok(block)
    }

    /// Memory of a block from the system, in pages of 2 MiB where it has them: a head's keys and values are read in
    /// 24 KiB of each block, and with pages of 4 KiB a processor looks up new ones all the time.
    fn pages(&self) -> io::Result<MmapMut> {
        let pages = MmapMut::map_anon(self.block_values() * size_of::<f16>())?;
        #[cfg(target_os = "linux")]
        drop(pages.advise(memmap2::Advice::HugePage)); // a kernel without them says so
        Ok(pages)
    }

    /// A block with the first positions of another.
    pub(super) fn copy(&self, block: &KvBlock, positions: usize) -> Result<KvBlock, ModelError> {
        let mut copy = self.take()?;
        let heads = copy.values_mut().chunks_exact_mut(self.head_values());
        for (to, from) in heads.zip(block.values().chunks_exact(self.head_values())) {
            let used = positions * self.head_dim;
            to[..used].copy_from_slice(&from[..used]);
        }
        Ok(copy)
    }
}

impl KvBlock {
    pub(super) fn values(&self) -> &[f16] {
        self.values.as_deref().map_or(&[], bytemuck::cast_slice)
    }

    pub(super) fn values_mut(&mut self) -> &mut [f16] {
        self.values
            .as_deref_mut()
            .map_or(&mut [], bytemuck::cast_slice_mut)
    }
}

impl Drop for KvBlock {
    fn drop(&mut self) {
        let mut spare = self.shared.spare();
        self.shared.blocks_used.fetch_sub(1, Ordering::Relaxed);
        if spare.is_kept && spare.pages.len() < self.shared.blocks_left() {
            spare.pages.extend(self.values.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl KvPool {
        /// Of 2 layers with 3 heads of 4 columns.
        pub(crate) fn tiny() -> Self {
            Self {
                layers: 2,
                kv_heads: 3,
                head_dim: 4,
                value_bytes: 2,
                has_values: true,
                shared: Shared::new(),
            }
        }
    }

    #[test]
    fn memory_of_a_block_serves_the_next_one_within_the_limit_until_it_is_returned() {
        let pool = KvPool::tiny();
        let spare = || pool.shared.spare().pages.len();
        pool.set_blocks_max(3);
        let mut blocks: Vec<_> = (0..3).map(|_| pool.take().unwrap()).collect();
        let places: Vec<_> = blocks.iter().map(|block| block.values().as_ptr()).collect();
        blocks.clear();
        assert_eq!((pool.blocks_used(), spare()), (0, 3));
        blocks.push(pool.take().unwrap());
        assert!(places.contains(&blocks[0].values().as_ptr()));
        assert_eq!((pool.blocks_used(), spare()), (1, 2));

        pool.set_blocks_max(2);
        assert_eq!(spare(), 1, "with the block that is alive as many as may be");
        blocks.push(pool.take().unwrap());
        pool.set_blocks_max(1);
        blocks.pop();
        assert_eq!(spare(), 0, "one is alive, and no more may be");
        blocks.clear();
        assert_eq!(spare(), 1);

        pool.return_spare_memory();
        assert_eq!(spare(), 0);
    }

    #[test]
    fn memory_of_a_block_that_ends_while_nothing_is_done_is_not_kept() {
        let pool = KvPool::tiny();
        let spare = || pool.shared.spare().pages.len();
        let block = pool.take().unwrap();
        pool.return_spare_memory();
        drop(block);
        assert_eq!(spare(), 0);
        drop(pool.take().unwrap());
        assert_eq!(spare(), 1, "there is something to do again");
    }
}
