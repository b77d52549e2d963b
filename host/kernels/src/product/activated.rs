//! A product, an activation and a rounding to eight bits as one: between the two layers of a feed-forward no floats go through memory.

use std::cell::Cell;

use rayon::prelude::*;

use super::PANEL;
use crate::activation::Activation;
use crate::activations::{BLOCK, QuantizedRows, TILE_ROWS};
use crate::affine::AffineRows;
use crate::disjoint::Disjoint;
use crate::kernel::Kernel;

/// Panels whose values are a block of columns: what a task makes of every row.
const BLOCK_PANELS: usize = BLOCK / PANEL;

/// Rows of [`BETWEEN`] that a thread keeps, 512 KiB: a picture's 577, a gated prompt's 1024.
const KEPT_ROWS: usize = 2048;

thread_local! {
    /// Values of a task before the activation, (rows, BLOCK), twice where it is gated: 256 bytes a row, in the second-level cache. Fresh
    /// memory would cost a task a fault for every 4 KiB.
    static BETWEEN: Cell<Vec<[f32; BLOCK]>> = Cell::default();
}

/// `activation` of what [`super::multiply`] gives, in eight bits with so many steps: to the bit as one after the other.
///
/// # Panics
/// When columns or steps differ, groups are not whole blocks of 64 columns, what the activation gives is not whole blocks, `bias` has
/// another size than there are rows of weights, or there are no steps or more than 127.
pub fn multiply_activated(
    kernel: Kernel,
    (weights, bias): (&AffineRows<'_>, Option<&[f32]>),
    x: &QuantizedRows,
    (activation, steps): (Activation, u8),
    out: &mut QuantizedRows,
) {
    super::check(weights, bias, x);
    let parts = activation.parts();
    let columns = weights.rows() / parts;
    assert!(
        weights.rows().is_multiple_of(parts * BLOCK),
        "whole blocks of columns"
    );
    out.reshape(x.rows(), columns, steps);
    if x.rows() == 0 {
        return out.fill_few();
    }
    let blocks = columns / BLOCK;
    let tiles = Disjoint::new(&mut out.tiles);
    let task = |block: usize| {
        let mut between = BETWEEN.take();
        between.resize(parts * x.rows(), [0.0; BLOCK]);
        for (part, values) in between.chunks_exact_mut(x.rows()).enumerate() {
            let panel = (part * blocks + block) * BLOCK_PANELS;
            multiply_block(kernel, (weights, panel), x, values);
            if let Some(bias) = bias {
                let bias = &bias[panel * PANEL..][..BLOCK];
                for row in &mut *values {
                    row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
                }
            }
        }
        let (values, up) = between.split_at_mut(x.rows());
        for (index, rows) in values.chunks_mut(TILE_ROWS).enumerate() {
            for (row, values) in rows.iter_mut().enumerate() {
                match activation {
                    Activation::QuickGelu => kernel.quick_gelu(values),
                    Activation::SwiGlu => {
                        kernel.swiglu(&values.clone(), &up[TILE_ROWS * index + row], values);
                    }
                }
            }
            // SAFETY: no other task has this block.
            let tile = unsafe { tiles.part(index * blocks + block, 1) };
            kernel.quantize(rows.iter(), steps, &mut tile[0]);
        }
        between.truncate(KEPT_ROWS);
        between.shrink_to(KEPT_ROWS);
        BETWEEN.set(between);
    };
    // One by one, as in `multiply`.
    let all = (0..blocks).into_par_iter().with_max_len(1);
    all.for_each(task);
    out.fill_few();
}

/// Values of a block of columns, from a panel on, for every row.
fn multiply_block(
    kernel: Kernel,
    (weights, first): (&AffineRows<'_>, usize),
    x: &QuantizedRows,
    out: &mut [[f32; BLOCK]],
) {
    let panels = first..first + BLOCK_PANELS;
    kernel.multiply(weights, panels, x, &mut |panel, row, values| {
        let values = values.as_flattened();
        out[row][panel * PANEL..][..values.len()].copy_from_slice(values);
    });
}
