//! The specification of the integer kernels: one block, one row at a time, as the formulas say it. Never tuned.

use crate::activations::{BLOCK, LARGEST_MIN, QuantizedRows, TILE_ROWS, WORDS};
use crate::affine::AffineRows;

/// Quantizes one block; [`crate::activations`] has the formulas.
pub(crate) fn quantize(x: &[f32; BLOCK], steps: f32) -> ([i32; WORDS], f32, f32) {
    let largest = x
        .iter()
        .fold(0, |most, value| most.max(value.abs().to_bits()));
    let largest = f32::from_bits(largest); // NaN and infinity have the largest bits
    if !largest.is_finite() {
        return ([0; WORDS], f32::NAN, f32::NAN);
    }
    if largest < LARGEST_MIN {
        return ([0; WORDS], 0.0, 0.0);
    }
    let inverse = steps / largest;
    let code = |column: usize| (x[column] * inverse).round_ties_even() as i8;
    let words = std::array::from_fn(|word| {
        i32::from_le_bytes(std::array::from_fn(|byte| {
            code(column(4 * word + byte)) as u8
        }))
    });
    let sum: i32 = (0..BLOCK).map(|column| i32::from(code(column))).sum();
    (words, largest / steps, largest / steps * sum as f32)
}

/// The column of a block whose code has this place in its words: even ones come first.
fn column(position: usize) -> usize {
    2 * (position % (BLOCK / 2)) + position / (BLOCK / 2)
}

/// One value of the product, for a matrix in groups of a multiple of 64 columns: from zero, over the blocks in order,
///
/// ```text
/// value = fma(weight bias, sum of the activations, value)
/// value = fma(dot, weight scale * activation scale, value)          dot: of the codes, an exact integer
/// ```
/// Every kernel rounds in this order, so that all give the same bits.
pub(crate) fn value(weights: &AffineRows<'_>, row: usize, x: &QuantizedRows, m: usize) -> f32 {
    let mut value = 0f32;
    for block in 0..x.blocks {
        let (codes, scale, bias) = weights.block(row, block);
        let weight = |column: usize| match weights.bits() {
            4 => codes[column / 2] >> (4 * (column % 2)) & 0xF,
            _ => codes[column],
        };
        let (tile, m) = (&x.tiles[m / TILE_ROWS * x.blocks + block], m % TILE_ROWS);
        let mut dot = 0;
        let codes = tile.words.iter().flat_map(|four| four[m].to_le_bytes());
        for (position, code) in codes.enumerate() {
            dot += i32::from(weight(column(position))) * i32::from(code as i8);
        }
        value = bias.mul_add(tile.sums[m], value);
        value = (dot as f32).mul_add(scale * tile.scales[m], value);
    }
    value
}
