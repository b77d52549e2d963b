//! Rows of activations in eight bits, what the integer kernels multiply.
//!
//! Columns come in blocks of 64, a weight's group. A block has one scale, and its codes lie in the order in which four-bit
//! weights leave their words (see [`crate::affine`]): first the even columns, then the odd ones.
//!
//! ```text
//! scale = max |x| / steps      code = x / scale, rounded to the nearest, ties to even: -steps..=steps
//! sum   = scale * (sum of the block's codes)
//! ```
//!
//! There are as many steps as leave the products room, see [`crate::AffineRows::activation_steps`].
//!
//! A block of zeros, or of values too small to divide by, has scale 0. A block with an infinity or a NaN has scale NaN, and so
//! has every product with it: nothing that broke upstream comes out looking sound.

use rayon::prelude::*;

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
    steps: u8,
}

impl QuantizedRows {
    /// Quantizes rows of `columns` values to so many steps on either side of zero.
    ///
    /// # Panics
    /// When `columns` is not a positive multiple of [`BLOCK`], `x` not whole rows, or there are no steps or more than 127.
    pub fn new(kernel: Kernel, x: &[f32], columns: usize, steps: u8) -> Self {
        let mut out = Self::default();
        out.fill(kernel, x, columns, steps);
        out
    }

    /// The same into the memory that is already here.
    ///
    /// # Panics
    /// As [`Self::new`].
    pub fn fill(&mut self, kernel: Kernel, x: &[f32], columns: usize, steps: u8) {
        assert!(
            columns > 0 && columns.is_multiple_of(BLOCK) && x.len().is_multiple_of(columns),
            "whole rows of whole blocks"
        );
        self.reshape(x.len() / columns, columns, steps);
        let each = |(tiles, rows): (&mut [Tile], &[f32])| {
            for (block, tile) in tiles.iter_mut().enumerate() {
                let rows = rows.chunks_exact(columns);
                kernel.quantize(rows.map(|row| &row.as_chunks().0[block]), steps, tile);
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
    pub(crate) fn reshape(&mut self, rows: usize, columns: usize, steps: u8) {
        assert!((1..=127).contains(&steps), "steps that a byte holds");
        self.blocks = columns / BLOCK;
        self.rows = rows;
        self.steps = steps;
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

    /// Steps on either side of zero.
    pub fn steps(&self) -> u8 {
        self.steps
    }
}
