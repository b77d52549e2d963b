//! Pictures by address: off unless configured, and never a way into the network the server stands in.

use std::io::ErrorKind;
use std::net::TcpListener;

use serde_json::json;

use crate::chat::content;
use crate::dialects::model;
use crate::server::{Server, chat, data_url, fixture, pictures, shared, with};

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
    refused(&server, "file:///etc/passwd", "images.files_root");
    // This the adapter refuses by itself.
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
fn a_file_below_the_folder_of_the_configuration_is_a_picture_in_every_dialect() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path().canonicalize().expect("a path");
    let png = fixture("tests/photos/cat.png");
    std::fs::write(root.join("cat.png"), &png).expect("written");
    let server = Server::start_with(&format!(
        "[images]\nfiles_root = {:?}\n",
        root.display().to_string()
    ));
    let answer = |url: &str| {
        let body = chat(&[pictures(&[url.to_owned()], "what is this?")]);
        content(
            &server
                .chat(&with(body, json!({"max_tokens": 8, "temperature": 0})))
                .ok(),
        )
    };
    let url = format!("file://{}/cat.png", root.display());
    let expected = answer(&data_url("image/png", &png));
    assert_eq!(answer(&url), expected);
    let parts = json!([{"type": "image", "source": {"type": "url", "url": url}}, {"type": "text", "text": "what is this?"}]);
    let body = json!({"model": model(), "max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": parts}]});
    let message = server
        .send("POST", "/v1/messages", body.to_string().as_bytes())
        .ok();
    assert_eq!(message["content"][0]["text"], json!(expected));
    let part = json!([{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "what is this?"}]);
    let body = json!({"input": [{"role": "user", "content": part}], "max_output_tokens": 8, "temperature": 0});
    let response = server
        .send("POST", "/v1/responses", body.to_string().as_bytes())
        .ok();
    assert_eq!(response["output"][0]["content"][0]["text"], json!(expected));
    let message = json!({"role": "user", "content": "what is this?", "images": [url]});
    let body = json!({"model": model(), "messages": [message], "stream": false, "options": {"num_predict": 8, "temperature": 0}});
    let told = server
        .send("POST", "/api/chat", body.to_string().as_bytes())
        .ok();
    assert_eq!(told["message"]["content"], json!(expected));

    refused(&server, "file:///etc/passwd", "images.files_root");
    let missing = format!("file://{}/dog.png", root.display());
    refused(&server, &missing, "no such file");
    let up = format!("file://{}/../cat.png", root.display());
    refused(&server, &up, "images.files_root");
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
