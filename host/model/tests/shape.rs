//! Checkpoints of random weights: they open, are quantized as a converter of 2024 does, and compute something finite.
#![expect(clippy::unwrap_used, reason = "helpers of tests panic like tests")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::{Dtype, SafeTensors};
use visor_model::image::PixelValues;
use visor_model::shape::write_random;
use visor_model::{Activations, Checkpoint, DeviceKind, ModelError, Phi3V, Precision, Prompt};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/ckpt_mha_int4")
}

/// The shape of the goldens, a few megabytes, into `name` of a folder.
fn written(folder: &Path, name: &str) -> PathBuf {
    let config = std::fs::read(golden().join("config.json")).unwrap();
    let target = folder.join(name);
    let config = ("config.json", &config[..]);
    write_random(config, Precision::Int4, &target, &mut |_| true).unwrap();
    target
}

/// MLX made the golden checkpoint in 2024's style: every tensor that is read has the same name, type and shape here.
#[test]
fn the_tensors_are_those_of_a_converter() {
    let folder = tempfile::tempdir().unwrap();
    let ours = std::fs::read(written(folder.path(), "a").join("model.safetensors")).unwrap();
    let theirs = std::fs::read(golden().join("model.safetensors")).unwrap();
    let ours = SafeTensors::deserialize(&ours).unwrap();
    let theirs = SafeTensors::deserialize(&theirs).unwrap();
    for (name, tensor) in theirs.iter() {
        let unread = name.contains("encoder.layers.2.") || name.contains("post_layernorm");
        match ours.tensor(name) {
            Ok(own) => {
                assert_eq!(own.shape(), tensor.shape(), "{name}");
                let words = (own.dtype() == Dtype::U32, tensor.dtype() == Dtype::U32);
                assert_eq!(words.0, words.1, "{name}");
                assert!(!unread, "{name}");
            }
            Err(_) => assert!(unread, "{name} is missing"),
        }
    }
    assert!(ours.iter().all(|(name, _)| theirs.tensor(name).is_ok()));
}

#[test]
fn the_same_config_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"]
        .map(|name| std::fs::read(written(folder.path(), name).join("model.safetensors")).unwrap());
    assert!(a == b);
}

#[test]
fn logits_are_finite_and_differ() {
    let folder = tempfile::tempdir().unwrap();
    for vision in [Precision::Int4, Precision::Int8] {
        let target = folder.path().join(format!("{vision:?}"));
        let config = std::fs::read(golden().join("config.json")).unwrap();
        write_random(("config.json", &config), vision, &target, &mut |_| true).unwrap();
        check_tower(&target, vision);
        check_logits(&target);
    }
}

/// INT8 has a byte a weight, none above 127, as `visor quantize` writes it.
fn check_tower(folder: &Path, vision: Precision) {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tower = |name: &str| name.ends_with("fc1.weight");
    let mut fc1 = tensors.iter().filter(|(name, _)| tower(name)).peekable();
    assert!(fc1.peek().is_some());
    for (name, tensor) in fc1 {
        let scales = name.replace(".weight", ".scales");
        let groups = tensors.tensor(&scales).unwrap().shape()[1];
        let is_int8 = vision == Precision::Int8;
        let words = groups * 64 / if is_int8 { 4 } else { 8 };
        assert_eq!(tensor.shape()[1], words, "{name}");
        let seven = tensor.data().iter().all(|code| *code < 128);
        assert_eq!(seven, is_int8, "{name}");
    }
}

fn check_logits(folder: &Path) {
    let checkpoint = Checkpoint::open(folder).unwrap();
    assert_eq!(checkpoint.facts().quantization, "int4 group 64");
    assert!(checkpoint.tokenizer().is_ok());
    let pixels = PixelValues {
        crops: (0..2 * 3 * 336 * 336)
            .map(|index| (index % 255) as f32 / 64.0 - 2.0)
            .collect(),
        crop_count: 2,
        columns: 1,
        rows: 1,
        key: [0; 32],
    };
    for activations in [Activations::Int8, Activations::Float] {
        let model = Phi3V::load_with(&checkpoint, DeviceKind::Cpu, activations, &|_| ()).unwrap();
        let features = Arc::new(model.encode_image(&pixels, &|| true).unwrap());
        let mut ids = vec![1, 32010];
        ids.extend([-1; 313]);
        ids.extend([1, 450, 32001]);
        let prompt = Prompt {
            ids,
            image_tokens: 313,
        };
        let mut state = model.begin(&prompt, &[features]).unwrap();
        let logits = model.advance(&mut state, usize::MAX).unwrap().unwrap();
        let power = logits.iter().map(|logit| logit * logit).sum::<f32>() / logits.len() as f32;
        // Weights keep the variance, so a model of any depth has logits around one.
        assert!((0.3..3.0).contains(&power.sqrt()), "{activations}: {power}");
    }
}

#[test]
fn a_cancelled_run_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let config = std::fs::read(golden().join("config.json")).unwrap();
    let target = folder.path().join("a");
    let mut asked = 0;
    let config = ("config.json", &config[..]);
    let stopped = write_random(config, Precision::Int8, &target, &mut |progress| {
        asked += 1;
        assert!(progress.bytes_done <= progress.bytes_total);
        asked < 5
    });
    assert!(matches!(stopped, Err(ModelError::Cancelled)));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
