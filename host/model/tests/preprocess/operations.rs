//! Recorded operations: what they compute, and which arguments they refuse.

use visor_model::image::{Filter, Layout, Op, RgbBuffer, run_ops};

use crate::files::{noise, source};

/// Each pixel's red is its number, row by row.
fn numbered(width: u32, height: u32) -> Vec<u8> {
    (0..width * height)
        .flat_map(|index| [index as u8, 100, 200])
        .collect()
}

fn reds(buffer: &RgbBuffer) -> Vec<u8> {
    buffer.samples().iter().copied().step_by(3).collect()
}

fn run(samples: &[u8], size: (u32, u32), ops: &[Op]) -> RgbBuffer {
    run_ops(&source(samples, size), ops).unwrap()
}

fn resize(width: u32, height: u32, filter: Filter) -> Op {
    Op::Resize {
        width,
        height,
        filter,
    }
}

#[test]
fn turns_and_mirrors_move_every_pixel() {
    let check = |ops: &[Op], size: (u32, u32), want: [u8; 6]| {
        let have = run(&numbered(3, 2), (3, 2), ops);
        assert_eq!((have.width_px(), have.height_px()), size, "{ops:?}");
        assert_eq!(reds(&have), want, "{ops:?}");
    };
    let rotate = |quarters| Op::Rotate { quarters };
    let flip = |horizontal| Op::Flip { horizontal };
    check(&[], (3, 2), [0, 1, 2, 3, 4, 5]);
    check(&[rotate(1)], (2, 3), [3, 0, 4, 1, 5, 2]);
    check(&[rotate(2)], (3, 2), [5, 4, 3, 2, 1, 0]);
    check(&[rotate(3)], (2, 3), [2, 5, 1, 4, 0, 3]);
    check(&[rotate(4)], (3, 2), [0, 1, 2, 3, 4, 5]);
    check(&[flip(true)], (3, 2), [2, 1, 0, 5, 4, 3]);
    check(&[flip(false)], (3, 2), [3, 4, 5, 0, 1, 2]);
    check(&[rotate(1), flip(true)], (2, 3), [0, 3, 1, 4, 2, 5]); // transposed
}

#[test]
fn crop_and_pad_place_pixels() {
    let crop = Op::Crop {
        x: 1,
        y: 1,
        width: 2,
        height: 1,
    };
    assert_eq!(reds(&run(&numbered(3, 2), (3, 2), &[crop])), [4, 5]);
    let pad = Op::Pad {
        width: 4,
        height: 3,
        x: 1,
        y: 0,
        fill: [9, 8, 7],
    };
    let padded = run(&numbered(3, 2), (3, 2), &[pad]);
    assert_eq!(reds(&padded), [9, 0, 1, 2, 9, 3, 4, 5, 9, 9, 9, 9]);
    assert_eq!(padded.samples()[..3], [9, 8, 7]);
}

#[test]
fn grey_adjust_and_blur_change_samples() {
    let gray = run(
        &[255, 0, 0, 10, 200, 30],
        (2, 1),
        &[Op::Convert(Layout::Gray)],
    );
    assert_eq!(gray.samples(), [76, 76, 76, 124, 124, 124]); // as PIL's convert("L")
    let unchanged = [
        Op::Convert(Layout::Rgb),
        Op::Convert(Layout::Rgba),
        Op::adjust(1.0, 1.0, 1.0),
    ];
    assert_eq!(
        run(&noise((5, 4)), (5, 4), &unchanged).samples(),
        noise((5, 4))
    );

    let adjusted = |op| run(&[0, 100, 255], (1, 1), &[op]).into_samples();
    assert_eq!(adjusted(Op::adjust(2.0, 1.0, 1.0)), [0, 200, 255]);
    assert_eq!(adjusted(Op::adjust(1.0, 0.0, 1.0)), [128, 128, 128]);
    assert_eq!(adjusted(Op::adjust(1.0, 1.0, 2.0)), [0, 160, 255]); // sqrt(100 / 255) * 255

    let mut dot = vec![0; 9 * 9 * 3];
    dot[(4 * 9 + 4) * 3] = 255;
    let blurred = reds(&run(&dot, (9, 9), &[Op::blur(1.0)]));
    assert_eq!(blurred[4 * 9 + 4], 41); // 255 / (2 pi), rounded in two passes
    assert_eq!(blurred[4 * 9 + 3], blurred[3 * 9 + 4]);
    assert_eq!(run(&[77; 12], (2, 2), &[Op::blur(5.0)]).samples(), [77; 12]);
}

#[test]
fn nearest_takes_the_sample_under_the_centre() {
    let row = numbered(6, 1);
    assert_eq!(
        reds(&run(&row, (6, 1), &[resize(2, 1, Filter::Nearest)])),
        [1, 4]
    );
    assert_eq!(
        reds(&run(&row, (6, 1), &[resize(4, 1, Filter::Nearest)])),
        [0, 2, 3, 5]
    );
    let up = run(&numbered(2, 1), (2, 1), &[resize(4, 2, Filter::Nearest)]);
    assert_eq!(reds(&up), [0, 0, 1, 1, 0, 0, 1, 1]);
}

/// The definition in f64, one sample at a time: rounded after each axis, as PIL does.
fn slow_resample(samples: &[u8], from: (usize, usize), to: (usize, usize), lobes: f64) -> Vec<u8> {
    let kernel = |x: f64| {
        let sinc = |x: f64| {
            if x == 0.0 {
                1.0
            } else {
                (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI)
            }
        };
        match x.abs() < lobes {
            true if lobes > 1.0 => sinc(x) * sinc(x / lobes),
            true => 1.0 - x.abs(),
            false => 0.0,
        }
    };
    let axis = |length_in: usize, length_out: usize, out: usize, get: &dyn Fn(usize) -> f64| {
        let scale = length_in as f64 / length_out as f64;
        let stretch = scale.max(1.0);
        let centre = (out as f64 + 0.5) * scale;
        let weight = |at: usize| kernel((at as f64 + 0.5 - centre) / stretch);
        let total: f64 = (0..length_in).map(weight).sum();
        let sum: f64 = (0..length_in).map(|at| weight(at) * get(at)).sum();
        (sum / total).round().clamp(0.0, 255.0)
    };
    let mut across = vec![0.0; to.0 * from.1 * 3];
    for (index, value) in across.iter_mut().enumerate() {
        let (y, x, channel) = (index / (to.0 * 3), index / 3 % to.0, index % 3);
        *value = axis(from.0, to.0, x, &|at| {
            f64::from(samples[(y * from.0 + at) * 3 + channel])
        });
    }
    let down = |index: usize| {
        let (y, x, channel) = (index / (to.0 * 3), index / 3 % to.0, index % 3);
        axis(from.1, to.1, y, &|at| across[(at * to.0 + x) * 3 + channel]) as u8
    };
    (0..to.0 * to.1 * 3).map(down).collect()
}

#[test]
fn antialiased_filters_equal_their_definition() {
    let from = (23, 17);
    let samples = noise(from);
    for (filter, lobes) in [(Filter::Bilinear, 1.0), (Filter::Lanczos, 3.0)] {
        for to in [(7, 5), (31, 40), (23, 9), (11, 17), (1, 1)] {
            let have = run(&samples, from, &[resize(to.0, to.1, filter)]);
            let (from, to) = ((23, 17), (to.0 as usize, to.1 as usize));
            let want = slow_resample(&samples, from, to, lobes);
            let worst = have
                .samples()
                .iter()
                .zip(&want)
                .map(|(a, b)| a.abs_diff(*b))
                .max();
            // Fixed-point weights may tip a sum that lies near a half.
            assert!(worst <= Some(1), "{filter:?} to {to:?}: off by {worst:?}");
        }
        let same = run(&samples, from, &[resize(23, 17, filter)]);
        assert_eq!(same.samples(), samples, "{filter:?}");
    }
}

#[test]
fn bicubic_rounds_to_8_bits_within_a_chain() {
    // Halving takes the four samples around each centre with the weights of a = -0.75.
    let row: Vec<u8> = [10, 20, 40, 80, 160, 250]
        .iter()
        .flat_map(|v| [*v; 3])
        .collect();
    let halved = reds(&run(&row, (6, 1), &[resize(3, 1, Filter::Bicubic)]));
    let tap =
        |a: f64, b: f64, c: f64, d: f64| (-0.09375 * (a + d) + 0.59375 * (b + c)).round() as u8;
    let want = [
        tap(10., 10., 20., 40.),
        tap(20., 40., 80., 160.),
        tap(80., 160., 250., 250.),
    ];
    assert_eq!(halved, want);
    // An overshoot is clipped, not wrapped.
    let edge: Vec<u8> = [0, 0, 255, 255].iter().flat_map(|v| [*v; 3]).collect();
    let up = reds(&run(&edge, (4, 1), &[resize(16, 1, Filter::Bicubic)]));
    assert_eq!((up.iter().min(), up.iter().max()), (Some(&0), Some(&255)));
    assert!(up.is_sorted() || up.windows(2).all(|pair| pair[0].abs_diff(pair[1]) < 128));
    // Three to one hits the middle sample.
    assert_eq!(
        reds(&run(
            &numbered(6, 3),
            (6, 3),
            &[resize(2, 1, Filter::Bicubic)]
        )),
        [7, 10]
    );
}

#[test]
fn arguments_that_do_not_fit_are_refused_with_their_numbers() {
    let image = source(&noise((40, 30)), (40, 30));
    let check = |op: Op, message: &str| {
        assert_eq!(run_ops(&image, &[op]).unwrap_err().to_string(), message);
    };
    let crop = |x, width, height| {
        let y = 0;
        Op::Crop {
            x,
            y,
            width,
            height,
        }
    };
    let pad = |width, height, x| {
        let (y, fill) = (0, [0; 3]);
        Op::Pad {
            width,
            height,
            x,
            y,
            fill,
        }
    };
    check(crop(1, 40, 30), "crop: 40x30 at (1, 0) is not inside 40x30");
    check(
        crop(u32::MAX, 2, 1),
        "crop: 2x1 at (4294967295, 0) is not inside 40x30",
    );
    check(crop(0, 0, 1), "crop: 0x1 at (0, 0) is not inside 40x30");
    check(pad(50, 30, 11), "pad: 40x30 at (11, 0) is not inside 50x30");
    check(resize(0, 5, Filter::Bilinear), "resize: 0x5 has no pixels");
    let limit = "67108864 pixels are allowed";
    check(
        resize(u32::MAX, u32::MAX, Filter::Nearest),
        &format!("resize would make 4294967295x4294967295 pixels; {limit}"),
    );
    check(
        resize(60_000_000, 1, Filter::Bilinear),
        "resize would make 60000000x1 pixels; 65535 a side are allowed",
    );
    // The result is small, the pass between is not.
    let [tall, wide] = [(10, 60_000), (60_000, 1)];
    let [tall, wide] = [tall, wide].map(|(w, h)| resize(w, h, Filter::Bilinear));
    assert_eq!(
        run_ops(&image, &[tall, wide]).unwrap_err().to_string(),
        format!("resize would make 60000x60000 pixels; {limit}")
    );
    check(
        pad(10_000, 10_000, 0),
        &format!("pad would make 10000x10000 pixels; {limit}"),
    );
    check(
        Op::blur(f32::NAN),
        "blur: sigma is NaN; above 0 and up to 64 works",
    );
    check(
        Op::blur(1e9),
        "blur: sigma is 1000000000; above 0 and up to 64 works",
    );
    check(
        Op::adjust(f32::INFINITY, 1.0, 1.0),
        "adjust: [inf, 1.0, 1.0] must be finite, not negative, and gamma not 0",
    );
    let long = vec![Op::Flip { horizontal: true }; 65];
    assert_eq!(
        run_ops(&image, &long).unwrap_err().to_string(),
        "view: a chain of 65 operations; 64 are allowed",
    );
}
