//! The trial run: a throw-away instance answers one plain call of everything it serves.

use std::sync::Arc;

use crate::adapter::exchange;
use crate::call::{Guest, Halt};
use crate::chat::{ChatRole, Message, Part, one_line};
use crate::error::{CallError, ErrorCode, GuestError, Issue, LoadError};
use crate::image_policy::{self, ImageContext, ImageOp, ImageSource, Layout, PixelBuffer};
use crate::load::schema;
use crate::options::{Function, Role};
use crate::plugin::{Core, PluginInfo, ServedRole, Tried};
use crate::services::{ModelFacts, SampleModel};
use crate::strategy::instance::StrategyInstance;
use crate::strategy::{Lookup, Tier};
use crate::template::{self, Conversation};

const TEXT_BYTES_MAX: usize = 1024;
const SCHEMA_BYTES_MAX: usize = 64 << 10;
const ISSUES_MAX: usize = 20;
const SAMPLE_CAPACITY_BYTES: u64 = 64 << 20;

/// Runs `core` through its roles.
pub(crate) fn run(core: &Arc<Core>, roles: &[ServedRole]) -> Result<Tried, LoadError> {
    let mut tried = Tried::default();
    // The roles are not empty: a component without one is refused before it is compiled.
    if let Some(first) = roles.first() {
        tried.info = describe(core, first.role)?;
        configure(core, first.role, &tried.info)?;
    }
    for served in roles {
        match served.role {
            Role::Adapter => {
                tried.routes = exchange::routes(core).map_err(failed)?;
                exchange::render_error(core, &sample_error(), false).map_err(failed)?;
            }
            Role::Template => {
                template::render(core, sample_conversation(core)).map_err(failed)?;
            }
            Role::ImagePolicy => {
                let context = sample_context(core);
                image_policy::prepare(core, Arc::new(SamplePicture), context).map_err(failed)?;
            }
            Role::CacheStrategy => try_strategy(core).map_err(failed)?,
        }
    }
    Ok(tried)
}

/// A trial is made of requests that nobody may refuse.
fn failed(error: CallError) -> LoadError {
    match error {
        CallError::Fault(fault) => LoadError::Trial(fault),
        CallError::Refused(refusal) => {
            LoadError::TrialRefused(one_line(&refusal.message, TEXT_BYTES_MAX))
        }
    }
}

fn describe(core: &Arc<Core>, role: Role) -> Result<PluginInfo, LoadError> {
    let mut guest = Guest::build(core, role, String::new()).map_err(failed)?;
    let info = guest.call(Function::Describe, |store, instance| {
        let common = core.exports.common.load(&mut *store, instance)?;
        Ok(common.visor_plugin_lifecycle().call_describe(store)?)
    });
    let info = info.map_err(failed)?;
    let short = |text: String| one_line(&text, TEXT_BYTES_MAX);
    Ok(PluginInfo {
        name: short(info.name),
        version: short(info.version),
        description: short(info.description),
        config_schema: info
            .config_schema
            .filter(|schema| schema.len() <= SCHEMA_BYTES_MAX),
    })
}

fn configure(core: &Arc<Core>, role: Role, info: &PluginInfo) -> Result<(), LoadError> {
    let config = &core.settings.config_json;
    if let Some(schema) = &info.config_schema {
        let issues = schema::check(schema, config);
        if !issues.is_empty() {
            return Err(LoadError::Configuration(issues));
        }
    }
    let mut guest = Guest::build(core, role, String::new()).map_err(failed)?;
    let answer = guest.call(Function::Configure, |store, instance| {
        let common = core.exports.common.load(&mut *store, instance)?;
        let answer = common
            .visor_plugin_lifecycle()
            .call_configure(store, config)?;
        Ok::<_, Halt>(answer)
    });
    answer.map_err(failed)?.map_err(|issues| {
        let short = |text: &str| one_line(text, TEXT_BYTES_MAX);
        let issues = issues.iter().take(ISSUES_MAX);
        let issues = issues.map(|issue| Issue {
            path: short(&issue.path),
            message: short(&issue.message),
        });
        LoadError::Configuration(issues.collect())
    })
}

fn try_strategy(core: &Arc<Core>) -> Result<(), CallError> {
    let mut instance = StrategyInstance::open(core)?;
    for tier in [Tier::Prefix, Tier::Embedding, Tier::Pixels, Tier::Response] {
        instance.create(tier, SAMPLE_CAPACITY_BYTES)?;
    }
    instance.scope(Lookup {
        principal: None,
        model: sample_model(core).id(),
        route: "/".to_owned(),
        prompt_tokens: 100,
        image_count: 1,
        temperature: 0.0,
        extensions: Vec::new(),
    })?;
    Ok(())
}

fn sample_model(core: &Arc<Core>) -> Arc<dyn ModelFacts> {
    let models = core.shared.services.models();
    models
        .into_iter()
        .next()
        .unwrap_or_else(|| Arc::new(SampleModel))
}

fn sample_error() -> GuestError {
    GuestError::new(ErrorCode::InvalidRequest, "a sample of an error")
}

fn sample_conversation(core: &Arc<Core>) -> Conversation {
    let model = sample_model(core);
    let parts = vec![
        Part::Image(0),
        Part::Text("What is in this picture?".to_owned()),
    ];
    Conversation {
        messages: vec![Message {
            role: ChatRole::User,
            parts,
        }],
        tools: Vec::new(),
        image_tokens: vec![model.image_tokens(1, 1)],
        budget_tokens: model.context_tokens(),
        open_turn: true,
        extensions: Vec::new(),
        model,
        request_id: String::new(),
    }
}

fn sample_context(core: &Arc<Core>) -> ImageContext {
    // The sample model takes images; a real one may be text only.
    let model = Some(sample_model(core)).filter(|model| model.vision().is_some());
    let model = model.unwrap_or_else(|| Arc::new(SampleModel));
    ImageContext {
        index: 0,
        count: 1,
        budget_tokens: model.context_tokens(),
        extensions: Vec::new(),
        model,
        request_id: String::new(),
    }
}

/// 640x480 pixels of nothing in particular.
struct SamplePicture;

impl ImageSource for SamplePicture {
    fn size_px(&self) -> (u32, u32) {
        (640, 480)
    }

    fn stored_size_px(&self) -> (u32, u32) {
        (640, 480)
    }

    fn layout(&self) -> Layout {
        Layout::Rgb
    }

    fn format(&self) -> String {
        "png".to_owned()
    }

    fn digest_hex(&self) -> String {
        "0".repeat(64)
    }

    /// Nothing is read; what is written is counted by whoever asks.
    fn work_px(&self, _: &[ImageOp]) -> Result<u64, GuestError> {
        Ok(0)
    }

    /// Grey of the right size: what the chain would do to nothing in particular.
    fn pixels(&self, ops: &[ImageOp]) -> Result<PixelBuffer, GuestError> {
        let (mut size, mut layout) = (self.size_px(), Layout::Rgb);
        for op in ops {
            match *op {
                ImageOp::Resize {
                    width_px,
                    height_px,
                    ..
                }
                | ImageOp::Crop {
                    width_px,
                    height_px,
                    ..
                }
                | ImageOp::Pad {
                    width_px,
                    height_px,
                    ..
                } => size = (width_px, height_px),
                ImageOp::Rotate { quarters } if quarters % 2 == 1 => size = (size.1, size.0),
                ImageOp::Convert(to) => layout = to,
                _ => {}
            }
        }
        let samples = size.0 as usize * size.1 as usize * layout.channels();
        Ok(PixelBuffer {
            width_px: size.0,
            height_px: size.1,
            layout,
            samples: vec![128; samples],
        })
    }
}
