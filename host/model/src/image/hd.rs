//! The reference's HD transform, written as recorded operations.
//!
//! Source: Phi-3.5-vision `processing_phi3_v.py`, `HD_transform` and `padding_336`.

use super::view::MAX_CROPS;
use super::{
    CROP_SIDE_PX, Filter, ImageError, Normalization, Op, RgbBuffer, SourceImage, ViewPlan, run_ops,
};

/// Turns a tall image wide and back: mirrors along the main diagonal, (x, y) to (y, x).
const TRANSPOSE: [Op; 2] = [Op::Rotate { quarters: 1 }, Op::Flip { horizontal: true }];

/// The plan for an image of that size: at most `num_crops` crops in a grid, and the overview.
///
/// Every step is recorded, also where it changes nothing: transpose (tall images only), bilinear
/// resize, white padding, transpose back; then a bicubic overview, and crops row by row.
///
/// # Errors
/// `num_crops` of 0 or beyond the limit; an image so narrow that its shorter side vanishes.
pub fn hd_plan(width_px: u32, height_px: u32, num_crops: u32) -> Result<ViewPlan, ImageError> {
    if num_crops == 0 || num_crops > MAX_CROPS {
        let message = format!("{num_crops} crops; 1 to {MAX_CROPS} work");
        return Err(ImageError::BadView(message));
    }
    let side = CROP_SIDE_PX;
    let tall = width_px < height_px;
    let (long, short) = if tall {
        (height_px, width_px)
    } else {
        (width_px, height_px)
    };
    let ratio = f64::from(long) / f64::from(short);
    let fits =
        |scale: u32| f64::from(scale) * (f64::from(scale) / ratio).ceil() <= f64::from(num_crops);
    let scale = (1..=num_crops).take_while(|&scale| fits(scale)).last();
    let new_long = side * scale.unwrap_or_default();
    let new_short = (f64::from(new_long) / ratio) as u32; // truncates; 0 for a ratio of NaN
    if new_short == 0 {
        return Err(ImageError::NothingLeft {
            width_px,
            height_px,
            num_crops,
        });
    }
    let padded_short = new_short.next_multiple_of(side);
    let transpose: &[Op] = if tall { &TRANSPOSE } else { &[] };
    let mut hd = transpose.to_vec();
    hd.push(Op::Resize {
        width: new_long,
        height: new_short,
        filter: Filter::Bilinear,
    });
    hd.push(Op::Pad {
        width: new_long,
        height: padded_short,
        x: 0,
        y: (padded_short - new_short) / 2,
        fill: [255; 3],
    });
    hd.extend_from_slice(transpose);
    let (columns, rows) = if tall {
        (padded_short / side, new_long / side)
    } else {
        (new_long / side, padded_short / side)
    };
    Ok(grid(&hd, columns, rows))
}

/// Overview and crops of an image whose sides are multiples of the crop's.
fn grid(hd: &[Op], columns: u32, rows: u32) -> ViewPlan {
    let side = CROP_SIDE_PX;
    let then = |op: Op| [hd, &[op]].concat();
    let tile = |row: u32, column: u32| Op::Crop {
        x: column * side,
        y: row * side,
        width: side,
        height: side,
    };
    let overview = Op::Resize {
        width: side,
        height: side,
        filter: Filter::Bicubic,
    };
    let places = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
    ViewPlan {
        overview: Some(then(overview)),
        columns,
        rows,
        tiles: places
            .map(|(row, column)| then(tile(row, column)))
            .collect(),
        normalization: Normalization::default(),
    }
}

/// The padded 8-bit HD image from which the crops are cut: what the goldens' `hd_u8_sha256` hashes.
///
/// # Errors
/// As [`hd_plan`].
pub fn hd_image(source: &SourceImage, num_crops: u32) -> Result<RgbBuffer, ImageError> {
    let plan = hd_plan(source.width_px(), source.height_px(), num_crops)?;
    let overview = plan.overview.unwrap_or_default();
    // The overview is the HD image and then one resize.
    run_ops(source, &overview[..overview.len().saturating_sub(1)])
}
