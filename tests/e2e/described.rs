//! `/openapi.json` tells what is mounted, all of it and nothing else.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::server::{Server, fixture, repository, shared};

/// Methods and paths of a document.
fn operations(document: &Value) -> BTreeSet<(String, String)> {
    let paths = document["paths"].as_object().expect("paths");
    let pairs = paths.iter().flat_map(|(path, methods)| {
        let methods = methods.as_object().expect("methods").keys();
        methods.map(move |method| (method.clone(), path.clone()))
    });
    pairs.collect()
}

/// The same of a fragment, below a prefix.
fn fragment(file: &str, prefix: &str) -> BTreeSet<(String, String)> {
    let text = fixture(file);
    let document: Value = serde_json::from_slice(&text).expect("JSON");
    let below = operations(&document).into_iter();
    below
        .map(|(method, path)| match prefix {
            "" => (method, path),
            _ => (method, format!("{prefix}{}", path.trim_end_matches('/'))),
        })
        .collect()
}

#[test]
fn the_document_is_all_that_is_mounted() {
    let server = shared();
    let document = server.get("/openapi.json").ok();
    let mut expected = fragment("host/server/src/http/openapi.json", "");
    for (adapter, prefix) in [
        ("openai", "/v1"),
        ("responses", "/v1/responses"),
        ("anthropic", "/v1/messages"),
        ("ollama", "/api"),
    ] {
        let file = format!("plugins/{adapter}/openapi.json");
        assert!(repository(&file).exists());
        expected.extend(fragment(&file, prefix));
    }
    assert_eq!(operations(&document), expected);
    let text = document.to_string();
    assert!(
        !text.contains("Served by the plugin"),
        "a route of a shipped adapter is not described"
    );
    assert!(!text.contains("\"$models"), "something was not filled in");
    assert!(document.get("security").is_none(), "there are no keys");
    for (method, path) in operations(&document) {
        let path = path.replace("{id}", "x");
        let answer = server.send(&method.to_uppercase(), &path, b"");
        assert!(
            ![405, 500].contains(&answer.status),
            "{method} {path}: {}",
            answer.status
        );
        let nowhere = answer.status == 404 && !answer.text().contains("model");
        assert!(!nowhere, "{method} {path} is not there");
    }
}

#[test]
fn what_is_not_mounted_is_not_told() {
    let server = Server::start_with(
        "[[routes]]\nprefix = \"/elsewhere\"\nadapter = \"ollama\"\ntemplate = \"phi3\"\nimage_policy = \"hd\"\n",
    );
    let document = server.get("/openapi.json").ok();
    let mut expected = fragment("host/server/src/http/openapi.json", "");
    expected.extend(fragment("plugins/ollama/openapi.json", "/elsewhere"));
    assert_eq!(operations(&document), expected);
    assert!(
        !document.to_string().contains("Anthropic"),
        "not even its schemas"
    );
    // Whoever replaces a shipped plugin says by its routes what there is now, and nothing more is known.
    server.install("ollama", &fixture("plugins/built/anthropic.wasm"));
    crate::server::until("the replacement is told", || {
        let document = server.get("/openapi.json").ok();
        let replaced = &document["paths"]["/elsewhere/count_tokens"]["post"];
        let summary = replaced["summary"].as_str()?;
        assert_eq!(summary, "Served by the plugin `ollama`.");
        assert!(document["paths"].get("/elsewhere/chat").is_none());
        Some(())
    });
}
