//! Clients that do not speak properly, written to a bare socket: each costs itself only.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::Incoming;
use crate::server::{Server, chat, random_checkpoint, shared, text, until, with};

/// Longest a server with timeouts of one second may hold on to a client that does nothing.
const SENT_AWAY_WITHIN: Duration = Duration::from_secs(8);

fn connect(server: &Server) -> TcpStream {
    let stream = TcpStream::connect(server.address).expect("the server accepts");
    stream
        .set_read_timeout(Some(SENT_AWAY_WITHIN))
        .expect("a timeout can be set");
    stream
}

/// Everything the server says until it hangs up; panics when it holds on.
#[track_caller]
fn last_words(mut stream: TcpStream) -> String {
    let mut said = Vec::new();
    let mut piece = [0; 4096];
    loop {
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(length) => said.extend_from_slice(&piece[..length]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("held on to: {error}, after {said:?}"),
        }
    }
    String::from_utf8_lossy(&said).into_owned()
}

/// Writes a text one byte at a time until it is through or nobody listens.
fn drip(mut stream: TcpStream, text: &str) {
    for byte in text.bytes() {
        thread::sleep(Duration::from_millis(100));
        if stream.write_all(&[byte]).is_err() {
            return;
        }
    }
}

#[test]
fn a_slow_sender_is_sent_away() {
    let server = Server::start_with("[server]\nhead_read_timeout_s = 1\nbody_read_timeout_s = 1\n");
    let began = Instant::now();
    assert_eq!(
        last_words(connect(&server)),
        "",
        "a client that says nothing"
    );

    let stream = connect(&server);
    let slow = stream.try_clone().expect("cloned");
    let head = format!(
        "GET /health HTTP/1.1\r\nhost: localhost\r\nx: {}",
        "y".repeat(200)
    );
    thread::spawn(move || drip(slow, &head));
    let said = last_words(stream);
    assert!(!said.contains("200 OK"), "{said}");

    let mut stream = connect(&server);
    stream
        .write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        .expect("sent");
    let said = last_words(stream);
    assert!(
        said.contains("200 OK"),
        "served, then idle for too long: {said}"
    );

    let mut stream = connect(&server);
    stream
        .write_all(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 200\r\n\r\n",
        )
        .expect("sent");
    let slow = stream.try_clone().expect("cloned");
    thread::spawn(move || drip(slow, &"{".repeat(200)));
    let said = last_words(stream);
    assert!(said.contains("did not arrive within 1 s"), "{said}");

    assert!(
        began.elapsed() < SENT_AWAY_WITHIN * 2,
        "{:?}",
        began.elapsed()
    );
    server.chat(&chat(&[text("still there")])).ok();
}

#[test]
fn broken_framing_is_refused_and_the_next_client_served() {
    let server = shared();
    let post = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n";
    let long = format!(
        "GET /health HTTP/1.1\r\nx: {}\r\n\r\n",
        "y".repeat(128 << 10)
    );
    let many = format!("GET /health HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(200));
    for broken in [
        "\r\n\r\n\r\n\r\nnonsense\r\n\r\n".to_owned(),
        "GET /health\r\n\r\n".to_owned(),
        "GET /health HTTP/1.1\r\n\r\n".to_owned(),
        "GET /health HTTP/9.9\r\n\r\n".to_owned(),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
        "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}\u{fc}\u{3}\u{3}".to_owned(),
        "GET /health HTTP/1.1\r\nbad header: x\r\n\r\n".to_owned(),
        "GET /health HTTP/1.1\r\nx: a\0b\r\n\r\n".to_owned(),
        "GET /health HTTP/1.1\r\nx : y\r\n\r\n".to_owned(),
        "GET /hea lth HTTP/1.1\r\n\r\n".to_owned(),
        long,
        many,
        format!("{post}content-length: -1\r\n\r\n"),
        format!("{post}content-length: +2\r\n\r\n{{}}"),
        format!("{post}content-length: 99999999999999999999\r\n\r\n"),
        format!("{post}content-length: 2\r\ncontent-length: 3\r\n\r\n{{}}"),
        format!("{post}transfer-encoding: gzip\r\n\r\n"),
        format!("{post}transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
        format!("{post}transfer-encoding: chunked\r\n\r\nzz\r\n{{}}\r\n0\r\n\r\n"),
        format!("{post}transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n"),
        format!("{post}transfer-encoding: chunked\r\n\r\n2\r\n{{}}xx0\r\n\r\n"),
    ] {
        let mut stream = connect(&server);
        // It may hang up before everything is written.
        _ = stream.write_all(broken.as_bytes());
        _ = stream.shutdown(std::net::Shutdown::Write);
        let said = last_words(stream);
        let refused =
            said.is_empty() || said.starts_with("HTTP/1.1 4") || said.starts_with("HTTP/1.0 4");
        let shown: String = broken.chars().take(90).collect();
        println!("{shown:?}: {:?}", said.lines().next());
        assert!(refused, "{shown:?}: {said}");
    }
    server.chat(&chat(&[text("still there")])).ok();
}

#[test]
fn what_a_client_writes_moves_nothing_in_the_log() {
    let server = Server::start();
    let mut stream = connect(&server);
    let long = "y".repeat(3000);
    let request = format!(
        "GET /v1/\u{9b}2J\u{202e}{long} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).expect("sent");
    let said = last_words(stream);
    assert!(said.starts_with("HTTP/1.1 404"), "{said}");
    server.wait_logged("/v1/\\u{9b}2J\\u{202e}yyy");
    server.wait_logged("bytes more)");
    assert!(server.logged().lines().all(|line| line.len() < 1000));
}

/// Two lengths for one body are how one request is smuggled inside another.
#[test]
fn a_length_beside_chunks_ends_the_connection() {
    let server = shared();
    let inside = "GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let body = "2\r\n{}\r\n0\r\n\r\n";
    let mut stream = connect(&server);
    let smuggled = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\ncontent-length: {}\r\n\r\n{body}{inside}",
        body.len() + inside.len()
    );
    stream.write_all(smuggled.as_bytes()).expect("sent");
    stream.shutdown(std::net::Shutdown::Write).expect("ended");
    let said = last_words(stream);
    assert_eq!(said.matches("HTTP/1.1 ").count(), 1, "{said}");
    assert!(said.starts_with("HTTP/1.1 4"), "{said}");
}

/// A body that others cut off elsewhere is how one request is smuggled inside another, too.
#[test]
fn another_coding_than_chunks_once_ends_the_connection() {
    let server = shared();
    let inside = "GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    let said = |codings: &str| {
        let mut stream = connect(&server);
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n{codings}\r\n2\r\n{{}}\r\n0\r\n\r\n{inside}"
        );
        stream.write_all(request.as_bytes()).expect("sent");
        last_words(stream)
    };
    for (codings, status) in [
        ("transfer-encoding: gzip, chunked\r\n", 501),
        (
            "transfer-encoding: identity\r\nTransfer-Encoding: chunked\r\n",
            501,
        ),
        ("transfer-encoding: chunked, chunked\r\n", 400),
        (
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
            400,
        ),
    ] {
        let said = said(codings);
        assert_eq!(said.matches("HTTP/1.1 ").count(), 1, "{codings}: {said}");
        assert!(
            said.starts_with(&format!("HTTP/1.1 {status} ")) && said.contains("connection: close"),
            "{codings}: {said}"
        );
    }
    let both = said("Transfer-Encoding: Chunked\r\n");
    assert_eq!(both.matches("HTTP/1.1 ").count(), 2, "{both}");
    assert!(both.contains("HTTP/1.1 200 OK"), "{both}");
}

#[test]
fn running_out_of_files_is_logged_once_and_its_end_once() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 100; exec \"$0\" \"$@\""]);
    command.args([env!("CARGO_BIN_EXE_visor"), "serve"]);
    command.args(["--listen", "127.0.0.1:0", "--model"]);
    command.arg(random_checkpoint());
    let server = Server::spawn(command, folder);
    server.wait_ready();
    let held: Vec<TcpStream> = (0..150).map(|_| connect(&server)).collect();
    server.wait_logged("accept failed");
    // Long enough for some more.
    thread::sleep(Duration::from_secs(1));
    drop(held);
    until("somebody comes when it is over", || {
        assert_eq!(server.get("/health").status, 200);
        server.logged().contains("accepted again").then_some(())
    });
    let log = server.logged();
    for once in ["accept failed", "accepted again"] {
        assert_eq!(log.matches(once).count(), 1, "{once}");
    }
}

#[test]
fn a_client_that_leaves_during_prefill_is_given_up() {
    let server = Server::start_with("[model]\nprefill_chunk_tokens = 1\n");
    let body = with(
        chat(&[text(&"so many words ".repeat(900))]),
        json!({"stream": true}),
    );
    let body = body.to_string();
    let mut stream = connect(&server);
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).expect("sent");
    until("it is being prefilled", || {
        (server.stats()["engine"]["running"] == 1).then_some(())
    });
    drop(stream);
    let engine = until("the engine is free", || {
        let engine = server.stats()["engine"].clone();
        (engine["aborted"] == 1 && engine["running"] == 0).then_some(engine)
    });
    assert_eq!(engine["finished"], 0, "{engine}");
    let metrics = server.get("/metrics");
    let generated = metrics
        .text()
        .lines()
        .find(|line| line.starts_with("vllm:generation_tokens_total"))
        .expect("counted")
        .to_owned();
    assert!(
        generated.ends_with(" 0"),
        "nothing was generated: {generated}"
    );
    server.chat(&chat(&[text("short")])).ok();
}

#[test]
fn connections_over_the_limit_are_turned_away_until_there_is_room() {
    let server = Server::start_with("[server]\nconnections_max = 3\nhead_read_timeout_s = 60\n");
    let held: Vec<TcpStream> = (0..3)
        .map(|_| {
            let mut stream = connect(&server);
            // An answer shows that it is in, not in the queue before it.
            stream
                .write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                .expect("sent");
            let answer = Incoming::read_head(stream.try_clone().expect("cloned"));
            assert_eq!(answer.status, 200);
            stream
        })
        .collect();
    let refused = last_words(connect(&server));
    assert!(
        refused.is_empty() || refused.starts_with("HTTP/1.1 503"),
        "{refused}"
    );
    server.wait_logged("connections_max");
    drop(held);
    until("there is room", || {
        let mut stream = connect(&server);
        let asked = stream
            .write_all(b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        (asked.is_ok() && last_words(stream).starts_with("HTTP/1.1 200")).then_some(())
    });
}
