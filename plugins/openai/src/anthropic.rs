//! The models as Anthropic's client reads them: it asks for them below the same paths as OpenAI's,
//! and its header tells them apart.
//!
//! Pure. That client's messages are answered by `plugins/anthropic`.

use serde_json::{Value, json};
use visor_plugin_body::rfc3339;

/// Header of every request of that client, and of no other.
pub(crate) const HEADER: &str = "anthropic-version";

/// A model; `created` is in Unix seconds.
pub(crate) fn model(id: &str, created: u64, context_tokens: u32) -> Value {
    json!({
        "type": "model",
        "id": id,
        "display_name": id,
        "created_at": rfc3339(created.saturating_mul(1000)),
        "lifecycle": "active",
        "max_input_tokens": context_tokens,
    })
}

/// All models, on one page.
pub(crate) fn page(models: &[Value]) -> Value {
    let id = |model: Option<&Value>| model.map(|model| model["id"].clone());
    json!({
        "data": models,
        "has_more": false,
        "first_id": id(models.first()),
        "last_id": id(models.last()),
    })
}

/// There is no such model.
pub(crate) fn not_found(id: &str) -> Value {
    let error = json!({ "type": "not_found_error", "message": format!("model: {id}") });
    json!({ "type": "error", "error": error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_all_models_and_names_both_ends() {
        let one = model("m", 1_700_000_000, 4096);
        let expected = json!({
            "type": "model", "id": "m", "display_name": "m", "created_at": "2023-11-14T22:13:20.000Z",
            "lifecycle": "active", "max_input_tokens": 4096,
        });
        assert_eq!(one, expected);
        let two = [one, model("n", 0, 1)];
        assert_eq!(
            page(&two),
            json!({ "data": two, "has_more": false, "first_id": "m", "last_id": "n" })
        );
        let none = json!({ "data": [], "has_more": false, "first_id": null, "last_id": null });
        assert_eq!(page(&[]), none);
    }

    #[test]
    fn a_missing_model_is_an_error_of_that_api() {
        let error = json!({ "type": "not_found_error", "message": "model: x" });
        assert_eq!(not_found("x"), json!({ "type": "error", "error": error }));
    }
}
