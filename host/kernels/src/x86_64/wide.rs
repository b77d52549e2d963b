//! What the kernels with AVX-512 share.

use std::arch::x86_64::*;

use super::exp2::ROUND;

/// Values of a register.
pub(super) const LANES: usize = 16;

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load(values: &[f32; LANES]) -> __m512 {
    // SAFETY: sixteen values, and the load needs no alignment.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn store(value: __m512) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    // SAFETY: sixteen values, and the store needs no alignment.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), value) };
    out
}

/// The nearest whole number, of magnitudes below 2^22.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn round(x: __m512) -> __m512 {
    let round = _mm512_set1_ps(ROUND);
    _mm512_sub_ps(_mm512_add_ps(x, round), round)
}

/// `2^(n + r)` for whole n and |r| at most 1/2, by the terms of a polynomial from the highest power on, but for the 1.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn exp2_of<const N: usize>(terms: &[f32; N], n: __m512, r: __m512) -> __m512 {
    let mut value = _mm512_set1_ps(terms[0]);
    for term in &terms[1..] {
        value = _mm512_fmadd_ps(value, r, _mm512_set1_ps(*term));
    }
    value = _mm512_fmadd_ps(value, r, _mm512_set1_ps(1.0));
    _mm512_scalef_ps(value, n)
}
