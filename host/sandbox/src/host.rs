//! What guests import, one file per interface of `wit/host.wit` and the `*-input` interfaces.
//!
//! Every function first asks whether the guest still has time, and trusts no number it is given.

pub(crate) mod adapter_input;
pub(crate) mod clock;
pub(crate) mod image;
pub(crate) mod inputs;
pub(crate) mod log;
pub(crate) mod media;
pub(crate) mod metrics;
pub(crate) mod model;
pub(crate) mod store;
pub(crate) mod types;
