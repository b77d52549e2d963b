//! Prefill, decode, sampling and caches on one thread that owns the model.
//!
//! [`Engine`] is the handle: [`Engine::submit`] takes a [`GenerateRequest`] and answers with an
//! [`EventReceiver`]. Behind it, `scheduler` is the loop and the only file that decides what runs
//! next; `sequence` is one request as a state machine; `slot` holds the model and moves to the CPU
//! when an accelerator breaks; `sampler`, `detokenizer` and `stop` turn logits into text, within
//! the rules of a [`Constraint`]. [`cache`]
//! keeps what was dear to make. Nothing here knows of HTTP, plugins or async.

pub mod cache;
mod caches;
mod constraint;
mod detokenizer;
mod drafter;
mod engine;
mod error;
mod features;
mod guard;
mod job;
mod model;
mod output;
mod pace;
mod prefix_cache;
mod request;
mod sampler;
mod scheduler;
mod sequence;
mod shared;
mod slot;
mod stats;
mod stop;
mod token_infos;

pub use cache::{
    Access, Algorithm, Cache, CacheEntry, CacheEvent, CacheKey, CacheStats, CacheStrategy,
    Extensions, Interests, Lookup, Native, NewEntry, Plan, RemovalCause, Scope, Scoping, Tier,
};
pub use caches::{CacheBytes, Caches};
pub use constraint::{Constraint, ConstraintError, Grammar};
pub use engine::{Engine, EngineOptions};
pub use error::{EngineError, chain};
pub use model::{CheckpointLoader, KvFigures, Model, ModelLoader, Part};
pub use prefix_cache::PrefixBlock;
pub use request::{
    Answer, CacheAccess, CancelToken, Event, EventReceiver, Finish, GenerateRequest, RecvError,
    Sampling, Timings, TokenChance, TokenInfo, Usage,
};
pub use shared::EngineState;
pub use stats::{EngineStats, STEP_SIZES, StageStats};
