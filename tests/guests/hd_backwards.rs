//! Four crops of a picture in the wrong order, the last one first: an image policy that shows that the evaluation suite
//! notices the order of crops. It takes every picture for a square.

#![expect(missing_docs, reason = "what `generate!` makes is documented in wit/")]

wit_bindgen::generate!({ world: "image-policy-plugin", path: "../../wit" });

use exports::visor::plugin::image_policy::{self, Grid, View};
use exports::visor::plugin::lifecycle;
use visor::plugin::image_policy_input::Context;
use visor::plugin::media::{Filter, Image, Rect, Size};
use visor::plugin::model::Handle;
use visor::plugin::types::Error;

const SIDE_PX: u32 = 336;
const TOP_LEFT: [(u32, u32); 4] = [(0, 0), (1, 0), (0, 1), (1, 1)];

struct Backwards;

#[cfg(target_arch = "wasm32")]
export!(Backwards);

impl lifecycle::Guest for Backwards {
    fn describe() -> lifecycle::Info {
        lifecycle::Info {
            name: "hd-backwards".to_owned(),
            version: "1".to_owned(),
            description: "four crops, the last one first".to_owned(),
            config_schema: None,
        }
    }

    fn configure(_config: String) -> Result<(), Vec<lifecycle::Issue>> {
        Ok(())
    }
}

impl image_policy::Guest for Backwards {
    fn prepare(image: &Image, _model: &Handle, _context: &Context) -> Result<View, Error> {
        let square = |side: u32| Size {
            width: side,
            height: side,
        };
        let whole = image.resize(square(2 * SIDE_PX), Filter::Bilinear)?;
        let tile = |(column, row): (u32, u32)| {
            whole.crop(Rect {
                x: column * SIDE_PX,
                y: row * SIDE_PX,
                width: SIDE_PX,
                height: SIDE_PX,
            })
        };
        Ok(View {
            overview: Some(whole.resize(square(SIDE_PX), Filter::Bicubic)?),
            grid: Some(Grid {
                columns: 2,
                rows: 2,
                tiles: TOP_LEFT
                    .into_iter()
                    .rev()
                    .map(tile)
                    .collect::<Result<_, _>>()?,
            }),
            normalization: None,
            extensions: Vec::new(),
        })
    }
}
