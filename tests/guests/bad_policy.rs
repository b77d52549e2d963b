//! An image policy that misbehaves when told to; see `misdeeds.rs`. Main function: `prepare`.
//!
//! Left alone, it shows one crop of the whole picture. Deeds of its own: `lie` (a 4x4 grid with one
//! tile), `grid` (the largest grid that can be said), `size` (a tile of 100x100), `empty` (neither
//! grid nor overview), `nan` (in the normalization), `arguments` (operations that cannot be),
//! `handles` (endless images), `chain` (endless operations on one), `look` (endless statistics),
//! `flood` (the log), `refuse` (the client's fault, says it).

#![expect(missing_docs, reason = "what `generate!` makes is documented in wit/")]

use visor_test_guests::{configure, deed, main_deed};

wit_bindgen::generate!({ world: "image-policy-plugin", path: "../../wit" });

use exports::visor::plugin::image_policy::{self, Grid, Normalization, View};
use exports::visor::plugin::lifecycle;
use visor::plugin::image_policy_input::Context;
use visor::plugin::log;
use visor::plugin::media::{Color, Filter, Image, Rect, Size};
use visor::plugin::model::Handle;
use visor::plugin::types::{Error, ErrorCode};

struct Bad;

#[cfg(target_arch = "wasm32")]
export!(Bad);

impl lifecycle::Guest for Bad {
    fn describe() -> lifecycle::Info {
        lifecycle::Info {
            name: "bad-policy".to_owned(),
            version: "1".to_owned(),
            description: "misbehaves when told to".to_owned(),
            config_schema: None,
        }
    }

    fn configure(config: String) -> Result<(), Vec<lifecycle::Issue>> {
        configure(&config);
        deed("configure");
        Ok(())
    }
}

impl image_policy::Guest for Bad {
    fn prepare(image: &Image, _model: &Handle, context: &Context) -> Result<View, Error> {
        let deed = main_deed("prepare", &hints(context));
        misuse(&deed, image);
        let scaled = |side| {
            image.resize(
                Size {
                    width: side,
                    height: side,
                },
                Filter::Bilinear,
            )
        };
        let mut view = View {
            overview: Some(scaled(336)?),
            grid: Some(Grid {
                columns: 1,
                rows: 1,
                tiles: vec![scaled(336)?],
            }),
            normalization: None,
            extensions: Vec::new(),
        };
        let tiles = vec![scaled(if deed == "size" { 100 } else { 336 })?];
        match deed.as_str() {
            "lie" => {
                view.grid = Some(Grid {
                    columns: 4,
                    rows: 4,
                    tiles,
                })
            }
            "grid" => {
                view.grid = Some(Grid {
                    columns: u32::MAX,
                    rows: u32::MAX,
                    tiles,
                })
            }
            "size" => {
                view.grid = Some(Grid {
                    columns: 1,
                    rows: 1,
                    tiles,
                })
            }
            "empty" => (view.overview, view.grid) = (None, None),
            "nan" => {
                view.normalization = Some(Normalization {
                    mean: (f32::NAN, 0.0, 0.0),
                    deviation: (0.0, 1.0, 1.0),
                })
            }
            "refuse" => {
                let message = "this policy takes no pictures".to_owned();
                return Err(Error {
                    code: ErrorCode::Unsupported,
                    message,
                    param: None,
                    retry_after: None,
                });
            }
            _ => {}
        }
        Ok(view)
    }
}

/// All hints of the request, such as `detail=low`.
fn hints(context: &Context) -> String {
    let hints = context.extensions();
    hints
        .iter()
        .map(|(key, value)| format!("{key}={value};"))
        .collect()
}

fn misuse(deed: &str, image: &Image) {
    match deed {
        "arguments" => arguments(image),
        "handles" => loop {
            std::mem::forget(image.rotate(1));
        },
        "chain" => {
            let mut chained = image.rotate(1);
            loop {
                chained = chained.rotate(1);
            }
        }
        "look" => loop {
            image.rotate(1).statistics();
        },
        "flood" => {
            (0..2_000).for_each(|_| log::emit(log::Level::Error, &"flood ".repeat(2_000), &[]))
        }
        _ => {}
    }
}

/// Each of these has to be an error of its own; one that is not traps, and so fails the test.
fn arguments(image: &Image) {
    let size = |width, height| Size { width, height };
    for wrong in [
        size(0, 336),
        size(336, 0),
        size(u32::MAX, u32::MAX),
        size(1 << 31, 2),
    ] {
        assert!(image.resize(wrong, Filter::Lanczos).is_err());
        assert!(image.pad(wrong, 0, 0, Color { r: 0, g: 0, b: 0 }).is_err());
    }
    let Size { width, height } = image.size();
    let rect = |x, y, width, height| Rect {
        x,
        y,
        width,
        height,
    };
    for wrong in [
        rect(0, 0, 0, 0),
        rect(0, 0, width + 1, height),
        rect(width, 0, 1, 1),
        rect(u32::MAX, u32::MAX, u32::MAX, u32::MAX),
        rect(1, u32::MAX, 1, 1),
    ] {
        assert!(image.crop(wrong).is_err());
    }
    assert!(
        image
            .pad(
                size(width + 1, height),
                u32::MAX,
                0,
                Color { r: 0, g: 0, b: 0 }
            )
            .is_err()
    );
    for wrong in [f32::NAN, f32::INFINITY, -1.0, 1e30] {
        assert!(image.blur(wrong).is_err());
    }
}
