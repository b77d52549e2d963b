//! Resampling: PIL's fixed-point filters bit for bit, torch's bicubic, nearest and Gaussian blur.
//!
//! Sources: Pillow `src/libImaging/Resample.c` (`precompute_coeffs`, `normalize_coeffs_8bpc`,
//! 8-bit passes); torch `aten/src/ATen/native/UpSample.h` (`get_cubic_upsample_coefficients`,
//! `area_pixel_compute_source_index`).

use super::{Filter, RgbBuffer};

/// Fraction bits of a weight. 255 * 2^22 * 1.8 still fits an i32, and Lanczos's absolute weights
/// sum to less.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// Scales to `(width, height)` pixels, in 8 bits.
pub(super) fn resize(image: &RgbBuffer, to: (u32, u32), filter: Filter) -> RgbBuffer {
    match filter {
        Filter::Nearest => nearest(image, to),
        Filter::Bilinear => resample(image, to, 1.0, triangle),
        Filter::Lanczos => resample(image, to, 3.0, lanczos),
        Filter::Bicubic => {
            let identity = [std::array::from_fn(|sample| sample as f32); 3];
            let mut samples = Vec::with_capacity(to.0 as usize * to.1 as usize * 3);
            bicubic(image, to, &identity, |_, row| {
                samples.extend(row.iter().map(|sample| sample.round() as u8)); // `as` saturates
            });
            RgbBuffer::from_samples(to.0, to.1, samples)
        }
    }
}

/// Gaussian blur, cut off at three standard deviations; beyond an edge there is nothing, the
/// weights inside it are scaled up.
pub(super) fn blur(image: &RgbBuffer, sigma: f32) -> RgbBuffer {
    let sigma = f64::from(sigma);
    let gauss = move |x: f64| (-0.5 * (x / sigma).powi(2)).exp();
    let radius = (3.0 * sigma).max(1.0);
    let (width, height) = (image.width_px(), image.height_px());
    let across = horizontal(image, &taps(width, width, radius, gauss));
    vertical(&across, &taps(height, height, radius, gauss))
}

/// Horizontal pass, then vertical; a pass that changes no size is skipped.
fn resample(
    image: &RgbBuffer,
    (width, height): (u32, u32),
    support: f64,
    kernel: fn(f64) -> f64,
) -> RgbBuffer {
    let across;
    let image = if width == image.width_px() {
        image
    } else {
        across = horizontal(image, &taps(image.width_px(), width, support, kernel));
        &across
    };
    if height == image.height_px() {
        return image.clone();
    }
    vertical(image, &taps(image.height_px(), height, support, kernel))
}

fn triangle(x: f64) -> f64 {
    (1.0 - x.abs()).max(0.0)
}

fn lanczos(x: f64) -> f64 {
    let sinc = |x: f64| {
        let x = x * std::f64::consts::PI;
        if x == 0.0 { 1.0 } else { x.sin() / x }
    };
    if (-3.0..3.0).contains(&x) {
        sinc(x) * sinc(x / 3.0)
    } else {
        0.0
    }
}

/// Which input samples make one output sample.
struct Tap {
    /// First input index.
    from: usize,
    /// Fixed-point weights of the inputs from there on; they sum to about 1.
    weights: Vec<i32>,
}

/// The taps of every output index of an axis of `length_in` samples scaled to `length_out`.
fn taps(length_in: u32, length_out: u32, support: f64, kernel: impl Fn(f64) -> f64) -> Vec<Tap> {
    let scale = f64::from(length_in) / f64::from(length_out);
    let filter_scale = scale.max(1.0);
    let support = support * filter_scale;
    let inverse = 1.0 / filter_scale;
    let tap = |index: u32| {
        let centre = (f64::from(index) + 0.5) * scale;
        let from = (centre - support + 0.5).max(0.0) as usize; // truncates
        let to = (centre + support + 0.5).min(f64::from(length_in)) as usize;
        let weights: Vec<f64> = (from..to)
            .map(|at| kernel((at as f64 - centre + 0.5) * inverse))
            .collect();
        let total: f64 = weights.iter().sum();
        let total = if total == 0.0 { 1.0 } else { total };
        let fixed = |weight: f64| {
            let scaled = weight / total * f64::from(1 << PRECISION_BITS);
            (scaled + 0.5f64.copysign(weight)) as i32 // truncates: rounds half away from zero
        };
        Tap {
            from,
            weights: weights.into_iter().map(fixed).collect(),
        }
    };
    (0..length_out).map(tap).collect()
}

/// The sum's integer part, clipped to 8 bits.
fn clip(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Half a unit, so that [`clip`] rounds.
const HALF: i32 = 1 << (PRECISION_BITS - 1);

fn horizontal(image: &RgbBuffer, taps: &[Tap]) -> RgbBuffer {
    let height = image.height_px();
    let mut pixels = Vec::with_capacity(taps.len() * height as usize);
    for row in image.pixels().chunks_exact(image.width_px() as usize) {
        pixels.extend(taps.iter().map(|tap| {
            let inputs = &row[tap.from..][..tap.weights.len()];
            let mut sums = [HALF; 3];
            for (input, &weight) in inputs.iter().zip(&tap.weights) {
                for (sum, &sample) in sums.iter_mut().zip(input) {
                    *sum += i32::from(sample) * weight;
                }
            }
            sums.map(clip)
        }));
    }
    RgbBuffer::from_pixels(taps.len() as u32, height, pixels)
}

fn vertical(image: &RgbBuffer, taps: &[Tap]) -> RgbBuffer {
    let row_bytes = image.width_px() as usize * 3;
    let mut samples = Vec::with_capacity(taps.len() * row_bytes);
    let mut sums = vec![0i32; row_bytes];
    for tap in taps {
        sums.fill(HALF);
        for (row, &weight) in image.rows().skip(tap.from).zip(&tap.weights) {
            for (sum, &sample) in sums.iter_mut().zip(row) {
                *sum += i32::from(sample) * weight;
            }
        }
        samples.extend(sums.iter().map(|&sum| clip(sum)));
    }
    RgbBuffer::from_samples(image.width_px(), taps.len() as u32, samples)
}

fn nearest(image: &RgbBuffer, (width, height): (u32, u32)) -> RgbBuffer {
    // (2o + 1) * in / (2 out): the input under the centre of output o, in integers.
    let under = |index: u32, length_in: u32, length_out: u32| {
        ((2 * u64::from(index) + 1) * u64::from(length_in) / (2 * u64::from(length_out))) as usize
    };
    let columns: Vec<usize> = (0..width)
        .map(|x| under(x, image.width_px(), width))
        .collect();
    let stride = image.width_px() as usize;
    let mut pixels = Vec::with_capacity(columns.len() * height as usize);
    for y in 0..height {
        let row = &image.pixels()[under(y, image.height_px(), height) * stride..][..stride];
        pixels.extend(columns.iter().map(|&x| row[x]));
    }
    RgbBuffer::from_pixels(width, height, pixels)
}

/// Four input indices, clamped to the edges, and their weights.
struct CubicTap {
    at: [usize; 4],
    weights: [f32; 4],
}

fn cubic_taps(length_in: u32, length_out: u32) -> Vec<CubicTap> {
    const A: f32 = -0.75;
    let near = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0; // |x| <= 1
    let far = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A; // 1 < |x| < 2
    let scale = length_in as f32 / length_out as f32;
    let last = i64::from(length_in) - 1;
    let tap = |index: u32| {
        let position = scale * (index as f32 + 0.5) - 0.5;
        let floor = position.floor();
        let t = position - floor;
        CubicTap {
            at: [-1, 0, 1, 2].map(|step| (floor as i64 + step).clamp(0, last) as usize),
            weights: [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)],
        }
    };
    (0..length_out).map(tap).collect()
}

/// torch's bicubic on `table[channel][sample]`, in f32 and not rounded.
///
/// Calls `emit(y, row)` for each output row, top to bottom; a row is (width, 3).
pub(super) fn bicubic(
    image: &RgbBuffer,
    (width, height): (u32, u32),
    table: &[[f32; 256]; 3],
    mut emit: impl FnMut(usize, &[f32]),
) {
    let columns = cubic_taps(image.width_px(), width);
    let rows = cubic_taps(image.height_px(), height);
    let stride = image.width_px() as usize;
    let mut row = vec![0f32; width as usize * 3];
    for (y, down) in rows.iter().enumerate() {
        row.fill(0.0);
        for (&from, &weight) in down.at.iter().zip(&down.weights) {
            if weight == 0.0 {
                continue; // odd ratios hit samples exactly: three rows of four count for nothing
            }
            let inputs = &image.pixels()[from * stride..][..stride];
            for (output, across) in row.as_chunks_mut::<3>().0.iter_mut().zip(&columns) {
                let [a, b, c, d] = across.at.map(|at| inputs[at]);
                let [wa, wb, wc, wd] = across.weights;
                for channel in 0..3 {
                    let value = |pixel: [u8; 3]| table[channel][usize::from(pixel[channel])];
                    let sum = wa * value(a) + wb * value(b) + wc * value(c) + wd * value(d);
                    output[channel] += weight * sum;
                }
            }
        }
        emit(y, &row);
    }
}
