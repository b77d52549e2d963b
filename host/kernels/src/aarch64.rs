//! The integer kernels with NEON and its dot products (Apple silicon, Graviton 2, Cortex-A76 and later).
//!
//! Four rows of weights make a quad, two quads a panel. Of a quad's block of 64 columns, eight words a row are transposed, so
//! that a register holds one word of each row; its low nibbles are four even columns of each row, its high ones the four odd
//! columns beside them. One `sdot` multiplies them with the same four activations and adds each row's four products in 32 bits.
//!
//! ```text
//! register t (of 16)   byte 4r..4r+4 = row r, columns 8(t % 8) + {0,2,4,6} + t / 8        one word of activations: t
//! ```
//!
//! Codes up to 15 are the same signed; those of INT8 are less by 128, and 128 times the activations' sum is added. A block's sum is at
//! most 64 * 255 * 64 = 1044480: exact in 32 bits, and as a float.

#![expect(
    unsafe_code,
    reason = "loads, stores, an instruction without a stable intrinsic, and calls that a CPU feature must allow"
)]

mod activation;
mod attention;
mod i8mm;
mod quantize;

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::ops::Range;

use crate::activations::{BLOCK, QuantizedRows, TILE_ROWS, Tile, WORDS};
use crate::affine::{AffineRows, ScaleType};
use crate::product::{Out, PANEL};

pub(crate) use i8mm::I8mm;

/// Weight rows of a register.
const QUAD: usize = 4;
/// Panels that are multiplied with a tile of activations.
const TILE_PANELS: usize = 2;
/// Their quads: 5 * 4 sums, 4 weights and 2 of activations are 26 of 32 registers.
const QUADS: usize = TILE_PANELS * PANEL / QUAD;
/// Blocks of weights unpacked at a time: four quads of 8 are 8 KiB, at most a quarter of a first-level cache.
const BLOCKS_AT_ONCE: usize = 8;

/// Proof that this processor has NEON and its dot products: only `detect` makes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neon(());

impl Neon {
    pub(crate) fn detect() -> Option<Self> {
        // Words of codes are loaded as bytes, the lowest first.
        let has = cfg!(target_endian = "little")
            && is_aarch64_feature_detected!("neon")
            && is_aarch64_feature_detected!("dotprod");
        has.then_some(Self(()))
    }

    /// Adds a stretch of blocks with products of bytes in 32 bits, four at a time.
    const fn dots<const BITS: usize>() -> Way {
        Way {
            arrange: if BITS == 8 { less_128 } else { |_| {} },
            add_tile: add_tile::<BITS>,
        }
    }

    /// Values of a range of panels for all of `x`.
    pub(crate) fn multiply(
        self,
        weights: &AffineRows<'_>,
        panels: Range<usize>,
        x: &QuantizedRows,
        out: Out<'_>,
    ) {
        if x.rows() == 1 && weights.bits() == 4 {
            // SAFETY: `self` exists, so `detect` saw the features.
            return unsafe { one_row(weights, panels, x, out) };
        }
        let way = [Self::dots::<4>(), Self::dots::<8>()][usize::from(weights.bits() == 8)];
        // SAFETY: as above.
        unsafe { many_rows(weights, panels, x, way, out) };
    }
}

/// Decoding: every weight is used once, and memory is what limits. Rows are read one after the other; a lane is a block.
#[target_feature(enable = "neon,dotprod")]
fn one_row(weights: &AffineRows<'_>, panels: Range<usize>, x: &QuantizedRows, out: Out<'_>) {
    // (blocks / 4, parts, rows), lanes: blocks; parts are dot products, scales and biases
    let mut fours = vec![[[vdupq_n_f32(0.0); PANEL]; 3]; x.blocks.div_ceil(4)];
    for (index, panel) in panels.enumerate() {
        for row in 0..PANEL {
            let parts = row_or_last(weights, panel * PANEL + row);
            read_row(parts, weights, x, &mut fours, row);
        }
        let mut values = [vdupq_n_f32(0.0); 2];
        for (four, parts) in fours.iter().enumerate() {
            let (eight, first) = (&x.few[four / 2], four % 2 * 4);
            for (quad, value) in values.iter_mut().enumerate() {
                let [dots, scales, biases] =
                    parts.map(|part| transpose_f32(part.as_chunks().0[quad]));
                for block in 0..4.min(x.blocks - 4 * four) {
                    let line = [scales[block], biases[block]];
                    let x = [eight.scales[first + block], eight.sums[first + block]];
                    *value = accumulate(*value, dots[block], line, x);
                }
            }
        }
        out(index, 0, &[store_panel(values)]);
    }
}

/// What all blocks of a row of weights give, four at a time, into place `row` of each part.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn read_row(
    [codes, scales, biases]: [&[u8]; 3],
    weights: &AffineRows<'_>,
    x: &QuantizedRows,
    fours: &mut [[[float32x4_t; PANEL]; 3]],
    row: usize,
) {
    let (whole, rest) = codes.as_chunks::<{ 4 * BLOCK / 2 }>();
    let mut padded = [0; 4 * BLOCK / 2];
    padded[..rest.len()].copy_from_slice(rest);
    for (four, [dots, ..]) in fours.iter_mut().enumerate() {
        let codes = whole.get(four).unwrap_or(&padded);
        let words = &x.few[four / 2].words.as_chunks().0[four % 2];
        dots[row] = vcvtq_f32_s32(four_dots(codes, words));
    }
    // Apart from the loop above: a call among its loads would send them all through the stack.
    for (four, [_, scale, bias]) in fours.iter_mut().enumerate() {
        scale[row] = four_blocks(scales, 4 * four, weights);
        bias[row] = four_blocks(biases, 4 * four, weights);
    }
}

/// Dot products of at most four blocks of one row of weights with one row of activations, a lane each.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn four_dots(codes: &[u8; 4 * BLOCK / 2], words: &[[i32; WORDS]; 4]) -> int32x4_t {
    let mut sums = [vdupq_n_s32(0); 4];
    for block in 0..4 {
        let (codes, _) = codes[block * BLOCK / 2..][..BLOCK / 2].as_chunks();
        let (words, _) = words[block].as_chunks();
        for part in 0..2 {
            let [even, odd] = nibbles(load_bytes(&codes[part]));
            sums[block] = dot(sums[block], even, load_codes(&words[part]));
            sums[block] = dot(sums[block], odd, load_codes(&words[2 + part]));
        }
    }
    let [a, b, c, d] = sums;
    vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d))
}

/// Scales or biases of four blocks from `first`; behind the last group they mean nothing.
#[target_feature(enable = "neon")]
#[inline]
fn four_blocks(part: &[u8], first: usize, weights: &AffineRows<'_>) -> float32x4_t {
    let (per_group, scale_type) = (weights.blocks_per_group(), weights.scale_type());
    if per_group == 1 {
        return widen(&part[first * scale_type.bytes()..], scale_type);
    }
    load_f32(&std::array::from_fn(|block| {
        scale_type.get_or_zero(part, (first + block) / per_group)
    }))
}

/// Four rows in their file, and scales and biases of all their blocks.
struct Quad<'a> {
    rows: [[&'a [u8]; 3]; QUAD],  // codes, scales, biases
    lines: Vec<[float32x4_t; 2]>, // (blocks): scale and bias of each row
}

impl<'a> Quad<'a> {
    fn new() -> Self {
        Self {
            rows: [[&[]; 3]; QUAD],
            lines: Vec::new(),
        }
    }

    /// Finds the rows from `first`, and reads their scales and biases.
    #[target_feature(enable = "neon")]
    fn read(&mut self, weights: &AffineRows<'a>, first: usize) {
        for (index, row) in self.rows.iter_mut().enumerate() {
            *row = row_or_last(weights, first + index);
        }
        self.lines.resize(weights.blocks(), [vdupq_n_f32(0.0); 2]);
        for (four, lines) in self.lines.chunks_mut(4).enumerate() {
            for part in 0..2 {
                let mut by_row = [vdupq_n_f32(0.0); QUAD];
                for (values, row) in by_row.iter_mut().zip(&self.rows) {
                    *values = four_blocks(row[1 + part], 4 * four, weights);
                }
                for (line, by_block) in lines.iter_mut().zip(transpose_f32(by_row)) {
                    line[part] = by_block;
                }
            }
        }
    }

    /// One block of all rows, as the module's comment draws it, into place `quad` of each step.
    #[target_feature(enable = "neon")]
    #[inline]
    fn unpack(
        &self,
        (block, bits): (usize, usize),
        steps: &mut [[int8x16_t; QUADS]; WORDS],
        quad: usize,
    ) {
        for half in 0..2 {
            let mut words = [[vdupq_n_s32(0); QUAD]; 2]; // even columns, odd ones
            for (row, [codes, ..]) in self.rows.iter().enumerate() {
                let codes = codes.as_chunks().0;
                let [even, odd] = if bits == 4 {
                    nibbles(load_bytes(&codes[2 * block + half]))
                } else {
                    let at = 2 * (2 * block + half);
                    split_bytes(load_bytes(&codes[at]), load_bytes(&codes[at + 1]))
                };
                words[0][row] = vreinterpretq_s32_s8(even);
                words[1][row] = vreinterpretq_s32_s8(odd);
            }
            for (odd, words) in words.into_iter().enumerate() {
                for (index, word) in transpose_i32(words).into_iter().enumerate() {
                    steps[WORDS / 2 * odd + 4 * half + index][quad] = vreinterpretq_s8_s32(word);
                }
            }
        }
    }
}

/// A row's parts. Rows behind the last one are the last one again; nobody asks for their values.
fn row_or_last<'a>(weights: &AffineRows<'a>, row: usize) -> [&'a [u8]; 3] {
    weights.row(row.min(weights.rows() - 1))
}

/// A stretch of blocks of a few quads, unpacked.
struct Unpacked {
    codes: Vec<[[int8x16_t; QUADS]; WORDS]>, // (blocks)
    lines: Vec<[[float32x4_t; 2]; QUADS]>,   // (blocks)
}

impl Unpacked {
    #[target_feature(enable = "neon")]
    fn new() -> Self {
        Self {
            codes: vec![[[vdupq_n_s8(0); QUADS]; WORDS]; BLOCKS_AT_ONCE],
            lines: vec![[[vdupq_n_f32(0.0); 2]; QUADS]; BLOCKS_AT_ONCE],
        }
    }

    #[target_feature(enable = "neon")]
    fn fill(&mut self, quads: &[Quad<'_>; QUADS], blocks: Range<usize>, bits: usize) {
        for (index, block) in blocks.enumerate() {
            for (offset, quad) in quads.iter().enumerate() {
                quad.unpack((block, bits), &mut self.codes[index], offset);
                self.lines[index][offset] = quad.lines[block];
            }
        }
    }
}

/// How a tile of rows meets unpacked weights; unsafe for the features it takes.
#[derive(Clone, Copy)]
struct Way {
    /// Puts unpacked weights into the form and the order that `add_tile` reads.
    arrange: unsafe fn(&mut Unpacked),
    /// Adds a stretch of blocks to the values of a tile's rows, at most [`TILE_ROWS`].
    add_tile: unsafe fn(&Unpacked, &[Tile], &mut [[float32x4_t; QUADS]]),
}

/// Prefill: weights are unpacked once for all rows of activations.
///
/// # Safety
/// The processor has what the way takes.
#[target_feature(enable = "neon")]
unsafe fn many_rows(
    weights: &AffineRows<'_>,
    panels: Range<usize>,
    x: &QuantizedRows,
    way: Way,
    out: Out<'_>,
) {
    let mut quads: [Quad<'_>; QUADS] = std::array::from_fn(|_| Quad::new());
    let mut values = vec![[vdupq_n_f32(0.0); QUADS]; x.rows()];
    let mut unpacked = Unpacked::new();
    for first in panels.clone().step_by(TILE_PANELS) {
        for (offset, quad) in quads.iter_mut().enumerate() {
            let panel = (first + offset / 2).min(panels.end - 1);
            quad.read(weights, panel * PANEL + offset % 2 * QUAD);
        }
        values.fill([vdupq_n_f32(0.0); QUADS]);
        for start in (0..x.blocks).step_by(BLOCKS_AT_ONCE) {
            let end = (start + BLOCKS_AT_ONCE).min(x.blocks);
            unpacked.fill(&quads, start..end, weights.bits());
            // SAFETY: the caller has what the way takes.
            unsafe { (way.arrange)(&mut unpacked) };
            for (rows, values) in values.chunks_mut(TILE_ROWS).enumerate() {
                let tiles = &x.tiles[rows * x.blocks + start..][..end - start];
                // SAFETY: the caller has what the way takes.
                unsafe { (way.add_tile)(&unpacked, tiles, values) };
            }
        }
        for (row, values) in values.iter().enumerate() {
            let [low, high] = values.as_chunks().0 else {
                unreachable!("a tile's quads are two panels");
            };
            let pair = [store_panel(*low), store_panel(*high)];
            let count = TILE_PANELS.min(panels.end - first);
            out(first - panels.start, row, &pair[..count]);
        }
    }
}

/// Adds a stretch of blocks to the values of a tile's rows.
#[target_feature(enable = "neon,dotprod")]
fn add_tile<const BITS: usize>(
    weights: &Unpacked,
    tiles: &[Tile],
    values: &mut [[float32x4_t; QUADS]],
) {
    match values.len() {
        1 => rows_times_quads::<1, BITS>(weights, tiles, values),
        2 => rows_times_quads::<2, BITS>(weights, tiles, values),
        3 => rows_times_quads::<3, BITS>(weights, tiles, values),
        4 => rows_times_quads::<4, BITS>(weights, tiles, values),
        _ => rows_times_quads::<TILE_ROWS, BITS>(weights, tiles, values),
    }
}

/// Adds a stretch of blocks to the values of the first N rows of a tile.
#[target_feature(enable = "neon,dotprod")]
fn rows_times_quads<const N: usize, const BITS: usize>(
    weights: &Unpacked,
    tiles: &[Tile],
    values: &mut [[float32x4_t; QUADS]],
) {
    let values = values
        .first_chunk_mut::<N>()
        .expect("the caller counted them");
    for ((codes, lines), tile) in weights.codes.iter().zip(&weights.lines).zip(tiles) {
        let dots = block_dots::<N, BITS>(codes, &tile.words);
        for row in 0..N {
            let x = [tile.scales[row], tile.sums[row]];
            add_block(&mut values[row], &dots[row], lines, x);
        }
    }
}

/// Adds what a block adds to the values of a row of activations, rounded as the specification does.
#[target_feature(enable = "neon")]
#[inline]
fn add_block(
    values: &mut [float32x4_t; QUADS],
    dots: &[int32x4_t; QUADS],
    lines: &[[float32x4_t; 2]; QUADS],
    [x_scale, x_sum]: [f32; 2],
) {
    for quad in 0..QUADS {
        let [scale, bias] = lines[quad];
        let dot = vcvtq_f32_s32(dots[quad]);
        values[quad] = accumulate(values[quad], dot, [scale, bias], [x_scale, x_sum]);
    }
}

/// `value` and what a block adds to it, rounded as the specification does.
#[target_feature(enable = "neon")]
#[inline]
fn accumulate(
    value: float32x4_t,
    dot: float32x4_t,
    [scale, bias]: [float32x4_t; 2],
    [x_scale, x_sum]: [f32; 2],
) -> float32x4_t {
    let value = vfmaq_n_f32(value, bias, x_sum);
    vfmaq_f32(value, dot, vmulq_n_f32(scale, x_scale))
}

/// Dot products of one block: (rows of x, quads).
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn block_dots<const N: usize, const BITS: usize>(
    codes: &[[int8x16_t; QUADS]; WORDS],
    words: &[[i32; TILE_ROWS]; WORDS],
) -> [[int32x4_t; QUADS]; N] {
    let mut sums = [[vdupq_n_s32(0); QUADS]; N];
    if BITS == 8 {
        for (sums, total) in sums.iter_mut().zip(row_totals(words)) {
            *sums = [vdupq_n_s32(128 * total); QUADS];
        }
    }
    for (codes, words) in codes.iter().zip(words) {
        let four = load_codes(words.first_chunk().expect("a tile has five rows"));
        let fifth = vreinterpretq_s8_s32(vdupq_n_s32(words[4]));
        // Each in its own words: a loop over rows would not be unrolled, and its sums would live in memory.
        add_row::<0>(sums.first_mut(), codes, four);
        add_row::<1>(sums.get_mut(1), codes, four);
        add_row::<2>(sums.get_mut(2), codes, four);
        add_row::<3>(sums.get_mut(3), codes, four);
        add_row::<0>(sums.get_mut(4), codes, fifth);
    }
    sums
}

/// Sums of the codes of each row of a tile's block; zeros behind the last.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn row_totals(words: &[[i32; TILE_ROWS]; WORDS]) -> impl Iterator<Item = i32> {
    let ones = vdupq_n_s8(1);
    let mut totals = [vdupq_n_s32(0); 2]; // of rows 0 to 3, of row 4
    for words in words {
        let four = load_codes(words.first_chunk().expect("a tile has five rows"));
        let fifth = vreinterpretq_s8_s32(vdupq_n_s32(words[4]));
        totals[0] = dot(totals[0], four, ones);
        totals[1] = dot(totals[1], fifth, ones);
    }
    let [four, fifth] = [store_i32(totals[0]), store_i32(totals[1])];
    four.into_iter().chain([fifth[0]])
}

/// Adds the products with word WORD of `words`, where there is a row of sums for it.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn add_row<const WORD: usize>(
    sums: Option<&mut [int32x4_t; QUADS]>,
    codes: &[int8x16_t; QUADS],
    words: int8x16_t,
) {
    if let Some(sums) = sums {
        for (sum, codes) in sums.iter_mut().zip(codes) {
            *sum = dot_word::<WORD>(*sum, *codes, words);
        }
    }
}

/// Adds to each lane of `sum` the products of its four bytes of `a` and of `b`: `vdotq_s32`, which is not stable.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn dot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction is of a feature of this function, and touches nothing but these registers.
    unsafe {
        asm!("sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// Adds to each lane of `sum` the products of its four bytes of `a` and of word WORD of `b`: `vdotq_laneq_s32`.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn dot_word<const WORD: usize>(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction is of a feature of this function, and touches nothing but these registers.
    unsafe {
        asm!("sdot {sum:v}.4s, {a:v}.16b, {b:v}.4b[{word}]",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b, word = const WORD,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// Sixteen bytes of two codes each: the low ones and the high ones.
#[target_feature(enable = "neon")]
#[inline]
fn nibbles(bytes: uint8x16_t) -> [int8x16_t; 2] {
    let low = vandq_u8(bytes, vdupq_n_u8(0xF));
    [low, vshrq_n_u8::<4>(bytes)].map(|codes| vreinterpretq_s8_u8(codes))
}

/// The bytes at even places, and those at odd ones.
#[target_feature(enable = "neon")]
#[inline]
fn split_bytes(a: uint8x16_t, b: uint8x16_t) -> [int8x16_t; 2] {
    [vuzp1q_u8(a, b), vuzp2q_u8(a, b)].map(|codes| vreinterpretq_s8_u8(codes))
}

/// Takes 128 of all codes, which signed bytes do not hold above.
#[target_feature(enable = "neon")]
fn less_128(unpacked: &mut Unpacked) {
    for code in unpacked.codes.as_flattened_mut().as_flattened_mut() {
        *code = veorq_s8(*code, vdupq_n_s8(i8::MIN));
    }
}

/// The first four values, zeros behind the last.
#[target_feature(enable = "neon")]
#[inline]
fn widen(stored: &[u8], scale_type: ScaleType) -> float32x4_t {
    match scale_type {
        ScaleType::F16 => vcvt_f32_f16(vreinterpret_f16_u16(load_half(stored))),
        ScaleType::Bf16 => vreinterpretq_f32_u32(vshll_n_u16::<16>(load_half(stored))),
        ScaleType::F32 => {
            let mut four = [0f32; 4];
            let count = stored.len().min(16) / 4;
            crate::widen::widen_f32(&stored[..4 * count], &mut four[..count]);
            load_f32(&four)
        }
    }
}

/// The first eight bytes, zeros behind the last.
#[target_feature(enable = "neon")]
#[inline]
fn load_half(bytes: &[u8]) -> uint16x4_t {
    let mut padded = [0u8; 8];
    let bytes = match bytes.first_chunk() {
        Some(bytes) => bytes,
        None => {
            padded[..bytes.len()].copy_from_slice(bytes);
            &padded
        }
    };
    vcreate_u16(u64::from_le_bytes(*bytes))
}

#[target_feature(enable = "neon")]
#[inline]
fn load_bytes(bytes: &[u8; 16]) -> uint8x16_t {
    // SAFETY: sixteen bytes, and the load needs no alignment.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

/// Four words of codes.
#[target_feature(enable = "neon")]
#[inline]
fn load_codes(words: &[i32; 4]) -> int8x16_t {
    // SAFETY: four words.
    vreinterpretq_s8_s32(unsafe { vld1q_s32(words.as_ptr()) })
}

#[target_feature(enable = "neon")]
#[inline]
fn load_f32(values: &[f32; 4]) -> float32x4_t {
    // SAFETY: four values.
    unsafe { vld1q_f32(values.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
fn store_i32(value: int32x4_t) -> [i32; 4] {
    let mut out = [0; 4];
    // SAFETY: four values.
    unsafe { vst1q_s32(out.as_mut_ptr(), value) };
    out
}

#[target_feature(enable = "neon")]
#[inline]
fn store_f32(value: float32x4_t) -> [f32; 4] {
    let mut out = [0.0; 4];
    // SAFETY: four values.
    unsafe { vst1q_f32(out.as_mut_ptr(), value) };
    out
}

#[target_feature(enable = "neon")]
#[inline]
fn store_panel([low, high]: [float32x4_t; 2]) -> [f32; PANEL] {
    let mut out = [0.0; PANEL];
    out[..4].copy_from_slice(&store_f32(low));
    out[4..].copy_from_slice(&store_f32(high));
    out
}

#[target_feature(enable = "neon")]
#[inline]
fn transpose_f32(rows: [float32x4_t; 4]) -> [float32x4_t; 4] {
    transpose_i32(rows.map(|row| vreinterpretq_s32_f32(row))).map(|row| vreinterpretq_f32_s32(row))
}

/// Lane c of row r becomes lane r of row c.
#[target_feature(enable = "neon")]
#[inline]
fn transpose_i32([a, b, c, d]: [int32x4_t; 4]) -> [int32x4_t; 4] {
    let even = [vtrn1q_s32(a, b), vtrn1q_s32(c, d)].map(|pair| vreinterpretq_s64_s32(pair));
    let odd = [vtrn2q_s32(a, b), vtrn2q_s32(c, d)].map(|pair| vreinterpretq_s64_s32(pair));
    [
        vtrn1q_s64(even[0], even[1]),
        vtrn1q_s64(odd[0], odd[1]),
        vtrn2q_s64(even[0], even[1]),
        vtrn2q_s64(odd[0], odd[1]),
    ]
    .map(|row| vreinterpretq_s32_s64(row))
}
