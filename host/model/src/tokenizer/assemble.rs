//! Prompts from parts: where BOS, control tokens and image slots go.
//!
//! Source: Phi-3.5-vision `processing_phi3_v.py`, `_convert_images_texts_to_inputs`: the text is
//! cut at the images, every chunk is encoded on its own and so begins with BOS, an empty one too.

use super::{ControlToken, Tokenizer};
use crate::ModelError;

const IMAGE_TAG_START: &str = "<|image_";
const IMAGE_TAG_END: &str = "|>";

/// A piece of a prompt as a template renders it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptPart {
    /// What somebody said: never read as control tokens. Neighbouring texts are one text.
    Text(String),
    /// A control token, spelled as the tokenizer has it.
    Control(String),
    /// The slots of an image.
    Image {
        /// Which of the request's images, from 0.
        index: u32,
        /// Slots it takes.
        tokens: u32,
    },
}

/// Token ids and image slots, ready for the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// A token where not negative; `-(k + 1)` is a slot of image `k`.
    pub ids: Vec<i64>,
    /// How many of the ids are slots.
    pub image_tokens: u32,
}

impl Tokenizer {
    /// Token ids of a prompt given in parts, the same as the reference's for the rendered text.
    ///
    /// # Errors
    /// A control token that the tokenizer does not have.
    pub fn assemble(&self, parts: &[PromptPart]) -> Result<Prompt, ModelError> {
        let mut prompt = PromptBuilder::new(self);
        for part in parts {
            match part {
                PromptPart::Text(text) => prompt.text.push_str(text),
                PromptPart::Control(name) => {
                    let token = self.control_tokens.get(name.as_str()).copied();
                    let unknown =
                        || ModelError::Prompt(format!("the tokenizer has no control token {name}"));
                    prompt.push_control(token.ok_or_else(unknown)?);
                }
                PromptPart::Image { index, tokens } => prompt.push_image(*index, *tokens),
            }
        }
        Ok(prompt.finish())
    }

    /// Token ids of a prompt that is rendered already, with control tokens and `<|image_k|>` tags
    /// (from 1) spelled in the text. For trusted text only, such as a reference's own prompts.
    ///
    /// # Errors
    /// A tag without an entry in `image_tokens`.
    pub fn assemble_rendered(
        &self,
        text: &str,
        image_tokens: &[u32],
    ) -> Result<Prompt, ModelError> {
        let mut prompt = PromptBuilder::new(self);
        let mut rest = text;
        while let Some((chunk, number, after)) = split_at_image(rest) {
            let index = number.checked_sub(1);
            let tokens = index.and_then(|index| image_tokens.get(index as usize));
            let (Some(index), Some(&tokens)) = (index, tokens) else {
                let images = image_tokens.len();
                let message = format!("<|image_{number}|> in a prompt with {images} images");
                return Err(ModelError::Prompt(message));
            };
            prompt.push_ids(&self.encode_with_control(chunk));
            prompt.push_image(index, tokens);
            rest = after;
        }
        prompt.push_ids(&self.encode_with_control(rest));
        Ok(prompt.finish())
    }
}

/// The text before the first image tag, the tag's number (saturated), the text after it.
fn split_at_image(text: &str) -> Option<(&str, u32, &str)> {
    let mut from = 0;
    loop {
        let start = from + text[from..].find(IMAGE_TAG_START)?;
        let number = &text[start + IMAGE_TAG_START.len()..];
        let digits = number.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = number.split_at(digits);
        if let Some(after) = after.strip_prefix(IMAGE_TAG_END)
            && digits > 0
        {
            return Some((&text[..start], number.parse().unwrap_or(u32::MAX), after));
        }
        from = start + IMAGE_TAG_START.len();
    }
}

/// Ids so far, and the text that is not encoded yet because more may follow it.
struct PromptBuilder<'a> {
    tokenizer: &'a Tokenizer,
    prompt: Prompt,
    text: String,
    /// Whether whitespace that begins `text` is swallowed.
    strips_text: bool,
}

impl<'a> PromptBuilder<'a> {
    fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            prompt: Prompt {
                ids: vec![i64::from(tokenizer.bos)],
                image_tokens: 0,
            },
            text: String::new(),
            strips_text: false,
        }
    }

    fn push_ids(&mut self, ids: &[u32]) {
        self.prompt.ids.extend(ids.iter().copied().map(i64::from));
    }

    fn push_control(&mut self, token: ControlToken) {
        self.flush();
        self.push_ids(&[token.id]);
        self.strips_text = token.strips_right;
    }

    /// Slots, and the BOS of the chunk after them.
    fn push_image(&mut self, index: u32, tokens: u32) {
        self.flush();
        let slot = -(i64::from(index) + 1);
        self.prompt
            .ids
            .extend(std::iter::repeat_n(slot, tokens as usize));
        self.prompt.image_tokens = self.prompt.image_tokens.saturating_add(tokens);
        self.push_ids(&[self.tokenizer.bos]);
        self.strips_text = false;
    }

    /// Encodes the waiting text as one segment.
    fn flush(&mut self) {
        let text = std::mem::take(&mut self.text);
        let text = if self.strips_text {
            text.trim_start()
        } else {
            &text
        };
        let ids = self.tokenizer.encode_text(text);
        self.push_ids(&ids);
        self.strips_text = false;
    }

    fn finish(mut self) -> Prompt {
        self.flush();
        self.prompt
    }
}
