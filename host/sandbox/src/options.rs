//! Limits: what every role may use, and what one plugin's entry lowers.

use std::fmt;
use std::time::Duration;

/// What a plugin does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Translates an HTTP dialect.
    Adapter,
    /// Writes prompts.
    Template,
    /// Cuts images into tiles.
    ImagePolicy,
    /// Steers the caches.
    CacheStrategy,
}

impl Role {
    /// All four, in the order a request meets them.
    pub const ALL: [Self; 4] = [
        Self::Adapter,
        Self::Template,
        Self::ImagePolicy,
        Self::CacheStrategy,
    ];

    /// Name of the interface in `visor:plugin`.
    #[must_use]
    pub fn interface(self) -> &'static str {
        match self {
            Self::Adapter => "adapter",
            Self::Template => "template",
            Self::ImagePolicy => "image-policy",
            Self::CacheStrategy => "cache-strategy",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.interface())
    }
}

/// A function the host calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Function {
    /// Building an instance.
    Instantiate,
    /// `lifecycle.describe`
    Describe,
    /// `lifecycle.configure`
    Configure,
    /// `adapter.routes`
    Routes,
    /// `adapter.exchange.start`
    Start,
    /// `adapter.exchange.advance`
    Advance,
    /// `adapter.exchange.keep-alive`
    KeepAlive,
    /// `adapter.render-error`
    RenderError,
    /// `template.render`
    Render,
    /// `image-policy.prepare`
    Prepare,
    /// `cache-strategy.scope`
    Scope,
    /// `cache-strategy.strategy.create`
    Create,
    /// `cache-strategy.strategy.observe`
    Observe,
    /// `cache-strategy.strategy.victims`
    Victims,
    /// `cache-strategy.strategy.admit`
    Admit,
}

impl Function {
    /// Every function, in the order of the declaration.
    pub const ALL: [Self; 15] = [
        Self::Instantiate,
        Self::Describe,
        Self::Configure,
        Self::Routes,
        Self::Start,
        Self::Advance,
        Self::KeepAlive,
        Self::RenderError,
        Self::Render,
        Self::Prepare,
        Self::Scope,
        Self::Create,
        Self::Observe,
        Self::Victims,
        Self::Admit,
    ];

    /// Name as in `wit/`, for logs and metric labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Instantiate => "instantiate",
            Self::Describe => "describe",
            Self::Configure => "configure",
            Self::Routes => "routes",
            Self::Start => "start",
            Self::Advance => "advance",
            Self::KeepAlive => "keep-alive",
            Self::RenderError => "render-error",
            Self::Render => "render",
            Self::Prepare => "prepare",
            Self::Scope => "scope",
            Self::Create => "create",
            Self::Observe => "observe",
            Self::Victims => "victims",
            Self::Admit => "admit",
        }
    }
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Milliseconds of wall clock a call may take, host time included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallBudgets {
    /// `start`
    pub start_ms: u64,
    /// `advance`
    pub advance_ms: u64,
    /// `keep-alive`
    pub keep_alive_ms: u64,
    /// `render-error`
    pub render_error_ms: u64,
    /// `render`
    pub render_ms: u64,
    /// `prepare`
    pub prepare_ms: u64,
    /// `scope`, the only call to a strategy on a request's path.
    pub scope_ms: u64,
    /// `observe`, `victims` and `admit`, which run beside the requests.
    pub strategy_ms: u64,
    /// Building and configuring an instance, `describe`, `routes`, `create`.
    pub setup_ms: u64,
}

impl Default for CallBudgets {
    fn default() -> Self {
        Self {
            start_ms: 250,
            advance_ms: 100,
            keep_alive_ms: 100,
            render_error_ms: 100,
            render_ms: 250,
            prepare_ms: 500,
            scope_ms: 50,
            strategy_ms: 250,
            setup_ms: 500,
        }
    }
}

impl CallBudgets {
    /// The budget of one function.
    #[must_use]
    pub fn of(&self, function: Function) -> Duration {
        let ms = match function {
            Function::Start => self.start_ms,
            Function::Advance => self.advance_ms,
            Function::KeepAlive => self.keep_alive_ms,
            Function::RenderError => self.render_error_ms,
            Function::Render => self.render_ms,
            Function::Prepare => self.prepare_ms,
            Function::Scope => self.scope_ms,
            Function::Observe | Function::Victims | Function::Admit => self.strategy_ms,
            Function::Instantiate
            | Function::Describe
            | Function::Configure
            | Function::Routes
            | Function::Create => self.setup_ms,
        };
        Duration::from_millis(ms)
    }
}

/// What one instance of a role may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoleLimits {
    /// Linear memory, in bytes.
    pub memory_bytes_max: usize,
    /// Elements of all its tables together.
    pub table_elements_max: usize,
    /// Bytes that one crossing may copy from the guest to the host.
    pub hostcall_bytes_max: usize,
    /// Host objects it may hold.
    pub handles_max: usize,
    /// Log lines a second, all instances of a plugin together.
    pub log_lines_per_s: u32,
    /// Longest log line in bytes; the rest is cut.
    pub log_line_bytes_max: usize,
}

impl RoleLimits {
    /// Bytes of a client's text that an instance can be given: what it makes of them has to come
    /// back, with a little more around it. More is the client's mistake, not the plugin's.
    pub(crate) fn text_bytes_max(&self) -> usize {
        self.hostcall_bytes_max / 4 * 3
    }

    /// Bytes of what was lifted out of a body that an instance can have taken apart into tokens: it says each
    /// of them back in several bytes. With the default it is more than fits into any context.
    pub(crate) fn tokenized_bytes_max(&self) -> usize {
        self.hostcall_bytes_max / 8
    }

    /// The defaults of a role.
    #[must_use]
    pub fn of(role: Role) -> Self {
        let (memory_mib, hostcall_kib, handles_max) = match role {
            Role::Adapter => (64, 2048, 256),
            Role::Template => (32, 512, 64),
            Role::ImagePolicy => (32, 128, 256),
            Role::CacheStrategy => (64, 256, 16),
        };
        Self {
            memory_bytes_max: memory_mib << 20,
            table_elements_max: 20_000,
            hostcall_bytes_max: hostcall_kib << 10,
            handles_max,
            log_lines_per_s: 50,
            log_line_bytes_max: 4096,
        }
    }
}

/// Limits of everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxOptions {
    /// Limits of adapters.
    pub adapter: RoleLimits,
    /// Limits of templates.
    pub template: RoleLimits,
    /// Limits of image policies.
    pub image_policy: RoleLimits,
    /// Limits of cache strategies.
    pub cache_strategy: RoleLimits,
    /// Time limits of all functions.
    pub budgets: CallBudgets,
    /// Instances alive at once, all plugins together.
    pub instances_max: u32,
    /// How long a call waits for a free instance before it is refused, in milliseconds.
    pub instance_wait_ms: u64,
    /// Largest plugin file, in bytes.
    pub component_bytes_max: u64,
    /// Tiles an image policy may ask for, the overview not counted. No key: a view of more is not made by the model's side, whatever
    /// its memory.
    pub tiles_max: u32,
    /// Operations recorded on one image. No key: what they cost is `image_work_px_max`, and this only bounds the list.
    pub image_ops_max: usize,
    /// Pixels of any recorded image.
    pub image_pixels_max: u64,
    /// Pixels that the operations one instance has run may read, all together.
    pub image_work_px_max: u64,
    /// Generations one exchange may ask for, all its steps together.
    pub generations_max: u32,
    /// Segments of one prompt. No key: what they hold is bounded by `hostcall_bytes_max` and the context, and this only bounds the list.
    pub segments_max: usize,
    /// Metric series of one plugin.
    pub metric_series_max: usize,
    /// Bytes all keys and values of one store bucket may take.
    pub store_bytes_max: usize,
    /// Entries of one store bucket.
    pub store_entries_max: usize,
}

impl Default for SandboxOptions {
    fn default() -> Self {
        Self {
            adapter: RoleLimits::of(Role::Adapter),
            template: RoleLimits::of(Role::Template),
            image_policy: RoleLimits::of(Role::ImagePolicy),
            cache_strategy: RoleLimits::of(Role::CacheStrategy),
            budgets: CallBudgets::default(),
            instances_max: 256,
            instance_wait_ms: 1000,
            component_bytes_max: 32 << 20,
            tiles_max: 64,
            image_ops_max: 32,
            image_pixels_max: 64 << 20,
            image_work_px_max: 2_000_000_000,
            generations_max: 16,
            segments_max: 10_000,
            metric_series_max: 200,
            store_bytes_max: 8 << 20,
            store_entries_max: 10_000,
        }
    }
}

impl SandboxOptions {
    /// The limits of one role.
    #[must_use]
    pub fn role(&self, role: Role) -> &RoleLimits {
        match role {
            Role::Adapter => &self.adapter,
            Role::Template => &self.template,
            Role::ImagePolicy => &self.image_policy,
            Role::CacheStrategy => &self.cache_strategy,
        }
    }
}

/// Limits of one plugin. Absent keys keep the limit of the role; a value above it is ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LimitOverrides {
    /// Milliseconds any one call may take.
    pub call_ms: Option<u64>,
    /// Linear memory of one instance, in bytes.
    pub memory_bytes_max: Option<usize>,
    /// Bytes one crossing may copy to the host.
    pub hostcall_bytes_max: Option<usize>,
    /// Host objects one instance may hold.
    pub handles_max: Option<usize>,
    /// Log lines a second.
    pub log_lines_per_s: Option<u32>,
}

impl LimitOverrides {
    /// `limits` lowered by what is set here.
    #[must_use]
    pub fn lower(&self, limits: &RoleLimits) -> RoleLimits {
        let mut lowered = limits.clone();
        lower(&mut lowered.memory_bytes_max, self.memory_bytes_max);
        lower(&mut lowered.hostcall_bytes_max, self.hostcall_bytes_max);
        lower(&mut lowered.handles_max, self.handles_max);
        lower(&mut lowered.log_lines_per_s, self.log_lines_per_s);
        lowered
    }

    /// `budget` lowered by `call_ms`.
    #[must_use]
    pub fn lower_budget(&self, budget: Duration) -> Duration {
        self.call_ms
            .map_or(budget, |ms| budget.min(Duration::from_millis(ms)))
    }
}

fn lower<T: Ord + Copy>(limit: &mut T, wanted: Option<T>) {
    if let Some(wanted) = wanted {
        *limit = (*limit).min(wanted);
    }
}

/// What the operator says about one plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginSettings {
    /// `[plugins.<id>.config]` as JSON text, `{}` when absent.
    pub config_json: String,
    /// Limits lowered for this plugin.
    pub limits: LimitOverrides,
    /// Shared store buckets it may open besides its private one.
    pub store_buckets: Vec<String>,
}

impl Default for PluginSettings {
    fn default() -> Self {
        Self {
            config_json: "{}".to_owned(),
            limits: LimitOverrides::default(),
            store_buckets: Vec::new(),
        }
    }
}
