//! The tools a body offers the model, and whether it is to call them.

use serde_json::{Map, Value};

use crate::format::verbatim;
use crate::{Field, Wrong};

/// Parameters of a tool that has none.
const NOTHING: &str = r#"{"type":"object","properties":{}}"#;

/// What tools may be called: letters, digits, and what else a dialect has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    /// Longest, in characters.
    pub characters_max: usize,
    /// What they may have beside letters and digits, in ASCII.
    pub marks: &'static str,
}

impl Names {
    /// 64 letters, digits, `_` and `-`.
    pub const SHORT: Self = Self {
        characters_max: 64,
        marks: "_-",
    };
    /// 128 of them.
    pub const LONG: Self = Self {
        characters_max: 128,
        ..Self::SHORT
    };
    /// 128 of them, and what separates names within names: for dialects that say nothing about it.
    pub const LOOSE: Self = Self {
        marks: "_-.:/",
        ..Self::LONG
    };
}

/// A tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it does.
    pub description: String,
    /// The schema of its arguments, as the client wrote it.
    pub parameters: String,
    /// Whether they have to fit all of it.
    pub strict: bool,
    /// What the client calls the schema.
    pub param: String,
}

/// Whether the model calls tools.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// Never.
    None,
    /// As it likes.
    #[default]
    Auto,
    /// It does.
    Required,
    /// This one.
    Named(String),
}

/// Tools and what is to become of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tools {
    /// Empty where none are offered.
    pub tools: Vec<Tool>,
    /// Whether they are called.
    pub choice: Choice,
    /// Whether several may be called at once.
    pub parallel: bool,
}

impl Tool {
    /// Reads what all dialects have in one place or another: a name, a description, and under `schema_key` a schema. `text` is the
    /// whole body.
    ///
    /// # Errors
    /// What is no tool.
    pub fn read(tool: &Field, names: Names, schema_key: &str, text: &str) -> Result<Self, Wrong> {
        let name = tool.object()?.get("name");
        check_name(&name, names)?;
        let strict = tool.get("strict").flag()?;
        let schema = tool.get(schema_key);
        let parameters = match schema.clone().given() {
            None => NOTHING,
            Some(schema) => {
                let kind = schema.object()?.get("type");
                if kind.value().is_some() && !kind.is_one_of(&["object"]) {
                    return Err(kind.wrong_value("object, as the arguments of a tool are one"));
                }
                verbatim(text, &schema.path).ok_or_else(|| schema.wrong_type("an object"))?
            }
        };
        Ok(Self {
            name: name.string()?.to_owned(),
            description: tool.get("description").text()?.unwrap_or_default(),
            parameters: parameters.to_owned(),
            strict,
            param: schema.path,
        })
    }
}

impl Tools {
    /// Reads the array of tools, each by `read`. `choice` is where and how the client chose.
    ///
    /// # Errors
    /// What is no tool, two of a name, or a choice that is none of them.
    pub fn read(
        tools: &Field,
        read: impl Fn(&Field) -> Result<Tool, Wrong>,
        (place, choice): (&Field, Choice),
        parallel: bool,
    ) -> Result<Self, Wrong> {
        let items = match tools.clone().given() {
            Some(tools) => tools.items()?,
            None => Vec::new(),
        };
        // A set, in the shape that is compiled into every adapter anyway.
        let mut names = Map::new();
        let mut list = Vec::new();
        for item in &items {
            let tool = read(item.object()?)?;
            if names.insert(tool.name.clone(), Value::Null).is_some() {
                let message = format!(
                    "Invalid value for '{}': two tools are called '{}'.",
                    item.path, tool.name
                );
                return Err(item.invalid(message));
            }
            list.push(tool);
        }
        match &choice {
            Choice::Named(name) if !names.contains_key(name) => {
                let message = format!(
                    "Invalid value for '{}': there is no tool '{name}' in '{}'.",
                    place.path, tools.path
                );
                return Err(place.invalid(message));
            }
            Choice::Required if list.is_empty() => {
                let message = format!(
                    "Invalid value for '{}': there are no '{}' to call.",
                    place.path, tools.path
                );
                return Err(place.invalid(message));
            }
            Choice::None => list.clear(),
            _ => {}
        }
        Ok(Self {
            tools: list,
            choice,
            parallel,
        })
    }

    /// What the host is told about the schemas: their names, and which are strict.
    pub fn hints(&self) -> impl Iterator<Item = (String, String)> {
        let tools = self.tools.iter().enumerate();
        tools.flat_map(|(index, tool)| {
            let strict = tool
                .strict
                .then(|| (format!("tool.{index}.strict"), "true".to_owned()));
            let named = (format!("tool.{index}.param"), tool.param.clone());
            [named].into_iter().chain(strict)
        })
    }
}

/// Refuses what is no name of a tool.
///
/// # Errors
/// Anything but what `names` allows.
pub fn check_name(field: &Field, names: Names) -> Result<(), Wrong> {
    let Names {
        characters_max,
        marks,
    } = names;
    let name = field.string()?;
    let fits = |letter: char| letter.is_ascii_alphanumeric() || marks.contains(letter);
    if (1..=characters_max).contains(&name.len()) && name.chars().all(fits) {
        return Ok(());
    }
    let wanted = format!("1 to {characters_max} letters, digits and any of `{marks}`");
    Err(field.wrong_value(&wanted))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: &str, choice: Choice) -> Result<Tools, Wrong> {
        let value: Value = serde_json::from_str(body).unwrap();
        let field = Field::body(&value).unwrap();
        let tool = |tool: &Field| Tool::read(tool, Names::SHORT, "schema", body);
        Tools::read(
            &field.get("tools"),
            tool,
            (&field.get("choice"), choice),
            true,
        )
    }

    #[test]
    fn tools_are_read_with_their_schemas_as_they_were_written() {
        let schema = r#"{ "type": "object", "properties": {"z": {}, "a": {}} }"#;
        let body = format!(
            r#"{{"tools": [{{"name": "a", "description": "does a"}}, {{"schema": {schema}, "name": "b-2_C", "strict": true}}]}}"#
        );
        let tools = read(&body, Choice::Named("b-2_C".to_owned())).unwrap();
        let [a, b] = &tools.tools[..] else {
            panic!("{tools:?}")
        };
        assert_eq!(
            (a.description.as_str(), a.parameters.as_str()),
            ("does a", NOTHING)
        );
        assert_eq!(
            (b.description.as_str(), b.parameters.as_str()),
            ("", schema)
        );
        let hints: Vec<_> = tools.hints().collect();
        assert_eq!(
            hints[1],
            ("tool.1.param".to_owned(), "tools[1].schema".to_owned())
        );
        let strict = ("tool.1.strict".to_owned(), "true".to_owned());
        assert_eq!(hints[2..], [strict]);
    }

    #[test]
    fn tools_that_are_not_to_be_called_are_not_offered() {
        let body = json!({ "tools": [{ "name": "a" }] }).to_string();
        assert_eq!(read(&body, Choice::None).unwrap().tools, []);
        assert_eq!(read(&body, Choice::Auto).unwrap().tools.len(), 1);
        assert_eq!(read("{}", Choice::Auto).unwrap().tools, []);
    }

    #[test]
    fn a_name_is_as_long_and_has_the_marks_that_its_dialect_allows() {
        let fits = |name: &str| {
            let name = json!({ "name": name });
            let name = Field::body(&name).unwrap().get("name");
            [Names::SHORT, Names::LONG, Names::LOOSE].map(|names| check_name(&name, names).is_ok())
        };
        assert_eq!(fits(&"x".repeat(64)), [true, true, true]);
        assert_eq!(fits(&"x".repeat(65)), [false, true, true]);
        assert_eq!(fits(&"x".repeat(128)), [false, true, true]);
        assert_eq!(fits(&"x".repeat(129)), [false, false, false]);
        assert_eq!(fits("mcp:files/read.all"), [false, false, true]);
        for none in ["", "a b", "grün", "a\"b", "a\\b"] {
            assert_eq!(fits(none), [false, false, false], "{none}");
        }
        let name = json!({ "name": "a b" });
        let name = Field::body(&name).unwrap().get("name");
        let message = check_name(&name, Names::LOOSE).unwrap_err().message;
        assert!(message.ends_with("1 to 128 letters, digits and any of `_-.:/`."));
    }

    #[test]
    fn what_is_wrong_with_a_tool_is_named() {
        let long = "x".repeat(65);
        for (tools, param) in [
            (json!({}), "tools"),
            (json!([5]), "tools[0]"),
            (json!([{}]), "tools[0].name"),
            (json!([{ "name": "a b" }]), "tools[0].name"),
            (json!([{ "name": "" }]), "tools[0].name"),
            (json!([{ "name": "grün" }]), "tools[0].name"),
            (json!([{ "name": long }]), "tools[0].name"),
            (
                json!([{ "name": "a", "description": 5 }]),
                "tools[0].description",
            ),
            (json!([{ "name": "a", "strict": 1 }]), "tools[0].strict"),
            (json!([{ "name": "a", "schema": [] }]), "tools[0].schema"),
            (
                json!([{ "name": "a", "schema": { "type": "array" } }]),
                "tools[0].schema.type",
            ),
            (json!([{ "name": "a" }, { "name": "a" }]), "tools[1]"),
        ] {
            let wrong = read(&json!({ "tools": tools }).to_string(), Choice::Auto).unwrap_err();
            assert_eq!(wrong.param.as_deref(), Some(param), "{tools}");
        }
        for choice in [Choice::Required, Choice::Named("b".to_owned())] {
            let wrong = read(r#"{"tools": []}"#, choice).unwrap_err();
            assert_eq!(wrong.param.as_deref(), Some("choice"));
        }
    }
}
