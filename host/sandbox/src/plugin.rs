//! A loaded plugin: what it is and the calls it answers.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use wasmtime::component::InstancePre;

use crate::adapter::exchange::{self, Exchange};
use crate::adapter::types::{HttpRequest, Response, Route, Step};
use crate::bindings::adapter::AdapterPluginIndices;
use crate::bindings::cache_strategy::CacheStrategyPluginIndices;
use crate::bindings::common::CommonIndices;
use crate::bindings::image_policy::ImagePolicyPluginIndices;
use crate::bindings::template::TemplatePluginIndices;
use crate::error::{CallError, Fault, FaultKind, GuestError};
use crate::faults::{Counters, FunctionStats};
use crate::guest::GuestState;
use crate::host::log::LogGate;
use crate::host::metrics::SeriesTable;
use crate::host::store::{Bucket, BucketLimits};
use crate::image_policy::{self, ImageContext, ImageSource, View};
use crate::options::{Function, PluginSettings, Role, RoleLimits};
use crate::sandbox::Shared;
use crate::strategy::actor::StrategyActor;
use crate::template::{self, Conversation, PromptSegments};

/// Where a plugin came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Embedded in the binary.
    Shipped,
    /// A file of the plugin folder.
    File(PathBuf),
}

/// What a plugin says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PluginInfo {
    /// Its name.
    pub name: String,
    /// Its own version.
    pub version: String,
    /// One sentence.
    pub description: String,
    /// JSON Schema of its configuration.
    pub config_schema: Option<String>,
}

/// A role that a plugin serves, and the interface version it was built for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedRole {
    /// Which role.
    pub role: Role,
    /// Version in the exported interface name, such as `0.1.0`.
    pub version: String,
}

/// What is kept of a plugin id over reloads.
pub(crate) struct Kept {
    pub(crate) counters: Counters,
    pub(crate) log: LogGate,
    pub(crate) series: SeriesTable,
    pub(crate) bucket: Arc<Bucket>,
}

impl Kept {
    pub(crate) fn new(bucket_limits: BucketLimits) -> Self {
        Self {
            counters: Counters::default(),
            log: LogGate::default(),
            series: SeriesTable::default(),
            bucket: Arc::new(Bucket::new(bucket_limits)),
        }
    }
}

/// A linked component and where its exports are.
pub(crate) struct Exports {
    pub(crate) pre: InstancePre<GuestState>,
    pub(crate) common: CommonIndices,
    pub(crate) adapter: Option<AdapterPluginIndices>,
    pub(crate) template: Option<TemplatePluginIndices>,
    pub(crate) image_policy: Option<ImagePolicyPluginIndices>,
    pub(crate) cache_strategy: Option<CacheStrategyPluginIndices>,
}

/// Facts about a file that every revision of a plugin made from it shares.
pub(crate) struct Compiled {
    pub(crate) digest_hex: String,
    pub(crate) bytes: u64,
    pub(crate) compile_ms: u64,
    pub(crate) wrapped: bool,
    pub(crate) roles: Vec<ServedRole>,
    pub(crate) imports: Vec<String>,
    pub(crate) exports: Arc<Exports>,
}

/// What a call needs to know of the plugin.
pub(crate) struct Core {
    pub(crate) id: String,
    pub(crate) revision: String,
    pub(crate) settings: PluginSettings,
    pub(crate) exports: Arc<Exports>,
    pub(crate) kept: Arc<Kept>,
    pub(crate) shared: Arc<Shared>,
}

impl Core {
    pub(crate) fn revision_short(&self) -> &str {
        self.revision.get(..12).unwrap_or(&self.revision)
    }

    pub(crate) fn limits(&self, role: Role) -> RoleLimits {
        self.settings.limits.lower(self.shared.options.role(role))
    }

    pub(crate) fn budget(&self, function: Function) -> Duration {
        self.settings
            .limits
            .lower_budget(self.shared.options.budgets.of(function))
    }
}

/// What the trial run found out.
#[derive(Default)]
pub(crate) struct Tried {
    pub(crate) info: PluginInfo,
    pub(crate) routes: Vec<Route>,
}

/// A plugin that passed its trial. Immutable; a changed file makes a new one.
pub struct Plugin {
    core: Arc<Core>,
    compiled: Arc<Compiled>,
    origin: Origin,
    tried: Tried,
}

impl Plugin {
    pub(crate) fn new(
        core: Arc<Core>,
        compiled: Arc<Compiled>,
        origin: Origin,
        tried: Tried,
    ) -> Arc<Self> {
        Arc::new(Self {
            core,
            compiled,
            origin,
            tried,
        })
    }

    pub(crate) fn compiled(&self) -> &Arc<Compiled> {
        &self.compiled
    }

    /// File stem or shipped name.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.core.id
    }

    /// SHA-256 of the file, hex.
    #[must_use]
    pub fn revision(&self) -> &str {
        &self.core.revision
    }

    /// The first 12 characters of the revision, for people.
    #[must_use]
    pub fn revision_short(&self) -> &str {
        self.core.revision_short()
    }

    /// What it says about itself.
    #[must_use]
    pub fn info(&self) -> &PluginInfo {
        &self.tried.info
    }

    /// Where it came from.
    #[must_use]
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The settings it was configured with.
    #[must_use]
    pub fn settings(&self) -> &PluginSettings {
        &self.core.settings
    }

    /// Size of the file in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.compiled.bytes
    }

    /// Milliseconds that compiling took.
    #[must_use]
    pub fn compile_ms(&self) -> u64 {
        self.compiled.compile_ms
    }

    /// Roles it serves.
    #[must_use]
    pub fn roles(&self) -> &[ServedRole] {
        &self.compiled.roles
    }

    /// Interfaces it imports, with versions.
    #[must_use]
    pub fn imports(&self) -> &[String] {
        &self.compiled.imports
    }

    /// Whether it serves `role`.
    #[must_use]
    pub fn serves(&self, role: Role) -> bool {
        self.roles().iter().any(|served| served.role == role)
    }

    /// Routes of an adapter, taken at load; empty for other roles.
    #[must_use]
    pub fn routes(&self) -> &[Route] {
        &self.tried.routes
    }

    /// Calls and faults of this plugin's id, all revisions together.
    #[must_use]
    pub fn stats(&self) -> Vec<FunctionStats> {
        self.core.kept.counters.functions()
    }

    /// Starts an exchange in a fresh instance, which lives as long as the [`Exchange`].
    ///
    /// # Errors
    /// A refusal of the adapter, or its fault.
    pub fn start(&self, request: HttpRequest) -> Result<(Exchange, Step), CallError> {
        Exchange::start(&self.core, request)
    }

    /// Renders an error in a fresh instance. With `mid_stream` only the body counts.
    ///
    /// # Errors
    /// The fault of the adapter, or a [`FaultKind::Limit`] when no instance is free.
    pub fn render_error(&self, error: &GuestError, mid_stream: bool) -> Result<Response, Fault> {
        exchange::render_error(&self.core, error, mid_stream).map_err(|error| match error {
            CallError::Fault(fault) => fault,
            CallError::Refused(refusal) => Fault {
                plugin: self.core.id.clone(),
                role: Role::Adapter,
                function: Function::RenderError,
                kind: FaultKind::Limit,
                message: refusal.message,
            },
        })
    }

    /// Renders a conversation in a fresh instance.
    ///
    /// # Errors
    /// A refusal of the template, or its fault.
    pub fn render(&self, conversation: Conversation) -> Result<PromptSegments, CallError> {
        template::render(&self.core, conversation)
    }

    /// Decides about an image in a fresh instance.
    ///
    /// # Errors
    /// A refusal of the policy, or its fault.
    pub fn prepare(
        &self,
        image: Arc<dyn ImageSource>,
        context: ImageContext,
    ) -> Result<View, CallError> {
        image_policy::prepare(&self.core, image, context)
    }

    /// Starts the one long-lived instance of a cache strategy on its own thread.
    ///
    /// # Errors
    /// The fault of the plugin, or of the operating system that gives no thread.
    pub fn strategy(&self) -> Result<StrategyActor, Fault> {
        StrategyActor::start(&self.core)
    }
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugin")
            .field("id", &self.core.id)
            .field("revision", &self.core.revision_short())
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}
