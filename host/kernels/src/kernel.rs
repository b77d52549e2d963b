//! Which instructions compute: found once, at run time.

use std::ops::Range;

#[cfg(target_arch = "aarch64")]
use crate::aarch64::{I8mm, Neon};
use crate::activations::{BLOCK, QuantizedRows, Tile, WORDS};
#[cfg(target_arch = "x86_64")]
use crate::activations::{FEW_ROWS, TILE_ROWS};
use crate::attention::{self, Head};
use crate::int4::Int4Rows;
#[cfg(target_arch = "x86_64")]
use crate::int4::ScaleType;
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
        // Few rows, and tiles of every height; then rows that are read in another order: so long, or in whole registers.
        self.multiplies(2 * BLOCK, ScaleType::F32, 1..=2 * TILE_ROWS)
            && self.multiplies(LONG_COLUMNS, ScaleType::F32, FEW_ROWS..=FEW_ROWS + 1)
            && self.multiplies(32 * BLOCK, ScaleType::F16, 1..=FEW_ROWS)
            && self.multiplies(16 * BLOCK, ScaleType::Bf16, 1..=FEW_ROWS)
    }

    /// Whether products of so many rows of so many columns are the specification's.
    #[cfg(target_arch = "x86_64")]
    fn multiplies(
        &self,
        columns: usize,
        scale_type: ScaleType,
        mut rows: std::ops::RangeInclusive<usize>,
    ) -> bool {
        const ROWS: usize = 3 * PANEL;
        let codes: Vec<u8> = (0..ROWS * columns / 2)
            .map(|index| ((index * 2_654_435_761) >> 8) as u8)
            .collect();
        let mut scales = Vec::new();
        (0..ROWS * columns / BLOCK)
            .for_each(|index| scale_type.put((index as f32 - 20.0) / 7.0, &mut scales));
        let parts: [&[u8]; 3] = [&codes, &scales, &scales];
        let Ok(weights) = Int4Rows::new(parts, columns, BLOCK, scale_type) else {
            return false;
        };
        let x: Vec<f32> = (0..*rows.end() * columns)
            .map(|index| (index * 37 % 101) as f32 - 50.0)
            .collect();
        let product = |kernel: Self, rows: usize| {
            let x = QuantizedRows::new(kernel, &x[..rows * columns], columns);
            let mut values = Vec::new();
            kernel.multiply(&weights, 0..ROWS / PANEL, &x, &mut |first, row, panels| {
                let panels = panels.iter().enumerate();
                values.extend(
                    panels.map(|(panel, eight)| (first + panel, row, eight.map(f32::to_bits))),
                );
            });
            values.sort_unstable();
            values
        };
        rows.all(|rows| product(*self, rows) == product(Self::Scalar, rows))
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
        weights: &Int4Rows<'_>,
        panels: Range<usize>,
        x: &QuantizedRows,
        out: Out<'_>,
    ) {
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
        tile: &mut Tile,
    ) {
        match self {
            Self::Scalar => quantize_each(rows, tile, scalar::quantize),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => quantize_each(rows, tile, |block| avx2.quantize(block)),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(avx512) => avx512.quantize(rows, tile),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(neon) | Self::I8mm(I8mm { neon }) => {
                quantize_each(rows, tile, |block| neon.quantize(block));
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

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_asked_for_a_product_before_it_is_used() {
        for kernel in Kernel::available() {
            assert!(kernel.is_right(), "{}", kernel.name());
        }
    }
}
