//! What an answer may look like: JSON, JSON that fits a schema, text that matches a regular expression, calls of tools. A wish
//! becomes a grammar that the engine follows.
//!
//! The only room that knows llguidance, whose types end here. A schema is a stranger's program: it is compiled on its own
//! request's thread, with so much work and no more, and every step of following it has a limit, too, for that is the engine's
//! thread. Nothing is ever fetched: a `$ref` to anywhere but the schema itself is an error.
//!
//! `calls`: tools as a grammar; `vocabulary`: the model's tokens as bytes; `follow`: one answer.

mod calls;
mod follow;
mod vocabulary;

use std::sync::{Arc, OnceLock};

use llguidance::api::{GrammarInit, ParserLimits, TopLevelGrammar};
use llguidance::toktrie::InferenceCapabilities;
use llguidance::{Logger, TokenParser};
use serde_json::{Map, Value, json};
use visor_engine::Grammar;
use visor_model::Tokenizer;
use visor_sandbox::{OutputFormat, ToolChoice};

use crate::calls::Calls;
use crate::config::FormatsConfig;
use follow::Compiled;
use vocabulary::Vocabulary;

/// Blanks between two tokens of JSON, in bytes: enough to indent by, too few to get lost in.
const BLANKS: &str = r"[\x20\x0A\x09]{1,32}";
/// The same within a call, which nobody reads: a small model would put as many as it may.
const BLANK: &str = r"\x20";
/// Least common multiple of all `multipleOf` in a schema, decimal points left out: what a number leaves when it is divided is kept
/// track of digit by digit, and the library's limits on work do not count that.
const MULTIPLE_MAX: u64 = 1000;
/// Longest explanation a client is given, in bytes; some repeat the schema.
const MESSAGE_BYTES_MAX: usize = 400;

/// Why there is no grammar; all of them are the client's to change.
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
    /// Not understood, too much work, or nothing fits it.
    #[error("the format cannot be used: {0}")]
    Unusable(String),
    /// The answer begins with a text that does not fit.
    #[error("the format does not allow what the answer is to begin with")]
    Beginning,
    /// The parameters of a tool.
    #[error("the parameters of the tool cannot be used: {why}")]
    Tool {
        /// Its number.
        index: usize,
        /// What is wrong with them.
        why: String,
    },
}

impl FormatError {
    /// The same, of the parameters of a tool.
    fn of_tool(self, index: usize) -> Self {
        let why = match self {
            Self::Unusable(why) | Self::Tool { why, .. } => why,
            Self::TooLarge { .. } | Self::Beginning => self.to_string(),
        };
        Self::Tool { index, why }
    }
}

/// Where an answer begins and ends.
#[derive(Debug, Clone, Default)]
pub struct Bounds {
    /// Text the answer begins with, which the model does not say.
    pub prefill: Option<String>,
    /// As in [`visor_engine::GenerateRequest`].
    pub continues: bool,
    /// Tokens that end it.
    pub stop_ids: Vec<u32>,
}

/// Compiles formats for one model.
#[derive(Debug)]
pub struct Formats {
    tokenizer: Arc<Tokenizer>,
    /// Tokens that end an answer whoever asks.
    stop_ids: Vec<u32>,
    /// Made for the first that asks: most servers are never asked.
    vocabulary: OnceLock<Result<Arc<Vocabulary>, String>>,
}

impl Formats {
    /// For a model's tokens; nothing is computed yet.
    pub fn new(tokenizer: Arc<Tokenizer>, stop_ids: Vec<u32>) -> Self {
        Self {
            tokenizer,
            stop_ids,
            vocabulary: OnceLock::new(),
        }
    }

    /// The grammar of a format and of tools; none for free text without any. Burns CPU: not for the engine's thread.
    ///
    /// # Errors
    /// What is wrong with the format, or with a tool.
    pub fn compile(
        &self,
        format: &OutputFormat,
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
        let Some(calls) = calls else {
            return Ok(Some(self.build(grammar(format)?, bounds, limits)?));
        };
        let built = self.build(calls::grammar(calls, format)?, bounds, limits);
        let built = built.map_err(|error| self.blame(error, calls, limits));
        Ok(Some(built?))
    }

    fn build(
        &self,
        grammar: TopLevelGrammar,
        bounds: Bounds,
        limits: &FormatsConfig,
    ) -> Result<Arc<dyn Grammar>, FormatError> {
        let vocabulary = self.vocabulary()?;
        let parser = parser(&vocabulary, grammar, limits)?;
        Ok(Arc::new(Compiled::new(parser, vocabulary, bounds)?))
    }

    /// Which tool it is that makes a grammar of several fail: the first that also fails alone.
    fn blame(&self, error: FormatError, calls: &Calls, limits: &FormatsConfig) -> FormatError {
        let alone = |name: &str| Calls {
            choice: ToolChoice::Named(name.to_owned()),
            count_max: 1,
            ..calls.clone()
        };
        let failing = calls.offered().find_map(|(index, tool)| {
            let grammar = calls::grammar(&alone(&tool.name), &OutputFormat::Text);
            let built = grammar.and_then(|g| self.build(g, Bounds::default(), limits));
            Some(built.err()?.of_tool(index))
        });
        failing.unwrap_or(error)
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

fn grammar(format: &OutputFormat) -> Result<TopLevelGrammar, FormatError> {
    if let OutputFormat::Regex(pattern) = format {
        return Ok(TopLevelGrammar::from_regex(whole(pattern)));
    }
    let schema = Value::Object(json_schema(format)?);
    Ok(TopLevelGrammar::from_json_schema(schema))
}

/// The schema of a format that is JSON.
fn json_schema(format: &OutputFormat) -> Result<Map<String, Value>, FormatError> {
    match format {
        OutputFormat::JsonSchema(text) => schema(text, BLANKS),
        _ => schema(r#"{"type": "object"}"#, BLANKS),
    }
}

/// A schema with our options, which are not the client's to set.
fn schema(text: &str, blanks: &str) -> Result<Map<String, Value>, FormatError> {
    let unusable = |what: String| FormatError::Unusable(what);
    let schema = serde_json::from_str(text)
        .map_err(|error| unusable(format!("the schema is no JSON: {error}")))?;
    if multiple(&schema).is_none() {
        let message = format!(
            "numbers are multiples of up to {MULTIPLE_MAX}, whatever the point, all of them together"
        );
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
        json!({ "whitespace_pattern": blanks }),
    );
    Ok(schema)
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

fn parser(
    vocabulary: &Vocabulary,
    grammar: TopLevelGrammar,
    config: &FormatsConfig,
) -> Result<TokenParser, FormatError> {
    let limits = ParserLimits {
        initial_lexer_fuel: config.compile_work_max,
        max_grammar_size: config.symbols_max,
        step_lexer_fuel: config.step_work_max,
        step_max_items: config.step_items_max,
        max_lexer_states: config.states_max,
        verbose_errors: false,
        ..ParserLimits::default()
    };
    let made = vocabulary.factory.create_parser_from_init_ext(
        GrammarInit::Serialized(grammar),
        Logger::new(0, 0),
        InferenceCapabilities::default(),
        limits,
    );
    made.map_err(|error| FormatError::Unusable(explained(&error.to_string())))
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
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    line[..line.floor_char_boundary(MESSAGE_BYTES_MAX)].to_owned()
}

#[cfg(test)]
mod tests;
