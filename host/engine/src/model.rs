//! The model as the engine sees it. Phi-3.5-vision is one implementation; tests script another.

use std::sync::Arc;

use visor_model::image::PixelValues;
use visor_model::{
    Activations, Checkpoint, DeviceKind, ImageFeatures, LoadProgress, ModelError, Phi3V, Prompt,
    SequenceState,
};

/// Pixels and tokens in, logits out. Lives on the engine thread alone.
pub trait Model: Send + 'static {
    /// One sequence: what is computed and what is pending.
    type State: Send;
    /// What the vision tower made of one picture.
    type Features: Send + Sync + 'static;

    /// Where it computes.
    fn device(&self) -> DeviceKind;

    /// Runs the vision tower on one picture, asking `keep_going` between crops.
    ///
    /// # Errors
    /// [`ModelError::Cancelled`] when `keep_going` said no; any failure of the forward pass.
    fn encode_image(
        &self,
        pixels: &PixelValues,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Self::Features, ModelError>;

    /// Memory the features take, in bytes.
    fn features_bytes(features: &Self::Features) -> u64;

    /// A sequence with the whole prompt pending; one features value per image index.
    ///
    /// # Errors
    /// A prompt the model cannot run.
    fn begin(
        &self,
        prompt: &Prompt,
        features: &[Arc<Self::Features>],
    ) -> Result<Self::State, ModelError>;

    /// Appends one generated token, pending.
    ///
    /// # Errors
    /// A sequence that is as long as the model allows.
    fn push(&self, state: &mut Self::State, token: u32) -> Result<(), ModelError>;

    /// Computes at most `positions_max` pending positions; the logits of the last one, (vocab_size),
    /// once nothing is pending.
    ///
    /// # Errors
    /// Any failure of the forward pass; the state is of no use then.
    fn advance(
        &self,
        state: &mut Self::State,
        positions_max: usize,
    ) -> Result<Option<Vec<f32>>, ModelError>;
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

    fn device(&self) -> DeviceKind {
        Self::device(self)
    }

    fn encode_image(
        &self,
        pixels: &PixelValues,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<ImageFeatures, ModelError> {
        Self::encode_image(self, pixels, keep_going)
    }

    fn features_bytes(features: &ImageFeatures) -> u64 {
        features.bytes()
    }

    fn begin(
        &self,
        prompt: &Prompt,
        features: &[Arc<ImageFeatures>],
    ) -> Result<SequenceState, ModelError> {
        Self::begin(self, prompt, features)
    }

    fn push(&self, state: &mut SequenceState, token: u32) -> Result<(), ModelError> {
        Self::push(self, state, token)
    }

    fn advance(
        &self,
        state: &mut SequenceState,
        positions_max: usize,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        Self::advance(self, state, positions_max)
    }
}

/// Loads [`Phi3V`] from a checkpoint and tells how far it is.
pub struct CheckpointLoader<P> {
    checkpoint: Arc<Checkpoint>,
    activations: Activations,
    progress: P,
}

impl<P: Fn(LoadProgress) + Send + 'static> CheckpointLoader<P> {
    /// `progress` is called on the engine thread while weights are read.
    pub fn new(checkpoint: Arc<Checkpoint>, activations: Activations, progress: P) -> Self {
        Self {
            checkpoint,
            activations,
            progress,
        }
    }
}

impl<P: Fn(LoadProgress) + Send + 'static> ModelLoader for CheckpointLoader<P> {
    type Model = Phi3V;

    fn load(&mut self, device: DeviceKind) -> Result<Phi3V, ModelError> {
        Phi3V::load_with(&self.checkpoint, device, self.activations, &self.progress)
    }
}
