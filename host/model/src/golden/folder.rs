//! What a golden folder holds, and which checkpoint a case runs on.

use std::path::{Path, PathBuf};

use candle_core::DType;

use crate::checkpoint::Checkpoint;
use crate::device::{DeviceChoice, DeviceKind};
use crate::error::ModelError;
use crate::image::{ImageLimits, PixelValues, SourceImage, decode, hd_plan, render_view};
use crate::model::Phi3V;
use crate::weights::{StoredTensor, Weights, read_file};

/// Goldens are trusted to be big, not to be endless.
const LIMITS: ImageLimits = ImageLimits {
    bytes_max: 1 << 30,
    pixels_max: 1 << 28,
    side_px_max: 1 << 16,
    aspect_ratio_max: 1 << 16,
};

/// The names in a golden folder.
pub(super) struct Folder {
    pub(super) root: PathBuf,
    cases: Vec<String>,
    checkpoints: Vec<String>,
}

impl Folder {
    pub(super) fn open(root: &Path) -> Result<Self, ModelError> {
        let root = root.canonicalize().map_err(|_| ModelError::MissingFile {
            path: root.display().to_string(),
            hint: "give a golden folder; its README describes the layout".into(),
        })?;
        let mut cases: Vec<String> = names_in(&root.join("cases"))
            .iter()
            .filter_map(|name| {
                name.strip_suffix(".json")
                    .or_else(|| name.strip_suffix(".safetensors"))
            })
            .map(str::to_owned)
            .collect();
        cases.sort();
        cases.dedup();
        let mut checkpoints = names_in(&root);
        checkpoints.retain(|name| name.starts_with("ckpt") && root.join(name).is_dir());
        checkpoints.sort();
        Ok(Self {
            root,
            cases,
            checkpoints,
        })
    }

    /// `<checkpoint>.<case>` of every file in `cases/`.
    pub(super) fn case_names(&self) -> Vec<String> {
        self.cases.clone()
    }

    /// The bytes of a file of the folder, nothing when it does not exist.
    pub(super) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, ModelError> {
        let path = self.root.join(name);
        if path.exists() {
            read_file(&path, "").map(Some)
        } else {
            Ok(None)
        }
    }

    /// The tensors of a file of the folder, nothing when it does not exist.
    pub(super) fn tensors(&self, name: &str) -> Result<Option<Weights>, ModelError> {
        let path = self.root.join(name);
        if path.exists() {
            Weights::open_file(&path).map(Some)
        } else {
            Ok(None)
        }
    }

    /// An image by name, with or without its extension, decoded as stored: the reference ignores EXIF. Nothing when
    /// there is no such file.
    pub(super) fn image(&self, name: &str) -> Result<Option<SourceImage>, String> {
        let images = self.root.join("images");
        let file = names_in(&images).into_iter().find(|file| {
            file == name || Path::new(file).file_stem().is_some_and(|stem| stem == name)
        });
        let Some(file) = file else { return Ok(None) };
        let path = images.join(&file);
        let bytes = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        decode(&bytes, &LIMITS, false)
            .map(Some)
            .map_err(|error| format!("{}: {error}", path.display()))
    }
}

/// The crops of an image as the reference cuts them.
pub(super) fn pixel_values(image: &SourceImage, num_crops: u32) -> Result<PixelValues, String> {
    hd_plan(image.width_px(), image.height_px(), num_crops)
        .and_then(|plan| render_view(image, &plan))
        .map_err(|error| error.to_string())
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// Shape and values of a golden tensor, nothing when there is none of that name, or what is wrong with it.
pub(super) type Found<T> = Result<Option<(Vec<usize>, Vec<T>)>, String>;

/// A tensor of a golden file as floats with its shape.
pub(super) fn floats(tensors: &Weights, name: &str) -> Found<f32> {
    let Some(tensor) = tensors.get(name) else {
        return Ok(None);
    };
    let values = tensor
        .to_f32()
        .ok_or_else(|| wrong_type(tensor, "floats"))?;
    Ok(Some((tensor.shape.clone(), values)))
}

/// A tensor of a golden file as integers with its shape.
pub(super) fn integers(tensors: &Weights, name: &str) -> Found<i64> {
    let Some(tensor) = tensors.get(name) else {
        return Ok(None);
    };
    let values = tensor.to_i64().ok_or_else(|| wrong_type(tensor, "i64"))?;
    Ok(Some((tensor.shape.clone(), values)))
}

fn wrong_type(tensor: &StoredTensor, want: &str) -> String {
    format!(
        "golden tensor {} holds {}, want {want}",
        tensor.name, tensor.dtype
    )
}

/// A checkpoint ready to run.
pub(super) struct Loaded {
    pub(super) checkpoint: Checkpoint,
    pub(super) model: Phi3V,
    dir: PathBuf,
    config: PathBuf,
}

impl Loaded {
    /// Largest difference that passes, by the type that computes. An accelerator makes f16 of INT4 weights on the way to its
    /// products, whatever type the rest is computed in.
    pub(super) fn tolerance(&self) -> f64 {
        let halves = self.model.device() != DeviceKind::Cpu && self.checkpoint.is_quantized();
        match self.model.dtype() {
            DType::BF16 => 0.5,
            DType::F16 => 0.05,
            _ if halves => 0.05,
            _ => 2e-4,
        }
    }
}

/// Loads the checkpoint of a case, keeping the last one because cases come sorted.
pub(super) struct Models<'a> {
    pub(super) folder: &'a Folder,
    device: DeviceChoice,
    replacement: Option<Replacement>,
    last: Option<Loaded>,
}

/// A checkpoint given by hand.
struct Replacement {
    dir: PathBuf,
    /// The `ckpt_*` it stands for; none listed means all.
    stands_for: Vec<String>,
}

impl<'a> Models<'a> {
    pub(super) fn new(
        folder: &'a Folder,
        replacement: Option<&Path>,
        device: DeviceChoice,
    ) -> Result<Self, ModelError> {
        let replacement = replacement
            .map(|dir| Replacement::find(folder, dir))
            .transpose()?;
        Ok(Self {
            folder,
            device,
            replacement,
            last: None,
        })
    }

    /// The model for cases of `checkpoint` with `config_file`, or why there is none: `Ok(Err(reason))` skips.
    pub(super) fn load(
        &mut self,
        checkpoint: &str,
        config_file: &str,
    ) -> Result<Result<&Loaded, String>, ModelError> {
        let own = self.folder.root.join(checkpoint);
        let replacement = self.replacement.as_ref().filter(|given| {
            given.stands_for.is_empty() || given.stands_for.iter().any(|name| name == checkpoint)
        });
        let dir = replacement.map_or_else(|| own.clone(), |given| given.dir.clone());
        if !dir.is_dir() {
            return Ok(Err(format!("there is no folder {checkpoint}")));
        }
        let Some(config) = [&dir, &own]
            .map(|dir| dir.join(config_file))
            .into_iter()
            .find(|path| path.is_file())
        else {
            return Ok(Err(format!("{} has no {config_file}", dir.display())));
        };
        let fresh = !matches!(&self.last, Some(last) if last.dir == dir && last.config == config);
        if fresh {
            self.last = None; // first, so that two models are never in memory
            let checkpoint = Checkpoint::open_with(&dir, &config.display().to_string())?;
            let model = load_on(&checkpoint, self.device)?;
            self.last = Some(Loaded {
                checkpoint,
                model,
                dir,
                config,
            });
        }
        Ok(self
            .last
            .as_ref()
            .ok_or_else(|| "the model was not kept".to_owned()))
    }
}

/// Loads on the first device of the choice that works.
fn load_on(checkpoint: &Checkpoint, device: DeviceChoice) -> Result<Phi3V, ModelError> {
    let mut kinds = device.kinds().into_iter().peekable();
    loop {
        let Some(kind) = kinds.next() else {
            return Err(ModelError::Prompt("no device to load on".into()));
        };
        match Phi3V::load(checkpoint, kind, &|_| ()) {
            Err(error) if kinds.peek().is_some() => {
                tracing::warn!(%kind, %error, "device does not work")
            }
            loaded => return loaded,
        }
    }
}

impl Replacement {
    /// Decides which `ckpt_*` a folder stands for, as [`super::VerifyOptions::checkpoint`] says.
    fn find(folder: &Folder, dir: &Path) -> Result<Self, ModelError> {
        let given = Checkpoint::open(dir)?;
        let dir = dir.canonicalize().map_err(|source| ModelError::Io {
            path: dir.display().to_string(),
            source,
        })?;
        let name = dir
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        if folder.checkpoints.contains(&name) {
            return Ok(Self {
                dir,
                stands_for: vec![name],
            });
        }
        let open = |name: &String| {
            Some((
                name.clone(),
                Checkpoint::open(&folder.root.join(name)).ok()?,
            ))
        };
        let all: Vec<(String, Checkpoint)> = folder.checkpoints.iter().filter_map(open).collect();
        let same_sizes = |other: &Checkpoint| sizes(other) == sizes(&given);
        let same_norm = |other: &Checkpoint| norms_agree(other, &given);
        let stored_alike =
            |other: &Checkpoint| other.facts().quantization == given.facts().quantization;
        let tests: [&dyn Fn(&Checkpoint) -> bool; 3] = [&same_sizes, &same_norm, &stored_alike];
        let mut fitting: Vec<&(String, Checkpoint)> = all.iter().collect();
        for (index, test) in tests.into_iter().enumerate() {
            let narrower: Vec<_> = fitting
                .iter()
                .copied()
                .filter(|(_, other)| test(other))
                .collect();
            if index == 0 || !narrower.is_empty() {
                fitting = narrower;
            }
        }
        Ok(Self {
            dir,
            stands_for: fitting.into_iter().map(|(name, _)| name.clone()).collect(),
        })
    }
}

/// Everything in a config that decides tensor shapes.
fn sizes(checkpoint: &Checkpoint) -> ([usize; 6], &crate::config::VisionConfig) {
    let config = checkpoint.config();
    let text = [
        config.hidden_size,
        config.intermediate_size,
        config.layers,
        config.heads,
        config.kv_heads,
        config.vocab_size,
    ];
    (text, &config.vision)
}

/// Whether two checkpoints have the same final norm up to rounding: the same trained model, however it is stored.
fn norms_agree(a: &Checkpoint, b: &Checkpoint) -> bool {
    let norm = |checkpoint: &Checkpoint| checkpoint.weights().get("model.norm.weight")?.to_f32();
    match (norm(a), norm(b)) {
        (Some(a), Some(b)) => {
            a.len() == b.len()
                && a.iter()
                    .zip(&b)
                    .all(|(a, b)| (a - b).abs() <= 0.01 * b.abs().max(0.01))
        }
        _ => false,
    }
}
