//! What an answer may look like: JSON, JSON that fits a schema, text that matches a regular expression, calls of tools. A wish
//! becomes a grammar that the engine follows.
//!
//! The only room that knows llguidance, whose types end here. A schema is a stranger's program: it is compiled with so much work
//! and time and no more, and every step of following it has a limit, too, for that is the engine's thread. Nothing is ever fetched:
//! a `$ref` to anywhere but the schema itself is an error.
//!
//! `calls`: tools as a grammar; `vocabulary`: the model's tokens as bytes; `compile`: a grammar, in time; `kept`: those of before;
//! `follow`: one answer.

mod calls;
mod compile;
mod follow;
mod kept;
mod vocabulary;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use llguidance::api::TopLevelGrammar;
use serde_json::{Map, Value, json};
use visor_engine::Grammar;
use visor_model::Tokenizer;
use visor_sandbox::{OutputFormat, ToolSpec};

use crate::calls::Calls;
use crate::config::FormatsConfig;
use compile::Places;
use kept::Kept;
pub use kept::KeptStats;
use vocabulary::Vocabulary;

/// What may stand between two tokens of JSON: one blank, as after a colon. Of line breaks and indents a small model would put as many
/// as it may, and each takes a token; who wants them can have them from any printer.
const BLANK: &str = r"\x20";
/// Least common multiple of all `multipleOf` in a schema, decimal points left out: what a number leaves when it is divided is kept
/// track of digit by digit, and the library's limits on work do not count that.
const MULTIPLE_MAX: u64 = 1000;
/// Largest magnitude of a number that an answer is to repeat: 2^53.
const LITERAL_MAX: f64 = 9_007_199_254_740_992.0;
/// Longest explanation a client is given, in bytes; some repeat the schema.
const MESSAGE_BYTES_MAX: usize = 400;

/// Why there is no grammar; all of them but [`Self::Busy`] are the client's to change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Over the operator's limit.
    #[error("the format is {bytes} bytes; {bytes_max} are allowed")]
    TooLarge {
        /// Of the schema or the expression.
        bytes: usize,
        /// What is allowed.
        bytes_max: u64,
    },
    /// Over the operator's limit on time. It is the client's like the limits on work, which come first on a machine that is not busy.
    #[error("the format took more than {compile_ms_max} ms to compile")]
    Slow {
        /// What is allowed.
        compile_ms_max: u64,
    },
    /// As many are compiled at once as may be.
    #[error("too many formats are being compiled already")]
    Busy,
    /// Not understood, too much work, or nothing fits it.
    #[error("the format cannot be used: {0}")]
    Unusable(String),
    /// The answer begins with a text that does not fit.
    #[error("the format does not allow what the answer is to begin with")]
    Beginning,
    /// The parameters of a tool.
    #[error("the parameters of the tool `{name}` cannot be used: {why}")]
    Tool {
        /// Its number.
        index: usize,
        /// Its name.
        name: String,
        /// What is wrong with them.
        why: String,
    },
}

impl FormatError {
    /// The same, of the parameters of a tool.
    fn of_tool(self, index: usize, tool: &ToolSpec) -> Self {
        let why = match self {
            Self::Unusable(why) | Self::Tool { why, .. } => why,
            Self::TooLarge { .. } | Self::Slow { .. } | Self::Busy | Self::Beginning => {
                self.to_string()
            }
        };
        let name = tool.name.clone();
        Self::Tool { index, name, why }
    }
}

/// Where an answer begins and ends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bounds {
    /// Text the answer begins with, which the model does not say.
    pub prefill: Option<String>,
    /// As in [`visor_engine::GenerateRequest`].
    pub continues: bool,
    /// Tokens that end it.
    pub stop_ids: Vec<u32>,
}

/// All that a grammar depends on, beside the model.
#[derive(Debug, PartialEq, Eq)]
struct Wish {
    format: OutputFormat,
    follow: Follow,
    calls: Option<Calls>,
    bounds: Bounds,
    limits: FormatsConfig,
}

impl Wish {
    /// Memory it takes, in bytes, but for what is the same size in all of them.
    fn bytes(&self) -> u64 {
        let tools = self.calls.iter().flat_map(|calls| &calls.tools);
        let tools = tools.map(size_of_val);
        let prefill = self.bounds.prefill.as_ref().map_or(0, String::len);
        (size_of_val(self) + tools.sum::<usize>() + prefill + self.text_bytes()) as u64
    }

    /// What the client wrote, in bytes.
    fn text_bytes(&self) -> usize {
        let format = match &self.format {
            OutputFormat::Text | OutputFormat::Json => 0,
            OutputFormat::JsonSchema(text) | OutputFormat::Regex(text) => text.len(),
        };
        let tools = self.calls.iter().flat_map(|calls| &calls.tools);
        let tools =
            tools.map(|tool| tool.name.len() + tool.description.len() + tool.parameters.len());
        format + tools.sum::<usize>()
    }
}

/// Compiles formats for one model.
#[derive(Debug)]
pub struct Formats {
    tokenizer: Arc<Tokenizer>,
    /// Tokens that end an answer whoever asks.
    stop_ids: Vec<u32>,
    /// Made for the first that asks: most servers are never asked.
    vocabulary: OnceLock<Result<Arc<Vocabulary>, String>>,
    places: Arc<Places>,
    kept: Kept,
    compiled: AtomicU64,
}

impl Formats {
    /// For a model's tokens; nothing is computed yet.
    pub fn new(tokenizer: Arc<Tokenizer>, stop_ids: Vec<u32>) -> Self {
        Self {
            tokenizer,
            stop_ids,
            vocabulary: OnceLock::new(),
            places: Arc::default(),
            kept: Kept::default(),
            compiled: AtomicU64::new(0),
        }
    }

    /// The grammar of a format, followed so far, and of tools, compiled or kept from before; none for free text without any. Blocks
    /// for as long as compiling may take: not for the engine's thread.
    ///
    /// # Errors
    /// What is wrong with the format, or with a tool.
    pub fn compile(
        &self,
        (format, follow): (&OutputFormat, Follow),
        calls: Option<&Calls>,
        bounds: Bounds,
        limits: &FormatsConfig,
    ) -> Result<Option<Arc<dyn Grammar>>, FormatError> {
        let text = match format {
            OutputFormat::Text if calls.is_none() => return Ok(None),
            OutputFormat::Text | OutputFormat::Json => "",
            OutputFormat::JsonSchema(text) | OutputFormat::Regex(text) => text,
        };
        if text.len() as u64 > limits.bytes_max {
            return Err(FormatError::TooLarge {
                bytes: text.len(),
                bytes_max: limits.bytes_max,
            });
        }
        let wish = Wish {
            format: format.clone(),
            follow,
            calls: calls.cloned(),
            bounds,
            limits: limits.clone(),
        };
        if let Some(grammar) = self.kept.find(&wish) {
            return Ok(Some(Arc::new(grammar)));
        }
        let wish = Arc::new(wish);
        self.compiled.fetch_add(1, Relaxed);
        let grammar = compile::compile(&self.places, self.vocabulary()?, Arc::clone(&wish))?;
        Ok(Some(Arc::new(self.kept.keep(wish, grammar))))
    }

    /// How many were compiled since the start, whatever came of it.
    pub fn compiled(&self) -> u64 {
        self.compiled.load(Relaxed)
    }

    /// Figures of those that are kept.
    pub fn kept(&self) -> KeptStats {
        self.kept.stats()
    }

    fn vocabulary(&self) -> Result<Arc<Vocabulary>, FormatError> {
        let make = || {
            let made = Vocabulary::new(&self.tokenizer, &self.stop_ids);
            made.map(Arc::new)
                .inspect_err(|error| tracing::error!(error, "no vocabulary for formats"))
        };
        let made = self.vocabulary.get_or_init(make).clone();
        made.map_err(|_| {
            FormatError::Unusable("this server's tokenizer does not allow formats".into())
        })
    }
}

fn grammar(format: &OutputFormat, follow: Follow) -> Result<TopLevelGrammar, FormatError> {
    if let OutputFormat::Regex(pattern) = format {
        return Ok(TopLevelGrammar::from_regex(whole(pattern)));
    }
    let schema = Value::Object(json_schema(format, follow)?);
    Ok(TopLevelGrammar::from_json_schema(schema))
}

/// The schema of a format that is JSON.
fn json_schema(format: &OutputFormat, follow: Follow) -> Result<Map<String, Value>, FormatError> {
    match format {
        OutputFormat::JsonSchema(text) => schema(text, follow),
        _ => schema(r#"{"type": "object"}"#, follow),
    }
}

/// How a schema is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follow {
    /// To the letter: what cannot be followed makes it unusable.
    Strictly,
    /// As far as it can be.
    Leniently,
}

impl Follow {
    /// As the client asks.
    pub fn strictly(strict: bool) -> Self {
        if strict {
            Self::Strictly
        } else {
            Self::Leniently
        }
    }
}

/// A schema with our options, which are not the client's to set.
fn schema(text: &str, follow: Follow) -> Result<Map<String, Value>, FormatError> {
    let unusable = |what: String| FormatError::Unusable(what);
    let schema = serde_json::from_str(text)
        .map_err(|error| unusable(format!("the schema is no JSON: {error}")))?;
    if multiple(&schema).is_none() {
        let message = format!(
            "numbers are multiples of up to {MULTIPLE_MAX}, whatever the point, all of them together"
        );
        return Err(unusable(message));
    }
    if !literals_fit(&schema, false) {
        let message = "numbers in `const` and `enum` lie between -2^53 and 2^53".to_owned();
        return Err(unusable(message));
    }
    let mut schema = match schema {
        Value::Object(schema) => schema,
        Value::Bool(true) => Map::new(),
        Value::Bool(false) => return Err(unusable("the schema allows nothing".into())),
        _ => return Err(unusable("a schema is an object".into())),
    };
    schema.insert(
        "x-guidance".to_owned(),
        json!({ "whitespace_pattern": BLANK, "lenient": follow == Follow::Leniently }),
    );
    Ok(schema)
}

/// Whether every number that an answer is to repeat is one that other readers of JSON know exactly. Near the ends of 64 bits the
/// library (llguidance 1.9.1, `rx_int_range`) calls itself without end, which ends the process.
fn literals_fit(value: &Value, is_literal: bool) -> bool {
    match value {
        Value::Number(number) => {
            !is_literal
                || number
                    .as_f64()
                    .is_some_and(|number| number.abs() <= LITERAL_MAX)
        }
        Value::Array(items) => items.iter().all(|item| literals_fit(item, is_literal)),
        Value::Object(members) => members.iter().all(|(key, member)| {
            literals_fit(
                member,
                is_literal || matches!(key.as_str(), "const" | "enum"),
            )
        }),
        _ => true,
    }
}

/// The least common multiple of every `multipleOf` in a schema, if it is not too large. One that is no number is none, for a
/// property may have that name.
fn multiple(value: &Value) -> Option<u64> {
    let all = |all: u64, value: &Value| common(all, multiple(value)?);
    match value {
        Value::Array(items) => items.iter().try_fold(1, all),
        Value::Object(members) => {
            let own = members.get("multipleOf").and_then(Value::as_f64);
            let below = members.values().try_fold(1, all)?;
            common(below, own.map_or(Some(1), digits)?)
        }
        _ => Some(1),
    }
}

/// The digits of a number as a whole one: 25 for 0.25.
fn digits(number: f64) -> Option<u64> {
    let scaled = (0..10).map(|places| number.abs() * 10_f64.powi(places));
    let whole = scaled
        .filter(|scaled| (scaled - scaled.round()).abs() < 1e-9)
        .map(f64::round)
        .next()?;
    // Nothing is a multiple of 0; the library says so.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "whole, and small enough"
    )]
    (whole <= MULTIPLE_MAX as f64).then_some((whole as u64).max(1))
}

/// The least common multiple of two that are not 0, if it is not too large.
fn common(a: u64, b: u64) -> Option<u64> {
    let (mut divisor, mut rest) = (a, b);
    while rest > 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    Some(a / divisor * b).filter(|multiple| *multiple <= MULTIPLE_MAX)
}

/// A pattern has to match the whole answer, so an anchor at either end says nothing new.
fn whole(pattern: &str) -> &str {
    let pattern = pattern.strip_prefix('^').unwrap_or(pattern);
    let Some(inner) = pattern.strip_suffix('$') else {
        return pattern;
    };
    let escapes = inner.len() - inner.trim_end_matches('\\').len();
    if escapes.is_multiple_of(2) {
        inner
    } else {
        pattern
    }
}

/// What the library says of a format, cut to what a client should have to read.
fn explained(message: &str) -> String {
    if message.starts_with("panic") {
        tracing::error!(message, "a format was not compiled");
        return "it is not understood".to_owned();
    }
    // It names its own options, which nobody can set.
    if message.contains("lexer_fuel") {
        return "it takes more work to compile than this server does".to_owned();
    }
    if let Some(keys) = unknown_keys(message) {
        return format!("it has keywords that cannot be followed here: {keys}");
    }
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    line[..line.floor_char_boundary(MESSAGE_BYTES_MAX)].to_owned()
}

/// The keywords that the library says it does not know, as it lists them.
fn unknown_keys(message: &str) -> Option<String> {
    let (_, list) = message.split_once("Unimplemented keys: [")?;
    let (list, _) = list.split_once(']')?;
    Some(list.replace('"', "`"))
}

#[cfg(test)]
mod tests;
