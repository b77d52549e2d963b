//! Attention in whole numbers with AVX2: `vpmaddwd` multiplies two pairs of 16 bits a lane where an instruction of f32 multiplies one, and
//! an addition follows; on Zen 3 that is three fifths of the time. A head's keys and values are rounded once, queries and keys row by
//! row, values column by column. A strip of queries sees all keys before its softmax, so that weights are rounded as finely as their sum
//! allows; sums of products are exact.
//!
//! Keys come in groups of 16. Weights leave their registers two by two with `vpackssdw`, which puts pairs of neighbours into an order
//! of its own; values lie in the same order.

use std::arch::x86_64::*;
use std::cell::Cell;

use super::{LANES, PANEL, STRIP, largest_of, load_f32, powers, scale, total, widen};
use crate::attention::{Head, HeadRows};
use crate::x86_64::{load_words, prefetch, store};

/// Keys of a group: two registers of scores, eight pairs of weights.
const GROUP: usize = 2 * LANES;
/// Steps from 0 to the largest of a row of queries or keys, or of a column of values.
pub(super) const STEPS: f32 = 4095.0;
/// So many columns can be added up: 128 * 4095^2 = 2 146 435 200, and 2^31 - 1 = 2 147 483 647.
const HEAD_DIM_MAX: usize = 128;
/// Steps from 0 to the largest weight, at most: what 16 bits hold.
pub(super) const WEIGHT_STEPS: f32 = 32767.0;
/// Steps of all weights of a query, at most. Rounding may add a half for each key: (520 192 + 8192 / 2) * 4095 = 2 146 959 360, and a sum
/// of f32 may err by a part in 4100 before 2^31 - 1 is passed.
pub(super) const WEIGHTS_STEPS: f32 = 520_192.0;
/// Keys that a query may see, for that.
const KEYS_MAX: usize = 8192;
/// What is smaller throughout is zeros: below 1.2e-35 its steps, `STEPS / largest`, would be infinite.
pub(super) const LARGEST_MIN: f32 = 1e-30;
/// Of 2^r, within 3e-6 of itself: finer than weights are rounded.
pub(super) const TERMS: [f32; 4] = [9.582_786e-3, 5.590_628e-2, 0.240_241, 0.693_124_2];
/// Rows ahead that memory is asked for: they lie pages apart, too far for the processor to ask by itself.
pub(super) const AHEAD_ROWS: usize = 8;

/// A pair of 16-bit numbers a lane.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Words([i32; LANES]);

const ZEROS: Words = Words([0; LANES]);

/// Whether a head can be attended to so: every query sees every key, columns are pairs, and products can be added up.
pub(super) fn takes(head: &Head<'_>) -> bool {
    let added_up =
        (1..=HEAD_DIM_MAX).contains(&head.head_dim) && (1..=KEYS_MAX).contains(&head.count);
    !head.causal && head.head_dim.is_multiple_of(2) && added_up
}

/// Asks for a row of f32.
#[inline]
pub(super) fn prefetch_row(rows: &HeadRows<'_>, index: usize, width: usize) {
    if let HeadRows::F32(data, stride) = rows {
        let row = data.as_ptr().wrapping_add(index * stride);
        prefetch(row.cast(), width * size_of::<f32>());
    }
}

/// Memory that every head of a thread uses again, 0.3 MB for a picture.
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

/// `out(row, values)` once for each query of a head that [`takes`] allows.
#[target_feature(enable = "avx2,fma,f16c")]
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
    rounded: Vec<[i32; LANES]>, // pairs
}

impl Rounder {
    fn resize(&mut self, head_dim: usize) {
        let panels = head_dim.div_ceil(PANEL);
        self.row.resize(panels, [0.0; PANEL]);
        self.row.as_flattened_mut()[head_dim..].fill(0.0);
        self.rounded.resize(panels, [0; LANES]);
    }

    /// A row in pairs of columns, and what a step is worth: not a number where one of the row is none.
    #[target_feature(enable = "avx2,fma,f16c")]
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
        for eight in row.as_flattened().as_chunks().0 {
            sizes.add(load_f32(eight));
        }
        let most = largest_of(sizes.most);
        let large = most >= LARGEST_MIN;
        let inverse = _mm256_set1_ps(if large { STEPS / most } else { 0.0 });
        for (panel, rounded) in row.iter().zip(&mut self.rounded) {
            let [low, high] = [panel.first_chunk(), panel.last_chunk()];
            let whole = |eight: Option<&[f32; LANES]>| {
                let eight = load_f32(eight.expect("half of a panel"));
                _mm256_cvtps_epi32(_mm256_mul_ps(eight, inverse))
            };
            let packed = _mm256_packs_epi32(whole(low), whole(high));
            // Quarters come out in turns.
            let pairs = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
            *rounded = store_words(pairs);
        }
        let pairs = &self.rounded.as_flattened()[..head_dim / 2];
        (pairs, most / STEPS + total(sizes.not_finite))
    }
}

/// The largest absolute value of each lane, and NaN where a value was not finite, else 0.
struct Sizes {
    most: __m256,
    not_finite: __m256,
}

impl Sizes {
    #[target_feature(enable = "avx2")]
    fn new() -> Self {
        Self {
            most: _mm256_setzero_ps(),
            not_finite: _mm256_setzero_ps(),
        }
    }

    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn add(&mut self, values: __m256) {
        let size = _mm256_andnot_ps(_mm256_set1_ps(-0.0), values);
        self.most = _mm256_max_ps(size, self.most);
        self.not_finite = _mm256_fmadd_ps(values, _mm256_setzero_ps(), self.not_finite);
    }
}

/// A head's keys, and behind the last in its group what was there before: nobody asks for its scores.
#[derive(Default)]
struct Keys {
    words: Vec<[Words; 2]>, // (keys / GROUP, head_dim / 2): two columns of 16 keys
    steps: Vec<[[f32; LANES]; 2]>, // (keys / GROUP): what a step of each key is worth
}

impl Keys {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn fill(&mut self, head: &Head<'_>, rounder: &mut Rounder) {
        let (groups, columns) = (head.count.div_ceil(GROUP), head.head_dim / 2);
        self.words.resize(groups * columns, [ZEROS; 2]);
        self.steps.resize(groups, [[0.0; LANES]; 2]);
        for key in 0..head.count {
            let (pairs, step) = rounder.round(&head.keys, key, head.head_dim);
            let (group, half, lane) = (key / GROUP, key / LANES % 2, key % LANES);
            let places = &mut self.words[group * columns..][..columns];
            for (place, pair) in places.iter_mut().zip(pairs) {
                place[half].0[lane] = *pair;
            }
            self.steps[group][half][lane] = step;
        }
    }
}

/// A head's values, zeros behind the last.
#[derive(Default)]
struct Values {
    rows: Vec<[f32; LANES]>, // (keys, columns / LANES): as they were
    /// (columns / LANES, keys / GROUP): two keys' eight columns, in the order of [`packed_key`].
    words: Vec<[Words; GROUP / 2]>,
    steps: Vec<[f32; LANES]>, // (columns / LANES): what a step of each column is worth
}

impl Values {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn fill(&mut self, head: &Head<'_>) {
        let (panels, groups) = (head.head_dim.div_ceil(LANES), head.count.div_ceil(GROUP));
        self.rows.resize(panels * GROUP * groups, [0.0; LANES]);
        let (rows, behind) = self.rows.split_at_mut(panels * head.count);
        for (key, row) in rows.chunks_exact_mut(panels).enumerate() {
            prefetch_row(&head.values, key + AHEAD_ROWS, head.head_dim);
            let (row, behind) = row.as_flattened_mut().split_at_mut(head.head_dim);
            widen(&head.values, key, row);
            behind.fill(0.0);
        }
        behind.fill([0.0; LANES]);
        self.words.resize(panels * groups, [ZEROS; GROUP / 2]);
        self.steps.resize(panels, [0.0; LANES]);
        let columns = self.words.chunks_exact_mut(groups).zip(&mut self.steps);
        for (panel, (words, steps)) in columns.enumerate() {
            *steps = round_columns(|key| load_f32(&self.rows[key * panels + panel]), words);
        }
    }
}

/// The first key of pair `pair` of a group, in the order in which `vpackssdw` leaves two registers of so many lanes: of each four lanes
/// of both two pairs of the first, then two of the second.
pub(super) fn packed_key(pair: usize, lanes: usize) -> usize {
    4 * (pair / 4) + lanes * (pair / 2 % 2) + 2 * (pair % 2)
}

/// Rounds eight columns, in pairs of keys; what a step of each column is worth.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn round_columns(
    values: impl Fn(usize) -> __m256,
    groups: &mut [[Words; GROUP / 2]],
) -> [f32; LANES] {
    let mut sizes = Sizes::new();
    for key in 0..GROUP * groups.len() {
        sizes.add(values(key));
    }
    let large = _mm256_cmp_ps::<_CMP_GE_OQ>(sizes.most, _mm256_set1_ps(LARGEST_MIN));
    let inverse = _mm256_and_ps(large, _mm256_div_ps(_mm256_set1_ps(STEPS), sizes.most));
    for (group, words) in groups.iter_mut().enumerate() {
        for (pair, words) in words.iter_mut().enumerate() {
            let first = GROUP * group + packed_key(pair, LANES);
            let whole = |key: usize| _mm256_cvtps_epi32(_mm256_mul_ps(values(key), inverse));
            let low = _mm256_and_si256(whole(first), _mm256_set1_epi32(0xFFFF));
            let high = _mm256_slli_epi32::<16>(whole(first + 1));
            words.0 = store_words(_mm256_or_si256(low, high));
        }
    }
    let step = _mm256_div_ps(sizes.most, _mm256_set1_ps(STEPS));
    store(_mm256_add_ps(step, sizes.not_finite))
}

/// Some queries, and what becomes of them.
#[derive(Default)]
struct Strip {
    queries: Vec<[i32; STRIP]>, // (head_dim / 2): pairs of columns
    steps: [f32; STRIP],        // what a step of each query is worth, scaled
    /// (keys / GROUP): scores, then in the first half of their place weights, pairs of keys in the order of [`packed_key`].
    scores: Vec<[Scores; STRIP]>,
    sums: [f32; STRIP],       // of weights
    mixed: Vec<[f32; LANES]>, // (STRIP, columns / LANES)
}

/// Scores of a group, in steps of the query: infinite where a key is beyond 6e32, and what comes of them is not a number.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Scores([[f32; LANES]; 2]);

impl Strip {
    fn resize(&mut self, head: &Head<'_>) {
        self.queries.resize(head.head_dim / 2, [0; STRIP]);
        let scores = [Scores([[0.0; LANES]; 2]); STRIP];
        self.scores.resize(head.count.div_ceil(GROUP), scores);
        let panels = head.head_dim.div_ceil(LANES);
        self.mixed.resize(STRIP * panels, [0.0; LANES]);
    }

    /// Takes up queries; of the last strip, which may have fewer, those of the one before stay, and nobody asks for them.
    #[target_feature(enable = "avx2,fma,f16c")]
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
    #[target_feature(enable = "avx2")]
    fn see(&mut self, keys: &Keys) {
        let groups = keys.words.chunks_exact(self.queries.len()).zip(&keys.steps);
        for (scores, (words, steps)) in self.scores.iter_mut().zip(groups) {
            let mut sums = [[_mm256_setzero_si256(); 2]; STRIP];
            for (queries, keys) in self.queries.iter().zip(words) {
                add_products(&mut sums, queries, [&keys[0], &keys[1]]);
            }
            for (scores, sums) in scores.iter_mut().zip(sums) {
                for half in 0..2 {
                    let sum = _mm256_cvtepi32_ps(sums[half]);
                    scores.0[half] = store(_mm256_mul_ps(sum, load_f32(&steps[half])));
                }
            }
        }
    }

    /// Softmax of the first `count` scores, up to a division by the sum of the rounded weights, so that what is mixed is a mean.
    #[target_feature(enable = "avx2,fma")]
    fn weigh(&mut self, count: usize) {
        let (lanes, all) = (Lanes::new(count), Lanes::all());
        for row in 0..STRIP {
            let (last, whole) = self.scores.split_last_mut().expect("there are keys");
            let nothing = _mm256_set1_ps(f32::NEG_INFINITY);
            let mut most = nothing;
            for scores in whole.iter() {
                let [low, high] = scores[row].load();
                most = _mm256_max_ps(most, _mm256_max_ps(low, high));
            }
            for (scores, lanes) in last[row].load().into_iter().zip(lanes.0) {
                most = _mm256_max_ps(most, _mm256_blendv_ps(nothing, scores, lanes));
            }
            let mut softmax = Softmax {
                most: _mm256_set1_ps(largest_of(most)),
                step: _mm256_set1_ps(self.steps[row]),
                sum: _mm256_setzero_ps(),
            };
            for scores in whole {
                softmax.take(&mut scores[row], &all);
            }
            softmax.take(&mut last[row], &lanes);
            let sum = total(softmax.sum);
            let whole_sum = self.round_weights(row, (WEIGHTS_STEPS / sum).min(WEIGHT_STEPS));
            self.sums[row] = if sum.is_nan() { sum } else { whole_sum };
        }
    }

    /// Rounds a query's weights to steps of which one weight of 1 has so many; their sum.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn round_weights(&mut self, row: usize, steps: f32) -> f32 {
        let steps = _mm256_set1_ps(steps);
        let mut sum = _mm256_setzero_si256();
        for scores in &mut self.scores {
            let [low, high] = scores[row].load();
            let low = _mm256_cvtps_epi32(_mm256_mul_ps(low, steps));
            let high = _mm256_cvtps_epi32(_mm256_mul_ps(high, steps));
            sum = _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
            let pairs = _mm256_packs_epi32(low, high);
            scores[row].0[0] = store(_mm256_castsi256_ps(pairs));
        }
        total(_mm256_cvtepi32_ps(sum)) // exact: below 2^24
    }

    /// Means of the values.
    #[target_feature(enable = "avx2")]
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

    /// The same of W times eight columns.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn mix_panels<const W: usize>(
        &mut self,
        values: &Values,
        first: usize,
        words: [&[[Words; GROUP / 2]]; W],
    ) {
        let mut sums = [[_mm256_setzero_si256(); W]; STRIP];
        for (group, scores) in self.scores.iter().enumerate() {
            let words = words.map(|words| &words[group]);
            for pair in 0..GROUP / 2 {
                let mut weights = [0; STRIP];
                for (weight, row) in weights.iter_mut().zip(scores) {
                    *weight = row.0[0][pair].to_bits().cast_signed();
                }
                add_products(&mut sums, &weights, words.map(|words| &words[pair]));
            }
        }
        let panels = values.steps.len();
        for (row, sums) in sums.into_iter().enumerate() {
            let inverse = _mm256_set1_ps(1.0 / self.sums[row]);
            for (panel, sum) in sums.into_iter().enumerate() {
                let step = _mm256_mul_ps(inverse, load_f32(&values.steps[first + panel]));
                self.mixed[row * panels + first + panel] =
                    store(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), step));
            }
        }
    }
}

impl Scores {
    #[target_feature(enable = "avx2")]
    #[inline]
    fn load(&self) -> [__m256; 2] {
        [load_f32(&self.0[0]), load_f32(&self.0[1])]
    }
}

/// Which lanes of a group are keys: all bits of them, none of others.
struct Lanes([__m256; 2]);

impl Lanes {
    /// Of the last group of so many keys.
    #[target_feature(enable = "avx2")]
    fn new(count: usize) -> Self {
        let keys = _mm256_set1_epi32(((count - 1) % GROUP + 1) as i32);
        let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let high = _mm256_add_epi32(lane, _mm256_set1_epi32(LANES as i32));
        let [low, high] = [
            _mm256_cmpgt_epi32(keys, lane),
            _mm256_cmpgt_epi32(keys, high),
        ];
        Self([_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)])
    }

    /// Of a whole group.
    #[target_feature(enable = "avx2")]
    fn all() -> Self {
        Self([_mm256_castsi256_ps(_mm256_set1_epi32(-1)); 2])
    }
}

/// A query's softmax on its way through the scores: the largest, what a step of them is worth, and the sum of weights so far.
struct Softmax {
    most: __m256,
    step: __m256,
    sum: __m256,
}

impl Softmax {
    /// Makes weights of a group's scores, none of lanes that are no keys.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn take(&mut self, scores: &mut Scores, lanes: &Lanes) {
        for (place, lanes) in scores.0.iter_mut().zip(lanes.0) {
            // Subtracted before they are scaled: two scaled scores may differ by a rounding, and lie above 0.
            let below = _mm256_mul_ps(_mm256_sub_ps(load_f32(place), self.most), self.step);
            let weight = _mm256_and_ps(lanes, powers(&TERMS, below));
            *place = store(weight);
            self.sum = _mm256_add_ps(self.sum, weight);
        }
    }
}

/// Adds to the sums of each query its pair's products with W times eight lanes.
#[target_feature(enable = "avx2")]
#[inline]
fn add_products<const W: usize>(
    sums: &mut [[__m256i; W]; STRIP],
    pairs: &[i32; STRIP],
    words: [&Words; W],
) {
    let mut row = [_mm256_setzero_si256(); W];
    for (row, words) in row.iter_mut().zip(words) {
        *row = load_words(&words.0);
    }
    for (sums, pair) in sums.iter_mut().zip(pairs) {
        let pair = _mm256_set1_epi32(*pair);
        for (sum, row) in sums.iter_mut().zip(row) {
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(row, pair));
        }
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store_words(words: __m256i) -> [i32; LANES] {
    let mut out = [0; LANES];
    // SAFETY: eight words, and the store needs no alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), words) };
    out
}
