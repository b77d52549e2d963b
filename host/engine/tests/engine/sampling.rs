//! What a request asks of the sampler arrives there, and what the sampler tells arrives here.

use visor_engine::{Engine, EngineError, Sampling, TokenInfo};

use crate::heard::*;
use crate::scripted::*;

fn ask_with(engine: &Engine, sampling: Sampling) -> Heard {
    let mut request = request(8);
    request.sampling = sampling;
    ask(engine, request)
}

fn bytes(infos: &[TokenInfo]) -> Vec<u8> {
    let chosen = infos.iter().flat_map(|info| info.chosen.bytes.clone());
    chosen.collect()
}

#[test]
fn tokens_are_told_with_their_text_where_that_is_asked() {
    let engine = start(&Script::saying("one 🦀 two"));
    let asked = |logprobs| Sampling {
        logprobs,
        ..Sampling::default()
    };
    let silent = ask_with(&engine, asked(None));
    assert!(silent.infos.is_empty());
    let heard = ask_with(&engine, asked(Some(2)));
    assert_eq!(heard.text, silent.text);
    assert_eq!(bytes(&heard.infos), heard.text.as_bytes());
    for info in &heard.infos {
        // One logit of 10 among zeros.
        assert!((info.chosen.logprob.exp() - 0.407).abs() < 1e-3, "{info:?}");
        assert_eq!(info.alternatives.len(), 2);
        assert_eq!(info.alternatives[0], info.chosen);
    }
    assert!(
        ask_with(&engine, asked(Some(0))).infos[0]
            .alternatives
            .is_empty()
    );
}

#[test]
fn a_stop_string_is_told_of_by_no_token() {
    let engine = start(&Script::saying("one two three"));
    let mut request = request(50);
    request.stop_strings = vec![" three".into()];
    request.sampling.logprobs = Some(0);
    let heard = ask(&engine, request);
    assert_eq!(heard.text, "one two");
    assert_eq!(bytes(&heard.infos), b"one two");
}

#[test]
fn a_bias_and_a_penalty_decide_what_is_said() {
    let engine = start(&Script::saying("yes"));
    let no = tokenizer().encode_text("no")[0];
    let biased = ask_with(
        &engine,
        Sampling {
            logit_bias: vec![(no, 50.0)],
            ..Sampling::default()
        },
    );
    assert_eq!(biased.text, format!("no{}", " no".repeat(7)));
    // The bias of 50 is gone at the second time.
    let penalized = ask_with(
        &engine,
        Sampling {
            logit_bias: vec![(no, 50.0)],
            presence_penalty: 45.0,
            ..Sampling::default()
        },
    );
    assert_eq!(penalized.text, "no");
}

#[test]
fn what_nothing_can_be_drawn_with_is_refused() {
    let engine = start(&Script::saying("x"));
    let wrong: [fn(&mut Sampling); 5] = [
        |s| s.min_p = 1.5,
        |s| s.repetition_penalty = 0.0,
        |s| s.presence_penalty = f32::NAN,
        |s| s.frequency_penalty = f32::INFINITY,
        |s| s.logit_bias = vec![(1, f32::NAN)],
    ];
    for change in wrong {
        let mut request = request(1);
        change(&mut request.sampling);
        let refused = engine.submit(request);
        assert!(matches!(refused, Err(EngineError::Invalid(_))));
    }
}
