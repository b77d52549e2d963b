//! A plugin's configuration against its JSON Schema, as far as settings need one: `type`,
//! `properties`, `required`, `additionalProperties: false`, `items`, `enum`, `minimum`,
//! `maximum`, `minLength`, `maxLength`. Other keywords are the plugin's own to check.

use serde_json::{Map, Value};

use crate::error::Issue;

/// Nesting that is followed; schemas of settings are flat.
const DEPTH_MAX: usize = 32;

/// Everything in `config` (JSON text) that `schema` (JSON text) forbids.
pub(crate) fn check(schema: &str, config: &str) -> Vec<Issue> {
    let mut issues = Vec::new();
    let schema: Value = match serde_json::from_str(schema) {
        Ok(schema) => schema,
        Err(error) => {
            issue(
                &mut issues,
                "",
                format!("the plugin's own config-schema is no JSON: {error}"),
            );
            return issues;
        }
    };
    match serde_json::from_str(config) {
        Ok(config) => check_value(&schema, &config, "", &mut issues),
        Err(error) => issue(&mut issues, "", format!("no JSON: {error}")),
    }
    issues
}

fn check_value(schema: &Value, value: &Value, path: &str, issues: &mut Vec<Issue>) {
    let Some(schema) = schema.as_object() else {
        return;
    };
    if path.bytes().filter(|&b| b == b'/').count() > DEPTH_MAX {
        return;
    }
    if let Some(wanted) = schema.get("type")
        && !has_type(wanted, value)
    {
        return issue(
            issues,
            path,
            format!("is {}; {wanted} is wanted", type_of(value)),
        );
    }
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array)
        && !allowed.contains(value)
    {
        let allowed: Vec<String> = allowed.iter().map(Value::to_string).collect();
        return issue(
            issues,
            path,
            format!("is {value}; one of {} is wanted", allowed.join(", ")),
        );
    }
    check_bounds(schema, value, path, issues);
    match value {
        Value::Object(entries) => check_object(schema, entries, path, issues),
        Value::Array(items) => {
            if let Some(schema) = schema.get("items") {
                for (index, item) in items.iter().enumerate() {
                    check_value(schema, item, &format!("{path}/{index}"), issues);
                }
            }
        }
        _ => {}
    }
}

fn check_object(
    schema: &Map<String, Value>,
    entries: &Map<String, Value>,
    path: &str,
    issues: &mut Vec<Issue>,
) {
    let properties = schema.get("properties").and_then(Value::as_object);
    let closed = schema.get("additionalProperties") == Some(&Value::Bool(false));
    for (key, value) in entries {
        match properties.and_then(|properties| properties.get(key)) {
            Some(schema) => check_value(schema, value, &format!("{path}/{key}"), issues),
            None if closed => {
                let known: Vec<&str> = properties
                    .into_iter()
                    .flat_map(Map::keys)
                    .map(String::as_str)
                    .collect();
                let message = format!("is unknown; known are {}", known.join(", "));
                issue(issues, &format!("{path}/{key}"), message);
            }
            None => {}
        }
    }
    let required = schema.get("required").and_then(Value::as_array);
    for key in required.into_iter().flatten().filter_map(Value::as_str) {
        if !entries.contains_key(key) {
            issue(issues, &format!("{path}/{key}"), "is missing".to_owned());
        }
    }
}

fn check_bounds(schema: &Map<String, Value>, value: &Value, path: &str, issues: &mut Vec<Issue>) {
    let (size, least, most) = match value {
        Value::Number(number) => (number.as_f64(), "minimum", "maximum"),
        Value::String(text) => (Some(text.chars().count() as f64), "minLength", "maxLength"),
        _ => return,
    };
    let bound = |key| schema.get(key).and_then(Value::as_f64);
    let Some(size) = size else { return };
    if bound(least).is_some_and(|bound| size < bound) {
        issue(
            issues,
            path,
            format!("is {value}; {least} is {}", schema[least]),
        );
    }
    if bound(most).is_some_and(|bound| size > bound) {
        issue(
            issues,
            path,
            format!("is {value}; {most} is {}", schema[most]),
        );
    }
}

fn has_type(wanted: &Value, value: &Value) -> bool {
    match wanted {
        Value::String(name) => match name.as_str() {
            "number" => value.is_number(),
            "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
            name => type_of(value) == name,
        },
        Value::Array(any) => any.iter().any(|wanted| has_type(wanted, value)),
        _ => true,
    }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn issue(issues: &mut Vec<Issue>, path: &str, message: String) {
    issues.push(Issue {
        path: path.to_owned(),
        message,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEMA: &str = r#"{
        "type": "object",
        "additionalProperties": false,
        "required": ["detail"],
        "properties": {
            "detail": {"enum": ["low", "high"]},
            "crops": {"type": "integer", "minimum": 1, "maximum": 16},
            "names": {"type": "array", "items": {"type": "string", "minLength": 1}},
            "maybe": {"type": ["string", "null"]}
        }
    }"#;

    #[test]
    fn a_configuration_is_checked_key_by_key() {
        for (config, found) in [
            (
                r#"{"detail": "low", "crops": 4, "names": ["a"], "maybe": null}"#,
                &[][..],
            ),
            (r#"{"detail": "low", "crops": 4.0}"#, &[]),
            ("{}", &["/detail"]),
            (r#"{"detail": "mid"}"#, &["/detail"]),
            (r#"{"detail": "low", "crops": 17}"#, &["/crops"]),
            (r#"{"detail": "low", "crops": 1.5}"#, &["/crops"]),
            (
                r#"{"detail": "low", "names": ["a", 1, ""]}"#,
                &["/names/1", "/names/2"],
            ),
            (
                r#"{"detail": "low", "maybe": 1, "x": 1}"#,
                &["/maybe", "/x"],
            ),
            ("[]", &[""]),
            ("{", &[""]),
        ] {
            let issues = check(SCHEMA, config);
            let paths: Vec<&str> = issues.iter().map(|issue| issue.path.as_str()).collect();
            assert_eq!(paths, found, "{config}");
        }
    }

    #[test]
    fn a_broken_schema_is_the_plugins_mistake_and_is_said() {
        assert!(check("{", "{}")[0].message.contains("config-schema"));
        assert_eq!(check("true", "{}"), []);
    }
}
