//! Tests of lifting: against examples, against a parser.

use super::*;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use visor_sandbox::Lifted as Originals;

const LIMITS: LiftLimits = LiftLimits {
    lift_bytes_min: 64,
    depth_max: 32,
    values_max: 1000,
    blobs_max: 8,
    text_bytes_max: 100_000,
};

fn lifted(body: &str) -> Lifted {
    lift(&Bytes::from(body.to_owned()), "M".to_owned(), &LIMITS).expect("within the limits")
}

fn noise(length: usize) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(length as u64);
    (0..length).map(|_| random.random()).collect()
}

#[test]
fn a_long_data_url_is_replaced_by_a_token_and_decoded() {
    let bytes = noise(100);
    let url = format!("data:image/png;base64,{}", STANDARD.encode(&bytes));
    let lifted = lifted(&json!({"a": [{"url": url}], "b": 1}).to_string());
    assert_eq!(lifted.text, r#"{"a":[{"url":"M:0"}],"b":1}"#);
    assert_eq!(lifted.blobs[0].bytes, bytes);
    assert_eq!(lifted.blobs[0].content_type, "image/png");
    assert_eq!(lifted.blobs[0].original, url);
}

#[test]
fn plain_base64_is_lifted_in_both_alphabets_with_and_without_padding() {
    let bytes = noise(101);
    for encoded in [STANDARD.encode(&bytes), URL_SAFE_NO_PAD.encode(&bytes)] {
        let lifted = lifted(&json!({ "images": [encoded] }).to_string());
        assert_eq!(lifted.text, r#"{"images":["M:0"]}"#);
        assert_eq!(lifted.blobs[0].bytes, bytes);
    }
}

#[test]
fn escapes_that_encoders_use_inside_base64_are_understood() {
    let bytes = [0xFF_u8; 90];
    let plain = format!("data:image/jpeg;base64,{}", STANDARD.encode(bytes));
    let escaped_slashes = plain.replace('/', "\\/");
    let escaped_unicode = plain.replace('/', "\\u002F");
    let wrapped = format!("{}\\r\\n{}", &plain[..60], &plain[60..]);
    for spelled in [escaped_slashes, escaped_unicode, wrapped] {
        let lifted = lifted(&format!(r#"["{spelled}"]"#));
        assert_eq!(lifted.text, r#"["M:0"]"#);
        assert_eq!(lifted.blobs[0].bytes, &bytes[..]);
    }
}

#[test]
fn short_strings_keys_prose_and_broken_json_stay_as_they_are() {
    let key = "A".repeat(200);
    for body in [
        r#"{"url":"data:image/png;base64,AAAA"}"#.to_owned(),
        format!(r#"{{"{key}" : 1}}"#),
        format!(r#"["{}"]"#, "two words ".repeat(20)),
        format!(r#"["{}\x41"]"#, "A".repeat(200)),
        format!(r#"["{}"#, "A".repeat(200)),
        format!(r#"["{}\"#, "A".repeat(200)),
        "plain text".to_owned(),
        String::new(),
    ] {
        let lifted = lifted(&body);
        assert_eq!(lifted.text, body);
        assert!(lifted.blobs.is_empty());
    }
}

#[test]
fn a_broken_data_url_is_lifted_as_its_own_text() {
    let url = format!("data:image/png;base64,{}", "@".repeat(100));
    let lifted = lifted(&format!(r#"["{url}"]"#));
    assert_eq!(lifted.text, r#"["M:0"]"#);
    assert_eq!(lifted.blobs[0].bytes, url);
    assert_eq!(lifted.blobs[0].content_type, data_url::BROKEN_CONTENT_TYPE);
}

#[test]
fn ten_thousand_brackets_are_refused_without_recursion() {
    let body = Bytes::from("[".repeat(10_000));
    let error = lift(&body, "M".to_owned(), &LIMITS).unwrap_err();
    assert_eq!(error, LiftError::TooDeep { depth_max: 32 });
    let in_a_string = format!(r#"["{}"]"#, "[".repeat(10_000));
    assert!(lift(&Bytes::from(in_a_string), "M".to_owned(), &LIMITS).is_ok());
}

#[test]
fn a_body_of_countless_small_values_is_refused() {
    let check = |body: String| lift(&Bytes::from(body), "M".to_owned(), &LIMITS).map(|_| ());
    let error = LiftError::TooManyValues { values_max: 1000 };
    assert_eq!(
        check(format!("[{}0]", "0,".repeat(1000))),
        Err(error.clone())
    );
    assert_eq!(check(format!("[{}{{}}]", "{},".repeat(500))), Err(error));
    assert_eq!(check(format!("[{}0]", "0,".repeat(999))), Ok(()));
    assert_eq!(
        check(format!("[\"{}\"]", ",".repeat(5000))),
        Ok(()),
        "text is not counted"
    );
}

#[test]
fn limits_on_count_and_text_and_the_encoding_are_errors() {
    let many = json!(vec!["A".repeat(200); 9]).to_string();
    let wide = json!("a b".repeat(50_000)).to_string();
    let check = |body: Vec<u8>| lift(&Bytes::from(body), "M".to_owned(), &LIMITS).unwrap_err();
    assert_eq!(
        check(many.into_bytes()),
        LiftError::TooManyBlobs { blobs_max: 8 }
    );
    assert!(matches!(
        check(wide.into_bytes()),
        LiftError::TooMuchText {
            text_bytes: 150_002,
            ..
        }
    ));
    assert_eq!(check(b"[\xFF]".to_vec()), LiftError::NotUtf8 { offset: 1 });
}

/// Against a parser: lifting and putting back is the identity on every JSON value.
#[test]
fn lifting_random_bodies_and_restoring_them_is_the_identity() {
    let mut random = StdRng::seed_from_u64(7);
    for _ in 0..300 {
        let value = random_value(&mut random, 0);
        let body = if random.random() {
            value.to_string()
        } else {
            serde_json::to_string_pretty(&value).expect("a value serializes")
        };
        let marker = random_marker();
        let limits = LiftLimits {
            values_max: usize::MAX,
            blobs_max: 10_000,
            text_bytes_max: usize::MAX,
            ..LIMITS
        };
        let lifted = lift(&Bytes::from(body), marker.clone(), &limits).expect("no limit is near");
        let mut parsed: Value = serde_json::from_str(&lifted.text).expect("still JSON");
        let originals = lifted.blobs.iter().map(|blob| blob.original.clone());
        put_back(&mut parsed, &Originals::new(marker, originals.collect()));
        assert_eq!(parsed, value);
    }
}

fn put_back(value: &mut Value, lifted: &Originals) {
    match value {
        Value::String(text) => *text = lifted.pieces(text).map(|piece| piece.shown()).collect(),
        Value::Array(items) => items.iter_mut().for_each(|item| put_back(item, lifted)),
        Value::Object(members) => members.values_mut().for_each(|item| put_back(item, lifted)),
        _ => {}
    }
}

fn random_value(random: &mut StdRng, depth: u32) -> Value {
    match random.random_range(0..if depth < 4 { 8 } else { 5 }) {
        0 => json!(random.random::<i32>()),
        1 => json!(
            "quote \" backslash \\ snowman \u{2603} \u{1F600}".repeat(random.random_range(0..6))
        ),
        2 => json!(STANDARD.encode(noise(random.random_range(0..200)))),
        3 => json!(format!(
            "data:image/webp;base64,{}",
            STANDARD.encode(noise(random.random_range(0..200)))
        )),
        4 => Value::Null,
        5 | 6 => (0..random.random_range(0..5))
            .map(|_| random_value(random, depth + 1))
            .collect(),
        _ => (0..random.random_range(0..5))
            .map(|index| {
                (
                    format!("{index}{}", "k".repeat(90)),
                    random_value(random, depth + 1),
                )
            })
            .collect(),
    }
}
