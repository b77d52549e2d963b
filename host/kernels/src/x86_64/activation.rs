//! Activation functions with AVX2 and FMA. [`crate::activation`] specifies them.

use std::arch::x86_64::*;

use super::attention::exp;
use super::{Avx2, load_f32, store};
use crate::activation::{QUICK_GELU, scaled_by_sigmoid};

impl Avx2 {
    pub(crate) fn swiglu(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        // SAFETY: `self` exists, so `detect` saw the features.
        unsafe { swiglu(gate, up, out) }
    }

    pub(crate) fn quick_gelu(self, values: &mut [f32]) {
        // SAFETY: `self` exists, so `detect` saw the features.
        unsafe { quick_gelu(values) }
    }
}

#[target_feature(enable = "avx2,fma")]
fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let ((gate, gate_rest), (up, up_rest)) = (gate.as_chunks::<8>(), up.as_chunks::<8>());
    let (out, out_rest) = out.as_chunks_mut::<8>();
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = store(_mm256_mul_ps(
            times_sigmoid(load_f32(gate), 1.0),
            load_f32(up),
        ));
    }
    for ((out, gate), up) in out_rest.iter_mut().zip(gate_rest).zip(up_rest) {
        *out = scaled_by_sigmoid(*gate, 1.0) * up;
    }
}

#[target_feature(enable = "avx2,fma")]
fn quick_gelu(values: &mut [f32]) {
    let (eights, rest) = values.as_chunks_mut::<8>();
    for eight in eights {
        *eight = store(times_sigmoid(load_f32(eight), QUICK_GELU));
    }
    for value in rest {
        *value = scaled_by_sigmoid(*value, QUICK_GELU);
    }
}

/// `x * sigmoid(slope * x)`, by the exponential of minus the magnitude, which cannot overflow.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn times_sigmoid(x: __m256, slope: f32) -> __m256 {
    let minus_zero = _mm256_set1_ps(-0.0);
    let scaled = _mm256_mul_ps(x, _mm256_set1_ps(slope));
    let small = exp(_mm256_or_ps(scaled, minus_zero));
    // Of a positive number 1 / (1 + e), of a negative one e / (1 + e).
    let upper = _mm256_blendv_ps(_mm256_set1_ps(1.0), small, scaled);
    let share = _mm256_div_ps(upper, _mm256_add_ps(_mm256_set1_ps(1.0), small));
    _mm256_mul_ps(x, share)
}
