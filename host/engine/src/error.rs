//! Why a request was refused or failed: one variant per thing the caller does differently.

use std::time::Duration;

use visor_model::ModelError;

use crate::constraint::ConstraintError;

/// A refusal by [`crate::Engine::submit`], or the end of a request that was admitted.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The caller can send less.
    #[error("prompt is {prompt_tokens} tokens; the context of {context_tokens_max} holds at most {} and an answer", context_tokens_max.saturating_sub(1))]
    PromptTooLong {
        /// Positions of the prompt, image tokens included.
        prompt_tokens: u32,
        /// Positions of prompt and answer together.
        context_tokens_max: u32,
    },
    /// The request contradicts itself; says where.
    #[error("request cannot be run: {0}")]
    Invalid(String),
    /// The model refuses this prompt or these pictures; another request may do.
    #[error("the model refuses the request")]
    Refused(#[source] ModelError),
    /// Its keys and values do not fit, even with everything else out of the way.
    #[error(
        "{tokens} tokens need more keys and values than there is room for: {kv_tokens_max} tokens"
    )]
    KvFull {
        /// Positions of the request so far.
        tokens: u32,
        /// Positions that all KV blocks hold.
        kv_tokens_max: u64,
    },
    /// The answer can no longer be held to the rules its request brought along.
    #[error("the answer cannot be constrained any further: {0}")]
    Constraint(#[source] ConstraintError),
    /// The caller can come back later.
    #[error("{queue_requests_max} requests are waiting for the model already")]
    QueueFull {
        /// Requests that may wait.
        queue_requests_max: usize,
    },
    /// The caller can come back later.
    #[error("prompts of {queue_tokens_max} tokens are waiting for the model already")]
    QueueTokensFull {
        /// Prompt positions that may wait.
        queue_tokens_max: u64,
    },
    /// The model is still loading.
    #[error("the model is still loading")]
    NotReady,
    /// No model could be loaded; nothing will be served.
    #[error("no model: {0}")]
    NoModel(String),
    /// The engine is stopping or has stopped.
    #[error("the engine is stopping")]
    Stopped,
    /// The request's own deadline passed.
    #[error("the request's deadline passed after {:.1} s", waited.as_secs_f64())]
    DeadlinePassed {
        /// From submission to the moment it was noticed.
        waited: Duration,
    },
    /// A bug or a broken device: logged with its chain, never shown.
    #[error("forward pass failed")]
    Forward(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// An error and its causes, in one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let causes: Vec<String> = causes.map(ToString::to_string).collect();
    causes.join(": ")
}
