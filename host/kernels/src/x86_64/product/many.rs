//! A product with many rows of activations, what a prompt or a picture is: weights are unpacked once for a chunk of rows. With INT8 any
//! number of rows is.

use std::arch::x86_64::*;
use std::ops::Range;

use super::sums::{byte_dots, pair_sums};
use super::{Ahead, Panel, TILE_PANELS, accumulate};
use crate::activations::{QuantizedRows, TILE_ROWS, Tile, WORDS};
use crate::affine::AffineRows;
use crate::product::{Out, PANEL, TASK_PANELS};
use crate::x86_64::store;

/// Rows of activations whose values are gathered at a time, whole tiles, half of a picture's: those of a stretch of blocks are 334 KB,
/// their values 19 KB for a pair of panels, in a second-level cache of 512.
const ROWS_AT_ONCE: usize = 58 * TILE_ROWS;
/// Pairs of panels that a chunk of rows meets before the next stretch of blocks: a task's.
const PAIRS_AT_ONCE: usize = TASK_PANELS / TILE_PANELS;
/// Up to this many rows, pairs of panels are taken one by one.
const ONE_PAIR_ROWS: usize = 64;
/// Blocks of weights unpacked at a time: two panels of 16 are 16 KiB, half of the first-level cache.
const BLOCKS_AT_ONCE: usize = 16;

/// Many rows: weights are unpacked once for a chunk of them. A stretch of blocks of the chunk's activations is read from the
/// second-level cache for every pair of panels in turn; with few rows it is in the first-level cache anyway, and pairs are
/// taken one by one, so that weights are read in their order.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn many_rows(
    weights: &AffineRows<'_>,
    panels: Range<usize>,
    x: &QuantizedRows,
    out: Out<'_>,
) {
    let pairs_at_once = if x.rows() > ONE_PAIR_ROWS {
        PAIRS_AT_ONCE
    } else {
        1
    };
    let mut chunk = Chunk::new(pairs_at_once, weights.bits());
    for first in panels.clone().step_by(TILE_PANELS * pairs_at_once) {
        let end = panels.end.min(first + TILE_PANELS * pairs_at_once);
        let pairs = chunk.find_pairs(weights, first..end);
        for row in (0..x.rows()).step_by(ROWS_AT_ONCE) {
            let rows = row..(row + ROWS_AT_ONCE).min(x.rows());
            chunk.multiply(pairs, x, rows.clone());
            // All panels of a row at once: in the product they lie side by side, and its rows are pages apart.
            let count = rows.len();
            for (index, row) in rows.enumerate() {
                let mut values = [[0.0; PANEL]; TILE_PANELS * PAIRS_AT_ONCE];
                let pairs = values.as_chunks_mut::<TILE_PANELS>().0.iter_mut();
                for (pair, sums) in pairs.zip(chunk.values[index..].iter().step_by(count)) {
                    *pair = [store(sums[0]), store(sums[1])];
                }
                out(first - panels.start, row, &values[..end - first]);
            }
        }
    }
}

/// A block of a pair of panels, unpacked: (steps, panels). A step is a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Codes([[__m256i; TILE_PANELS]; WORDS]);

/// What unpacked codes are, which says how many of their products fit in 16 bits.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// INT4.
    Nibbles,
    /// INT8 without a code above 127, as `visor quantize` writes the vision tower's.
    SevenBits,
    /// INT8.
    EightBits,
}

/// A stretch of blocks of a few panels, unpacked.
struct Unpacked {
    codes: Vec<Codes>,                      // (blocks)
    lines: Vec<[[__m256; 2]; TILE_PANELS]>, // (blocks)
    kind: Kind,
}

impl Unpacked {
    #[target_feature(enable = "avx2")]
    fn new(bits: usize) -> Self {
        Self {
            kind: if bits == 4 {
                Kind::Nibbles
            } else {
                Kind::EightBits
            },
            codes: vec![Codes([[_mm256_setzero_si256(); TILE_PANELS]; WORDS]); BLOCKS_AT_ONCE],
            lines: vec![[[_mm256_setzero_ps(); 2]; TILE_PANELS]; BLOCKS_AT_ONCE],
        }
    }

    #[target_feature(enable = "avx2")]
    fn fill(&mut self, panels: &[Panel<'_>; TILE_PANELS], blocks: Range<usize>) {
        let ahead = Ahead::new(&panels[0], TILE_PANELS);
        let mut any = _mm256_setzero_si256();
        for (index, block) in blocks.enumerate() {
            for (offset, panel) in panels.iter().enumerate() {
                let steps = &mut self.codes[index].0;
                if self.kind == Kind::Nibbles {
                    panel.unpack(block, steps, offset);
                } else {
                    any = _mm256_or_si256(any, panel.unpack_bytes(block, steps, offset));
                }
                self.lines[index][offset] = panel.lines[block];
            }
            ahead.prefetch_all(block);
        }
        if self.kind != Kind::Nibbles {
            self.kind = match _mm256_movemask_epi8(any) {
                0 => Kind::SevenBits,
                _ => Kind::EightBits,
            };
        }
    }
}

/// Takes up the first panels of a range; the last one again where there are fewer.
#[target_feature(enable = "avx2,f16c")]
fn find_pair<'a>(
    pair: &mut [Panel<'a>; TILE_PANELS],
    weights: &AffineRows<'a>,
    panels: Range<usize>,
) {
    for (offset, panel) in pair.iter_mut().enumerate() {
        panel.find(weights, (panels.start + offset).min(panels.end - 1));
        panel.read_lines(weights);
    }
}

/// A few pairs of panels, what is unpacked of one of them, and values of a chunk of rows: memory that a task uses again.
struct Chunk<'a> {
    pairs: Vec<[Panel<'a>; TILE_PANELS]>,
    unpacked: Unpacked,
    values: Vec<[__m256; TILE_PANELS]>, // (pairs, rows)
}

impl<'a> Chunk<'a> {
    #[target_feature(enable = "avx2")]
    fn new(pairs: usize, bits: usize) -> Self {
        let pair = || std::array::from_fn(|_| Panel::new());
        Self {
            pairs: std::iter::repeat_with(pair).take(pairs).collect(),
            unpacked: Unpacked::new(bits),
            values: Vec::new(),
        }
    }

    /// Takes up the pairs of a range of panels and says how many there are; the last panel twice where the last pair has no
    /// second.
    #[target_feature(enable = "avx2,f16c")]
    fn find_pairs(&mut self, weights: &AffineRows<'a>, panels: Range<usize>) -> usize {
        let firsts = panels.clone().step_by(TILE_PANELS);
        let pairs = firsts.len();
        for (pair, first) in self.pairs.iter_mut().zip(firsts) {
            find_pair(pair, weights, first..panels.end);
        }
        pairs
    }

    /// Values of a chunk of rows for the first pairs.
    #[target_feature(enable = "avx2,fma")]
    fn multiply(&mut self, pairs: usize, x: &QuantizedRows, rows: Range<usize>) {
        self.values.clear();
        let zeros = [_mm256_setzero_ps(); TILE_PANELS];
        self.values.resize(pairs * rows.len(), zeros);
        let tiles = &x.tiles[rows.start / TILE_ROWS * x.blocks..];
        for start in (0..x.blocks).step_by(BLOCKS_AT_ONCE) {
            let blocks = start..(start + BLOCKS_AT_ONCE).min(x.blocks);
            for (pair, values) in self.pairs.iter().zip(self.values.chunks_mut(rows.len())) {
                self.unpacked.fill(pair, blocks.clone());
                for (values, tiles) in values.chunks_mut(TILE_ROWS).zip(tiles.chunks(x.blocks)) {
                    // A function of its own: inlined into the loops around it, it was slower by a twentieth.
                    add_tile(&self.unpacked, &tiles[blocks.clone()], values);
                }
            }
        }
    }
}

/// Adds a stretch of blocks to the values of a tile's rows.
#[target_feature(enable = "avx2,fma")]
#[inline(never)]
fn add_tile(weights: &Unpacked, tiles: &[Tile], values: &mut [[__m256; TILE_PANELS]]) {
    match values.len() {
        1 => add_rows::<1>(weights, tiles, values),
        2 => add_rows::<2>(weights, tiles, values),
        3 => add_rows::<3>(weights, tiles, values),
        4 => add_rows::<4>(weights, tiles, values),
        _ => add_rows::<TILE_ROWS>(weights, tiles, values),
    }
}

/// Adds a stretch of blocks to the values of the first N rows of a tile.
#[target_feature(enable = "avx2,fma")]
fn add_rows<const N: usize>(
    weights: &Unpacked,
    tiles: &[Tile],
    values: &mut [[__m256; TILE_PANELS]],
) {
    let values = values
        .first_chunk_mut::<N>()
        .expect("the caller counted them");
    let blocks = weights.codes.iter().zip(&weights.lines).zip(tiles);
    match weights.kind {
        Kind::Nibbles => {
            for ((codes, lines), tile) in blocks {
                add_nibbles(values, codes, lines, tile);
            }
        }
        Kind::SevenBits => add_bytes::<N, true>(values, blocks),
        Kind::EightBits => add_bytes::<N, false>(values, blocks),
    }
}

/// Adds a block of INT4 to the values of N rows.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn add_nibbles<const N: usize>(
    values: &mut [[__m256; TILE_PANELS]; N],
    codes: &Codes,
    lines: &[[__m256; 2]; TILE_PANELS],
    tile: &Tile,
) {
    let ones = _mm256_set1_epi16(1);
    let (low, high) = codes.0.split_at(WORDS / 2);
    let low = pair_sums::<N, TILE_PANELS, 0>(|step| low[step], [tile; 2]);
    let high = pair_sums::<N, TILE_PANELS, 1>(|step| high[step], [tile; 2]);
    for row in 0..N {
        for offset in 0..TILE_PANELS {
            let low = _mm256_madd_epi16(low[row][offset], ones);
            let high = _mm256_madd_epi16(high[row][offset], ones);
            let dot = _mm256_cvtepi32_ps(_mm256_add_epi32(low, high));
            let x = [tile.scales[row], tile.sums[row]];
            values[row][offset] = accumulate(values[row][offset], dot, lines[offset], x);
        }
    }
}

/// Adds a stretch of blocks of INT8, panel by panel: a row's products need two registers beside its sum and its value.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn add_bytes<'a, const N: usize, const SEVEN_BITS: bool>(
    values: &mut [[__m256; TILE_PANELS]; N],
    blocks: impl Iterator<Item = ((&'a Codes, &'a [[__m256; 2]; TILE_PANELS]), &'a Tile)> + Clone,
) {
    for offset in 0..TILE_PANELS {
        let mut panel = [_mm256_setzero_ps(); N];
        for row in 0..N {
            panel[row] = values[row][offset];
        }
        for ((codes, lines), tile) in blocks.clone() {
            let dots = byte_dots::<N, SEVEN_BITS>(|step| codes.0[step][offset], tile);
            for row in 0..N {
                let dot = _mm256_cvtepi32_ps(dots[row]);
                let x = [tile.scales[row], tile.sums[row]];
                panel[row] = accumulate(panel[row], dot, lines[offset], x);
            }
        }
        for row in 0..N {
            values[row][offset] = panel[row];
        }
    }
}
