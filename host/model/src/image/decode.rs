//! Encoded bytes to 8-bit RGB, under limits that are checked before a pixel exists.
//!
//! Samples are as PIL's `convert("RGB")` has them: grey replicated, palettes expanded, alpha
//! dropped (not blended), 16 bits cut to their high byte. One difference on purpose: PIL clips
//! 16-bit *grey* at 255, which makes such a picture white.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder as _, ImageReader};
use sha2::{Digest as _, Sha256};

use super::container::{self, Container};
use super::ops::{flip, rotate};
use super::{ImageError, ImageFormat, ImageHeader, ImageLimits, Layout, RgbBuffer};

/// Room for a decoder's working memory beside its output, which the pixel limit bounds: rows and
/// metadata. A colour profile may be compressed, so its size says nothing.
const DECODER_SLACK_BYTES: u64 = 32 << 20;

/// A decoded picture, ready for recorded operations.
#[derive(Debug, Clone)]
pub struct SourceImage {
    /// The pixels, oriented when that was asked for.
    pub rgb: RgbBuffer,
    /// Width in the file, before orientation.
    pub stored_width_px: u32,
    /// Height in the file, before orientation.
    pub stored_height_px: u32,
    /// Channels in the file.
    pub layout: Layout,
    /// Encoding of the file.
    pub format: ImageFormat,
    /// SHA-256 of the file's bytes and of whether orientation was applied.
    pub digest: [u8; 32],
}

impl SourceImage {
    /// Width in pixels, after orientation.
    pub fn width_px(&self) -> u32 {
        self.rgb.width_px()
    }

    /// Height in pixels, after orientation.
    pub fn height_px(&self) -> u32 {
        self.rgb.height_px()
    }
}

/// Reads the header and walks the file's structure; decodes no pixel.
///
/// # Errors
/// A file over a limit, of another format, cut short, or with a header its decoder rejects.
pub fn probe(bytes: &[u8], limits: &ImageLimits) -> Result<ImageHeader, ImageError> {
    if bytes.len() as u64 > limits.bytes_max {
        return Err(ImageError::TooManyBytes {
            bytes: bytes.len() as u64,
            bytes_max: limits.bytes_max,
        });
    }
    let format = container::sniff(bytes)?;
    let container = container::inspect(format, bytes)?;
    // What the file announces anywhere comes first: decoders size buffers by it, whatever the
    // outer header says, and their own words for it lack the numbers.
    let (announced_width_px, announced_height_px) = container.announced_px;
    check_pixels(announced_width_px, announced_height_px, limits)?;
    let ((width_px, height_px), samples_bytes) = guarded(format, || {
        let decoder = reader(format, bytes, limits).into_decoder()?;
        Ok((decoder.dimensions(), decoder.total_bytes()))
    })?;
    check_pixels(width_px, height_px, limits)?;
    check_aspect(width_px, height_px, limits)?;
    Ok(ImageHeader {
        format,
        width_px,
        height_px,
        orientation: orientation(&container).to_exif(),
        samples_bytes,
    })
}

/// Decodes a whole image; applies its EXIF orientation when `orient`.
///
/// # Errors
/// What [`probe`] refuses, and pixels that cannot be decoded to the end.
pub fn decode(bytes: &[u8], limits: &ImageLimits, orient: bool) -> Result<SourceImage, ImageError> {
    let header = probe(bytes, limits)?;
    let format = header.format;
    let image = guarded(format, || {
        DynamicImage::from_decoder(reader(format, bytes, limits).into_decoder()?)
    })?;
    let (layout, stored) = to_rgb(image).ok_or_else(|| ImageError::Malformed {
        format,
        detail: "its samples do not match its size".into(),
    })?;
    let (stored_width_px, stored_height_px) = (stored.width_px(), stored.height_px());
    let rgb = match Orientation::from_exif(header.orientation) {
        Some(orientation) if orient => oriented(stored, orientation),
        _ => stored,
    };
    let digest = Sha256::new()
        .chain_update(bytes)
        .chain_update([u8::from(orient)])
        .finalize()
        .into();
    Ok(SourceImage {
        rgb,
        stored_width_px,
        stored_height_px,
        layout,
        format,
        digest,
    })
}

fn check_pixels(width_px: u32, height_px: u32, limits: &ImageLimits) -> Result<(), ImageError> {
    if width_px.max(height_px) > limits.side_px_max {
        return Err(ImageError::SideTooLong {
            width_px,
            height_px,
            side_px_max: limits.side_px_max,
        });
    }
    if u64::from(width_px) * u64::from(height_px) > limits.pixels_max {
        return Err(ImageError::TooManyPixels {
            width_px,
            height_px,
            pixels_max: limits.pixels_max,
        });
    }
    Ok(())
}

fn check_aspect(width_px: u32, height_px: u32, limits: &ImageLimits) -> Result<(), ImageError> {
    let longer = u64::from(width_px.max(height_px));
    let shorter = u64::from(width_px.min(height_px));
    if longer > shorter * u64::from(limits.aspect_ratio_max) {
        return Err(ImageError::TooNarrow {
            width_px,
            height_px,
            aspect_ratio_max: limits.aspect_ratio_max,
        });
    }
    Ok(())
}

fn orientation(container: &Container<'_>) -> Orientation {
    container
        .exif
        .and_then(Orientation::from_exif_chunk)
        .unwrap_or(Orientation::NoTransforms)
}

/// A reader for a known format that refuses to allocate beyond the limits.
fn reader<'a>(
    format: ImageFormat,
    bytes: &'a [u8],
    limits: &ImageLimits,
) -> ImageReader<Cursor<&'a [u8]>> {
    let format = match format {
        ImageFormat::Jpeg => image::ImageFormat::Jpeg,
        ImageFormat::Png => image::ImageFormat::Png,
        ImageFormat::WebP => image::ImageFormat::WebP,
    };
    let mut decoder_limits = image::Limits::no_limits();
    decoder_limits.max_image_width = Some(limits.side_px_max);
    decoder_limits.max_image_height = Some(limits.side_px_max);
    decoder_limits.max_alloc = Some(DECODER_SLACK_BYTES);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(decoder_limits);
    reader
}

/// Runs a decoder; its errors and its panics come back as errors of the image.
fn guarded<T>(
    format: ImageFormat,
    run: impl FnOnce() -> image::ImageResult<T>,
) -> Result<T, ImageError> {
    // Nothing the closure touches outlives it, so no broken state can be seen after a panic.
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) if is_end_of_file(&error) => Err(ImageError::Truncated {
            format,
            detail: error.to_string(),
        }),
        Ok(Err(error)) => Err(ImageError::Malformed {
            format,
            detail: error.to_string(),
        }),
        Err(_) => Err(ImageError::Malformed {
            format,
            detail: "the decoder panicked".into(),
        }),
    }
}

fn is_end_of_file(error: &image::ImageError) -> bool {
    matches!(error, image::ImageError::IoError(io) if io.kind() == std::io::ErrorKind::UnexpectedEof)
}

/// 8-bit RGB and the layout the file had; `None` if the decoder returned the wrong length.
fn to_rgb(image: DynamicImage) -> Option<(Layout, RgbBuffer)> {
    let (width_px, height_px) = (image.width(), image.height());
    let (layout, samples) = match image {
        DynamicImage::ImageRgb8(rgb) => (Layout::Rgb, rgb.into_raw()),
        DynamicImage::ImageLuma8(gray) => (Layout::Gray, replicated::<1, _>(&gray, |v| v)),
        DynamicImage::ImageLumaA8(gray) => (Layout::Rgba, replicated::<2, _>(&gray, |v| v)),
        DynamicImage::ImageRgba8(rgba) => (Layout::Rgba, opaque::<4, _>(&rgba, |v| v)),
        DynamicImage::ImageLuma16(gray) => (Layout::Gray, replicated::<1, _>(&gray, high_byte)),
        DynamicImage::ImageLumaA16(gray) => (Layout::Rgba, replicated::<2, _>(&gray, high_byte)),
        DynamicImage::ImageRgb16(rgb) => (Layout::Rgb, opaque::<3, _>(&rgb, high_byte)),
        DynamicImage::ImageRgba16(rgba) => (Layout::Rgba, opaque::<4, _>(&rgba, high_byte)),
        other => (Layout::Rgb, other.into_rgb8().into_raw()), // no such decoder is compiled in
    };
    RgbBuffer::new(width_px, height_px, samples).map(|rgb| (layout, rgb))
}

fn high_byte(sample: u16) -> u8 {
    (sample >> 8) as u8
}

/// The first of `N` channels three times.
fn replicated<const N: usize, T: Copy>(samples: &[T], narrow: impl Fn(T) -> u8) -> Vec<u8> {
    let pixels = samples.as_chunks::<N>().0.iter();
    pixels.flat_map(|pixel| [narrow(pixel[0]); 3]).collect()
}

/// The first three of `N` channels.
fn opaque<const N: usize, T: Copy>(samples: &[T], narrow: impl Fn(T) -> u8) -> Vec<u8> {
    let pixels = samples.as_chunks::<N>().0.iter();
    pixels
        .flat_map(|pixel| [narrow(pixel[0]), narrow(pixel[1]), narrow(pixel[2])])
        .collect()
}

/// Turns the stored picture the way its EXIF says it was taken.
fn oriented(stored: RgbBuffer, orientation: Orientation) -> RgbBuffer {
    match orientation {
        Orientation::NoTransforms => stored,
        Orientation::FlipHorizontal => flip(&stored, true),
        Orientation::Rotate180 => rotate(&stored, 2),
        Orientation::FlipVertical => flip(&stored, false),
        Orientation::Rotate90FlipH => flip(&rotate(&stored, 1), true),
        Orientation::Rotate90 => rotate(&stored, 1),
        Orientation::Rotate270FlipH => flip(&rotate(&stored, 3), true),
        Orientation::Rotate270 => rotate(&stored, 3),
    }
}
