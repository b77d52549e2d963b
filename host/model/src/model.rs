//! Phi-3.5-vision: pixels and token ids in, logits out.
//!
//! [`Phi3V`] is immutable once loaded; everything that changes is in the caller's [`SequenceState`](crate::SequenceState) and
//! [`ImagePass`]. Here it is loaded and sees; `sequence` says what it is asked, `step` answers.

use std::cell::Cell;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use visor_kernels::Kernel;

use crate::checkpoint::Checkpoint;
use crate::clip::{Tower, TowerPass};
use crate::config::ModelConfig;
use crate::decoder::Decoder;
use crate::device::{Activations, DeviceKind};
use crate::error::ModelError;
use crate::image::PixelValues;
use crate::kv_cache::KvPool;
use crate::linear::Loader;
use crate::progress::{LoadProgress, LoadStage};
use crate::projector::{Projector, ProjectorPass};

/// The model: image tower, projector and decoder on one device.
pub struct Phi3V {
    config: ModelConfig,
    kind: DeviceKind,
    dtype: DType,
    pub(crate) tower: Tower,
    pub(crate) projector: Projector,
    pub(crate) decoder: Decoder,
    pub(crate) kv_pool: Arc<KvPool>,
}

/// Where weights go and what computes.
struct Placement {
    device: Device,
    dtype: DType,
    /// Matrices stay as their files have them.
    stored: bool,
    activations: Activations,
}

/// One image on its way through the tower.
#[derive(Default)]
pub struct ImagePass {
    tower: TowerPass,
    projector: Option<ProjectorPass>,
}

/// Projected features of one image, what its slots are filled with.
pub struct ImageFeatures {
    pub(crate) rows: Tensor, // (tokens, hidden), on the model's device
}

impl ImageFeatures {
    /// Slots the image takes in a prompt.
    pub fn tokens(&self) -> u32 {
        u32::try_from(self.rows.dims()[0]).unwrap_or(u32::MAX)
    }

    /// Bytes the features hold.
    pub fn bytes(&self) -> u64 {
        (self.rows.elem_count() * self.rows.dtype().size_in_bytes()) as u64
    }

    /// The features as f32, one row per image token.
    ///
    /// # Errors
    /// [`ModelError::Forward`] when the device cannot be read.
    pub fn to_rows(&self) -> Result<Vec<Vec<f32>>, ModelError> {
        Ok(self.rows.to_dtype(DType::F32)?.to_vec2()?)
    }
}

impl Phi3V {
    /// Loads the model to a device, to compute in floats. On the CPU weights stay mapped and little is read.
    ///
    /// # Errors
    /// [`ModelError::Device`] when the device does not start, [`ModelError::Forward`] when it has no room.
    pub fn load(
        checkpoint: &Checkpoint,
        device: DeviceKind,
        progress: &dyn Fn(LoadProgress),
    ) -> Result<Self, ModelError> {
        Self::load_with(checkpoint, device, Activations::Float, progress)
    }

    /// As [`Self::load`], with the activations that INT4 and INT8 weights are multiplied with.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_with(
        checkpoint: &Checkpoint,
        device: DeviceKind,
        activations: Activations,
        progress: &dyn Fn(LoadProgress),
    ) -> Result<Self, ModelError> {
        let placement = Placement {
            device: device.open()?,
            dtype: device.compute_dtype(checkpoint.parameters(), checkpoint.stored_dtype()),
            stored: device == DeviceKind::Cpu,
            activations,
        };
        Self::load_at(checkpoint, device, placement, progress)
    }

    fn load_at(
        checkpoint: &Checkpoint,
        kind: DeviceKind,
        Placement {
            device,
            dtype,
            stored,
            activations,
        }: Placement,
        progress: &dyn Fn(LoadProgress),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let loader = Loader {
            weights: checkpoint.weights(),
            device: &device,
            dtype,
            stored,
            kernel: (activations == Activations::Int8)
                .then(Kernel::detect)
                .flatten(),
            progress,
            bytes_done: Cell::new(0),
        };
        let decoder = Decoder::load(&loader, &config)?;
        let model = Self {
            tower: Tower::load(&loader, &config)?,
            projector: Projector::load(&loader, &config)?,
            kv_pool: Arc::new(decoder.kv_pool(&config)),
            decoder,
            config,
            kind,
            dtype,
        };
        let bytes_total = checkpoint.weights().bytes();
        progress(LoadProgress {
            stage: LoadStage::Loading,
            bytes_done: bytes_total,
            bytes_total,
        });
        Ok(model)
    }

    /// The checkpoint's config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device the model runs on.
    pub fn device(&self) -> DeviceKind {
        self.kind
    }

    /// Where the KV blocks of all sequences come from.
    pub fn kv_pool(&self) -> &KvPool {
        &self.kv_pool
    }

    /// The type activations are computed in.
    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Tower, merge and projection of one image. `keep_going` is asked between layers.
    ///
    /// # Errors
    /// [`ModelError::Cancelled`] once `keep_going` says no, [`ModelError::Pixels`] when the crops do not fit the grid,
    /// [`ModelError::Forward`] when the device fails.
    pub fn encode_image(
        &self,
        pixels: &PixelValues,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<ImageFeatures, ModelError> {
        if !keep_going() {
            return Err(ModelError::Cancelled);
        }
        self.advance_image(&mut ImagePass::default(), pixels, keep_going)?
            .ok_or(ModelError::Cancelled)
    }

    /// Goes on with an image where an earlier call left off, for a layer of some crops at least. `keep_going` is asked behind
    /// each; once it says no, the answer is `None` and the rest is left for the next call. Pixels are the same in all calls.
    ///
    /// # Errors
    /// As [`Self::encode_image`], never [`ModelError::Cancelled`].
    pub fn advance_image(
        &self,
        pass: &mut ImagePass,
        pixels: &PixelValues,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<ImageFeatures>, ModelError> {
        // A device that computes behind our back has done nothing yet when a layer returns: whoever looks at the time looks once it
        // has. An error comes again with the next layer.
        let settled = || {
            let _again = self.settle();
            keep_going()
        };
        let keep_going: &(dyn Fn() -> bool + Sync) = match self.kind {
            DeviceKind::Cpu => keep_going,
            _ => &settled,
        };
        let grid = u64::from(pixels.columns) * u64::from(pixels.rows);
        if u64::from(pixels.crop_count) != grid + 1 {
            return Err(ModelError::Pixels(format!(
                "{} crops; a grid of {} x {} and an overview are {}",
                pixels.crop_count,
                pixels.columns,
                pixels.rows,
                grid + 1
            )));
        }
        let projector = match &mut pass.projector {
            Some(projector) => projector,
            none => {
                let tower = &mut pass.tower;
                let Some(patches) = self.tower.advance(tower, &pixels.crops, keep_going)? else {
                    return Ok(None);
                };
                none.insert(self.begin_projection(&patches, pixels)?)
            }
        };
        let rows = self.projector.advance(projector, keep_going)?;
        self.settle()?;
        Ok(rows.map(|rows| ImageFeatures { rows }))
    }

    /// Waits until the device has done all that it was given, so that what is measured is what it takes. On the CPU that is so.
    pub(crate) fn settle(&self) -> Result<(), ModelError> {
        Ok(self.decoder.device.synchronize()?)
    }

    /// The tower's output, (crops, 576, width).
    pub(crate) fn tower_features(
        &self,
        pixels: &PixelValues,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Tensor, ModelError> {
        let mut pass = TowerPass::default();
        let patches = self.tower.advance(&mut pass, &pixels.crops, keep_going)?;
        patches.ok_or(ModelError::Cancelled)
    }

    /// Merge and projection of the tower's output.
    pub(crate) fn project(
        &self,
        patches: &Tensor,
        pixels: &PixelValues,
    ) -> Result<ImageFeatures, ModelError> {
        let mut pass = self.begin_projection(patches, pixels)?;
        let rows = self.projector.advance(&mut pass, &|| true)?;
        rows.map(|rows| ImageFeatures { rows })
            .ok_or(ModelError::Cancelled)
    }

    fn begin_projection(
        &self,
        patches: &Tensor,
        pixels: &PixelValues,
    ) -> Result<ProjectorPass, ModelError> {
        let (crops, grid) = (patches.dim(0)?, pixels.columns * pixels.rows);
        if crops as u64 != u64::from(grid) + 1 {
            return Err(ModelError::Pixels(format!(
                "{} values for {} crops",
                pixels.crops.len(),
                pixels.crop_count
            )));
        }
        let (rows, columns) = (pixels.rows as usize, pixels.columns as usize);
        Ok(self.projector.begin(patches, rows, columns)?)
    }
}

#[cfg(test)]
mod tests;
