//! The operations a policy may record, on 8-bit RGB: checked as a chain before any is run.

use std::borrow::Cow;

use super::resize::{blur, resize};
use super::work::chain_cost;
use super::{CANVAS_PIXELS_MAX, ImageError, Layout, RgbBuffer, SourceImage};

/// Longest recorded chain. The reference transform takes seven.
const OPS_MAX: usize = 64;

/// Longest side an operation may make, in pixels; tables of weights grow with it.
const SIDE_PX_MAX: u32 = 65_535;

/// Widest blur in pixels; a pass costs six times this per sample.
const BLUR_SIGMA_MAX: f32 = 64.0;

/// How [`Op::Resize`] computes samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Filter {
    /// The sample under the centre of the new one.
    Nearest,
    /// PIL's BILINEAR, bit for bit: a triangle, widened when shrinking, each pass rounded to 8 bits.
    Bilinear,
    /// torch's bicubic: four taps an axis with a = -0.75, edges clamped, not antialiased.
    Bicubic,
    /// PIL's LANCZOS: three lobes, widened when shrinking, each pass rounded to 8 bits.
    Lanczos,
}

/// One recorded operation. Floats are held as bits so that chains can be compared and hashed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Op {
    /// Scales to `width` x `height` pixels.
    Resize {
        /// New width in pixels.
        width: u32,
        /// New height in pixels.
        height: u32,
        /// How samples are computed.
        filter: Filter,
    },
    /// Cuts out the rectangle whose upper left corner is (x, y).
    Crop {
        /// Left edge in pixels.
        x: u32,
        /// Upper edge in pixels.
        y: u32,
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// Puts the image at (x, y) of a canvas of one colour.
    Pad {
        /// Width of the canvas in pixels.
        width: u32,
        /// Height of the canvas in pixels.
        height: u32,
        /// Left edge of the image on it.
        x: u32,
        /// Upper edge of the image on it.
        y: u32,
        /// RGB of the canvas.
        fill: [u8; 3],
    },
    /// Turns clockwise by quarters of a circle.
    Rotate {
        /// Quarter turns; only the remainder by 4 matters.
        quarters: u8,
    },
    /// Mirrors left to right, or top to bottom.
    Flip {
        /// Left to right.
        horizontal: bool,
    },
    /// Grey replaces each pixel by its luma (ITU-R 601-2, PIL's integers), three times;
    /// the other layouts change nothing, since alpha is gone already.
    Convert(
        /// The layout to look like.
        Layout,
    ),
    /// Brightness factor, then contrast factor around mid grey, then gamma (above 1 brightens).
    /// See [`Op::adjust`].
    Adjust {
        /// Bits of the f32 factor.
        brightness_bits: u32,
        /// Bits of the f32 factor.
        contrast_bits: u32,
        /// Bits of the f32 exponent.
        gamma_bits: u32,
    },
    /// Gaussian blur. See [`Op::blur`].
    Blur {
        /// Bits of the f32 standard deviation in pixels.
        sigma_bits: u32,
    },
}

impl Op {
    /// [`Op::Adjust`] from its factors; 1.0 leaves a value alone.
    pub fn adjust(brightness: f32, contrast: f32, gamma: f32) -> Self {
        Self::Adjust {
            brightness_bits: brightness.to_bits(),
            contrast_bits: contrast.to_bits(),
            gamma_bits: gamma.to_bits(),
        }
    }

    /// [`Op::Blur`] with a standard deviation in pixels.
    pub fn blur(sigma: f32) -> Self {
        Self::Blur {
            sigma_bits: sigma.to_bits(),
        }
    }

    /// Size of the result for an image of `size` (width, height) pixels.
    ///
    /// # Errors
    /// Arguments that do not fit such an image, and results beyond [`CANVAS_PIXELS_MAX`] or 65535 a side.
    pub fn output_size(&self, size: (u32, u32)) -> Result<(u32, u32), ImageError> {
        let (from_width, from_height) = size;
        match *self {
            Self::Resize { width, height, .. } => {
                check_canvas("resize", width, height)?;
                // The horizontal pass comes first, at the old height.
                check_canvas("resize", width, from_height)?;
                Ok((width, height))
            }
            Self::Crop {
                x,
                y,
                width,
                height,
            } => {
                check_inside("crop", (x, y), (width, height), size)?;
                Ok((width, height))
            }
            Self::Pad {
                width,
                height,
                x,
                y,
                ..
            } => {
                check_inside("pad", (x, y), size, (width, height))?;
                check_canvas("pad", width, height)?;
                Ok((width, height))
            }
            Self::Rotate { quarters } if quarters % 2 == 1 => Ok((from_height, from_width)),
            Self::Rotate { .. } | Self::Flip { .. } | Self::Convert(_) => Ok(size),
            Self::Adjust {
                brightness_bits,
                contrast_bits,
                gamma_bits,
            } => {
                let factors = [brightness_bits, contrast_bits, gamma_bits].map(f32::from_bits);
                let usable = |factor: f32| factor.is_finite() && factor >= 0.0;
                if factors.into_iter().all(usable) && factors[2] > 0.0 {
                    return Ok(size);
                }
                Err(ImageError::BadOp {
                    op: "adjust",
                    detail: format!("{factors:?} must be finite, not negative, and gamma not 0"),
                })
            }
            Self::Blur { sigma_bits } => {
                let sigma = f32::from_bits(sigma_bits);
                if sigma > 0.0 && sigma <= BLUR_SIGMA_MAX {
                    return Ok(size);
                }
                Err(ImageError::BadOp {
                    op: "blur",
                    detail: format!("sigma is {sigma}; above 0 and up to {BLUR_SIGMA_MAX} works"),
                })
            }
        }
    }

    /// Whether the operation leaves every image of that size as it is.
    pub(super) fn is_identity(&self, size: (u32, u32)) -> bool {
        let one = 1f32.to_bits();
        match *self {
            Self::Resize { width, height, .. }
            | Self::Crop { width, height, .. }
            | Self::Pad { width, height, .. } => (width, height) == size,
            Self::Rotate { quarters } => quarters.is_multiple_of(4),
            Self::Flip { .. } | Self::Blur { .. } => false,
            Self::Convert(layout) => layout != Layout::Gray,
            Self::Adjust {
                brightness_bits,
                contrast_bits,
                gamma_bits,
            } => [brightness_bits, contrast_bits, gamma_bits] == [one; 3],
        }
    }

    /// Runs the operation; the arguments were checked by [`Self::output_size`].
    pub(super) fn apply<'a>(&self, image: Cow<'a, RgbBuffer>) -> Cow<'a, RgbBuffer> {
        if self.is_identity((image.width_px(), image.height_px())) {
            return image;
        }
        Cow::Owned(match *self {
            Self::Resize {
                width,
                height,
                filter,
            } => resize(&image, (width, height), filter),
            Self::Crop {
                x,
                y,
                width,
                height,
            } => crop(&image, (x, y), (width, height)),
            Self::Pad {
                width,
                height,
                x,
                y,
                fill,
            } => pad(&image, (x, y), (width, height), fill),
            Self::Rotate { quarters } => rotate(&image, quarters),
            Self::Flip { horizontal } => flip(&image, horizontal),
            Self::Convert(_) => gray(&image),
            Self::Adjust {
                brightness_bits,
                contrast_bits,
                gamma_bits,
            } => adjust(
                &image,
                f32::from_bits(brightness_bits),
                f32::from_bits(contrast_bits),
                f32::from_bits(gamma_bits),
            ),
            Self::Blur { sigma_bits } => blur(&image, f32::from_bits(sigma_bits)),
        })
    }
}

/// Runs a recorded chain on the whole image.
///
/// # Errors
/// A chain that is too long, does not fit the image or holds too much at once; nothing is computed then.
pub fn run_ops(source: &SourceImage, ops: &[Op]) -> Result<RgbBuffer, ImageError> {
    chain_cost((source.width_px(), source.height_px()), ops)?;
    let start = Cow::Borrowed(&source.rgb);
    let end = ops.iter().fold(start, |image, op| op.apply(image));
    Ok(end.into_owned())
}

/// Size at the end of a chain.
pub(super) fn check_chain(size: (u32, u32), ops: &[Op]) -> Result<(u32, u32), ImageError> {
    if ops.len() > OPS_MAX {
        return Err(ImageError::BadView(format!(
            "a chain of {} operations; {OPS_MAX} are allowed",
            ops.len()
        )));
    }
    ops.iter().try_fold(size, |size, op| op.output_size(size))
}

fn check_canvas(op: &'static str, width_px: u32, height_px: u32) -> Result<(), ImageError> {
    let pixels = u64::from(width_px) * u64::from(height_px);
    if pixels == 0 {
        let detail = format!("{width_px}x{height_px} has no pixels");
        return Err(ImageError::BadOp { op, detail });
    }
    if pixels > CANVAS_PIXELS_MAX {
        return Err(ImageError::CanvasTooLarge {
            op,
            width_px,
            height_px,
            pixels_max: CANVAS_PIXELS_MAX,
        });
    }
    if width_px.max(height_px) > SIDE_PX_MAX {
        return Err(ImageError::CanvasTooLong {
            op,
            width_px,
            height_px,
            side_px_max: SIDE_PX_MAX,
        });
    }
    Ok(())
}

fn check_inside(
    op: &'static str,
    (x, y): (u32, u32),
    (width, height): (u32, u32),
    (outer_width, outer_height): (u32, u32),
) -> Result<(), ImageError> {
    let fits = |at: u32, length: u32, outer: u32| {
        length > 0 && u64::from(at) + u64::from(length) <= u64::from(outer)
    };
    if fits(x, width, outer_width) && fits(y, height, outer_height) {
        return Ok(());
    }
    let detail =
        format!("{width}x{height} at ({x}, {y}) is not inside {outer_width}x{outer_height}");
    Err(ImageError::BadOp { op, detail })
}

/// Quarter turns clockwise.
pub(super) fn rotate(image: &RgbBuffer, quarters: u8) -> RgbBuffer {
    let (width, height) = (image.width_px(), image.height_px());
    let pixels = image.pixels();
    let stride = width as usize;
    let mut turned = Vec::with_capacity(pixels.len());
    match quarters % 4 {
        0 => return image.clone(),
        1 => {
            for x in 0..stride {
                turned.extend(pixels[x..].iter().step_by(stride).rev());
            }
        }
        2 => turned.extend(pixels.iter().rev()),
        _ => {
            for x in (0..stride).rev() {
                turned.extend(pixels[x..].iter().step_by(stride));
            }
        }
    }
    match quarters % 2 {
        1 => RgbBuffer::from_pixels(height, width, turned),
        _ => RgbBuffer::from_pixels(width, height, turned),
    }
}

/// Mirrors left to right when `horizontal`, else top to bottom.
pub(super) fn flip(image: &RgbBuffer, horizontal: bool) -> RgbBuffer {
    let rows = image.pixels().chunks_exact(image.width_px() as usize);
    let mut pixels = Vec::with_capacity(image.pixels().len());
    if horizontal {
        rows.for_each(|row| pixels.extend(row.iter().rev()));
    } else {
        rows.rev().for_each(|row| pixels.extend_from_slice(row));
    }
    RgbBuffer::from_pixels(image.width_px(), image.height_px(), pixels)
}

fn crop(image: &RgbBuffer, (x, y): (u32, u32), (width, height): (u32, u32)) -> RgbBuffer {
    let columns = x as usize * 3..(x + width) as usize * 3;
    let mut samples = Vec::with_capacity(width as usize * height as usize * 3);
    for row in image.rows().skip(y as usize).take(height as usize) {
        samples.extend_from_slice(&row[columns.clone()]);
    }
    RgbBuffer::from_samples(width, height, samples)
}

fn pad(
    image: &RgbBuffer,
    (x, y): (u32, u32),
    (width, height): (u32, u32),
    fill: [u8; 3],
) -> RgbBuffer {
    let mut samples = vec![fill; width as usize * height as usize].into_flattened();
    let canvas_rows = samples.chunks_exact_mut(width as usize * 3);
    for (to, from) in canvas_rows.skip(y as usize).zip(image.rows()) {
        to[x as usize * 3..][..from.len()].copy_from_slice(from);
    }
    RgbBuffer::from_samples(width, height, samples)
}

/// Luma in PIL's fixed point: 299, 587 and 114 thousandths in 16 bits.
fn gray(image: &RgbBuffer) -> RgbBuffer {
    let luma = |&[r, g, b]: &[u8; 3]| {
        let [r, g, b] = [r, g, b].map(u32::from);
        [((r * 19_595 + g * 38_470 + b * 7_471 + 0x8000) >> 16) as u8; 3]
    };
    let pixels = image.pixels().iter().map(luma).collect();
    RgbBuffer::from_pixels(image.width_px(), image.height_px(), pixels)
}

fn adjust(image: &RgbBuffer, brightness: f32, contrast: f32, gamma: f32) -> RgbBuffer {
    let table: [u8; 256] = std::array::from_fn(|sample| {
        let bright = sample as f32 / 255.0 * brightness;
        let contrasted = (bright - 0.5) * contrast + 0.5;
        (contrasted.clamp(0.0, 1.0).powf(1.0 / gamma) * 255.0).round() as u8
    });
    let samples = image.samples().iter();
    let samples = samples.map(|&sample| table[usize::from(sample)]).collect();
    RgbBuffer::from_samples(image.width_px(), image.height_px(), samples)
}
