//! Mixed requests for a while: nothing fails that should not, and memory stays where it is.
//!
//! `VISOR_SOAK_REQUESTS=10000 cargo test --release --test e2e soak -- --nocapture` is the long run; without it a short one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use image::{ImageFormat, Rgb, RgbImage};
use serde_json::{Value, json};

use crate::server::{Server, chat, data_url, pictures, text, until, with};

const CLIENTS: u64 = 12;
const SHORT_REQUESTS: u64 = 400;
/// What memory may grow by once caches are full: after the first tenth of the long run, and after half of the short one, where
/// allocators have hardly settled.
const GROWTH_MAX: f64 = 0.02;
const SHORT_GROWTH_MAX: f64 = 0.15;
/// When a server that has nothing to do has given back what it does not use.
const RESTED: Duration = Duration::from_secs(3);
/// Caches that are full soon.
const CONFIG: &str = "[cache]\npixels_mib = 24\nfeatures_mib = 8\nresponses_mib = 1\nprefixes_mib = 16\n[model]\nkv_cache_mib = 48\n";

/// A picture that differs with every number.
fn picture(number: u64) -> String {
    let shade = |x: u32, y: u32| (u64::from(x ^ y) * 7 + number * 131) as u8;
    let image = RgbImage::from_fn(96 + (number % 5) as u32 * 60, 96, |x, y| {
        Rgb([shade(x, y), (number / 256) as u8, shade(y, 3 * x)])
    });
    let mut bytes = std::io::Cursor::new(Vec::new());
    image
        .write_to(&mut bytes, ImageFormat::Png)
        .expect("a picture fits in memory");
    data_url("image/png", &bytes.into_inner())
}

/// What becomes of a request.
enum Kind {
    Answered(Value),
    Refused(Value),
    Left(Value),
}

fn kind(number: u64) -> Kind {
    let question = format!("Number {number}: what is this?");
    let few = json!({"max_tokens": 1 + number % 9});
    match number % 10 {
        0..=2 => Kind::Answered(with(chat(&[pictures(&[picture(number)], &question)]), few)),
        3 | 4 => Kind::Answered(with(
            chat(&[pictures(&[picture(number % 7)], &question)]),
            few,
        )),
        5 => Kind::Answered(with(chat(&[text("What can you do?")]), few)),
        6 => {
            let warm = json!({"max_tokens": 12, "temperature": 1, "seed": number});
            Kind::Answered(with(chat(&[text(&question)]), warm))
        }
        7 => Kind::Refused(chat(&[pictures(
            &["data:image/png;base64,AAAA".into()],
            "?",
        )])),
        _ => {
            let long = json!({"max_tokens": 200, "stream": true});
            Kind::Left(with(
                chat(&[pictures(&[picture(number % 40)], &question)]),
                long,
            ))
        }
    }
}

fn ask(server: &Server, number: u64) {
    match kind(number) {
        Kind::Answered(body) => drop(server.chat(&body).ok()),
        Kind::Refused(body) => drop(server.chat(&body).error(400)),
        Kind::Left(body) => {
            let mut stream = server.open_chat(&body);
            assert_eq!(stream.status, 200, "request {number}");
            if !number.is_multiple_of(4) {
                stream.piece();
            }
        }
    }
}

fn resident(server: &Server) -> f64 {
    let stats = server.stats();
    let bytes = stats["memory"]["resident_bytes"].as_f64();
    bytes.expect("this system tells how much is resident")
}

/// Bytes that all caches together say they hold.
fn cached(server: &Server) -> f64 {
    let stats = server.stats();
    let caches = stats["caches"].as_object().expect("caches").values();
    caches
        .map(|cache| cache["bytes"].as_f64().expect("a number"))
        .sum()
}

#[test]
fn memory_stays_where_it_is() {
    let asked = std::env::var("VISOR_SOAK_REQUESTS").ok();
    let count: u64 = asked
        .as_deref()
        .map_or(SHORT_REQUESTS, |count| count.parse().expect("a number"));
    let server = Arc::new(Server::start_with(CONFIG));
    let next = Arc::new(AtomicU64::new(0));
    let run_to = |end: u64| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                let (server, next) = (Arc::clone(&server), Arc::clone(&next));
                thread::spawn(move || {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= end {
                            break;
                        }
                        ask(&server, number);
                    }
                })
            })
            .collect();
        for client in clients {
            client.join().expect("every request went as it should");
        }
        next.store(end, Ordering::Relaxed);
        until("nothing runs", || {
            let engine = server.stats()["engine"].clone();
            (engine["running"] == 0 && engine["waiting"] == 0).then_some(())
        });
        let busy = resident(&server);
        thread::sleep(RESTED);
        let rested = resident(&server);
        let [before, all, caches] = [busy, rested, cached(&server)].map(|bytes| bytes / 1048576.0);
        println!(
            "{end} requests: {all:.1} MiB ({before:.1} at work), {caches:.1} of them in caches"
        );
        assert!(rested < busy, "nothing went back to the system");
        rested
    };
    let (parts, growth_max) = match asked {
        Some(_) => (10, GROWTH_MAX),
        None => (2, SHORT_GROWTH_MAX),
    };
    let after: Vec<f64> = (1..=parts)
        .map(|part| run_to(count * part / parts))
        .collect();
    let growth = after[after.len() - 1] / after[0] - 1.0;
    assert!(
        growth < growth_max,
        "memory grew by {:.1} %",
        100.0 * growth
    );
    let stats = server.stats();
    assert_eq!(stats["engine"]["failed"], 0, "{}", stats["engine"]);
    let blocks = stats["engine"]["kv_blocks"].as_u64().expect("a number");
    let entries = stats["caches"]["prefixes"]["entries"]
        .as_u64()
        .expect("a number");
    assert!(blocks <= entries, "{blocks} blocks, {entries} cached");
}

/// What a tokenizer would keep of texts is more than the texts.
#[test]
fn texts_that_are_taken_apart_leave_nothing_behind() {
    const TEXTS: u64 = 3000;
    /// What they would come to is twice that.
    const GROWTH_BYTES_MAX: f64 = 4e6;
    let server = Arc::new(Server::start());
    let run = |numbers: std::ops::Range<u64>| {
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let (server, numbers) = (Arc::clone(&server), numbers.clone());
                thread::spawn(move || {
                    for number in numbers.skip(client).step_by(4) {
                        let words = (1..25).map(|word| (number * word * 2_654_435_761) % 1_000_003);
                        let words: Vec<String> = words.map(|word| word.to_string()).collect();
                        let body = json!({"prompt": words.join(" ")}).to_string();
                        server.send("POST", "/v1/tokenize", body.as_bytes()).ok();
                    }
                })
            })
            .collect();
        for client in clients {
            client.join().expect("every text was taken apart");
        }
        resident(&server)
    };
    let early = run(0..500);
    let growth = run(500..500 + TEXTS) - early;
    println!("{TEXTS} texts: {:+.1} MiB", growth / 1048576.0);
    assert!(growth < GROWTH_BYTES_MAX, "{growth} bytes");
}
