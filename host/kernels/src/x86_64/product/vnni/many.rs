//! A product with many rows of activations: weights are unpacked once for a chunk of rows, 64 rows of weights at a time, so that
//! an activation, once in a register, meets four of them.

use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;

use super::{Pair, accumulate, unpacked};
use crate::activations::{QuantizedRows, TILE_ROWS, Tile, WORDS};
use crate::affine::AffineRows;
use crate::product::{Out, PANEL};
use crate::x86_64::prefetch;
use crate::x86_64::product::{Ahead, TILE_PANELS};
use crate::x86_64::wide::{LANES, load, store};

/// Pairs of panels that are multiplied with a tile of activations: 5 * 4 sums, 4 weights and an activation are 25 of 32 registers.
/// Of 1 (two sums each), 2, 3 and 4 pairs, 4 took the fewest loads for a product and were faster than 1 by a fifth.
const PAIRS: usize = 4;
/// Panels of them.
const PANELS: usize = PAIRS * TILE_PANELS;
/// Rows of activations whose values are gathered at a time, whole tiles, a picture's at once: those of a stretch of blocks are 167 KB,
/// their values 148 KB, in the second-level cache.
const ROWS_AT_ONCE: usize = 116 * TILE_ROWS;
/// Blocks of weights unpacked at a time: four pairs of 4 are 16 KiB, and leave the first-level cache room for the tiles to come.
const BLOCKS_AT_ONCE: usize = 4;

/// A row's values in the rows of the pairs: whole cache lines.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Values([[f32; LANES]; PAIRS]);

thread_local! {
    /// Memory that every task of a thread uses again, 170 KB: the C library would give so much back after each, and interrupt the other
    /// cores for it.
    static MEMORY: Cell<(Unpacked, Vec<Values>)> = Cell::default();
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,f16c")]
pub(super) fn many_rows(
    weights: &AffineRows<'_>,
    panels: Range<usize>,
    x: &QuantizedRows,
    out: Out<'_>,
) {
    let mut pairs: [Pair<'_>; PAIRS] = std::array::from_fn(|_| Pair::new());
    let (mut unpacked, mut values) = MEMORY.take();
    unpacked.resize();
    for first in panels.clone().step_by(PANELS) {
        let here = first..panels.end.min(first + PANELS);
        for (offset, pair) in pairs.iter_mut().enumerate() {
            // The last panel again where there are fewer; nobody asks for its values.
            let panel = (first + TILE_PANELS * offset).min(here.end - 1);
            pair.find(weights, panel..here.end);
        }
        for row in (0..x.rows()).step_by(ROWS_AT_ONCE) {
            let rows = row..(row + ROWS_AT_ONCE).min(x.rows());
            values.clear();
            values.resize(rows.len(), Values([[0.0; LANES]; PAIRS]));
            for start in (0..x.blocks).step_by(BLOCKS_AT_ONCE) {
                let blocks = start..(start + BLOCKS_AT_ONCE).min(x.blocks);
                unpacked.fill(&pairs, blocks.clone(), weights.bits());
                let tiles = x.tiles[row / TILE_ROWS * x.blocks..].chunks(x.blocks);
                for (values, tiles) in values.chunks_mut(TILE_ROWS).zip(tiles) {
                    let tiles = (&tiles[blocks.clone()], x.blocks);
                    add_tile(&unpacked, tiles, values);
                }
            }
            for (row, values) in rows.zip(&values) {
                let eights = values.0.as_flattened().as_chunks::<PANEL>().0;
                out(first - panels.start, row, &eights[..here.len()]);
            }
        }
    }
    MEMORY.set((unpacked, values));
}

/// A stretch of blocks of the pairs, unpacked.
#[derive(Default)]
struct Unpacked {
    codes: Vec<[[__m512i; PAIRS]; WORDS]>, // (blocks)
    lines: Vec<[[__m512; 2]; PAIRS]>,      // (blocks)
}

impl Unpacked {
    #[target_feature(enable = "avx512f")]
    fn resize(&mut self) {
        let (codes, lines) = (_mm512_setzero_si512(), _mm512_setzero_ps());
        self.codes.resize(BLOCKS_AT_ONCE, [[codes; PAIRS]; WORDS]);
        self.lines.resize(BLOCKS_AT_ONCE, [[lines; 2]; PAIRS]);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx2")]
    fn fill(&mut self, pairs: &[Pair<'_>; PAIRS], blocks: Range<usize>, bits: usize) {
        let ahead = Ahead::new(&pairs[0].panels[0], PANELS);
        for (block, (steps, lines)) in blocks.zip(self.codes.iter_mut().zip(&mut self.lines)) {
            for (offset, pair) in pairs.iter().enumerate() {
                if bits == 4 {
                    for (step, word) in pair.words(block).into_iter().enumerate() {
                        let [even, odd] = unpacked(word);
                        steps[step][offset] = even;
                        steps[WORDS / 2 + step][offset] = odd;
                    }
                } else {
                    unpack_bytes(pair, block, steps, offset);
                }
                lines[offset] = pair.lines[block];
            }
            ahead.prefetch_all(block);
        }
    }
}

/// A block of INT8 of a pair into place `offset` of each step, whose columns are those of INT4's.
#[target_feature(enable = "avx512f,avx512bw,avx2")]
#[inline]
fn unpack_bytes(
    pair: &Pair<'_>,
    block: usize,
    steps: &mut [[__m512i; PAIRS]; WORDS],
    offset: usize,
) {
    const SECOND: __mmask32 = 0xAAAA_AAAA;
    let evens_first = _mm512_broadcast_i32x4(_mm_setr_epi8(
        0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15,
    ));
    for half in 0..2 {
        let words = pair.words(2 * block + half);
        for (t, two) in words.as_chunks::<2>().0.iter().enumerate() {
            let first = _mm512_shuffle_epi8(two[0], evens_first);
            let second = _mm512_shuffle_epi8(two[1], evens_first);
            let (low, high) = (
                _mm512_srli_epi32::<16>(first),
                _mm512_slli_epi32::<16>(second),
            );
            let step = WORDS / 4 * half + t;
            steps[step][offset] = _mm512_mask_blend_epi16(SECOND, first, high);
            steps[WORDS / 2 + step][offset] = _mm512_mask_blend_epi16(SECOND, low, second);
        }
    }
}

/// Adds a stretch of blocks to the values of a tile's rows. `tiles`: that stretch, and how many tiles on the next rows' is.
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_tile(weights: &Unpacked, tiles: (&[Tile], usize), values: &mut [Values]) {
    match values.len() {
        1 => rows_times_pairs::<1>(weights, tiles, values),
        2 => rows_times_pairs::<2>(weights, tiles, values),
        3 => rows_times_pairs::<3>(weights, tiles, values),
        4 => rows_times_pairs::<4>(weights, tiles, values),
        _ => rows_times_pairs::<TILE_ROWS>(weights, tiles, values),
    }
}

/// Adds a stretch of blocks to the values of the first N rows of a tile.
#[target_feature(enable = "avx512f,avx512vnni")]
fn rows_times_pairs<const N: usize>(
    weights: &Unpacked,
    (tiles, ahead): (&[Tile], usize),
    values: &mut [Values],
) {
    let values = values
        .first_chunk_mut::<N>()
        .expect("the caller counted them");
    for ((codes, lines), tile) in weights.codes.iter().zip(&weights.lines).zip(tiles) {
        // That of the next rows lies too far away for the processor to ask by itself.
        let next = std::ptr::from_ref(tile).wrapping_add(ahead);
        prefetch(next.cast(), size_of::<Tile>());
        let mut dots = [[_mm512_setzero_si512(); PAIRS]; N];
        for (codes, words) in codes.iter().zip(&tile.words) {
            for row in 0..N {
                let activation = _mm512_set1_epi32(words[row]);
                for (dot, codes) in dots[row].iter_mut().zip(codes) {
                    *dot = _mm512_dpbusd_epi32(*dot, *codes, activation);
                }
            }
        }
        // The compiler would keep all values in registers from one block to the next, and has none left: it would copy them there
        // and back instead.
        let values = std::hint::black_box(&mut *values);
        for (row, values) in values.iter_mut().enumerate() {
            let x = [tile.scales[row], tile.sums[row]];
            for (pair, value) in values.0.iter_mut().enumerate() {
                *value = store(accumulate(load(value), dots[row][pair], lines[pair], x));
            }
        }
    }
}
