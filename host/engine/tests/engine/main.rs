//! The engine with a scripted model: what clients see, whatever goes wrong.

#![expect(clippy::unwrap_used, reason = "every function here is part of a test")]

mod batch;
mod cancel;
mod constraints;
mod drafts;
mod events;
mod fallback;
mod features;
mod heard;
mod limits;
mod prefix;
mod random;
mod real;
mod sampling;
mod scripted;
mod stops;
