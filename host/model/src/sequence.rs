//! What a sequence is: its slots, the images that fill some of them, and its KV cache.

use std::sync::Arc;

use crate::error::ModelError;
use crate::kv_cache::{KvBlock, KvCache};
use crate::model::{ImageFeatures, Phi3V};
use crate::rope::Regime;
use crate::tokenizer::Prompt;

/// What one position of a sequence is filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    Token(u32),
    Image { index: u32, row: u32 },
}

/// One sequence: its tokens and image slots, its KV cache, and how far it has run.
///
/// The slots stay for the sequence's life, because crossing `original_positions_max` runs everything again.
pub struct SequenceState {
    pub(crate) slots: Vec<Slot>,
    pub(crate) features: Vec<Option<Arc<ImageFeatures>>>,
    image_tokens: Vec<u32>,
    pub(crate) cache: KvCache,
    /// Positions of the prompt; those behind were generated.
    pub(crate) prompt_len: usize,
    pub(crate) last_hidden: Vec<f32>,
    pub(crate) rebuilds: bool,
}

impl SequenceState {
    /// Positions in all, run and pending.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a sequence has at least one position"
    )]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Positions that have not run yet.
    pub fn pending(&self) -> usize {
        self.slots.len() - self.cache.len()
    }

    /// Bytes of the KV cache's blocks, those shared with other sequences included.
    pub fn kv_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// Normalized hidden state of the last position that gave logits; empty before.
    pub fn last_hidden(&self) -> &[f32] {
        &self.last_hidden
    }

    /// Blocks of the positions that have run, to be adopted by other sequences; the last one may be filled in part, and is
    /// copied before this sequence goes on. None where blocks cannot be shared.
    pub fn share(&self) -> &[Arc<KvBlock>] {
        self.cache.share()
    }
}

impl Phi3V {
    /// Starts a sequence with its images: [`Self::begin_without`], then [`Self::set_features`] for each.
    ///
    /// # Errors
    /// As those.
    pub fn begin(
        &self,
        prompt: &Prompt,
        features: &[Arc<ImageFeatures>],
    ) -> Result<SequenceState, ModelError> {
        let image_tokens: Vec<u32> = features.iter().map(|image| image.tokens()).collect();
        let mut state = self.begin_without(prompt, &image_tokens)?;
        for (index, image) in features.iter().enumerate() {
            self.set_features(&mut state, index, Arc::clone(image))?;
        }
        Ok(state)
    }

    /// Starts a sequence whose images are not there yet, of so many tokens each: nothing runs. Slot `-(k + 1)` is filled from
    /// image k, whatever the order of the slots; an image that appears again starts again.
    ///
    /// # Errors
    /// [`ModelError::Prompt`] for an empty prompt, an unknown id, a slot of no image, or slots that are not a whole number of
    /// images; [`ModelError::TooLong`].
    pub fn begin_without(
        &self,
        prompt: &Prompt,
        image_tokens: &[u32],
    ) -> Result<SequenceState, ModelError> {
        if prompt.ids.is_empty() {
            return Err(ModelError::Prompt("it is empty".into()));
        }
        self.check_length(prompt.ids.len())?;
        let mut used = vec![0u32; image_tokens.len()];
        let mut slots = Vec::with_capacity(prompt.ids.len());
        for &id in &prompt.ids {
            slots.push(match u32::try_from(id) {
                Ok(token) => self.check_token(token)?,
                Err(_) => next_image_slot(id, image_tokens, &mut used)?,
            });
        }
        for (index, (used, tokens)) in used.iter().zip(image_tokens).enumerate() {
            if used % tokens.max(&1) != 0 {
                let message = format!("image {index} has {used} slots and {tokens} features");
                return Err(ModelError::Prompt(message));
            }
        }
        Ok(SequenceState {
            prompt_len: slots.len(),
            slots,
            features: vec![None; image_tokens.len()],
            image_tokens: image_tokens.to_vec(),
            cache: KvCache::new(Arc::clone(&self.kv_pool)),
            last_hidden: Vec::new(),
            rebuilds: true,
        })
    }

    /// Gives a sequence one of its images. Slots of an image cannot run before; those that were adopted need none.
    ///
    /// # Errors
    /// [`ModelError::Prompt`] for another number of tokens than was announced.
    pub fn set_features(
        &self,
        state: &mut SequenceState,
        index: usize,
        features: Arc<ImageFeatures>,
    ) -> Result<(), ModelError> {
        let announced = state.image_tokens.get(index).copied();
        if announced != Some(features.tokens()) {
            return Err(ModelError::Prompt(format!(
                "image {index} has {} features; {} were announced",
                features.tokens(),
                announced.unwrap_or(0)
            )));
        }
        state.features[index] = Some(features);
        Ok(())
    }

    /// Lets a sequence that has not run begin behind `positions` that ran in another one, of which `blocks` came from
    /// [`SequenceState::share`]. Everything that a KV value depends on has to be equal: the slots up to there, the features of
    /// their images, [`Self::is_long`] of both. At least the last position is left to run.
    ///
    /// # Errors
    /// [`ModelError::Prompt`] for more positions than that, or than the blocks hold; [`ModelError::KvFull`].
    pub fn adopt(
        &self,
        state: &mut SequenceState,
        blocks: &[Arc<KvBlock>],
        positions: usize,
    ) -> Result<(), ModelError> {
        let held = blocks.len() * self.kv_pool.block_positions();
        if positions >= state.len() || positions > held {
            return Err(ModelError::Prompt(format!(
                "{positions} positions are to be adopted by a sequence of {}, from {held}",
                state.len()
            )));
        }
        let regime = self.decoder.rope.regime(state.len());
        state.cache.adopt(blocks, positions, regime)
    }

    /// Whether a sequence of so many positions is rotated with the long factors. Keys of one regime are of no use in the other.
    pub fn is_long(&self, positions: usize) -> bool {
        self.decoder.rope.regime(positions) == Regime::Long
    }

    /// Takes KV blocks for so many positions in all, so that a step up to there needs no more.
    ///
    /// # Errors
    /// [`ModelError::KvFull`].
    pub fn reserve(&self, state: &mut SequenceState, positions: usize) -> Result<(), ModelError> {
        state.cache.reserve(positions)
    }

    /// Appends one generated token, pending until the next step. Crossing `original_positions_max` drops the cache:
    /// its keys were rotated with the short factors, and everything is pending again. HF does the same.
    ///
    /// # Errors
    /// [`ModelError::Prompt`] for an unknown id, [`ModelError::TooLong`].
    pub fn push(&self, state: &mut SequenceState, token: u32) -> Result<(), ModelError> {
        self.check_length(state.len() + 1)?;
        let slot = self.check_token(token)?;
        state.slots.push(slot);
        let regime = self.decoder.rope.regime(state.len());
        if state.rebuilds && state.cache.len() > 0 && state.cache.regime != regime {
            state.cache.clear();
        }
        Ok(())
    }

    /// Appends tokens that are likely to come next, pending, as many of them as need no other rotary regime and find KV blocks;
    /// how many. A step then tells what comes behind each ([`StepPart::drafts`](crate::StepPart)). None where positions that run
    /// together would not give what each gives alone.
    pub fn push_drafts(&self, state: &mut SequenceState, tokens: &[u32]) -> usize {
        let (len, regime) = (state.len(), self.decoder.rope.regime(state.len()));
        if !self.decoder.is_joint() {
            return 0;
        }
        let fits = |count: usize| {
            self.check_length(len + count).is_ok()
                && self.decoder.rope.regime(len + count) == regime
        };
        for (index, token) in tokens.iter().enumerate() {
            let Ok(slot) = self.check_token(*token) else {
                return index;
            };
            if !fits(index + 1) || state.cache.reserve(len + index + 1).is_err() {
                return index;
            }
            state.slots.push(slot);
        }
        tokens.len()
    }

    /// Takes back the last `count` tokens, which were drafts, whether they ran or not.
    pub fn drop_drafts(&self, state: &mut SequenceState, count: usize) {
        let len = state.len().saturating_sub(count).max(state.prompt_len);
        state.slots.truncate(len);
        state.cache.truncate(len);
    }

    fn check_length(&self, positions: usize) -> Result<(), ModelError> {
        let positions_max = self.config().positions_max;
        if positions > positions_max {
            return Err(ModelError::TooLong {
                positions,
                positions_max,
            });
        }
        Ok(())
    }

    fn check_token(&self, token: u32) -> Result<Slot, ModelError> {
        let vocab_size = self.config().vocab_size;
        if token as usize >= vocab_size {
            let message = format!("token {token} is not below the vocabulary size {vocab_size}");
            return Err(ModelError::Prompt(message));
        }
        Ok(Slot::Token(token))
    }
}

/// The next row of the image that the negative id stands for.
fn next_image_slot(id: i64, image_tokens: &[u32], used: &mut [u32]) -> Result<Slot, ModelError> {
    // Not negative: an id above u32, which no vocabulary has.
    let index = id
        .checked_neg()
        .and_then(|number| usize::try_from(number - 1).ok());
    let image = index.and_then(|index| Some((index, *image_tokens.get(index)?)));
    let Some((index, tokens)) = image else {
        let message = format!(
            "id {id} is neither a token nor a slot of one of {} images",
            image_tokens.len()
        );
        return Err(ModelError::Prompt(message));
    };
    let row = used[index] % tokens.max(1);
    used[index] = used[index].saturating_add(1);
    Ok(Slot::Image {
        index: index as u32,
        row,
    })
}
