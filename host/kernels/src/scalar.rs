//! The specification of the integer kernels: one block, one row at a time, as the formulas say it. Never tuned.

use crate::activations::{BLOCK, LARGEST_MIN, QuantizedRows, TILE_ROWS, WORDS};
use crate::affine::AffineRows;

/// Quantizes one block; [`crate::activations`] has the formulas.
pub(crate) fn quantize(x: &[f32; BLOCK]) -> ([i32; WORDS], f32, f32) {
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
    let inverse = 127.0 / largest;
    let code = |column: usize| (x[column] * inverse).round_ties_even() as i8;
    let column = |position: usize| 2 * (position % (BLOCK / 2)) + position / (BLOCK / 2);
    let words = std::array::from_fn(|word| {
        i32::from_le_bytes(std::array::from_fn(|byte| {
            code(column(4 * word + byte)) as u8
        }))
    });
    let sum: i32 = (0..BLOCK).map(|column| i32::from(code(column))).sum();
    let scale = largest / 127.0;
    (words, scale, scale * sum as f32)
}

/// One value of the product, for a matrix in groups of a multiple of 64 columns: from zero, over the blocks of nibbles in order,
///
/// ```text
/// value = fma(weight bias, sum of the activations, value)
/// value = fma(dot, weight scale * activation scale, value)          dot: of the nibbles, an exact integer
/// ```
///
/// Odd nibbles count `odd_factor` times. Every kernel rounds in this order, so that all give the same bits.
pub(crate) fn value(weights: &AffineRows<'_>, row: usize, x: &QuantizedRows, m: usize) -> f32 {
    let mut value = 0f32;
    for block in 0..x.blocks {
        let (codes, scale, bias) = weights.block(row, block);
        let (tile, m) = (&x.tiles[m / TILE_ROWS * x.blocks + block], m % TILE_ROWS);
        let mut dots = [0; 2]; // of even nibbles, of odd ones
        for (word, four) in tile.words.iter().enumerate() {
            for (byte, &code) in four[m].to_le_bytes().iter().enumerate() {
                let position = 4 * word + byte;
                let packed = codes[position % 32] >> (4 * (position / 32)) & 0xF;
                dots[position / 32] += i32::from(packed) * i32::from(code as i8);
            }
        }
        let dot = dots[0] + i32::from(weights.odd_factor()) * dots[1];
        value = bias.mul_add(tile.sums[m], value);
        value = (dot as f32).mul_add(scale * tile.scales[m], value);
    }
    value
}
