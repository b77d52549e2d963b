//! Decoding with long rows of weights: each weight is used for one to three rows of activations, and memory is what limits.
//!
//! Sixteen rows at once, as shorter ones are read, would each be in the same places of the first-level cache when they are 4 KiB of
//! codes long: it keeps eight, and each line came twice (20 GB/s where rows of 1.5 KiB come at 28). So rows are read one after the
//! other, as they lie in memory. A lane is a block of a row; the dot products of sixteen rows are transposed, and a lane is a row.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{Pair, accumulate, hand_over, transpose_quarters, unpacked};
use crate::activations::{BLOCK, Eight, QuantizedRows};
use crate::int4::Int4Rows;
use crate::product::{Out, PANEL};
use crate::x86_64::product::TILE_PANELS;
use crate::x86_64::wide::LANES;
use crate::x86_64::{LONG_COLUMNS, prefetch_far};

/// Rows of weights whose dot products are gathered.
const ROWS: usize = TILE_PANELS * PANEL;
/// Codes of two blocks: a register.
const PAIR_BYTES: usize = BLOCK;
/// Codes of as many blocks as a register has lanes.
type Sixteen = [[u8; PAIR_BYTES]; LANES / 2];
/// How far ahead of a row's codes memory is asked for, into the second-level cache: of 2 to 32 KiB the fastest, and into the first
/// level none was faster than not to ask.
const AHEAD_BYTES: usize = 8192;

/// Whether rows of so many blocks share their places in the first-level cache. They are whole registers, too.
pub(super) fn takes(blocks: usize) -> bool {
    (blocks * BLOCK).is_multiple_of(LONG_COLUMNS)
}

/// Activations of two blocks: of their even columns, and of their odd ones.
type Pairs<const N: usize> = [[[__m512i; 2]; N]; LANES / 2];
/// Dot products of sixteen blocks: (rows of x, rows), lanes: blocks.
type Dots<const N: usize> = [[__m512i; ROWS]; N];

#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,f16c")]
pub(super) fn few_rows<const N: usize>(
    weights: &Int4Rows<'_>,
    panels: Range<usize>,
    x: &QuantizedRows,
    out: Out<'_>,
) {
    let eights = x.few.as_chunks::<N>().0;
    let sixteens = eights.as_chunks::<2>().0;
    let mut activations = vec![[[[_mm512_setzero_si512(); 2]; N]; LANES / 2]; sixteens.len()];
    for (pairs, sixteen) in activations.iter_mut().zip(sixteens) {
        pair_up(pairs, sixteen);
    }
    let mut dots = vec![[[_mm512_setzero_si512(); ROWS]; N]; sixteens.len()];
    let mut pair = Pair::new();
    for first in panels.clone().step_by(TILE_PANELS) {
        pair.find(weights, first..panels.end);
        for row in 0..ROWS {
            let [codes, scales, biases] = pair.panels[row / PANEL].rows[row % PANEL];
            for part in [scales, biases] {
                let ahead = part.as_ptr().wrapping_add(ROWS * part.len());
                prefetch_far(ahead, part.len());
            }
            let codes = codes.as_chunks().0.as_chunks().0;
            for ((codes, x), dots) in codes.iter().zip(&activations).zip(&mut dots) {
                read_row(codes, x, dots, row);
            }
        }
        let mut values = [_mm512_setzero_ps(); N];
        let lines = pair.lines.as_chunks::<LANES>().0;
        for ((dots, lines), eights) in dots.iter().zip(lines).zip(sixteens) {
            for row in 0..N {
                let by_block = transpose(&dots[row]);
                for (block, line) in lines.iter().enumerate() {
                    let eight: &Eight = &eights[block / 8][row];
                    let scale_and_sum = [eight.scales[block % 8], eight.sums[block % 8]];
                    values[row] = accumulate(values[row], by_block[block], *line, scale_and_sum);
                }
            }
        }
        hand_over(values, (&panels, first), out);
    }
}

/// Sixteen blocks of each row of activations, two by two.
#[target_feature(enable = "avx512f")]
#[inline]
fn pair_up<const N: usize>(pairs: &mut Pairs<N>, sixteen: &[[Eight; N]; 2]) {
    for (index, pair) in pairs.iter_mut().enumerate() {
        for (row, parts) in pair.iter_mut().enumerate() {
            let words = &sixteen[index / 4][row].words;
            // SAFETY: a block is 64 bytes, and the load needs no alignment.
            let first = unsafe { _mm512_loadu_si512(words[2 * index % 8].as_ptr().cast()) };
            // SAFETY: as above.
            let second = unsafe { _mm512_loadu_si512(words[2 * index % 8 + 1].as_ptr().cast()) };
            *parts = [
                _mm512_shuffle_i64x2::<0b01_00_01_00>(first, second),
                _mm512_shuffle_i64x2::<0b11_10_11_10>(first, second),
            ];
        }
    }
}

/// Dot products of sixteen blocks of one row of weights, into place `row`.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn read_row<const N: usize>(codes: &Sixteen, x: &Pairs<N>, dots: &mut Dots<N>, row: usize) {
    let mut sums = [[[_mm512_setzero_si512(); 4]; 2]; N];
    for pair in 0..LANES / 2 {
        let codes = codes[pair].as_ptr();
        // SAFETY: 64 bytes, and the load needs no alignment.
        let word = unsafe { _mm512_loadu_si512(codes.cast()) };
        let [even, odd] = unpacked(word);
        prefetch_far(codes.wrapping_add(AHEAD_BYTES), PAIR_BYTES);
        for n in 0..N {
            let sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, x[pair][n][0]);
            sums[n][pair / 4][pair % 4] = _mm512_dpbusd_epi32(sum, odd, x[pair][n][1]);
        }
    }
    for n in 0..N {
        dots[n][row] = totals([quarters(sums[n][0]), quarters(sums[n][1])]);
    }
}

/// The sum of each quarter of four registers: lane c of a quarter is register c's.
#[target_feature(enable = "avx512f")]
#[inline]
fn quarters([a, b, c, d]: [__m512i; 4]) -> __m512i {
    let ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd))
}

/// Of four registers' quarters and of four more: what each half of a register gives, in the order in which halves follow each other.
#[target_feature(enable = "avx512f")]
#[inline]
fn totals([first, second]: [__m512i; 2]) -> __m512i {
    let even = _mm512_shuffle_i64x2::<0b10_00_10_00>(first, second);
    let odd = _mm512_shuffle_i64x2::<0b11_01_11_01>(first, second);
    // Quarters: lower halves of the first four registers, upper ones, lower ones of the second four, upper ones.
    let lanes = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    _mm512_permutexvar_epi32(lanes, _mm512_add_epi32(even, odd))
}

/// Lane c of row r becomes lane r of row c.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose(rows: &[__m512i; LANES]) -> [__m512i; LANES] {
    let mut fours = [[_mm512_setzero_si512(); 4]; 4]; // (rows / 4, column of each quarter)
    for four in 0..4 {
        fours[four] = transpose_quarters([
            rows[4 * four],
            rows[4 * four + 1],
            rows[4 * four + 2],
            rows[4 * four + 3],
        ]);
    }
    let mut out = [_mm512_setzero_si512(); LANES];
    for column in 0..4 {
        let [a, b, c, d] = [
            fours[0][column],
            fours[1][column],
            fours[2][column],
            fours[3][column],
        ];
        let ab = [
            _mm512_shuffle_i64x2::<0b10_00_10_00>(a, b),
            _mm512_shuffle_i64x2::<0b11_01_11_01>(a, b),
        ];
        let cd = [
            _mm512_shuffle_i64x2::<0b10_00_10_00>(c, d),
            _mm512_shuffle_i64x2::<0b11_01_11_01>(c, d),
        ];
        for quarter in 0..2 {
            // ab[quarter]: quarters `quarter` and `quarter + 2` of a, then of b.
            out[4 * quarter + column] =
                _mm512_shuffle_i64x2::<0b10_00_10_00>(ab[quarter], cd[quarter]);
            out[4 * (quarter + 2) + column] =
                _mm512_shuffle_i64x2::<0b11_01_11_01>(ab[quarter], cd[quarter]);
        }
    }
    out
}
