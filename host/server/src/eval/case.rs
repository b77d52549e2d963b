//! One line of a suite: a JSON object, read with every key checked.
//!
//! This room knows JSON and limits. It opens no file: whether a picture is there is `suite`'s business.

use std::path::{Component, Path};

use serde::Deserialize;
use serde_json::Value;

use super::verdict::Rule;

/// Longest id or category, in characters.
const NAME_CHARS_MAX: usize = 64;
/// Most pictures, earlier turns, and accepted or rejected answers of one case. The server's own
/// limits (`images.count_max`, the context) are lower; these only bound what is read.
const ITEMS_MAX: usize = 64;
/// The category that stands for all cases in figures and in `--min`.
pub const ALL_CATEGORIES: &str = "all";

/// A question about pictures, and what counts as its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// Unique in its suite.
    pub id: String,
    /// What it is counted under.
    pub category: String,
    /// Pictures by path below the suite's folder, in the order they are shown.
    pub images: Vec<String>,
    /// Earlier turns; the pictures belong to the first.
    pub history: Vec<Turn>,
    /// What is asked.
    pub question: String,
    /// Accepted answers, at least one.
    pub accept: Vec<String>,
    /// What must not be in the answer.
    pub reject: Vec<String>,
    /// How answers are compared.
    pub rule: Rule,
    /// Most crops of each picture, as a client says it with `num_crops`; none leaves it to the
    /// configuration.
    pub crops: Option<u32>,
    /// `low`, `auto` or `high`, as a client says it; none leaves it to the configuration.
    pub detail: Option<String>,
}

/// A question that was answered before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// What was asked.
    pub question: String,
    /// What the model is told that it answered.
    pub answer: String,
}

/// A mistake in a case: the key and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaseError {
    /// Such as `images[1]`; empty when the line as a whole is wrong.
    pub key: String,
    /// Lower case, one sentence.
    pub message: String,
}

impl CaseError {
    pub(super) fn at(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            message: message.into(),
        }
    }
}

/// The keys of a case. Values are looked at one by one, so that a mistake is told with its key.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    id: Option<Value>,
    category: Option<Value>,
    images: Option<Value>,
    history: Option<Value>,
    question: Option<Value>,
    accept: Option<Value>,
    reject: Option<Value>,
    r#match: Option<Value>,
    crops: Option<Value>,
    detail: Option<Value>,
}

/// One earlier turn, as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TurnLine {
    question: Option<Value>,
    answer: Option<Value>,
}

impl Case {
    /// Reads one line.
    ///
    /// # Errors
    /// The first mistake, with its key.
    pub fn parse(line: &str) -> Result<Self, CaseError> {
        // A list would be read as the keys' values in order.
        if !line.trim_start().starts_with('{') {
            return Err(CaseError::at("", "has to be a JSON object"));
        }
        let line: Line = serde_json::from_str(line)
            .map_err(|error| CaseError::at("", without_line(&error.to_string())))?;
        let rule = rule(line.r#match)?;
        let accept = texts("accept", line.accept)?;
        if accept.is_empty() {
            return Err(CaseError::at("accept", "has no accepted answer"));
        }
        let reject = texts("reject", line.reject.or_else(empty))?;
        check_phrases("accept", &accept, rule)?;
        // What must not come with a yes or a no may be any words.
        let rejecting = match rule {
            Rule::Text => Rule::Text,
            _ => Rule::Words,
        };
        check_phrases("reject", &reject, rejecting)?;
        let (crops, detail) = (crops(line.crops)?, detail(line.detail)?);
        if crops.is_some() && detail.is_some() {
            return Err(CaseError::at(
                "detail",
                "goes without `crops`: both say how finely",
            ));
        }
        Ok(Self {
            id: name("id", line.id)?,
            category: category(line.category)?,
            images: images(line.images)?,
            history: history(line.history)?,
            question: text("question", line.question)?,
            accept,
            reject,
            rule,
            crops,
            detail,
        })
    }
}

/// An optional list that is not given.
#[expect(clippy::unnecessary_wraps, reason = "handed to Option::or_else")]
fn empty() -> Option<Value> {
    Some(Value::Array(Vec::new()))
}

fn text(key: &str, value: Option<Value>) -> Result<String, CaseError> {
    match value {
        None => Err(CaseError::at(key, "is missing")),
        Some(Value::String(text)) if text.trim().is_empty() => Err(CaseError::at(key, "is empty")),
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(CaseError::at(key, "has to be a string")),
    }
}

fn items(key: &str, value: Option<Value>) -> Result<Vec<Value>, CaseError> {
    match value {
        None => Err(CaseError::at(key, "is missing")),
        Some(Value::Array(items)) if items.len() > ITEMS_MAX => {
            let message = format!("has {} entries; {ITEMS_MAX} are allowed", items.len());
            Err(CaseError::at(key, message))
        }
        Some(Value::Array(items)) => Ok(items),
        Some(_) => Err(CaseError::at(key, "has to be a list")),
    }
}

fn texts(key: &str, value: Option<Value>) -> Result<Vec<String>, CaseError> {
    let items = items(key, value)?.into_iter().enumerate();
    items
        .map(|(index, item)| text(&format!("{key}[{index}]"), Some(item)))
        .collect()
}

/// A word for tables, command lines and file names: letters, digits and `- _ . /`.
fn name(key: &str, value: Option<Value>) -> Result<String, CaseError> {
    let name = text(key, value)?;
    let fits = |c: char| c.is_alphanumeric() || "-_./".contains(c);
    if name.chars().count() > NAME_CHARS_MAX || !name.chars().all(fits) {
        let message = format!("has to be at most {NAME_CHARS_MAX} letters, digits and - _ . /");
        return Err(CaseError::at(key, message));
    }
    Ok(name)
}

fn category(value: Option<Value>) -> Result<String, CaseError> {
    let category = name("category", value)?;
    if category == ALL_CATEGORIES {
        let message = format!("cannot be {ALL_CATEGORIES:?}, which stands for all cases");
        return Err(CaseError::at("category", message));
    }
    Ok(category)
}

/// Paths that stay below their folder whatever is in it. Links are looked at when a file is opened.
fn images(value: Option<Value>) -> Result<Vec<String>, CaseError> {
    let images = texts("images", value)?;
    for (index, image) in images.iter().enumerate() {
        let mut parts = Path::new(image).components();
        // A backslash or a drive means another folder on another system.
        let plain = !image.contains(['\\', ':', '\0']);
        if !plain || !parts.all(|part| matches!(part, Component::Normal(_))) {
            let message = format!("{image:?} has to be a relative path inside the suite's folder");
            return Err(CaseError::at(format!("images[{index}]"), message));
        }
    }
    Ok(images)
}

fn history(value: Option<Value>) -> Result<Vec<Turn>, CaseError> {
    let items = items("history", value.or_else(empty))?;
    let turn = |(index, item): (usize, Value)| {
        let key = format!("history[{index}]");
        if !item.is_object() {
            return Err(CaseError::at(key, "has to be an object"));
        }
        let line: TurnLine =
            serde_json::from_value(item).map_err(|error| CaseError::at(&key, error.to_string()))?;
        Ok(Turn {
            question: text(&format!("{key}.question"), line.question)?,
            answer: text(&format!("{key}.answer"), line.answer)?,
        })
    };
    items.into_iter().enumerate().map(turn).collect()
}

fn rule(value: Option<Value>) -> Result<Rule, CaseError> {
    let Some(value) = value else {
        return Ok(Rule::default());
    };
    let name = text("match", Some(value))?;
    Rule::find(&name).ok_or_else(|| {
        let known: Vec<_> = Rule::ALL.iter().map(|(name, _)| *name).collect();
        let message = format!("{name:?} is not one of {}", known.join(", "));
        CaseError::at("match", message)
    })
}

fn check_phrases(key: &str, phrases: &[String], rule: Rule) -> Result<(), CaseError> {
    for (index, phrase) in phrases.iter().enumerate() {
        if let Some(why) = rule.why_unusable(phrase) {
            return Err(CaseError::at(
                format!("{key}[{index}]"),
                format!("{phrase:?} {why}"),
            ));
        }
    }
    Ok(())
}

fn crops(value: Option<Value>) -> Result<Option<u32>, CaseError> {
    let Some(value) = value else { return Ok(None) };
    let count = value.as_u64().and_then(|count| u32::try_from(count).ok());
    match count {
        Some(count) if count > 0 => Ok(Some(count)),
        _ => Err(CaseError::at("crops", "has to be a whole number from 1 on")),
    }
}

fn detail(value: Option<Value>) -> Result<Option<String>, CaseError> {
    let Some(value) = value else { return Ok(None) };
    let detail = text("detail", Some(value))?;
    if ["low", "auto", "high"].contains(&detail.as_str()) {
        return Ok(Some(detail));
    }
    let message = format!("{detail:?} is not one of low, auto, high");
    Err(CaseError::at("detail", message))
}

/// The parser counts lines of what it was given, which is always one.
fn without_line(message: &str) -> String {
    message.replace(" at line 1 column ", " at column ")
}

#[cfg(test)]
mod tests;
