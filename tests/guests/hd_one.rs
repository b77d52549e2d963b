//! The HD transform with one crop, whatever was asked for: an image policy whose token counts differ
//! from the shipped one's, for the tests that swap it under load.

#![expect(missing_docs, reason = "what `generate!` makes is documented in wit/")]

wit_bindgen::generate!({ world: "image-policy-plugin", path: "../../wit" });

use exports::visor::plugin::image_policy::{self, Grid, View};
use exports::visor::plugin::lifecycle;
use visor::plugin::image_policy_input::Context;
use visor::plugin::media::{Color, Filter, Image, Size};
use visor::plugin::model::Handle;
use visor::plugin::types::Error;

const SIDE_PX: u32 = 336;

struct One;

#[cfg(target_arch = "wasm32")]
export!(One);

impl lifecycle::Guest for One {
    fn describe() -> lifecycle::Info {
        lifecycle::Info {
            name: "hd-one".to_owned(),
            version: "1".to_owned(),
            description: "one crop for every picture".to_owned(),
            config_schema: None,
        }
    }

    fn configure(_config: String) -> Result<(), Vec<lifecycle::Issue>> {
        Ok(())
    }
}

impl image_policy::Guest for One {
    fn prepare(image: &Image, _model: &Handle, _context: &Context) -> Result<View, Error> {
        let Size { width, height } = image.size();
        let tall = width < height;
        let (long, short) = if tall {
            (height, width)
        } else {
            (width, height)
        };
        let short_px = (f64::from(SIDE_PX) / (f64::from(long) / f64::from(short))) as u32;
        let transpose = |image: &Image| image.rotate(1).flip(true);
        let transposed = tall.then(|| transpose(image));
        let padded = transposed
            .as_ref()
            .unwrap_or(image)
            .resize(
                Size {
                    width: SIDE_PX,
                    height: short_px,
                },
                Filter::Bilinear,
            )?
            .pad(
                Size {
                    width: SIDE_PX,
                    height: SIDE_PX,
                },
                0,
                (SIDE_PX - short_px) / 2,
                Color {
                    r: 255,
                    g: 255,
                    b: 255,
                },
            )?;
        let tile = if tall { transpose(&padded) } else { padded };
        let overview = tile.resize(
            Size {
                width: SIDE_PX,
                height: SIDE_PX,
            },
            Filter::Bicubic,
        )?;
        let grid = Grid {
            columns: 1,
            rows: 1,
            tiles: vec![tile],
        };
        Ok(View {
            overview: Some(overview),
            grid: Some(grid),
            normalization: None,
            extensions: Vec::new(),
        })
    }
}
