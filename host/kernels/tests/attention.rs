//! Attention of every kernel this processor has against the specification.

use std::ops::Range;

use half::f16;
use visor_kernels::{AttentionInput, AttentionShape, HalfRows, HeadRows, Kernel, Way, attend};

/// Sums of f32 in another order, and an exponential within 2e-7.
const TOLERANCE: f32 = 2e-5;
/// The same where numbers below 1 are rounded to 4095 steps and weights no coarser, for each unit of the queries' size: random
/// numbers stay below it. Scores of d columns err by 2 sqrt(d) log2(e) / 8190 at most.
const ROUNDED_TOLERANCE: f32 = 2e-4;

struct Case {
    shape: AttentionShape,
    rows: usize,
    keys: usize,
    way: Way,
    page_rows: usize,
}

/// Rows that a page of f16 holds: neither one nor a tile's; what the KV cache has; more than a tile.
const PAGE_ROWS: [usize; 3] = [24, 64, 100];

fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

impl Case {
    /// Keys and values as they are kept: f32 with all heads side by side in a row, (keys, kv_heads * head_dim + 5), f16 as pages (kv_heads, page_rows, head_dim).
    fn run(&self, kernel: Kernel, half: bool, size: f32) -> Vec<f32> {
        self.run_rows(kernel, half, size, 0..self.rows)
    }

    /// As `run`, of some of the queries: those behind them see no less, those before them are not there.
    fn run_rows(&self, kernel: Kernel, half: bool, size: f32, asked: Range<usize>) -> Vec<f32> {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.shape;
        let stride = heads * head_dim + 5;
        let queries: Vec<f32> = numbers(self.rows * stride, 1)
            .iter()
            .map(|x| x * size)
            .collect();
        let capacity = (self.keys + 3) * head_dim;
        let stored = [2, 3].map(|seed| numbers(kv_heads * capacity, seed));
        let pages16 = stored
            .each_ref()
            .map(|all| pages(all, self.page_rows, (kv_heads, head_dim), self.keys));
        let pages16 = pages16
            .each_ref()
            .map(|pages| pages.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let rows32 = stored
            .each_ref()
            .map(|all| side_by_side(all, kv_heads, head_dim, self.keys));
        let rows_of = |head: usize| {
            [0, 1].map(|part| {
                if half {
                    HeadRows::F16(HalfRows {
                        pages: &pages16[part],
                        page_rows: self.page_rows,
                        offset: head * self.page_rows * head_dim,
                        stride: head_dim,
                    })
                } else {
                    HeadRows::F32(&rows32[part][head * head_dim..], kv_heads * head_dim + 5)
                }
            })
        };
        let unseen = if self.shape.causal {
            self.rows - asked.end
        } else {
            0
        };
        let input = AttentionInput {
            queries: &queries[asked.start * stride..],
            query_stride: stride,
            rows: asked.len(),
            keys: self.keys - unseen,
            way: self.way,
            key_values: &rows_of,
        };
        let mut out = vec![f32::NAN; asked.len() * heads * head_dim];
        attend(kernel, self.shape, &input, &mut out);
        out
    }
}

/// The first rows of all heads side by side, NaN behind them.
fn side_by_side(all: &[f32], heads: usize, head_dim: usize, rows: usize) -> Vec<f32> {
    let capacity = all.len() / heads;
    let row = |row: usize| {
        let head = move |head: usize| &all[head * capacity + row * head_dim..][..head_dim];
        (0..heads).flat_map(head).copied().chain([f32::NAN; 5])
    };
    (0..rows).flat_map(row).collect()
}

/// The first rows of every head in pages, the last one's rest NaN.
fn pages(
    all: &[f32],
    page_rows: usize,
    (heads, head_dim): (usize, usize),
    rows: usize,
) -> Vec<Vec<f16>> {
    let capacity = all.len() / heads;
    let page = |first: usize| {
        let mut page = vec![f16::NAN; heads * page_rows * head_dim];
        for head in 0..heads {
            let count = page_rows.min(rows - first) * head_dim;
            let from = &all[head * capacity + first * head_dim..][..count];
            for (to, from) in page[head * page_rows * head_dim..].iter_mut().zip(from) {
                *to = f16::from_f32(*from);
            }
        }
        page
    };
    (0..rows).step_by(page_rows).map(page).collect()
}

/// One head; as many queries and keys as there are rows of them. In f16 where queries go alone.
fn one_head(
    kernel: Kernel,
    (way, causal): (Way, bool),
    head_dim: usize,
    [queries, keys, values]: [&[f32]; 3],
) -> Vec<f32> {
    let halves =
        [keys, values].map(|rows| pages(rows, PAGE_ROWS[0], (1, head_dim), rows.len() / head_dim));
    let halves = halves
        .each_ref()
        .map(|pages| pages.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let rows_of = |_| {
        if way == Way::Alone {
            return halves.each_ref().map(|pages| {
                HeadRows::F16(HalfRows {
                    pages,
                    page_rows: PAGE_ROWS[0],
                    offset: 0,
                    stride: head_dim,
                })
            });
        }
        [keys, values].map(|rows| HeadRows::F32(rows, head_dim))
    };
    let input = AttentionInput {
        queries,
        query_stride: head_dim,
        rows: queries.len() / head_dim,
        keys: keys.len() / head_dim,
        way,
        key_values: &rows_of,
    };
    let shape = AttentionShape {
        heads: 1,
        kv_heads: 1,
        head_dim,
        causal,
    };
    let mut out = vec![f32::INFINITY; queries.len()];
    attend(kernel, shape, &input, &mut out);
    out
}

#[test]
fn every_kernel_attends_as_the_specification_does() {
    for (heads, kv_heads, head_dim) in [
        (4, 4, 96),
        (6, 2, 64),
        (2, 1, 16),
        (1, 1, 8),
        (2, 2, 20),
        (3, 1, 128),
        (1, 1, 21),
        (1, 1, 160),
        (2, 2, 100),
        (33, 11, 8), // several heads a task, on up to ten threads
    ] {
        for causal in [false, true] {
            for (rows, keys) in [
                (1, 1),
                (1, 7),
                (1, 200),
                (3, 65),
                (5, 64),
                (6, 6),
                (7, 130),
                (64, 64),
                (70, 257),
            ] {
                // Longer pages where few queries see more than a shorter one has.
                let longer = rows <= 7 && keys > PAGE_ROWS[0];
                let alone = PAGE_ROWS.map(|page_rows| (Way::Alone, page_rows));
                let alone = alone.into_iter().take(if longer { 3 } else { 1 });
                let others = [Way::Tiled, Way::Rounded].map(|way| (way, PAGE_ROWS[0]));
                for (way, page_rows) in alone.chain(others) {
                    check(&Case {
                        shape: AttentionShape {
                            heads,
                            kv_heads,
                            head_dim,
                            causal,
                        },
                        rows,
                        keys,
                        way,
                        page_rows,
                    });
                }
            }
        }
    }
}

/// All that attend in a way of their own: wider products go with the attention of the kernel before.
fn kernels() -> Vec<Kernel> {
    let mut all = Kernel::available();
    all.retain(|kernel| kernel.name() != "neon-i8mm");
    all
}

fn check(case: &Case) {
    let Case {
        shape, rows, keys, ..
    } = case;
    for (half, size) in [(false, 1.0), (true, 1.0), (false, 40.0), (true, 40.0)] {
        let may_round = case.way == Way::Rounded
            && !shape.causal
            && shape.head_dim.is_multiple_of(2)
            && shape.head_dim <= 128;
        let want = case.run(Kernel::Scalar, half, size);
        for kernel in kernels() {
            let got = case.run(kernel, half, size);
            let rounds = may_round && ["avx2", "avx512-vnni"].contains(&kernel.name());
            let tolerance = if rounds {
                ROUNDED_TOLERANCE * size
            } else {
                TOLERANCE
            };
            if case.way == Way::Rounded {
                let tiled = Case {
                    way: Way::Tiled,
                    ..*case
                };
                let same = tiled.run(kernel, half, size) == got;
                // The mean of one value is that value, a step or not.
                assert!(
                    same != rounds || keys == &1,
                    "{} rounds {shape:?}",
                    kernel.name()
                );
            }
            for (got, want) in got.iter().zip(&want) {
                assert!(
                    (got - want).abs() < tolerance,
                    "{} {shape:?}, {rows} of {keys}, {:?}, half {half}: {got} {want}",
                    kernel.name(),
                    case.way
                );
            }
        }
    }
}

/// To the bit: how a prompt is cut into chunks, or which sequences run together, changes no value.
#[test]
fn a_query_gives_the_same_alone_and_among_others() {
    let case = |way| Case {
        shape: AttentionShape {
            heads: 3,
            kv_heads: 3,
            head_dim: 40,
            causal: true,
        },
        rows: 150,
        keys: 190,
        way,
        page_rows: PAGE_ROWS[1],
    };
    for kernel in kernels() {
        let mut picture = case(Way::Rounded);
        picture.shape.causal = false;
        for (case, half) in [
            (case(Way::Tiled), true),
            (case(Way::Tiled), false),
            (case(Way::Alone), true),
            (picture, false),
        ] {
            let whole = case.run(kernel, half, 3.0);
            for size in [1, 5, 6, 7, 64, 100] {
                let starts = (0..case.rows).step_by(size);
                let parts = starts.flat_map(|start| {
                    let asked = start..case.rows.min(start + size);
                    case.run_rows(kernel, half, 3.0, asked)
                });
                assert!(
                    parts
                        .map(f32::to_bits)
                        .eq(whole.iter().map(|x| x.to_bits())),
                    "{}, {size} at a time",
                    kernel.name()
                );
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    for (causal, way, half) in [
        (true, Way::Tiled, false),
        (false, Way::Rounded, false),
        (true, Way::Alone, true),
    ] {
        let case = Case {
            shape: AttentionShape {
                heads: 1,
                kv_heads: 1,
                head_dim: 16,
                causal,
            },
            rows: 8,
            keys: 8,
            way,
            page_rows: PAGE_ROWS[0],
        };
        for kernel in kernels() {
            for size in [f32::NAN, f32::INFINITY] {
                let out = case.run(kernel, half, size);
                assert!(
                    out.iter().all(|value| value.is_nan()),
                    "{} {way:?} {size}",
                    kernel.name()
                );
            }
        }
    }
}

/// A first page, and more, of keys that weigh nothing at all.
#[test]
fn scores_of_minus_infinity_weigh_nothing() {
    const DIM: usize = 16;
    let mut query = numbers(DIM, 1);
    query[0] = 1.0;
    let values = numbers(200 * DIM, 2);
    for blind in [1, PAGE_ROWS[0], PAGE_ROWS[0] + 3, 199] {
        let mut keys = numbers(200 * DIM, 3);
        for key in keys.chunks_exact_mut(DIM).take(blind) {
            key.fill(0.0);
            key[0] = f32::NEG_INFINITY;
        }
        for way in [Way::Alone, Way::Tiled] {
            let out = |kernel| one_head(kernel, (way, true), DIM, [&query, &keys, &values]);
            let want = out(Kernel::Scalar);
            assert!(want.iter().all(|value| value.is_finite()));
            for kernel in kernels() {
                for (got, want) in out(kernel).iter().zip(&want) {
                    assert!(
                        (got - want).abs() < TOLERANCE,
                        "{} {way:?} {blind}: {got} {want}",
                        kernel.name()
                    );
                }
            }
        }
    }
}

/// Keys that are no numbers break every query that sees them, wherever they are, and no other.
#[test]
fn keys_that_are_no_numbers_are_not_lost() {
    const DIM: usize = 16;
    let (queries, values) = (numbers(200 * DIM, 1), numbers(200 * DIM, 2));
    for (rows, broken) in [
        (1, 3..4),
        (1, 0..64),
        (1, 24..48),
        (1, 199..200),
        (8, 195..196),
        (70, 3..4),
        (70, 0..64),
        (70, 64..128),
        (200, 64..130),
    ] {
        let mut keys = numbers(200 * DIM, 3);
        keys[broken.start * DIM..broken.end * DIM].fill(f32::NAN);
        let way = if rows > 1 { Way::Tiled } else { Way::Alone };
        let given = [&queries[..rows * DIM], &keys, &values];
        for kernel in kernels() {
            let out = one_head(kernel, (way, true), DIM, given);
            for (row, out) in out.chunks_exact(DIM).enumerate() {
                let sees = 200 - rows + row >= broken.start;
                assert!(
                    out.iter().all(|value| value.is_nan() == sees),
                    "{} {rows} {broken:?}: row {row}",
                    kernel.name()
                );
            }
        }
    }
}

/// Rounded, a row of keys or a column of values that has something in it that is no number is none throughout, and zeros are zeros.
#[test]
fn rounding_loses_no_broken_numbers_and_divides_by_no_zero() {
    const DIM: usize = 32;
    let queries = numbers(9 * DIM, 1);
    let run = |kernel, keys: &[f32], values: &[f32]| {
        one_head(kernel, (Way::Rounded, false), DIM, [&queries, keys, values])
    };
    for kernel in kernels() {
        let (keys, values) = (numbers(100 * DIM, 2), numbers(100 * DIM, 3));
        let zeros = vec![0.0; 100 * DIM];
        assert_eq!(
            run(kernel, &keys, &zeros),
            [0.0; 9 * DIM],
            "{}",
            kernel.name()
        );
        let means = run(kernel, &zeros, &values);
        for column in 0..DIM {
            let mean = (0..100).map(|key| values[key * DIM + column]).sum::<f32>() / 100.0;
            assert!((means[column] - mean).abs() < ROUNDED_TOLERANCE, "{mean}");
        }
        let blind = [&[0.0; 9 * DIM][..], &keys, &values];
        let blind = one_head(kernel, (Way::Rounded, false), DIM, blind);
        assert_eq!(
            blind,
            means,
            "{}: nothing asked, all the same",
            kernel.name()
        );
        let mut broken = keys.clone();
        broken[70 * DIM + 5] = f32::NAN;
        let lost = run(kernel, &broken, &values);
        assert!(lost.iter().all(|value| value.is_nan()), "{}", kernel.name());
        broken.clone_from(&values);
        broken[70 * DIM + 5] = f32::INFINITY;
        for (index, value) in run(kernel, &keys, &broken).iter().enumerate() {
            assert_eq!(
                value.is_finite(),
                index % DIM != 5,
                "{}: {index}",
                kernel.name()
            );
        }
    }
}

/// Memory that a thread used for other keys, and queries beside one that is broken, change no bit.
#[test]
fn what_was_rounded_before_or_beside_is_not_seen() {
    const DIM: usize = 64;
    let (queries, keys, values) = (
        numbers(7 * DIM, 1),
        numbers(100 * DIM, 2),
        numbers(100 * DIM, 3),
    );
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let one_thread = one_thread.unwrap();
    for kernel in kernels() {
        let run = |queries: &[f32], keys: &[f32], values: &[f32]| {
            let given = [queries, keys, values];
            one_thread.install(|| one_head(kernel, (Way::Rounded, false), DIM, given))
        };
        let fewer = 97 * DIM;
        let first = run(&queries, &keys[..fewer], &values[..fewer]);
        let mut broken = keys.clone();
        broken[99 * DIM..].fill(f32::NAN);
        let lost = run(&queries, &broken, &values);
        assert!(lost.iter().all(|value| value.is_nan()), "{}", kernel.name());
        let again = run(&queries, &keys[..fewer], &values[..fewer]);
        assert_eq!(again, first, "{}", kernel.name());
        broken.clone_from(&queries);
        broken[3 * DIM + 5] = f32::NAN;
        let one = run(&broken, &keys[..fewer], &values[..fewer]);
        for (row, (got, want)) in one.chunks(DIM).zip(first.chunks(DIM)).enumerate() {
            let is_as_before = row != 3 && got == want;
            let is_lost = row == 3 && got.iter().all(|value| value.is_nan());
            assert!(is_as_before || is_lost, "{} {row}", kernel.name());
        }
    }
}

/// All columns and weights at their largest, as many as may be: what is added up does not overflow. With more keys nothing is rounded.
#[test]
fn the_largest_of_everything_can_be_added_up() {
    const DIM: usize = 128;
    let ones = vec![1.0; 8192 * DIM];
    let minus: Vec<f32> = ones.iter().map(|x| -x).collect();
    for kernel in kernels() {
        for (keys, values) in [(&ones, &ones), (&minus, &ones), (&ones, &minus)] {
            let given = [&ones[..2 * DIM], keys, values];
            let out = one_head(kernel, (Way::Rounded, false), DIM, given);
            let near = out.iter().all(|value| (value - values[0]).abs() < 1e-5);
            assert!(near, "{}: {:?}", kernel.name(), out[0]);
        }
        let (queries, many) = (numbers(7 * DIM, 1), numbers(8193 * DIM, 2));
        let given = [&queries[..], &many, &many];
        let [rounded, tiled] =
            [Way::Rounded, Way::Tiled].map(|way| one_head(kernel, (way, false), DIM, given));
        assert_eq!(rounded, tiled, "{}", kernel.name());
    }
}

/// What many small weights lose by rounding, their sum loses too.
#[test]
fn rounded_weights_still_make_a_mean() {
    const DIM: usize = 16;
    // The first key's weight is 1, that of the other 576 a little below and a little above half a step of 1 / 32767.
    for steps in [0.48f32, 0.52] {
        let score = (steps / 32767.0).ln() * (DIM as f32).sqrt();
        let mut keys = vec![0.0; 577 * DIM];
        for key in keys.chunks_exact_mut(DIM).skip(1) {
            key[0] = score;
        }
        let (values, mut queries) = (vec![1.0; 577 * DIM], vec![0.0; DIM]);
        queries[0] = 1.0;
        for kernel in kernels() {
            let given = [&queries[..], &keys, &values];
            let out = one_head(kernel, (Way::Rounded, false), DIM, given);
            let near = out.iter().all(|value| (value - 1.0).abs() < 1e-4);
            assert!(near, "{} {steps}: {out:?}", kernel.name());
        }
    }
}
