//! Guests that a compiler made, where hand-written ones would be long: what `built_guests.rs` does
//! not show, mostly what happens after the first fault.

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use visor_sandbox::{
    Blob, CacheEvent, CallError, ErrorCode, Event, Exchange, FaultKind, GuestError, HttpRequest,
    ImageContext, ImageOp, ImageSource, Layout, LimitOverrides, LoadError, Origin, PixelBuffer,
    Plugin, PluginSettings, SampleModel, Sandbox, SandboxOptions, Tier,
};

use crate::guests::{core_module, sandbox_with};

fn built(name: &str) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let folder = if name.contains('-') {
        "tests/guests/built"
    } else {
        "plugins/built"
    };
    fs::read(root.join(folder).join(format!("{name}.wasm"))).expect("cargo xtask plugins makes it")
}

/// Budgets that a loaded machine keeps; whoever waits for a deadline lowers them.
fn roomy() -> Sandbox {
    let mut options = SandboxOptions::default();
    let budgets = &mut options.budgets;
    (
        budgets.start_ms,
        budgets.advance_ms,
        budgets.render_error_ms,
    ) = (5000, 5000, 5000);
    (budgets.prepare_ms, budgets.strategy_ms, budgets.setup_ms) = (5000, 5000, 5000);
    sandbox_with(options)
}

fn load(name: &str, config: &str, call_ms: u64) -> Result<Arc<Plugin>, LoadError> {
    let settings = PluginSettings {
        config_json: config.to_owned(),
        limits: LimitOverrides {
            call_ms: Some(call_ms),
            ..LimitOverrides::default()
        },
        ..PluginSettings::default()
    };
    roomy().load(name, &built(name), &settings, Origin::Shipped)
}

fn post(text: &str) -> HttpRequest {
    HttpRequest {
        method: "POST".to_owned(),
        path: "/chat/completions".to_owned(),
        path_params: Vec::new(),
        query: Vec::new(),
        headers: Vec::new(),
        principal: None,
        id: "req-1".to_owned(),
        text: Ok(text.to_owned()),
        lifted: Arc::default(),
        blobs: Vec::new(),
        raw: Blob {
            bytes: Bytes::new(),
            content_type: String::new(),
        },
        form: Vec::new(),
    }
}

fn advance(exchange: &mut Exchange) -> Option<FaultKind> {
    let text = "x".to_owned();
    let delta = Event::Delta {
        generation: 0,
        choice: 0,
        text,
        tokens: Vec::new(),
    };
    match exchange.advance(vec![delta]) {
        Ok(_) => None,
        Err(CallError::Fault(fault)) => Some(fault.kind),
        Err(CallError::Refused(refusal)) => panic!("{refusal}"),
    }
}

#[test]
fn an_exchange_that_failed_stays_failed_and_errors_can_still_be_rendered() {
    for (deed, kind, call_ms) in [
        ("spin", FaultKind::Deadline, 100),
        ("hoard", FaultKind::Memory, 5000),
        ("trap", FaultKind::Trap, 5000),
        ("huge", FaultKind::Limit, 5000),
        ("handles", FaultKind::Limit, 5000),
    ] {
        let config = format!(r#"{{"do": "{deed}", "in": "advance"}}"#);
        let plugin = load("bad-adapter", &config, call_ms).unwrap();
        let (mut exchange, _) = plugin.start(post("hello")).unwrap();
        assert_eq!(advance(&mut exchange), Some(kind), "{deed}");
        assert_eq!(advance(&mut exchange), Some(kind), "{deed}, again");
        assert!(exchange.keep_alive().is_err(), "{deed}");
        let error = GuestError::new(ErrorCode::Internal, "it failed");
        let response = plugin.render_error(&error, true).unwrap();
        assert_eq!(response.body, b"bad-adapter: it failed", "{deed}");
    }
}

#[test]
fn exchanges_of_one_plugin_do_not_see_each_other() {
    let plugin = load("bad-adapter", "{}", 5000).unwrap();
    let (mut first, _) = plugin.start(post("one")).unwrap();
    let (mut second, _) = plugin.start(post("two")).unwrap();
    assert_eq!((advance(&mut first), advance(&mut second)), (None, None));
    drop(first);
    assert_eq!(advance(&mut second), None);
}

#[test]
fn a_policy_that_looks_at_pixels_for_ever_is_stopped_by_the_hosts_own_time() {
    match load("bad-policy", r#"{"do": "look"}"#, 200) {
        Err(LoadError::Trial(fault)) => assert_eq!(fault.kind, FaultKind::Deadline),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_strategy_that_fails_beside_the_requests_is_found_out_too() {
    for (deed, function, kind) in [
        ("lie", "admit", FaultKind::Contract),
        ("trap", "observe", FaultKind::Trap),
        ("trap", "victims", FaultKind::Trap),
    ] {
        let config = format!(r#"{{"do": "{deed}", "in": "{function}"}}"#);
        let actor = load("bad-strategy", &config, 5000)
            .unwrap()
            .strategy()
            .unwrap();
        actor.plan(Tier::Pixels, 1000).unwrap();
        let fault = match function {
            "victims" => actor.victims(Tier::Pixels, 10, 10).unwrap_err(),
            "admit" => actor.admit(Tier::Pixels, Vec::new()).unwrap_err(),
            _ => {
                let hit = CacheEvent::Hit { id: 1, count: 1 };
                actor.observe(Tier::Pixels, vec![hit], 0).unwrap_err()
            }
        };
        assert_eq!(fault.kind, kind, "{deed} in {function}: {fault}");
    }
}

thread_local! {
    static PICTURES_RUN: Cell<u32> = const { Cell::new(0) };
}

/// A picture whose host code panics when asked for pixels.
struct Picture(u32, u32);

impl ImageSource for Picture {
    fn size_px(&self) -> (u32, u32) {
        (self.0, self.1)
    }
    fn stored_size_px(&self) -> (u32, u32) {
        (self.0, self.1)
    }
    fn layout(&self) -> Layout {
        Layout::Rgb
    }
    fn format(&self) -> String {
        "png".to_owned()
    }
    fn digest_hex(&self) -> String {
        "ab".repeat(32)
    }
    fn work_px(&self, _: &[ImageOp]) -> Result<u64, GuestError> {
        Ok(1000)
    }
    fn pixels(&self, _: &[ImageOp]) -> Result<PixelBuffer, GuestError> {
        PICTURES_RUN.with(|run| run.set(run.get() + 1));
        panic!("the host's own code fails")
    }
}

fn context() -> ImageContext {
    ImageContext {
        index: 0,
        count: 1,
        budget_tokens: 4096,
        extensions: Vec::new(),
        model: Arc::new(SampleModel),
        request_id: "r".to_owned(),
    }
}

#[test]
fn the_hd_policy_fits_pictures_of_any_shape() {
    let plugin = load("hd", "{}", 5000).unwrap();
    for (width_px, height_px) in [(640, 480), (1, 1), (3000, 20), (20, 3000), (336, 336)] {
        let view = plugin.prepare(Arc::new(Picture(width_px, height_px)), context());
        let view = view.unwrap_or_else(|error| panic!("{width_px}x{height_px}: {error}"));
        assert_eq!(view.tiles.len(), (view.columns * view.rows) as usize);
        assert!(view.overview.is_some());
    }
}

/// Resizes to 10x10 and looks at the pixels; answers an overview when it may, else nothing.
const LOOKING: &str = r#"(module
  (import "visor:plugin/media@0.1.0" "[resource-drop]image" (func $drop_image (param i32)))
  (import "visor:plugin/media@0.1.0" "[method]image.resize"
    (func $resize (param i32 i32 i32 i32 i32)))
  (import "visor:plugin/media@0.1.0" "[method]image.pixels" (func $pixels (param i32 i32)))
  (import "visor:plugin/model@0.1.0" "[resource-drop]handle" (func $drop_model (param i32)))
  (import "visor:plugin/image-policy-input@0.1.0" "[resource-drop]context"
    (func $drop_context (param i32)))
  (memory (export "memory") 2)
  (global $next (mut i32) (i32.const 65536))
  (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $next) (i32.const 7)) (i32.const -8)))
    (global.set $next (i32.add (local.get $at) (local.get 3)))
    (local.get $at))
  (func (export "visor:plugin/lifecycle@0.1.0#describe") (result i32) (i32.const 1024))
  (func (export "visor:plugin/lifecycle@0.1.0#configure") (param i32 i32) (result i32)
    (i32.const 1024))
  (func (export "visor:plugin/image-policy@0.1.0#prepare")
      (param $image i32) (param $model i32) (param $context i32) (result i32)
    (call $resize (local.get $image) (i32.const 10) (i32.const 10) (i32.const 1) (i32.const 2048))
    (call $pixels (i32.load (i32.const 2052)) (i32.const 2064))
    (if (i32.eqz (i32.load8_u (i32.const 2064))) (then
      (call $resize
        (local.get $image) (i32.const 336) (i32.const 336) (i32.const 1) (i32.const 2048))
      (i32.store8 (i32.const 3076) (i32.const 1))
      (i32.store (i32.const 3080) (i32.load (i32.const 2052)))))
    (call $drop_image (local.get $image))
    (call $drop_model (local.get $model))
    (call $drop_context (local.get $context))
    (i32.const 3072)))"#;

#[test]
fn a_panic_of_the_hosts_image_code_stays_with_the_host() {
    let sandbox = roomy();
    let module = core_module("image-policy-plugin", "", LOOKING);
    let settings = PluginSettings::default();
    let plugin = sandbox
        .load("looking", &module, &settings, Origin::Shipped)
        .unwrap();
    // The trial's picture has pixels, this one panics: the guest sees a refusal and goes on.
    match plugin.prepare(Arc::new(Picture(64, 64)), context()) {
        Err(CallError::Fault(fault)) => {
            assert_eq!(fault.message, "neither an overview nor tiles");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(sandbox.instances(), 0);
}

#[test]
fn what_a_look_would_take_is_counted_before_it_is_taken() {
    let options = SandboxOptions {
        // The trial's look is 100 pixels, and this picture's is 1100.
        image_work_px_max: 1099,
        ..SandboxOptions::default()
    };
    let module = core_module("image-policy-plugin", "", LOOKING);
    let load = |options| {
        let settings = PluginSettings::default();
        let sandbox = sandbox_with(options);
        sandbox
            .load("looking", &module, &settings, Origin::Shipped)
            .unwrap()
    };
    // Running it would panic, which is logged; it is not run.
    let refused = load(options.clone()).prepare(Arc::new(Picture(64, 64)), context());
    assert!(refused.is_err());
    assert_eq!(PICTURES_RUN.with(Cell::get), 0);
    let enough = SandboxOptions {
        image_work_px_max: 1100,
        ..options
    };
    assert!(
        load(enough)
            .prepare(Arc::new(Picture(64, 64)), context())
            .is_err()
    );
    assert_eq!(PICTURES_RUN.with(Cell::get), 1);
}

#[test]
fn a_shipped_plugin_cut_short_is_refused() {
    let sandbox = roomy();
    let good = built("phi3");
    for bytes in (0..good.len()).step_by(1009) {
        let loaded = sandbox.load(
            "x",
            &good[..bytes],
            &PluginSettings::default(),
            Origin::Shipped,
        );
        assert!(loaded.is_err(), "{bytes} of {}", good.len());
    }
}
