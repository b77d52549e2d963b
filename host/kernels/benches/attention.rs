//! `cargo bench -p visor-kernels --bench attention`: one layer's attention at the true shapes.
#![expect(clippy::print_stdout, reason = "printing is what a benchmark does")]

use std::time::Instant;

use half::f16;
use visor_kernels::{AttentionInput, AttentionShape, HalfRows, HeadRows, Kernel, Way, attend};

/// Positions of a block of the KV cache.
const PAGE_ROWS: usize = 64;

fn main() {
    visor_kernels::allocator::return_large_blocks();
    visor_kernels::on_pool(|| {
        let tower = AttentionShape {
            heads: 16,
            kv_heads: 16,
            head_dim: 64,
            causal: false,
        };
        measure("a crop of the tower", tower, (577, 577), Way::Rounded);
        measure("the same in f32", tower, (577, 577), Way::Tiled);
        let decoder = AttentionShape {
            heads: 32,
            kv_heads: 32,
            head_dim: 96,
            causal: true,
        };
        measure("prefill of 757", decoder, (757, 757), Way::Tiled);
        measure("its first 128", decoder, (128, 128), Way::Tiled);
        measure("128 behind 512 of it", decoder, (128, 640), Way::Tiled);
        measure(
            "prefill of 512 behind 1997",
            decoder,
            (512, 2509),
            Way::Tiled,
        );
        measure("decode behind 757", decoder, (1, 758), Way::Alone);
    });
}

fn measure(name: &str, shape: AttentionShape, (rows, keys): (usize, usize), way: Way) {
    let kernel = Kernel::detect().unwrap_or(Kernel::Scalar);
    let width = shape.heads * shape.head_dim;
    let queries: Vec<f32> = (0..rows * width)
        .map(|index| (index % 17) as f32 / 17.0 - 0.5)
        .collect();
    // Several layers' caches, so that none stays in the processor's, in blocks of 64 positions, laid out as the model's.
    let layers = if rows == 1 { 32 } else { 2 };
    let part = PAGE_ROWS * width;
    let blocks: Vec<Vec<f16>> = (0..keys.div_ceil(PAGE_ROWS))
        .map(|_| {
            (0..layers * 2 * part)
                .map(|index| f16::from_f32((index % 13) as f32 / 13.0 - 0.5))
                .collect()
        })
        .collect();
    let pages: Vec<&[f16]> = blocks.iter().map(Vec::as_slice).collect();
    // As a layer of the tower has them: f32, the heads of a row side by side.
    let picture: Vec<f32> = (0..2 * keys * width)
        .map(|index| (index % 13) as f32 / 13.0 - 0.5)
        .collect();
    let mut out = vec![0.0; rows * width];
    let mut times = Vec::new();
    for run in 0..if rows == 1 { 96 } else { 6 } {
        let layer = run % layers * 2 * part;
        let rows_of = |head: usize| {
            [0, 1].map(|side| {
                if way == Way::Rounded {
                    let all = &picture[side * keys * width..][..keys * width];
                    return HeadRows::F32(&all[head * shape.head_dim..], width);
                }
                HeadRows::F16(HalfRows {
                    pages: &pages,
                    page_rows: PAGE_ROWS,
                    offset: layer + (2 * head + side) * PAGE_ROWS * shape.head_dim,
                    stride: shape.head_dim,
                })
            })
        };
        let input = AttentionInput {
            queries: &queries,
            query_stride: width,
            rows,
            keys,
            way,
            key_values: &rows_of,
        };
        let start = Instant::now();
        attend(kernel, shape, &input, &mut out);
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let seconds = times[times.len() / 2];
    let seen: usize = (0..rows)
        .map(|row| {
            if shape.causal {
                keys - rows + row + 1
            } else {
                keys
            }
        })
        .sum();
    let flop = 4.0 * (seen * width) as f64;
    println!(
        "{name:>28}: {:8.3} ms  {:6.1} GFLOP/s  {:5.1} GB/s of keys and values",
        seconds * 1e3,
        flop / seconds / 1e9,
        (4 * keys * shape.kv_heads * shape.head_dim) as f64 / seconds / 1e9
    );
}
