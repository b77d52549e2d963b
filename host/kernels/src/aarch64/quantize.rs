//! Activations to eight bits with NEON. [`crate::activations`] has the formulas, `scalar.rs` specifies them.

use std::arch::aarch64::*;

use super::{Neon, load_f32, store_i32};
use crate::activations::{BLOCK, LARGEST_MIN, WORDS};

impl Neon {
    pub(crate) fn quantize(self, block: &[f32; BLOCK], steps: f32) -> ([i32; WORDS], f32, f32) {
        // SAFETY: `self` exists, so `detect` saw the features.
        unsafe { quantize(block, steps) }
    }
}

#[target_feature(enable = "neon")]
fn quantize(x: &[f32; BLOCK], steps: f32) -> ([i32; WORDS], f32, f32) {
    let (fours, _) = x.as_chunks::<4>();
    let values: [float32x4_t; BLOCK / 4] = std::array::from_fn(|index| load_f32(&fours[index]));
    let mut most = vdupq_n_u32(0);
    for value in values {
        most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(value)));
    }
    let largest = f32::from_bits(vmaxvq_u32(most)); // NaN and infinity have the largest bits
    if !largest.is_finite() {
        return ([0; WORDS], f32::NAN, f32::NAN);
    }
    if largest < LARGEST_MIN {
        return ([0; WORDS], 0.0, 0.0);
    }
    let inverse = steps / largest;
    let mut sum = vdupq_n_s32(0);
    let mut codes = [vdupq_n_s8(0); BLOCK / 16];
    for (codes, values) in codes.iter_mut().zip(values.as_chunks::<4>().0) {
        let [a, b, c, d] = values.map(|four| vcvtnq_s32_f32(vmulq_n_f32(four, inverse)));
        sum = vaddq_s32(sum, vaddq_s32(vaddq_s32(a, b), vaddq_s32(c, d)));
        *codes = vcombine_s8(narrow(a, b), narrow(c, d));
    }
    let [a, b, c, d] = codes; // sixteen columns each
    let even = [vuzp1q_s8(a, b), vuzp1q_s8(c, d)];
    let odd = [vuzp2q_s8(a, b), vuzp2q_s8(c, d)];
    let mut words = [0; WORDS];
    for (four, codes) in words
        .as_chunks_mut()
        .0
        .iter_mut()
        .zip(even.into_iter().chain(odd))
    {
        *four = store_i32(vreinterpretq_s32_s8(codes));
    }
    let scale = largest / steps;
    (words, scale, scale * vaddvq_s32(sum) as f32)
}

/// Eight 32-bit numbers that fit in a byte.
#[target_feature(enable = "neon")]
fn narrow(low: int32x4_t, high: int32x4_t) -> int8x8_t {
    vmovn_s16(vcombine_s16(vmovn_s32(low), vmovn_s32(high)))
}
