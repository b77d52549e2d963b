//! One case: the reference's prompt through every stage of the model.

use std::sync::Arc;

use serde::Deserialize;

use super::compare::{Finding, Reporter, largest_difference};
use super::folder::{Loaded, Models, floats, integers, pixel_values};
use super::greedy;
use crate::error::ModelError;
use crate::image::PixelValues;
use crate::model::ImageFeatures;
use crate::sequence::SequenceState;
use crate::tokenizer::{Prompt, Tokenizer};
use crate::weights::Weights;

/// `cases/<checkpoint>.<case>.json`; keys that are not listed are for readers.
#[derive(Deserialize)]
#[serde(default)]
pub(super) struct CaseFile {
    checkpoint: Option<String>,
    config: String,
    prompt: Option<String>,
    images: Vec<String>,
    num_crops: Option<u32>,
    num_img_tokens: Option<Vec<u32>>,
    image_sizes: Option<Vec<[u32; 2]>>,
    pub(super) generated: Vec<u32>,
    pub(super) generated_no_cache_rebuild: Option<Vec<u32>>,
}

impl Default for CaseFile {
    fn default() -> Self {
        Self {
            checkpoint: None,
            config: "config.json".to_owned(),
            prompt: None,
            images: Vec::new(),
            num_crops: None,
            num_img_tokens: None,
            image_sizes: None,
            generated: Vec::new(),
            generated_no_cache_rebuild: None,
        }
    }
}

/// A case with everything its stages need.
pub(super) struct Case<'a> {
    pub(super) name: &'a str,
    pub(super) file: CaseFile,
    pub(super) tensors: Weights,
    pub(super) loaded: &'a Loaded,
    pub(super) prompt: Prompt,
    pub(super) features: Vec<Arc<ImageFeatures>>,
}

/// Compares one case, stage by stage.
pub(super) fn compare_case(
    name: &str,
    tokenizer: &Tokenizer,
    models: &mut Models<'_>,
    reporter: &mut Reporter<'_>,
) {
    let folder = models.folder;
    let (file, tensors) = match read_case(name, folder, reporter) {
        Some(read) => read,
        None => return,
    };
    let checkpoint = file
        .checkpoint
        .clone()
        .unwrap_or_else(|| format!("ckpt_{}", name.split('.').next().unwrap_or(name)));
    let loaded = match models.load(&checkpoint, &file.config) {
        Ok(Ok(loaded)) => loaded,
        Ok(Err(reason)) => return reporter.stage(name, "load", Finding::Skipped(reason)),
        Err(error) => return reporter.stage(name, "load", error),
    };
    let images = match read_images(name, folder, &file, loaded.checkpoint.num_crops(), reporter) {
        Some(images) => images,
        None => return,
    };
    let Some(prompt) = compare_tokens(
        name,
        &file,
        &tensors,
        (tokenizer, loaded, &images),
        reporter,
    ) else {
        return;
    };
    let mut case = Case {
        name,
        file,
        tensors,
        loaded,
        prompt,
        features: Vec::new(),
    };
    if let Err(error) = compare_features(&mut case, &images, reporter) {
        return reporter.stage(name, "features", error);
    }
    match compare_prefill(&case, reporter) {
        Ok((state, last)) => greedy::compare_greedy(&case, state, last, reporter),
        Err(error) => reporter.stage(name, "prefill", error),
    }
}

/// What the golden says of a case; nothing when that cannot be read. Without tensors its lists of tokens are compared.
fn read_case(
    name: &str,
    folder: &super::folder::Folder,
    reporter: &mut Reporter<'_>,
) -> Option<(CaseFile, Weights)> {
    let read = folder.read(&format!("cases/{name}.json"));
    let file = match read.map(|json| json.map(|json| serde_json::from_slice(&json))) {
        Ok(Some(Ok(file))) => file,
        Ok(Some(Err(error))) => {
            let broken = Finding::Miss(format!("{name}.json: {error}"));
            reporter.stage(name, "case", broken);
            return None;
        }
        Ok(None) => {
            let absent = Finding::Skipped(format!("there is no {name}.json"));
            reporter.stage(name, "case", absent);
            return None;
        }
        Err(error) => {
            reporter.stage(name, "case", error);
            return None;
        }
    };
    let tensors = match folder.tensors(&format!("cases/{name}.safetensors")) {
        Ok(Some(tensors)) => tensors,
        Ok(None) => {
            let reason =
                format!("there is no {name}.safetensors; only the JSON's token lists are compared");
            reporter.stage(name, "tensors", Finding::Skipped(reason));
            Weights::default()
        }
        Err(error) => {
            reporter.stage(name, "tensors", error);
            return None;
        }
    };
    Some((file, tensors))
}

/// Decodes and cuts the images; nothing when the case cannot go on.
fn read_images(
    name: &str,
    folder: &super::folder::Folder,
    file: &CaseFile,
    num_crops: u32,
    reporter: &mut Reporter<'_>,
) -> Option<Vec<PixelValues>> {
    let mut images = Vec::new();
    for image in &file.images {
        let source = match folder.image(image) {
            Ok(Some(source)) => source,
            Ok(None) => {
                reporter.stage(
                    name,
                    "images",
                    Finding::Skipped(format!("there is no images/{image}.*")),
                );
                return None;
            }
            Err(message) => {
                reporter.stage(name, "images", Finding::Miss(message));
                return None;
            }
        };
        match pixel_values(&source, file.num_crops.unwrap_or(num_crops)) {
            Ok(pixels) => images.push(pixels),
            Err(message) => {
                reporter.stage(name, "images", Finding::Miss(format!("{image}: {message}")));
                return None;
            }
        }
    }
    if let Some(want) = &file.image_sizes {
        let side = crate::image::CROP_SIDE_PX;
        let have: Vec<[u32; 2]> = images
            .iter()
            .map(|image| [image.rows * side, image.columns * side])
            .collect();
        reporter.stage(name, "image_sizes", Finding::lists(&have, want));
    }
    if let Some(want) = &file.num_img_tokens {
        let have: Vec<u32> = images.iter().map(PixelValues::image_tokens).collect();
        reporter.stage(name, "num_img_tokens", Finding::lists(&have, want));
    }
    Some(images)
}

/// Compares the prompt's ids and gives the prompt to run: the reference's, so that one miss stays one miss.
fn compare_tokens(
    name: &str,
    file: &CaseFile,
    tensors: &Weights,
    (default, loaded, images): (&Tokenizer, &Loaded, &[PixelValues]),
    reporter: &mut Reporter<'_>,
) -> Option<Prompt> {
    let want = match integers(tensors, "input_ids") {
        Ok(ids) => ids.map(|(_, ids)| ids),
        Err(message) => {
            reporter.stage(name, "tokens", Finding::Miss(message));
            return None;
        }
    };
    let have = encode(file, (default, loaded, images));
    let ids = match (have, want) {
        (Ok(have), Some(want)) => {
            reporter.stage(name, "tokens", Finding::lists(&have.ids, &want));
            want
        }
        (Err(finding), Some(want)) => {
            reporter.stage(name, "tokens", finding);
            want
        }
        (Ok(have), None) => have.ids,
        (Err(finding), None) => {
            reporter.stage(name, "tokens", finding);
            return None;
        }
    };
    let image_tokens = u32::try_from(ids.iter().filter(|id| **id < 0).count()).unwrap_or(u32::MAX);
    Some(Prompt { ids, image_tokens })
}

/// The prompt's ids by the tokenizer of the case's checkpoint, else the default one.
fn encode(
    file: &CaseFile,
    (default, loaded, images): (&Tokenizer, &Loaded, &[PixelValues]),
) -> Result<Prompt, Finding> {
    let Some(text) = &file.prompt else {
        return Err(Finding::Skipped(
            "the case has token ids and no text".into(),
        ));
    };
    let own = loaded
        .checkpoint
        .own_tokenizer()
        .map(|path| Tokenizer::from_file(&path))
        .transpose()?;
    let tokenizer = own.as_ref().unwrap_or(default);
    let vocab_size = loaded.checkpoint.config().vocab_size;
    if tokenizer.vocab_size() as usize > vocab_size {
        let reason = format!(
            "the tokenizer has {} ids, the model {vocab_size}",
            tokenizer.vocab_size()
        );
        return Err(Finding::Skipped(reason));
    }
    let image_tokens: Vec<u32> = images.iter().map(PixelValues::image_tokens).collect();
    Ok(tokenizer.assemble_rendered(text, &image_tokens)?)
}

/// Tower and projected features. A column sum over N rows is divided by the square root of N, so that it is measured
/// in the unit of a single row's error.
fn compare_features(
    case: &mut Case<'_>,
    images: &[PixelValues],
    reporter: &mut Reporter<'_>,
) -> Result<(), ModelError> {
    let (model, tolerance) = (&case.loaded.model, case.loaded.tolerance());
    let mut towers = Vec::new();
    for image in images {
        let patches = model.tower_features(image, &|| true)?;
        case.features
            .push(Arc::new(model.project(&patches, image)?));
        towers.push(patches);
    }
    match floats(&case.tensors, "vit_features_p96") {
        Ok(None) => {}
        Ok(Some((shape, want))) => reporter.stage(
            case.name,
            "tower",
            compare_tower(&towers, &shape, &want, tolerance),
        ),
        Err(message) => reporter.stage(case.name, "tower", Finding::Miss(message)),
    }
    let mut rows = Vec::new();
    for features in &case.features {
        rows.extend(features.to_rows()?);
    }
    if let Some(finding) = compare_rows(case, &rows, tolerance) {
        reporter.stage(case.name, "features", finding);
    }
    match floats(&case.tensors, "image_features_colsum") {
        Ok(Some((_, want))) => {
            let scale = 1.0 / (rows.len().max(1) as f64).sqrt();
            let sum = |column| {
                rows.iter()
                    .map(|row: &Vec<f32>| f64::from(row[column]))
                    .sum::<f64>()
            };
            let have: Vec<f32> = (0..model.config().hidden_size)
                .map(|column| (sum(column) * scale) as f32)
                .collect();
            let want: Vec<f32> = want
                .iter()
                .map(|sum| (f64::from(*sum) * scale) as f32)
                .collect();
            let note = format!("sums over {} rows divided by the root of that", rows.len());
            reporter.stage(
                case.name,
                "features_colsum",
                Finding::floats(&have, &want, tolerance).with_note(&note),
            );
        }
        Ok(None) => {}
        Err(message) => reporter.stage(case.name, "features_colsum", Finding::Miss(message)),
    }
    Ok(())
}

/// `image_features`: the rows that `image_features_rows` lists, all when it lists none.
fn compare_rows(case: &Case<'_>, rows: &[Vec<f32>], tolerance: f64) -> Option<Finding> {
    let want = match floats(&case.tensors, "image_features") {
        Ok(want) => want?.1,
        Err(message) => return Some(Finding::Miss(message)),
    };
    let listed = match integers(&case.tensors, "image_features_rows") {
        Ok(Some((_, listed))) => listed,
        Ok(None) => (0..rows.len() as i64).collect(),
        Err(message) => return Some(Finding::Miss(message)),
    };
    let row = |index: &i64| {
        usize::try_from(*index)
            .ok()
            .and_then(|index| rows.get(index))
    };
    let picked: Option<Vec<&Vec<f32>>> = listed.iter().map(row).collect();
    Some(match picked {
        None => Finding::Miss(format!("the golden has rows beyond our {}", rows.len())),
        Some(picked) => {
            let have: Vec<f32> = picked.into_iter().flatten().copied().collect();
            Finding::floats(&have, &want, tolerance).with_note(&format!(
                "{} of {} rows",
                listed.len(),
                rows.len()
            ))
        }
    })
}

/// `vit_features_p96` [images, crops, 6, width]: every 96th patch of the first crops. Crops that only pad the
/// reference's batch are not computed here and not compared.
fn compare_tower(
    towers: &[candle_core::Tensor],
    shape: &[usize],
    want: &[f32],
    tolerance: f64,
) -> Finding {
    let &[images, crops, patches, width] = shape else {
        return Finding::Miss(format!(
            "vit_features_p96 has shape {shape:?}, want [images, crops, 6, width]"
        ));
    };
    if images != towers.len() || want.is_empty() {
        return Finding::Miss(format!(
            "vit_features_p96 is of {images} images, the case has {}",
            towers.len()
        ));
    }
    let (mut largest, mut compared) = (0.0f64, 0);
    for (tower, want) in towers
        .iter()
        .zip(want.chunks_exact(crops * patches * width))
    {
        let have = tower
            .to_dtype(candle_core::DType::F32)
            .and_then(|tower| tower.to_vec3::<f32>());
        let have = match have {
            Ok(have) => have,
            Err(error) => return ModelError::from(error).into(),
        };
        for (crop, want) in have.iter().zip(want.chunks_exact(patches * width)) {
            let picked: Vec<f32> = crop.iter().step_by(96).flatten().copied().collect();
            match largest_difference(&picked, want) {
                Ok(difference) => largest = largest.max(difference),
                Err(message) => return Finding::Miss(message),
            }
            compared += 1;
        }
    }
    Finding::Floats {
        difference: largest,
        tolerance,
        note: format!("{compared} crops"),
    }
}

/// Runs the prompt and compares its logits; gives the sequence and its last position's logits.
fn compare_prefill(
    case: &Case<'_>,
    reporter: &mut Reporter<'_>,
) -> Result<(SequenceState, Vec<f32>), ModelError> {
    let model = &case.loaded.model;
    let mut state = model.begin(&case.prompt, &case.features)?;
    let hidden = model.run(&mut state, usize::MAX)?;
    let last = model.finish_one(&mut state, &hidden)?;
    for (tensor, stride) in [("logits_last", 1), ("logits_last_s7", 7)] {
        let finding = match floats(&case.tensors, tensor) {
            Ok(None) => continue,
            Ok(Some((_, want))) => {
                let have: Vec<f32> = last.iter().step_by(stride).copied().collect();
                Finding::floats(&have, &want, case.loaded.tolerance())
            }
            Err(message) => Finding::Miss(message),
        };
        reporter.stage(case.name, tensor, finding);
    }
    let positions = u32::try_from(case.prompt.ids.len()).unwrap_or(u32::MAX);
    if let Ok(Some((_, want))) = floats(&case.tensors, "logits_full") {
        let have = model
            .logits_of(&hidden, &(0..positions).collect::<Vec<u32>>())?
            .concat();
        reporter.stage(
            case.name,
            "logits_full",
            Finding::floats(&have, &want, case.loaded.tolerance()),
        );
    }
    if let Some(finding) = compare_columns(case, &hidden) {
        reporter.stage(case.name, "logits_cols", finding);
    }
    Ok((state, last))
}

/// `logits_cols`: positions `logits_cols_pos` by ids `logits_cols_ids`.
fn compare_columns(case: &Case<'_>, hidden: &candle_core::Tensor) -> Option<Finding> {
    let list = |name| integers(&case.tensors, name)?.ok_or_else(|| format!("there is no {name}"));
    let want = match floats(&case.tensors, "logits_cols") {
        Ok(want) => want?.1,
        Err(message) => return Some(Finding::Miss(message)),
    };
    let (positions, ids) = match (list("logits_cols_pos"), list("logits_cols_ids")) {
        (Ok(positions), Ok(ids)) => (positions.1, ids.1),
        (Err(message), _) | (_, Err(message)) => return Some(Finding::Miss(message)),
    };
    let inside = |list: &[i64], end: usize| -> Option<Vec<u32>> {
        list.iter()
            .map(|&at| u32::try_from(at).ok().filter(|at| (*at as usize) < end))
            .collect()
    };
    let config = case.loaded.model.config();
    let (Some(positions), Some(ids)) = (
        inside(&positions, case.prompt.ids.len()),
        inside(&ids, config.vocab_size),
    ) else {
        return Some(Finding::Miss(
            "logits_cols_pos or logits_cols_ids point outside the prompt or vocabulary".into(),
        ));
    };
    let mut have = Vec::with_capacity(want.len());
    for some in positions.chunks(32) {
        match case.loaded.model.logits_of(hidden, some) {
            Ok(rows) => rows
                .iter()
                .for_each(|row| have.extend(ids.iter().map(|id| row[*id as usize]))),
            Err(error) => return Some(error.into()),
        }
    }
    Some(Finding::floats(&have, &want, case.loaded.tolerance()))
}
