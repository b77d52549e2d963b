//! A weight matrix in any stored form, and its products.

use std::ops::Range;

use rayon::prelude::*;

use crate::affine::AffineRows;
use crate::widen;

/// Arrays that do not have the size their shape asks for; says which and what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShapeError(pub String);

impl std::fmt::Display for ShapeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ShapeError {}

/// Row-major weights as their file has them.
#[derive(Debug, Clone, Copy)]
pub enum StoredRows<'a> {
    /// Little-endian f32.
    F32(&'a [u8]),
    /// IEEE binary16.
    F16(&'a [u8]),
    /// bfloat16.
    Bf16(&'a [u8]),
    /// Codes of four or eight bits with scales and biases.
    Affine(AffineRows<'a>),
}

/// Stored weights with a checked shape: (rows, columns), a linear layer's (out, in).
#[derive(Debug, Clone, Copy)]
pub struct StoredMatrix<'a> {
    data: StoredRows<'a>,
    rows: usize,
    columns: usize,
}

/// Rows one parallel task widens or multiplies: enough work to be worth a task, few enough to share.
const TASK_ROWS: usize = 16;

impl<'a> StoredMatrix<'a> {
    /// Gives `data` the shape (rows, columns).
    ///
    /// # Errors
    /// [`ShapeError`] when the bytes are not exactly that many values, or a dimension is zero.
    pub fn new(data: StoredRows<'a>, rows: usize, columns: usize) -> Result<Self, ShapeError> {
        let fits = match data {
            StoredRows::F32(bytes) => is_size(bytes.len(), rows, columns, 4),
            StoredRows::F16(bytes) | StoredRows::Bf16(bytes) => {
                is_size(bytes.len(), rows, columns, 2)
            }
            StoredRows::Affine(affine) => affine.rows() == rows && affine.columns() == columns,
        };
        if !fits || rows == 0 || columns == 0 {
            return Err(ShapeError(format!(
                "stored bytes are not a matrix of {rows} x {columns}"
            )));
        }
        Ok(Self {
            data,
            rows,
            columns,
        })
    }

    /// Output values of the layer.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input values of the layer.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Converts one row to f32.
    ///
    /// # Panics
    /// When `row` is out of range or `out` is not `columns` long.
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        let span = |bytes: usize| row * self.columns * bytes..(row + 1) * self.columns * bytes;
        match self.data {
            StoredRows::F32(bytes) => widen::widen_f32(&bytes[span(4)], out),
            StoredRows::F16(bytes) => widen::widen_f16(&bytes[span(2)], out),
            StoredRows::Bf16(bytes) => widen::widen_bf16(&bytes[span(2)], out),
            StoredRows::Affine(affine) => affine.dequantize_row(row, out),
        }
    }

    /// Converts a range of rows to f32 on all cores, row-major into `out`.
    ///
    /// # Panics
    /// When the range is out of bounds or `out` is not its size.
    pub fn widen_rows(&self, range: Range<usize>, out: &mut [f32]) {
        assert!(
            range.start <= range.end && range.end <= self.rows,
            "rows are in range"
        );
        assert_eq!(
            out.len(),
            range.len() * self.columns,
            "one value per weight"
        );
        out.par_chunks_mut(TASK_ROWS * self.columns)
            .enumerate()
            .for_each(|(task, block)| {
                for (index, values) in block.chunks_exact_mut(self.columns).enumerate() {
                    self.widen_row(range.start + task * TASK_ROWS + index, values);
                }
            });
    }

    /// `x` times the transposed matrix for a few rows of `x`, which is (m, columns); the answer is (m, rows).
    ///
    /// Each weight is widened once and used m times. Every value is one [`dot`] whatever m is, so a row's result does
    /// not depend on its neighbours.
    ///
    /// # Panics
    /// When `x` is not a whole number of rows.
    pub fn multiply_few(&self, x: &[f32]) -> Vec<f32> {
        assert!(x.len().is_multiple_of(self.columns), "whole rows");
        let m = x.len() / self.columns;
        if m == 0 {
            return Vec::new();
        }
        let mut by_weight = vec![0.0; self.rows * m]; // (rows, m)
        by_weight
            .par_chunks_mut(TASK_ROWS * m)
            .enumerate()
            .for_each_init(
                || vec![0.0; self.columns],
                |weights, (task, block)| {
                    for (index, sums) in block.chunks_exact_mut(m).enumerate() {
                        self.widen_row(task * TASK_ROWS + index, weights);
                        for (sum, inputs) in sums.iter_mut().zip(x.chunks_exact(self.columns)) {
                            *sum = dot(weights, inputs);
                        }
                    }
                },
            );
        if m == 1 {
            return by_weight;
        }
        let mut out = vec![0.0; m * self.rows];
        for (column, sums) in by_weight.chunks_exact(m).enumerate() {
            for (row, &sum) in sums.iter().enumerate() {
                out[row * self.rows + column] = sum;
            }
        }
        out
    }
}

/// Whether `len` bytes are rows x columns values of `bytes` each.
fn is_size(len: usize, rows: usize, columns: usize, bytes: usize) -> bool {
    rows.checked_mul(columns)
        .and_then(|values| values.checked_mul(bytes))
        == Some(len)
}

/// Sum of products, in a fixed order: 16 running sums over columns modulo 16, folded in halves, then the tail.
///
/// # Panics
/// When the lengths differ.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    assert_eq!(a.len(), b.len(), "vectors of one length");
    let mut sums = [0.0f32; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_blocks
        .remainder()
        .iter()
        .zip(b_blocks.remainder())
        .map(|(x, y)| x * y)
        .sum();
    for (x, y) in a_blocks.zip(b_blocks) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0] + tail
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::affine::ScaleType;

    /// Small integers, so that every sum is exact in f32 and must be equal.
    fn integers(count: usize, seed: usize) -> Vec<f32> {
        (0..count)
            .map(|index| ((index * 31 + seed * 17) % 13) as f32 - 6.0)
            .collect()
    }

    fn bytes_of(values: &[f32]) -> Vec<u8> {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    }

    #[test]
    fn dot_is_the_sum_of_products_at_every_length() {
        for len in 0..70 {
            let (a, b) = (integers(len, 1), integers(len, 2));
            let want: f32 = a.iter().zip(&b).map(|(x, y)| x * y).sum();
            assert_eq!(dot(&a, &b), want, "{len}");
        }
    }

    #[test]
    fn products_equal_the_naive_ones_in_every_stored_type() {
        let (rows, columns, m) = (37, 24, 3);
        let weights = integers(rows * columns, 3);
        let f16: Vec<u8> = weights
            .iter()
            .flat_map(|&w| half::f16::from_f32(w).to_le_bytes())
            .collect();
        let bf16: Vec<u8> = weights
            .iter()
            .flat_map(|&w| half::bf16::from_f32(w).to_le_bytes())
            .collect();
        let f32_bytes = bytes_of(&weights);
        let x = integers(m * columns, 4);
        let mut want = Vec::new();
        for row in 0..m {
            for out in 0..rows {
                want.push(
                    (0..columns)
                        .map(|c| x[row * columns + c] * weights[out * columns + c])
                        .sum::<f32>(),
                );
            }
        }
        for data in [
            StoredRows::F32(&f32_bytes),
            StoredRows::F16(&f16),
            StoredRows::Bf16(&bf16),
        ] {
            let matrix = StoredMatrix::new(data, rows, columns).unwrap();
            assert_eq!(matrix.multiply_few(&x), want);
            assert_eq!(
                matrix.multiply_few(&x[columns..2 * columns]),
                want[rows..2 * rows],
                "a row alone"
            );
            let mut widened = vec![f32::NAN; 20 * columns];
            matrix.widen_rows(17..37, &mut widened);
            assert_eq!(widened, weights[17 * columns..]);
        }
    }

    #[test]
    fn int4_rows_multiply_like_their_dequantized_form() {
        let (rows, columns) = (19, 64);
        let weight: Vec<u8> = (0..rows * columns / 2)
            .map(|index| (index * 37 % 256) as u8)
            .collect();
        let scales = bytes_of(&integers(rows, 5));
        let biases = bytes_of(&integers(rows, 6));
        let int4 =
            AffineRows::int4([&weight, &scales, &biases], columns, 64, ScaleType::F32).unwrap();
        let matrix = StoredMatrix::new(StoredRows::Affine(int4), rows, columns).unwrap();
        let mut widened = vec![f32::NAN; rows * columns];
        matrix.widen_rows(0..rows, &mut widened);
        let x = integers(columns, 7);
        let want: Vec<f32> = widened.chunks(columns).map(|row| dot(row, &x)).collect();
        assert_eq!(matrix.multiply_few(&x), want);
        assert!(widened.iter().any(|value| *value != 0.0));
    }

    #[test]
    fn a_shape_that_is_not_the_bytes_is_refused() {
        let bytes = [0; 24];
        assert!(StoredMatrix::new(StoredRows::F32(&bytes), 2, 3).is_ok());
        assert!(StoredMatrix::new(StoredRows::F16(&bytes), 2, 3).is_err());
        assert!(StoredMatrix::new(StoredRows::F32(&bytes), usize::MAX, 2).is_err());
        assert!(StoredMatrix::new(StoredRows::F32(&[]), 0, 3).is_err());
    }
}
