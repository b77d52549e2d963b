//! The lazy image: operations are checked and recorded, not run.

use std::sync::Arc;

use crate::error::{ErrorCode, GuestError};
use crate::image_policy::{Filter, ImageOp, ImageSource, Layout};

/// Blur beyond this takes long and shows nothing.
const SIGMA_PX_MAX: f32 = 256.0;

/// What may be recorded on one image.
#[derive(Clone, Copy)]
pub(crate) struct OpLimits {
    pub(crate) ops_max: usize,
    pub(crate) pixels_max: u64,
}

/// `media.image`: a source and what is to be done with it. Sizes are those after the chain.
#[expect(unreachable_pub, reason = "bindgen re-exports it")]
pub struct RecordedImage {
    pub(crate) source: Arc<dyn ImageSource>,
    pub(crate) ops: Vec<ImageOp>,
    pub(crate) layout: Layout,
    width_px: u32,
    height_px: u32,
}

impl RecordedImage {
    pub(crate) fn new(source: Arc<dyn ImageSource>) -> Self {
        let (width_px, height_px) = source.size_px();
        let layout = source.layout();
        Self {
            source,
            ops: Vec::new(),
            layout,
            width_px,
            height_px,
        }
    }

    pub(crate) fn size_px(&self) -> (u32, u32) {
        (self.width_px, self.height_px)
    }

    /// Bytes of its packed samples.
    pub(crate) fn bytes(&self) -> u64 {
        u64::from(self.width_px) * u64::from(self.height_px) * self.layout.channels() as u64
    }

    pub(crate) fn resize(
        &self,
        to: (u32, u32),
        filter: Filter,
        limits: &OpLimits,
    ) -> Result<Self, GuestError> {
        check_size("resize", to, limits)?;
        let op = ImageOp::Resize {
            width_px: to.0,
            height_px: to.1,
            filter,
        };
        self.with(op, to, self.layout, limits)
    }

    pub(crate) fn crop(
        &self,
        corner: (u32, u32),
        size: (u32, u32),
        limits: &OpLimits,
    ) -> Result<Self, GuestError> {
        check_size("crop", size, limits)?;
        check_inside("crop", corner, size, self.size_px())?;
        let op = ImageOp::Crop {
            x_px: corner.0,
            y_px: corner.1,
            width_px: size.0,
            height_px: size.1,
        };
        self.with(op, size, self.layout, limits)
    }

    pub(crate) fn pad(
        &self,
        canvas: (u32, u32),
        corner: (u32, u32),
        fill: [u8; 3],
        limits: &OpLimits,
    ) -> Result<Self, GuestError> {
        check_size("pad", canvas, limits)?;
        check_inside("pad", corner, self.size_px(), canvas)?;
        let op = ImageOp::Pad {
            width_px: canvas.0,
            height_px: canvas.1,
            x_px: corner.0,
            y_px: corner.1,
            fill,
        };
        self.with(op, canvas, self.layout, limits)
    }

    pub(crate) fn rotate(&self, quarters: u8, limits: &OpLimits) -> Result<Self, GuestError> {
        let (width, height) = self.size_px();
        match quarters % 4 {
            0 => Ok(self.same()),
            2 => self.with(
                ImageOp::Rotate { quarters: 2 },
                (width, height),
                self.layout,
                limits,
            ),
            odd => self.with(
                ImageOp::Rotate { quarters: odd },
                (height, width),
                self.layout,
                limits,
            ),
        }
    }

    pub(crate) fn flip(&self, horizontal: bool, limits: &OpLimits) -> Result<Self, GuestError> {
        self.with(
            ImageOp::Flip { horizontal },
            self.size_px(),
            self.layout,
            limits,
        )
    }

    pub(crate) fn convert(&self, layout: Layout, limits: &OpLimits) -> Result<Self, GuestError> {
        if layout == self.layout {
            return Ok(self.same());
        }
        self.with(ImageOp::Convert(layout), self.size_px(), layout, limits)
    }

    /// `amounts` are brightness, contrast and gamma.
    pub(crate) fn adjust(&self, amounts: [f32; 3], limits: &OpLimits) -> Result<Self, GuestError> {
        let [brightness, contrast, gamma] = amounts;
        let legal = amounts
            .iter()
            .all(|amount| amount.is_finite() && *amount >= 0.0);
        if !legal || gamma == 0.0 {
            return Err(invalid(format!(
                "adjust by {brightness}, {contrast}, {gamma}: factors are finite and not \
                 negative, gamma is above 0"
            )));
        }
        let op = ImageOp::Adjust {
            brightness,
            contrast,
            gamma,
        };
        self.with(op, self.size_px(), self.layout, limits)
    }

    pub(crate) fn blur(&self, sigma_px: f32, limits: &OpLimits) -> Result<Self, GuestError> {
        if !(sigma_px > 0.0 && sigma_px <= SIGMA_PX_MAX) {
            return Err(invalid(format!(
                "blur by {sigma_px}: above 0 and at most {SIGMA_PX_MAX} pixels are possible"
            )));
        }
        self.with(
            ImageOp::Blur { sigma_px },
            self.size_px(),
            self.layout,
            limits,
        )
    }

    fn same(&self) -> Self {
        Self {
            source: Arc::clone(&self.source),
            ops: self.ops.clone(),
            ..*self
        }
    }

    fn with(
        &self,
        op: ImageOp,
        size: (u32, u32),
        layout: Layout,
        limits: &OpLimits,
    ) -> Result<Self, GuestError> {
        if self.ops.len() >= limits.ops_max {
            let message = format!("more than {} operations on one image", limits.ops_max);
            return Err(GuestError::new(ErrorCode::TooLarge, message));
        }
        let mut ops = Vec::with_capacity(self.ops.len() + 1);
        ops.extend_from_slice(&self.ops);
        ops.push(op);
        let source = Arc::clone(&self.source);
        Ok(Self {
            source,
            ops,
            layout,
            width_px: size.0,
            height_px: size.1,
        })
    }
}

fn check_size(
    what: &str,
    (width, height): (u32, u32),
    limits: &OpLimits,
) -> Result<(), GuestError> {
    if width == 0 || height == 0 {
        return Err(invalid(format!(
            "{what} to {width}x{height}: a side is zero"
        )));
    }
    // Two u32 multiply without overflow in a u64.
    let pixels = u64::from(width) * u64::from(height);
    if pixels > limits.pixels_max {
        let message = format!(
            "{what} to {width}x{height}: {pixels} pixels; {} are allowed",
            limits.pixels_max
        );
        return Err(GuestError::new(ErrorCode::TooLarge, message));
    }
    Ok(())
}

/// `size` at `corner` lies in `whole`.
fn check_inside(
    what: &str,
    corner: (u32, u32),
    size: (u32, u32),
    whole: (u32, u32),
) -> Result<(), GuestError> {
    let fits = |at: u32, side: u32, room: u32| at.checked_add(side).is_some_and(|end| end <= room);
    if fits(corner.0, size.0, whole.0) && fits(corner.1, size.1, whole.1) {
        return Ok(());
    }
    Err(invalid(format!(
        "{what}: {}x{} at ({}, {}) is not inside {}x{}",
        size.0, size.1, corner.0, corner.1, whole.0, whole.1
    )))
}

fn invalid(message: String) -> GuestError {
    GuestError::new(ErrorCode::InvalidRequest, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image_policy::PixelBuffer;

    struct Grey;

    impl ImageSource for Grey {
        fn size_px(&self) -> (u32, u32) {
            (640, 480)
        }
        fn stored_size_px(&self) -> (u32, u32) {
            (480, 640)
        }
        fn layout(&self) -> Layout {
            Layout::Rgb
        }
        fn format(&self) -> String {
            "png".to_owned()
        }
        fn digest_hex(&self) -> String {
            "00".to_owned()
        }
        fn work_px(&self, _: &[ImageOp]) -> Result<u64, GuestError> {
            Ok(0)
        }
        fn pixels(&self, _: &[ImageOp]) -> Result<PixelBuffer, GuestError> {
            Err(GuestError::new(ErrorCode::Internal, "not asked for"))
        }
    }

    const LIMITS: OpLimits = OpLimits {
        ops_max: 3,
        pixels_max: 1_000_000,
    };

    fn image() -> RecordedImage {
        RecordedImage::new(Arc::new(Grey))
    }

    #[test]
    fn sizes_follow_the_recorded_chain() {
        let turned = image().rotate(5, &LIMITS).unwrap();
        assert_eq!(turned.size_px(), (480, 640));
        let cut = turned.crop((400, 600), (80, 40), &LIMITS).unwrap();
        assert_eq!(cut.size_px(), (80, 40));
        assert_eq!(cut.ops.len(), 2);
        assert_eq!(image().rotate(4, &LIMITS).unwrap().ops, []);
    }

    #[test]
    fn impossible_arguments_are_refused_when_recorded() {
        let max = u32::MAX;
        let refused = [
            image().resize((0, 5), Filter::Nearest, &LIMITS),
            image().resize((max, max), Filter::Nearest, &LIMITS),
            image().crop((0, 0), (641, 1), &LIMITS),
            image().crop((max, 0), (2, 2), &LIMITS),
            image().pad((700, 479), (0, 0), [0; 3], &LIMITS),
            image().pad((700, 700), (max, 0), [0; 3], &LIMITS),
            image().blur(f32::NAN, &LIMITS),
            image().blur(0.0, &LIMITS),
            image().adjust([1.0, f32::INFINITY, 1.0], &LIMITS),
            image().adjust([1.0, 1.0, 0.0], &LIMITS),
        ];
        for (index, result) in refused.iter().enumerate() {
            assert!(result.is_err(), "case {index}");
        }
    }

    #[test]
    fn a_chain_has_a_longest_length() {
        let mut image = image();
        for _ in 0..3 {
            image = image.flip(true, &LIMITS).unwrap();
        }
        let refusal = image.flip(true, &LIMITS).err().unwrap();
        assert_eq!(refusal.code, ErrorCode::TooLarge);
    }
}
