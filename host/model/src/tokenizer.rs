//! Text to token ids and back, and prompts with images from their parts.
//!
//! Two tokenizers of one vocabulary: one that knows the control tokens, for what templates say, and
//! one that does not, for what clients say. A client's `<|end|>` is therefore never the token.

mod assemble;
mod kind;

use std::collections::HashMap;
use std::path::Path;

pub use assemble::{Prompt, PromptPart};
use kind::Kinds;
pub use kind::TokenKind;

use crate::ModelError;
use crate::weights::read_plain;

/// Ends the model's turn wherever it exists, whatever the checkpoint's configuration says: the
/// published one names only `</s>`, which the model never says.
const STOP_TOKENS: [&str; 4] = ["</s>", "<|endoftext|>", "<|assistant|>", "<|end|>"];

/// What every encoded chunk begins with.
const BOS: &str = "<s>";

/// The tokenizer of a checkpoint.
pub struct Tokenizer {
    with_control: tokenizers::Tokenizer,
    text_only: tokenizers::Tokenizer,
    control_tokens: HashMap<String, ControlToken>,
    bos: u32,
    vocab_size: u32,
    kinds: Kinds,
    /// Longest piece of the vocabulary; no token covers more of a text.
    piece_bytes_max: usize,
}

#[derive(Debug, Clone, Copy)]
struct ControlToken {
    id: u32,
    /// Swallows the whitespace that follows it.
    strips_right: bool,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} tokens)", self.vocab_size)
    }
}

impl Tokenizer {
    /// Reads a Hugging Face `tokenizer.json`.
    ///
    /// # Errors
    /// A file that cannot be read, and what [`Self::from_bytes`] refuses.
    pub fn from_file(path: &Path) -> Result<Self, ModelError> {
        let failed = |message: String| ModelError::Tokenizer {
            file: path.display().to_string(),
            message,
        };
        let bytes = read_plain(path).map_err(|error| failed(error.to_string()))?;
        Self::parse(&bytes).map_err(failed)
    }

    /// Parses the content of a Hugging Face `tokenizer.json`.
    ///
    /// # Errors
    /// Content that is no tokenizer, or one without the token `<s>`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ModelError> {
        Self::parse(bytes).map_err(|message| ModelError::Tokenizer {
            file: "tokenizer.json".into(),
            message,
        })
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut with_control: tokenizers::Tokenizer =
            serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        // It would keep what users wrote: ten thousand texts for each thread that ever encoded one.
        let mut model = with_control.get_model().clone();
        model.resize_cache(0);
        with_control.with_model(model);
        // Both would cut or lengthen prompts behind our back.
        with_control.with_padding(None);
        with_control
            .with_truncation(None)
            .map_err(|error| error.to_string())?;
        let control_tokens: HashMap<_, _> = with_control
            .get_added_tokens_decoder()
            .into_iter()
            .map(|(id, token)| {
                let strips_right = token.rstrip;
                (token.content, ControlToken { id, strips_right })
            })
            .collect();
        let bos = control_tokens.get(BOS).map(|token| token.id);
        let bos = bos.ok_or_else(|| format!("no added token {BOS}; is this a Phi-3 tokenizer?"))?;
        let vocabulary = with_control.get_vocab(true);
        let text_only = without_control(&with_control)?;
        // A vocabulary that cannot spell everything fails on the first odd character: find out now.
        text_only
            .encode_fast("a \u{10fffd}", false)
            .map_err(|error| format!("it cannot encode every text: {error}"))?;
        let last = vocabulary.values().max();
        let vocab_size = last.map_or(0, |id| id.saturating_add(1));
        // Each id takes memory, whether there is a token or not.
        if vocab_size as usize > vocabulary.len().saturating_mul(2) {
            let count = vocabulary.len();
            return Err(format!("{count} tokens have ids up to {}", vocab_size - 1));
        }
        let mut tokenizer = Self {
            vocab_size,
            kinds: Kinds::default(),
            piece_bytes_max: vocabulary.keys().map(String::len).max().unwrap_or(1),
            with_control,
            text_only,
            control_tokens,
            bos,
        };
        tokenizer.kinds = tokenizer.new_kinds();
        Ok(tokenizer)
    }

    /// One more than the largest token id.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    /// Ids of a text, which is never read as control tokens; no BOS.
    pub fn encode_text(&self, text: &str) -> Vec<u32> {
        encode(&self.text_only, text)
    }

    /// Ids of a text in which control tokens are spelled out, as Hugging Face encodes it; no BOS.
    pub fn encode_with_control(&self, text: &str) -> Vec<u32> {
        encode(&self.with_control, text)
    }

    /// Text of some ids; `skip_special` leaves out the special tokens. Unknown ids are left out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        // Only a decoder that the tokenizer file itself misconfigures can fail.
        self.with_control
            .decode(ids, skip_special)
            .unwrap_or_default()
    }

    /// Id of a control token such as `<|end|>`, if there is one of exactly that spelling.
    pub fn control_token(&self, text: &str) -> Option<u32> {
        self.control_tokens.get(text).map(|token| token.id)
    }

    /// Tokens that [`Self::encode_text`] makes of a text.
    pub fn count(&self, text: &str) -> u32 {
        u32::try_from(self.encode_text(text).len()).unwrap_or(u32::MAX)
    }

    /// Tokens that texts of so many bytes come to at least, whatever they say: found without reading them.
    pub fn count_least(&self, bytes: usize) -> u32 {
        u32::try_from(bytes / self.piece_bytes_max.max(1)).unwrap_or(u32::MAX)
    }

    /// Length in bytes of a prefix of `text` that takes at most `tokens_max` tokens; one more
    /// character would not fit. Ends between characters.
    pub fn fit(&self, text: &str, tokens_max: u32) -> usize {
        // No prefix longer than this can fit: it would need a piece that does not exist.
        let reach = (tokens_max as usize).saturating_mul(self.piece_bytes_max);
        let text = &text[..text.floor_char_boundary(reach)];
        let fits = |bytes: usize| self.count(&text[..bytes]) <= tokens_max;
        if fits(text.len()) {
            return text.len();
        }
        let mut bytes = self.end_of_token(text, tokens_max);
        // Cut there, the text may split into other tokens: step back until it fits, then on again.
        while !fits(bytes) {
            bytes = text.floor_char_boundary(bytes.saturating_sub(1));
        }
        loop {
            let next = text.ceil_char_boundary(bytes + 1);
            if !fits(next) {
                return bytes;
            }
            bytes = next;
        }
    }

    /// Where the first `tokens` tokens of a text end, in bytes.
    fn end_of_token(&self, text: &str, tokens: u32) -> usize {
        let Some(last) = (tokens as usize).checked_sub(1) else {
            return 0;
        };
        let encoding = self.text_only.encode(text, false);
        let end = encoding
            .ok()
            .and_then(|encoding| Some(encoding.get_offsets().get(last)?.1));
        text.floor_char_boundary(end.unwrap_or_default())
    }

    /// Ids at which generation stops: the configured ones and those that end a turn, sorted.
    pub fn stop_ids(&self, config_eos: &[u32]) -> Vec<u32> {
        let named = STOP_TOKENS
            .iter()
            .filter_map(|name| self.control_token(name));
        let mut ids: Vec<u32> = config_eos.iter().copied().chain(named).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

/// The same vocabulary and rules, but nothing added: control tokens are spelled, not recognised.
fn without_control(tokenizer: &tokenizers::Tokenizer) -> Result<tokenizers::Tokenizer, String> {
    let mut plain = tokenizers::Tokenizer::new(tokenizer.get_model().clone());
    let normalizer = tokenizer.get_normalizer().cloned();
    plain
        .with_normalizer(normalizer)
        .map_err(|error| error.to_string())?;
    plain.with_pre_tokenizer(tokenizer.get_pre_tokenizer().cloned());
    plain.with_decoder(tokenizer.get_decoder().cloned());
    Ok(plain)
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str) -> Vec<u32> {
    // `parse` made sure that every text can be encoded.
    let encoding = tokenizer.encode_fast(text, false);
    encoding
        .map(|encoding| encoding.get_ids().to_vec())
        .unwrap_or_default()
}
