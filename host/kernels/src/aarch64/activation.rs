//! Activation functions with NEON. [`crate::activation`] specifies them.

use std::arch::aarch64::*;

use super::attention::exp;
use super::{Neon, load_f32, store_f32};
use crate::activation::{QUICK_GELU, scaled_by_sigmoid};

impl Neon {
    pub(crate) fn swiglu(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        // SAFETY: `self` exists, so `detect` saw the feature.
        unsafe { swiglu(gate, up, out) }
    }

    pub(crate) fn quick_gelu(self, values: &mut [f32]) {
        // SAFETY: `self` exists, so `detect` saw the feature.
        unsafe { quick_gelu(values) }
    }
}

#[target_feature(enable = "neon")]
fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let ((gate, gate_rest), (up, up_rest)) = (gate.as_chunks::<4>(), up.as_chunks::<4>());
    let (out, out_rest) = out.as_chunks_mut::<4>();
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = store_f32(vmulq_f32(times_sigmoid(load_f32(gate), 1.0), load_f32(up)));
    }
    for ((out, gate), up) in out_rest.iter_mut().zip(gate_rest).zip(up_rest) {
        *out = scaled_by_sigmoid(*gate, 1.0) * up;
    }
}

#[target_feature(enable = "neon")]
fn quick_gelu(values: &mut [f32]) {
    let (fours, rest) = values.as_chunks_mut::<4>();
    for four in fours {
        *four = store_f32(times_sigmoid(load_f32(four), QUICK_GELU));
    }
    for value in rest {
        *value = scaled_by_sigmoid(*value, QUICK_GELU);
    }
}

/// `x * sigmoid(slope * x)`, by the exponential of minus the magnitude, which cannot overflow.
#[target_feature(enable = "neon")]
#[inline]
fn times_sigmoid(x: float32x4_t, slope: f32) -> float32x4_t {
    let one = vdupq_n_f32(1.0);
    let scaled = vmulq_n_f32(x, slope);
    let small = exp(vnegq_f32(vabsq_f32(scaled)));
    // Of a positive number 1 / (1 + e), of a negative one e / (1 + e).
    let upper = vbslq_f32(vcltzq_f32(scaled), small, one);
    vmulq_f32(x, vdivq_f32(upper, vaddq_f32(one, small)))
}
