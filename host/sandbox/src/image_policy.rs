//! Role image policy: a picture becomes an overview and a grid of tiles, as recorded operations.

use std::sync::Arc;

use wasmtime::component::{Resource, ResourceTable, ResourceTableError};

use crate::bindings::image_policy::exports::visor::plugin::image_policy as wit;
use crate::call::{Guest, Halt};
use crate::chat::Extensions;
use crate::error::{CallError, ErrorCode, GuestError};
use crate::host::image::RecordedImage;
use crate::host::model::ModelHandle;
use crate::options::{Function, Role};
use crate::plugin::Core;
use crate::services::{ModelFacts, Vision};

/// How `resize` computes samples; see `wit/host.wit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Filter {
    /// The sample under the centre of the new one.
    Nearest,
    /// Triangle, antialiased, rounded to 8 bits per pass.
    Bilinear,
    /// Four taps, a = -0.75, not antialiased.
    Bicubic,
    /// Three lobes, antialiased.
    Lanczos,
}

/// Channels of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// One channel.
    Gray,
    /// Three.
    Rgb,
    /// Three and alpha.
    Rgba,
}

impl Layout {
    /// Samples per pixel.
    #[must_use]
    pub fn channels(self) -> usize {
        match self {
            Self::Gray => 1,
            Self::Rgb => 3,
            Self::Rgba => 4,
        }
    }
}

/// One recorded operation. Arguments were checked when it was recorded: sizes are not zero,
/// areas lie inside, numbers are finite.
#[derive(Clone, Debug, PartialEq)]
pub enum ImageOp {
    /// To `width_px` x `height_px`.
    Resize {
        /// New width.
        width_px: u32,
        /// New height.
        height_px: u32,
        /// How.
        filter: Filter,
    },
    /// Keeps a rectangle, which lies inside.
    Crop {
        /// Left edge.
        x_px: u32,
        /// Top edge.
        y_px: u32,
        /// Width kept.
        width_px: u32,
        /// Height kept.
        height_px: u32,
    },
    /// Puts the image on a canvas, which holds it.
    Pad {
        /// Canvas width.
        width_px: u32,
        /// Canvas height.
        height_px: u32,
        /// Left edge of the image.
        x_px: u32,
        /// Top edge of the image.
        y_px: u32,
        /// Colour of the rest.
        fill: [u8; 3],
    },
    /// 1 to 3 quarter turns clockwise.
    Rotate {
        /// How many.
        quarters: u8,
    },
    /// Mirrors.
    Flip {
        /// Left to right when true, top to bottom when false.
        horizontal: bool,
    },
    /// Changes the channels.
    Convert(Layout),
    /// Factors and gamma; 1.0 leaves a value alone.
    Adjust {
        /// Factor of brightness, at least 0.
        brightness: f32,
        /// Factor of contrast, at least 0.
        contrast: f32,
        /// Exponent, above 0.
        gamma: f32,
    },
    /// Gaussian.
    Blur {
        /// Standard deviation in pixels, above 0.
        sigma_px: f32,
    },
}

/// Packed 8-bit samples, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PixelBuffer {
    /// Width.
    pub width_px: u32,
    /// Height.
    pub height_px: u32,
    /// Channels.
    pub layout: Layout,
    /// `width_px * height_px * channels` samples.
    pub samples: Vec<u8>,
}

/// A decoded picture, seen from the sandbox. The server implements it.
pub trait ImageSource: Send + Sync {
    /// Width and height in pixels, after orientation.
    fn size_px(&self) -> (u32, u32);
    /// Width and height as stored in the file.
    fn stored_size_px(&self) -> (u32, u32);
    /// Channels of the file.
    fn layout(&self) -> Layout;
    /// `jpeg`, `png`, `webp`.
    fn format(&self) -> String;
    /// Stable content hash, hex.
    fn digest_hex(&self) -> String;
    /// Pixels that running a chain would read, told without running it.
    ///
    /// # Errors
    /// When the chain cannot be run; the guest sees the message.
    fn work_px(&self, ops: &[ImageOp]) -> Result<u64, GuestError>;
    /// Runs a chain of operations.
    ///
    /// # Errors
    /// When the chain cannot be run; the guest sees the message.
    fn pixels(&self, ops: &[ImageOp]) -> Result<PixelBuffer, GuestError>;
}

/// Where an image stands in its request.
pub struct ImageContext {
    /// Position among the request's images.
    pub index: u32,
    /// How many there are.
    pub count: u32,
    /// Prompt tokens left for this image.
    pub budget_tokens: u32,
    /// `detail` and others.
    pub extensions: Extensions,
    /// The model that will see it.
    pub model: Arc<dyn ModelFacts>,
    /// The host's request id, for the log.
    pub request_id: String,
}

/// `(x - mean) / deviation` per channel, on samples from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalization {
    /// Means.
    pub mean: [f32; 3],
    /// Deviations, none zero.
    pub deviation: [f32; 3],
}

/// The decision of an image policy. Overview and tiles all have the model's tile size, there are
/// `columns * rows` tiles, and the view is not empty.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// The whole picture in one tile.
    pub overview: Option<Vec<ImageOp>>,
    /// Tiles per row; 0 without a grid.
    pub columns: u32,
    /// Rows of tiles; 0 without a grid.
    pub rows: u32,
    /// Row by row.
    pub tiles: Vec<Vec<ImageOp>>,
    /// None keeps the model's own.
    pub normalization: Option<Normalization>,
    /// Hints for other roles.
    pub extensions: Extensions,
}

/// Decides about an image in a fresh instance.
pub(crate) fn prepare(
    core: &Arc<Core>,
    image: Arc<dyn ImageSource>,
    context: ImageContext,
) -> Result<View, CallError> {
    let Some(vision) = context.model.vision() else {
        let message = format!("the model `{}` takes no images", context.model.id());
        return Err(CallError::Refused(GuestError::new(
            ErrorCode::Unsupported,
            message,
        )));
    };
    let mut guest = Guest::open(core, Role::ImagePolicy, context.request_id.clone())?;
    let tiles_max = core.shared.options.tiles_max;
    guest.call(Function::Prepare, |store, instance| {
        let indices = core.exports.image_policy.as_ref();
        let indices = indices.ok_or_else(|| Halt::Broken("is no image policy".to_owned()))?;
        let bindings = indices.load(&mut *store, instance)?;
        let table = &mut store.data_mut().table;
        let image = table.push(RecordedImage::new(image))?;
        let model = table.push(ModelHandle {
            facts: Arc::clone(&context.model),
        })?;
        let context = table.push(context)?;
        let policy = bindings.visor_plugin_image_policy();
        let answer = policy.call_prepare(
            &mut *store,
            Resource::new_borrow(image.rep()),
            Resource::new_borrow(model.rep()),
            Resource::new_borrow(context.rep()),
        )?;
        let view = answer.map_err(|e| Halt::Refused(e.into()))?;
        let proposal = Proposal::take(view, &mut store.data_mut().table)?;
        proposal.check(vision, tiles_max).map_err(Halt::Broken)
    })
}

/// A view as the guest gave it, unchecked.
struct Proposal {
    overview: Option<RecordedImage>,
    grid: Option<(u32, u32, Vec<RecordedImage>)>,
    normalization: Option<Normalization>,
    extensions: Extensions,
}

impl Proposal {
    fn take(view: wit::View, table: &mut ResourceTable) -> Result<Self, ResourceTableError> {
        let overview = view
            .overview
            .map(|handle| table.delete(handle))
            .transpose()?;
        let grid = match view.grid {
            None => None,
            Some(grid) => {
                let tiles: Result<Vec<_>, _> = grid
                    .tiles
                    .into_iter()
                    .map(|handle| table.delete(handle))
                    .collect();
                Some((grid.columns, grid.rows, tiles?))
            }
        };
        let normalization = view.normalization.map(|n| Normalization {
            mean: [n.mean.0, n.mean.1, n.mean.2],
            deviation: [n.deviation.0, n.deviation.1, n.deviation.2],
        });
        Ok(Self {
            overview,
            grid,
            normalization,
            extensions: view.extensions,
        })
    }

    fn check(self, vision: Vision, tiles_max: u32) -> Result<View, String> {
        if self.overview.is_none() && self.grid.is_none() {
            return Err("neither an overview nor tiles".to_owned());
        }
        if self.overview.is_none() && vision.overview {
            return Err("tiles without an overview, which the model wants beside them".to_owned());
        }
        let (columns, rows, tiles) = self.grid.unwrap_or((0, 0, Vec::new()));
        let wanted = columns
            .checked_mul(rows)
            .filter(|&count| count as usize == tiles.len());
        if wanted.is_none() || (columns == 0) != (rows == 0) {
            return Err(format!(
                "{} tiles for a grid of {columns}x{rows}",
                tiles.len()
            ));
        }
        if tiles.len() > tiles_max as usize {
            return Err(format!(
                "{} tiles; at most {tiles_max} are allowed",
                tiles.len()
            ));
        }
        let tile_px = (vision.tile_width_px, vision.tile_height_px);
        for image in self.overview.iter().chain(&tiles) {
            if image.size_px() != tile_px {
                let ((width, height), (tile_width, tile_height)) = (image.size_px(), tile_px);
                return Err(format!(
                    "a tile of {width}x{height}; the model wants {tile_width}x{tile_height}"
                ));
            }
        }
        if let Some(n) = &self.normalization {
            let finite = n
                .mean
                .iter()
                .chain(&n.deviation)
                .all(|value| value.is_finite());
            if !finite || n.deviation.iter().any(|&deviation| deviation <= 0.0) {
                return Err(format!(
                    "normalization by {:?} and {:?}",
                    n.mean, n.deviation
                ));
            }
        }
        Ok(View {
            overview: self.overview.map(|image| image.ops),
            columns,
            rows,
            tiles: tiles.into_iter().map(|image| image.ops).collect(),
            normalization: self.normalization,
            extensions: self.extensions,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_wants_an_overview_gets_one_with_every_grid() {
        let tiles_alone = || Proposal {
            overview: None,
            grid: Some((0, 0, Vec::new())),
            normalization: None,
            extensions: Vec::new(),
        };
        let vision = |overview| Vision {
            tile_width_px: 336,
            tile_height_px: 336,
            tiles_max: 16,
            overview,
        };
        let refused = tiles_alone().check(vision(true), 64).unwrap_err();
        assert!(refused.contains("without an overview"), "{refused}");
        tiles_alone().check(vision(false), 64).unwrap();
    }
}
