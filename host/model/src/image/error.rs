//! Why an image, or what a plan asks of it, is refused. All of these are the caller's to mend.

use super::ImageFormat;

/// An image that cannot be used; every message has the numbers and the limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// The file is longer than the limit.
    #[error("image is {bytes} bytes; {bytes_max} are allowed")]
    TooManyBytes {
        /// Encoded size.
        bytes: u64,
        /// The limit.
        bytes_max: u64,
    },
    /// The header announces more pixels than the limit.
    #[error("image is {width_px}x{height_px} pixels; {pixels_max} pixels are allowed")]
    TooManyPixels {
        /// Announced width.
        width_px: u32,
        /// Announced height.
        height_px: u32,
        /// The limit.
        pixels_max: u64,
    },
    /// The header announces a side longer than the limit.
    #[error("image is {width_px}x{height_px} pixels; {side_px_max} a side are allowed")]
    SideTooLong {
        /// Announced width.
        width_px: u32,
        /// Announced height.
        height_px: u32,
        /// The limit.
        side_px_max: u32,
    },
    /// The sides differ by more than the limit.
    #[error(
        "image is {width_px}x{height_px} pixels; the longer side may be at most {aspect_ratio_max} times the shorter"
    )]
    TooNarrow {
        /// Announced width.
        width_px: u32,
        /// Announced height.
        height_px: u32,
        /// The limit.
        aspect_ratio_max: u32,
    },
    /// Neither JPEG nor PNG nor WebP, judged by content.
    #[error("not a JPEG, PNG or WebP image ({0})")]
    UnknownFormat(
        /// What the file starts with.
        String,
    ),
    /// The file ends before its image does.
    #[error("{format} image is truncated: {detail}")]
    Truncated {
        /// The encoding.
        format: ImageFormat,
        /// Where it ends and what is missing.
        detail: String,
    },
    /// The decoder rejects the file.
    #[error("{format} image cannot be decoded: {detail}")]
    Malformed {
        /// The encoding.
        format: ImageFormat,
        /// The decoder's words.
        detail: String,
    },
    /// An operation whose arguments do not fit the image it is applied to.
    #[error("{op}: {detail}")]
    BadOp {
        /// The operation.
        op: &'static str,
        /// What does not fit, with both sizes.
        detail: String,
    },
    /// An operation that would make an image beyond [`super::CANVAS_PIXELS_MAX`].
    #[error("{op} would make {width_px}x{height_px} pixels; {pixels_max} pixels are allowed")]
    CanvasTooLarge {
        /// The operation.
        op: &'static str,
        /// Width of the result or of its intermediate.
        width_px: u32,
        /// Height of the result or of its intermediate.
        height_px: u32,
        /// The limit.
        pixels_max: u64,
    },
    /// An operation that would make an image with a side beyond the limit.
    #[error("{op} would make {width_px}x{height_px} pixels; {side_px_max} a side are allowed")]
    CanvasTooLong {
        /// The operation.
        op: &'static str,
        /// Width of the result or of its intermediate.
        width_px: u32,
        /// Height of the result or of its intermediate.
        height_px: u32,
        /// The limit.
        side_px_max: u32,
    },
    /// A view that is not an overview and a full grid of crops.
    #[error("view: {0}")]
    BadView(
        /// What is wrong with it.
        String,
    ),
    /// The HD transform would scale the shorter side to nothing.
    #[error(
        "image is {width_px}x{height_px} pixels, too narrow for {num_crops} crops: its shorter side would be scaled to 0 pixels"
    )]
    NothingLeft {
        /// Width of the oriented image.
        width_px: u32,
        /// Height of the oriented image.
        height_px: u32,
        /// Crops asked for.
        num_crops: u32,
    },
}
