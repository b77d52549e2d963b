//! What recorded operations cost, counted before any of them runs: time as pixels read, memory as pixels
//! held. A chain is short and says nothing of its cost: one blur reads hundreds of pixels for each it writes.

use super::ops::check_chain;
use super::view::CROP_PIXELS;
use super::{CANVAS_PIXELS_MAX, Filter, ImageError, Op};

/// What else takes time, in reads one after the other as a blur does them. Measured.
/// A pixel written, into memory that is new.
const WRITE_READS: u64 = 3;
/// A pixel read down the columns, as a quarter turn does.
const TURN_READS: u64 = 5;
/// A weight computed: an exponential or a sine.
const WEIGHT_READS: u64 = 32;
/// Bytes of a weight, and of a pixel.
const WEIGHT_BYTES: u64 = 4;
const PIXEL_BYTES: u64 = 3;

/// What operations take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Pixels read, all operations together, and what takes as long; a read takes one to two nanoseconds.
    pub reads_px: u64,
    /// Most pixels held at once beside the source's own: 3 bytes each.
    pub held_px: u64,
}

/// What a chain costs on an image of `size` (width, height) pixels.
///
/// # Errors
/// A chain that cannot be run there, or holds too much at once.
pub fn chain_cost(size: (u32, u32), ops: &[Op]) -> Result<Cost, ImageError> {
    check_chain(size, ops)?;
    let mut cost = Cost::default();
    let mut at = Canvas {
        size,
        is_owned: false,
    };
    for op in ops {
        let step = at.step(op)?;
        cost.add(at.held_px(), &step);
        at = step.to;
    }
    // What is handed out is a copy of its own.
    cost.held_px = cost.held_px.max(at.pixels());
    cost.check_held(size)?;
    Ok(cost)
}

/// What a view costs whose chains were all checked: beginnings that they share count once, as they run once.
pub(super) fn view_cost<'a>(
    size: (u32, u32),
    chains: impl Iterator<Item = &'a Vec<Op>>,
) -> Result<Cost, ImageError> {
    let source = Canvas {
        size,
        is_owned: false,
    };
    let cost = branches_cost(source, chains.map(Vec::as_slice).collect())?;
    cost.check_held(size)?;
    Ok(cost)
}

/// As `view::grow` runs them: the last group takes the image along, the others leave it.
fn branches_cost(at: Canvas, branches: Vec<&[Op]>) -> Result<Cost, ImageError> {
    let mut cost = Cost {
        reads_px: 0,
        held_px: at.held_px(),
    };
    let mut groups: Vec<(&Op, Vec<&[Op]>)> = Vec::new();
    for branch in branches {
        let Some((next, rest)) = branch.split_first() else {
            cost.read(CROP_PIXELS as u64);
            continue;
        };
        match groups.iter_mut().find(|(op, _)| *op == next) {
            Some((_, group)) => group.push(rest),
            None => groups.push((next, vec![rest])),
        }
    }
    let count = groups.len();
    for (index, (op, group)) in groups.into_iter().enumerate() {
        let mut step = at.step(op)?;
        cost.add(at.held_px(), &step);
        let stays = index + 1 < count;
        // One that changes nothing hands on what it was given.
        step.to.is_owned &= !(stays && step.is_nothing);
        let below = branches_cost(step.to, group)?;
        cost.read(below.reads_px);
        let beside = if stays { at.held_px() } else { 0 };
        cost.held_px = cost.held_px.max(beside.saturating_add(below.held_px));
    }
    Ok(cost)
}

impl Cost {
    /// Most memory held at once beside the source's own, in bytes.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        self.held_px.saturating_mul(PIXEL_BYTES)
    }

    fn read(&mut self, reads_px: u64) {
        self.reads_px = self.reads_px.saturating_add(reads_px);
    }

    fn add(&mut self, before_px: u64, step: &Step) {
        self.read(step.reads_px);
        let during = before_px.saturating_add(step.made_px);
        self.held_px = self.held_px.max(during);
    }

    /// Three of the largest canvas: what a resize or a blur reads, its first pass, and its second; and a
    /// quarter of one for weights.
    fn check_held(&self, source: (u32, u32)) -> Result<(), ImageError> {
        let held_px_max = CANVAS_PIXELS_MAX.max(pixels(source)) * 13 / 4;
        if self.held_px <= held_px_max {
            return Ok(());
        }
        Err(ImageError::BadView(format!(
            "operations that hold {} pixels at once; {held_px_max} are allowed",
            self.held_px
        )))
    }
}

/// An image on its way through a chain.
#[derive(Clone, Copy)]
struct Canvas {
    size: (u32, u32),
    /// Not the source itself, nor what another branch holds.
    is_owned: bool,
}

/// One operation on a canvas.
struct Step {
    to: Canvas,
    reads_px: u64,
    /// Pixels of the result, of what comes between, and of weights.
    made_px: u64,
    is_nothing: bool,
}

impl Canvas {
    fn pixels(self) -> u64 {
        pixels(self.size)
    }

    fn held_px(self) -> u64 {
        if self.is_owned { self.pixels() } else { 0 }
    }

    fn step(self, op: &Op) -> Result<Step, ImageError> {
        let size = op.output_size(self.size)?;
        if op.is_identity(self.size) {
            return Ok(Step {
                to: self,
                reads_px: 0,
                made_px: 0,
                is_nothing: true,
            });
        }
        let (reads_px, between_px) = reads(op, self.size, size);
        let reads_px = reads_px.saturating_add(WRITE_READS * pixels(size));
        let to = Canvas {
            size,
            is_owned: true,
        };
        Ok(Step {
            to,
            reads_px,
            made_px: to.pixels().saturating_add(between_px),
            is_nothing: false,
        })
    }
}

/// Pixels that an operation reads, and those it holds beside its result.
fn reads(op: &Op, from: (u32, u32), to: (u32, u32)) -> (u64, u64) {
    match *op {
        Op::Resize { filter, .. } => match filter {
            Filter::Nearest => (pixels(to), 0),
            Filter::Bicubic => {
                let weights = 4 * (u64::from(to.0) + u64::from(to.1));
                (16 * pixels(to) + WEIGHT_READS * weights, 0)
            }
            Filter::Bilinear => passes(from, to, 1.0),
            Filter::Lanczos => passes(from, to, 3.0),
        },
        Op::Blur { sigma_bits } => {
            let support = (3.0 * f64::from(f32::from_bits(sigma_bits))).max(1.0);
            let [across, down] = [axis(from.0, to.0, support), axis(from.1, to.1, support)];
            two_passes(from, to, across, down)
        }
        Op::Rotate { quarters } if quarters % 2 == 1 => (TURN_READS * pixels(to), 0),
        _ => (pixels(to), 0),
    }
}

/// A pass that changes no size is skipped.
fn passes(from: (u32, u32), to: (u32, u32), support: f64) -> (u64, u64) {
    let axis = |from: u32, to: u32| match from == to {
        true => 0,
        false => axis(from, to, support),
    };
    two_passes(from, to, axis(from.0, to.0), axis(from.1, to.1))
}

/// Inputs of one output on an axis, at most.
fn axis(from: u32, to: u32, support: f64) -> u64 {
    let scale = (f64::from(from) / f64::from(to)).max(1.0);
    let inputs = (2.0 * support * scale).ceil() as u64 + 1;
    inputs.min(from.into())
}

fn two_passes(from: (u32, u32), to: (u32, u32), across: u64, down: u64) -> (u64, u64) {
    let between = if across > 0 {
        pixels((to.0, from.1))
    } else {
        0
    };
    let weights = [(to.0, across), (to.1, down)].map(|(side, inputs)| u64::from(side) * inputs);
    let reads = between
        .saturating_mul(across + WRITE_READS)
        .saturating_add(pixels(to).saturating_mul(down))
        .saturating_add(WEIGHT_READS * (weights[0] + weights[1]));
    let weights_px = weights[0].max(weights[1]) * WEIGHT_BYTES / PIXEL_BYTES;
    (reads, between + weights_px)
}

fn pixels((width, height): (u32, u32)) -> u64 {
    u64::from(width) * u64::from(height)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{hd_plan, image_tokens};

    const MPX: u64 = 1_000_000;

    fn resize(width: u32, height: u32) -> Op {
        Op::Resize {
            width,
            height,
            filter: Filter::Bilinear,
        }
    }

    #[test]
    fn the_reference_transform_costs_little_whatever_the_picture() {
        for (width, height) in [
            (7300, 5479),
            (5479, 7300),
            (16_384, 2441),
            (2441, 16_384),
            (632, 63_245),
        ] {
            let plan = hd_plan(width, height, 16).unwrap();
            let cost = plan.cost((width, height)).unwrap();
            assert!(cost.reads_px < 700 * MPX, "{width}x{height}: {cost:?}");
            assert!(cost.held_px <= 2 * 40 * MPX, "{width}x{height}: {cost:?}");
            assert!(image_tokens(plan.columns, plan.rows) > 1000);
        }
    }

    #[test]
    fn a_pass_reads_what_its_filter_covers() {
        // Across: 500 x 1000 outputs of 2 * 2 + 1 inputs; down: 500 x 250 of 2 * 4 + 1; and the weights.
        let cost = chain_cost((1000, 1000), &[resize(500, 250)]).unwrap();
        let (weights, written) = (500 * 5 + 250 * 9, 500_000 + 125_000);
        let want = 500_000 * 5 + 125_000 * 9 + 32 * weights + 3 * written;
        assert_eq!(cost.reads_px, want);
        assert!(
            cost.held_px > 500_000 + 125_000 && cost.held_px < 640_000,
            "{cost:?}"
        );
        let blur = chain_cost((1000, 1000), &[Op::blur(64.0)]).unwrap();
        assert!(blur.reads_px > 2 * 384 * MPX, "{blur:?}");
        let again = chain_cost((1000, 1000), &[Op::blur(64.0), Op::blur(64.0)]).unwrap();
        assert_eq!(again.reads_px, 2 * blur.reads_px);
        assert_eq!(chain_cost((9, 9), &[resize(9, 9)]).unwrap().reads_px, 0);
    }

    #[test]
    fn shared_beginnings_count_once_and_what_waits_is_held() {
        let canvas = resize(8000, 8000);
        let cut = |flips: usize| {
            let flips = vec![Op::Flip { horizontal: true }; flips];
            let cut = Op::Crop {
                x: 0,
                y: 0,
                width: 336,
                height: 336,
            };
            [vec![canvas.clone()], flips, vec![cut]].concat()
        };
        let [one, two] = [vec![cut(0)], vec![cut(0), cut(0)]]
            .map(|chains| view_cost((336, 336), chains.iter()).unwrap());
        assert!(two.reads_px - one.reads_px < MPX, "{one:?} {two:?}");
        assert!(two.held_px < 70 * MPX, "{two:?}");
        // Each level leaves 64 million pixels to its second branch.
        let comb: Vec<_> = (0..6).rev().map(cut).collect();
        let refused = view_cost((336, 336), comb.iter()).unwrap_err().to_string();
        assert!(
            refused.contains("pixels at once; 218103808 are allowed"),
            "{refused}"
        );
    }

    #[test]
    fn a_side_of_millions_is_refused_before_its_weights_are_made() {
        let strip = Op::Crop {
            x: 0,
            y: 0,
            width: 640,
            height: 1,
        };
        let refused = chain_cost((640, 480), &[strip, resize(1 << 26, 1)]).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "resize would make 67108864x1 pixels; 65535 a side are allowed"
        );
    }
}
