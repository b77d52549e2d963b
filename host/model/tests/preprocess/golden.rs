//! Every image and crop count of the reference, bit for bit up to the padded HD image.

use std::collections::BTreeMap;

use safetensors::SafeTensors;
use serde::Deserialize;
use visor_model::image::{hd_image, hd_plan, image_tokens, render_view};

use crate::files::{golden_image, golden_path};

/// Two f32 roundings on values up to 2.7; the bit-exact path needs none of it.
const TOLERANCE: f32 = 1e-6;

#[derive(Deserialize)]
struct Case {
    input_size_wh: [u32; 2],
    num_crops: u32,
    image_size_hw: [u32; 2],
    num_img_tokens: u32,
    real_crops: u32,
    hd_u8_sha256: String,
    hd_u8_sum: [u64; 3],
    crop_mean: Vec<[f64; 3]>,
    crop_std: Vec<[f64; 3]>,
}

/// Several images in one call of the reference's processor.
#[derive(Deserialize)]
struct Batch {
    images: Vec<String>,
    image_size_hw: Vec<[u32; 2]>,
    num_img_tokens: Vec<u32>,
    pixel_values_shape: [u32; 5],
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Entry {
    Case(Case),
    Batch(Batch),
}

struct Golden {
    cases: BTreeMap<String, Case>,
    batches: Vec<Batch>,
    tensors: Vec<u8>,
}

fn golden() -> Golden {
    let read = |name| std::fs::read(golden_path(name)).expect("goldens are in the repository");
    let entries: BTreeMap<String, Entry> =
        serde_json::from_slice(&read("preprocess.json")).expect("goldens are sound");
    let mut golden = Golden {
        cases: BTreeMap::new(),
        batches: Vec::new(),
        tensors: read("preprocess.safetensors"),
    };
    for (name, entry) in entries {
        match entry {
            Entry::Case(case) => drop(golden.cases.insert(name, case)),
            Entry::Batch(batch) => golden.batches.push(batch),
        }
    }
    golden
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn floats(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = tensors.tensor(name).expect("the golden has this tensor");
    let bytes = tensor.data().as_chunks::<4>().0;
    bytes
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}

/// `crop[:, from_y::step, from_x::step]` of a (3, 336, 336) crop.
fn subsample(crop: &[f32], step: usize, (from_y, from_x): (usize, usize)) -> Vec<f32> {
    let planes = crop.chunks_exact(336 * 336);
    let rows = planes.flat_map(|plane| plane.chunks_exact(336).skip(from_y).step_by(step));
    rows.flat_map(|row| row.iter().copied().skip(from_x).step_by(step))
        .collect()
}

fn assert_close(have: &[f32], want: &[f32], what: &str) {
    assert_eq!(have.len(), want.len(), "{what}");
    for (index, (have, want)) in have.iter().zip(want).enumerate() {
        let difference = (have - want).abs();
        assert!(
            difference <= TOLERANCE,
            "{what}[{index}]: {have} is not {want}"
        );
    }
}

#[test]
fn hd_images_are_identical_to_the_reference() {
    let golden = golden();
    let tensors = SafeTensors::deserialize(&golden.tensors).unwrap();
    assert_eq!(golden.cases.len(), 27, "9 images with 1, 4 and 16 crops");
    for (name, case) in &golden.cases {
        let image = golden_image(name.split_once('.').unwrap().0);
        assert_eq!(
            [image.width_px(), image.height_px()],
            case.input_size_wh,
            "{name}"
        );
        let hd = hd_image(&image, case.num_crops).unwrap();
        assert_eq!(
            [hd.height_px(), hd.width_px()],
            case.image_size_hw,
            "{name}"
        );
        let sum = |channel: usize| {
            hd.samples()
                .iter()
                .skip(channel)
                .step_by(3)
                .map(|&v| u64::from(v))
                .sum::<u64>()
        };
        assert_eq!([0, 1, 2].map(sum), case.hd_u8_sum, "{name}");
        assert_eq!(hex(&hd.sha256()), case.hd_u8_sha256, "{name}");

        let rows = hd.samples().chunks_exact(hd.width_px() as usize * 3);
        let rows = rows.skip(5).step_by(16);
        let sampled: Vec<u8> = rows
            .flat_map(|row| row.as_chunks::<3>().0.iter().skip(3).step_by(16))
            .flatten()
            .copied()
            .collect();
        let want = tensors.tensor(&format!("{name}.hd_u8_s16")).unwrap();
        assert!(sampled == want.data(), "{name}.hd_u8_s16");
    }
}

#[test]
fn crops_and_global_view_are_the_reference_s() {
    let golden = golden();
    let tensors = SafeTensors::deserialize(&golden.tensors).unwrap();
    for (name, case) in &golden.cases {
        let image = golden_image(name.split_once('.').unwrap().0);
        let plan = hd_plan(image.width_px(), image.height_px(), case.num_crops).unwrap();
        let values = render_view(&image, &plan).unwrap();
        assert_eq!(values.crop_count, case.real_crops + 1, "{name}");
        assert_eq!(values.image_tokens(), case.num_img_tokens, "{name}");
        assert_eq!(values.columns * 336, case.image_size_hw[1], "{name}");
        assert_eq!(values.rows * 336, case.image_size_hw[0], "{name}");
        assert_eq!(
            values.bytes(),
            u64::from(values.crop_count) * 3 * 336 * 336 * 4
        );

        let global = subsample(values.crop(0).unwrap(), 12, (2, 7));
        let want = floats(&tensors, &format!("{name}.global_s12"));
        assert_close(&global, &want, &format!("{name}.global_s12"));

        if case.num_crops > 1 {
            let indices = tensors.tensor(&format!("{name}.crops_idx")).unwrap();
            let indices = indices.data().as_chunks::<8>().0.iter();
            let crops: Vec<f32> = indices
                .map(|index| usize::try_from(i64::from_le_bytes(*index)).unwrap())
                .flat_map(|index| subsample(values.crop(index).unwrap(), 24, (9, 4)))
                .collect();
            let want = floats(&tensors, &format!("{name}.crops_s24"));
            assert_close(&crops, &want, &format!("{name}.crops_s24"));
        }

        for (index, (means, deviations)) in case.crop_mean.iter().zip(&case.crop_std).enumerate() {
            let planes = values.crop(index).unwrap().chunks_exact(336 * 336);
            for (plane, (mean, deviation)) in planes.zip(means.iter().zip(deviations)) {
                let have = moments(plane);
                let close = (have.0 - mean).abs() < 1e-6 && (have.1 - deviation).abs() < 1e-6;
                assert!(
                    close,
                    "{name} crop {index}: {have:?} is not {mean}, {deviation}"
                );
            }
        }
    }
}

/// Mean and population standard deviation.
fn moments(values: &[f32]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
    let squares = values.iter().map(|v| (f64::from(*v) - mean).powi(2));
    (mean, (squares.sum::<f64>() / count).sqrt())
}

#[test]
fn several_images_are_prepared_each_on_its_own() {
    let golden = golden();
    assert_eq!(golden.batches.len(), 1);
    for batch in &golden.batches {
        let num_crops = batch.pixel_values_shape[1] - 1;
        for (index, name) in batch.images.iter().enumerate() {
            let image = golden_image(name);
            let plan = hd_plan(image.width_px(), image.height_px(), num_crops).unwrap();
            assert_eq!(
                [plan.rows * 336, plan.columns * 336],
                batch.image_size_hw[index],
                "{name}"
            );
            assert_eq!(
                image_tokens(plan.columns, plan.rows),
                batch.num_img_tokens[index],
                "{name}"
            );
        }
    }
}

/// The worked examples of the specification: input, crops, padded size, tokens.
#[test]
fn plans_have_the_sizes_and_token_counts_of_the_worked_examples() {
    // Input size, then padded size and tokens for 4 and for 16 crops.
    let examples = [
        ((512, 512), [(672, 672, 757), (1344, 1344, 2509)]),
        ((336, 336), [(672, 672, 757), (1344, 1344, 2509)]),
        ((20, 20), [(672, 672, 757), (1344, 1344, 2509)]),
        ((900, 300), [(1008, 336, 601), (2016, 672, 1909)]),
        ((300, 900), [(336, 1008, 625), (672, 2016, 1957)]),
        ((1344, 336), [(1344, 336, 745), (2688, 672, 2485)]),
        ((400, 250), [(672, 672, 757), (1344, 1008, 1921)]),
        ((2000, 1500), [(672, 672, 757), (1344, 1008, 1921)]),
        ((960, 686), [(672, 672, 757), (1344, 1008, 1921)]),
        ((123, 457), [(336, 1008, 625), (672, 2352, 2257)]),
    ];
    let check = |(width, height), num_crops, want| {
        let plan = hd_plan(width, height, num_crops).unwrap();
        let tokens = image_tokens(plan.columns, plan.rows);
        let have = (plan.columns * 336, plan.rows * 336, tokens);
        assert_eq!(have, want, "{width}x{height} in {num_crops} crops");
        assert_eq!(plan.tiles.len() as u32, plan.columns * plan.rows);
    };
    for (input, [four, sixteen]) in examples {
        check(input, 4, four);
        check(input, 16, sixteen);
        check(input, 1, (336, 336, 313));
    }
}
