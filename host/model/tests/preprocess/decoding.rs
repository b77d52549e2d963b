//! Files of every kind: what their pixels become, and which are refused.

use image::ExtendedColorType;
use visor_model::image::{ImageError, ImageFormat, ImageLimits, Layout, decode, probe};

use crate::files::{
    PngKind, golden_path, jpeg, jpeg_with_exif, noise, png, png_chunk, png_with_exif, raw_png,
    riff, riff_chunk, tiff, vp8x, webp, webp_with_exif,
};

const LIMITS: ImageLimits = ImageLimits {
    bytes_max: 4 << 20,
    pixels_max: 4_000_000,
    side_px_max: 8_000,
    aspect_ratio_max: 100,
};

/// Blocks of 16x16 pixels in flat colours, which JPEG keeps: 3 columns, 2 rows.
const BLOCKS_PX: (u32, u32) = (48, 32);
const COLORS: [[[u8; 3]; 3]; 2] = [
    [[230, 20, 20], [20, 230, 20], [20, 20, 230]],
    [[0, 0, 0], [128, 128, 128], [255, 255, 255]],
];

fn blocks() -> Vec<u8> {
    let at = |x: u32, y: u32| COLORS[y as usize / 16][x as usize / 16];
    let rows = (0..BLOCKS_PX.1).flat_map(|y| (0..BLOCKS_PX.0).map(move |x| at(x, y)));
    rows.flatten().collect()
}

/// Where EXIF shows the stored block (row, column): (row, column) as displayed. EXIF defines an
/// orientation by the sides at which the stored row 0 and column 0 are seen.
fn shown_at(orientation: u16, (row, column): (usize, usize)) -> (usize, usize) {
    match orientation {
        1 => (row, column),         // row 0 at the top, column 0 at the left
        2 => (row, 2 - column),     // top, right
        3 => (1 - row, 2 - column), // bottom, right
        4 => (1 - row, column),     // bottom, left
        5 => (column, row),         // left, top
        6 => (column, 1 - row),     // right, top
        7 => (2 - column, 1 - row), // right, bottom
        _ => (2 - column, row),     // left, bottom
    }
}

fn check_orientation(file: &[u8], orientation: u16, tolerance: u8, what: &str) {
    let header = probe(file, &LIMITS).unwrap();
    assert_eq!(u16::from(header.orientation), orientation, "{what}");
    assert_eq!((header.width_px, header.height_px), BLOCKS_PX, "{what}");
    let image = decode(file, &LIMITS, true).unwrap();
    let (width, height) = if orientation < 5 { (48, 32) } else { (32, 48) };
    assert_eq!(
        (image.width_px(), image.height_px()),
        (width, height),
        "{what}"
    );
    let stored_px = (image.stored_width_px, image.stored_height_px);
    assert_eq!(stored_px, BLOCKS_PX, "{what}");
    for (row, colors) in COLORS.iter().enumerate() {
        for (column, color) in colors.iter().enumerate() {
            let (row, column) = shown_at(orientation, (row, column));
            let centre = ((row * 16 + 8) * width as usize + column * 16 + 8) * 3;
            let have = &image.rgb.samples()[centre..centre + 3];
            let close = have
                .iter()
                .zip(color)
                .all(|(a, b)| a.abs_diff(*b) <= tolerance);
            assert!(close, "{what} {orientation}: {have:?} is not {color:?}");
        }
    }
    let plain = decode(file, &LIMITS, false).unwrap();
    assert_eq!((plain.width_px(), plain.height_px()), BLOCKS_PX, "{what}");
    assert_ne!(
        plain.digest, image.digest,
        "{what}: the digest covers orientation"
    );
}

#[test]
fn all_eight_orientations_are_applied_in_every_format() {
    let rgb = ExtendedColorType::Rgb8;
    let jpeg = jpeg(&blocks(), BLOCKS_PX, rgb);
    let png = png(&blocks(), BLOCKS_PX, rgb);
    let webp = webp(&blocks(), BLOCKS_PX, rgb);
    for orientation in 1..=8 {
        for big_endian in [false, true] {
            let exif = tiff(orientation, big_endian);
            let prefixed = [b"Exif\0\0", &exif[..]].concat();
            check_orientation(&jpeg_with_exif(&jpeg, &exif), orientation, 8, "jpeg");
            for after_pixels in [false, true] {
                let file = png_with_exif(&png, &exif, after_pixels);
                check_orientation(&file, orientation, 0, "png");
            }
            for exif in [&exif, &prefixed] {
                let file = webp_with_exif(&webp, BLOCKS_PX, exif);
                check_orientation(&file, orientation, 0, "webp");
            }
        }
    }
}

#[test]
fn broken_exif_is_no_orientation() {
    let file = jpeg(&blocks(), BLOCKS_PX, ExtendedColorType::Rgb8);
    for exif in [
        &b""[..],
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        &tiff(0, true),
        &tiff(9, false),
    ] {
        let header = probe(&jpeg_with_exif(&file, exif), &LIMITS).unwrap();
        assert_eq!(header.orientation, 1, "{exif:?}");
    }
}

#[test]
fn formats_are_told_apart_by_content() {
    let rgb = ExtendedColorType::Rgb8;
    let files = [
        (jpeg(&blocks(), BLOCKS_PX, rgb), ImageFormat::Jpeg, "jpeg"),
        (png(&blocks(), BLOCKS_PX, rgb), ImageFormat::Png, "png"),
        (webp(&blocks(), BLOCKS_PX, rgb), ImageFormat::WebP, "webp"),
    ];
    for (file, format, name) in files {
        let header = probe(&file, &LIMITS).unwrap();
        assert_eq!(header.format, format);
        assert_eq!(header.format.to_string(), name);
        assert_eq!(decode(&file, &LIMITS, true).unwrap().layout, Layout::Rgb);
    }
}

fn check_samples(file: &[u8], layout: Layout, want: &[u8], what: &str) {
    let image = decode(file, &LIMITS, true).unwrap();
    assert_eq!(image.layout, layout, "{what}");
    assert_eq!(image.rgb.samples(), want, "{what}");
}

#[test]
fn grey_is_replicated_alpha_is_dropped_and_16_bits_are_cut() {
    use ExtendedColorType as Color;
    let size = (2, 1);
    let gray = [7, 7, 7, 200, 200, 200];
    check_samples(
        &png(&[7, 200], size, Color::L8),
        Layout::Gray,
        &gray,
        "grey",
    );
    let file = png(&[7, 0, 200, 128], size, Color::La8);
    check_samples(&file, Layout::Rgba, &gray, "grey and alpha");
    let samples = [1, 2, 3, 0, 250, 251, 252, 17];
    let rgb = [1, 2, 3, 250, 251, 252];
    check_samples(
        &png(&samples, size, Color::Rgba8),
        Layout::Rgba,
        &rgb,
        "alpha, png",
    );
    check_samples(
        &webp(&samples, size, Color::Rgba8),
        Layout::Rgba,
        &rgb,
        "alpha, webp",
    );

    // 16 bits, each sample with a low byte that rounding would carry into the high one.
    let wide = |samples: &[u8]| -> Vec<u8> {
        samples
            .iter()
            .flat_map(|high| u16::from_be_bytes([*high, 0xff]).to_ne_bytes())
            .collect()
    };
    let check = |samples: &[u8], color, layout, want: &[u8], what| {
        check_samples(&png(&wide(samples), size, color), layout, want, what);
    };
    check(
        &[7, 200],
        Color::L16,
        Layout::Gray,
        &gray,
        "grey of 16 bits",
    );
    check(
        &[7, 0, 200, 128],
        Color::La16,
        Layout::Rgba,
        &gray,
        "grey and alpha of 16 bits",
    );
    check(&rgb, Color::Rgb16, Layout::Rgb, &rgb, "rgb of 16 bits");
    check(
        &samples,
        Color::Rgba16,
        Layout::Rgba,
        &rgb,
        "rgba of 16 bits",
    );
}

#[test]
fn palettes_and_packed_greys_are_expanded() {
    let palette = png_chunk(b"PLTE", &[10, 20, 30, 40, 50, 60, 70, 80, 90]);
    let transparency = png_chunk(b"tRNS", &[0, 128]);
    let kind = PngKind {
        bit_depth: 2,
        color_type: 3,
    };
    let lines = [0, 0b10_01_00_00]; // no filter; entries 2, 1, 0
    let want = [70, 80, 90, 40, 50, 60, 10, 20, 30];
    let file = raw_png((3, 1), &kind, &palette, &lines);
    check_samples(&file, Layout::Rgb, &want, "palette");
    let file = raw_png((3, 1), &kind, &[palette, transparency].concat(), &lines);
    check_samples(&file, Layout::Rgba, &want, "palette with transparency");

    let kind = PngKind {
        bit_depth: 1,
        color_type: 0,
    };
    let file = raw_png((3, 1), &kind, &[], &[0, 0b1010_0000]);
    check_samples(
        &file,
        Layout::Gray,
        &[255, 255, 255, 0, 0, 0, 255, 255, 255],
        "1 bit",
    );
    let kind = PngKind {
        bit_depth: 4,
        color_type: 0,
    };
    let file = raw_png((2, 1), &kind, &[], &[0, 0x3f]);
    check_samples(&file, Layout::Gray, &[51, 51, 51, 255, 255, 255], "4 bits");
}

#[test]
fn grey_jpeg_is_grey() {
    let file = jpeg(&[100; 64], (8, 8), ExtendedColorType::L8);
    let image = decode(&file, &LIMITS, true).unwrap();
    assert_eq!(image.layout, Layout::Gray);
    assert!(
        image
            .rgb
            .samples()
            .iter()
            .all(|sample| sample.abs_diff(100) <= 1)
    );
}

#[test]
fn limits_are_checked_with_their_numbers() {
    let file = png(&noise((200, 100)), (200, 100), ExtendedColorType::Rgb8);
    let check = |limits: ImageLimits, message: &str| {
        for refused in [
            probe(&file, &limits).err(),
            decode(&file, &limits, true).err(),
        ] {
            assert_eq!(refused.unwrap().to_string(), message);
        }
    };
    let bytes = file.len();
    check(
        ImageLimits {
            bytes_max: 100,
            ..LIMITS
        },
        &format!("image is {bytes} bytes; 100 are allowed"),
    );
    check(
        ImageLimits {
            pixels_max: 19_999,
            ..LIMITS
        },
        "image is 200x100 pixels; 19999 pixels are allowed",
    );
    check(
        ImageLimits {
            side_px_max: 199,
            ..LIMITS
        },
        "image is 200x100 pixels; 199 a side are allowed",
    );
    check(
        ImageLimits {
            aspect_ratio_max: 1,
            ..LIMITS
        },
        "image is 200x100 pixels; the longer side may be at most 1 times the shorter",
    );
    let exact = ImageLimits {
        bytes_max: bytes as u64,
        pixels_max: 20_000,
        side_px_max: 200,
        aspect_ratio_max: 2,
    };
    assert!(decode(&file, &exact, true).is_ok());
}

#[test]
fn bombs_are_refused_by_their_header() {
    // 8000 x 8000 pixels announced by a file of a hundred bytes.
    let kind = PngKind {
        bit_depth: 8,
        color_type: 6,
    };
    let file = raw_png((8_000, 8_000), &kind, &[], &[0]);
    let too_many = |refused| matches!(refused, Err(ImageError::TooManyPixels { .. }));
    assert!(too_many(probe(&file, &LIMITS).map(drop)));
    let file = raw_png((u32::MAX >> 1, 1), &kind, &[], &[0]);
    let refused = probe(&file, &LIMITS);
    assert!(
        matches!(refused, Err(ImageError::SideTooLong { .. })),
        "{refused:?}"
    );

    // A JPEG frame of 7000 x 7000 behind a sound start.
    let mut file = jpeg(&blocks(), BLOCKS_PX, ExtendedColorType::Rgb8);
    let frame = file
        .windows(2)
        .position(|bytes| bytes == [0xff, 0xc0])
        .unwrap();
    file[frame + 5..frame + 9].copy_from_slice(&[0x1b, 0x58, 0x1b, 0x58]);
    assert!(too_many(probe(&file, &LIMITS).map(drop)));

    // A WebP canvas of 10 x 10 with a frame of 7000 x 7000 inside, bare and in an animation.
    let frame = [
        0x10, 0x02, 0x00, 0x9d, 0x01, 0x2a, 0x58, 0x1b, 0x58, 0x1b, 0, 0, 0, 0,
    ];
    let frame = riff_chunk(b"VP8 ", &frame);
    let file = riff(&[vp8x((10, 10), 0), frame.clone()].concat());
    assert!(too_many(decode(&file, &LIMITS, true).map(drop)));
    let animation = riff_chunk(b"ANMF", &[vec![0; 16], frame].concat());
    let start = riff_chunk(b"ANIM", &[0; 6]);
    let file = riff(&[vp8x((10, 10), 2), start, animation].concat());
    assert!(too_many(decode(&file, &LIMITS, true).map(drop)));
}

#[test]
fn truncated_files_are_errors_wherever_they_are_cut() {
    let (samples, size) = (noise((40, 24)), (40, 24));
    let rgb = ExtendedColorType::Rgb8;
    let files = [
        jpeg(&samples, size, rgb),
        png(&samples, size, rgb),
        webp(&samples, size, rgb),
    ];
    for file in files {
        assert!(decode(&file, &LIMITS, true).is_ok());
        for length in 0..file.len() {
            let refused = decode(&file[..length], &LIMITS, true);
            let refused = refused.expect_err("a cut file");
            if length > 16 {
                assert!(
                    matches!(refused, ImageError::Truncated { .. }),
                    "{length} of {} bytes: {refused}",
                    file.len(),
                );
            }
        }
    }
}

#[test]
fn a_png_with_too_few_pixels_is_truncated_or_malformed() {
    let kind = PngKind {
        bit_depth: 8,
        color_type: 2,
    };
    let file = raw_png((4, 4), &kind, &[], &[0; 13]); // one line of four
    let refused = decode(&file, &LIMITS, true).unwrap_err();
    let named = matches!(
        refused,
        ImageError::Truncated { .. } | ImageError::Malformed { .. }
    );
    assert!(named, "{refused}");
}

#[test]
fn a_jpeg_of_endless_scans_is_refused() {
    let file = jpeg(&blocks(), BLOCKS_PX, ExtendedColorType::Rgb8);
    let scan = file
        .windows(2)
        .position(|bytes| bytes == [0xff, 0xda])
        .unwrap();
    let (head, scan) = file[..file.len() - 2].split_at(scan);
    let file = [head, &scan.repeat(101), &[0xff, 0xd9]].concat();
    let refused = decode(&file, &LIMITS, true).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "jpeg image cannot be decoded: more than 100 scans"
    );
}

#[test]
fn garbage_is_refused_and_never_panics() {
    let unknown = probe(b"GIF89a....", &LIMITS).unwrap_err();
    assert_eq!(
        unknown.to_string(),
        "not a JPEG, PNG or WebP image (it starts with \"GIF89a..\")"
    );
    let empty = probe(b"", &LIMITS).unwrap_err();
    assert_eq!(
        empty.to_string(),
        "not a JPEG, PNG or WebP image (it is empty)"
    );

    // Every format with one byte after the other broken: an error or a picture, nothing else.
    let (samples, size) = (noise((20, 12)), (20, 12));
    let rgb = ExtendedColorType::Rgb8;
    let exif = tiff(6, true);
    let files = [
        jpeg_with_exif(&jpeg(&samples, size, rgb), &exif),
        png_with_exif(&png(&samples, size, rgb), &exif, false),
        webp_with_exif(&webp(&samples, size, rgb), size, &exif),
    ];
    for file in files {
        for index in 0..file.len() {
            for flip in [0xff, 0x01, 0x80] {
                let mut broken = file.clone();
                broken[index] ^= flip;
                drop(decode(&broken, &LIMITS, true));
            }
        }
    }
}

#[test]
fn the_digest_is_of_the_file() {
    let file = std::fs::read(golden_path("images/tiny_20x20.png")).unwrap();
    let digest = |file: &[u8]| decode(file, &LIMITS, true).unwrap().digest;
    assert_eq!(digest(&file), digest(&file));
    let same_pixels = [&file[..], b"trailing"].concat();
    assert_ne!(digest(&file), digest(&same_pixels));
}
