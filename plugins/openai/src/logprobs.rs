//! How likely tokens were, in the shapes of both APIs.

use serde_json::{Map, Value, json};

use crate::exports::visor::plugin::adapter::{TokenChance, TokenInfo};

/// What clients take for minus infinity.
const LEAST: f32 = -9999.0;

/// Tokens of a chat: each with its bytes, for a token may be a piece of a character.
pub(crate) fn chat(tokens: &[TokenInfo]) -> Value {
    let token = |info: &TokenInfo| {
        let mut token = chance(&info.chosen);
        token["top_logprobs"] = info.alternatives.iter().map(chance).collect();
        token
    };
    json!({ "content": tokens.iter().map(token).collect::<Value>(), "refusal": null })
}

fn chance(chance: &TokenChance) -> Value {
    json!({
        "token": String::from_utf8_lossy(&chance.bytes),
        "logprob": chance.logprob.max(LEAST),
        "bytes": chance.bytes,
    })
}

/// Tokens of a completion, the first of which begins `offset` characters behind the prompt.
pub(crate) fn completion(tokens: &[TokenInfo], offset: usize) -> Value {
    let chosen = || tokens.iter().map(|info| &info.chosen);
    let names: Vec<String> = chosen().map(|chance| name(&chance.bytes)).collect();
    let logprobs: Vec<f32> = chosen().map(|chance| chance.logprob.max(LEAST)).collect();
    let offsets = chosen().scan(offset, |end, chance| {
        let begin = *end;
        *end += characters(&chance.bytes);
        Some(begin)
    });
    let alternatives = |info: &TokenInfo| -> Value {
        let all = info.alternatives.iter();
        let all = all.map(|chance| (name(&chance.bytes), json!(chance.logprob.max(LEAST))));
        Value::Object(all.collect::<Map<_, _>>())
    };
    json!({
        "tokens": names,
        "token_logprobs": logprobs,
        "top_logprobs": tokens.iter().map(alternatives).collect::<Vec<_>>(),
        "text_offset": offsets.collect::<Vec<_>>(),
    })
}

/// Characters that begin in these bytes of UTF-8.
pub(crate) fn characters(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count()
}

/// This API has no bytes: a piece of a character is spelled.
fn name(bytes: &[u8]) -> String {
    let spell = || bytes.iter().map(|byte| format!("\\x{byte:02x}"));
    std::str::from_utf8(bytes).map_or_else(
        |_| format!("bytes:{}", spell().collect::<String>()),
        str::to_owned,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(bytes: &[u8], alternatives: &[&[u8]]) -> TokenInfo {
        let chance = |bytes: &[u8]| TokenChance {
            token: 1,
            bytes: bytes.to_vec(),
            logprob: -0.5,
        };
        TokenInfo {
            chosen: chance(bytes),
            alternatives: alternatives.iter().map(|bytes| chance(bytes)).collect(),
        }
    }

    #[test]
    fn a_chat_tells_bytes_beside_the_text() {
        let told = chat(&[token(" é".as_bytes(), &[b"\xF0"])]);
        assert_eq!(
            told,
            json!({ "refusal": null, "content": [{
                "token": " é", "logprob": -0.5, "bytes": [32, 195, 169],
                "top_logprobs": [{ "token": "\u{FFFD}", "logprob": -0.5, "bytes": [240] }],
            }]})
        );
    }

    #[test]
    fn a_completion_tells_where_tokens_begin_and_spells_pieces() {
        let tokens = [
            token("é".as_bytes(), &[b"a"]),
            token(b"\xF0\x9F", &[]),
            token(b"\xA6\x80", &[]),
            token(b"x", &[]),
        ];
        assert_eq!(
            completion(&tokens, 3),
            json!({
                "tokens": ["é", "bytes:\\xf0\\x9f", "bytes:\\xa6\\x80", "x"],
                "token_logprobs": [-0.5, -0.5, -0.5, -0.5],
                "top_logprobs": [{ "a": -0.5 }, {}, {}, {}],
                "text_offset": [3, 4, 5, 5],
            })
        );
    }

    #[test]
    fn the_impossible_is_a_number() {
        let mut never = token(b"x", &[]);
        never.chosen.logprob = f32::NEG_INFINITY;
        assert_eq!(chat(&[never])["content"][0]["logprob"], -9999.0);
    }
}
