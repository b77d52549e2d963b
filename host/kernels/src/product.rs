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

/// `x` (m, columns) times the transposed weights (rows, columns), into `out` (m, rows). `scalar.rs` says what a value is,
/// to the bit, whatever the kernel, the number of rows and the number of threads.
///
/// # Panics
/// When columns differ, groups are not whole blocks of 64 columns, or `out` has another size.
pub fn multiply(kernel: Kernel, weights: &Int4Rows<'_>, x: &QuantizedRows, out: &mut [f32]) {
    assert_eq!(weights.columns(), x.columns(), "one activation per column");
    assert!(weights.is_blocked(), "groups of whole blocks");
    assert_eq!(
        out.len(),
        x.rows() * weights.rows(),
        "one value per row and row"
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
    (0..panels.div_ceil(task))
        .into_par_iter()
        .for_each(|index| {
            let range = index * task..((index + 1) * task).min(panels);
            let first = range.start;
            kernel.multiply(weights, range, x, &mut |panel, row, values| {
                // SAFETY: no other task has this panel, and the borrow of `out` outlives the loop over tasks.
                unsafe { out.write(row, (first + panel) * PANEL, values) };
            });
        });
}

/// A matrix (rows, width) whose columns several threads write.
struct Columns {
    values: *mut f32,
    rows: usize,
    width: usize,
}

// SAFETY: `write` is told to be called by one thread for one column, and nothing reads before all are done.
unsafe impl Sync for Columns {}

impl Columns {
    /// Writes the values of a panel that the matrix has columns for.
    ///
    /// # Safety
    /// The matrix is borrowed for as long, and no other thread writes these columns.
    unsafe fn write(&self, row: usize, column: usize, values: &[f32; PANEL]) {
        assert!(row < self.rows && column < self.width, "inside the matrix");
        let count = PANEL.min(self.width - column);
        // SAFETY: the start lies inside the matrix, as was asserted.
        let start = unsafe { self.values.add(row * self.width + column) };
        // SAFETY: `count` values from there are in the same row, and the caller alone writes them.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), start, count) };
    }
}
