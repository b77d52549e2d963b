//! The real binary, asked over real sockets: what a client sees, what an operator sees.
//!
//! Most tests serve a golden checkpoint, whose weights are random: its answers are noise, so they look
//! at structure, counts, equality and difference, never at what is said. `demo` asks the trained model.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    unreachable_pub,
    reason = "a test binary: a panic is its verdict, and nothing is outside of it"
)]

mod access;
mod admin;
mod chat;
mod client;
mod crowd;
mod demo;
mod described;
mod dialects;
mod errors;
mod eval;
mod fetching;
mod formats;
mod hostile;
mod images;
mod lifecycle;
mod lifted;
mod overload;
mod reload;
mod sampling;
mod server;
mod soak;
mod sockets;
mod stream;
mod tls;
mod together;
mod tools;
mod traces;
