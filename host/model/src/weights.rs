//! Weight files: mapped, their headers checked, their tensors found by name.
//!
//! A safetensors file is `u64` header length, that many bytes of JSON, then the data. The header is hostile until every
//! span in it is inside the file and as long as its shape and type ask for; after that no reader can leave the map.
//! Header by hand rather than by the `safetensors` crate: its sums overflow on offsets near 2^64, and it cannot say
//! that a file is truncated.
#![expect(unsafe_code, reason = "the one memory map of weight files")]

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::config::{Keys, parse_json};
use crate::error::ModelError;

/// Longest header read: the published one is 70 kB.
const HEADER_BYTES_MAX: u64 = 100 << 20;
/// Longest file that is no weights; tokenizers are under 10 MiB.
pub(crate) const SMALL_BYTES_MAX: u64 = 64 << 20;
const EMBEDDING: &str = "model.embed_tokens.";
/// The name the reference's image module knows the same table by; some checkpoints store only this one.
const EMBEDDING_ALIAS: &str = "model.vision_embed_tokens.wte.";

/// The types a weight file may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StoredType {
    F32,
    F16,
    Bf16,
    U32,
    I64,
    U8,
    /// Some other type: fine in a tensor nobody reads.
    Other(String),
}

impl StoredType {
    fn parse(text: &str) -> Self {
        match text {
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::Bf16,
            "U32" => Self::U32,
            "I64" => Self::I64,
            "U8" => Self::U8,
            other => Self::Other(other.to_owned()),
        }
    }

    /// Bytes of one value, where known.
    fn bytes(&self) -> Option<usize> {
        match self {
            Self::U8 => Some(1),
            Self::F16 | Self::Bf16 => Some(2),
            Self::F32 | Self::U32 => Some(4),
            Self::I64 => Some(8),
            Self::Other(_) => None,
        }
    }
}

impl std::fmt::Display for StoredType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::U32 => "u32",
            Self::I64 => "i64",
            Self::U8 => "u8",
            Self::Other(name) => name,
        })
    }
}

/// The bytes of one weight file.
enum FileBytes {
    Mapped(memmap2::Mmap),
    Embedded(&'static [u8]),
}

/// One weight file, kept mapped while a tensor of it lives.
pub(crate) struct WeightFile {
    pub(crate) name: String,
    bytes: FileBytes,
    /// When it was opened; none inside the binary.
    pub(crate) metadata: Option<Metadata>,
}

impl WeightFile {
    /// All of it.
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.bytes {
            FileBytes::Mapped(map) => map,
            FileBytes::Embedded(bytes) => bytes,
        }
    }

    /// Lets the system take back the memory of these pages; the next reader gets them from the file again.
    pub(crate) fn release(&self, span: Range<usize>) {
        #[cfg(unix)]
        if let FileBytes::Mapped(map) = &self.bytes {
            // SAFETY: the map is read-only and backed by its file: dropped pages come back with the same bytes.
            let advised = unsafe {
                map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    span.start,
                    span.len(),
                )
            };
            // Advice that is not taken costs memory, nothing else.
            drop(advised);
        }
        #[cfg(not(unix))]
        drop(span);
    }
}

/// One tensor where its file has it.
#[derive(Clone)]
pub(crate) struct StoredTensor {
    pub(crate) name: String,
    pub(crate) file: Arc<WeightFile>,
    pub(crate) dtype: StoredType,
    pub(crate) shape: Vec<usize>,
    span: Range<usize>,
}

impl StoredTensor {
    /// The values, row-major, little-endian, at any alignment.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.file.bytes()[self.span.clone()]
    }

    /// The values of a float tensor as f32, or nothing for other types.
    pub(crate) fn to_f32(&self) -> Option<Vec<f32>> {
        let values = self.shape.iter().product();
        let mut out = vec![0.0; values];
        self.widen(0..values, &mut out).then_some(out)
    }

    /// Some values of a float tensor as f32, in the order of the file; false for other types.
    ///
    /// # Panics
    /// When the range is out of bounds or `out` is not its size.
    pub(crate) fn widen(&self, values: Range<usize>, out: &mut [f32]) -> bool {
        let size = self.value_bytes();
        let bytes = &self.bytes()[values.start * size..values.end * size];
        match self.dtype {
            StoredType::F32 => visor_kernels::widen::widen_f32(bytes, out),
            StoredType::F16 => visor_kernels::widen::widen_f16(bytes, out),
            StoredType::Bf16 => visor_kernels::widen::widen_bf16(bytes, out),
            _ => return false,
        }
        true
    }

    /// Bytes of one value; 0 for types that are not read.
    pub(crate) fn value_bytes(&self) -> usize {
        self.dtype.bytes().unwrap_or(0)
    }

    /// Lets the system take back the memory of this tensor's pages; the next reader gets them from the file again.
    pub(crate) fn release(&self) {
        self.file.release(self.span.clone());
    }

    /// The values of an i64 tensor, or nothing for other types.
    pub(crate) fn to_i64(&self) -> Option<Vec<i64>> {
        (self.dtype == StoredType::I64).then(|| {
            self.bytes()
                .as_chunks::<8>()
                .0
                .iter()
                .map(|eight| i64::from_le_bytes(*eight))
                .collect()
        })
    }
}

/// All tensors of a checkpoint.
#[derive(Default)]
pub(crate) struct Weights {
    files: Vec<Arc<WeightFile>>,
    tensors: HashMap<String, StoredTensor>,
}

impl Weights {
    /// Maps the weight files of a checkpoint folder: `model.safetensors`, else the shards of
    /// `model.safetensors.index.json`, else every `*.safetensors`.
    ///
    /// # Errors
    /// A [`ModelError`] naming the file that is missing, truncated or malformed.
    pub(crate) fn open_dir(dir: &Path) -> Result<Self, ModelError> {
        let mut weights = Self::default();
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if single.is_file() {
            weights.add_path(&single, "model.safetensors")?;
        } else if index.is_file() {
            weights.add_index(dir, &index)?;
        } else {
            for name in safetensors_in(dir)? {
                weights.add_path(&dir.join(&name), &name)?;
            }
        }
        Ok(weights)
    }

    /// Maps one file.
    pub(crate) fn open_file(path: &Path) -> Result<Self, ModelError> {
        let mut weights = Self::default();
        weights.add_path(path, &path.display().to_string())?;
        Ok(weights)
    }

    /// Weights inside the binary.
    pub(crate) fn embedded(name: &str, bytes: &'static [u8]) -> Result<Self, ModelError> {
        let mut weights = Self::default();
        weights.add(WeightFile {
            name: name.to_owned(),
            bytes: FileBytes::Embedded(bytes),
            metadata: None,
        })?;
        Ok(weights)
    }

    /// The tensor of that name, the embedding table under either of its names.
    pub(crate) fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name).or_else(|| {
            let rest = name.strip_prefix(EMBEDDING)?;
            self.tensors.get(&format!("{EMBEDDING_ALIAS}{rest}"))
        })
    }

    /// All tensors, in the order of the files.
    pub(crate) fn in_order(&self) -> Vec<&StoredTensor> {
        let mut tensors: Vec<&StoredTensor> = self.tensors.values().collect();
        tensors.sort_by(|a, b| {
            (&a.file.name, a.span.start, &a.name).cmp(&(&b.file.name, b.span.start, &b.name))
        });
        tensors
    }

    /// Names of the files, for messages.
    pub(crate) fn file_names(&self) -> String {
        let names: Vec<&str> = self.files.iter().map(|file| file.name.as_str()).collect();
        match names.len() {
            0..=4 => names.join(", "),
            count => format!("{}, {} and {} more", names[0], names[1], count - 2),
        }
    }

    /// Bytes of all files.
    pub(crate) fn bytes(&self) -> u64 {
        self.files
            .iter()
            .map(|file| file.bytes().len() as u64)
            .sum()
    }

    /// Adds names, types, shapes and sizes of everything to a digest; no weight is read.
    pub(crate) fn digest(&self, hasher: &mut Sha256) {
        let mut tensors: Vec<&StoredTensor> = self.tensors.values().collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        for tensor in tensors {
            hasher.update(format!(
                "{} {} {:?} {:?}\n",
                tensor.name, tensor.dtype, tensor.shape, tensor.span
            ));
        }
        for file in &self.files {
            hasher.update(format!("{} {}\n", file.name, file.bytes().len()));
        }
    }

    /// Lets the system take back the memory of the tensors whose names begin so; tells their bytes.
    pub(crate) fn release(&self, prefix: &str) -> u64 {
        let tensors = self.tensors.values();
        let released = tensors.filter(|tensor| tensor.name.starts_with(prefix));
        released
            .map(|tensor| {
                tensor.release();
                tensor.bytes().len() as u64
            })
            .sum()
    }

    /// The files, for who reads every byte of them.
    pub(crate) fn files(&self) -> &[Arc<WeightFile>] {
        &self.files
    }

    /// The shards an index lists, each tensor where the index says.
    fn add_index(&mut self, dir: &Path, index: &Path) -> Result<(), ModelError> {
        let file = index.display().to_string();
        let json = read_file(index, "")?;
        let value = parse_json(&json, &file)?;
        let keys = Keys::new(&value, &file)?;
        let Some(Value::Object(map)) = keys.value("weight_map") else {
            return Err(keys.wrong(
                "weight_map",
                "nothing",
                "an object of tensor names and file names",
            ));
        };
        let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, shard) in map {
            match shard.as_str() {
                Some(shard) if is_plain_name(shard) => shards.entry(shard).or_default().push(name),
                _ => {
                    return Err(keys.wrong(
                        "weight_map",
                        &format!("{shard} for {name}"),
                        "a file name without folders",
                    ));
                }
            }
        }
        for (shard, names) in shards {
            self.add_path(&dir.join(shard), shard)?;
            for name in names {
                if self
                    .tensors
                    .get(name)
                    .is_none_or(|tensor| tensor.file.name != shard)
                {
                    return Err(ModelError::MissingTensor {
                        name: name.to_owned(),
                        files: shard.to_owned(),
                        hint: "model.safetensors.index.json says it is there; fetch the index and this shard again".into(),
                    });
                }
            }
        }
        Ok(())
    }

    fn add_path(&mut self, path: &Path, name: &str) -> Result<(), ModelError> {
        let shown = path.display().to_string();
        let io = |source: std::io::Error| {
            match source.kind() {
            std::io::ErrorKind::NotFound => ModelError::MissingFile {
                path: shown.clone(),
                hint: "a weight file of this checkpoint is missing, fetch it or point the model path elsewhere".into(),
            },
            _ => ModelError::Io { path: shown.clone(), source },
        }
        };
        let file = open_plain(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if metadata.len() == 0 {
            return Err(ModelError::Truncated {
                file: shown,
                have_bytes: 0,
                want_bytes: 8,
            });
        }
        // SAFETY: the map is read-only and its file is opened read-only. Rust requires that nobody writes or truncates
        // the file while it is mapped: a checkpoint is replaced by rename, never edited in place (README, limits).
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        // What is read from the disk now is kept in large pages where the system has some for files; see `PAGE_BYTES` of the writer.
        #[cfg(target_os = "linux")]
        drop(map.advise(memmap2::Advice::HugePage));
        self.add(WeightFile {
            name: name.to_owned(),
            bytes: FileBytes::Mapped(map),
            metadata: Some(metadata),
        })
    }

    fn add(&mut self, file: WeightFile) -> Result<(), ModelError> {
        let file = Arc::new(file);
        for tensor in read_header(&file)? {
            if let Some(other) = self.tensors.get(&tensor.name) {
                let message = format!("tensor {} is already in {}", tensor.name, other.file.name);
                return Err(ModelError::BadHeader {
                    file: file.name.clone(),
                    message,
                });
            }
            self.tensors.insert(tensor.name.clone(), tensor);
        }
        self.files.push(file);
        Ok(())
    }
}

/// Opens a plain file, or a link to one: to open a pipe would wait for who writes it, and a device may have no end.
fn open_plain(path: &Path) -> io::Result<File> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a plain file"));
    }
    File::open(path)
}

/// The content of a plain file that is no weights.
pub(crate) fn read_plain(path: &Path) -> io::Result<Vec<u8>> {
    let file = open_plain(path)?;
    if file.metadata()?.len() > SMALL_BYTES_MAX {
        let more = format!("it has more than {SMALL_BYTES_MAX} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, more));
    }
    let mut bytes = Vec::new();
    file.take(SMALL_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads a small file of a checkpoint; `hint` says what to do when it is missing.
pub(crate) fn read_file(path: &Path, hint: &str) -> Result<Vec<u8>, ModelError> {
    read_plain(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => ModelError::MissingFile {
            path: path.display().to_string(),
            hint: hint.to_owned(),
        },
        _ => ModelError::Io {
            path: path.display().to_string(),
            source,
        },
    })
}

fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0', ':'])
}

/// The weight files of a folder without an index, in order of name.
fn safetensors_in(dir: &Path) -> Result<Vec<String>, ModelError> {
    let io = |source| ModelError::Io {
        path: dir.display().to_string(),
        source,
    };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        if let Some(name) = name
            .to_str()
            .filter(|name| name.ends_with(".safetensors") && !name.starts_with('.'))
        {
            names.push(name.to_owned());
        }
    }
    if names.is_empty() {
        return Err(ModelError::MissingFile {
            path: dir.join("model.safetensors").display().to_string(),
            hint: "the folder has no *.safetensors; other formats (GGUF, .bin, .npz) are not read"
                .into(),
        });
    }
    names.sort();
    Ok(names)
}

/// Reads and checks a header: every tensor returned lies inside the file and is as long as its shape.
fn read_header(file: &Arc<WeightFile>) -> Result<Vec<StoredTensor>, ModelError> {
    let bytes = file.bytes();
    let truncated = |want_bytes: u64| ModelError::Truncated {
        file: file.name.clone(),
        have_bytes: bytes.len() as u64,
        want_bytes,
    };
    let bad = |message: String| ModelError::BadHeader {
        file: file.name.clone(),
        message,
    };
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(bad("it is a Git LFS pointer; run git lfs pull".into()));
    }
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(truncated(8));
    };
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > HEADER_BYTES_MAX {
        return Err(bad(format!(
            "its header would be {header_bytes} bytes, more than {HEADER_BYTES_MAX}"
        )));
    }
    let header_bytes = header_bytes as usize; // at most 100 MiB
    let Some((header, data)) = rest.split_at_checked(header_bytes) else {
        return Err(truncated(8 + header_bytes as u64));
    };
    let value: Value = serde_json::from_slice(header)
        .map_err(|error| bad(format!("its header is not JSON: {error}")))?;
    let Value::Object(entries) = value else {
        return Err(bad("its header is not a JSON object".into()));
    };
    let mut tensors = Vec::new();
    let mut end = 0;
    for (name, entry) in entries.iter().filter(|(name, _)| *name != "__metadata__") {
        let (dtype, shape, span) =
            read_entry(entry).map_err(|why| bad(format!("tensor {name} {why}")))?;
        end = end.max(span.end);
        let start = 8 + header_bytes;
        let span = match (start.checked_add(span.start), start.checked_add(span.end)) {
            (Some(from), Some(to)) => from..to,
            _ => return Err(bad(format!("tensor {name} ends beyond any file"))),
        };
        tensors.push(StoredTensor {
            name: name.clone(),
            file: Arc::clone(file),
            dtype,
            shape,
            span,
        });
    }
    match end.cmp(&data.len()) {
        std::cmp::Ordering::Greater => Err(truncated((8 + header_bytes + end) as u64)),
        std::cmp::Ordering::Less => Err(bad(format!(
            "{} bytes follow its last tensor",
            data.len() - end
        ))),
        std::cmp::Ordering::Equal => Ok(tensors),
    }
}

/// One entry of a header: type, shape, and span within the data, checked against each other.
fn read_entry(entry: &Value) -> Result<(StoredType, Vec<usize>, Range<usize>), String> {
    let size = |value: &Value| value.as_u64().and_then(|size| usize::try_from(size).ok());
    let sizes = |key: &str| -> Option<Vec<usize>> {
        entry.get(key)?.as_array()?.iter().map(size).collect()
    };
    let dtype = StoredType::parse(
        entry
            .get("dtype")
            .and_then(Value::as_str)
            .ok_or("has no dtype")?,
    );
    let shape = sizes("shape").ok_or("has no shape")?;
    let span = match sizes("data_offsets").as_deref() {
        Some(&[start, end]) if start <= end => start..end,
        _ => return Err("has no data_offsets [start, end]".into()),
    };
    if let Some(bytes) = dtype.bytes() {
        let want = shape
            .iter()
            .try_fold(bytes, |product, dimension| product.checked_mul(*dimension));
        if want != Some(span.len()) {
            return Err(format!(
                "is {} bytes, not {dtype} of shape {shape:?}",
                span.len()
            ));
        }
    }
    Ok((dtype, shape, span))
}
