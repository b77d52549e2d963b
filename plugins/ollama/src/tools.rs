//! Tools of a chat: what the model may call, what it called before, and what came of it.
//!
//! Calls of this API need no identifiers: a result names its tool, or follows its call.

use std::collections::VecDeque;

use visor_plugin_body::{Choice, Field, Names, Tool, Tools, Wrong, check_name, verbatim};

use crate::visor::plugin::types::{Part, ToolCall, ToolResult};

/// Reads `tools`; `text` is the whole body.
///
/// # Errors
/// What is wrong, and the path to it.
pub(crate) fn parse(body: &Field, text: &str) -> Result<Tools, Wrong> {
    let tool = |tool: &Field| {
        let kind = tool.get("type");
        if kind.value().is_some() && !kind.is_one_of(&["function", ""]) {
            return Err(kind.unsupported("tools are functions"));
        }
        Tool::read(&tool.get("function"), Names::LOOSE, "parameters", text)
    };
    let tools = body.get("tools");
    Tools::read(&tools, tool, (&tools, Choice::Auto), true)
}

/// Calls that have no result yet, in order.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    calls: VecDeque<ToolCall>,
    count: usize,
}

impl Pending {
    /// Calls of an assistant; `text` is the whole body.
    pub(crate) fn calls(&mut self, message: &Field, text: &str) -> Result<Vec<Part>, Wrong> {
        let Some(calls) = message.get("tool_calls").given() else {
            return Ok(Vec::new());
        };
        let mut parts = Vec::new();
        for call in calls.items()? {
            let function = call.object()?.get("function");
            let name = function.object()?.get("name");
            check_name(&name, Names::LOOSE)?;
            let arguments = function.get("arguments");
            let arguments = match arguments.value() {
                None => "{}",
                Some(_) => verbatim(text, &arguments.object()?.path).unwrap_or("{}"),
            };
            self.count += 1;
            let call = ToolCall {
                id: call
                    .get("id")
                    .text()?
                    .unwrap_or_else(|| self.count.to_string()),
                name: name.string()?.to_owned(),
                arguments: arguments.to_owned(),
            };
            self.calls.push_back(call.clone());
            parts.push(Part::ToolCall(call));
        }
        Ok(parts)
    }

    /// What came of one of them.
    pub(crate) fn result(&mut self, message: &Field) -> Result<Part, Wrong> {
        let id = message.get("tool_call_id").text()?;
        let name = message.get("tool_name").text()?;
        let fits = |call: &ToolCall| match (&id, &name) {
            (Some(id), _) => call.id == *id,
            (None, Some(name)) => call.name == *name,
            (None, None) => true,
        };
        let at = self.calls.iter().position(fits);
        let call = at.and_then(|at| self.calls.remove(at));
        let id = call.map(|call| call.id).or(id).unwrap_or_default();
        let content = message.get("content").string()?.to_owned();
        Ok(Part::ToolResult(ToolResult { id, content }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn tools_are_functions() {
        let parsed = |tools: Value| {
            let body = json!({ "tools": tools });
            parse(&Field::body(&body).unwrap(), &body.to_string())
        };
        let function = json!({ "name": "weather", "parameters": { "type": "object" } });
        let tools = parsed(json!([{ "type": "function", "function": function }])).unwrap();
        assert_eq!(tools.tools[0].param, "tools[0].function.parameters");
        assert_eq!(tools.choice, Choice::Auto);
        for untyped in [
            json!([{ "function": function }]),
            json!([{ "type": null, "function": function }]),
            json!([{ "type": "", "function": function }]),
        ] {
            assert_eq!(parsed(untyped).unwrap().tools[0].name, "weather");
        }
        for (tools, param) in [
            (json!([{ "type": "other" }]), "tools[0].type"),
            (json!([{}]), "tools[0].function"),
            (
                json!([{ "function": { "name": "a b" } }]),
                "tools[0].function.name",
            ),
        ] {
            assert_eq!(parsed(tools).unwrap_err().param.as_deref(), Some(param));
        }
    }

    #[test]
    fn results_find_their_calls_by_id_by_name_or_in_order() {
        let body = json!({ "tool_calls": [
            { "function": { "name": "a", "arguments": { "b": [2], "z": 1 } } },
            { "function": { "name": "b" } },
            { "id": "x", "function": { "name": "a" } },
            { "function": { "name": "a" } },
        ] });
        let mut pending = Pending::default();
        let calls = pending.calls(&Field::body(&body).unwrap(), &body.to_string());
        let calls = calls.unwrap();
        assert!(
            matches!(&calls[0], Part::ToolCall(call) if call.id == "1" && call.arguments == r#"{"b":[2],"z":1}"#)
        );
        let mut id = |message: Value| {
            let part = pending.result(&Field::body(&message).unwrap()).unwrap();
            let Part::ToolResult(result) = part else {
                panic!("{part:?}")
            };
            result.id
        };
        assert_eq!(id(json!({ "content": "", "tool_call_id": "x" })), "x");
        assert_eq!(id(json!({ "content": "", "tool_name": "b" })), "2");
        assert_eq!(id(json!({ "content": "" })), "1");
        assert_eq!(id(json!({ "content": "", "tool_name": "a" })), "4");
        assert_eq!(id(json!({ "content": "", "tool_name": "a" })), "");
        let wrong = json!({ "tool_calls": [{ "function": { "name": "a", "arguments": "{}" } }] });
        assert!(
            pending
                .calls(&Field::body(&wrong).unwrap(), &wrong.to_string())
                .is_err()
        );
    }
}
