//! What an answer is to look like, where OpenAI's APIs and those after their fashion say it.

use serde_json::Value;

use crate::{Field, Wrong};

/// The shape of an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Any text.
    #[default]
    Text,
    /// A JSON object.
    Json,
    /// JSON that fits a schema.
    Schema {
        /// As the client wrote it.
        text: String,
        /// Whether one that cannot be followed to the letter is no good.
        strict: bool,
    },
    /// Text that matches a regular expression.
    Regex(String),
}

impl Format {
    /// Reads `{"type": …}`. A schema stands in the member `json_schema` of it with some APIs, in itself with others, beside a
    /// name, which tells the model nothing here, and `strict`. `text` is the whole body.
    ///
    /// # Errors
    /// What is no format.
    pub fn read(field: &Field, text: &str, schema_in: Option<&str>) -> Result<Self, Wrong> {
        let Some(field) = field.clone().given() else {
            return Ok(Self::Text);
        };
        let kind = field.object()?.get("type");
        match kind.string()? {
            "text" => Ok(Self::Text),
            "json_object" => Ok(Self::Json),
            "json_schema" => {
                let holder = schema_in.map_or_else(|| field.clone(), |key| field.get(key));
                holder.object()?.get("name").text()?;
                let strict = holder.get("strict").flag()?;
                Self::schema(&holder.get("schema"), text, strict)
            }
            "regex" => Ok(Self::Regex(field.get("regex").string()?.to_owned())),
            _ => Err(kind.wrong_value("text, json_object, json_schema or regex")),
        }
    }

    /// A schema, which is an object.
    ///
    /// # Errors
    /// Anything else, or nothing.
    pub fn schema(field: &Field, text: &str, strict: bool) -> Result<Self, Wrong> {
        field.object()?;
        let schema = verbatim(text, &field.path).ok_or_else(|| field.wrong_type("an object"))?;
        Ok(Self::Schema {
            text: schema.to_owned(),
            strict,
        })
    }

    /// What the host is told of it in extensions.
    pub fn hints(&self) -> impl Iterator<Item = (String, String)> {
        let strict = matches!(self, Self::Schema { strict: true, .. });
        strict
            .then(|| ("format.strict".to_owned(), "true".to_owned()))
            .into_iter()
    }
}

/// A value of a body as the client wrote it; `text` is JSON, `path` that of a [`Field`] whose keys are ours. A value that was read
/// has its keys in the alphabet's order, and the order of a schema's properties is that of the answer's.
#[must_use]
pub fn verbatim<'a>(text: &'a str, path: &str) -> Option<&'a str> {
    path.split('.').try_fold(text, |text, step| {
        let mut steps = step.split('[');
        let value = member(text, steps.next()?)?;
        steps.try_fold(value, |value, index| {
            element(value, index.strip_suffix(']')?.parse().ok()?)
        })
    })
}

fn element(array: &str, index: usize) -> Option<&str> {
    let mut rest = array.trim_start().strip_prefix('[')?.trim_start();
    for _ in 0..index {
        let behind = rest.get(value_bytes(rest)..)?.trim_start();
        rest = behind.strip_prefix(',')?.trim_start();
    }
    let element = &rest[..value_bytes(rest)];
    (!element.is_empty()).then_some(element)
}

/// Said twice, the last counts, as for values that are read.
fn member<'a>(object: &'a str, key: &str) -> Option<&'a str> {
    let mut rest = object.trim_start().strip_prefix('{')?.trim_start();
    let mut found = None;
    while rest.starts_with('"') {
        let (name, behind) = rest.split_at(value_bytes(rest));
        let value = behind.trim_start().strip_prefix(':')?.trim_start();
        let (value, behind) = value.split_at(value_bytes(value));
        // A name may be written with escapes.
        if serde_json::from_str::<Value>(name).is_ok_and(|name| name == key) {
            found = Some(value);
        }
        rest = behind.trim_start().trim_start_matches(',').trim_start();
    }
    found
}

/// Length of the value that a text begins with.
fn value_bytes(text: &str) -> usize {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => continue,
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth > 0 => depth -= 1,
            b',' | b'}' | b']' | b' ' | b'\t' | b'\r' | b'\n' if depth == 0 => return at,
            _ => continue,
        }
        if depth == 0 && !in_string {
            return at + 1;
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;
    use serde_json::json;

    fn schema(text: &str, strict: bool) -> Format {
        let text = text.to_owned();
        Format::Schema { text, strict }
    }

    fn read(text: &str, schema_in: Option<&str>) -> Result<Format, Wrong> {
        let body: Value = serde_json::from_str(text).unwrap();
        let body = Field::body(&body).unwrap();
        Format::read(&body.get("a").get("f"), text, schema_in)
    }

    #[test]
    fn a_schema_arrives_as_it_was_written() {
        let schema = r#"{ "z": 1.50, "a": [ ], "z\u0061": {"y":0,"b":1} }"#;
        let flat = format!(
            r#"{{"b": 1, "a": {{"f": {{"type": "json_schema", "name": "n", "schema": {schema} }} }} }}"#
        );
        assert_eq!(read(&flat, None), Ok(self::schema(schema, false)));
        let inner = format!(
            r#"{{"a":{{"f":{{"type":"json_schema","in":{{"schema":{schema},"strict":true}}}}}}}}"#
        );
        assert_eq!(read(&inner, Some("in")), Ok(self::schema(schema, true)));
    }

    #[test]
    fn what_is_said_twice_is_what_was_said_last() {
        let text =
            r#"{"a":{"f":{"type":"text"}},"a":{"f":{"type":"regex","regex":"x","regex":"y"}}}"#;
        assert_eq!(read(text, None), Ok(Format::Regex("y".to_owned())));
        let text = r#"{"a":{"f":{"type":"json_schema","schema":{"x":1},"schema":{"y":2}}}}"#;
        assert_eq!(read(text, None), Ok(self::schema(r#"{"y":2}"#, false)));
    }

    #[test]
    fn members_are_found_among_whatever_else_there_is() {
        let values = [
            json!(1.5),
            json!(-1e9),
            json!(true),
            json!(null),
            json!(""),
            json!("a\\\"}]{,: \u{e9}\u{1f980}\\"),
            json!([]),
            json!([[{ "x": ["]", "}"] }], "\\"]),
            json!({ "k": { "k": { "\"": "}" } } }),
        ];
        for (at, value) in values.iter().enumerate() {
            let mut body = json!({ "a": values, "z": values });
            body["k\"\u{e9}"] = json!({ "k": value, "l": values[(at + 1) % values.len()] });
            for text in [
                body.to_string(),
                serde_json::to_string_pretty(&body).unwrap(),
                body.to_string().replace("\u{e9}", "\\u00e9"),
            ] {
                for path in ["k\"\u{e9}.k".to_owned(), format!("a[{at}]")] {
                    let found = verbatim(&text, &path).unwrap();
                    let read: Value = serde_json::from_str(found).unwrap();
                    assert_eq!(read, *value, "{text}");
                }
                for missing in ["a.k", "missing", "a[99]", "a[6][0]", "k[0]"] {
                    assert_eq!(verbatim(&text, missing), None, "{missing}");
                }
                assert_eq!(verbatim(&text, "a[7][0][0].x[1]"), Some(r#""}""#));
            }
        }
    }

    #[test]
    fn nothing_and_text_are_text_and_what_is_no_format_is_named() {
        for text in ["{}", r#"{"a":null}"#, r#"{"a":{"f":{"type":"text"}}}"#] {
            assert_eq!(read(text, None), Ok(Format::Text));
        }
        for (format, param) in [
            ("5", "a.f"),
            ("{}", "a.f.type"),
            (r#"{"type":"xml"}"#, "a.f.type"),
            (r#"{"type":"json_schema"}"#, "a.f.in"),
            (r#"{"type":"json_schema","in":{}}"#, "a.f.in.schema"),
            (
                r#"{"type":"json_schema","in":{"schema":"x"}}"#,
                "a.f.in.schema",
            ),
            (
                r#"{"type":"json_schema","in":{"schema":{},"strict":"yes"}}"#,
                "a.f.in.strict",
            ),
            (r#"{"type":"regex"}"#, "a.f.regex"),
        ] {
            let wrong = read(&format!(r#"{{"a":{{"f":{format}}}}}"#), Some("in")).unwrap_err();
            assert_eq!(
                (wrong.kind, wrong.param.as_deref()),
                (Kind::Invalid, Some(param)),
                "{format}"
            );
        }
    }
}
