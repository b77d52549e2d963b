//! Products of codes with activations: of INT4, which `several` and `many` share, added up in 16 bits, and of INT8, a pair or two.
//!
//! In assembly, because the compiler loads activations long before they are used and adds products up in another order, for which it
//! holds more of them than there are registers. Left to it, prompts took 2 to 4 % longer on Zen 3, and six to ten rows 3 %.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::activations::{TILE_ROWS, Tile, WORDS};

/// Words of a half of a block: its even columns, or its odd ones.
const HALF_WORDS: usize = WORDS / 2;

/// Products of a block's even nibbles (`HALF` 0) or odd ones (1), neighbours added, as 16-bit numbers: (rows of x, panels).
///
/// There are N rows of x in two tiles, and P panels. `codes` is asked for their codes once a step, in order, just before its products.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn pair_sums<const N: usize, const P: usize, const HALF: usize>(
    codes: impl Fn(usize) -> [__m256i; P],
    tiles: [&Tile; 2],
) -> [[__m256i; P]; N] {
    const {
        assert!(N <= 2 * TILE_ROWS && TILE_ROWS == 5, "two tiles");
        assert!(P == 1 || P == 2, "one panel or two");
    }
    let mut sums = [[_mm256_setzero_si256(); P]; N];
    // Written out: a step's place in the tile is a constant in its instructions.
    step::<N, P, HALF, 0>(&mut sums, codes(0), tiles);
    step::<N, P, HALF, 1>(&mut sums, codes(1), tiles);
    step::<N, P, HALF, 2>(&mut sums, codes(2), tiles);
    step::<N, P, HALF, 3>(&mut sums, codes(3), tiles);
    step::<N, P, HALF, 4>(&mut sums, codes(4), tiles);
    step::<N, P, HALF, 5>(&mut sums, codes(5), tiles);
    step::<N, P, HALF, 6>(&mut sums, codes(6), tiles);
    step::<N, P, HALF, 7>(&mut sums, codes(7), tiles);
    sums
}

/// Adds a step's products of all rows; those of the first step have no sum to be added to.
#[target_feature(enable = "avx2")]
#[inline]
fn step<const N: usize, const P: usize, const HALF: usize, const STEP: usize>(
    sums: &mut [[__m256i; P]; N],
    codes: [__m256i; P],
    tiles: [&Tile; 2],
) {
    for (row, sums) in sums.iter_mut().enumerate() {
        let (tile, place) = (tiles[row / TILE_ROWS], row % TILE_ROWS);
        match place {
            _ if STEP == 0 => {
                let x = _mm256_set1_epi32(tile.words[HALF * HALF_WORDS][place]);
                for (sum, codes) in sums.iter_mut().zip(codes) {
                    *sum = _mm256_maddubs_epi16(codes, x);
                }
            }
            0 => add_products::<HALF, STEP, 0>(sums, &codes, tile),
            1 => add_products::<HALF, STEP, 1>(sums, &codes, tile),
            2 => add_products::<HALF, STEP, 2>(sums, &codes, tile),
            3 => add_products::<HALF, STEP, 3>(sums, &codes, tile),
            _ => add_products::<HALF, STEP, 4>(sums, &codes, tile),
        }
    }
}

/// Adds the products of one or two panels' codes with a step's word of a row, neighbours added.
#[target_feature(enable = "avx2")]
#[inline]
fn add_products<const HALF: usize, const STEP: usize, const ROW: usize>(
    sums: &mut [__m256i],
    codes: &[__m256i],
    tile: &Tile,
) {
    const {
        assert!(
            HALF < 2 && STEP < HALF_WORDS && ROW < TILE_ROWS,
            "inside a tile"
        )
    };
    let words = tile.words.as_ptr();
    match (sums, codes) {
        // SAFETY: the function has AVX2, the assertion keeps what is read inside `tile.words`, and nothing is written.
        ([sum], [codes]) => unsafe {
            asm!(
                "vpbroadcastd {x}, dword ptr [{words} + {at}]",
                "vpmaddubsw {x}, {codes}, {x}",
                "vpaddw {sum}, {sum}, {x}",
                x = out(ymm_reg) _,
                words = in(reg) words,
                at = const size_of::<i32>() * ((HALF * HALF_WORDS + STEP) * TILE_ROWS + ROW),
                codes = in(ymm_reg) *codes,
                sum = inout(ymm_reg) *sum,
                options(readonly, nostack, preserves_flags)
            );
        },
        // SAFETY: as above.
        ([sum_a, sum_b], [codes_a, codes_b]) => unsafe {
            asm!(
                "vpbroadcastd {x}, dword ptr [{words} + {at}]",
                "vpmaddubsw {products}, {codes_a}, {x}",
                "vpaddw {sum_a}, {sum_a}, {products}",
                "vpmaddubsw {x}, {codes_b}, {x}",
                "vpaddw {sum_b}, {sum_b}, {x}",
                x = out(ymm_reg) _,
                products = out(ymm_reg) _,
                words = in(reg) words,
                at = const size_of::<i32>() * ((HALF * HALF_WORDS + STEP) * TILE_ROWS + ROW),
                codes_a = in(ymm_reg) *codes_a,
                codes_b = in(ymm_reg) *codes_b,
                sum_a = inout(ymm_reg) *sum_a,
                sum_b = inout(ymm_reg) *sum_b,
                options(readonly, nostack, preserves_flags)
            );
        },
        _ => unreachable!("`pair_sums` has one panel or two"),
    }
}

/// Dot products of a block of INT8 of a panel with N rows of x.
///
/// Activations have 64 steps ([`crate::AffineRows::activation_steps`]): a pair of products is at most 2 * 255 * 64 = 32640, of 32767. Where
/// no code is above 127 (`SEVEN_BITS`) two pairs are 4 * 127 * 64 = 32512 and become 32 bits together, which saves one multiplication of
/// four.
/// `codes` is asked for a step's, in order, just before its products.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn byte_dots<const N: usize, const SEVEN_BITS: bool>(
    codes: impl Fn(usize) -> __m256i,
    tile: &Tile,
) -> [__m256i; N] {
    const { assert!(N <= TILE_ROWS && TILE_ROWS == 5, "a tile") };
    let mut sums = [_mm256_setzero_si256(); N];
    let two = |step: usize| [codes(step), codes(step + 1)];
    two_steps::<N, SEVEN_BITS, 0>(&mut sums, two(0), tile);
    two_steps::<N, SEVEN_BITS, 2>(&mut sums, two(2), tile);
    two_steps::<N, SEVEN_BITS, 4>(&mut sums, two(4), tile);
    two_steps::<N, SEVEN_BITS, 6>(&mut sums, two(6), tile);
    two_steps::<N, SEVEN_BITS, 8>(&mut sums, two(8), tile);
    two_steps::<N, SEVEN_BITS, 10>(&mut sums, two(10), tile);
    two_steps::<N, SEVEN_BITS, 12>(&mut sums, two(12), tile);
    two_steps::<N, SEVEN_BITS, 14>(&mut sums, two(14), tile);
    sums
}

/// Adds the products of step STEP and the next one of all rows.
#[target_feature(enable = "avx2")]
#[inline]
fn two_steps<const N: usize, const SEVEN_BITS: bool, const STEP: usize>(
    sums: &mut [__m256i; N],
    codes: [__m256i; 2],
    tile: &Tile,
) {
    for (row, sum) in sums.iter_mut().enumerate() {
        match row {
            0 => add_two_steps::<SEVEN_BITS, STEP, 0>(sum, codes, tile),
            1 => add_two_steps::<SEVEN_BITS, STEP, 1>(sum, codes, tile),
            2 => add_two_steps::<SEVEN_BITS, STEP, 2>(sum, codes, tile),
            3 => add_two_steps::<SEVEN_BITS, STEP, 3>(sum, codes, tile),
            _ => add_two_steps::<SEVEN_BITS, STEP, 4>(sum, codes, tile),
        }
    }
}

/// Adds the products of two steps' codes with the words of a row, in 32 bits.
#[target_feature(enable = "avx2")]
#[inline]
fn add_two_steps<const SEVEN_BITS: bool, const STEP: usize, const ROW: usize>(
    sum: &mut __m256i,
    [first, second]: [__m256i; 2],
    tile: &Tile,
) {
    const { assert!(STEP + 1 < WORDS && ROW < TILE_ROWS, "inside a tile") };
    let (words, ones) = (tile.words.as_ptr(), _mm256_set1_epi16(1));
    /// The products of both steps in `x` and `y`, and what becomes one number a lane of them in `x`.
    macro_rules! add_products {
        ($($become_one:literal),*) => {
            asm!(
                "vpbroadcastd {x}, dword ptr [{words} + {at}]",
                "vpbroadcastd {y}, dword ptr [{words} + {next}]",
                "vpmaddubsw {x}, {first}, {x}",
                "vpmaddubsw {y}, {second}, {y}",
                $($become_one,)*
                "vpaddd {sum}, {sum}, {x}",
                x = out(ymm_reg) _,
                y = out(ymm_reg) _,
                words = in(reg) words,
                at = const size_of::<i32>() * (STEP * TILE_ROWS + ROW),
                next = const size_of::<i32>() * ((STEP + 1) * TILE_ROWS + ROW),
                first = in(ymm_reg) first,
                second = in(ymm_reg) second,
                ones = in(ymm_reg) ones,
                sum = inout(ymm_reg) *sum,
                options(readonly, nostack, preserves_flags)
            )
        };
    }
    if SEVEN_BITS {
        // SAFETY: the function has AVX2, the assertion keeps what is read inside `tile.words`, and nothing is written.
        unsafe { add_products!("vpaddw {x}, {x}, {y}", "vpmaddwd {x}, {x}, {ones}") };
    } else {
        // SAFETY: as above.
        unsafe {
            add_products!(
                "vpmaddwd {x}, {x}, {ones}",
                "vpmaddwd {y}, {y}, {ones}",
                "vpaddd {x}, {x}, {y}"
            );
        }
    }
}
