//! The products with AVX-512 VNNI: a register holds sixteen rows of weights, what AVX2 calls a pair of panels, and one `vpdpbusd`
//! multiplies four columns of each with four activations, sums and all, in 32 bits. One row of activations or two go through a row
//! of weights at a time, see `by_row`.

mod by_row;
mod many;

use std::arch::x86_64::*;
use std::ops::Range;

use super::{Ahead, Panel, TILE_PANELS};
use crate::activations::{BLOCK, Eight, FEW_ROWS, QuantizedRows, TILE_ROWS, Tile};
use crate::affine::{AffineRows, ScaleType};
use crate::product::{Out, PANEL};
use crate::x86_64::{Avx512, LONG_COLUMNS, load_bytes, store};

impl Avx512 {
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
            1 if by_row::takes(weights) => by_row::multiply::<1>,
            2 if by_row::takes(weights) => by_row::multiply::<2>,
            1 => several_rows::<1>,
            2 => several_rows::<2>,
            3 => several_rows::<3>,
            4 => several_rows::<4>,
            5 => several_rows::<5>,
            6 => several_rows::<6>,
            7 => several_rows::<7>,
            8 => several_rows::<8>,
            9 => several_rows::<9>,
            10 => several_rows::<10>,
            _ => many::many_rows,
        };
        // SAFETY: `self` exists, so `detect` saw the features.
        unsafe { kernel(weights, panels, x, out) };
    }
}

/// Sixteen rows of weights: two panels, and scales and biases of all their blocks.
struct Pair<'a> {
    panels: [Panel<'a>; TILE_PANELS],
    lines: Vec<[__m512; 2]>, // (blocks): scale and bias of each row
}

impl<'a> Pair<'a> {
    fn new() -> Self {
        Self {
            panels: [Panel::new(), Panel::new()],
            lines: Vec::new(),
        }
    }

    /// Takes up the first panels of a range, the last one again where there are fewer, and reads scales and biases.
    #[target_feature(enable = "avx512f,avx512bw,avx2,f16c")]
    fn find(&mut self, weights: &AffineRows<'a>, panels: Range<usize>) {
        for (offset, panel) in self.panels.iter_mut().enumerate() {
            panel.find(weights, (panels.start + offset).min(panels.end - 1));
        }
        let blocks = weights.blocks();
        self.lines.resize(blocks, [_mm512_setzero_ps(); 2]);
        let halves = weights.scale_type() != ScaleType::F32;
        if halves && weights.blocks_per_group() == 1 && blocks.is_multiple_of(2 * PANEL) {
            return self.read_halves(weights.scale_type());
        }
        for panel in &mut self.panels {
            panel.read_lines(weights);
        }
        let panels = self.panels[0].lines.iter().zip(&self.panels[1].lines);
        for (line, (low, high)) in self.lines.iter_mut().zip(panels) {
            *line = [join(low[0], high[0]), join(low[1], high[1])];
        }
    }

    /// Scales and biases of sixteen bits, a group a block, sixteen blocks at a time: a register holds two blocks' of each row.
    #[target_feature(enable = "avx512f,avx512bw,avx2")]
    fn read_halves(&mut self, scale_type: ScaleType) {
        for (sixteen, lines) in self.lines.chunks_exact_mut(2 * PANEL).enumerate() {
            for part in 0..2 {
                let rows = |row: usize| {
                    let stored = self.panels[row / PANEL].rows[row % PANEL][1 + part];
                    &stored.as_chunks::<32>().0[sixteen]
                };
                let twos = by_word(rows);
                for (lines, two) in lines.as_chunks_mut::<2>().0.iter_mut().zip(twos) {
                    [lines[0][part], lines[1][part]] = widen_two(two, scale_type);
                }
            }
        }
    }

    /// One run of all rows, a block of INT4: of the eight words of a row, one in each register, a lane for each row.
    #[target_feature(enable = "avx512f,avx2")]
    #[inline]
    fn words(&self, run: usize) -> [__m512i; PANEL] {
        join_words(self.half(0, run), self.half(1, run))
    }

    /// One run of a panel's rows.
    #[target_feature(enable = "avx512f,avx2")]
    #[inline]
    fn half(&self, panel: usize, run: usize) -> [__m512i; 4] {
        half_by_word(|row| self.panels[panel].codes(row, run))
    }
}

/// Of each lane its lower and its upper half as f32.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn widen_two(two: __m512i, scale_type: ScaleType) -> [__m512; 2] {
    if scale_type == ScaleType::Bf16 {
        let high = _mm512_and_si512(two, _mm512_set1_epi32(0xFFFF_0000_u32 as i32));
        return [_mm512_slli_epi32::<16>(two), high].map(|bits| _mm512_castsi512_ps(bits));
    }
    // The lower halves of all lanes, then the upper ones.
    let lanes: [i16; 32] = std::array::from_fn(|index| (2 * (index % 16) + index / 16) as i16);
    // SAFETY: 64 bytes, and the load needs no alignment.
    let lanes = unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) };
    let halves = _mm512_permutexvar_epi16(lanes, two);
    [
        _mm512_cvtph_ps(_mm512_castsi512_si256(halves)),
        _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(halves)),
    ]
}

/// Blocks of a long row that are read of one panel before they are read of the other. Long rows share their places in the first-level
/// cache, which keeps eight lines in each: sixteen rows at once took half as long again as the same weights in rows of 2 KiB.
const STRETCH: usize = 8;
const _: () = assert!(LONG_COLUMNS.is_multiple_of(STRETCH * BLOCK));

/// Up to so many rows of activations, odd columns have sums of their own: a multiplication waits for the one before it in its sum. Of
/// more rows there is always another sum, and two of each are more than there are registers beside their values.
const TWO_SUMS_ROWS_MAX: usize = 6;

/// A block of N rows of activations. Few rows are read from where they lie close together: of tiles, of five rows each, one of
/// 3072 columns takes 17 KB, half of a first-level cache.
#[derive(Clone, Copy)]
enum Block<'a, const N: usize> {
    Few(&'a [Eight; N], usize),
    Tiles([&'a Tile; 2]),
}

impl<const N: usize> Block<'_, N> {
    #[inline]
    fn word(&self, row: usize, step: usize) -> i32 {
        match self {
            Self::Few(eights, block) => eights[row].words[*block][step],
            Self::Tiles(tiles) => tiles[row / TILE_ROWS].words[step][row % TILE_ROWS],
        }
    }

    #[inline]
    fn scale_and_sum(&self, row: usize) -> [f32; 2] {
        match self {
            Self::Few(eights, block) => [eights[row].scales[*block], eights[row].sums[*block]],
            Self::Tiles(tiles) => {
                let (tile, row) = (tiles[row / TILE_ROWS], row % TILE_ROWS);
                [tile.scales[row], tile.sums[row]]
            }
        }
    }
}

/// Values of all panels' rows for the N rows of `x`, at most two tiles: weights go from their file into the product without being
/// stored unpacked.
///
/// The compiler leaves the steps of a block a loop as long as words come out of a branch; written out, they spill, and 3 to 6 rows
/// take up to twice as long.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,f16c")]
fn several_rows<const N: usize>(
    weights: &AffineRows<'_>,
    panels: Range<usize>,
    x: &QuantizedRows,
    out: Out<'_>,
) {
    let tiles = x.first_and_last_tiles();
    let few = x.few.as_chunks::<N>().0;
    let mut pair = Pair::new();
    let is_long = weights.columns().is_multiple_of(LONG_COLUMNS);
    let mut firsts = [[_mm512_setzero_si512(); 4]; STRETCH];
    for first in panels.clone().step_by(TILE_PANELS) {
        pair.find(weights, first..panels.end);
        let ahead = Ahead::new(&pair.panels[0], TILE_PANELS);
        let mut values = [_mm512_setzero_ps(); N];
        for (block, lines) in pair.lines.iter().enumerate() {
            let words = if is_long {
                let place = block % STRETCH;
                if place == 0 {
                    for (offset, first) in firsts.iter_mut().enumerate() {
                        *first = pair.half(0, block + offset);
                    }
                }
                join_words(firsts[place], pair.half(1, block))
            } else {
                pair.words(block)
            };
            ahead.prefetch_scales::<_MM_HINT_T0>(block);
            let x = if N <= FEW_ROWS {
                Block::Few(&few[block / 8], block % 8)
            } else {
                Block::Tiles([&tiles[0][block], &tiles[1][block]])
            };
            let dots = dots::<N>(&words, x, (&ahead, block));
            for row in 0..N {
                values[row] = accumulate(values[row], dots[row], *lines, x.scale_and_sum(row));
            }
        }
        hand_over(values, (&panels, first), out);
    }
}

/// Hands over what each row of `x` gives with the pair of panels that begins at `first`: the last pair may be one panel.
#[target_feature(enable = "avx512f,avx2")]
#[inline]
fn hand_over<const N: usize>(
    values: [__m512; N],
    (panels, first): (&Range<usize>, usize),
    out: Out<'_>,
) {
    let count = TILE_PANELS.min(panels.end - first);
    for (row, value) in values.into_iter().enumerate() {
        let [low, high] = halves(value);
        let both = [store(low), store(high)];
        out(first - panels.start, row, &both[..count]);
    }
}

/// Eight words of each of sixteen rows: one of each row in each register, a lane for each row.
#[target_feature(enable = "avx512f,avx2")]
#[inline]
fn by_word<'a>(rows: impl Fn(usize) -> &'a [u8; 32]) -> [__m512i; PANEL] {
    join_words(half_by_word(&rows), half_by_word(|row| rows(PANEL + row)))
}

/// Eight words of each of eight rows: quarters of a register are a word of rows 0..4, the fourth word behind it, the same of rows 4..8.
#[target_feature(enable = "avx512f,avx2")]
#[inline]
fn half_by_word<'a>(rows: impl Fn(usize) -> &'a [u8; 32]) -> [__m512i; 4] {
    let mut fours = [_mm512_setzero_si512(); 4];
    for (row, two) in fours.iter_mut().enumerate() {
        let (low, high) = (rows(row), rows(row + 4));
        *two = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(load_bytes(low)), load_bytes(high));
    }
    transpose_quarters(fours)
}

/// Eight words of eight rows and of eight more: one of each row in each register.
#[target_feature(enable = "avx512f")]
#[inline]
fn join_words(first: [__m512i; 4], second: [__m512i; 4]) -> [__m512i; PANEL] {
    let mut words = [_mm512_setzero_si512(); PANEL];
    for word in 0..4 {
        words[word] = _mm512_shuffle_i64x2::<0b10_00_10_00>(first[word], second[word]);
        words[4 + word] = _mm512_shuffle_i64x2::<0b11_01_11_01>(first[word], second[word]);
    }
    words
}

/// The low nibbles of all bytes, and the high ones.
#[target_feature(enable = "avx512f")]
#[inline]
fn unpacked(word: __m512i) -> [__m512i; 2] {
    let nibble = _mm512_set1_epi8(0xF);
    [
        _mm512_and_si512(word, nibble),
        _mm512_and_si512(_mm512_srli_epi32::<4>(word), nibble),
    ]
}

/// In each quarter: lane c of row r becomes lane r of row c.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose_quarters(rows: [__m512i; 4]) -> [__m512i; 4] {
    let [a, b, c, d] = rows;
    let (low_ab, high_ab) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (low_cd, high_cd) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    [
        _mm512_unpacklo_epi64(low_ab, low_cd),
        _mm512_unpackhi_epi64(low_ab, low_cd),
        _mm512_unpacklo_epi64(high_ab, high_cd),
        _mm512_unpackhi_epi64(high_ab, high_cd),
    ]
}

/// Dot products of a block of a pair of panels with N rows of activations: (rows of x), lanes: the pair's rows. Asks for the
/// codes to come, of which each word has a line.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn dots<const N: usize>(
    words: &[__m512i; PANEL],
    x: Block<'_, N>,
    (ahead, block): (&Ahead, usize),
) -> [__m512i; N] {
    let odd_sum = const { if N > TWO_SUMS_ROWS_MAX { 0 } else { 1 } };
    let mut sums = [[_mm512_setzero_si512(); 2]; N];
    for (step, word) in words.iter().enumerate() {
        let [even, odd] = unpacked(*word);
        ahead.prefetch_codes(block, step);
        for (row, sums) in sums.iter_mut().enumerate() {
            let activation = |step: usize| _mm512_set1_epi32(x.word(row, step));
            sums[0] = _mm512_dpbusd_epi32(sums[0], even, activation(step));
            sums[odd_sum] = _mm512_dpbusd_epi32(sums[odd_sum], odd, activation(PANEL + step));
        }
    }
    sums.map(|[first, second]| _mm512_add_epi32(first, second))
}

/// `value` and what a block adds to it, rounded as the specification does.
#[target_feature(enable = "avx512f")]
#[inline]
fn accumulate(value: __m512, dot: __m512i, [scale, bias]: [__m512; 2], x: [f32; 2]) -> __m512 {
    let value = _mm512_fmadd_ps(bias, _mm512_set1_ps(x[1]), value);
    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x[0]));
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, value)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn join(low: __m256, high: __m256) -> __m512 {
    let (low, high) = (_mm256_castps_pd(low), _mm256_castps_pd(high));
    let both = _mm512_insertf64x4::<1>(_mm512_castpd256_pd512(low), high);
    _mm512_castpd_ps(both)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn halves(value: __m512) -> [__m256; TILE_PANELS] {
    let value = _mm512_castps_pd(value);
    let (low, high) = (
        _mm512_castpd512_pd256(value),
        _mm512_extractf64x4_pd::<1>(value),
    );
    [_mm256_castpd_ps(low), _mm256_castpd_ps(high)]
}
