//! `[sandbox]`: what a plugin may use, by role. A plugin's own `limits` table only lowers these.

use serde::{Deserialize, Serialize};

/// `[sandbox]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SandboxConfig {
    /// Plugin instances alive at once, all roles together. Needs a restart.
    pub instances_max: u32,
    /// Milliseconds that a call waits for one of them to end before it is refused. Needs a restart.
    pub instance_wait_ms: u64,
    /// Largest plugin file, in MiB. Needs a restart.
    pub component_mib_max: u64,
    /// Milliseconds that building and configuring an instance may take. Needs a restart.
    pub setup_ms: u64,
    /// Millions of pixels that image operations may read for one picture. Needs a restart.
    pub image_work_mpx_max: u64,
    /// Series of counters and histograms that one plugin may keep. Needs a restart.
    pub metric_series_max: u32,
    /// Memory of one bucket of the store, keys and values, in MiB. Needs a restart.
    pub store_mib_max: u64,
    /// Entries of one bucket of the store. Needs a restart.
    pub store_entries_max: u32,
    /// Limits of request adapters. Needs a restart, like the other roles.
    pub adapter: RoleLimits<AdapterCalls>,
    /// Limits of prompt templates.
    pub template: RoleLimits<TemplateCalls>,
    /// Limits of image policies.
    pub image_policy: RoleLimits<ImagePolicyCalls>,
    /// Limits of cache strategies.
    pub cache_strategy: RoleLimits<CacheStrategyCalls>,
}

impl Default for SandboxConfig {
    fn default() -> Self {
        Self {
            instances_max: 256,
            instance_wait_ms: 1000,
            component_mib_max: 32,
            setup_ms: 500,
            image_work_mpx_max: 2000,
            metric_series_max: 200,
            store_mib_max: 8,
            store_entries_max: 10_000,
            adapter: RoleLimits::default(),
            template: RoleLimits::default(),
            image_policy: RoleLimits::default(),
            cache_strategy: RoleLimits::default(),
        }
    }
}

/// Limits of one role; `C` lists its functions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RoleLimits<C> {
    /// Linear memory of one instance, in MiB.
    pub memory_mib_max: u64,
    /// Elements of one instance's tables.
    pub table_elements_max: u32,
    /// Data one call may hand to the host, in KiB.
    pub hostcall_kib_max: u64,
    /// Host objects one instance may hold.
    pub handles_max: u32,
    /// Log lines a second; more are dropped and counted.
    pub log_lines_per_s: u32,
    /// Longest log line, in bytes; the rest is cut.
    pub log_line_bytes_max: u32,
    /// Milliseconds of wall clock each function may take.
    pub call_ms: C,
}

impl<C: Default> RoleLimits<C> {
    fn with(memory_mib_max: u64, hostcall_kib_max: u64, handles_max: u32) -> Self {
        Self {
            memory_mib_max,
            table_elements_max: 20_000,
            hostcall_kib_max,
            handles_max,
            log_lines_per_s: 50,
            log_line_bytes_max: 4096,
            call_ms: C::default(),
        }
    }
}

impl Default for RoleLimits<AdapterCalls> {
    fn default() -> Self {
        Self::with(64, 2048, 256)
    }
}

impl Default for RoleLimits<TemplateCalls> {
    fn default() -> Self {
        Self::with(32, 512, 64)
    }
}

impl Default for RoleLimits<ImagePolicyCalls> {
    fn default() -> Self {
        Self::with(32, 128, 256)
    }
}

impl Default for RoleLimits<CacheStrategyCalls> {
    fn default() -> Self {
        Self::with(64, 256, 16)
    }
}

/// `[sandbox.adapter.call_ms]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterCalls {
    /// Reading one request.
    pub start: u64,
    /// Turning one batch of events into bytes.
    pub advance: u64,
    /// Writing an error in the dialect.
    pub render_error: u64,
    /// Writing a keep-alive.
    pub keep_alive: u64,
}

impl Default for AdapterCalls {
    fn default() -> Self {
        Self {
            start: 250,
            advance: 100,
            render_error: 100,
            keep_alive: 100,
        }
    }
}

/// `[sandbox.template.call_ms]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TemplateCalls {
    /// Rendering one conversation.
    pub render: u64,
}

impl Default for TemplateCalls {
    fn default() -> Self {
        Self { render: 250 }
    }
}

/// `[sandbox.image_policy.call_ms]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImagePolicyCalls {
    /// Planning one image.
    pub prepare: u64,
}

impl Default for ImagePolicyCalls {
    fn default() -> Self {
        Self { prepare: 500 }
    }
}

/// `[sandbox.cache_strategy.call_ms]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheStrategyCalls {
    /// Choosing a scope: the only one on a request's path.
    pub scope: u64,
    /// Every other call; they run beside the requests.
    pub other: u64,
}

impl Default for CacheStrategyCalls {
    fn default() -> Self {
        Self {
            scope: 50,
            other: 250,
        }
    }
}

/// The limits of one role with its functions as a list, for code that treats all roles alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoleView {
    /// Linear memory of one instance, in MiB.
    pub memory_mib_max: u64,
    /// Elements of one instance's tables.
    pub table_elements_max: u32,
    /// Data one call may hand to the host, in KiB.
    pub hostcall_kib_max: u64,
    /// Host objects one instance may hold.
    pub handles_max: u32,
    /// Log lines a second.
    pub log_lines_per_s: u32,
    /// Longest log line, in bytes.
    pub log_line_bytes_max: u32,
    /// Function and milliseconds it may take.
    pub call_ms: Vec<(&'static str, u64)>,
}

impl SandboxConfig {
    /// Every role's key in the file and its limits.
    #[must_use]
    pub fn roles(&self) -> [(&'static str, RoleView); 4] {
        let adapter = &self.adapter.call_ms;
        let strategy = &self.cache_strategy.call_ms;
        [
            (
                "adapter",
                self.adapter.view(vec![
                    ("start", adapter.start),
                    ("advance", adapter.advance),
                    ("render_error", adapter.render_error),
                    ("keep_alive", adapter.keep_alive),
                ]),
            ),
            (
                "template",
                self.template
                    .view(vec![("render", self.template.call_ms.render)]),
            ),
            (
                "image_policy",
                self.image_policy
                    .view(vec![("prepare", self.image_policy.call_ms.prepare)]),
            ),
            (
                "cache_strategy",
                self.cache_strategy
                    .view(vec![("scope", strategy.scope), ("other", strategy.other)]),
            ),
        ]
    }
}

impl<C> RoleLimits<C> {
    fn view(&self, call_ms: Vec<(&'static str, u64)>) -> RoleView {
        RoleView {
            memory_mib_max: self.memory_mib_max,
            table_elements_max: self.table_elements_max,
            hostcall_kib_max: self.hostcall_kib_max,
            handles_max: self.handles_max,
            log_lines_per_s: self.log_lines_per_s,
            log_line_bytes_max: self.log_line_bytes_max,
            call_ms,
        }
    }
}
