//! The sandbox from outside: guests that misbehave, files that cannot be loaded, reloads, and the
//! plugins the server ships.

#![allow(missing_docs, reason = "tests are sentences")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod built;
mod guests;
mod hostile;
mod loading;
mod reload;
mod strategy;
