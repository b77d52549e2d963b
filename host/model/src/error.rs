//! Everything that can go wrong between a checkpoint folder and a logit, said so that the reader can act on it.

use crate::device::DeviceKind;

/// Why a checkpoint, a prompt or a forward pass was refused.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// `keep_going` answered false; nothing is wrong with the model.
    #[error("cancelled")]
    Cancelled,
    /// As many KV blocks as may be are in use, or the system has no memory for one more, which the log says then.
    #[error("all {blocks_max} blocks of the KV cache are in use")]
    KvFull {
        /// The limit.
        blocks_max: usize,
    },
    /// A file or folder that has to be there is not.
    #[error("{path}: no such file; {hint}")]
    MissingFile {
        /// The path that was tried.
        path: String,
        /// What to do about it.
        hint: String,
    },
    /// The operating system refused to read a file.
    #[error("{path}: cannot be read: {source}")]
    Io {
        /// The path that was read.
        path: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file or folder cannot be written.
    #[error("{path}: cannot be written: {reason}")]
    Write {
        /// The path that was to be written.
        path: String,
        /// The system's reason, or what is in the way and what to do.
        reason: String,
    },
    /// A weight that the form asked for cannot hold.
    #[error("tensor {name} in {file} cannot be quantized: {message}")]
    Unfit {
        /// The tensor.
        name: String,
        /// The file it is in.
        file: String,
        /// Which value, why, and what helps.
        message: String,
    },
    /// `config.json` (or another JSON file of the checkpoint) says something this model cannot be.
    #[error("{file}: {message}")]
    Config {
        /// The file that says so.
        file: String,
        /// Which key, what it holds, and what it may hold.
        message: String,
    },
    /// The checkpoint is of another architecture.
    #[error(
        "{file}: model_type is {have:?}; only \"phi3_v\" (Phi-3-vision, Phi-3.5-vision) is served, point the model path at such a checkpoint"
    )]
    UnknownModelType {
        /// The config file.
        file: String,
        /// What it says, empty when it says nothing.
        have: String,
    },
    /// A weight file ends before the last byte its header promises.
    #[error(
        "{file}: has {have_bytes} bytes, its header promises {want_bytes}: the download is truncated, fetch this file again"
    )]
    Truncated {
        /// The safetensors file.
        file: String,
        /// Bytes in the file.
        have_bytes: u64,
        /// Bytes the header accounts for.
        want_bytes: u64,
    },
    /// A safetensors header that does not describe its file.
    #[error("{file}: not a usable safetensors file: {message}")]
    BadHeader {
        /// The safetensors file.
        file: String,
        /// What is wrong with it.
        message: String,
    },
    /// A tensor the model needs is in none of the weight files.
    #[error("tensor {name} is missing from {files}; {hint}")]
    MissingTensor {
        /// The name that was looked up.
        name: String,
        /// The files that were searched.
        files: String,
        /// What to do about it.
        hint: String,
    },
    /// A tensor of another shape than the config asks for.
    #[error(
        "tensor {name} in {file} has shape {have:?}, config.json asks for {want}; the config and the weights are of different models"
    )]
    WrongShape {
        /// The tensor.
        name: String,
        /// The file it is in.
        file: String,
        /// Its shape.
        have: Vec<usize>,
        /// The shape or shapes that would do.
        want: String,
    },
    /// A tensor stored as a type this model does not read.
    #[error("tensor {name} in {file} is stored as {have}, which is not read here; {want}")]
    WrongType {
        /// The tensor.
        name: String,
        /// The file it is in.
        file: String,
        /// Its type.
        have: String,
        /// What would do.
        want: String,
    },
    /// A tokenizer file that cannot be used.
    #[error("{file}: not a usable tokenizer: {message}")]
    Tokenizer {
        /// The tokenizer file, or where it came from.
        file: String,
        /// What is wrong with it.
        message: String,
    },
    /// A tokenizer that makes ids the model has no embedding for.
    #[error(
        "{file}: makes token ids up to {id_max}, the model knows {vocab_size}; put the tokenizer.json of this checkpoint beside its config.json"
    )]
    TokenizerMismatch {
        /// The tokenizer file, or where it came from.
        file: String,
        /// Largest id of the tokenizer.
        id_max: u32,
        /// Rows of the model's embedding table.
        vocab_size: usize,
    },
    /// A prompt the model cannot run; says which id or slot.
    #[error("prompt cannot be run: {0}")]
    Prompt(String),
    /// More positions than the model was made for.
    #[error("the sequence would be {positions} positions; the model has {positions_max}")]
    TooLong {
        /// Positions asked for.
        positions: usize,
        /// `max_position_embeddings`.
        positions_max: usize,
    },
    /// Pixels that do not have the shape the tower wants.
    #[error("pixel values cannot be encoded: {0}")]
    Pixels(String),
    /// A device that is not in this build or does not start.
    #[error("device {device} cannot be used: {message}")]
    Device {
        /// The device asked for.
        device: DeviceKind,
        /// Why, and what would help.
        message: String,
    },
    /// A golden folder that cannot be compared with at all.
    #[error("{path}: {message}")]
    Golden {
        /// The folder or file.
        path: String,
        /// What is wrong with it.
        message: String,
    },
    /// A bug or a failing device.
    #[error("forward pass failed: {0}")]
    Forward(#[from] candle_core::Error),
}
