//! Powers of two in registers of any width: 2^n * 2^r with |r| at most 1/2, and 2^r by the polynomial of its degree that errs least
//! (Lawson's iterations), 1 at 0.

/// Below it nothing is left.
pub(super) const LEAST: f32 = -126.0;
/// Adding it rounds to a whole number, which is then the low bits.
pub(super) const ROUND: f32 = 12_582_912.0;
pub(super) const ONE_BITS: i32 = 0x3F80_0000;
/// Of 2^r, from the highest power on, but for the 1: within 2e-7.
#[expect(clippy::approx_constant, reason = "ln 2 itself errs more")]
pub(super) const TERMS: [f32; 5] = [
    1.326_472_7e-3,
    9.671_513e-3,
    5.550_733_6e-2,
    0.240_222_42,
    0.693_147,
];
