//! Requests, steps and events of an exchange, as plain data.

use std::sync::Arc;

use bytes::Bytes;

use crate::adapter::lifted::Lifted;
use crate::chat::{Extensions, FinishReason, Message, ToolCall, ToolSpec, Usage};
use crate::error::GuestError;

/// Immutable bytes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// Decoded content.
    pub bytes: Bytes,
    /// Media type, from the data URL, the part header or the leading bytes.
    pub content_type: String,
}

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Bytes of this request.
    Blob(Blob),
    /// A URL for the host to resolve under its policy.
    Url(String),
}

/// One part of a `multipart/form-data` body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormPart {
    /// Field name.
    pub name: String,
    /// File name, if the part is a file.
    pub filename: Option<String>,
    /// Its bytes.
    pub content: Blob,
}

/// The request an exchange is started with.
#[derive(Clone, Debug)]
pub struct HttpRequest {
    /// Upper-case method.
    pub method: String,
    /// Path below the mount prefix, with its leading slash.
    pub path: String,
    /// Values of the `{name}` segments.
    pub path_params: Vec<(String, String)>,
    /// Decoded query parameters.
    pub query: Vec<(String, String)>,
    /// Header names in lower case, and values.
    pub headers: Vec<(String, String)>,
    /// Who is calling, none for anonymous.
    pub principal: Option<String>,
    /// The host's request id.
    pub id: String,
    /// Body as text, long base64 strings replaced by `<marker>:<n>`.
    pub text: Result<String, GuestError>,
    /// The random marker, and the strings themselves.
    pub lifted: Arc<Lifted>,
    /// What was lifted out of the body, by `n`.
    pub blobs: Vec<Blob>,
    /// The undecoded body.
    pub raw: Blob,
    /// Parts of a multipart body.
    pub form: Vec<FormPart>,
}

/// A path that an adapter serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Upper-case method.
    pub method: String,
    /// Literal segments, `{name}`, or a final `{name...}`.
    pub path: String,
    /// Largest body in bytes, beside the operator's limit.
    pub body_bytes_max: Option<u64>,
}

/// A whole response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// 200 to 599.
    pub status: u16,
    /// Legal names and values, none that belongs to the host (`content-length` and the like).
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

/// Head of a response whose body follows in pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// 200 to 599.
    pub status: u16,
    /// Legal names and values, none that belongs to the host.
    pub headers: Vec<(String, String)>,
    /// Whether pieces are written as they come, with keep-alives between them.
    pub incremental: bool,
}

/// What is to be continued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Goes through the prompt template.
    Chat(Vec<Message>),
    /// Used as it is.
    Text(String),
}

/// Sampling wishes; none takes the operator's default. All numbers are finite.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampling {
    /// Softmax temperature.
    pub temperature: Option<f32>,
    /// Nucleus size, 0 to 1.
    pub top_p: Option<f32>,
    /// Candidates kept.
    pub top_k: Option<u32>,
    /// Least probability, relative to the best.
    pub min_p: Option<f32>,
    /// Divides logits of tokens seen.
    pub repetition_penalty: Option<f32>,
    /// Subtracted from logits of tokens seen.
    pub presence_penalty: Option<f32>,
    /// Subtracted once per occurrence.
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the random numbers.
    pub seed: Option<u64>,
    /// Alternatives to report per token.
    pub logprobs: Option<u8>,
}

/// Shape of the output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutputFormat {
    /// Free text.
    Text,
    /// A JSON object.
    Json,
    /// JSON that fits a schema.
    JsonSchema(String),
    /// Text that matches a regular expression.
    Regex(String),
}

/// Whether the model calls its tools.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ToolChoice {
    /// It answers or calls.
    #[default]
    Auto,
    /// It calls.
    Required,
    /// It calls this one, once.
    Named(String),
}

/// One wish of an adapter to the model.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Id or alias; none takes the route's default.
    pub model: Option<String>,
    /// What to continue.
    pub input: Input,
    /// Images, in the order the input refers to.
    pub images: Vec<Source>,
    /// How to sample.
    pub sampling: Sampling,
    /// Most tokens to generate; 0 counts the prompt only.
    pub tokens_max: Option<u32>,
    /// Strings that end the output.
    pub stop: Vec<String>,
    /// Shape of the output.
    pub format: OutputFormat,
    /// Tools the model may call.
    pub tools: Vec<ToolSpec>,
    /// Whether it does.
    pub tool_choice: ToolChoice,
    /// Whether it may call several at once.
    pub parallel_tools: bool,
    /// Alternatives, at least 1.
    pub count: u32,
    /// Hints for the other roles.
    pub extensions: Extensions,
}

/// What `start` wants next.
#[derive(Clone, Debug)]
pub enum Step {
    /// Send this; done.
    Respond(Response),
    /// Run these and feed their events to `advance`.
    Generate(Head, Vec<Generation>),
}

/// A token the model might say.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenChance {
    /// Its id.
    pub token: u32,
    /// What it adds to the text, perhaps a piece of a character.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// A token the model said.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenInfo {
    /// The token.
    pub chosen: TokenChance,
    /// The likeliest in its place, the likeliest first.
    pub alternatives: Vec<TokenChance>,
}

/// What happened to a generation. `generation` counts over all steps of the exchange.
#[derive(Clone, Debug)]
pub enum Event {
    /// Admitted and preprocessed.
    Started {
        /// Which generation.
        generation: u32,
        /// Prompt counts.
        usage: Usage,
    },
    /// Whole characters of output.
    Delta {
        /// Which generation.
        generation: u32,
        /// Which alternative.
        choice: u32,
        /// New text.
        text: String,
        /// Its tokens, if asked for.
        tokens: Vec<TokenInfo>,
    },
    /// A tool call of the model.
    ToolCall {
        /// Which generation.
        generation: u32,
        /// Which alternative.
        choice: u32,
        /// The call.
        call: ToolCall,
    },
    /// An alternative ended.
    Finish {
        /// Which generation.
        generation: u32,
        /// Which alternative.
        choice: u32,
        /// Why.
        reason: FinishReason,
        /// The stop string, if one matched.
        matched_stop: Option<String>,
    },
    /// The last event of a generation.
    Done {
        /// Which generation.
        generation: u32,
        /// All counts.
        usage: Usage,
        /// Microseconds in the queue.
        queue_us: u64,
        /// Microseconds of vision and prefill.
        prefill_us: u64,
        /// Microseconds of decoding.
        decode_us: u64,
    },
    /// The last event of a generation that failed.
    Failed {
        /// Which generation.
        generation: u32,
        /// What to tell the client.
        error: GuestError,
    },
}

/// What an adapter wants after some events.
#[derive(Clone, Debug)]
pub enum Next {
    /// More events.
    More,
    /// The response is complete.
    End,
    /// Run these too.
    Generate(Vec<Generation>),
}

/// How the deltas of one choice are written that are text and nothing else.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Which generation.
    pub generation: u32,
    /// Which alternative.
    pub choice: u32,
    /// What stands before the text, which is written as a JSON string.
    pub before: Vec<u8>,
    /// What stands behind it.
    pub after: Vec<u8>,
}

/// The answer of `advance`.
#[derive(Clone, Debug)]
pub struct Progress {
    /// Bytes to write now; may be empty.
    pub bytes: Vec<u8>,
    /// What follows.
    pub next: Next,
    /// How deltas may be written up to the next `advance`.
    pub frame: Option<Frame>,
}
