//! A safetensors file written in one pass: the header first, then every tensor where the header says.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use visor_kernels::{EncodeError, ScaleType, SquaredError, encode_rows};

use super::plan::{Action, Planned, Step, module, stored_bits};
use super::{GROUP, ModuleError, cannot_write};
use crate::error::ModelError;
use crate::weights::StoredTensor;

/// Values widened at a time: 16 MiB of f32, enough rows for every core.
const BLOCK_VALUES: usize = 4 << 20;
/// Bytes written at a time, from a multiple of as many on: a large page's. Linux keeps them in one then, and whoever maps the file has
/// an entry in the page table for all of them: both cores read a tenth to a sixth faster than in pages of 4 KiB (ext4, Linux 6.18).
const PAGE_BYTES: usize = 2 << 20;

/// What helps where a value is too large.
const FURTHER: &str = "; bf16 reaches further than f16";

/// A file whose header is written.
pub(crate) struct Writer {
    path: PathBuf,
    file: File,
    /// Less than a page, to be written behind what is in the file.
    page: Vec<u8>,
    bytes: u64,
    /// Bytes of all tensors that the header lists.
    pub(crate) tensor_bytes: u64,
}

impl Writer {
    /// Creates the file and writes the header of what will be put into it, in this order.
    pub(crate) fn create(
        path: &Path,
        tensors: &[Planned<'_>],
        float_type: ScaleType,
    ) -> Result<Self, ModelError> {
        let header = Header::of(tensors, float_type);
        let tensor_bytes = header.at as u64;
        let mut text = Value::Object(header.entries).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let file = File::create_new(path).map_err(|source| cannot_write(path, source))?;
        let mut writer = Self {
            path: path.to_owned(),
            file,
            page: Vec::with_capacity(PAGE_BYTES),
            bytes: 0,
            tensor_bytes,
        };
        writer.put(&(text.len() as u64).to_le_bytes())?;
        writer.put(&text)?;
        Ok(writer)
    }

    /// Appends the next bytes of the tensors.
    pub(crate) fn put(&mut self, mut bytes: &[u8]) -> Result<(), ModelError> {
        self.bytes += bytes.len() as u64;
        while self.page.len() + bytes.len() >= PAGE_BYTES {
            let (first, rest) = bytes.split_at(PAGE_BYTES - self.page.len());
            self.page.extend_from_slice(first);
            bytes = rest;
            let written = self.file.write_all(&self.page);
            written.map_err(|source| cannot_write(&self.path, source))?;
            self.page.clear();
        }
        self.page.extend_from_slice(bytes);
        Ok(())
    }

    /// Makes sure that all of it is on the disk, and tells its size.
    pub(crate) fn finish(mut self) -> Result<u64, ModelError> {
        let written = self.file.write_all(&self.page);
        written
            .and_then(|()| self.file.sync_all())
            .map_err(|source| cannot_write(&self.path, source))?;
        Ok(self.bytes)
    }
}

/// Bytes of tensors that a file would hold.
pub(super) fn tensor_bytes(tensors: &[Planned<'_>], float_type: ScaleType) -> u64 {
    Header::of(tensors, float_type).at as u64
}

struct Header {
    entries: Map<String, Value>,
    at: usize,
}

impl Header {
    fn of(tensors: &[Planned<'_>], float_type: ScaleType) -> Self {
        let metadata = json!({ "format": "mlx" });
        let mut header = Self {
            entries: Map::from_iter([("__metadata__".to_owned(), metadata)]),
            at: 0,
        };
        for planned in tensors {
            header.add_planned(planned, float_type);
        }
        header
    }

    fn add_planned(&mut self, planned: &Planned<'_>, float_type: ScaleType) {
        let (name, shape) = (planned.name, planned.shape);
        let float = (float_name(float_type), float_type.bytes());
        match planned.action {
            Action::Float => self.add(name, float, shape),
            Action::ChannelsLast => {
                self.add(name, float, &[shape[0], shape[2], shape[3], shape[1]]);
            }
            Action::Affine {
                rows,
                columns,
                bits,
            } => {
                let module = module(name);
                self.add(name, ("U32", 4), &[rows, columns / 32 * stored_bits(bits)]);
                for part in ["scales", "biases"] {
                    self.add(&format!("{module}.{part}"), float, &[rows, columns / GROUP]);
                }
            }
        }
    }

    fn add(&mut self, name: &str, (dtype, value_bytes): (&str, usize), shape: &[usize]) {
        let end = self.at + value_bytes * shape.iter().product::<usize>();
        let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [self.at, end] });
        self.entries.insert(name.to_owned(), entry);
        self.at = end;
    }
}

fn float_name(float_type: ScaleType) -> &'static str {
    match float_type {
        ScaleType::F16 => "F16",
        ScaleType::Bf16 => "BF16",
        ScaleType::F32 => "F32",
    }
}

/// Writes one tensor, block by block; for a quantized one, what that changed. `on_bytes` hears of the source's bytes that
/// are done and answers whether to go on.
pub(super) fn write_tensor(
    writer: &mut Writer,
    step: &Step<'_>,
    float_type: ScaleType,
    on_bytes: &mut dyn FnMut(u64) -> bool,
) -> Result<Option<ModuleError>, ModelError> {
    let tensor = step.tensor;
    let mut error = SquaredError::default();
    let (mut scales, mut biases) = (Vec::new(), Vec::new());
    let row_values = match step.action {
        Action::Affine { columns, .. } => columns,
        Action::ChannelsLast => tensor.shape[1..].iter().product(),
        Action::Float => 1,
    };
    let values: usize = tensor.shape.iter().product();
    let block = (BLOCK_VALUES / row_values.max(1)).max(1) * row_values.max(1);
    for start in (0..values).step_by(block) {
        let range = start..values.min(start + block);
        let mut floats = vec![0.0; range.len()];
        tensor.widen(range, &mut floats);
        match step.action {
            Action::Float => writer.put(&as_floats(tensor, &floats, float_type)?)?,
            Action::ChannelsLast => {
                let moved = channels_last(&floats, &tensor.shape);
                writer.put(&as_floats(tensor, &moved, float_type)?)?;
            }
            Action::Affine { columns, bits, .. } => {
                let rows = encode_rows(&floats, columns, (bits, GROUP), float_type)
                    .map_err(|error| refused(tensor, start / columns, error))?;
                writer.put(&rows.weight)?;
                scales.extend(rows.scales);
                biases.extend(rows.biases);
                error += rows.error;
            }
        }
        if !on_bytes((floats.len() * tensor.value_bytes()) as u64) {
            return Err(ModelError::Cancelled);
        }
    }
    writer.put(&scales)?;
    writer.put(&biases)?;
    Ok(match step.action {
        Action::Affine {
            rows,
            columns,
            bits,
        } => Some(ModuleError {
            module: module(&tensor.name).to_owned(),
            bits,
            rows,
            columns,
            relative: relative(error.encoded, error.weights),
            relative_by_ends: relative(error.ends, error.weights),
        }),
        _ => None,
    })
}

fn relative(error: f64, weights: f64) -> f64 {
    if weights > 0.0 {
        (error / weights).sqrt()
    } else {
        0.0
    }
}

/// Values in the float type; finite ones stay finite.
fn as_floats(
    tensor: &StoredTensor,
    values: &[f32],
    float_type: ScaleType,
) -> Result<Vec<u8>, ModelError> {
    let mut out = Vec::with_capacity(values.len() * float_type.bytes());
    for &value in values {
        if value.is_finite() && !float_type.rounded(value).is_finite() {
            let name = float_name(float_type);
            return Err(unfit(
                tensor,
                &format!("{value} does not fit {name}{FURTHER}"),
            ));
        }
        float_type.put(value, &mut out);
    }
    Ok(out)
}

/// (out, channel, row, column) as (out, row, column, channel), whole outputs.
fn channels_last(values: &[f32], shape: &[usize]) -> Vec<f32> {
    let (channels, pixels) = (shape[1], shape[2] * shape[3]);
    let mut out = Vec::with_capacity(values.len());
    for filter in values.chunks_exact(channels * pixels) {
        for pixel in 0..pixels {
            out.extend((0..channels).map(|channel| filter[channel * pixels + pixel]));
        }
    }
    out
}

fn refused(tensor: &StoredTensor, first_row: usize, error: EncodeError) -> ModelError {
    let hint = match error {
        EncodeError::Range { .. } => FURTHER,
        _ => "",
    };
    unfit(tensor, &format!("{}{hint}", error.after(first_row)))
}

fn unfit(tensor: &StoredTensor, message: &str) -> ModelError {
    ModelError::Unfit {
        name: tensor.name.clone(),
        file: tensor.file.name.clone(),
        message: message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_any_length_arrive_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        let mut writer = Writer::create(&path, &[], ScaleType::F16).unwrap();
        let head = usize::try_from(writer.bytes).unwrap();
        let lengths = [
            1,
            PAGE_BYTES - head - 2,
            1,
            0,
            3,
            2 * PAGE_BYTES,
            3 * PAGE_BYTES - 3,
            5,
        ];
        let bytes: Vec<u8> = (0..lengths.iter().sum())
            .map(|index: usize| (index % 251) as u8)
            .collect();
        let mut rest = &bytes[..];
        for length in lengths {
            let (piece, behind) = rest.split_at(length);
            writer.put(piece).unwrap();
            rest = behind;
        }
        let told = writer.finish().unwrap();
        let written = std::fs::read(&path).unwrap();
        assert_eq!(told, written.len() as u64);
        assert!(written[head..] == bytes, "all of it, in order");
    }
}
