//! The kernels with AVX2, FMA and F16C (Haswell, Zen and later): the proof that they are there, and what the files beside share.

#![expect(
    unsafe_code,
    reason = "loads, prefetches, products in assembly, and calls that a CPU feature must allow"
)]

mod activation;
mod attention;
mod exp2;
mod product;
mod quantize;
mod wide;

use std::arch::x86_64::*;

/// Rows of weights of so many columns, or a multiple, all begin at the same place of the first-level cache: 4 KiB of codes, after
/// which the places of 32 KiB repeat, eight each.
pub(crate) const LONG_COLUMNS: usize = 8192;

/// Proof that this processor has AVX2, FMA and F16C: only `detect` makes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self(()))
    }
}

/// Proof that this processor has AVX-512 with VNNI (Ice Lake, Zen 4 and later) besides: only `detect` makes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx512 {
    pub(crate) avx2: Avx2,
}

impl Avx512 {
    pub(crate) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni");
        Avx2::detect().filter(|_| has).map(|avx2| Self { avx2 })
    }
}

/// Asks for the cache lines of some bytes, which need not be there.
#[inline]
pub(crate) fn prefetch(start: *const u8, bytes: usize) {
    prefetch_into::<_MM_HINT_T0>(start, bytes);
}

/// The same into the second-level cache: for what is needed so much later that the first would not hold it any more.
#[inline]
pub(crate) fn prefetch_far(start: *const u8, bytes: usize) {
    prefetch_into::<_MM_HINT_T1>(start, bytes);
}

#[inline]
fn prefetch_into<const HINT: i32>(start: *const u8, bytes: usize) {
    for offset in (0..bytes).step_by(64) {
        // SAFETY: every x86-64 has SSE, and where nothing is, nothing comes.
        unsafe { _mm_prefetch::<HINT>(start.wrapping_add(offset).cast()) };
    }
}

/// The first sixteen bytes, zeros behind the last.
#[target_feature(enable = "avx2")]
#[inline]
fn load_half(bytes: &[u8]) -> __m128i {
    let mut padded = [0u8; 16];
    let bytes = match bytes.first_chunk() {
        Some(bytes) => bytes,
        None => {
            padded[..bytes.len()].copy_from_slice(bytes);
            &padded
        }
    };
    // SAFETY: sixteen bytes, and the load needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
fn load_bytes(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: 32 bytes, and the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// Sixteen bytes below sixteen others.
#[target_feature(enable = "avx2")]
#[inline]
fn load_halves(low: &[u8; 16], high: &[u8; 16]) -> __m256i {
    // SAFETY: sixteen bytes each, and the load needs no alignment.
    unsafe { _mm256_loadu2_m128i(high.as_ptr().cast(), low.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_words(words: &[i32]) -> __m256i {
    let words: &[i32; 8] = words.first_chunk().expect("half of a block");
    // SAFETY: eight words, and the load needs no alignment.
    unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
fn load_f32(values: &[f32; 8]) -> __m256 {
    // SAFETY: eight values, and the load needs no alignment.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[target_feature(enable = "avx2")]
fn store(value: __m256) -> [f32; 8] {
    let mut out = [0.0; 8];
    // SAFETY: eight values, and the store needs no alignment.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), value) };
    out
}

#[target_feature(enable = "avx2")]
#[inline]
fn transpose_f32(mut rows: [__m256; 8]) -> [__m256; 8] {
    let mut whole = [_mm256_setzero_si256(); 8];
    for index in 0..8 {
        whole[index] = _mm256_castps_si256(rows[index]);
    }
    let whole = transpose_i32(whole);
    for index in 0..8 {
        rows[index] = _mm256_castsi256_ps(whole[index]);
    }
    rows
}

/// In each half: lane c of row r becomes lane r of row c.
#[target_feature(enable = "avx2")]
#[inline]
fn transpose_halves(rows: [__m256i; 4]) -> [__m256i; 4] {
    let [a, b, c, d] = rows;
    let (low_ab, high_ab) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let (low_cd, high_cd) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    [
        _mm256_unpacklo_epi64(low_ab, low_cd),
        _mm256_unpackhi_epi64(low_ab, low_cd),
        _mm256_unpacklo_epi64(high_ab, high_cd),
        _mm256_unpackhi_epi64(high_ab, high_cd),
    ]
}

/// In each half: lane c of eight in row r becomes lane r of row c.
#[target_feature(enable = "avx2")]
#[inline]
fn transpose_i16(rows: [__m256i; 8]) -> [__m256i; 8] {
    // Words of rows 2k and 2k + 1: of columns 0..4, of columns 4..8.
    let mut pairs = [[_mm256_setzero_si256(); 4]; 2];
    for k in 0..4 {
        let (a, b) = (rows[2 * k], rows[2 * k + 1]);
        (pairs[0][k], pairs[1][k]) = (_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b));
    }
    let mut out = rows;
    for (half, pairs) in pairs.into_iter().enumerate() {
        out[4 * half..][..4].copy_from_slice(&transpose_halves(pairs));
    }
    out
}

/// Lane c of row r becomes lane r of row c.
#[target_feature(enable = "avx2")]
#[inline]
fn transpose_i32(rows: [__m256i; 8]) -> [__m256i; 8] {
    let mut pairs = rows;
    for k in 0..4 {
        let (a, b) = (rows[2 * k], rows[2 * k + 1]);
        (pairs[2 * k], pairs[2 * k + 1]) =
            (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    }
    let mut fours = rows;
    for k in 0..4 {
        let (a, b) = (pairs[4 * (k / 2) + k % 2], pairs[4 * (k / 2) + 2 + k % 2]);
        let at = 4 * (k / 2) + 2 * (k % 2);
        (fours[at], fours[at + 1]) = (_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    }
    let mut out = rows;
    for k in 0..4 {
        let (a, b) = (fours[k], fours[4 + k]);
        (out[k], out[4 + k]) = (
            _mm256_permute2x128_si256::<0x20>(a, b),
            _mm256_permute2x128_si256::<0x31>(a, b),
        );
    }
    out
}
