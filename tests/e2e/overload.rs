//! Too many at once, and clients that leave.

use std::sync::Arc;
use std::thread;

use serde_json::{Value, json};

use crate::server::{Server, chat, text, until, with};

/// A chat that takes a while: as long as the context allows. Greedy noise runs in circles and meets
/// no stop token; another number makes another conversation, so that no cache answers.
fn long(number: u64) -> Value {
    with(
        chat(&[text(&format!("on and on, the {number}th"))]),
        json!({"max_tokens": 3000, "stream": true}),
    )
}

fn metric(server: &Server, name: &str) -> f64 {
    let metrics = server.get("/metrics");
    let lines = metrics.text().lines().filter(|line| line.starts_with(name));
    lines
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
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
    assert_eq!(server.get("/health").status, 200, "alive while it refuses");
    drop(busy);
    until("there is room again", || {
        (server.chat(&chat(&[text("and now")])).status == 200).then_some(())
    });
}

#[test]
fn a_client_that_leaves_mid_stream_frees_the_engine_and_is_counted() {
    let server = Server::start();
    let mut stream = server.open_chat(&long(2));
    stream.piece().expect("it has begun");
    assert!(metric(&server, "vllm:num_requests_running") >= 1.0);
    drop(stream);
    until("the engine is free", || {
        (metric(&server, "vllm:num_requests_running") == 0.0).then_some(())
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
        (metric(&server, "vllm:num_requests_running") >= 1.0).then_some(())
    });
    drop(stream);
    assert_given_up(&server);
    assert_eq!(metric(&server, "vllm:num_requests_running"), 0.0);
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
