//! MLX's affine INT4 and INT8: the format, and its conversion to f32.
//!
//! A matrix `P` of `rows` x `columns` is three arrays, row-major, little-endian:
//!
//! ```text
//! P.weight  u32  (rows, columns / 8)     eight 4-bit codes per word; INT8: (rows, columns / 4), four of eight bits
//! P.scales  f16 | bf16 | f32  (rows, columns / group)
//! P.biases  the type of scales           (rows, columns / group)
//! ```
//!
//! One word holds the codes of columns 8w to 8w + 7, lowest nibble first, so on disk the low nibble of the first byte
//! is the first column:
//!
//! ```text
//! byte          0        1        2        3
//! bits       7..4 3..0 7..4 3..0 7..4 3..0 7..4 3..0
//! column        1   0    3   2    5   4    7   6      (+ 8w)
//! ```
//!
//! A byte of INT8 is a column.
//!
//! Codes are unsigned, 0 to 15 or 255, with no zero point and no offset. All columns of one group share a scale and a bias:
//!
//! ```text
//! value(row, column) = scales[row, column / group] * code + biases[row, column / group]
//! ```
//!
//! The group is 64 by default (32 and 128 exist) and is always a multiple of 8, so a word never straddles two groups.
//! Scales may be negative. `P.biases` (plural) is part of the format; `P.bias` (singular) is the layer's own.
//! Source: `mx.quantize` / `mx.dequantize`, ml-explore/mlx v0.32 `mlx/ops.cpp`, mode `affine`.

use std::ops::Range;

use crate::activations::BLOCK;
use crate::matrix::ShapeError;
use crate::widen;

/// How scales and biases are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleType {
    /// IEEE binary16: converters of 2024.
    F16,
    /// bfloat16: current converters.
    Bf16,
    /// f32.
    F32,
}

impl ScaleType {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    /// The nearest value of this type; infinite beyond its range.
    pub fn rounded(self, value: f32) -> f32 {
        match self {
            Self::F16 => half::f16::from_f32(value).to_f32(),
            Self::Bf16 => half::bf16::from_f32(value).to_f32(),
            Self::F32 => value,
        }
    }

    /// Appends a value as it is stored.
    pub fn put(self, value: f32, out: &mut Vec<u8>) {
        match self {
            Self::F16 => out.extend_from_slice(&half::f16::from_f32(value).to_le_bytes()),
            Self::Bf16 => out.extend_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
            Self::F32 => out.extend_from_slice(&value.to_le_bytes()),
        }
    }

    /// The value at `index`, zero behind the last.
    pub(crate) fn get_or_zero(self, bytes: &[u8], index: usize) -> f32 {
        if (index + 1) * self.bytes() <= bytes.len() {
            self.get(bytes, index)
        } else {
            0.0
        }
    }

    /// The value at `index`.
    #[inline]
    fn get(self, bytes: &[u8], index: usize) -> f32 {
        match self {
            Self::F16 => widen::f16(bytes[2 * index], bytes[2 * index + 1]),
            Self::Bf16 => widen::bf16(bytes[2 * index], bytes[2 * index + 1]),
            Self::F32 => {
                let at = 4 * index;
                f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
            }
        }
    }
}

/// The rows of one INT4 or INT8 matrix, borrowed from its file.
#[derive(Debug, Clone, Copy)]
pub struct AffineRows<'a> {
    weight: &'a [u8],
    scales: &'a [u8],
    biases: &'a [u8],
    bits: usize, // of a code: 4 or 8
    group: usize,
    columns: usize,
    rows: usize,
    code_bytes: usize,  // of a row
    scale_bytes: usize, // of a row
    scale_type: ScaleType,
}

impl<'a> AffineRows<'a> {
    /// Views `[weight, scales, biases]` as rows of `columns` four-bit values in groups of `group`.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn int4(
        parts: [&'a [u8]; 3],
        columns: usize,
        group: usize,
        scale_type: ScaleType,
    ) -> Result<Self, ShapeError> {
        Self::new(parts, columns, (4, group), scale_type)
    }

    /// Views `[weight, scales, biases]` as rows of `columns` values of so many bits in groups of `group`.
    ///
    /// # Errors
    /// [`ShapeError`] when there are other than four or eight bits, `group` is not a positive multiple of 8, does not divide
    /// `columns`, or the three arrays do not hold the same whole number of rows.
    pub fn new(
        [weight, scales, biases]: [&'a [u8]; 3],
        columns: usize,
        (bits, group): (usize, usize),
        scale_type: ScaleType,
    ) -> Result<Self, ShapeError> {
        if bits != 4 && bits != 8 {
            return Err(ShapeError(format!(
                "codes have {bits} bits; 4 and 8 are read"
            )));
        }
        if group == 0 || !group.is_multiple_of(8) || columns == 0 || !columns.is_multiple_of(group)
        {
            return Err(ShapeError(format!(
                "INT{bits} groups of {group} do not divide rows of {columns} columns into whole words"
            )));
        }
        let code_bytes = columns / 8 * bits;
        let rows = weight.len() / code_bytes;
        let scale_bytes = (columns / group)
            .checked_mul(scale_type.bytes())
            .filter(|row| row.checked_mul(rows) == Some(scales.len()))
            .filter(|_| weight.len() % code_bytes == 0 && scales.len() == biases.len());
        let Some(scale_bytes) = scale_bytes else {
            return Err(ShapeError(format!(
                "INT{bits} arrays of {}, {} and {} bytes are not rows of {columns} columns in groups of {group}",
                weight.len(),
                scales.len(),
                biases.len()
            )));
        };
        Ok(Self {
            weight,
            scales,
            biases,
            bits,
            group,
            columns,
            rows,
            code_bytes,
            scale_bytes,
            scale_type,
        })
    }

    /// Rows held.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values per row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bits of a code.
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// Whether a group is whole blocks of 64 columns, as the integer kernels take them.
    pub fn is_blocked(&self) -> bool {
        self.group.is_multiple_of(BLOCK)
    }

    /// Steps that activations are rounded to before they meet these weights, on either side of zero.
    ///
    /// AVX2 adds neighbours' products in 16 bits. Those of INT4 leave room for all that a byte of activations holds; a pair of INT8's
    /// is 2 * 255 * 64 = 32640, of 32767 that fit. Whatever the kernel: results do not depend on the processor.
    pub fn activation_steps(&self) -> u8 {
        if self.bits == 4 { 127 } else { 64 }
    }

    /// Blocks of 64 columns that a row has.
    pub(crate) fn blocks(&self) -> usize {
        self.columns / BLOCK
    }

    /// Blocks that share a scale and a bias.
    pub(crate) fn blocks_per_group(&self) -> usize {
        self.group / BLOCK
    }

    /// Bytes of a block's codes: two columns a byte or one.
    pub(crate) fn block_bytes(&self) -> usize {
        BLOCK / 8 * self.bits
    }

    /// A row's block, and the scale and bias of its group.
    pub(crate) fn block(&self, row: usize, block: usize) -> (&'a [u8], f32, f32) {
        self.codes(row, block * BLOCK..(block + 1) * BLOCK)
    }

    /// The parts of one row: its codes, its scales and its biases.
    pub(crate) fn row(&self, row: usize) -> [&'a [u8]; 3] {
        self.parts(row..row + 1)
    }

    /// The parts of some rows.
    pub(crate) fn parts(&self, rows: Range<usize>) -> [&'a [u8]; 3] {
        let part = |bytes: &'a [u8], width: usize| &bytes[rows.start * width..rows.end * width];
        [
            part(self.weight, self.code_bytes),
            part(self.scales, self.scale_bytes),
            part(self.biases, self.scale_bytes),
        ]
    }

    /// The codes of some columns of one group, two a byte or one, and its scale and bias.
    ///
    /// # Panics
    /// When the columns are not whole bytes of one row.
    pub fn codes(&self, row: usize, columns: Range<usize>) -> (&'a [u8], f32, f32) {
        assert!(
            columns.end <= self.columns
                && [columns.start, columns.end]
                    .into_iter()
                    .all(|column| (column * self.bits).is_multiple_of(8)),
            "whole bytes of a row"
        );
        let byte = |column: usize| row * self.code_bytes + column * self.bits / 8;
        let group = row * (self.columns / self.group) + columns.start / self.group;
        (
            &self.weight[byte(columns.start)..byte(columns.end)],
            self.scale_type.get(self.scales, group),
            self.scale_type.get(self.biases, group),
        )
    }

    /// Columns of a group.
    pub fn group(&self) -> usize {
        self.group
    }

    /// How scales and biases are stored.
    pub(crate) fn scale_type(&self) -> ScaleType {
        self.scale_type
    }

    /// Converts one row to f32. A multiplication and an addition per value, in f32, not fused.
    ///
    /// # Panics
    /// When `row` is out of range or `out` is not `columns` long.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.columns, "one value per column");
        let groups = self.columns / self.group;
        let [codes, ..] = self.row(row);
        for (index, (values, codes)) in out
            .chunks_exact_mut(self.group)
            .zip(codes.chunks_exact(self.group / 8 * self.bits))
            .enumerate()
        {
            let scale = self.scale_type.get(self.scales, row * groups + index);
            let bias = self.scale_type.get(self.biases, row * groups + index);
            if self.bits == 8 {
                for (value, &code) in values.iter_mut().zip(codes) {
                    *value = scale * f32::from(code) + bias;
                }
                continue;
            }
            for (pair, &byte) in values.chunks_exact_mut(2).zip(codes) {
                pair[0] = scale * f32::from(byte & 0xF) + bias;
                pair[1] = scale * f32::from(byte >> 4) + bias;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The formula of the module comment, read literally: words, shifts, division.
    fn by_the_formula(words: &[u32], scales: &[f32], biases: &[f32], group: usize) -> Vec<f32> {
        (0..words.len() * 8)
            .map(|column| {
                let code = words[column / 8] >> (4 * (column % 8)) & 0xF;
                scales[column / group] * code as f32 + biases[column / group]
            })
            .collect()
    }

    fn encode(values: &[f32], scale_type: ScaleType) -> Vec<u8> {
        values
            .iter()
            .flat_map(|&value| match scale_type {
                ScaleType::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
                ScaleType::Bf16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
                ScaleType::F32 => value.to_le_bytes().to_vec(),
            })
            .collect()
    }

    /// Every byte value once per group size and scale type, with positive, negative and zero scales.
    #[test]
    fn all_byte_values_follow_the_formula() {
        let bytes: Vec<u8> = (0..=255).collect();
        let words: Vec<u32> = bytes
            .chunks_exact(4)
            .map(|four| u32::from_le_bytes(four.try_into().unwrap()))
            .collect();
        for group in [8, 32, 64, 128] {
            let groups = 512 / group;
            let scales: Vec<f32> = (0..groups)
                .map(|index| [0.5, -0.25, 0.0, 2.0][index % 4])
                .collect();
            let biases: Vec<f32> = (0..groups).map(|index| index as f32 * 0.5 - 3.0).collect();
            for scale_type in [ScaleType::F16, ScaleType::Bf16, ScaleType::F32] {
                let (scale_bytes, bias_bytes) =
                    (encode(&scales, scale_type), encode(&biases, scale_type));
                let rows =
                    AffineRows::int4([&bytes, &scale_bytes, &bias_bytes], 512, group, scale_type)
                        .unwrap();
                let mut out = vec![f32::NAN; 512];
                rows.dequantize_row(0, &mut out);
                assert_eq!(
                    out,
                    by_the_formula(&words, &scales, &biases, group),
                    "{group} {scale_type:?}"
                );
            }
        }
    }

    #[test]
    fn a_byte_of_eight_bits_is_a_column() {
        let bytes: Vec<u8> = (0..=255).rev().collect();
        let scales = encode(&[0.5, -2.0, 0.25, 1.0], ScaleType::F16);
        let biases = encode(&[1.0, 0.0, -3.0, 8.0], ScaleType::F16);
        let parts: [&[u8]; 3] = [&bytes, &scales, &biases];
        let rows = AffineRows::new(parts, 128, (8, 64), ScaleType::F16).unwrap();
        assert_eq!(
            (rows.rows(), rows.blocks(), rows.blocks_per_group()),
            (2, 2, 1)
        );
        let mut out = [f32::NAN; 128];
        rows.dequantize_row(1, &mut out);
        assert_eq!(out[..2], [0.25 * 127.0 - 3.0, 0.25 * 126.0 - 3.0]);
        assert_eq!(out[64..66], [63.0 + 8.0, 62.0 + 8.0]);
        assert_eq!(out[127], 8.0);
        let (codes, scale, bias) = rows.codes(0, 64..66);
        assert_eq!((codes, scale, bias), (&[191, 190][..], -2.0, 0.0));
    }

    #[test]
    fn the_low_nibble_of_the_first_byte_is_the_first_column() {
        let scales = encode(&[1.0], ScaleType::F32);
        let biases = encode(&[-8.0], ScaleType::F32);
        let rows = AffineRows::int4(
            [&[0x21, 0x43, 0x65, 0xF7], &scales, &biases],
            8,
            8,
            ScaleType::F32,
        )
        .unwrap();
        let mut out = [0.0; 8];
        rows.dequantize_row(0, &mut out);
        assert_eq!(out, [-7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 7.0]);
    }

    #[test]
    fn rows_and_groups_keep_their_own_scale() {
        let weight = [0x11; 2 * 16 / 2];
        let scales = encode(&[1.0, 10.0, 100.0, 1000.0], ScaleType::Bf16);
        let biases = encode(&[0.0, 0.5, 0.0, -1.0], ScaleType::Bf16);
        let rows = AffineRows::int4([&weight, &scales, &biases], 16, 8, ScaleType::Bf16).unwrap();
        let mut out = [f32::NAN; 16];
        rows.dequantize_row(1, &mut out);
        assert_eq!(rows.rows(), 2);
        assert_eq!(out[..8], [100.0; 8]);
        assert_eq!(out[8..], [999.0; 8]);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let check = |weight: usize, scales: usize, biases: usize, columns: usize, group: usize| {
            let (weight, scales, biases) = (vec![0; weight], vec![0; scales], vec![0; biases]);
            AffineRows::int4([&weight, &scales, &biases], columns, group, ScaleType::F16).is_ok()
        };
        assert!(check(64, 4, 4, 64, 64));
        let eight =
            |bits| AffineRows::new([&[0; 64], &[0; 2], &[0; 2]], 64, (bits, 64), ScaleType::F16);
        assert!(eight(8).is_ok() && eight(4).is_err() && eight(6).is_err() && eight(0).is_err());
        assert!(check(0, 0, 0, 64, 64), "no rows is a shape");
        assert!(!check(64, 4, 4, 64, 0), "group 0");
        assert!(!check(64, 4, 4, 64, 12), "group not a multiple of 8");
        assert!(!check(64, 4, 4, 0, 8), "no columns");
        assert!(!check(64, 4, 4, 96, 64), "a tail shorter than a group");
        assert!(!check(65, 4, 4, 64, 64), "half a row");
        assert!(!check(64, 2, 4, 64, 64), "scales of one row for two");
        assert!(!check(64, 4, 2, 64, 64), "biases unlike scales");
    }
}
