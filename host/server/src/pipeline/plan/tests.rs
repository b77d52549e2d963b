//! Limits on tokens, and wishes that are not fulfilled.

use super::*;
use std::sync::Arc;
use visor_model::{CheckpointFacts, Tokenizer};
use visor_sandbox::{ChatRole, Message, Part, Sampling as Wishes};

fn model(context_tokens: u32) -> ServedModel {
    let tokenizer = Tokenizer::from_bytes(include_bytes!("../../../../model/phi3/tokenizer.json"));
    ServedModel {
        id: "phi".to_owned(),
        aliases: vec!["gpt".to_owned()],
        created_s: 0,
        context_tokens,
        num_crops: 4,
        stop_ids: Vec::new(),
        tokenizer: Arc::new(tokenizer.expect("the demo's tokenizer")),
        facts: CheckpointFacts {
            embedded: false,
            id: "phi".to_owned(),
            bytes: 0,
            quantization: "bf16".to_owned(),
            digest: String::new(),
        },
    }
}

fn generation() -> Generation {
    Generation {
        model: None,
        input: Input::Text("x".to_owned()),
        images: Vec::new(),
        sampling: Wishes::default(),
        tokens_max: None,
        stop: Vec::new(),
        format: visor_sandbox::OutputFormat::Text,
        tools: Vec::new(),
        tool_choice: ToolChoice::Auto,
        parallel_tools: true,
        count: 1,
        extensions: Vec::new(),
    }
}

fn prompt(text: usize, image_tokens: u32) -> Prompt {
    let slots = vec![-1; image_tokens as usize];
    Prompt {
        ids: [vec![1; text], slots].concat(),
        image_tokens,
    }
}

fn wish(tokens_wanted: Option<u32>) -> Wish {
    Wish {
        sampling: Sampling::default(),
        tokens_wanted,
        input: "messages",
        cut: false,
        stop: Vec::new(),
    }
}

#[test]
fn what_cannot_be_fulfilled_names_its_key() {
    let model = model(100);
    let refused = |change: &dyn Fn(&mut Generation)| {
        let mut generation = generation();
        change(&mut generation);
        let failure = check(&generation, &Config::default(), &model).expect_err("refused");
        (failure.error.code, failure.error.param.unwrap_or_default())
    };
    assert_eq!(
        refused(&|g| g.model = Some("other".to_owned())),
        (ErrorCode::NotFound, "model".to_owned())
    );
    let invalid = |param: &str| (ErrorCode::InvalidRequest, param.to_owned());
    for (param, change) in out_of_range() {
        assert_eq!(refused(&|g| change(&mut g.sampling)), invalid(param));
    }
    assert_eq!(refused(&|g| g.stop = vec![String::new()]), invalid("stop"));
    assert_eq!(
        refused(&|g| g.stop = vec!["x".to_owned(); 65]),
        invalid("stop")
    );
}

#[test]
fn tools_have_limits_and_names_of_their_own() {
    let tool = |name: &str, description: &str| ToolSpec {
        name: name.to_owned(),
        description: description.to_owned(),
        parameters: "{}".to_owned(),
    };
    let check = |tools: &[ToolSpec], choice: ToolChoice| {
        let generation = Generation {
            tools: tools.to_vec(),
            tool_choice: choice,
            ..generation()
        };
        let limits = FormatsConfig {
            tools_max: 3,
            tools_bytes_max: 100,
            ..FormatsConfig::default()
        };
        let refused = check_tools(&generation, &limits).err();
        refused.map(|failure| failure.error.param.unwrap_or_default())
    };
    let few: Vec<_> = ["a", "b", "c"].map(|name| tool(name, "")).into();
    let named = |name: &str| ToolChoice::Named(name.to_owned());
    assert_eq!(check(&few, ToolChoice::Auto), None);
    assert_eq!(check(&few, named("b")), None);
    assert_eq!(check(&[], ToolChoice::Auto), None);
    let many: Vec<_> = ["a", "b", "c", "d"].map(|name| tool(name, "")).into();
    let tools = Some("tools".to_owned());
    assert_eq!(check(&many, ToolChoice::Auto), tools);
    let long = [tool("a", &"x".repeat(98))];
    assert_eq!(check(&long, ToolChoice::Auto), tools);
    let twins = [tool("a", "one"), tool("a", "two")];
    assert_eq!(check(&twins, ToolChoice::Auto), tools);
    let choice = Some("tool_choice".to_owned());
    assert_eq!(check(&few, named("d")), choice);
    assert_eq!(check(&[], ToolChoice::Required), choice);
}

type Change = fn(&mut Wishes);

fn out_of_range() -> [(&'static str, Change); 11] {
    [
        ("min_p", |s| s.min_p = Some(1.5)),
        ("min_p", |s| s.min_p = Some(-0.1)),
        ("repetition_penalty", |s| s.repetition_penalty = Some(0.0)),
        ("repetition_penalty", |s| s.repetition_penalty = Some(101.0)),
        ("presence_penalty", |s| s.presence_penalty = Some(2.5)),
        ("frequency_penalty", |s| s.frequency_penalty = Some(-2.5)),
        ("logit_bias", |s| s.logit_bias = vec![(5, 101.0)]),
        ("logit_bias", |s| s.logit_bias = vec![(40_000, 1.0)]),
        ("logit_bias", |s| s.logit_bias = vec![(5, 1.0); 1025]),
        ("top_logprobs", |s| s.logprobs = Some(21)),
        ("top_logprobs", |s| s.logprobs = Some(255)),
    ]
}

#[test]
fn values_in_range_and_known_names_are_fulfilled() {
    let mut generation = generation();
    generation.model = Some("gpt".to_owned());
    generation.sampling = Wishes {
        min_p: Some(0.25),
        repetition_penalty: Some(1.5),
        presence_penalty: Some(-2.0),
        logit_bias: vec![(5, -100.0)],
        logprobs: Some(20),
        temperature: Some(9.0),
        seed: Some(7),
        ..Wishes::default()
    };
    let wish = check(&generation, &Config::default(), &model(100)).expect("fulfilled");
    let Sampling {
        seed,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        logprobs,
        ..
    } = &wish.sampling;
    assert_eq!((*seed, *min_p, *logprobs), (Some(7), 0.25, Some(20)));
    assert_eq!(
        [*repetition_penalty, *presence_penalty, *frequency_penalty],
        [1.5, -2.0, 0.0]
    );
    assert_eq!(*logit_bias, [(5, -100.0)]);
    assert_eq!(wish.sampling.temperature, 2.0, "clamped to the limit");
}

#[test]
fn an_answer_gets_what_was_asked_or_what_the_context_leaves() {
    let (config, model) = (Config::default(), model(1000));
    let granted = |prompt_tokens, wanted| {
        output_tokens(&prompt(prompt_tokens, 0), &wish(wanted), &config, &model)
    };
    assert_eq!(
        granted(100, None).expect("fits"),
        config.generation.max_tokens
    );
    assert_eq!(granted(900, None).expect("fits"), 100);
    assert_eq!(granted(999, None).expect("fits"), 1);
    assert_eq!(granted(900, Some(100)).expect("fits"), 100);
    let at_most = Wish {
        cut: true,
        ..wish(Some(3000))
    };
    let cut = output_tokens(&prompt(900, 0), &at_most, &config, &model);
    assert_eq!(cut.expect("cut"), 100);
    let rooms = [None, Some(0), Some(7), Some(9999)].map(|w| answer_room(&wish(w), &config));
    assert_eq!(rooms, [1, 1, 7, config.generation.max_tokens]);
}

#[test]
fn an_overflow_is_told_with_all_its_numbers() {
    let (config, model) = (Config::default(), model(1000));
    let message = |text, image_tokens, wanted| {
        let failure = output_tokens(&prompt(text, image_tokens), &wish(wanted), &config, &model)
            .expect_err("too long");
        assert_eq!(failure.error.code, ErrorCode::ContextOverflow);
        failure.error.message
    };
    let whole = message(300, 757, None);
    assert!(
        whole.contains("1057 tokens (757 of images, 300 of text)") && whole.contains("999 fit"),
        "{whole}"
    );
    let together = message(901, 0, Some(100));
    assert_eq!(
        together,
        "this model's maximum context length is 1000 tokens, prompt and answer together; the prompt is 901 tokens \
         (0 of images, 901 of text), and 100 tokens of answer were asked for where 99 are possible"
    );
}

#[test]
fn the_operators_prompt_limit_counts_too() {
    let mut config = Config::default();
    config.generation.prompt_tokens_max = 50;
    assert!(output_tokens(&prompt(51, 0), &wish(None), &config, &model(1000)).is_err());
    assert!(output_tokens(&prompt(50, 0), &wish(None), &config, &model(1000)).is_ok());
}

fn conversation(messages: usize, parts: usize) -> Input {
    let parts = vec![Part::Text(String::new()); parts];
    let role = ChatRole::User;
    Input::Chat(vec![Message { role, parts }; messages])
}

#[test]
fn a_conversation_of_countless_pieces_is_too_large() {
    for (input, says) in [
        (conversation(1025, 1), "1025 messages; 1024"),
        (conversation(1, 4097), "4097 parts; 4096"),
    ] {
        let generation = Generation {
            input,
            ..generation()
        };
        let failure = check(&generation, &Config::default(), &model(100)).expect_err(says);
        assert_eq!(failure.error.code, ErrorCode::TooLarge);
        assert!(
            failure.error.message.contains(says),
            "{}",
            failure.error.message
        );
    }
}

#[test]
fn what_cannot_fit_is_refused_before_it_is_rendered() {
    let input = conversation(10, 1);
    assert!(check_least(&input, 80, 100).is_ok());
    let failure = check_least(&input, 81, 100).expect_err("101 tokens");
    assert_eq!(failure.error.param.as_deref(), Some("messages"));
    let text = check_least(&Input::Text("much".to_owned()), 101, 100).expect_err("101 tokens");
    assert_eq!(text.error.param.as_deref(), Some("prompt"));
    assert_eq!(failure.error.code, ErrorCode::ContextOverflow);
    assert!(
        failure
            .error
            .message
            .contains("at least 101 tokens of text, without those of images; 100 fit")
    );
}
