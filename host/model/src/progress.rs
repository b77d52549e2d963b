//! How far something is that goes through all bytes of a model.

use std::fmt;

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadStage {
    /// Weights go where they are computed with.
    Loading,
    /// Random weights are drawn and written.
    Drawing,
    /// Weights are read, to know them again.
    Hashing,
    /// Another process quantizes the same weights.
    Waiting,
    /// Floats become INT4.
    Quantizing,
    /// What was written is run beside what it was made from.
    Comparing,
}

impl fmt::Display for LoadStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loading => "loading model",
            Self::Drawing => "making weights",
            Self::Hashing => "hashing weights",
            Self::Waiting => "waiting for another process that quantizes the same weights",
            Self::Quantizing => "quantizing",
            Self::Comparing => "comparing",
        })
    }
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// What is being done.
    pub stage: LoadStage,
    /// Weight bytes done.
    pub bytes_done: u64,
    /// Weight bytes in all.
    pub bytes_total: u64,
}

impl LoadProgress {
    /// Whole percents.
    pub fn percent(&self) -> u64 {
        self.bytes_done.saturating_mul(100) / self.bytes_total.max(1)
    }
}
