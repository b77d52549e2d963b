//! Tool calls as a grammar: calls, or where the model may choose also an answer that does not begin like one.

use std::fmt::Write as _;

use llguidance::api::TopLevelGrammar;
use serde_json::{Map, Value, json};
use visor_sandbox::{OutputFormat, ToolChoice};

use super::{Follow, FormatError, json_schema, schema, whole};
use crate::calls::{Calls, call_begin};

/// Where a schema says about its members what its list of properties does not.
const OTHER_MEMBERS: [&str; 9] = [
    "additionalProperties",
    "unevaluatedProperties",
    "patternProperties",
    "propertyNames",
    "$ref",
    "allOf",
    "anyOf",
    "oneOf",
    "not",
];

/// # Errors
/// A tool whose parameters are no schema, or the format.
pub(super) fn grammar(
    calls: &Calls,
    (format, follow): (&OutputFormat, Follow),
) -> Result<TopLevelGrammar, FormatError> {
    let syntax = &calls.syntax;
    let (open, between) = (literal(&syntax.open), literal(&syntax.between));
    let more = match calls.count_max {
        0 | 1 => String::new(),
        count_max => format!(" ({between} call){{0,{}}}", count_max - 1),
    };
    let close = match syntax.close.as_str() {
        "" => String::new(),
        close => literal(close),
    };
    let mut lark = format!("calls: {open} call{more} {close}\n");
    let mut names = Vec::new();
    for (index, tool) in calls.offered() {
        let schema = arguments(calls, index).map_err(|error| error.of_tool(index, tool))?;
        let (begin, schema) = (literal(&call_begin(&tool.name)), Value::Object(schema));
        names.push(format!("call_{index}"));
        // Writing into a string cannot fail.
        let _ = writeln!(lark, "call_{index}: {begin} %json {schema} \"}}\"");
    }
    let _ = writeln!(lark, "call: {}", names.join(" | "));
    lark.push_str(&match calls.choice {
        ToolChoice::Auto => format!("start: calls | {}", answer((format, follow), &open)?),
        ToolChoice::Required | ToolChoice::Named(_) => "start: calls\n".to_owned(),
    });
    Ok(TopLevelGrammar::from_lark(lark))
}

/// What is no call, and what defines it. JSON is told from calls by its own grammar.
fn answer((format, follow): (&OutputFormat, Follow), open: &str) -> Result<String, FormatError> {
    let pattern = match format {
        OutputFormat::Text => r"(?s:.*)".to_owned(),
        OutputFormat::Regex(pattern) => llguidance::regex_to_lark(whole(pattern), ""),
        OutputFormat::Json | OutputFormat::JsonSchema(_) => {
            let schema = Value::Object(json_schema(format, follow)?);
            return Ok(format!("%json {schema}\n"));
        }
    };
    Ok(format!(
        "ANSWER\nANSWER: /{pattern}/ & ~( {open} /(?s:.*)/ )\n"
    ))
}

/// The schema of the arguments of the tool with that number. They are an object, and one that lists its properties has no others:
/// what a tool does not declare it does not take.
pub(super) fn arguments(calls: &Calls, index: usize) -> Result<Map<String, Value>, FormatError> {
    let follow = Follow::strictly(calls.strict.contains(&index));
    let mut schema = schema(&calls.tools[index].parameters, follow)?;
    match schema.get("type") {
        None => schema.insert("type".to_owned(), json!("object")),
        Some(kind) if kind == "object" => None,
        Some(_) => {
            let message = "the arguments of a tool are an object".to_owned();
            return Err(FormatError::Unusable(message));
        }
    };
    if !OTHER_MEMBERS.iter().any(|key| schema.contains_key(*key)) {
        schema.insert("additionalProperties".to_owned(), json!(false));
    }
    Ok(schema)
}

/// A text as it is said.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}
