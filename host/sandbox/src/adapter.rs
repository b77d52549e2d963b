//! Role adapter: an HTTP dialect as a protocol machine without I/O.

pub(crate) mod checks;
pub(crate) mod convert;
pub(crate) mod exchange;
pub(crate) mod lifted;
pub(crate) mod types;
