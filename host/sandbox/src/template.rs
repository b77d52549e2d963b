//! Role template: a conversation becomes typed prompt segments.

use std::sync::Arc;

use wasmtime::component::Resource;

use crate::bindings::template::exports::visor::plugin::template as wit;
use crate::call::{Guest, Halt, check_text};
use crate::chat::{Extensions, Message, Part, ToolSpec};
use crate::error::CallError;
use crate::host::model::ModelHandle;
use crate::options::{Function, Role};
use crate::plugin::Core;
use crate::services::ModelFacts;

/// Stop strings of one prompt.
/// No key: they are the template's own, and the client's come beside them.
const STOPS_MAX: usize = 64;
/// Longest text around a tool call, in bytes.
const SYNTAX_BYTES_MAX: usize = 64;

/// What a template renders.
pub struct Conversation {
    /// The messages, in order.
    pub messages: Vec<Message>,
    /// Tools the model may call.
    pub tools: Vec<ToolSpec>,
    /// Prompt tokens of each image after preprocessing; the length is the image count.
    pub image_tokens: Vec<u32>,
    /// Tokens the prompt may take.
    pub budget_tokens: u32,
    /// Whether to open the assistant's turn at the end.
    pub open_turn: bool,
    /// Hints of the adapter.
    pub extensions: Extensions,
    /// The model that will read the prompt.
    pub model: Arc<dyn ModelFacts>,
    /// The host's request id, for the log.
    pub request_id: String,
}

/// A piece of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// Never read as control tokens.
    Text(String),
    /// Control tokens as the tokenizer spells them.
    Control(String),
    /// The place of image `index`.
    Image(u32),
}

/// How the model writes tool calls: `open`, a call, `between` and a call for each further one, `close`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallSyntax {
    /// What calls begin with, and no other answer does.
    pub open: String,
    /// What stands between two calls.
    pub between: String,
    /// What they end with.
    pub close: String,
}

/// The answer of a template. Every image of the conversation appears, and none beyond.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptSegments {
    /// The prompt.
    pub segments: Vec<Segment>,
    /// More strings that end the output.
    pub stop: Vec<String>,
    /// Control tokens that end the output.
    pub stop_control: Vec<String>,
    /// Text the answer begins with.
    pub prefill: Option<String>,
    /// How the model writes tool calls, if it can.
    pub calls: Option<CallSyntax>,
    /// Hints for other roles.
    pub extensions: Extensions,
}

/// Renders a conversation in a fresh instance.
pub(crate) fn render(
    core: &Arc<Core>,
    conversation: Conversation,
) -> Result<PromptSegments, CallError> {
    check_text(core, Role::Template, text_bytes(&conversation))?;
    let mut guest = Guest::open(core, Role::Template, conversation.request_id.clone())?;
    let image_count = conversation.image_tokens.len();
    let segments_max = core.shared.options.segments_max;
    guest.call(Function::Render, |store, instance| {
        let indices = core.exports.template.as_ref();
        let indices = indices.ok_or_else(|| Halt::Broken("is no template".to_owned()))?;
        let bindings = indices.load(&mut *store, instance)?;
        let table = &mut store.data_mut().table;
        let model = table.push(ModelHandle {
            facts: Arc::clone(&conversation.model),
        })?;
        let conversation = table.push(conversation)?;
        let (conversation, model) = (
            Resource::new_borrow(conversation.rep()),
            Resource::new_borrow(model.rep()),
        );
        let template = bindings.visor_plugin_template();
        let answer = template.call_render(store, conversation, model)?;
        let prompt = PromptSegments::from(answer.map_err(|e| Halt::Refused(e.into()))?);
        check(&prompt, image_count, segments_max).map_err(Halt::Broken)?;
        Ok(prompt)
    })
}

fn text_bytes(conversation: &Conversation) -> usize {
    let parts = conversation
        .messages
        .iter()
        .flat_map(|message| &message.parts);
    let parts = parts.map(|part| match part {
        Part::Text(text) => text.len(),
        Part::Image(_) => 0,
        Part::ToolCall(call) => call.name.len() + call.arguments.len(),
        Part::ToolResult { id, content } => id.len() + content.len(),
    });
    let tools = conversation.tools.iter();
    let tools = tools.map(|tool| tool.name.len() + tool.description.len() + tool.parameters.len());
    parts.sum::<usize>() + tools.sum::<usize>()
}

impl From<wit::Prompt> for PromptSegments {
    fn from(prompt: wit::Prompt) -> Self {
        Self {
            segments: prompt.segments.into_iter().map(Segment::from).collect(),
            stop: prompt.stop,
            stop_control: prompt.stop_control,
            prefill: prompt.prefill,
            calls: prompt.calls.map(CallSyntax::from),
            extensions: prompt.extensions,
        }
    }
}

impl From<wit::CallSyntax> for CallSyntax {
    fn from(syntax: wit::CallSyntax) -> Self {
        Self {
            open: syntax.open,
            between: syntax.between,
            close: syntax.close,
        }
    }
}

impl From<wit::Segment> for Segment {
    fn from(segment: wit::Segment) -> Self {
        match segment {
            wit::Segment::Text(text) => Self::Text(text),
            wit::Segment::Control(text) => Self::Control(text),
            wit::Segment::Image(index) => Self::Image(index),
        }
    }
}

fn check(prompt: &PromptSegments, image_count: usize, segments_max: usize) -> Result<(), String> {
    let segments = prompt.segments.len();
    if segments == 0 || segments > segments_max {
        return Err(format!(
            "{segments} segments; 1 to {segments_max} are possible"
        ));
    }
    for (what, stops) in [
        ("stop", &prompt.stop),
        ("stop-control", &prompt.stop_control),
    ] {
        if stops.len() > STOPS_MAX || stops.iter().any(String::is_empty) {
            return Err(format!(
                "`{what}` has over {STOPS_MAX} strings or an empty one"
            ));
        }
    }
    if let Some(syntax) = &prompt.calls {
        check_syntax(syntax)?;
    }
    let mut shown = vec![false; image_count];
    for segment in &prompt.segments {
        if let Segment::Image(index) = segment {
            let place = shown.get_mut(*index as usize);
            *place.ok_or_else(|| {
                format!("places image {index}; the conversation has {image_count}")
            })? = true;
        }
    }
    match shown.iter().position(|shown| !shown) {
        Some(index) => Err(format!("leaves out image {index} of {image_count}")),
        None => Ok(()),
    }
}

/// An opening tells calls from text. Something stands between two of them, or nobody could say where
/// one ends. Both are held back from a client until they are complete.
fn check_syntax(syntax: &CallSyntax) -> Result<(), String> {
    let CallSyntax {
        open,
        between,
        close,
    } = syntax;
    let bytes = open.len().max(between.len()).max(close.len());
    if open.is_empty() || between.is_empty() || bytes > SYNTAX_BYTES_MAX {
        return Err(format!(
            "`calls` opens or separates with nothing, or has over {SYNTAX_BYTES_MAX} bytes"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(segments: Vec<Segment>) -> PromptSegments {
        PromptSegments {
            segments,
            stop: Vec::new(),
            stop_control: Vec::new(),
            prefill: None,
            calls: None,
            extensions: Vec::new(),
        }
    }

    #[test]
    fn every_image_appears_and_none_beyond() {
        let text = || Segment::Text("x".to_owned());
        check(&prompt(vec![text()]), 0, 10).unwrap();
        check(
            &prompt(vec![Segment::Image(1), text(), Segment::Image(0)]),
            2,
            10,
        )
        .unwrap();
        assert!(check(&prompt(vec![Segment::Image(0)]), 2, 10).is_err());
        assert!(check(&prompt(vec![Segment::Image(u32::MAX)]), 1, 10).is_err());
        assert!(check(&prompt(vec![text()]), 1, 10).is_err());
    }

    #[test]
    fn a_prompt_has_some_segments_and_not_too_many() {
        assert!(check(&prompt(Vec::new()), 0, 10).is_err());
        assert!(check(&prompt(vec![Segment::Image(0); 11]), 0, 10).is_err());
        let empty_stop = PromptSegments {
            stop: vec![String::new()],
            ..prompt(vec![Segment::Text("x".to_owned())])
        };
        assert!(check(&empty_stop, 0, 10).is_err());
    }

    #[test]
    fn calls_can_be_told_from_text_and_from_each_other() {
        let with = |open: &str, between: &str, close: &str| PromptSegments {
            calls: Some(CallSyntax {
                open: open.to_owned(),
                between: between.to_owned(),
                close: close.to_owned(),
            }),
            ..prompt(vec![Segment::Text("x".to_owned())])
        };
        check(&with("call[", ", ", "]"), 0, 10).unwrap();
        check(&with("call:", "\n", ""), 0, 10).unwrap();
        assert!(check(&with("", ", ", "]"), 0, 10).is_err());
        assert!(check(&with("call[", "", "]"), 0, 10).is_err());
        assert!(check(&with(&"x".repeat(65), ", ", "]"), 0, 10).is_err());
    }
}
