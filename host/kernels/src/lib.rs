//! Arithmetic on stored weights: the home of unsafe.
//!
//! A weight matrix stays as its file has it, f32, f16, bf16 or INT4, and is widened to f32 a few rows at a time.
//! [`int4`] draws the INT4 format byte by byte, [`mod@encode`] makes it of f32, [`widen`] converts the float types,
//! [`StoredMatrix`] puts both behind one shape and multiplies. Everything here is the scalar specification, safe and
//! written so that the compiler can vectorize it; nothing here knows of tensors, files or models.

pub mod encode;
pub mod int4;
mod matrix;
pub mod widen;

pub use encode::{EncodeError, EncodedRows, SquaredError, encode_rows};
pub use int4::{Int4Rows, ScaleType};
pub use matrix::{ShapeError, StoredMatrix, StoredRows, dot};
