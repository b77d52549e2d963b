//! What cannot be loaded, and what the operator reads about it.

use std::fs;
use std::sync::Arc;

use visor_sandbox::{
    FaultKind, HostServices, LoadError, ModelFacts, Origin, PluginSettings, Role, Sandbox,
    SandboxOptions, check_file,
};

use crate::guests::{
    conversation, core_module, load, sandbox, sandbox_with, template, template_wat,
};

#[test]
fn a_core_module_is_wrapped_and_says_what_it_is() {
    let sandbox = sandbox();
    let plugin = load(&sandbox, &template("", "")).unwrap();
    assert!(plugin.serves(Role::Template));
    assert_eq!(plugin.roles()[0].version, "0.1.0");
    assert_eq!(plugin.revision().len(), 64);
    let imports = plugin.imports();
    assert!(
        imports
            .iter()
            .any(|name| name == "visor:plugin/template-input@0.1.0"),
        "{imports:?}"
    );
    assert!(
        imports.iter().all(|name| !name.contains("store")),
        "unused imports are not there"
    );
}

#[test]
fn what_is_not_wasm_is_said_to_be_not_wasm() {
    let sandbox = sandbox();
    let said = |bytes: &[u8]| load(&sandbox, bytes).unwrap_err().to_string();
    assert_eq!(said(b""), "not a WebAssembly file: the file is empty");
    assert_eq!(
        said(b"#!/bin/sh\n"),
        "not a WebAssembly file: it begins with \"#!/bin/sh\\n\""
    );
}

#[test]
fn every_truncation_of_a_good_file_is_refused() {
    let sandbox = sandbox();
    let good = template("", "");
    for bytes in 0..good.len() {
        assert!(
            load(&sandbox, &good[..bytes]).is_err(),
            "{bytes} of {}",
            good.len()
        );
    }
    let half = load(&sandbox, &good[..good.len() / 2]).unwrap_err();
    assert!(matches!(half, LoadError::Malformed(_)), "{half}");
}

#[test]
fn flipped_bytes_never_bring_the_loader_down() {
    let sandbox = sandbox();
    let good = template("", "");
    for index in 8..good.len() {
        let mut bad = good.clone();
        bad[index] ^= if index % 2 == 0 { 0x55 } else { 1 };
        // Whether this byte matters is not the point.
        let _ = load(&sandbox, &bad);
    }
}

#[test]
fn a_file_over_the_cap_is_not_looked_at() {
    let options = SandboxOptions {
        component_bytes_max: 100,
        ..SandboxOptions::default()
    };
    let error = load(&sandbox_with(options), &[0; 101]).unwrap_err();
    assert_eq!(
        error,
        LoadError::TooLarge {
            bytes: 101,
            bytes_max: 100
        }
    );
}

#[test]
fn a_core_module_without_a_component_type_is_no_plugin() {
    let module = wat::parse_str(r#"(module (func (export "run")))"#).unwrap();
    let error = load(&sandbox(), &module).unwrap_err();
    assert!(
        matches!(error, LoadError::NoRole(_) | LoadError::NotComponent(_)),
        "{error}"
    );
}

#[test]
fn a_module_that_lacks_an_export_of_its_world_is_refused() {
    let wat = template_wat("", "").replace("template@0.1.0#render", "template@0.1.0#other");
    let module = std::panic::catch_unwind(|| core_module("template-plugin", "", &wat)).unwrap();
    let error = load(&sandbox(), &module).unwrap_err();
    assert!(matches!(error, LoadError::NotComponent(_)), "{error}");
    assert!(error.to_string().contains("render"), "{error}");
}

#[test]
fn a_component_with_the_right_names_and_wrong_types_is_refused() {
    let wrong_export = r#"(component
      (core module $m (func (export "f")))
      (core instance $i (instantiate $m))
      (func $f (canon lift (core func $i "f")))
      (instance $life (export "describe" (func $f)) (export "configure" (func $f)))
      (instance $role (export "render" (func $f)))
      (export "visor:plugin/lifecycle@0.1.0" (instance $life))
      (export "visor:plugin/template@0.1.0" (instance $role)))"#;
    let error = load(&sandbox(), &wat::parse_str(wrong_export).unwrap()).unwrap_err();
    assert!(error.to_string().contains("describe"), "{error}");

    let missing = wrong_export.replace(r#"(export "render" (func $f))"#, "");
    let error = load(&sandbox(), &wat::parse_str(missing).unwrap()).unwrap_err();
    assert!(matches!(error, LoadError::Link(_)), "{error}");
    assert!(error.to_string().contains("render"), "{error}");

    let wrong_import = wrong_export.replace(
        "(component",
        r#"(component (import "visor:plugin/clock@0.1.0" (instance (export "now" (func (result string)))))"#,
    );
    let error = load(&sandbox(), &wat::parse_str(wrong_import).unwrap()).unwrap_err();
    assert!(matches!(error, LoadError::Link(_)), "{error}");
    assert!(error.to_string().contains("visor:plugin/clock"), "{error}");
}

#[test]
fn a_plugin_that_fails_its_trial_is_not_loaded() {
    let sandbox = sandbox();
    let wat =
        template_wat("", "").replace("(i32.const 0))\n      (then", "(i32.const 1))\n      (then");
    let on_trial = wat.replace(
        "(i32.store (i32.const 2056) (i32.const 1))",
        "(unreachable)",
    );
    assert_ne!(on_trial, template_wat("", ""));
    let error = load(&sandbox, &core_module("template-plugin", "", &on_trial)).unwrap_err();
    match &error {
        LoadError::Trial(fault) => assert_eq!(fault.kind, FaultKind::Trap),
        _ => panic!("{error}"),
    }
    assert!(
        sandbox
            .stats()
            .iter()
            .all(|stats| stats.functions.is_empty()),
        "a trial counts nothing"
    );
}

#[test]
fn issues_of_the_configuration_are_told_with_their_path() {
    // `err([{ path: "a", message: "b" }])`
    let wat = template_wat("", "")
        .replace(
            "(param i32 i32) (result i32)\n    (i32.const 1024)",
            "(param i32 i32) (result i32)\n    (i32.const 3072)",
        )
        .replace(
            "(data (i32.const 8192) \"hi\")",
            r#"(data (i32.const 8192) "hi/key")
               (data (i32.const 3072) "\01\00\00\00\80\0c\00\00\01\00\00\00")
               (data (i32.const 3200) "\02\20\00\00\04\00\00\00\00\20\00\00\02\00\00\00")"#,
        );
    let error = load(&sandbox(), &core_module("template-plugin", "", &wat)).unwrap_err();
    assert_eq!(error.to_string(), "configuration refused: /key: hi");
}

const WASI: &str = r"
package test:wasi;
package wasi:io@0.2.3 { interface poll { resource pollable { block: func(); } } }
package wasi:clocks@0.2.3 {
  interface monotonic-clock {
    use wasi:io/poll@0.2.3.{pollable};
    now: func() -> u64;
    subscribe-duration: func(when: u64) -> pollable;
  }
}
world guest {
  include visor:plugin/template-plugin@0.1.0;
  import wasi:clocks/monotonic-clock@0.2.3;
  import wasi:io/poll@0.2.3;
}";

#[test]
fn wasi_is_there_for_those_who_name_it_and_lets_nobody_wait() {
    let imports = r#"
      (import "wasi:clocks/monotonic-clock@0.2.3" "now" (func $now (result i64)))
      (import "wasi:clocks/monotonic-clock@0.2.3" "subscribe-duration"
        (func $sleep (param i64) (result i32)))
      (import "wasi:io/poll@0.2.3" "[method]pollable.block" (func $block (param i32)))"#;
    let sandbox = sandbox();
    let harmless = template_wat(imports, "(drop (call $now))");
    let plugin = load(&sandbox, &core_module("guest", WASI, &harmless)).unwrap();
    plugin.render(conversation("r1")).unwrap();
    let sleeper = template_wat(
        imports,
        "(call $block (call $sleep (i64.const 10000000000)))",
    );
    let plugin = load(&sandbox, &core_module("guest", WASI, &sleeper)).unwrap();
    let error = plugin.render(conversation("r2")).unwrap_err().to_string();
    assert!(error.contains("plugins may not wait"), "{error}");
}

const PRINTING: &str = r"
package test:printing;
package wasi:io@0.2.3 {
  interface error { resource error; }
  interface streams {
    use error.{error};
    resource output-stream {
      blocking-write-and-flush: func(contents: list<u8>) -> result<_, stream-error>;
    }
    variant stream-error { last-operation-failed(own<error>), closed }
  }
}
package wasi:cli@0.2.3 {
  interface stdout {
    use wasi:io/streams@0.2.3.{output-stream};
    get-stdout: func() -> output-stream;
  }
}
world guest {
  include visor:plugin/template-plugin@0.1.0;
  import wasi:cli/stdout@0.2.3;
  import wasi:io/error@0.2.3;
  import wasi:io/streams@0.2.3;
}";

/// WASI blocks on a runtime of its own, which panics on a thread that runs one.
#[test]
fn a_plugin_that_prints_while_it_is_loaded_is_loaded_from_any_thread() {
    let imports = r#"
      (import "wasi:cli/stdout@0.2.3" "get-stdout" (func $stdout (result i32)))
      (import "wasi:io/streams@0.2.3" "[method]output-stream.blocking-write-and-flush"
        (func $write (param i32 i32 i32 i32)))"#;
    let head = r##"(func (export "visor:plugin/lifecycle@0.1.0#describe") (result i32)"##;
    let print = "(call $write (call $stdout) (i32.const 8192) (i32.const 2) (i32.const 1536))";
    let quiet = template_wat(imports, "");
    let loud = quiet.replace(head, &format!("{head} {print}"));
    assert_ne!(quiet, loud);
    let guest = core_module("guest", PRINTING, &loud);
    let sandbox = sandbox();
    let plain = load(&sandbox, &guest).unwrap();
    let inside = wasmtime_wasi::runtime::in_tokio(async { load(&sandbox, &guest) }).unwrap();
    assert_eq!(plain.revision(), inside.revision());
}

/// Services that fail when they are asked for a model.
struct Broken;

impl HostServices for Broken {
    fn models(&self) -> Vec<Arc<dyn ModelFacts>> {
        panic!("no models here")
    }
}

#[test]
fn a_panic_of_the_host_in_a_trial_refuses_the_file_and_ends_nothing() {
    let sandbox = Sandbox::new(SandboxOptions::default(), Arc::new(Broken)).unwrap();
    let error = load(&sandbox, &template("", "")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "trial run: it brings the server's own code down: no models here; the log says where"
    );
    assert_eq!(sandbox.instances(), 0);
}

#[test]
fn the_same_bytes_are_compiled_once() {
    let sandbox = sandbox();
    let bytes = template("", "");
    let first = load(&sandbox, &bytes).unwrap();
    let settings = PluginSettings {
        config_json: "{\"a\": 1}".to_owned(),
        ..Default::default()
    };
    let second = sandbox
        .load("other", &bytes, &settings, Origin::Shipped)
        .unwrap();
    assert_eq!(first.revision(), second.revision());
    assert_eq!(first.compile_ms(), second.compile_ms());
    assert_eq!(second.id(), "other");
    assert_eq!(second.settings(), &settings);
}

#[test]
fn a_file_is_checked_as_the_server_would_load_it() {
    let folder = tempfile::tempdir().unwrap();
    let (sandbox, settings) = (sandbox(), PluginSettings::default());
    let path = folder.path().join("my-template.wasm");
    fs::write(&path, template("", "")).unwrap();
    let report = check_file(&sandbox, &path, &settings).unwrap();
    assert_eq!((report.id.as_str(), report.wrapped), ("my-template", true));
    assert_eq!(report.bytes, fs::metadata(&path).unwrap().len());
    let missing = check_file(&sandbox, &folder.path().join("no.wasm"), &settings).unwrap_err();
    assert!(matches!(missing, LoadError::Read(_)), "{missing}");
    let unfit = check_file(&sandbox, &folder.path().join("a b.wasm"), &settings).unwrap_err();
    assert!(
        unfit.to_string().contains("`a b` cannot be a plugin id"),
        "{unfit}"
    );
}

#[cfg(unix)]
#[test]
fn what_is_not_a_plain_file_is_refused_and_not_waited_for() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let made = std::process::Command::new("mkfifo")
        .arg(at("pipe.wasm"))
        .status();
    assert!(made.unwrap().success());
    symlink("/dev/zero", at("endless.wasm")).unwrap();
    fs::create_dir(at("folder.wasm")).unwrap();
    for name in ["pipe.wasm", "endless.wasm", "folder.wasm"] {
        let (told, refused) = std::sync::mpsc::channel();
        let path = at(name);
        std::thread::spawn(move || {
            let checked = check_file(&sandbox(), &path, &PluginSettings::default());
            told.send(checked).unwrap();
        });
        let refused = refused.recv_timeout(std::time::Duration::from_secs(60));
        let refused = refused.expect("within a minute").unwrap_err().to_string();
        assert_eq!(
            refused, "cannot read the file: it is not a plain file",
            "{name}"
        );
    }
}

#[test]
fn deep_nesting_is_refused_and_not_followed() {
    let sandbox = sandbox();
    for levels in [200, 990, 200_000] {
        // A type section with one type: component types, each declaring the next. `0x41` is a
        // component type, then one declaration, of kind type.
        let mut section = vec![1_u8];
        for _ in 0..levels {
            section.extend([0x41, 1, 1]);
        }
        section.extend([0x41, 0]);
        let mut file = b"\0asm\x0d\0\x01\0\x07".to_vec();
        let mut length = section.len();
        while length >= 0x80 {
            file.push((length & 0x7f) as u8 | 0x80);
            length >>= 7;
        }
        file.push(length as u8);
        file.extend(section);
        let error = load(&sandbox, &file).unwrap_err();
        // Moderate depth is legal, and then it is no plugin.
        let is_said = matches!(error, LoadError::Malformed(_) | LoadError::NoRole(_));
        assert!(is_said, "{levels} levels: {error}");
    }
}
