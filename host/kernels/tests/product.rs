//! Every kernel this processor has against the specification, to the bit.
#![expect(clippy::unwrap_used, reason = "helpers of tests panic like tests")]

use visor_kernels::{
    Activation, AffineRows, Kernel, QuantizedRows, ScaleType, multiply, multiply_activated,
};

/// Uniform numbers of a fixed seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        self.0 >> 33
    }

    fn unit(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 31) as f32 * 2.0 - 1.0
    }
}

struct Matrix {
    parts: [Vec<u8>; 3],
    columns: usize,
    form: (usize, usize), // bits and group
    scale_type: ScaleType,
}

impl Matrix {
    fn random(
        random: &mut Random,
        (rows, columns): (usize, usize),
        (bits, group): (usize, usize),
        scale_type: ScaleType,
    ) -> Self {
        // Of seven bits in bytes in the first half of the rows: where a kernel asks whether all codes are, both answers are there.
        let seven = if bits == 7 {
            rows.max(2) / 2 * columns
        } else {
            0
        };
        let bits = usize::next_power_of_two(bits);
        let weight = (0..rows * columns / 8 * bits)
            .map(|index| random.next() as u8 & if index < seven { 0x7F } else { 0xFF })
            .collect();
        let mut line = |size: f32| {
            let mut out = Vec::new();
            for index in 0..rows * columns / group {
                // Zero, negative and huge ones among them.
                let value = [0.0, 1.0, -1.0, 3e4][index % 4] * size * random.unit();
                scale_type.put(value, &mut out);
            }
            out
        };
        Self {
            parts: [weight, line(1.0), line(0.5)],
            columns,
            form: (bits, group),
            scale_type,
        }
    }

    fn view(&self) -> AffineRows<'_> {
        let [weight, scales, biases] = &self.parts;
        let parts: [&[u8]; 3] = [weight, scales, biases];
        AffineRows::new(parts, self.columns, self.form, self.scale_type).unwrap()
    }
}

fn product(kernel: Kernel, weights: &AffineRows<'_>, x: &[f32]) -> Vec<f32> {
    let x = QuantizedRows::new(kernel, x, weights.columns(), weights.activation_steps());
    let mut out = vec![f32::NAN; x.rows() * weights.rows()];
    multiply(kernel, weights, &x, None, &mut out);
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Rows of weights, columns, rows of activations: every height of a tile, tails, stretches of blocks, chunks of rows.
const SHAPES: [(usize, usize, usize); 40] = [
    (1, 128, 1),
    (9, 64, 1),
    (9, 64, 7),
    (3, 64 * 9, 1),
    (8, 128, 1),
    (9, 128, 2),
    (16, 256, 3),
    (17, 640, 4),
    (24, 128, 5),
    (31, 1152, 6),
    (40, 128, 7),
    (26, 192, 8),
    (33, 640, 9),
    (8, 128, 10),
    (40, 256, 11),
    (200, 128, 1),
    (7, 128, 13),
    (40, 1536, 14),
    (24, 512, 12),
    (70, 640, 65),
    (150, 128, 241),
    (24, 64, 500),
    (70, 320, 586),
    (40, 1024, 1),
    (87, 3072, 2),
    (32, 1024, 3),
    (9, 8192, 1),
    (33, 8192, 2),
    (64, 8192, 3),
    (64, 8192, 4),
    (72, 8192, 5),
    (64, 8192, 6),
    (49, 8192, 7),
    (64, 8192, 8),
    (64, 8192, 9),
    (70, 8192, 10),
    (64, 16384, 1),
    (64, 16384, 5),
    (70, 1152, 66),
    (40, 2112, 300),
];

#[test]
fn every_kernel_gives_the_bits_of_the_specification() {
    let mut random = Random(1);
    println!(
        "kernels: {:?}",
        Kernel::available()
            .iter()
            .map(|kernel| kernel.name())
            .collect::<Vec<_>>()
    );
    for scale_type in [ScaleType::F16, ScaleType::Bf16, ScaleType::F32] {
        let forms = match scale_type {
            ScaleType::F16 => &[(4, 64), (4, 128), (7, 64), (8, 64), (8, 128)][..],
            ScaleType::Bf16 => &[(4, 64), (4, 128), (7, 64), (8, 64)],
            ScaleType::F32 => &[(4, 64), (4, 128)],
        };
        for &form in forms {
            for (rows, columns, m) in SHAPES {
                if columns % form.1 != 0 {
                    continue;
                }
                let matrix = Matrix::random(&mut random, (rows, columns), form, scale_type);
                let x: Vec<f32> = (0..m * columns).map(|_| random.unit() * 4.0).collect();
                let want = product(Kernel::Scalar, &matrix.view(), &x);
                assert!(want.iter().all(|value| value.is_finite()));
                for kernel in Kernel::available() {
                    let got = product(kernel, &matrix.view(), &x);
                    assert_eq!(
                        bits(&got),
                        bits(&want),
                        "{} {scale_type:?} {form:?} {rows}x{columns} {m}",
                        kernel.name()
                    );
                }
            }
        }
    }
}

/// Codes above 127 somewhere in a row, and none before or behind them: how products are added up changes on the way.
#[test]
fn a_row_may_have_codes_of_seven_bits_and_of_eight() {
    let mut random = Random(9);
    let (rows, columns, m) = (24, 64 * 40, 70);
    let mut matrix = Matrix::random(&mut random, (rows, columns), (8, 64), ScaleType::F16);
    let x: Vec<f32> = (0..m * columns).map(|_| random.unit()).collect();
    let codes = matrix.parts[0].clone();
    for eight in [0..1, 64 * 20..64 * 20 + 1, columns - 1..columns, 0..64 * 16] {
        for (index, (code, whole)) in matrix.parts[0].iter_mut().zip(&codes).enumerate() {
            let is_whole = eight.contains(&(index % columns));
            *code = if is_whole { whole | 0x80 } else { whole & 0x7F };
        }
        let want = product(Kernel::Scalar, &matrix.view(), &x);
        for kernel in Kernel::available() {
            let got = product(kernel, &matrix.view(), &x);
            assert_eq!(bits(&got), bits(&want), "{} {eight:?}", kernel.name());
        }
    }
}

#[test]
fn quantized_activations_are_the_same_to_the_bit() {
    let mut random = Random(2);
    let mut x: Vec<f32> = (0..64 * 64).map(|_| random.unit()).collect();
    for (block, values) in x.chunks_exact_mut(64).enumerate() {
        match block {
            0 => values.fill(0.0),
            1 => values.fill(1e-38),
            2 => values[63] = f32::NAN,
            3 => values[0] = f32::NEG_INFINITY,
            4 => values.fill(f32::MAX),
            5 => values[17] = -f32::MAX,
            6 => values
                .iter_mut()
                .enumerate()
                .for_each(|(k, v)| *v = k as f32 - 63.5), // ties
            7 => values
                .iter_mut()
                .enumerate()
                .for_each(|(k, v)| *v = if k == 9 { -127.0 } else { k as f32 - 31.5 }),
            8 => values.fill(-0.0),
            _ => values
                .iter_mut()
                .for_each(|value| *value *= 10f32.powi(block as i32 - 30)),
        }
    }
    for steps in [127, 64] {
        let quantized = |kernel| format!("{:?}", QuantizedRows::new(kernel, &x, 64 * 8, steps));
        for kernel in Kernel::available() {
            assert_eq!(
                quantized(kernel),
                quantized(Kernel::Scalar),
                "{} {steps}",
                kernel.name()
            );
        }
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    let mut random = Random(3);
    let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    let shapes = [
        (128, 3, (4, ScaleType::F32)),
        (8192, 3, (4, ScaleType::F32)),
        (1024, 2, (4, ScaleType::F16)),
        (128, 3, (8, ScaleType::F16)),
    ];
    for ((columns, m, (bits, scale_type)), bad) in shapes
        .into_iter()
        .flat_map(|shape| bad.map(|bad| (shape, bad)))
    {
        let matrix = Matrix::random(&mut random, (16, columns), (bits, 64), scale_type);
        let mut x = vec![1.0; m * columns];
        x[columns + 70] = bad;
        for kernel in Kernel::available() {
            let out = product(kernel, &matrix.view(), &x);
            assert!(
                out[..16]
                    .iter()
                    .chain(&out[32..])
                    .all(|value| value.is_finite()),
                "{}",
                kernel.name()
            );
            assert!(
                out[16..32].iter().all(|value| value.is_nan()),
                "{}",
                kernel.name()
            );
        }
    }
}

/// All byte values against the largest activations of either sign: the 16-bit sums reach their bounds.
#[test]
fn extreme_codes_do_not_overflow() {
    let extremes = [(0xFFu8, 1.0f32), (0xFF, -1.0), (0xF0, 1.0), (0x0F, -1.0)];
    let shapes = [(128, 6), (128, 11), (8192, 3), (1024, 1), (1024, 2)];
    for ((code, sign), (columns, m)) in extremes
        .into_iter()
        .flat_map(|extreme| shapes.map(|shape| (extreme, shape)))
    {
        let mut scales = Vec::new();
        (0..16 * columns / 64).for_each(|_| ScaleType::F16.put(1.0, &mut scales));
        let biases = vec![0; scales.len()];
        let x = vec![sign * 127.0; m * columns];
        let nibbles = f32::from(code >> 4) + f32::from(code & 0xF);
        for (bits, code) in [(4, code), (8, code), (8, code & 0x7F)] {
            let per_column = if bits == 4 {
                nibbles / 2.0
            } else {
                f32::from(code)
            };
            let weight = vec![code; 16 * columns / 8 * bits];
            let parts: [&[u8]; 3] = [&weight, &scales, &biases];
            let weights = AffineRows::new(parts, columns, (bits, 64), ScaleType::F16).unwrap();
            for kernel in Kernel::available() {
                let out = product(kernel, &weights, &x);
                assert!(
                    out.iter()
                        .all(|&value| value == sign * 127.0 * columns as f32 * per_column),
                    "{} {bits}: {out:?}",
                    kernel.name()
                );
            }
        }
    }
}

/// A row's values do not depend on the rows beside it.
#[test]
fn rows_multiply_alike_alone_and_together() {
    let mut random = Random(4);
    for (form, columns, m) in [((4, 64), 1024, 19), ((4, 64), 8192, 5), ((8, 64), 1024, 12)] {
        let matrix = Matrix::random(&mut random, (48, columns), form, ScaleType::F16);
        let x: Vec<f32> = (0..m * columns).map(|_| random.unit()).collect();
        for kernel in Kernel::available() {
            let together = product(kernel, &matrix.view(), &x);
            for (row, x) in x.chunks_exact(columns).enumerate() {
                let alone = product(kernel, &matrix.view(), x);
                assert_eq!(
                    bits(&alone),
                    bits(&together[row * 48..(row + 1) * 48]),
                    "{} {row} of {columns}",
                    kernel.name()
                );
            }
        }
    }
}

/// A product, an activation and its eight bits as one are what they are one after the other.
#[test]
fn an_activation_between_products_changes_no_bit() {
    let mut random = Random(8);
    for (bits, (rows, columns, m)) in [4, 8].into_iter().flat_map(|bits| {
        [
            (128, 192, 0),
            (128, 192, 1),
            (128, 192, 3),
            (128, 192, 5),
            (256, 192, 10),
            (384, 192, 21),
            (128, 192, 77),
            (256, 1024, 1),
            (256, 1024, 2),
        ]
        .map(|shape| (bits, shape))
    }) {
        let matrix = Matrix::random(&mut random, (rows, columns), (bits, 64), ScaleType::F16);
        // The layer behind has other weights than this one.
        let (steps, next) = (
            matrix.view().activation_steps(),
            if bits == 4 { 64 } else { 127 },
        );
        let values: Vec<f32> = (0..m * columns).map(|_| random.unit()).collect();
        let bias: Vec<f32> = (0..rows).map(|_| random.unit() * 100.0).collect();
        for (kernel, bias) in Kernel::available()
            .into_iter()
            .flat_map(|kernel| [(kernel, None), (kernel, Some(&bias[..]))])
        {
            let x = QuantizedRows::new(kernel, &values, columns, steps);
            let mut product = vec![f32::NAN; m * rows];
            multiply(kernel, &matrix.view(), &x, bias, &mut product);
            let gated = product.chunks_exact(rows).flat_map(|row| {
                let ((gate, up), mut out) = (row.split_at(rows / 2), vec![0.0; rows / 2]);
                kernel.swiglu(gate, up, &mut out);
                out
            });
            let gated = QuantizedRows::new(kernel, &gated.collect::<Vec<_>>(), rows / 2, next);
            kernel.quick_gelu(&mut product);
            let plain = QuantizedRows::new(kernel, &product, rows, next);
            // Memory that was used for something larger.
            let mut got = QuantizedRows::new(kernel, &vec![1.0; 99 * 512], 512, 1);
            for (activation, want) in [(Activation::SwiGlu, gated), (Activation::QuickGelu, plain)]
            {
                let weights = (&matrix.view(), bias);
                multiply_activated(kernel, weights, &x, (activation, next), &mut got);
                assert!(got == want, "{} {activation:?} {rows} {m}", kernel.name());
            }
        }
    }
}

#[test]
fn a_bias_is_added_behind_the_product() {
    let mut random = Random(7);
    for (rows, m) in [(1, 1), (7, 3), (8, 5), (21, 12), (40, 8)] {
        let matrix = Matrix::random(&mut random, (rows, 128), (4, 64), ScaleType::F16);
        let values: Vec<f32> = (0..m * 128).map(|_| random.unit()).collect();
        let bias: Vec<f32> = (0..rows).map(|_| random.unit() * 100.0).collect();
        for kernel in Kernel::available() {
            let mut want = product(kernel, &matrix.view(), &values);
            for row in want.chunks_mut(rows) {
                row.iter_mut().zip(&bias).for_each(|(x, b)| *x += b);
            }
            let x = QuantizedRows::new(kernel, &values, 128, 127);
            let mut got = vec![f32::NAN; m * rows];
            multiply(kernel, &matrix.view(), &x, Some(&bias), &mut got);
            assert_eq!(bits(&got), bits(&want), "{} {rows} {m}", kernel.name());
        }
    }
}

/// Activations in 127 steps cost about half a hundredth of the product, in 64 a hundredth, on weights and activations as layers have
/// them.
#[test]
fn eight_bits_are_near_the_floats() {
    let mut random = Random(5);
    let (rows, columns, m) = (64, 1024, 4);
    let mut normal = |count: usize| -> Vec<f32> {
        (0..count)
            .map(|_| (0..6).map(|_| random.unit()).sum())
            .collect()
    };
    let (weights, x) = (normal(rows * columns), normal(m * columns));
    for (bits, group, most) in [
        (4, 64, 0.006),
        (7, 64, 0.012),
        (8, 64, 0.012),
        (8, 128, 0.012),
    ] {
        let form = (bits, group);
        let encoded = visor_kernels::encode_rows(&weights, columns, form, ScaleType::F16).unwrap();
        let parts: [&[u8]; 3] = [&encoded.weight, &encoded.scales, &encoded.biases];
        let form = (bits.next_power_of_two(), group);
        let view = AffineRows::new(parts, columns, form, ScaleType::F16).unwrap();
        let got = product(Kernel::Scalar, &view, &x);
        let (mut error, mut size) = (0.0, 0.0);
        let mut row = vec![0.0; columns];
        for n in 0..rows {
            view.dequantize_row(n, &mut row);
            for k in 0..m {
                let products = row.iter().zip(&x[k * columns..]);
                let want: f64 = products.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                error += (f64::from(got[k * rows + n]) - want).powi(2);
                size += want.powi(2);
            }
        }
        let relative = (error / size).sqrt();
        println!("{bits} {group}: relative error {relative:.5}");
        assert!(relative < most, "{bits} {group}: {relative}");
    }
}
