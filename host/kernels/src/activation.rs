//! Activation functions, on slices.

#[cfg(target_arch = "aarch64")]
use crate::aarch64::I8mm;
use crate::kernel::Kernel;

/// What becomes of a layer's values before the next layer takes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(1.702 x)`: CLIP's, not GELU.
    QuickGelu,
    /// `gate * sigmoid(gate) * up`: the first half of the layer's rows are gates, the second is up.
    SwiGlu,
}

impl Activation {
    /// Values of the layer that make one.
    pub(crate) fn parts(self) -> usize {
        match self {
            Self::QuickGelu => 1,
            Self::SwiGlu => 2,
        }
    }
}

impl Kernel {
    /// `gate * sigmoid(gate) * up`, value by value.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn swiglu(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(
            gate.len() == up.len() && up.len() == out.len(),
            "slices of one length"
        );
        match self {
            Self::Scalar => {
                for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                    *out = scaled_by_sigmoid(*gate, 1.0) * up;
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => avx2.swiglu(gate, up, out),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(avx512) => avx512.swiglu(gate, up, out),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(neon) | Self::I8mm(I8mm { neon }) => neon.swiglu(gate, up, out),
        }
    }

    /// `x * sigmoid(1.702 x)` in place: CLIP's activation, not GELU.
    pub fn quick_gelu(self, values: &mut [f32]) {
        match self {
            Self::Scalar => {
                for value in values {
                    *value = scaled_by_sigmoid(*value, QUICK_GELU);
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => avx2.quick_gelu(values),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(avx512) => avx512.quick_gelu(values),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(neon) | Self::I8mm(I8mm { neon }) => neon.quick_gelu(values),
        }
    }
}

/// What CLIP multiplies with inside the sigmoid.
pub(crate) const QUICK_GELU: f32 = 1.702;

/// `x * sigmoid(slope * x)`
pub(crate) fn scaled_by_sigmoid(x: f32, slope: f32) -> f32 {
    x / (1.0 + (-slope * x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_near_the_formula_at_every_size_and_sign() {
        // In front, where registers take them, and not with the rest.
        let mut x = Vec::from([
            0.0,
            -0.0,
            88.8,
            -88.8,
            1e4,
            -1e4,
            f32::MAX,
            f32::MIN,
            1e-30,
            f32::INFINITY,
        ]);
        x.extend((-4000..4000).map(|k| k as f32 / 100.0));
        for kernel in Kernel::available() {
            let (mut silu, mut gelu) = (vec![f32::NAN; x.len()], x.clone());
            kernel.swiglu(&x, &vec![2.0; x.len()], &mut silu);
            kernel.quick_gelu(&mut gelu);
            for ((x, silu), gelu) in x.iter().zip(silu).zip(gelu) {
                let want = |slope: f64| {
                    let x = f64::from(*x);
                    (x / (1.0 + (-slope * x).exp())) as f32
                };
                let near = |got: f32, want: f32| {
                    got == want || (got - want).abs() < 1e-6 * want.abs().max(1e-3)
                };
                assert!(
                    near(silu, 2.0 * want(1.0)),
                    "{}: silu of {x} is {silu}",
                    kernel.name()
                );
                assert!(
                    near(gelu, want(1.702)),
                    "{}: quick gelu of {x} is {gelu}",
                    kernel.name()
                );
            }
            for none in [f32::NAN, f32::NEG_INFINITY] {
                let mut values = [none; 35];
                kernel.quick_gelu(&mut values);
                assert!(
                    values.iter().all(|x| x.is_nan()),
                    "{} {none}",
                    kernel.name()
                );
            }
        }
    }
}
