//! Pictures by address: off unless configured, and never a way into the network the server stands in.

use std::io::ErrorKind;
use std::net::TcpListener;

use crate::server::{Server, chat, pictures, shared};

fn ask(server: &Server, url: &str) -> crate::client::Answer {
    server.chat(&chat(&[pictures(&[url.to_owned()], "what?")]))
}

#[track_caller]
fn refused(server: &Server, url: &str, says: &str) {
    let error = ask(server, url).error(400);
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains(says), "{url}: {message}");
    let param = error["param"].as_str().expect("the picture is named");
    assert!(param.contains("messages[0].content[0]"), "{param}");
}

#[test]
fn nothing_is_fetched_or_read_unless_a_key_says_so() {
    let server = shared();
    refused(&server, "https://example.org/a.png", "images.fetch.https");
    refused(&server, "http://127.0.0.1:1/a.png", "images.fetch.http");
    // These the adapter refuses by itself.
    refused(&server, "file:///etc/passwd", "data: URL");
    refused(&server, "/etc/passwd", "data: URL");
}

#[test]
fn a_request_may_name_so_many_pictures_to_fetch() {
    let config = "[images.fetch]\nhttp = true\nhosts = [\"*\"]\nper_request_max = 2\n";
    let server = Server::start_with(config);
    // The third is counted before the first, which is not to be had, is asked for.
    let urls: Vec<String> = (0..3).map(|n| format!("http://10.0.0.{n}/")).collect();
    let ask = |urls: &[String]| server.chat(&chat(&[pictures(urls, "what?")])).error(400);
    let text = |error: serde_json::Value| error["message"].as_str().expect("a message").to_owned();
    assert!(text(ask(&urls[..2])).contains("could not be fetched"));
    assert!(text(ask(&urls)).contains("images.fetch.per_request_max"));
}

#[test]
fn with_everything_allowed_a_listener_on_this_machine_hears_nothing() {
    let victim = TcpListener::bind("127.0.0.1:0").expect("a port");
    victim.set_nonblocking(true).expect("set");
    let port = victim.local_addr().expect("bound").port();
    let config = format!(
        "[images.fetch]\nhttps = true\nhttp = true\nhosts = [\"*\"]\nports = [{port}, 80, 443]\ntimeout_s = 5\n"
    );
    let server = Server::start_with(&config);
    for host in [
        "127.0.0.1",
        "localhost",
        "LOCALHOST.",
        "127.1",
        "2130706433",
        "0x7f000001",
        "017700000001",
        "0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "10.0.0.1",
        "169.254.169.254",
        "100.64.0.1",
    ] {
        for scheme in ["http", "https"] {
            let url = format!("{scheme}://{host}:{port}/a.png");
            refused(&server, &url, "could not be fetched");
        }
    }
    server.wait_logged("127.0.0.1:");
    server.wait_logged("is not public (loopback)");
    let url = format!("http://example.org@127.0.0.1:{port}/a.png");
    refused(&server, &url, "a user or password");
    refused(&server, "http://127.0.0.1:22/", "images.fetch.ports");
    let heard = victim.accept().map(|_| ()).map_err(|error| error.kind());
    assert_eq!(heard, Err(ErrorKind::WouldBlock));
}
