//! Plans of a policy: what they come out as, what they are refused for, what their key covers.

use visor_model::image::{
    Filter, ImageError, Layout, Normalization, Op, PixelValues, ViewPlan, hd_plan, image_tokens,
    render_view, run_ops,
};

use crate::files::{noise, source};

fn resize(width: u32, height: u32, filter: Filter) -> Op {
    Op::Resize {
        width,
        height,
        filter,
    }
}

/// Samples of an 8-bit crop as the tower would see them.
fn normalised(samples: &[u8], Normalization { mean, deviation }: Normalization) -> Vec<f32> {
    let value = |channel: usize, sample: u8| {
        (f32::from(sample) / 255.0 - mean[channel]) / deviation[channel]
    };
    let plane = |channel| {
        samples
            .iter()
            .skip(channel)
            .step_by(3)
            .map(move |&sample| value(channel, sample))
    };
    (0..3).flat_map(plane).collect()
}

#[test]
fn shared_beginnings_give_the_same_crops_as_each_chain_alone() {
    let image = source(&noise((300, 500)), (300, 500));
    let mut plan = hd_plan(300, 500, 4).unwrap();
    // Chains that part at the first, a middle and the last operation, and one that is a prefix.
    let canvas = resize(672, 672, Filter::Bilinear);
    let tile = |x, y| Op::Crop {
        x,
        y,
        width: 336,
        height: 336,
    };
    plan.tiles = vec![
        vec![canvas.clone(), tile(0, 0)],
        vec![
            Op::Flip { horizontal: true },
            resize(336, 336, Filter::Nearest),
        ],
        vec![canvas.clone(), Op::Convert(Layout::Gray), tile(336, 0)],
        vec![canvas.clone(), tile(0, 0), Op::Flip { horizontal: false }],
        vec![canvas, tile(336, 336)],
        vec![resize(336, 336, Filter::Lanczos)],
    ];
    (plan.columns, plan.rows) = (3, 2);
    plan.normalization = Normalization {
        mean: [0.1, 0.2, 0.3],
        deviation: [0.5, 0.25, 2.0],
    };
    let values = render_view(&image, &plan).unwrap();
    assert_eq!((values.crop_count, values.columns, values.rows), (7, 3, 2));
    for (index, chain) in plan.tiles.iter().enumerate() {
        let alone = run_ops(&image, chain).unwrap();
        let want = normalised(alone.samples(), plan.normalization);
        assert!(values.crop(index + 1).unwrap() == want, "tile {index}");
    }
    // The overview ends in a bicubic resize: not rounded, so near the 8-bit result but not on it.
    let overview = plan.overview.as_ref().unwrap();
    let rounded = normalised(
        run_ops(&image, overview).unwrap().samples(),
        plan.normalization,
    );
    let have = values.crop(0).unwrap();
    assert!(have != rounded);
    let inside = have
        .iter()
        .zip(&rounded)
        .filter(|(a, b)| (*a - *b).abs() < 0.51 / 255.0 / 0.25);
    assert!(
        inside.count() * 10 > have.len() * 9,
        "noise overshoots in few places"
    );
}

#[test]
fn the_tall_plan_mirrors_before_and_after_scaling() {
    let plan = hd_plan(300, 900, 4).unwrap();
    let transpose = [Op::Rotate { quarters: 1 }, Op::Flip { horizontal: true }];
    let mut want = transpose.to_vec();
    want.push(resize(1008, 336, Filter::Bilinear));
    want.push(Op::Pad {
        width: 1008,
        height: 336,
        x: 0,
        y: 0,
        fill: [255; 3],
    });
    want.extend(transpose);
    want.push(resize(336, 336, Filter::Bicubic));
    assert_eq!(plan.overview, Some(want));
    assert_eq!((plan.columns, plan.rows), (1, 3));
}

#[test]
fn ratios_that_leave_nothing_are_refused() {
    let refused = hd_plan(10_000, 5, 4).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "image is 10000x5 pixels, too narrow for 4 crops: its shorter side would be scaled to 0 pixels"
    );
    for size in [(5, 10_000), (10_000, 0), (0, 0), (u32::MAX, 1)] {
        let refused = hd_plan(size.0, size.1, 4);
        assert!(
            matches!(refused, Err(ImageError::NothingLeft { .. })),
            "{size:?}: {refused:?}"
        );
    }
    assert!(hd_plan(1344, 1, 4).is_ok());
    assert_eq!(
        hd_plan(10, 10, 0).unwrap_err().to_string(),
        "view: 0 crops; 1 to 256 work"
    );
    assert!(hd_plan(10, 10, u32::MAX).is_err());
}

#[test]
fn a_view_may_be_its_overview_alone() {
    let image = source(&noise((50, 40)), (50, 40));
    let plan = ViewPlan {
        overview: Some(vec![resize(336, 336, Filter::Bilinear)]),
        columns: 0,
        rows: 0,
        tiles: vec![],
        normalization: Normalization::default(),
    };
    let values: PixelValues = render_view(&image, &plan).unwrap();
    assert_eq!((values.crop_count, values.image_tokens()), (1, 157));
}

#[test]
fn plans_that_are_no_view_are_refused() {
    let image = source(&noise((50, 40)), (50, 40));
    let good = hd_plan(50, 40, 4).unwrap();
    let check = |change: &dyn Fn(&mut ViewPlan), message: &str| {
        let mut plan = good.clone();
        change(&mut plan);
        let refused = render_view(&image, &plan).unwrap_err().to_string();
        assert!(refused.contains(message), "{refused}");
    };
    check(&|plan| plan.overview = None, "no overview");
    check(&|plan| plan.columns = 3, "a grid of 3x2 with 4 tiles");
    check(
        &|plan| (plan.columns, plan.rows) = (u32::MAX, u32::MAX),
        "with 4 tiles",
    );
    let wrong = vec![resize(336, 335, Filter::Bilinear)];
    check(
        &|plan| plan.tiles[3] = wrong.clone(),
        "a crop of 336x335 pixels; the model takes 336x336",
    );
    check(&|plan| plan.tiles[0].clear(), "a crop of 50x40 pixels");
    check(
        &|plan| plan.normalization.deviation[1] = 0.0,
        "not finite and positive",
    );
    check(
        &|plan| plan.normalization.mean[2] = f32::NAN,
        "not finite and positive",
    );
    let many = |plan: &mut ViewPlan| {
        plan.tiles = vec![plan.tiles[0].clone(); 257];
        (plan.columns, plan.rows) = (257, 1);
    };
    check(&many, "257 tiles; 256 are allowed");
}

#[test]
fn the_key_covers_the_source_and_every_number_of_the_plan() {
    let plan = hd_plan(900, 300, 4).unwrap();
    let source = [7; 32];
    let mut keys = vec![plan.key(&source), plan.key(&[8; 32])];
    let mut add = |change: &dyn Fn(&mut ViewPlan)| {
        let mut plan = plan.clone();
        change(&mut plan);
        keys.push(plan.key(&source));
    };
    add(&|plan| plan.normalization.mean[0] += 0.5);
    add(&|plan| plan.normalization.deviation[2] += 0.5);
    add(&|plan| (plan.columns, plan.rows) = (plan.rows, plan.columns));
    add(&|plan| plan.tiles.swap(0, 1));
    add(&|plan| drop(plan.tiles.pop()));
    add(&|plan| plan.overview = None);
    let last = |op: Op| move |plan: &mut ViewPlan| plan.tiles[0].push(op.clone());
    for op in [
        Op::Flip { horizontal: true },
        Op::Flip { horizontal: false },
        Op::Rotate { quarters: 1 },
        Op::Rotate { quarters: 2 },
        Op::Convert(Layout::Gray),
        Op::adjust(1.0, 2.0, 3.0),
        Op::adjust(2.0, 1.0, 3.0),
        Op::blur(1.0),
        Op::blur(2.0),
        resize(336, 336, Filter::Nearest),
        resize(336, 336, Filter::Bilinear),
        Op::Pad {
            width: 336,
            height: 336,
            x: 0,
            y: 0,
            fill: [1, 2, 3],
        },
        Op::Pad {
            width: 336,
            height: 336,
            x: 0,
            y: 0,
            fill: [1, 2, 4],
        },
        Op::Crop {
            x: 0,
            y: 0,
            width: 336,
            height: 336,
        },
    ] {
        add(&last(op));
    }
    let count = keys.len();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), count);
    assert_eq!(
        plan.key(&source),
        hd_plan(900, 300, 4).unwrap().key(&source)
    );
}

#[test]
fn image_tokens_saturate() {
    assert_eq!(image_tokens(1, 1), 313);
    assert_eq!(image_tokens(3, 1), 601);
    assert_eq!(image_tokens(1, 3), 625);
    assert_eq!(image_tokens(u32::MAX, u32::MAX), u32::MAX);
}
