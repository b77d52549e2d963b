//! A product with several rows of activations, what a few sequences decode together: one panel at a time meets all of them, each
//! row of activations has its sums in a register, and weights go from their file into the product without being stored unpacked.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::sums::pair_sums;
use super::{Ahead, Panel, accumulate};
use crate::activations::{QuantizedRows, TILE_ROWS, Tile};
use crate::affine::AffineRows;
use crate::product::{Out, PANEL, TASK_PANELS};
use crate::x86_64::store;

/// A local of this type aligns what its function spills: where that straddled cache lines, six to ten rows took up to a tenth longer.
#[repr(align(64))]
struct Aligned(#[expect(dead_code, reason = "only its place matters")] [u8; 64]);

/// Values of all panels' rows for the N rows of `x`, at most two tiles.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn several_rows<const N: usize>(
    weights: &AffineRows<'_>,
    panels: Range<usize>,
    x: &QuantizedRows,
    out: Out<'_>,
) {
    std::hint::black_box(&mut MaybeUninit::<Aligned>::uninit());
    let mut panel = Panel::new();
    let tiles = x.first_and_last_tiles();
    for first in panels.clone().step_by(TASK_PANELS) {
        let end = panels.end.min(first + TASK_PANELS);
        let mut gathered = [[[0.0; PANEL]; TASK_PANELS]; N];
        for index in first..end {
            panel.find(weights, index);
            panel.read_lines(weights);
            let ahead = Ahead::new(&panel, 1);
            let mut values = [_mm256_setzero_ps(); N];
            for (block, lines) in panel.lines.iter().enumerate() {
                let words = panel.words(block);
                ahead.prefetch_scales::<_MM_HINT_T0>(block);
                let tiles = [&tiles[0][block], &tiles[1][block]];
                let dots = dots::<N>(&words, tiles, (&ahead, block));
                for row in 0..N {
                    let tile = tiles[row / TILE_ROWS];
                    let x = [tile.scales[row % TILE_ROWS], tile.sums[row % TILE_ROWS]];
                    values[row] = accumulate(values[row], _mm256_cvtepi32_ps(dots[row]), *lines, x);
                }
            }
            for (gathered, value) in gathered.iter_mut().zip(values) {
                gathered[index - first] = store(value);
            }
        }
        // All panels of a row at once: on Zen 3 each hand-over takes as long as three blocks of a row.
        for (row, values) in gathered.iter().enumerate() {
            out(first - panels.start, row, &values[..end - first]);
        }
    }
}

/// Dot products of a block of a panel with N rows of activations: (rows of x), lanes: the panel's rows. Asks for the block's share of
/// the codes to come.
#[target_feature(enable = "avx2")]
#[inline]
fn dots<const N: usize>(
    words: &[__m256i; PANEL],
    tiles: [&Tile; 2],
    ahead: (&Ahead, usize),
) -> [__m256i; N] {
    let mut dots = nibble_dots::<N, 0>(words, tiles, ahead);
    let odd = nibble_dots::<N, 1>(words, tiles, ahead);
    for (dot, odd) in dots.iter_mut().zip(odd) {
        *dot = _mm256_add_epi32(*dot, odd);
    }
    dots
}

/// The same of the low nibbles (`HALF` 0, even columns) or the high ones (1, odd columns); asks for half of the share.
#[target_feature(enable = "avx2")]
#[inline]
fn nibble_dots<const N: usize, const HALF: usize>(
    words: &[__m256i; PANEL],
    tiles: [&Tile; 2],
    (ahead, block): (&Ahead, usize),
) -> [__m256i; N] {
    let codes = |step: usize| {
        if step.is_multiple_of(4) {
            ahead.prefetch_codes(block, 2 * HALF + step / 4);
        }
        let nibbles = if HALF == 0 {
            words[step]
        } else {
            _mm256_srli_epi16::<4>(words[step])
        };
        [_mm256_and_si256(nibbles, _mm256_set1_epi8(0xF))]
    };
    let mut dots = [_mm256_setzero_si256(); N];
    for (dot, [sum]) in dots.iter_mut().zip(pair_sums::<N, 1, HALF>(codes, tiles)) {
        *dot = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
    }
    dots
}
