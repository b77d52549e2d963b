//! Tools of a message: what the model may call, what it called before, and what came of it.

use visor_plugin_body::{Choice, Field, Names, Tool, Tools, Wrong, check_name, verbatim};

use crate::visor::plugin::types::{Part, ToolCall, ToolResult};

/// Reads `tools` and `tool_choice`; `text` is the whole body.
///
/// # Errors
/// What is wrong, and the path to it.
pub(crate) fn parse(body: &Field, text: &str) -> Result<Tools, Wrong> {
    let tool = |tool: &Field| {
        let kind = tool.get("type");
        if kind.value().is_some() && !kind.is_one_of(&["custom"]) {
            return Err(kind.unsupported("tools are the client's to run"));
        }
        tool.get("input_schema").object()?;
        Tool::read(tool, Names::LONG, "input_schema", text)
    };
    let place = body.get("tool_choice");
    let choice = choice(&place)?;
    let parallel = !place.get("disable_parallel_tool_use").flag()?;
    Tools::read(&body.get("tools"), tool, (&place, choice), parallel)
}

fn choice(field: &Field) -> Result<Choice, Wrong> {
    let Some(field) = field.clone().given() else {
        return Ok(Choice::Auto);
    };
    let kind = field.object()?.get("type");
    match kind.string()? {
        "none" => Ok(Choice::None),
        "auto" => Ok(Choice::Auto),
        "any" => Ok(Choice::Required),
        "tool" => Ok(Choice::Named(field.get("name").string()?.to_owned())),
        _ => Err(kind.wrong_value("auto, any, tool or none")),
    }
}

/// A block of an assistant that called; `text` is the whole body.
pub(crate) fn call(block: &Field, text: &str) -> Result<Part, Wrong> {
    let (name, input) = (block.get("name"), block.get("input"));
    check_name(&name, Names::LONG)?;
    input.object()?;
    Ok(Part::ToolCall(ToolCall {
        id: block.get("id").string()?.to_owned(),
        name: name.string()?.to_owned(),
        arguments: verbatim(text, &input.path).unwrap_or("{}").to_owned(),
    }))
}

/// What came of a call: a block whose inner ones are text and images, which stand behind it.
pub(crate) fn result(block: &Field, inner: Vec<Part>) -> Result<Vec<Part>, Wrong> {
    let mut content = String::new();
    if block.get("is_error").flag()? {
        content.push_str("error: ");
    }
    let mut images = Vec::new();
    for part in inner {
        match part {
            Part::Text(text) => content.push_str(&text),
            other => images.push(other),
        }
    }
    let id = block.get("tool_use_id").string()?.to_owned();
    let result = Part::ToolResult(ToolResult { id, content });
    Ok([vec![result], images].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use visor_plugin_body::Kind;

    fn parsed(tools: Value, choice: Value) -> Result<Tools, Wrong> {
        let body = json!({ "tools": tools, "tool_choice": choice });
        parse(&Field::body(&body).unwrap(), &body.to_string())
    }

    fn weather() -> Value {
        json!([{ "name": "weather", "description": "of a city", "input_schema": { "type": "object" } }])
    }

    /// A tool whose name has that many characters.
    fn named(characters: usize) -> Value {
        json!([{ "name": "x".repeat(characters), "input_schema": {} }])
    }

    #[test]
    fn tools_and_the_choice_among_them_are_read() {
        let read = |choice: Value| {
            let tools = parsed(weather(), choice).unwrap();
            (tools.tools.len(), tools.choice, tools.parallel)
        };
        assert_eq!(read(Value::Null), (1, Choice::Auto, true));
        assert_eq!(read(json!({ "type": "none" })), (0, Choice::None, true));
        let alone = json!({ "type": "any", "disable_parallel_tool_use": true });
        assert_eq!(read(alone), (1, Choice::Required, false));
        let weather_alone = json!({ "type": "tool", "name": "weather" });
        assert_eq!(read(weather_alone).1, Choice::Named("weather".to_owned()));
        assert_eq!(parsed(named(128), Value::Null).unwrap().tools.len(), 1);
        let tools = parsed(weather(), Value::Null).unwrap();
        assert_eq!(tools.tools[0].param, "tools[0].input_schema");
    }

    #[test]
    fn what_is_wrong_with_them_is_named() {
        let (invalid, unsupported) = (Kind::Invalid, Kind::Unsupported);
        let server = json!([{ "type": "web_search_20250305", "name": "web_search" }]);
        for (tools, choice, kind, param) in [
            (server, Value::Null, unsupported, "tools[0].type"),
            (
                json!([{ "name": "a" }]),
                Value::Null,
                invalid,
                "tools[0].input_schema",
            ),
            (weather(), json!("any"), invalid, "tool_choice"),
            (
                weather(),
                json!({ "type": "all" }),
                invalid,
                "tool_choice.type",
            ),
            (
                weather(),
                json!({ "type": "tool" }),
                invalid,
                "tool_choice.name",
            ),
            (
                weather(),
                json!({ "type": "tool", "name": "b" }),
                invalid,
                "tool_choice",
            ),
            (json!([]), json!({ "type": "any" }), invalid, "tool_choice"),
            (named(129), Value::Null, invalid, "tools[0].name"),
        ] {
            let wrong = parsed(tools, choice).unwrap_err();
            assert_eq!((wrong.kind, wrong.param.as_deref()), (kind, Some(param)));
        }
    }
}
