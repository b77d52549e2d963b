//! INT4 or INT8 weights times eight-bit activations, on all cores.

#![expect(unsafe_code, reason = "threads write disjoint columns of one matrix")]

mod activated;

use rayon::prelude::*;

pub use self::activated::multiply_activated;
use crate::activations::QuantizedRows;
use crate::affine::AffineRows;
use crate::disjoint::Disjoint;
use crate::kernel::Kernel;

/// Weight rows that a kernel works on together.
pub(crate) const PANEL: usize = 8;
/// Takes values of a product: `out(panel of the range, row of x, values in it and the panels behind it)`. Behind the last row of the
/// matrix a panel's values mean nothing.
pub(crate) type Out<'a> = &'a mut dyn FnMut(usize, usize, &[[f32; PANEL]]);

/// Rows ahead that memory is asked for: they lie pages apart, too far for the processor to ask by itself.
#[cfg(target_arch = "x86_64")]
const AHEAD_ROWS: usize = 8;
/// Panels of one parallel task: some ten microseconds for a few rows of activations. As many as kernels take together, or hand over
/// at a time.
pub(crate) const TASK_PANELS: usize = 8;

/// `x` (m, columns) times the transposed weights (rows, columns), into `out` (m, rows), each row with `bias` (rows) added where
/// there is one. `scalar.rs` says what a value is, to the bit, whatever the kernel, the number of rows and the number of threads.
///
/// # Panics
/// When columns or steps differ, groups are not whole blocks of 64 columns, or `bias` or `out` has another size.
pub fn multiply(
    kernel: Kernel,
    weights: &AffineRows<'_>,
    x: &QuantizedRows,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    check(weights, bias, x);
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
        values: Disjoint::new(out),
        width: weights.rows(),
    };
    let bias = bias.map(padded);
    (0..panels.div_ceil(task))
        .into_par_iter()
        .with_max_len(1) // rayon would stop cutting, and run several tasks in a row while other threads have none
        .for_each(|index| {
            let range = index * task..((index + 1) * task).min(panels);
            let first = range.start;
            kernel.multiply(weights, range, x, &mut |panel, row, values| {
                let bias = bias.as_ref().map(|bias| &bias[first + panel..]);
                // SAFETY: no other task has these panels.
                unsafe { out.write(row, first + panel, values, bias) };
            });
        });
}

/// Panics where sizes do not fit.
fn check(weights: &AffineRows<'_>, bias: Option<&[f32]>, x: &QuantizedRows) {
    assert_eq!(weights.columns(), x.columns(), "one activation per column");
    assert_eq!(weights.activation_steps(), x.steps(), "made for these bits");
    assert!(weights.is_blocked(), "groups of whole blocks");
    assert!(
        bias.is_none_or(|bias| bias.len() == weights.rows()),
        "one bias per row of weights"
    );
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
struct Columns<'a> {
    values: Disjoint<'a, f32>,
    width: usize,
}

impl Columns<'_> {
    /// Writes the values of a row in some panels, one beside the other, each panel with its bias added: the columns of them that
    /// the matrix has.
    ///
    /// # Safety
    /// No other thread writes these columns.
    unsafe fn write(
        &self,
        row: usize,
        panel: usize,
        values: &[[f32; PANEL]],
        bias: Option<&[[f32; PANEL]]>,
    ) {
        let column = panel * PANEL;
        assert!(column < self.width, "inside the matrix");
        let count = (values.len() * PANEL).min(self.width - column);
        // SAFETY: as the caller was told.
        let out = unsafe { self.values.part(row * self.width + column, count) };
        #[cfg(target_arch = "x86_64")]
        if let Some(ahead) = self.values.place((row + AHEAD_ROWS) * self.width + column) {
            crate::x86_64::prefetch(ahead.cast(), size_of_val(out));
        }
        let values = values.as_flattened();
        match bias {
            None => out.copy_from_slice(&values[..count]),
            Some(bias) => {
                for ((out, value), bias) in out.iter_mut().zip(values).zip(bias.as_flattened()) {
                    *out = value + bias;
                }
            }
        }
    }
}
