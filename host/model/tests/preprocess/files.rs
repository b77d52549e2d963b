//! Image files made by hand, where no encoder makes what a test needs.

use std::path::PathBuf;

use image::codecs::jpeg::JpegEncoder;
use image::codecs::png::PngEncoder;
use image::codecs::webp::WebPEncoder;
use image::{ExtendedColorType, ImageEncoder as _};
use visor_model::image::{ImageLimits, SourceImage, decode};

/// A file of the golden folder.
pub(crate) fn golden_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/golden")
        .join(name)
}

pub(crate) fn golden_image(name: &str) -> SourceImage {
    let path = golden_path(&format!("images/{name}.png"));
    let bytes = std::fs::read(path).expect("the golden image is in the repository");
    decode(&bytes, &ImageLimits::default(), true).expect("the golden image is sound")
}

pub(crate) fn png(samples: &[u8], size: (u32, u32), color: ExtendedColorType) -> Vec<u8> {
    let mut file = Vec::new();
    let encoder = PngEncoder::new(&mut file);
    let encoded = encoder.write_image(samples, size.0, size.1, color);
    encoded.expect("the encoder takes these samples");
    file
}

/// An 8-bit RGB picture decoded from a PNG.
pub(crate) fn source(samples: &[u8], size: (u32, u32)) -> SourceImage {
    let file = png(samples, size, ExtendedColorType::Rgb8);
    decode(&file, &ImageLimits::default(), true).expect("a sound PNG")
}

/// A picture without structure, the same on every run.
pub(crate) fn noise(size: (u32, u32)) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..size.0 * size.1 * 3).map(|_| next()).collect()
}

pub(crate) fn jpeg(samples: &[u8], size: (u32, u32), color: ExtendedColorType) -> Vec<u8> {
    let mut file = Vec::new();
    let encoded =
        JpegEncoder::new_with_quality(&mut file, 95).encode(samples, size.0, size.1, color);
    encoded.expect("the encoder takes these samples");
    file
}

pub(crate) fn webp(samples: &[u8], size: (u32, u32), color: ExtendedColorType) -> Vec<u8> {
    let mut file = Vec::new();
    let encoded = WebPEncoder::new_lossless(&mut file).encode(samples, size.0, size.1, color);
    encoded.expect("the encoder takes these samples");
    file
}

/// A TIFF header with one entry: orientation.
pub(crate) fn tiff(orientation: u16, big_endian: bool) -> Vec<u8> {
    let entry = [0x112u16, 3]; // tag, type SHORT
    let mut block = Vec::new();
    if big_endian {
        block.extend_from_slice(b"MM\0*\0\0\0\x08\0\x01");
        entry
            .iter()
            .for_each(|value| block.extend(value.to_be_bytes()));
        block.extend(1u32.to_be_bytes());
        block.extend(orientation.to_be_bytes());
    } else {
        block.extend_from_slice(b"II*\0\x08\0\0\0\x01\0");
        entry
            .iter()
            .for_each(|value| block.extend(value.to_le_bytes()));
        block.extend(1u32.to_le_bytes());
        block.extend(orientation.to_le_bytes());
    }
    block.extend([0; 6]); // rest of the value, no next directory
    block
}

/// The JPEG with an APP1 segment after its start.
pub(crate) fn jpeg_with_exif(file: &[u8], exif: &[u8]) -> Vec<u8> {
    let length = (2 + 6 + exif.len()) as u16;
    let head = [&[0xff, 0xe1][..], &length.to_be_bytes(), b"Exif\0\0", exif].concat();
    [&file[..2], &head, &file[2..]].concat()
}

/// The PNG with an `eXIf` chunk before its pixels, or after them.
pub(crate) fn png_with_exif(file: &[u8], exif: &[u8], after_pixels: bool) -> Vec<u8> {
    let at = if after_pixels {
        file.len() - 12 // IEND
    } else {
        33 // signature and IHDR
    };
    [&file[..at], &png_chunk(b"eXIf", exif), &file[at..]].concat()
}

/// A simple lossless WebP wrapped into an extended one with an EXIF chunk.
pub(crate) fn webp_with_exif(file: &[u8], size: (u32, u32), exif: &[u8]) -> Vec<u8> {
    let frame = &file[12..];
    riff(&[&vp8x(size, 0x08), frame, &riff_chunk(b"EXIF", exif)].concat())
}

pub(crate) fn riff(chunks: &[u8]) -> Vec<u8> {
    let length = (chunks.len() + 4) as u32;
    [b"RIFF", &length.to_le_bytes()[..], b"WEBP", chunks].concat()
}

pub(crate) fn riff_chunk(kind: &[u8; 4], payload: &[u8]) -> Vec<u8> {
    let length = payload.len() as u32;
    let padding = &[0][..payload.len() % 2];
    [kind, &length.to_le_bytes()[..], payload, padding].concat()
}

/// The header of an extended WebP.
pub(crate) fn vp8x((width, height): (u32, u32), flags: u8) -> Vec<u8> {
    let mut payload = vec![flags, 0, 0, 0];
    payload.extend_from_slice(&(width - 1).to_le_bytes()[..3]);
    payload.extend_from_slice(&(height - 1).to_le_bytes()[..3]);
    riff_chunk(b"VP8X", &payload)
}

pub(crate) fn png_chunk(kind: &[u8; 4], payload: &[u8]) -> Vec<u8> {
    let checked = [kind, payload].concat();
    let length = payload.len() as u32;
    let checksum = crc32(&checked).to_be_bytes();
    [&length.to_be_bytes()[..], &checked, &checksum].concat()
}

/// What `IHDR` says of a PNG's samples.
pub(crate) struct PngKind {
    pub(crate) bit_depth: u8,
    pub(crate) color_type: u8,
}

/// A PNG from scan lines (each begins with its filter byte), with extra chunks before the pixels.
pub(crate) fn raw_png(size: (u32, u32), kind: &PngKind, extra: &[u8], lines: &[u8]) -> Vec<u8> {
    let mut header = [size.0.to_be_bytes(), size.1.to_be_bytes()].concat();
    header.extend([kind.bit_depth, kind.color_type, 0, 0, 0]);
    [
        b"\x89PNG\r\n\x1a\n",
        &png_chunk(b"IHDR", &header)[..],
        extra,
        &png_chunk(b"IDAT", &zlib_stored(lines)),
        &png_chunk(b"IEND", &[]),
    ]
    .concat()
}

/// A zlib stream of one stored block.
fn zlib_stored(bytes: &[u8]) -> Vec<u8> {
    let length = bytes.len() as u16;
    let (mut a, mut b) = (1u32, 0u32);
    for byte in bytes {
        a = (a + u32::from(*byte)) % 65_521;
        b = (b + a) % 65_521;
    }
    let checksum = ((b << 16) | a).to_be_bytes();
    let head = [
        &[0x78, 0x01, 0x01][..],
        &length.to_le_bytes(),
        &(!length).to_le_bytes(),
    ]
    .concat();
    [&head[..], bytes, &checksum].concat()
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}
