//! What can go wrong: a guest that refuses a request, a guest that fails, a file that cannot be
//! loaded.

use std::fmt;

use crate::options::{Function, Role};

/// Why a request cannot be served, in terms that every dialect can express.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// Malformed or contradictory input.
    InvalidRequest,
    /// No such model, route or object.
    NotFound,
    /// Understood, but this server or plugin cannot do it.
    Unsupported,
    /// Over a limit of bytes, images or pixels.
    TooLarge,
    /// Prompt plus requested output exceed the context length.
    ContextOverflow,
    /// No key, or none that is known.
    Unauthorized,
    /// This client asked for too much; it may retry.
    RateLimited,
    /// Busy; the client may retry.
    Overloaded,
    /// The deadline passed.
    Timeout,
    /// A fault of the plugin or the server; details are for the log only.
    Internal,
}

/// A refusal: safe to show to the client. Plugins make these, and so does the host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct GuestError {
    /// What kind of refusal.
    pub code: ErrorCode,
    /// One sentence for the client.
    pub message: String,
    /// JSON pointer or parameter at fault, when known.
    pub param: Option<String>,
    /// Seconds after which a retry makes sense.
    pub retry_after_s: Option<u32>,
}

impl GuestError {
    /// A refusal with neither parameter nor retry time.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            param: None,
            retry_after_s: None,
        }
    }
}

/// How a guest failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// It trapped: a panic, a division by zero, memory out of bounds.
    Trap,
    /// It was not done in time.
    Deadline,
    /// It wanted more memory or table elements than allowed.
    Memory,
    /// It went over another limit: copied data, handles, recorded operations, instances.
    Limit,
    /// It broke the contract: an answer that fails a check, or bytes that decode to nothing.
    Contract,
}

impl FaultKind {
    /// Lower-case word for logs and metric labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Trap => "trap",
            Self::Deadline => "deadline",
            Self::Memory => "memory",
            Self::Limit => "limit",
            Self::Contract => "contract",
        }
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A guest failed. Belongs in the log; the client only learns that something internal happened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("plugin `{plugin}`, {role} `{function}`: {kind}: {message}")]
pub struct Fault {
    /// Plugin id.
    pub plugin: String,
    /// Role it served.
    pub role: Role,
    /// Function that was called.
    pub function: Function,
    /// How it failed.
    pub kind: FaultKind,
    /// What happened, with the numbers.
    pub message: String,
}

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The request is refused: tell the client.
    #[error("refused: {0}")]
    Refused(GuestError),
    /// The guest failed: tell the log.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// A complaint of a plugin about its configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issue {
    /// Where in the configuration table.
    pub path: String,
    /// What is wrong.
    pub message: String,
}

/// Why a file is not a usable plugin. Every message is for an operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read.
    #[error("cannot read the file: {0}")]
    Read(String),
    /// Over the size cap.
    #[error("file is {bytes} bytes; at most {bytes_max} are allowed (sandbox.component_mib_max)")]
    TooLarge {
        /// Size of the file.
        bytes: u64,
        /// The cap.
        bytes_max: u64,
    },
    /// Neither a component nor a core module.
    #[error("not a WebAssembly file: {0}")]
    NotWasm(String),
    /// WebAssembly, but cut short or malformed.
    #[error("damaged or truncated WebAssembly: {0}")]
    Malformed(String),
    /// A core module that cannot be made a component.
    #[error(
        "core module without a usable component type: {0}; build it with wit-bindgen against this server's wit/ folder, or componentize it"
    )]
    NotComponent(String),
    /// No role is exported, or one at a version this server does not speak.
    #[error("{0}")]
    NoRole(String),
    /// The plugin wants something the server does not give.
    #[error("{0}")]
    Import(String),
    /// Names fit, types do not.
    #[error("does not fit this server's interfaces: {0}")]
    Link(String),
    /// The compiler refused it.
    #[error("cannot be compiled: {0}")]
    Compile(String),
    /// One instance would take what others need.
    #[error(
        "one instance of it has {memories} memories and {tables} tables; {memories_max} and {tables_max} are allowed, so that sandbox.instances_max of them fit"
    )]
    TooManyParts {
        /// Memories of one instance.
        memories: u32,
        /// Tables of one instance.
        tables: u32,
        /// Most memories.
        memories_max: u32,
        /// Most tables.
        tables_max: u32,
    },
    /// `configure` did not like the configuration.
    #[error("configuration refused: {}", list_issues(.0))]
    Configuration(Vec<Issue>),
    /// The trial run failed.
    #[error("trial run failed: {0}")]
    Trial(Fault),
    /// The trial run was refused where it must not be.
    #[error("trial run: refused a plain request: {0}")]
    TrialRefused(String),
    /// The operating system gave no thread for the trial run.
    #[error("trial run: no thread for it: {0}")]
    NoThread(String),
    /// The trial run panicked: the guest found a mistake of ours.
    #[error("trial run: it brings the server's own code down: {0}; the log says where")]
    TrialPanicked(String),
}

fn list_issues(issues: &[Issue]) -> String {
    let listed: Vec<String> = issues
        .iter()
        .map(|issue| match issue.path.as_str() {
            "" => issue.message.clone(),
            path => format!("{path}: {}", issue.message),
        })
        .collect();
    listed.join("; ")
}

/// Why the sandbox itself cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The WebAssembly engine refused its settings.
    #[error("cannot start the plugin engine: {0}")]
    Start(String),
    /// The operating system gave no thread.
    #[error("cannot start the thread `{name}`")]
    Thread {
        /// Name of the thread.
        name: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}
