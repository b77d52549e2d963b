//! Image preprocessing against the reference's goldens, and image files of every kind.

#![expect(
    clippy::unwrap_used,
    reason = "a case that cannot be set up fails there"
)]

mod decoding;
mod files;
mod golden;
mod operations;
mod views;
