//! Everything a client can get wrong, and the proper answer to it.

use std::io::Write;
use std::net::TcpStream;
use std::time::Instant;

use serde_json::{Value, json};

use crate::client::{self, Incoming, MUCH, Request};
use crate::server::{Server, chat, shared, text, with};

fn post(server: &Server, body: &[u8]) -> client::Answer {
    server.send("POST", "/v1/chat/completions", body)
}

#[test]
fn malformed_bodies_are_400() {
    let server = shared();
    for body in [
        "",
        "{",
        "[]",
        "null",
        "\"text\"",
        "{\"messages\": [}",
        "{} trailing",
    ] {
        post(&server, body.as_bytes()).error(400);
    }
    post(&server, b"{\"messages\": \"\xFF\"}").error(400);
}

#[test]
fn wrong_types_and_missing_keys_are_400_and_name_the_key() {
    let server = shared();
    for (body, param) in [
        (json!({}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hello"}), "messages"),
        (json!({"messages": [{"content": "no role"}]}), "messages"),
        (json!({"messages": [{"role": "user"}]}), "messages"),
        (
            json!({"messages": [{"role": "user", "content": 5}]}),
            "messages",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "video"}]}]}),
            "messages",
        ),
        (
            json!({"messages": [text("x")], "max_tokens": "many"}),
            "max_tokens",
        ),
        (
            json!({"messages": [text("x")], "max_tokens": 0}),
            "max_tokens",
        ),
        (
            json!({"messages": [text("x")], "max_tokens": -1}),
            "max_tokens",
        ),
        (
            json!({"messages": [text("x")], "temperature": "hot"}),
            "temperature",
        ),
        (
            json!({"messages": [text("x")], "temperature": -1}),
            "temperature",
        ),
        (json!({"messages": [text("x")], "top_p": 7}), "top_p"),
        (json!({"messages": [text("x")], "stop": 5}), "stop"),
        (json!({"messages": [text("x")], "stream": "yes"}), "stream"),
    ] {
        let error = post(&server, body.to_string().as_bytes()).error(400);
        let named = error["param"].as_str().unwrap_or("").to_owned()
            + error["message"].as_str().unwrap_or("");
        assert!(named.contains(param), "{body}: {error}");
    }
}

#[test]
fn what_this_server_does_not_do_is_said_and_not_ignored() {
    let server = shared();
    for (wish, param) in [
        (json!({"functions": [{"name": "f"}]}), "functions"),
        (json!({"modalities": ["audio"]}), "modalities"),
    ] {
        let error = server
            .chat(&with(chat(&[text("x")]), wish.clone()))
            .error(400);
        assert_eq!(error["param"], param, "{wish}: {error}");
    }
    let neutral = json!({"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"}});
    server.chat(&with(chat(&[text("x")]), neutral)).ok();
}

#[test]
fn sampling_out_of_range_is_400_and_names_the_key() {
    let server = shared();
    for (wish, param) in [
        (json!({"n": 21}), "n"),
        (json!({"n": 1_000_000}), "n"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (
            json!({"logprobs": true, "top_logprobs": 21}),
            "top_logprobs",
        ),
        (json!({"min_p": 2}), "min_p"),
        (json!({"repetition_penalty": 1e9}), "repetition_penalty"),
        (json!({"presence_penalty": 2.5}), "presence_penalty"),
        (json!({"frequency_penalty": -3}), "frequency_penalty"),
        (json!({"logit_bias": {"1": 200}}), "logit_bias.1"),
        (json!({"logit_bias": {"4000000": 1}}), "logit_bias"),
        (json!({"stop": ["1", "2", "3", "4", "5"]}), "stop"),
    ] {
        let error = server
            .chat(&with(chat(&[text("x")]), wish.clone()))
            .error(400);
        assert_eq!(error["param"], param, "{wish}: {error}");
    }
    let faults = &server.stats()["requests"]["outcomes"]["guest_fault"];
    assert!([json!(0), Value::Null].contains(faults), "{faults}");
}

#[test]
fn unknown_fields_are_no_error() {
    let unknown = json!({"user": "u", "metadata": {"a": "b"}, "x_vendor": [1, 2, {"deep": true}]});
    shared().chat(&with(chat(&[text("x")]), unknown)).ok();
}

#[test]
fn an_unknown_model_is_404_and_the_known_one_is_served() {
    let server = shared();
    let error = server
        .chat(&with(chat(&[text("x")]), json!({"model": "gpt-4o"})))
        .error(404);
    assert!(
        error["message"]
            .as_str()
            .expect("a message")
            .contains("gpt-4o"),
        "{error}"
    );
    let id = server.get("/v1/models").ok()["data"][0]["id"].clone();
    server
        .chat(&with(chat(&[text("x")]), json!({"model": id})))
        .ok();
}

#[test]
fn ten_thousand_brackets_are_refused_at_once() {
    let server = shared();
    let deep = format!(
        "{{\"messages\": {}{}}}",
        "[".repeat(10_000),
        "]".repeat(10_000)
    );
    post(&server, deep.as_bytes()).error(400);
    let objects = "{\"a\":".repeat(10_000);
    post(&server, objects.as_bytes()).error(400);
}

#[test]
fn a_huge_body_is_413() {
    let server = Server::start_with("[server]\nrequest_body_bytes_max = 1048576\n");
    let huge = chat(&[text(&"x".repeat(3 << 20))]).to_string();
    post(&server, huge.as_bytes()).error(413);
    server.chat(&chat(&[text("still there")])).ok();
}

/// By a server that waits ten seconds for the rest of a body.
#[test]
fn a_body_that_is_announced_too_large_is_413_at_once() {
    let server = Server::start_with("[server]\nrequest_body_bytes_max = 1048576\n");
    for (expect, sent) in [("", ""), ("expect: 100-continue\r\n", ""), ("", "{")] {
        let began = Instant::now();
        let mut stream = TcpStream::connect(server.address).expect("the server accepts");
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n{expect}content-length: 1048577\r\n\r\n{sent}"
        );
        stream.write_all(head.as_bytes()).expect("sent");
        Incoming::read_head(stream).finish().error(413);
        assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
    }
}

#[test]
fn a_large_body_that_nobody_wants_does_not_break_its_client_off() {
    let headers = [("content-encoding", "br")];
    for (method, path, status) in [
        ("POST", "/v1/nothing/here", 404),
        ("POST", "/nowhere", 404),
        ("PUT", "/v1/chat/completions", 405),
        ("POST", "/health", 405),
        ("POST", "/v1/chat/completions", 415),
    ] {
        let request = Request {
            method,
            path,
            headers: &headers,
            body: MUCH,
        };
        client::send_all(shared().address, &request).error(status);
    }
}

#[test]
fn who_waits_with_a_body_that_nobody_wants_is_not_told_to_send_it() {
    let server = shared();
    for (request, status) in [
        ("POST /v1/nothing/here", 404),
        ("POST /nowhere", 404),
        ("PUT /v1/chat/completions", 405),
        ("PUT /health", 405),
    ] {
        let mut stream = TcpStream::connect(server.address).expect("the server accepts");
        let head = format!(
            "{request} HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 1000\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).expect("sent");
        Incoming::read_head(stream).finish().error(status);
    }
}

#[test]
fn a_body_in_a_coding_is_415() {
    let request = Request {
        method: "POST",
        path: "/v1/chat/completions",
        headers: &[
            ("content-type", "application/json"),
            ("content-encoding", "gzip"),
        ],
        body: b"\x1f\x8b",
    };
    let error = client::send(shared().address, &request).error(415);
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains("Content-Encoding: gzip"), "{message}");
}

#[test]
fn a_head_that_is_too_large_is_431() {
    let server = shared();
    for length in [70_000, 100_000, 200_000] {
        let long = "x".repeat(length);
        let request = Request {
            method: "GET",
            path: "/v1/models",
            headers: &[("x-long", &long)],
            body: b"",
        };
        assert_eq!(client::send(server.address, &request).status, 431);
    }
}

#[test]
fn a_prompt_that_does_not_fit_is_told_with_the_numbers() {
    let server = shared();
    let error = server
        .chat(&chat(&[text(&"word ".repeat(6000))]))
        .error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    let message = error["message"].as_str().expect("a message");
    assert!(
        message.contains("of text") && message.contains("of images"),
        "{message}"
    );
    let greedy = with(
        chat(&[text(&"word ".repeat(3000))]),
        json!({"max_tokens": 2000}),
    );
    let error = server.chat(&greedy).error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    assert!(
        error["message"]
            .as_str()
            .expect("a message")
            .contains("2000"),
        "{error}"
    );
}

#[test]
fn without_max_tokens_the_answer_is_cut_to_what_fits() {
    let server = Server::start_with("[model]\ncontext_tokens = 512\n");
    let body = json!({"messages": [text("as long as you like")], "temperature": 0});
    let usage: Value = server.chat(&body).ok()["usage"].clone();
    assert!(
        usage["total_tokens"].as_u64().expect("a count") <= 512,
        "{usage}"
    );
}

#[test]
fn unknown_paths_are_404_and_wrong_methods_405() {
    let server = shared();
    for path in [
        "/v1/nothing",
        "/v1",
        "/v2/chat/completions",
        "/v1/chat/completions/",
    ] {
        server.get(path).error(404);
    }
    let wrong = server.send("GET", "/v1/chat/completions", b"");
    wrong.error(405);
    assert_eq!(wrong.header("allow"), Some("POST"));
    server.send("DELETE", "/v1/models", b"").error(405);
    let wrong = server.send("POST", "/health", b"");
    wrong.error(405);
    assert_eq!(wrong.header("allow"), Some("GET, HEAD"));
}

#[test]
fn clients_of_ollama_are_greeted() {
    let answer = shared().get("/");
    assert_eq!((answer.status, answer.text()), (200, "Ollama is running"));
}

/// Whatever a client piles up, it is the client that is told: no plugin is made to fail by it.
#[test]
fn endless_small_pieces_are_the_clients_fault() {
    let server = Server::start();
    for (count, content) in [
        (1000, "a"),
        (3000, "a"),
        (1024, ""),
        (20_000, "a"),
        (200_000, ""),
    ] {
        let answer = server.chat(&chat(&vec![text(content); count]));
        assert!(
            [400, 413].contains(&answer.status),
            "{count}: {}",
            answer.text()
        );
        answer.error(answer.status);
    }
    for (count, content) in [(4000, "a"), (6000, ""), (100_000, "a")] {
        let parts = vec![json!({"type": "text", "text": content}); count];
        let answer = server.chat(&chat(&[json!({"role": "user", "content": parts})]));
        assert!(
            [200, 400, 413].contains(&answer.status),
            "{count}: {}",
            answer.text()
        );
    }
    let faults = &server.stats()["requests"]["outcomes"]["guest_fault"];
    assert!([json!(0), Value::Null].contains(faults), "{faults}");
}
