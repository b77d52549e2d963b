//! Every tensor the model reads, by name and shape: the one place where the checkpoint layout is written down.
//!
//! A checkpoint is checked against this table when it is opened, and the parts of the model take their shapes from it
//! when they load. Tensors outside the table (the last tower layer, `post_layernorm`, `position_ids`,
//! `rotary_emb.inv_freq`) are never looked at.
//! Source: HF `microsoft/Phi-3.5-vision-instruct`, `model.safetensors.index.json`.

use crate::config::{CROP_SIDE_PATCHES, ModelConfig, PATCH_SIDE_PX};
use crate::error::ModelError;
use crate::weights::{StoredTensor, StoredType, Weights};

/// Prefix of the image module.
pub(crate) const VISION: &str = "model.vision_embed_tokens";
/// Prefix of the CLIP tower.
pub(crate) const TOWER: &str = "model.vision_embed_tokens.img_processor.vision_model";
/// Prefix of the token embedding.
pub(crate) const EMBEDDING: &str = "model.embed_tokens";

/// What a tensor may look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Form {
    /// A matrix (rows, columns), stored as floats, or as INT4 or INT8 with scales and biases.
    Matrix { rows: usize, columns: usize },
    /// Floats of exactly this shape.
    Floats(Vec<usize>),
    /// The patch convolution: (out, 3, side, side) as HF has it, or (out, side, side, 3) as MLX has it.
    Patches { out: usize },
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) form: Form,
}

/// All tensors of a model of this config, in the order they are used.
pub(crate) fn tensors(config: &ModelConfig) -> Vec<Entry> {
    let mut table = Table(Vec::new());
    tower(&mut table, config);
    projector(&mut table, config);
    decoder(&mut table, config);
    table.0
}

struct Table(Vec<Entry>);

impl Table {
    fn matrix(&mut self, module: &str, rows: usize, columns: usize) {
        self.0.push(Entry {
            name: format!("{module}.weight"),
            form: Form::Matrix { rows, columns },
        });
    }

    fn floats(&mut self, name: String, shape: &[usize]) {
        self.0.push(Entry {
            name,
            form: Form::Floats(shape.to_vec()),
        });
    }

    fn linear_with_bias(&mut self, module: &str, rows: usize, columns: usize) {
        self.matrix(module, rows, columns);
        self.floats(format!("{module}.bias"), &[rows]);
    }

    fn layer_norm(&mut self, module: &str, width: usize) {
        self.floats(format!("{module}.weight"), &[width]);
        self.floats(format!("{module}.bias"), &[width]);
    }
}

fn tower(table: &mut Table, config: &ModelConfig) {
    let (width, inner) = (config.vision.hidden_size, config.vision.intermediate_size);
    table.floats(format!("{TOWER}.embeddings.class_embedding"), &[width]);
    let name = format!("{TOWER}.embeddings.patch_embedding.weight");
    table.0.push(Entry {
        name,
        form: Form::Patches { out: width },
    });
    let positions = 1 + CROP_SIDE_PATCHES * CROP_SIDE_PATCHES;
    table.matrix(
        &format!("{TOWER}.embeddings.position_embedding"),
        positions,
        width,
    );
    table.layer_norm(&format!("{TOWER}.pre_layrnorm"), width);
    for layer in 0..config.vision.layers_run {
        let layer = format!("{TOWER}.encoder.layers.{layer}");
        table.layer_norm(&format!("{layer}.layer_norm1"), width);
        for part in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            table.linear_with_bias(&format!("{layer}.self_attn.{part}"), width, width);
        }
        table.layer_norm(&format!("{layer}.layer_norm2"), width);
        table.linear_with_bias(&format!("{layer}.mlp.fc1"), inner, width);
        table.linear_with_bias(&format!("{layer}.mlp.fc2"), width, inner);
    }
}

fn projector(table: &mut Table, config: &ModelConfig) {
    let (merged, hidden) = (config.vision.merged_size(), config.hidden_size);
    table.floats(format!("{VISION}.sub_GN"), &[1, 1, 1, merged]);
    table.floats(format!("{VISION}.glb_GN"), &[1, 1, merged]);
    table.linear_with_bias(&format!("{VISION}.img_projection.0"), hidden, merged);
    table.linear_with_bias(&format!("{VISION}.img_projection.2"), hidden, hidden);
}

fn decoder(table: &mut Table, config: &ModelConfig) {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    table.matrix(EMBEDDING, config.vocab_size, hidden);
    for layer in 0..config.layers {
        let layer = format!("model.layers.{layer}");
        table.floats(format!("{layer}.input_layernorm.weight"), &[hidden]);
        let qkv = (config.heads + 2 * config.kv_heads) * config.head_dim;
        table.matrix(&format!("{layer}.self_attn.qkv_proj"), qkv, hidden);
        table.matrix(&format!("{layer}.self_attn.o_proj"), hidden, hidden);
        table.floats(
            format!("{layer}.post_attention_layernorm.weight"),
            &[hidden],
        );
        table.matrix(&format!("{layer}.mlp.gate_up_proj"), 2 * inner, hidden);
        table.matrix(&format!("{layer}.mlp.down_proj"), hidden, inner);
    }
    table.floats("model.norm.weight".to_owned(), &[hidden]);
    if !config.tie_word_embeddings {
        table.matrix("lm_head", config.vocab_size, hidden);
    }
}

/// Checks that every tensor of the table is there in a form that can be loaded.
///
/// # Errors
/// [`ModelError::MissingTensor`], [`ModelError::WrongShape`] or [`ModelError::WrongType`] for the first that is not.
pub(crate) fn check(config: &ModelConfig, weights: &Weights) -> Result<(), ModelError> {
    tensors(config)
        .iter()
        .try_for_each(|entry| check_entry(entry, weights))
}

fn check_entry(entry: &Entry, weights: &Weights) -> Result<(), ModelError> {
    let tensor = weights
        .get(&entry.name)
        .ok_or_else(|| missing(&entry.name, weights))?;
    match &entry.form {
        Form::Matrix { rows, columns } => match affine_parts(&entry.name, weights)? {
            Some([scales, biases]) => check_affine([tensor, scales, biases], *rows, *columns),
            None => check_floats(tensor, &[vec![*rows, *columns]]),
        },
        Form::Floats(shape) => check_floats(tensor, std::slice::from_ref(shape)),
        Form::Patches { out } => {
            let side = PATCH_SIDE_PX;
            check_floats(
                tensor,
                &[vec![*out, 3, side, side], vec![*out, side, side, 3]],
            )
        }
    }
}

/// Scales and biases of the module whose weight is `name`, when it is quantized: that is when it has scales.
pub(crate) fn affine_parts<'a>(
    name: &str,
    weights: &'a Weights,
) -> Result<Option<[&'a StoredTensor; 2]>, ModelError> {
    let module = name.strip_suffix(".weight").unwrap_or(name);
    let Some(scales) = weights.get(&format!("{module}.scales")) else {
        return Ok(None);
    };
    let biases = format!("{module}.biases");
    let biases = weights
        .get(&biases)
        .ok_or_else(|| missing(&biases, weights))?;
    Ok(Some([scales, biases]))
}

/// Bits of a code, of a weight stored as u32 words; nothing where they do not fill the words.
pub(crate) fn code_bits(weight: &StoredTensor, columns: usize) -> Option<usize> {
    let &[_, words] = weight.shape.as_slice() else {
        return None;
    };
    let bits = words.checked_mul(32)?.checked_div(columns)?;
    (bits * columns == words * 32).then_some(bits)
}

fn missing(name: &str, weights: &Weights) -> ModelError {
    ModelError::MissingTensor {
        name: name.to_owned(),
        files: weights.file_names(),
        hint: "these weights are incomplete or of another model; fetch the checkpoint again".into(),
    }
}

fn check_floats(tensor: &StoredTensor, shapes: &[Vec<usize>]) -> Result<(), ModelError> {
    if tensor.dtype == StoredType::U32 && tensor.shape.len() == 2 {
        let want = "a quantized weight also needs its .scales and .biases";
        return Err(wrong_type(tensor, want));
    }
    if !matches!(
        tensor.dtype,
        StoredType::F32 | StoredType::F16 | StoredType::Bf16
    ) {
        return Err(wrong_type(
            tensor,
            "convert the checkpoint to f32, f16, bf16 or MLX INT4 or INT8",
        ));
    }
    if shapes.contains(&tensor.shape) {
        return Ok(());
    }
    let want: Vec<String> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
    Err(wrong_shape(tensor, want.join(" or ")))
}

fn check_affine(
    [weight, scales, biases]: [&StoredTensor; 3],
    rows: usize,
    columns: usize,
) -> Result<(), ModelError> {
    if weight.dtype != StoredType::U32 {
        return Err(wrong_type(
            weight,
            "a weight with .scales has to hold u32 words of codes",
        ));
    }
    if scales.dtype != biases.dtype
        || !matches!(
            scales.dtype,
            StoredType::F32 | StoredType::F16 | StoredType::Bf16
        )
    {
        return Err(wrong_type(
            scales,
            "scales and biases have to be both f16, bf16 or f32",
        ));
    }
    let is_read = matches!(code_bits(weight, columns), Some(4 | 8));
    if weight.shape.first() != Some(&rows) || !is_read || !columns.is_multiple_of(8) {
        let want = format!(
            "[{rows}, {}] words of eight 4-bit codes, or {} of four 8-bit ones (other widths are not read)",
            columns / 8,
            columns / 4
        );
        return Err(wrong_shape(weight, want));
    }
    for part in [scales, biases] {
        let groups = match part.shape.as_slice() {
            &[part_rows, groups]
                if part_rows == rows && groups > 0 && part.shape == scales.shape =>
            {
                groups
            }
            _ => {
                return Err(wrong_shape(
                    part,
                    format!("[{rows}, {columns} / group size]"),
                ));
            }
        };
        if !columns.is_multiple_of(groups) || !(columns / groups).is_multiple_of(8) {
            return Err(wrong_shape(
                part,
                format!("[{rows}, {columns} / a group size that is a multiple of 8]"),
            ));
        }
    }
    Ok(())
}

fn wrong_shape(tensor: &StoredTensor, want: String) -> ModelError {
    ModelError::WrongShape {
        name: tensor.name.clone(),
        file: tensor.file.name.clone(),
        have: tensor.shape.clone(),
        want,
    }
}

fn wrong_type(tensor: &StoredTensor, want: &str) -> ModelError {
    ModelError::WrongType {
        name: tensor.name.clone(),
        file: tensor.file.name.clone(),
        have: tensor.dtype.to_string(),
        want: want.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// The published checkpoint, name by name: nothing missing, nothing invented, every shape equal.
    #[test]
    fn the_table_is_the_published_checkpoint() {
        let real = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/real");
        let config = std::fs::read(format!("{real}/config.reconstructed.json")).unwrap();
        let config = ModelConfig::parse(&config, "config.reconstructed.json").unwrap();
        let ours: BTreeMap<String, Vec<usize>> = tensors(&config)
            .into_iter()
            .map(|entry| {
                let shape = match entry.form {
                    Form::Matrix { rows, columns } => vec![rows, columns],
                    Form::Floats(shape) => shape,
                    Form::Patches { out } => vec![out, 3, 14, 14],
                };
                (entry.name, shape)
            })
            .collect();
        let listed: serde_json::Value =
            serde_json::from_slice(&std::fs::read(format!("{real}/model_tensors.json")).unwrap())
                .unwrap();
        let theirs: BTreeMap<String, Vec<usize>> = listed
            .as_object()
            .unwrap()
            .iter()
            .filter(|(_, tensor)| tensor["used"] == true)
            .map(|(name, tensor)| {
                (
                    name.clone(),
                    serde_json::from_value(tensor["shape"].clone()).unwrap(),
                )
            })
            .collect();
        assert_eq!(ours, theirs);
        assert_eq!(
            ours.len(),
            592 - 18,
            "all but the last tower layer and post_layernorm"
        );
    }
}
