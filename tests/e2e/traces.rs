//! Spans of requests, as a collector gets them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::thread;

use crate::client::{Request, send};
use crate::server::{Server, chat, text};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const OTHER_TRACE: &str = "1bf7651916cd43dd8448eb211c80319d";
const PARENT: &str = "b7ad6b7169203331";

/// A collector that keeps what it is sent.
fn collector() -> (u16, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let kept = Arc::new(Mutex::new(Vec::new()));
    let keep = Arc::clone(&kept);
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let mut reader = BufReader::new(stream);
            let (mut line, mut length) = (String::new(), 0);
            while reader.read_line(&mut line).is_ok_and(|read| read > 2) {
                let lower = line.to_ascii_lowercase();
                if let Some(value) = lower.strip_prefix("content-length: ") {
                    length = value.trim().parse().expect("a length");
                }
                if lower.starts_with("post") {
                    assert!(line.starts_with("POST /v1/traces HTTP/1.1"), "{line}");
                }
                line.clear();
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).expect("a whole body");
            keep.lock().unwrap().extend(body);
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
            _ = reader.get_mut().write_all(answer);
        }
    });
    (port, kept)
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().as_chunks::<2>().0.iter();
    let byte = |pair: &[u8; 2]| std::str::from_utf8(pair).expect("ASCII").to_owned();
    digits
        .map(|pair| u8::from_str_radix(&byte(pair), 16).expect("hexadecimal"))
        .collect()
}

fn has(haystack: &[u8], needle: &[u8]) -> bool {
    haystack
        .windows(needle.len())
        .any(|window| window == needle)
}

#[test]
fn a_request_is_a_span_of_its_callers_trace() {
    let (port, kept) = collector();
    let config = format!("[telemetry]\notlp_endpoint = \"http://127.0.0.1:{port}\"\n");
    let mut server = Server::start_with(&config);
    let body = chat(&[text("trace me")]).to_string();
    for (trace, flags) in [(TRACE, "01"), (OTHER_TRACE, "00")] {
        let parent = format!("00-{trace}-{PARENT}-{flags}");
        let request = Request {
            method: "POST",
            path: "/v1/chat/completions",
            headers: &[
                ("content-type", "application/json"),
                ("traceparent", &parent),
                ("x-request-id", "told-1"),
            ],
            body: body.as_bytes(),
        };
        send(server.address, &request).ok();
    }
    // What is not sent yet is sent when it stops.
    server.signal("TERM");
    assert!(server.wait_exit().success());
    let kept = kept.lock().unwrap();
    // Fields of opentelemetry.proto.trace.v1.Span: trace_id is 1, parent_span_id is 4, both of bytes.
    assert!(has(&kept, &[&[0x0a, 16][..], &bytes(TRACE)].concat()));
    assert!(has(&kept, &[&[0x22, 8][..], &bytes(PARENT)].concat()));
    for told in [
        "POST /v1",
        "told-1",
        "/v1/chat/completions",
        "visor.stage.decode_us",
    ] {
        assert!(has(&kept, told.as_bytes()), "{told}");
    }
    assert!(
        !has(&kept, &bytes(OTHER_TRACE)),
        "its caller did not ask for it"
    );
}

#[test]
fn a_collector_that_is_not_there_costs_no_request() {
    let gone = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = gone.local_addr().expect("bound").port();
    drop(gone);
    let config = format!("[telemetry]\notlp_endpoint = \"http://127.0.0.1:{port}\"\n");
    let mut server = Server::start_with(&config);
    server.chat(&chat(&[text("trace me")])).ok();
    server.signal("TERM");
    server.wait_logged("spans were not sent");
    assert!(server.wait_exit().success());
}
