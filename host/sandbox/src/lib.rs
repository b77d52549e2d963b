//! Component plugins behind an API that never says wasmtime.
//!
//! [`Sandbox::load`] turns a file into a [`Plugin`]: checked, compiled, linked and tried out. A
//! plugin answers calls with plain data or a [`CallError`]; whatever it does wrong costs that one
//! call. [`Registry`] and [`PluginFolder`] keep the set of plugins current while requests run.
//!
//! This room knows `wit/` and nothing else of the server: models, pictures and requests reach it
//! through [`HostServices`], [`ImageSource`] and plain structs.

mod adapter;
mod bindings;
mod call;
mod chat;
mod check;
mod error;
mod faults;
mod guest;
mod host;
mod image_policy;
mod limiter;
mod linker;
mod load;
mod options;
mod plugin;
mod registry;
mod reload;
mod sandbox;
mod services;
mod strategy;
mod template;
mod wasm_engine;

pub use adapter::exchange::Exchange;
pub use adapter::lifted::{Lifted, Piece};
pub use adapter::types::{
    Blob, Event, FormPart, Frame, Generation, Head, HttpRequest, Input, Next, OutputFormat,
    Progress, Response, Route, Sampling, Source, Step, TokenChance, TokenInfo, ToolChoice,
};
pub use chat::{ChatRole, Extensions, FinishReason, Message, Part, ToolCall, ToolSpec, Usage};
pub use check::{CheckReport, check_file};
pub use error::{
    CallError, ErrorCode, Fault, FaultKind, GuestError, Issue, LoadError, SandboxError,
};
pub use faults::{FunctionStats, LogStats, PluginStats};
pub use host::metrics::{MetricsSnapshot, Series, SeriesValue};
pub use image_policy::{
    Filter, ImageContext, ImageOp, ImageSource, Layout, Normalization, PixelBuffer, View,
};
pub use options::{
    CallBudgets, Function, LimitOverrides, PluginSettings, Role, RoleLimits, SandboxOptions,
};
pub use plugin::{Origin, Plugin, PluginInfo, ServedRole};
pub use registry::{PluginSet, Registry};
pub use reload::{
    FileError, FolderOptions, FolderStatus, OnChange, PluginFolder, ReloadError, SettingsFor,
    Shipped,
};
pub use sandbox::Sandbox;
pub use services::{HostServices, ModelFacts, SampleModel, Vision};
pub use strategy::actor::StrategyActor;
pub use strategy::{
    Access, Algorithm, CacheEntry, CacheEvent, Interests, Lookup, RemovalCause, Scoping,
    StrategyPlan, Tier,
};
pub use template::{CallSyntax, Conversation, PromptSegments, Segment};
