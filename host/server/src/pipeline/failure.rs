//! Why an exchange stops, in terms every dialect can express.

use visor_sandbox::{CallError, ErrorCode, Fault, FaultKind, GuestError};

use super::record::Outcome;

/// Why an exchange stops, and whose doing it was.
#[derive(Debug, Clone)]
pub struct Failure {
    /// What the client is told, in terms an adapter can render.
    pub error: GuestError,
    /// The methods a path does have, when the request came with another one.
    pub allow: Vec<String>,
    /// The status of a request that HTTP has a word for and no dialect: 408, 415, 431.
    pub status: Option<u16>,
    /// How metrics count it.
    pub outcome: Outcome,
}

impl Failure {
    /// A failure that its code alone decides.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::from(GuestError {
            code,
            message: message.into(),
            param: None,
            retry_after_s: None,
        })
    }

    /// The client sent something that cannot be.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidRequest, message)
    }

    /// Understood, and not to be had here.
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Unsupported, message).at(param)
    }

    /// Something of ours broke. The client is told nothing that the log does not know better.
    pub fn internal() -> Self {
        Self::new(
            ErrorCode::Internal,
            "the server failed to answer; its log has the reason",
        )
    }

    /// The request ran out of time.
    pub fn timeout(seconds: u64) -> Self {
        Self::new(
            ErrorCode::Timeout,
            format!("the request took longer than {seconds} s"),
        )
    }

    /// A plugin answered with something the contract does not allow.
    pub fn nonsense(plugin: &str, what: &str) -> Self {
        tracing::error!(plugin, what, "plugin broke the contract");
        Self {
            outcome: Outcome::GuestFault,
            ..Self::new(
                ErrorCode::Internal,
                format!("plugin {plugin} failed; the server's log has the reason"),
            )
        }
    }

    /// A method that a path does not have.
    pub fn method_not_allowed(method: &str, path: &str, allowed: Vec<String>) -> Self {
        let message = format!(
            "{method} is not allowed on {path}; use {}",
            allowed.join(" or ")
        );
        Self {
            allow: allowed,
            ..Self::invalid(message)
        }
    }

    /// The same, naming what is at fault.
    #[must_use]
    pub fn at(mut self, param: impl Into<String>) -> Self {
        self.error.param = Some(param.into());
        self
    }

    /// The same, with a status of its own.
    #[must_use]
    pub fn with_status(mut self, status: u16) -> Self {
        self.status = Some(status);
        self
    }

    /// The same, saying when a retry makes sense.
    #[must_use]
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.error.retry_after_s = Some(seconds);
        self
    }
}

impl From<GuestError> for Failure {
    fn from(error: GuestError) -> Self {
        let outcome = match error.code {
            ErrorCode::Overloaded | ErrorCode::RateLimited => Outcome::Rejected,
            ErrorCode::Internal | ErrorCode::Timeout => Outcome::ServerError,
            _ => Outcome::ClientError,
        };
        Self {
            error,
            allow: Vec::new(),
            status: None,
            outcome,
        }
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Refused(error) => error.into(),
            CallError::Fault(fault) => fault.into(),
        }
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        tracing::error!(
            plugin = %fault.plugin, function = %fault.function, kind = ?fault.kind, message = %fault.message,
            "plugin fault"
        );
        let what = if fault.kind == FaultKind::Deadline {
            "took too long"
        } else {
            "failed"
        };
        let message = format!(
            "plugin {} {what}; the server's log has the reason",
            fault.plugin
        );
        Self {
            outcome: Outcome::GuestFault,
            ..Self::new(ErrorCode::Internal, message)
        }
    }
}
