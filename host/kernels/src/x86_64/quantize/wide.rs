//! Activations to eight bits with AVX-512.

use std::arch::x86_64::*;

use crate::activations::{BLOCK, LARGEST_MIN, TILE_ROWS, Tile, WORDS};
use crate::x86_64::Avx512;
use crate::x86_64::wide::load;

impl Avx512 {
    pub(crate) fn quantize<'a>(
        self,
        rows: impl Iterator<Item = &'a [f32; BLOCK]>,
        steps: f32,
        tile: &mut Tile,
    ) {
        // SAFETY: `self` exists, so `detect` saw the features.
        unsafe { quantize(rows, steps, tile) }
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
fn quantize<'a>(rows: impl Iterator<Item = &'a [f32; BLOCK]>, steps: f32, tile: &mut Tile) {
    let mut words = [_mm512_setzero_si512(); TILE_ROWS];
    (tile.scales, tile.sums) = Default::default();
    for (row, block) in rows.enumerate() {
        (words[row], tile.scales[row], tile.sums[row]) = quantize_block(block, steps);
    }
    interleave(&words, &mut tile.words);
}

/// A word of each row, then the next one of each.
#[target_feature(enable = "avx512f")]
#[inline]
fn interleave(rows: &[__m512i; TILE_ROWS], words: &mut [[i32; TILE_ROWS]; WORDS]) {
    /// Of each lane of each register, which word of a row it is.
    const WORD: [[i32; WORDS]; TILE_ROWS] = {
        let mut word = [[0; WORDS]; TILE_ROWS];
        let mut place = 0;
        while place < TILE_ROWS * WORDS {
            word[place / WORDS][place % WORDS] = (place / TILE_ROWS) as i32;
            place += 1;
        }
        word
    };
    /// Of each register, which lanes are of which row.
    const OF_ROW: [[__mmask16; TILE_ROWS]; TILE_ROWS] = {
        let mut of_row = [[0; TILE_ROWS]; TILE_ROWS];
        let mut place = 0;
        while place < TILE_ROWS * WORDS {
            of_row[place / WORDS][place % TILE_ROWS] |= 1 << (place % WORDS);
            place += 1;
        }
        of_row
    };
    let registers = words.as_flattened_mut().as_chunks_mut::<WORDS>().0;
    for ((words, word), of_row) in registers.iter_mut().zip(&WORD).zip(&OF_ROW) {
        // SAFETY: sixteen words, and the load needs no alignment.
        let word = unsafe { _mm512_loadu_si512(word.as_ptr().cast()) };
        let mut mixed = _mm512_permutexvar_epi32(word, rows[0]);
        for row in 1..TILE_ROWS {
            mixed = _mm512_mask_permutexvar_epi32(mixed, of_row[row], word, rows[row]);
        }
        // SAFETY: sixteen words, and the store needs no alignment.
        unsafe { _mm512_storeu_si512(words.as_mut_ptr().cast(), mixed) };
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn quantize_block(x: &[f32; BLOCK], steps: f32) -> (__m512i, f32, f32) {
    let [a, b, c, d] = x.as_chunks().0 else {
        unreachable!("four registers are a block")
    };
    let values = [load(a), load(b), load(c), load(d)];
    let magnitude = _mm512_set1_epi32(i32::MAX);
    let mut most = _mm512_setzero_si512();
    for value in values {
        let bits = _mm512_and_si512(_mm512_castps_si512(value), magnitude);
        most = _mm512_max_epi32(most, bits);
    }
    let largest = f32::from_bits(_mm512_reduce_max_epi32(most).cast_unsigned());
    if !largest.is_finite() {
        return (_mm512_setzero_si512(), f32::NAN, f32::NAN);
    }
    if largest < LARGEST_MIN {
        return (_mm512_setzero_si512(), 0.0, 0.0);
    }
    let inverse = _mm512_set1_ps(steps / largest);
    let whole = values.map(|value| {
        let scaled = _mm512_mul_ps(value, inverse);
        _mm512_cvtps_epi32(scaled)
    });
    let sum = _mm512_add_epi32(
        _mm512_add_epi32(whole[0], whole[1]),
        _mm512_add_epi32(whole[2], whole[3]),
    );
    let scale = largest / steps;
    let sum = scale * _mm512_reduce_add_epi32(sum) as f32;
    (words(whole), scale, sum)
}

/// Numbers that fit in a byte, as words of four even columns, then of four odd ones.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn words(whole: [__m512i; 4]) -> __m512i {
    // Each quarter l: columns 4l..4l + 4 of every register.
    let bytes = _mm512_packs_epi16(
        _mm512_packs_epi32(whole[0], whole[1]),
        _mm512_packs_epi32(whole[2], whole[3]),
    );
    let evens_first = _mm512_broadcast_i32x4(_mm_setr_epi8(
        0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,
    ));
    let bytes = _mm512_shuffle_epi8(bytes, evens_first);
    // Pairs of bytes: word t of a parity has those of register t / 2 from quarters 2 (t % 2) and the next.
    const ORDER: [i16; 2 * WORDS] = {
        let mut order = [0; 2 * WORDS];
        let mut place = 0;
        while place < order.len() {
            let (parity, word, half) = (place / WORDS, place / 2 % (WORDS / 2), place % 2);
            order[place] = (8 * (2 * (word % 2) + half) + 4 * parity + word / 2) as i16;
            place += 1;
        }
        order
    };
    // SAFETY: 64 bytes, and the load needs no alignment.
    let order = unsafe { _mm512_loadu_si512(ORDER.as_ptr().cast()) };
    _mm512_permutexvar_epi16(order, bytes)
}
