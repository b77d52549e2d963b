//! Tools in words. Phi-3.5 has no control tokens for them, so everything is text: what can be called stands at the end of the system
//! turn, calls are the assistant's words, results are the user's. The spelling is that of Phi-4-mini, the first of its family that
//! was trained to call: `functools[{"name": …, "arguments": …}, …]`. The host holds the model to it.

use crate::exports::visor::plugin::template::CallSyntax;
use crate::visor::plugin::types::{Message, Part, ToolCall, ToolResult, ToolSpec};

const OPEN: &str = "functools[";
const BETWEEN: &str = ", ";
const CLOSE: &str = "]";

pub(crate) fn syntax() -> CallSyntax {
    CallSyntax {
        open: OPEN.to_owned(),
        between: BETWEEN.to_owned(),
        close: CLOSE.to_owned(),
    }
}

/// What the model is told it can call.
pub(crate) fn offer(tools: &[ToolSpec]) -> String {
    let tool = |tool: &ToolSpec| {
        let (name, description) = (quoted(&tool.name), quoted(&tool.description));
        let parameters = &tool.parameters;
        format!(r#"{{"name": {name}, "description": {description}, "parameters": {parameters}}}"#)
    };
    let tools: Vec<String> = tools.iter().map(tool).collect();
    format!(
        "You can call these tools; parameters are the JSON schema of a tool's arguments:\n[{}]\n\
         To call, answer with nothing but {OPEN}{{\"name\": \"...\", \"arguments\": {{...}}}}{CLOSE}, one or several.",
        tools.join(", ")
    )
}

/// Calls that were made at once, as the model wrote them.
pub(crate) fn calls(calls: &[&ToolCall]) -> String {
    let call = |call: &&ToolCall| {
        let name = quoted(&call.name);
        format!(r#"{{"name": {name}, "arguments": {}}}"#, call.arguments)
    };
    let calls: Vec<String> = calls.iter().map(call).collect();
    format!("{OPEN}{}{CLOSE}", calls.join(BETWEEN))
}

/// A result, with the name of the tool that was called, if the call is there.
pub(crate) fn result(messages: &[Message], result: &ToolResult) -> String {
    let parts = messages.iter().flat_map(|message| &message.parts);
    let mut calls = parts.filter_map(|part| match part {
        Part::ToolCall(call) if call.id == result.id => Some(call.name.as_str()),
        _ => None,
    });
    let name = calls.next().unwrap_or("the tool");
    format!("Result of {name}:\n{}\n", result.content)
}

fn quoted(text: &str) -> serde_json::Value {
    serde_json::Value::from(text)
}
