//! A product with several rows of activations, what a few sequences decode together: one panel at a time meets all of them, each
//! row of activations has its sums in a register, and weights go from their file into the product without being stored unpacked.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{Ahead, Panel, accumulate};
use crate::activations::{QuantizedRows, TILE_ROWS, Tile};
use crate::int4::Int4Rows;
use crate::product::{Out, PANEL};
use crate::x86_64::store;

/// Values of all panels' rows for the N rows of `x`, at most two tiles.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn several_rows<const N: usize>(
    weights: &Int4Rows<'_>,
    panels: Range<usize>,
    x: &QuantizedRows,
    out: Out<'_>,
) {
    let mut panel = Panel::new();
    let first = panels.start;
    let tiles = x.first_and_last_tiles();
    for index in panels {
        panel.find(weights, index);
        panel.read_lines(weights);
        let mut values = [_mm256_setzero_ps(); N];
        for (block, lines) in panel.lines.iter().enumerate() {
            let words = panel.words(block);
            let [codes, scales, biases] = Ahead::new(&panel, block, 1);
            scales.prefetch_all();
            biases.prefetch_all();
            let tiles = [&tiles[0][block], &tiles[1][block]];
            let dots = dots::<N>(&words, tiles, codes);
            for row in 0..N {
                let tile = tiles[row / TILE_ROWS];
                let x = [tile.scales[row % TILE_ROWS], tile.sums[row % TILE_ROWS]];
                values[row] = accumulate(values[row], _mm256_cvtepi32_ps(dots[row]), *lines, x);
            }
        }
        for (row, value) in values.iter().enumerate() {
            out(index - first, row, &[store(*value)]);
        }
    }
}

/// Dot products of a block of a panel with N rows of activations: (rows of x), lanes: the panel's rows. Asks for the codes to come, of
/// which two words have a line.
#[target_feature(enable = "avx2")]
#[inline]
fn dots<const N: usize>(words: &[__m256i; PANEL], tiles: [&Tile; 2], ahead: Ahead) -> [__m256i; N] {
    let [first, last] = tiles.map(|tile| tile.words.split_at(PANEL));
    let mut dots = nibble_dots::<N, 0>(words, [first.0, last.0], (ahead, 0));
    let high = nibble_dots::<N, 4>(words, [first.1, last.1], (ahead, PANEL / 4));
    for (dot, high) in dots.iter_mut().zip(high) {
        *dot = _mm256_add_epi32(*dot, high);
    }
    dots
}

/// The same of the nibbles that lie `SHIFT` bits up in each byte, with the activations of their columns. Asks for half of the codes to
/// come, from a line on.
#[target_feature(enable = "avx2")]
#[inline]
fn nibble_dots<const N: usize, const SHIFT: i32>(
    words: &[__m256i; PANEL],
    x: [&[[i32; TILE_ROWS]]; 2],
    (ahead, line): (Ahead, usize),
) -> [__m256i; N] {
    let nibble = _mm256_set1_epi8(0xF);
    // Unknown to the compiler, which would unroll the loop and then hold more than there are registers.
    let words = &words[..std::hint::black_box(PANEL)];
    let mut sums = [_mm256_setzero_si256(); N];
    for (step, (word, x)) in words.iter().zip(x[0].iter().zip(x[1])).enumerate() {
        if step % 4 == 0 {
            ahead.prefetch(line + step / 4);
        }
        let codes = _mm256_and_si256(_mm256_srli_epi16::<SHIFT>(*word), nibble);
        let x: [&[i32; TILE_ROWS]; 2] = x.into();
        for row in 0..N {
            let activation = _mm256_set1_epi32(x[row / TILE_ROWS][row % TILE_ROWS]);
            let products = _mm256_maddubs_epi16(codes, activation);
            sums[row] = _mm256_add_epi16(sums[row], products);
        }
    }
    sums.map(|sum| _mm256_madd_epi16(sum, _mm256_set1_epi16(1)))
}
