//! Weight matrices and the layers made of them: the one seam to the kernels.
//!
//! On the CPU a matrix stays as its file has it, mapped. INT4 and INT8 are multiplied as they are with activations of eight bits; where
//! floats are asked for, and any other type, a block of output rows at a time is widened to f32 and multiplied. On an
//! accelerator INT4 stays INT4 too, and anything else, INT8 among it, is a tensor of the compute type. Callers cannot tell.

mod device;

use std::cell::Cell;

use candle_core::{DType, Device, Tensor};
use visor_kernels::{
    Activation, AffineRows, Kernel, QuantizedRows, ScaleType, StoredMatrix, StoredRows,
};

use self::device::DeviceWeight;
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

    /// (n, in) to (n, out).
    pub(crate) fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let out = match &self.weight {
            LinearWeight::Stored(matrix, None) => matrix.multiply(x)?,
            LinearWeight::Stored(_, Some(kernel)) => {
                let (mut quantized, mut out) = (Quantized::default(), Rows::default());
                let rows = Rows::of(x)?;
                quantized.set(*kernel, &rows, &[self]);
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

/// The eight-bit forms of rows that the layers take which they are for.
#[derive(Default)]
pub(crate) struct Quantized {
    /// In front, those that hold these rows; behind them memory to use again.
    forms: Vec<QuantizedRows>,
    count: usize,
}

impl Quantized {
    /// What each of the layers takes: one form, more where their weights have different bits, none where these are floats.
    pub(crate) fn set(&mut self, kernel: Kernel, rows: &Rows, layers: &[&Linear]) {
        self.count = 0;
        for layer in layers {
            let Some((weights, _)) = layer.integer() else {
                continue;
            };
            if self.of(&weights).is_none() {
                self.next().fill(
                    kernel,
                    &rows.values,
                    rows.columns,
                    weights.activation_steps(),
                );
            }
        }
    }

    /// Memory for one more form.
    fn next(&mut self) -> &mut QuantizedRows {
        if self.count == self.forms.len() {
            self.forms.push(QuantizedRows::default());
        }
        self.count += 1;
        &mut self.forms[self.count - 1]
    }

    /// The form that these weights take.
    fn of(&self, weights: &AffineRows<'_>) -> Option<&QuantizedRows> {
        let mut forms = self.forms[..self.count].iter();
        forms.find(|form| form.steps() == weights.activation_steps())
    }
}

impl Linear {
    /// The matrix as the integer kernels take it, with what multiplies it.
    fn integer(&self) -> Option<(AffineRows<'_>, Kernel)> {
        match &self.weight {
            LinearWeight::Stored(matrix, Some(kernel)) => Some((matrix.blocked()?, *kernel)),
            _ => None,
        }
    }

    /// The same on plain rows: INT4 and INT8 by the integer kernel with the rows' eight-bit form, anything else with the rows.
    pub(crate) fn forward_rows(
        &self,
        x: &Rows,
        quantized: &Quantized,
        out: &mut Rows,
    ) -> candle_core::Result<()> {
        match (self.integer(), &self.weight) {
            (Some((weights, kernel)), _) => {
                let quantized = quantized.of(&weights).expect("set for this layer");
                assert_eq!(x.count(), quantized.rows(), "two forms of one thing");
                self.forward_quantized((weights, kernel), quantized, out)?;
            }
            (_, LinearWeight::Stored(matrix, _)) => {
                *out = Rows::of(&matrix.multiply(&x.to_tensor()?)?)?;
                if let Some(bias) = self.bias()? {
                    out.add_to_each(&bias);
                }
            }
            _ => *out = Rows::of(&self.forward(&x.to_tensor()?)?)?,
        }
        Ok(())
    }

    fn forward_quantized(
        &self,
        (weights, kernel): (AffineRows<'_>, Kernel),
        x: &QuantizedRows,
        out: &mut Rows,
    ) -> candle_core::Result<()> {
        let bias = self.bias()?;
        out.reshape(x.rows(), weights.rows());
        visor_kernels::multiply(kernel, &weights, x, bias.as_deref(), &mut out.values);
        Ok(())
    }

    fn bias(&self) -> candle_core::Result<Option<Vec<f32>>> {
        self.bias.as_ref().map(Tensor::to_vec1).transpose()
    }
}

/// What lies between the two layers of a feed-forward: memory that is used again.
#[derive(Default)]
pub(crate) struct Between {
    wide: Rows,
    activated: Rows,
    forms: Quantized,
    /// What the kernel makes of both.
    quantized: QuantizedRows,
}

/// Two layers and the activation between them, on plain rows. Where both are the kernel's, what is between them becomes eight bits as
/// soon as it is made.
pub(crate) fn feed_forward(
    (first, activation, second): (&Linear, Activation, &Linear),
    (kernel, x, quantized): (Kernel, &Rows, &Quantized),
    s: &mut Between,
    out: &mut Rows,
) -> candle_core::Result<()> {
    match (first.integer(), second.integer()) {
        (Some((weights, kernel)), Some(next)) => {
            let bias = first.bias()?;
            let x = quantized.of(&weights).expect("set for this layer");
            let activation = (activation, next.0.activation_steps());
            let weights = (&weights, bias.as_deref());
            let between = &mut s.quantized;
            visor_kernels::multiply_activated(kernel, weights, x, activation, between);
            second.forward_quantized(next, between, out)
        }
        _ => {
            first.forward_rows(x, quantized, &mut s.wide)?;
            s.activated.set_activated(&s.wide, activation, kernel);
            s.forms.set(kernel, &s.activated, &[second]);
            second.forward_rows(&s.activated, &s.forms, out)
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
    use super::*;

    const ROWS: usize = 70_001;
    const COLUMNS: usize = 64;

    /// A weight file with one f32 matrix of more than two blocks, small integers so that every sum is exact.
    fn weights() -> Weights {
        let value = |index: usize| ((index * 31 + index / COLUMNS) % 13) as f32 - 6.0;
        let data: Vec<u8> = (0..ROWS * COLUMNS)
            .flat_map(|index| value(index).to_le_bytes())
            .collect();
        let header = format!(
            "{{\"m.weight\":{{\"dtype\":\"F32\",\"shape\":[{ROWS},{COLUMNS}],\"data_offsets\":[0,{}]}}}}",
            data.len()
        );
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&data);
        Weights::embedded("test", Vec::leak(bytes)).unwrap()
    }

    /// Matrices `four`, `eight` and `floats`, 64 x 64.
    fn of_each_kind() -> Weights {
        const SIDE: usize = 64;
        let codes = |bytes: usize| (0..bytes).map(|index| (index * 37 % 251) as u8);
        let halves = |value: f32| half::f16::from_f32(value).to_le_bytes().repeat(SIDE);
        let floats = (0..SIDE * SIDE).flat_map(|index| (index as f32 % 7.0 - 3.0).to_le_bytes());
        let tensors: [(&str, &str, usize, Vec<u8>); 7] = [
            (
                "four.weight",
                "U32",
                SIDE / 8,
                codes(SIDE * SIDE / 2).collect(),
            ),
            ("four.scales", "F16", 1, halves(0.01)),
            ("four.biases", "F16", 1, halves(-0.08)),
            (
                "eight.weight",
                "U32",
                SIDE / 4,
                codes(SIDE * SIDE).collect(),
            ),
            ("eight.scales", "F16", 1, halves(0.001)),
            ("eight.biases", "F16", 1, halves(-0.1)),
            ("floats.weight", "F32", SIDE, floats.collect()),
        ];
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, dtype, columns, bytes) in tensors {
            let span = [data.len(), data.len() + bytes.len()];
            let entry = serde_json::json!({
                "dtype": dtype, "shape": [SIDE, columns], "data_offsets": span
            });
            header.insert(name.to_owned(), entry);
            data.extend(bytes);
        }
        let header = serde_json::Value::Object(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&data);
        Weights::embedded("test", Vec::leak(bytes)).unwrap()
    }

    /// Layers that share an input may be stored in different ways: each takes the form it needs, also where it was made before for others.
    #[test]
    fn layers_of_any_kind_take_the_same_rows() {
        let weights = of_each_kind();
        let kernel = Kernel::detect().unwrap_or(Kernel::Scalar);
        let layer = |name: &str| {
            let matrix = WeightMatrix::find(&weights, &format!("{name}.weight"), 64, 64).unwrap();
            let weight = LinearWeight::Stored(Box::new(matrix), Some(kernel));
            Linear { weight, bias: None }
        };
        let (four, eight, floats) = (layer("four"), layer("eight"), layer("floats"));
        let mut quantized = Quantized::default();
        let (mut out, mut between) = (Rows::default(), Between::default());
        for (seed, layers) in [
            (1, &[&four, &eight, &floats][..]),
            (2, &[&eight]),
            (3, &[&floats]),
            (4, &[&floats, &eight, &four]),
        ] {
            let values = (0..9 * 64).map(|index| (index * seed % 23) as f32 - 11.0);
            let x = Rows {
                values: values.collect(),
                columns: 64,
            };
            quantized.set(kernel, &x, layers);
            for first in layers {
                first.forward_rows(&x, &quantized, &mut out).unwrap();
                let alone = first.forward(&x.to_tensor().unwrap()).unwrap();
                assert_eq!(out, Rows::of(&alone).unwrap(), "{seed}");
                for second in [&four, &eight, &floats] {
                    let mut wide = Rows::default();
                    wide.set_activated(&Rows::of(&alone).unwrap(), Activation::QuickGelu, kernel);
                    let want = second.forward(&wide.to_tensor().unwrap()).unwrap();
                    let layers = (*first, Activation::QuickGelu, second);
                    feed_forward(layers, (kernel, &x, &quantized), &mut between, &mut out).unwrap();
                    assert_eq!(out, Rows::of(&want).unwrap(), "{seed}");
                }
            }
        }
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
