//! INT4 and INT8 weights times eight-bit activations with AVX2. `scalar.rs` specifies a value to the bit.
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
//! 16-bit sums: a pair is at most 2 * 15 * 127 = 3810, eight of them 30480: they fit in 32767, and only then become 32 bits. INT8 goes
//! through `many.rs`, and `sums.rs` has its bounds.

mod many;
mod several;
mod sums;
mod vnni;

use std::arch::x86_64::*;
use std::ops::Range;

use super::{
    Avx2, load_bytes, load_f32, load_half, load_halves, load_words, prefetch_far, store,
    transpose_f32, transpose_halves, transpose_i16,
};
use crate::activations::{BLOCK, Eight, QuantizedRows, WORDS};
use crate::affine::{AffineRows, ScaleType};
use crate::product::{Out, PANEL};

/// Panels that are multiplied with a tile of activations: 10 sums, 2 codes, a word and a product are 14 of 16 registers.
const TILE_PANELS: usize = 2;
/// Bytes of a row's codes that are read at a time.
const RUN: usize = BLOCK / 2;
/// How far ahead of a row's codes memory is asked for when decoding, into the second-level cache: so many rows, and not nearer than
/// so many bytes. Into the first level it comes a fifth slower.
const CODES_AHEAD_ROWS: usize = 5;
const AHEAD_BYTES_MIN: usize = 8192;
/// The same for its scales and biases: of five rows of 3072 columns they are few lines.
const LINES_AHEAD_ROWS: usize = 16;

/// Bytes ahead of a row of so many that memory is asked for.
fn ahead_bytes(row_bytes: usize) -> usize {
    AHEAD_BYTES_MIN.max(row_bytes * CODES_AHEAD_ROWS)
}

impl Avx2 {
    /// Values of a range of panels for all of `x`.
    pub(crate) fn multiply(
        self,
        weights: &AffineRows<'_>,
        panels: Range<usize>,
        x: &QuantizedRows,
        out: Out<'_>,
    ) {
        let kernel = match x.rows() {
            _ if weights.bits() == 8 => many::many_rows,
            1 => one_row,
            2 => several::several_rows::<2>,
            3 => several::several_rows::<3>,
            4 => several::several_rows::<4>,
            5 => several::several_rows::<5>,
            6 => several::several_rows::<6>,
            7 => several::several_rows::<7>,
            8 => several::several_rows::<8>,
            9 => several::several_rows::<9>,
            10 => several::several_rows::<10>,
            _ => many::many_rows,
        };
        // SAFETY: `self` exists, so `detect` saw the features.
        unsafe { kernel(weights, panels, x, out) };
    }
}

/// A panel's rows in their file, and scales and biases of all its blocks.
struct Panel<'a> {
    rows: [[&'a [u8]; 3]; PANEL], // codes, scales, biases
    /// Blocks that each of the rows has.
    blocks: usize,
    /// Runs of 32 bytes of codes that each of the rows has: a block is one, of INT8 two.
    runs: usize,
    lines: Vec<[__m256; 2]>, // (blocks): scale and bias of each row
}

impl<'a> Panel<'a> {
    fn new() -> Self {
        Self {
            rows: [[&[]; 3]; PANEL],
            blocks: 0,
            runs: 0,
            lines: Vec::new(),
        }
    }

    /// Rows behind the last one are the last one again; nobody asks for their values.
    fn find(&mut self, weights: &AffineRows<'a>, panel: usize) {
        let last = weights.rows() - 1;
        for (index, row) in self.rows.iter_mut().enumerate() {
            *row = weights.row((panel * PANEL + index).min(last));
        }
        self.blocks = weights.blocks();
        self.runs = self.blocks * weights.block_bytes() / RUN;
        let bytes = self.runs * RUN;
        let whole = self.rows.iter().all(|[codes, ..]| codes.len() >= bytes);
        assert!(whole, "a row is whole blocks");
    }

    /// Reads scales and biases.
    #[target_feature(enable = "avx2,f16c")]
    fn read_lines(&mut self, weights: &AffineRows<'a>) {
        let per_group = weights.blocks_per_group();
        self.lines
            .resize(weights.blocks(), [_mm256_setzero_ps(); 2]);
        let halves = weights.scale_type() != ScaleType::F32;
        if halves && per_group == 1 && self.blocks.is_multiple_of(PANEL) {
            return self.read_halves(weights.scale_type());
        }
        for (eight, lines) in self.lines.chunks_mut(8 * per_group).enumerate() {
            for part in 0..2 {
                let by_group = by_group(&self.rows, (1 + part, 8 * eight), weights.scale_type());
                for (index, line) in lines.iter_mut().enumerate() {
                    line[part] = by_group[index / per_group];
                }
            }
        }
    }

    /// Scales and biases of sixteen bits, a group a block, eight blocks at a time.
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn read_halves(&mut self, scale_type: ScaleType) {
        for (eight, lines) in self.lines.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let mut rows = [_mm256_setzero_si256(); PANEL];
            for (both, [_, scales, biases]) in rows.iter_mut().zip(self.rows) {
                *both = load_halves(&scales.as_chunks().0[eight], &biases.as_chunks().0[eight]);
            }
            for (line, both) in lines.iter_mut().zip(transpose_i16(rows)) {
                let scale = widen_halves(_mm256_castsi256_si128(both), scale_type);
                let bias = widen_halves(_mm256_extracti128_si256::<1>(both), scale_type);
                *line = [scale, bias];
            }
        }
    }

    /// A run of codes of a row.
    #[inline]
    fn codes(&self, row: usize, run: usize) -> &[u8; RUN] {
        // Not a look at the row's length: with that this was a twentieth of the product of eight activations.
        assert!(run < self.runs, "inside the rows");
        // SAFETY: `find` saw that every row has that many runs, and the place is inside one of them.
        let place = unsafe { self.rows[row][0].as_ptr().add(run * RUN) };
        // SAFETY: as many bytes are there for as long as the row is borrowed.
        unsafe { &*place.cast() }
    }

    /// One run of all rows: of the eight words of a row, one in each register.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn words(&self, run: usize) -> [__m256i; PANEL] {
        let codes = |row: usize, half: usize| -> &[u8; RUN / 2] {
            let halves = self.codes(row, run).as_chunks().0;
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

    /// One block of INT4 of all rows, as the module's comment draws it, into place `offset` of each step.
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

    /// The same of a block of INT8, whose steps are the same columns. Returns the bits that any code has.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn unpack_bytes(
        &self,
        block: usize,
        steps: &mut [[__m256i; TILE_PANELS]; WORDS],
        offset: usize,
    ) -> __m256i {
        let evens_first = _mm256_broadcastsi128_si256(_mm_setr_epi8(
            0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15,
        ));
        let mut any = _mm256_setzero_si256();
        for half in 0..2 {
            let words = self.words(2 * block + half);
            for (t, two) in words.as_chunks::<2>().0.iter().enumerate() {
                any = _mm256_or_si256(any, _mm256_or_si256(two[0], two[1]));
                let first = _mm256_shuffle_epi8(two[0], evens_first);
                let second = _mm256_shuffle_epi8(two[1], evens_first);
                let (low, high) = (
                    _mm256_srli_epi32::<16>(first),
                    _mm256_slli_epi32::<16>(second),
                );
                steps[4 * half + t][offset] = _mm256_blend_epi16::<0xAA>(first, high);
                steps[8 + 4 * half + t][offset] = _mm256_blend_epi16::<0xAA>(low, second);
            }
        }
        any
    }
}

/// Decoding: every weight is used once, and memory is what limits. Rows of weights are read one after the other; a lane is a block.
#[target_feature(enable = "avx2,fma,f16c")]
fn one_row(weights: &AffineRows<'_>, panels: Range<usize>, x: &QuantizedRows, out: Out<'_>) {
    let mut panel = Panel::new();
    let first = panels.start;
    let mut eights = vec![EightBlocks::new(); x.few.len()];
    for index in panels {
        panel.find(weights, index);
        for (row, parts) in panel.rows.iter().enumerate() {
            read_row(*parts, weights, &x.few, &mut eights, row);
        }
        let mut value = _mm256_setzero_ps();
        for (index, (eight, x_eight)) in eights.iter().zip(&x.few).enumerate() {
            // Not by `map`, which lacks the features: the compiler at times calls the closure instead of inlining it, and a row takes
            // a tenth longer.
            let [scales, biases] = eight.lines;
            let lines = [transpose_f32(scales), transpose_f32(biases)];
            let blocks = 8.min(x.blocks - 8 * index);
            let dots = transpose_f32(eight.dots);
            for (block, dot) in dots.into_iter().enumerate().take(blocks) {
                let line = [lines[0][block], lines[1][block]];
                let x = [x_eight.scales[block], x_eight.sums[block]];
                value = accumulate(value, dot, line, x);
            }
        }
        out(index - first, 0, &[store(value)]);
    }
}

/// What eight blocks of a panel give with the row of activations. Lanes are blocks.
#[derive(Clone, Copy)]
struct EightBlocks {
    /// Dot products of each row.
    dots: [__m256; PANEL],
    /// Scales and biases of each row.
    lines: [[__m256; PANEL]; 2],
}

impl EightBlocks {
    #[target_feature(enable = "avx2")]
    fn new() -> Self {
        Self {
            dots: [_mm256_setzero_ps(); PANEL],
            lines: [[_mm256_setzero_ps(); PANEL]; 2],
        }
    }
}

/// What all blocks of a row of weights give, into place `row`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn read_row(
    [codes, scales, biases]: [&[u8]; 3],
    weights: &AffineRows<'_>,
    x: &[Eight],
    eights: &mut [EightBlocks],
    row: usize,
) {
    let scale_type = weights.scale_type();
    let (width, per_group) = (scale_type.bytes(), weights.blocks_per_group());
    let ahead = ahead_bytes(codes.len());
    for part in [scales, biases] {
        prefetch_far(
            part.as_ptr().wrapping_add(LINES_AHEAD_ROWS * part.len()),
            part.len(),
        );
    }
    let (whole, rest) = codes.as_chunks::<{ BLOCK / 2 }>().0.as_chunks::<8>();
    let mut padded = [[0; BLOCK / 2]; 8];
    padded[..rest.len()].copy_from_slice(rest);
    for (eight, (x, out)) in x.iter().zip(eights).enumerate() {
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
        prefetch_far(
            codes.as_ptr().cast::<u8>().wrapping_add(ahead),
            size_of_val(codes),
        );
        out.dots[row] = _mm256_cvtepi32_ps(eight_dots(codes, &x.words));
        [out.lines[0][row], out.lines[1][row]] = [scale, bias];
    }
}

/// Dot products of eight blocks of one row of weights with those of the row of activations, a lane each.
///
/// A 16-bit lane holds a pair of even and a pair of odd columns, at most 2 * 3810 = 7620; two additions of lanes make that
/// 30480 before lanes become 32 bits.
#[target_feature(enable = "avx2")]
#[inline]
fn eight_dots(codes: &[[u8; BLOCK / 2]; 8], words: &[[i32; WORDS]; 8]) -> __m256i {
    let nibble = _mm256_set1_epi8(0xF);
    let mut halves = [nibble; 2]; // each 128-bit half: one word of each of four blocks
    let fours = halves.iter_mut().zip(codes.as_chunks::<4>().0);
    for ((dots, codes), words) in fours.zip(words.as_chunks::<4>().0) {
        let mut sums = [_mm256_setzero_si256(); 4];
        for ((sum, codes), words) in sums.iter_mut().zip(codes).zip(words) {
            let codes = load_bytes(codes);
            let low = _mm256_and_si256(codes, nibble);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), nibble);
            let (even, odd) = words.split_at(WORDS / 2);
            let low = _mm256_maddubs_epi16(low, load_words(even));
            *sum = _mm256_add_epi16(low, _mm256_maddubs_epi16(high, load_words(odd)));
        }
        let [a, b, c, d] = sums;
        let ab = _mm256_add_epi16(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let cd = _mm256_add_epi16(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
        let four = _mm256_add_epi16(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
        *dots = _mm256_madd_epi16(four, _mm256_set1_epi16(1));
    }
    let [first, last] = halves;
    _mm256_add_epi32(
        _mm256_permute2x128_si256::<0x20>(first, last),
        _mm256_permute2x128_si256::<0x31>(first, last),
    )
}

/// `value` and what a block adds to it, rounded as the specification does.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn accumulate(value: __m256, dot: __m256, [scale, bias]: [__m256; 2], x: [f32; 2]) -> __m256 {
    let value = _mm256_fmadd_ps(bias, _mm256_set1_ps(x[1]), value);
    let scale = _mm256_mul_ps(scale, _mm256_set1_ps(x[0]));
    _mm256_fmadd_ps(dot, scale, value)
}

/// Memory of the panels behind those that are multiplied together, to be asked for: rows lie one behind the other, so the shares of
/// all blocks run through the panels to come from beginning to end.
struct Ahead {
    starts: [*const u8; 3], // of codes, scales, biases
    panels: usize,
    code_bytes: usize,  // of codes that a block of a panel has
    scale_bytes: usize, // of scales or biases
}

impl Ahead {
    fn new(first: &Panel<'_>, panels: usize) -> Self {
        Self {
            starts: first.rows[0].map(|row| row.as_ptr().wrapping_add(row.len() * PANEL * panels)),
            panels,
            code_bytes: first.runs / first.blocks * RUN * PANEL,
            scale_bytes: first.rows[0][1].len() * PANEL / first.blocks,
        }
    }

    /// Asks for a line of a block's share of codes, of which a panel of INT4 has four. Between products, one by one: a core has few places
    /// for lines on their way, and when a burst takes them all, its loads wait.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn prefetch_codes(&self, block: usize, line: usize) {
        let at = block * self.panels * self.code_bytes + 64 * line;
        _mm_prefetch::<_MM_HINT_T1>(self.starts[0].wrapping_add(at).cast());
    }

    /// Asks for the lines that begin in a block's share of scales and biases. Into the first level where they are used with the next
    /// panels: a row's are short, and read all at once, from as many lines as there are rows.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn prefetch_scales<const HINT: i32>(&self, block: usize) {
        let share = self.panels * self.scale_bytes;
        let mut at = (block * share).next_multiple_of(64);
        while at < (block + 1) * share {
            _mm_prefetch::<HINT>(self.starts[1].wrapping_add(at).cast());
            _mm_prefetch::<HINT>(self.starts[2].wrapping_add(at).cast());
            at += 64;
        }
    }

    /// Asks for all lines of a block's share, into the second level: there are many rows of activations before they are used.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn prefetch_all(&self, block: usize) {
        for line in 0..self.panels * self.code_bytes / 64 {
            self.prefetch_codes(block, line);
        }
        self.prefetch_scales::<_MM_HINT_T1>(block);
    }
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

/// Eight values of sixteen bits.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn widen_halves(halves: __m128i, scale_type: ScaleType) -> __m256 {
    if scale_type == ScaleType::Bf16 {
        return _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)));
    }
    _mm256_cvtph_ps(halves)
}

/// The first eight values, zeros behind the last.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn widen(stored: &[u8], scale_type: ScaleType) -> __m256 {
    match scale_type {
        ScaleType::F16 | ScaleType::Bf16 => widen_halves(load_half(stored), scale_type),
        ScaleType::F32 => {
            let mut eight = [0f32; 8];
            let count = stored.len().min(32) / 4;
            crate::widen::widen_f32(&stored[..4 * count], &mut eight[..count]);
            load_f32(&eight)
        }
    }
}
