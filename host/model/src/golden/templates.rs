//! `tokenizer_cases.json`: texts, prompts with images, and conversations, to ids and back.

use serde::Deserialize;

use super::compare::{Finding, Reporter};
use super::folder::Folder;
use crate::tokenizer::{PromptPart, Tokenizer};

const CASE: &str = "tokenizer";

#[derive(Deserialize, Default)]
#[serde(default)]
struct Sections {
    encode: Vec<Encode>,
    placeholder: Vec<Placeholder>,
    chat_template: Vec<Conversation>,
}

#[derive(Deserialize)]
struct Encode {
    text: String,
    ids: Vec<u32>,
    ids_no_bos: Option<Vec<u32>>,
    decode_skip: Option<String>,
    decode_full: Option<String>,
}

#[derive(Deserialize)]
struct Placeholder {
    prompt: String,
    pretend_num_img_tokens: Vec<u32>,
    ids: Vec<i64>,
}

#[derive(Deserialize)]
struct Conversation {
    messages: Vec<Message>,
    with_gen_prompt: String,
    no_gen_prompt: Option<String>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: String,
}

/// Compares every section that is there.
pub(super) fn compare_all(folder: &Folder, tokenizer: &Tokenizer, reporter: &mut Reporter<'_>) {
    let json = match folder.read("tokenizer_cases.json") {
        Ok(Some(json)) => json,
        Ok(None) => {
            return reporter.stage(
                CASE,
                "json",
                Finding::Skipped("there is no tokenizer_cases.json".into()),
            );
        }
        Err(error) => return reporter.stage(CASE, "json", error),
    };
    let sections: Sections = match serde_json::from_slice(&json) {
        Ok(sections) => sections,
        Err(error) => {
            return reporter.stage(
                CASE,
                "json",
                Finding::Miss(format!("tokenizer_cases.json: {error}")),
            );
        }
    };
    compare_texts(tokenizer, &sections.encode, reporter);
    let found = sections.placeholder.iter().map(|case| {
        let have = tokenizer.assemble_rendered(&case.prompt, &case.pretend_num_img_tokens);
        differs(
            &case.prompt,
            &have.map(|prompt| prompt.ids).unwrap_or_default(),
            &case.ids,
        )
    });
    report(reporter, "placeholder", found);
    let found = sections.chat_template.iter().flat_map(|case| {
        let with = render(&case.messages, true);
        let want_without = case
            .no_gen_prompt
            .clone()
            .unwrap_or_else(|| render(&case.messages, false));
        [
            differs("with_gen_prompt", &with, &case.with_gen_prompt),
            differs(
                "no_gen_prompt",
                &render(&case.messages, false),
                &want_without,
            ),
            compare_parts(tokenizer, case),
        ]
    });
    report(reporter, "chat_template", found);
}

fn compare_texts(tokenizer: &Tokenizer, cases: &[Encode], reporter: &mut Reporter<'_>) {
    let no_bos = |case: &Encode| tokenizer.encode_with_control(&case.text);
    let bos = tokenizer.control_token("<s>");
    let encode = |case: &Encode| bos.into_iter().chain(no_bos(case)).collect::<Vec<u32>>();
    report(
        reporter,
        "encode",
        cases
            .iter()
            .map(|case| differs(&case.text, &encode(case), &case.ids)),
    );
    report(
        reporter,
        "encode_no_bos",
        cases.iter().filter_map(|case| {
            Some(differs(
                &case.text,
                &no_bos(case),
                case.ids_no_bos.as_ref()?,
            ))
        }),
    );
    for (stage, skip) in [("decode_skip", true), ("decode_full", false)] {
        let want = |case: &Encode| {
            if skip {
                case.decode_skip.clone()
            } else {
                case.decode_full.clone()
            }
        };
        report(
            reporter,
            stage,
            cases.iter().filter_map(|case| {
                Some(differs(
                    &case.text,
                    &tokenizer.decode(&case.ids, skip),
                    &want(case)?,
                ))
            }),
        );
    }
}

/// One stage out of many small comparisons: each is nothing, or what differs.
fn report(reporter: &mut Reporter<'_>, stage: &str, found: impl Iterator<Item = Option<String>>) {
    let all: Vec<Option<String>> = found.collect();
    if all.is_empty() {
        return reporter.stage(
            CASE,
            stage,
            Finding::Skipped(format!("tokenizer_cases.json has no {stage}")),
        );
    }
    let unequal: Vec<&String> = all.iter().flatten().collect();
    let note = match unequal.first() {
        Some(first) => format!("{} items; first: {first}", all.len()),
        None => format!("{} items", all.len()),
    };
    reporter.stage(
        CASE,
        stage,
        Finding::Items {
            unequal: unequal.len(),
            note,
        },
    );
}

fn differs<T: PartialEq + std::fmt::Debug>(what: &str, have: &T, want: &T) -> Option<String> {
    (have != want).then(|| format!("{what:?}: have {have:?}, want {want:?}"))
}

/// The vision models' chat template: content verbatim, and no generation prompt behind a final assistant message.
/// Source: `tokenizer_config.json` of microsoft/Phi-3.5-vision-instruct. Serving renders by plugin; this is the
/// reference's own text to compare with.
fn render(messages: &[Message], generation_prompt: bool) -> String {
    let mut text = String::new();
    for Message { role, content } in messages {
        text.push_str(&format!("<|{role}|>\n{content}<|end|>\n"));
    }
    if generation_prompt
        && messages
            .last()
            .is_some_and(|message| message.role != "assistant")
    {
        text.push_str("<|assistant|>\n");
    }
    text
}

/// The same conversation in parts, with content that cannot be read as control tokens, gives the ids of the text.
fn compare_parts(tokenizer: &Tokenizer, case: &Conversation) -> Option<String> {
    let mut parts = Vec::new();
    for Message { role, content } in &case.messages {
        parts.push(PromptPart::Control(format!("<|{role}|>")));
        parts.push(PromptPart::Text(format!("\n{content}")));
        parts.push(PromptPart::Control("<|end|>".into()));
        parts.push(PromptPart::Text("\n".into()));
    }
    if case
        .messages
        .last()
        .is_some_and(|message| message.role != "assistant")
    {
        parts.push(PromptPart::Control("<|assistant|>".into()));
        parts.push(PromptPart::Text("\n".into()));
    }
    let have = tokenizer.assemble(&parts).map(|prompt| prompt.ids);
    let want = tokenizer
        .assemble_rendered(&case.with_gen_prompt, &[])
        .map(|prompt| prompt.ids);
    match (have, want) {
        (Ok(have), Ok(want)) => differs("ids of parts", &have, &want),
        (Err(error), _) | (_, Err(error)) => Some(error.to_string()),
    }
}
