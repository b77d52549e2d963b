//! From bytes to a plugin: size, digest, validation, names, compiler, linker, trial run.
//!
//! Everything that can be said without compiling is said first. Nothing here touches a plugin
//! that is in service.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use sha2::{Digest, Sha256};
use wasmtime::component::{Component, InstancePre};

use crate::bindings::adapter::AdapterPluginIndices;
use crate::bindings::cache_strategy::CacheStrategyPluginIndices;
use crate::bindings::common::CommonIndices;
use crate::bindings::image_policy::ImagePolicyPluginIndices;
use crate::bindings::template::TemplatePluginIndices;
use crate::chat::one_line;
use crate::error::LoadError;
use crate::guest::GuestState;
use crate::options::{PluginSettings, Role};
use crate::plugin::{Compiled, Core, Exports, Kept, Origin, Plugin, ServedRole, Tried};
use crate::sandbox::Shared;
use crate::wasm_engine::{MEMORIES_PER_COMPONENT, TABLES_PER_COMPONENT};

pub(crate) mod inspect;
pub(crate) mod metadata;
pub(crate) mod schema;
pub(crate) mod trial;
pub(crate) mod wrap;

use inspect::Surface;

/// Compiled files that are remembered; shipped plugins and a few revisions of each.
const REMEMBERED_MAX: usize = 32;
/// What is told of a panic; the log has all of it.
const PANIC_BYTES_MAX: usize = 256;

/// Compiles one file at a time and remembers the last ones by digest.
#[derive(Default)]
pub(crate) struct Compiler {
    /// Newest last. Also held while compiling: one at a time.
    remembered: Mutex<Vec<Arc<Compiled>>>,
}

/// Everything up to the linked component; from memory when these bytes were here before.
pub(crate) fn compile(shared: &Shared, bytes: &[u8]) -> Result<Arc<Compiled>, LoadError> {
    let (size, bytes_max) = (bytes.len() as u64, shared.options.component_bytes_max);
    if size > bytes_max {
        return Err(LoadError::TooLarge {
            bytes: size,
            bytes_max,
        });
    }
    let digest_hex = hex(&Sha256::digest(bytes));
    let mut remembered = shared.compiler.lock();
    if let Some(index) = remembered
        .iter()
        .position(|known| known.digest_hex == digest_hex)
    {
        let known = remembered.remove(index);
        remembered.push(Arc::clone(&known));
        return Ok(known);
    }
    // wit-component asserts what no compiler would write, and this file may be anything.
    let built = catch_unwind(AssertUnwindSafe(|| build(shared, bytes, digest_hex)));
    let built = built.unwrap_or_else(|_| {
        Err(LoadError::Malformed(
            "it brings the compiler down; see the log".to_owned(),
        ))
    });
    let compiled = Arc::new(built?);
    if remembered.len() == REMEMBERED_MAX {
        remembered.remove(0);
    }
    remembered.push(Arc::clone(&compiled));
    Ok(compiled)
}

fn build(shared: &Shared, bytes: &[u8], digest_hex: String) -> Result<Compiled, LoadError> {
    let component = wrap::component_bytes(bytes)?;
    let surface = inspect::inspect(&component)?;
    let started = Instant::now();
    let exports = link(shared, &component, &surface)?;
    Ok(Compiled {
        digest_hex,
        bytes: bytes.len() as u64,
        compile_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        wrapped: wrap::is_core_module(bytes),
        roles: surface.roles,
        imports: surface.imports,
        exports: Arc::new(exports),
    })
}

impl Compiler {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Compiled>>> {
        self.remembered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn link(shared: &Shared, component: &[u8], surface: &Surface) -> Result<Exports, LoadError> {
    let compiled = Component::from_binary(&shared.wasm_engine, component)
        .map_err(|error| LoadError::Compile(format!("{error:#}")))?;
    check_parts(&compiled)?;
    let linker = if surface.needs_wasi {
        &shared.wasi_linker
    } else {
        &shared.own_linker
    };
    let exports = linker
        .instantiate_pre(&compiled)
        .and_then(|pre| find_exports(pre, surface));
    exports.map_err(|error| LoadError::Link(format!("{error:#}")))
}

/// Refuses a component of which not every instance would find room. The pool itself counts core instances.
fn check_parts(component: &Component) -> Result<(), LoadError> {
    let needs = component
        .resources_required()
        .ok_or_else(|| LoadError::Link("it imports a core module".to_owned()))?;
    let (memories_max, tables_max) = (MEMORIES_PER_COMPONENT, TABLES_PER_COMPONENT);
    let (memories, tables) = (needs.num_memories, needs.num_tables);
    if memories <= memories_max && tables <= tables_max {
        return Ok(());
    }
    Err(LoadError::TooManyParts {
        memories,
        tables,
        memories_max,
        tables_max,
    })
}

fn find_exports(pre: InstancePre<GuestState>, surface: &Surface) -> wasmtime::Result<Exports> {
    let serves = |role| surface.roles.iter().any(|served| served.role == role);
    Ok(Exports {
        common: CommonIndices::new(&pre)?,
        adapter: serves(Role::Adapter)
            .then(|| AdapterPluginIndices::new(&pre))
            .transpose()?,
        template: serves(Role::Template)
            .then(|| TemplatePluginIndices::new(&pre))
            .transpose()?,
        image_policy: serves(Role::ImagePolicy)
            .then(|| ImagePolicyPluginIndices::new(&pre))
            .transpose()?,
        cache_strategy: serves(Role::CacheStrategy)
            .then(|| CacheStrategyPluginIndices::new(&pre))
            .transpose()?,
        pre,
    })
}

/// Tries a compiled file with its settings; what it does on trial touches nothing that is kept.
pub(crate) fn admit(
    shared: &Arc<Shared>,
    id: &str,
    compiled: Arc<Compiled>,
    settings: &PluginSettings,
    origin: Origin,
) -> Result<Arc<Plugin>, LoadError> {
    let core = |kept| {
        Arc::new(Core {
            id: id.to_owned(),
            revision: compiled.digest_hex.clone(),
            settings: settings.clone(),
            exports: Arc::clone(&compiled.exports),
            kept,
            shared: Arc::clone(shared),
        })
    };
    let on_trial = core(Arc::new(Kept::new(shared.bucket_limits())));
    let tried = try_apart(&on_trial, &compiled.roles)?;
    let core = core(shared.kept(id));
    Ok(Plugin::new(core, compiled, origin, tried))
}

/// Runs the trial on a thread of its own. WASI blocks on a runtime, which panics on a thread that runs
/// one already, and whoever loads may be such a thread; and a panic must cost this file only.
fn try_apart(core: &Arc<Core>, roles: &[ServedRole]) -> Result<Tried, LoadError> {
    thread::scope(|scope| {
        let trial = thread::Builder::new()
            .name("plugin-trial".to_owned())
            .spawn_scoped(scope, || trial::run(core, roles))
            .map_err(|error| LoadError::NoThread(error.to_string()))?;
        trial.join().unwrap_or_else(|panic| {
            let words = panic.downcast_ref::<&str>().copied();
            let words = words.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
            let words = words.unwrap_or("a panic without words");
            Err(LoadError::TrialPanicked(one_line(words, PANIC_BYTES_MAX)))
        })
    })
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}
