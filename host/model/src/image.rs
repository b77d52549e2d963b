//! Pictures: encoded bytes in, normalised crops out.
//!
//! `container` looks at the file's structure, `decode` turns it into 8-bit RGB, `ops` and `resize`
//! are what a policy may record, `hd` writes the reference's HD transform with them, `work` counts
//! what a recorded plan costs, `view` runs it. Nothing here knows prompts, tensors or who asked.

mod container;
mod decode;
mod error;
mod hd;
mod ops;
mod resize;
mod view;
mod work;

use sha2::{Digest as _, Sha256};

pub use decode::{SourceImage, decode, probe};
pub use error::ImageError;
pub use hd::{hd_image, hd_plan};
pub use ops::{Filter, Op, run_ops};
pub use view::{Normalization, PixelValues, ViewPlan, image_tokens, render_view};
pub use work::{Cost, chain_cost};

/// Side of one crop in pixels: what the vision tower was trained on.
pub const CROP_SIDE_PX: u32 = 336;

/// Most pixels a recorded operation may produce, its intermediate included: 192 MiB of RGB.
pub const CANVAS_PIXELS_MAX: u64 = 1 << 26;

/// What an encoded image may be before a single pixel of it is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLimits {
    /// Largest encoded size in bytes.
    pub bytes_max: u64,
    /// Most pixels, width times height.
    pub pixels_max: u64,
    /// Longest side in pixels.
    pub side_px_max: u32,
    /// Longest side over shortest side.
    pub aspect_ratio_max: u32,
}

impl Default for ImageLimits {
    /// 20 MiB, 50 megapixels, 16384 pixels a side, 100 to 1.
    fn default() -> Self {
        Self {
            bytes_max: 20 << 20,
            pixels_max: 50_000_000,
            side_px_max: 16_384,
            aspect_ratio_max: 100,
        }
    }
}

/// The encodings Visor reads, told apart by content and never by a declared type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageFormat {
    /// JPEG, baseline or progressive.
    Jpeg,
    /// PNG; of an animation the default image.
    Png,
    /// WebP, lossy or lossless; of an animation the first frame.
    WebP,
}

impl ImageFormat {
    /// `jpeg`, `png` or `webp`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Jpeg => "jpeg",
            Self::Png => "png",
            Self::WebP => "webp",
        }
    }
}

impl std::fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Channels of an image as its file has them. Samples in memory are always RGB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// One channel.
    Gray,
    /// Three channels.
    Rgb,
    /// Colour or grey with an alpha channel, which decoding drops.
    Rgba,
}

/// What the header says, known before any pixel is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageHeader {
    /// The encoding, by content.
    pub format: ImageFormat,
    /// Stored width, before orientation.
    pub width_px: u32,
    /// Stored height, before orientation.
    pub height_px: u32,
    /// EXIF orientation, 1 to 8; 1 when there is none.
    pub orientation: u8,
    /// What the decoder hands out, in bytes: stored channels at their stored depth.
    pub samples_bytes: u64,
}

impl ImageHeader {
    /// Bytes of the decoded picture.
    pub fn decoded_bytes(&self) -> u64 {
        self.pixels() * 3
    }

    /// Most bytes that decoding takes at once, its result included: samples beside either the coefficients of a progressive JPEG (three
    /// of 16 bits a pixel) or their conversion; or what is turned, and turned again.
    pub fn decoding_bytes(&self) -> u64 {
        (self.samples_bytes + self.pixels() * 6).max(self.pixels() * 9)
    }

    fn pixels(&self) -> u64 {
        u64::from(self.width_px) * u64::from(self.height_px)
    }
}

/// 8-bit RGB pixels, row-major: (height, width, 3).
#[derive(Clone, PartialEq, Eq)]
pub struct RgbBuffer {
    width_px: u32,
    height_px: u32,
    samples: Vec<u8>,
}

impl RgbBuffer {
    /// Takes packed samples; `None` when a side is 0 or the length is not `width * height * 3`.
    pub fn new(width_px: u32, height_px: u32, samples: Vec<u8>) -> Option<Self> {
        let pixels = u64::from(width_px) * u64::from(height_px);
        (pixels > 0 && pixels.checked_mul(3) == Some(samples.len() as u64)).then_some(Self {
            width_px,
            height_px,
            samples,
        })
    }

    /// Width in pixels, at least 1.
    pub fn width_px(&self) -> u32 {
        self.width_px
    }

    /// Height in pixels, at least 1.
    pub fn height_px(&self) -> u32 {
        self.height_px
    }

    /// Packed samples, (height, width, 3).
    pub fn samples(&self) -> &[u8] {
        &self.samples
    }

    /// The packed samples, without a copy.
    pub fn into_samples(self) -> Vec<u8> {
        self.samples
    }

    /// SHA-256 of the packed samples, as the goldens have it.
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(&self.samples).into()
    }

    /// Pixels as triples, row-major.
    fn pixels(&self) -> &[[u8; 3]] {
        self.samples.as_chunks().0
    }

    /// Rows top to bottom, each `width * 3` bytes.
    fn rows(&self) -> std::slice::ChunksExact<'_, u8> {
        self.samples.chunks_exact(self.width_px as usize * 3)
    }

    /// A buffer from pixels an operation computed; the caller got the sizes right.
    fn from_pixels(width_px: u32, height_px: u32, pixels: Vec<[u8; 3]>) -> Self {
        Self::from_samples(width_px, height_px, pixels.into_flattened())
    }

    /// As [`Self::from_pixels`], from flat samples.
    fn from_samples(width_px: u32, height_px: u32, samples: Vec<u8>) -> Self {
        assert_eq!(
            samples.len() as u64,
            u64::from(width_px) * u64::from(height_px) * 3,
            "an operation on {width_px}x{height_px} pixels made the wrong number of samples",
        );
        Self {
            width_px,
            height_px,
            samples,
        }
    }
}

impl std::fmt::Debug for RgbBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RgbBuffer({}x{})", self.width_px, self.height_px)
    }
}
