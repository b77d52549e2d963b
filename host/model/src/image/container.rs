//! The file around the pixels: which format it is, whether it is all there, and its EXIF block.
//!
//! Decoders are lenient where it hurts (a JPEG cut in half comes out half grey) and trust inner
//! sizes (a WebP frame may be larger than its canvas), so the structure is walked first. The walk
//! allocates nothing and reads every byte at most once.

use super::{ImageError, ImageFormat};

/// Most scans of a progressive JPEG: each costs a pass over all pixels, encoders write about ten.
const JPEG_SCANS_MAX: u32 = 100;

/// What the walk found.
#[derive(Debug, Default)]
pub(super) struct Container<'a> {
    /// EXIF block, starting at its TIFF header.
    pub(super) exif: Option<&'a [u8]>,
    /// Largest size announced by any canvas or frame, (width, height) in pixels.
    pub(super) announced_px: (u32, u32),
}

/// Tells the format by the leading bytes.
pub(super) fn sniff(bytes: &[u8]) -> Result<ImageFormat, ImageError> {
    match bytes {
        [0xff, 0xd8, 0xff, ..] => Ok(ImageFormat::Jpeg),
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Ok(ImageFormat::Png),
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
        ] => Ok(ImageFormat::WebP),
        [] => Err(ImageError::UnknownFormat("it is empty".into())),
        _ => {
            let shown = &bytes[..bytes.len().min(8)];
            let text = shown.escape_ascii();
            Err(ImageError::UnknownFormat(format!(
                "it starts with \"{text}\""
            )))
        }
    }
}

/// Walks the whole structure of a file of that format.
pub(super) fn inspect(format: ImageFormat, bytes: &[u8]) -> Result<Container<'_>, ImageError> {
    let mut found = Container::default();
    match format {
        ImageFormat::Jpeg => jpeg(bytes, &mut found)?,
        ImageFormat::Png => png(bytes, &mut found)?,
        ImageFormat::WebP => webp(bytes, &mut found)?,
    }
    Ok(found)
}

fn truncated(format: ImageFormat, detail: String) -> ImageError {
    ImageError::Truncated { format, detail }
}

/// EXIF without the `Exif\0\0` that JPEG demands and some WebP writers copy along.
fn tiff_part(block: &[u8]) -> &[u8] {
    block.strip_prefix(b"Exif\0\0").unwrap_or(block)
}

/// From marker to marker until end-of-image. Entropy-coded data needs no case of its own: in it
/// 0xff is followed by 0x00 or a restart marker, which are stepped over like stray bytes.
fn jpeg<'a>(bytes: &'a [u8], found: &mut Container<'a>) -> Result<(), ImageError> {
    let format = ImageFormat::Jpeg;
    let mut at = 2; // past start-of-image
    let mut scans = 0;
    loop {
        let rest = bytes.get(at..).unwrap_or_default();
        let marker_at = rest.windows(2).position(|w| w[0] == 0xff && w[1] != 0xff);
        let Some(marker_at) = marker_at else {
            let detail = format!("no end-of-image marker in {} bytes", bytes.len());
            return Err(truncated(format, detail));
        };
        let marker = rest[marker_at + 1];
        at += marker_at + 2;
        match marker {
            0xd9 => return Ok(()),
            0x00 | 0x01 | 0xd0..=0xd8 => continue,
            _ => {}
        }
        let segment = segment(bytes, at)
            .ok_or_else(|| truncated(format, format!("segment at byte {at} runs past the end")))?;
        at += 2 + segment.len();
        match marker {
            0xe1 if segment.starts_with(b"Exif\0\0") && found.exif.is_none() => {
                found.exif = Some(tiff_part(segment));
            }
            0xda => scans += 1,
            0xc0..=0xcf if !matches!(marker, 0xc4 | 0xc8 | 0xcc) => {
                if let [_, high_y, low_y, high_x, low_x, ..] = *segment {
                    let side = |high, low| u32::from(u16::from_be_bytes([high, low]));
                    let frame_px = (side(high_x, low_x), side(high_y, low_y));
                    found.announced_px = larger(found.announced_px, frame_px);
                }
            }
            _ => {}
        }
        if scans > JPEG_SCANS_MAX {
            let detail = format!("more than {JPEG_SCANS_MAX} scans");
            return Err(ImageError::Malformed { format, detail });
        }
    }
}

/// The payload of a JPEG segment whose two length bytes are at `at`.
fn segment(bytes: &[u8], at: usize) -> Option<&[u8]> {
    let length = bytes.get(at..at + 2)?;
    let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
    bytes.get(at + 2..at + length.max(2))
}

/// From chunk to chunk until `IEND`. `eXIf` may follow the pixels, where decoders miss it.
fn png<'a>(bytes: &'a [u8], found: &mut Container<'a>) -> Result<(), ImageError> {
    let mut at = 8; // past the signature
    loop {
        let header = bytes
            .get(at..at + 8)
            .and_then(|header| header.split_first_chunk());
        let Some((length, kind)) = header else {
            let detail = format!("no IEND chunk in {} bytes", bytes.len());
            return Err(truncated(ImageFormat::Png, detail));
        };
        let length = u32::from_be_bytes(*length) as usize;
        // Payload and checksum.
        let rest = bytes.get(at + 8..).unwrap_or_default();
        let (Some(payload), true) = (rest.get(..length), rest.len() >= length.saturating_add(4))
        else {
            let kind = kind.escape_ascii();
            let detail = format!("chunk {kind} at byte {at} runs past the end");
            return Err(truncated(ImageFormat::Png, detail));
        };
        match kind {
            b"IEND" => return Ok(()),
            b"eXIf" if found.exif.is_none() => found.exif = Some(tiff_part(payload)),
            b"IHDR" => {
                if let [x0, x1, x2, x3, y0, y1, y2, y3, ..] = *payload {
                    let width = u32::from_be_bytes([x0, x1, x2, x3]);
                    let height = u32::from_be_bytes([y0, y1, y2, y3]);
                    found.announced_px = larger(found.announced_px, (width, height));
                }
            }
            _ => {}
        }
        at += 12 + length; // length, kind, payload, checksum
    }
}

/// The RIFF chunks, and those inside animation frames.
fn webp<'a>(bytes: &'a [u8], found: &mut Container<'a>) -> Result<(), ImageError> {
    let announced = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
    let Some(body) = bytes.get(8..).and_then(|rest| rest.get(..announced)) else {
        let detail = format!("{} of {} bytes", bytes.len(), announced.saturating_add(8));
        return Err(truncated(ImageFormat::WebP, detail));
    };
    riff_chunks(body.get(4..).unwrap_or_default(), |kind, payload| {
        match kind {
            b"EXIF" if found.exif.is_none() => found.exif = Some(tiff_part(payload)),
            b"ANMF" => {
                let frame = payload.get(16..).unwrap_or_default();
                riff_chunks(frame, |kind, payload| {
                    found.announced_px = larger(found.announced_px, webp_px(kind, payload));
                    Ok(())
                })?;
            }
            _ => found.announced_px = larger(found.announced_px, webp_px(kind, payload)),
        }
        Ok(())
    })
}

/// Calls `visit` with each chunk's kind and payload.
fn riff_chunks<'a>(
    mut rest: &'a [u8],
    mut visit: impl FnMut(&[u8; 4], &'a [u8]) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    while let Some((header, after)) = rest.split_first_chunk::<8>() {
        let [a, b, c, d, length @ ..] = *header;
        let length = u32::from_le_bytes(length) as usize;
        let Some(payload) = after.get(..length) else {
            let kind = [a, b, c, d];
            let detail = format!(
                "chunk {} has {} of {length} bytes",
                kind.escape_ascii(),
                after.len()
            );
            return Err(truncated(ImageFormat::WebP, detail));
        };
        visit(&[a, b, c, d], payload)?;
        rest = after.get(length + length % 2..).unwrap_or_default(); // chunks are padded to even
    }
    Ok(())
}

/// Size that a canvas or a frame announces; (0, 0) for other chunks.
fn webp_px(kind: &[u8; 4], payload: &[u8]) -> (u32, u32) {
    match (kind, payload) {
        (b"VP8 ", &[_, _, _, 0x9d, 0x01, 0x2a, x0, x1, y0, y1, ..]) => {
            let side = |low, high| u32::from(u16::from_le_bytes([low, high]) & 0x3fff);
            (side(x0, x1), side(y0, y1))
        }
        (b"VP8L", &[0x2f, a, b, c, d, ..]) => {
            let bits = u32::from_le_bytes([a, b, c, d]);
            ((bits & 0x3fff) + 1, ((bits >> 14) & 0x3fff) + 1)
        }
        (b"VP8X", &[_, _, _, _, x0, x1, x2, y0, y1, y2, ..]) => {
            let side = |bytes: [u8; 3]| {
                let [low, middle, high] = bytes;
                u32::from_le_bytes([low, middle, high, 0]) + 1
            };
            (side([x0, x1, x2]), side([y0, y1, y2]))
        }
        _ => (0, 0),
    }
}

fn larger(a: (u32, u32), b: (u32, u32)) -> (u32, u32) {
    (a.0.max(b.0), a.1.max(b.1))
}
