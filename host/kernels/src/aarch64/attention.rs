//! Attention of one head with NEON. [`crate::attention`] specifies it.

use std::arch::aarch64::*;

use half::f16;

use super::{Neon, load_f32, store_f32};
use crate::attention::{HalfRows, Head, HeadRows, Way};

/// Queries of a strip and columns of a panel: 8 * 2 registers of sums, 2 of a panel's row, 2 of the queries' values. Sixteen
/// multiplications for four loads; as many are under way at once in four units of four cycles.
const STRIP: usize = 8;
const PANEL: usize = 8;
/// Keys of a tile: with values of 96, both packed tiles are 48 KiB, in the second-level cache.
const TILE: usize = 64;

/// Eight values.
type Pair = [float32x4_t; 2];

impl Neon {
    /// `out(row, values)` once for each query.
    pub(crate) fn attend(self, head: &Head<'_>, out: &mut dyn FnMut(usize, &[f32])) {
        if head.way == Way::Alone {
            // SAFETY: `self` exists, so `detect` saw the feature.
            unsafe { few(head, out) };
        } else {
            // SAFETY: `self` exists, so `detect` saw the feature.
            unsafe { many(head, out) };
        }
    }
}

/// Every query alone.
#[target_feature(enable = "neon")]
fn few(head: &Head<'_>, out: &mut dyn FnMut(usize, &[f32])) {
    let mut mixed = vec![0.0; head.head_dim];
    let mut query = vec![0.0; head.head_dim];
    for row in 0..head.rows {
        for (scaled, value) in query.iter_mut().zip(head.query(row)) {
            *scaled = value * head.scale();
        }
        let visible = head.visible(row);
        let mut scores = vec![f32::NEG_INFINITY; visible.next_multiple_of(8)];
        match head.keys {
            HeadRows::F32(data, stride) => {
                for (key, score) in scores[..visible].iter_mut().enumerate() {
                    *score = dot(&query, &data[key * stride..][..head.head_dim]);
                }
            }
            HeadRows::F16(half) => dots_f16(&query, half, &mut scores[..visible]),
        }
        let most = largest(&scores, f32::NEG_INFINITY);
        let sum = weights(&mut scores, most);
        mixed.fill(0.0);
        match head.values {
            HeadRows::F32(data, stride) => {
                for (key, weight) in scores[..visible].iter().enumerate() {
                    add(&mut mixed, &data[key * stride..][..head.head_dim], *weight);
                }
            }
            HeadRows::F16(half) => add_f16(&mut mixed, half, &scores[..visible]),
        }
        for value in &mut mixed {
            *value /= sum;
        }
        out(row, &mixed);
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [[vdupq_n_f32(0.0); 2]; 2];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (index, (a, b)) in a.iter().zip(b).enumerate() {
        add_pair(&mut sums[index % 2], load(a), load(b));
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    total(sums) + rest
}

/// Products of a query with the first rows.
#[target_feature(enable = "neon")]
fn dots_f16(query: &[f32], rows: HalfRows<'_>, scores: &mut [f32]) {
    let mut scores = scores.iter_mut();
    for (run, count) in rows.runs(scores.len()) {
        for (key, score) in scores.by_ref().take(count).enumerate() {
            *score = dot_f16(query, &run[key * rows.stride..][..query.len()]);
        }
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn dot_f16(a: &[f32], b: &[f16]) -> f32 {
    let mut sums = [[vdupq_n_f32(0.0); 2]; 2];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (index, (a, b)) in a.iter().zip(b).enumerate() {
        add_pair(&mut sums[index % 2], load(a), load_f16(b));
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b.to_f32()).sum();
    total(sums) + rest
}

#[target_feature(enable = "neon")]
#[inline]
fn add_pair(sums: &mut Pair, a: Pair, b: Pair) {
    *sums = [
        vfmaq_f32(sums[0], a[0], b[0]),
        vfmaq_f32(sums[1], a[1], b[1]),
    ];
}

#[target_feature(enable = "neon")]
#[inline]
fn total([[a, b], [c, d]]: [Pair; 2]) -> f32 {
    vaddvq_f32(vaddq_f32(vaddq_f32(a, b), vaddq_f32(c, d)))
}

#[target_feature(enable = "neon")]
#[inline]
fn add(mixed: &mut [f32], row: &[f32], weight: f32) {
    for (mixed, value) in mixed.iter_mut().zip(row) {
        *mixed = value.mul_add(weight, *mixed);
    }
}

/// The weighted sum of rows, 24 registers of it at a time.
#[target_feature(enable = "neon")]
fn add_f16(mixed: &mut [f32], rows: HalfRows<'_>, weights: &[f32]) {
    const WIDE: usize = 12;
    let whole = mixed.len() / 8;
    for first in (0..whole).step_by(WIDE) {
        let count = WIDE.min(whole - first);
        let mut sums = [[vdupq_n_f32(0.0); 2]; WIDE];
        for (row, weight) in rows.weighted(weights) {
            let (eights, _) = row[8 * first..][..8 * count].as_chunks::<8>();
            let weight = [vdupq_n_f32(weight); 2];
            if let Some(eights) = eights.first_chunk::<WIDE>() {
                for index in 0..WIDE {
                    add_pair(&mut sums[index], load_f16(&eights[index]), weight);
                }
            } else {
                for (sum, eight) in sums.iter_mut().zip(eights) {
                    add_pair(sum, load_f16(eight), weight);
                }
            }
        }
        let (eights, _) = mixed[8 * first..].as_chunks_mut::<8>();
        for (out, sum) in eights.iter_mut().zip(&sums[..count]) {
            store(out, *sum);
        }
    }
    for column in 8 * whole..mixed.len() {
        let products = rows
            .weighted(weights)
            .map(|(row, weight)| row[column].to_f32() * weight);
        mixed[column] = products.sum();
    }
}

/// The largest of a multiple of four scores and `most`; NaN when one is.
#[target_feature(enable = "neon")]
#[inline]
fn largest(scores: &[f32], most: f32) -> f32 {
    let mut most = vdupq_n_f32(most);
    for four in scores.as_chunks().0 {
        most = vmaxq_f32(most, load_f32(four));
    }
    vmaxvq_f32(most)
}

/// Scores become `exp(score - most)`, whose sum is returned. A multiple of four of them.
#[target_feature(enable = "neon")]
#[inline]
fn weights(scores: &mut [f32], most: f32) -> f32 {
    let mut sum = vdupq_n_f32(0.0);
    for four in scores.as_chunks_mut().0 {
        let weight = exp(vsubq_f32(load_f32(four), vdupq_n_f32(most)));
        *four = store_f32(weight);
        sum = vaddq_f32(sum, weight);
    }
    vaddvq_f32(sum)
}

/// `e^x` for x up to 0, within 2e-7 of itself; 0 below -87. By 2^n * e^r with |r| at most ln(2) / 2, and e^r by its series.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn exp(x: float32x4_t) -> float32x4_t {
    const SERIES: [f32; 6] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0];
    let tiny = vcltq_f32(x, vdupq_n_f32(-87.0));
    let x = vmaxq_f32(vdupq_n_f32(-87.0), x); // NaN stays
    let n = vrndnq_f32(vmulq_n_f32(x, std::f32::consts::LOG2_E));
    let r = vfmsq_f32(x, n, vdupq_n_f32(0.693_359_4)); // ln 2, its first bits and the rest
    let r = vfmsq_f32(r, n, vdupq_n_f32(-2.121_944_4e-4));
    let mut value = vdupq_n_f32(SERIES[0]);
    for term in &SERIES[1..] {
        value = vfmaq_f32(vdupq_n_f32(*term), value, r);
    }
    value = vfmaq_f32(vdupq_n_f32(1.0), value, r);
    let power = vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)));
    let value = vmulq_f32(value, vreinterpretq_f32_s32(power));
    vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), tiny))
}

/// A tile of keys and values, packed into panels; zeros behind the last key and the last column.
struct Packed {
    keys: Vec<[f32; PANEL]>,   // (TILE / PANEL, head_dim), eight keys
    values: Vec<[f32; PANEL]>, // (columns / PANEL, TILE), eight columns
}

impl Packed {
    fn new(head_dim: usize) -> Self {
        Self {
            keys: vec![[0.0; PANEL]; TILE / PANEL * head_dim],
            values: vec![[0.0; PANEL]; head_dim.div_ceil(PANEL) * TILE],
        }
    }

    #[target_feature(enable = "neon")]
    fn fill(&mut self, head: &Head<'_>, first: usize, row: &mut [f32]) {
        let count = TILE.min(head.count - first);
        for key in 0..TILE {
            row.fill(0.0);
            if key < count {
                widen(&head.keys, first + key, row);
            }
            let panel = &mut self.keys[key / PANEL * head.head_dim..][..head.head_dim];
            for (place, value) in panel.iter_mut().zip(row.iter()) {
                place[key % PANEL] = *value;
            }
            if key < count {
                widen(&head.values, first + key, row);
            }
            for (panel, values) in row.chunks(PANEL).enumerate() {
                self.values[panel * TILE + key][..values.len()].copy_from_slice(values);
            }
        }
    }
}

/// One row as f32.
#[target_feature(enable = "neon")]
#[inline]
fn widen(rows: &HeadRows<'_>, index: usize, out: &mut [f32]) {
    let HeadRows::F16(half) = rows else {
        return rows.widen(index, out);
    };
    let ((stored, rest), (out, out_rest)) = (
        half.row(index, out.len()).as_chunks::<8>(),
        out.as_chunks_mut::<8>(),
    );
    for (out, stored) in out.iter_mut().zip(stored) {
        store(out, load_f16(stored));
    }
    for (out, stored) in out_rest.iter_mut().zip(rest) {
        *out = stored.to_f32();
    }
}

/// Eight queries and what they have gathered.
struct Strip {
    queries: Vec<[f32; STRIP]>, // (head_dim), scaled
    mixed: Vec<[f32; PANEL]>,   // (columns / PANEL, STRIP)
    most: [f32; STRIP],
    sum: [f32; STRIP],
}

#[target_feature(enable = "neon")]
fn many(head: &Head<'_>, out: &mut dyn FnMut(usize, &[f32])) {
    let mut strips: Vec<Strip> = (0..head.rows)
        .step_by(STRIP)
        .map(|first| Strip::new(head, first))
        .collect();
    let mut packed = Packed::new(head.head_dim);
    let mut row = vec![0.0; head.head_dim];
    for first in (0..head.count).step_by(TILE) {
        packed.fill(head, first, &mut row);
        for (index, strip) in strips.iter_mut().enumerate() {
            let rows = index * STRIP..head.rows.min((index + 1) * STRIP);
            if head.visible(rows.end - 1) > first {
                let visible = std::array::from_fn(|row| {
                    head.visible((rows.start + row).min(rows.end - 1))
                        .saturating_sub(first)
                        .min(TILE)
                });
                strip.see(head.head_dim, &packed, visible);
            }
        }
    }
    for (index, strip) in strips.iter().enumerate() {
        for offset in 0..STRIP.min(head.rows - index * STRIP) {
            for (panel, values) in row.chunks_mut(PANEL).enumerate() {
                for (out, value) in values.iter_mut().zip(&strip.mixed[panel * STRIP + offset]) {
                    *out = value / strip.sum[offset];
                }
            }
            out(index * STRIP + offset, &row);
        }
    }
}

impl Strip {
    fn new(head: &Head<'_>, first: usize) -> Self {
        let mut queries = vec![[0.0; STRIP]; head.head_dim];
        for offset in 0..STRIP.min(head.rows - first) {
            for (scaled, value) in queries.iter_mut().zip(head.query(first + offset)) {
                scaled[offset] = value * head.scale();
            }
        }
        Self {
            queries,
            mixed: vec![[0.0; PANEL]; head.head_dim.div_ceil(PANEL) * STRIP],
            most: [f32::NEG_INFINITY; STRIP],
            sum: [0.0; STRIP],
        }
    }

    /// Takes in a tile, of which each query sees the first few keys.
    #[target_feature(enable = "neon")]
    fn see(&mut self, head_dim: usize, packed: &Packed, visible: [usize; STRIP]) {
        let mut scores = [[0f32; TILE]; STRIP];
        for (panel, keys) in packed.keys.chunks_exact(head_dim).enumerate() {
            let mut sums = [[vdupq_n_f32(0.0); 2]; STRIP];
            for (queries, keys) in self.queries.iter().zip(keys) {
                add_products(&mut sums, load(queries), load(keys));
            }
            for (scores, sums) in scores.iter_mut().zip(sums) {
                store(&mut scores.as_chunks_mut().0[panel], sums);
            }
        }
        let mut shrink = [1f32; STRIP];
        for row in 0..STRIP {
            scores[row][visible[row]..].fill(f32::NEG_INFINITY);
            let most = largest(&scores[row], self.most[row]);
            if most == f32::NEG_INFINITY {
                scores[row].fill(0.0); // this query sees none of these keys
                continue;
            }
            shrink[row] = (self.most[row] - most).exp();
            self.sum[row] = self.sum[row] * shrink[row] + weights(&mut scores[row], most);
            self.most[row] = most;
        }
        let by_key = by_key(&scores);
        let panels = packed.values.as_chunks::<TILE>().0;
        for (values, mixed) in panels.iter().zip(self.mixed.as_chunks_mut::<STRIP>().0) {
            let mut sums = [[vdupq_n_f32(0.0); 2]; STRIP];
            for row in 0..STRIP {
                sums[row] = load(&mixed[row]).map(|four| vmulq_n_f32(four, shrink[row]));
            }
            for (weights, values) in by_key.iter().zip(values) {
                add_products(&mut sums, load(weights), load(values));
            }
            for (mixed, sums) in mixed.iter_mut().zip(sums) {
                store(mixed, sums);
            }
        }
    }
}

/// Weights (queries, keys) as (keys, queries).
fn by_key(weights: &[[f32; TILE]; STRIP]) -> [[f32; STRIP]; TILE] {
    let mut out = [[0.0; STRIP]; TILE];
    for (row, weights) in weights.iter().enumerate() {
        for (place, weight) in out.iter_mut().zip(weights) {
            place[row] = *weight;
        }
    }
    out
}

/// Adds each of eight values of a column times a row of eight.
#[target_feature(enable = "neon")]
#[inline]
fn add_products(sums: &mut [Pair; STRIP], [first, last]: Pair, row: Pair) {
    for half in 0..2 {
        sums[0][half] = vfmaq_laneq_f32::<0>(sums[0][half], row[half], first);
        sums[1][half] = vfmaq_laneq_f32::<1>(sums[1][half], row[half], first);
        sums[2][half] = vfmaq_laneq_f32::<2>(sums[2][half], row[half], first);
        sums[3][half] = vfmaq_laneq_f32::<3>(sums[3][half], row[half], first);
        sums[4][half] = vfmaq_laneq_f32::<0>(sums[4][half], row[half], last);
        sums[5][half] = vfmaq_laneq_f32::<1>(sums[5][half], row[half], last);
        sums[6][half] = vfmaq_laneq_f32::<2>(sums[6][half], row[half], last);
        sums[7][half] = vfmaq_laneq_f32::<3>(sums[7][half], row[half], last);
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn load_f16(values: &[f16; 8]) -> Pair {
    // SAFETY: eight values of sixteen bits.
    let bits = vreinterpretq_f16_u16(unsafe { vld1q_u16(values.as_ptr().cast()) });
    [vcvt_f32_f16(vget_low_f16(bits)), vcvt_high_f32_f16(bits)]
}

#[target_feature(enable = "neon")]
#[inline]
fn load(values: &[f32; 8]) -> Pair {
    let (fours, _) = values.as_chunks();
    [load_f32(&fours[0]), load_f32(&fours[1])]
}

#[target_feature(enable = "neon")]
#[inline]
fn store(out: &mut [f32; 8], [low, high]: Pair) {
    let (fours, _) = out.as_chunks_mut();
    (fours[0], fours[1]) = (store_f32(low), store_f32(high));
}
