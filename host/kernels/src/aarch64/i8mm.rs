//! The tile of many rows with the matrix products of Armv8.6 (Apple M2, Graviton 3, Cortex-X2 and later): one `usmmla` multiplies
//! two rows of weights, unsigned, with two of activations, eight columns each, into four sums. Twice the work of a `sdot`.
//!
//! ```text
//! weights of a pair of rows     [row 0: words t, t + 1] [row 1: words t, t + 1]        activations of a pair alike
//! sums of two pairs             [w0 x0] [w0 x1] [w1 x0] [w1 x1]
//! ```

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::ops::Range;

use super::{Neon, QUADS, Unpacked, Way, add_block, load_codes, many_rows};
use crate::activations::{QuantizedRows, TILE_ROWS, Tile, WORDS};
use crate::affine::AffineRows;
use crate::product::Out;

/// Pairs of a tile's rows, the last of a row and of nothing: 3 * 8 sums, 2 weights and 3 of activations are 29 of 32 registers.
const PAIRS: usize = TILE_ROWS.div_ceil(2);

/// Proof that this processor has these products besides: only `detect` makes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct I8mm {
    pub(crate) neon: Neon,
}

impl I8mm {
    pub(crate) fn detect() -> Option<Self> {
        Neon::detect()
            .filter(|_| is_aarch64_feature_detected!("i8mm"))
            .map(|neon| Self { neon })
    }

    /// As that of NEON, which does what memory limits: one row.
    pub(crate) fn multiply(
        self,
        weights: &AffineRows<'_>,
        panels: Range<usize>,
        x: &QuantizedRows,
        out: Out<'_>,
    ) {
        if x.rows() == 1 && weights.bits() == 4 {
            return self.neon.multiply(weights, panels, x, out);
        }
        let way = Way {
            arrange: pair_up,
            add_tile,
        };
        // SAFETY: `self` exists, so `detect` saw the features.
        unsafe { many_rows(weights, panels, x, way, out) };
    }
}

/// Of two steps of a quad, four rows and a word each, makes two pairs of rows with two words each.
#[target_feature(enable = "neon")]
fn pair_up(unpacked: &mut Unpacked) {
    for codes in &mut unpacked.codes {
        for [first, second] in codes.as_chunks_mut::<2>().0 {
            for (a, b) in first.iter_mut().zip(second) {
                [*a, *b] = zipped(*a, *b);
            }
        }
    }
}

/// Words 0 and 1 of both in turns, and words 2 and 3.
#[target_feature(enable = "neon")]
#[inline]
fn zipped(a: int8x16_t, b: int8x16_t) -> [int8x16_t; 2] {
    let (a, b) = (vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b));
    [vzip1q_s32(a, b), vzip2q_s32(a, b)].map(|words| vreinterpretq_s8_s32(words))
}

/// Adds a stretch of blocks to the values of a tile's rows.
#[target_feature(enable = "neon,i8mm")]
fn add_tile(weights: &Unpacked, tiles: &[Tile], values: &mut [[float32x4_t; QUADS]]) {
    match values.len() {
        1 | 2 => rows_times_quads::<1>(weights, tiles, values),
        3 | 4 => rows_times_quads::<2>(weights, tiles, values),
        _ => rows_times_quads::<PAIRS>(weights, tiles, values),
    }
}

/// Adds a stretch of blocks to the values of the first P pairs of a tile's rows.
#[target_feature(enable = "neon,i8mm")]
fn rows_times_quads<const P: usize>(
    weights: &Unpacked,
    tiles: &[Tile],
    values: &mut [[float32x4_t; QUADS]],
) {
    for ((codes, lines), tile) in weights.codes.iter().zip(&weights.lines).zip(tiles) {
        let sums = block_sums::<P>(codes, &tile.words);
        for (row, values) in values.iter_mut().enumerate() {
            let mut dots = [vdupq_n_s32(0); QUADS];
            for (dots, [low, high]) in dots.iter_mut().zip(&sums[row / 2]) {
                *dots = match row % 2 {
                    0 => vuzp1q_s32(*low, *high),
                    _ => vuzp2q_s32(*low, *high),
                };
            }
            add_block(values, &dots, lines, [tile.scales[row], tile.sums[row]]);
        }
    }
}

/// Sums of one block: (pairs of rows of x, quads, pairs of a quad's rows).
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn block_sums<const P: usize>(
    codes: &[[int8x16_t; QUADS]; WORDS],
    words: &[[i32; TILE_ROWS]; WORDS],
) -> [[[int32x4_t; 2]; QUADS]; P] {
    let mut sums = [[[vdupq_n_s32(0); 2]; QUADS]; P];
    for (codes, words) in codes
        .as_chunks::<2>()
        .0
        .iter()
        .zip(words.as_chunks::<2>().0)
    {
        let [first, second] = words
            .each_ref()
            .map(|words| load_codes(words.first_chunk().expect("a tile has five rows")));
        let [pair_0, pair_1] = zipped(first, second);
        let last = [words[0][4], words[1][4], 0, 0];
        let x = [pair_0, pair_1, load_codes(&last)];
        for (sums, x) in sums.iter_mut().zip(x) {
            for (quad, sums) in sums.iter_mut().enumerate() {
                sums[0] = add_products(sums[0], codes[0][quad], x);
                sums[1] = add_products(sums[1], codes[1][quad], x);
            }
        }
    }
    sums
}

/// Adds the products of two rows of eight bytes of `a`, unsigned, with two of `b`: `vusmmlaq_s32`, which is not stable.
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn add_products(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction is of a feature of this function, and touches nothing but these registers.
    unsafe {
        asm!("usmmla {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}
