//! Which instructions compute: found once, at run time.

use std::ops::Range;

#[cfg(target_arch = "aarch64")]
use crate::aarch64::{I8mm, Neon};
use crate::activations::{BLOCK, QuantizedRows, Tile, WORDS};
#[cfg(target_arch = "x86_64")]
use crate::activations::{FEW_ROWS, TILE_ROWS};
use crate::affine::AffineRows;
#[cfg(target_arch = "x86_64")]
use crate::affine::ScaleType;
use crate::attention::{self, Head};
use crate::product::{Out, PANEL};
use crate::scalar;
#[cfg(target_arch = "x86_64")]
use crate::x86_64::{Avx2, Avx512, LONG_COLUMNS};

/// A set of instructions that the kernels are written for, proved to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// The specification, for any processor.
    Scalar,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX-512 with VNNI, and for what neither helps what AVX2 has.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// NEON with dot products of eight-bit numbers.
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
    /// NEON with matrix products of eight-bit numbers, and for what these do not help what NEON has.
    #[cfg(target_arch = "aarch64")]
    I8mm(I8mm),
}

impl Kernel {
    /// The fastest that this processor has; none where that is the specification, which is slower than floats.
    pub fn detect() -> Option<Self> {
        Self::available()
            .pop()
            .filter(|kernel| *kernel != Self::Scalar)
    }

    /// All that this processor has, the slowest first.
    pub fn available() -> Vec<Self> {
        #[cfg_attr(
            not(any(target_arch = "x86_64", target_arch = "aarch64")),
            expect(unused_mut, reason = "nothing to add")
        )]
        let mut all = vec![Self::Scalar];
        #[cfg(target_arch = "x86_64")]
        all.extend(Avx2::detect().map(Self::Avx2));
        #[cfg(target_arch = "x86_64")]
        all.extend(Avx512::detect().map(Self::Avx512).filter(Self::is_right));
        #[cfg(target_arch = "aarch64")]
        all.extend(Neon::detect().map(Self::Neon));
        #[cfg(target_arch = "aarch64")]
        all.extend(I8mm::detect().map(Self::I8mm));
        all
    }

    /// Whether small products are the specification's, to the bit: asked where not every machine that tests it can tell.
    #[cfg(target_arch = "x86_64")]
    fn is_right(&self) -> bool {
        // Few rows, and tiles of every height; then rows that are read in another order: so long, or in whole registers; then INT8.
        self.multiplies(2 * BLOCK, (4, ScaleType::F32), 1..=2 * TILE_ROWS + 1)
            && self.multiplies(LONG_COLUMNS, (4, ScaleType::F32), FEW_ROWS..=FEW_ROWS + 1)
            && self.multiplies(32 * BLOCK, (4, ScaleType::F16), 1..=FEW_ROWS)
            && self.multiplies(16 * BLOCK, (4, ScaleType::Bf16), 1..=FEW_ROWS)
            && self.multiplies(3 * BLOCK, (8, ScaleType::F16), 1..=TILE_ROWS + 1)
    }

    /// Whether products of so many rows of so many columns are the specification's, with codes of so many bits.
    #[cfg(target_arch = "x86_64")]
    fn multiplies(
        &self,
        columns: usize,
        stored: (usize, ScaleType),
        mut rows: std::ops::RangeInclusive<usize>,
    ) -> bool {
        const PANELS: usize = 3;
        let matrix = Sample::new(PANELS * PANEL, columns, stored);
        rows.all(|rows| {
            let x = sample_rows(rows, columns);
            let product = |kernel| matrix.product(kernel, 0..PANELS, &x);
            product(*self).is_some_and(|values| Some(values) == product(Self::Scalar))
        })
    }

    /// As logs and reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512-vnni",
            #[cfg(target_arch = "aarch64")]
            Self::Neon(_) => "neon",
            #[cfg(target_arch = "aarch64")]
            Self::I8mm(_) => "neon-i8mm",
        }
    }

    /// Values of a range of panels of eight weight rows, each once.
    pub(crate) fn multiply(
        self,
        weights: &AffineRows<'_>,
        panels: Range<usize>,
        x: &QuantizedRows,
        out: Out<'_>,
    ) {
        assert_eq!(x.blocks, weights.blocks(), "one activation per column");
        match self {
            Self::Scalar => {
                for (index, panel) in panels.enumerate() {
                    for m in 0..x.rows() {
                        let mut values = [0.0; PANEL];
                        let rows = panel * PANEL..weights.rows().min((panel + 1) * PANEL);
                        for (value, row) in values.iter_mut().zip(rows) {
                            *value = scalar::value(weights, row, x, m);
                        }
                        out(index, m, &[values]);
                    }
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => avx2.multiply(weights, panels, x, out),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(avx512) => avx512.multiply(weights, panels, x, out),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(neon) => neon.multiply(weights, panels, x, out),
            #[cfg(target_arch = "aarch64")]
            Self::I8mm(i8mm) => i8mm.multiply(weights, panels, x, out),
        }
    }

    /// Attention of some heads of one shape: `out(head, row, values)` once for each query.
    pub(crate) fn attend(self, heads: &[Head<'_>], out: &mut dyn FnMut(usize, usize, &[f32])) {
        #[cfg(target_arch = "x86_64")]
        if let (Self::Avx2(avx2) | Self::Avx512(Avx512 { avx2 }), Some(heads)) =
            (self, Head::alone(heads))
        {
            return avx2.attend_alone(&heads, out);
        }
        for (index, head) in heads.iter().enumerate() {
            self.attend_one(head, &mut |row, values| out(index, row, values));
        }
    }

    fn attend_one(self, head: &Head<'_>, out: &mut dyn FnMut(usize, &[f32])) {
        match self {
            Self::Scalar => attention::attend_naive(head, out),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => avx2.attend(head, out),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(avx512) => avx512.attend(head, out),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(neon) | Self::I8mm(I8mm { neon }) => neon.attend(head, out),
        }
    }

    /// Quantizes a block of each row of a tile, at most [`crate::activations::TILE_ROWS`]; zeros behind the last.
    pub(crate) fn quantize<'a>(
        self,
        rows: impl Iterator<Item = &'a [f32; BLOCK]>,
        steps: u8,
        tile: &mut Tile,
    ) {
        let steps = f32::from(steps);
        match self {
            Self::Scalar => quantize_each(rows, tile, |block| scalar::quantize(block, steps)),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => quantize_each(rows, tile, |block| avx2.quantize(block, steps)),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(avx512) => avx512.quantize(rows, steps, tile),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(neon) | Self::I8mm(I8mm { neon }) => {
                quantize_each(rows, tile, |block| neon.quantize(block, steps));
            }
        }
    }
}

/// Quantizes a block of each row of a tile with what takes one: its words, scale and sum.
fn quantize_each<'a>(
    rows: impl Iterator<Item = &'a [f32; BLOCK]>,
    tile: &mut Tile,
    quantize: impl Fn(&[f32; BLOCK]) -> ([i32; WORDS], f32, f32),
) {
    *tile = Tile::default();
    for (row, block) in rows.enumerate() {
        let (words, scale, sum) = quantize(block);
        for (place, word) in tile.words.iter_mut().zip(words) {
            place[row] = word;
        }
        (tile.scales[row], tile.sums[row]) = (scale, sum);
    }
}

/// A matrix that a kernel is tried with before it is used.
#[cfg(target_arch = "x86_64")]
struct Sample {
    codes: Vec<u8>,
    scales: Vec<u8>, // and biases
    columns: usize,
    bits: usize,
    scale_type: ScaleType,
}

#[cfg(target_arch = "x86_64")]
impl Sample {
    fn new(rows: usize, columns: usize, (bits, scale_type): (usize, ScaleType)) -> Self {
        let codes =
            (0..rows * columns / 8 * bits).map(|index| ((index * 2_654_435_761) >> 8) as u8);
        let mut scales = Vec::new();
        (0..rows * columns / BLOCK)
            .for_each(|index| scale_type.put((index as f32 - 20.0) / 7.0, &mut scales));
        Self {
            codes: codes.collect(),
            scales,
            columns,
            bits,
            scale_type,
        }
    }

    /// The bits of its product with some rows, by panel and row; none where it is no matrix.
    fn product(
        &self,
        kernel: Kernel,
        panels: Range<usize>,
        x: &[f32],
    ) -> Option<Vec<(usize, usize, [u32; PANEL])>> {
        let parts: [&[u8]; 3] = [&self.codes, &self.scales, &self.scales];
        let bits_and_group = (self.bits, BLOCK);
        let weights = AffineRows::new(parts, self.columns, bits_and_group, self.scale_type).ok()?;
        let x = QuantizedRows::new(kernel, x, self.columns, weights.activation_steps());
        let mut values = Vec::new();
        let start = panels.start;
        kernel.multiply(&weights, panels, &x, &mut |first, row, panels| {
            for (panel, eight) in (start + first..).zip(panels) {
                let mut bits = eight.map(f32::to_bits);
                // Behind the last row a panel's values mean nothing.
                let count = weights.rows() - panel * PANEL;
                bits.iter_mut().skip(count).for_each(|bits| *bits = 0);
                values.push((panel, row, bits));
            }
        });
        values.sort_unstable();
        Some(values)
    }
}

#[cfg(target_arch = "x86_64")]
fn sample_rows(rows: usize, columns: usize) -> Vec<f32> {
    let value = |index: usize| (index * 37 % 101) as f32 - 50.0;
    (0..rows * columns).map(value).collect()
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    /// All that this processor has: one that is not right is not available, and other tests do not see it.
    fn unchecked() -> impl Iterator<Item = Kernel> {
        let avx2 = Avx2::detect().map(Kernel::Avx2);
        let avx512 = Avx512::detect().map(Kernel::Avx512);
        avx2.into_iter().chain(avx512)
    }

    #[test]
    fn every_kernel_that_this_processor_has_is_right() {
        for kernel in unchecked() {
            assert!(kernel.is_right(), "{}", kernel.name());
        }
    }

    /// Whatever the tasks that a product is cut into, which depend on the number of threads.
    #[test]
    fn any_range_of_panels_is_the_specification_s() {
        const ROWS: usize = 4 * PANEL + 7;
        let panels = ROWS.div_ceil(PANEL);
        let shapes = [
            (1024, (4, ScaleType::F16)),
            (3072, (4, ScaleType::Bf16)),
            (512, (8, ScaleType::F16)),
        ];
        for ((columns, stored), rows) in shapes
            .into_iter()
            .flat_map(|shape| [1, 2, 3, 7].map(|rows| (shape, rows)))
        {
            let matrix = Sample::new(ROWS, columns, stored);
            let x = sample_rows(rows, columns);
            for start in 0..panels {
                for end in start..=panels {
                    let product = |kernel| matrix.product(kernel, start..end, &x);
                    let want = product(Kernel::Scalar);
                    let count = rows * (end - start);
                    assert_eq!(want.as_ref().map(Vec::len), Some(count));
                    for kernel in unchecked() {
                        assert!(
                            product(kernel) == want,
                            "{} {columns} {rows} {start}..{end}",
                            kernel.name()
                        );
                    }
                }
            }
        }
    }
}
