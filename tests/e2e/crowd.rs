//! Two thousand clients that keep their connection and say nothing, and streams beside them.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::thread;

use serde_json::json;

use crate::client::{Incoming, chunks};
use crate::server::{Server, chat, text, until, with};

const IDLE: usize = 2000;
const STREAMS: usize = 64;
const ROUNDS: usize = 3;
/// What an idle connection may take, in KiB: its buffers, its task, its timer.
const CONNECTION_KIB_MAX: f64 = 32.0;
/// What the last round may leave behind that the first did not: allocators settle late.
const GROWTH_MAX: f64 = 0.10;
/// Caches that are full soon, and room for all of them at once.
const CONFIG: &str = "[server]\nconnections_max = 2200\nrequests_in_flight_max = 64\nhead_read_timeout_s = 120\n\
    [cache]\nresponses_mib = 1\nprefixes_mib = 4\n[model]\nkv_cache_mib = 16\n";

fn resident_kib(server: &Server) -> f64 {
    let bytes = server.stats()["memory"]["resident_bytes"].as_f64();
    bytes.expect("this system tells how much is resident") / 1024.0
}

/// Asks on a connection that is kept, and reads the answer.
fn alive(stream: &TcpStream) {
    let mut writing = stream;
    writing
        .write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        .expect("the connection is open");
    let reading = stream.try_clone().expect("cloned");
    assert_eq!(Incoming::read_head(reading).finish().status, 200);
}

/// As many streams as may be in flight, each to its end.
fn stream_all(server: &Arc<Server>, round: usize) {
    let clients: Vec<_> = (0..STREAMS)
        .map(|number| {
            let server = Arc::clone(server);
            thread::spawn(move || {
                let question = format!("Round {round}, number {number}: go on");
                let body = with(
                    chat(&[text(&question)]),
                    json!({"max_tokens": 24, "stream": true}),
                );
                let answer = server.chat(&body);
                assert_eq!(answer.status, 200, "{}", answer.text());
                assert!(chunks(&answer).len() > 2, "{}", answer.text());
            })
        })
        .collect();
    for client in clients {
        client.join().expect("its stream came to its end");
    }
    until("nothing runs", || {
        let engine = server.stats()["engine"].clone();
        (engine["running"] == 0 && engine["waiting"] == 0).then_some(())
    });
}

#[test]
fn idle_connections_cost_little_and_streams_beside_them_nothing_for_good() {
    raise_open_files();
    let server = Arc::new(Server::start_with(CONFIG));
    let alone = resident_kib(&server);
    let idle: Vec<TcpStream> = (0..IDLE)
        .map(|_| {
            let stream = TcpStream::connect(server.address).expect("the server accepts");
            alive(&stream);
            stream
        })
        .collect();
    let crowded = resident_kib(&server);
    let each = (crowded - alone) / IDLE as f64;
    let after: Vec<f64> = (0..ROUNDS)
        .map(|round| {
            stream_all(&server, round);
            resident_kib(&server)
        })
        .collect();
    println!(
        "{:.0} MiB, {each:.1} KiB for each of {IDLE} idle connections; after rounds of {STREAMS} streams {:.0?} MiB",
        alone / 1024.0,
        after.iter().map(|kib| kib / 1024.0).collect::<Vec<_>>()
    );
    assert!(each < CONNECTION_KIB_MAX, "{each:.1} KiB");
    let growth = after[ROUNDS - 1] / after[0] - 1.0;
    assert!(
        growth < GROWTH_MAX,
        "memory grew by {:.1} %",
        100.0 * growth
    );
    idle.iter().for_each(alive);
    until("every stream is counted", || {
        (server.stats()["requests"]["outcomes"]["ok"] == STREAMS * ROUNDS).then_some(())
    });
    let engine = &server.stats()["engine"];
    assert_eq!(engine["failed"], 0, "{engine}");
}

/// This side holds as many connections as the server.
#[cfg(unix)]
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised).expect("as many as the system allows");
}

#[cfg(not(unix))]
fn raise_open_files() {}
