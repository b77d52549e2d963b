//! Too many at once, and clients that leave.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};

use crate::client::{Incoming, MUCH};
use crate::server::{Server, chat, text, until, with};

/// A chat that takes a while: as long as the context allows. Greedy noise runs in circles and meets
/// no stop token; another number makes another conversation, so that no cache answers.
fn long(number: u64) -> Value {
    with(
        chat(&[text(&format!("on and on, the {number}th"))]),
        json!({"max_tokens": 3000, "stream": true}),
    )
}

/// Waits until one abort is counted, by the server at once and by the engine after the step it is in, and checks that
/// the engine gave the work up halfway.
#[track_caller]
fn assert_given_up(server: &Server) {
    let stats = until("the abort is counted", || {
        let stats = server.stats();
        let counts = [&stats["requests"]["outcomes"], &stats["engine"]];
        (counts.iter().all(|count| count["aborted"] == 1)).then_some(stats)
    });
    let engine = &stats["engine"];
    assert_eq!(
        (&engine["aborted"], &engine["finished"]),
        (&json!(1), &json!(0)),
        "{engine}"
    );
}

#[test]
fn over_the_limit_is_503_at_once_and_says_when_to_come_back() {
    let server = Server::start_with("[server]\nrequests_in_flight_max = 1\n");
    let mut busy = server.open_chat(&long(1));
    assert_eq!(busy.status, 200);
    busy.piece().expect("it has begun");
    let refused = server.chat(&chat(&[text("me too")]));
    refused.error(503);
    assert!(
        refused
            .header("retry-after")
            .is_some_and(|seconds| seconds.parse::<u32>().is_ok())
    );
    server
        .send_all("POST", "/v1/chat/completions", MUCH)
        .error(503);
    assert_eq!(server.get("/health").status, 200, "alive while it refuses");
    drop(busy);
    until("there is room again", || {
        (server.chat(&chat(&[text("and now")])).status == 200).then_some(())
    });
}

#[test]
fn what_is_told_of_the_server_is_made_so_often_whoever_asks() {
    let server = Arc::new(Server::start_with("[server]\nstats_per_s_max = 1\n"));
    let began = Instant::now();
    for path in ["/stats", "/metrics", "/openapi.json"] {
        let asking = (0..8).map(|_| {
            let server = Arc::clone(&server);
            thread::spawn(move || -> Vec<String> {
                let asks = (0..25).map(|_| server.get(path));
                asks.map(|answer| {
                    assert_eq!(answer.status, 200);
                    answer.text().to_owned()
                })
                .collect()
            })
        });
        let asking: Vec<_> = asking.collect();
        let told = asking
            .into_iter()
            .flat_map(|client| client.join().expect("no panic"));
        // Each tells how long the server runs, so no two that were made are equal.
        let made = told.collect::<BTreeSet<_>>().len() as u64;
        let made_max = match path {
            "/openapi.json" => 1,
            _ => 2 + began.elapsed().as_secs(),
        };
        assert!(made <= made_max, "{path}: {made} of {made_max}");
    }
    let before = server.get("/stats").text().to_owned();
    until("it is made again", || {
        (server.get("/stats").text() != before).then_some(())
    });
}

#[test]
fn a_client_that_leaves_mid_stream_frees_the_engine_and_is_counted() {
    let server = Server::start();
    let mut stream = server.open_chat(&long(2));
    stream.piece().expect("it has begun");
    // It is told that it begins before it is counted.
    until("it runs", || {
        (server.metric("vllm:num_requests_running") >= 1.0).then_some(())
    });
    drop(stream);
    until("the engine is free", || {
        (server.metric("vllm:num_requests_running") == 0.0).then_some(())
    });
    assert_given_up(&server);
    server.chat(&chat(&[text("still there")])).ok();
}

#[test]
fn a_client_that_leaves_while_waiting_for_a_whole_answer_is_noticed_too() {
    let server = Server::start();
    let body = with(long(3), json!({"stream": false})).to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut stream = std::net::TcpStream::connect(server.address).expect("the server accepts");
    std::io::Write::write_all(&mut stream, (head + &body).as_bytes()).expect("sent");
    until("it runs", || {
        (server.metric("vllm:num_requests_running") >= 1.0).then_some(())
    });
    drop(stream);
    assert_given_up(&server);
    assert_eq!(server.metric("vllm:num_requests_running"), 0.0);
}

/// Tokens of prompts and of answers, as they are counted.
fn used(server: &Server) -> [u64; 2] {
    ["vllm:prompt_tokens_total", "vllm:generation_tokens_total"]
        .map(|name| server.metric(name) as u64)
}

#[test]
fn what_a_client_used_before_it_left_is_counted_and_what_it_saw_to_the_end_once() {
    let server = Server::start();
    let mut stream = server.open_chat(&long(6));
    for _ in 0..30 {
        stream.piece().expect("it goes on");
    }
    drop(stream);
    assert_given_up(&server);
    let [prompt, completion] = until("it is counted", || {
        let used = used(&server);
        (used[0] > 0).then_some(used)
    });
    assert!((10..3000).contains(&completion), "{completion} tokens");
    let log = server.wait_logged("outcome=\"aborted\"");
    let told = format!("prompt_tokens={prompt} completion_tokens={completion}");
    assert!(log.contains(&told), "{told}: {log}");

    // The same prompt, and two answers to it.
    let whole = with(
        long(6),
        json!({"max_tokens": 20, "stream": false, "n": 2, "temperature": 1}),
    );
    let usage = server.chat(&whole).ok()["usage"].clone();
    assert_eq!(usage["prompt_tokens"], prompt);
    let answers = usage["completion_tokens"].as_u64().expect("it is told");
    let both = [2 * prompt, completion + answers];
    until("both are counted", || {
        let used = used(&server);
        assert!(used[0] <= both[0] && used[1] <= both[1], "{used:?}");
        (used == both).then_some(())
    });
}

#[test]
fn what_was_used_until_the_time_was_over_is_counted() {
    let server = Server::start_with("[server]\nrequest_timeout_s = 1\n");
    let mut before = [0, 0];
    for stream in [false, true] {
        let asked = with(long(7), json!({"stream": stream, "n": 2}));
        let answer = server.chat(&asked);
        assert_eq!(answer.status, if stream { 200 } else { 504 });
        before = until("it is counted", || {
            let used = used(&server);
            (used[0] > before[0] && used[1] > before[1]).then_some(used)
        });
    }
    assert_eq!(server.stats()["engine"]["finished"], 0);
}

#[test]
fn many_clients_at_once_are_all_answered() {
    let server = Arc::new(Server::start());
    let clients: Vec<_> = (0..16)
        .map(|number| {
            let server = Arc::clone(&server);
            thread::spawn(move || {
                let body = with(
                    chat(&[text(&format!("client {number}"))]),
                    json!({"stream": number % 2 == 0}),
                );
                server.chat(&body).status
            })
        })
        .collect();
    for client in clients {
        assert_eq!(client.join().expect("no panic"), 200);
    }
}

/// A chat of `length` bytes of which `sent` are on their way.
fn begun(server: &Server, (sent, length): (usize, usize)) -> TcpStream {
    let mut stream = TcpStream::connect(server.address).expect("the server accepts");
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).expect("sent");
    stream.write_all(&vec![b' '; sent]).expect("sent");
    stream
}

#[test]
fn bodies_that_do_not_come_take_no_place_from_those_that_do() {
    let server = Server::start_with("[server]\nrequests_in_flight_max = 1\n");
    let slow: Vec<_> = (0..8).map(|_| begun(&server, (10, 1000))).collect();
    for _ in 0..3 {
        server.chat(&chat(&[text("quick")])).ok();
    }
    drop(slow);
}

#[test]
fn a_body_that_comes_too_slowly_is_sent_away_before_its_time() {
    let server = Server::start_with(
        "[server]\nhead_read_timeout_s = 1\nbody_bytes_per_s_min = 1000\nbody_read_timeout_s = 60\n",
    );
    let stream = begun(&server, (100, 10_000));
    let answer = Incoming::read_head(stream).finish();
    let error = answer.error(408);
    assert_eq!(error["type"], "invalid_request_error");
    // An answer is counted once it is sent.
    until("it is counted as the client's", || {
        (server.stats()["requests"]["outcomes"]["client_error"] == 1).then_some(())
    });
    let message = error["message"].to_string();
    assert!(
        message.contains("slower than 1000 bytes a second"),
        "{message}"
    );
}

#[test]
fn bodies_on_their_way_have_so_much_memory_together() {
    let server = Server::start_with(
        "[server]\nrequest_body_bytes_max = 1000000\narriving_bytes_max = 1000000\n",
    );
    let large = begun(&server, (990_000, 1_000_000));
    let body = chat(&[text(&"x".repeat(100_000))]);
    let refused = until("what was sent has arrived", || {
        let answer = server.chat(&body);
        (answer.status == 503).then_some(answer)
    });
    assert!(refused.header("retry-after").is_some());
    server.chat(&chat(&[text("small")])).ok();
    drop(large);
    // Too long for the model, which is another matter.
    until("its memory is given back", || {
        (server.chat(&body).status == 400).then_some(())
    });
}

/// It looks like a picture, so it is lifted out of the body, past all limits on text, and then it is text after all.
#[test]
fn a_text_that_cannot_fit_is_refused_without_being_taken_apart() {
    const MIB: u64 = 1 << 20;
    let server = Server::start();
    let peak = || {
        server.stats()["memory"]["peak_bytes"]
            .as_u64()
            .expect("this system tells")
            / MIB
    };
    server.chat(&chat(&[text("warm")])).ok();
    let before = peak();
    let long = format!("data:{}", "x".repeat(24 << 20));
    let error = server.chat(&chat(&[text(&long)])).error(400);
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|why| why.contains("too long")),
        "{error}"
    );
    let growth = peak() - before;
    assert!(growth < 300, "{growth} MiB for 24");
}

#[test]
fn a_request_has_so_much_time_and_no_more() {
    let server = Server::start_with("[server]\nrequest_timeout_s = 1\n");
    let answer = server.chat(&with(long(4), json!({"stream": false})));
    answer.error(504);
    let stream = server.chat(&long(5));
    assert_eq!(stream.status, 200);
    assert!(
        stream.text().contains("\"error\""),
        "the stream says why it ends: {}",
        stream.text()
    );
    server.chat(&chat(&[text("short")])).ok();
}
