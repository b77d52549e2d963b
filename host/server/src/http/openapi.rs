//! What this server answers, as an OpenAPI document of exactly what is mounted.
//!
//! Beside each shipped adapter lies a fragment that describes its paths, and one here describes the
//! server's own. The wiring says which adapters serve which prefixes. A plugin of somebody else, or
//! one that replaces a shipped one, is listed by the routes it asks for: only it knows the rest.

use serde_json::{Value, json};
use visor_sandbox::{Origin, Plugin, Route};

use super::routes;
use crate::config::Config;
use crate::services::ServedModel;
use crate::wiring::{WiredRoute, Wiring};

const OWN: &str = include_str!("openapi.json");
/// Fragments by the ids of the shipped adapters; their paths are those below a prefix.
const SHIPPED: [(&str, &str); 4] = [
    (
        "openai",
        include_str!("../../../../plugins/openai/openapi.json"),
    ),
    (
        "responses",
        include_str!("../../../../plugins/responses/openapi.json"),
    ),
    (
        "anthropic",
        include_str!("../../../../plugins/anthropic/openapi.json"),
    ),
    (
        "ollama",
        include_str!("../../../../plugins/ollama/openapi.json"),
    ),
];

/// The document for a wiring and the model that is served.
#[must_use]
pub(super) fn document(wiring: &Wiring, model: &ServedModel) -> Value {
    let own = fragment(OWN);
    let mut paths = own["paths"].as_object().cloned().unwrap_or_default();
    let mut components = own["components"].clone();
    for route in &wiring.routes {
        let described = described_by(&route.adapter).map(fragment);
        if let Some(described) = &described {
            merge(&mut components, &described["components"]);
        }
        for served in route.adapter.routes() {
            let (below, params) = template(&served.path);
            let path = format!("{}{below}", route.prefix.trim_end_matches('/'));
            if !reaches(wiring, route, &path) {
                continue;
            }
            let method = served.method.to_ascii_lowercase();
            let below = if below.is_empty() { "/" } else { &below };
            let operation = described
                .as_ref()
                .and_then(|described| described["paths"].get(below)?.get(&method).cloned())
                .unwrap_or_else(|| undescribed(&route.adapter, served, &params));
            let methods = paths.entry(path).or_insert_with(|| json!({}));
            methods[method] = operation;
        }
    }
    if !routes::greets(wiring) {
        paths.remove("/");
    }
    if !wiring.config.access.stats_need_key {
        for page in ["/stats", "/metrics"] {
            paths[page]["get"]["security"] = json!([]);
        }
    }
    let mut document = json!({
        "openapi": "3.1.0",
        "info": { "title": "Visor", "version": env!("CARGO_PKG_VERSION") },
        "paths": paths,
        "components": components,
    });
    if !wiring.keys.is_empty() {
        document["security"] = json!([{ "bearer": [] }, { "key": [] }]);
    }
    fill(&mut document, &wiring.config, model);
    document
}

fn fragment(text: &str) -> Value {
    serde_json::from_str(text).expect("a test reads every fragment")
}

/// The fragment of an adapter: of the shipped one only, for a file under its name may do otherwise.
fn described_by(adapter: &Plugin) -> Option<&'static str> {
    let shipped = *adapter.origin() == Origin::Shipped;
    let found = SHIPPED.iter().find(|(id, _)| *id == adapter.id());
    found.filter(|_| shipped).map(|(_, text)| *text)
}

/// Whether a path of a route is not taken over by one with a longer prefix.
fn reaches(wiring: &Wiring, route: &WiredRoute, path: &str) -> bool {
    let first = wiring.routes.iter().find(|other| other.covers(path));
    first.is_some_and(|first| std::ptr::eq(first, route))
}

/// An adapter's path as OpenAPI writes it, and its parameters: `{id...}` takes the rest of a path.
fn template(path: &str) -> (String, Vec<String>) {
    let path = path.replace("...}", "}");
    let segments = path.split('/');
    let names = segments.filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'));
    let params = names.map(str::to_owned).collect();
    (path.trim_end_matches('/').to_owned(), params)
}

/// All that is known of a path whose plugin nobody here wrote.
fn undescribed(adapter: &Plugin, route: &Route, params: &[String]) -> Value {
    let parameter = |name: &String| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } });
    let mut operation = json!({
        "summary": format!("Served by the plugin `{}`.", adapter.id()),
        "responses": { "default": { "description": "What the plugin answers." } },
    });
    if !params.is_empty() {
        operation["parameters"] = params.iter().map(parameter).collect();
    }
    if ["POST", "PUT", "PATCH"].contains(&route.method.to_ascii_uppercase().as_str()) {
        operation["requestBody"] = json!({ "content": { "*/*": {} } });
    }
    operation
}

/// Adds the components of a fragment. Names are unique: each begins with that of its dialect.
fn merge(components: &mut Value, more: &Value) {
    for (kind, named) in more.as_object().into_iter().flatten() {
        let all = components[kind].as_object_mut();
        let mut all = all.map(std::mem::take).unwrap_or_default();
        all.extend(named.as_object().cloned().into_iter().flatten());
        components[kind] = Value::Object(all);
    }
}

/// Puts in what the fragments leave open: `$models` are the names of the model, `$server.key` is that
/// key of the configuration.
fn fill(value: &mut Value, config: &Config, model: &ServedModel) {
    match value {
        Value::String(text) => {
            if let Some(filled) = text
                .strip_prefix('$')
                .and_then(|key| lookup(key, config, model))
            {
                *value = filled;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| fill(item, config, model)),
        Value::Object(members) => {
            members
                .values_mut()
                .for_each(|member| fill(member, config, model));
        }
        _ => {}
    }
}

fn lookup(key: &str, config: &Config, model: &ServedModel) -> Option<Value> {
    let names = || std::iter::once(&model.id).chain(&model.aliases).cloned();
    match key {
        "models" => Some(names().collect()),
        "models_or_null" => Some(names().map(Value::from).chain([Value::Null]).collect()),
        "models_latest" => Some(
            names()
                .flat_map(|name| [format!("{name}:latest"), name])
                .collect(),
        ),
        _ => {
            let all = serde_json::to_value(config).ok()?;
            all.pointer(&format!("/{}", key.replace('.', "/"))).cloned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every name behind a `$ref`.
    fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            Value::Object(members) => {
                found.extend(members.get("$ref").and_then(Value::as_str));
                members
                    .values()
                    .for_each(|member| references(member, found));
            }
            _ => {}
        }
    }

    #[test]
    fn fragments_name_what_is_there_and_nothing_twice() {
        let mut components = fragment(OWN)["components"].clone();
        let count = |components: &Value| -> usize {
            let kinds = components.as_object().into_iter().flatten();
            kinds
                .map(|(_, named)| named.as_object().map_or(0, serde_json::Map::len))
                .sum()
        };
        let mut expected = count(&components);
        for (_, text) in SHIPPED {
            let more = fragment(text)["components"].clone();
            expected += count(&more);
            merge(&mut components, &more);
        }
        assert_eq!(count(&components), expected, "a name is there twice");
        let all = json!({ "components": components });
        for text in SHIPPED.map(|(_, text)| text).into_iter().chain([OWN]) {
            let fragment = fragment(text);
            let mut found = Vec::new();
            references(&fragment, &mut found);
            for reference in found {
                let pointer = reference.strip_prefix('#').expect("here");
                assert!(all.pointer(pointer).is_some(), "{reference}");
            }
        }
    }

    #[test]
    fn paths_of_adapters_become_templates() {
        let plain = |path: &str| template(path).0;
        assert_eq!(
            (plain("/"), plain("/models")),
            (String::new(), "/models".to_owned())
        );
        assert_eq!(
            template("/a/{b}/{c...}"),
            (
                "/a/{b}/{c}".to_owned(),
                vec!["b".to_owned(), "c".to_owned()]
            )
        );
    }

    /// The pages of the server's own are a handful of lines in one file: what is routed there is told.
    #[test]
    fn every_page_of_the_server_is_described() {
        let own = fragment(OWN);
        let paths = own["paths"].as_object().expect("paths");
        let mut described: Vec<&str> = paths.keys().map(String::as_str).collect();
        described.sort_unstable();
        let pages = include_str!("routes.rs").split(".route(\"").skip(1);
        let mut routed: Vec<&str> = pages.filter_map(|rest| rest.split('"').next()).collect();
        routed.sort_unstable();
        assert_eq!(described, routed);
    }
}
