//! Formats over the real model's vocabulary: whatever is drawn at random within the mask fits.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use visor_engine::{ConstraintError, Grammar};

use super::*;
use crate::calls::{Reader, Said};
use visor_sandbox::{CallSyntax, ToolChoice, ToolSpec};

const VOCAB: usize = 32064;

pub(super) fn formats() -> &'static Formats {
    static FORMATS: OnceLock<Formats> = OnceLock::new();
    FORMATS.get_or_init(|| {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../model/phi3/tokenizer.json");
        let tokenizer = Tokenizer::from_file(path.as_ref()).unwrap();
        let stop_ids = tokenizer.stop_ids(&[2]);
        Formats::new(Arc::new(tokenizer), stop_ids)
    })
}

pub(super) fn bounds() -> Bounds {
    Bounds {
        stop_ids: formats().stop_ids.clone(),
        ..Bounds::default()
    }
}

fn compile_within(format: &OutputFormat, bounds: Bounds) -> Result<Arc<dyn Grammar>, FormatError> {
    let compiled = formats().compile(
        (format, Follow::Strictly),
        None,
        bounds,
        &FormatsConfig::default(),
    );
    compiled.map(|grammar| grammar.expect("no free text"))
}

fn compile(format: &OutputFormat) -> Result<Arc<dyn Grammar>, FormatError> {
    compile_within(format, bounds())
}

pub(super) fn schema_of(schema: &Value) -> OutputFormat {
    OutputFormat::JsonSchema(schema.to_string())
}

fn regex(pattern: &str) -> OutputFormat {
    OutputFormat::Regex(pattern.to_owned())
}

/// xorshift64*, so that a failure can be run again.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % bound
    }
}

/// A walk at random: its tokens, and whether the answer came to an end of its own.
pub(super) struct Walk {
    pub(super) tokens: Vec<u32>,
    ended: bool,
    pub(super) failed: Option<ConstraintError>,
    slowest: Duration,
    /// In `mask` and `accept` together.
    time: Duration,
}

pub(super) fn walk(grammar: &Arc<dyn Grammar>, seed: usize, tokens_max: usize) -> Walk {
    let mut random = Random(0x9E37_79B9 + seed as u64 * 77);
    let mut following = grammar.follow();
    let mut walk = Walk {
        tokens: Vec::new(),
        ended: false,
        failed: None,
        slowest: Duration::ZERO,
        time: Duration::ZERO,
    };
    while walk.tokens.len() < tokens_max {
        let mut logits = vec![0.0; VOCAB];
        let began = Instant::now();
        let masked = following.mask(&mut logits);
        walk.slowest = walk.slowest.max(began.elapsed());
        walk.time += began.elapsed();
        if let Err(error) = masked {
            walk.failed = Some(error);
            break;
        }
        let allowed: Vec<u32> = (0..VOCAB as u32)
            .filter(|id| logits[*id as usize] == 0.0)
            .collect();
        assert!(!allowed.is_empty(), "neither a token nor an end");
        let stop = allowed.iter().find(|id| formats().stop_ids.contains(id));
        let token = match stop {
            Some(stop) if random.below(3) == 0 || allowed.len() <= 8 => *stop,
            _ => allowed[random.below(allowed.len())],
        };
        if formats().stop_ids.contains(&token) {
            walk.ended = true;
            break;
        }
        walk.tokens.push(token);
        let began = Instant::now();
        let accepted = following.accept(token);
        walk.time += began.elapsed();
        match accepted {
            Ok(false) => (),
            Ok(true) => {
                walk.ended = true;
                break;
            }
            Err(error) => {
                walk.failed = Some(error);
                break;
            }
        }
    }
    walk
}

/// What walks say that come to their end, and how many do not.
fn said(format: &OutputFormat) -> (Vec<String>, usize) {
    said_within(&compile(format).unwrap())
}

pub(super) fn said_within(grammar: &Arc<dyn Grammar>) -> (Vec<String>, usize) {
    let mut cut = 0;
    let mut texts = Vec::new();
    for seed in 0..30 {
        let walk = walk(grammar, seed, 200);
        assert_eq!(walk.failed, None);
        if walk.ended {
            texts.push(formats().tokenizer.decode(&walk.tokens, true));
        } else {
            cut += 1;
        }
    }
    (texts, cut)
}

#[test]
fn whatever_is_drawn_matches_an_expression() {
    type Fits = fn(&str) -> bool;
    let table: [(&str, Fits); 8] = [
        ("yes|no", |text| ["yes", "no"].contains(&text)),
        ("^(cat|dog){2}$", |text| {
            ["catcat", "catdog", "dogcat", "dogdog"].contains(&text)
        }),
        ("[0-9]{3}-[0-9]{2}", |text| {
            text.len() == 6 && text.as_bytes()[3] == b'-'
        }),
        // The decoder strips one space of a text.
        (" {2}x", |text| text == "  x"),
        ("x?", |text| ["", "x"].contains(&text)),
        ("", |text| text.is_empty()),
        ("(日本|🦀|ä){3}", |text| text.chars().count() <= 6),
        (r"a/\$", |text| text == "a/$"),
    ];
    for (pattern, fits) in table {
        let (texts, cut) = said(&regex(pattern));
        assert_eq!(cut, 0, "{pattern}");
        for text in texts {
            assert!(fits(&text), "{pattern}: {text:?}");
        }
    }
}

#[test]
fn whatever_is_drawn_fits_a_schema_in_its_order() {
    let text = r##"{"type":"object","properties":{
        "size":{"type":"integer","minimum":-5,"maximum":99},
        "kind":{"enum":["a","bé",null,4]},
        "also":{"type":"array","items":{"$ref":"#/$defs/flag"},"maxItems":2}
    },"required":["size","kind","also"],"additionalProperties":false,"$defs":{"flag":{"type":"boolean"}}}"##;
    let (texts, _) = said(&OutputFormat::JsonSchema(text.to_owned()));
    assert!(texts.len() > 15, "{}", texts.len());
    for text in texts {
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value.as_object().unwrap().len(), 3);
        // -0 is one of them.
        let size = value["size"].as_f64().unwrap();
        assert!(size.fract() == 0.0 && (-5.0..=99.0).contains(&size));
        assert!([json!("a"), json!("bé"), json!(null), json!(4)].contains(&value["kind"]));
        let also = value["also"].as_array().unwrap();
        assert!(also.len() <= 2 && also.iter().all(Value::is_boolean));
        let places = ["size", "kind", "also"].map(|key| text.find(&format!("\"{key}\"")));
        assert!(places.is_sorted(), "{text}");
        assert!(!text.starts_with(' '), "{text:?}");
    }
}

#[test]
fn json_is_an_object() {
    let (texts, _) = said(&OutputFormat::Json);
    assert!(!texts.is_empty());
    for text in texts {
        assert!(serde_json::from_str::<Value>(&text).unwrap().is_object());
        assert!(!text.contains(['\n', '\t']), "indented: {text}");
    }
}

#[test]
fn an_answer_is_judged_with_what_it_begins_with() {
    let begun = |prefill: &str| Bounds {
        prefill: Some(prefill.to_owned()),
        continues: true,
        ..bounds()
    };
    let format = regex("count: (one| two)");
    let grammar = compile_within(&format, begun("count:")).unwrap();
    for seed in 0..10 {
        let walk = walk(&grammar, seed, 20);
        let ids = [formats().tokenizer.encode_text("count:"), walk.tokens].concat();
        let text = formats().tokenizer.decode(&ids, true);
        assert!(
            ["count: one", "count:  two"].contains(&text.as_str()),
            "{text}"
        );
    }
    let refused = compile_within(&format, begun("sum:")).err();
    assert_eq!(refused, Some(FormatError::Beginning));
}

#[test]
fn copies_of_a_grammar_do_not_see_each_other() {
    let grammar = compile(&regex("[a-c]{6}")).unwrap();
    let alone: Vec<Vec<u32>> = (0..6).map(|seed| walk(&grammar, seed, 20).tokens).collect();
    let threads: Vec<_> = (0..6)
        .map(|seed| {
            let grammar = Arc::clone(&grammar);
            std::thread::spawn(move || walk(&grammar, seed, 20).tokens)
        })
        .collect();
    let together: Vec<Vec<u32>> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    assert_eq!(together, alone);
}

/// Schemas and expressions of somebody who means no good, which are followed within their limits.
#[test]
fn hostile_formats_stay_within_their_limits() {
    let mut deep = json!({ "type": "integer" });
    for _ in 0..60 {
        deep = json!({ "type": "object", "properties": { "a": deep }, "required": ["a"] });
    }
    let wide = |count: usize| -> Value {
        let members = (0..count).map(|n| (format!("property_{n}"), json!({ "type": "string" })));
        Value::Object(members.collect())
    };
    let followed = [
        schema_of(&deep),
        schema_of(&json!({ "type": "object", "properties": wide(700) })),
        schema_of(&json!({ "type": "string", "minLength": 100_000, "maxLength": 1_000_000 })),
        schema_of(&json!({ "type": "array", "minItems": 100_000, "items": { "type": "null" } })),
        schema_of(&json!({ "type": "integer", "multipleOf": 997 })),
        schema_of(
            &json!({ "$defs": { "t": { "type": "array", "items": { "$ref": "#/$defs/t" } } }, "$ref": "#/$defs/t" }),
        ),
        // Named, and not looked up.
        schema_of(&json!({ "$schema": "http://127.0.0.1:1/meta", "type": "string" })),
        regex("(a+)+b"),
        regex("(a|b)*a(a|b){200}"),
        regex("((a{1000}){1000}){1000}"),
        regex("(.*a.{20}b|.*c.{30}d|.*e.{25}f)"),
        regex(r"(\w|\p{Greek}|\d){1,2000}"),
        regex(
            &(0..300)
                .map(|n| format!(".*w{n}.*x{n}"))
                .collect::<Vec<_>>()
                .join("|"),
        ),
    ];
    for format in &followed {
        let began = Instant::now();
        let grammar = compile(format).unwrap_or_else(|error| panic!("{error}: {format:.200?}"));
        let compiled = began.elapsed();
        let walk = walk(&grammar, 1, 200);
        let mut text = format!("{format:?}");
        text.truncate(60);
        assert!(compiled < Duration::from_secs(20), "{text}");
        // A limit on work, not on time; this only tells milliseconds from seconds.
        assert!(walk.slowest < Duration::from_secs(1), "{text}");
        if let Some(error) = walk.failed {
            assert!(error.0.contains("more work"), "{error}");
        }
    }
}

/// And those that are not.
#[test]
fn hostile_formats_are_refused_in_time() {
    let either = |n: usize| json!({ "anyOf": [{ "properties": { format!("a{n}"): {} } }, { "properties": { format!("b{n}"): {} } }] });
    let eithers: Vec<Value> = (0..14).map(either).collect();
    let multiples: Vec<Value> = [97, 101, 103].map(|n| json!({ "multipleOf": n })).into();
    let refused = [
        schema_of(&json!({ "allOf": eithers })),
        schema_of(&json!({ "$ref": "#" })),
        schema_of(
            &json!({ "$defs": { "a": { "$ref": "#/$defs/b" }, "b": { "$ref": "#/$defs/a" } }, "$ref": "#/$defs/a" }),
        ),
        schema_of(&json!({ "$ref": "http://127.0.0.1:1/schema.json" })),
        schema_of(&json!({ "$ref": "file:///etc/passwd" })),
        schema_of(&json!({ "$ref": ["ä".repeat(200)] })),
        schema_of(&json!({ "type": "integer", "multipleOf": 999_983 })),
        schema_of(&json!({ "type": "integer", "allOf": multiples })),
        schema_of(&json!({ "enum": [] })),
        OutputFormat::JsonSchema("{".to_owned()),
        OutputFormat::JsonSchema("5".to_owned()),
        OutputFormat::JsonSchema("[".repeat(10_000)),
        regex("("),
        regex(&format!("{}a{}", "(".repeat(10_000), ")*".repeat(10_000))),
        regex(r"a(?=b)b"),
        regex(r"[^\s\S]"),
        regex(&"x".repeat(100_000)),
    ];
    for format in &refused {
        let began = Instant::now();
        let error = compile(format).expect_err(&format!("{format:.200?}"));
        let message = error.to_string();
        assert!(began.elapsed() < Duration::from_secs(20), "{message}");
        assert!(
            message.len() < 500 && !message.contains("panic"),
            "{message}"
        );
    }
}

/// A tool whose every call is short, and one without arguments.
fn calls(choice: ToolChoice, count_max: u32) -> Calls {
    let tool = |name: &str, parameters: &Value| ToolSpec {
        name: name.to_owned(),
        description: String::new(),
        parameters: parameters.to_string(),
    };
    let syntax = CallSyntax {
        open: "call[".to_owned(),
        between: ", ".to_owned(),
        close: "]".to_owned(),
    };
    let weather = json!({
        "properties": { "unit": { "enum": ["C", "F"] }, "days": { "type": "integer", "minimum": 1, "maximum": 9 } },
        "required": ["unit", "days"],
    });
    Calls {
        syntax,
        tools: vec![
            tool("weather", &weather),
            tool("the_time", &json!({ "type": "object", "properties": {} })),
        ],
        strict: std::collections::BTreeSet::new(),
        choice,
        count_max,
    }
}

fn compile_calls(calls: &Calls, format: &OutputFormat) -> Result<Arc<dyn Grammar>, FormatError> {
    let compiled = formats().compile(
        (format, Follow::Strictly),
        Some(calls),
        bounds(),
        &FormatsConfig::default(),
    );
    compiled.map(|grammar| grammar.expect("no free text"))
}

/// The calls in a text, whose arguments fit.
fn read_calls(calls: &Calls, text: &str) -> Vec<String> {
    let mut reader = Reader::new(Some(Arc::new(calls.clone())));
    let said = reader.take(text);
    let name = |said: &Said| {
        let Said::Call(call) = said else {
            panic!("{text}");
        };
        let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
        match call.name.as_str() {
            "weather" => {
                assert_eq!(arguments.as_object().unwrap().len(), 2, "{text}");
                assert!(["C", "F"].contains(&arguments["unit"].as_str().unwrap()));
            }
            "the_time" => assert_eq!(arguments, json!({})),
            other => panic!("{other}"),
        }
        call.name.clone()
    };
    said.iter().map(name).collect()
}

#[test]
fn calls_that_are_required_are_made_and_fit() {
    let both = calls(ToolChoice::Required, 3);
    let (texts, _) = said_within(&compile_calls(&both, &OutputFormat::Text).unwrap());
    assert!(texts.len() > 15, "{}", texts.len());
    let names: Vec<Vec<String>> = texts.iter().map(|text| read_calls(&both, text)).collect();
    assert!(names.iter().all(|calls| (1..=3).contains(&calls.len())));
    assert!(names.iter().any(|calls| calls.len() > 1));
    let flat = names.concat();
    assert!(flat.contains(&"weather".to_owned()) && flat.contains(&"the_time".to_owned()));

    let named = calls(ToolChoice::Named("the_time".to_owned()), 1);
    let (texts, cut) = said_within(&compile_calls(&named, &OutputFormat::Json).unwrap());
    assert_eq!(cut, 0);
    for text in texts {
        assert_eq!(read_calls(&named, &text), ["the_time"]);
    }
}

#[test]
fn who_may_choose_answers_or_calls() {
    let syntax = calls(ToolChoice::Auto, 2);
    let text = |grammar: &Arc<dyn Grammar>, text: &str| {
        let mut following = grammar.follow();
        let ids = formats().tokenizer.encode_text(text);
        for id in ids {
            let mut logits = vec![0.0; VOCAB];
            following.mask(&mut logits).unwrap();
            if logits[id as usize] != 0.0 {
                return None;
            }
            following.accept(id).unwrap();
        }
        let mut logits = vec![0.0; VOCAB];
        following.mask(&mut logits).unwrap();
        Some(
            formats()
                .stop_ids
                .iter()
                .any(|id| logits[*id as usize] == 0.0),
        )
    };
    let free = compile_calls(&syntax, &OutputFormat::Text).unwrap();
    for whole in [
        "",
        "A cat.",
        "call",
        "call me\n\n",
        "I call[",
        "日本 {}",
        r#"call[{"name": "the_time", "arguments": {}}]"#,
    ] {
        assert_eq!(text(&free, whole), Some(true), "{whole}");
    }
    assert_eq!(text(&free, r#"call[{"name": "#), Some(false));
    assert_eq!(text(&free, "call[ing"), None);
    let held = compile_calls(&syntax, &regex("yes|no|call.*")).unwrap();
    for (said, fits) in [
        ("yes", Some(true)),
        ("maybe", None),
        ("call me", Some(true)),
        ("call[x", None),
    ] {
        assert_eq!(text(&held, said), fits, "{said}");
    }
    let (texts, _) =
        said_within(&compile_calls(&syntax, &schema_of(&json!({ "enum": [1, "a"] }))).unwrap());
    for text in texts {
        let is_answer = [json!(1), json!("a")]
            .map(|v| v.to_string())
            .contains(&text);
        assert!(
            is_answer || !read_calls(&syntax, &text).is_empty(),
            "{text}"
        );
    }
}

#[test]
fn a_tool_that_cannot_be_called_is_named() {
    for parameters in [
        json!({ "type": "object", "properties": { "a": { "type": "no such type" } } }),
        json!({ "type": "object", "properties": { "a": { "$ref": "http://127.0.0.1:1/x.json" } } }),
        json!({ "type": "object", "properties": { "a": { "enum": [] } }, "required": ["a"] }),
        json!({ "type": "string" }),
        json!({ "multipleOf": 99_999 }),
        json!(5),
    ] {
        for choice in [ToolChoice::Auto, ToolChoice::Required] {
            let mut calls = calls(choice, 2);
            calls.tools[1].parameters = parameters.to_string();
            let error = compile_calls(&calls, &OutputFormat::Text).expect_err("refused");
            let FormatError::Tool { index: 1, why, .. } = &error else {
                panic!("{error}: {parameters}");
            };
            assert!(why.len() < 500 && !why.contains("start:"), "{why}");
        }
    }
    let wrong = compile_calls(&calls(ToolChoice::Auto, 2), &regex("(")).unwrap_err();
    assert!(matches!(wrong, FormatError::Unusable(_)), "{wrong}");
}

#[test]
fn what_cannot_be_followed_of_a_tool_is_left_out_unless_it_is_strict() {
    let mut calls = calls(ToolChoice::Named("the_time".to_owned()), 1);
    let a = json!({ "type": "integer", "minimum": 7, "maximum": 9, "not": { "const": 8 } });
    let parameters = json!({ "properties": { "a": a }, "required": ["a"] });
    calls.tools[1].parameters = parameters.to_string();
    let (texts, _) = said_within(&compile_calls(&calls, &OutputFormat::Text).unwrap());
    assert!(!texts.is_empty());
    for text in texts {
        assert!(text.contains(['7', '8', '9']), "{text}");
    }
    calls.strict.insert(1);
    let error = compile_calls(&calls, &OutputFormat::Text).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the parameters of the tool `the_time` cannot be used: it has keywords that cannot be followed here: `not`"
    );
}

#[test]
fn many_tools_are_followed_in_time() {
    let mut many = calls(ToolChoice::Auto, 16);
    let weather = many.tools[0].clone();
    many.tools = (0..128)
        .map(|n| ToolSpec {
            name: format!("tool_{n}"),
            ..weather.clone()
        })
        .collect();
    let began = Instant::now();
    let grammar = compile_calls(&many, &OutputFormat::Text).unwrap();
    assert!(began.elapsed() < Duration::from_secs(20));
    let walk = walk(&grammar, 1, 200);
    assert_eq!(walk.failed, None);
    assert!(walk.slowest < Duration::from_secs(1));
}

#[test]
fn the_digits_of_multiples_are_bounded_together() {
    for (schema, fits) in [
        (json!({ "multipleOf": 0.01 }), true),
        (json!({ "multipleOf": 1000 }), true),
        (json!({ "multipleOf": 1001 }), false),
        (json!({ "multipleOf": 1e300 }), false),
        (json!({ "multipleOf": 0.123_45 }), false),
        (json!({ "multipleOf": 0 }), true),
        (
            json!({ "properties": { "multipleOf": { "type": "string" } } }),
            true,
        ),
        (
            json!({ "anyOf": [{ "multipleOf": 8 }, { "multipleOf": 0.12 }] }),
            true,
        ),
        (
            json!({ "anyOf": [{ "multipleOf": 37 }, { "multipleOf": 31 }] }),
            false,
        ),
    ] {
        assert_eq!(multiple(&schema).is_some(), fits, "{schema}");
    }
}

#[test]
fn only_an_anchor_at_an_end_is_left_out() {
    for (pattern, inner) in [
        ("^a$", "a"),
        ("a$", "a"),
        (r"a\$", r"a\$"),
        (r"a\\$", r"a\\"),
        ("", ""),
    ] {
        assert_eq!(whole(pattern), inner);
    }
}

/// Prints what a format adds to a token: `cargo test --release -p visor --lib what_a_format_costs -- --ignored --nocapture`.
#[test]
#[ignore = "tells times, judges nothing"]
fn what_a_format_costs() {
    let began = Instant::now();
    formats().vocabulary().unwrap();
    println!("vocabulary, once: {:.1?}", began.elapsed());
    let person = json!({ "type": "object", "required": ["name", "age", "tags"], "properties": {
        "name": { "type": "string", "maxLength": 40 },
        "age": { "type": "integer", "minimum": 0, "maximum": 120 },
        "tags": { "type": "array", "items": { "enum": ["red", "green", "blue"] }, "maxItems": 5 },
    } });
    for (name, format) in [
        ("json_object", OutputFormat::Json),
        ("a schema", schema_of(&person)),
        ("(yes|no), [a-z ]{80}", regex("(yes|no), [a-z ]{80}")),
    ] {
        let began = Instant::now();
        let grammar = compile(&format).unwrap();
        let compiled = began.elapsed();
        let walks: Vec<Walk> = (0..40).map(|seed| walk(&grammar, seed, 200)).collect();
        let tokens: usize = walks.iter().map(|walk| walk.tokens.len()).sum();
        let time: Duration = walks.iter().map(|walk| walk.time).sum();
        let slowest = walks.iter().map(|walk| walk.slowest).max().unwrap();
        let each = time / u32::try_from(tokens).unwrap();
        println!(
            "{name}: compiled in {compiled:.1?}, {each:.1?} a token of {tokens}, {slowest:.1?} at most"
        );
    }
}
