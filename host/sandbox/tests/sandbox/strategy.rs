//! The long-lived instance of a cache strategy: deadlines, rebuilding, and giving up for a while.

use visor_sandbox::{
    Algorithm, CacheEntry, CacheEvent, FaultKind, Function, Lookup, SandboxOptions, StrategyActor,
    Tier,
};

use crate::guests::{core_module, load, sandbox_with};

/// A strategy that misbehaves on demand: `victims` traps when asked for 13, spins when asked for
/// 14, and answers twice the same when asked for 15. Else it answers nothing; `observe` with more
/// than 99 used bytes spins. The counter of created strategies is the plan's ttl.
const STRATEGY: &str = r#"(module
  (import "[export]visor:plugin/cache-strategy@0.1.0" "[resource-new]strategy"
    (func $new (param i32) (result i32)))
  (import "visor:plugin/cache-strategy-input@0.1.0" "[resource-drop]lookup"
    (func $drop_lookup (param i32)))
  (memory (export "memory") 2)
  (global $next (mut i32) (i32.const 65536))
  (global $created (mut i32) (i32.const 0))
  (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $next) (i32.const 7)) (i32.const -8)))
    (global.set $next (i32.add (local.get $at) (local.get 3)))
    (local.get $at))
  (func (export "visor:plugin/lifecycle@0.1.0#describe") (result i32) (i32.const 1024))
  (func (export "visor:plugin/lifecycle@0.1.0#configure") (param i32 i32) (result i32)
    (i32.const 1024))
  (func (export "visor:plugin/cache-strategy@0.1.0#scope") (param $lookup i32) (result i32)
    (call $drop_lookup (local.get $lookup))
    (i32.const 1024))
  (func (export "visor:plugin/cache-strategy@0.1.0#[static]strategy.create")
      (param i32 i64) (result i32)
    (global.set $created (i32.add (global.get $created) (i32.const 1)))
    (i32.store (i32.const 2048) (call $new (i32.const 7)))
    (i32.store8 (i32.const 2052) (i32.const 3))        ;; base: sieve
    (i32.store8 (i32.const 2053) (i32.const 0x20))     ;; interests: victims
    (i32.store (i32.const 2056) (i32.const 1))         ;; hit-sampling
    (i32.store8 (i32.const 2060) (i32.const 1))        ;; ttl: some
    (i32.store (i32.const 2064) (global.get $created))
    (i32.store (i32.const 2068) (i32.const 500))       ;; max-entry-permille
    (i32.const 2048))
  (func (export "visor:plugin/cache-strategy@0.1.0#[method]strategy.observe")
      (param $self i32) (param i32 i32) (param $used i64)
    (if (i64.gt_u (local.get $used) (i64.const 99)) (then (loop (br 0)))))
  (func (export "visor:plugin/cache-strategy@0.1.0#[method]strategy.victims")
      (param $self i32) (param i64) (param $at_most i32) (result i32)
    (if (i32.eq (local.get $at_most) (i32.const 13)) (then unreachable))
    (if (i32.eq (local.get $at_most) (i32.const 14)) (then (loop (br 0))))
    (if (i32.eq (local.get $at_most) (i32.const 15)) (then
      (i32.store (i32.const 3072) (i32.const 4096))
      (i32.store (i32.const 3076) (i32.const 2))
      (return (i32.const 3072))))
    (i32.const 1024))
  (func (export "visor:plugin/cache-strategy@0.1.0#[method]strategy.admit")
      (param $self i32) (param i32 i32) (result i32) (i32.const 1024))
  (func (export "visor:plugin/cache-strategy@0.1.0#[dtor]strategy") (param i32)))"#;

fn actor(scope_ms: u64) -> StrategyActor {
    let mut options = SandboxOptions::default();
    options.budgets.strategy_ms = 100;
    options.budgets.scope_ms = scope_ms;
    let sandbox = sandbox_with(options);
    let bytes = core_module("cache-strategy-plugin", "", STRATEGY);
    load(&sandbox, &bytes).unwrap().strategy().unwrap()
}

fn lookup() -> Lookup {
    Lookup {
        principal: None,
        model: "m".to_owned(),
        route: "/".to_owned(),
        prompt_tokens: 1,
        image_count: 0,
        temperature: 0.0,
        extensions: Vec::new(),
    }
}

#[test]
fn one_instance_serves_all_tiers_and_remembers() {
    let actor = actor(1000);
    let pixels = actor.plan(Tier::Pixels, 1000).unwrap();
    assert_eq!((pixels.base, pixels.ttl_s), (Algorithm::Sieve, Some(1)));
    assert!(pixels.interests.victims && !pixels.interests.scope);
    assert_eq!(actor.plan(Tier::Response, 1000).unwrap().ttl_s, Some(2));
    for _ in 0..100 {
        assert_eq!(actor.scope(lookup()).unwrap().scope, "");
        let hit = CacheEvent::Hit { id: 1, count: 2 };
        actor.observe(Tier::Pixels, vec![hit], 0).unwrap();
        assert_eq!(
            actor.victims(Tier::Pixels, 10, 5).unwrap(),
            Vec::<u64>::new()
        );
    }
    assert_eq!(actor.restarts(), 0);
}

#[test]
fn nonsense_is_a_fault_and_a_new_instance_knows_the_tiers() {
    let actor = actor(1000);
    actor.plan(Tier::Pixels, 1000).unwrap();
    let fault = actor.victims(Tier::Pixels, 10, 15).unwrap_err();
    assert_eq!(fault.kind, FaultKind::Contract);
    assert!(fault.message.contains("comes twice"), "{fault}");
    assert_eq!(
        actor.victims(Tier::Pixels, 10, 5).unwrap(),
        Vec::<u64>::new()
    );
    assert_eq!(actor.restarts(), 1);
    // A tier that was never planned is our own mistake, and still no reason to fall over.
    assert!(actor.observe(Tier::Prefix, Vec::new(), 0).is_err());
}

#[test]
fn an_answer_for_every_candidate_or_none_counts() {
    let actor = actor(1000);
    actor.plan(Tier::Pixels, 1000).unwrap();
    let entry = CacheEntry {
        id: 1,
        tier: Tier::Pixels,
        scope: 0,
        bytes: 1,
        cost_us: 1,
        tokens: 1,
    };
    let fault = actor.admit(Tier::Pixels, vec![entry]).unwrap_err();
    assert!(
        fault.message.contains("0 answers for 1 candidates"),
        "{fault}"
    );
}

#[test]
fn three_faults_in_a_row_and_it_rests() {
    let actor = actor(1000);
    actor.plan(Tier::Pixels, 1000).unwrap();
    let mut kinds = Vec::new();
    for at_most in [13, 14, 13, 5, 5] {
        kinds.push(
            actor
                .victims(Tier::Pixels, 10, at_most)
                .map_err(|fault| fault.kind),
        );
    }
    use FaultKind::{Deadline, Limit, Trap};
    assert_eq!(
        kinds,
        [Err(Trap), Err(Deadline), Err(Trap), Err(Limit), Err(Limit)]
    );
    assert_eq!(actor.restarts(), 2);
}

#[test]
fn a_caller_does_not_wait_for_a_strategy_that_is_busy() {
    let mut options = SandboxOptions::default();
    options.budgets.strategy_ms = 2000;
    options.budgets.scope_ms = 20;
    let sandbox = sandbox_with(options);
    let plugin = load(
        &sandbox,
        &core_module("cache-strategy-plugin", "", STRATEGY),
    )
    .unwrap();
    let actor = plugin.strategy().unwrap();
    actor.plan(Tier::Pixels, 1000).unwrap();
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            actor
                .observe(Tier::Pixels, Vec::new(), 100)
                .map_err(|f| f.kind)
        });
        // Whether it is running yet or still queued, what comes behind it is late.
        while !busy.is_finished() {
            if let Err(fault) = actor.scope(lookup()) {
                assert_eq!(
                    (fault.kind, fault.function),
                    (FaultKind::Deadline, Function::Scope)
                );
                break;
            }
        }
        assert_eq!(busy.join().unwrap(), Err(FaultKind::Deadline));
    });
    drop(actor); // Joins the thread, so that the late one is counted.
    let late: u64 = plugin.stats().iter().map(|stats| stats.late).sum();
    assert!(late >= 1, "{:?}", plugin.stats());
}
