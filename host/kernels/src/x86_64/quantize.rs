//! Activations to eight bits with AVX2. [`crate::activations`] has the formulas, `scalar.rs` specifies them.

mod wide;

use std::arch::x86_64::*;

use super::{Avx2, load_f32};
use crate::activations::{BLOCK, LARGEST_MIN, WORDS};

impl Avx2 {
    pub(crate) fn quantize(self, block: &[f32; BLOCK], steps: f32) -> ([i32; WORDS], f32, f32) {
        // SAFETY: `self` exists, so `detect` saw the features.
        unsafe { quantize(block, steps) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn quantize(x: &[f32; BLOCK], steps: f32) -> ([i32; WORDS], f32, f32) {
    let (eights, _) = x.as_chunks::<8>();
    let values: [__m256; 8] = std::array::from_fn(|index| load_f32(&eights[index]));
    let magnitude = _mm256_set1_epi32(0x7FFF_FFFF);
    let mut most = _mm256_setzero_si256();
    for value in values {
        most = _mm256_max_epi32(
            most,
            _mm256_and_si256(_mm256_castps_si256(value), magnitude),
        );
    }
    let most = _mm_max_epi32(
        _mm256_castsi256_si128(most),
        _mm256_extracti128_si256::<1>(most),
    );
    let most = _mm_max_epi32(most, _mm_shuffle_epi32::<0b00_01_10_11>(most));
    let most = _mm_max_epi32(most, _mm_shuffle_epi32::<0b10_11_00_01>(most));
    let largest = f32::from_bits(_mm_cvtsi128_si32(most).cast_unsigned());
    if !largest.is_finite() {
        return ([0; WORDS], f32::NAN, f32::NAN);
    }
    if largest < LARGEST_MIN {
        return ([0; WORDS], 0.0, 0.0);
    }
    let inverse = _mm256_set1_ps(steps / largest);
    let whole: [__m256i; 8] =
        std::array::from_fn(|index| _mm256_cvtps_epi32(_mm256_mul_ps(values[index], inverse)));
    let mut sum = whole[0];
    for &eight in &whole[1..] {
        sum = _mm256_add_epi32(sum, eight);
    }
    let scale = largest / steps;
    let [[even0, odd0], [even1, odd1]] = [split_bytes(&whole[..4]), split_bytes(&whole[4..])];
    let mut words = [0; WORDS];
    for (four, bytes) in words.chunks_exact_mut(4).zip([even0, even1, odd0, odd1]) {
        let [low, high] = [_mm_cvtsi128_si64(bytes), _mm_extract_epi64::<1>(bytes)];
        four.copy_from_slice(&[
            low as i32,
            (low >> 32) as i32,
            high as i32,
            (high >> 32) as i32,
        ]);
    }
    (words, scale, scale * sum_lanes(sum) as f32)
}

/// Four registers of 32-bit numbers that fit in a byte: the sixteen at even places, and the sixteen at odd ones.
#[target_feature(enable = "avx2")]
fn split_bytes(whole: &[__m256i]) -> [__m128i; 2] {
    let (low, high) = (
        _mm256_packs_epi32(whole[0], whole[1]),
        _mm256_packs_epi32(whole[2], whole[3]),
    );
    let bytes = _mm256_packs_epi16(low, high); // each 128-bit lane: four of every register
    let evens_first = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,
    ));
    let bytes = _mm256_shuffle_epi8(bytes, evens_first);
    let (first, second) = (
        _mm256_castsi256_si128(bytes),
        _mm256_extracti128_si256::<1>(bytes),
    );
    [
        _mm_unpacklo_epi16(first, second),
        _mm_unpackhi_epi16(first, second),
    ]
}

#[target_feature(enable = "avx2")]
fn sum_lanes(x: __m256i) -> i32 {
    let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b00_01_10_11>(x));
    let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x));
    _mm_cvtsi128_si32(x)
}
