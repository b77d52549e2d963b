//! Rows of f32 in plain memory, and what the CPU's eight-bit path does to them between the products.
//!
//! The same maths as candle's operators of the same names, which the float path uses; here a row is touched once.

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use visor_kernels::{Activation, Kernel};

/// Values that one parallel task touches at least.
const TASK_VALUES: usize = 16 << 10;

/// (count, columns), row-major. What a layer makes it writes into rows that were used before: memory fresh from the system costs
/// a page fault for every 4 KiB.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Rows {
    pub(crate) values: Vec<f32>,
    pub(crate) columns: usize,
}

impl Rows {
    /// Gives the rows a shape; what they hold afterwards means nothing.
    pub(crate) fn reshape(&mut self, count: usize, columns: usize) {
        self.values.resize(count * columns, 0.0);
        self.columns = columns;
    }

    /// The rows of a tensor (count, columns) on the CPU.
    pub(crate) fn of(x: &Tensor) -> candle_core::Result<Self> {
        let (_, columns) = x.dims2()?;
        Ok(Self {
            values: x.flatten_all()?.to_vec1()?,
            columns,
        })
    }

    pub(crate) fn to_tensor(&self) -> candle_core::Result<Tensor> {
        Tensor::from_slice(&self.values, (self.count(), self.columns), &Device::Cpu)
    }

    pub(crate) fn count(&self) -> usize {
        self.values.len().checked_div(self.columns).unwrap_or(0)
    }

    /// Calls `work` for each row, on all cores where there is enough to do.
    fn each(&mut self, work: impl Fn(&mut [f32]) + Sync) {
        if self.values.len() <= TASK_VALUES {
            self.values.chunks_exact_mut(self.columns).for_each(work);
            return;
        }
        let rows = (TASK_VALUES / self.columns).max(1);
        self.values
            .par_chunks_mut(rows * self.columns)
            .for_each(|rows| rows.chunks_exact_mut(self.columns).for_each(&work));
    }

    /// Takes the shape of `x` and calls `work` with each row and that of `x`, on all cores where there is enough to do.
    fn set_each(&mut self, x: &Self, work: impl Fn(&mut [f32], &[f32]) + Sync) {
        let columns = x.columns;
        self.reshape(x.count(), columns);
        let some = |(out, x): (&mut [f32], &[f32])| {
            out.chunks_exact_mut(columns)
                .zip(x.chunks_exact(columns))
                .for_each(|(out, x)| work(out, x));
        };
        if x.values.len() <= TASK_VALUES {
            some((&mut self.values, &x.values));
            return;
        }
        let task = (TASK_VALUES / columns).max(1) * columns;
        self.values
            .par_chunks_mut(task)
            .zip(x.values.par_chunks(task))
            .for_each(some);
    }

    /// Adds a vector to each row: a bias.
    pub(crate) fn add_to_each(&mut self, bias: &[f32]) {
        self.each(|row| row.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
    }

    /// Adds rows of the same shape: a residual connection.
    pub(crate) fn add(&mut self, other: &Self) {
        let task = TASK_VALUES.max(self.columns);
        let add = |(out, values): (&mut [f32], &[f32])| {
            out.iter_mut().zip(values).for_each(|(x, y)| *x += y);
        };
        let parts = self
            .values
            .par_chunks_mut(task)
            .zip(other.values.par_chunks(task));
        if other.values.len() <= task {
            add((&mut self.values, &other.values));
        } else {
            parts.for_each(add);
        }
    }

    /// `x / sqrt(mean(x^2) + eps) * weight`
    pub(crate) fn set_rms_norm(&mut self, x: &Self, weight: &[f32], eps: f32) {
        self.set_each(x, |out, row| {
            let factor = 1.0 / (sum(row, |x| x * x) / row.len() as f32 + eps).sqrt();
            for ((out, x), w) in out.iter_mut().zip(row).zip(weight) {
                *out = x * factor * w;
            }
        });
    }

    /// `(x - mean) / sqrt(variance + eps) * weight + bias`
    pub(crate) fn set_layer_norm(&mut self, x: &Self, [weight, bias]: [&[f32]; 2], eps: f32) {
        self.set_each(x, |out, row| {
            let mean = sum(row, |x| x) / row.len() as f32;
            let factor =
                1.0 / (sum(row, |x| (x - mean) * (x - mean)) / row.len() as f32 + eps).sqrt();
            for (((out, x), w), b) in out.iter_mut().zip(row).zip(weight).zip(bias) {
                *out = (x - mean) * factor * w + b;
            }
        });
    }

    /// The activation of each row: of [`Activation::SwiGlu`] half as wide.
    pub(crate) fn set_activated(&mut self, x: &Self, activation: Activation, kernel: Kernel) {
        match activation {
            Activation::QuickGelu => self.set_each(x, |out, row| {
                out.copy_from_slice(row);
                kernel.quick_gelu(out);
            }),
            Activation::SwiGlu => {
                let inner = x.columns / 2;
                self.reshape(x.count(), inner);
                let work = |(out, row): (&mut [f32], &[f32])| {
                    let (gate, up) = row.split_at(inner);
                    kernel.swiglu(gate, up, out);
                };
                let rows = self.values.par_chunks_mut(inner);
                rows.zip(x.values.par_chunks(x.columns)).for_each(work);
            }
        }
    }
}

/// A sum in sixteen lanes, so that the compiler can vectorize it.
fn sum(row: &[f32], of: impl Fn(f32) -> f32) -> f32 {
    let (lanes, rest) = row.as_chunks::<16>();
    let mut sums = [0f32; 16];
    for lane in lanes {
        sums.iter_mut()
            .zip(lane)
            .for_each(|(sum, x)| *sum += of(*x));
    }
    sums.iter().sum::<f32>() + rest.iter().map(|x| of(*x)).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use candle_nn::ops::{layer_norm, rms_norm, sigmoid, swiglu};

    use super::*;

    fn near(ours: &Rows, theirs: &Tensor) {
        let theirs = Rows::of(theirs).unwrap();
        assert_eq!(ours.columns, theirs.columns);
        for (a, b) in ours.values.iter().zip(&theirs.values) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
    }

    #[test]
    fn every_operation_is_that_of_the_float_path() {
        for (count, columns) in [(1, 64), (3, 100), (700, 64)] {
            let x = Tensor::randn(0f32, 2.0, (count, columns), &Device::Cpu).unwrap();
            let weight = Tensor::randn(0f32, 1.0, columns, &Device::Cpu).unwrap();
            let (w, rows) = (weight.to_vec1::<f32>().unwrap(), Rows::of(&x).unwrap());
            let kernel = Kernel::detect().unwrap_or(Kernel::Scalar);
            let mut out = Rows::default();
            out.set_rms_norm(&rows, &w, 1e-5);
            near(&out, &rms_norm(&x, &weight, 1e-5).unwrap());
            out.set_layer_norm(&rows, [&w, &w], 1e-5);
            near(&out, &layer_norm(&x, &weight, &weight, 1e-5).unwrap());
            out.set_activated(&rows, Activation::SwiGlu, kernel);
            near(&out, &swiglu(&x).unwrap());
            let mut gelu = Rows::default();
            gelu.set_activated(&rows, Activation::QuickGelu, kernel);
            near(
                &gelu,
                &(&x * sigmoid(&(&x * 1.702).unwrap()).unwrap()).unwrap(),
            );
            let mut added = rows.clone();
            added.add(&rows);
            near(&added, &(&x + &x).unwrap());
            added = rows;
            added.add_to_each(&w);
            near(&added, &x.broadcast_add(&weight).unwrap());
        }
    }
}
