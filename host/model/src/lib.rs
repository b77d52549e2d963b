//! Phi-3.5-vision as functions of tensors.
//!
//! Pixels become crops ([`image`]), crops patch features (`clip`), patch features embeddings (`projector`), and
//! embeddings with token ids hidden states, KV cache and logits (`decoder`). [`Checkpoint`] reads files, [`Phi3V`]
//! computes, [`quantize()`] makes an MLX checkpoint of INT4 and INT8 of a float one, [`shape`] one of random weights, [`mod@bench`] measures,
//! [`verify`] compares with the reference. Nothing here knows of requests, HTTP or plugins.

pub mod bench;
pub mod checkpoint;
mod clip;
pub mod config;
mod decoder;
pub mod device;
pub mod error;
pub mod golden;
pub mod image;
mod kv_cache;
mod linear;
pub mod model;
mod progress;
mod projector;
pub mod quantize;
mod rope;
mod rows;
mod sequence;
pub mod shape;
mod step;
mod table;
pub mod tokenizer;
mod weights;

pub use checkpoint::{Checkpoint, CheckpointFacts, hex};
pub use config::ModelConfig;
pub use device::{Activations, DeviceChoice, DeviceKind};
pub use error::ModelError;
pub use golden::{Outcome, StageResult, Totals, VerifyOptions, verify, verify_some};
pub use kv_cache::{KvBlock, KvPool};
pub use model::{ImageFeatures, ImagePass, Phi3V};
pub use progress::{LoadProgress, LoadStage};
pub use quantize::{
    FloatType, ModuleError, Precision, Quantization, QuantizeOptions, QuantizeReport,
    QuantizedCache, quantize, quantized_facts,
};
pub use sequence::SequenceState;
pub use step::StepPart;
pub use tokenizer::{Prompt, PromptPart, TokenKind, Tokenizer};
pub use visor_kernels::allocator::{return_free_memory, return_large_blocks};
