//! Attention in whole numbers with AVX-512 VNNI: `vpdpwssd` multiplies two pairs of 16 bits a lane where an instruction of f32
//! multiplies one, and was 2.3 times as fast here. Queries and keys are rounded row by row, values column by column of a tile,
//! weights against the largest so far; sums of products are exact.

use std::arch::x86_64::*;

use super::{PAIR, largest, load, store, weights};
use crate::attention::{Head, HeadRows};
use crate::x86_64::attention::{Line, PANEL, STRIP, Scores, Strip, TILE, finish, scale, widen};

/// Steps from 0 to the largest of a row of queries or keys, or of a column of values.
const STEPS: f32 = 4095.0;
/// Steps from 0 to a weight of 1.
const WEIGHT_STEPS: f32 = 8191.0;
/// So many columns can be added up: 128 * 4095^2 = 2 146 435 200, and 2^31 - 1 = 2 147 483 647. So can the keys of a tile,
/// 64 * 4095 * 8191 = 2 146 697 280.
const HEAD_DIM_MAX: usize = 128;
/// What is smaller throughout is zeros: below 1.2e-35 its steps, `STEPS / largest`, would be infinite.
const LARGEST_MIN: f32 = 1e-30;

/// A pair of 16-bit numbers a lane.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Words([i32; PANEL]);

/// A tile of keys and values. Behind the last there are zeros of values, and of keys what was there before.
struct Packed {
    keys: Vec<Words>, // (TILE / PANEL, head_dim / 2), two columns of sixteen keys
    key_scales: [[f32; PANEL]; TILE / PANEL],
    values: Vec<Words>, // (columns / PANEL, TILE / 2), two keys' sixteen columns
    value_scales: Vec<[f32; PANEL]>, // (columns / PANEL)
}

/// Whether a head can be attended to so: every query sees every key, columns are pairs, and their products can be added up.
pub(super) fn takes(head: &Head<'_>) -> bool {
    !head.causal && head.head_dim.is_multiple_of(2) && head.head_dim <= HEAD_DIM_MAX
}

/// `out(row, values)` once for each query of a head that [`takes`] allows.
#[target_feature(enable = "avx512f,avx512vnni,avx2,fma,f16c")]
pub(super) fn attend(head: &Head<'_>, out: &mut dyn FnMut(usize, &[f32])) {
    let mut rounder = Rounder::new(head.head_dim);
    let (mut strips, scales): (Vec<_>, Vec<_>) = (0..head.rows)
        .step_by(STRIP)
        .map(|first| rounder.strip(head, first))
        .unzip();
    let mut packed = Packed::new(head.head_dim);
    for first in (0..head.count).step_by(TILE) {
        packed.fill(head, first, &mut rounder);
        let count = TILE.min(head.count - first);
        for (strip, scales) in strips.iter_mut().zip(&scales) {
            see(strip, scales, &packed, count);
        }
    }
    finish(head, &strips, out);
}

/// Memory to round in.
struct Rounder {
    row: Vec<[f32; PANEL]>,
    tile: Vec<[f32; PANEL]>,        // (TILE, columns / PANEL), of values
    rounded: Vec<[i32; PANEL / 2]>, // pairs
}

impl Rounder {
    fn new(head_dim: usize) -> Self {
        let panels = head_dim.div_ceil(PANEL);
        Self {
            row: vec![[0.0; PANEL]; panels],
            tile: vec![[0.0; PANEL]; panels * TILE],
            rounded: vec![[0; PANEL / 2]; panels],
        }
    }

    /// A row in pairs of columns, and what a step is worth: not a number where one of the row is none.
    #[target_feature(enable = "avx512f,avx2,f16c")]
    fn round(&mut self, rows: &HeadRows<'_>, index: usize, head_dim: usize) -> (&[i32], f32) {
        widen(rows, index, &mut self.row.as_flattened_mut()[..head_dim]);
        let mut sizes = Sizes::new();
        for panel in &self.row {
            sizes.add(load(panel));
        }
        let most = _mm512_reduce_max_ps(sizes.most);
        let large = most >= LARGEST_MIN;
        let inverse = _mm512_set1_ps(if large { STEPS / most } else { 0.0 });
        for (panel, rounded) in self.row.iter().zip(&mut self.rounded) {
            *rounded = narrow(_mm512_cvtps_epi32(_mm512_mul_ps(load(panel), inverse)));
        }
        let pairs = &self.rounded.as_flattened()[..head_dim / 2];
        (pairs, most / STEPS + _mm512_reduce_add_ps(sizes.not_finite))
    }

    /// Six queries, and what a step of each is worth, scaled.
    #[target_feature(enable = "avx512f,avx2,f16c")]
    fn strip(&mut self, head: &Head<'_>, first: usize) -> (Strip<i32>, [f32; STRIP]) {
        let mut strip = Strip::empty(head.head_dim, head.head_dim / 2);
        let mut scales = [0.0; STRIP];
        let queries = HeadRows::F32(head.queries, head.stride);
        for offset in 0..STRIP.min(head.rows - first) {
            let (pairs, step) = self.round(&queries, first + offset, head.head_dim);
            for (place, pair) in strip.queries.iter_mut().zip(pairs) {
                place[offset] = *pair;
            }
            scales[offset] = step * scale(head);
        }
        (strip, scales)
    }
}

/// The largest absolute value of each lane, and NaN where a value was not finite, else 0.
struct Sizes {
    most: __m512,
    not_finite: __m512,
}

impl Sizes {
    #[target_feature(enable = "avx512f")]
    fn new() -> Self {
        Self {
            most: _mm512_setzero_ps(),
            not_finite: _mm512_setzero_ps(),
        }
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn add(&mut self, values: __m512) {
        self.most = _mm512_max_ps(_mm512_abs_ps(values), self.most);
        self.not_finite = _mm512_fmadd_ps(values, _mm512_setzero_ps(), self.not_finite);
    }
}

impl Packed {
    fn new(head_dim: usize) -> Self {
        let panels = head_dim.div_ceil(PANEL);
        Self {
            keys: vec![Words([0; PANEL]); TILE / PANEL * head_dim / 2],
            key_scales: [[0.0; PANEL]; TILE / PANEL],
            values: vec![Words([0; PANEL]); panels * TILE / 2],
            value_scales: vec![[0.0; PANEL]; panels],
        }
    }

    #[target_feature(enable = "avx512f,avx2,f16c")]
    fn fill(&mut self, head: &Head<'_>, first: usize, rounder: &mut Rounder) {
        let count = TILE.min(head.count - first);
        // Of a tile that is not full, keys of the one before lie behind the last; their weight is 0.
        for key in 0..count {
            let (pairs, step) = rounder.round(&head.keys, first + key, head.head_dim);
            let panel = &mut self.keys[key / PANEL * pairs.len()..][..pairs.len()];
            for (place, pair) in panel.iter_mut().zip(pairs) {
                place.0[key % PANEL] = *pair;
            }
            self.key_scales[key / PANEL][key % PANEL] = step;
        }
        let panels = self.value_scales.len();
        let tile = &mut rounder.tile;
        tile[count * panels..].fill([0.0; PANEL]);
        for (key, row) in tile.chunks_exact_mut(panels).take(count).enumerate() {
            let row = &mut row.as_flattened_mut()[..head.head_dim];
            widen(&head.values, first + key, row);
        }
        for (panel, scales) in self.value_scales.iter_mut().enumerate() {
            let words = &mut self.values[panel * TILE / 2..][..TILE / 2];
            *scales = round_columns(|key| load(&tile[key * panels + panel]), words);
        }
    }
}

/// Rounds a panel of columns of a tile of values, in pairs of keys; what a step of each column is worth.
#[target_feature(enable = "avx512f")]
#[inline]
fn round_columns(values: impl Fn(usize) -> __m512, words: &mut [Words]) -> [f32; PANEL] {
    let mut sizes = Sizes::new();
    for key in 0..TILE {
        sizes.add(values(key));
    }
    let large = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(sizes.most, _mm512_set1_ps(LARGEST_MIN));
    let inverse = _mm512_maskz_div_ps(large, _mm512_set1_ps(STEPS), sizes.most);
    for (pair, words) in words.iter_mut().enumerate() {
        let [low, high] = [0, 1].map(|key| {
            let value = _mm512_mul_ps(values(2 * pair + key), inverse);
            _mm512_cvtps_epi32(value)
        });
        let low = _mm512_and_si512(low, _mm512_set1_epi32(0xFFFF));
        let word = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
        // SAFETY: sixteen words, and the store needs no alignment.
        unsafe { _mm512_storeu_si512(words.0.as_mut_ptr().cast(), word) };
    }
    let step = _mm512_div_ps(sizes.most, _mm512_set1_ps(STEPS));
    store(_mm512_add_ps(step, sizes.not_finite))
}

/// Weights become whole numbers of steps, whose sum is returned: of the rounded ones, so that what is mixed is a mean.
#[target_feature(enable = "avx512f")]
fn round_weights(weights: &mut [f32]) -> f32 {
    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    let mut sum = _mm512_setzero_ps();
    for panel in weights.as_chunks_mut().0 {
        let steps = _mm512_mul_ps(load(panel), _mm512_set1_ps(WEIGHT_STEPS));
        let steps = _mm512_roundscale_ps::<NEAREST>(steps);
        *panel = store(steps);
        sum = _mm512_add_ps(sum, steps);
    }
    _mm512_reduce_add_ps(sum)
}

/// Sixteen numbers of 16 bits, two beside each other.
#[target_feature(enable = "avx512f")]
#[inline]
fn narrow(values: __m512i) -> [i32; PANEL / 2] {
    let values = _mm512_cvtepi32_epi16(values);
    let mut pairs = [0; PANEL / 2];
    // SAFETY: eight words, and the store needs no alignment.
    unsafe { _mm256_storeu_si256(pairs.as_mut_ptr().cast(), values) };
    pairs
}

/// Takes in a tile of so many keys.
#[target_feature(enable = "avx512f,avx512vnni,avx2,fma")]
fn see(strip: &mut Strip<i32>, query_scales: &[f32; STRIP], packed: &Packed, count: usize) {
    let mut scores = Scores([[0f32; TILE]; STRIP]);
    let pairs = packed.keys.chunks_exact(PAIR * strip.queries.len());
    for (pair, keys) in pairs.take(count.div_ceil(PAIR * PANEL)).enumerate() {
        let (first, second) = keys.split_at(strip.queries.len());
        let mut sums = [[_mm512_setzero_si512(); PAIR]; STRIP];
        for (queries, keys) in strip.queries.iter().zip(first.iter().zip(second)) {
            let keys = [load_words(keys.0), load_words(keys.1)];
            for (sums, query) in sums.iter_mut().zip(queries) {
                add_product(sums, *query, keys);
            }
        }
        let key_scales = [2 * pair, 2 * pair + 1].map(|panel| load(&packed.key_scales[panel]));
        for (row, sums) in sums.into_iter().enumerate() {
            let places = scores.0[row][pair * PAIR * PANEL..].as_chunks_mut().0;
            for ((place, sum), key_scale) in places.iter_mut().zip(sums).zip(key_scales) {
                let step = _mm512_mul_ps(key_scale, _mm512_set1_ps(query_scales[row]));
                *place = store(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), step));
            }
        }
    }
    let softmax = (
        |scores: &[f32]| largest(scores),
        |scores: &mut [f32], most| {
            weights(scores, most);
            round_weights(scores)
        },
    );
    let width = count.next_multiple_of(PANEL);
    let shrink = strip.weigh(&mut scores.0, [count; STRIP], width, softmax);
    let mut rounded = [[[0; PANEL / 2]; TILE / PANEL]; STRIP];
    for (rounded, weights) in rounded.iter_mut().zip(&scores.0) {
        for (rounded, weights) in rounded.iter_mut().zip(weights[..width].as_chunks().0) {
            *rounded = narrow(_mm512_cvtps_epi32(load(weights)));
        }
    }
    let weighted = |row: usize| (rounded[row].as_flattened(), shrink[row]);
    let values = packed.values.as_chunks::<{ TILE / 2 }>().0;
    let values = values.as_chunks::<PAIR>();
    let scales = packed.value_scales.as_chunks::<PAIR>();
    let mixed = strip.mixed.as_chunks_mut::<STRIP>().0;
    let (pairs, rest) = mixed.as_chunks_mut::<PAIR>();
    for ((mixed, values), scales) in pairs.iter_mut().zip(values.0).zip(scales.0) {
        let values = values.each_ref().map(|panel| &panel[..width / 2]);
        mix(mixed, (values, scales), weighted);
    }
    if let ([mixed], [values], [scales]) = (rest, values.1, scales.1) {
        let mixed = std::array::from_mut(mixed);
        mix(mixed, ([&values[..width / 2]], &[*scales]), weighted);
    }
}

/// Shrinks what has been gathered of W panels of columns, and adds the weighted values of a tile. `weighted`: a query's weights,
/// and what becomes of those so far.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn mix<'a, const W: usize>(
    mixed: &mut [[Line; STRIP]; W],
    (values, scales): ([&[Words]; W], &[[f32; PANEL]; W]),
    weighted: impl Fn(usize) -> (&'a [i32], f32),
) {
    let mut sums = [[_mm512_setzero_si512(); W]; STRIP];
    for pair in 0..values[0].len() {
        let values = values.map(|values| load_words(&values[pair]));
        for (row, sums) in sums.iter_mut().enumerate() {
            add_product(sums, weighted(row).0[pair], values);
        }
    }
    for (panel, (mixed, scales)) in mixed.iter_mut().zip(scales).enumerate() {
        let step = load(scales);
        for (row, mixed) in mixed.iter_mut().enumerate() {
            let shrunk = _mm512_mul_ps(load(&mixed.0), _mm512_set1_ps(weighted(row).1));
            let sum = _mm512_cvtepi32_ps(sums[row][panel]);
            *mixed = Line(store(_mm512_fmadd_ps(sum, step, shrunk)));
        }
    }
}

#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn add_product<const W: usize>(sums: &mut [__m512i; W], pair: i32, row: [__m512i; W]) {
    let pair = _mm512_set1_epi32(pair);
    for (sum, row) in sums.iter_mut().zip(row) {
        *sum = _mm512_dpwssd_epi32(*sum, row, pair);
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_words(words: &Words) -> __m512i {
    // SAFETY: sixteen words, and the load needs no alignment.
    unsafe { _mm512_loadu_si512(words.0.as_ptr().cast()) }
}
