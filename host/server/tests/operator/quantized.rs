//! `model.quantization` and `visor quantize` against the running binary: while it is made, killed in the middle, a full disk.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::serving::Served;
use super::{repository, run, text, visor};

fn float_demo() -> String {
    repository("host/model/demo/float").display().to_string()
}

/// A server of the float demo quantized, its cache inside `folder`.
fn serving(folder: &Path) -> Command {
    let model = float_demo();
    let flags = ["serve", "--listen", "127.0.0.1:0", "--model", &model];
    let mut command = visor(folder, &flags);
    command.args(["--quantization", "int4"]);
    command.env("XDG_CACHE_HOME", folder.join("cache"));
    command
}

fn get(url: &str) -> (u16, Value) {
    let agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .build()
        .new_agent();
    let mut response = agent.get(url).call().expect("the server answers");
    let body = response.body_mut().read_json().expect("JSON");
    (response.status().as_u16(), body)
}

/// Waits for the first bytes of what is being quantized.
fn wait_for_partial(partial: &Path) {
    let begun = Instant::now();
    while !partial.join("model.safetensors").exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "nothing begins");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_float_checkpoint_is_quantized_on_first_load_and_mapped_on_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = Served::listening(serving(folder.path()));
    first.told("quantizing");
    let (status, health) = get(&format!("{}/health", first.address));
    assert_eq!((status, &health["status"]), (200, &Value::from("alive")));
    let (status, ready) = get(&format!("{}/ready", first.address));
    let reason = ready["reason"].as_str().unwrap_or_default();
    // It may have been quick.
    assert!(
        status == 200 || reason.contains("still loading"),
        "{status} {reason}"
    );
    let kept = first.told("quantized weights are kept");
    assert!(
        kept.contains("cache/visor/quantized") && kept.contains("took_s"),
        "{kept}"
    );
    first.told("ready on cpu");
    let (_, stats) = get(&format!("{}/stats", first.address));
    assert_eq!(stats["model"]["quantization"], "int4 group 64, from f16");
    drop(first);
    let mut second = Served::listening(serving(folder.path()));
    let kept = second.told("quantized weights are kept");
    assert!(!kept.contains("took_s"), "{kept}");
    second.told("ready on cpu");
}

#[cfg(unix)]
#[test]
fn a_server_that_is_stopped_while_it_quantizes_ends_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut served = Served::listening(serving(folder.path()));
    served.told("quantizing");
    served.interrupt();
    let ended = served.child.wait().expect("it ends");
    assert_eq!(ended.code(), Some(0));
    let kept = folder.path().join("cache/visor/quantized");
    let names: Vec<PathBuf> = std::fs::read_dir(kept)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(
        names.iter().all(|name| name.ends_with("known")),
        "{names:?}"
    );
}

#[test]
fn a_killed_run_leaves_nothing_that_loads_and_the_next_one_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let source = float_demo();
    let quantize = ["quantize", &source, "int4"];
    let mut killed = visor(folder.path(), &quantize)
        .stdout(Stdio::null())
        .spawn()
        .expect("the binary runs");
    let partial = folder.path().join("int4.partial");
    wait_for_partial(&partial);
    // Another one at the same time leaves it alone.
    let out = run(folder.path(), &quantize);
    assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("another process is writing it"));
    killed.kill().expect("it runs"); // SIGKILL: nothing is tidied up
    killed.wait().expect("it ended");
    assert!(partial.is_dir() && !folder.path().join("int4").exists());
    let out = run(folder.path(), &["models", "--model", "int4.partial"]);
    assert_eq!(out.status.code(), Some(3));
    assert!(text(&out.stderr).contains("is not whole"));
    let out = run(folder.path(), &quantize);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    assert!(!partial.exists());
    let out = run(folder.path(), &["models", "--json", "--model", "int4"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
}

/// The system refuses at 2 MiB, as a full disk does somewhere in the middle.
#[cfg(unix)]
#[test]
fn a_full_disk_is_told_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let limited = "trap '' XFSZ; ulimit -f 2048; exec \"$0\" \"$@\"";
    let out = Command::new("bash")
        .args(["-c", limited, env!("CARGO_BIN_EXE_visor")])
        .args(["quantize", &float_demo(), "int4"])
        .current_dir(folder.path())
        .output()
        .expect("bash runs");
    assert_eq!(out.status.code(), Some(3));
    let told = text(&out.stderr);
    assert!(
        told.contains("model.safetensors: cannot be written"),
        "{told}"
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
