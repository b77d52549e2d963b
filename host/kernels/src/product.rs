//! INT4 weights times eight-bit activations, on all cores.

#![expect(unsafe_code, reason = "threads write disjoint columns of one matrix")]

use rayon::prelude::*;

use crate::activations::QuantizedRows;
use crate::int4::Int4Rows;
use crate::kernel::Kernel;

/// Weight rows that a kernel works on together.
pub(crate) const PANEL: usize = 8;
/// Panels of one parallel task for one row of activations: some tens of microseconds.
const TASK_PANELS: usize = 16;

/// `x` (m, columns) times the transposed weights (rows, columns), into `out` (m, rows), each row with `bias` (rows) added where
/// there is one. `scalar.rs` says what a value is, to the bit, whatever the kernel, the number of rows and the number of threads.
///
/// # Panics
/// When columns differ, groups are not whole blocks of 64 columns, or `bias` or `out` has another size.
pub fn multiply(
    kernel: Kernel,
    weights: &Int4Rows<'_>,
    x: &QuantizedRows,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    assert_eq!(weights.columns(), x.columns(), "one activation per column");
    assert!(weights.is_blocked(), "groups of whole blocks");
    assert_eq!(
        out.len(),
        x.rows() * weights.rows(),
        "one value per row and row"
    );
    assert!(
        bias.is_none_or(|bias| bias.len() == weights.rows()),
        "one bias per row of weights"
    );
    let panels = weights.rows().div_ceil(PANEL);
    let task = TASK_PANELS
        .min(panels.div_ceil(rayon::current_num_threads()))
        .max(1);
    let out = Columns {
        values: out.as_mut_ptr(),
        rows: x.rows(),
        width: weights.rows(),
    };
    let bias = bias.map(padded);
    (0..panels.div_ceil(task))
        .into_par_iter()
        .for_each(|index| {
            let range = index * task..((index + 1) * task).min(panels);
            let first = range.start;
            let biased = |panel: usize, values: &[f32; PANEL]| match &bias {
                Some(bias) => std::array::from_fn(|index| values[index] + bias[panel][index]),
                None => *values,
            };
            let whole = &mut |panel: usize, row: usize, values: &[f32; PANEL]| {
                let values = biased(first + panel, values);
                // SAFETY: no other task has this panel, `out` is whole panels wide, and its borrow outlives the loop.
                unsafe { out.write_panel(row, first + panel, &values) };
            };
            let part = &mut |panel: usize, row: usize, values: &[f32; PANEL]| {
                let values = biased(first + panel, values);
                // SAFETY: no other task has this panel, and the borrow of `out` outlives the loop over tasks.
                unsafe { out.write_part(row, first + panel, &values) };
            };
            if out.width.is_multiple_of(PANEL) {
                kernel.multiply(weights, range, x, whole);
            } else {
                kernel.multiply(weights, range, x, part);
            }
        });
}

/// Numbers of whole panels, zeros behind the last.
fn padded(bias: &[f32]) -> Vec<[f32; PANEL]> {
    let eight = |some: &[f32]| {
        let mut eight = [0.0; PANEL];
        eight[..some.len()].copy_from_slice(some);
        eight
    };
    bias.chunks(PANEL).map(eight).collect()
}

/// A matrix (rows, width) whose columns several threads write.
struct Columns {
    values: *mut f32,
    rows: usize,
    width: usize,
}

// SAFETY: `write_panel` and `write_part` are told to be called by one thread for one column, and nothing reads before all are done.
unsafe impl Sync for Columns {}

impl Columns {
    /// Where the values of a row and a panel begin.
    fn start(&self, row: usize, panel: usize) -> *mut f32 {
        assert!(
            row < self.rows && panel * PANEL < self.width,
            "inside the matrix"
        );
        // SAFETY: the place lies inside the matrix, as was asserted.
        unsafe { self.values.add(row * self.width + panel * PANEL) }
    }

    /// Writes the values of a panel of a matrix that is whole panels wide: a store, where a number of bytes to be looked up
    /// would make it a call.
    ///
    /// # Safety
    /// The matrix is borrowed for as long, no other thread writes these columns, and they are eight.
    unsafe fn write_panel(&self, row: usize, panel: usize, values: &[f32; PANEL]) {
        let start = self.start(row, panel).cast::<[f32; PANEL]>();
        // SAFETY: so many values from there are in the same row, and the caller alone writes them.
        unsafe { start.write_unaligned(*values) };
    }

    /// Writes the values of a panel that the matrix has columns for.
    ///
    /// # Safety
    /// The matrix is borrowed for as long, and no other thread writes these columns.
    unsafe fn write_part(&self, row: usize, panel: usize, values: &[f32; PANEL]) {
        let (start, count) = (
            self.start(row, panel),
            PANEL.min(self.width - panel * PANEL),
        );
        // SAFETY: `count` values from there are in the same row, and the caller alone writes them.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), start, count) };
    }
}
