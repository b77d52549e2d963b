//! INT4 weights times eight-bit activations with AVX2. `scalar.rs` specifies a value to the bit.
//!
//! Eight rows of weights make a panel. Of a panel's block of 64 columns, eight words a row are transposed, so that a register
//! holds one word of each row; its low nibbles are four even columns of each row, its high ones the four odd columns beside
//! them. One `vpmaddubsw` multiplies them with the same four activations, sent to all rows: unsigned codes with signed ones,
//! neighbours added in 16 bits.
//!
//! ```text
//! register t (of 16)   byte 4r..4r+4 = row r, columns 8(t % 8) + {0,2,4,6} + t / 8        one word of activations: t
//! ```
//!
//! 16-bit sums: a pair is at most 2 * 15 * 127 = 3810, eight of them 30480: they fit in 32767, and only then become 32 bits.

mod several;
mod vnni;

use std::arch::x86_64::*;
use std::ops::Range;

use super::{
    Avx2, load_bytes, load_f32, load_half, load_halves, load_words, store, transpose_f32,
    transpose_halves,
};
use crate::activations::{BLOCK, Eight, QuantizedRows, TILE_ROWS, Tile, WORDS};
use crate::int4::{Int4Rows, ScaleType};
use crate::product::PANEL;

/// Panels that are multiplied with a tile of activations: 2 * 5 sums, 2 weights, activations and products fill 16 registers.
const TILE_PANELS: usize = 2;
/// Rows of activations whose values are gathered at a time, whole tiles: with a stretch of blocks 141 KB, their values 15 KB for
/// a pair of panels, in the second-level cache.
const ROWS_AT_ONCE: usize = 48 * TILE_ROWS;
/// Pairs of panels that a chunk of rows meets before the next stretch of blocks.
const PAIRS_AT_ONCE: usize = 8;
/// Up to this many rows, pairs of panels are taken one by one.
const ONE_PAIR_ROWS: usize = 64;
/// Blocks of weights unpacked at a time: two panels of 16 are 16 KiB, half of the first-level cache.
const BLOCKS_AT_ONCE: usize = 16;
/// How far ahead of a row's codes memory is asked for when decoding: nearer is too late, and from 3 KiB on nothing is gained.
const AHEAD_BYTES: usize = 2048;

impl Avx2 {
    /// Values of the rows `panel * PANEL..` of a panel pair for all of `x`: `out(panel offset, row of x, eight values)`.
    pub(crate) fn multiply(
        self,
        weights: &Int4Rows<'_>,
        panels: Range<usize>,
        x: &QuantizedRows,
        out: &mut dyn FnMut(usize, usize, &[f32; PANEL]),
    ) {
        let kernel = match x.rows() {
            1 => few_rows::<1>,
            2 => few_rows::<2>,
            3 => few_rows::<3>,
            4 => several::several_rows::<4>,
            5 => several::several_rows::<5>,
            6 => several::several_rows::<6>,
            7 => several::several_rows::<7>,
            8 => several::several_rows::<8>,
            9 => several::several_rows::<9>,
            10 => several::several_rows::<10>,
            _ => many_rows,
        };
        // SAFETY: `self` exists, so `detect` saw the features.
        unsafe { kernel(weights, panels, x, out) };
    }
}

/// Adds a stretch of blocks to the values of a tile's rows, at most [`TILE_ROWS`]. Unsafe for the features it takes. Called
/// through a pointer it is a function of its own; inlined into the loops around it, it was slower by a twentieth.
type AddTile = unsafe fn(&Unpacked, &[Tile], &mut [[__m256; TILE_PANELS]]);

/// A panel's rows in their file, and scales and biases of all its blocks.
struct Panel<'a> {
    rows: [[&'a [u8]; 3]; PANEL], // codes, scales, biases
    /// Blocks that each of the rows has.
    blocks: usize,
    lines: Vec<[__m256; 2]>, // (blocks): scale and bias of each row
}

impl<'a> Panel<'a> {
    fn new() -> Self {
        Self {
            rows: [[&[]; 3]; PANEL],
            blocks: 0,
            lines: Vec::new(),
        }
    }

    /// Rows behind the last one are the last one again; nobody asks for their values.
    fn find(&mut self, weights: &Int4Rows<'a>, panel: usize) {
        let last = weights.rows() - 1;
        for (index, row) in self.rows.iter_mut().enumerate() {
            *row = weights.row((panel * PANEL + index).min(last));
        }
        self.blocks = weights.columns() / BLOCK;
        let bytes = self.blocks * BLOCK / 2;
        let whole = self.rows.iter().all(|[codes, ..]| codes.len() >= bytes);
        assert!(whole, "a row is whole blocks");
    }

    /// Reads scales and biases.
    #[target_feature(enable = "avx2,f16c")]
    fn read_lines(&mut self, weights: &Int4Rows<'a>) {
        let per_group = weights.group() / BLOCK;
        self.lines
            .resize(weights.columns() / BLOCK, [_mm256_setzero_ps(); 2]);
        for (eight, lines) in self.lines.chunks_mut(8 * per_group).enumerate() {
            for part in 0..2 {
                let by_group = by_group(&self.rows, (1 + part, 8 * eight), weights.scale_type());
                for (index, line) in lines.iter_mut().enumerate() {
                    line[part] = by_group[index / per_group];
                }
            }
        }
    }

    /// A block of a row.
    #[inline]
    fn codes(&self, row: usize, block: usize) -> &[u8; BLOCK / 2] {
        // Not a look at the row's length: with that this was a twentieth of the product of eight activations.
        assert!(block < self.blocks, "inside the rows");
        // SAFETY: `find` saw that every row has that many blocks, and the place is inside one of them.
        let place = unsafe { self.rows[row][0].as_ptr().add(block * (BLOCK / 2)) };
        // SAFETY: as many bytes are there for as long as the row is borrowed.
        unsafe { &*place.cast() }
    }

    /// One block of all rows: of the eight words of a row, one in each register.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn words(&self, block: usize) -> [__m256i; PANEL] {
        let codes = |row: usize, half: usize| -> &[u8; BLOCK / 4] {
            let halves = self.codes(row, block).as_chunks().0;
            &halves[half]
        };
        let mut words = [_mm256_setzero_si256(); PANEL];
        for half in 0..2 {
            let mut rows = [_mm256_setzero_si256(); PANEL / 2];
            for (row, pair) in rows.iter_mut().enumerate() {
                *pair = load_halves(codes(row, half), codes(row + PANEL / 2, half));
            }
            words[4 * half..][..4].copy_from_slice(&transpose_halves(rows));
        }
        words
    }

    /// One block of all rows, as the module's comment draws it, into place `offset` of each step.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn unpack(&self, block: usize, steps: &mut [[__m256i; TILE_PANELS]; WORDS], offset: usize) {
        let words = self.words(block);
        let nibble = _mm256_set1_epi8(0xF);
        for t in 0..8 {
            steps[t][offset] = _mm256_and_si256(words[t], nibble);
            steps[8 + t][offset] = _mm256_and_si256(_mm256_srli_epi16::<4>(words[t]), nibble);
        }
    }
}

/// Decoding: every weight is used for one to three rows of `x`, and memory is what limits. Rows of weights are read one after
/// the other; a lane is a block.
#[target_feature(enable = "avx2,fma,f16c")]
fn few_rows<const N: usize>(
    weights: &Int4Rows<'_>,
    panels: Range<usize>,
    x: &QuantizedRows,
    out: &mut dyn FnMut(usize, usize, &[f32; PANEL]),
) {
    let mut panel = Panel::new();
    let first = panels.start;
    let x_eights = x.few.as_chunks::<N>().0;
    let mut products = vec![[[_mm256_setzero_ps(); PANEL]; N]; x_eights.len()]; // (blocks / 8, rows of x, rows), lanes: blocks
    for index in panels {
        panel.find(weights, index);
        for (row, parts) in panel.rows.iter().enumerate() {
            row_products(*parts, weights, x_eights, &mut products, row);
        }
        let mut values = [_mm256_setzero_ps(); N];
        for (eight, products) in products.iter().enumerate() {
            let blocks = 8.min(x.blocks - 8 * eight);
            for (value, products) in values.iter_mut().zip(products) {
                for product in &transpose_f32(*products)[..blocks] {
                    *value = _mm256_add_ps(*value, *product);
                }
            }
        }
        for (row, value) in values.iter().enumerate() {
            out(index - first, row, &store(*value));
        }
    }
}

/// What each block of a row of weights adds to its values, eight blocks at a time, into column `row` of `products`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn row_products<const N: usize>(
    [codes, scales, biases]: [&[u8]; 3],
    weights: &Int4Rows<'_>,
    x: &[[Eight; N]],
    products: &mut [[[__m256; PANEL]; N]],
    row: usize,
) {
    let scale_type = weights.scale_type();
    let (width, per_group) = (scale_type.bytes(), weights.group() / BLOCK);
    let (whole, rest) = codes.as_chunks::<{ BLOCK / 2 }>().0.as_chunks::<8>();
    let mut padded = [[0; BLOCK / 2]; 8];
    padded[..rest.len()].copy_from_slice(rest);
    for (eight, (x, products)) in x.iter().zip(products).enumerate() {
        let codes = whole.get(eight).unwrap_or(&padded);
        let (scale, bias) = if per_group == 1 {
            let at = 8 * eight * width;
            (
                widen(&scales[at..], scale_type),
                widen(&biases[at..], scale_type),
            )
        } else {
            let line = |part: &[u8]| {
                std::array::from_fn(|block| {
                    scale_type.get_or_zero(part, (8 * eight + block) / per_group)
                })
            };
            (load_f32(&line(scales)), load_f32(&line(biases)))
        };
        let dots = eight_dots(codes, x.each_ref().map(|x| &x.words));
        for n in 0..N {
            let dot = _mm256_cvtepi32_ps(dots[n]);
            let scale = _mm256_mul_ps(scale, load_f32(&x[n].scales));
            let bias = _mm256_mul_ps(bias, load_f32(&x[n].sums));
            products[n][row] = _mm256_fmadd_ps(dot, scale, bias);
        }
    }
}

/// Dot products of eight blocks of one row of weights with a few rows of activations, a lane each.
///
/// A 16-bit lane holds a pair of even and a pair of odd columns, at most 2 * 3810 = 7620; two additions of lanes make that
/// 30480 before lanes become 32 bits.
#[target_feature(enable = "avx2")]
#[inline]
fn eight_dots<const N: usize>(
    codes: &[[u8; BLOCK / 2]; 8],
    words: [&[[i32; WORDS]; 8]; N],
) -> [__m256i; N] {
    let nibble = _mm256_set1_epi8(0xF);
    for line in 0..4 {
        let ahead = codes
            .as_ptr()
            .cast::<u8>()
            .wrapping_add(AHEAD_BYTES + 64 * line);
        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
    }
    let mut halves = [[nibble; N]; 2]; // each 128-bit half: one word of each of four blocks
    let fours = halves.iter_mut().zip(codes.as_chunks::<4>().0);
    for (half, (dots, codes)) in fours.enumerate() {
        let mut sums = [[_mm256_setzero_si256(); N]; 4];
        for (place, (sums, codes)) in sums.iter_mut().zip(codes).enumerate() {
            let codes = load_bytes(codes);
            let low = _mm256_and_si256(codes, nibble);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), nibble);
            for (sum, words) in sums.iter_mut().zip(words) {
                let (even, odd) = words[4 * half + place].split_at(WORDS / 2);
                let low = _mm256_maddubs_epi16(low, load_words(even));
                *sum = _mm256_add_epi16(low, _mm256_maddubs_epi16(high, load_words(odd)));
            }
        }
        for (row, dots) in dots.iter_mut().enumerate() {
            let [a, b, c, d] = [sums[0][row], sums[1][row], sums[2][row], sums[3][row]];
            let ab = _mm256_add_epi16(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
            let cd = _mm256_add_epi16(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
            let four =
                _mm256_add_epi16(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
            *dots = _mm256_madd_epi16(four, _mm256_set1_epi16(1));
        }
    }
    let [first, mut dots] = halves;
    for (dots, first) in dots.iter_mut().zip(first) {
        *dots = _mm256_add_epi32(
            _mm256_permute2x128_si256::<0x20>(first, *dots),
            _mm256_permute2x128_si256::<0x31>(first, *dots),
        );
    }
    dots
}

/// `value` and what a block adds to it, rounded as the specification does.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn accumulate(value: __m256, dot: __m256i, [scale, bias]: [__m256; 2], x: [f32; 2]) -> __m256 {
    let scale = _mm256_mul_ps(scale, _mm256_set1_ps(x[0]));
    let bias = _mm256_mul_ps(bias, _mm256_set1_ps(x[1]));
    _mm256_add_ps(value, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, bias))
}

/// A block of a pair of panels, unpacked: (steps, panels). A step is a cache line, for AVX-512 reads it at once.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Codes([[__m256i; TILE_PANELS]; WORDS]);

/// Takes up the first panels of a range; the last one again where there are fewer.
#[target_feature(enable = "avx2,f16c")]
fn find_pair<'a>(
    pair: &mut [Panel<'a>; TILE_PANELS],
    weights: &Int4Rows<'a>,
    panels: Range<usize>,
) {
    for (offset, panel) in pair.iter_mut().enumerate() {
        panel.find(weights, (panels.start + offset).min(panels.end - 1));
        panel.read_lines(weights);
    }
}

/// A stretch of blocks of a few panels, unpacked.
struct Unpacked {
    codes: Vec<Codes>,                      // (blocks)
    lines: Vec<[[__m256; 2]; TILE_PANELS]>, // (blocks)
}

impl Unpacked {
    #[target_feature(enable = "avx2")]
    fn new() -> Self {
        Self {
            codes: vec![Codes([[_mm256_setzero_si256(); TILE_PANELS]; WORDS]); BLOCKS_AT_ONCE],
            lines: vec![[[_mm256_setzero_ps(); 2]; TILE_PANELS]; BLOCKS_AT_ONCE],
        }
    }

    #[target_feature(enable = "avx2")]
    fn fill(&mut self, panels: &[Panel<'_>; TILE_PANELS], blocks: Range<usize>) {
        for (index, block) in blocks.enumerate() {
            for (offset, panel) in panels.iter().enumerate() {
                panel.unpack(block, &mut self.codes[index].0, offset);
                self.lines[index][offset] = panel.lines[block];
            }
            prefetch_after(&panels[0], block, TILE_PANELS);
        }
    }
}

/// Asks for what follows `panels` panels in memory, as far on as this block is in them: rows lie one behind the other, so the
/// requests of all blocks run through the next panels from beginning to end.
#[target_feature(enable = "avx2")]
#[inline]
fn prefetch_after(first: &Panel<'_>, block: usize, panels: usize) {
    let step = panels * PANEL * BLOCK / 2;
    let codes = first.rows[0][0];
    let next = codes
        .as_ptr()
        .wrapping_add(codes.len() * PANEL * panels + block * step);
    for line in 0..step / 64 {
        _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(64 * line).cast());
    }
}

/// Many rows: weights are unpacked once for a chunk of them. A stretch of blocks of the chunk's activations is read from the
/// second-level cache for every pair of panels in turn; with few rows it is in the first-level cache anyway, and pairs are
/// taken one by one, so that weights are read in their order.
#[target_feature(enable = "avx2,fma,f16c")]
fn many_rows(
    weights: &Int4Rows<'_>,
    panels: Range<usize>,
    x: &QuantizedRows,
    out: &mut dyn FnMut(usize, usize, &[f32; PANEL]),
) {
    // SAFETY: the tile takes what this function takes.
    unsafe { rows_by_tiles(weights, panels, x, add_tile, out) };
}

/// # Safety
/// The processor has what `add_tile` takes.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows_by_tiles(
    weights: &Int4Rows<'_>,
    panels: Range<usize>,
    x: &QuantizedRows,
    add_tile: AddTile,
    out: &mut dyn FnMut(usize, usize, &[f32; PANEL]),
) {
    let pairs_at_once = if x.rows() > ONE_PAIR_ROWS {
        PAIRS_AT_ONCE
    } else {
        1
    };
    let mut chunk = Chunk::new(pairs_at_once);
    for first in panels.clone().step_by(TILE_PANELS * pairs_at_once) {
        let end = panels.end.min(first + TILE_PANELS * pairs_at_once);
        let pairs = chunk.find_pairs(weights, first..end);
        for row in (0..x.rows()).step_by(ROWS_AT_ONCE) {
            let rows = row..(row + ROWS_AT_ONCE).min(x.rows());
            // SAFETY: the caller has what the tile takes.
            unsafe { chunk.multiply(pairs, x, rows.clone(), add_tile) };
            for (panel, values) in (first..)
                .step_by(TILE_PANELS)
                .zip(chunk.values.chunks(rows.len()))
            {
                for (row, values) in rows.clone().zip(values) {
                    for (panel, value) in (panel..end).zip(values) {
                        out(panel - panels.start, row, &store(*value));
                    }
                }
            }
        }
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
    fn new(pairs: usize) -> Self {
        let pair = || std::array::from_fn(|_| Panel::new());
        Self {
            pairs: std::iter::repeat_with(pair).take(pairs).collect(),
            unpacked: Unpacked::new(),
            values: Vec::new(),
        }
    }

    /// Takes up the pairs of a range of panels and says how many there are; the last panel twice where the last pair has no
    /// second.
    #[target_feature(enable = "avx2,f16c")]
    fn find_pairs(&mut self, weights: &Int4Rows<'a>, panels: Range<usize>) -> usize {
        let firsts = panels.clone().step_by(TILE_PANELS);
        let pairs = firsts.len();
        for (pair, first) in self.pairs.iter_mut().zip(firsts) {
            find_pair(pair, weights, first..panels.end);
        }
        pairs
    }

    /// Values of a chunk of rows for the first pairs.
    ///
    /// # Safety
    /// The processor has what `add_tile` takes.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn multiply(
        &mut self,
        pairs: usize,
        x: &QuantizedRows,
        rows: Range<usize>,
        add_tile: AddTile,
    ) {
        self.values.clear();
        let zeros = [_mm256_setzero_ps(); TILE_PANELS];
        self.values.resize(pairs * rows.len(), zeros);
        let tiles = &x.tiles[rows.start / TILE_ROWS * x.blocks..];
        for start in (0..x.blocks).step_by(BLOCKS_AT_ONCE) {
            let blocks = start..(start + BLOCKS_AT_ONCE).min(x.blocks);
            for (pair, values) in self.pairs.iter().zip(self.values.chunks_mut(rows.len())) {
                self.unpacked.fill(pair, blocks.clone());
                for (values, tiles) in values.chunks_mut(TILE_ROWS).zip(tiles.chunks(x.blocks)) {
                    // SAFETY: the caller has what it takes.
                    unsafe { add_tile(&self.unpacked, &tiles[blocks.clone()], values) };
                }
            }
        }
    }
}

/// Adds a stretch of blocks to the values of a tile's rows.
#[target_feature(enable = "avx2,fma")]
fn add_tile(weights: &Unpacked, tiles: &[Tile], values: &mut [[__m256; TILE_PANELS]]) {
    match values.len() {
        1 => rows_times_panels::<1>(weights, tiles, values),
        2 => rows_times_panels::<2>(weights, tiles, values),
        3 => rows_times_panels::<3>(weights, tiles, values),
        4 => rows_times_panels::<4>(weights, tiles, values),
        _ => rows_times_panels::<TILE_ROWS>(weights, tiles, values),
    }
}

/// Adds a stretch of blocks to the values of the first N rows of a tile.
#[target_feature(enable = "avx2,fma")]
fn rows_times_panels<const N: usize>(
    weights: &Unpacked,
    tiles: &[Tile],
    values: &mut [[__m256; TILE_PANELS]],
) {
    let values = values
        .first_chunk_mut::<N>()
        .expect("the caller counted them");
    let ones = _mm256_set1_epi16(1);
    // Eight, but unknown to the compiler: it would unroll the loop over steps and then hold every weight at once.
    let steps = std::hint::black_box(WORDS / 2);
    for ((codes, lines), tile) in weights.codes.iter().zip(&weights.lines).zip(tiles) {
        let (low, high) = codes.0.split_at(steps);
        let (low_words, high_words) = tile.words.split_at(steps);
        let low = pair_sums::<N>(low, low_words);
        let high = pair_sums::<N>(high, high_words);
        for row in 0..N {
            for offset in 0..TILE_PANELS {
                let low = _mm256_madd_epi16(low[row][offset], ones);
                let dot = _mm256_add_epi32(low, _mm256_madd_epi16(high[row][offset], ones));
                let x = [tile.scales[row], tile.sums[row]];
                values[row][offset] = accumulate(values[row][offset], dot, lines[offset], x);
            }
        }
    }
}

/// Products of at most eight steps, neighbours added, as 16-bit numbers: (rows of x, panels).
#[target_feature(enable = "avx2")]
#[inline]
fn pair_sums<const N: usize>(
    codes: &[[__m256i; TILE_PANELS]],
    words: &[[i32; TILE_ROWS]],
) -> [[__m256i; TILE_PANELS]; N] {
    let mut pairs = [[_mm256_setzero_si256(); TILE_PANELS]; N];
    for (codes, words) in codes.iter().zip(words) {
        for row in 0..N {
            let activation = _mm256_set1_epi32(words[row]);
            for offset in 0..TILE_PANELS {
                let products = _mm256_maddubs_epi16(codes[offset], activation);
                pairs[row][offset] = _mm256_add_epi16(pairs[row][offset], products);
            }
        }
    }
    pairs
}

/// Scales or biases of eight groups from `first`, of each group the eight rows'; behind the last group they mean nothing.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn by_group(
    rows: &[[&[u8]; 3]; PANEL],
    (part, first): (usize, usize),
    scale_type: ScaleType,
) -> [__m256; 8] {
    let mut values = [_mm256_setzero_ps(); PANEL];
    for row in 0..PANEL {
        values[row] = widen(&rows[row][part][first * scale_type.bytes()..], scale_type);
    }
    transpose_f32(values)
}

/// The first eight values, zeros behind the last.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn widen(stored: &[u8], scale_type: ScaleType) -> __m256 {
    match scale_type {
        ScaleType::F16 => _mm256_cvtph_ps(load_half(stored)),
        ScaleType::Bf16 => {
            let wide = _mm256_cvtepu16_epi32(load_half(stored));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
        ScaleType::F32 => {
            let mut eight = [0f32; 8];
            let count = stored.len().min(32) / 4;
            crate::widen::widen_f32(&stored[..4 * count], &mut eight[..count]);
            load_f32(&eight)
        }
    }
}
