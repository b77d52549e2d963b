//! The weights of a layer on an accelerator.
//!
//! INT4 stays INT4: ggml's Q4_1, which candle multiplies on Metal and CUDA, holds blocks of 32 columns of a row, each with a
//! scale `d` and a least value `m` in f16, and its value is `d * code + m`, as MLX's is. So a group of 32, 64 or 128 columns
//! becomes one, two or four blocks that share its scale and bias, without loss wherever f16 holds those.
//!
//! ```text
//! block   bytes 0, 1: d   2, 3: m   4..20: byte k has column k in its low nibble and column k + 16 in its high one
//! ```

use std::borrow::Cow;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use half::f16;
use visor_kernels::AffineRows;

/// Columns of a block, and its bytes.
const BLOCK: usize = 32;
const BLOCK_BYTES: usize = 20;
/// Half of f16's smallest step: what it may be off, beneath all that a weight's four bits can tell.
const ERROR_MAX: f32 = 1.0 / (1 << 25) as f32;

/// (out, in)
pub(super) enum DeviceWeight {
    /// In the compute type.
    Floats(Tensor),
    /// In four bits; products are f32.
    Int4(QMatMul),
}

impl DeviceWeight {
    /// An INT4 matrix in four bits; `None` where it is INT8, f16 does not hold its scales and biases or a block would straddle groups.
    pub(super) fn int4(
        rows: &AffineRows<'_>,
        device: &Device,
    ) -> candle_core::Result<Option<Self>> {
        let Some(blocks) = blocks(rows) else {
            return Ok(None);
        };
        let storage = QStorage::from_data(Cow::Owned(blocks), device, GgmlDType::Q4_1)?;
        let tensor = QTensor::new(storage, (rows.rows(), rows.columns()))?;
        Ok(Some(Self::Int4(QMatMul::from_qtensor(tensor)?)))
    }

    /// (n, in) to (n, out), in the type of `x`.
    pub(super) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Floats(weight) => x.matmul(&weight.t()?),
            Self::Int4(weight) => weight
                .forward(&x.to_dtype(DType::F32)?.contiguous()?)?
                .to_dtype(x.dtype()),
        }
    }
}

/// The blocks of all rows, one row after the other.
fn blocks(rows: &AffineRows<'_>) -> Option<Vec<u8>> {
    if rows.bits() != 4 || !rows.group().is_multiple_of(BLOCK) {
        return None;
    }
    let per_row = rows.columns() / BLOCK;
    let mut out = Vec::with_capacity(rows.rows() * per_row * BLOCK_BYTES);
    for row in 0..rows.rows() {
        for index in 0..per_row {
            let (codes, scale, bias) = rows.codes(row, index * BLOCK..(index + 1) * BLOCK);
            for value in [scale, bias] {
                out.extend_from_slice(&held(value)?.to_le_bytes());
            }
            let code = |column: usize| codes[column / 2] >> (4 * (column % 2)) & 0xF;
            out.extend((0..BLOCK / 2).map(|k| code(k) | code(k + BLOCK / 2) << 4));
        }
    }
    Some(out)
}

/// A scale or bias as f16, if that holds it.
fn held(value: f32) -> Option<f16> {
    let half = f16::from_f32(value);
    ((half.to_f32() - value).abs() <= ERROR_MAX).then_some(half)
}

#[cfg(test)]
mod tests {
    use super::*;
    use visor_kernels::ScaleType;

    fn bytes_of(values: &[f32], scale_type: ScaleType) -> Vec<u8> {
        let mut out = Vec::new();
        for value in values {
            scale_type.put(*value, &mut out);
        }
        out
    }

    #[test]
    fn eight_bits_become_floats() {
        let line = bytes_of(&[1.0], ScaleType::F16);
        let parts: [&[u8]; 3] = [&[7; 64], &line, &line];
        let int8 = AffineRows::new(parts, 64, (8, 64), ScaleType::F16).unwrap();
        assert!(DeviceWeight::int4(&int8, &Device::Cpu).unwrap().is_none());
    }

    /// Every pair of codes in every place, scales of either sign, none and the largest; tiny biases.
    #[test]
    fn blocks_hold_what_the_groups_hold() {
        let (rows, columns) = (16, 256);
        let codes: Vec<u8> = (0..rows * columns / 2)
            .map(|index| (index * 73 % 256) as u8)
            .collect();
        for group in [32, 64, 128] {
            let groups = rows * columns / group;
            let scales: Vec<f32> = (0..groups)
                .map(|index| [0.015625, -0.5, 0.0, 60000.0, 3e-5][index % 5])
                .collect();
            let biases: Vec<f32> = (0..groups)
                .map(|index| [-0.25, 3.0, 1e-7, -60000.0][index % 4])
                .collect();
            for scale_type in [ScaleType::F16, ScaleType::Bf16] {
                let parts = [bytes_of(&scales, scale_type), bytes_of(&biases, scale_type)];
                let int4 =
                    AffineRows::int4([&codes, &parts[0], &parts[1]], columns, group, scale_type)
                        .unwrap();
                let Some(DeviceWeight::Int4(QMatMul::QTensor(held))) =
                    DeviceWeight::int4(&int4, &Device::Cpu).unwrap()
                else {
                    panic!("f16 holds all of these");
                };
                let held = held.dequantize(&Device::Cpu).unwrap();
                let mut want = vec![f32::NAN; columns];
                for (row, held) in held.to_vec2::<f32>().unwrap().iter().enumerate() {
                    int4.dequantize_row(row, &mut want);
                    for (held, want) in held.iter().zip(&want) {
                        assert!(
                            (held - want).abs() <= 16.0 * ERROR_MAX,
                            "group {group}, {scale_type:?}, row {row}: {held} for {want}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn what_f16_does_not_hold_stays_floats() {
        let codes = [0x21; 32];
        let int4 = |scale: f32, bias: f32, group: usize| {
            let count = 64 / group;
            let parts = [scale, bias].map(|value| bytes_of(&vec![value; count], ScaleType::F32));
            let rows = AffineRows::int4([&codes, &parts[0], &parts[1]], 64, group, ScaleType::F32)
                .unwrap();
            DeviceWeight::int4(&rows, &Device::Cpu).unwrap().is_some()
        };
        assert!(int4(0.5, -4.0, 64));
        assert!(!int4(0.1, -4.0, 64), "more bits than f16 has");
        assert!(!int4(0.5, 1e6, 64), "beyond f16");
        assert!(!int4(f32::NAN, 0.0, 64));
        assert!(!int4(0.5, f32::INFINITY, 64));
        assert!(!int4(0.5, -4.0, 16), "a block of two groups");
    }
}
