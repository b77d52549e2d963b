//! Activation functions with AVX-512.

use std::arch::x86_64::*;

use crate::activation::{QUICK_GELU, scaled_by_sigmoid};
use crate::x86_64::Avx512;
use crate::x86_64::exp2::TERMS;
use crate::x86_64::wide::{LANES, exp2_of, load, round, store};

impl Avx512 {
    pub(crate) fn swiglu(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        // SAFETY: `self` exists, so `detect` saw the features.
        unsafe { swiglu(gate, up, out) }
    }

    pub(crate) fn quick_gelu(self, values: &mut [f32]) {
        // SAFETY: `self` exists, so `detect` saw the features.
        unsafe { quick_gelu(values) }
    }
}

#[target_feature(enable = "avx512f")]
fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let ((gate, gate_rest), (up, up_rest)) = (gate.as_chunks::<LANES>(), up.as_chunks::<LANES>());
    let (out, out_rest) = out.as_chunks_mut::<LANES>();
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = store(_mm512_mul_ps(times_sigmoid(load(gate), 1.0), load(up)));
    }
    for ((out, gate), up) in out_rest.iter_mut().zip(gate_rest).zip(up_rest) {
        *out = scaled_by_sigmoid(*gate, 1.0) * up;
    }
}

#[target_feature(enable = "avx512f")]
fn quick_gelu(values: &mut [f32]) {
    let (whole, rest) = values.as_chunks_mut::<LANES>();
    for some in whole {
        *some = store(times_sigmoid(load(some), QUICK_GELU));
    }
    for value in rest {
        *value = scaled_by_sigmoid(*value, QUICK_GELU);
    }
}

/// `x * sigmoid(slope * x)`, by the exponential of minus the magnitude, which cannot overflow.
#[target_feature(enable = "avx512f")]
#[inline]
fn times_sigmoid(x: __m512, slope: f32) -> __m512 {
    let scaled = _mm512_mul_ps(x, _mm512_set1_ps(slope));
    let sign = _mm512_set1_epi32(i32::MIN);
    let below = _mm512_or_si512(_mm512_castps_si512(scaled), sign);
    let small = exp(_mm512_castsi512_ps(below));
    // Of a positive number 1 / (1 + e), of a negative one e / (1 + e).
    let one = _mm512_set1_ps(1.0);
    let negative = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(scaled, _mm512_setzero_ps());
    let upper = _mm512_mask_mov_ps(one, negative, small);
    let lower = _mm512_add_ps(one, small);
    // Twice as many bits as the first guess has, 28.
    let guess = _mm512_rcp14_ps(lower);
    let error = _mm512_fnmadd_ps(lower, guess, one);
    let share = _mm512_mul_ps(upper, _mm512_fmadd_ps(guess, error, guess));
    _mm512_mul_ps(x, share)
}

/// `e^x` for x up to 0, within 3e-7 of itself; 0 below -87.
#[target_feature(enable = "avx512f")]
#[inline]
fn exp(x: __m512) -> __m512 {
    // The base-2 logarithm of e, its first bits and the rest.
    const LOG2_E: [f32; 2] = [std::f32::consts::LOG2_E, 1.925_963e-8];
    let least = _mm512_set1_ps(-87.0);
    let seen = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, least);
    let x = _mm512_max_ps(least, x); // the second operand when either is NaN
    let n = round(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E[0])));
    let r = _mm512_fmsub_ps(x, _mm512_set1_ps(LOG2_E[0]), n);
    let r = _mm512_fmadd_ps(x, _mm512_set1_ps(LOG2_E[1]), r);
    _mm512_maskz_mov_ps(seen, exp2_of(&TERMS, n, r))
}
