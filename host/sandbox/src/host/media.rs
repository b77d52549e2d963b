//! Import `media`: bytes and pictures that stay on the host.

use std::panic::{AssertUnwindSafe, catch_unwind};

use wasmtime::component::Resource;

use crate::adapter::types::Blob;
use crate::bindings::adapter::visor::plugin::media as wit;
use crate::bindings::adapter::visor::plugin::types::Error;
use crate::error::{ErrorCode, FaultKind, GuestError};
use crate::guest::{GuestState, HostFault};
use crate::host::image::{OpLimits, RecordedImage};
use crate::image_policy::{Filter, Layout, PixelBuffer};

// Promised in `wit/host.wit`, so no keys.
const READ_BYTES_MAX: usize = 64 << 10;
const PIXEL_BYTES_MAX: usize = 64 << 10;

type Recorded = wasmtime::Result<Result<Resource<RecordedImage>, Error>>;

impl wit::Host for GuestState {}

impl wit::HostBlob for GuestState {
    fn size(&mut self, handle: Resource<Blob>) -> wasmtime::Result<u64> {
        self.on_time()?;
        Ok(self.table.get(&handle)?.bytes.len() as u64)
    }

    fn content_type(&mut self, handle: Resource<Blob>) -> wasmtime::Result<String> {
        self.on_time()?;
        Ok(self.table.get(&handle)?.content_type.clone())
    }

    fn read(
        &mut self,
        handle: Resource<Blob>,
        offset: u64,
        length: u32,
    ) -> wasmtime::Result<Vec<u8>> {
        self.on_time()?;
        let bytes = &self.table.get(&handle)?.bytes;
        let start = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let wanted = (length as usize).min(READ_BYTES_MAX);
        let end = start.saturating_add(wanted).min(bytes.len());
        Ok(bytes[start..end].to_vec())
    }

    fn drop(&mut self, handle: Resource<Blob>) -> wasmtime::Result<()> {
        self.table.delete(handle)?;
        Ok(())
    }
}

impl GuestState {
    fn image(&self, handle: &Resource<RecordedImage>) -> wasmtime::Result<&RecordedImage> {
        self.on_time()?;
        Ok(self.table.get(handle)?)
    }

    fn op_limits(&self) -> OpLimits {
        let options = &self.core.shared.options;
        OpLimits {
            ops_max: options.image_ops_max,
            pixels_max: options.image_pixels_max,
        }
    }

    /// For operations that can answer with an error.
    fn keep(&mut self, recorded: Result<RecordedImage, GuestError>) -> Recorded {
        match recorded {
            Ok(image) => Ok(Ok(self.table.push(image)?)),
            Err(refusal) => Ok(Err(refusal.into())),
        }
    }

    /// For operations that cannot: the guest ends.
    fn must_keep(
        &mut self,
        recorded: Result<RecordedImage, GuestError>,
    ) -> wasmtime::Result<Resource<RecordedImage>> {
        let image = recorded.map_err(|refusal| {
            let kind = match refusal.code {
                ErrorCode::TooLarge => FaultKind::Limit,
                _ => FaultKind::Contract,
            };
            HostFault::new(kind, refusal.message)
        })?;
        Ok(self.table.push(image)?)
    }

    /// Counts what running the image would take. The clock is looked at only afterwards, so this is what
    /// bounds it.
    fn count_work(
        &mut self,
        handle: &Resource<RecordedImage>,
    ) -> wasmtime::Result<Option<GuestError>> {
        let image = self.image(handle)?;
        let (width, height) = image.size_px();
        let work_px = match image.source.work_px(&image.ops) {
            Ok(work_px) => work_px.saturating_add(u64::from(width) * u64::from(height)),
            Err(refusal) => return Ok(Some(refusal)),
        };
        let work_px_max = self.core.shared.options.image_work_px_max;
        let total = self.image_work_px.saturating_add(work_px);
        if total > work_px_max {
            let message = format!(
                "image operations that read {total} pixels; {work_px_max} are allowed \
                 (sandbox.image_work_mpx_max)"
            );
            return Ok(Some(GuestError::new(ErrorCode::TooLarge, message)));
        }
        self.image_work_px = total;
        Ok(None)
    }

    fn run(
        &mut self,
        handle: &Resource<RecordedImage>,
    ) -> wasmtime::Result<Result<PixelBuffer, GuestError>> {
        if let Some(refusal) = self.count_work(handle)? {
            return Ok(Err(refusal));
        }
        let image = self.image(handle)?;
        // Native image code must not unwind through a guest.
        let run = catch_unwind(AssertUnwindSafe(|| image.source.pixels(&image.ops)));
        let buffer = run.unwrap_or_else(|_| {
            Err(GuestError::new(
                ErrorCode::Internal,
                "the host failed to compute these pixels",
            ))
        });
        self.on_time()?;
        Ok(buffer)
    }
}

impl wit::HostImage for GuestState {
    fn size(&mut self, handle: Resource<RecordedImage>) -> wasmtime::Result<wit::Size> {
        let (width, height) = self.image(&handle)?.size_px();
        Ok(wit::Size { width, height })
    }

    fn stored_size(&mut self, handle: Resource<RecordedImage>) -> wasmtime::Result<wit::Size> {
        let (width, height) = self.image(&handle)?.source.stored_size_px();
        Ok(wit::Size { width, height })
    }

    fn layout(&mut self, handle: Resource<RecordedImage>) -> wasmtime::Result<wit::Layout> {
        Ok(self.image(&handle)?.layout.into())
    }

    fn format(&mut self, handle: Resource<RecordedImage>) -> wasmtime::Result<String> {
        Ok(self.image(&handle)?.source.format())
    }

    fn digest(&mut self, handle: Resource<RecordedImage>) -> wasmtime::Result<String> {
        Ok(self.image(&handle)?.source.digest_hex())
    }

    fn resize(
        &mut self,
        handle: Resource<RecordedImage>,
        to: wit::Size,
        filter: wit::Filter,
    ) -> Recorded {
        let limits = self.op_limits();
        let to = (to.width, to.height);
        let recorded = self.image(&handle)?.resize(to, filter.into(), &limits);
        self.keep(recorded)
    }

    fn crop(&mut self, handle: Resource<RecordedImage>, area: wit::Rect) -> Recorded {
        let limits = self.op_limits();
        let corner = (area.x, area.y);
        let recorded = self
            .image(&handle)?
            .crop(corner, (area.width, area.height), &limits);
        self.keep(recorded)
    }

    fn pad(
        &mut self,
        handle: Resource<RecordedImage>,
        canvas: wit::Size,
        x: u32,
        y: u32,
        fill: wit::Color,
    ) -> Recorded {
        let limits = self.op_limits();
        let canvas = (canvas.width, canvas.height);
        let fill = [fill.r, fill.g, fill.b];
        let recorded = self.image(&handle)?.pad(canvas, (x, y), fill, &limits);
        self.keep(recorded)
    }

    fn rotate(
        &mut self,
        handle: Resource<RecordedImage>,
        quarters: u8,
    ) -> wasmtime::Result<Resource<RecordedImage>> {
        let recorded = self.image(&handle)?.rotate(quarters, &self.op_limits());
        self.must_keep(recorded)
    }

    fn flip(
        &mut self,
        handle: Resource<RecordedImage>,
        horizontal: bool,
    ) -> wasmtime::Result<Resource<RecordedImage>> {
        let recorded = self.image(&handle)?.flip(horizontal, &self.op_limits());
        self.must_keep(recorded)
    }

    fn convert(
        &mut self,
        handle: Resource<RecordedImage>,
        layout: wit::Layout,
    ) -> wasmtime::Result<Resource<RecordedImage>> {
        let recorded = self
            .image(&handle)?
            .convert(layout.into(), &self.op_limits());
        self.must_keep(recorded)
    }

    fn adjust(
        &mut self,
        handle: Resource<RecordedImage>,
        brightness: f32,
        contrast: f32,
        gamma: f32,
    ) -> wasmtime::Result<Resource<RecordedImage>> {
        let amounts = [brightness, contrast, gamma];
        let recorded = self.image(&handle)?.adjust(amounts, &self.op_limits());
        self.must_keep(recorded)
    }

    fn blur(&mut self, handle: Resource<RecordedImage>, sigma: f32) -> Recorded {
        let limits = self.op_limits();
        let recorded = self.image(&handle)?.blur(sigma, &limits);
        self.keep(recorded)
    }

    fn statistics(&mut self, handle: Resource<RecordedImage>) -> wasmtime::Result<Vec<(f32, f32)>> {
        let buffer = self.run(&handle)?.map_err(|refusal| {
            HostFault::new(
                FaultKind::Limit,
                format!("no statistics: {}", refusal.message),
            )
        })?;
        Ok(statistics(&buffer))
    }

    fn pixels(
        &mut self,
        handle: Resource<RecordedImage>,
    ) -> wasmtime::Result<Result<Vec<u8>, Error>> {
        let image = self.image(&handle)?;
        let bytes = image.bytes();
        if bytes > PIXEL_BYTES_MAX as u64 {
            let message =
                format!("{bytes} bytes of pixels; {PIXEL_BYTES_MAX} may be read: resize first");
            return Ok(Err(GuestError::new(ErrorCode::TooLarge, message).into()));
        }
        let buffer = self.run(&handle)?.map_err(Error::from);
        Ok(buffer.map(|buffer| buffer.samples))
    }

    fn drop(&mut self, handle: Resource<RecordedImage>) -> wasmtime::Result<()> {
        self.table.delete(handle)?;
        Ok(())
    }
}

/// Mean and standard deviation of each channel, on samples from 0 to 1. The sums are exact: a
/// sample's square is below 2^16, and 2^48 of them fit.
fn statistics(buffer: &PixelBuffer) -> Vec<(f32, f32)> {
    let channels = buffer.layout.channels();
    let mut sums = vec![(0_u64, 0_u64); channels];
    for pixel in buffer.samples.chunks_exact(channels) {
        for ((sum, squares), &sample) in sums.iter_mut().zip(pixel) {
            *sum += u64::from(sample);
            *squares += u64::from(sample) * u64::from(sample);
        }
    }
    let pixels = (buffer.samples.len() / channels).max(1) as f64;
    sums.into_iter()
        .map(|(sum, squares)| {
            let mean = sum as f64 / pixels;
            let variance = (squares as f64 / pixels - mean * mean).max(0.0);
            ((mean / 255.0) as f32, (variance.sqrt() / 255.0) as f32)
        })
        .collect()
}

impl From<wit::Filter> for Filter {
    fn from(filter: wit::Filter) -> Self {
        match filter {
            wit::Filter::Nearest => Self::Nearest,
            wit::Filter::Bilinear => Self::Bilinear,
            wit::Filter::Bicubic => Self::Bicubic,
            wit::Filter::Lanczos => Self::Lanczos,
        }
    }
}

impl From<wit::Layout> for Layout {
    fn from(layout: wit::Layout) -> Self {
        match layout {
            wit::Layout::Gray => Self::Gray,
            wit::Layout::Rgb => Self::Rgb,
            wit::Layout::Rgba => Self::Rgba,
        }
    }
}

impl From<Layout> for wit::Layout {
    fn from(layout: Layout) -> Self {
        match layout {
            Layout::Gray => Self::Gray,
            Layout::Rgb => Self::Rgb,
            Layout::Rgba => Self::Rgba,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_per_channel_and_on_samples_from_zero_to_one() {
        let samples = vec![0, 255, 51, 255, 255, 51];
        let buffer = PixelBuffer {
            width_px: 2,
            height_px: 1,
            layout: Layout::Rgb,
            samples,
        };
        assert_eq!(statistics(&buffer), [(0.5, 0.5), (1.0, 0.0), (0.2, 0.0)]);
    }
}
