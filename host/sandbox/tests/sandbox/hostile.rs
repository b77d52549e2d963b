//! Each misdeed costs its own call, has its own kind of fault, and is counted.

use std::sync::Arc;
use std::time::{Duration, Instant};

use visor_sandbox::{
    CallError, ErrorCode, Exchange, FaultKind, Function, LimitOverrides, LoadError, Origin, Part,
    Plugin, PluginFolder, PluginSettings, PromptSegments, Registry, Sandbox, SandboxOptions,
    Segment, StrategyActor,
};

use crate::guests::{
    conversation, core_module, load, sandbox, sandbox_with, template, template_wat,
};

fn kind(result: Result<PromptSegments, CallError>) -> (FaultKind, String) {
    match result {
        Err(CallError::Fault(fault)) => {
            assert_eq!(fault.function, Function::Render);
            (fault.kind, fault.message)
        }
        other => panic!("no fault: {other:?}"),
    }
}

fn outcomes(plugin: &Plugin) -> [u64; 7] {
    let stats = plugin.stats();
    let render = stats
        .iter()
        .find(|stats| stats.function == Function::Render)
        .unwrap();
    let sum = render.ok + render.refused + render.trap + render.deadline;
    assert_eq!(
        render.calls,
        sum + render.memory + render.limit + render.contract
    );
    [
        render.ok,
        render.refused,
        render.trap,
        render.deadline,
        render.memory,
        render.limit,
        render.contract,
    ]
}

/// Loads a template with this body and lets it misbehave once.
fn misbehave(imports: &str, body: &str) -> (Arc<Plugin>, FaultKind, String) {
    let sandbox = sandbox();
    let plugin = load(&sandbox, &template(imports, body)).unwrap();
    let (kind, message) = kind(plugin.render(conversation("r1")));
    assert_eq!(
        sandbox.instances(),
        0,
        "the instance of a failed call is gone"
    );
    (plugin, kind, message)
}

#[test]
fn a_good_guest_answers() {
    let plugin = load(&sandbox(), &template("", "")).unwrap();
    let prompt = plugin.render(conversation("r1")).unwrap();
    assert_eq!(prompt.segments, [Segment::Text("hi".to_owned())]);
    assert_eq!(outcomes(&plugin), [1, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_guest_that_spins_is_stopped_at_its_deadline() {
    let started = Instant::now();
    let (plugin, kind, message) = misbehave("", "(loop (br 0))");
    assert_eq!(
        (kind, message.as_str()),
        (FaultKind::Deadline, "not done within 100 ms")
    );
    assert!(
        started.elapsed() < Duration::from_secs(60),
        "loading and two calls"
    );
    assert_eq!(outcomes(&plugin), [0, 0, 0, 1, 0, 0, 0]);
}

#[test]
fn a_guest_that_spends_its_time_in_the_host_is_stopped_too() {
    let imports = r#"(import "visor:plugin/clock@0.1.0" "now" (func $now (result i64)))"#;
    let (_, kind, _) = misbehave(imports, "(loop (drop (call $now)) (br 0))");
    assert_eq!(kind, FaultKind::Deadline);
}

#[test]
fn a_guest_that_allocates_without_end_is_stopped_at_its_memory_limit() {
    let body = "(loop (drop (memory.grow (i32.const 16))) (br 0))";
    let (plugin, kind, message) = misbehave("", body);
    assert_eq!(kind, FaultKind::Memory);
    assert_eq!(
        message,
        "wants 34603008 bytes of memory; 33554432 are allowed"
    );
    assert_eq!(outcomes(&plugin), [0, 0, 0, 0, 1, 0, 0]);
}

#[test]
fn tables_have_a_limit_and_so_does_the_memory_it_starts_with() {
    let body = "(loop (drop (table.grow $table (ref.null func) (i32.const 1000))) (br 0))";
    let (_, kind, message) = misbehave("", body);
    assert_eq!(kind, FaultKind::Memory);
    assert!(
        message.contains("table elements; 20000 are allowed"),
        "{message}"
    );

    let wat = template_wat("", "").replace("(export \"memory\") 64)", "(export \"memory\") 600)");
    match load(&sandbox(), &core_module("template-plugin", "", &wat)) {
        Err(LoadError::Trial(fault)) => assert_eq!(fault.kind, FaultKind::Memory, "{fault}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_call_has_an_instance_of_its_own() {
    let body = "(if (global.get $seen) (then unreachable)) (global.set $seen (i32.const 1))";
    let plugin = load(&sandbox(), &template("", body)).unwrap();
    for _ in 0..3 {
        plugin.render(conversation("r")).unwrap();
    }
}

#[test]
fn text_that_could_not_come_back_is_refused_before_the_guest_sees_it() {
    let plugin = load(&sandbox(), &template("", "unreachable")).unwrap();
    let mut long = conversation("r");
    long.messages[0]
        .parts
        .push(Part::Text("x".repeat(512 << 10)));
    match plugin.render(long) {
        Err(CallError::Refused(refusal)) => assert_eq!(refusal.code, ErrorCode::TooLarge),
        other => panic!("{other:?}"),
    }
}

#[test]
fn handles_of_the_sandbox_cross_threads() {
    fn is_send<T: Send>() {}
    fn is_sync<T: Send + Sync>() {}
    is_send::<Exchange>();
    is_sync::<Plugin>();
    is_sync::<Sandbox>();
    is_sync::<Registry>();
    is_sync::<StrategyActor>();
    is_sync::<PluginFolder>();
}

#[test]
fn a_guest_that_traps_costs_one_call_and_the_next_one_is_served() {
    let (plugin, kind, message) = misbehave("", "unreachable");
    assert_eq!(kind, FaultKind::Trap);
    assert!(message.contains("unreachable"), "{message}");
    let (again, _) = self::kind(plugin.render(conversation("r2")));
    assert_eq!(again, FaultKind::Trap);
    assert_eq!(outcomes(&plugin), [0, 0, 2, 0, 0, 0, 0]);
}

#[test]
fn endless_recursion_is_a_trap() {
    let (_, kind, message) = misbehave("", "(call $deep)");
    assert_eq!(kind, FaultKind::Trap, "{message}");
}

#[test]
fn lies_about_sizes_are_found_out() {
    for (what, body) in [
        (
            "a list that lies outside",
            "(i32.store (i32.const 2052) (i32.const 0x7ffffff0))",
        ),
        (
            "a list that is not aligned",
            "(i32.store (i32.const 2052) (i32.const 4109))",
        ),
        (
            "a text that lies outside",
            "(i32.store (i32.const 4116) (i32.const 0x300000))
                                      (i32.store (i32.const 4112) (i32.const 0x3ffff0))",
        ),
        (
            "a text that is not UTF-8",
            "(i32.store (i32.const 8192) (i32.const 0xffff))",
        ),
        (
            "a segment of no kind",
            "(i32.store8 (i32.const 4108) (i32.const 9))",
        ),
        (
            "an answer that is neither",
            "(i32.store8 (i32.const 2048) (i32.const 2))",
        ),
        ("no segments", "(i32.store (i32.const 2056) (i32.const 0))"),
        (
            "an image that is not there",
            "(i32.store (i32.const 2052) (i32.const 4096))",
        ),
        (
            "an error of no kind",
            "(i32.store8 (i32.const 2048) (i32.const 1))
                                 (i32.store8 (i32.const 2052) (i32.const 99))",
        ),
    ] {
        let (plugin, kind, message) = misbehave("", body);
        assert_eq!(kind, FaultKind::Contract, "{what}: {message}");
        assert_eq!(outcomes(&plugin), [0, 0, 0, 0, 0, 0, 1], "{what}");
    }
}

#[test]
fn huge_result_lists_are_not_copied() {
    // 200,000 segments of 12 bytes are in bounds of its 4 MiB and over 512 KiB.
    let body = "(i32.store (i32.const 2056) (i32.const 200000))";
    let (_, kind, message) = misbehave("", body);
    assert_eq!(kind, FaultKind::Limit, "{message}");
    assert!(message.contains("too much data"), "{message}");
}

#[test]
fn many_texts_that_share_one_buffer_are_not_copied_either() {
    // 10,000 segments, each the same 1 MiB of text.
    let body = r#"
      (local.set $i (i32.const 0))
      (loop
        (i32.store (i32.add (i32.const 1048580) (i32.mul (local.get $i) (i32.const 12)))
          (i32.const 2097152))
        (i32.store (i32.add (i32.const 1048584) (i32.mul (local.get $i) (i32.const 12)))
          (i32.const 1048576))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br_if 0 (i32.lt_u (local.get $i) (i32.const 10000))))
      (i32.store (i32.const 2052) (i32.const 1048576))
      (i32.store (i32.const 2056) (i32.const 10000))"#;
    let (_, kind, message) = misbehave("", body);
    assert_eq!(kind, FaultKind::Limit, "{message}");
}

#[test]
fn a_guest_that_floods_the_log_loses_lines_and_nothing_else() {
    let imports = r#"(import "visor:plugin/log@0.1.0" "emit"
        (func $emit (param i32 i32 i32 i32 i32)))"#;
    let body = r#"
      (local.set $i (i32.const 0))
      (loop
        (call $emit (i32.const 4) (i32.const 1048576) (i32.const 8000) (i32.const 0) (i32.const 0))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br_if 0 (i32.lt_u (local.get $i) (i32.const 500))))"#;
    let sandbox = sandbox();
    let plugin = load(&sandbox, &template(imports, body)).unwrap();
    plugin.render(conversation("r1")).unwrap();
    let stats = sandbox.stats();
    let log = stats.iter().find(|stats| stats.id == "guest").unwrap().log;
    assert_eq!(log.lines + log.dropped, 500);
    // One window's worth, or two when the call lay across the end of one.
    assert!(log.lines == 50 || log.lines == 100, "{log:?}");
    assert_eq!(log.cut, log.lines, "8000 bytes are over the 4096 of a line");
}

#[test]
fn a_guest_that_hoards_handles_is_stopped() {
    let imports = r#"(import "visor:plugin/model@0.1.0" "[method]handle.tokenizer"
        (func $tokenizer (param i32) (result i32)))"#;
    let body = "(loop (drop (call $tokenizer (local.get $model))) (br 0))";
    let (plugin, kind, message) = misbehave(imports, body);
    assert_eq!(kind, FaultKind::Limit, "{message}");
    assert_eq!(outcomes(&plugin), [0, 0, 0, 0, 0, 1, 0]);
}

#[test]
fn handles_it_was_never_given_are_no_use() {
    let imports = r#"(import "visor:plugin/model@0.1.0" "[method]handle.created"
        (func $created (param i32) (result i64)))"#;
    for handle in ["0", "77", "-1"] {
        let body = format!("(drop (call $created (i32.const {handle})))");
        let (_, kind, message) = misbehave(imports, &body);
        assert_eq!(kind, FaultKind::Contract, "{message}");
    }
    // A conversation is no model.
    let (_, kind, message) = misbehave(imports, "(drop (call $created (local.get $conversation)))");
    assert_eq!(kind, FaultKind::Contract, "{message}");
}

#[test]
fn what_was_borrowed_must_be_given_back() {
    let (_, kind, message) = misbehave("", "(return (i32.const 2048))");
    assert_eq!(kind, FaultKind::Contract, "{message}");
}

#[test]
fn a_refusal_is_no_fault_and_its_words_are_bounded() {
    // `err(error { code: invalid-request, message: 100,000 times 0 })`
    let body = "(i32.store8 (i32.const 2048) (i32.const 1))
                (i32.store (i32.const 2052) (i32.const 0))
                (i32.store (i32.const 2056) (i32.const 1048576))
                (i32.store (i32.const 2060) (i32.const 100000))";
    let plugin = load(&sandbox(), &template("", body)).unwrap();
    match plugin.render(conversation("r1")) {
        Err(CallError::Refused(refusal)) => assert_eq!(refusal.message.len(), 1024),
        other => panic!("{other:?}"),
    }
    assert_eq!(outcomes(&plugin), [0, 1, 0, 0, 0, 0, 0]);
}

#[test]
fn a_plugins_own_limits_lower_those_of_its_role() {
    let limits = LimitOverrides {
        memory_bytes_max: Some(5 << 20),
        call_ms: Some(20),
        ..LimitOverrides::default()
    };
    let settings = PluginSettings {
        limits,
        ..PluginSettings::default()
    };
    let sandbox = sandbox();
    let load = |body| {
        sandbox
            .load("guest", &template("", body), &settings, Origin::Shipped)
            .unwrap()
    };
    let plugin = load("(loop (drop (memory.grow (i32.const 16))) (br 0))");
    let (kind, message) = self::kind(plugin.render(conversation("r1")));
    assert_eq!(kind, FaultKind::Memory);
    assert!(message.ends_with("5242880 are allowed"), "{message}");
    let (kind, message) = self::kind(load("(loop (br 0))").render(conversation("r2")));
    assert_eq!(
        (kind, message.as_str()),
        (FaultKind::Deadline, "not done within 20 ms")
    );
}

#[test]
fn when_all_instances_are_busy_the_caller_is_told_to_come_back() {
    let mut options = SandboxOptions {
        instances_max: 1,
        instance_wait_ms: 10,
        ..SandboxOptions::default()
    };
    options.budgets.render_ms = 2000;
    let sandbox = sandbox_with(options);
    let plugin = load(&sandbox, &template("", "(loop (br 0))")).unwrap();
    let busy = Arc::clone(&plugin);
    let spinning = std::thread::spawn(move || busy.render(conversation("r1")));
    while sandbox.instances() == 0 {
        std::thread::yield_now();
    }
    match plugin.render(conversation("r2")) {
        Err(CallError::Refused(refusal)) => assert_eq!(refusal.code, ErrorCode::Overloaded),
        other => panic!("{other:?}"),
    }
    assert_eq!(kind(spinning.join().unwrap()).0, FaultKind::Deadline);
}

/// A template with so many tables more, that spins.
fn with_tables(more: usize) -> Vec<u8> {
    let wat = template_wat("", "(loop (br 0))");
    let table = "(table $table 10 funcref)";
    let tables = format!("{table}{}", " (table 1 funcref)".repeat(more));
    assert!(wat.contains(table));
    core_module("template-plugin", "", &wat.replace(table, &tables))
}

#[test]
fn what_a_component_may_have_fits_as_often_as_instances_may_live() {
    let mut options = SandboxOptions {
        instances_max: 8,
        ..SandboxOptions::default()
    };
    options.budgets.render_ms = 2000;
    let sandbox = sandbox_with(options);
    let refused = load(&sandbox, &with_tables(4)).unwrap_err();
    assert!(
        matches!(refused, LoadError::TooManyParts { .. }),
        "{refused}"
    );
    // With its own and the one of the adapter that wraps it, four.
    let plugin = load(&sandbox, &with_tables(2)).unwrap();
    let spinning: Vec<_> = (0..8)
        .map(|_| {
            let plugin = Arc::clone(&plugin);
            std::thread::spawn(move || plugin.render(conversation("r")))
        })
        .collect();
    for one in spinning {
        let (kind, message) = kind(one.join().unwrap());
        assert_eq!(kind, FaultKind::Deadline, "{message}");
    }
}
