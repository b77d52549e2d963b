//! From a source that an adapter names to a decoded picture, under the operator's limits.
//!
//! This server fetches nothing: not from the network, not from its own disk. A picture is what came
//! with the request, and a URL that points elsewhere is refused with the reason, because a picture
//! that is silently left out turns into a made-up answer.

pub mod data_url;

use bytes::Bytes;
use visor_model::image::{ImageError, ImageLimits, SourceImage, decode};
use visor_sandbox::{ErrorCode, GuestError, Source};

use crate::config::ImagesConfig;

/// Longest piece of a client's URL that is repeated in an error, in characters.
const URL_SHOWN_CHARS: usize = 60;

/// The operator's limits in the model's terms.
pub fn limits(config: &ImagesConfig) -> ImageLimits {
    ImageLimits {
        bytes_max: config.bytes_max,
        pixels_max: config.pixels_max,
        side_px_max: config.side_px_max,
        aspect_ratio_max: config.aspect_ratio_max,
    }
}

/// The decoded picture of a source.
///
/// # Errors
/// A URL that is not carried out, bytes that are no picture, or a picture over a limit.
pub fn load(source: &Source, config: &ImagesConfig) -> Result<SourceImage, GuestError> {
    let bytes = encoded(source)?;
    decode(&bytes, &limits(config), config.apply_exif_orientation).map_err(|error| refusal(&error))
}

/// The encoded bytes of a source.
fn encoded(source: &Source) -> Result<Bytes, GuestError> {
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
            .map_err(|error| invalid(error.to_string()));
    }
    Err(not_fetched(url))
}

fn not_fetched(url: &str) -> GuestError {
    const INSTEAD: &str = "send the image itself as data:image/jpeg;base64,...";
    let scheme = url
        .split_once(':')
        .map(|(scheme, _)| scheme.to_ascii_lowercase())
        .unwrap_or_default();
    let message = match scheme.as_str() {
        "http" | "https" => {
            format!("this server does not fetch images from the network; {INSTEAD}")
        }
        "file" => format!("this server does not read files that clients name; {INSTEAD}"),
        _ => {
            let shown: String = url.chars().take(URL_SHOWN_CHARS).collect();
            return invalid(format!(
                "{shown:?} is not an image URL this server knows; {INSTEAD}"
            ));
        }
    };
    GuestError::new(ErrorCode::Unsupported, message)
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

fn invalid(message: String) -> GuestError {
    GuestError::new(ErrorCode::InvalidRequest, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use visor_sandbox::Blob;

    fn check(source: Source, code: ErrorCode, says: &str) {
        let error = load(&source, &ImagesConfig::default()).expect_err(says);
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(says), "{error}");
    }

    fn url(url: &str) -> Source {
        Source::Url(url.to_owned())
    }

    #[test]
    fn nothing_is_fetched_and_the_reason_is_said() {
        for address in ["http://127.0.0.1/a.png", "HTTPS://example.org/a.png"] {
            check(
                url(address),
                ErrorCode::Unsupported,
                "does not fetch images from the network",
            );
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
        let error = load(&blob, &small).expect_err("16 pixels");
        assert_eq!(error.code, ErrorCode::TooLarge);
        assert!(error.message.contains("4x4"), "{error}");
        let image = load(&blob, &ImagesConfig::default())
            .expect("a small picture, whatever its declared type");
        assert_eq!((image.width_px(), image.height_px()), (4, 4));
    }
}
