//! `preprocess.{json,safetensors}`: images to crops, bit-exact up to the crops and 1e-6 from there.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::compare::{Finding, Reporter};
use super::folder::{Folder, floats, integers, pixel_values};
use crate::checkpoint::hex;
use crate::image::{CROP_SIDE_PX, PixelValues, SourceImage, hd_image, image_tokens};
use crate::weights::{StoredType, Weights};

/// f32 steps of a value below 4 are 2.4e-7; the global view sums a few products of those.
const TOLERANCE: f64 = 1e-6;
const SIDE: usize = CROP_SIDE_PX as usize;

/// One image and crop count of `preprocess.json`, or a batch of images.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    num_crops: Option<u32>,
    image_size_hw: serde_json::Value,
    num_img_tokens: serde_json::Value,
    hd_u8_sha256: Option<String>,
    crop_mean: Vec<Vec<f64>>,
    crop_std: Vec<Vec<f64>>,
    images: Option<Vec<String>>,
}

/// Compares every entry.
pub(super) fn compare_all(folder: &Folder, reporter: &mut Reporter<'_>) {
    let entries = match folder.read("preprocess.json") {
        Ok(None) => {
            return reporter.stage(
                "preprocess",
                "json",
                Finding::Skipped("there is no preprocess.json".into()),
            );
        }
        Ok(Some(json)) => {
            match serde_json::from_slice::<BTreeMap<String, serde_json::Value>>(&json) {
                Ok(entries) => entries,
                Err(error) => {
                    return reporter.stage(
                        "preprocess",
                        "json",
                        Finding::Miss(format!("preprocess.json: {error}")),
                    );
                }
            }
        }
        Err(error) => return reporter.stage("preprocess", "json", error),
    };
    let tensors = match folder.tensors("preprocess.safetensors") {
        Ok(Some(tensors)) => tensors,
        Ok(None) => {
            let reason =
                "there is no preprocess.safetensors; sizes and digests are compared".to_owned();
            reporter.stage("preprocess", "tensors", Finding::Skipped(reason));
            Weights::default()
        }
        Err(error) => {
            reporter.stage("preprocess", "tensors", error);
            Weights::default()
        }
    };
    for (key, value) in entries {
        let case = format!("preprocess.{key}");
        let entry: Entry = match serde_json::from_value(value) {
            Ok(entry) => entry,
            Err(error) => {
                reporter.stage(
                    &case,
                    "json",
                    Finding::Miss(format!("preprocess.json: {key}: {error}")),
                );
                continue;
            }
        };
        if let Err(finding) = compare_entry(folder, (&key, &entry), &tensors, reporter) {
            reporter.stage(&case, "image", finding);
        }
    }
}

fn compare_entry(
    folder: &Folder,
    (key, entry): (&str, &Entry),
    tensors: &Weights,
    reporter: &mut Reporter<'_>,
) -> Result<(), Finding> {
    let case = format!("preprocess.{key}");
    let (name, suffix) = key.rsplit_once(".c").unwrap_or((key, ""));
    let num_crops = entry
        .num_crops
        .or_else(|| suffix.parse().ok())
        .ok_or_else(|| {
            Finding::Miss(format!(
                "{key}: neither num_crops nor a name ending in .c<num_crops>"
            ))
        })?;
    if let Some(names) = &entry.images {
        let mut sizes = Vec::new();
        let mut tokens = Vec::new();
        for name in names {
            let pixels = pixel_values(&open(folder, name)?, num_crops).map_err(Finding::Miss)?;
            sizes.push(size_px(&pixels));
            tokens.push(pixels.image_tokens());
        }
        compare_size(&case, entry, (json!(sizes), json!(tokens)), reporter);
        return Ok(());
    }
    let image = open(folder, name)?;
    let pixels = pixel_values(&image, num_crops).map_err(Finding::Miss)?;
    let tokens = image_tokens(pixels.columns, pixels.rows);
    let have = (json!(size_px(&pixels)), json!(tokens));
    compare_size(&case, entry, have, reporter);
    compare_hd(
        (&case, key),
        (&image, num_crops),
        (entry, tensors),
        reporter,
    )?;
    compare_crops((&case, key), &pixels, tensors, reporter);
    compare_statistics(&case, &pixels, entry, reporter);
    Ok(())
}

fn open(folder: &Folder, name: &str) -> Result<SourceImage, Finding> {
    match folder.image(name) {
        Ok(Some(image)) => Ok(image),
        Ok(None) => Err(Finding::Skipped(format!("there is no images/{name}.*"))),
        Err(message) => Err(Finding::Miss(message)),
    }
}

/// Height and width of the grid, in pixels.
fn size_px(pixels: &PixelValues) -> [u32; 2] {
    [pixels.rows * CROP_SIDE_PX, pixels.columns * CROP_SIDE_PX]
}

/// What becomes of one image, or of each of several.
fn compare_size(
    case: &str,
    entry: &Entry,
    (size, tokens): (Value, Value),
    reporter: &mut Reporter<'_>,
) {
    let size = Finding::equal(&size, &entry.image_size_hw);
    reporter.stage(case, "image_size", size);
    let tokens = Finding::equal(&tokens, &entry.num_img_tokens);
    reporter.stage(case, "num_img_tokens", tokens);
}

/// The padded 8-bit image: its digest, and the sample that tells where it differs.
fn compare_hd(
    (case, key): (&str, &str),
    (image, num_crops): (&SourceImage, u32),
    (entry, tensors): (&Entry, &Weights),
    reporter: &mut Reporter<'_>,
) -> Result<(), Finding> {
    let hd = hd_image(image, num_crops).map_err(|error| Finding::Miss(error.to_string()))?;
    if let Some(want) = &entry.hd_u8_sha256 {
        let have = hex(&hd.sha256());
        reporter.stage(case, "hd_u8_sha256", Finding::equal(&have, want));
    }
    if let Some(want) = tensors
        .get(&format!("{key}.hd_u8_s16"))
        .filter(|tensor| tensor.dtype == StoredType::U8)
    {
        let row_bytes = 3 * hd.width_px() as usize;
        let rows = hd.samples().chunks_exact(row_bytes).skip(5).step_by(16);
        let have: Vec<u8> = rows
            .flat_map(|row| {
                row.as_chunks::<3>()
                    .0
                    .iter()
                    .skip(3)
                    .step_by(16)
                    .flatten()
                    .copied()
            })
            .collect();
        reporter.stage(case, "hd_u8", Finding::lists(&have, want.bytes()));
    }
    Ok(())
}

/// `.global_s12` is the overview at [:, 2::12, 7::12], `.crops_s24` the crops of `.crops_idx` at [:, 9::24, 4::24].
fn compare_crops(
    (case, key): (&str, &str),
    pixels: &PixelValues,
    tensors: &Weights,
    reporter: &mut Reporter<'_>,
) {
    match floats(tensors, &format!("{key}.global_s12")) {
        Ok(None) => {}
        Ok(Some((_, want))) => {
            let have = pixels
                .crop(0)
                .map(|crop| sample(crop, [2, 7], 12))
                .unwrap_or_default();
            reporter.stage(case, "global", Finding::floats(&have, &want, TOLERANCE));
        }
        Err(message) => reporter.stage(case, "global", Finding::Miss(message)),
    }
    let crops = floats(tensors, &format!("{key}.crops_s24"));
    let index = integers(tensors, &format!("{key}.crops_idx"));
    let finding = match (crops, index) {
        (Ok(None), _) => return,
        (Ok(Some((_, want))), Ok(Some((_, index)))) => {
            let crop = |index: &i64| {
                usize::try_from(*index)
                    .ok()
                    .and_then(|index| pixels.crop(index))
            };
            let have: Vec<f32> = index
                .iter()
                .filter_map(crop)
                .flat_map(|crop| sample(crop, [9, 4], 24))
                .collect();
            Finding::floats(&have, &want, TOLERANCE)
        }
        (Ok(Some(_)), Ok(None)) => Finding::Miss("there is crops_s24 and no crops_idx".into()),
        (Err(message), _) | (_, Err(message)) => Finding::Miss(message),
    };
    reporter.stage(case, "crops", finding);
}

/// A crop (3, 336, 336) at every `step`-th row and column from `from`.
fn sample(crop: &[f32], from: [usize; 2], step: usize) -> Vec<f32> {
    let rows = |channel: usize| {
        crop[channel * SIDE * SIDE..(channel + 1) * SIDE * SIDE]
            .chunks_exact(SIDE)
            .skip(from[0])
            .step_by(step)
    };
    (0..3)
        .flat_map(|channel| {
            rows(channel).flat_map(|row| row.iter().skip(from[1]).step_by(step).copied())
        })
        .collect()
}

/// Mean and deviation of every channel of every crop, which no sample can hide from.
fn compare_statistics(
    case: &str,
    pixels: &PixelValues,
    entry: &Entry,
    reporter: &mut Reporter<'_>,
) {
    let flat = |table: &[Vec<f64>]| {
        table
            .concat()
            .iter()
            .map(|value| *value as f32)
            .collect::<Vec<f32>>()
    };
    let (mut means, mut deviations) = (Vec::new(), Vec::new());
    for crop in (0..pixels.crop_count as usize).filter_map(|index| pixels.crop(index)) {
        for channel in crop.chunks_exact(SIDE * SIDE) {
            let count = channel.len() as f64;
            let mean = channel.iter().map(|value| f64::from(*value)).sum::<f64>() / count;
            let variance = channel
                .iter()
                .map(|value| (f64::from(*value) - mean).powi(2))
                .sum::<f64>()
                / count;
            means.push(mean as f32);
            deviations.push(variance.sqrt() as f32);
        }
    }
    if !entry.crop_mean.is_empty() {
        reporter.stage(
            case,
            "crop_mean",
            Finding::floats(&means, &flat(&entry.crop_mean), TOLERANCE),
        );
    }
    if !entry.crop_std.is_empty() {
        reporter.stage(
            case,
            "crop_std",
            Finding::floats(&deviations, &flat(&entry.crop_std), TOLERANCE),
        );
    }
}
