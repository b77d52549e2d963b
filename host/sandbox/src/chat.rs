//! Messages, usage and the other plain data that several roles share (`wit/package.wit`, `types`).

/// Key and value strings; unknown keys are ignored on both sides.
pub type Extensions = Vec<(String, String)>;

/// Who speaks in a chat message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChatRole {
    /// Instructions of the operator or the application.
    System,
    /// The person asking.
    User,
    /// The model.
    Assistant,
    /// The result of a tool.
    Tool,
    /// A role that only some models know.
    Other(String),
}

/// A call of a tool, made by the assistant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// Identifier that the result refers to.
    pub id: String,
    /// Name of the tool.
    pub name: String,
    /// Arguments as JSON text.
    pub arguments: String,
}

/// A tool the model may call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolSpec {
    /// Name of the tool.
    pub name: String,
    /// What it does, for the model to read.
    pub description: String,
    /// JSON Schema of its arguments.
    pub parameters: String,
}

/// A piece of a chat message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Plain text.
    Text(String),
    /// Index into the image list of the same request.
    Image(u32),
    /// A call the assistant made.
    ToolCall(ToolCall),
    /// The result of an earlier call.
    ToolResult {
        /// Identifier of that call.
        id: String,
        /// What the tool answered.
        content: String,
    },
}

/// One chat message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: ChatRole,
    /// What is said, in order.
    pub parts: Vec<Part>,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token or stop string.
    Stop,
    /// The token limit.
    Length,
    /// The model calls tools.
    ToolCalls,
    /// The server ended it early.
    Cancelled,
}

/// Token counts of one generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Prompt tokens, images included.
    pub prompt_tokens: u32,
    /// Image tokens among them.
    pub image_tokens: u32,
    /// Prompt tokens that came from a cache.
    pub cached_tokens: u32,
    /// Generated tokens.
    pub completion_tokens: u32,
}

/// The longest prefix of `text` with at most `bytes_max` bytes that ends between characters.
pub(crate) fn cut(text: &str, bytes_max: usize) -> &str {
    if text.len() <= bytes_max {
        return text;
    }
    let mut end = bytes_max;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// The same as one line: control characters become spaces, so that a plugin's words cannot forge
/// lines of a log.
pub(crate) fn one_line(text: &str, bytes_max: usize) -> String {
    cut(text, bytes_max)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
