//! What a model of a shape has to do, whoever does it: operations (two for a multiplication and its addition) and bytes.

use crate::checkpoint::Checkpoint;
use crate::config::{CROP_SIDE_PATCHES, ModelConfig, PATCH_SIDE_PX};
use crate::table::{self, Entry, Form, TOWER, VISION};
use crate::weights::StoredTensor;

/// Positions of a crop in the tower: its patches and the class token.
const CROP_POSITIONS: usize = 1 + CROP_SIDE_PATCHES * CROP_SIDE_PATCHES;

/// Weights by what they are multiplied with.
pub(super) struct Work {
    /// With every position of a sequence.
    layers: f64,
    /// With its last position.
    head: f64,
    /// With every position of a crop.
    tower: f64,
    /// With every patch of a crop.
    patches: f64,
    /// With every image token.
    projector: f64,
    /// Attention's operations for one visible position, over all layers: the score, and its share of the values.
    attention: f64,
    tower_attention: f64,
    /// Keys and values of one position, over all layers.
    kv_position_values: u64,
}

impl Work {
    pub(super) fn new(config: &ModelConfig) -> Self {
        let entries = table::tensors(config);
        let weights = |wanted: &dyn Fn(&str) -> bool| -> f64 {
            let matching = entries.iter().filter(|entry| wanted(&entry.name));
            matching.map(matrix_weights).sum()
        };
        let vision = &config.vision;
        Self {
            layers: weights(&is_layer),
            head: weights(&|name| is_head(name, config)),
            tower: weights(&|name| name.starts_with(&format!("{TOWER}.encoder"))),
            patches: (vision.hidden_size * 3 * PATCH_SIDE_PX * PATCH_SIDE_PX) as f64,
            projector: weights(&|name| name.starts_with(&format!("{VISION}.img_projection"))),
            attention: (4 * config.layers * config.heads * config.head_dim) as f64,
            tower_attention: (4 * vision.layers_run * vision.hidden_size) as f64,
            kv_position_values: (2 * config.layers * config.kv_heads * config.head_dim) as u64,
        }
    }

    /// Operations from embeddings to the logits of the last of `tokens` positions.
    pub(super) fn prefill(&self, tokens: usize) -> f64 {
        let tokens = tokens as f64;
        let visible = tokens * (tokens + 1.0) / 2.0;
        2.0 * (self.layers * tokens + self.head) + self.attention * visible
    }

    /// Operations from crops to image tokens.
    pub(super) fn vision(&self, crops: u32, image_tokens: u32) -> f64 {
        let positions = CROP_POSITIONS as f64;
        let crop = 2.0 * (self.tower * positions + self.patches * (positions - 1.0))
            + self.tower_attention * positions * positions;
        f64::from(crops) * crop + 2.0 * self.projector * f64::from(image_tokens)
    }

    /// Keys and values that a step behind that many positions reads.
    pub(super) fn kv_bytes(&self, positions: usize, value_bytes: u64) -> u64 {
        positions as u64 * self.kv_position_values * value_bytes
    }
}

/// The matrices that every step of decoding reads, scales and biases among them.
pub(super) fn step_weights(checkpoint: &Checkpoint) -> Vec<&StoredTensor> {
    let (config, weights) = (checkpoint.config(), checkpoint.weights());
    let matrices = table::tensors(config)
        .into_iter()
        .filter(|entry| is_layer(&entry.name) || is_head(&entry.name, config))
        .filter(|entry| matches!(entry.form, Form::Matrix { .. }));
    matrices
        .flat_map(|entry| {
            let module = entry.name.trim_end_matches(".weight");
            ["weight", "scales", "biases"].map(|part| weights.get(&format!("{module}.{part}")))
        })
        .flatten()
        .collect()
}

fn matrix_weights(entry: &Entry) -> f64 {
    match entry.form {
        Form::Matrix { rows, columns } => (rows * columns) as f64,
        _ => 0.0,
    }
}

fn is_layer(name: &str) -> bool {
    name.starts_with("model.layers.")
}

fn is_head(name: &str, config: &ModelConfig) -> bool {
    let head = if config.tie_word_embeddings {
        table::EMBEDDING
    } else {
        "lm_head"
    };
    name.strip_prefix(head) == Some(".weight")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::PHI35_VISION_CONFIG;

    /// By hand, from the published sizes.
    #[test]
    fn the_published_shape_costs_what_its_sizes_say() {
        let config = ModelConfig::parse(PHI35_VISION_CONFIG, "published").unwrap();
        let work = Work::new(&config);
        let layer = 3072.0 * (9216.0 + 3072.0 + 16384.0 + 8192.0);
        assert_eq!(work.layers, 32.0 * layer);
        assert_eq!(work.head, 32064.0 * 3072.0);
        let attention = 32.0 * 4.0 * 3072.0;
        let want = 2.0 * (32.0 * layer * 2.0 + 32064.0 * 3072.0) + attention * 3.0;
        assert_eq!(work.prefill(2), want, "the second position sees two");
        assert_eq!(work.kv_bytes(1, 2), 2 * 2 * 32 * 3072);
        let tower = 23.0 * (4.0 * 1024.0 * 1024.0 + 2.0 * 1024.0 * 4096.0);
        assert_eq!(work.tower, tower);
        assert_eq!(work.projector, 3072.0 * (4096.0 + 3072.0));
    }
}
