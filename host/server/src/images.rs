//! From a source that an adapter names to a decoded picture, under the operator's limits.
//!
//! A picture comes with the request. One that only has an address is fetched where the operator
//! allows it (`fetch`, `files`), and refused with the reason elsewhere, because a picture that is
//! silently left out turns into a made-up answer.

mod address;
pub mod budget;
pub mod data_url;
pub mod fetch;
#[cfg(unix)]
mod files;
mod lookup;
mod permit;

use bytes::Bytes;
use visor_model::image::{ImageError, ImageHeader, ImageLimits, SourceImage};
use visor_model::image::{decode, probe};
use visor_sandbox::{ErrorCode, GuestError, Source};

use crate::config::ImagesConfig;
use budget::{Budget, NoRoom, Room};
use fetch::{FetchError, Fetcher, Patience};

/// Longest piece of a client's URL that is repeated in an error, in characters.
const URL_SHOWN_CHARS: usize = 60;
/// What a client can do whatever the operator allows.
const INSTEAD: &str = "send the image itself as data:image/jpeg;base64,...";

/// Seconds after which a client that met no room may come back.
const RETRY_AFTER_S: u32 = 2;

/// What loading needs beside the source.
pub struct Loading<'a> {
    /// The operator's limits.
    pub config: &'a ImagesConfig,
    /// The way out.
    pub fetcher: &'a Fetcher,
    /// How long anybody waits.
    pub patience: Patience<'a>,
    /// Whose picture it is, for the log.
    pub request_id: &'a str,
}

/// Why there is no picture.
#[derive(Debug, Clone)]
pub enum LoadError {
    /// The client is told why.
    Refused(GuestError),
    /// The client has left.
    Gone,
}

/// The operator's limits in the model's terms.
pub fn limits(config: &ImagesConfig) -> ImageLimits {
    ImageLimits {
        bytes_max: config.bytes_max,
        pixels_max: config.pixels_max,
        side_px_max: config.side_px_max,
        aspect_ratio_max: config.aspect_ratio_max,
    }
}

/// What encoded bytes say they are, whatever anybody else says; no pixel is decoded.
///
/// # Errors
/// Bytes that are no picture, or a picture over a limit.
pub fn header(bytes: &[u8], config: &ImagesConfig) -> Result<ImageHeader, LoadError> {
    probe(bytes, &limits(config)).map_err(|error| LoadError::Refused(refusal(&error)))
}

/// The picture in encoded bytes.
///
/// # Errors
/// As [`header`], and pixels that cannot be decoded to the end.
pub fn decoded(bytes: &[u8], config: &ImagesConfig) -> Result<SourceImage, LoadError> {
    decode(bytes, &limits(config), config.apply_exif_orientation)
        .map_err(|error| LoadError::Refused(refusal(&error)))
}

/// Room for pictures of these headers, one after the other decoded and all of them kept.
///
/// # Errors
/// There is none: not in time, or not ever.
pub fn room(
    headers: &[ImageHeader],
    budget: &Budget,
    loading: &Loading<'_>,
) -> Result<Room, LoadError> {
    let kept: u64 = headers.iter().map(ImageHeader::decoded_bytes).sum();
    let beside = headers
        .iter()
        .map(|h| h.decoding_bytes() - h.decoded_bytes());
    let bytes = kept + beside.max().unwrap_or(0);
    let mib_max = loading.config.decoded_mib_max;
    let limit = (mib_max, "to decode", "images.decoded_mib_max");
    take(bytes, budget, loading, limit)
}

/// Room for crops of so many bytes, from when they are made until the answer about them ends.
///
/// # Errors
/// As [`room`].
pub fn crops_room(bytes: u64, budget: &Budget, loading: &Loading<'_>) -> Result<Room, LoadError> {
    let mib_max = loading.config.crops_mib_max;
    let limit = (mib_max, "as crops", "images.crops_mib_max");
    take(bytes, budget, loading, limit)
}

/// Room for what operations hold while they run.
///
/// # Errors
/// As [`room`].
pub fn canvases_room(
    bytes: u64,
    budget: &Budget,
    loading: &Loading<'_>,
) -> Result<Room, LoadError> {
    let mib_max = loading.config.canvases_mib_max;
    let limit = (mib_max, "to be cut into crops", "images.canvases_mib_max");
    take(bytes, budget, loading, limit)
}

fn take(
    bytes: u64,
    budget: &Budget,
    loading: &Loading<'_>,
    (mib_max, what, key): (u64, &str, &str),
) -> Result<Room, LoadError> {
    budget.take(bytes, &loading.patience).map_err(|none| match none {
        NoRoom::Never => {
            let mib = bytes.div_ceil(1 << 20);
            let message = format!(
                "the images of this request take {mib} MiB {what}; at most {mib_max} are allowed ({key})"
            );
            refused(ErrorCode::TooLarge, message)
        }
        NoRoom::Late => busy("other requests' images take all the memory there is for them"),
        NoRoom::Gone => LoadError::Gone,
    })
}

/// Whether loading a source would ask another server.
pub fn is_remote(source: &Source) -> bool {
    match source {
        Source::Url(url) => matches!(scheme(url.trim()).as_str(), "http" | "https"),
        Source::Blob(_) => false,
    }
}

/// Whether a source has its bytes elsewhere than in the request.
pub fn is_named(source: &Source) -> bool {
    matches!(source, Source::Url(url) if !data_url::is_data_url(url.trim()))
}

/// The scheme of a URL, in lower case.
fn scheme(url: &str) -> String {
    let (scheme, _) = url.split_once(':').unwrap_or_default();
    scheme.to_ascii_lowercase()
}

/// The encoded bytes of a source; what is not in the request is at most `named_bytes_max` long.
///
/// # Errors
/// A URL that is not carried out, or leads to more.
pub fn encoded(
    source: &Source,
    loading: &Loading<'_>,
    named_bytes_max: u64,
) -> Result<Bytes, LoadError> {
    let bytes_max = loading.config.bytes_max.min(named_bytes_max);
    let url = match source {
        Source::Blob(blob) if blob.content_type == data_url::BROKEN_CONTENT_TYPE => {
            // A lifted data URL that could not be decoded kept its text: say what is wrong with it.
            std::str::from_utf8(&blob.bytes).unwrap_or_default()
        }
        Source::Blob(blob) => return Ok(blob.bytes.clone()),
        Source::Url(url) => url.trim(),
    };
    if data_url::is_data_url(url) {
        return data_url::parse(url)
            .map(|parsed| parsed.bytes)
            .map_err(|error| refused(ErrorCode::InvalidRequest, error.to_string()));
    }
    match scheme(url).as_str() {
        "http" | "https" => fetched(url, loading, bytes_max),
        "file" => read_file(url, loading.config, bytes_max),
        _ => {
            let shown: String = url.chars().take(URL_SHOWN_CHARS).collect();
            Err(refused(
                ErrorCode::InvalidRequest,
                format!("{shown:?} is not an image URL this server knows; {INSTEAD}"),
            ))
        }
    }
}

fn fetched(url: &str, loading: &Loading<'_>, bytes_max: u64) -> Result<Bytes, LoadError> {
    let got = loading
        .fetcher
        .fetch(url, (&loading.config.fetch, bytes_max), &loading.patience);
    got.map_err(|error| match error {
        FetchError::Refused(why) => refused(ErrorCode::Unsupported, format!("{why}; {INSTEAD}")),
        FetchError::Unreached { host, why } => {
            tracing::warn!(
                request = loading.request_id,
                host,
                why,
                "an image was not fetched"
            );
            let message = format!("the image could not be fetched from {host}; {INSTEAD}");
            refused(ErrorCode::Unsupported, message)
        }
        FetchError::TooLarge(why) => refused(ErrorCode::TooLarge, why),
        FetchError::Busy => busy("too many images are being fetched already"),
        FetchError::Gone => LoadError::Gone,
    })
}

#[cfg(unix)]
fn read_file(url: &str, config: &ImagesConfig, bytes_max: u64) -> Result<Bytes, LoadError> {
    let read = files::read(url, &config.files_root, bytes_max);
    read.map_err(|error| match error {
        files::FileError::Refused(why) => {
            refused(ErrorCode::Unsupported, format!("{why}; {INSTEAD}"))
        }
        files::FileError::TooLarge(why) => refused(ErrorCode::TooLarge, why),
    })
}

#[cfg(not(unix))]
fn read_file(_: &str, _: &ImagesConfig, _: u64) -> Result<Bytes, LoadError> {
    let why = format!("this server does not read files that clients name; {INSTEAD}");
    Err(refused(ErrorCode::Unsupported, why))
}

/// There is no room now; later there may be.
fn busy(message: &str) -> LoadError {
    LoadError::Refused(GuestError {
        retry_after_s: Some(RETRY_AFTER_S),
        ..GuestError::new(ErrorCode::Overloaded, message)
    })
}

fn refused(code: ErrorCode, message: String) -> LoadError {
    LoadError::Refused(GuestError::new(code, message))
}

fn refusal(error: &ImageError) -> GuestError {
    let code = match error {
        ImageError::TooManyBytes { .. }
        | ImageError::TooManyPixels { .. }
        | ImageError::SideTooLong { .. }
        | ImageError::CanvasTooLarge { .. } => ErrorCode::TooLarge,
        _ => ErrorCode::InvalidRequest,
    };
    GuestError::new(code, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use visor_sandbox::Blob;

    fn load_with(source: &Source, config: &ImagesConfig) -> Result<SourceImage, GuestError> {
        let loading = Loading {
            config,
            fetcher: &Fetcher::system(&config.fetch),
            patience: Patience {
                deadline: std::time::Instant::now(),
                gone: &|| false,
            },
            request_id: "test",
        };
        let bytes = encoded(source, &loading, config.named_bytes_max);
        let image = bytes.and_then(|bytes| decoded(&bytes, config));
        image.map_err(|error| match error {
            LoadError::Refused(error) => error,
            LoadError::Gone => panic!("nobody left"),
        })
    }

    fn check(source: Source, code: ErrorCode, says: &str) {
        let error = load_with(&source, &ImagesConfig::default()).expect_err(says);
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(says), "{error}");
    }

    fn url(url: &str) -> Source {
        Source::Url(url.to_owned())
    }

    #[test]
    fn nothing_is_fetched_and_the_reason_is_said() {
        for (address, says) in [
            (
                "http://127.0.0.1/a.png",
                "does not fetch images from http: URLs (images.fetch.http ",
            ),
            (
                "HTTPS://example.org/a.png",
                "(images.fetch.https turns that on); send the image itself",
            ),
        ] {
            check(url(address), ErrorCode::Unsupported, says);
        }
        check(
            url("file:///etc/passwd"),
            ErrorCode::Unsupported,
            "does not read files",
        );
        check(
            url("/etc/passwd"),
            ErrorCode::InvalidRequest,
            "not an image URL",
        );
        check(url(""), ErrorCode::InvalidRequest, "not an image URL");
    }

    #[cfg(unix)]
    #[test]
    fn a_file_below_the_root_is_a_picture_like_any_other() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/images");
        let root = std::fs::canonicalize(root).expect("the goldens are there");
        let config = ImagesConfig {
            files_root: root.clone(),
            ..ImagesConfig::default()
        };
        let file = |name: &str| url(&format!("file://{}/{name}", root.display()));
        let image = load_with(&file("tiny_20x20.png"), &config).expect("a picture");
        assert_eq!((image.width_px(), image.height_px()), (20, 20));
        let outside = load_with(&file("../README.md"), &config).expect_err("outside");
        assert_eq!(outside.code, ErrorCode::Unsupported);
        assert!(outside.message.contains("images.files_root"), "{outside}");
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        check(
            url("data:image/png;base64,@@"),
            ErrorCode::InvalidRequest,
            "not valid base64",
        );
        check(
            url("data:image/png;base64,AAAA"),
            ErrorCode::InvalidRequest,
            "JPEG, PNG or WebP",
        );
        let content_type = data_url::BROKEN_CONTENT_TYPE.to_owned();
        let bytes = Bytes::from_static(b"data:image/png;base64,@@");
        check(
            Source::Blob(Blob {
                bytes,
                content_type,
            }),
            ErrorCode::InvalidRequest,
            "not valid base64",
        );
    }

    #[test]
    fn a_picture_over_a_limit_is_too_large() {
        let small = ImagesConfig {
            pixels_max: 15,
            ..ImagesConfig::default()
        };
        let mut png = std::io::Cursor::new(Vec::new());
        image::RgbImage::new(4, 4)
            .write_to(&mut png, image::ImageFormat::Png)
            .expect("encodes");
        let bytes = Bytes::from(png.into_inner());
        let blob = Source::Blob(Blob {
            bytes,
            content_type: "image/jpeg".to_owned(),
        });
        let error = load_with(&blob, &small).expect_err("16 pixels");
        assert_eq!(error.code, ErrorCode::TooLarge);
        assert!(error.message.contains("4x4"), "{error}");
        let image = load_with(&blob, &ImagesConfig::default())
            .expect("a small picture, whatever its declared type");
        assert_eq!((image.width_px(), image.height_px()), (4, 4));
    }
}
