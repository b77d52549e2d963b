//! Plugins swapped under load: every request succeeds, each by exactly one revision.

use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::client::Answer;
use crate::server::{Server, chat, data_url, fixture, pictures, text, until, with};

/// Clients asking at the same time.
const CLIENTS: usize = 3;

/// The shipped plugin of that name.
fn shipped(id: &str) -> Vec<u8> {
    fixture(&format!("plugins/built/{id}.wasm"))
}

/// The same plugin as another revision: a custom section changes the file and nothing else.
fn revised(id: &str, number: u8) -> Vec<u8> {
    let mut bytes = shipped(id);
    // Section 0, three bytes long: a name of one letter, and one byte.
    bytes.extend([0, 3, 1, b'r', number]);
    bytes
}

fn revision(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .take(6)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The revision that a `x-visor-plugins` header names for a role.
fn named(header: &str, role: &str) -> String {
    let found = header
        .split(", ")
        .find_map(|entry| entry.strip_prefix(role)?.strip_prefix('='));
    found
        .unwrap_or_else(|| panic!("{role} is not in {header}"))
        .to_owned()
}

/// What one answer of the load told.
struct Seen {
    status: u16,
    plugins: String,
    body: String,
    prompt_tokens: u64,
    cached_tokens: u64,
}

impl Seen {
    fn new(answer: &Answer) -> Self {
        let text = answer.text();
        // Whole, or the last chunk of a stream before [DONE].
        let json = text
            .rsplit("data: ")
            .find(|chunk| chunk.starts_with('{'))
            .unwrap_or(text);
        let json: Value = serde_json::from_str(json).unwrap_or_default();
        let usage = &json["usage"];
        Self {
            status: answer.status,
            plugins: answer.header("x-visor-plugins").unwrap_or("").to_owned(),
            prompt_tokens: usage["prompt_tokens"].as_u64().unwrap_or(0),
            cached_tokens: usage["prompt_tokens_details"]["cached_tokens"]
                .as_u64()
                .unwrap_or(0),
            body: text.to_owned(),
        }
    }
}

/// Asks again and again from several threads until told to stop: always the same, so that only the
/// plugins make a difference; every second time at a temperature, so that the model has work.
struct Load {
    server: Arc<Server>,
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Seen>>>,
    clients: Vec<thread::JoinHandle<()>>,
}

impl Load {
    fn start(server: &Arc<Server>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let url = data_url(
            "image/png",
            &fixture("tests/golden/images/wide_900x300.png"),
        );
        let base = chat(&[pictures(&[url], "what is this?")]);
        let clients = (0..CLIENTS).map(|_| {
            let (server, stop, seen, base) = (
                Arc::clone(server),
                Arc::clone(&stop),
                Arc::clone(&seen),
                base.clone(),
            );
            thread::spawn(move || {
                for number in 0.. {
                    if stop.load(Relaxed) {
                        break;
                    }
                    let mut body = with(
                        base.clone(),
                        json!({"max_tokens": 2, "temperature": number % 2}),
                    );
                    if number % 3 == 0 {
                        body = with(
                            body,
                            json!({"stream": true, "stream_options": {"include_usage": true}}),
                        );
                    }
                    let answer = Seen::new(&server.chat(&body));
                    seen.lock().unwrap().push(answer);
                }
            })
        });
        Self {
            server: Arc::clone(server),
            clients: clients.collect(),
            stop,
            seen,
        }
    }

    /// Waits until an answer after the first `from` came from a revision.
    fn wait_for(&self, from: usize, role: &str, expected: &str) {
        until(&format!("an answer by {expected}"), || {
            let seen = self.seen.lock().unwrap();
            let mut later = seen.iter().skip(from);
            later
                .any(|seen| named(&seen.plugins, role) == expected)
                .then_some(())
        });
    }

    fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    fn stop(mut self) -> Vec<Seen> {
        self.stop.store(true, Relaxed);
        for client in self.clients.drain(..) {
            client.join().expect("no client panics");
        }
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if thread::panicking() {
            eprintln!(
                "--- log of the server under load ---\n{}",
                self.server.logged()
            );
        }
    }
}

/// Swaps a plugin under load, to `other` and back and forth, then takes the file away again.
/// Gives the answers of the shipped one (in both revisions of it) and those of the other.
fn swap_under_load(id: &str, role: &str, other: &[u8]) -> (Vec<Seen>, Vec<Seen>) {
    let server = Arc::new(Server::start());
    // What is inside the binary, by its own word: the checked-in file may be newer.
    let inside = named(&plugins_of(&server), role);
    let load = Load::start(&server);
    let name = |bytes: &[u8]| format!("{id}@{}", revision(bytes));
    load.wait_for(0, role, &inside);
    for bytes in [other, &revised(id, 1), other] {
        let before = load.count();
        let renamed = Instant::now();
        server.install(id, bytes);
        load.wait_for(before, role, &name(bytes));
        println!(
            "{id}: {} ms from rename to the first answer by the new one",
            renamed.elapsed().as_millis()
        );
    }
    let before = load.count();
    let removed = Instant::now();
    server.uninstall(id);
    load.wait_for(before, role, &inside);
    println!(
        "{id}: {} ms from removal to the first answer by the shipped one",
        removed.elapsed().as_millis()
    );
    let seen = load.stop();
    println!("{id}: {} requests, 4 swaps, no failure", seen.len());
    let (mut by_shipped, mut by_other) = (Vec::new(), Vec::new());
    for answer in seen {
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert!(!answer.body.contains("\"error\""), "{}", answer.body);
        let by = named(&answer.plugins, role);
        if by == name(other) {
            by_other.push(answer);
        } else {
            assert!(
                [inside.clone(), name(&revised(id, 1))].contains(&by),
                "{by} was never installed"
            );
            by_shipped.push(answer);
        }
    }
    (by_shipped, by_other)
}

/// The one prompt length of all answers.
#[track_caller]
fn one_length(answers: &[Seen]) -> u64 {
    let lengths: BTreeSet<u64> = answers.iter().map(|answer| answer.prompt_tokens).collect();
    assert_eq!(lengths.len(), 1, "one revision, one prompt: {lengths:?}");
    lengths.into_iter().next().expect("one")
}

fn guest(name: &str) -> Vec<u8> {
    fixture(&format!("tests/guests/built/{name}.wasm"))
}

#[test]
fn the_template_is_swapped_under_load() {
    let (quiet, loud) = swap_under_load("phi3", "template", &guest("phi3-loud"));
    assert!(
        one_length(&loud) > one_length(&quiet),
        "the louder template writes longer prompts"
    );
}

#[test]
fn the_image_policy_is_swapped_under_load() {
    let (detailed, coarse) = swap_under_load("hd", "image-policy", &guest("hd-one"));
    assert!(
        one_length(&coarse) < one_length(&detailed),
        "one crop takes fewer tokens"
    );
}

#[test]
fn the_cache_strategy_is_swapped_under_load() {
    let (keeping, forgetting) =
        swap_under_load("lru", "cache-strategy", &guest("no-response-cache"));
    assert!(
        forgetting
            .iter()
            .all(|answer| answer.cached_tokens < answer.prompt_tokens),
        "no whole answer comes from a cache it closed"
    );
    assert!(
        keeping
            .iter()
            .any(|answer| answer.cached_tokens == answer.prompt_tokens),
        "whole answers are kept"
    );
}

#[test]
fn the_adapter_is_swapped_under_load() {
    swap_under_load("openai", "adapter", &revised("openai", 2));
}

fn plugins_of(server: &Server) -> String {
    server
        .chat(&chat(&[text("who serves me?")]))
        .header("x-visor-plugins")
        .expect("told")
        .to_owned()
}

fn told_reason(server: &Server, id: &str) -> Option<String> {
    let stats = server.stats();
    let errors = stats["plugin_folder"]["load_errors"].as_array()?.clone();
    let error = errors.into_iter().find(|error| error["id"] == id)?;
    error["message"].as_str().map(str::to_owned)
}

#[test]
fn a_bad_file_changes_nothing_and_says_why() {
    let server = Server::start();
    let before = plugins_of(&server);
    let whole = shipped("phi3");
    for (what, bytes) in [
        ("no wasm", b"this is no plugin".to_vec()),
        ("truncated", whole[..whole.len() / 2].to_vec()),
        ("another role", shipped("lru")),
        ("another track of the contract", guest("other-track")),
        ("empty", Vec::new()),
    ] {
        server.install("phi3", &bytes);
        let reason = until("the reason is told", || told_reason(&server, "phi3"));
        println!("{what}: {reason}");
        assert_eq!(plugins_of(&server), before, "{what}");
        server.chat(&chat(&[text(what)])).ok();
        server.uninstall("phi3");
        until("the reason is gone with the file", || {
            told_reason(&server, "phi3").is_none().then_some(())
        });
    }
    server.install("phi3", &revised("phi3", 9));
    until("a good file is taken after all that", || {
        (plugins_of(&server) != before).then_some(())
    });
}

#[cfg(unix)]
#[test]
fn a_folder_that_cannot_be_read_changes_nothing_and_says_why() {
    use std::os::unix::fs::symlink;
    // The folder is a link, so that what it is changes at once.
    let server = Server::launch("", |folder| {
        fs::rename(folder.join("visor-plugins"), folder.join("real")).expect("renamed");
        symlink("real", folder.join("visor-plugins")).expect("linked");
        fs::write(folder.join("real/phi3.wasm"), revised("phi3", 1)).expect("written");
    });
    server.wait_ready();
    let before = plugins_of(&server);
    assert!(before.contains(&revision(&revised("phi3", 1))), "{before}");
    let point_to = |target: &str| {
        let next = server.folder().join("next");
        symlink(target, &next).expect("linked");
        fs::rename(next, server.folder().join("visor-plugins")).expect("swapped");
    };
    point_to("visor.toml");
    let reason = until("the reason is told", || told_reason(&server, ""));
    assert!(reason.contains("Not a directory"), "{reason}");
    assert_eq!(plugins_of(&server), before);
    point_to("real");
    until("the reason is gone", || {
        told_reason(&server, "").is_none().then_some(())
    });
    assert_eq!(plugins_of(&server), before);
    let log = server.wait_logged("plugin folder read again");
    assert_eq!(log.matches("plugin folder not read").count(), 1, "{log}");
}

#[test]
fn a_half_written_file_is_not_taken_before_it_is_whole() {
    let server = Server::start();
    let before = plugins_of(&server);
    let bytes = revised("phi3", 1);
    let path = server.folder().join("visor-plugins/phi3.wasm");
    let mut file = fs::File::create(&path).expect("created");
    for part in bytes.chunks(bytes.len() / 8 + 1) {
        std::io::Write::write_all(&mut file, part).expect("written");
        assert_eq!(plugins_of(&server), before);
    }
    drop(file);
    let expected = format!("phi3@{}", revision(&bytes));
    until("the whole file is taken", || {
        plugins_of(&server).contains(&expected).then_some(())
    });
    assert!(told_reason(&server, "phi3").is_none());
}

/// Whether `/stats` lists a plugin of this id.
fn is_there(server: &Server, id: &str) -> bool {
    let stats = server.stats();
    let mut plugins = stats["plugins"].as_array().into_iter().flatten();
    plugins.any(|plugin| plugin["id"] == id)
}

/// A configuration file that names this image policy.
fn routed(policy: &str) -> String {
    format!(
        "[[routes]]\nprefix = \"/v1\"\nadapter = \"openai\"\ntemplate = \"phi3\"\n\
         image_policy = \"{policy}\"\ncache_strategy = \"lru\"\n"
    )
}

fn wait_refused(server: &Server, because_of: &str) {
    until("a route to nothing is refused", || {
        let error = server.stats()["config"]["last_error"].clone();
        error.as_str()?.contains(because_of).then_some(())
    });
}

#[test]
fn a_plugin_under_a_new_name_is_wired_by_the_configuration() {
    let server = Server::start();
    server.install("mine", &shipped("hd"));
    until("the new plugin is there", || {
        is_there(&server, "mine").then_some(())
    });
    assert!(plugins_of(&server).contains("image-policy=hd@"));
    fs::write(server.folder().join("visor.toml"), routed("mine")).expect("written");
    until("it serves", || {
        plugins_of(&server)
            .contains("image-policy=mine@")
            .then_some(())
    });
}

/// Whoever copies both into place need not think of the order.
#[test]
fn a_configuration_that_was_refused_waits_for_its_plugin() {
    let settings = |key: &str| format!("[plugins]\npoll_s = 0\n[plugins.mine.config]\n{key} = 4\n");
    // The plugin will not load with what is in force, only with what was refused.
    let server = Server::start_with(&settings("most_crops"));
    let file = server.folder().join("visor.toml");
    fs::write(&file, routed("mine") + &settings("auto_crops")).expect("written");
    wait_refused(&server, "no plugin `mine`");
    assert!(plugins_of(&server).contains("image-policy=hd@"));
    server.install("other", &shipped("hd"));
    until("another plugin is there", || {
        is_there(&server, "other").then_some(())
    });
    wait_refused(&server, "no plugin `mine`");
    server.install("mine", &shipped("hd"));
    until("the file is in force", || {
        plugins_of(&server)
            .contains("image-policy=mine@")
            .then_some(())
    });
    let config = server.stats()["config"].clone();
    assert_eq!(config["last_error"], Value::Null, "{config}");
    assert_eq!(config["applied"], 1, "{config}");
}
