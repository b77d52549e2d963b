//! Checkpoints in every layout that converters make give the same answers, and broken ones say what is wrong.
#![expect(clippy::unwrap_used, reason = "helpers of tests panic like tests")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use visor_kernels::{AffineRows, ScaleType};
use visor_model::image::{ImageLimits, decode, hd_plan, render_view};
use visor_model::{Checkpoint, DeviceKind, ModelError, Phi3V, Prompt};

const VISION: &str = "model.vision_embed_tokens.";
const PATCHES: &str =
    "model.vision_embed_tokens.img_processor.vision_model.embeddings.patch_embedding.weight";

/// Tensors of a file by name: type, shape, bytes.
type Tensors = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/golden")
        .join(name)
}

fn read_tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let entries: BTreeMap<String, Value> = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let tensor = |entry: &Value| {
        let list =
            |key: &str| -> Vec<usize> { serde_json::from_value(entry[key].clone()).unwrap() };
        let (shape, offsets) = (list("shape"), list("data_offsets"));
        let data = bytes[8 + header + offsets[0]..8 + header + offsets[1]].to_vec();
        (entry["dtype"].as_str().unwrap().to_owned(), shape, data)
    };
    entries
        .iter()
        .filter(|(name, _)| *name != "__metadata__")
        .map(|(name, entry)| (name.clone(), tensor(entry)))
        .collect()
}

fn write_tensors(path: &Path, tensors: &Tensors) {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({ "format": "mlx" }));
    let mut data = Vec::new();
    for (name, (dtype, shape, bytes)) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(
            name.clone(),
            json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets }),
        );
        data.extend_from_slice(bytes);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    std::fs::write(path, file).unwrap();
}

/// A checkpoint folder made from one of the golden ones.
struct Folder {
    dir: tempfile::TempDir,
    tensors: Tensors,
    config: Value,
}

impl Folder {
    fn of(checkpoint: &str) -> Self {
        let from = golden(checkpoint);
        let config =
            serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
        Self {
            dir: tempfile::tempdir().unwrap(),
            tensors: read_tensors(&from.join("model.safetensors")),
            config,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write_config(&self) {
        std::fs::write(self.path("config.json"), self.config.to_string()).unwrap();
    }

    /// Writes everything into one file.
    fn write(&self) {
        self.write_config();
        write_tensors(&self.path("model.safetensors"), &self.tensors);
    }

    /// Writes two shards and their index.
    fn write_shards(&self) {
        self.write_config();
        let mut shards = [Tensors::new(), Tensors::new()];
        let mut map = serde_json::Map::new();
        for (index, (name, tensor)) in self.tensors.iter().enumerate() {
            shards[index % 2].insert(name.clone(), tensor.clone());
            map.insert(
                name.clone(),
                json!(format!("model-0000{}-of-00002.safetensors", index % 2 + 1)),
            );
        }
        for (index, shard) in shards.iter().enumerate() {
            write_tensors(
                &self.path(&format!("model-0000{}-of-00002.safetensors", index + 1)),
                shard,
            );
        }
        let index = json!({ "metadata": { "total_size": 1 }, "weight_map": map });
        std::fs::write(self.path("model.safetensors.index.json"), index.to_string()).unwrap();
    }

    fn open(&self) -> Result<Checkpoint, ModelError> {
        Checkpoint::open(self.dir.path())
    }

    fn refused(&self) -> String {
        self.open()
            .err()
            .expect("this checkpoint is broken")
            .to_string()
    }

    fn rename(&mut self, from: &str, to: &str) {
        let tensor = self.tensors.remove(from).unwrap();
        self.tensors.insert(to.to_owned(), tensor);
    }
}

/// Image features of one crop, and the logits behind them: everything a checkpoint decides.
fn answers(checkpoint: &Checkpoint) -> (Vec<Vec<f32>>, Vec<f32>) {
    let model = Phi3V::load(checkpoint, DeviceKind::Cpu, &|_| ()).unwrap();
    let bytes = std::fs::read(golden("images/tiny_20x20.png")).unwrap();
    let image = decode(&bytes, &ImageLimits::default(), false).unwrap();
    let pixels = render_view(&image, &hd_plan(20, 20, 1).unwrap()).unwrap();
    let features = Arc::new(model.encode_image(&pixels, &|| true).unwrap());
    let mut ids = vec![1, 5, 9];
    ids.extend([-1; 313]);
    ids.extend([7, 11]);
    let mut state = model
        .begin(
            &Prompt {
                ids,
                image_tokens: 313,
            },
            std::slice::from_ref(&features),
        )
        .unwrap();
    let logits = model.advance(&mut state, usize::MAX).unwrap().unwrap();
    (features.to_rows().unwrap(), logits)
}

fn answers_of_golden(checkpoint: &str) -> (Vec<Vec<f32>>, Vec<f32>) {
    answers(&Checkpoint::open(&golden(checkpoint)).unwrap())
}

fn widen(bytes: &[u8]) -> Vec<u8> {
    let mut values = vec![0.0; bytes.len() / 2];
    visor_kernels::widen::widen_bf16(bytes, &mut values);
    values
        .iter()
        .flat_map(|value: &f32| value.to_le_bytes())
        .collect()
}

#[test]
fn shards_with_an_index_are_the_same_model() {
    let folder = Folder::of("ckpt_gqa_v512");
    folder.write_shards();
    assert_eq!(
        answers(&folder.open().unwrap()),
        answers_of_golden("ckpt_gqa_v512")
    );
    std::fs::remove_file(folder.path("model.safetensors.index.json")).unwrap();
    assert!(
        folder.open().is_ok(),
        "shards without an index are found by their ending"
    );
}

#[test]
fn the_alias_of_the_embedding_will_do_and_unused_tensors_are_ignored() {
    let mut folder = Folder::of("ckpt_gqa_v512");
    folder.rename("model.embed_tokens.weight", &format!("{VISION}wte.weight"));
    folder
        .tensors
        .retain(|name, _| !name.contains("encoder.layers.2.") && !name.contains("post_layernorm"));
    let ids = ("I64".to_owned(), vec![1, 2], vec![0; 16]);
    folder.tensors.insert(
        format!("{VISION}img_processor.vision_model.embeddings.position_ids"),
        ids,
    );
    folder.tensors.insert(
        "model.layers.0.self_attn.rotary_emb.inv_freq".into(),
        ("BOOL".into(), vec![3], vec![0; 3]),
    );
    folder.write();
    assert_eq!(
        answers(&folder.open().unwrap()),
        answers_of_golden("ckpt_gqa_v512")
    );
}

#[test]
fn f32_weights_and_mlx_convolutions_are_the_same_model() {
    let mut folder = Folder::of("ckpt_gqa_v512");
    for (dtype, _, bytes) in folder.tensors.values_mut() {
        assert_eq!(dtype, "BF16");
        *dtype = "F32".into();
        *bytes = widen(bytes);
    }
    let (_, shape, bytes) = folder.tensors.get_mut(PATCHES).unwrap();
    let mut channels_last = Vec::new();
    for out in 0..shape[0] {
        for pixel in 0..14 * 14 {
            for channel in 0..3 {
                let at = 4 * ((out * 3 + channel) * 14 * 14 + pixel);
                channels_last.extend_from_slice(&bytes[at..at + 4]);
            }
        }
    }
    (*bytes, *shape) = (channels_last, vec![shape[0], 14, 14, 3]);
    folder.write();
    let checkpoint = folder.open().unwrap();
    assert_eq!(checkpoint.facts().quantization, "f32");
    let ((features, logits), (want_features, want_logits)) =
        (answers(&checkpoint), answers_of_golden("ckpt_gqa_v512"));
    // The convolution adds its products in another order.
    for (have, want) in features.concat().iter().zip(want_features.concat()) {
        assert!((have - want).abs() < 2e-5, "{have} {want}");
    }
    for (have, want) in logits.iter().zip(want_logits) {
        assert!((have - want).abs() < 2e-5, "{have} {want}");
    }
}

/// What current MLX converters write: the image module as floats, the text INT4, and a talkative config.
#[test]
fn quantization_is_decided_tensor_by_tensor() {
    let mut folder = Folder::of("ckpt_mha_int4");
    let modules: Vec<String> = folder
        .tensors
        .keys()
        .filter(|name| name.starts_with(VISION))
        .filter_map(|name| name.strip_suffix(".scales").map(str::to_owned))
        .collect();
    let positions = |module: &String| module.ends_with("position_embedding");
    assert!(modules.iter().any(positions));
    for module in modules {
        let mut take = |part: &str| folder.tensors.remove(&format!("{module}.{part}")).unwrap();
        let ((_, shape, weight), (_, _, scales), (_, _, biases)) =
            (take("weight"), take("scales"), take("biases"));
        let columns = shape[1] * 8;
        let parts: [&[u8]; 3] = [&weight, &scales, &biases];
        let rows = AffineRows::int4(parts, columns, 64, ScaleType::F16).unwrap();
        let mut values = vec![0.0; shape[0] * columns];
        for (row, out) in values.chunks_exact_mut(columns).enumerate() {
            rows.dequantize_row(row, out);
        }
        let bytes = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        folder.tensors.insert(
            format!("{module}.weight"),
            ("F32".into(), vec![shape[0], columns], bytes),
        );
    }
    folder.config["quantization"] = json!({
        "group_size": 64, "bits": 4, "mode": "affine", "lm_head": { "group_size": 64, "bits": 4 },
        "model.vision_embed_tokens.img_projection.0": false
    });
    folder.config["quantization_config"] = folder.config["quantization"].clone();
    folder.write();
    let checkpoint = folder.open().unwrap();
    assert_eq!(checkpoint.facts().quantization, "int4 group 64");
    assert_eq!(answers(&checkpoint), answers_of_golden("ckpt_mha_int4"));
}

#[test]
fn tied_embeddings_are_the_output_layer_too() {
    let mut folder = Folder::of("ckpt_gqa_v512");
    let embedding = folder.tensors["model.embed_tokens.weight"].clone();
    folder.tensors.insert("lm_head.weight".into(), embedding);
    folder.write();
    let untied = answers(&folder.open().unwrap());
    folder.tensors.remove("lm_head.weight");
    folder.write();
    assert!(
        folder
            .refused()
            .contains("tensor lm_head.weight is missing from model.safetensors")
    );
    folder.config["tie_word_embeddings"] = json!(true);
    folder.write();
    assert_eq!(answers(&folder.open().unwrap()), untied);
}

#[test]
fn a_loaded_model_outlives_its_checkpoint_and_reports_progress() {
    let checkpoint = Checkpoint::embedded().unwrap();
    let seen = std::cell::RefCell::new(Vec::new());
    let model = Phi3V::load(&checkpoint, DeviceKind::Cpu, &|progress| {
        seen.borrow_mut().push(progress)
    })
    .unwrap();
    drop(checkpoint);
    let seen = seen.into_inner();
    assert!(
        seen.windows(2)
            .all(|pair| pair[0].bytes_done <= pair[1].bytes_done)
    );
    assert_eq!(
        seen.last().unwrap().bytes_done,
        seen.last().unwrap().bytes_total
    );
    let mut state = model
        .begin(
            &Prompt {
                ids: vec![1, 2],
                image_tokens: 0,
            },
            &[],
        )
        .unwrap();
    assert_eq!(
        model.advance(&mut state, 8).unwrap().unwrap().len(),
        model.config().vocab_size
    );
}

#[test]
fn broken_tensors_are_named_with_file_and_shape() {
    let mut folder = Folder::of("ckpt_gqa_v512");
    let name = "model.layers.1.mlp.down_proj.weight";
    let good = folder.tensors.remove(name).unwrap();
    folder.write();
    let message = folder.refused();
    assert!(
        message.contains(name) && message.contains("model.safetensors"),
        "{message}"
    );
    folder.tensors.insert(
        name.into(),
        (good.0.clone(), vec![good.1[1], good.1[0]], good.2.clone()),
    );
    folder.write();
    let message = folder.refused();
    assert!(
        message.contains("has shape [160, 96]") && message.contains("[96, 160]"),
        "{message}"
    );
    folder.tensors.insert(
        name.into(),
        ("F8_E4M3".into(), good.1.clone(), vec![0; 96 * 160]),
    );
    folder.write();
    assert!(folder.refused().contains("F8_E4M3"), "{}", folder.refused());
    folder.tensors.insert(
        name.into(),
        ("U32".into(), good.1.clone(), vec![0; 4 * 96 * 160]),
    );
    folder.write();
    assert!(folder.refused().contains(".scales"), "{}", folder.refused());
    folder.tensors.insert(name.into(), good.clone());
    folder.tensors.insert(
        "model.layers.1.mlp.down_proj.scales".into(),
        ("BF16".into(), vec![96, 2], vec![0; 384]),
    );
    folder.write();
    assert!(
        folder.refused().contains("down_proj.biases is missing"),
        "{}",
        folder.refused()
    );
}

/// The same codes, a byte each: a module has eight bits when its words are twice as many. Other widths are refused.
#[test]
fn a_module_is_as_wide_as_its_words_say() {
    let mut folder = Folder::of("ckpt_mha_int4");
    let name = "model.layers.1.mlp.down_proj.weight";
    let (dtype, shape, bytes) = folder.tensors.remove(name).unwrap();
    let codes = bytes.iter().flat_map(|byte| [byte & 0xF, byte >> 4]);
    let codes: Vec<u8> = codes.collect();
    let mut wide = (dtype, vec![shape[0], 2 * shape[1]], codes);
    folder.tensors.insert(name.into(), wide.clone());
    folder.write();
    let answers = answers(&folder.open().unwrap());
    assert_eq!(answers, answers_of_golden("ckpt_mha_int4"));
    wide.1[1] = shape[1] / 2 * 3;
    wide.2.truncate(bytes.len() / 2 * 3);
    folder.tensors.insert(name.into(), wide);
    folder.write();
    let message = folder.refused();
    assert!(message.contains(name), "{message}");
    assert!(message.contains("8-bit ones (other widths"), "{message}");
}

#[test]
fn broken_files_say_what_to_fetch() {
    let folder = Folder::of("ckpt_gqa_v512");
    assert!(matches!(
        Checkpoint::open(&folder.path("nowhere")),
        Err(ModelError::MissingFile { .. })
    ));
    assert!(
        folder.refused().contains("config.json"),
        "{}",
        folder.refused()
    );
    folder.write_config();
    assert!(
        folder.refused().contains("no *.safetensors"),
        "{}",
        folder.refused()
    );
    folder.write_shards();
    let shard = folder.path("model-00002-of-00002.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 5]).unwrap();
    let message = folder.refused();
    let sizes = format!(
        "has {} bytes, its header promises {}",
        bytes.len() - 5,
        bytes.len()
    );
    assert!(
        message.contains("model-00002-of-00002.safetensors") && message.contains(&sizes),
        "{message}"
    );
    std::fs::write(&shard, []).unwrap();
    assert!(matches!(
        folder.open(),
        Err(ModelError::Truncated { have_bytes: 0, .. })
    ));
    std::fs::write(
        &shard,
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    )
    .unwrap();
    assert!(
        folder.refused().contains("git lfs pull"),
        "{}",
        folder.refused()
    );
    std::fs::remove_file(&shard).unwrap();
    let message = folder.refused();
    assert!(
        message.contains("model-00002-of-00002.safetensors") && message.contains("missing"),
        "{message}"
    );
    let index =
        json!({ "weight_map": { "lm_head.weight": "../model-00001-of-00002.safetensors" } });
    std::fs::write(
        folder.path("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
    assert!(
        folder.refused().contains("without folders"),
        "{}",
        folder.refused()
    );
}

#[test]
fn a_foreign_model_is_refused_before_its_weights_are_read() {
    let mut folder = Folder::of("ckpt_gqa_v512");
    folder.config["model_type"] = json!("llama");
    folder.write_config();
    let message = folder.refused();
    assert!(
        message.contains("\"llama\"") && message.contains("phi3_v"),
        "{message}"
    );
}

#[test]
fn a_tokenizer_beyond_the_vocabulary_is_refused() {
    let checkpoint = Checkpoint::open(&golden("ckpt_gqa_v512")).unwrap();
    let message = checkpoint.tokenizer().unwrap_err().to_string();
    assert!(
        message.contains("32044") && message.contains("512"),
        "{message}"
    );
    assert!(
        Checkpoint::open(&golden("ckpt_mha"))
            .unwrap()
            .tokenizer()
            .is_ok()
    );
    let folder = Folder::of("ckpt_gqa_v512");
    folder.write();
    std::fs::write(folder.path("tokenizer.json"), "{}").unwrap();
    let message = folder.open().unwrap().tokenizer().unwrap_err().to_string();
    assert!(message.contains("tokenizer.json"), "{message}");
}

#[test]
fn digests_tell_checkpoints_apart() {
    let digest = |folder: &Folder| folder.open().unwrap().facts().digest;
    let mut folder = Folder::of("ckpt_gqa_v512");
    folder.write();
    let first = digest(&folder);
    assert_eq!(first, digest(&folder));
    folder.config["rms_norm_eps"] = json!(2e-5);
    folder.write();
    assert_ne!(first, digest(&folder));
}

/// xorshift64: the same mutations on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// Opens and, if it opens, loads: either may fail, neither may panic.
fn try_load(dir: &Path) -> bool {
    match Checkpoint::open(dir) {
        Ok(checkpoint) => Phi3V::load(&checkpoint, DeviceKind::Cpu, &|_| ()).is_ok(),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

#[test]
fn mutated_headers_and_configs_never_panic() {
    let folder = Folder::of("ckpt_gqa_v512");
    folder.write();
    let good = std::fs::read(folder.path("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let config = folder.config.to_string();
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let digits = b"0123456789-.e\"[]{},:";
    let mut loaded = 0;
    for round in 0..400 {
        let mut bytes = good.clone();
        match round % 4 {
            0 => bytes.truncate(random.below(good.len())),
            1 => bytes[random.below(8)] = random.below(256) as u8,
            2 => bytes[8 + random.below(header)] = digits[random.below(digits.len())],
            _ => {}
        }
        let mut text = config.clone().into_bytes();
        if round % 4 == 3 {
            let at = random.below(text.len());
            match random.below(3) {
                0 => text.truncate(at),
                1 => text[at] = digits[random.below(digits.len())],
                _ => text.insert(at, digits[random.below(digits.len())]),
            }
        }
        std::fs::write(folder.path("model.safetensors"), bytes).unwrap();
        std::fs::write(folder.path("config.json"), text).unwrap();
        loaded += usize::from(try_load(folder.dir.path()));
    }
    assert!(loaded < 400, "some mutations must matter");
}

#[test]
fn hostile_headers_never_leave_the_file() {
    let folder = Folder::of("ckpt_gqa_v512");
    folder.write_config();
    let max = u64::MAX;
    let entries = [
        json!({ "x": { "dtype": "U8", "shape": [max], "data_offsets": [0, max] } }),
        json!({ "x": { "dtype": "U8", "shape": [max - 7], "data_offsets": [0, max - 7] } }),
        json!({ "x": { "dtype": "F32", "shape": [1u64 << 62, 16], "data_offsets": [0, 0] } }),
        json!({ "x": { "dtype": "F32", "shape": [0], "data_offsets": [8, 4] } }),
        json!({ "x": { "dtype": "F8", "shape": [1], "data_offsets": [0, 1u64 << 40] } }),
        json!({ "x": { "dtype": "F32", "shape": [-1], "data_offsets": [0, 4] } }),
        json!({ "x": 3 }),
        json!([1, 2]),
        json!({}),
    ];
    for entry in entries {
        let header = entry.to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        std::fs::write(folder.path("model.safetensors"), bytes).unwrap();
        assert!(folder.open().is_err(), "{header}");
    }
    std::fs::write(folder.path("model.safetensors"), max.to_le_bytes()).unwrap();
    assert!(matches!(folder.open(), Err(ModelError::BadHeader { .. })));
}
