//! AVX2's attention in whole numbers with AVX-512 VNNI: one `vpdpwssd` multiplies two pairs of 16 bits a lane and adds them up.
//!
//! Keys come in groups of 32. Weights leave their registers two by two with `vpackssdw`, which puts pairs of neighbours into an order
//! of its own; values lie in the same order.

use std::arch::x86_64::*;
use std::cell::Cell;

use crate::attention::{Head, HeadRows};
use crate::x86_64::attention::rounded::{
    AHEAD_ROWS, LARGEST_MIN, STEPS, TERMS, WEIGHT_STEPS, WEIGHTS_STEPS, packed_key, prefetch_row,
};
use crate::x86_64::attention::{PANEL, scale, widen};
use crate::x86_64::exp2::LEAST;
use crate::x86_64::wide::{exp2_of, load, round, store};

/// Queries taken together: with 2 registers of sums each, 2 of keys or values, and 1 of a query.
const STRIP: usize = 12;
/// Keys of a group: two registers of scores, sixteen pairs of weights.
const GROUP: usize = 2 * PANEL;

/// A pair of 16-bit numbers a lane.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Words([i32; PANEL]);

const ZEROS: Words = Words([0; PANEL]);

/// Memory that every head of a thread uses again, 0.35 MB for a picture: the C library would give so much back after each, and interrupt
/// the other cores for it.
#[derive(Default)]
struct Memory {
    rounder: Rounder,
    keys: Keys,
    values: Values,
    strip: Strip,
}

thread_local! {
    static MEMORY: Cell<Memory> = Cell::default();
}

/// `out(row, values)` once for each query of a head that AVX2's takes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
pub(super) fn attend(head: &Head<'_>, out: &mut dyn FnMut(usize, &[f32])) {
    let mut memory = MEMORY.take();
    let Memory {
        rounder,
        keys,
        values,
        strip,
    } = &mut memory;
    rounder.resize(head.head_dim);
    keys.fill(head, rounder);
    values.fill(head);
    strip.resize(head);
    for first in (0..head.rows).step_by(STRIP) {
        strip.fill(head, first, rounder);
        strip.see(keys);
        strip.weigh(head.count);
        strip.mix(values);
        let rows = first..head.rows.min(first + STRIP);
        for (row, mixed) in rows.zip(strip.mixed.chunks_exact(values.steps.len())) {
            out(row, &mixed.as_flattened()[..head.head_dim]);
        }
    }
    MEMORY.set(memory);
}

/// Memory to round a row in.
#[derive(Default)]
struct Rounder {
    row: Vec<[f32; PANEL]>,
    rounded: Vec<[i32; PANEL / 2]>, // pairs
}

impl Rounder {
    fn resize(&mut self, head_dim: usize) {
        let panels = head_dim.div_ceil(PANEL);
        self.row.resize(panels, [0.0; PANEL]);
        self.row.as_flattened_mut()[head_dim..].fill(0.0);
        self.rounded.resize(panels, [0; PANEL / 2]);
    }

    /// A row in pairs of columns, and what a step is worth: not a number where one of the row is none.
    #[target_feature(enable = "avx512f,avx2,f16c")]
    fn round(&mut self, rows: &HeadRows<'_>, index: usize, head_dim: usize) -> (&[i32], f32) {
        prefetch_row(rows, index + AHEAD_ROWS, head_dim);
        let row = match rows {
            HeadRows::F32(data, stride) if head_dim.is_multiple_of(PANEL) => {
                data[index * stride..][..head_dim].as_chunks().0
            }
            _ => {
                widen(rows, index, &mut self.row.as_flattened_mut()[..head_dim]);
                &self.row
            }
        };
        let mut sizes = Sizes::new();
        for panel in row {
            sizes.add(load(panel));
        }
        let most = _mm512_reduce_max_ps(sizes.most);
        let large = most >= LARGEST_MIN;
        let inverse = _mm512_set1_ps(if large { STEPS / most } else { 0.0 });
        for (panel, rounded) in row.iter().zip(&mut self.rounded) {
            let whole = _mm512_cvtps_epi32(_mm512_mul_ps(load(panel), inverse));
            let whole = _mm512_cvtepi32_epi16(whole);
            // SAFETY: eight words, and the store needs no alignment.
            unsafe { _mm256_storeu_si256(rounded.as_mut_ptr().cast(), whole) };
        }
        let pairs = &self.rounded.as_flattened()[..head_dim / 2];
        (pairs, most / STEPS + _mm512_reduce_add_ps(sizes.not_finite))
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

/// A head's keys, and behind the last in its group what was there before: nobody asks for its scores.
#[derive(Default)]
struct Keys {
    words: Vec<[Words; 2]>, // (keys / GROUP, head_dim / 2): two columns of 32 keys
    steps: Vec<[[f32; PANEL]; 2]>, // (keys / GROUP): what a step of each key is worth
}

impl Keys {
    #[target_feature(enable = "avx512f,avx2,f16c")]
    fn fill(&mut self, head: &Head<'_>, rounder: &mut Rounder) {
        let (groups, columns) = (head.count.div_ceil(GROUP), head.head_dim / 2);
        self.words.resize(groups * columns, [ZEROS; 2]);
        self.steps.resize(groups, [[0.0; PANEL]; 2]);
        for key in 0..head.count {
            let (pairs, step) = rounder.round(&head.keys, key, head.head_dim);
            let (group, panel, lane) = (key / GROUP, key / PANEL % 2, key % PANEL);
            let places = &mut self.words[group * columns..][..columns];
            for (place, pair) in places.iter_mut().zip(pairs) {
                place[panel].0[lane] = *pair;
            }
            self.steps[group][panel][lane] = step;
        }
    }
}

/// A head's values, zeros behind the last.
#[derive(Default)]
struct Values {
    rows: Vec<[f32; PANEL]>, // (keys, columns / PANEL): as they were
    /// (columns / PANEL, keys / GROUP): two keys' sixteen columns, in the order of [`packed_key`].
    words: Vec<[Words; GROUP / 2]>,
    steps: Vec<[f32; PANEL]>, // (columns / PANEL): what a step of each column is worth
}

impl Values {
    #[target_feature(enable = "avx512f,avx2,f16c")]
    fn fill(&mut self, head: &Head<'_>) {
        let (panels, groups) = (head.head_dim.div_ceil(PANEL), head.count.div_ceil(GROUP));
        self.rows.resize(panels * GROUP * groups, [0.0; PANEL]);
        let (rows, behind) = self.rows.split_at_mut(panels * head.count);
        for (key, row) in rows.chunks_exact_mut(panels).enumerate() {
            prefetch_row(&head.values, key + AHEAD_ROWS, head.head_dim);
            let (row, behind) = row.as_flattened_mut().split_at_mut(head.head_dim);
            widen(&head.values, key, row);
            behind.fill(0.0);
        }
        behind.fill([0.0; PANEL]);
        self.words.resize(panels * groups, [ZEROS; GROUP / 2]);
        self.steps.resize(panels, [0.0; PANEL]);
        let columns = self.words.chunks_exact_mut(groups).zip(&mut self.steps);
        for (panel, (words, steps)) in columns.enumerate() {
            *steps = round_columns(|key| load(&self.rows[key * panels + panel]), words);
        }
    }
}

/// Rounds a panel of columns, in pairs of keys; what a step of each column is worth.
#[target_feature(enable = "avx512f")]
#[inline]
fn round_columns(
    values: impl Fn(usize) -> __m512,
    groups: &mut [[Words; GROUP / 2]],
) -> [f32; PANEL] {
    let mut sizes = Sizes::new();
    for key in 0..GROUP * groups.len() {
        sizes.add(values(key));
    }
    let large = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(sizes.most, _mm512_set1_ps(LARGEST_MIN));
    let inverse = _mm512_maskz_div_ps(large, _mm512_set1_ps(STEPS), sizes.most);
    for (group, words) in groups.iter_mut().enumerate() {
        for (pair, words) in words.iter_mut().enumerate() {
            let first = GROUP * group + packed_key(pair, PANEL);
            let [low, high] = [first, first + 1].map(|key| {
                let value = _mm512_mul_ps(values(key), inverse);
                _mm512_cvtps_epi32(value)
            });
            let low = _mm512_and_si512(low, _mm512_set1_epi32(0xFFFF));
            let word = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
            // SAFETY: sixteen words, and the store needs no alignment.
            unsafe { _mm512_storeu_si512(words.0.as_mut_ptr().cast(), word) };
        }
    }
    let step = _mm512_div_ps(sizes.most, _mm512_set1_ps(STEPS));
    store(_mm512_add_ps(step, sizes.not_finite))
}

/// Some queries, and what becomes of them.
#[derive(Default)]
struct Strip {
    queries: Vec<[i32; STRIP]>, // (head_dim / 2): pairs of columns
    steps: [f32; STRIP],        // what a step of each query is worth, scaled
    /// (keys / GROUP): scores, then in the first half of their place weights, pairs of keys in the order of [`packed_key`].
    scores: Vec<[Scores; STRIP]>,
    sums: [f32; STRIP],       // of weights
    mixed: Vec<[f32; PANEL]>, // (STRIP, columns / PANEL)
}

/// Scores of a group, in steps of the query: infinite where a key is beyond 6e32, and what comes of them is not a number.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Scores([[f32; PANEL]; 2]);

impl Strip {
    fn resize(&mut self, head: &Head<'_>) {
        self.queries.resize(head.head_dim / 2, [0; STRIP]);
        let scores = [Scores([[0.0; PANEL]; 2]); STRIP];
        self.scores.resize(head.count.div_ceil(GROUP), scores);
        let panels = head.head_dim.div_ceil(PANEL);
        self.mixed.resize(STRIP * panels, [0.0; PANEL]);
    }

    /// Takes up queries; of the last strip, which may have fewer, those of the one before stay, and nobody asks for them.
    #[target_feature(enable = "avx512f,avx2,f16c")]
    fn fill(&mut self, head: &Head<'_>, first: usize, rounder: &mut Rounder) {
        let queries = HeadRows::F32(head.queries, head.stride);
        for offset in 0..STRIP.min(head.rows - first) {
            let (pairs, step) = rounder.round(&queries, first + offset, head.head_dim);
            for (place, pair) in self.queries.iter_mut().zip(pairs) {
                place[offset] = *pair;
            }
            self.steps[offset] = step * scale(head);
        }
    }

    /// Scores of all keys.
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn see(&mut self, keys: &Keys) {
        let groups = keys.words.chunks_exact(self.queries.len()).zip(&keys.steps);
        for (scores, (words, steps)) in self.scores.iter_mut().zip(groups) {
            let mut sums = [[_mm512_setzero_si512(); 2]; STRIP];
            for (queries, keys) in self.queries.iter().zip(words) {
                add_products(
                    &mut sums,
                    queries,
                    keys.each_ref().map(|words| load_words(words)),
                );
            }
            let steps = steps.each_ref().map(|panel| load(panel));
            for (scores, sums) in scores.iter_mut().zip(sums) {
                for panel in 0..2 {
                    let sum = _mm512_cvtepi32_ps(sums[panel]);
                    scores.0[panel] = store(_mm512_mul_ps(sum, steps[panel]));
                }
            }
        }
    }

    /// Softmax of the first `count` scores, up to a division by the sum of the rounded weights, so that what is mixed is a mean.
    #[target_feature(enable = "avx512f,avx512bw")]
    fn weigh(&mut self, count: usize) {
        // Of the last group's lanes those that are keys.
        let lanes = u32::MAX >> (GROUP - 1 - (count - 1) % GROUP);
        let lanes = [lanes as __mmask16, (lanes >> PANEL) as __mmask16];
        for row in 0..STRIP {
            let (last, whole) = self.scores.split_last_mut().expect("there are keys");
            let nothing = _mm512_set1_ps(f32::NEG_INFINITY);
            let mut most = nothing;
            for scores in whole.iter() {
                let scores = scores[row].0.each_ref().map(|panel| load(panel));
                most = _mm512_max_ps(most, _mm512_max_ps(scores[0], scores[1]));
            }
            for (scores, lanes) in last[row].0.iter().zip(lanes) {
                most = _mm512_max_ps(most, _mm512_mask_mov_ps(nothing, lanes, load(scores)));
            }
            let mut softmax = Softmax {
                most: _mm512_set1_ps(_mm512_reduce_max_ps(most)),
                step: _mm512_set1_ps(self.steps[row]),
                sum: _mm512_setzero_ps(),
            };
            for scores in whole {
                softmax.take(&mut scores[row], [__mmask16::MAX; 2]);
            }
            softmax.take(&mut last[row], lanes);
            let sum = _mm512_reduce_add_ps(softmax.sum);
            let whole_sum = self.round_weights(row, (WEIGHTS_STEPS / sum).min(WEIGHT_STEPS));
            self.sums[row] = if sum.is_nan() { sum } else { whole_sum };
        }
    }

    /// Rounds a query's weights to steps of which one weight of 1 has so many; their sum.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    fn round_weights(&mut self, row: usize, steps: f32) -> f32 {
        let steps = _mm512_set1_ps(steps);
        let mut sum = _mm512_setzero_si512();
        for scores in &mut self.scores {
            let [low, high] = scores[row].0.each_ref().map(|weights| {
                let weights = _mm512_mul_ps(load(weights), steps);
                _mm512_cvtps_epi32(weights)
            });
            sum = _mm512_add_epi32(sum, _mm512_add_epi32(low, high));
            let pairs = _mm512_packs_epi32(low, high);
            scores[row].0[0] = store(_mm512_castsi512_ps(pairs));
        }
        _mm512_reduce_add_epi32(sum) as f32
    }

    /// Means of the values.
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn mix(&mut self, values: &Values) {
        let groups = self.scores.len();
        for (index, words) in values.words.chunks(2 * groups).enumerate() {
            let (first, second) = words.split_at(groups);
            if second.is_empty() {
                self.mix_panels(values, 2 * index, [first]);
            } else {
                self.mix_panels(values, 2 * index, [first, second]);
            }
        }
    }

    /// The same of W panels of columns.
    #[target_feature(enable = "avx512f,avx512vnni")]
    #[inline]
    fn mix_panels<const W: usize>(
        &mut self,
        values: &Values,
        first: usize,
        words: [&[[Words; GROUP / 2]]; W],
    ) {
        let mut sums = [[_mm512_setzero_si512(); W]; STRIP];
        for (group, scores) in self.scores.iter().enumerate() {
            let words = words.map(|words| &words[group]);
            for pair in 0..GROUP / 2 {
                let weights = scores
                    .each_ref()
                    .map(|row| row.0[0][pair].to_bits().cast_signed());
                add_products(
                    &mut sums,
                    &weights,
                    words.map(|words| load_words(&words[pair])),
                );
            }
        }
        let panels = values.steps.len();
        for (row, sums) in sums.into_iter().enumerate() {
            let inverse = _mm512_set1_ps(1.0 / self.sums[row]);
            for (panel, sum) in sums.into_iter().enumerate() {
                let step = _mm512_mul_ps(inverse, load(&values.steps[first + panel]));
                self.mixed[row * panels + first + panel] =
                    store(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), step));
            }
        }
    }
}

/// A query's softmax on its way through the scores: the largest, what a step of them is worth, and the sum of weights so far.
struct Softmax {
    most: __m512,
    step: __m512,
    sum: __m512,
}

impl Softmax {
    /// Makes weights of a group's scores, none of lanes that are no keys.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn take(&mut self, Scores(scores): &mut Scores, lanes: [__mmask16; 2]) {
        for (place, lanes) in scores.iter_mut().zip(lanes) {
            // Subtracted before they are scaled: two scaled scores may differ by a rounding, and lie above 0.
            let below = _mm512_mul_ps(_mm512_sub_ps(load(place), self.most), self.step);
            let weight = _mm512_maskz_mov_ps(lanes, exp2(below));
            *place = store(weight);
            self.sum = _mm512_add_ps(self.sum, weight);
        }
    }
}

/// `2^x` for x up to 0, within 3e-6 of itself, finer than weights are rounded; next to nothing below -126.
#[target_feature(enable = "avx512f")]
#[inline]
fn exp2(x: __m512) -> __m512 {
    let x = _mm512_max_ps(_mm512_set1_ps(LEAST), x); // the second operand when either is NaN
    let n = round(x);
    exp2_of(&TERMS, n, _mm512_sub_ps(x, n))
}

#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn add_products<const W: usize>(
    sums: &mut [[__m512i; W]; STRIP],
    pairs: &[i32; STRIP],
    row: [__m512i; W],
) {
    for (sums, pair) in sums.iter_mut().zip(pairs) {
        let pair = _mm512_set1_epi32(*pair);
        for (sum, row) in sums.iter_mut().zip(row) {
            *sum = _mm512_dpwssd_epi32(*sum, row, pair);
        }
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_words(words: &Words) -> __m512i {
    // SAFETY: sixteen words, and the load needs no alignment.
    unsafe { _mm512_loadu_si512(words.0.as_ptr().cast()) }
}
