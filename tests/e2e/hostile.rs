//! Guests that misbehave, through HTTP: each costs its own request, and everybody else goes on.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::Answer;
use crate::server::{Server, chat, data_url, fixture, pictures, text, until, with};

/// Longest a request of a broken guest may take to be refused.
const REFUSED_WITHIN: Duration = Duration::from_secs(10);

/// The shipped route, and one at `/bad` by the adapter that misbehaves.
const ROUTES: &str = r#"
[[routes]]
prefix = "/v1"
adapter = "openai"
template = "phi3"
image_policy = "hd"
cache_strategy = "lru"

[[routes]]
prefix = "/bad"
adapter = "bad-adapter"
template = "phi3"
image_policy = "hd"
cache_strategy = "lru"
"#;

fn launch(guests: &[&str], config: &str) -> Server {
    let server = Server::launch(config, |folder| {
        for guest in guests {
            let bytes = fixture(&format!("tests/guests/built/{guest}.wasm"));
            fs::write(
                folder.join("visor-plugins").join(format!("{guest}.wasm")),
                bytes,
            )
            .expect("written");
        }
    });
    server.wait_ready();
    server
}

/// Replaces the configuration and waits until it is in force.
fn configure(server: &Server, config: &str) {
    let applied = |server: &Server| server.stats()["config"]["applied"].as_u64().unwrap_or(0);
    let before = applied(server);
    fs::write(server.folder().join("visor.toml"), config).expect("written");
    until("the configuration is applied", || {
        (applied(server) > before).then_some(())
    });
}

/// Calls of a plugin's function that ended in a fault.
fn faults(server: &Server, plugin: &str, function: &str) -> u64 {
    let stats = server.stats();
    let plugins = stats["plugins"].as_array().expect("plugins").clone();
    let found = plugins
        .into_iter()
        .find(|one| one["id"] == plugin)
        .unwrap_or_default();
    found["functions"][function]["faults"].as_u64().unwrap_or(0)
}

/// Asks while a well-behaved request runs beside it; that one has to succeed.
fn ask_beside(server: &Server, path: &str, body: &Value) -> Answer {
    thread::scope(|scope| {
        let beside = scope.spawn(|| server.chat(&chat(&[text("all well here?")])).status);
        let began = Instant::now();
        let answer = server.send("POST", path, body.to_string().as_bytes());
        assert!(
            began.elapsed() < REFUSED_WITHIN,
            "took {:?}",
            began.elapsed()
        );
        assert_eq!(
            beside.join().expect("no panic"),
            200,
            "the neighbour goes on"
        );
        answer
    })
}

#[test]
fn an_adapter_that_misbehaves_costs_its_own_requests_only() {
    let server = launch(&["bad-adapter"], ROUTES);
    let body = chat(&[text("hello")]);
    assert_eq!(
        ask_beside(&server, "/bad/chat/completions", &body).status,
        200,
        "left alone, it serves"
    );
    for (function, deeds) in [
        (
            "start",
            &[
                "spin", "hoard", "trap", "recurse", "huge", "status", "header", "handles", "lie",
            ][..],
        ),
        (
            "advance",
            &[
                "spin", "hoard", "trap", "recurse", "huge", "handles", "frame",
            ],
        ),
    ] {
        for deed in deeds {
            let order =
                format!("[plugins.bad-adapter.config]\ndo = {deed:?}\nin = {function:?}\n{ROUTES}");
            configure(&server, &order);
            let before = faults(&server, "bad-adapter", function);
            let answer = ask_beside(&server, "/bad/chat/completions", &body);
            println!("{deed} in {function}: {} {}", answer.status, answer.text());
            assert_eq!(answer.status, 500, "{deed} in {function}");
            assert!(
                answer.text().contains("bad-adapter"),
                "a fresh instance says so in its dialect"
            );
            assert_eq!(
                faults(&server, "bad-adapter", function),
                before + 1,
                "{deed} in {function} is counted"
            );
        }
    }
    // The record of a request is written just after its last byte.
    until("all are counted", || {
        (server.stats()["requests"]["outcomes"]["guest_fault"].as_u64() >= Some(16)).then_some(())
    });
}

#[test]
fn a_flood_of_log_lines_is_dropped_and_counted() {
    let order = format!("[plugins.bad-adapter.config]\ndo = \"flood\"\n{ROUTES}");
    let server = launch(&["bad-adapter"], &order);
    let answer = ask_beside(&server, "/bad/chat/completions", &chat(&[text("hello")]));
    println!("flood: {}", answer.status);
    let stats = server.stats();
    let plugins = stats["plugins"].as_array().expect("plugins");
    let log = &plugins
        .iter()
        .find(|one| one["id"] == "bad-adapter")
        .expect("it is there")["log"];
    assert!(log["dropped"].as_u64() > Some(1000), "{log}");
    server.wait_logged("flood flood");
    assert!(
        server.logged().matches("flood flood").count() < 2_000 * 2_000 / 10,
        "the log is not flooded"
    );
}

#[test]
fn a_template_over_its_limits_costs_its_own_request_only() {
    let server = launch(&[], "[plugins.phi3.limits]\nhostcall_kib_max = 4\n");
    // Little text in so many turns that the template's answer is more than it may hand over.
    let turns: Vec<Value> = (0..200).map(|number| text(&number.to_string())).collect();
    let long = chat(&turns);
    let error = ask_beside(&server, "/v1/chat/completions", &long).error(500);
    assert!(
        error["message"]
            .as_str()
            .expect("a message")
            .contains("phi3"),
        "{error}"
    );
    assert_eq!(faults(&server, "phi3", "render"), 1);
    server.chat(&with(long, json!({"stream": true}))).error(500);
}

#[test]
fn an_image_policy_over_its_limits_costs_its_own_request_only() {
    let server = launch(&[], "[plugins.hd.limits]\nhandles_max = 14\n");
    let url = data_url(
        "image/png",
        &fixture("tests/golden/images/huge_2000x1500.png"),
    );
    let mut message = pictures(&[url], "what?");
    message["content"][0]["image_url"]["detail"] = json!("high");
    let error = ask_beside(&server, "/v1/chat/completions", &chat(&[message])).error(500);
    assert!(
        error["message"].as_str().expect("a message").contains("hd"),
        "{error}"
    );
    assert_eq!(faults(&server, "hd", "prepare"), 1);
}

/// A strategy that fails beside the requests is not even noticed by them.
#[test]
fn a_cache_strategy_that_misbehaves_costs_nobody_a_request() {
    let route = ROUTES
        .split("[[routes]]")
        .nth(1)
        .expect("the shipped route")
        .replace("\"lru\"", "\"bad-strategy\"");
    for (deed, function) in [
        ("trap", "observe"),
        ("spin", "observe"),
        ("lie", "victims"),
        ("hoard", "admit"),
    ] {
        let config = format!(
            "[plugins.bad-strategy.config]\ndo = {deed:?}\nin = {function:?}\n[[routes]]{route}"
        );
        let server = launch(&["bad-strategy"], &config);
        for number in 0..6 {
            let answer = server.chat(&chat(&[text(&format!("{deed} {number}"))]));
            answer.ok();
            assert!(
                answer
                    .header("x-visor-plugins")
                    .expect("told")
                    .contains("bad-strategy@")
            );
        }
        server.chat(&chat(&[text(&format!("{deed} 0"))])).ok();
    }
}

/// What a plugin does wrong for a plain request is found before any client meets it.
#[test]
fn plugins_that_fail_their_trial_are_refused_with_the_reason() {
    let config = "[plugins.phi3.config]\ndo = \"spin\"\n[plugins.hd.config]\ndo = \"lie\"\n";
    let server = Server::start();
    let healthy = server
        .chat(&chat(&[text("before")]))
        .header("x-visor-plugins")
        .expect("told")
        .to_owned();
    server.install("phi3", &fixture("tests/guests/built/bad-template.wasm"));
    server.install("hd", &fixture("tests/guests/built/bad-policy.wasm"));
    until("both are in service, behaving", || {
        let plugins = server
            .chat(&chat(&[text("now")]))
            .header("x-visor-plugins")?
            .to_owned();
        let old = |role: &str| {
            healthy
                .split(", ")
                .find(|one| one.starts_with(role))
                .expect("told")
                .to_owned()
        };
        (!plugins.contains(&old("template")) && !plugins.contains(&old("image-policy")))
            .then_some(())
    });
    fs::write(server.folder().join("visor.toml"), config).expect("written");
    let reason = until("the reason is told", || {
        server.stats()["config"]["last_error"]
            .as_str()
            .map(str::to_owned)
    });
    println!("{reason}");
    assert!(reason.contains("trial run"), "{reason}");
    server.chat(&chat(&[text("after")])).ok();
}
