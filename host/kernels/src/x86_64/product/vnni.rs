//! The products with AVX-512 VNNI: a register holds sixteen rows of weights, what AVX2 calls a pair of panels, and one `vpdpbusd`
//! multiplies four columns of each with four activations, sums and all, in 32 bits.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{Panel, TILE_PANELS, Unpacked, find_pair, prefetch_after, rows_by_tiles};
use crate::activations::{QuantizedRows, TILE_ROWS, Tile};
use crate::int4::Int4Rows;
use crate::product::PANEL;
use crate::x86_64::{Avx512, load_bytes, store};

/// Sums of a row that are under way at once: with five rows ten, as many as two units of five cycles take.
const CHAINS: usize = 2;

impl Avx512 {
    /// As that of AVX2, which keeps one row, where memory limits and a register of 512 bits gains nothing.
    pub(crate) fn multiply(
        self,
        weights: &Int4Rows<'_>,
        panels: Range<usize>,
        x: &QuantizedRows,
        out: &mut dyn FnMut(usize, usize, &[f32; PANEL]),
    ) {
        let kernel = match x.rows() {
            0 | 1 => return self.avx2.multiply(weights, panels, x, out),
            2 => several_rows::<2>,
            3 => several_rows::<3>,
            4 => several_rows::<4>,
            5 => several_rows::<5>,
            6 => several_rows::<6>,
            7 => several_rows::<7>,
            8 => several_rows::<8>,
            9 => several_rows::<9>,
            10 => several_rows::<10>,
            _ => many_rows,
        };
        // SAFETY: `self` exists, so `detect` saw the features.
        unsafe { kernel(weights, panels, x, out) };
    }
}

#[target_feature(enable = "avx512f,avx512vnni,avx2,fma,f16c")]
fn many_rows(
    weights: &Int4Rows<'_>,
    panels: Range<usize>,
    x: &QuantizedRows,
    out: &mut dyn FnMut(usize, usize, &[f32; PANEL]),
) {
    // SAFETY: the tile takes what this function takes.
    unsafe { rows_by_tiles(weights, panels, x, add_tile, out) };
}

/// Values of all panels' rows for the N rows of `x`, at most two tiles: weights go from their file into the product without being
/// stored unpacked.
#[target_feature(enable = "avx512f,avx512vnni,avx2,fma,f16c")]
fn several_rows<const N: usize>(
    weights: &Int4Rows<'_>,
    panels: Range<usize>,
    x: &QuantizedRows,
    out: &mut dyn FnMut(usize, usize, &[f32; PANEL]),
) {
    let tiles = x.first_and_last_tiles();
    let mut pair = [Panel::new(), Panel::new()];
    for first in panels.clone().step_by(TILE_PANELS) {
        find_pair(&mut pair, weights, first..panels.end);
        let mut values = [_mm512_setzero_ps(); N];
        for block in 0..x.blocks {
            let words = pair_words(&pair, block);
            prefetch_after(&pair[0], block, TILE_PANELS);
            let tiles = [&tiles[0][block], &tiles[1][block]];
            let dots = dots::<N>(&words, tiles);
            let [low, high] = [pair[0].lines[block], pair[1].lines[block]];
            let lines = [join(low[0], high[0]), join(low[1], high[1])];
            for row in 0..N {
                let tile = tiles[row / TILE_ROWS];
                let x = [tile.scales[row % TILE_ROWS], tile.sums[row % TILE_ROWS]];
                values[row] = accumulate(values[row], dots[row], lines, x);
            }
        }
        for (row, value) in values.into_iter().enumerate() {
            for (panel, value) in (first..panels.end).zip(halves(value)) {
                out(panel - panels.start, row, &store(value));
            }
        }
    }
}

/// One block of both panels: of the eight words of a row, one in each register, a lane for each of the sixteen rows.
#[target_feature(enable = "avx512f,avx2")]
#[inline]
fn pair_words(pair: &[Panel<'_>; TILE_PANELS], block: usize) -> [__m512i; PANEL] {
    let mut fours = [[_mm512_setzero_si512(); 4]; TILE_PANELS];
    for (panel, fours) in pair.iter().zip(&mut fours) {
        for (row, two) in fours.iter_mut().enumerate() {
            let (low, high) = (panel.codes(row, block), panel.codes(row + 4, block));
            *two =
                _mm512_inserti64x4::<1>(_mm512_castsi256_si512(load_bytes(low)), load_bytes(high));
        }
        *fours = transpose_quarters(*fours);
    }
    let mut words = [_mm512_setzero_si512(); PANEL];
    for word in 0..4 {
        // Quarters of a register: a word of rows 0..4, the fourth word behind it, the same of rows 4..8.
        words[word] = _mm512_shuffle_i64x2::<0b10_00_10_00>(fours[0][word], fours[1][word]);
        words[4 + word] = _mm512_shuffle_i64x2::<0b11_01_11_01>(fours[0][word], fours[1][word]);
    }
    words
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

/// Dot products of a block of a pair of panels with N rows of activations: (rows of x), lanes: the pair's rows.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn dots<const N: usize>(words: &[__m512i; PANEL], tiles: [&Tile; 2]) -> [__m512i; N] {
    let nibble = _mm512_set1_epi8(0xF);
    let mut sums = [[_mm512_setzero_si512(); 2]; N]; // of even columns, of odd ones
    for (step, word) in words.iter().enumerate() {
        let even = _mm512_and_si512(*word, nibble);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<4>(*word), nibble);
        for row in 0..N {
            let x = &tiles[row / TILE_ROWS].words;
            let activation = |step: usize| _mm512_set1_epi32(x[step][row % TILE_ROWS]);
            sums[row][0] = _mm512_dpbusd_epi32(sums[row][0], even, activation(step));
            sums[row][1] = _mm512_dpbusd_epi32(sums[row][1], odd, activation(PANEL + step));
        }
    }
    sums.map(|[even, odd]| _mm512_add_epi32(even, odd))
}

/// `value` and what a block adds to it, rounded as the specification does.
#[target_feature(enable = "avx512f")]
#[inline]
fn accumulate(value: __m512, dot: __m512i, [scale, bias]: [__m512; 2], x: [f32; 2]) -> __m512 {
    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x[0]));
    let bias = _mm512_mul_ps(bias, _mm512_set1_ps(x[1]));
    _mm512_add_ps(value, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, bias))
}

/// Adds a stretch of blocks to the values of a tile's rows.
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_tile(weights: &Unpacked, tiles: &[Tile], values: &mut [[__m256; TILE_PANELS]]) {
    match values.len() {
        1 => rows_times_pair::<1>(weights, tiles, values),
        2 => rows_times_pair::<2>(weights, tiles, values),
        3 => rows_times_pair::<3>(weights, tiles, values),
        4 => rows_times_pair::<4>(weights, tiles, values),
        _ => rows_times_pair::<TILE_ROWS>(weights, tiles, values),
    }
}

/// Adds a stretch of blocks to the values of the first N rows of a tile.
#[target_feature(enable = "avx512f,avx512vnni")]
fn rows_times_pair<const N: usize>(
    weights: &Unpacked,
    tiles: &[Tile],
    values: &mut [[__m256; TILE_PANELS]],
) {
    let values = values
        .first_chunk_mut::<N>()
        .expect("the caller counted them");
    let mut sums = [_mm512_setzero_ps(); N];
    for (sum, value) in sums.iter_mut().zip(values.iter()) {
        *sum = join(value[0], value[1]);
    }
    for ((codes, lines), tile) in weights.codes.iter().zip(&weights.lines).zip(tiles) {
        let mut dots = [[_mm512_setzero_si512(); CHAINS]; N];
        let steps = codes.0.as_chunks::<CHAINS>().0.iter();
        for (codes, words) in steps.zip(tile.words.as_chunks::<CHAINS>().0) {
            for chain in 0..CHAINS {
                let codes = join_codes(&codes[chain]);
                for row in 0..N {
                    let activation = _mm512_set1_epi32(words[chain][row]);
                    dots[row][chain] = _mm512_dpbusd_epi32(dots[row][chain], codes, activation);
                }
            }
        }
        let lines = [
            join(lines[0][0], lines[1][0]),
            join(lines[0][1], lines[1][1]),
        ];
        for row in 0..N {
            let dot = _mm512_add_epi32(dots[row][0], dots[row][1]);
            sums[row] = accumulate(sums[row], dot, lines, [tile.scales[row], tile.sums[row]]);
        }
    }
    for (value, sum) in values.iter_mut().zip(sums) {
        *value = halves(sum);
    }
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

/// Two panels that lie side by side.
#[target_feature(enable = "avx512f")]
#[inline]
fn join_codes(codes: &[__m256i; TILE_PANELS]) -> __m512i {
    // SAFETY: 64 bytes, and the load needs no alignment.
    unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) }
}
