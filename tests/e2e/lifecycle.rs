//! From start to stop: readiness, live configuration, draining, and a binary alone in a folder.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;

use serde_json::json;

use crate::client::{Incoming, MUCH};
use crate::server::{Server, chat, fixture, repository, shared, text, until, with};

#[test]
fn a_starting_server_is_alive_and_says_when_it_is_ready() {
    let server = Server::launch("", |_| {});
    assert_eq!(server.get("/health").status, 200);
    let early = server.get("/ready");
    assert!([200, 503].contains(&early.status));
    if early.status == 503 {
        assert!(early.json()["reason"].is_string());
    }
    server.wait_ready();
    server.chat(&chat(&[text("hello")])).ok();
}

#[test]
fn stats_and_metrics_tell_of_requests_plugins_and_memory() {
    let server = shared();
    server.chat(&chat(&[text("count me")])).ok();
    let stats = server.stats();
    let text = stats.to_string();
    for told in [
        "requests", "tokens", "stages", "plugins", "memory", "openai", "phi3", "hd", "lru",
        "revision",
    ] {
        assert!(text.contains(told), "{told} is missing: {text}");
    }
    // The record of a request is written just after its last byte.
    let metrics = until("the request is counted", || {
        let metrics = server.get("/metrics");
        let counted = metrics.text().contains("vllm:request_success_total");
        counted.then_some(metrics)
    });
    assert!(
        metrics
            .header("content-type")
            .is_some_and(|kind| kind.starts_with("text/plain"))
    );
    for name in [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:e2e_request_latency_seconds_count",
    ] {
        assert!(
            metrics.text().contains(name),
            "{name} is missing:\n{}",
            metrics.text()
        );
    }
}

#[test]
fn a_signal_drains_what_is_in_flight_and_then_ends() {
    for signal in ["TERM", "INT"] {
        let mut server = Server::start();
        let body = with(
            chat(&[text("go on")]),
            json!({"max_tokens": 400, "stream": true}),
        );
        let mut stream = server.open_chat(&body);
        stream.piece().expect("it has begun");
        server.signal(signal);
        server.wait_logged("draining");
        assert_eq!(server.get("/ready").status, 503, "no new work");
        server.chat(&chat(&[text("too late")])).error(503);
        server
            .send_all("POST", "/v1/chat/completions", MUCH)
            .error(503);
        let answer = stream.finish();
        assert!(
            answer.text().ends_with("data: [DONE]\n\n"),
            "{signal}: the stream was finished"
        );
        assert!(server.wait_exit().success(), "{signal}");
    }
}

#[test]
fn a_body_that_is_on_its_way_when_the_signal_comes_is_waited_for() {
    let mut server = Server::start();
    let body = chat(&[text("almost there")]).to_string();
    let (first, rest) = body.split_at(20);
    let mut stream = TcpStream::connect(server.address).expect("the server accepts");
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).expect("sent");
    // It says so when it begins to read the body.
    let mut told = [0; 25];
    stream.read_exact(&mut told).expect("told to go on");
    assert!(told.starts_with(b"HTTP/1.1 100 Continue"));
    stream.write_all(first.as_bytes()).expect("sent");
    server.signal("TERM");
    server.wait_logged("draining");
    stream.write_all(rest.as_bytes()).expect("sent");
    Incoming::read_head(stream).finish().ok();
    assert!(server.wait_exit().success());
}

#[test]
fn what_is_not_done_when_the_drain_is_over_is_cut_off() {
    let mut server = Server::start_with("[server]\ndrain_s = 1\n");
    let body = with(
        chat(&[text("go on")]),
        json!({"max_tokens": 3500, "stream": true}),
    );
    let mut stream = server.open_chat(&body);
    stream.piece().expect("it has begun");
    server.signal("TERM");
    server.wait_logged("cut off");
    assert!(server.wait_exit().success(), "it was asked to end, and did");
}

#[test]
fn a_second_interrupt_stops_at_once() {
    let mut server = Server::start();
    let body = with(
        chat(&[text("go on")]),
        json!({"max_tokens": 3500, "stream": true}),
    );
    let mut stream = server.open_chat(&body);
    stream.piece().expect("it has begun");
    server.signal("INT");
    server.wait_logged("draining");
    server.signal("INT");
    assert!(!server.wait_exit().success());
}

/// A pipe to a pager, a terminal that is held: what nobody reads must not keep threads that others need.
#[test]
fn a_log_that_nobody_reads_stops_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_visor"));
    command.args(["serve", "--listen", "127.0.0.1:0", "--log", "trace"]);
    let mut server = Server::spawn_read(command, folder, |line| !line.contains("listening on"));
    // Each is several lines, and a pipe holds 64 KiB.
    for _ in 0..500 {
        assert_eq!(server.get("/nowhere").status, 404);
    }
    server.wait_ready();
    server.chat(&chat(&[text("hello")])).ok();
    server.signal("TERM");
    assert_eq!(server.wait_exit().code(), Some(0));
}

#[test]
fn a_changed_configuration_is_applied_live_and_a_broken_one_refused() {
    let server = Server::start();
    let config = server.folder().join("visor.toml");
    let ask = || server.chat(&chat(&[text(&"word ".repeat(50))])).status;
    assert_eq!(ask(), 200);
    fs::write(&config, "[generation]\nprompt_tokens_max = 20\n").expect("written");
    until("the new limit is in force", || (ask() == 400).then_some(()));
    fs::write(&config, "[generation]\nprompt_tokens_max = \"few\"\n").expect("written");
    until("the mistake is told", || {
        server
            .stats()
            .to_string()
            .contains("prompt_tokens_max")
            .then_some(())
    });
    assert_eq!(ask(), 400, "the old one is kept");
    fs::write(&config, "").expect("written");
    until("the limit is gone", || (ask() == 200).then_some(()));
}

#[test]
fn the_binary_alone_in_an_empty_folder_serves() {
    let folder = tempfile::tempdir().expect("a folder");
    let binary = folder.path().join("visor");
    fs::copy(env!("CARGO_BIN_EXE_visor"), &binary).expect("copied");
    let mut command = Command::new(&binary);
    command
        .args(["serve", "--listen", "127.0.0.1:0"])
        .env_clear();
    let server = Server::spawn(command, folder);
    server.wait_ready();
    let url = crate::server::data_url("image/png", &fixture("tests/golden/images/exact_336.png"));
    server
        .chat(&chat(&[crate::server::pictures(&[url], "what?")]))
        .ok();
}

#[test]
fn a_checkpoint_folder_is_served_under_its_name() {
    let checkpoint = repository("tests/golden/ckpt_mha");
    let config = format!(
        "[model]\npath = {:?}\naliases = [\"phi\"]\n",
        checkpoint.display().to_string()
    );
    let server = Server::start_without_flag(&config);
    let id = server.get("/v1/models").ok()["data"][0]["id"].clone();
    assert_eq!(id, "ckpt_mha");
    let answer = server
        .chat(&with(chat(&[text("hello")]), json!({"model": "phi"})))
        .ok();
    assert_eq!(answer["model"], id);
}

#[test]
fn a_broken_checkpoint_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = Command::new(env!("CARGO_BIN_EXE_visor"))
        .args(["serve", "--listen", "127.0.0.1:0", "--model", "nowhere"])
        .current_dir(folder.path())
        .output()
        .expect("it runs");
    assert!(!run.status.success());
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(said.contains("nowhere"), "{said}");
}
