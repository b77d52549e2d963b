//! Keys and values of one sequence: an argument of the forward pass, never a field of a layer.

mod pool;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use visor_kernels::{HalfRows, HeadRows};

use crate::error::ModelError;
use crate::rope::Regime;
pub(crate) use pool::BLOCK_POSITIONS;
pub use pool::{KvBlock, KvPool};

/// From so many rows on that a layer gets in a block, all cores write them.
const ROWS_TOGETHER_MIN: usize = 8;
/// Parts, keys or values of one head, that a core writes one after the other, at least.
const PARTS_MIN: usize = 8;

/// Rotated keys and values of every layer, for positions `0..len`, in blocks of a pool: f16 in plain memory where the CPU
/// computes with activations of eight bits. Elsewhere they are tensors of the compute type, and blocks count them: as many
/// positions as these stand for. Two things are not counted: while room grows, one layer is there twice; and Metal's allocator
/// rounds each tensor up to a power of two.
///
/// **Invariant:** blocks that other sequences or a cache hold, too, are full up to where this sequence reads them and never
/// written; the one that positions are appended to is this sequence's alone.
pub(crate) struct KvCache {
    pool: Arc<KvPool>,
    blocks: Vec<Arc<KvBlock>>,
    tensors: Vec<(Tensor, Tensor)>, // each (kv_heads, capacity, head_dim)
    tensor_capacity: usize,
    len: usize,
    /// What the keys inside were rotated with; meaningless while `len` is 0.
    pub(crate) regime: Regime,
}

impl KvCache {
    /// Empty; nothing is allocated.
    pub(crate) fn new(pool: Arc<KvPool>) -> Self {
        Self {
            pool,
            blocks: Vec::new(),
            tensors: Vec::new(),
            tensor_capacity: 0,
            len: 0,
            regime: Regime::Short,
        }
    }

    /// Positions inside.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of the blocks, those of other sequences included.
    pub(crate) fn bytes(&self) -> u64 {
        self.blocks.len() as u64 * self.pool.block_bytes()
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
        self.blocks.clear();
        self.tensors.clear();
        self.tensor_capacity = 0;
    }

    /// Forgets what is behind the first `positions`. It was computed for this sequence alone, and its room stays.
    pub(crate) fn truncate(&mut self, positions: usize) {
        self.len = self.len.min(positions);
    }

    /// Takes blocks for `positions` in all, and the one that is appended to for this sequence alone.
    ///
    /// # Errors
    /// [`ModelError::KvFull`]; the cache holds then what it held, and perhaps some more room.
    pub(crate) fn reserve(&mut self, positions: usize) -> Result<(), ModelError> {
        let (tail, rest) = (self.len / BLOCK_POSITIONS, self.len % BLOCK_POSITIONS);
        if let Some(block) = self.blocks.get_mut(tail)
            && Arc::get_mut(block).is_none()
        {
            *block = Arc::new(self.pool.copy(block, rest)?);
        }
        while self.blocks.len() * BLOCK_POSITIONS < positions {
            self.blocks.push(Arc::new(self.pool.take()?));
        }
        Ok(())
    }

    /// Starts with `positions` that were computed for another sequence, rotated with `regime`: whole blocks are shared, what is
    /// read of the last one only in part is copied.
    ///
    /// # Errors
    /// [`ModelError::KvFull`]; the cache is empty then.
    pub(crate) fn adopt(
        &mut self,
        blocks: &[Arc<KvBlock>],
        positions: usize,
        regime: Regime,
    ) -> Result<(), ModelError> {
        self.clear();
        let (whole, rest) = (positions / BLOCK_POSITIONS, positions % BLOCK_POSITIONS);
        let mut adopted = blocks[..whole].to_vec();
        if rest > 0 {
            adopted.push(Arc::new(self.pool.copy(&blocks[whole], rest)?));
        }
        (self.blocks, self.len, self.regime) = (adopted, positions, regime);
        Ok(())
    }

    /// The blocks of the positions inside, the last one perhaps filled in part; none where they hold no values.
    pub(crate) fn share(&self) -> &[Arc<KvBlock>] {
        if self.pool.can_share() {
            &self.blocks[..self.len.div_ceil(BLOCK_POSITIONS)]
        } else {
            &[]
        }
    }

    /// Room in tensors for `positions` in all, and for all that was reserved. Everything is copied when it grows, a block at a time:
    /// once for 64 generated tokens, each of which reads it, too.
    pub(crate) fn reserve_tensors(
        &mut self,
        positions: usize,
        device: &Device,
        dtype: DType,
    ) -> candle_core::Result<()> {
        if positions <= self.tensor_capacity {
            return Ok(());
        }
        let blocks = positions.div_ceil(BLOCK_POSITIONS).max(self.blocks.len());
        let capacity = blocks * BLOCK_POSITIONS;
        let shape = (self.pool.kv_heads(), capacity, self.pool.head_dim());
        // Layer by layer: only one is there twice at a time.
        for index in 0..self.pool.layers() {
            let grown = [
                Tensor::zeros(shape, dtype, device)?,
                Tensor::zeros(shape, dtype, device)?,
            ];
            if let (Some((keys, values)), true) = (self.tensors.get(index), self.len > 0) {
                for (new, old) in grown.iter().zip([keys, values]) {
                    new.slice_set(&old.narrow(1, 0, self.len)?.contiguous()?, 1, 0)?;
                }
            }
            match self.tensors.get_mut(index) {
                Some(tensors) => *tensors = grown.into(),
                None => self.tensors.push(grown.into()),
            }
        }
        self.tensor_capacity = capacity;
        Ok(())
    }

    /// Writes keys and values (kv_heads, n, head_dim) of one layer behind what is there and returns all of that layer.
    /// They count only once [`Self::commit`] is called, so a pass that fails halfway leaves the cache as it was.
    pub(crate) fn append_tensors(
        &self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let total = self.len + keys.dim(1)?;
        let (all_keys, all_values) = &self.tensors[layer];
        all_keys.slice_set(&keys.contiguous()?, 1, self.len)?;
        all_values.slice_set(&values.contiguous()?, 1, self.len)?;
        Ok((
            all_keys.narrow(1, 0, total)?,
            all_values.narrow(1, 0, total)?,
        ))
    }

    /// As [`Self::append_tensors`], of rows that hold queries, keys and values side by side, in f16. Room was reserved.
    pub(crate) fn append(&mut self, layer: usize, qkv: &[f32], columns: usize) {
        let (head_dim, head_values) = (self.pool.head_dim(), self.pool.head_values());
        let (heads, layer_values) = (self.pool.kv_heads(), self.pool.layer_values());
        assert!(qkv.len().is_multiple_of(columns), "whole rows");
        let mut position = self.len;
        let mut rest = qkv;
        while !rest.is_empty() {
            let place = position % BLOCK_POSITIONS;
            let count = (BLOCK_POSITIONS - place).min(rest.len() / columns);
            let (rows, behind) = rest.split_at(count * columns);
            let block = &mut self.blocks[position / BLOCK_POSITIONS];
            let block = Arc::get_mut(block).expect("`reserve` made it this sequence's alone");
            let layer = &mut block.values_mut()[layer * layer_values..][..layer_values];
            // Keys of a head or values of it.
            let append_part = |(part, to): (usize, &mut [f16])| {
                let first =
                    columns - 2 * heads * head_dim + (part % 2 * heads + part / 2) * head_dim;
                let to = to[place * head_dim..].chunks_exact_mut(head_dim);
                for (to, row) in to.zip(rows.chunks_exact(columns)) {
                    to.convert_from_f32_slice(&row[first..][..head_dim]);
                }
            };
            let together = if count < ROWS_TOGETHER_MIN {
                2 * heads
            } else {
                PARTS_MIN
            };
            let parts = layer.par_chunks_exact_mut(head_values).enumerate();
            parts.with_min_len(together).for_each(append_part);
            (position, rest) = (position + count, behind);
        }
    }

    /// What [`Self::head_rows`] reads.
    pub(crate) fn pages(&self) -> Vec<&[f16]> {
        self.blocks.iter().map(|block| block.values()).collect()
    }

    /// Keys and values of a head, appended ones included.
    pub(crate) fn head_rows<'a>(
        &self,
        pages: &'a [&'a [f16]],
        layer: usize,
        head: usize,
    ) -> [HeadRows<'a>; 2] {
        let keys = layer * self.pool.layer_values() + 2 * head * self.pool.head_values();
        [keys, keys + self.pool.head_values()].map(|offset| {
            HeadRows::F16(HalfRows {
                pages,
                page_rows: BLOCK_POSITIONS,
                offset,
                stride: self.pool.head_dim(),
            })
        })
    }

    /// Makes `positions` appended positions count, rotated with `regime`.
    pub(crate) fn commit(&mut self, positions: usize, regime: Regime) {
        self.len += positions;
        self.regime = regime;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What follows from the layout alone: of row r, part p of head h begins at column `(1 + p) * 3 * 4 + 4 * h` behind the queries.
    #[test]
    fn rows_lie_where_they_are_read_however_many_are_appended_together() {
        let columns = 9 * 4;
        let row =
            |position: usize| (0..columns).map(move |c| (position * columns + c) as f32 / 8.0);
        let rows: Vec<f32> = (0..200).flat_map(row).collect();
        for step in [1, 7, 8, 63, 64, 65, 200] {
            let mut cache = KvCache::new(Arc::new(KvPool::tiny()));
            cache.reserve(200).unwrap();
            for some in rows.chunks(step * columns) {
                (0..2).for_each(|layer| cache.append(layer, some, columns));
                cache.commit(some.len() / columns, Regime::Short);
            }
            let pages = cache.pages();
            for (layer, head, position) in [(0, 0, 0), (1, 2, 63), (0, 1, 64), (1, 0, 199)] {
                let parts = cache.head_rows(&pages, layer, head);
                for (part, read) in parts.iter().enumerate() {
                    let HeadRows::F16(read) = read else {
                        panic!("kept as f16");
                    };
                    let at = read.offset + position % read.page_rows * read.stride;
                    let values = &read.pages[position / read.page_rows][at..][..4];
                    let first = position * columns + (1 + part) * 12 + 4 * head;
                    let want = rows[first..][..4].iter().map(|x| f16::from_f32(*x));
                    assert!(
                        values.iter().copied().eq(want),
                        "{step} {layer} {head} {position}"
                    );
                }
            }
        }
    }
}
