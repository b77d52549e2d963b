//! Rows of activations in eight bits, what the integer kernels multiply.
//!
//! Columns come in blocks of 64, a weight's group. A block has one scale, and its codes lie in the order in which four-bit
//! weights leave their words (see [`crate::affine`]): first the even columns, then the odd ones.
//!
//! ```text
//! scale = max |x| / 127        code = x / scale, rounded to the nearest, ties to even: -127..=127
//! sum   = scale * (sum of the block's codes)
//! ```
//!
//! A block of zeros, or of values too small to divide by, has scale 0. A block with an infinity or a NaN has scale NaN, and so
//! has every product with it: nothing that broke upstream comes out looking sound.

use std::borrow::Cow;

use rayon::prelude::*;

use crate::affine::AffineRows;
use crate::kernel::Kernel;

/// Columns of a block.
pub const BLOCK: usize = 64;
/// Codes packed into one word: four columns, lowest byte first.
pub(crate) const WORDS: usize = BLOCK / 4;
/// Below this a block's largest magnitude counts as zero: its reciprocal would not be finite.
pub(crate) const LARGEST_MIN: f32 = 1e-30;
/// Rows that lie interleaved in memory: as many as a kernel multiplies at once.
pub(crate) const TILE_ROWS: usize = 5;

/// Up to this many rows are kept once more, close together, for kernels that decode: AVX2's takes one, that of AVX-512 up to three.
pub(crate) const FEW_ROWS: usize = 3;

/// One block of columns of a few rows; zeros where there are fewer.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Tile {
    pub(crate) words: [[i32; TILE_ROWS]; WORDS],
    pub(crate) scales: [f32; TILE_ROWS],
    pub(crate) sums: [f32; TILE_ROWS],
}

impl Tile {
    /// The first 32 columns and the last, each twice.
    fn by_nibble(&self) -> [Self; 2] {
        let mut halves = [Self::default(); 2];
        for row in 0..TILE_ROWS {
            for (half, out) in halves.iter_mut().enumerate() {
                let mut sum = 0;
                for word in 0..WORDS / 4 {
                    let at = half * (WORDS / 4) + word;
                    let (even, odd) = (self.words[at][row], self.words[WORDS / 2 + at][row]);
                    let (even, odd) = (even.to_le_bytes(), odd.to_le_bytes());
                    for two in 0..2 {
                        let [a, b] = [even[2 * two], even[2 * two + 1]];
                        let [c, d] = [odd[2 * two], odd[2 * two + 1]];
                        let four = [a, c, b, d];
                        sum += four.iter().map(|&code| i32::from(code as i8)).sum::<i32>();
                        let four = i32::from_le_bytes(four);
                        out.words[2 * word + two][row] = four;
                        out.words[WORDS / 2 + 2 * word + two][row] = four;
                    }
                }
                out.scales[row] = self.scales[row];
                out.sums[row] = self.scales[row] * sum as f32;
            }
        }
        halves
    }
}

/// Eight blocks of one row; zeros where there are fewer.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Eight {
    pub(crate) words: [[i32; WORDS]; 8],
    pub(crate) scales: [f32; 8],
    pub(crate) sums: [f32; 8],
}

/// Activations (rows, columns) in eight bits.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct QuantizedRows {
    pub(crate) tiles: Vec<Tile>, // (rows / TILE_ROWS, blocks)
    /// Few rows once more, eight blocks at a time, (blocks / 8, rows): what decoding reads.
    pub(crate) few: Vec<Eight>,
    pub(crate) blocks: usize,
    rows: usize,
}

impl QuantizedRows {
    /// Quantizes rows of `columns` values.
    ///
    /// # Panics
    /// When `columns` is not a positive multiple of [`BLOCK`], or `x` not whole rows.
    pub fn new(kernel: Kernel, x: &[f32], columns: usize) -> Self {
        let mut out = Self::default();
        out.fill(kernel, x, columns);
        out
    }

    /// The same into the memory that is already here.
    ///
    /// # Panics
    /// As [`Self::new`].
    pub fn fill(&mut self, kernel: Kernel, x: &[f32], columns: usize) {
        assert!(
            columns > 0 && columns.is_multiple_of(BLOCK) && x.len().is_multiple_of(columns),
            "whole rows of whole blocks"
        );
        self.reshape(x.len() / columns, columns);
        let each = |(tiles, rows): (&mut [Tile], &[f32])| {
            for (block, tile) in tiles.iter_mut().enumerate() {
                let rows = rows.chunks_exact(columns);
                kernel.quantize(rows.map(|row| &row.as_chunks().0[block]), tile);
            }
        };
        if self.rows <= TILE_ROWS {
            each((&mut self.tiles, x));
        } else {
            let tiles = self.tiles.par_chunks_mut(self.blocks);
            tiles.zip(x.par_chunks(TILE_ROWS * columns)).for_each(each);
        }
        self.fill_few();
    }

    /// Gives the rows a shape; what they hold afterwards means nothing.
    pub(crate) fn reshape(&mut self, rows: usize, columns: usize) {
        self.blocks = columns / BLOCK;
        self.rows = rows;
        let tiles = rows.div_ceil(TILE_ROWS) * self.blocks;
        self.tiles.resize(tiles, Tile::default());
    }

    /// Takes few rows from their tiles once more.
    pub(crate) fn fill_few(&mut self) {
        self.few.clear();
        if self.rows <= FEW_ROWS {
            for first in (0..self.blocks).step_by(8) {
                for row in 0..self.rows {
                    self.few.push(self.eight(row, first));
                }
            }
        }
    }

    /// At most eight blocks of a row.
    fn eight(&self, row: usize, first: usize) -> Eight {
        let (tile, place) = (row / TILE_ROWS * self.blocks, row % TILE_ROWS);
        let tiles = &self.tiles[tile + first..tile + self.blocks.min(first + 8)];
        let mut eight = Eight::default();
        for (index, tile) in tiles.iter().enumerate() {
            eight.words[index] = tile.words.map(|word| word[place]);
            (eight.scales[index], eight.sums[index]) = (tile.scales[place], tile.sums[place]);
        }
        eight
    }

    /// The rows as a matrix is multiplied with them: as they are, or by nibble.
    pub(crate) fn facing(&self, weights: &AffineRows<'_>) -> Cow<'_, Self> {
        if weights.bits() == 8 {
            Cow::Owned(self.by_nibble())
        } else {
            Cow::Borrowed(self)
        }
    }

    /// The rows for weights of eight bits, twice as many blocks, which only kernels for many rows read: each has 32 columns, in their
    /// order, and has them once for the lower nibbles and once for the upper ones.
    fn by_nibble(&self) -> Self {
        let mut out = Self::default();
        out.reshape(self.rows, 2 * self.columns());
        let pairs = out.tiles.as_chunks_mut().0;
        let each = |(pair, tile): (&mut [Tile; 2], &Tile)| *pair = tile.by_nibble();
        if self.rows <= TILE_ROWS {
            pairs.iter_mut().zip(&self.tiles).for_each(each);
        } else {
            pairs.par_iter_mut().zip(&self.tiles).for_each(each);
        }
        out
    }

    /// Tiles of the first rows and of the last: all there are of at most two tiles of rows, twice the same of one.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn first_and_last_tiles(&self) -> [&[Tile]; 2] {
        let last = self.tiles.len() - self.blocks;
        [&self.tiles[..self.blocks], &self.tiles[last..]]
    }

    /// Rows held.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values per row.
    pub fn columns(&self) -> usize {
        self.blocks * BLOCK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Column by column: both nibbles of a byte meet the column's activation, and a half's sum is of its own columns.
    #[test]
    fn by_nibble_every_column_is_where_its_byte_is() {
        let (rows, columns) = (7, 2 * BLOCK);
        let value = |row: usize, column: usize| ((row * 31 + column * 17) % 253) as f32 - 126.0;
        let mut x = Vec::new();
        for row in 0..rows {
            x.extend((0..columns).map(|column| match column % BLOCK {
                0 => 127.0, // the scale is 1, and a code its value
                _ => value(row, column),
            }));
        }
        let plain = QuantizedRows::new(Kernel::Scalar, &x, columns);
        let faced = plain.by_nibble();
        assert_eq!((faced.rows, faced.blocks), (rows, 2 * plain.blocks));
        for (row, x) in x.chunks_exact(columns).enumerate() {
            for (block, x) in x.chunks_exact(BLOCK / 2).enumerate() {
                let tile = &faced.tiles[row / TILE_ROWS * faced.blocks + block];
                let place = row % TILE_ROWS;
                let codes: Vec<i8> = (tile.words.iter())
                    .flat_map(|word| word[place].to_le_bytes().map(u8::cast_signed))
                    .collect();
                let want: Vec<i8> = x.iter().map(|value| *value as i8).collect();
                assert_eq!(codes, [&want[..], &want].concat(), "{row} {block}");
                assert_eq!(tile.scales[place], 1.0);
                assert_eq!(tile.sums[place], x.iter().sum::<f32>(), "{row} {block}");
            }
        }
    }
}
