//! Image policy: the HD transform of Phi-3.5-vision, with a crop count that follows the request.
//!
//! An image policy decides what the model gets to see of a picture: an *overview* (the whole
//! picture in one 336 px tile) and a grid of *crops* in more detail. Crops are context and time: a
//! 4:3 photo takes 313 tokens with one crop, 757 with four and 1921 with sixteen. So the client
//! chooses (`num_crops`, or OpenAI's `detail`), the operator sets what the words mean, and what
//! remains of the prompt decides how much of it fits.
//!
//! No pixel enters the plugin. `image` is a handle; `resize`, `pad` and the others *record* a step
//! and return a new handle at once. The host runs the recorded chain natively, and uses it as the
//! cache key, so that equal pictures cut in equal ways are preprocessed once.
//!
//! The steps are exactly the reference's (Phi-3.5-vision `processing_phi3_v.py`, `HD_transform`
//! and `padding_336`): a tall picture is transposed and handled as a wide one; scaled, so that as
//! many tiles as allowed are filled; padded with white; transposed back; cut.

#![expect(missing_docs, reason = "what `generate!` makes is documented in wit/")]

use std::cell::OnceCell;

use serde::Deserialize;

wit_bindgen::generate!({ world: "image-policy-plugin", path: "../../wit" });

use exports::visor::plugin::image_policy::{self, Grid, View};
use exports::visor::plugin::lifecycle;
use visor::plugin::image_policy_input::Context;
use visor::plugin::media::{Color, Filter, Image, Rect, Size};
use visor::plugin::model::Handle;
use visor::plugin::types::{Error, ErrorCode};

/// Side of a crop and of the overview in pixels: what the vision tower takes.
const SIDE_PX: u32 = 336;

/// Most crops the model was trained with.
const CROPS_MAX: u32 = 16;

const WHITE: Color = Color {
    r: 255,
    g: 255,
    b: 255,
};

/// What the host checks `[plugins.hd.config]` against, and `visor plugin check` prints.
const CONFIG_SCHEMA: &str = r#"{
  "type": "object",
  "additionalProperties": false,
  "properties": {
    "low_crops":  { "type": "integer", "minimum": 1, "maximum": 16, "default": 1,
                    "description": "Most crops of an image with detail = low." },
    "auto_crops": { "type": "integer", "minimum": 1, "maximum": 16, "default": 4,
                    "description": "Most crops of an image with detail = auto, or none given. Fewer when the prompt has no room." },
    "high_crops": { "type": "integer", "minimum": 1, "maximum": 16, "default": 16,
                    "description": "Most crops of an image with detail = high." },
    "max_crops":  { "type": "integer", "minimum": 1, "maximum": 16, "default": 16,
                    "description": "Most crops a request may ask for by number." }
  }
}"#;

/// `[plugins.hd.config]`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Config {
    low_crops: u32,
    auto_crops: u32,
    high_crops: u32,
    max_crops: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            low_crops: 1,
            auto_crops: 4,
            high_crops: CROPS_MAX,
            max_crops: CROPS_MAX,
        }
    }
}

impl Config {
    fn parse(json: &str) -> Result<Self, Vec<lifecycle::Issue>> {
        let issue = |path: &str, message: String| lifecycle::Issue {
            path: path.to_owned(),
            message,
        };
        let config: Self =
            serde_json::from_str(json).map_err(|error| vec![issue("", error.to_string())])?;
        let keys = [
            ("low_crops", config.low_crops),
            ("auto_crops", config.auto_crops),
            ("high_crops", config.high_crops),
            ("max_crops", config.max_crops),
        ];
        let wrong = keys
            .into_iter()
            .filter(|(_, crops)| !(1..=CROPS_MAX).contains(crops));
        let issues: Vec<_> = wrong
            .map(|(key, crops)| issue(key, format!("{crops} crops; 1 to {CROPS_MAX} work")))
            .collect();
        if issues.is_empty() {
            Ok(config)
        } else {
            Err(issues)
        }
    }
}

thread_local! {
    static CONFIG: OnceCell<Config> = const { OnceCell::new() };
}

/// The type the exports hang on.
struct Hd;

#[cfg(target_arch = "wasm32")]
export!(Hd);

impl lifecycle::Guest for Hd {
    fn describe() -> lifecycle::Info {
        lifecycle::Info {
            name: "hd".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            description: env!("CARGO_PKG_DESCRIPTION").to_owned(),
            config_schema: Some(CONFIG_SCHEMA.to_owned()),
        }
    }

    fn configure(config: String) -> Result<(), Vec<lifecycle::Issue>> {
        let config = Config::parse(&config)?;
        CONFIG.with(|cell| cell.set(config).ok());
        Ok(())
    }
}

impl image_policy::Guest for Hd {
    /// We look at sizes and hints, never at pixels.
    fn prepare(image: &Image, model: &Handle, context: &Context) -> Result<View, Error> {
        let config = CONFIG.with(|cell| cell.get().copied()).unwrap_or_default();
        let wish = wish(&context.extensions(), &config)?;
        let size = image.size();
        let tokens = |columns, rows| model.image_tokens(columns, rows);
        let plan = choose((size.width, size.height), wish, context.budget(), &tokens)?;
        record(image, &plan)
    }
}

/// How many crops are asked for at most, and whether fewer will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    /// The client said so: this many, or an error.
    Exactly(u32),
    /// Nobody said so: as many as the prompt has room for.
    UpTo(u32),
}

/// Reads the client's wish from the hints the adapter passed on.
fn wish(extensions: &[(String, String)], config: &Config) -> Result<Wish, Error> {
    let hint = |name: &str| {
        extensions
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    };
    if let Some(text) = hint("num_crops") {
        let crops = text
            .parse()
            .ok()
            .filter(|crops| (1..=config.max_crops).contains(crops));
        let wrong = || {
            invalid(format!(
                "num_crops is {text}; 1 to {} are allowed",
                config.max_crops
            ))
        };
        return crops.map(Wish::Exactly).ok_or_else(wrong);
    }
    match hint("detail") {
        None | Some("auto") => Ok(Wish::UpTo(config.auto_crops)),
        Some("low") => Ok(Wish::Exactly(config.low_crops)),
        Some("high") => Ok(Wish::Exactly(config.high_crops)),
        Some(other) => Err(invalid(format!(
            "detail is {other}; low, high and auto are known"
        ))),
    }
}

/// Where the picture goes: sizes in the frame where it is at least as wide as high.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Whether it has to be transposed to be so.
    tall: bool,
    /// Size to scale to.
    long_px: u32,
    short_px: u32,
    /// Size after padding; a multiple of the tile's side.
    padded_short_px: u32,
}

impl Plan {
    /// The plan for at most `crops` crops. None when the picture is so narrow that its short side
    /// would vanish.
    fn new((width_px, height_px): (u32, u32), crops: u32) -> Option<Self> {
        let tall = width_px < height_px;
        let (long, short) = if tall {
            (height_px, width_px)
        } else {
            (width_px, height_px)
        };
        let ratio = f64::from(long) / f64::from(short);
        // The most tiles along the long side with which the grid has at most `crops`.
        let fits = |columns: u32| {
            f64::from(columns) * (f64::from(columns) / ratio).ceil() <= f64::from(crops)
        };
        let columns = (1..=crops).take_while(|columns| fits(*columns)).last()?;
        let long_px = columns * SIDE_PX;
        let short_px = (f64::from(long_px) / ratio) as u32; // truncates, as the reference does
        let padded_short_px = short_px.next_multiple_of(SIDE_PX);
        (short_px > 0).then_some(Self {
            tall,
            long_px,
            short_px,
            padded_short_px,
        })
    }

    /// Columns and rows of the grid in the picture's own frame.
    fn grid(&self) -> (u32, u32) {
        let (long, short) = (self.long_px / SIDE_PX, self.padded_short_px / SIDE_PX);
        if self.tall {
            (short, long)
        } else {
            (long, short)
        }
    }

    /// White above the picture; what remains of the padding is below.
    fn top_px(&self) -> u32 {
        (self.padded_short_px - self.short_px) / 2
    }
}

/// The plan that grants the wish within `budget` prompt tokens.
fn choose(
    size_px: (u32, u32),
    wish: Wish,
    budget: u32,
    tokens: &dyn Fn(u32, u32) -> u32,
) -> Result<Plan, Error> {
    let (most, least) = match wish {
        Wish::Exactly(crops) => (crops, crops),
        Wish::UpTo(crops) => (crops, 1),
    };
    let mut needed = 0;
    for crops in (least..=most).rev() {
        let plan = Plan::new(size_px, crops).ok_or_else(|| {
            let (width_px, height_px) = size_px;
            invalid(format!("an image of {width_px}x{height_px} pixels is too narrow to be scaled to {SIDE_PX} px crops"))
        })?;
        let (columns, rows) = plan.grid();
        needed = tokens(columns, rows);
        if needed <= budget {
            return Ok(plan);
        }
    }
    let hint = if least > 1 {
        "; ask for fewer crops or detail = low"
    } else {
        ""
    };
    let crops = if least == 1 { "crop" } else { "crops" };
    let message = format!(
        "this image needs {needed} prompt tokens with {least} {crops} and {budget} are left{hint}"
    );
    Err(Error {
        code: ErrorCode::ContextOverflow,
        message,
        param: None,
        retry_after: None,
    })
}

/// Records the plan's steps on the picture.
fn record(image: &Image, plan: &Plan) -> Result<View, Error> {
    let transposed = plan.tall.then(|| transpose(image));
    let scaled = Size {
        width: plan.long_px,
        height: plan.short_px,
    };
    let canvas = Size {
        width: plan.long_px,
        height: plan.padded_short_px,
    };
    let padded = transposed
        .as_ref()
        .unwrap_or(image)
        .resize(scaled, Filter::Bilinear)?
        .pad(canvas, 0, plan.top_px(), WHITE)?;
    let padded = if plan.tall {
        transpose(&padded)
    } else {
        padded
    };
    let overview = padded.resize(
        Size {
            width: SIDE_PX,
            height: SIDE_PX,
        },
        Filter::Bicubic,
    )?;
    let (columns, rows) = plan.grid();
    let tiles = (0..rows * columns).map(|index| {
        let (x, y) = (index % columns * SIDE_PX, index / columns * SIDE_PX);
        padded.crop(Rect {
            x,
            y,
            width: SIDE_PX,
            height: SIDE_PX,
        })
    });
    Ok(View {
        overview: Some(overview),
        grid: Some(Grid {
            columns,
            rows,
            tiles: tiles.collect::<Result<_, _>>()?,
        }),
        normalization: None,
        extensions: Vec::new(),
    })
}

/// Swaps x and y: mirrors along the main diagonal, which undoes itself.
fn transpose(image: &Image) -> Image {
    image.rotate(1).flip(true)
}

fn invalid(message: String) -> Error {
    Error {
        code: ErrorCode::InvalidRequest,
        message,
        param: None,
        retry_after: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The model's own formula: tiles and overview, separators, line ends.
    fn tokens(columns: u32, rows: u32) -> u32 {
        (columns * rows + 1) * 144 + 1 + (rows + 1) * 12
    }

    /// Padded size in the picture's frame, and tokens.
    fn padded(size_px: (u32, u32), crops: u32) -> (u32, u32, u32) {
        let (columns, rows) = Plan::new(size_px, crops).unwrap().grid();
        (columns * SIDE_PX, rows * SIDE_PX, tokens(columns, rows))
    }

    #[test]
    fn grids_are_those_of_the_reference() {
        let cases = [
            ((512, 512), (672, 672, 757), (1344, 1344, 2509)),
            ((20, 20), (672, 672, 757), (1344, 1344, 2509)),
            ((900, 300), (1008, 336, 601), (2016, 672, 1909)),
            ((300, 900), (336, 1008, 625), (672, 2016, 1957)),
            ((1344, 336), (1344, 336, 745), (2688, 672, 2485)),
            ((960, 686), (672, 672, 757), (1344, 1008, 1921)),
            ((123, 457), (336, 1008, 625), (672, 2352, 2257)),
        ];
        for (size_px, four, sixteen) in cases {
            assert_eq!(padded(size_px, 4), four, "{size_px:?} with 4 crops");
            assert_eq!(padded(size_px, 16), sixteen, "{size_px:?} with 16 crops");
            assert_eq!(
                padded(size_px, 1),
                (336, 336, 313),
                "{size_px:?} with 1 crop"
            );
        }
    }

    #[test]
    fn padding_is_split_with_the_odd_row_below() {
        let plan = Plan::new((960, 686), 4).unwrap();
        assert_eq!(
            (
                plan.long_px,
                plan.short_px,
                plan.padded_short_px,
                plan.top_px()
            ),
            (672, 480, 672, 96)
        );
        let plan = Plan::new((457, 123), 4).unwrap();
        assert_eq!((plan.short_px, plan.top_px()), (271, 32)); // 65 rows of white: 32 and 33
    }

    #[test]
    fn a_picture_that_scales_to_nothing_is_refused() {
        assert_eq!(Plan::new((40_000, 1), 4), None);
        let error = choose((1, 40_000), Wish::UpTo(4), 9999, &tokens).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidRequest);
        assert!(error.message.contains("1x40000"), "{}", error.message);
    }

    #[test]
    fn a_tight_prompt_gets_fewer_crops_unless_the_client_insists() {
        let square = (512, 512);
        let grid = |budget| choose(square, Wish::UpTo(4), budget, &tokens).map(|plan| plan.grid());
        assert_eq!(grid(757).unwrap(), (2, 2));
        assert_eq!(grid(756).unwrap(), (1, 1));
        assert_eq!(grid(312).unwrap_err().code, ErrorCode::ContextOverflow);
        let error = choose(square, Wish::Exactly(4), 756, &tokens).unwrap_err();
        assert!(
            error.message.contains("757") && error.message.contains("756"),
            "{}",
            error.message
        );
    }

    #[test]
    fn the_crop_count_is_the_clients_then_the_details() {
        let config = Config::default();
        let wish = |pairs: &[(&str, &str)]| {
            let pairs: Vec<_> = pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect();
            wish(&pairs, &config)
        };
        assert_eq!(wish(&[]).unwrap(), Wish::UpTo(4));
        assert_eq!(wish(&[("detail", "auto")]).unwrap(), Wish::UpTo(4));
        assert_eq!(wish(&[("detail", "low")]).unwrap(), Wish::Exactly(1));
        assert_eq!(wish(&[("detail", "high")]).unwrap(), Wish::Exactly(16));
        assert_eq!(
            wish(&[("detail", "low"), ("num_crops", "9")]).unwrap(),
            Wish::Exactly(9)
        );
        for wrong in [
            ("num_crops", "0"),
            ("num_crops", "17"),
            ("num_crops", "many"),
            ("detail", "ultra"),
        ] {
            assert_eq!(
                wish(&[wrong]).unwrap_err().code,
                ErrorCode::InvalidRequest,
                "{wrong:?}"
            );
        }
    }

    #[test]
    fn a_wrong_configuration_names_the_key() {
        let issues = Config::parse(r#"{ "auto_crops": 0, "high_crops": 99 }"#).unwrap_err();
        let paths: Vec<_> = issues.iter().map(|issue| issue.path.as_str()).collect();
        assert_eq!(paths, ["auto_crops", "high_crops"]);
        assert!(Config::parse(r#"{ "crops": 4 }"#).is_err());
        assert_eq!(
            Config::parse(r#"{ "auto_crops": 9 }"#).unwrap().auto_crops,
            9
        );
    }

    #[test]
    fn the_schema_has_the_defaults_of_the_code() {
        let schema: serde_json::Value = serde_json::from_str(CONFIG_SCHEMA).unwrap();
        let default = Config::default();
        for (key, crops) in [
            ("low_crops", default.low_crops),
            ("auto_crops", default.auto_crops),
            ("high_crops", default.high_crops),
            ("max_crops", default.max_crops),
        ] {
            assert_eq!(schema["properties"][key]["default"], crops, "{key}");
        }
    }
}
