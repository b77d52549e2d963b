//! From a recorded plan to the crops the vision tower sees.

use std::borrow::Cow;

use sha2::{Digest as _, Sha256};

use super::ops::check_chain;
use super::resize::bicubic;
use super::work::{Cost, view_cost};
use super::{CROP_SIDE_PX, Filter, ImageError, Layout, Op, RgbBuffer, SourceImage};

/// Most crops of one view, the overview not counted: 331 MiB of samples.
pub(super) const MAX_CROPS: u32 = 256;

/// f32 samples of one crop, (3, 336, 336).
const CROP_SAMPLES: usize = 3 * CROP_PIXELS;
pub(super) const CROP_PIXELS: usize = CROP_SIDE_PX as usize * CROP_SIDE_PX as usize;

/// Channel-wise `(x - mean) / deviation` on samples in 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalization {
    /// Means of red, green and blue.
    pub mean: [f32; 3],
    /// Standard deviations of red, green and blue.
    pub deviation: [f32; 3],
}

impl Default for Normalization {
    /// CLIP's, which Phi-3.5-vision was trained with.
    fn default() -> Self {
        Self {
            mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            deviation: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        }
    }
}

impl Normalization {
    /// `table[channel][sample]`: every value a normalised 8-bit sample can have.
    fn table(&self) -> [[f32; 256]; 3] {
        std::array::from_fn(|channel| {
            let (mean, deviation) = (self.mean[channel], self.deviation[channel]);
            std::array::from_fn(|sample| (sample as f32 / 255.0 - mean) / deviation)
        })
    }
}

/// How one picture becomes crops: recorded operations, nothing computed yet.
#[derive(Debug, Clone, PartialEq)]
pub struct ViewPlan {
    /// The whole picture in one crop.
    pub overview: Option<Vec<Op>>,
    /// Columns of the grid.
    pub columns: u32,
    /// Rows of the grid.
    pub rows: u32,
    /// One chain per crop of the grid, row by row.
    pub tiles: Vec<Vec<Op>>,
    /// Applied to every sample at the end.
    pub normalization: Normalization,
}

impl ViewPlan {
    /// Memory of the crops it makes, in bytes.
    pub fn crops_bytes(&self) -> u64 {
        (self.chains().count() * CROP_SAMPLES * size_of::<f32>()) as u64
    }

    /// What it costs on an image of `size` (width, height) pixels.
    ///
    /// # Errors
    /// A plan that [`render_view`] would refuse.
    pub fn cost(&self, size: (u32, u32)) -> Result<Cost, ImageError> {
        self.check(size)?;
        view_cost(size, self.chains())
    }

    /// SHA-256 over the source's digest and everything in the plan: equal keys, equal crops.
    pub fn key(&self, source_digest: &[u8; 32]) -> [u8; 32] {
        let mut sha = Sha256::new();
        sha.update(b"visor view 1\0");
        sha.update(source_digest);
        let Normalization { mean, deviation } = self.normalization;
        for value in mean.iter().chain(&deviation) {
            sha.update(value.to_bits().to_le_bytes());
        }
        for count in [self.columns, self.rows, u32::from(self.overview.is_some())] {
            sha.update(count.to_le_bytes());
        }
        for chain in self.chains() {
            sha.update((chain.len() as u64).to_le_bytes());
            chain.iter().for_each(|op| hash_op(&mut sha, op));
        }
        sha.finalize().into()
    }

    /// The overview's chain, then the tiles': the order of the crops.
    fn chains(&self) -> impl Iterator<Item = &Vec<Op>> {
        self.overview.iter().chain(&self.tiles)
    }

    /// Everything that can be wrong with the plan for an image of that size.
    fn check(&self, size: (u32, u32)) -> Result<(), ImageError> {
        let (columns, rows) = (self.columns, self.rows);
        let tiles = self.tiles.len();
        let bad = |message: String| Err(ImageError::BadView(message));
        if self.overview.is_none() {
            return bad("no overview; the model was trained with one for every image".into());
        }
        if u64::from(columns) * u64::from(rows) != tiles as u64 || (columns == 0) != (rows == 0) {
            return bad(format!("a grid of {columns}x{rows} with {tiles} tiles"));
        }
        if tiles > MAX_CROPS as usize {
            return bad(format!("{tiles} tiles; {MAX_CROPS} are allowed"));
        }
        let Normalization { mean, deviation } = self.normalization;
        let finite = mean.iter().chain(&deviation).all(|value| value.is_finite());
        if !finite || deviation.iter().any(|value| *value <= 0.0) {
            return bad(format!(
                "normalization {mean:?} / {deviation:?} is not finite and positive"
            ));
        }
        for chain in self.chains() {
            let (width, height) = check_chain(size, chain)?;
            if (width, height) != (CROP_SIDE_PX, CROP_SIDE_PX) {
                return bad(format!(
                    "a crop of {width}x{height} pixels; the model takes {CROP_SIDE_PX}x{CROP_SIDE_PX}"
                ));
            }
        }
        Ok(())
    }
}

/// An unambiguous encoding: the operation's number, then its fields at fixed width.
fn hash_op(sha: &mut Sha256, op: &Op) {
    let fields = match *op {
        Op::Resize {
            width,
            height,
            filter,
        } => [0, width, height, filter as u32, 0, 0],
        Op::Crop {
            x,
            y,
            width,
            height,
        } => [1, x, y, width, height, 0],
        Op::Pad {
            width,
            height,
            x,
            y,
            fill: [r, g, b],
        } => [2, width, height, x, y, u32::from_le_bytes([r, g, b, 0])],
        Op::Rotate { quarters } => [3, u32::from(quarters % 4), 0, 0, 0, 0],
        Op::Flip { horizontal } => [4, u32::from(horizontal), 0, 0, 0, 0],
        Op::Convert(layout) => [5, u32::from(layout == Layout::Gray), 0, 0, 0, 0],
        Op::Adjust {
            brightness_bits,
            contrast_bits,
            gamma_bits,
        } => [6, brightness_bits, contrast_bits, gamma_bits, 0, 0],
        Op::Blur { sigma_bits } => [7, sigma_bits, 0, 0, 0, 0],
    };
    fields
        .iter()
        .for_each(|field| sha.update(field.to_le_bytes()));
}

/// Crops as the tower wants them.
#[derive(Debug, Clone, PartialEq)]
pub struct PixelValues {
    /// Normalised samples, (crops, 3, 336, 336): overview first, then the grid row by row.
    pub crops: Vec<f32>,
    /// Crops, the overview included.
    pub crop_count: u32,
    /// Columns of the grid.
    pub columns: u32,
    /// Rows of the grid.
    pub rows: u32,
    /// The plan's key for its source.
    pub key: [u8; 32],
}

impl PixelValues {
    /// Prompt tokens this image takes.
    pub fn image_tokens(&self) -> u32 {
        image_tokens(self.columns, self.rows)
    }

    /// Memory of the samples in bytes.
    pub fn bytes(&self) -> u64 {
        size_of_val(self.crops.as_slice()) as u64
    }

    /// Samples of one crop, (3, 336, 336), if there are that many.
    pub fn crop(&self, index: usize) -> Option<&[f32]> {
        self.crops.chunks_exact(CROP_SAMPLES).nth(index)
    }
}

/// Prompt tokens of an image cut into a grid of that size, with its overview:
/// `(h * w + 1) * 144 + 1 + (h + 1) * 12`; `u32::MAX` where that is too large for one.
pub fn image_tokens(columns: u32, rows: u32) -> u32 {
    let (w, h) = (u64::from(columns), u64::from(rows));
    let tokens = h.saturating_mul(w).saturating_add(1).saturating_mul(144);
    let tokens = tokens.saturating_add(1 + (h + 1) * 12);
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

/// Runs a plan on a picture. Operations that several crops begin with are run once.
///
/// A bicubic resize that ends a chain is evaluated in f32 on the normalised samples and not
/// rounded, as the reference computes its global view.
///
/// # Errors
/// A plan that does not fit the picture, does not end in 336x336 crops or holds too much at once; nothing
/// is computed then.
pub fn render_view(source: &SourceImage, plan: &ViewPlan) -> Result<PixelValues, ImageError> {
    plan.cost((source.width_px(), source.height_px()))?;
    let crop_count = plan.chains().count();
    let mut crops = vec![0f32; crop_count * CROP_SAMPLES];
    let table = plan.normalization.table();
    let branches = plan
        .chains()
        .zip(crops.chunks_exact_mut(CROP_SAMPLES))
        .map(|(chain, crop)| Branch { rest: chain, crop })
        .collect();
    grow(Cow::Borrowed(&source.rgb), branches, &table);
    Ok(PixelValues {
        crops,
        crop_count: crop_count as u32,
        columns: plan.columns,
        rows: plan.rows,
        key: plan.key(&source.digest),
    })
}

/// One crop to be made: what is left of its chain, and where it goes.
struct Branch<'a> {
    rest: &'a [Op],
    crop: &'a mut [f32],
}

/// Finishes the branches that end here, and walks the others along their next operation, together
/// as long as they agree. Recursion is as deep as branches part, which the chain limit bounds.
fn grow(image: Cow<'_, RgbBuffer>, branches: Vec<Branch<'_>>, table: &[[f32; 256]; 3]) {
    let mut groups: Vec<(&Op, Vec<Branch<'_>>)> = Vec::new();
    for mut branch in branches {
        match branch.rest {
            [] => write_crop(&image, branch.crop, table),
            [
                Op::Resize {
                    filter: Filter::Bicubic,
                    width,
                    height,
                },
            ] => {
                bicubic(&image, (*width, *height), table, |y, row| {
                    write_row(branch.crop, y, row.as_chunks().0.iter().copied());
                });
            }
            [next, rest @ ..] => {
                branch.rest = rest;
                match groups.iter_mut().find(|(op, _)| *op == next) {
                    Some((_, group)) => group.push(branch),
                    None => groups.push((next, vec![branch])),
                }
            }
        }
    }
    let Some((last_op, last)) = groups.pop() else {
        return;
    };
    for (op, group) in groups {
        grow(op.apply(Cow::Borrowed(&*image)), group, table);
    }
    // The last group takes the image along, so that a chain without branches holds one buffer.
    grow(last_op.apply(image), last, table);
}

/// Normalises a finished crop, from interleaved to planar.
fn write_crop(image: &RgbBuffer, crop: &mut [f32], table: &[[f32; 256]; 3]) {
    let rows = image.pixels().chunks_exact(CROP_SIDE_PX as usize);
    for (y, row) in rows.enumerate() {
        let values = row.iter().map(|&[r, g, b]| {
            [
                table[0][usize::from(r)],
                table[1][usize::from(g)],
                table[2][usize::from(b)],
            ]
        });
        write_row(crop, y, values);
    }
}

/// Spreads one row of pixels over the three planes of a crop.
fn write_row(crop: &mut [f32], y: usize, pixels: impl Iterator<Item = [f32; 3]>) {
    let start = y * CROP_SIDE_PX as usize;
    for (x, pixel) in pixels.enumerate() {
        for (channel, value) in pixel.into_iter().enumerate() {
            crop[channel * CROP_PIXELS + start + x] = value;
        }
    }
}
