//! A model folder, or the model inside the binary: config, weights and tokenizer that were checked against each other.

use std::path::{Path, PathBuf};

use candle_core::DType;
use sha2::{Digest, Sha256};

use crate::config::{Keys, ModelConfig, parse_json};
use crate::error::ModelError;
use crate::table;
use crate::tokenizer::Tokenizer;
use crate::weights::{StoredType, Weights, read_file};

/// In a folder that is being written: it is no checkpoint yet.
pub(crate) const MARKER: &str = ".visor-partial";

const CONFIG: &[u8] = include_bytes!("../demo/config.json");
const GENERATION_CONFIG: &[u8] = include_bytes!("../demo/generation_config.json");
/// The published one, too.
pub(crate) const PREPROCESSOR_CONFIG: &[u8] = include_bytes!("../demo/preprocessor_config.json");
const MODEL: &[u8] = include_bytes!("../demo/model.safetensors");
const TOKENIZER: &[u8] = include_bytes!("../demo/tokenizer.json");
/// The tokenizer of the published model, for checkpoints that carry none.
pub(crate) const PHI3_TOKENIZER: &[u8] = include_bytes!("../phi3/tokenizer.json");

/// Name of the model inside the binary.
const EMBEDDED_ID: &str = "visor-demo";
/// What Phi-3.5-vision's preprocessor_config.json says.
const NUM_CROPS_DEFAULT: u32 = 4;
const NUM_CROPS_MAX: usize = 256;
/// Decides how a checkpoint is described: quantized in every quantized checkpoint.
const TYPICAL_MODULE: &str = "model.layers.0.self_attn.qkv_proj";

/// Weights, config and tokenizer that belong together. Opening reads headers, not weights.
pub struct Checkpoint {
    id: String,
    dir: Option<PathBuf>,
    config: ModelConfig,
    weights: Weights,
    num_crops: u32,
    digest: String,
}

/// What a client may be told about a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointFacts {
    /// The folder's name, or `visor-demo`.
    pub id: String,
    /// It is the small model inside the binary, whatever a folder is called.
    pub embedded: bool,
    /// Bytes of all weight files.
    pub bytes: u64,
    /// How the weights are stored: `int4 group 64`, `int8 group 64`, `bf16`, `f16` or `f32`.
    pub quantization: String,
    /// sha256, hex, of the config, every tensor header and every file size: another checkpoint, another digest.
    pub digest: String,
}

impl Checkpoint {
    /// Opens a checkpoint folder: `config.json`, `*.safetensors` (one file, or an index and shards), and, where they
    /// exist, `generation_config.json`, `preprocessor_config.json` and `tokenizer.json`.
    ///
    /// # Errors
    /// A [`ModelError`] naming the file, key or tensor that is missing or wrong, and what to do.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        Self::open_with(dir, "config.json")
    }

    /// As [`Self::open`] with another config, a name inside `dir` or a path of its own.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(dir: &Path, config_file: &str) -> Result<Self, ModelError> {
        if dir.join(MARKER).exists() {
            return Err(ModelError::Config {
                file: dir.display().to_string(),
                message: "this folder is not whole: it is being written, or that was interrupted; run the command again".into(),
            });
        }
        Self::open_unmarked(dir, config_file)
    }

    /// A folder that this process is still writing.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) fn open_written(dir: &Path) -> Result<Self, ModelError> {
        Self::open_unmarked(dir, "config.json")
    }

    fn open_unmarked(dir: &Path, config_file: &str) -> Result<Self, ModelError> {
        if !dir.is_dir() {
            let hint = "give the folder that holds config.json and the weight files".to_owned();
            return Err(ModelError::MissingFile {
                path: dir.display().to_string(),
                hint,
            });
        }
        let path = dir.join(config_file);
        let config = read_file(
            &path,
            "the folder is not a Hugging Face checkpoint, or its download is incomplete",
        )?;
        let optional = |name: &str| -> Result<Option<Vec<u8>>, ModelError> {
            let path = dir.join(name);
            if path.is_file() {
                read_file(&path, "").map(Some)
            } else {
                Ok(None)
            }
        };
        let files = ConfigFiles {
            name: path.display().to_string(),
            config: &config,
            generation: optional("generation_config.json")?,
            preprocessor: optional("preprocessor_config.json")?,
        };
        // The config first: with a wrong model type nothing else matters.
        let (config, num_crops) = files.parse()?;
        let weights = Weights::open_dir(dir)?;
        Self::checked(
            folder_name(dir),
            Some(dir.to_owned()),
            &files,
            (config, num_crops, weights),
        )
    }

    /// The model inside the binary: the real architecture and arithmetic, small, trained on simple pictures.
    ///
    /// # Errors
    /// None in a binary that passed its tests.
    pub fn embedded() -> Result<Self, ModelError> {
        let files = ConfigFiles {
            name: format!("{EMBEDDED_ID}/config.json"),
            config: CONFIG,
            generation: Some(GENERATION_CONFIG.to_vec()),
            preprocessor: Some(PREPROCESSOR_CONFIG.to_vec()),
        };
        let (config, num_crops) = files.parse()?;
        let weights = Weights::embedded(&format!("{EMBEDDED_ID}/model.safetensors"), MODEL)?;
        Self::checked(
            EMBEDDED_ID.to_owned(),
            None,
            &files,
            (config, num_crops, weights),
        )
    }

    fn checked(
        id: String,
        dir: Option<PathBuf>,
        files: &ConfigFiles<'_>,
        (config, num_crops, weights): (ModelConfig, u32, Weights),
    ) -> Result<Self, ModelError> {
        table::check(&config, &weights)?;
        let mut hasher = Sha256::new();
        hasher.update(files.config);
        weights.digest(&mut hasher);
        let digest = hex(&hasher.finalize());
        Ok(Self {
            id,
            dir,
            config,
            weights,
            num_crops,
            digest,
        })
    }

    /// The checked config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Crops an image is cut into at most, by default: `num_crops` of `preprocessor_config.json`, else 4.
    pub fn num_crops(&self) -> u32 {
        self.num_crops
    }

    /// The checkpoint's own `tokenizer.json`, else the embedded Phi-3 one; the demo's for the demo.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] for a file that is none, [`ModelError::TokenizerMismatch`] when it makes ids the model
    /// has no embedding for.
    pub fn tokenizer(&self) -> Result<Tokenizer, ModelError> {
        let own = self.own_tokenizer();
        let (tokenizer, file) = match &own {
            Some(path) => (Tokenizer::from_file(path)?, path.display().to_string()),
            None if self.dir.is_none() => (
                Tokenizer::from_bytes(TOKENIZER)?,
                format!("{EMBEDDED_ID}/tokenizer.json"),
            ),
            None => (phi3_tokenizer()?, "the embedded Phi-3 tokenizer".to_owned()),
        };
        if tokenizer.vocab_size() as usize > self.config.vocab_size {
            return Err(ModelError::TokenizerMismatch {
                file,
                id_max: tokenizer.vocab_size() - 1,
                vocab_size: self.config.vocab_size,
            });
        }
        Ok(tokenizer)
    }

    /// What a client may be told.
    pub fn facts(&self) -> CheckpointFacts {
        CheckpointFacts {
            id: self.id.clone(),
            embedded: self.dir.is_none(),
            bytes: self.weights.bytes(),
            quantization: self.quantization(),
            digest: self.digest.clone(),
        }
    }

    /// The checkpoint's own tokenizer file, if it has one.
    pub(crate) fn own_tokenizer(&self) -> Option<PathBuf> {
        self.dir
            .as_ref()
            .map(|dir| dir.join("tokenizer.json"))
            .filter(|path| path.is_file())
    }

    /// Its folder; none for the one inside the binary.
    pub(crate) fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// Whether some matrix is INT4 or INT8.
    pub(crate) fn is_quantized(&self) -> bool {
        let tensors = self.weights.in_order();
        tensors
            .iter()
            .any(|tensor| tensor.name.ends_with(".scales"))
    }

    pub(crate) fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Weights in all, quantized ones counted as weights.
    pub(crate) fn parameters(&self) -> u64 {
        let count = |entry: &table::Entry| match &entry.form {
            table::Form::Matrix { rows, columns } => (rows * columns) as u64,
            table::Form::Floats(shape) => shape.iter().product::<usize>() as u64,
            table::Form::Patches { out } => (out * 3 * 14 * 14) as u64,
        };
        table::tensors(&self.config).iter().map(count).sum()
    }

    /// The float type of what is not quantized.
    pub(crate) fn stored_dtype(&self) -> DType {
        match self
            .weights
            .get("model.norm.weight")
            .map(|tensor| &tensor.dtype)
        {
            Some(StoredType::F16) => DType::F16,
            Some(StoredType::Bf16) => DType::BF16,
            _ => DType::F32,
        }
    }

    /// `int4 group 64`, `int8 group 64`, `bf16`, `f16` or `f32`, by a typical matrix.
    fn quantization(&self) -> String {
        let part = |suffix: &str| self.weights.get(&format!("{TYPICAL_MODULE}.{suffix}"));
        match (part("scales"), part("weight")) {
            (Some(scales), Some(weight)) => {
                let columns = self.config.hidden_size;
                let bits = table::code_bits(weight, columns).unwrap_or_default();
                let groups = scales.shape.get(1).copied().unwrap_or(1).max(1);
                format!("int{bits} group {}", columns / groups)
            }
            (None, Some(weight)) => weight.dtype.to_string(),
            (_, None) => "unknown".to_owned(),
        }
    }
}

/// The small JSON files of a checkpoint.
struct ConfigFiles<'a> {
    name: String,
    config: &'a [u8],
    generation: Option<Vec<u8>>,
    preprocessor: Option<Vec<u8>>,
}

impl ConfigFiles<'_> {
    /// The config and the crop count.
    fn parse(&self) -> Result<(ModelConfig, u32), ModelError> {
        let beside = |name: &str| {
            Path::new(&self.name)
                .with_file_name(name)
                .display()
                .to_string()
        };
        let mut config = ModelConfig::parse(self.config, &self.name)?;
        if let Some(json) = &self.generation {
            config.add_generation_eos(json, &beside("generation_config.json"))?;
        }
        let Some(json) = &self.preprocessor else {
            return Ok((config, NUM_CROPS_DEFAULT));
        };
        let file = beside("preprocessor_config.json");
        let value = parse_json(json, &file)?;
        let num_crops = Keys::new(&value, &file)?.size("num_crops", NUM_CROPS_MAX)?;
        Ok((
            config,
            num_crops
                .and_then(|count| u32::try_from(count).ok())
                .unwrap_or(NUM_CROPS_DEFAULT),
        ))
    }
}

/// The tokenizer of the published model.
pub(crate) fn phi3_tokenizer() -> Result<Tokenizer, ModelError> {
    Tokenizer::from_bytes(PHI3_TOKENIZER)
}

/// What a folder is called; in Hugging Face's cache, `models--org--name/snapshots/<hash>`, the model's name.
fn folder_name(dir: &Path) -> String {
    let full = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let text = |path: &Path| {
        path.file_name()
            .map(|name| name.to_string_lossy().into_owned())
    };
    let parent = full.parent();
    let repository = parent
        .filter(|parent| parent.ends_with("snapshots"))
        .and_then(Path::parent)
        .and_then(text);
    repository
        .and_then(|name| {
            name.strip_prefix("models--")
                .map(|rest| rest.rsplit("--").next().unwrap_or(rest).to_owned())
        })
        .or_else(|| text(&full))
        .unwrap_or_else(|| "model".to_owned())
}

/// Bytes as hexadecimal digits in lower case, how digests are told.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_in_the_hub_cache_is_called_after_its_model() {
        let path = Path::new("/none/models--microsoft--Phi-3.5-vision-instruct/snapshots/4a0d683e");
        assert_eq!(folder_name(path), "Phi-3.5-vision-instruct");
        assert_eq!(folder_name(Path::new("/none/my-model")), "my-model");
    }

    #[test]
    fn the_embedded_checkpoint_is_whole() {
        let checkpoint = Checkpoint::embedded().unwrap();
        let facts = checkpoint.facts();
        assert_eq!(
            (facts.id.as_str(), facts.quantization.as_str()),
            ("visor-demo", "int4 group 64")
        );
        assert_eq!(facts.digest.len(), 64);
        assert!(facts.embedded && facts.bytes <= 8 << 20, "{facts:?}");
        assert_eq!(checkpoint.num_crops(), 4);
        assert!(
            checkpoint.tokenizer().unwrap().vocab_size() as usize <= checkpoint.config().vocab_size
        );
    }
}
