//! Data URLs and base64, as lenient as RFC 2397 and real encoders need and no more.

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;

/// Content type of a lifted string that claims to be a data URL and cannot be decoded.
pub const BROKEN_CONTENT_TYPE: &str = "application/x-undecodable-data-url";

/// Padding is optional and spare bits are ignored: phones and hand-written encoders get both wrong.
const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
    .with_decode_padding_mode(DecodePaddingMode::Indifferent)
    .with_decode_allow_trailing_bits(true);
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);

/// A decoded data URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataUrl {
    /// What it holds.
    pub bytes: Bytes,
    /// Its media type without parameters, lower case; from the bytes when it names none.
    pub content_type: String,
}

/// What is wrong with a data URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DataUrlError {
    /// No comma between head and data.
    #[error("the data URL has no comma before its data")]
    NoComma,
    /// The data is not base64.
    #[error("the data URL is not valid base64: {0}")]
    Base64(String),
    /// A percent sign without two hexadecimal digits.
    #[error("the data URL has a broken percent escape at offset {0} of its data")]
    Percent(usize),
}

/// Whether a string claims to be a data URL.
pub fn is_data_url(text: &str) -> bool {
    text.get(..5)
        .is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:"))
}

/// Decodes a data URL, base64 or percent-encoded.
pub fn parse(text: &str) -> Result<DataUrl, DataUrlError> {
    let rest = text.get(5..).unwrap_or("");
    let (head, data) = rest.split_once(',').ok_or(DataUrlError::NoComma)?;
    let mut fields = head.split(';').map(str::trim);
    let media_type = fields.next().unwrap_or("").to_ascii_lowercase();
    let is_base64 = fields.any(|field| field.eq_ignore_ascii_case("base64"));
    let bytes = match (is_base64, data.contains('%')) {
        (true, false) => decode_base64(data)?,
        // A plus and a slash may be escaped in a URL.
        (true, true) => {
            let unescaped = percent_decode(data)?;
            decode_base64(&String::from_utf8_lossy(&unescaped))?
        }
        (false, _) => percent_decode(data)?,
    };
    let content_type = if media_type.is_empty() {
        sniff(&bytes).to_owned()
    } else {
        media_type
    };
    Ok(DataUrl {
        bytes,
        content_type,
    })
}

/// Decodes base64 in either alphabet; line breaks, blanks and missing padding are accepted.
pub fn decode_base64(text: &str) -> Result<Bytes, DataUrlError> {
    let bytes = text.as_bytes();
    let wrong = bytes.iter().position(|byte| !is_base64_byte(*byte));
    if let Some(offset) = wrong {
        return Err(DataUrlError::Base64(format!(
            "the byte at offset {offset} is not of its alphabet"
        )));
    }
    let engine = if bytes.iter().any(|byte| matches!(byte, b'-' | b'_')) {
        &URL_SAFE
    } else {
        &STANDARD
    };
    let decoded = if bytes.iter().any(u8::is_ascii_whitespace) {
        let packed: Vec<u8> = bytes
            .iter()
            .copied()
            .filter(|byte| !byte.is_ascii_whitespace())
            .collect();
        engine.decode(packed)
    } else {
        engine.decode(bytes)
    };
    decoded
        .map(Bytes::from)
        .map_err(|error| DataUrlError::Base64(error.to_string().to_lowercase()))
}

fn is_base64_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'+' | b'/' | b'-' | b'_' | b'=' | b'\n' | b'\r' | b' ' | b'\t'
        )
}

fn percent_decode(data: &str) -> Result<Bytes, DataUrlError> {
    let bytes = data.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] != b'%' {
            out.push(bytes[at]);
            at += 1;
            continue;
        }
        let digits = data
            .get(at + 1..at + 3)
            .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let value = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        out.push(value.ok_or(DataUrlError::Percent(at))?);
        at += 3;
    }
    Ok(Bytes::from(out))
}

/// The media type that the leading bytes speak of.
pub fn sniff(bytes: &[u8]) -> &'static str {
    match bytes {
        [0xFF, 0xD8, 0xFF, ..] => "image/jpeg",
        [0x89, b'P', b'N', b'G', 0x0D, 0x0A, 0x1A, 0x0A, ..] => "image/png",
        [
            b'R',
            b'I',
            b'F',
            b'F',
            _,
            _,
            _,
            _,
            b'W',
            b'E',
            b'B',
            b'P',
            ..,
        ] => "image/webp",
        [b'G', b'I', b'F', b'8', ..] => "image/gif",
        [b'B', b'M', ..] => "image/bmp",
        [b'%', b'P', b'D', b'F', b'-', ..] => "application/pdf",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_data_url_decode_alike() {
        for url in [
            "data:image/png;base64,iVBORw==",
            "DATA:IMAGE/PNG;BASE64,iVBORw==",
            "data:image/png;name=a.png;base64,iVBORw",
            "data:image/png;base64,iVBO\n Rw==\n",
            "data:image/png,%89PNG",
            "data:image/png;base64,iVBOR%77%3d%3D",
        ] {
            let parsed = parse(url).expect(url);
            assert_eq!(&parsed.bytes[..], b"\x89PNG", "{url}");
            assert_eq!(parsed.content_type, "image/png");
        }
    }

    #[test]
    fn a_missing_media_type_is_read_from_the_bytes() {
        assert_eq!(
            parse("data:;base64,/9j/4A").expect("valid").content_type,
            "image/jpeg"
        );
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (url, says) in [
            ("data:image/png;base64", "no comma"),
            (
                "data:image/png;base64,@@@@",
                "not valid base64: the byte at offset 0",
            ),
            ("data:image/png;base64,A", "not valid base64"),
            ("data:image/png;base64,AA=A", "not valid base64"),
            ("data:image/png;base64,iV%zz", "percent escape at offset 2"),
            ("data:image/png,%8", "percent escape at offset 0"),
            ("data:image/png,%+1", "percent escape at offset 0"),
        ] {
            let message = parse(url).expect_err(url).to_string();
            assert!(message.contains(says), "{url}: {message}");
        }
    }
}
