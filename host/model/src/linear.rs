//! Weight matrices and the layers made of them: the one seam to the kernels.
//!
//! On the CPU a matrix stays as its file has it, mapped. INT4 and INT8 are multiplied as they are with activations of eight bits; where
//! floats are asked for, and any other type, a block of output rows at a time is widened to f32 and multiplied. On an
//! accelerator INT4 stays INT4 too, and anything else, INT8 among it, is a tensor of the compute type. Callers cannot tell.

mod device;
mod eight_bit;

use std::cell::Cell;

use candle_core::{DType, Device, Tensor};
use visor_kernels::{AffineRows, Kernel, ScaleType, StoredMatrix, StoredRows};

use self::device::DeviceWeight;
pub(crate) use self::eight_bit::{Between, Quantized, feed_forward};
use crate::config::PATCH_SIDE_PX;
use crate::error::ModelError;
use crate::progress::{LoadProgress, LoadStage};
use crate::rows::Rows;
use crate::table;
use crate::weights::{StoredTensor, StoredType, Weights};

/// Up to this many input rows each weight is widened once and used at once, without a block in memory: decoding.
const FEW_ROWS_MAX: usize = 4;
/// Weights widened at a time for more rows than that: 8 MiB of f32.
const BLOCK_VALUES: usize = 2 << 20;

/// A matrix (rows, columns) as its file has it.
pub(crate) struct WeightMatrix {
    rows: usize,
    columns: usize,
    source: Source,
}

enum Source {
    Floats(StoredTensor),
    Affine {
        parts: Box<[StoredTensor; 3]>,
        bits: usize,
        group: usize,
        scale_type: ScaleType,
    },
}

impl WeightMatrix {
    /// The matrix behind `name`, with the `.scales` and `.biases` beside it when it is quantized.
    fn find(
        weights: &Weights,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<Self, ModelError> {
        let weight = weights.get(name).ok_or_else(|| unlisted(name))?.clone();
        let source = match table::affine_parts(name, weights)? {
            None => Source::Floats(weight),
            Some([scales, biases]) => Source::Affine {
                bits: table::code_bits(&weight, columns).ok_or_else(|| unlisted(name))?,
                group: columns / scales.shape.get(1).copied().unwrap_or(1).max(1),
                scale_type: match scales.dtype {
                    StoredType::F16 => ScaleType::F16,
                    StoredType::Bf16 => ScaleType::Bf16,
                    _ => ScaleType::F32,
                },
                parts: Box::new([weight, scales.clone(), biases.clone()]),
            },
        };
        let matrix = Self {
            rows,
            columns,
            source,
        };
        matrix.try_view().map_err(|error| ModelError::BadHeader {
            file: name.to_owned(),
            message: error.to_string(),
        })?;
        Ok(matrix)
    }

    fn try_view(&self) -> Result<StoredMatrix<'_>, visor_kernels::ShapeError> {
        let data = match &self.source {
            Source::Affine { .. } => StoredRows::Affine(self.try_affine()?),
            Source::Floats(tensor) => match tensor.dtype {
                StoredType::F16 => StoredRows::F16(tensor.bytes()),
                StoredType::Bf16 => StoredRows::Bf16(tensor.bytes()),
                _ => StoredRows::F32(tensor.bytes()),
            },
        };
        StoredMatrix::new(data, self.rows, self.columns)
    }

    /// The matrix as codes with scales; a matrix of floats has none.
    fn try_affine(&self) -> Result<AffineRows<'_>, visor_kernels::ShapeError> {
        let Source::Affine {
            parts,
            bits,
            group,
            scale_type,
        } = &self.source
        else {
            return Err(visor_kernels::ShapeError("not a quantized matrix".into()));
        };
        AffineRows::new(
            parts.each_ref().map(StoredTensor::bytes),
            self.columns,
            (*bits, *group),
            *scale_type,
        )
    }

    /// The matrix as the integer kernels take it: INT4 or INT8 in groups of whole blocks.
    fn blocked(&self) -> Option<AffineRows<'_>> {
        self.try_affine().ok().filter(AffineRows::is_blocked)
    }

    fn view(&self) -> StoredMatrix<'_> {
        self.try_view()
            .expect("the shape was checked when the matrix was found")
    }

    /// Values per row.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes in the file.
    fn bytes(&self) -> u64 {
        let parts = match &self.source {
            Source::Affine { parts, .. } => parts.as_slice(),
            Source::Floats(tensor) => std::slice::from_ref(tensor),
        };
        parts.iter().map(|part| part.bytes().len() as u64).sum()
    }

    /// Some rows as f32, one after the other: an embedding look-up. Only these rows are converted.
    ///
    /// # Panics
    /// When an id is not below `rows`; callers check ids first.
    pub(crate) fn gather(&self, ids: &[u32]) -> Vec<f32> {
        let view = self.view();
        let mut out = vec![0.0; ids.len() * self.columns];
        for (&id, row) in ids.iter().zip(out.chunks_exact_mut(self.columns)) {
            view.widen_row(id as usize, row);
        }
        out
    }

    /// All of it as f32, (rows, columns).
    fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.columns];
        self.view().widen_rows(0..self.rows, &mut out);
        out
    }

    /// `x` (n, columns) times the transposed matrix: (n, rows). Any split of n gives the same sums up to the order in
    /// which `gemm` adds, and up to four rows at a time exactly the same.
    fn multiply(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (n, _) = x.dims2()?;
        let view = self.view();
        if n <= FEW_ROWS_MAX {
            let sums = view.multiply_few(&x.flatten_all()?.to_vec1::<f32>()?);
            return Tensor::from_vec(sums, (n, self.rows), x.device());
        }
        let block_rows = (BLOCK_VALUES / self.columns).clamp(16, self.rows.max(16));
        let mut parts = Vec::new();
        for start in (0..self.rows).step_by(block_rows) {
            let end = (start + block_rows).min(self.rows);
            let mut block = vec![0.0; (end - start) * self.columns];
            view.widen_rows(start..end, &mut block);
            let block = Tensor::from_vec(block, (end - start, self.columns), x.device())?;
            parts.push(x.matmul(&block.t()?)?);
        }
        if parts.len() == 1 {
            Ok(parts.remove(0))
        } else {
            Tensor::cat(&parts, 1)
        }
    }
}

/// `x W^T + b` on rows.
pub(crate) struct Linear {
    weight: LinearWeight,
    bias: Option<Tensor>,
}

enum LinearWeight {
    /// On the CPU: stored as the file has it; with a kernel, multiplied by it where it can.
    Stored(Box<WeightMatrix>, Option<Kernel>),
    /// On an accelerator.
    Device(DeviceWeight),
}

impl Linear {
    /// Whether every row is multiplied by the integer kernel, so that it gives the same among any others.
    pub(crate) fn is_integer(&self) -> bool {
        self.integer().is_some()
    }

    /// The matrix as the integer kernels take it, with what multiplies it.
    fn integer(&self) -> Option<(AffineRows<'_>, Kernel)> {
        match &self.weight {
            LinearWeight::Stored(matrix, Some(kernel)) => Some((matrix.blocked()?, *kernel)),
            _ => None,
        }
    }

    fn bias(&self) -> candle_core::Result<Option<Vec<f32>>> {
        self.bias.as_ref().map(Tensor::to_vec1).transpose()
    }

    /// (n, in) to (n, out).
    pub(crate) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let out = match &self.weight {
            LinearWeight::Stored(matrix, None) => matrix.multiply(x)?,
            LinearWeight::Stored(_, Some(_)) => {
                let (mut quantized, mut out) = (Quantized::default(), Rows::default());
                let rows = Rows::of(x)?;
                quantized.set(&rows, &[self]);
                self.forward_rows(&rows, &quantized, &mut out)?;
                return out.to_tensor();
            }
            LinearWeight::Device(weight) => weight.forward(x)?,
        };
        match &self.bias {
            Some(bias) => out.broadcast_add(bias),
            None => Ok(out),
        }
    }
}

/// Builds the parts of the model from weights that were checked against the table.
pub(crate) struct Loader<'a> {
    pub(crate) weights: &'a Weights,
    pub(crate) device: &'a Device,
    pub(crate) dtype: DType,
    /// Matrices stay as their files have them instead of becoming tensors of `dtype`: the CPU, in f32.
    pub(crate) stored: bool,
    /// What multiplies INT4 and INT8 matrices with activations of eight bits; none where activations are floats.
    pub(crate) kernel: Option<Kernel>,
    pub(crate) progress: &'a dyn Fn(LoadProgress),
    pub(crate) bytes_done: Cell<u64>,
}

impl Loader<'_> {
    /// The matrix of `module`, (rows, columns) as the table says.
    pub(crate) fn matrix(
        &self,
        module: &str,
        rows: usize,
        columns: usize,
    ) -> Result<WeightMatrix, ModelError> {
        let matrix = WeightMatrix::find(self.weights, &format!("{module}.weight"), rows, columns)?;
        self.count(matrix.bytes());
        Ok(matrix)
    }

    /// A matrix as a tensor of the compute type, for the small tables that are added whole.
    pub(crate) fn matrix_tensor(
        &self,
        module: &str,
        rows: usize,
        columns: usize,
    ) -> Result<Tensor, ModelError> {
        let values = self.matrix(module, rows, columns)?.to_f32();
        self.place(values, &[rows, columns])
    }

    /// A linear layer without bias.
    pub(crate) fn linear(
        &self,
        module: &str,
        rows: usize,
        columns: usize,
    ) -> Result<Linear, ModelError> {
        let matrix = self.matrix(module, rows, columns)?;
        self.linear_of(matrix)
    }

    /// A linear layer with bias.
    pub(crate) fn linear_with_bias(
        &self,
        module: &str,
        rows: usize,
        columns: usize,
    ) -> Result<Linear, ModelError> {
        let mut linear = self.linear(module, rows, columns)?;
        linear.bias = Some(self.floats(&format!("{module}.bias"), &[rows])?);
        Ok(linear)
    }

    /// A float tensor in the compute type, given the shape it is used in.
    pub(crate) fn floats(&self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        let tensor = self.weights.get(name).ok_or_else(|| unlisted(name))?;
        self.count(tensor.bytes().len() as u64);
        let values = tensor.to_f32().ok_or_else(|| unlisted(name))?;
        self.place(values, shape)
    }

    /// The patch convolution as a linear layer over unfolded patches, and whether a patch unfolds as (row, column,
    /// channel) instead of (channel, row, column): MLX stores the former, and the stored rows are used as they are.
    pub(crate) fn patches(&self, module: &str, rows: usize) -> Result<(Linear, bool), ModelError> {
        let name = format!("{module}.weight");
        let tensor = self.weights.get(&name).ok_or_else(|| unlisted(&name))?;
        let channels_last = tensor.shape.last() == Some(&3);
        Ok((
            self.linear(module, rows, 3 * PATCH_SIDE_PX * PATCH_SIDE_PX)?,
            channels_last,
        ))
    }

    fn linear_of(&self, matrix: WeightMatrix) -> Result<Linear, ModelError> {
        let weight = if self.stored {
            LinearWeight::Stored(Box::new(matrix), self.kernel)
        } else {
            LinearWeight::Device(self.device_weight(&matrix)?)
        };
        Ok(Linear { weight, bias: None })
    }

    fn device_weight(&self, matrix: &WeightMatrix) -> Result<DeviceWeight, ModelError> {
        if let Ok(rows) = matrix.try_affine()
            && let Some(weight) = DeviceWeight::int4(&rows, self.device)?
        {
            return Ok(weight);
        }
        let shape = [matrix.rows, matrix.columns];
        Ok(DeviceWeight::Floats(self.place(matrix.to_f32(), &shape)?))
    }

    fn place(&self, values: Vec<f32>, shape: &[usize]) -> Result<Tensor, ModelError> {
        // Converted before it travels, so that the device never holds both forms.
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?
            .to_dtype(self.dtype)?
            .to_device(self.device)?)
    }

    fn count(&self, bytes: u64) {
        self.bytes_done.set(self.bytes_done.get() + bytes);
        (self.progress)(LoadProgress {
            stage: LoadStage::Loading,
            bytes_done: self.bytes_done.get(),
            bytes_total: self.weights.bytes(),
        });
    }
}

/// A tensor that the table does not list, or that was not checked against it: a bug, not a bad checkpoint.
fn unlisted(name: &str) -> ModelError {
    ModelError::MissingTensor {
        name: name.to_owned(),
        files: "the checked table".into(),
        hint: "this is a bug in visor, please report it".into(),
    }
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::*;

    const ROWS: usize = 70_001;
    const COLUMNS: usize = 64;

    /// A weight file with some matrices.
    pub(super) fn embedded(matrices: &[(&str, Dtype, [usize; 2], Vec<u8>)]) -> Weights {
        let views = matrices.iter().map(|(name, dtype, shape, bytes)| {
            let view = TensorView::new(*dtype, shape.to_vec(), bytes);
            (*name, view.unwrap())
        });
        let file = safetensors::serialize(views, None).unwrap();
        Weights::embedded("test", Vec::leak(file)).unwrap()
    }

    /// A weight file with one f32 matrix of more than two blocks, small integers so that every sum is exact.
    fn weights() -> Weights {
        let value = |index: usize| ((index * 31 + index / COLUMNS) % 13) as f32 - 6.0;
        let data: Vec<u8> = (0..ROWS * COLUMNS)
            .flat_map(|index| value(index).to_le_bytes())
            .collect();
        embedded(&[("m.weight", Dtype::F32, [ROWS, COLUMNS], data)])
    }

    #[test]
    fn rows_multiply_alike_alone_and_in_a_block() {
        const { assert!(ROWS * COLUMNS > 2 * BLOCK_VALUES) };
        let weights = weights();
        let matrix = WeightMatrix::find(&weights, "m.weight", ROWS, COLUMNS).unwrap();
        let n = FEW_ROWS_MAX + 2;
        let values: Vec<f32> = (0..n * COLUMNS)
            .map(|index| (index * 7 % 11) as f32 - 5.0)
            .collect();
        let x = Tensor::from_vec(values, (n, COLUMNS), &Device::Cpu).unwrap();
        let together = matrix.multiply(&x).unwrap().to_vec2::<f32>().unwrap();
        for (row, together) in together.iter().enumerate() {
            let alone = matrix.multiply(&x.narrow(0, row, 1).unwrap()).unwrap();
            assert!(alone.to_vec2::<f32>().unwrap()[0] == *together, "row {row}");
        }
        let last = matrix.gather(&[(ROWS - 1) as u32]);
        let want: f32 = last
            .iter()
            .zip(x.to_vec2::<f32>().unwrap()[0].iter())
            .map(|(a, b)| a * b)
            .sum();
        assert_eq!(together[0][ROWS - 1], want);
    }
}
