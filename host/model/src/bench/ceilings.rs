//! What this machine can do at best, measured where the model will run: reading memory, and multiplying.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::Serialize;
use visor_kernels::{AffineRows, Kernel, QuantizedRows, ScaleType, multiply};

use crate::device::Activations;
use crate::error::ModelError;
use crate::quantize::{GROUP, Precision, stored_bits};

/// Bytes read at a time: more than caches hold.
const READ_BYTES: usize = 256 << 20;
/// Bytes that a thread reads at a time.
const PART_BYTES: usize = 1 << 20;
const READS: usize = 12;
/// A product (rows of activations, columns, rows of weights) that is large enough for all of a processor.
const PRODUCT: [usize; 3] = [512, 3072, 8192];
const PRODUCTS: usize = 6;

/// The best of several tries: whatever else runs makes a machine look slower, nothing makes it look faster.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ceilings {
    /// Threads that compute.
    pub threads: usize,
    /// All threads reading memory, 10^9 bytes a second.
    pub read_gb_per_s: f64,
    /// Large products, 10^9 operations a second: two for a multiplication and its addition.
    pub products: Products,
}

/// What weights of each kind are multiplied at.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Products {
    /// Of floats.
    pub f32_gop_per_s: f64,
    /// Of codes, with activations of eight bits; where activations are floats, codes are multiplied as floats are.
    pub integer: Option<IntegerProducts>,
}

/// What a kernel multiplies codes at.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct IntegerProducts {
    /// Its name.
    pub kernel: &'static str,
    /// INT4.
    pub int4_gop_per_s: f64,
    /// INT8 as [`crate::quantize()`] writes it for the tower.
    pub int8_gop_per_s: f64,
}

impl Ceilings {
    /// Takes a few seconds.
    ///
    /// # Errors
    /// [`ModelError::Forward`] when there is no memory.
    pub fn measure(activations: Activations) -> Result<Self, ModelError> {
        let kernel = match activations {
            Activations::Int8 => Kernel::detect(),
            Activations::Float => None,
        };
        let integer = kernel.map(|kernel| IntegerProducts {
            kernel: kernel.name(),
            int4_gop_per_s: integer_product(kernel, 4),
            int8_gop_per_s: integer_product(kernel, 7),
        });
        Ok(Self {
            threads: rayon::current_num_threads(),
            read_gb_per_s: read(),
            products: Products {
                f32_gop_per_s: float_product()?,
                integer,
            },
        })
    }
}

impl Products {
    /// The rate of weights that are stored so.
    pub(super) fn of(&self, precision: Precision) -> f64 {
        match (precision, &self.integer) {
            (Precision::Int4, Some(integer)) => integer.int4_gop_per_s,
            (Precision::Int8, Some(integer)) => integer.int8_gop_per_s,
            _ => self.f32_gop_per_s,
        }
    }
}

fn read() -> f64 {
    let bytes = vec![1; READ_BYTES];
    let mut reader = Reader::new([&*bytes]);
    (0..READS).fold(0.0, |most, _| reader.gb_per_s().max(most))
}

/// Reads memory plainly: from its beginning to its end, with all threads.
pub(super) struct Reader<'a> {
    parts: Vec<&'a [u8]>,
    next: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(memory: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let parts = memory.into_iter().flat_map(|all| all.chunks(PART_BYTES));
        Self {
            parts: parts.collect(),
            next: 0,
        }
    }

    /// Reads what comes next, and from the beginning again behind the end: 10^9 bytes a second.
    pub(super) fn gb_per_s(&mut self) -> f64 {
        let count = self.parts.len().min(READ_BYTES / PART_BYTES);
        let parts = self.parts.iter().cycle().skip(self.next).take(count);
        let parts: Vec<&[u8]> = parts.copied().collect();
        self.next = (self.next + count) % self.parts.len().max(1);
        let start = Instant::now();
        let xor = parts.par_iter().map(|part| xor(part));
        std::hint::black_box(xor.reduce(|| 0, |a, b| a ^ b));
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        bytes as f64 / start.elapsed().as_secs_f64() / 1e9
    }
}

fn xor(bytes: &[u8]) -> u64 {
    let words = bytes.as_chunks().0.iter();
    words.fold(0, |xor, word| xor ^ u64::from_le_bytes(*word))
}

/// Of codes of so many bits.
fn integer_product(kernel: Kernel, bits: usize) -> f64 {
    let [m, columns, rows] = PRODUCT;
    let stored = stored_bits(bits);
    let mask = 0xFF >> (stored - bits);
    let codes: Vec<u8> = (0..rows * columns / 8 * stored)
        .map(|index| ((index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8 & mask)
        .collect();
    let mut scales = Vec::new();
    (0..rows * columns / GROUP).for_each(|_| ScaleType::F16.put(0.01, &mut scales));
    let parts: [&[u8]; 3] = [&codes, &scales, &scales];
    let weights = AffineRows::new(parts, columns, (stored, GROUP), ScaleType::F16);
    let weights = weights.expect("whole groups");
    let x: Vec<f32> = (0..m * columns).map(|index| (index % 251) as f32).collect();
    let mut quantized = QuantizedRows::default();
    let mut out = vec![0.0; m * rows];
    let seconds = best(PRODUCTS, || {
        quantized.fill(kernel, &x, columns, weights.activation_steps());
        multiply(kernel, &weights, &quantized, None, &mut out);
    });
    gop_per_s(seconds)
}

fn float_product() -> Result<f64, ModelError> {
    let [m, columns, rows] = PRODUCT;
    let x = Tensor::ones((m, columns), DType::F32, &Device::Cpu)?;
    let weights = Tensor::ones((rows, columns), DType::F32, &Device::Cpu)?.t()?;
    x.matmul(&weights)?; // so that a refusal is an error, not a speed
    Ok(gop_per_s(best(PRODUCTS, || {
        std::hint::black_box(x.matmul(&weights).ok());
    })))
}

fn gop_per_s(seconds: f64) -> f64 {
    2.0 * PRODUCT.map(|size| size as f64).iter().product::<f64>() / seconds / 1e9
}

fn best(runs: usize, mut run: impl FnMut()) -> f64 {
    let seconds = (0..runs).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    seconds.fold(f64::INFINITY, f64::min)
}
