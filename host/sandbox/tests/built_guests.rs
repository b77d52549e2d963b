//! The checked-in components: the plugins the server ships, and compiled guests that misbehave. The
//! hand-written ones of the other rooms show what a byte out of place does; these, what a plugin
//! author's compiler makes.

#![allow(missing_docs, reason = "tests are sentences")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

#[allow(dead_code, reason = "shared with the other tests, which use all of it")]
#[path = "sandbox/guests.rs"]
mod guests;

use std::sync::Arc;

use bytes::Bytes;
use visor_sandbox::{
    Blob, CallError, ErrorCode, Event, Exchange, Extensions, FaultKind, Filter, FinishReason,
    GuestError, HttpRequest, ImageContext, ImageOp, ImageSource, Input, Layout, Lifted, LoadError,
    Lookup, Next, Origin, Part, PixelBuffer, Plugin, PluginSettings, Role, SampleModel, Sandbox,
    SandboxOptions, Segment, Source, Step, Tier, Usage, View,
};

use guests::{conversation, sandbox_with};

const SHIPPED_BYTES_MAX: usize = 216 << 10;

fn file(path: &str) -> Vec<u8> {
    let path = format!("{}/../../{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn shipped(name: &str) -> Vec<u8> {
    file(&format!("plugins/built/{name}.wasm"))
}

/// Longest a guest may spin, and longest anything else may take: a busy machine needs its time to
/// find out that memory has run out.
const SPIN_MS: u64 = 200;
const PATIENCE_MS: u64 = 20_000;

/// A sandbox whose calls may take that long.
fn sandbox(call_ms: u64) -> Sandbox {
    let mut options = SandboxOptions {
        instances_max: 8,
        ..SandboxOptions::default()
    };
    let budgets = &mut options.budgets;
    (budgets.start_ms, budgets.advance_ms, budgets.scope_ms) = (call_ms, call_ms, call_ms);
    (budgets.render_ms, budgets.prepare_ms, budgets.strategy_ms) = (call_ms, call_ms, call_ms);
    sandbox_with(options)
}

/// Loads with a configuration.
fn load_in(sandbox: &Sandbox, bytes: &[u8], config_json: &str) -> Result<Arc<Plugin>, LoadError> {
    let settings = PluginSettings {
        config_json: config_json.to_owned(),
        ..PluginSettings::default()
    };
    sandbox.load("guest", bytes, &settings, Origin::Shipped)
}

fn configured(bytes: &[u8], config_json: &str) -> Result<Arc<Plugin>, LoadError> {
    let spins = config_json.contains("\"spin\"");
    load_in(
        &sandbox(if spins { SPIN_MS } else { PATIENCE_MS }),
        bytes,
        config_json,
    )
}

fn plugin(name: &str) -> Arc<Plugin> {
    configured(&shipped(name), "{}").unwrap()
}

/// A guest that does `deed`, as `{ "do": … }` and more, when it is asked to.
fn bad(name: &str, order: &str) -> Arc<Plugin> {
    configured(&file(&format!("tests/guests/built/{name}.wasm")), order).unwrap()
}

fn fault<T>(result: Result<T, CallError>) -> (FaultKind, String) {
    match result {
        Err(CallError::Fault(fault)) => (fault.kind, fault.message),
        Err(CallError::Refused(error)) => panic!("refused: {error:?}"),
        Ok(_) => panic!("no fault"),
    }
}

fn refusal<T>(result: Result<T, CallError>) -> GuestError {
    match result {
        Err(CallError::Refused(error)) => error,
        Err(CallError::Fault(fault)) => panic!("fault: {fault:?}"),
        Ok(_) => panic!("not refused"),
    }
}

/// A picture of which only the size matters.
struct Sized(u32, u32);

impl ImageSource for Sized {
    fn size_px(&self) -> (u32, u32) {
        (self.0, self.1)
    }
    fn stored_size_px(&self) -> (u32, u32) {
        self.size_px()
    }
    fn layout(&self) -> Layout {
        Layout::Rgb
    }
    fn format(&self) -> String {
        "png".to_owned()
    }
    fn digest_hex(&self) -> String {
        "00".repeat(32)
    }
    fn work_px(&self, _ops: &[ImageOp]) -> Result<u64, GuestError> {
        Ok(0)
    }
    fn pixels(&self, _ops: &[ImageOp]) -> Result<PixelBuffer, GuestError> {
        Err(GuestError::new(
            ErrorCode::Unsupported,
            "this picture has no pixels",
        ))
    }
}

fn prepare(
    policy: &Plugin,
    size_px: (u32, u32),
    hints: &[(&str, &str)],
    budget_tokens: u32,
) -> Result<View, CallError> {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    let extensions: Extensions = hints.iter().map(owned).collect();
    let context = ImageContext {
        index: 0,
        count: 1,
        budget_tokens,
        extensions,
        model: Arc::new(SampleModel),
        request_id: "r1".to_owned(),
    };
    policy.prepare(Arc::new(Sized(size_px.0, size_px.1)), context)
}

fn request(method: &str, path: &str, body: &str, blobs: Vec<Blob>) -> HttpRequest {
    let id = path
        .strip_prefix("/models/")
        .map(|id| ("id".to_owned(), id.to_owned()));
    HttpRequest {
        method: method.to_owned(),
        path: path.to_owned(),
        path_params: id.into_iter().collect(),
        query: Vec::new(),
        headers: Vec::new(),
        principal: None,
        id: "r1".to_owned(),
        text: Ok(body.to_owned()),
        lifted: Arc::new(Lifted::new("blob-7f".to_owned(), Vec::new())),
        blobs,
        raw: Blob {
            bytes: Bytes::copy_from_slice(body.as_bytes()),
            content_type: "application/json".to_owned(),
        },
        form: Vec::new(),
    }
}

fn lookup(route: &str) -> Lookup {
    Lookup {
        principal: Some("alice".to_owned()),
        model: "sample".to_owned(),
        route: route.to_owned(),
        prompt_tokens: 10,
        image_count: 0,
        temperature: 0.0,
        extensions: Vec::new(),
    }
}

#[test]
fn every_shipped_plugin_loads_is_small_and_needs_no_wasi() {
    for (name, role) in [
        ("openai", Role::Adapter),
        ("responses", Role::Adapter),
        ("anthropic", Role::Adapter),
        ("ollama", Role::Adapter),
        ("phi3", Role::Template),
        ("hd", Role::ImagePolicy),
        ("lru", Role::CacheStrategy),
    ] {
        let bytes = shipped(name);
        assert!(
            bytes.len() <= SHIPPED_BYTES_MAX,
            "{name} is {} bytes",
            bytes.len()
        );
        let plugin = plugin(name);
        assert_eq!(plugin.info().name, name);
        assert!(plugin.serves(role) && plugin.roles().len() == 1);
        let imports = plugin.imports();
        assert!(
            imports.iter().all(|import| import.starts_with("visor:")),
            "{imports:?}"
        );
    }
}

#[test]
fn a_wrong_configuration_is_refused_when_it_is_loaded() {
    for (name, config) in [
        ("phi3", r#"{ "image_placement": "last" }"#),
        ("hd", r#"{ "auto_crops": 17 }"#),
        ("lru", r#"{ "share": true }"#),
        ("openai", r#"{ "anything": 1 }"#),
    ] {
        let error = configured(&shipped(name), config).unwrap_err();
        assert!(
            matches!(error, LoadError::Configuration(_)),
            "{name}: {error}"
        );
    }
}

#[test]
fn the_policy_records_the_reference_transform_for_a_tall_picture() {
    let view = prepare(&plugin("hd"), (300, 900), &[], 4000).unwrap();
    assert_eq!((view.columns, view.rows, view.tiles.len()), (1, 3, 3));
    let hd = [
        ImageOp::Rotate { quarters: 1 },
        ImageOp::Flip { horizontal: true },
        ImageOp::Resize {
            width_px: 1008,
            height_px: 336,
            filter: Filter::Bilinear,
        },
        ImageOp::Pad {
            width_px: 1008,
            height_px: 336,
            x_px: 0,
            y_px: 0,
            fill: [255; 3],
        },
        ImageOp::Rotate { quarters: 1 },
        ImageOp::Flip { horizontal: true },
    ];
    let overview = ImageOp::Resize {
        width_px: 336,
        height_px: 336,
        filter: Filter::Bicubic,
    };
    assert_eq!(
        view.overview,
        Some([&hd[..], std::slice::from_ref(&overview)].concat())
    );
    let last = ImageOp::Crop {
        x_px: 0,
        y_px: 672,
        width_px: 336,
        height_px: 336,
    };
    assert_eq!(
        view.tiles[2],
        [&hd[..], std::slice::from_ref(&last)].concat()
    );
}

#[test]
fn the_policy_follows_hints_and_budget() {
    let hd = plugin("hd");
    let grid = |hints: &[_], budget| {
        prepare(&hd, (960, 686), hints, budget).map(|view| (view.columns, view.rows))
    };
    assert_eq!(grid(&[], 4000).unwrap(), (2, 2));
    assert_eq!(grid(&[("detail", "low")], 4000).unwrap(), (1, 1));
    assert_eq!(grid(&[("detail", "high")], 4000).unwrap(), (4, 3));
    assert_eq!(grid(&[("num_crops", "9")], 4000).unwrap(), (3, 3));
    assert_eq!(grid(&[], 400).unwrap(), (1, 1));
    let tight = refusal(grid(&[("detail", "high")], 1000));
    assert_eq!(tight.code, ErrorCode::ContextOverflow);
    let narrow = refusal(prepare(&hd, (40_000, 1), &[], 4000));
    assert_eq!(narrow.code, ErrorCode::InvalidRequest);
}

#[test]
fn the_template_writes_typed_segments() {
    let prompt = plugin("phi3").render(conversation("r1")).unwrap();
    let text = |text: &str| Segment::Text(text.to_owned());
    let control = |token: &str| Segment::Control(token.to_owned());
    assert_eq!(
        prompt.segments,
        [
            control("<|user|>"),
            text("\nhello"),
            control("<|end|>"),
            text("\n"),
            control("<|assistant|>"),
            text("\n"),
        ]
    );
    assert!(prompt.stop_control.contains(&"<|end|>".to_owned()));
}

#[test]
fn the_strategy_scopes_by_principal_and_keeps_recency() {
    let lru = plugin("lru").strategy().unwrap();
    let plan = lru.plan(Tier::Embedding, 1 << 20).unwrap();
    assert!(plan.interests.victims);
    let scoping = lru.scope(lookup("/v1")).unwrap();
    assert_eq!(scoping.scope, "principal alice");
    assert!(scoping.response.read && scoping.response.write);
    assert!(lru.victims(Tier::Embedding, 1 << 20, 8).unwrap().is_empty());
}

/// The body of a chat about a lifted picture.
const ABOUT_A_PICTURE: &str = r#"{ "stream": true, "temperature": 0, "messages": [{ "role": "user", "content": [
    { "type": "text", "text": "What is this?" },
    { "type": "image_url", "image_url": { "url": "blob-7f:0", "detail": "low" } }] }] }"#;

#[test]
fn the_adapter_turns_a_chat_into_a_generation_and_events_into_a_stream() {
    let openai = plugin("openai");
    let photo = Blob {
        bytes: Bytes::from_static(b"\x89PNG"),
        content_type: "image/png".to_owned(),
    };
    let request = request(
        "POST",
        "/chat/completions",
        ABOUT_A_PICTURE,
        vec![photo.clone()],
    );
    let (mut exchange, step) = openai.start(request).unwrap();
    let Step::Generate(head, generations) = step else {
        panic!("a chat is generated")
    };
    assert!(head.incremental && head.status == 200);
    let [generation] = &generations[..] else {
        panic!("one generation, not {}", generations.len())
    };
    assert_eq!(generation.model.as_deref(), Some("sample"));
    assert_eq!(generation.images, [Source::Blob(photo)]);
    let Input::Chat(messages) = &generation.input else {
        panic!("a chat")
    };
    assert!(matches!(
        messages[0].parts[..],
        [Part::Text(_), Part::Image(0)]
    ));
    let hint = |key: &str| {
        let found = generation.extensions.iter().find(|(own, _)| own == key);
        found.map(|(_, value)| value.as_str())
    };
    assert_eq!(hint("image.0.detail"), Some("low"));
    assert_eq!(
        hint("image.0.param"),
        Some("messages[0].content[1].image_url")
    );
    streams(&mut exchange);
}

/// Feeds an exchange one answer and looks at the stream it makes of it.
fn streams(exchange: &mut Exchange) {
    let usage = Usage {
        prompt_tokens: 320,
        image_tokens: 313,
        cached_tokens: 0,
        completion_tokens: 1,
    };
    let generation = 0;
    let progress = exchange
        .advance(vec![
            Event::Started { generation, usage },
            Event::Delta {
                generation,
                choice: 0,
                text: "Ca".to_owned(),
                tokens: Vec::new(),
            },
        ])
        .unwrap();
    assert!(matches!(progress.next, Next::More));
    assert!(exchange.keep_alive().unwrap().starts_with(b":"));
    let last = exchange
        .advance(vec![
            Event::Finish {
                generation,
                choice: 0,
                reason: FinishReason::Stop,
                matched_stop: None,
            },
            Event::Done {
                generation,
                usage,
                queue_us: 0,
                prefill_us: 0,
                decode_us: 0,
            },
        ])
        .unwrap();
    assert!(matches!(last.next, Next::End));
    let body = String::from_utf8([progress.bytes, last.bytes].concat()).unwrap();
    assert_eq!(body.matches("data: {").count(), 3, "{body}");
    assert!(body.ends_with("data: [DONE]\n\n"), "{body}");
}

#[test]
fn the_adapter_lists_models_and_renders_every_error() {
    let openai = plugin("openai");
    let body = |path: &str| match openai.start(request("GET", path, "", Vec::new())).unwrap() {
        (_, Step::Respond(response)) => String::from_utf8(response.body).unwrap(),
        (_, other) => panic!("{path}: {other:?}"),
    };
    assert!(body("/models").contains(r#""id":"sample""#));
    assert!(body("/models/sample").contains(r#""object":"model""#));
    let missing = refusal(openai.start(request("GET", "/models/none", "", Vec::new())));
    assert_eq!(missing.code, ErrorCode::NotFound);
    let response = openai.render_error(&missing, false).unwrap();
    assert_eq!(response.status, 404);
    assert!(String::from_utf8_lossy(&response.body).contains("model_not_found"));
    let twice = ABOUT_A_PICTURE.replace(
        "\"low\" } }",
        "\"low\" } }, { \"type\": \"image_url\", \"image_url\": \"blob-7f:0\" }",
    );
    let error = refusal(openai.start(request("POST", "/chat/completions", &twice, Vec::new())));
    assert_eq!(
        error.param.as_deref(),
        Some("messages[0].content[1].image_url")
    );
}

#[test]
fn a_guest_of_another_track_is_refused_with_both_versions() {
    let error = configured(&file("tests/guests/built/other-track.wasm"), "{}").unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("@0.3.0") && message.contains("0.1"),
        "{message}"
    );
}

#[test]
fn a_guest_that_misbehaves_in_the_trial_is_not_loaded() {
    for (name, function) in [
        ("bad-adapter", "routes"),
        ("bad-adapter", "render-error"),
        ("bad-template", "configure"),
        ("bad-template", "render"),
        ("bad-policy", "prepare"),
        ("bad-strategy", "create"),
    ] {
        for deed in ["spin", "hoard", "trap", "recurse"] {
            let order = format!(r#"{{ "do": "{deed}", "in": "{function}" }}"#);
            let bytes = file(&format!("tests/guests/built/{name}.wasm"));
            let error = configured(&bytes, &order).unwrap_err();
            assert!(
                matches!(error, LoadError::Trial(_)),
                "{name} {order}: {error}"
            );
        }
    }
}

#[test]
fn a_template_that_misbehaves_costs_its_own_call() {
    for (deed, kind) in [
        ("spin", FaultKind::Deadline),
        ("hoard", FaultKind::Memory),
        ("trap", FaultKind::Trap),
        ("recurse", FaultKind::Trap),
        ("lie", FaultKind::Contract),
        ("huge", FaultKind::Limit),
        ("handles", FaultKind::Limit),
    ] {
        let order = format!(r#"{{ "do": "{deed}", "on": "hello" }}"#);
        let template = bad("bad-template", &order);
        let (found, message) = fault(template.render(conversation("r1")));
        assert_eq!(found, kind, "{deed}: {message}");
    }
    bad("bad-template", "{}")
        .render(conversation("r1"))
        .unwrap();
}

#[test]
fn a_policy_that_misbehaves_costs_its_own_call() {
    for (deed, kind) in [
        ("spin", FaultKind::Deadline),
        ("hoard", FaultKind::Memory),
        ("trap", FaultKind::Trap),
        ("lie", FaultKind::Contract),
        ("grid", FaultKind::Contract),
        ("size", FaultKind::Contract),
        ("empty", FaultKind::Contract),
        ("nan", FaultKind::Contract),
        ("handles", FaultKind::Limit),
        ("chain", FaultKind::Limit),
    ] {
        let order = format!(r#"{{ "do": "{deed}", "on": "detail=low" }}"#);
        let policy = bad("bad-policy", &order);
        let (found, message) = fault(prepare(&policy, (512, 512), &[("detail", "low")], 4000));
        assert_eq!(found, kind, "{deed}: {message}");
    }
}

#[test]
fn impossible_operations_are_errors_that_a_guest_can_handle() {
    let policy = bad("bad-policy", r#"{ "do": "arguments" }"#);
    prepare(&policy, (512, 384), &[], 4000).unwrap();
}

#[test]
fn an_adapter_that_misbehaves_costs_its_own_request() {
    for (deed, kind) in [
        ("spin", FaultKind::Deadline),
        ("hoard", FaultKind::Memory),
        ("trap", FaultKind::Trap),
        ("huge", FaultKind::Limit),
        ("lie", FaultKind::Contract),
        ("status", FaultKind::Contract),
        ("header", FaultKind::Contract),
        ("handles", FaultKind::Limit),
    ] {
        let adapter = bad("bad-adapter", &format!(r#"{{ "do": "{deed}" }}"#));
        let (found, message) =
            fault(adapter.start(request("POST", "/chat/completions", "hi", Vec::new())));
        assert_eq!(found, kind, "{deed}: {message}");
    }
}

#[test]
fn a_flood_of_log_lines_is_dropped_and_counted() {
    let sandbox = sandbox(PATIENCE_MS);
    let bytes = file("tests/guests/built/bad-adapter.wasm");
    let adapter = load_in(&sandbox, &bytes, r#"{ "do": "flood" }"#).unwrap();
    let request = request("POST", "/chat/completions", "hi", Vec::new());
    adapter.start(request).unwrap();
    let log = &sandbox.stats()[0].log;
    assert_eq!(log.lines + log.dropped, 2_000);
    assert!(log.dropped > 1_000 && log.cut == log.lines, "{log:?}");
}

#[test]
fn a_strategy_that_misbehaves_costs_its_own_call() {
    for (deed, kind) in [
        ("spin", FaultKind::Deadline),
        ("hoard", FaultKind::Memory),
        ("trap", FaultKind::Trap),
        ("huge", FaultKind::Limit),
    ] {
        let order = format!(r#"{{ "do": "{deed}", "on": "/v1" }}"#);
        let strategy = bad("bad-strategy", &order).strategy().unwrap();
        let fault = strategy.scope(lookup("/v1")).unwrap_err();
        assert_eq!(fault.kind, kind, "{deed}: {}", fault.message);
    }
    let strategy = bad("bad-strategy", r#"{ "do": "lie", "in": "victims" }"#);
    let strategy = strategy.strategy().unwrap();
    strategy.plan(Tier::Pixels, 1 << 20).unwrap();
    let fault = strategy.victims(Tier::Pixels, 1024, 8).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Contract, "{}", fault.message);
}

#[test]
fn the_harmless_variants_differ_from_the_shipped_ones() {
    let variant = |name: &str| bad(name, "{}");
    let loud = variant("phi3-loud").render(conversation("r1")).unwrap();
    assert!(
        loud.segments
            .contains(&Segment::Text("\nhelloLOUD".to_owned()))
    );
    let one = prepare(&variant("hd-one"), (300, 900), &[("detail", "high")], 4000).unwrap();
    assert_eq!((one.columns, one.rows), (1, 1));
    let strategy = variant("no-response-cache").strategy().unwrap();
    let scoping = strategy.scope(lookup("/v1")).unwrap();
    assert!(!scoping.response.read && scoping.pixels.read);
}
