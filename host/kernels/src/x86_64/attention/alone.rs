//! Attention of queries that decode, with AVX2: each reads all keys and values by itself, of f16.
//!
//! Several heads go through the cache together, page by page, with a running maximum each; what is read next is asked for long
//! before. At the full shape, keys and values of 757 positions came at 19 GB/s when each head went through all pages by itself and
//! asked 3 KiB ahead, and come at 26 now, of 33 when memory is only read.

use std::arch::x86_64::*;

use half::f16;

use super::{LANES, TILE, largest, load_f16, scale, weights};
use crate::attention::{HalfRows, Head};
use crate::x86_64::{load_f32, prefetch_far, store};

/// Keys whose scores are summed up together.
const FOUR: usize = 4;
/// Rows ahead that memory is asked for, 8 KiB of 96 columns. A processor that reads ahead by itself begins anew in every run.
const AHEAD_ROWS: usize = 42;

/// A query, scaled, and what it has gathered.
struct Gathered {
    query: Vec<f32>, // (head_dim)
    mixed: Vec<f32>, // (head_dim)
    most: f32,
    sum: f32,
}

/// Keys or values of one head in a tile, and where what is read behind them begins.
#[derive(Clone, Copy)]
struct Rows<'a> {
    run: &'a [f16],
    next: &'a [f16],
    count: usize,
    /// Rows ahead that memory is asked for: at most all rows here, so that what is asked for is among those read next.
    ahead: usize,
    stride: usize,
}

/// `out(head, row, values)` once for each query.
///
/// # Panics
/// When pages of keys and values do not have equally many rows.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn attend(
    heads: &[(&Head<'_>, [HalfRows<'_>; 2])],
    out: &mut dyn FnMut(usize, usize, &[f32]),
) {
    let [(head, [keys, _]), ..] = heads else {
        return;
    };
    let (count, page_rows) = (head.count, keys.page_rows);
    let mut parts = heads.iter().flat_map(|(_, parts)| parts);
    assert!(
        parts.all(|part| part.page_rows == page_rows),
        "pages of one length"
    );
    let mut gathered: Vec<Vec<_>> = heads
        .iter()
        .map(|(head, _)| (0..head.rows).map(|row| Gathered::new(head, row)).collect())
        .collect();
    let mut first = 0;
    while first < count {
        let end = count.min(first + TILE.min(page_rows - first % page_rows));
        for (index, (head, parts)) in heads.iter().enumerate() {
            let next = match heads.get(index + 1) {
                Some((_, [keys, _])) => keys.from(first),
                None if end < count => heads[0].1[0].from(end),
                None => &[],
            };
            for (row, gathered) in gathered[index].iter_mut().enumerate() {
                let count = head.visible(row).min(end).saturating_sub(first);
                let [keys, values] = parts.map(|part| part.from(first));
                let [keys, values] =
                    [(keys, values, 0), (values, next, 1)].map(|(run, next, part)| {
                        let stride = parts[part].stride;
                        Rows {
                            run,
                            next,
                            count,
                            ahead: count.min(AHEAD_ROWS),
                            stride,
                        }
                    });
                gathered.take_in(keys, values);
            }
        }
        first = end;
    }
    for (index, gathered) in gathered.iter_mut().enumerate() {
        for (row, gathered) in gathered.iter_mut().enumerate() {
            for value in &mut gathered.mixed {
                *value /= gathered.sum;
            }
            out(index, row, &gathered.mixed);
        }
    }
}

impl Gathered {
    fn new(head: &Head<'_>, row: usize) -> Self {
        let scale = scale(head);
        Self {
            query: head.query(row).iter().map(|value| value * scale).collect(),
            mixed: vec![0.0; head.head_dim],
            most: f32::NEG_INFINITY,
            sum: 0.0,
        }
    }

    /// Takes in a tile, as far as the query sees it.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn take_in(&mut self, keys: Rows<'_>, values: Rows<'_>) {
        let mut scores = [f32::NEG_INFINITY; TILE];
        keys.scores(&self.query, &mut scores);
        let scores = &mut scores[..keys.count.next_multiple_of(LANES)];
        let most = largest(scores).max(self.most);
        if most == f32::NEG_INFINITY && !scores.iter().any(|score| score.is_nan()) {
            return; // nothing that weighs anything yet, whatever its values are
        }
        let shrink = if most == self.most {
            1.0
        } else {
            (self.most - most).exp2()
        };
        self.sum = self.sum * shrink + weights(scores, most);
        self.most = most;
        values.add(&mut self.mixed, shrink, &scores[..values.count]);
    }
}

impl<'a> Rows<'a> {
    #[inline]
    fn row(&self, index: usize, width: usize) -> &'a [f16] {
        &self.run[index * self.stride..][..width]
    }

    /// Asks for columns `first..`, N registers of them, of what is read so many rows behind this one.
    #[inline]
    fn prefetch<const N: usize>(&self, row: usize, first: usize) {
        let ahead = row + self.ahead;
        let (run, row) = if ahead < self.count {
            (self.run, ahead)
        } else {
            (self.next, ahead - self.count)
        };
        let start = run.as_ptr().wrapping_add(row * self.stride + first);
        prefetch_far(start.cast(), N * LANES * size_of::<f16>());
    }

    /// Products of a query with all rows.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn scores(&self, query: &[f32], scores: &mut [f32; TILE]) {
        let fours = scores.as_chunks_mut::<FOUR>().0;
        for (index, scores) in fours.iter_mut().enumerate().take(self.count.div_ceil(FOUR)) {
            let first = FOUR * index;
            let count = FOUR.min(self.count - first);
            let dots = self.dots(first, query);
            scores[..count].copy_from_slice(&dots[..count]);
        }
    }

    /// Products of a query with rows `at..at + 4`; those behind the last row mean nothing.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn dots(&self, at: usize, query: &[f32]) -> [f32; FOUR] {
        let mut rows = [self.row(at, query.len()); FOUR];
        for (index, row) in rows.iter_mut().enumerate().take(self.count - at) {
            *row = self.row(at + index, query.len());
        }
        let mut sums = [_mm256_setzero_ps(); FOUR];
        let first = self.dot_columns::<12>((at, &rows), 0, query, &mut sums);
        let first = self.dot_columns::<4>((at, &rows), first, query, &mut sums);
        let first = self.dot_columns::<1>((at, &rows), first, query, &mut sums);
        let mut dots = totals(sums);
        for (dot, row) in dots.iter_mut().zip(rows) {
            for (query, value) in query[first..].iter().zip(&row[first..]) {
                *dot = value.to_f32().mul_add(*query, *dot);
            }
        }
        dots
    }

    /// Adds to each row's sum what columns `first..` give, N registers of them at a time as long as there are as many; the first
    /// column left.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn dot_columns<const N: usize>(
        &self,
        (at, rows): (usize, &[&[f16]; FOUR]),
        mut first: usize,
        query: &[f32],
        sums: &mut [__m256; FOUR],
    ) -> usize {
        while let Some(query) = query[first..].as_chunks::<LANES>().0.first_chunk::<N>() {
            for row in 0..FOUR {
                self.prefetch::<N>(at + row, first);
                let values: &[_; N] = rows[row][first..]
                    .as_chunks()
                    .0
                    .first_chunk()
                    .expect("a row is as long as the query");
                for register in 0..N {
                    sums[row] = _mm256_fmadd_ps(
                        load_f32(&query[register]),
                        load_f16(&values[register]),
                        sums[row],
                    );
                }
            }
            first += LANES * N;
        }
        first
    }

    /// Shrinks `mixed`, and adds the weighted sum of all rows.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn add(&self, mixed: &mut [f32], shrink: f32, weights: &[f32]) {
        let first = self.add_columns::<12>(mixed, 0, shrink, weights);
        let first = self.add_columns::<4>(mixed, first, shrink, weights);
        let first = self.add_columns::<1>(mixed, first, shrink, weights);
        for (column, mixed) in mixed.iter_mut().enumerate().skip(first) {
            *mixed *= shrink;
            for (row, weight) in weights.iter().enumerate() {
                let value = self.row(row, column + 1)[column].to_f32();
                *mixed = value.mul_add(*weight, *mixed);
            }
        }
    }

    /// As [`Self::add`] of columns `first..`, N registers of them at a time as long as there are as many; the first column left.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn add_columns<const N: usize>(
        &self,
        mixed: &mut [f32],
        mut first: usize,
        shrink: f32,
        weights: &[f32],
    ) -> usize {
        while let Some(mixed) = mixed[first..]
            .as_chunks_mut::<LANES>()
            .0
            .first_chunk_mut::<N>()
        {
            let mut sums = [_mm256_setzero_ps(); N];
            for register in 0..N {
                sums[register] = _mm256_mul_ps(load_f32(&mixed[register]), _mm256_set1_ps(shrink));
            }
            for (index, weight) in weights.iter().enumerate() {
                self.prefetch::<N>(index, first);
                let row = self.row(index, first + LANES * N)[first..].as_chunks().0;
                let row: &[_; N] = row.first_chunk().expect("a row is as long as their sum");
                let weight = _mm256_set1_ps(*weight);
                for register in 0..N {
                    sums[register] =
                        _mm256_fmadd_ps(load_f16(&row[register]), weight, sums[register]);
                }
            }
            for register in 0..N {
                mixed[register] = store(sums[register]);
            }
            first += LANES * N;
        }
        first
    }
}

/// The sum of each register's lanes.
#[target_feature(enable = "avx2")]
#[inline]
fn totals([a, b, c, d]: [__m256; FOUR]) -> [f32; FOUR] {
    let halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    let (low, high) = (
        _mm256_castps256_ps128(halves),
        _mm256_extractf128_ps::<1>(halves),
    );
    let sums = _mm_add_ps(low, high);
    let mut totals = [0.0; FOUR];
    // SAFETY: four values, and the store needs no alignment.
    unsafe { _mm_storeu_ps(totals.as_mut_ptr(), sums) };
    totals
}
