//! f32 weights to MLX's affine INT4 or INT8 ([`crate::affine`] draws the format): which scale and bias a group gets.
//!
//! MLX takes the two ends of a group (`ends`). The squared error is smaller when each end is pulled in a little and
//! when, for given codes, scale and bias are the least-squares line through the weights; both are tried from several
//! starts, and the best is kept, MLX's own among them: a group is never worse than `mx.quantize` makes it.
//! Scale and bias are rounded to their stored type before anything is measured, so that what is measured is what is read
//! back, and the bias is fitted to the scale as it was rounded.
//!
//! On normal weights in f16 four bits leave 8.13 % where the smallest and largest weight leave 8.96 % and MLX 9.10 %. The format
//! hardly holds more: 225 starts leave 8.07 %. Half is beyond any format of this size: 4.5 bits a weight leave a normal
//! distribution 4.42 % however they are used (its rate-distortion bound, `2^-4.5`).
//! Source of `ends`: `affine_quantize`, ml-explore/mlx v0.32 `mlx/ops.cpp`.

use rayon::prelude::*;

use crate::affine::ScaleType;
use crate::matrix::ShapeError;

/// Shares of a group's range by which a search pulls in either end to start from, each with each, in four bits: in eight as many
/// steps. Nine starts with one share for both ends leave more than these.
const STARTS: [f32; 3] = [0.0, 0.05, 0.1];
/// Least-squares lines drawn after each start; the error hardly falls after three.
const LINES: usize = 3;
/// Weights side by side in the inner loop, for the compiler to vectorize; a group is a multiple.
const LANES: usize = 8;
/// At this magnitude an f32 is a whole number: adding it rounds, ties to even, where `round` would be a call.
const WHOLE: f32 = 8_388_608.0;
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
    /// Codes, two a byte of four bits, one of seven or eight.
    pub weight: Vec<u8>,
    /// One per group.
    pub scales: Vec<u8>,
    /// One per group.
    pub biases: Vec<u8>,
    /// How far the rows are from what they were.
    pub error: SquaredError,
}

/// Encodes whole rows of `columns` values, in so many bits and in groups of so many, on all cores. Codes of seven bits are INT8 too,
/// none above 127: a bit less exact, and with AVX2 multiplied in less time.
///
/// # Errors
/// [`EncodeError`] when there are other than four, seven or eight bits, rows are not whole groups of a multiple of 8, or a value does
/// not fit.
pub fn encode_rows(
    values: &[f32],
    columns: usize,
    (bits, group): (usize, usize),
    scale_type: ScaleType,
) -> Result<EncodedRows, EncodeError> {
    let whole = matches!(bits, 4 | 7 | 8)
        && group > 0
        && group.is_multiple_of(8)
        && columns > 0
        && columns.is_multiple_of(group)
        && values.len().is_multiple_of(columns);
    if !whole {
        return Err(EncodeError::Shape(ShapeError(format!(
            "{} values are not rows of {columns} in groups of {group} with codes of {bits} bits",
            values.len()
        ))));
    }
    let rows: Vec<EncodedRows> = values
        .par_chunks_exact(columns)
        .enumerate()
        .map(|(index, row)| encode_row(index, row, (bits, group), scale_type))
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
    (bits, group): (usize, usize),
    scale_type: ScaleType,
) -> Result<EncodedRows, EncodeError> {
    if values.iter().any(|value| !value.is_finite()) {
        return Err(EncodeError::NotFinite { row });
    }
    let mut out = EncodedRows::default();
    for weights in values.chunks_exact(group) {
        let plain = Line::rounded(ends(weights, bits), scale_type);
        let plain_error = plain.sums(weights).error;
        let (line, error) = best_line(weights, (plain, plain_error), scale_type);
        if !error.is_finite() {
            return Err(EncodeError::Range { row });
        }
        match bits {
            4 => out.weight.extend(
                (weights.as_chunks().0.iter()).map(|[a, b]| line.code(*a) | line.code(*b) << 4),
            ),
            _ => out.weight.extend(weights.iter().map(|w| line.code(*w))),
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
    code_max: f32,
}

impl Line {
    /// As it is read back.
    fn rounded(self, scale_type: ScaleType) -> Self {
        Self {
            scale: scale_type.rounded(self.scale),
            bias: scale_type.rounded(self.bias),
            ..self
        }
    }

    /// The nearest code of a weight.
    fn code(self, weight: f32) -> u8 {
        self.position(weight) as u8
    }

    fn position(self, weight: f32) -> f32 {
        // NaN on a line without slope: such a line has no error and is never the best.
        let position = ((weight - self.bias) / self.scale).clamp(0.0, self.code_max);
        (position + WHOLE) - WHOLE
    }

    /// What the line does to a group.
    fn sums(self, weights: &[f32]) -> Sums {
        let mut lanes = [[0.0f32; LANES]; 4];
        let [errors, codes, squares, products] = &mut lanes;
        for weights in weights.as_chunks::<LANES>().0 {
            for (lane, &weight) in weights.iter().enumerate() {
                let code = self.position(weight);
                let change = self.scale * code + self.bias - weight;
                errors[lane] += change * change;
                codes[lane] += code;
                squares[lane] += code * code;
                products[lane] += code * weight;
            }
        }
        let [error, codes, squares, products] = lanes.map(|lanes| lanes.iter().sum());
        Sums {
            error,
            codes,
            squares,
            products,
        }
    }
}

/// Sums over a group on some line.
struct Sums {
    /// Of the squares of what the line changes.
    error: f32,
    codes: f32,
    /// Of codes.
    squares: f32,
    /// Of codes and weights.
    products: f32,
}

impl Sums {
    /// The least-squares line through weights of this sum over these codes, as it is stored; nothing when all codes are one.
    fn line(&self, (count, sum): (f32, f32), scale_type: ScaleType) -> Option<(f32, f32)> {
        // Whole numbers, exact below 2^24: of four bits groups up to 256. Eight bits lose a millionth of what a whole range spreads.
        let spread = count * self.squares - self.codes * self.codes;
        if spread <= 0.0 {
            return None;
        }
        let scale = scale_type.rounded((count * self.products - self.codes * sum) / spread);
        let bias = scale_type.rounded((sum - scale * self.codes) / count);
        Some((scale, bias))
    }
}

/// MLX's choice: the end of larger magnitude lies on a code exactly, the other end nearly.
fn ends(weights: &[f32], bits: usize) -> Line {
    let code_max = ((1 << bits) - 1) as f32;
    let (low, high) = range(weights);
    let from_low = low.abs() > high.abs();
    let width = ((high - low) / code_max).max(SCALE_MIN);
    let scale = if from_low { width } else { -width };
    let edge = if from_low { low } else { high };
    let steps = (edge / scale).round_ties_even();
    let (scale, bias) = if steps == 0.0 {
        (scale, 0.0)
    } else {
        (edge / steps, edge)
    };
    Line {
        scale,
        bias,
        code_max,
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
    let total = (weights.len() as f32, weights.iter().sum::<f32>());
    let mut best = first;
    for (below, above) in STARTS
        .iter()
        .flat_map(|below| STARTS.map(|above| (*below, above)))
    {
        // Halves, as the whole range of a type may be beyond it.
        let half = high / 2.0 - low / 2.0;
        let [below, above] = [below, above].map(|share| share * (15.0 / first.0.code_max));
        let start = Line {
            scale: (2.0 * half * ((1.0 - below - above) / first.0.code_max)).max(SCALE_MIN),
            bias: low + 2.0 * half * below,
            ..first.0
        };
        let mut line = start.rounded(scale_type);
        for _ in 0..=LINES {
            let sums = line.sums(weights);
            // A first choice that does not fit its type has no error to compare with.
            if sums.error < best.1 || best.1.is_nan() {
                best = (line, sums.error);
            }
            match sums.line(total, scale_type) {
                Some((scale, bias)) if (scale, bias) != (line.scale, line.bias) => {
                    line = Line {
                        scale,
                        bias,
                        ..line
                    };
                }
                _ => break,
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::affine::AffineRows;

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
        bits_and_group: (usize, usize),
        scale_type: ScaleType,
    ) -> Vec<f32> {
        let parts: [&[u8]; 3] = [&rows.weight, &rows.scales, &rows.biases];
        let view = AffineRows::new(parts, columns, bits_and_group, scale_type).unwrap();
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
            for form in [(4, 32), (4, 64), (4, 128), (8, 64), (8, 128)] {
                let values = normal(8 * 256, 7);
                let rows = encode_rows(&values, 256, form, scale_type).unwrap();
                let real = squares(&decoded(&rows, 256, form, scale_type), &values);
                let said = rows.error.encoded;
                assert!(
                    (real - said).abs() < 1e-4 * said,
                    "{scale_type:?} {form:?}: {said}, really {real}"
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
            for (scale_type, bits) in TYPES.into_iter().flat_map(|t| [(t, 4), (t, 8)]) {
                let encoded = encode_rows(&values, 64, (bits, 64), scale_type).unwrap();
                let error = encoded.error;
                assert!(
                    error.encoded < error.ends,
                    "{name} {scale_type:?} {bits}: {error:?}"
                );
            }
        }
    }

    /// What the top of this file says: plain rounding between smallest and largest weight leaves a tenth more.
    #[test]
    fn normal_weights_lose_less_than_between_their_extremes() {
        let values = normal(64 * 4096, 3);
        for scale_type in [ScaleType::F16, ScaleType::Bf16] {
            let extremes: f32 = values
                .chunks_exact(64)
                .map(|group| {
                    let (low, high) = range(group);
                    let line = Line {
                        scale: (high - low) / 15.0,
                        bias: low,
                        code_max: 15.0,
                    };
                    line.rounded(scale_type).sums(group).error
                })
                .sum();
            let error = encode_rows(&values, 64, (4, 64), scale_type).unwrap().error;
            let relative = |error: f64| (error / squared(&values)).sqrt();
            let (ours, extremes) = (relative(error.encoded), relative(f64::from(extremes)));
            assert!(
                ours < 0.92 * extremes && ours < 0.083,
                "{scale_type:?}: {ours} of {extremes}"
            );
        }
    }

    #[test]
    fn eight_bits_lose_half_a_hundredth_of_normal_weights() {
        let values = normal(64 * 512, 5);
        for (scale_type, most) in [(ScaleType::F16, 0.0055), (ScaleType::Bf16, 0.0065)] {
            let error = encode_rows(&values, 64, (8, 64), scale_type).unwrap().error;
            let relative = (error.encoded / squared(&values)).sqrt();
            assert!(relative < most, "{scale_type:?}: {relative}");
        }
    }

    /// The sum of the squares.
    fn squared(values: &[f32]) -> f64 {
        values.iter().map(|&value| f64::from(value).powi(2)).sum()
    }

    #[test]
    fn weights_that_the_codes_hold_come_back_exactly() {
        let four = |index: usize| ((index * 7) % 16) as f32 * 0.25 - 1.5;
        // Both ends in every group of 64.
        let eight = |index: usize| {
            let code = [0, 255, (index * 37 % 256) as u8][index % 3];
            f32::from(code) * 0.25 - 32.0
        };
        for scale_type in TYPES {
            let check = |bits: usize, values: Vec<f32>| {
                let rows = encode_rows(&values, 128, (bits, 64), scale_type).unwrap();
                assert_eq!(decoded(&rows, 128, (bits, 64), scale_type), values);
                assert_eq!(rows.error.encoded, 0.0);
            };
            check(4, (0..512).map(four).collect());
            check(8, (0..512).map(eight).collect());
        }
    }

    #[test]
    fn groups_without_range_keep_their_value() {
        for value in [0.0, -0.0, 1.0, -3.5, 1e-12] {
            let rows = encode_rows(&[value; 64], 64, (4, 64), ScaleType::F32).unwrap();
            let back = decoded(&rows, 64, (4, 64), ScaleType::F32);
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
        let encode = |values: &[f32]| encode_rows(values, 64, (4, 64), ScaleType::F16).unwrap_err();
        assert_eq!(encode(&values), EncodeError::NotFinite { row: 1 });
        values[70] = 0.5;
        values[130] = 1e9;
        assert_eq!(encode(&values), EncodeError::Range { row: 2 });
        for (columns, form) in [
            (64, (4, 0)),
            (64, (4, 12)),
            (0, (4, 64)),
            (96, (4, 64)),
            (128, (4, 64)),
            (64, (6, 64)),
        ] {
            let refused = encode_rows(&values, columns, form, ScaleType::F16);
            assert!(
                matches!(refused, Err(EncodeError::Shape(_))),
                "{columns} {form:?}"
            );
        }
    }
}
