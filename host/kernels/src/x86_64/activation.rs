//! Activation functions with AVX2 and FMA. [`crate::activation`] specifies them.

mod wide;

use std::arch::x86_64::*;

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

/// `e^x` for x up to 0, within 2e-7 of itself; 0 below -87. By 2^n * e^r with |r| at most ln(2) / 2, and e^r by its series.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn exp(x: __m256) -> __m256 {
    const SERIES: [f32; 6] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0];
    let tiny = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(-87.0));
    let x = _mm256_max_ps(_mm256_set1_ps(-87.0), x); // the second operand when either is NaN
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_mul_ps(
        x,
        _mm256_set1_ps(std::f32::consts::LOG2_E),
    ));
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693_359_4), x); // ln 2, its first bits and the rest
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.121_944_4e-4), r);
    let mut value = _mm256_set1_ps(SERIES[0]);
    for term in &SERIES[1..] {
        value = _mm256_fmadd_ps(value, r, _mm256_set1_ps(*term));
    }
    value = _mm256_fmadd_ps(value, r, _mm256_set1_ps(1.0));
    let power = _mm256_slli_epi32::<23>(_mm256_add_epi32(
        _mm256_cvtps_epi32(n),
        _mm256_set1_epi32(127),
    ));
    _mm256_andnot_ps(tiny, _mm256_mul_ps(value, _mm256_castsi256_ps(power)))
}
