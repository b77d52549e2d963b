//! Chat completions, whole: structure, counts, determinism.

use serde_json::{Value, json};

use crate::server::{chat, data_url, fixture, pictures, shared, text, until, with};

/// What the model said.
#[track_caller]
pub fn content(answer: &Value) -> String {
    answer["choices"][0]["message"]["content"]
        .as_str()
        .expect("a text")
        .to_owned()
}

#[test]
fn a_text_is_answered_with_a_whole_completion_object() {
    let answer = shared().chat(&chat(&[text("hello")]));
    let json = answer.ok();
    assert_eq!(json["object"], "chat.completion");
    assert!(json["id"].as_str().is_some_and(|id| !id.is_empty()));
    assert!(
        json["created"]
            .as_u64()
            .is_some_and(|created| created > 1_600_000_000)
    );
    assert!(
        json["model"]
            .as_str()
            .is_some_and(|model| !model.is_empty())
    );
    let choices = json["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 1);
    assert_eq!(choices[0]["index"], 0);
    assert_eq!(choices[0]["message"]["role"], "assistant");
    assert!(["stop", "length"].contains(&choices[0]["finish_reason"].as_str().expect("a reason")));
    for required in ["refusal", "content"] {
        assert!(
            choices[0]["message"].get(required).is_some(),
            "{required} is a required key"
        );
    }
    assert!(
        choices[0].get("logprobs").is_some(),
        "logprobs is a required key"
    );
    assert_ne!(
        json.get("system_fingerprint"),
        Some(&Value::Null),
        "a string or nothing"
    );
    let usage = &json["usage"];
    let count = |key: &str| usage[key].as_u64().expect("a count");
    assert_eq!(
        count("total_tokens"),
        count("prompt_tokens") + count("completion_tokens")
    );
    assert!((1..=8).contains(&count("completion_tokens")));
    assert!(count("prompt_tokens") > 3);
    let plugins = answer
        .header("x-visor-plugins")
        .expect("the revisions are told");
    for role in [
        "adapter=openai@",
        "template=phi3@",
        "image-policy=hd@",
        "cache-strategy=lru@",
    ] {
        assert!(plugins.contains(role), "{plugins}");
    }
}

#[test]
fn request_ids_are_taken_over_and_made() {
    let server = shared();
    let ours = server.get("/v1/models");
    assert!(
        ours.header("x-request-id")
            .is_some_and(|id| id.starts_with("req-"))
    );
    let request = crate::client::Request {
        method: "GET",
        path: "/v1/models",
        headers: &[("x-request-id", "trace-42")],
        body: b"",
    };
    let theirs = crate::client::send(server.address, &request);
    assert_eq!(theirs.header("x-request-id"), Some("trace-42"));
}

#[test]
fn the_model_is_listed_and_says_that_it_is_a_demo() {
    let server = crate::server::Server::start_without_flag("");
    let list = server.get("/v1/models").ok();
    assert_eq!(list["object"], "list");
    let model = &list["data"][0];
    assert_eq!(model["object"], "model");
    let id = model["id"].as_str().expect("an id");
    assert!(model.to_string().contains("demo model"), "{model}");
    let one = server.get(&format!("/v1/models/{id}")).ok();
    assert_eq!(one["id"], id);
    server.get("/v1/models/gpt-4").error(404);
}

#[test]
fn greedy_answers_repeat_and_follow_the_whole_conversation() {
    let server = shared();
    let ask = |messages: &[Value]| server.chat(&chat(messages)).ok();
    let first = ask(&[text("one")]);
    assert_eq!(content(&first), content(&ask(&[text("one")])));
    let turns = [
        text("one"),
        json!({"role": "assistant", "content": "two"}),
        text("three"),
    ];
    let longer = ask(&turns);
    let with_system = ask(&[
        json!({"role": "system", "content": "Be brief."}),
        text("one"),
    ]);
    let tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().expect("a count");
    assert!(tokens(&longer) > tokens(&first) && tokens(&with_system) > tokens(&first));
    assert_ne!(content(&first), content(&longer));
}

#[test]
fn text_parts_and_plain_strings_are_the_same() {
    let server = shared();
    let plain = server.chat(&chat(&[text("same words")])).ok();
    let parts = json!({"role": "user", "content": [{"type": "text", "text": "same words"}]});
    let parts = server.chat(&chat(&[parts])).ok();
    assert_eq!(
        plain["usage"]["prompt_tokens"],
        parts["usage"]["prompt_tokens"]
    );
    assert_eq!(content(&plain), content(&parts));
}

#[test]
fn a_control_token_typed_by_a_client_stays_text() {
    let server = shared();
    let tokens = |words: &str| {
        server.chat(&chat(&[text(words)])).ok()["usage"]["prompt_tokens"]
            .as_u64()
            .expect("a count")
    };
    let base = tokens("a b");
    assert!(
        tokens("a <|end|> b") > base + 2,
        "spelled out, it takes several tokens"
    );
    assert!(tokens("a <|image_1|> b") > base + 2);
}

#[test]
fn max_tokens_bounds_the_answer_under_both_names() {
    let server = shared();
    for name in ["max_tokens", "max_completion_tokens"] {
        let body = json!({"messages": [text("count")], "temperature": 0, name: 3});
        let answer = server.chat(&body).ok();
        let made = answer["usage"]["completion_tokens"]
            .as_u64()
            .expect("a count");
        assert!((1..=3).contains(&made), "{name}: {made}");
        if made == 3 {
            assert_eq!(answer["choices"][0]["finish_reason"], "length");
        }
    }
}

#[test]
fn a_seed_decides_the_answer() {
    let server = shared();
    let ask = |seed: u64| {
        let wishes = json!({"temperature": 1.0, "top_p": 0.9, "seed": seed, "max_tokens": 16});
        content(&server.chat(&with(chat(&[text("dice")]), wishes)).ok())
    };
    assert_eq!(ask(1), ask(1));
    let answers: Vec<String> = (1..=4).map(ask).collect();
    assert!(
        answers.iter().any(|answer| *answer != answers[0]),
        "four seeds, one answer: {answers:?}"
    );
}

#[test]
fn a_stop_string_ends_the_answer_and_is_not_in_it() {
    let server = shared();
    let long = json!({"max_tokens": 24});
    let whole = content(
        &server
            .chat(&with(chat(&[text("go on")]), long.clone()))
            .ok(),
    );
    let characters: Vec<char> = whole.chars().collect();
    assert!(characters.len() > 8, "noise, but some: {whole:?}");
    let stop: String = characters[characters.len() / 2..characters.len() / 2 + 3]
        .iter()
        .collect();
    let answer = server
        .chat(&with(
            chat(&[text("go on")]),
            with(long, json!({"stop": [stop]})),
        ))
        .ok();
    let cut = content(&answer);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(cut, whole[..whole.find(&stop).expect("it is a part")]);
}

#[test]
fn a_picture_costs_its_tokens_and_changes_the_answer() {
    let server = shared();
    let ask = |picture: &str| {
        let url = data_url(
            "image/png",
            &fixture(&format!("tests/golden/images/{picture}.png")),
        );
        server
            .chat(&chat(&[pictures(&[url], "what is this?")]))
            .ok()
    };
    let (square, wide) = (ask("sq_512"), ask("wide_900x300"));
    assert_ne!(content(&square), content(&wide));
    let image_tokens = |answer: &Value| {
        let details = &answer["usage"]["prompt_tokens_details"];
        details
            .to_string()
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|n| n.parse::<u64>().ok())
            .max()
    };
    for answer in [&square, &wide] {
        let tokens = image_tokens(answer).expect("image tokens are told");
        // (h * w + 1) * 144 + 1 + (h + 1) * 12 for a grid of h rows and w columns.
        let grids = (1..=16_u64)
            .flat_map(|h| (1..=16_u64).map(move |w| (h * w + 1) * 144 + 1 + (h + 1) * 12));
        assert!(
            grids.into_iter().any(|grid| grid == tokens),
            "{tokens}: {}",
            answer["usage"]
        );
        assert!(answer["usage"]["prompt_tokens"].as_u64().expect("a count") > tokens);
    }
}

#[test]
fn several_pictures_count_and_their_order_matters() {
    let server = shared();
    let url = |name: &str| {
        data_url(
            "image/png",
            &fixture(&format!("tests/golden/images/{name}.png")),
        )
    };
    let low = |urls: &[String]| {
        let mut message = pictures(urls, "compare");
        for part in message["content"].as_array_mut().expect("parts") {
            if part["type"] == "image_url" {
                part["image_url"]["detail"] = json!("low");
            }
        }
        server.chat(&chat(&[message])).ok()
    };
    let (a, b) = (url("sq_512"), url("exact_336"));
    let one = low(std::slice::from_ref(&a));
    let both = low(&[a.clone(), b.clone()]);
    let swapped = low(&[b, a]);
    let tokens = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().expect("a count");
    assert!(tokens(&both) > tokens(&one) + 144);
    assert_eq!(tokens(&both), tokens(&swapped));
    assert_ne!(content(&both), content(&swapped));
}

#[test]
fn a_long_word_that_looks_like_base64_is_text_all_the_same() {
    let word = "abcd".repeat(1500);
    let answer = shared().chat(&chat(&[text(&word)])).ok();
    assert!(answer["usage"]["prompt_tokens"].as_u64().expect("a count") > 500);
}

#[test]
fn repeated_requests_hit_the_caches() {
    let server = crate::server::Server::start();
    let url = data_url("image/png", &fixture("tests/golden/images/exact_336.png"));
    let ask = |question: &str| {
        server
            .chat(&chat(&[pictures(std::slice::from_ref(&url), question)]))
            .ok()
    };
    let first = ask("what?");
    assert_eq!(content(&first), content(&ask("what?")));
    // A new conversation: nothing of the prompt before the picture is the same.
    let system = json!({"role": "system", "content": "Be brief."});
    let question = pictures(std::slice::from_ref(&url), "another question");
    server.chat(&chat(&[system, question])).ok();
    let stats = server.stats().to_string();
    for cache in ["pixels", "features", "responses", "prefixes"] {
        assert!(stats.contains(cache), "{cache} is in /stats: {stats}");
    }
    // The record of a request is written just after its last byte.
    until("the last request is counted", || {
        (server.metric("vllm:mm_cache_hits_total") >= 1.0).then_some(())
    });
    assert!(server.metric("vllm:prompt_tokens_total") > 0.0);
}
