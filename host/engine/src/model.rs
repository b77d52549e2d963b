//! The model as the engine sees it. Phi-3.5-vision is one implementation; tests script another.

use std::sync::Arc;

use visor_model::image::PixelValues;
use visor_model::{
    Activations, Checkpoint, DeviceKind, ImageFeatures, ImagePass, KvBlock, LoadProgress,
    ModelError, Phi3V, Prompt, QuantizedCache, SequenceState, StepPart,
};

/// Pixels and tokens in, logits out. Lives on the engine thread alone.
pub trait Model: Send + 'static {
    /// One sequence: what is computed and what is pending.
    type State: Send;
    /// What the vision tower made of one picture.
    type Features: Send + Sync + 'static;
    /// One picture on its way through the vision tower.
    type Pass: Default + Send;
    /// Keys and values of a few positions, shared between sequences.
    type Block: Send + Sync + 'static;

    /// Where it computes.
    fn device(&self) -> DeviceKind;

    /// Goes on with a picture where an earlier call left off, asking `keep_going` between layers; `None` once it said no.
    ///
    /// # Errors
    /// Any failure of the forward pass.
    fn advance_image(
        &self,
        pass: &mut Self::Pass,
        pixels: &PixelValues,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<Self::Features>, ModelError>;

    /// Memory the features take, in bytes.
    fn features_bytes(features: &Self::Features) -> u64;

    /// A sequence with the whole prompt pending; how many tokens each picture will have, by index.
    ///
    /// # Errors
    /// A prompt the model cannot run.
    fn begin(&self, prompt: &Prompt, image_tokens: &[u32]) -> Result<Self::State, ModelError>;

    /// Gives a sequence one of its pictures, before a slot of it runs.
    ///
    /// # Errors
    /// Features of another number of tokens.
    fn set_features(
        &self,
        state: &mut Self::State,
        index: usize,
        features: Arc<Self::Features>,
    ) -> Result<(), ModelError>;

    /// Appends one generated token, pending.
    ///
    /// # Errors
    /// A sequence that is as long as the model allows.
    fn push(&self, state: &mut Self::State, token: u32) -> Result<(), ModelError>;

    /// Appends tokens that are likely to come next, pending; how many of them, perhaps none. What runs with drafts behind it
    /// gives what it gives alone.
    fn push_drafts(&self, _state: &mut Self::State, _tokens: &[u32]) -> usize {
        0
    }

    /// Takes back the last `count` positions, which were drafts, whether they ran or not.
    fn drop_drafts(&self, _state: &mut Self::State, _count: usize) {}

    /// Positions that have not run.
    fn pending(state: &Self::State) -> usize;

    /// The store of KV blocks.
    fn kv(&self) -> KvFigures;

    /// Another limit for blocks alive at once.
    fn set_kv_blocks_max(&self, blocks_max: usize);

    /// Gives the system memory that is kept for blocks to come, where any is. Called when nothing has been asked for a while.
    fn return_spare_memory(&self) {}

    /// Takes blocks for so many positions in all.
    ///
    /// # Errors
    /// [`ModelError::KvFull`].
    fn reserve(&self, state: &mut Self::State, positions: usize) -> Result<(), ModelError>;

    /// Blocks of the positions that have run, the last one perhaps filled in part; none where they cannot be shared.
    fn share(state: &Self::State) -> &[Arc<Self::Block>];

    /// Lets a sequence begin behind positions that ran in another one; at least one is left to run.
    ///
    /// # Errors
    /// [`ModelError::KvFull`].
    fn adopt(
        &self,
        state: &mut Self::State,
        blocks: &[Arc<Self::Block>],
        positions: usize,
    ) -> Result<(), ModelError>;

    /// Whether a sequence of so many positions is rotated with the long factors.
    fn is_long(&self, positions: usize) -> bool;

    /// Runs pending positions of several sequences; for each, once nothing of it is pending, the logits, (1 + drafts, vocab_size),
    /// of its last positions. What a sequence gets does not depend on the others. Asks `keep_going` between layers.
    ///
    /// # Errors
    /// [`ModelError::Cancelled`] once `keep_going` said no, [`ModelError::KvFull`]; any failure of the forward pass, after which
    /// the states are of no use.
    fn step(
        &self,
        parts: &mut [Part<'_, Self::State>],
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Option<Vec<f32>>>, ModelError>;
}

/// A sequence's part of a step.
pub struct Part<'a, S> {
    /// Whose.
    pub state: &'a mut S,
    /// Pending positions to run at most; at least one is.
    pub positions_max: usize,
    /// The last ones that are drafts.
    pub drafts: usize,
}

/// A model's KV blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KvFigures {
    /// Positions a block holds.
    pub block_positions: usize,
    /// Its memory.
    pub block_bytes: u64,
    /// Alive now, shared ones once.
    pub blocks_used: usize,
    /// Alive at most.
    pub blocks_max: usize,
}

/// Makes the model for a device, on the engine thread: at start, and when an accelerator breaks.
pub trait ModelLoader: Send + 'static {
    /// What it makes.
    type Model: Model;

    /// Loads the model onto a device.
    ///
    /// # Errors
    /// A device that does not start, or a checkpoint that cannot be loaded.
    fn load(&mut self, device: DeviceKind) -> Result<Self::Model, ModelError>;
}

impl Model for Phi3V {
    type State = SequenceState;
    type Features = ImageFeatures;
    type Pass = ImagePass;
    type Block = KvBlock;

    fn device(&self) -> DeviceKind {
        Self::device(self)
    }

    fn advance_image(
        &self,
        pass: &mut ImagePass,
        pixels: &PixelValues,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<ImageFeatures>, ModelError> {
        Self::advance_image(self, pass, pixels, keep_going)
    }

    fn features_bytes(features: &ImageFeatures) -> u64 {
        features.bytes()
    }

    fn begin(&self, prompt: &Prompt, image_tokens: &[u32]) -> Result<SequenceState, ModelError> {
        self.begin_without(prompt, image_tokens)
    }

    fn set_features(
        &self,
        state: &mut SequenceState,
        index: usize,
        features: Arc<ImageFeatures>,
    ) -> Result<(), ModelError> {
        Self::set_features(self, state, index, features)
    }

    fn push(&self, state: &mut SequenceState, token: u32) -> Result<(), ModelError> {
        Self::push(self, state, token)
    }

    fn push_drafts(&self, state: &mut SequenceState, tokens: &[u32]) -> usize {
        Self::push_drafts(self, state, tokens)
    }

    fn drop_drafts(&self, state: &mut SequenceState, count: usize) {
        Self::drop_drafts(self, state, count);
    }

    fn pending(state: &SequenceState) -> usize {
        state.pending()
    }

    fn kv(&self) -> KvFigures {
        let pool = self.kv_pool();
        KvFigures {
            block_positions: pool.block_positions(),
            block_bytes: pool.block_bytes(),
            blocks_used: pool.blocks_used(),
            blocks_max: pool.blocks_max(),
        }
    }

    fn set_kv_blocks_max(&self, blocks_max: usize) {
        self.kv_pool().set_blocks_max(blocks_max);
    }

    fn return_spare_memory(&self) {
        self.kv_pool().return_spare_memory();
    }

    fn reserve(&self, state: &mut SequenceState, positions: usize) -> Result<(), ModelError> {
        Self::reserve(self, state, positions)
    }

    fn share(state: &SequenceState) -> &[Arc<KvBlock>] {
        state.share()
    }

    fn adopt(
        &self,
        state: &mut SequenceState,
        blocks: &[Arc<KvBlock>],
        positions: usize,
    ) -> Result<(), ModelError> {
        Self::adopt(self, state, blocks, positions)
    }

    fn is_long(&self, positions: usize) -> bool {
        Self::is_long(self, positions)
    }

    fn step(
        &self,
        parts: &mut [Part<'_, SequenceState>],
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Option<Vec<f32>>>, ModelError> {
        let mut parts: Vec<StepPart<'_>> = parts
            .iter_mut()
            .map(|part| StepPart {
                state: part.state,
                positions_max: part.positions_max,
                drafts: part.drafts,
            })
            .collect();
        Self::step(self, &mut parts, keep_going)
    }
}

/// Loads [`Phi3V`] from a checkpoint and tells how far it is.
pub struct CheckpointLoader<P> {
    checkpoint: Arc<Checkpoint>,
    /// Not looked into yet.
    cache: Option<QuantizedCache>,
    activations: Activations,
    progress: P,
}

impl<P: Fn(LoadProgress) -> bool + Send + 'static> CheckpointLoader<P> {
    /// `progress` is called on the engine thread while weights are read, and answers whether to go on.
    pub fn new(checkpoint: Arc<Checkpoint>, activations: Activations, progress: P) -> Self {
        Self {
            checkpoint,
            cache: None,
            activations,
            progress,
        }
    }

    /// The same for the INT4 form of the checkpoint, which `cache` has or makes.
    #[must_use]
    pub fn quantized(self, cache: Option<QuantizedCache>) -> Self {
        Self { cache, ..self }
    }
}

impl<P: Fn(LoadProgress) -> bool + Send + 'static> ModelLoader for CheckpointLoader<P> {
    type Model = Phi3V;

    fn load(&mut self, device: DeviceKind) -> Result<Phi3V, ModelError> {
        let progress = &self.progress;
        if let Some(cache) = &self.cache {
            // Once; the next device takes what is there then.
            if let Some(quantized) = cache.open(&self.checkpoint, &mut |done| progress(done))? {
                self.checkpoint = Arc::new(quantized);
            }
            self.cache = None;
        }
        Phi3V::load_with(&self.checkpoint, device, self.activations, &|done| {
            progress(done); // it does not take long: nobody stops it
        })
    }
}
