//! Every call of the model goes through here: a panic ends a request, never the engine thread.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use visor_model::ModelError;

use crate::constraint::ConstraintError;

/// Why a step of a sequence did not succeed.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// The model stopped because it was asked to.
    Cancelled,
    /// There are not as many KV blocks now.
    Full,
    /// This request cannot be run, on any device.
    Refused(ModelError),
    /// The answer cannot be held to its rules, on any device.
    Constraint(ConstraintError),
    /// The forward pass or the device is broken; another device may do.
    Broken(Box<dyn std::error::Error + Send + Sync>),
    /// The model panicked; otherwise as `Broken`.
    Panicked(String),
    /// What is done to a step's answer panicked, such as the drawing of a token: nothing is wrong with the device.
    Spoiled(String),
}

/// The model panicked; the message went to the panic hook, too.
#[derive(Debug, thiserror::Error)]
#[error("the model panicked: {0}")]
pub(crate) struct Panicked(pub(crate) String);

/// As [`Panicked`], of one sequence's own work behind a step.
#[derive(Debug, thiserror::Error)]
#[error("the answer's text could not be made: {0}")]
pub(crate) struct Spoiled(pub(crate) String);

impl From<ModelError> for Trouble {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Cancelled => Self::Cancelled,
            ModelError::KvFull { .. } => Self::Full,
            ModelError::Prompt(_) | ModelError::TooLong { .. } | ModelError::Pixels(_) => {
                Self::Refused(error)
            }
            _ => Self::Broken(Box::new(error)),
        }
    }
}

impl Trouble {
    /// Whether it is the request's own, and no other has a part in it.
    pub(crate) fn is_own(&self) -> bool {
        matches!(
            self,
            Self::Refused(_) | Self::Constraint(_) | Self::Spoiled(_)
        )
    }

    /// The error behind it.
    pub(crate) fn into_error(self) -> Box<dyn std::error::Error + Send + Sync> {
        match self {
            Self::Cancelled => Box::new(ModelError::Cancelled),
            Self::Full => Box::new(ModelError::KvFull { blocks_max: 0 }),
            Self::Spoiled(message) => Box::new(Spoiled(message)),
            Self::Refused(error) => Box::new(error),
            Self::Constraint(error) => Box::new(error),
            Self::Broken(error) => error,
            Self::Panicked(message) => Box::new(Panicked(message)),
        }
    }
}

/// Runs one call of the model. What the call may have left half done (a sequence's state, a model
/// on a broken device) is not used again by whoever sees the trouble.
pub(crate) fn guarded<T>(call: impl FnOnce() -> Result<T, ModelError>) -> Result<T, Trouble> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(Trouble::from),
        Err(panic) => Err(Trouble::Panicked(message(panic.as_ref()))),
    }
}

/// Runs what a sequence does with its part of a step's answer. It is the request's own: a panic ends that request, and the sequence
/// is not used again.
pub(crate) fn alone<T>(work: impl FnOnce() -> Result<T, Trouble>) -> Result<T, Trouble> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(Trouble::Spoiled(message(panic.as_ref()))))
}

/// The same for the rules that a request brings along.
pub(crate) fn constrained<T>(
    call: impl FnOnce() -> Result<T, ConstraintError>,
) -> Result<T, ConstraintError> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        tracing::error!(panic = message(panic.as_ref()), "a constraint panicked");
        Err(ConstraintError(
            "it failed; the server's log has the reason".into(),
        ))
    })
}

/// Frees what may lie on a broken device, and may panic going.
pub(crate) fn freed(what: &str, free: impl FnOnce()) {
    let freed = guarded(|| {
        free();
        Ok(())
    });
    if let Err(trouble) = freed {
        tracing::warn!(?trouble, what, "cannot be freed");
    }
}

/// What a panic said.
pub(crate) fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_string()
}
