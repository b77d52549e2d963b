//! `cargo bench -p visor-kernels`: the products of one decoder layer at the true shapes, in Gop/s (two a multiplication and
//! addition) and, for one row, in GB/s of weights read. Weights are more than the caches hold.
#![expect(clippy::print_stdout, reason = "printing is what a benchmark does")]

use std::time::Instant;

use visor_kernels::{
    Activation, AffineRows, Kernel, QuantizedRows, ScaleType, multiply, multiply_activated, on_pool,
};

/// Rows, columns and bits of the products of a decoder layer, then of a layer of the vision tower, and what follows them. Codes of seven
/// bits are stored in eight.
const SHAPES: [(usize, usize, usize, Option<Activation>); 11] = [
    (9216, 3072, 4, None),
    (3072, 3072, 4, None),
    (16384, 3072, 4, Some(Activation::SwiGlu)),
    (3072, 8192, 4, None),
    (1024, 1024, 4, None),
    (4096, 1024, 4, Some(Activation::QuickGelu)),
    (1024, 4096, 4, None),
    (1024, 1024, 7, None),
    (4096, 1024, 7, Some(Activation::QuickGelu)),
    (1024, 4096, 7, None),
    (4096, 1024, 8, Some(Activation::QuickGelu)),
];

fn main() {
    on_pool(measure);
}

fn measure() {
    let rows_of: Vec<usize> = std::env::args()
        .filter_map(|arg| arg.parse().ok())
        .collect();
    let kernel = Kernel::detect().unwrap_or(Kernel::Scalar);
    println!(
        "kernel {}, {} threads",
        kernel.name(),
        rayon::current_num_threads()
    );
    println!("read bandwidth {:.1} GB/s", read_bandwidth());
    for (rows, columns, bits, activation) in SHAPES {
        let weights = Weights::new(rows, columns, bits);
        for &m in if rows_of.is_empty() {
            &[1, 2, 4, 8, 64, 757][..]
        } else {
            &rows_of
        } {
            let x: Vec<f32> = (0..m * columns)
                .map(|index| (index % 251) as f32 - 125.0)
                .collect();
            let (mut quantized, mut next) = (QuantizedRows::default(), QuantizedRows::default());
            let mut out = vec![0.0; m * rows];
            weights.report(m, "", |view| {
                quantized.fill(kernel, &x, columns, view.activation_steps());
                multiply(kernel, view, &quantized, None, &mut out);
            });
            if let Some(activation) = activation {
                weights.report(m, "and activation in eight bits", |view| {
                    let steps = view.activation_steps();
                    multiply_activated(
                        kernel,
                        (view, None),
                        &quantized,
                        (activation, steps),
                        &mut next,
                    );
                });
            }
        }
    }
}

/// A matrix as often as it takes to be more than the caches hold.
struct Weights {
    rows: usize,
    columns: usize,
    bits: usize,
    copies: usize,
    codes: Vec<u8>,
    scales: Vec<u8>,
    biases: Vec<u8>,
}

impl Weights {
    fn new(rows: usize, columns: usize, bits: usize) -> Self {
        let bytes = rows * columns / 8 * bits.next_power_of_two();
        let copies = (200_000_000 / bytes).max(1);
        let mask = if bits == 7 { 0x7F } else { 0xFF };
        let codes = (0..bytes * copies).map(|index| (index * 2_654_435_761) as u8 & mask);
        let mut scales = Vec::new();
        (0..rows * columns / 64 * copies).for_each(|_| ScaleType::F16.put(0.01, &mut scales));
        Self {
            rows,
            columns,
            bits,
            copies,
            codes: codes.collect(),
            biases: scales.clone(),
            scales,
        }
    }

    /// Prints the median time of a product with m rows, one copy after the other.
    fn report(&self, m: usize, what: &str, mut work: impl FnMut(&AffineRows<'_>)) {
        let (rows, columns, bits) = (self.rows, self.columns, self.bits);
        let stored = bits.next_power_of_two();
        let bytes = rows * columns / 8 * stored;
        let mut times = Vec::new();
        for run in 0..(self.copies * 4).min(if m > 32 { 4 } else { 64 }) {
            let codes = &self.codes[run % self.copies * bytes..][..bytes];
            let groups = rows * columns / 64 * ScaleType::F16.bytes();
            let [scales, biases] = [&self.scales, &self.biases]
                .map(|all| &all[run % self.copies * groups..][..groups]);
            let parts = [codes, scales, biases];
            let view = AffineRows::new(parts, columns, (stored, 64), ScaleType::F16);
            let view = view.expect("a matrix");
            let start = Instant::now();
            work(&view);
            times.push(start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let seconds = times[times.len() / 2];
        let gop = 2.0 * (rows * columns * m) as f64 / seconds / 1e9;
        let bytes = bytes + rows * columns / 64 * 4;
        println!(
            "{rows:>6} x {columns}, {bits} bits, {m:>4} rows: {:8.3} ms  {gop:6.1} Gop/s  {:5.1} GB/s {what}",
            seconds * 1e3,
            bytes as f64 / seconds / 1e9
        );
    }
}

/// All threads reading memory one after the other, the median of several runs.
fn read_bandwidth() -> f64 {
    use rayon::prelude::*;
    let words = vec![1u64; 64 << 20];
    let mut times: Vec<f64> = (0..9)
        .map(|_| {
            let start = Instant::now();
            let sum: u64 = words
                .par_chunks(1 << 16)
                .map(|part| part.iter().fold(0, |sum, word| sum ^ word))
                .reduce(|| 0, |a, b| a ^ b);
            assert_eq!(sum, 0);
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    8.0 * words.len() as f64 / times[times.len() / 2] / 1e9
}
