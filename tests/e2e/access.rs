//! Who may ask, how much, and from which pages.

use std::io::Write;
use std::net::TcpStream;
use std::process::Command;

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::client::{self, Answer, Incoming, MUCH, Request};
use crate::server::{Server, chat, repository, text, until, with};

/// A key with further settings.
fn key(name: &str, secret: &str, more: &str) -> String {
    let digest: [u8; 32] = Sha256::digest(secret).into();
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("[[access.keys]]\nname = \"{name}\"\nsha256 = \"{hex}\"\n{more}\n")
}

fn send(server: &Server, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
    let body = chat(&[text("hello")]).to_string();
    let request = Request {
        method,
        path,
        headers,
        body: if method == "POST" {
            body.as_bytes()
        } else {
            b""
        },
    };
    client::send(server.address, &request)
}

fn ask(server: &Server, headers: &[(&str, &str)]) -> Answer {
    send(server, "POST", "/v1/chat/completions", headers)
}

#[test]
fn once_there_is_a_key_every_request_needs_one() {
    let server = Server::start_with(&key("alice", "secret-of-alice", ""));
    for (wrong, says) in [
        (&[][..], "needs an API key"),
        (&[("authorization", "Bearer secret-of-bob")], "not known"),
        (&[("x-api-key", "secret-of-bob")], "not known"),
        (
            &[("authorization", "Basic secret-of-alice")],
            "needs an API key",
        ),
    ] {
        let answer = ask(&server, wrong);
        let error = answer.error(401);
        assert!(
            error["message"].as_str().expect("a message").contains(says),
            "{error}"
        );
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        assert!(answer.header("x-request-id").is_some());
        assert_eq!(answer.header("x-visor-plugins"), None, "for strangers");
        for path in [
            "/v1/models",
            "/stats",
            "/metrics",
            "/openapi.json",
            "/nowhere",
        ] {
            send(&server, "GET", path, wrong).error(401);
        }
    }
    for right in [
        ("authorization", "Bearer secret-of-alice"),
        ("x-api-key", "secret-of-alice"),
    ] {
        let answer = ask(&server, &[right]);
        assert!(answer.header("x-visor-plugins").is_some());
        answer.ok();
        let document = send(&server, "GET", "/openapi.json", &[right]).ok();
        assert!(
            document["security"].is_array(),
            "it tells that a key is needed"
        );
        for path in ["/v1/models", "/stats", "/metrics"] {
            assert_eq!(send(&server, "GET", path, &[right]).status, 200, "{path}");
        }
        send(&server, "GET", "/nowhere", &[right]).error(404);
    }
    for path in ["/health", "/ready"] {
        assert_eq!(server.get(path).status, 200, "{path} is open");
    }
    let last = [
        ("authorization", "Bearer secret-of-alice"),
        ("x-request-id", "last-of-all"),
    ];
    ask(&server, &last).ok();
    let log = server.wait_logged("last-of-all");
    assert!(log.contains("principal=\"alice\""), "{log}");
    assert!(!log.contains("secret-of-"), "no key is logged");
}

/// Calls that rendered an error, of all adapters.
fn rendered(server: &Server) -> u64 {
    let stats = server.get("/stats").ok();
    let plugins = stats["plugins"].as_array().cloned().unwrap_or_default();
    let calls = plugins.iter().map(|plugin| {
        let calls = &plugin["functions"]["render-error"]["calls"];
        calls.as_u64().unwrap_or(0)
    });
    calls.sum()
}

#[test]
fn who_is_turned_away_is_told_in_the_dialect_they_speak() {
    let keys = key("slow", "slow", "requests_per_minute = 1");
    let server = Server::start_with(&format!("[access]\nstats_need_key = false\n{keys}"));
    let before = rendered(&server);
    let paths = [
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/api/chat",
    ];
    for _ in 0..5 {
        for path in paths {
            let answer = send(&server, "POST", path, &[]);
            let error = answer.json()["error"].clone();
            assert_eq!(answer.status, 401, "{path}: {error}");
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
            assert_eq!(answer.header("x-visor-plugins"), None, "for strangers");
            match path {
                "/v1/messages" => assert_eq!(error["type"], "authentication_error"),
                "/api/chat" => assert!(error.is_string(), "{error}"),
                _ => assert_eq!(error["code"], "invalid_api_key"),
            }
        }
    }
    assert_eq!(rendered(&server) - before, 4, "one call for each dialect");
    let slow = [("x-api-key", "slow")];
    send(&server, "POST", "/v1/messages", &slow);
    for path in paths {
        let answer = send(&server, "POST", path, &slow);
        let error = answer.json()["error"].clone();
        assert_eq!(answer.status, 429, "{path}: {error}");
        assert!(answer.header("retry-after").is_some());
        match path {
            "/v1/messages" => assert_eq!(error["type"], "rate_limit_error"),
            "/api/chat" => assert!(error.is_string(), "{error}"),
            _ => assert_eq!(error["code"], "rate_limit_exceeded"),
        }
    }
}

/// A picture is on its way before the server has said no, and most clients read only when they have written.
#[test]
fn a_client_that_writes_much_still_reads_why_it_was_turned_away() {
    let server = Server::start_with(&key("slow", "slow", "requests_per_minute = 1"));
    let send = |headers: &[(&str, &str)]| {
        let request = Request {
            method: "POST",
            path: "/v1/chat/completions",
            headers,
            body: MUCH,
        };
        client::send_all(server.address, &request)
    };
    let slow = [("x-api-key", "slow")];
    send(&[]).error(401);
    ask(&server, &slow).ok();
    send(&slow).error(429);
}

/// Refused requests whose bodies never end take no place from others.
#[test]
fn who_is_over_its_limits_keeps_nobody_out() {
    let keys = key("slow", "slow", "requests_per_minute = 1") + &key("other", "other", "");
    let server = Server::start_with(&format!("[server]\nrequests_in_flight_max = 4\n{keys}"));
    ask(&server, &[("x-api-key", "slow")]).ok();
    let mut dripping = Vec::new();
    for _ in 0..8 {
        let mut stream = TcpStream::connect(server.address).expect("the server accepts");
        let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-api-key: slow\r\ncontent-length: 999\r\n\r\n{";
        stream
            .write_all(head.as_bytes())
            .expect("the head is taken");
        dripping.push(stream);
    }
    for _ in 0..3 {
        ask(&server, &[("x-api-key", "other")]).ok();
    }
    drop(dripping);
}

#[test]
fn keys_come_and_go_while_the_server_runs() {
    let config = format!("{}\n[access]\nstats_need_key = false\n", "");
    let server = Server::start_with(&config);
    ask(&server, &[]).ok();
    let with_key = format!(
        "[access]\nstats_need_key = false\n{}",
        key("alice", "one", "")
    );
    std::fs::write(server.folder().join("visor.toml"), with_key).expect("written");
    until("a key is needed", || {
        (ask(&server, &[]).status == 401).then_some(())
    });
    ask(&server, &[("x-api-key", "one")]).ok();
    // A plugin that comes later is wired with the keys of now.
    let template = repository("plugins/built/phi3.wasm");
    server.install("mine", &std::fs::read(template).expect("it is checked in"));
    until("the plugin is there", || {
        let plugins = server.stats()["plugins"].clone();
        let mine = |plugin: &serde_json::Value| plugin["id"] == "mine";
        plugins.as_array()?.iter().any(mine).then_some(())
    });
    assert_eq!(ask(&server, &[]).status, 401);
    assert_eq!(
        server.get("/stats").status,
        200,
        "open when the configuration says so"
    );
    std::fs::write(server.folder().join("visor.toml"), config).expect("written");
    until("nobody needs one", || {
        (ask(&server, &[]).status == 200).then_some(())
    });
}

/// A file that is cut short is one without keys.
#[test]
fn the_last_key_stays_while_other_machines_reach_the_server() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("visor.toml");
    let whole = key("alice", "one", "");
    std::fs::write(&file, &whole).expect("written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_visor"));
    let model = repository("tests/golden/ckpt_mha_int4");
    command.args(["serve", "--listen", "0.0.0.0:0", "--config", "visor.toml"]);
    command.arg("--model").arg(model);
    let mut server = Server::spawn(command, folder);
    server.address.set_ip([127, 0, 0, 1].into());
    server.wait_ready();
    let alice = [("x-api-key", "one")];
    let config = || send(&server, "GET", "/stats", &alice).ok()["config"].clone();
    for (refused, cut) in ["", "[server]\nkeep_alive_s = 13\n"].iter().enumerate() {
        std::fs::write(&file, cut).expect("written");
        let told = until("it is refused", || {
            let config = config();
            (config["refused"] == refused + 1).then_some(config)
        });
        let why = told["last_error"].as_str().expect("it says why");
        for words in ["access.keys", "0.0.0.0:0 is reached", "keep one", "restart"] {
            assert!(why.contains(words), "no {words}: {why}");
        }
        assert!(server.wait_logged(why).contains("the old one stays"));
        assert_eq!(ask(&server, &[]).status, 401);
        ask(&server, &alice).ok();
    }
    let other = whole.replace("alice", "bob");
    std::fs::write(&file, other).expect("written");
    until("another key for the last one is taken", || {
        let config = config();
        (config["applied"] == 1 && config["last_error"].is_null()).then_some(())
    });
    std::fs::remove_file(&file).expect("it was there");
    let told = until("a file that is gone is refused", || {
        let config = config();
        (config["refused"] == 3).then_some(config)
    });
    let why = told["last_error"].as_str().expect("it says why");
    assert!(why.starts_with("visor.toml: cannot be read"), "{why}");
    assert_eq!(ask(&server, &[]).status, 401);
}

#[test]
fn a_key_that_asks_too_much_is_told_when_to_come_back() {
    let keys = key("slow", "slow", "requests_per_minute = 2")
        + &key("narrow", "narrow", "requests_in_flight_max = 1")
        + &key("free", "free", "");
    let server = Server::start_with(&keys);
    let slow = [("x-api-key", "slow")];
    ask(&server, &slow).ok();
    ask(&server, &slow).ok();
    let refused = ask(&server, &slow);
    refused.error(429);
    let seconds = refused.header("retry-after").expect("it says when");
    assert!(
        (1..=30).contains(&seconds.parse::<u32>().expect("seconds")),
        "{seconds}"
    );

    let narrow = [("x-api-key", "narrow")];
    let long = with(
        chat(&[text("on and on")]),
        json!({"max_tokens": 3000, "stream": true}),
    );
    let long = long.to_string();
    let request = Request {
        method: "POST",
        path: "/v1/chat/completions",
        headers: &narrow,
        body: long.as_bytes(),
    };
    let mut stream = client::open(server.address, &request);
    stream.piece().expect("it has begun");
    let refused = ask(&server, &narrow);
    refused.error(429);
    assert!(refused.header("retry-after").is_some());
    ask(&server, &[("x-api-key", "free")]).ok();
    drop(stream);
    until("its place is free again", || {
        (ask(&server, &narrow).status == 200).then_some(())
    });
}

#[test]
fn a_web_page_may_ask_only_from_a_listed_origin() {
    let config = format!(
        "[access]\ncors_origins = [\"https://a.example\"]\n{}",
        key("alice", "one", "")
    );
    let server = Server::start_with(&config);
    let path = "/v1/chat/completions";
    let preflight = |origin| {
        let asks = [
            ("origin", origin),
            ("access-control-request-method", "POST"),
            (
                "access-control-request-headers",
                "authorization,content-type",
            ),
        ];
        send(&server, "OPTIONS", path, &asks)
    };
    let granted = preflight("https://a.example");
    assert_eq!(granted.status, 204, "without a key: browsers send none");
    let allow = "access-control-allow-origin";
    assert_eq!(granted.header(allow), Some("https://a.example"));
    let allowed = granted.header("access-control-allow-headers");
    assert_eq!(allowed, Some("authorization,content-type"));
    let refused = preflight("https://b.example");
    assert_eq!((refused.status, refused.header(allow)), (403, None));

    let from = |origin| ask(&server, &[("origin", origin), ("x-api-key", "one")]);
    let answer = from("https://a.example");
    answer.ok();
    assert_eq!(answer.header(allow), Some("https://a.example"));
    assert_eq!(answer.header("vary"), Some("origin"));
    let refused = from("https://b.example");
    refused.error(403);
    assert_eq!(refused.header(allow), None);
    let own = format!("http://{}", server.address);
    from(&own).ok();
    let denied = ask(&server, &[("origin", "https://a.example")]);
    denied.error(401);
    assert_eq!(
        denied.header(allow),
        Some("https://a.example"),
        "errors too"
    );
}

#[test]
fn a_page_that_may_not_ask_is_told_so_in_its_dialect() {
    let server = Server::start();
    let asked = |path| {
        let answer = send(&server, "POST", path, &[("origin", "https://a.example")]);
        assert_eq!(answer.status, 403, "{path}");
        assert!(answer.header("x-request-id").is_some(), "{path}");
        answer.json()
    };
    asked("/v1/chat/completions")["error"]["message"]
        .as_str()
        .expect("a message");
    let claude = asked("/v1/messages");
    assert_eq!(claude["type"], "error", "{claude}");
    let ollama = asked("/api/chat");
    assert!(ollama["error"].is_string(), "{ollama}");
    let nobody = asked("/nothing/here");
    assert!(nobody["error"]["message"].is_string(), "{nobody}");
}

/// A page whose own name resolves to this machine asks as if it were the server's.
#[test]
fn without_keys_only_names_of_this_machine_are_asked() {
    let config = "[access]\nhosts = [\"visor.example\"]\n";
    only_names_of_this_machine_are_asked(&Server::start_with(config));
    // However the address it listens at is written.
    let folder = tempfile::tempdir().expect("a folder can be made");
    std::fs::write(folder.path().join("visor.toml"), config).expect("written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_visor"));
    command.args(["serve", "--listen", "localhost:0", "--config", "visor.toml"]);
    let server = Server::spawn(command, folder);
    server.wait_ready();
    only_names_of_this_machine_are_asked(&server);
}

fn only_names_of_this_machine_are_asked(server: &Server) {
    let by = |host: &str| {
        let mut stream = TcpStream::connect(server.address).expect("the server accepts");
        let head = format!("GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        stream
            .write_all(head.as_bytes())
            .expect("the head is taken");
        Incoming::read_head(stream).finish().status
    };
    for (host, status) in [
        ("localhost:8080", 200),
        ("127.0.0.1", 200),
        ("[::1]:9", 200),
        ("visor.example:8080", 200),
        ("Visor.Example", 200),
        ("host.docker.internal:11434", 200),
        ("evil.example:8080", 403),
        ("localhost.evil.example", 403),
    ] {
        assert_eq!(by(host), status, "{host}");
    }
}

#[test]
fn ids_and_traces_are_taken_over_and_logged_as_json() {
    let server = Server::start_with("[server]\nlog_format = \"json\"\n");
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let answer = ask(
        &server,
        &[("x-request-id", "mine-1"), ("traceparent", trace)],
    );
    answer.ok();
    assert_eq!(answer.header("x-request-id"), Some("mine-1"));
    let line = until("the request is logged", || {
        let log = server.logged();
        let line = log.lines().find(|line| line.contains("mine-1"))?;
        serde_json::from_str::<serde_json::Value>(line).ok()
    });
    let fields = &line["fields"];
    assert_eq!(fields["request"], "mine-1", "{line}");
    assert_eq!(fields["traceparent"], trace, "{line}");
    let broken = ask(
        &server,
        &[("x-request-id", "no good"), ("traceparent", "x")],
    );
    broken.ok();
    let id = broken.header("x-request-id").expect("a fresh one");
    assert!(id.starts_with("req-"), "{id}");
    let log = server.wait_logged("ready on");
    for line in log.lines() {
        let read = serde_json::from_str::<serde_json::Value>(line);
        assert!(read.is_ok_and(|line| line.is_object()), "{line}");
    }
}

#[test]
fn an_open_address_without_keys_is_warned_of() {
    let open = |config: &str| {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("visor.toml"), config).expect("written");
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_visor"));
        command.args(["serve", "--listen", "0.0.0.0:0"]);
        let server = Server::spawn(command, folder);
        server.wait_logged("is served by")
    };
    let says = "everybody who can reach this address may ask";
    assert!(open("").contains(says));
    assert!(!open(&key("alice", "one", "")).contains(says));
    let loopback = Server::start().wait_logged("is served by");
    assert!(!loopback.contains(says));
}
