//! Attention of one head with AVX2 and FMA. [`crate::attention`] specifies it.

mod alone;
mod rounded;
mod wide;

use std::arch::x86_64::*;

use half::f16;

use super::exp2::{LEAST, ONE_BITS, ROUND, TERMS};
use super::{Avx2, load_f32};
use crate::attention::{HalfRows, Head, HeadRows, Way};

/// Queries of a strip and columns of a panel: 6 x 2 registers of sums, 2 of a panel's row, 1 of a query's value.
const STRIP: usize = 6;
const LANES: usize = 8;
const PANEL: usize = 16;
/// Keys of a tile: with values of 96, both packed tiles are 48 KiB, in the second-level cache.
const TILE: usize = 64;

impl Avx2 {
    /// `out(row, values)` once for each query.
    pub(crate) fn attend(self, head: &Head<'_>, out: &mut dyn FnMut(usize, &[f32])) {
        if head.way == Way::Rounded && rounded::takes(head) {
            // SAFETY: `self` exists, so `detect` saw the features.
            return unsafe { rounded::attend(head, out) };
        }
        let see = |strip: &mut Strip, packed: &Packed, visible| {
            // SAFETY: `self` exists, so `detect` saw the features.
            unsafe { strip.see(head.head_dim, packed, visible) };
        };
        // SAFETY: as above.
        unsafe { many(head, see, out) };
    }

    /// As [`Self::attend`] of several heads whose keys and values are f16, each query by itself: `out(head, row, values)`.
    pub(crate) fn attend_alone(
        self,
        heads: &[(&Head<'_>, [HalfRows<'_>; 2])],
        out: &mut dyn FnMut(usize, usize, &[f32]),
    ) {
        // SAFETY: `self` exists, so `detect` saw the features.
        unsafe { alone::attend(heads, out) };
    }
}

/// Of scores whose softmax is of powers of two.
fn scale(head: &Head<'_>) -> f32 {
    head.scale() * std::f32::consts::LOG2_E
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn load_f16(values: &[f16; 8]) -> __m256 {
    // SAFETY: sixteen bytes, and the load needs no alignment.
    let bits = unsafe { _mm_loadu_si128(values.as_ptr().cast()) };
    _mm256_cvtph_ps(bits)
}

#[target_feature(enable = "avx2")]
#[inline]
fn total(sum: __m256) -> f32 {
    let sum = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
    let sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)))
}

/// The largest of a multiple of eight scores; which, when one is NaN, does not matter.
#[target_feature(enable = "avx2")]
#[inline]
fn largest(scores: &[f32]) -> f32 {
    let mut most = _mm256_set1_ps(f32::NEG_INFINITY);
    for eight in scores.as_chunks::<8>().0 {
        most = _mm256_max_ps(most, load_f32(eight));
    }
    largest_of(most)
}

/// The largest lane.
#[target_feature(enable = "avx2")]
#[inline]
fn largest_of(most: __m256) -> f32 {
    let most = _mm_max_ps(
        _mm256_castps256_ps128(most),
        _mm256_extractf128_ps::<1>(most),
    );
    let most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)))
}

/// Scores become `2^(score - most)`, whose sum is returned. A multiple of eight of them.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn weights(scores: &mut [f32], most: f32) -> f32 {
    let mut sum = _mm256_setzero_ps();
    for eight in scores.as_chunks_mut::<8>().0 {
        let weight = exp2(_mm256_sub_ps(load_f32(eight), _mm256_set1_ps(most)));
        *eight = super::store(weight);
        sum = _mm256_add_ps(sum, weight);
    }
    total(sum)
}

/// `2^x` for x up to 0, within 2e-7 of itself; 0 below -126.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn exp2(x: __m256) -> __m256 {
    let tiny = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(LEAST));
    _mm256_andnot_ps(tiny, powers(&TERMS, x))
}

/// `2^x` for x up to 0, next to nothing below -126, by the terms of a polynomial from the highest power on, but for the 1.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn powers<const N: usize>(terms: &[f32; N], x: __m256) -> __m256 {
    let x = _mm256_max_ps(_mm256_set1_ps(LEAST), x); // the second operand when either is NaN
    let rounded = _mm256_add_ps(x, _mm256_set1_ps(ROUND));
    let r = _mm256_sub_ps(x, _mm256_sub_ps(rounded, _mm256_set1_ps(ROUND)));
    let mut value = _mm256_set1_ps(terms[0]);
    for term in &terms[1..] {
        value = _mm256_fmadd_ps(value, r, _mm256_set1_ps(*term));
    }
    value = _mm256_fmadd_ps(value, r, _mm256_set1_ps(1.0));
    let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(rounded));
    let power = _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(ONE_BITS)));
    _mm256_mul_ps(value, power)
}

/// A panel's row, in a cache line of its own: loads that straddle two are twice as slow.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([f32; PANEL]);

/// Scores of a strip with a tile.
#[repr(align(64))]
struct Scores([[f32; TILE]; STRIP]);

/// A tile of keys and values, packed into panels; zeros behind the last key and the last column.
struct Packed {
    keys: Vec<Line>,   // (TILE / PANEL, head_dim), sixteen keys
    values: Vec<Line>, // (columns / PANEL, TILE), sixteen columns
}

impl Packed {
    fn new(head_dim: usize) -> Self {
        Self {
            keys: vec![Line([0.0; PANEL]); TILE / PANEL * head_dim],
            values: vec![Line([0.0; PANEL]); head_dim.div_ceil(PANEL) * TILE],
        }
    }

    #[target_feature(enable = "avx2,f16c")]
    fn fill(&mut self, head: &Head<'_>, first: usize, row: &mut [f32]) {
        let count = TILE.min(head.count - first);
        for key in 0..TILE {
            row.fill(0.0);
            if key < count {
                widen(&head.keys, first + key, row);
            }
            let panel = &mut self.keys[key / PANEL * head.head_dim..][..head.head_dim];
            for (place, value) in panel.iter_mut().zip(row.iter()) {
                place.0[key % PANEL] = *value;
            }
            if key < count {
                widen(&head.values, first + key, row);
            }
            for (panel, values) in row.chunks(PANEL).enumerate() {
                self.values[panel * TILE + key].0[..values.len()].copy_from_slice(values);
            }
        }
    }
}

/// One row as f32.
#[target_feature(enable = "avx2,f16c")]
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
        *out = super::store(load_f16(stored));
    }
    for (out, stored) in out_rest.iter_mut().zip(rest) {
        *out = stored.to_f32();
    }
}

/// Six queries and what they have gathered.
struct Strip {
    queries: Vec<[f32; STRIP]>, // (head_dim), scaled
    mixed: Vec<Line>,           // (columns / PANEL, STRIP)
    most: [f32; LANES],         // the first STRIP of them
    sum: [f32; STRIP],
}

/// `see`: takes a tile into a strip, of which each of its queries sees the first few keys.
#[target_feature(enable = "avx2,fma,f16c")]
fn many(
    head: &Head<'_>,
    see: impl Fn(&mut Strip, &Packed, [usize; STRIP]),
    out: &mut dyn FnMut(usize, &[f32]),
) {
    let mut strips: Vec<_> = (0..head.rows)
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
                see(strip, &packed, visible);
            }
        }
    }
    finish(head, &strips, out);
}

/// Hands over what the strips have gathered, each query's weights divided by their sum.
fn finish(head: &Head<'_>, strips: &[Strip], out: &mut dyn FnMut(usize, &[f32])) {
    let mut row = vec![0.0; head.head_dim];
    for (index, strip) in strips.iter().enumerate() {
        for offset in 0..STRIP.min(head.rows - index * STRIP) {
            for (panel, values) in row.chunks_mut(PANEL).enumerate() {
                for (out, value) in values
                    .iter_mut()
                    .zip(&strip.mixed[panel * STRIP + offset].0)
                {
                    *out = value / strip.sum[offset];
                }
            }
            out(index * STRIP + offset, &row);
        }
    }
}

impl Strip {
    fn new(head: &Head<'_>, first: usize) -> Self {
        let mut strip = Self {
            queries: vec![[0.0; STRIP]; head.head_dim],
            mixed: vec![Line([0.0; PANEL]); head.head_dim.div_ceil(PANEL) * STRIP],
            most: [f32::NEG_INFINITY; LANES],
            sum: [0.0; STRIP],
        };
        let scale = scale(head);
        for offset in 0..STRIP.min(head.rows - first) {
            for (scaled, value) in strip.queries.iter_mut().zip(head.query(first + offset)) {
                scaled[offset] = value * scale;
            }
        }
        strip
    }

    /// Takes in a tile, of which each query sees the first few keys.
    #[target_feature(enable = "avx2,fma")]
    fn see(&mut self, head_dim: usize, packed: &Packed, visible: [usize; STRIP]) {
        let seen = visible.into_iter().fold(0, usize::max);
        let panels = packed.keys.chunks_exact(head_dim);
        let mut scores = Scores([[0f32; TILE]; STRIP]);
        for (panel, keys) in panels.take(seen.div_ceil(PANEL)).enumerate() {
            let sums = scores_of(&self.queries, keys);
            for (scores, sums) in scores.0.iter_mut().zip(sums) {
                write_panel(&mut scores[panel * PANEL..], sums);
            }
        }
        let softmax = (
            |scores: &[f32]| largest(scores),
            |scores: &mut [f32], most| weights(scores, most),
        );
        let width = seen.next_multiple_of(PANEL);
        let shrink = self.weigh(&mut scores.0, visible, width, softmax);
        for (values, mixed) in packed
            .values
            .as_chunks::<TILE>()
            .0
            .iter()
            .zip(self.mixed.as_chunks_mut::<STRIP>().0)
        {
            let mut sums = [[_mm256_setzero_ps(); 2]; STRIP];
            for row in 0..STRIP {
                let [low, high] = read_panel(&mixed[row].0);
                let shrink = _mm256_set1_ps(shrink[row]);
                sums[row] = [_mm256_mul_ps(low, shrink), _mm256_mul_ps(high, shrink)];
            }
            let sums = mixed_with(sums, &scores.0, &values[..seen]);
            for (mixed, sums) in mixed.iter_mut().zip(sums) {
                write_panel(&mut mixed.0, sums);
            }
        }
    }

    /// Makes weights of the first `width` scores, whole panels, as far as each query sees; gives what becomes of the weights so
    /// far. By the largest of some scores, and by what makes weights of them and sums them.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn weigh(
        &mut self,
        scores: &mut [[f32; TILE]; STRIP],
        visible: [usize; STRIP],
        width: usize,
        (largest, weights): (impl Fn(&[f32]) -> f32, impl Fn(&mut [f32], f32) -> f32),
    ) -> [f32; LANES] {
        let mut most = self.most;
        for row in 0..STRIP {
            let scores = &mut scores[row][..width];
            if visible[row] < width {
                scores[visible[row]..].fill(f32::NEG_INFINITY);
            }
            most[row] = largest(scores).max(most[row]);
        }
        let risen = _mm256_sub_ps(load_f32(&self.most), load_f32(&most));
        let mut shrink = super::store(exp2(risen));
        for row in 0..STRIP {
            let scores = &mut scores[row][..width];
            if most[row] == f32::NEG_INFINITY && !scores.iter().any(|score| score.is_nan()) {
                scores.fill(0.0); // this query sees none of these keys
                shrink[row] = 1.0;
                continue;
            }
            self.sum[row] = self.sum[row] * shrink[row] + weights(scores, most[row]);
            self.most[row] = most[row];
        }
        shrink
    }
}

/// Scores of six queries with sixteen keys.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn scores_of(queries: &[[f32; STRIP]], keys: &[Line]) -> [[__m256; 2]; STRIP] {
    let mut sums = [[_mm256_setzero_ps(); 2]; STRIP];
    for (queries, keys) in queries.iter().zip(keys) {
        add_products(&mut sums, queries, keys);
    }
    sums
}

/// `sums` and the weighted sum of a tile's first values, sixteen columns of them.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn mixed_with(
    mut sums: [[__m256; 2]; STRIP],
    weights: &[[f32; TILE]; STRIP],
    values: &[Line],
) -> [[__m256; 2]; STRIP] {
    for (key, values) in values.iter().enumerate().take(TILE) {
        let mut of_key = [0.0; STRIP];
        for (place, weights) in of_key.iter_mut().zip(weights) {
            *place = weights[key];
        }
        add_products(&mut sums, &of_key, values);
    }
    sums
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn add_products(sums: &mut [[__m256; 2]; STRIP], column: &[f32; STRIP], row: &Line) {
    let [low, high] = read_panel(&row.0);
    for (sums, value) in sums.iter_mut().zip(column) {
        let value = _mm256_set1_ps(*value);
        sums[0] = _mm256_fmadd_ps(value, low, sums[0]);
        sums[1] = _mm256_fmadd_ps(value, high, sums[1]);
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn read_panel(panel: &[f32; PANEL]) -> [__m256; 2] {
    let [low, high] =
        [panel.first_chunk(), panel.last_chunk()].map(|half| half.expect("sixteen values"));
    [load_f32(low), load_f32(high)]
}

#[target_feature(enable = "avx2")]
#[inline]
fn write_panel(out: &mut [f32], sums: [__m256; 2]) {
    out[..8].copy_from_slice(&super::store(sums[0]));
    out[8..PANEL].copy_from_slice(&super::store(sums[1]));
}
