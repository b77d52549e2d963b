//! Keys and values of one sequence: an argument of the forward pass, never a field of a layer.

use candle_core::{DType, Device, Tensor};
use half::f16;
use half::slice::HalfFloatSliceExt;
use visor_kernels::HeadRows;

use crate::config::ModelConfig;
use crate::rope::Regime;

/// Positions the cache grows by at least: growing copies everything.
const GROWTH_POSITIONS: usize = 256;

/// Rotated keys and values of every layer, for positions `0..len`: tensors of the compute type, or f16 in plain memory where
/// the CPU computes with activations of eight bits. A cache is used one way only.
pub(crate) struct KvCache {
    layers: Vec<(Tensor, Tensor)>, // each (kv_heads, capacity, head_dim)
    half: Vec<[Vec<f16>; 2]>,      // keys and values, each (kv_heads, capacity, head_dim)
    layer_count: usize,
    kv_heads: usize,
    head_dim: usize,
    len: usize,
    capacity: usize,
    /// What the keys inside were rotated with; meaningless while `len` is 0.
    pub(crate) regime: Regime,
}

impl KvCache {
    /// Empty; nothing is allocated.
    pub(crate) fn new(config: &ModelConfig) -> Self {
        Self {
            layers: Vec::new(),
            half: Vec::new(),
            layer_count: config.layers,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            len: 0,
            capacity: 0,
            regime: Regime::Short,
        }
    }

    /// Positions inside.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Bytes allocated.
    pub(crate) fn bytes(&self) -> u64 {
        let bytes = |tensor: &Tensor| (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
        let tensors = self.layers.iter();
        let half = self.half.iter().flatten().map(|part| 2 * part.len() as u64);
        tensors
            .map(|(keys, values)| bytes(keys) + bytes(values))
            .sum::<u64>()
            + half.sum::<u64>()
    }

    /// Forgets everything and keeps the memory.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// Makes room for `positions` in all, at once for the whole of a known prompt.
    pub(crate) fn reserve(
        &mut self,
        positions: usize,
        device: &Device,
        dtype: DType,
    ) -> candle_core::Result<()> {
        if positions <= self.capacity {
            return Ok(());
        }
        let capacity = self.grown(positions);
        let shape = (self.kv_heads, capacity, self.head_dim);
        let mut layers = Vec::with_capacity(self.layer_count);
        for index in 0..self.layer_count {
            let grown = (
                Tensor::zeros(shape, dtype, device)?,
                Tensor::zeros(shape, dtype, device)?,
            );
            if let (Some((keys, values)), true) = (self.layers.get(index), self.len > 0) {
                grown
                    .0
                    .slice_set(&keys.narrow(1, 0, self.len)?.contiguous()?, 1, 0)?;
                grown
                    .1
                    .slice_set(&values.narrow(1, 0, self.len)?.contiguous()?, 1, 0)?;
            }
            layers.push(grown);
        }
        self.layers = layers;
        self.capacity = capacity;
        Ok(())
    }

    /// Room for at least so many positions, and for a quarter more than there was.
    fn grown(&self, positions: usize) -> usize {
        positions
            .max(self.capacity + self.capacity / 4)
            .next_multiple_of(GROWTH_POSITIONS)
    }

    /// As [`Self::reserve`], in f16.
    pub(crate) fn reserve_half(&mut self, positions: usize) {
        if positions <= self.capacity {
            return;
        }
        let capacity = self.grown(positions);
        let (was, will) = (self.capacity * self.head_dim, capacity * self.head_dim);
        let used = self.len * self.head_dim;
        self.half.resize(self.layer_count, [Vec::new(), Vec::new()]);
        for part in self.half.iter_mut().flatten() {
            let mut grown = vec![f16::ZERO; self.kv_heads * will];
            if used > 0 {
                for (new, old) in grown.chunks_exact_mut(will).zip(part.chunks_exact(was)) {
                    new[..used].copy_from_slice(&old[..used]);
                }
            }
            *part = grown;
        }
        self.capacity = capacity;
    }

    /// As [`Self::append`], of rows that hold queries, keys and values side by side, in f16.
    pub(crate) fn append_half(&mut self, layer: usize, qkv: &[f32], columns: usize) {
        let (width, capacity) = (self.kv_heads * self.head_dim, self.capacity * self.head_dim);
        for (row, values) in qkv.chunks_exact(columns).enumerate() {
            let at = (self.len + row) * self.head_dim;
            let key_values = values[columns - 2 * width..].chunks_exact(width);
            for (part, values) in self.half[layer].iter_mut().zip(key_values) {
                for (head, values) in values.chunks_exact(self.head_dim).enumerate() {
                    let place = &mut part[head * capacity + at..][..self.head_dim];
                    place.convert_from_f32_slice(values);
                }
            }
        }
    }

    /// Keys and values of a head, appended ones included.
    pub(crate) fn half_rows(&self, layer: usize, head: usize) -> [HeadRows<'_>; 2] {
        let capacity = self.capacity * self.head_dim;
        self.half[layer]
            .each_ref()
            .map(|part| HeadRows::F16(&part[head * capacity..][..capacity], self.head_dim))
    }

    /// Writes keys and values (kv_heads, n, head_dim) of one layer behind what is there and returns all of that layer.
    /// They count only once [`Self::commit`] is called, so a pass that fails halfway leaves the cache as it was.
    pub(crate) fn append(
        &self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let total = self.len + keys.dim(1)?;
        let (all_keys, all_values) = &self.layers[layer];
        all_keys.slice_set(&keys.contiguous()?, 1, self.len)?;
        all_values.slice_set(&values.contiguous()?, 1, self.len)?;
        Ok((
            all_keys.narrow(1, 0, total)?,
            all_values.narrow(1, 0, total)?,
        ))
    }

    /// Makes `positions` appended positions count, rotated with `regime`.
    pub(crate) fn commit(&mut self, positions: usize, regime: Regime) {
        self.len += positions;
        self.regime = regime;
    }
}
