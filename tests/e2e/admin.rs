//! The admin listener: on its own address, for whoever runs the server.

use std::net::SocketAddr;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::client::{self, Answer, Request};
use crate::server::{Server, chat, data_url, fixture, pictures, text, until};

const ON: &str = "[admin]\nlisten = \"127.0.0.1:0\"\n";

/// A ready server with an admin listener, and where that is.
fn administered(config: &str) -> (Server, SocketAddr) {
    let server = Server::start_with(config);
    // Written before the server is ready, and read here by a thread that may be behind.
    let log = server.wait_logged("administered at http://");
    let (_, rest) = log.split_once("administered at http://").expect("told");
    let address = rest.split_whitespace().next().expect("an address");
    (server, address.parse().expect("an address"))
}

fn send(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
    let request = Request {
        method,
        path,
        headers,
        body: b"",
    };
    client::send(address, &request)
}

#[test]
fn plugins_are_listed_and_reloaded_when_asked() {
    let (server, admin) = administered(&format!("{ON}[plugins]\npoll_s = 0\n"));
    let listed = send(admin, "GET", "/plugins", &[]).ok();
    let ids: Vec<&Value> = listed["plugins"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|one| &one["id"])
        .collect();
    for shipped in ["openai", "phi3", "hd", "lru"] {
        assert!(ids.contains(&&json!(shipped)), "{listed}");
    }
    server.install("hd", &fixture("tests/guests/built/hd-one.wasm"));
    let config = format!("{ON}[plugins]\npoll_s = 0\n[images]\ncount_max = 2\n");
    std::fs::write(server.folder().join("visor.toml"), config).expect("written");
    let after = send(admin, "POST", "/reload", &[]).ok();
    assert!(
        after["wiring"]["revision"].as_u64() > listed["wiring"]["revision"].as_u64(),
        "{after}"
    );
    assert_ne!(
        after["plugins"], listed["plugins"],
        "the new one is in service already"
    );
    std::fs::write(
        server.folder().join("visor.toml"),
        "[images]\ncount_max = -1\n",
    )
    .expect("written");
    let refused = send(admin, "POST", "/reload", &[]).ok();
    let why = refused["config"]["last_error"].as_str().expect("a reason");
    assert!(why.contains("count_max"), "{why}");
}

#[test]
fn a_server_steps_aside_and_back_and_serves_on() {
    let (server, admin) = administered(ON);
    assert_eq!(send(admin, "POST", "/drain", &[]).ok()["ready"], false);
    assert_eq!(server.get("/ready").status, 503);
    server.chat(&chat(&[text("still served")])).ok();
    assert_eq!(send(admin, "DELETE", "/drain", &[]).ok()["ready"], true);
    assert_eq!(server.get("/ready").status, 200);
}

#[test]
fn caches_are_emptied() {
    let (server, admin) = administered(ON);
    let photo = data_url("image/jpeg", &fixture("tests/photos/cat.jpg"));
    server
        .chat(&chat(&[pictures(&[photo], "What is this?")]))
        .ok();
    let entries = || {
        let caches = &server.stats()["caches"];
        ["pixels", "features", "responses", "prefixes"]
            .map(|cache| caches[cache]["entries"].as_u64().expect("a number"))
    };
    until("everything is kept", || {
        entries().iter().all(|&count| count > 0).then_some(())
    });
    send(admin, "POST", "/caches/reset", &[]).ok();
    assert_eq!(entries(), [0; 4]);
}

#[test]
fn nobody_else_administers() {
    let hex = |key: &str| -> String {
        let digest: [u8; 32] = Sha256::digest(key).into();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    };
    let (root, client) = (hex("admin"), hex("client"));
    let keys = format!(
        "{ON}[[access.keys]]\nname = \"root\"\nsha256 = \"{root}\"\nadmin = true\n\
         [[access.keys]]\nname = \"client\"\nsha256 = \"{client}\"\n"
    );
    let (server, admin) = administered(&keys);
    send(admin, "POST", "/drain", &[]).error(401);
    send(admin, "POST", "/drain", &[("x-api-key", "neither")]).error(401);
    let known = send(admin, "POST", "/drain", &[("x-api-key", "client")]);
    assert_eq!(known.status, 403, "the key is good, and not for this");
    assert_eq!(server.get("/ready").status, 200);
    send(admin, "GET", "/plugins", &[("x-api-key", "admin")]).ok();
    let page = [("x-api-key", "admin"), ("origin", "http://localhost:3000")];
    assert_eq!(send(admin, "POST", "/drain", &page).status, 403);
    for path in ["/plugins", "/reload", "/drain", "/caches/reset"] {
        let there = client::send(
            server.address,
            &Request {
                method: "POST",
                path,
                headers: &[("x-api-key", "admin")],
                body: b"",
            },
        );
        assert_eq!(there.status, 404, "{path} is not where clients are");
    }
}
