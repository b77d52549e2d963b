//! Softmax attention, head by head or a few heads together, without a matrix of all scores.
//!
//! ```text
//! out = softmax(scale * q k^T) v        a causal query sees the keys up to its own position
//! ```
//!
//! Keys and values are rows of f32 or f16 at any stride, so that a KV cache of either type and a fused projection's output are
//! read where they lie. `attend_naive` is the specification. Queries of a prompt run against a tile of keys at a time
//! with a running maximum (online softmax; Dao et al., FlashAttention, 2022); a query that decodes reads keys and values once, on
//! x86-64 so, too.

#![expect(unsafe_code, reason = "threads write the columns of their heads")]

use half::f16;
use rayon::prelude::*;

use crate::disjoint::Disjoint;
use crate::kernel::Kernel;

/// Head counts, width and visibility of an attention.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    /// Heads of the queries.
    pub heads: usize,
    /// Heads of keys and values; each serves `heads / kv_heads` neighbours.
    pub kv_heads: usize,
    /// Values a head.
    pub head_dim: usize,
    /// Query i sees the keys up to `keys - queries + i`; otherwise all.
    pub causal: bool,
}

/// Heads whose queries go alone through their keys in one task, so that memory is read in longer runs: what a page of 64 positions
/// has of one head are 24 KiB at the full shape, and between pages lie megabytes.
const HEADS_ALONE: usize = 4;

/// How queries go through their keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Each reads all of its keys by itself: decoding. Of f16; f32 may be the same as [`Self::Tiled`].
    Alone,
    /// They share tiles of keys: a prompt.
    Tiled,
    /// In whole numbers of thirteen bits on x86-64, where every query sees every key of at most 8192 and heads have an even number of
    /// columns, at most 128: a picture. The same as [`Self::Tiled`] elsewhere.
    Rounded,
}

/// Rows of one head: row i starts at `i * stride`.
#[derive(Debug, Clone, Copy)]
pub enum HeadRows<'a> {
    /// f32.
    F32(&'a [f32], usize),
    /// IEEE binary16, as a KV cache keeps it.
    F16(HalfRows<'a>),
}

/// Rows of one head in pages of equally many; row i is row `i % page_rows` of page `i / page_rows`.
#[derive(Debug, Clone, Copy)]
pub struct HalfRows<'a> {
    /// What holds the rows, of this head and others.
    pub pages: &'a [&'a [f16]],
    /// Rows a page, of one head.
    pub page_rows: usize,
    /// Where in each page the head's rows begin.
    pub offset: usize,
    /// Values from one row to the next.
    pub stride: usize,
}

impl<'a> HalfRows<'a> {
    /// Row `index`, so many values of it.
    pub(crate) fn row(&self, index: usize, width: usize) -> &'a [f16] {
        &self.from(index)[..width]
    }

    /// Values from row `index` on, of its page.
    pub(crate) fn from(&self, index: usize) -> &'a [f16] {
        let at = self.offset + index % self.page_rows * self.stride;
        &self.pages[index / self.page_rows][at..]
    }

    /// The first `count` rows, page by page: values from the first of a page on, and how many rows.
    #[cfg(target_arch = "aarch64")]
    pub(crate) fn runs(self, count: usize) -> impl Iterator<Item = (&'a [f16], usize)> {
        (0..count).step_by(self.page_rows).map(move |first| {
            let page = &self.pages[first / self.page_rows][self.offset..];
            (page, self.page_rows.min(count - first))
        })
    }

    /// The first rows, from their first value on, each with its weight.
    #[cfg(target_arch = "aarch64")]
    #[inline]
    pub(crate) fn weighted(self, weights: &'a [f32]) -> impl Iterator<Item = (&'a [f16], f32)> {
        let rows = self
            .runs(weights.len())
            .flat_map(move |(run, count)| (0..count).map(move |index| &run[index * self.stride..]));
        rows.zip(weights.iter().copied())
    }
}

impl HeadRows<'_> {
    /// Row `index`, as f32.
    pub(crate) fn widen(&self, index: usize, out: &mut [f32]) {
        let width = out.len();
        match self {
            Self::F32(data, stride) => out.copy_from_slice(&data[index * stride..][..width]),
            Self::F16(half) => {
                for (value, half) in out.iter_mut().zip(half.row(index, width)) {
                    *value = half.to_f32();
                }
            }
        }
    }
}

/// What one attention reads.
pub struct AttentionInput<'a> {
    /// Queries, (rows, stride); head h of a row begins at column `h * head_dim`.
    pub queries: &'a [f32],
    /// Values from one row of queries to the next.
    pub query_stride: usize,
    /// Rows of queries.
    pub rows: usize,
    /// Keys and values seen in all.
    pub keys: usize,
    /// How queries go through their keys. What one gives depends on that, in its last bits or as far as it rounds, and never on the
    /// queries beside it.
    pub way: Way,
    /// Keys and values of a key head.
    pub key_values: &'a (dyn Fn(usize) -> [HeadRows<'a>; 2] + Sync),
}

/// One head's part of an attention.
pub(crate) struct Head<'a> {
    pub(crate) queries: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    pub(crate) keys: HeadRows<'a>,
    pub(crate) values: HeadRows<'a>,
    pub(crate) count: usize,
    pub(crate) head_dim: usize,
    pub(crate) causal: bool,
    pub(crate) way: Way,
}

impl<'a> Head<'a> {
    /// Each with its keys and values, where queries go alone through f16.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn alone<'b>(heads: &'b [Self]) -> Option<Vec<(&'b Self, [HalfRows<'a>; 2])>> {
        let parts = |head: &'b Self| match (head.way, head.keys, head.values) {
            (Way::Alone, HeadRows::F16(keys), HeadRows::F16(values)) => {
                Some((head, [keys, values]))
            }
            _ => None,
        };
        heads.iter().map(parts).collect()
    }

    /// Keys that a query sees.
    pub(crate) fn visible(&self, row: usize) -> usize {
        if self.causal {
            self.count - self.rows + row + 1
        } else {
            self.count
        }
    }

    pub(crate) fn query(&self, row: usize) -> &[f32] {
        &self.queries[row * self.stride..][..self.head_dim]
    }

    pub(crate) fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// Attention of all heads, on all cores: `out` is (rows, heads * head_dim).
///
/// # Panics
/// When slices are shorter than their shape, or fewer keys than queries are causal.
pub fn attend(kernel: Kernel, shape: AttentionShape, input: &AttentionInput<'_>, out: &mut [f32]) {
    let width = shape.heads * shape.head_dim;
    assert_eq!(
        out.len(),
        input.rows * width,
        "one value per row and column"
    );
    assert!(
        !shape.causal || input.keys >= input.rows,
        "a causal query has a key"
    );
    if input.rows == 0 {
        return;
    }
    let group = shape.heads / shape.kv_heads;
    let out = Disjoint::new(out);
    let head = |index: usize| {
        let [keys, values] = (input.key_values)(index / group);
        Head {
            queries: &input.queries[index * shape.head_dim..],
            stride: input.query_stride,
            rows: input.rows,
            keys,
            values,
            count: input.keys,
            head_dim: shape.head_dim,
            causal: shape.causal,
            way: input.way,
        }
    };
    let together = match input.way {
        Way::Alone => {
            let share = shape.heads.div_ceil(rayon::current_num_threads());
            share.div_ceil(share.div_ceil(HEADS_ALONE)) // tasks of even length
        }
        Way::Tiled | Way::Rounded => 1,
    };
    let tasks = shape.heads.div_ceil(together);
    // One by one: rayon would stop cutting, and run several in a row while other threads have none.
    (0..tasks).into_par_iter().with_max_len(1).for_each(|task| {
        let first = task * together;
        let heads: Vec<_> = (first..shape.heads.min(first + together))
            .map(head)
            .collect();
        kernel.attend(&heads, &mut |index, row, values| {
            let at = row * width + (first + index) * shape.head_dim;
            // SAFETY: no other task has these heads' columns.
            let out = unsafe { out.part(at, values.len()) };
            out.copy_from_slice(values);
        });
    });
}

/// The specification: one query at a time, scores, their softmax, the weighted sum of values.
pub(crate) fn attend_naive(head: &Head<'_>, out: &mut dyn FnMut(usize, &[f32])) {
    let mut row_of = vec![0.0; head.head_dim];
    for row in 0..head.rows {
        let mut scores = Vec::with_capacity(head.visible(row));
        for key in 0..head.visible(row) {
            head.keys.widen(key, &mut row_of);
            let products = head.query(row).iter().zip(&row_of).map(|(q, k)| q * k);
            scores.push(products.sum::<f32>() * head.scale());
        }
        let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f32 = scores.iter().map(|score| (score - most).exp()).sum();
        let mut mixed = vec![0.0; head.head_dim];
        for (key, score) in scores.iter().enumerate() {
            head.values.widen(key, &mut row_of);
            for (mixed, value) in mixed.iter_mut().zip(&row_of) {
                *mixed += (score - most).exp() / sum * value;
            }
        }
        out(row, &mixed);
    }
}
