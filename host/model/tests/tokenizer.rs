//! The tokenizer against the reference's cases, and against clients who type control tokens.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::Value;
use visor_model::{ModelError, Prompt, PromptPart, Tokenizer};

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("phi3/tokenizer.json");
    Tokenizer::from_file(&path).expect("the embedded tokenizer is sound")
});

#[derive(Deserialize)]
struct Cases {
    encode: Vec<Encode>,
    placeholder: Vec<Placeholder>,
    chat_template: Vec<Chat>,
}

#[derive(Deserialize)]
struct Encode {
    text: String,
    ids: Vec<u32>,
    ids_no_bos: Vec<u32>,
    decode_skip: String,
    decode_full: String,
}

#[derive(Deserialize)]
struct Placeholder {
    prompt: String,
    pretend_num_img_tokens: Vec<u32>,
    ids: Vec<i64>,
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Message>,
    with_gen_prompt: String,
    no_gen_prompt: String,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: String,
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/golden")
        .join(name)
}

fn json<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    let bytes = std::fs::read(path).expect("goldens are in the repository");
    serde_json::from_slice(&bytes).expect("goldens are sound")
}

fn cases() -> Cases {
    json(&golden("tokenizer_cases.json"))
}

fn text(text: &str) -> PromptPart {
    PromptPart::Text(text.into())
}

fn control(name: &str) -> PromptPart {
    PromptPart::Control(name.into())
}

/// The parts a template would have made of a rendered prompt.
fn parts(rendered: &str, image_tokens: &[u32]) -> Vec<PromptPart> {
    let mut parts = Vec::new();
    let mut rest = rendered;
    while let Some(start) = rest.find("<|") {
        let end = start
            + rest[start..]
                .find("|>")
                .map_or(rest.len() - start, |end| end + 2);
        parts.push(text(&rest[..start]));
        let tag = &rest[start..end];
        let image = tag
            .strip_prefix("<|image_")
            .and_then(|tag| tag.strip_suffix("|>"));
        if let Some(index) = image.and_then(|number| number.parse::<u32>().ok()) {
            let tokens = image_tokens[index as usize - 1];
            parts.push(PromptPart::Image {
                index: index - 1,
                tokens,
            });
        } else if TOKENIZER.control_token(tag).is_some() {
            parts.push(control(tag));
        } else {
            parts.push(text(tag));
        }
        rest = &rest[end..];
    }
    parts.push(text(rest));
    parts
}

fn ids(prompt: &Prompt) -> &[i64] {
    let slots = prompt.ids.iter().filter(|id| **id < 0).count();
    assert_eq!(prompt.image_tokens as usize, slots);
    &prompt.ids
}

/// The demo's own: a small vocabulary that still holds every text, and the real one's control tokens as they are.
#[test]
fn the_demo_tokenizer_is_of_the_same_kind() {
    let path = |name: &str| {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(name)
            .join("tokenizer.json")
    };
    let demo = Tokenizer::from_file(&path("demo")).expect("the demo's tokenizer is sound");
    let reference = cases().encode.into_iter().map(|case| case.text);
    let more = [
        "naïve café – 日本語 🍎",
        "  two  spaces\n\ttab ",
        "\0\u{7}\u{10ffff}",
        "",
    ];
    // "▁" itself is what both write for a space.
    let texts = reference
        .chain(more.map(str::to_owned))
        .filter(|text| !text.contains('▁'));
    for text in texts {
        assert_eq!(
            demo.decode(&demo.encode_text(&text), false),
            text,
            "{text:?}"
        );
    }
    let added = |name: &str| -> BTreeMap<String, Value> {
        let mut file: Value = json(&path(name));
        let tokens: Vec<Value> =
            serde_json::from_value(file["added_tokens"].take()).expect("a list");
        let by_text = tokens.into_iter().map(|mut token| {
            token["id"].take();
            (token["content"].as_str().expect("text").to_owned(), token)
        });
        by_text.collect()
    };
    let (ours, theirs) = (added("demo"), added("phi3"));
    assert_eq!(ours.len(), 15);
    for (text, token) in ours {
        assert_eq!(Some(&token), theirs.get(&text), "{text}");
    }
}

#[test]
fn every_reference_text_has_the_reference_ids() {
    let cases = cases().encode;
    assert_eq!(cases.len(), 72);
    for case in cases {
        let what = &case.text;
        assert_eq!(
            TOKENIZER.encode_with_control(what),
            case.ids_no_bos,
            "{what:?}"
        );
        assert_eq!(
            TOKENIZER.decode(&case.ids, true),
            case.decode_skip,
            "{what:?}"
        );
        assert_eq!(
            TOKENIZER.decode(&case.ids, false),
            case.decode_full,
            "{what:?}"
        );
        let rendered = TOKENIZER.assemble_rendered(&what.replace("<|image_", "<|imag_"), &[]);
        if !what.contains("<|image_") {
            let want: Vec<i64> = case.ids.iter().map(|id| i64::from(*id)).collect();
            assert_eq!(ids(&rendered.unwrap()), want, "{what:?}");
        }
        // Without control tokens in it, a text has one encoding.
        if !parts(what, &[0])
            .iter()
            .any(|part| matches!(part, PromptPart::Control(_)))
            && !what.contains("<s>")
            && !what.contains("</s>")
            && !what.contains("<unk>")
        {
            assert_eq!(TOKENIZER.encode_text(what), case.ids_no_bos, "{what:?}");
            assert_eq!(TOKENIZER.count(what) as usize, case.ids_no_bos.len());
        }
    }
}

#[test]
fn placeholders_expand_as_in_the_reference() {
    let cases = cases().placeholder;
    assert_eq!(cases.len(), 7);
    for case in cases {
        let tokens = &case.pretend_num_img_tokens;
        let rendered = TOKENIZER.assemble_rendered(&case.prompt, tokens).unwrap();
        assert_eq!(ids(&rendered), case.ids, "{:?}", case.prompt);
        let assembled = TOKENIZER.assemble(&parts(&case.prompt, tokens)).unwrap();
        assert_eq!(ids(&assembled), case.ids, "{:?}", case.prompt);
    }
}

#[test]
fn chats_in_parts_have_the_ids_of_the_rendered_template() {
    let cases = cases().chat_template;
    assert_eq!(cases.len(), 3);
    for case in cases {
        let mut parts = Vec::new();
        for message in &case.messages {
            parts.push(control(&format!("<|{}|>", message.role)));
            parts.extend([text("\n"), text(&message.content)]);
            parts.extend([control("<|end|>"), text("\n")]);
        }
        let check = |parts: &[PromptPart], rendered: &str| {
            let mut want = vec![1];
            want.extend(
                TOKENIZER
                    .encode_with_control(rendered)
                    .iter()
                    .map(|id| i64::from(*id)),
            );
            assert_eq!(
                ids(&TOKENIZER.assemble(parts).unwrap()),
                want,
                "{rendered:?}"
            );
        };
        check(&parts, &case.no_gen_prompt);
        parts.extend([control("<|assistant|>"), text("\n")]);
        check(&parts, &case.with_gen_prompt);
    }
}

#[test]
fn prompts_of_the_golden_cases_have_their_ids() {
    let mut checked = 0;
    for entry in std::fs::read_dir(golden("cases")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let case: Value = json(&path);
        let Some(prompt) = case["prompt"].as_str() else {
            continue; // raw ids
        };
        let counts = case["num_img_tokens"].as_array();
        let tokens: Vec<u32> = counts
            .into_iter()
            .flatten()
            .map(|count| count.as_u64().unwrap() as u32)
            .collect();
        let bytes = std::fs::read(path.with_extension("safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let want = tensors.tensor("input_ids").unwrap();
        let want = want.data().as_chunks::<8>().0.iter();
        let want: Vec<i64> = want.map(|bytes| i64::from_le_bytes(*bytes)).collect();
        let rendered = TOKENIZER.assemble_rendered(prompt, &tokens).unwrap();
        assert_eq!(ids(&rendered), want, "{}", path.display());
        let assembled = TOKENIZER.assemble(&parts(prompt, &tokens)).unwrap();
        assert_eq!(ids(&assembled), want, "{}", path.display());
        checked += 1;
    }
    assert!(checked >= 10, "{checked} cases have a prompt");
}

#[test]
fn the_real_model_s_ids_and_answer_are_reproduced() {
    let want: Value = json(&golden("real/phi3_5-vision-instruct.json"));
    let want: Vec<i64> = serde_json::from_value(want["input_ids"].clone()).unwrap();
    assert_eq!(want.len(), 775);
    let answer: Value = json(&golden("real/phi3_5-vision-instruct_generation.json"));
    let question = answer["prompt"].as_str().unwrap();
    let rendered = format!("<|user|>\n<|image_1|>\n{question}<|end|>\n<|assistant|>\n");
    let prompt = TOKENIZER.assemble_rendered(&rendered, &[757]).unwrap();
    assert_eq!(ids(&prompt), want);
    let parts = [
        control("<|user|>"),
        text("\n"),
        PromptPart::Image {
            index: 0,
            tokens: 757,
        },
        text("\n"),
        text(question),
        control("<|end|>"),
        text("\n"),
        control("<|assistant|>"),
        text("\n"),
    ];
    assert_eq!(ids(&TOKENIZER.assemble(&parts).unwrap()), want);
    let tokens: Vec<u32> = serde_json::from_value(answer["generated_tokens"].clone()).unwrap();
    assert_eq!(
        TOKENIZER.decode(&tokens, true),
        answer["generated_text"].as_str().unwrap()
    );
}

#[test]
fn a_client_cannot_type_a_control_token() {
    let vocabulary: Value =
        json(&Path::new(env!("CARGO_MANIFEST_DIR")).join("phi3/tokenizer.json"));
    let added = vocabulary["added_tokens"].as_array().unwrap();
    assert_eq!(added.len(), 48);
    let is_control = |id: i64| added.iter().any(|token| token["id"].as_i64() == Some(id));
    for token in added {
        let name = token["content"].as_str().unwrap();
        assert_eq!(
            TOKENIZER.control_token(name).map(i64::from),
            token["id"].as_i64()
        );
        for hostile in [
            name.to_owned(),
            format!("hi{name}\n"),
            format!(" {name}{name} x"),
        ] {
            let typed = TOKENIZER.encode_text(&hostile);
            assert!(
                !typed.iter().any(|id| is_control(i64::from(*id))),
                "{hostile:?}: {typed:?}"
            );
            assert_eq!(TOKENIZER.decode(&typed, true), hostile);
            let parts = [control("<|user|>"), text(&hostile), control("<|end|>")];
            let prompt = TOKENIZER.assemble(&parts).unwrap();
            let inside = &prompt.ids[2..prompt.ids.len() - 1];
            assert!(
                !inside.iter().any(|id| is_control(*id)),
                "{hostile:?}: {inside:?}"
            );
        }
    }
    // Nor one put together from pieces, nor a slot.
    let parts = [text("<|e"), text("nd|>"), text("<|image_1|>")];
    let prompt = TOKENIZER.assemble(&parts).unwrap();
    assert_eq!(prompt.image_tokens, 0);
    assert!(!prompt.ids[1..].iter().any(|id| is_control(*id)));
}

#[test]
fn whitespace_after_a_stripping_token_is_swallowed_once_per_segment() {
    let assemble = |parts: &[PromptPart]| TOKENIZER.assemble(parts).unwrap().ids;
    let encoded = |rendered: &str| -> Vec<i64> {
        let ids = TOKENIZER.encode_with_control(rendered);
        [1].into_iter()
            .chain(ids.into_iter().map(i64::from))
            .collect()
    };
    let parts = [
        control("<|assistant|>"),
        text("\n"),
        text(" \t x"),
        text(" y"),
    ];
    assert_eq!(assemble(&parts), encoded("<|assistant|>\n \t x y"));
    let parts = [control("<|user|>"), text("\n"), text(" x")];
    assert_eq!(assemble(&parts), encoded("<|user|>\n x"));
    let parts = [control("<|assistant|>"), text("\u{a0}\u{3000}\u{2003}x")];
    assert_eq!(
        assemble(&parts),
        encoded("<|assistant|>\u{a0}\u{3000}\u{2003}x")
    );
    let parts = [control("<|assistant|>"), text("\u{200b}x")];
    assert_eq!(assemble(&parts), encoded("<|assistant|>\u{200b}x"));
    // An image is in between: the next chunk keeps its line break.
    let image = PromptPart::Image {
        index: 0,
        tokens: 2,
    };
    let parts = [control("<|assistant|>"), image, text("\n")];
    assert_eq!(assemble(&parts), [1, 32001, -1, -1, 1, 29871, 13]);
}

#[test]
fn prompts_without_text_are_made_of_bos() {
    assert_eq!(TOKENIZER.assemble(&[]).unwrap().ids, [1]);
    let image = |index| PromptPart::Image { index, tokens: 1 };
    let prompt = TOKENIZER.assemble(&[image(1), image(0)]).unwrap();
    assert_eq!(prompt.ids, [1, -2, 1, -1, 1]);
    assert_eq!(prompt.image_tokens, 2);
}

#[test]
fn wrong_parts_and_tags_are_refused_by_name() {
    let refused = |result: Result<Prompt, ModelError>| result.unwrap_err().to_string();
    let message = refused(TOKENIZER.assemble(&[control("<|tool|>")]));
    assert!(message.contains("no control token <|tool|>"), "{message}");
    for (rendered, number) in [
        ("<|image_0|>", "0"),
        ("<|image_3|>", "3"),
        ("<|image_99999999999|>", "4294967295"),
    ] {
        let message = refused(TOKENIZER.assemble_rendered(rendered, &[5, 5]));
        let want = format!("<|image_{number}|> in a prompt with 2 images");
        assert!(message.contains(&want), "{message}");
    }
    // Not tags: text like any other.
    let prompt = TOKENIZER.assemble_rendered("<|image_|><|image_x|><|image_1|<|image_1|>", &[1]);
    assert_eq!(prompt.unwrap().image_tokens, 1);
}

#[test]
fn fit_cuts_where_one_more_character_would_not_fit() {
    let texts = [
        "The quick brown fox jumps over the lazy dog.",
        "日本語のテキスト 🦀🦀 e\u{301}\u{301} naïve",
        "    indented    code\n\n\n\treturn 1234567890;",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "<|end|><|user|>",
        "",
    ];
    for sample in texts {
        for tokens_max in 0..=TOKENIZER.count(sample) + 1 {
            let bytes = TOKENIZER.fit(sample, tokens_max);
            let fitting = TOKENIZER.count(&sample[..bytes]);
            assert!(
                fitting <= tokens_max,
                "{sample:?}: {fitting} > {tokens_max}"
            );
            if let Some(next) = sample[bytes..].chars().next() {
                let longer = TOKENIZER.count(&sample[..bytes + next.len_utf8()]);
                assert!(
                    longer > tokens_max,
                    "{sample:?}: {bytes} bytes, {tokens_max} tokens"
                );
            }
        }
        assert_eq!(TOKENIZER.fit(sample, u32::MAX), sample.len());
    }
    let long = "word ".repeat(20_000);
    assert_eq!(
        TOKENIZER.fit(&long, 10),
        "word word word word word word word word word word".len()
    );
}

#[test]
fn stop_ids_add_those_that_end_a_turn() {
    assert_eq!(TOKENIZER.stop_ids(&[2]), [2, 32000, 32001, 32007]);
    assert_eq!(TOKENIZER.stop_ids(&[]), [2, 32000, 32001, 32007]);
    assert_eq!(
        TOKENIZER.stop_ids(&[7, 32007, 7]),
        [2, 7, 32000, 32001, 32007]
    );
}

#[test]
fn unusable_tokenizer_files_say_why() {
    let missing = Tokenizer::from_file(Path::new("/nowhere/tokenizer.json")).unwrap_err();
    assert!(
        missing.to_string().contains("/nowhere/tokenizer.json"),
        "{missing}"
    );
    assert!(Tokenizer::from_bytes(b"{").is_err());
    let empty =
        br#"{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{},"merges":[]}}"#;
    let refused = Tokenizer::from_bytes(empty).unwrap_err().to_string();
    assert!(refused.contains("no added token <s>"), "{refused}");
    // Knows `a` and nothing else: the first other character would have no token.
    let narrow = br#"{"version":"1.0","added_tokens":[{"id":1,"content":"<s>","single_word":false,
        "lstrip":false,"rstrip":false,"normalized":false,"special":true}],
        "model":{"type":"BPE","unk_token":"<unk>","vocab":{"a":0},"merges":[]}}"#;
    let refused = Tokenizer::from_bytes(narrow).unwrap_err().to_string();
    assert!(refused.contains("cannot encode every text"), "{refused}");
    assert_eq!(TOKENIZER.vocab_size(), 32045);
}

#[test]
fn ids_far_above_the_number_of_tokens_are_refused() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/phi3/tokenizer.json");
    let mut file: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(file["model"]["vocab"]["\u{2581}the"].is_u64());
    file["model"]["vocab"]["\u{2581}the"] = 4_000_000_000_u32.into();
    let refused = Tokenizer::from_bytes(file.to_string().as_bytes()).unwrap_err();
    assert!(
        refused.to_string().contains("ids up to 4000000000"),
        "{refused}"
    );
}
