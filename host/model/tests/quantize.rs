//! A float checkpoint quantized: what is written is MLX's format, loads, and is nearer to its source than MLX's own.
#![expect(clippy::unwrap_used, reason = "helpers of tests panic like tests")]

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use visor_model::quantize::compare;
use visor_model::{
    Checkpoint, FloatType, ModelError, Precision, QuantizeOptions, QuantizeReport, quantize,
};

const EVERYTHING: QuantizeOptions = QuantizeOptions {
    vision: Precision::Int4,
    embeddings: Precision::Int4,
    float_type: FloatType::F16,
};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/golden")
        .join(name)
}

fn quantized(source: &Path, target: &Path, options: &QuantizeOptions) -> QuantizeReport {
    quantize(source, target, options, &mut |_| true).unwrap()
}

fn weights(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("model.safetensors")).unwrap()
}

/// The golden INT4 checkpoint was made by MLX from a float one: the same tensors, types and shapes come out here.
#[test]
fn the_layout_is_that_of_mlx() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("int4");
    quantized(&golden("ckpt_mha"), &target, &EVERYTHING);
    let (ours, theirs) = (weights(&target), weights(&golden("ckpt_mha_int4")));
    let (ours, theirs) = (
        SafeTensors::deserialize(&ours).unwrap(),
        SafeTensors::deserialize(&theirs).unwrap(),
    );
    for (name, tensor) in ours.iter() {
        let other = theirs
            .tensor(name)
            .unwrap_or_else(|_| panic!("MLX has no {name}"));
        // MLX's converter of 2024 also quantizes the position table, current ones nothing of the tower.
        if !name.contains("position_embedding") {
            assert_eq!(tensor.shape(), other.shape(), "{name}");
            let words = other.dtype() == Dtype::U32;
            assert_eq!(tensor.dtype() == Dtype::U32, words, "{name}");
        }
    }
    for name in theirs.names() {
        assert!(
            ours.tensor(name).is_ok() || name.contains("position_embedding"),
            "{name} is missing here"
        );
    }
    let config: Value =
        serde_json::from_slice(&std::fs::read(target.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization"]["group_size"], 64);
    assert_eq!(config["quantization"]["bits"], 4);
    assert_eq!(
        Checkpoint::open(&target).unwrap().facts().quantization,
        "int4 group 64"
    );
}

#[test]
fn every_module_is_nearer_to_its_source_than_by_its_ends() {
    let folder = tempfile::tempdir().unwrap();
    for (name, float_type) in [("f16", FloatType::F16), ("bf16", FloatType::Bf16)] {
        let options = QuantizeOptions {
            float_type,
            ..EVERYTHING
        };
        let report = quantized(&golden("ckpt_mha"), &folder.path().join(name), &options);
        assert!(report.modules.len() > 20, "{}", report.modules.len());
        for module in &report.modules {
            let (ours, by_ends) = (module.relative, module.relative_by_ends);
            assert!(
                ours < by_ends && by_ends < 0.2,
                "{}: {ours} of {by_ends}",
                module.module
            );
        }
    }
}

#[test]
fn what_is_to_stay_float_stays_float() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("text-only");
    let options = QuantizeOptions {
        vision: Precision::Float,
        embeddings: Precision::Float,
        float_type: FloatType::Bf16,
    };
    let report = quantized(&golden("ckpt_mha"), &target, &options);
    assert!(
        report
            .modules
            .iter()
            .all(|module| module.module.starts_with("model.layers."))
    );
    let bytes = weights(&target);
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for name in [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.vision_embed_tokens.img_projection.0.weight",
    ] {
        assert_eq!(tensors.tensor(name).unwrap().dtype(), Dtype::BF16, "{name}");
    }
    assert_eq!(
        tensors
            .tensor("model.layers.0.mlp.down_proj.weight")
            .unwrap()
            .dtype(),
        Dtype::U32
    );
    assert_eq!(report.bytes, bytes.len() as u64);
}

#[test]
fn a_run_that_is_stopped_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("int4");
    let mut steps = 0;
    let stopped = quantize(&golden("ckpt_mha"), &target, &EVERYTHING, &mut |_| {
        steps += 1;
        steps < 5
    });
    assert!(matches!(stopped, Err(ModelError::Cancelled)), "{stopped:?}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// What a killed process leaves does not load, and the next run replaces it; what is someone else's stays.
#[test]
fn a_leftover_is_replaced_and_a_stranger_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let (target, partial) = (
        folder.path().join("int4"),
        folder.path().join("int4.partial"),
    );
    std::fs::create_dir(&partial).unwrap();
    std::fs::write(partial.join("thesis.txt"), "mine").unwrap();
    let refused = |target: &Path| {
        quantize(&golden("ckpt_mha"), target, &EVERYTHING, &mut |_| true)
            .unwrap_err()
            .to_string()
    };
    assert!(
        refused(&target).contains("in the way"),
        "{}",
        refused(&target)
    );
    std::fs::write(partial.join(".visor-partial"), "").unwrap();
    quantized(&golden("ckpt_mha"), &target, &EVERYTHING);
    assert!(target.join("model.safetensors").is_file() && !partial.exists());
    assert!(
        refused(&target).contains("it exists"),
        "{}",
        refused(&target)
    );
    let again = quantize(
        &target,
        &folder.path().join("twice"),
        &EVERYTHING,
        &mut |_| true,
    )
    .unwrap_err()
    .to_string();
    assert!(again.contains("quantized already"), "{again}");
}

#[test]
fn a_weight_that_is_no_number_is_told_with_its_row() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("broken");
    std::fs::create_dir(&source).unwrap();
    std::fs::copy(
        golden("ckpt_mha").join("config.json"),
        source.join("config.json"),
    )
    .unwrap();
    let mut bytes = weights(&golden("ckpt_mha"));
    let (end, rows) = {
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = tensors.tensor("lm_head.weight").unwrap();
        let start = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize;
        (start + tensor.data().len(), tensor.shape()[0])
    };
    bytes[end - 2..end].copy_from_slice(&[0xC0, 0x7F]); // the upper half of a NaN, f32 or bf16
    std::fs::write(source.join("model.safetensors"), bytes).unwrap();
    let target = folder.path().join("int4");
    let error = quantize(&source, &target, &EVERYTHING, &mut |_| true)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("lm_head.weight") && error.contains(&format!("row {} ", rows - 1)),
        "{error}"
    );
    assert!(
        error.ends_with("not finite"),
        "no advice that does not help: {error}"
    );
    assert!(!target.exists() && !folder.path().join("int4.partial").exists());
}

#[test]
fn both_checkpoints_are_run_and_compared_layer_by_layer() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (golden("ckpt_mha"), folder.path().join("int4"));
    quantized(&source, &target, &EVERYTHING);
    let mut done = Vec::new();
    let compared = compare(&source, &target, &mut |progress| {
        done.push(progress.bytes_done);
        true
    })
    .unwrap();
    assert!(done.is_sorted() && done.len() > 4, "{done:?}");
    let stage = |name: &str| {
        let stages = &compared.stages;
        let found = stages.iter().find(|stage| stage.stage == name);
        found.unwrap_or_else(|| panic!("{stages:?}")).relative
    };
    for name in [
        "vision layer 0",
        "image features",
        "layer 0",
        "layer 1",
        "logits",
    ] {
        assert!(
            (0.001..0.5).contains(&stage(name)),
            "{name} {}",
            stage(name)
        );
    }
    assert!(compared.tokens > 48 && compared.same_tokens <= compared.tokens);
    // What is compared with itself is the same.
    let same = compare(&source, &source, &mut |_| true).unwrap();
    assert!(same.stages.iter().all(|stage| stage.relative == 0.0));
    assert_eq!(same.same_tokens, same.tokens);
    let stopped = compare(&source, &target, &mut |_| false);
    assert!(matches!(stopped, Err(ModelError::Cancelled)));
}

/// The tower in eight bits, as it is by default, codes up to 127: the config says so module by module, as MLX's mixed conversions do.
#[test]
fn the_vision_tower_has_eight_bits() {
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (golden("ckpt_mha"), folder.path().join("mixed"));
    let report = quantized(&source, &target, &QuantizeOptions::default());
    let config = std::fs::read(target.join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let bytes = weights(&target);
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut eight = 0;
    for module in &report.modules {
        let name = &module.module;
        let form = &config["quantization"][name];
        if !name.starts_with("model.vision_embed_tokens.") {
            assert!(module.bits == 4 && form.is_null(), "{name}");
            continue;
        }
        eight += 1;
        let want = serde_json::json!({ "group_size": 64, "bits": 8, "mode": "affine" });
        assert_eq!((module.bits, form), (7, &want), "{name}");
        let tensor = tensors.tensor(&format!("{name}.weight")).unwrap();
        assert_eq!(tensor.shape(), [module.rows, module.columns / 4], "{name}");
        let (ours, by_ends) = (module.relative, module.relative_by_ends);
        assert!(ours < by_ends && ours < 0.012, "{name} {ours} {by_ends}");
        assert!(tensor.data().iter().all(|code| *code < 128), "{name}");
    }
    assert!(eight > 10, "{eight}");
    let opened = Checkpoint::open(&target).unwrap();
    assert_eq!(opened.facts().quantization, "int4 group 64");
    let compared = compare(&source, &target, &mut |_| true).unwrap();
    let mut stages = compared.stages.iter();
    let features = stages.find(|stage| stage.stage == "image features");
    let features = features.unwrap().relative;
    assert!((1e-4..0.04).contains(&features), "{features}");
}

/// Embeddings and `lm_head` in eight bits are nearer than in four.
#[test]
fn embeddings_may_have_eight_bits() {
    let folder = tempfile::tempdir().unwrap();
    let source = golden("ckpt_mha");
    let logits = |name: &str, embeddings| {
        let target = folder.path().join(name);
        let options = QuantizeOptions {
            embeddings,
            ..QuantizeOptions::default()
        };
        let report = quantized(&source, &target, &options);
        let head = report.modules.iter().find(|one| one.module == "lm_head");
        let compared = compare(&source, &target, &mut |_| true).unwrap();
        let last = compared.stages.last().unwrap();
        assert_eq!(last.stage, "logits");
        (head.unwrap().bits, last.relative)
    };
    let (four, eight) = (
        logits("four", Precision::Int4),
        logits("eight", Precision::Int8),
    );
    assert_eq!((four.0, eight.0), (4, 8));
    assert!(eight.1 < four.1, "{eight:?} {four:?}");
}
