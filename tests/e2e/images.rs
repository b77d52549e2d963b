//! Pictures in every encoding, and everything that is not quite a picture.

use std::fs;
use std::io::Cursor;
use std::sync::Arc;
use std::thread;

use image::{DynamicImage, ImageFormat};
use serde_json::{Value, json};

use crate::chat::content;
use crate::client::{Answer, chunks, joined};
use crate::server::{Server, chat, data_url, fixture, pictures, shared, until, with};

fn golden(name: &str) -> Vec<u8> {
    fixture(&format!("tests/golden/images/{name}.png"))
}

fn encoded(picture: &[u8], format: ImageFormat) -> Vec<u8> {
    let decoded = image::load_from_memory(picture)
        .expect("a golden picture")
        .to_rgb8();
    let mut bytes = Cursor::new(Vec::new());
    DynamicImage::ImageRgb8(decoded)
        .write_to(&mut bytes, format)
        .expect("it can be encoded");
    bytes.into_inner()
}

fn ask(server: &Server, kind: &str, bytes: &[u8]) -> Value {
    server
        .chat(&chat(&[pictures(
            &[data_url(kind, bytes)],
            "what is this?",
        )]))
        .ok()
}

/// The error that a picture in the second message's second part is answered with.
#[track_caller]
fn refused(server: &Server, url: &str, status: u16) -> Value {
    let messages = [
        json!({"role": "system", "content": "You see."}),
        json!({"role": "user", "content": [
            {"type": "text", "text": "what is this?"},
            {"type": "image_url", "image_url": {"url": url}},
        ]}),
    ];
    let error = server.chat(&chat(&messages)).error(status);
    let param = error["param"].as_str().expect("the part is named");
    assert!(param.contains("messages[1].content[1]"), "{param}");
    error
}

#[test]
fn lossless_encodings_of_one_picture_have_one_answer_whatever_they_claim_to_be() {
    let server = shared();
    let png = golden("sq_512");
    let webp = encoded(&png, ImageFormat::WebP);
    let expected = content(&ask(&server, "image/png", &png));
    assert_eq!(content(&ask(&server, "image/webp", &webp)), expected);
    assert_eq!(
        content(&ask(&server, "image/jpeg", &webp)),
        expected,
        "sniffed by content"
    );
    assert_eq!(
        content(&ask(&server, "application/octet-stream", &png)),
        expected
    );
}

#[test]
fn a_jpeg_is_answered_alike_whole_and_streamed() {
    let server = shared();
    let jpeg = encoded(&golden("wide_900x300"), ImageFormat::Jpeg);
    let body = chat(&[pictures(&[data_url("image/jpeg", &jpeg)], "what is this?")]);
    let whole = content(&server.chat(&body).ok());
    let stream = server.chat(&with(body, json!({"stream": true})));
    assert_eq!(joined(&chunks(&stream)), whole);
}

#[test]
fn a_real_photo_is_answered_in_all_three_encodings() {
    let server = shared();
    for kind in ["jpg", "png", "webp"] {
        let photo = fixture(&format!("tests/photos/cat.{kind}"));
        let answer = ask(&server, "image/unknown", &photo);
        assert!(
            answer["usage"]["prompt_tokens"].as_u64().expect("a count") > 300,
            "{kind}"
        );
    }
}

#[test]
fn detail_chooses_how_many_crops_a_picture_gets() {
    let server = shared();
    let url = data_url("image/png", &golden("huge_2000x1500"));
    let tokens = |detail: &str| {
        let message = json!({"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": url, "detail": detail}},
        ]});
        server.chat(&chat(&[message])).ok()["usage"]["prompt_tokens"]
            .as_u64()
            .expect("a count")
    };
    let (low, auto, high) = (tokens("low"), tokens("auto"), tokens("high"));
    assert!(low < auto && auto < high, "{low} < {auto} < {high}");
}

#[test]
fn what_cannot_be_decoded_is_refused_by_name() {
    let server = shared();
    let png = golden("sq_512");
    let mut noise = png.clone();
    noise
        .iter_mut()
        .skip(64)
        .for_each(|byte| *byte = byte.wrapping_mul(31).wrapping_add(7));
    for (what, url) in [
        (
            "text",
            data_url(
                "image/png",
                b"this is not a picture, however long the text may be",
            ),
        ),
        ("long text", data_url("image/png", &[b'x'; 9000])),
        ("truncated", data_url("image/png", &png[..png.len() / 2])),
        ("truncated header", data_url("image/png", &png[..20])),
        ("damaged", data_url("image/png", &noise)),
        ("empty", "data:image/png;base64,".to_owned()),
        ("no base64", "data:image/png;base64,@@@@".to_owned()),
        (
            "long and no base64",
            format!("data:image/png;base64,{}", "@".repeat(9000)),
        ),
        (
            "a gif",
            data_url("image/gif", b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"),
        ),
    ] {
        let error = refused(&server, &url, 400);
        println!("{what}: {}", error["message"]);
    }
}

#[test]
fn a_truncated_jpeg_is_refused_too() {
    let photo = fixture("tests/photos/cat.jpg");
    refused(
        &shared(),
        &data_url("image/jpeg", &photo[..photo.len() * 2 / 3]),
        400,
    );
}

/// A PNG of 60000x60000 pixels, as far as its header goes.
fn bomb() -> Vec<u8> {
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".to_vec();
    png.extend(60_000_u32.to_be_bytes());
    png.extend(60_000_u32.to_be_bytes());
    png.extend([8, 2, 0, 0, 0]);
    png.extend(crc(&png[12..]).to_be_bytes());
    for (kind, data) in [
        (b"IDAT", &[0x78, 0x9c, 0x03, 0, 0, 0, 0, 1][..]),
        (b"IEND", &[]),
    ] {
        png.extend(u32::try_from(data.len()).expect("short").to_be_bytes());
        let start = png.len();
        png.extend(kind);
        png.extend(data);
        png.extend(crc(&png[start..]).to_be_bytes());
    }
    png
}

fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xEDB8_8320 * (crc & 1))
        })
    })
}

#[test]
fn a_bomb_is_refused_by_its_header() {
    let server = shared();
    let url = data_url("image/png", &bomb());
    let body = chat(&[pictures(&[url], "what?")]);
    let answer = server.chat(&body);
    assert!([400, 413].contains(&answer.status), "{}", answer.text());
    let error = answer.error(answer.status);
    assert!(
        error["message"]
            .as_str()
            .expect("a message")
            .contains("60000x60000"),
        "{error}"
    );
}

/// With an answer of one letter, however long it might be.
#[test]
fn a_long_answer_costs_no_crops_and_is_refused_where_it_does_not_fit() {
    let picture = data_url("image/png", &golden("sq_512"));
    let ask = |count: usize, max_tokens: u64| {
        let body = chat(&[pictures(&vec![picture.clone(); count], "what?")]);
        let format = json!({"type": "regex", "regex": "x"});
        let more = json!({"max_tokens": max_tokens, "response_format": format});
        shared().chat(&with(body, more))
    };
    let prompt = |answer: &Answer| {
        let tokens = answer.ok()["usage"]["prompt_tokens"].as_u64();
        tokens.expect("a count")
    };
    let tokens = prompt(&ask(1, 8));
    let room = 4096 - tokens;
    for max_tokens in [512, 513, 2000, room] {
        assert_eq!(prompt(&ask(1, max_tokens)), tokens, "{max_tokens}");
    }
    for max_tokens in [room + 1, room + 20, 3500, 4000] {
        let error = ask(1, max_tokens).error(400);
        assert_eq!(error["param"], "max_tokens", "{error}");
        let message = error["message"].as_str().expect("a message");
        assert!(message.contains(&max_tokens.to_string()), "{message}");
        assert!(message.contains(&tokens.to_string()), "{message}");
    }
    // Five have all their crops beside a short answer, and fewer beside a longer one.
    let (short, longer) = (prompt(&ask(5, 8)), prompt(&ask(5, 400)));
    assert!(longer < short && longer + 400 <= 4096, "{short} {longer}");
}

#[test]
fn too_many_pictures_are_refused() {
    let url = data_url("image/png", &golden("tiny_20x20"));
    let answer = shared().chat(&chat(&[pictures(&vec![url; 9], "what are these?")]));
    assert!([400, 413].contains(&answer.status), "{}", answer.text());
    let error = answer.error(answer.status);
    assert!(
        error["message"]
            .as_str()
            .expect("a message")
            .contains("9 images; 8"),
        "{error}"
    );
}

#[test]
fn pictures_over_configured_limits_are_refused() {
    let server = Server::start_with("[images]\nbytes_max = 2000\nside_px_max = 400\n");
    for name in ["sq_512", "wide_900x300"] {
        let url = data_url("image/png", &golden(name));
        let answer = server.chat(&chat(&[pictures(&[url], "what?")]));
        assert!([400, 413].contains(&answer.status), "{}", answer.text());
        answer.error(answer.status);
    }
}

/// A picture of one colour: few bytes, many pixels.
fn plain(side_px: u32) -> String {
    drawn(side_px, side_px)
}

fn drawn(width_px: u32, height_px: u32) -> String {
    let mut bytes = Cursor::new(Vec::new());
    DynamicImage::ImageRgb8(image::RgbImage::new(width_px, height_px))
        .write_to(&mut bytes, ImageFormat::Png)
        .expect("it can be encoded");
    data_url("image/png", &bytes.into_inner())
}

#[test]
fn decoded_pictures_of_all_requests_share_one_budget_of_memory() {
    const BUDGET: &str = "[images]\npixels_max = 16000000\ndecoded_mib_max = 224\n";
    /// The budget, and what requests and crops take beside it.
    const GROWTH_MIB_MAX: u64 = 400;
    let server = Arc::new(Server::start_with(BUDGET));
    let memory = |name: &str| {
        let bytes = server.stats()["memory"][name].as_u64();
        bytes.expect("this system tells") >> 20
    };
    let before = memory("resident_bytes");
    // All at once they are 768 MB.
    let body = Arc::new(chat(&[pictures(&[plain(4000)], "what is this?")]));
    let clients: Vec<_> = (0..16)
        .map(|_| {
            let (server, body) = (Arc::clone(&server), Arc::clone(&body));
            thread::spawn(move || server.chat(&body).ok())
        })
        .collect();
    for client in clients {
        client.join().expect("it waited and was answered");
    }
    let growth = memory("peak_bytes").saturating_sub(before);
    println!("16 pictures of 48 MB at once: {growth} MiB more than before");
    assert!(growth < GROWTH_MIB_MAX, "{growth} MiB");

    let error = server
        .chat(&chat(&[pictures(&vec![plain(4000); 5], "and these?")]))
        .error(413);
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains("images.decoded_mib_max"), "{message}");
}

/// A picture in four crops and a whole is 6.5 MiB.
#[test]
fn crops_of_all_requests_share_one_budget_of_memory() {
    let server = Arc::new(Server::start_with("[images]\ncrops_mib_max = 32\n"));
    let asking = |count: usize| {
        let different: Vec<_> = (0..count as u32).map(|index| plain(400 + index)).collect();
        chat(&[pictures(&different, "what are these?")])
    };
    // Of six clients with four pictures each, one has room at a time.
    let clients: Vec<_> = (0..6)
        .map(|_| {
            let (server, body) = (Arc::clone(&server), asking(4));
            thread::spawn(move || server.chat(&body).ok())
        })
        .collect();
    for client in clients {
        client.join().expect("it waited and was answered");
    }
    let error = server.chat(&asking(5)).error(413);
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains("images.crops_mib_max"), "{message}");
    server.chat(&asking(4)).ok();
}

/// A tall picture of 3.8 million pixels takes 22 MiB while it is turned.
#[test]
fn what_making_crops_takes_has_a_budget() {
    let server = Server::start_with("[images]\npixels_max = 4000000\ncanvases_mib_max = 38\n");
    let server = Arc::new(server);
    let clients: Vec<_> = (0..6)
        .map(|index| {
            let server = Arc::clone(&server);
            let tall = drawn(1900 + index, 2000);
            thread::spawn(move || {
                server
                    .chat(&chat(&[pictures(&[tall], "what is this?")]))
                    .ok()
            })
        })
        .collect();
    for client in clients {
        client.join().expect("it waited and was answered");
    }
    // Neither alone, nor with what stays until the next start, does a file get its way that leaves no room for one picture.
    for (images, says) in [
        ("canvases_mib_max = 1", "images.canvases_mib_max"),
        ("count_max = 2", "until the next start"),
    ] {
        let file = format!("[images]\n{images}\n");
        fs::write(server.folder().join("visor.toml"), file).expect("written");
        until("the file is refused", || {
            let why = server.stats()["config"]["last_error"].as_str()?.to_owned();
            (why.contains(says) && why.contains("images.pixels_max")).then_some(())
        });
    }
}
