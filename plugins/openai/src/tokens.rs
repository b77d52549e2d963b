//! Text to token ids and back, in the words of vLLM and SGLang, which OpenAI has none for.

use serde_json::{Value, json};
use visor_plugin_body::{Field, Wrong};

/// A text whose tokens are asked for.
#[derive(Debug, PartialEq)]
pub(crate) struct TokenizeRequest {
    pub(crate) model: Option<String>,
    pub(crate) prompt: String,
    /// Whether the token that begins every prompt is put in front.
    pub(crate) begin: bool,
}

/// Ids whose text is asked for.
#[derive(Debug, PartialEq)]
pub(crate) struct DetokenizeRequest {
    pub(crate) model: Option<String>,
    pub(crate) tokens: Vec<u32>,
}

/// Reads a body of `/tokenize`.
///
/// # Errors
/// What is wrong, and the path to it.
pub(crate) fn parse_tokenize(text: &str) -> Result<TokenizeRequest, Wrong> {
    let body = Field::json(text)?;
    let body = Field::body(&body)?;
    if let Some(messages) = body.get("messages").given() {
        return Err(messages.unsupported("only a 'prompt' is taken apart"));
    }
    let begin = body.get("add_special_tokens").given();
    Ok(TokenizeRequest {
        model: body.get("model").text()?,
        prompt: body.get("prompt").string()?.to_owned(),
        begin: begin.map_or(Ok(true), |field| field.boolean())?,
    })
}

/// Reads a body of `/detokenize`.
///
/// # Errors
/// What is wrong, and the path to it.
pub(crate) fn parse_detokenize(text: &str) -> Result<DetokenizeRequest, Wrong> {
    let body = Field::json(text)?;
    let body = Field::body(&body)?;
    let tokens = body.get("tokens").items()?;
    Ok(DetokenizeRequest {
        model: body.get("model").text()?,
        tokens: tokens
            .iter()
            .map(|id| id.count(0))
            .collect::<Result<_, _>>()?,
    })
}

/// The answer to `/tokenize`.
pub(crate) fn tokenized(tokens: &[u32], context_tokens: u32) -> Value {
    json!({ "count": tokens.len(), "max_model_len": context_tokens, "tokens": tokens })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_begins_as_prompts_do_unless_that_is_not_wanted() {
        let parsed = |body: Value| parse_tokenize(&body.to_string());
        let plain = parsed(json!({ "prompt": "a" })).unwrap();
        assert_eq!((plain.prompt.as_str(), plain.begin), ("a", true));
        let bare = parsed(json!({ "prompt": "a", "add_special_tokens": false, "model": "m" }));
        let bare = bare.unwrap();
        assert_eq!((bare.begin, bare.model.as_deref()), (false, Some("m")));
        for (body, param) in [
            (json!({}), "prompt"),
            (json!({ "prompt": 1 }), "prompt"),
            (json!({ "messages": [] }), "messages"),
        ] {
            assert_eq!(parsed(body).unwrap_err().param.as_deref(), Some(param));
        }
    }

    #[test]
    fn ids_are_whole_numbers() {
        let parsed = |body: Value| parse_detokenize(&body.to_string());
        assert_eq!(parsed(json!({ "tokens": [1, 2] })).unwrap().tokens, [1, 2]);
        for body in [
            json!({}),
            json!({ "tokens": [-1] }),
            json!({ "tokens": "a" }),
        ] {
            assert!(parsed(body).is_err());
        }
    }
}
