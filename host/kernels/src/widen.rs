//! Stored floats to f32, exactly: every f16 and bf16 value has an f32 that equals it.
//!
//! Bytes are little-endian and need no alignment, because a tensor may start anywhere in its file.

/// Widens bf16: the upper half of an f32. `bytes` holds two per element of `out`.
///
/// # Panics
/// When `bytes` is not two bytes per element of `out`.
pub fn widen_bf16(bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * 2, "two bytes per bf16");
    for (value, pair) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        *value = bf16(pair[0], pair[1]);
    }
}

/// Widens f16 (IEEE binary16). `bytes` holds two per element of `out`.
///
/// # Panics
/// When `bytes` is not two bytes per element of `out`.
pub fn widen_f16(bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * 2, "two bytes per f16");
    for (value, pair) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        *value = f16(pair[0], pair[1]);
    }
}

/// Copies f32. `bytes` holds four per element of `out`.
///
/// # Panics
/// When `bytes` is not four bytes per element of `out`.
pub fn widen_f32(bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * 4, "four bytes per f32");
    for (value, four) in out.iter_mut().zip(bytes.chunks_exact(4)) {
        *value = f32::from_le_bytes([four[0], four[1], four[2], four[3]]);
    }
}

/// One bf16, low byte first.
#[inline]
pub(crate) fn bf16(low: u8, high: u8) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes([low, high])) << 16)
}

/// One f16, low byte first.
///
/// Exponent and fraction move to their f32 places, which leaves the exponent short by the difference of the biases,
/// 127 - 15 = 112; the multiplication by 2^112 adds it and is exact for subnormals too. Infinities and NaNs keep their
/// fraction and get the largest exponent.
#[inline]
pub(crate) fn f16(low: u8, high: u8) -> f32 {
    const TWO_POW_112: f32 = f32::from_bits((127 + 112) << 23);
    const EXPONENT_ALL_ONES: u32 = 0x7C00 << 13;
    let bits = u32::from(u16::from_le_bytes([low, high]));
    let magnitude = (bits & 0x7FFF) << 13;
    let finite = (f32::from_bits(magnitude) * TWO_POW_112).to_bits();
    let special = magnitude | 0x7F80_0000;
    let value = if magnitude >= EXPONENT_ALL_ONES {
        special
    } else {
        finite
    };
    f32::from_bits(value | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn same(ours: f32, theirs: f32, bits: u16) {
        let equal = ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan());
        assert!(equal, "{bits:#06x}: {ours} instead of {theirs}");
    }

    #[test]
    fn every_f16_and_bf16_widens_exactly() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let bytes: Vec<u8> = all.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let mut out = vec![f32::NAN; all.len()];
        widen_f16(&bytes, &mut out);
        for (&bits, &value) in all.iter().zip(&out) {
            same(value, half::f16::from_bits(bits).to_f32(), bits);
        }
        widen_bf16(&bytes, &mut out);
        for (&bits, &value) in all.iter().zip(&out) {
            same(value, half::bf16::from_bits(bits).to_f32(), bits);
        }
    }

    #[test]
    fn f32_is_copied() {
        let values = [
            0.0,
            -0.0,
            1.5,
            f32::MIN_POSITIVE / 2.0,
            f32::INFINITY,
            -3.25e7,
        ];
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value: &f32| value.to_le_bytes())
            .collect();
        let mut out = [f32::NAN; 6];
        widen_f32(&bytes, &mut out);
        assert_eq!(out.map(f32::to_bits), values.map(f32::to_bits));
    }

    #[test]
    #[should_panic(expected = "two bytes per f16")]
    fn a_length_that_does_not_match_is_a_programmer_error() {
        widen_f16(&[0; 3], &mut [0.0; 2]);
    }
}
