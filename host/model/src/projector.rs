//! From patch features to embeddings: tiles merged into one grid, separators added, two linear layers.
//!
//! Source: HF Phi-3.5 `modeling_phi3_v.py`, `Phi3ImageEmbedding.hd_feature_transform`, `reshape_hd_patches_2x2merge`
//! and `add_image_newline`.

use candle_core::Tensor;

use crate::config::{CROP_SIDE_PATCHES, ModelConfig};
use crate::error::ModelError;
use crate::linear::{Linear, Loader};
use crate::table::VISION;

/// Merged patches along a crop's side.
const SIDE: usize = CROP_SIDE_PATCHES / 2;

/// Tokens projected between two looks at `keep_going`.
const TOKENS_AT_ONCE: usize = 256;

/// One image on its way through the two layers.
pub(crate) struct ProjectorPass {
    merged: Tensor, // (tokens, 4 * width)
    done: Vec<Tensor>,
    done_tokens: usize,
}

/// Separators and the two layers behind them.
pub(crate) struct Projector {
    newline: Tensor,   // (1, merged): sub_GN, at the end of every grid row
    separator: Tensor, // (1, merged): glb_GN, between the two grids
    first: Linear,
    second: Linear,
    sub_first: bool,
}

impl Projector {
    pub(crate) fn load(loader: &Loader<'_>, config: &ModelConfig) -> Result<Self, ModelError> {
        let (merged, hidden) = (config.vision.merged_size(), config.hidden_size);
        Ok(Self {
            newline: loader.floats(&format!("{VISION}.sub_GN"), &[1, merged])?,
            separator: loader.floats(&format!("{VISION}.glb_GN"), &[1, merged])?,
            first: loader.linear_with_bias(
                &format!("{VISION}.img_projection.0"),
                hidden,
                merged,
            )?,
            second: loader.linear_with_bias(
                &format!("{VISION}.img_projection.2"),
                hidden,
                hidden,
            )?,
            sub_first: config.sub_first,
        })
    }

    /// Goes on with the rows of a merged image, some at a time; `keep_going` is asked behind each time, and once it says no the
    /// answer is `None`. GELU is the exact one, by the error function.
    pub(crate) fn advance(
        &self,
        pass: &mut ProjectorPass,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> candle_core::Result<Option<Tensor>> {
        let tokens = pass.merged.dim(0)?;
        while pass.done_tokens < tokens {
            let count = TOKENS_AT_ONCE.min(tokens - pass.done_tokens);
            let rows = pass.merged.narrow(0, pass.done_tokens, count)?;
            let inner = self.first.forward(&rows)?.gelu_erf()?;
            pass.done.push(self.second.forward(&inner)?);
            pass.done_tokens += count;
            if pass.done_tokens < tokens && !keep_going() {
                return Ok(None);
            }
        }
        Tensor::cat(&pass.done, 0).map(Some)
    }

    /// Patch features (1 + rows * columns, 576, width), the overview first and the tiles row by row, to the image's sequence
    /// before projection.
    pub(crate) fn begin(
        &self,
        patches: &Tensor,
        rows: usize,
        columns: usize,
    ) -> candle_core::Result<ProjectorPass> {
        Ok(ProjectorPass {
            merged: self.merge(patches, rows, columns)?,
            done: Vec::new(),
            done_tokens: 0,
        })
    }

    /// The image's sequence before projection, (tokens, 4 * width).
    fn merge(&self, patches: &Tensor, rows: usize, columns: usize) -> candle_core::Result<Tensor> {
        let overview = self.grid(&patches.narrow(0, 0, 1)?, 1, 1)?;
        let mut parts = vec![self.separator.clone()];
        if rows * columns > 0 {
            let tiles = self.grid(&patches.narrow(0, 1, rows * columns)?, rows, columns)?;
            parts.insert(if self.sub_first { 0 } else { 1 }, tiles);
        }
        parts.insert(if self.sub_first { parts.len() } else { 0 }, overview);
        Tensor::cat(&parts, 0)
    }

    /// Tiles (rows * columns, 576, width) to one grid of merged patches with a newline behind every row,
    /// (12 rows * (12 columns + 1), 4 * width).
    fn grid(&self, tiles: &Tensor, rows: usize, columns: usize) -> candle_core::Result<Tensor> {
        let (count, _, width) = tiles.dims3()?;
        // Four neighbours side by side in depth: (0,0), (0,1), (1,0), (1,1) within each 2 x 2.
        let merged = tiles
            .reshape((count, SIDE, 2, SIDE, 2, width))?
            .permute([0, 1, 3, 2, 4, 5])?
            .reshape((rows, columns, SIDE, SIDE, 4 * width))?;
        // Rows of the picture, not rows of the tiles one after the other.
        let grid =
            merged
                .permute([0, 2, 1, 3, 4])?
                .reshape((rows * SIDE, columns * SIDE, 4 * width))?;
        let newlines = self
            .newline
            .unsqueeze(0)?
            .broadcast_as((rows * SIDE, 1, 4 * width))?
            .contiguous()?;
        Tensor::cat(&[&grid, &newlines], 1)?
            .reshape((rows * SIDE * (columns * SIDE + 1), 4 * width))
    }
}
