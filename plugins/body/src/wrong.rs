//! What a client got wrong, before it is said in a dialect.

use std::fmt;

/// Why a field cannot be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Malformed or contradictory.
    Invalid,
    /// Understood, and not to be had here.
    Unsupported,
}

/// A complaint about one field of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// Why it cannot be taken.
    pub kind: Kind,
    /// One sentence, safe to show.
    pub message: String,
    /// The path to the field; none for the body itself.
    pub param: Option<String>,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Wrong {}
