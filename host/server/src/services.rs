//! What plugins may know of the model and of a picture: facts, counts, small looks.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use visor_model::image::{
    self, CROP_SIDE_PX, Filter as ModelFilter, Layout as ModelLayout, Op, SourceImage,
};
use visor_model::{Checkpoint, CheckpointFacts, ModelError, Tokenizer, hex};
use visor_sandbox::{
    ErrorCode, Extensions, Filter, GuestError, HostServices, ImageOp, ImageSource, Layout,
    ModelFacts, PixelBuffer, Vision,
};

use crate::config::ModelSection;

/// The model this server serves, as plugins and the pipeline know it.
#[derive(Debug)]
pub struct ServedModel {
    /// Name clients use.
    pub id: String,
    /// Further names clients may use.
    pub aliases: Vec<String>,
    /// When the server took it up, in Unix seconds.
    pub created_s: u64,
    /// Longest prompt plus answer, in tokens.
    pub context_tokens: u32,
    /// Most tiles it was trained with, the overview not counted.
    pub num_crops: u32,
    /// Ids that end an answer.
    pub stop_ids: Vec<u32>,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// What else is known of the weights.
    pub facts: CheckpointFacts,
}

impl ServedModel {
    /// A checkpoint under the operator's names; `facts` are of the weights that compute.
    ///
    /// # Errors
    /// A checkpoint without a usable tokenizer.
    pub fn new(
        checkpoint: &Checkpoint,
        facts: CheckpointFacts,
        config: &ModelSection,
    ) -> Result<Self, ModelError> {
        let model = checkpoint.config();
        let tokenizer = checkpoint.tokenizer()?;
        let positions_max = u32::try_from(model.positions_max).unwrap_or(u32::MAX);
        let id = if config.served_name.is_empty() {
            facts.id.clone()
        } else {
            config.served_name.clone()
        };
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Ok(Self {
            id,
            aliases: config.aliases.clone(),
            created_s: since_epoch.as_secs(),
            context_tokens: config.context_tokens.min(positions_max),
            num_crops: checkpoint.num_crops(),
            stop_ids: tokenizer.stop_ids(&model.eos_token_ids),
            tokenizer: Arc::new(tokenizer),
            facts,
        })
    }

    /// Whether a client may call it that.
    pub fn answers_to(&self, name: &str) -> bool {
        self.id == name || self.aliases.iter().any(|alias| alias == name)
    }
}

impl ModelFacts for ServedModel {
    fn id(&self) -> String {
        self.id.clone()
    }

    fn aliases(&self) -> Vec<String> {
        self.aliases.clone()
    }

    fn created_s(&self) -> u64 {
        self.created_s
    }

    fn context_tokens(&self) -> u32 {
        self.context_tokens
    }

    fn vision(&self) -> Option<Vision> {
        Some(Vision {
            tile_width_px: CROP_SIDE_PX,
            tile_height_px: CROP_SIDE_PX,
            tiles_max: self.num_crops,
            overview: true,
        })
    }

    fn image_tokens(&self, columns: u32, rows: u32) -> u32 {
        image::image_tokens(columns, rows)
    }

    fn count(&self, text: &str) -> u32 {
        self.tokenizer.count(text)
    }

    fn encode(&self, text: &str, control: bool) -> Vec<u32> {
        if control {
            self.tokenizer.encode_with_control(text)
        } else {
            self.tokenizer.encode_text(text)
        }
    }

    fn decode(&self, tokens: &[u32]) -> String {
        self.tokenizer.decode(tokens, false)
    }

    fn control_token(&self, text: &str) -> Option<u32> {
        self.tokenizer.control_token(text)
    }

    fn fit(&self, text: &str, tokens_max: u32) -> u32 {
        u32::try_from(self.tokenizer.fit(text, tokens_max)).unwrap_or(u32::MAX)
    }

    fn details(&self) -> Extensions {
        let mut details = vec![
            ("family".to_owned(), "phi3_v".to_owned()),
            ("quantization".to_owned(), self.facts.quantization.clone()),
            ("weights_bytes".to_owned(), self.facts.bytes.to_string()),
            ("digest".to_owned(), self.facts.digest.clone()),
            ("crops".to_owned(), self.num_crops.to_string()),
        ];
        if self.facts.embedded {
            let note = "a small demo model: simple objects, shapes, colors, positions, counts, a few digits or capital letters";
            details.push(("note".to_owned(), note.to_owned()));
        }
        details
    }
}

/// The sandbox's view of the server: one model.
#[derive(Debug, Clone)]
pub struct Services(pub Arc<ServedModel>);

impl HostServices for Services {
    fn models(&self) -> Vec<Arc<dyn ModelFacts>> {
        vec![Arc::clone(&self.0) as Arc<dyn ModelFacts>]
    }
}

/// A decoded picture, as an image policy may look at it.
#[derive(Debug)]
pub struct HostImage(pub Arc<SourceImage>);

impl ImageSource for HostImage {
    fn size_px(&self) -> (u32, u32) {
        (self.0.width_px(), self.0.height_px())
    }

    fn stored_size_px(&self) -> (u32, u32) {
        (self.0.stored_width_px, self.0.stored_height_px)
    }

    fn layout(&self) -> Layout {
        match self.0.layout {
            ModelLayout::Gray => Layout::Gray,
            ModelLayout::Rgb => Layout::Rgb,
            ModelLayout::Rgba => Layout::Rgba,
        }
    }

    fn format(&self) -> String {
        self.0.format.name().to_owned()
    }

    fn digest_hex(&self) -> String {
        hex(&self.0.digest)
    }

    fn work_px(&self, ops: &[ImageOp]) -> Result<u64, GuestError> {
        let cost = image::chain_cost(self.size_px(), &model_ops(ops)).map_err(refused)?;
        Ok(cost.reads_px)
    }

    fn pixels(&self, ops: &[ImageOp]) -> Result<PixelBuffer, GuestError> {
        let rgb = image::run_ops(&self.0, &model_ops(ops)).map_err(refused)?;
        let converted = ops.iter().rev().find_map(|op| match op {
            ImageOp::Convert(layout) => Some(*layout),
            _ => None,
        });
        let layout = converted.unwrap_or_else(|| self.layout());
        let (width_px, height_px) = (rgb.width_px(), rgb.height_px());
        let samples = packed(rgb.into_samples(), layout);
        Ok(PixelBuffer {
            width_px,
            height_px,
            layout,
            samples,
        })
    }
}

fn refused(error: image::ImageError) -> GuestError {
    GuestError::new(ErrorCode::InvalidRequest, error.to_string())
}

/// RGB samples in another layout: pictures are RGB in here, whatever their file had.
fn packed(rgb: Vec<u8>, layout: Layout) -> Vec<u8> {
    let (pixels, _) = rgb.as_chunks::<3>();
    match layout {
        Layout::Gray => pixels.iter().map(|pixel| pixel[0]).collect(),
        Layout::Rgb => rgb,
        Layout::Rgba => pixels
            .iter()
            .flat_map(|[r, g, b]| [*r, *g, *b, u8::MAX])
            .collect(),
    }
}

/// Recorded operations in the model's terms.
pub fn model_ops(ops: &[ImageOp]) -> Vec<Op> {
    ops.iter().map(model_op).collect()
}

fn model_op(op: &ImageOp) -> Op {
    match *op {
        ImageOp::Resize {
            width_px,
            height_px,
            filter,
        } => Op::Resize {
            width: width_px,
            height: height_px,
            filter: model_filter(filter),
        },
        ImageOp::Crop {
            x_px,
            y_px,
            width_px,
            height_px,
        } => Op::Crop {
            x: x_px,
            y: y_px,
            width: width_px,
            height: height_px,
        },
        ImageOp::Pad {
            width_px,
            height_px,
            x_px,
            y_px,
            fill,
        } => Op::Pad {
            width: width_px,
            height: height_px,
            x: x_px,
            y: y_px,
            fill,
        },
        ImageOp::Rotate { quarters } => Op::Rotate { quarters },
        ImageOp::Flip { horizontal } => Op::Flip { horizontal },
        ImageOp::Convert(layout) => Op::Convert(match layout {
            Layout::Gray => ModelLayout::Gray,
            Layout::Rgb => ModelLayout::Rgb,
            Layout::Rgba => ModelLayout::Rgba,
        }),
        ImageOp::Adjust {
            brightness,
            contrast,
            gamma,
        } => Op::adjust(brightness, contrast, gamma),
        ImageOp::Blur { sigma_px } => Op::blur(sigma_px),
    }
}

fn model_filter(filter: Filter) -> ModelFilter {
    match filter {
        Filter::Nearest => ModelFilter::Nearest,
        Filter::Bilinear => ModelFilter::Bilinear,
        Filter::Bicubic => ModelFilter::Bicubic,
        Filter::Lanczos => ModelFilter::Lanczos,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use visor_model::image::{ImageLimits, decode};

    fn gray_2x1() -> HostImage {
        let mut png = std::io::Cursor::new(Vec::new());
        let picture = ::image::GrayImage::from_raw(2, 1, vec![10, 200]).expect("two samples");
        picture
            .write_to(&mut png, ::image::ImageFormat::Png)
            .expect("encodes");
        let limits = ImageLimits::default();
        HostImage(Arc::new(
            decode(png.get_ref(), &limits, true).expect("a picture"),
        ))
    }

    #[test]
    fn a_look_has_the_layout_it_says() {
        let image = gray_2x1();
        assert_eq!(
            (image.layout(), image.format().as_str(), image.size_px()),
            (Layout::Gray, "png", (2, 1))
        );
        let look = |ops: &[ImageOp]| image.pixels(ops).expect("it fits").samples;
        assert_eq!(look(&[]), [10, 200]);
        assert_eq!(
            look(&[ImageOp::Convert(Layout::Rgb)]),
            [10, 10, 10, 200, 200, 200]
        );
        let mirrored = [
            ImageOp::Flip { horizontal: true },
            ImageOp::Convert(Layout::Rgba),
        ];
        assert_eq!(look(&mirrored), [200, 200, 200, 255, 10, 10, 10, 255]);
    }

    #[test]
    fn what_a_chain_takes_is_told_without_running_it() {
        let wide = ImageOp::Resize {
            width_px: 8192,
            height_px: 8192,
            filter: Filter::Nearest,
        };
        let blurs = vec![ImageOp::Blur { sigma_px: 64.0 }; 30];
        let chain = [vec![wide], blurs].concat();
        let work_px = gray_2x1().work_px(&chain).expect("it fits");
        assert!(work_px > 30 * 2 * 384 * 8192 * 8192, "{work_px}");
    }

    #[test]
    fn an_operation_that_does_not_fit_is_refused() {
        let outside = ImageOp::Crop {
            x_px: 1,
            y_px: 0,
            width_px: 2,
            height_px: 1,
        };
        assert_eq!(
            gray_2x1().pixels(&[outside]).expect_err("2 from 1").code,
            ErrorCode::InvalidRequest
        );
    }
}
