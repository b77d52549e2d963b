//! Arithmetic on stored weights: the home of unsafe.
//!
//! A weight matrix stays as its file has it, f32, f16, bf16, INT8 or INT4. [`affine`] draws the last two byte by byte, [`mod@encode`]
//! makes it of f32, [`widen`] converts the float types.
//!
//! There are two ways to multiply. [`StoredMatrix`] widens a few rows at a time to f32: safe, for any type, written so that
//! the compiler can vectorize it. [`multiply()`] takes INT4 and INT8 as they are, with [`activations`] of eight bits: `scalar` specifies
//! it, and one file for each instruction set does the same, to the bit, as fast as that can. Nothing here knows of tensors,
//! files or models.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod activation;
pub mod activations;
pub mod affine;
pub mod allocator;
pub mod attention;
mod disjoint;
pub mod encode;
mod kernel;
mod matrix;
mod pool;
mod product;
mod scalar;
pub mod widen;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use activation::Activation;
pub use activations::QuantizedRows;
pub use affine::{AffineRows, ScaleType};
pub use attention::{AttentionInput, AttentionShape, HalfRows, HeadRows, Way, attend};
pub use encode::{EncodeError, EncodedRows, SquaredError, encode_rows};
pub use kernel::Kernel;
pub use matrix::{ShapeError, StoredMatrix, StoredRows, dot};
pub use pool::on_pool;
pub use product::{multiply, multiply_activated};
