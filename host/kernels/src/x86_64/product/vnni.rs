//! The tile of many rows with AVX-512 VNNI: a register holds sixteen rows of weights, what AVX2 calls a pair of panels, and one
//! `vpdpbusd` multiplies four columns of each with four activations, sums and all, in 32 bits.
//!
//! No machine of ours has run it: [`crate::Kernel::available`] holds it to the specification before it is used.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{TILE_PANELS, Unpacked, rows_by_tiles};
use crate::activations::{FEW_ROWS, QuantizedRows, TILE_ROWS, Tile};
use crate::int4::Int4Rows;
use crate::product::PANEL;
use crate::x86_64::Avx512;

/// Sums of a row that are under way at once: with five rows ten, as many as two units of five cycles take.
const CHAINS: usize = 2;

impl Avx512 {
    /// As that of AVX2, which keeps up to [`FEW_ROWS`] rows, where memory limits. All more go by the tile, the few for which AVX2
    /// leaves weights packed as well: which is faster here was not measured.
    pub(crate) fn multiply(
        self,
        weights: &Int4Rows<'_>,
        panels: Range<usize>,
        x: &QuantizedRows,
        out: &mut dyn FnMut(usize, usize, &[f32; PANEL]),
    ) {
        if x.rows() <= FEW_ROWS {
            return self.avx2.multiply(weights, panels, x, out);
        }
        // SAFETY: `self` exists, so `detect` saw the features.
        unsafe { rows_by_tiles(weights, panels, x, add_tile, out) };
    }
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
        let steps = codes.as_chunks::<CHAINS>().0.iter();
        for (codes, words) in steps.zip(tile.words.as_chunks::<CHAINS>().0) {
            for chain in 0..CHAINS {
                let codes = join_codes(&codes[chain]);
                for row in 0..N {
                    let activation = _mm512_set1_epi32(words[chain][row]);
                    dots[row][chain] = _mm512_dpbusd_epi32(dots[row][chain], codes, activation);
                }
            }
        }
        let scale = join(lines[0][0], lines[1][0]);
        let bias = join(lines[0][1], lines[1][1]);
        for row in 0..N {
            let dot = _mm512_add_epi32(dots[row][0], dots[row][1]);
            let scale = _mm512_mul_ps(scale, _mm512_set1_ps(tile.scales[row]));
            let bias = _mm512_mul_ps(bias, _mm512_set1_ps(tile.sums[row]));
            let added = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, bias);
            sums[row] = _mm512_add_ps(sums[row], added);
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
