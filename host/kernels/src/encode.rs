//! f32 weights to MLX's affine INT4 ([`crate::int4`] draws the format): which scale and bias a group gets.
//!
//! MLX takes the two ends of a group (`ends`). The squared error is smaller when the ends are pulled in a little and
//! when, for given codes, scale and bias are the least-squares line through the weights; both are tried from several
//! starts, and the best is kept, MLX's own among them: a group is never worse than `mx.quantize` makes it.
//! Scale and bias are rounded to their stored type before anything is measured, so that what is measured is what is read
//! back.
//! Source of `ends`: `affine_quantize`, ml-explore/mlx v0.32 `mlx/ops.cpp`.

use rayon::prelude::*;

use crate::int4::ScaleType;
use crate::matrix::ShapeError;

/// Largest code.
const CODE_MAX: f32 = 15.0;
/// Shares of a group's range that a search starts from.
const STARTS: [f32; 6] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.7];
/// Least-squares lines drawn after each start; the error hardly falls after three.
const LINES: usize = 3;
/// MLX's least scale.
const SCALE_MIN: f32 = 1e-7;

/// Why rows cannot be encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EncodeError {
    /// Rows that are not whole groups.
    Shape(ShapeError),
    /// A weight that is infinite or not a number.
    NotFinite {
        /// Row, counted from the first one given.
        row: usize,
    },
    /// A scale or bias beyond the range of its stored type.
    Range {
        /// Row, counted from the first one given.
        row: usize,
    },
}

impl EncodeError {
    /// The same of rows that follow `rows` others, counted from the first of all.
    #[must_use]
    pub fn after(self, rows: usize) -> Self {
        match self {
            Self::Shape(shape) => Self::Shape(shape),
            Self::NotFinite { row } => Self::NotFinite { row: rows + row },
            Self::Range { row } => Self::Range { row: rows + row },
        }
    }
}

impl std::fmt::Display for EncodeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shape(shape) => shape.fmt(f),
            Self::NotFinite { row } => write!(f, "row {row} holds a weight that is not finite"),
            Self::Range { row } => write!(
                f,
                "row {row} needs a scale or bias beyond the range of the type that stores it"
            ),
        }
    }
}

impl std::error::Error for EncodeError {}

/// Sums of squares over encoded weights.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SquaredError {
    /// Of the weights.
    pub weights: f64,
    /// Of what encoding changed.
    pub encoded: f64,
    /// Of what MLX's own choice of scale and bias would have changed.
    pub ends: f64,
}

impl std::ops::AddAssign for SquaredError {
    fn add_assign(&mut self, other: Self) {
        self.weights += other.weights;
        self.encoded += other.encoded;
        self.ends += other.ends;
    }
}

/// Rows in the stored form, each array row-major and little-endian.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EncodedRows {
    /// Codes, two a byte.
    pub weight: Vec<u8>,
    /// One per group.
    pub scales: Vec<u8>,
    /// One per group.
    pub biases: Vec<u8>,
    /// How far the rows are from what they were.
    pub error: SquaredError,
}

/// Encodes whole rows of `columns` values on all cores.
///
/// # Errors
/// [`EncodeError`] when rows are not whole groups of a multiple of 8, or a value does not fit.
pub fn encode_rows(
    values: &[f32],
    columns: usize,
    group: usize,
    scale_type: ScaleType,
) -> Result<EncodedRows, EncodeError> {
    let whole = group > 0
        && group.is_multiple_of(8)
        && columns > 0
        && columns.is_multiple_of(group)
        && values.len().is_multiple_of(columns);
    if !whole {
        return Err(EncodeError::Shape(ShapeError(format!(
            "{} values are not rows of {columns} in INT4 groups of {group}",
            values.len()
        ))));
    }
    let rows: Vec<EncodedRows> = values
        .par_chunks_exact(columns)
        .enumerate()
        .map(|(index, row)| encode_row(index, row, group, scale_type))
        .collect::<Result<_, _>>()?;
    let mut out = EncodedRows::default();
    for row in rows {
        out.weight.extend_from_slice(&row.weight);
        out.scales.extend_from_slice(&row.scales);
        out.biases.extend_from_slice(&row.biases);
        out.error += row.error;
    }
    Ok(out)
}

fn encode_row(
    row: usize,
    values: &[f32],
    group: usize,
    scale_type: ScaleType,
) -> Result<EncodedRows, EncodeError> {
    if values.iter().any(|value| !value.is_finite()) {
        return Err(EncodeError::NotFinite { row });
    }
    let mut out = EncodedRows::default();
    for weights in values.chunks_exact(group) {
        let plain = Line::rounded(ends(weights), scale_type);
        let plain_error = plain.error(weights);
        let (line, error) = best_line(weights, (plain, plain_error), scale_type);
        if !error.is_finite() {
            return Err(EncodeError::Range { row });
        }
        for pair in weights.chunks_exact(2) {
            out.weight
                .push(line.code(pair[0]) | line.code(pair[1]) << 4);
        }
        scale_type.put(line.scale, &mut out.scales);
        scale_type.put(line.bias, &mut out.biases);
        out.error += SquaredError {
            weights: weights.iter().map(|&w| f64::from(w).powi(2)).sum(),
            encoded: f64::from(error),
            ends: f64::from(plain_error),
        };
    }
    Ok(out)
}

/// What codes stand for: `scale * code + bias`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Line {
    scale: f32,
    bias: f32,
}

impl Line {
    /// As it is read back.
    fn rounded(self, scale_type: ScaleType) -> Self {
        Self {
            scale: scale_type.rounded(self.scale),
            bias: scale_type.rounded(self.bias),
        }
    }

    /// The nearest code of a weight.
    fn code(self, weight: f32) -> u8 {
        self.position(weight) as u8
    }

    fn position(self, weight: f32) -> f32 {
        // NaN on a line without slope: such a line has no error and is never the best.
        ((weight - self.bias) / self.scale)
            .round_ties_even()
            .clamp(0.0, CODE_MAX)
    }

    /// The sum of squares of what the line changes.
    fn error(self, weights: &[f32]) -> f32 {
        let one = |&weight: &f32| {
            let change = self.scale * self.position(weight) + self.bias - weight;
            change * change
        };
        weights.iter().map(one).sum()
    }

    /// The least-squares line through the weights over this one's codes; nothing when all codes are one.
    fn through(self, weights: &[f32]) -> Option<Self> {
        let count = weights.len() as f32;
        let (mut codes, mut squares, mut sum, mut products) = (0.0f32, 0.0f32, 0.0f32, 0.0f32);
        for &weight in weights {
            let code = self.position(weight);
            codes += code;
            squares += code * code;
            sum += weight;
            products += code * weight;
        }
        let spread = count * squares - codes * codes; // whole numbers, exact below 2^24: groups up to 256
        if spread <= 0.0 {
            return None;
        }
        let scale = (count * products - codes * sum) / spread;
        let bias = (sum - scale * codes) / count;
        Some(Self { scale, bias })
    }
}

/// MLX's choice: the end of larger magnitude lies on a code exactly, the other end nearly.
fn ends(weights: &[f32]) -> Line {
    let (low, high) = range(weights);
    let from_low = low.abs() > high.abs();
    let width = ((high - low) / CODE_MAX).max(SCALE_MIN);
    let scale = if from_low { width } else { -width };
    let edge = if from_low { low } else { high };
    let steps = (edge / scale).round_ties_even();
    if steps == 0.0 {
        Line { scale, bias: 0.0 }
    } else {
        Line {
            scale: edge / steps,
            bias: edge,
        }
    }
}

fn range(weights: &[f32]) -> (f32, f32) {
    weights.iter().fold(
        (f32::INFINITY, f32::NEG_INFINITY),
        |(low, high), &weight| (low.min(weight), high.max(weight)),
    )
}

/// The line of the least error that the search finds, and that error.
fn best_line(weights: &[f32], first: (Line, f32), scale_type: ScaleType) -> (Line, f32) {
    let (low, high) = range(weights);
    let (middle, half) = (low / 2.0 + high / 2.0, high / 2.0 - low / 2.0);
    let mut best = first;
    for share in STARTS {
        let start = Line {
            scale: (2.0 * half * share / CODE_MAX).max(SCALE_MIN),
            bias: middle - half * share,
        };
        let mut line = start.rounded(scale_type);
        for _ in 0..=LINES {
            let error = line.error(weights);
            // A first choice that does not fit its type has no error to compare with.
            if error < best.1 || best.1.is_nan() {
                best = (line, error);
            }
            match line.through(weights) {
                Some(next) => line = next.rounded(scale_type),
                None => break,
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::int4::Int4Rows;

    const TYPES: [ScaleType; 3] = [ScaleType::F16, ScaleType::Bf16, ScaleType::F32];

    /// About normal, from a fixed seed: the sum of twelve uniform numbers.
    fn normal(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut uniform = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        (0..count)
            .map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0)
            .collect()
    }

    fn decoded(
        rows: &EncodedRows,
        columns: usize,
        group: usize,
        scale_type: ScaleType,
    ) -> Vec<f32> {
        let view = Int4Rows::new(
            [&rows.weight, &rows.scales, &rows.biases],
            columns,
            group,
            scale_type,
        )
        .unwrap();
        let mut out = vec![f32::NAN; view.rows() * columns];
        for (row, values) in out.chunks_exact_mut(columns).enumerate() {
            view.dequantize_row(row, values);
        }
        out
    }

    fn squares(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    }

    #[test]
    fn what_is_measured_is_what_is_read_back() {
        for scale_type in TYPES {
            for group in [32, 64, 128] {
                let values = normal(8 * 256, 7);
                let rows = encode_rows(&values, 256, group, scale_type).unwrap();
                let real = squares(&decoded(&rows, 256, group, scale_type), &values);
                let said = rows.error.encoded;
                assert!(
                    (real - said).abs() < 1e-4 * said,
                    "{scale_type:?} {group}: {said}, really {real}"
                );
            }
        }
    }

    #[test]
    fn every_kind_of_group_is_nearer_than_by_its_ends() {
        let plain = normal(64 * 64, 1);
        let heavy: Vec<f32> = plain.iter().map(|x| x * x * x).collect();
        let mut outlier = plain.clone();
        outlier.iter_mut().step_by(64).for_each(|x| *x *= 20.0);
        let shifted: Vec<f32> = plain.iter().map(|x| 0.02 * x + 5.0).collect();
        for (name, values) in [
            ("normal", plain),
            ("heavy", heavy),
            ("outlier", outlier),
            ("shifted", shifted),
        ] {
            for scale_type in TYPES {
                let error = encode_rows(&values, 64, 64, scale_type).unwrap().error;
                assert!(
                    error.encoded < error.ends,
                    "{name} {scale_type:?}: {error:?}"
                );
            }
        }
    }

    #[test]
    fn weights_that_four_bits_hold_come_back_exactly() {
        let values: Vec<f32> = (0..512)
            .map(|index| ((index * 7) % 16) as f32 * 0.25 - 1.5)
            .collect();
        for scale_type in TYPES {
            let rows = encode_rows(&values, 128, 64, scale_type).unwrap();
            assert_eq!(decoded(&rows, 128, 64, scale_type), values);
            assert_eq!(rows.error.encoded, 0.0);
        }
    }

    #[test]
    fn groups_without_range_keep_their_value() {
        for value in [0.0, -0.0, 1.0, -3.5, 1e-12] {
            let rows = encode_rows(&[value; 64], 64, 64, ScaleType::F32).unwrap();
            let back = decoded(&rows, 64, 64, ScaleType::F32);
            assert!(
                back.iter().all(|b| (b - value).abs() <= 1e-7),
                "{value}: {back:?}"
            );
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_row() {
        let mut values = vec![0.5; 3 * 64];
        values[70] = f32::NAN;
        let encode = |values: &[f32]| encode_rows(values, 64, 64, ScaleType::F16).unwrap_err();
        assert_eq!(encode(&values), EncodeError::NotFinite { row: 1 });
        values[70] = 0.5;
        values[130] = 1e9;
        assert_eq!(encode(&values), EncodeError::Range { row: 2 });
        for (columns, group) in [(64, 0), (64, 12), (0, 64), (96, 64), (128, 64)] {
            let refused = encode_rows(&values, columns, group, ScaleType::F16);
            assert!(
                matches!(refused, Err(EncodeError::Shape(_))),
                "{columns} {group}"
            );
        }
    }
}
