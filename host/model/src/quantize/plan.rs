//! What becomes of every tensor of a checkpoint.

use std::collections::HashMap;

use super::{GROUP, Precision, QuantizeOptions};
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::table::{self, Form, VISION};
use crate::weights::{StoredTensor, StoredType};

/// Bits of a code of the tower and the projector in INT8. With AVX2 products of seven with activations take a seventh less time than of
/// eight (`kernels/src/x86_64/product/sums.rs`), and a picture's take most of its time.
const VISION_INT8_BITS: usize = 7;

/// One tensor of the source and what is written of it.
pub(super) struct Step<'a> {
    pub(super) tensor: &'a StoredTensor,
    pub(super) action: Action,
}

impl Step<'_> {
    /// What the file's header has to know.
    pub(super) fn planned(&self) -> Planned<'_> {
        Planned {
            name: &self.tensor.name,
            shape: &self.tensor.shape,
            action: self.action,
        }
    }
}

/// What a weight's name names.
pub(super) fn module(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// A tensor of a file that is about to be written.
pub(crate) struct Planned<'a> {
    pub(crate) name: &'a str,
    /// Before the action.
    pub(crate) shape: &'a [usize],
    pub(crate) action: Action,
}

impl<'a> Planned<'a> {
    /// The module of a matrix whose codes are stored in eight bits.
    pub(crate) fn eight_bit_module(&self) -> Option<&'a str> {
        let is_one = matches!(self.action, Action::Affine { bits, .. } if stored_bits(bits) == 8);
        is_one.then(|| module(self.name))
    }
}

/// Bits that a code of so many takes in its file.
pub(crate) fn stored_bits(bits: usize) -> usize {
    bits.next_power_of_two()
}

/// What is written of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Codes of so many bits, scales and biases of a matrix. Those of seven are stored in eight.
    Affine {
        rows: usize,
        columns: usize,
        bits: usize,
    },
    /// The values in the float type.
    Float,
    /// The values of a convolution (out, channel, row, column) as (out, row, column, channel), in the float type.
    ChannelsLast,
}

/// Every float tensor of the checkpoint in the order of its files, those that the model never reads among them: other
/// readers of the format want them. What is no float (`position_ids`) is left out, as MLX leaves it out.
pub(super) fn plan<'a>(
    checkpoint: &'a Checkpoint,
    options: &QuantizeOptions,
) -> Result<Vec<Step<'a>>, ModelError> {
    let forms: HashMap<String, Form> = table::tensors(checkpoint.config())
        .into_iter()
        .map(|entry| (entry.name, entry.form))
        .collect();
    let mut steps = Vec::new();
    for tensor in checkpoint.weights().in_order() {
        if tensor.name.ends_with(".scales") || tensor.dtype == StoredType::U32 {
            return Err(ModelError::WrongType {
                name: tensor.name.clone(),
                file: tensor.file.name.clone(),
                have: tensor.dtype.to_string(),
                want: "the checkpoint is quantized already; give the one it was made from".into(),
            });
        }
        let float = matches!(
            tensor.dtype,
            StoredType::F32 | StoredType::F16 | StoredType::Bf16
        );
        if float && !tensor.name.ends_with("rotary_emb.inv_freq") {
            let action = action(tensor, forms.get(&tensor.name), options);
            steps.push(Step { tensor, action });
        }
    }
    Ok(steps)
}

/// Bits that a code of the matrix of this name gets; floats have none.
pub(crate) fn planned_bits(name: &str, options: &QuantizeOptions) -> Option<usize> {
    if name.starts_with(VISION) && !name.contains(".wte.") {
        options.vision.bits().map(|bits| match bits {
            8 => VISION_INT8_BITS,
            _ => bits,
        })
    } else if name.contains("embed_tokens") || name.starts_with("lm_head") {
        options.embeddings.bits()
    } else {
        Precision::Int4.bits()
    }
}

fn action(tensor: &StoredTensor, form: Option<&Form>, options: &QuantizeOptions) -> Action {
    let bits = planned_bits(&tensor.name, options);
    match (bits, form, tensor.shape.as_slice()) {
        // The last tower layer is not in the table, and is stored as the others are.
        (Some(bits), Some(Form::Matrix { .. }) | None, &[rows, columns])
            if rows > 0
                && columns > 0
                && columns.is_multiple_of(GROUP)
                && tensor.name.ends_with(".weight")
                && !tensor.name.contains("position_embedding") =>
        {
            Action::Affine {
                rows,
                columns,
                bits,
            }
        }
        (_, Some(Form::Patches { .. }), &[_, 3, _, _]) => Action::ChannelsLast,
        _ => Action::Float,
    }
}
