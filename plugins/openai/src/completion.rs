//! Reads the body of a completion, the older API: texts to go on with, past every template.

use serde_json::Value;
use visor_plugin_body::{Field, IsNeutral, Wrong};

use crate::ANSWERS_MAX;
use crate::options::{self, Options};

/// Tokens of an answer that does not say, as OpenAI has it.
const MAX_TOKENS: u32 = 16;
/// Most alternatives per token, as OpenAI has it.
const LOGPROBS_MAX: u8 = 5;

/// A request as far as it can be understood without the host.
#[derive(Debug)]
pub(crate) struct CompletionRequest {
    /// At least one.
    pub(crate) prompts: Vec<String>,
    pub(crate) options: Options,
}

/// Reads a body.
///
/// # Errors
/// What is wrong, and the path to it.
pub(crate) fn parse(text: &str) -> Result<CompletionRequest, Wrong> {
    let body = Field::json(text)?;
    let body = Field::body(&body)?;
    let table: [(&str, &str, IsNeutral); 2] = [
        ("echo", "the prompt is not repeated", |field| {
            field.is_false()
        }),
        ("suffix", "this model only writes at the end", |field| {
            field.is_empty()
        }),
    ];
    body.refuse(&table)?;
    let logprobs = body.get("logprobs").optional_count_to(LOGPROBS_MAX)?;
    let mut options = options::parse(&body, logprobs)?;
    options.max_tokens = options.max_tokens.or(Some(MAX_TOKENS));
    best_of(&body, options.count)?;
    Ok(CompletionRequest {
        prompts: prompts(&body.get("prompt"))?,
        options,
    })
}

/// One text, or an array of them. The API takes arrays of token ids, too, one prompt each or alone.
fn prompts(prompt: &Field) -> Result<Vec<String>, Wrong> {
    let Some(Value::Array(items)) = prompt.value() else {
        return Ok(vec![prompt.string()?.to_owned()]);
    };
    if let Some(Value::Number(_) | Value::Array(_)) = items.first() {
        return Err(prompt.unsupported("prompts are text, not token ids"));
    }
    if items.is_empty() || items.len() > ANSWERS_MAX as usize {
        let what = format!("a string or an array of 1 to {ANSWERS_MAX} strings");
        return Err(prompt.wrong_value(&what));
    }
    let texts = prompt.items()?;
    let text = |field: &Field| Ok(field.string()?.to_owned());
    texts.iter().map(text).collect()
}

/// The best of as many as are returned are all of them.
fn best_of(body: &Field, count: u32) -> Result<(), Wrong> {
    match body.get("best_of").given() {
        Some(field) if field.count(1)? != count => {
            Err(field.unsupported("every answer that is made is returned"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use visor_plugin_body::Kind;

    fn parsed(body: &Value) -> Result<CompletionRequest, Wrong> {
        parse(&body.to_string())
    }

    #[test]
    fn a_text_is_gone_on_with() {
        let plain = parsed(&json!({ "prompt": "Once", "echo": false, "suffix": null })).unwrap();
        assert_eq!(plain.prompts, ["Once"]);
        assert_eq!(plain.options.max_tokens, Some(16));
        assert_eq!(plain.options.sampling.logprobs, None);
        let more = parsed(&json!({
            "prompt": ["Once"], "max_tokens": 7, "logprobs": 5, "n": 2, "best_of": 2, "stop": "x",
        }))
        .unwrap();
        assert_eq!(more.prompts, ["Once"]);
        assert_eq!((more.options.max_tokens, more.options.count), (Some(7), 2));
        assert_eq!(more.options.sampling.logprobs, Some(5));
    }

    #[test]
    fn several_texts_keep_their_order() {
        let several = parsed(&json!({ "prompt": ["b", "", "a", "b"], "n": 2 })).unwrap();
        assert_eq!(several.prompts, ["b", "", "a", "b"]);
        assert_eq!(several.options.count, 2, "of each");
        let most = parsed(&json!({ "prompt": vec!["a"; 128] })).unwrap();
        assert_eq!(most.prompts.len(), 128);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let (invalid, unsupported) = (Kind::Invalid, Kind::Unsupported);
        let table = [
            (json!({}), invalid, "prompt"),
            (json!({ "prompt": 5 }), invalid, "prompt"),
            (json!({ "prompt": [1, 2] }), unsupported, "prompt"),
            (json!({ "prompt": [[1], [2]] }), unsupported, "prompt"),
            (json!({ "prompt": [] }), invalid, "prompt"),
            (json!({ "prompt": vec!["a"; 129] }), invalid, "prompt"),
            (json!({ "prompt": ["a", 1] }), invalid, "prompt[1]"),
            (json!({ "prompt": [null] }), invalid, "prompt[0]"),
            (json!({ "prompt": "a", "echo": true }), unsupported, "echo"),
            (
                json!({ "prompt": "a", "suffix": "z" }),
                unsupported,
                "suffix",
            ),
            (
                json!({ "prompt": "a", "best_of": 3 }),
                unsupported,
                "best_of",
            ),
            (json!({ "prompt": "a", "logprobs": 6 }), invalid, "logprobs"),
            (
                json!({ "prompt": "a", "logprobs": true }),
                invalid,
                "logprobs",
            ),
        ];
        for (body, kind, param) in table {
            let error = parsed(&body).unwrap_err();
            assert_eq!(
                (error.kind, error.param.as_deref()),
                (kind, Some(param)),
                "{body}"
            );
        }
    }
}
