//! Decoding: each weight is used for one or two rows of activations, and memory is what limits.
//!
//! Rows of weights are read one after the other, as they lie in memory: a register holds two blocks of a row. What they give with
//! the activations is added until a lane is a block; of sixteen rows these dot products are transposed, and a lane is a row.
//!
//! Memory is asked for evenly, a line for each that is read, and on while values are added up: a core has few places for lines on
//! their way, and all the time that they stand empty is lost.

use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;

use super::{
    accumulate, by_word, hand_over, join_words, several_rows, transpose_quarters, unpacked,
    widen_two,
};
use crate::activations::{BLOCK, Eight, QuantizedRows};
use crate::affine::{AffineRows, ScaleType};
use crate::product::{Out, PANEL};
use crate::x86_64::product::{TILE_PANELS, ahead_bytes};
use crate::x86_64::wide::LANES;
use crate::x86_64::{prefetch, prefetch_far};

/// Rows of weights whose dot products are gathered.
const ROWS: usize = TILE_PANELS * PANEL;
/// Bytes of two blocks' codes: a register, and a cache line.
const TWO_BLOCKS: usize = BLOCK;
/// Registers of as many blocks as a register has lanes.
const REGISTERS: usize = LANES / 2;

/// Codes of as many blocks of a row as a register has lanes.
type Sixteen = [[u8; TWO_BLOCKS]; REGISTERS];
/// Scales or biases of as many blocks of a row, sixteen bits each.
type SixteenHalves = [u8; 2 * LANES];
/// Activations of two blocks: of their even columns, and of their odd ones.
type Twos<const N: usize> = [[[__m512i; 2]; N]; REGISTERS];
/// Dot products of sixteen blocks: (rows of x, rows), lanes: blocks.
type Dots<const N: usize> = [[__m512i; ROWS]; N];

/// Memory of a thread.
#[derive(Default)]
struct Memory {
    /// Even columns of two blocks, and odd ones: (blocks / 2, rows of x).
    activations: Vec<[__m512i; 2]>,
    /// (blocks / 16, rows of x).
    dots: Vec<[__m512i; ROWS]>,
}

thread_local! {
    /// 16 KiB for a row of 8192 columns and one of activations, that every task of a thread uses again.
    static MEMORY: Cell<Memory> = Cell::default();
}

/// Whether rows are whole registers of dot products, and of scales, of which each block has one.
pub(super) fn takes(weights: &AffineRows<'_>) -> bool {
    let sixteens = weights.columns().is_multiple_of(LANES * BLOCK);
    sixteens && weights.group() == BLOCK && weights.scale_type() != ScaleType::F32
}

/// Values of all panels' rows for the N rows of `x`, sixteen rows of weights at a time; fewer at the end as [`several_rows`] has them.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,f16c")]
pub(super) fn multiply<const N: usize>(
    weights: &AffineRows<'_>,
    panels: Range<usize>,
    x: &QuantizedRows,
    out: Out<'_>,
) {
    let sixteens = x.few.as_chunks::<N>().0.as_chunks::<2>().0;
    let mut memory = MEMORY.take();
    let zero = _mm512_setzero_si512();
    memory
        .activations
        .resize(sixteens.len() * REGISTERS * N, [zero; 2]);
    memory.dots.resize(sixteens.len() * N, [zero; ROWS]);
    let twos = memory.activations.as_chunks_mut::<N>().0.as_chunks_mut().0;
    for (twos, sixteen) in twos.iter_mut().zip(sixteens) {
        in_twos(twos, sixteen);
    }
    let dots_by_sixteen = memory.dots.as_chunks_mut().0;
    // Of panels, whole ones.
    let pairs = panels
        .end
        .min(weights.rows() / PANEL)
        .saturating_sub(panels.start)
        / TILE_PANELS;
    for pair in 0..pairs {
        let first = panels.start + pair * TILE_PANELS;
        let parts = weights.parts(first * PANEL..first * PANEL + ROWS);
        let mut ahead = MemoryAhead::new(parts);
        let codes = parts[0].as_chunks().0.as_chunks().0;
        for (row, codes) in codes.chunks_exact(sixteens.len()).enumerate() {
            for ((codes, x), dots) in codes.iter().zip(&*twos).zip(&mut *dots_by_sixteen) {
                read_row(codes, x, dots, row, &mut ahead);
            }
        }
        let mut values = [_mm512_setzero_ps(); N];
        for (index, (dots, x)) in dots_by_sixteen.iter().zip(sixteens).enumerate() {
            let lines = [parts[1], parts[2]].map(|part| &part.as_chunks().0[index..]);
            let lines = Lines::read(lines, sixteens.len(), weights.scale_type());
            add_sixteen(dots, &lines, x, &mut values, &mut ahead);
        }
        hand_over(values, (&panels, first), out);
    }
    let rest = panels.start + pairs * TILE_PANELS..panels.end;
    if !rest.is_empty() {
        let before = rest.start - panels.start;
        several_rows::<N>(weights, rest, x, &mut |panel, row, values| {
            out(before + panel, row, values)
        });
    }
    MEMORY.set(memory);
}

/// Scales and biases of sixteen blocks of all rows: a register holds two blocks' of each row.
struct Lines {
    twos: [[__m512i; REGISTERS]; 2],
    scale_type: ScaleType,
}

impl Lines {
    /// Those that begin a row's scales and a row's biases, in rows of so many times sixteen blocks.
    #[target_feature(enable = "avx512f,avx2")]
    #[inline]
    fn read(parts: [&[SixteenHalves]; 2], width: usize, scale_type: ScaleType) -> Self {
        let [scales, biases] = parts;
        let last = (ROWS - 1) * width;
        assert!(last < scales.len() && last < biases.len(), "all rows");
        Self {
            twos: [
                by_word(|row| &scales[row * width]),
                by_word(|row| &biases[row * width]),
            ],
            scale_type,
        }
    }

    /// Those of two blocks.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    fn two(&self, index: usize) -> [[__m512; 2]; 2] {
        let [scales, biases] = [self.twos[0][index], self.twos[1][index]];
        let (scales, biases) = (
            widen_two(scales, self.scale_type),
            widen_two(biases, self.scale_type),
        );
        [[scales[0], biases[0]], [scales[1], biases[1]]]
    }
}

/// Adds what sixteen blocks of all rows give with each row of `x`.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn add_sixteen<const N: usize>(
    dots: &Dots<N>,
    lines: &Lines,
    x: &[[Eight; N]; 2],
    values: &mut [__m512; N],
    ahead: &mut MemoryAhead,
) {
    let mut by_block = [[_mm512_setzero_si512(); LANES]; N];
    for n in 0..N {
        by_block[n] = transpose(&dots[n]);
    }
    for index in 0..REGISTERS {
        let two = lines.two(index);
        for (part, line) in two.into_iter().enumerate() {
            let block = 2 * index + part;
            ahead.ask_codes();
            for n in 0..N {
                let eight = &x[block / 8][n];
                let scale_and_sum = [eight.scales[block % 8], eight.sums[block % 8]];
                values[n] = accumulate(values[n], by_block[n][block], line, scale_and_sum);
            }
        }
    }
}

/// Memory to come: codes further on, scales and biases of the next sixteen rows.
struct MemoryAhead {
    codes: *const u8,
    lines: [*const u8; 2],
}

impl MemoryAhead {
    fn new([codes, scales, biases]: [&[u8]; 3]) -> Self {
        let ahead = ahead_bytes(codes.len() / ROWS);
        Self {
            codes: codes.as_ptr().wrapping_add(ahead),
            lines: [scales, biases].map(|part| part.as_ptr_range().end),
        }
    }

    /// Asks for a line of codes.
    #[inline]
    fn ask_codes(&mut self) {
        prefetch_far(self.codes, TWO_BLOCKS);
        self.codes = self.codes.wrapping_add(TWO_BLOCKS);
    }

    /// Asks for a line of scales and, the next time, for one of biases, into the first level: they are few, and those of sixteen
    /// rows are read at once. Even behind 64 KiB of codes that is faster than the second level.
    #[inline]
    fn ask_lines(&mut self) {
        prefetch(self.lines[0], TWO_BLOCKS);
        self.lines = [self.lines[1], self.lines[0].wrapping_add(TWO_BLOCKS)];
    }
}

/// Sixteen blocks of each row of activations, two by two.
#[target_feature(enable = "avx512f")]
#[inline]
fn in_twos<const N: usize>(twos: &mut Twos<N>, sixteen: &[[Eight; N]; 2]) {
    for (index, two) in twos.iter_mut().enumerate() {
        for (row, parts) in two.iter_mut().enumerate() {
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
fn read_row<const N: usize>(
    codes: &Sixteen,
    x: &Twos<N>,
    dots: &mut Dots<N>,
    row: usize,
    ahead: &mut MemoryAhead,
) {
    let mut sums = [[[_mm512_setzero_si512(); 4]; 2]; N];
    for index in 0..REGISTERS {
        // SAFETY: 64 bytes, and the load needs no alignment.
        let word = unsafe { _mm512_loadu_si512(codes[index].as_ptr().cast()) };
        let [even, odd] = unpacked(word);
        // An eighth of the codes to come is asked for where values are added up.
        if index == 0 {
            ahead.ask_lines();
        } else {
            ahead.ask_codes();
        }
        for n in 0..N {
            let sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, x[index][n][0]);
            sums[n][index / 4][index % 4] = _mm512_dpbusd_epi32(sum, odd, x[index][n][1]);
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
    for (four, rows) in fours.iter_mut().zip(rows.as_chunks().0) {
        *four = transpose_quarters(*rows);
    }
    let low = join_words(fours[0], fours[1]);
    let high = join_words(fours[2], fours[3]);
    let mut out = [_mm512_setzero_si512(); LANES];
    for index in 0..PANEL {
        let (low, high) = (low[index], high[index]);
        out[index] = _mm512_shuffle_i64x2::<0b10_00_10_00>(low, high);
        out[PANEL + index] = _mm512_shuffle_i64x2::<0b11_01_11_01>(low, high);
    }
    out
}
