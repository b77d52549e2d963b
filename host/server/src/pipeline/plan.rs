//! What a generation asks for, against what this server does: every limit on tokens is here, those
//! on how they are drawn in `sampling`.

mod sampling;

use std::collections::HashSet;

pub(super) use sampling::seed_of;
use visor_engine::Sampling;
use visor_model::Prompt;
use visor_sandbox::{ErrorCode, Generation, Input, ToolChoice, ToolSpec};

use super::failure::Failure;
use crate::config::{Config, FormatsConfig};
use crate::services::ServedModel;

/// Most messages of one conversation.
const MESSAGES_MAX: usize = 1024;
/// Most parts of all its messages together.
const PARTS_MAX: usize = 4096;
/// Tokens that a message takes beside its text: something opens it and something closes it.
const MESSAGE_TOKENS_MIN: u32 = 2;
/// Most stop strings a client may give; the engine takes more, for those of the template. No key: the text is searched for each of
/// them, and no API of ours asks for as many.
const STOPS_MAX: usize = 64;
/// Longest stop string in bytes: that much text is held back while it may still match.
const STOP_BYTES_MAX: usize = 1024;

/// A generation whose wishes this server can fulfil.
#[derive(Debug, Clone)]
pub(super) struct Wish {
    /// How to sample.
    pub sampling: Sampling,
    /// Output tokens the client asked for, if it did.
    pub tokens_wanted: Option<u32>,
    /// What an error about the input's length names.
    pub input: &'static str,
    /// Whether an answer that does not fit is to be cut rather than refused.
    pub cut: bool,
    /// Strings that end the output.
    pub stop: Vec<String>,
}

/// Hint of an adapter: its clients give the most an answer may be, whatever fits.
const CUT: (&str, &str) = ("max-tokens", "at-most");

/// Checks a generation; refuses what would otherwise be left out silently.
pub(super) fn check(
    generation: &Generation,
    config: &Config,
    model: &ServedModel,
) -> Result<Wish, Failure> {
    if let Some(name) = generation
        .model
        .as_deref()
        .filter(|name| !model.answers_to(name))
    {
        let message = format!(
            "the model `{name}` does not exist; this server has `{}`",
            model.id
        );
        return Err(Failure::new(ErrorCode::NotFound, message).at("model"));
    }
    check_tools(generation, &config.formats)?;
    check_images(generation.images.len(), config)?;
    check_stops(&generation.stop)?;
    check_conversation(&generation.input)?;
    let mut extensions = generation.extensions.iter();
    Ok(Wish {
        sampling: sampling::check(&generation.sampling, &config.generation, model)?,
        tokens_wanted: generation.tokens_max,
        input: input_param(&generation.input),
        cut: extensions.any(|(key, value)| (key.as_str(), value.as_str()) == CUT),
        stop: generation.stop.clone(),
    })
}

/// What an input is called; an adapter whose clients call it otherwise says so in their words.
fn input_param(input: &Input) -> &'static str {
    match input {
        Input::Chat(_) => "messages",
        Input::Text(_) => "prompt",
    }
}

/// Refuses more tools than the operator allows, and those that cannot be told apart.
fn check_tools(generation: &Generation, limits: &FormatsConfig) -> Result<(), Failure> {
    let tools = &generation.tools;
    let refused = |message: String| Err(Failure::invalid(message).at("tools"));
    if tools.len() > limits.tools_max as usize {
        let (count, count_max) = (tools.len(), limits.tools_max);
        return refused(format!(
            "the request has {count} tools; {count_max} are allowed"
        ));
    }
    let bytes = |tool: &ToolSpec| tool.name.len() + tool.description.len() + tool.parameters.len();
    let bytes: usize = tools.iter().map(bytes).sum();
    if bytes as u64 > limits.tools_bytes_max {
        let bytes_max = limits.tools_bytes_max;
        return refused(format!(
            "the tools are {bytes} bytes; {bytes_max} are allowed"
        ));
    }
    let mut names = HashSet::new();
    if let Some(tool) = tools.iter().find(|tool| !names.insert(&tool.name)) {
        return refused(format!("two tools have the name `{}`", tool.name));
    }
    match &generation.tool_choice {
        ToolChoice::Named(name) if !names.contains(name) => {
            let message = format!("there is no tool `{name}`");
            Err(Failure::invalid(message).at("tool_choice"))
        }
        ToolChoice::Required if tools.is_empty() => {
            let message = "a call is required, and there are no tools";
            Err(Failure::invalid(message).at("tool_choice"))
        }
        _ => Ok(()),
    }
}

/// Refuses more pictures than a request may have.
pub(super) fn check_images(count: usize, config: &Config) -> Result<(), Failure> {
    let count_max = config.images.count_max;
    if count as u64 > u64::from(count_max) {
        let message = format!("the request has {count} images; {count_max} are allowed");
        return Err(Failure::new(ErrorCode::TooLarge, message).at("messages"));
    }
    Ok(())
}

/// Refuses conversations of more pieces than any template can be asked to render.
fn check_conversation(input: &Input) -> Result<(), Failure> {
    let Input::Chat(messages) = input else {
        return Ok(());
    };
    let parts: usize = messages.iter().map(|message| message.parts.len()).sum();
    let limits = [
        ("messages", messages.len(), MESSAGES_MAX),
        ("parts", parts, PARTS_MAX),
    ];
    for (what, count, count_max) in limits {
        if count > count_max {
            let message = format!("the conversation has {count} {what}; {count_max} are allowed");
            return Err(Failure::new(ErrorCode::TooLarge, message).at("messages"));
        }
    }
    Ok(())
}

fn check_stops(stops: &[String]) -> Result<(), Failure> {
    if stops.len() > STOPS_MAX {
        let message = format!("{} stop strings; {STOPS_MAX} are allowed", stops.len());
        return Err(Failure::invalid(message).at("stop"));
    }
    if stops
        .iter()
        .any(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX)
    {
        let message = format!("a stop string has 1 to {STOP_BYTES_MAX} bytes");
        return Err(Failure::invalid(message).at("stop"));
    }
    Ok(())
}

/// Most tokens a prompt may take: the operator's limit, and room for one token of answer.
pub(super) fn prompt_tokens_max(config: &Config, model: &ServedModel) -> u32 {
    let context = model.context_tokens.saturating_sub(1);
    match config.generation.prompt_tokens_max {
        0 => context,
        limit => limit.min(context),
    }
}

/// Tokens to be left for the answer when pictures are cut into crops: what is asked for, and no more than one that does not say
/// gets. Who asks for a long answer does not mean to see less.
pub(super) fn answer_room(wish: &Wish, config: &Config) -> u32 {
    let wanted = wish.tokens_wanted.unwrap_or(1);
    wanted.min(config.generation.max_tokens).max(1)
}

/// Refuses an input that cannot fit however it is rendered, before a template is bothered with it.
///
/// # Errors
/// More tokens than a prompt may have; all numbers are in the message.
pub(super) fn check_least(input: &Input, text_tokens: u32, tokens_max: u32) -> Result<(), Failure> {
    let messages = match input {
        Input::Chat(messages) => u32::try_from(messages.len()).unwrap_or(u32::MAX),
        Input::Text(_) => 0,
    };
    let least = text_tokens.saturating_add(messages.saturating_mul(MESSAGE_TOKENS_MIN));
    if least <= tokens_max {
        return Ok(());
    }
    let message = format!(
        "the prompt is too long: at least {least} tokens of text, without those of images; {tokens_max} fit beside one token of answer"
    );
    Err(Failure::new(ErrorCode::ContextOverflow, message).at(input_param(input)))
}

/// Output tokens a prompt leaves room for: what was asked, or the operator's default cut to fit.
///
/// # Errors
/// A prompt, or a prompt and the answer asked for, beyond the context; all numbers are in the message.
pub(super) fn output_tokens(
    prompt: &Prompt,
    wish: &Wish,
    config: &Config,
    model: &ServedModel,
) -> Result<u32, Failure> {
    let prompt_tokens = u32::try_from(prompt.ids.len()).unwrap_or(u32::MAX);
    let text_tokens = prompt_tokens.saturating_sub(prompt.image_tokens);
    let sizes = format!(
        "{prompt_tokens} tokens ({} of images, {text_tokens} of text)",
        prompt.image_tokens
    );
    let prompt_max = prompt_tokens_max(config, model);
    if prompt_tokens > prompt_max {
        let message = format!(
            "the prompt is too long: it is {sizes}; {prompt_max} fit beside one token of answer"
        );
        return Err(Failure::new(ErrorCode::ContextOverflow, message).at(wish.input));
    }
    let room = model.context_tokens - prompt_tokens;
    let limit = config.generation.max_tokens_limit;
    let Some(wanted) = wish.tokens_wanted else {
        return Ok(config.generation.max_tokens.min(limit).min(room).max(1));
    };
    let granted = wanted.min(limit);
    if granted > room && wish.cut {
        return Ok(room);
    }
    if granted > room {
        let context = model.context_tokens;
        let message = format!(
            "this model's maximum context length is {context} tokens, prompt and answer together; the prompt is \
             {sizes}, and {wanted} tokens of answer were asked for where {room} are possible"
        );
        return Err(Failure::new(ErrorCode::ContextOverflow, message).at("max_tokens"));
    }
    Ok(granted)
}

#[cfg(test)]
mod tests;
