//! What an answer may say, token by token. A request brings the rules along; the engine asks which tokens may come next and
//! tells which one came, and knows nothing of schemas, expressions or how they are followed.

use std::fmt::Debug;

/// The rules of one request, ready to be followed by each of its answers.
pub trait Grammar: Debug + Send + Sync {
    /// Begins to follow one answer.
    fn follow(&self) -> Box<dyn Constraint>;
}

/// One answer, as far as it got. It belongs to the sequence, not to the device: whatever is computed again, no token is drawn
/// twice, so it never goes back.
///
/// Both calls are made on the engine thread, once per token: everybody waits for them.
pub trait Constraint: Send {
    /// Sets the logits of all tokens that must not come next to negative infinity; the others stay as they are. Tokens that end
    /// an answer stay where it may end.
    ///
    /// # Errors
    /// It cannot be told what may come next.
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), ConstraintError>;

    /// Takes the token that was drawn; whether the answer is complete and nothing can follow.
    ///
    /// # Errors
    /// The token is none of those that may come, or it cannot be told.
    fn accept(&mut self, token: u32) -> Result<bool, ConstraintError>;
}

/// Why an answer can no longer be held to its rules; safe to show to the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConstraintError(pub String);
