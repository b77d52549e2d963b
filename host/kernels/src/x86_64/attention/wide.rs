//! Attention of many queries with AVX-512: AVX2's tiles and strips, two panels at a time, each in one register.

mod rounded;

use std::arch::x86_64::*;

use super::rounded::takes;
use super::{Line, PANEL, Packed, STRIP, Scores, Strip, TILE, many};
use crate::attention::{Head, Way};
use crate::x86_64::Avx512;
use crate::x86_64::exp2::{LEAST, TERMS};
use crate::x86_64::wide::{exp2_of, load, round, store};

/// Panels taken together: 6 x 2 registers of sums, as many as two units of four cycles take and half as many again.
const PAIR: usize = 2;

impl Avx512 {
    /// `out(row, values)` once for each query.
    pub(crate) fn attend(self, head: &Head<'_>, out: &mut dyn FnMut(usize, &[f32])) {
        if head.way == Way::Rounded && takes(head) {
            // SAFETY: `self` exists, so `detect` saw the features.
            unsafe { rounded::attend(head, out) };
        } else {
            let see = |strip: &mut Strip, packed: &Packed, visible| {
                // SAFETY: `self` exists, so `detect` saw the features.
                unsafe { see(strip, (head.head_dim, packed), visible) };
            };
            // SAFETY: as above.
            unsafe { many(head, see, out) };
        }
    }
}

/// Takes in a tile, of which each query sees the first few keys.
#[target_feature(enable = "avx512f,avx2,fma")]
fn see(strip: &mut Strip, (head_dim, packed): (usize, &Packed), visible: [usize; STRIP]) {
    let seen = visible.into_iter().fold(0, usize::max);
    let mut scores = Scores([[0f32; TILE]; STRIP]);
    let pairs = packed.keys.chunks_exact(PAIR * head_dim);
    for (pair, keys) in pairs.take(seen.div_ceil(PAIR * PANEL)).enumerate() {
        let (first, second) = keys.split_at(head_dim);
        let mut sums = [[_mm512_setzero_ps(); PAIR]; STRIP];
        for (queries, keys) in strip.queries.iter().zip(first.iter().zip(second)) {
            let keys = [load(&keys.0.0), load(&keys.1.0)];
            for (sums, query) in sums.iter_mut().zip(queries) {
                add_product(sums, *query, keys);
            }
        }
        for (scores, sums) in scores.0.iter_mut().zip(sums) {
            let places = scores[pair * PAIR * PANEL..].as_chunks_mut().0;
            for (place, sum) in places.iter_mut().zip(sums) {
                *place = store(sum);
            }
        }
    }
    let softmax = (
        |scores: &[f32]| largest(scores),
        |scores: &mut [f32], most| weights(scores, most),
    );
    let width = seen.next_multiple_of(PANEL);
    let shrink = strip.weigh(&mut scores.0, visible, width, softmax);
    let gathered = |row: usize| (&scores.0[row], shrink[row]);
    let values = packed.values.as_chunks::<TILE>().0.as_chunks::<PAIR>();
    let mixed = strip.mixed.as_chunks_mut::<STRIP>().0;
    let (pairs, rest) = mixed.as_chunks_mut::<PAIR>();
    for (mixed, values) in pairs.iter_mut().zip(values.0) {
        mix(
            mixed,
            values.each_ref().map(|panel| &panel[..seen]),
            gathered,
        );
    }
    if let ([mixed], [values]) = (rest, values.1) {
        mix(std::array::from_mut(mixed), [&values[..seen]], gathered);
    }
}

/// Shrinks what has been gathered of W panels of columns, and adds the weighted values of a tile. `weighted`: a query's weights, and
/// what becomes of those so far.
#[target_feature(enable = "avx512f")]
#[inline]
fn mix<'a, const W: usize>(
    mixed: &mut [[Line; STRIP]; W],
    values: [&[Line]; W],
    weighted: impl Fn(usize) -> (&'a [f32; TILE], f32),
) {
    let mut sums = [[_mm512_setzero_ps(); W]; STRIP];
    for (row, sums) in sums.iter_mut().enumerate() {
        let shrink = _mm512_set1_ps(weighted(row).1);
        for (sum, mixed) in sums.iter_mut().zip(mixed.iter()) {
            *sum = _mm512_mul_ps(load(&mixed[row].0), shrink);
        }
    }
    for key in 0..values[0].len().min(TILE) {
        let values = values.map(|values| load(&values[key].0));
        for (row, sums) in sums.iter_mut().enumerate() {
            add_product(sums, weighted(row).0[key], values);
        }
    }
    for (row, sums) in sums.into_iter().enumerate() {
        for (mixed, sum) in mixed.iter_mut().zip(sums) {
            mixed[row] = Line(store(sum));
        }
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn add_product<const W: usize>(sums: &mut [__m512; W], value: f32, row: [__m512; W]) {
    let value = _mm512_set1_ps(value);
    for (sum, row) in sums.iter_mut().zip(row) {
        *sum = _mm512_fmadd_ps(value, row, *sum);
    }
}

/// The largest of whole panels of scores; which, when one is NaN, does not matter.
#[target_feature(enable = "avx512f")]
fn largest(scores: &[f32]) -> f32 {
    let mut most = _mm512_set1_ps(f32::NEG_INFINITY);
    for panel in scores.as_chunks().0 {
        most = _mm512_max_ps(most, load(panel));
    }
    _mm512_reduce_max_ps(most)
}

/// Whole panels of scores become `2^(score - most)`, whose sum is returned.
#[target_feature(enable = "avx512f")]
fn weights(scores: &mut [f32], most: f32) -> f32 {
    let mut sum = _mm512_setzero_ps();
    for panel in scores.as_chunks_mut().0 {
        let weight = exp2(_mm512_sub_ps(load(panel), _mm512_set1_ps(most)));
        *panel = store(weight);
        sum = _mm512_add_ps(sum, weight);
    }
    _mm512_reduce_add_ps(sum)
}

/// As AVX2's.
#[target_feature(enable = "avx512f")]
#[inline]
fn exp2(x: __m512) -> __m512 {
    let least = _mm512_set1_ps(LEAST);
    let seen = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, least);
    let x = _mm512_max_ps(least, x); // the second operand when either is NaN
    let n = round(x);
    _mm512_maskz_mov_ps(seen, exp2_of(&TERMS, n, _mm512_sub_ps(x, n)))
}
