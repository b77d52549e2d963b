//! What the server provides to plugins: the models it serves, as facts.

use std::sync::Arc;

use crate::chat::Extensions;

/// What plugins may reach beyond their own request.
pub trait HostServices: Send + Sync + 'static {
    /// Models that are served; the first is the default. Cheap: called per request.
    fn models(&self) -> Vec<Arc<dyn ModelFacts>>;
}

/// How a model wants its images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vision {
    /// Width of a tile, in pixels.
    pub tile_width_px: u32,
    /// Height of a tile, in pixels.
    pub tile_height_px: u32,
    /// Most tiles the model was trained with, the overview not counted.
    pub tiles_max: u32,
    /// Whether an overview accompanies the grid.
    pub overview: bool,
}

/// One served model and its tokenizer, as far as a plugin may know them.
pub trait ModelFacts: Send + Sync {
    /// Identifier in the API.
    fn id(&self) -> String;
    /// Other names clients may use.
    fn aliases(&self) -> Vec<String>;
    /// Unix seconds.
    fn created_s(&self) -> u64;
    /// Context length in tokens.
    fn context_tokens(&self) -> u32;
    /// How it wants images; none when it takes none.
    fn vision(&self) -> Option<Vision>;
    /// Prompt tokens of an image with this grid.
    fn image_tokens(&self, columns: u32, rows: u32) -> u32;
    /// Tokens of plain text.
    fn count(&self, text: &str) -> u32;
    /// Token ids; control tokens are recognized only when `control`.
    fn encode(&self, text: &str, control: bool) -> Vec<u32>;
    /// Text of token ids.
    fn decode(&self, tokens: &[u32]) -> String;
    /// Id of a control token, if the model has it.
    fn control_token(&self, text: &str) -> Option<u32>;
    /// Bytes of the longest prefix of `text` with at most `tokens_max` tokens.
    fn fit(&self, text: &str, tokens_max: u32) -> u32;
    /// Anything else: quantization, license, family.
    fn details(&self) -> Extensions;
}

/// The model of trial runs where no real one is at hand: the Phi-3.5-vision geometry, and a
/// tokenizer that takes every byte for a token.
#[derive(Clone, Copy, Debug, Default)]
pub struct SampleModel;

/// Control tokens of the sample model, spelled as Phi-3 does; ids follow the bytes.
const SAMPLE_CONTROL: [&str; 4] = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"];
const SAMPLE_CONTROL_FIRST: u32 = 256;

impl ModelFacts for SampleModel {
    fn id(&self) -> String {
        "sample".to_owned()
    }

    fn aliases(&self) -> Vec<String> {
        Vec::new()
    }

    fn created_s(&self) -> u64 {
        0
    }

    fn context_tokens(&self) -> u32 {
        4096
    }

    fn vision(&self) -> Option<Vision> {
        Some(Vision {
            tile_width_px: 336,
            tile_height_px: 336,
            tiles_max: 16,
            overview: true,
        })
    }

    fn image_tokens(&self, columns: u32, rows: u32) -> u32 {
        let tiles = columns
            .saturating_mul(rows)
            .saturating_add(1)
            .saturating_mul(144);
        tiles
            .saturating_add(1)
            .saturating_add(rows.saturating_add(1).saturating_mul(12))
    }

    fn count(&self, text: &str) -> u32 {
        u32::try_from(text.len()).unwrap_or(u32::MAX)
    }

    fn encode(&self, text: &str, control: bool) -> Vec<u32> {
        match self.control_token(text) {
            Some(token) if control => vec![token],
            _ => text.bytes().map(u32::from).collect(),
        }
    }

    fn decode(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens
            .iter()
            .filter_map(|&token| u8::try_from(token).ok())
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn control_token(&self, text: &str) -> Option<u32> {
        let index = SAMPLE_CONTROL.iter().position(|&known| known == text)?;
        Some(SAMPLE_CONTROL_FIRST + u32::try_from(index).ok()?)
    }

    fn fit(&self, text: &str, tokens_max: u32) -> u32 {
        let mut end = (tokens_max as usize).min(text.len());
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        u32::try_from(end).unwrap_or(u32::MAX)
    }

    fn details(&self) -> Extensions {
        Vec::new()
    }
}

/// Services with the sample model only, for checks without a server.
impl HostServices for SampleModel {
    fn models(&self) -> Vec<Arc<dyn ModelFacts>> {
        vec![Arc::new(*self)]
    }
}
