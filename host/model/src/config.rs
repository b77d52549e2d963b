//! `config.json`, read once, checked once.
//!
//! The published file and its descendants are accepted: MLX's `quantization` tables, transformers' `longrope` spelling
//! with keys moved into `rope_scaling`, and the goldens' small towers. Whatever would change the arithmetic and is not
//! implemented is refused by key.

mod keys;

pub(crate) use keys::Keys;

use serde_json::Value;

use crate::error::ModelError;

/// Side of one crop, px. CLIP's geometry is not in the config: the reference hard-codes it.
pub const CROP_SIDE_PX: usize = 336;
/// Side of one patch, px.
pub const PATCH_SIDE_PX: usize = 14;
/// Patches along a crop's side.
pub const CROP_SIDE_PATCHES: usize = CROP_SIDE_PX / PATCH_SIDE_PX;
/// Added to the variance in every LayerNorm of the tower.
pub const LAYER_NORM_EPS: f32 = 1e-5;

/// No real model comes near; below it no product of two sizes overflows.
const SIZE_MAX: usize = 1 << 20;
const VOCAB_MAX: usize = 1 << 24;
const LAYERS_MAX: usize = 1 << 10;
const POSITIONS_MAX: usize = 1 << 30;

/// The language model's sizes, checked against each other.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// `hidden_size / heads`, even.
    pub head_dim: usize,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f64,
    /// Rotary angles.
    pub rope: RopeConfig,
    /// Positions the model can run (131072).
    pub positions_max: usize,
    /// Positions the short rotary factors are made for (4096); a longer sequence uses the long ones throughout.
    pub original_positions_max: usize,
    /// `lm_head` is the embedding table.
    pub tie_word_embeddings: bool,
    /// Ids that end a turn, as `config.json` and `generation_config.json` say (spec section 9: not the whole truth).
    pub eos_token_ids: Vec<u32>,
    /// Image tokens go sub, separator, glb when true (`sub_glb`, the published order), else the other way round.
    pub sub_first: bool,
    /// The image tower.
    pub vision: VisionConfig,
}

/// Rotary embedding: base and the factors of both regimes.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the angles (10000).
    pub theta: f64,
    /// `head_dim / 2` factors while the whole sequence fits `original_positions_max`.
    pub short_factor: Vec<f32>,
    /// `head_dim / 2` factors for longer sequences.
    pub long_factor: Vec<f32>,
    /// What cosines and sines are multiplied by in both regimes:
    /// `sqrt(1 + ln(max / original) / ln(original))`, 1.19 for 131072 / 4096, and 1 for a model without longrope.
    pub magnitude: f64,
}

/// The CLIP tower's sizes: ViT-L/14-336 unless `img_processor` overrides them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VisionConfig {
    /// Width of the tower.
    pub hidden_size: usize,
    /// Width of its MLP.
    pub intermediate_size: usize,
    /// Layers of the tower, unused ones included.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Layers to run for the wanted hidden state: one less than `layers` for `hidden_states[-2]`.
    pub layers_run: usize,
}

impl ModelConfig {
    /// Reads and checks a config; `file` is its name for messages.
    ///
    /// # Errors
    /// [`ModelError::UnknownModelType`], or [`ModelError::Config`] naming the first key that is missing or impossible.
    pub fn parse(json: &[u8], file: &str) -> Result<Self, ModelError> {
        let value = parse_json(json, file)?;
        let keys = Keys::new(&value, file)?;
        let model_type = keys.text("model_type")?.unwrap_or_default();
        if model_type != "phi3_v" {
            return Err(ModelError::UnknownModelType {
                file: file.to_owned(),
                have: model_type.to_owned(),
            });
        }
        check_unsupported(&keys)?;
        let hidden_size = keys.size_needed("hidden_size", SIZE_MAX)?;
        let heads = keys.size_needed("num_attention_heads", SIZE_MAX)?;
        let kv_heads = keys.size("num_key_value_heads", SIZE_MAX)?.unwrap_or(heads);
        if !hidden_size.is_multiple_of(heads * 2) {
            return Err(keys.wrong(
                "num_attention_heads",
                &heads.to_string(),
                &format!("half of an even share of hidden_size {hidden_size}"),
            ));
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(keys.wrong(
                "num_key_value_heads",
                &kv_heads.to_string(),
                &format!("a divisor of num_attention_heads {heads}"),
            ));
        }
        let positions_max = keys.size_needed("max_position_embeddings", POSITIONS_MAX)?;
        let (rope, original_positions_max) = parse_rope(&keys, hidden_size / heads, positions_max)?;
        let (vision, sub_first) = parse_vision(&keys)?;
        Ok(Self {
            hidden_size,
            intermediate_size: keys.size_needed("intermediate_size", SIZE_MAX)?,
            layers: keys.size_needed("num_hidden_layers", LAYERS_MAX)?,
            heads,
            kv_heads,
            head_dim: hidden_size / heads,
            vocab_size: keys.size_needed("vocab_size", VOCAB_MAX)?,
            rms_norm_eps: keys.positive("rms_norm_eps")?.unwrap_or(1e-5),
            rope,
            positions_max,
            original_positions_max,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            eos_token_ids: keys.token_ids("eos_token_id")?,
            sub_first,
            vision,
        })
    }

    /// Adds the ids `generation_config.json` ends a turn with.
    ///
    /// # Errors
    /// [`ModelError::Config`] when it is not JSON or `eos_token_id` is neither an id nor a list of ids.
    pub(crate) fn add_generation_eos(&mut self, json: &[u8], file: &str) -> Result<(), ModelError> {
        let value = parse_json(json, file)?;
        for id in Keys::new(&value, file)?.token_ids("eos_token_id")? {
            if !self.eos_token_ids.contains(&id) {
                self.eos_token_ids.push(id);
            }
        }
        Ok(())
    }
}

impl VisionConfig {
    /// Width of four patches side by side in depth, what the projector reads.
    pub fn merged_size(&self) -> usize {
        4 * self.hidden_size
    }
}

/// JSON with the file and line in the error.
pub(crate) fn parse_json(json: &[u8], file: &str) -> Result<Value, ModelError> {
    serde_json::from_slice(json).map_err(|error| ModelError::Config {
        file: file.to_owned(),
        message: format!("not JSON: {error}"),
    })
}

/// Refuses what would silently compute something else.
fn check_unsupported(keys: &Keys<'_>) -> Result<(), ModelError> {
    if let Some(act) = keys.text("hidden_act")?.filter(|act| *act != "silu") {
        return Err(keys.wrong("hidden_act", act, "silu"));
    }
    if let Some(share) = keys
        .positive("partial_rotary_factor")?
        .filter(|share| *share != 1.0)
    {
        return Err(keys.wrong("partial_rotary_factor", &share.to_string(), "1"));
    }
    for table in ["quantization", "quantization_config", "quantized"] {
        let Some(quantization) = keys.object(table).ok().flatten() else {
            continue;
        };
        if let Some(mode) = quantization.text("mode")?.filter(|mode| *mode != "affine") {
            return Err(quantization.wrong("mode", mode, "affine (MLX's default)"));
        }
        if let Some(method) = quantization
            .text("quant_method")?
            .filter(|method| *method != "mlx")
        {
            return Err(quantization.wrong(
                "quant_method",
                method,
                "an MLX INT4 or INT8, or an unquantized checkpoint",
            ));
        }
    }
    Ok(())
}

/// Reads `rope_scaling` (or transformers 5's `rope_parameters`) and where the short regime ends.
fn parse_rope(
    keys: &Keys<'_>,
    head_dim: usize,
    positions_max: usize,
) -> Result<(RopeConfig, usize), ModelError> {
    let scaling = match keys.object("rope_scaling")? {
        None => keys.object("rope_parameters")?,
        found => found,
    };
    let inner_theta = scaling
        .as_ref()
        .map(|scaling| scaling.positive("rope_theta"))
        .transpose()?
        .flatten();
    let theta = keys
        .positive("rope_theta")?
        .or(inner_theta)
        .unwrap_or(10000.0);
    let kind = match &scaling {
        None => "default",
        Some(scaling) => match scaling.text("type")? {
            None => scaling.text("rope_type")?.unwrap_or("longrope"),
            Some(kind) => kind,
        },
    };
    let (scaling, kind) = (scaling.as_ref(), kind);
    let Some(scaling) = scaling.filter(|_| kind != "default") else {
        let ones = vec![1.0; head_dim / 2];
        let rope = RopeConfig {
            theta,
            short_factor: ones.clone(),
            long_factor: ones,
            magnitude: 1.0,
        };
        return Ok((rope, positions_max));
    };
    if kind != "su" && kind != "longrope" {
        return Err(scaling.wrong("type", &format!("{kind:?}"), "\"su\" or \"longrope\""));
    }
    let key = "original_max_position_embeddings";
    let original = match keys.size(key, POSITIONS_MAX)? {
        None => scaling.size_needed(key, POSITIONS_MAX)?,
        Some(original) => original,
    };
    if original < 2 {
        return Err(keys.wrong(key, &original.to_string(), "at least 2"));
    }
    let rope = RopeConfig {
        theta,
        short_factor: scaling.positives("short_factor", head_dim / 2)?,
        long_factor: scaling.positives("long_factor", head_dim / 2)?,
        magnitude: magnitude(positions_max as f64, original as f64),
    };
    Ok((rope, original))
}

/// Source: HF Phi-3.5 `modeling_phi3_v.py`, `Phi3SuScaledRotaryEmbedding.forward`.
fn magnitude(positions_max: f64, original: f64) -> f64 {
    let ratio = positions_max / original;
    if ratio <= 1.0 {
        1.0
    } else {
        (1.0 + ratio.ln() / original.ln()).sqrt()
    }
}

/// Reads `img_processor` and `embd_layer`; gives the tower and whether sub tiles come first.
fn parse_vision(keys: &Keys<'_>) -> Result<(VisionConfig, bool), ModelError> {
    let empty = Value::Object(serde_json::Map::new());
    let none = Keys::new(&empty, "config.json")?;
    let processor = keys.object("img_processor")?;
    let processor = processor.as_ref().unwrap_or(&none);
    for (key, want) in [("name", "clip_vision_model"), ("type_feature", "patch")] {
        if let Some(have) = processor.text(key)?.filter(|have| *have != want) {
            return Err(processor.wrong(key, &format!("{have:?}"), want));
        }
    }
    for (key, want) in [
        ("image_size", CROP_SIDE_PX),
        ("patch_size", PATCH_SIDE_PX),
        ("num_img_tokens", 144),
    ] {
        if let Some(have) = processor.size(key, SIZE_MAX)?.filter(|have| *have != want) {
            return Err(processor.wrong(key, &have.to_string(), &want.to_string()));
        }
    }
    let hidden_size = processor.size("hidden_size", SIZE_MAX)?.unwrap_or(1024);
    let heads = processor
        .size("num_attention_heads", SIZE_MAX)?
        .unwrap_or(16);
    if !hidden_size.is_multiple_of(heads) {
        return Err(processor.wrong(
            "num_attention_heads",
            &heads.to_string(),
            &format!("a divisor of hidden_size {hidden_size}"),
        ));
    }
    if let Some(out) = processor
        .size("image_dim_out", SIZE_MAX)?
        .filter(|out| *out != hidden_size)
    {
        return Err(processor.wrong(
            "image_dim_out",
            &out.to_string(),
            &format!("the tower's hidden_size {hidden_size}"),
        ));
    }
    let layers = processor
        .size("num_hidden_layers", LAYERS_MAX)?
        .unwrap_or(24);
    let vision = VisionConfig {
        hidden_size,
        intermediate_size: processor
            .size("intermediate_size", SIZE_MAX)?
            .unwrap_or(4096),
        layers,
        heads,
        layers_run: layers_run(processor, layers)?,
    };
    let embd = keys.object("embd_layer")?;
    Ok((vision, parse_order(embd.as_ref().unwrap_or(&none))?))
}

/// `hidden_states[layer_idx]` is what `layers_run` layers leave; `hidden_states` has one entry more than layers.
fn layers_run(processor: &Keys<'_>, layers: usize) -> Result<usize, ModelError> {
    let index = processor.integer("layer_idx")?.unwrap_or(-2);
    let count = layers as i64 + 1;
    let run = if index < 0 {
        index.saturating_add(count)
    } else {
        index
    };
    usize::try_from(run)
        .ok()
        .filter(|run| *run <= layers)
        .ok_or_else(|| {
            processor.wrong(
                "layer_idx",
                &index.to_string(),
                &format!("one of the {count} hidden states"),
            )
        })
}

/// Checks `embd_layer` and tells whether the order is `sub_glb`.
fn parse_order(embd: &Keys<'_>) -> Result<bool, ModelError> {
    for key in ["use_hd_transform", "with_learnable_separator"] {
        if embd.flag(key)? == Some(false) {
            return Err(embd.wrong(key, "false", "true"));
        }
    }
    for (key, want) in [("embedding_cls", "image"), ("projection_cls", "mlp")] {
        if let Some(have) = embd.text(key)?.filter(|have| *have != want) {
            return Err(embd.wrong(key, &format!("{have:?}"), want));
        }
    }
    match embd.text("hd_transform_order")?.unwrap_or("sub_glb") {
        "sub_glb" => Ok(true),
        "glb_sub" => Ok(false),
        other => Err(embd.wrong(
            "hd_transform_order",
            &format!("{other:?}"),
            "sub_glb or glb_sub",
        )),
    }
}

#[cfg(test)]
mod tests;
