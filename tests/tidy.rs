//! What the shape of the house promises, held by a test: which way the arrows
//! point, how long a file may be, and that the checked-in plugins are the ones
//! the sources make.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

#[path = "../plugins/xtask/src/stamp.rs"]
#[expect(dead_code, reason = "xtask uses all of it, this test only `stale`")]
mod stamp;

/// A file longer than this is two rooms.
const FILE_LINES_MAX: usize = 600;

/// Which crates of the house each crate may use.
const ARROWS: [(&str, &[&str]); 5] = [
    ("kernels", &[]),
    ("model", &["visor-kernels"]),
    ("engine", &["visor-model"]),
    ("sandbox", &[]),
    ("server", &["visor-engine", "visor-model", "visor-sandbox"]),
];

/// Heavy dependencies, and the only crates that may name them.
const FENCES: [(&str, &[&str]); 7] = [
    ("wasmtime", &["sandbox"]),
    ("wit-component", &["sandbox"]),
    ("candle-core", &["model", "engine"]),
    ("axum", &["server"]),
    ("tokio", &["server"]),
    ("llguidance", &["server"]),
    ("memmap2", &["model"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn manifest(name: &str) -> toml::Table {
    let path = root().join("host").join(name).join("Cargo.toml");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.parse()
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn dependencies(name: &str) -> BTreeSet<String> {
    let manifest = manifest(name);
    let table = manifest.get("dependencies").and_then(|d| d.as_table());
    table
        .map(|d| d.keys().cloned().collect())
        .unwrap_or_default()
}

/// Every `.rs` file below `folder`, build output left out.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder that was just listed") {
        let path = entry.expect("an entry that was just listed").path();
        if path.is_dir() {
            if !path.ends_with("target") {
                sources(&path, found);
            }
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

fn all_sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in ["host", "plugins", "tests"] {
        sources(&root().join(folder), &mut found);
    }
    assert!(
        found.len() > 30,
        "the walk found only {} files",
        found.len()
    );
    found
}

#[test]
fn arrows_between_crates_point_one_way() {
    for (name, allowed) in ARROWS {
        let ours: Vec<_> = dependencies(name)
            .into_iter()
            .filter(|d| d.starts_with("visor-"))
            .collect();
        for dependency in &ours {
            assert!(
                allowed.contains(&dependency.as_str()),
                "host/{name} must not use {dependency}"
            );
        }
    }
    let folders: BTreeSet<_> = fs::read_dir(root().join("host"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.is_dir())
        .map(|p| p.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    let known: BTreeSet<_> = ARROWS.iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(
        folders, known,
        "a crate was added under host/ without saying where its arrows go"
    );
}

#[test]
fn heavy_dependencies_stay_behind_their_fence() {
    for (dependency, allowed) in FENCES {
        for (name, _) in ARROWS {
            if !allowed.contains(&name) {
                assert!(
                    !dependencies(name).contains(dependency),
                    "host/{name} must not use {dependency}"
                );
            }
        }
    }
}

#[test]
fn axum_stays_in_the_http_rooms_and_the_client_inside_the_process() {
    for path in all_sources() {
        let inside = path
            .strip_prefix(root())
            .unwrap()
            .to_string_lossy()
            .replace('\\', "/");
        let allowed = inside.starts_with("host/server/src/http")
            || ["host/server/src/lib.rs", "host/server/src/cli/client.rs"]
                .contains(&inside.as_str())
            || inside.starts_with("tests/");
        let text = fs::read_to_string(&path).unwrap();
        assert!(
            allowed || !text.contains("axum::"),
            "{inside} must not know axum"
        );
    }
}

#[test]
fn files_fit_a_head_and_say_what_they_are_for() {
    let mut wrong = Vec::new();
    for path in all_sources() {
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().count();
        if lines > FILE_LINES_MAX {
            wrong.push(format!(
                "{}: {lines} lines, {FILE_LINES_MAX} at most",
                path.display()
            ));
        }
        if !text.starts_with("//!") {
            wrong.push(format!(
                "{}: does not open with //! and a purpose",
                path.display()
            ));
        }
        if path.file_name().is_some_and(|n| n == "mod.rs") {
            wrong.push(format!("{}: no mod.rs", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn built_plugins_come_from_these_sources() {
    let stale = stamp::stale(&root()).expect("the stamp can be read");
    assert!(
        stale.is_empty(),
        "run `cargo xtask plugins`: {}",
        stale.join(", ")
    );
}

#[test]
fn unsafe_code_lives_in_the_kernels_and_the_memory_map() {
    for path in all_sources() {
        let inside = path
            .strip_prefix(root())
            .unwrap()
            .to_string_lossy()
            .replace('\\', "/");
        if inside.starts_with("host/kernels/")
            || inside == "host/model/src/weights.rs"
            || inside == "tests/tidy.rs"
        {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        assert!(
            !text.contains("expect(unsafe_code") && !text.contains("allow(unsafe_code"),
            "{inside} opens unsafe code"
        );
    }
}

#[test]
fn the_top_level_is_the_agreed_one() {
    let agreed: BTreeMap<&str, &str> = [
        ("Cargo.toml", "the workspace"),
        ("Cargo.lock", "cargo"),
        ("README.md", "what it is"),
        ("LICENSE", "both licences"),
        ("LICENSE-APACHE", "its text"),
        ("LICENSE-MIT", "its text"),
        ("NOTICE", "data of others"),
        ("clippy.toml", "clippy"),
        ("deny.toml", "cargo deny"),
        ("config", "visor.toml"),
        ("host", "native"),
        ("plugins", "guests"),
        ("tests", "tests"),
        ("wit", "the contract"),
        ("target", "build output"),
    ]
    .into();
    for entry in fs::read_dir(root()).unwrap().map(Result::unwrap) {
        let name = entry.file_name().to_string_lossy().into_owned();
        assert!(
            name.starts_with('.') || agreed.contains_key(name.as_str()),
            "{name} does not belong at the top level"
        );
    }
}

#[test]
fn ci_runs_the_commands_of_the_readme() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let ci = fs::read_to_string(root().join(".ci/run")).unwrap();
    assert!(readme.contains("\ncargo run --release\n"));
    assert!(readme.contains("\ncargo test\n"));
    assert!(ci.lines().any(|l| l.trim() == "cargo test"));
}
