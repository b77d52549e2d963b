//! Import `model`: facts of the served models and their tokenizers.

use std::sync::Arc;

use wasmtime::component::Resource;

use crate::bindings::adapter::visor::plugin::model as wit;
use crate::chat::Extensions;
use crate::error::{ErrorCode, GuestError};
use crate::guest::{GuestState, HostRefusal};
use crate::services::ModelFacts;

/// `model.handle`
#[expect(unreachable_pub, reason = "bindgen re-exports it")]
pub struct ModelHandle {
    pub(crate) facts: Arc<dyn ModelFacts>,
}

/// `model.tokenizer`
#[expect(unreachable_pub, reason = "bindgen re-exports it")]
pub struct TokenizerHandle {
    facts: Arc<dyn ModelFacts>,
}

impl GuestState {
    fn facts(&self, handle: &Resource<ModelHandle>) -> wasmtime::Result<Arc<dyn ModelFacts>> {
        self.on_time()?;
        Ok(Arc::clone(&self.table.get(handle)?.facts))
    }

    fn tokens(&self, handle: &Resource<TokenizerHandle>) -> wasmtime::Result<Arc<dyn ModelFacts>> {
        self.on_time()?;
        Ok(Arc::clone(&self.table.get(handle)?.facts))
    }

    /// A text with what was lifted out of it: nobody asks how many tokens stand for it here.
    fn whole(&mut self, text: String) -> wasmtime::Result<String> {
        let lifted = Arc::clone(&self.lifted);
        if !lifted.is_in(&text) {
            return Ok(text);
        }
        let originals = lifted.pieces(&text).filter_map(|piece| piece.original);
        let bytes = originals.fold(self.tokenized_bytes, |sum, o| sum.saturating_add(o.len()));
        let bytes_max = self.limits.tokenized_bytes_max();
        if bytes > bytes_max {
            let message = format!(
                "{bytes} bytes of base64 are too many to be taken apart into tokens; {bytes_max} are allowed"
            );
            let refusal = GuestError::new(ErrorCode::TooLarge, message);
            return Err(HostRefusal(refusal).into());
        }
        self.tokenized_bytes = bytes;
        Ok(lifted.pieces(&text).map(|piece| piece.shown()).collect())
    }
}

impl wit::Host for GuestState {
    fn available(&mut self) -> wasmtime::Result<Vec<Resource<ModelHandle>>> {
        self.on_time()?;
        let models = self.core.shared.services.models();
        models
            .into_iter()
            .map(|facts| Ok(self.table.push(ModelHandle { facts })?))
            .collect()
    }

    fn find(&mut self, name: String) -> wasmtime::Result<Option<Resource<ModelHandle>>> {
        self.on_time()?;
        let models = self.core.shared.services.models();
        let found = models
            .into_iter()
            .find(|facts| facts.id() == name || facts.aliases().contains(&name));
        found
            .map(|facts| Ok(self.table.push(ModelHandle { facts })?))
            .transpose()
    }
}

impl wit::HostHandle for GuestState {
    fn id(&mut self, handle: Resource<ModelHandle>) -> wasmtime::Result<String> {
        Ok(self.facts(&handle)?.id())
    }

    fn aliases(&mut self, handle: Resource<ModelHandle>) -> wasmtime::Result<Vec<String>> {
        Ok(self.facts(&handle)?.aliases())
    }

    fn created(&mut self, handle: Resource<ModelHandle>) -> wasmtime::Result<u64> {
        Ok(self.facts(&handle)?.created_s())
    }

    fn context_length(&mut self, handle: Resource<ModelHandle>) -> wasmtime::Result<u32> {
        Ok(self.facts(&handle)?.context_tokens())
    }

    fn vision(&mut self, handle: Resource<ModelHandle>) -> wasmtime::Result<Option<wit::Vision>> {
        Ok(self.facts(&handle)?.vision().map(|vision| wit::Vision {
            tile_width: vision.tile_width_px,
            tile_height: vision.tile_height_px,
            max_tiles: vision.tiles_max,
            overview: vision.overview,
        }))
    }

    fn image_tokens(
        &mut self,
        handle: Resource<ModelHandle>,
        columns: u32,
        rows: u32,
    ) -> wasmtime::Result<u32> {
        Ok(self.facts(&handle)?.image_tokens(columns, rows))
    }

    fn tokenizer(
        &mut self,
        handle: Resource<ModelHandle>,
    ) -> wasmtime::Result<Resource<TokenizerHandle>> {
        let facts = self.facts(&handle)?;
        Ok(self.table.push(TokenizerHandle { facts })?)
    }

    fn details(&mut self, handle: Resource<ModelHandle>) -> wasmtime::Result<Extensions> {
        Ok(self.facts(&handle)?.details())
    }

    fn drop(&mut self, handle: Resource<ModelHandle>) -> wasmtime::Result<()> {
        self.table.delete(handle)?;
        Ok(())
    }
}

impl wit::HostTokenizer for GuestState {
    fn count(&mut self, handle: Resource<TokenizerHandle>, text: String) -> wasmtime::Result<u32> {
        let text = self.whole(text)?;
        Ok(self.tokens(&handle)?.count(&text))
    }

    fn encode(
        &mut self,
        handle: Resource<TokenizerHandle>,
        text: String,
        control: bool,
    ) -> wasmtime::Result<Vec<u32>> {
        let text = self.whole(text)?;
        Ok(self.tokens(&handle)?.encode(&text, control))
    }

    fn decode(
        &mut self,
        handle: Resource<TokenizerHandle>,
        tokens: Vec<u32>,
    ) -> wasmtime::Result<String> {
        Ok(self.tokens(&handle)?.decode(&tokens))
    }

    fn control_token(
        &mut self,
        handle: Resource<TokenizerHandle>,
        text: String,
    ) -> wasmtime::Result<Option<u32>> {
        Ok(self.tokens(&handle)?.control_token(&text))
    }

    fn fit(
        &mut self,
        handle: Resource<TokenizerHandle>,
        text: String,
        tokens_max: u32,
    ) -> wasmtime::Result<u32> {
        let whole = self.whole(text.clone())?;
        let fits = self.tokens(&handle)?.fit(&whole, tokens_max);
        let written = self.lifted.written_bytes(&text, fits as usize);
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    fn drop(&mut self, handle: Resource<TokenizerHandle>) -> wasmtime::Result<()> {
        self.table.delete(handle)?;
        Ok(())
    }
}
