//! Sealed connections, with a certificate made for the test.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::server::{Server, chat, text, until, with};

const KEYS: &str =
    "[server]\ntls_cert_file = \"cert.pem\"\ntls_key_file = \"key.pem\"\nhead_read_timeout_s = 1\n";

/// Writes a certificate for `visor.example` and its key into a folder.
fn certify(folder: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(["visor.example".to_owned()]).expect("made");
    fs::write(folder.join("cert.pem"), made.cert.pem()).expect("written");
    fs::write(folder.join("key.pem"), made.signing_key.serialize_pem()).expect("written");
    made.cert.der().clone()
}

/// A server with TLS, and the certificate it shows.
fn sealed() -> (Server, CertificateDer<'static>) {
    let mut certificate = None;
    let server = Server::launch(KEYS, |folder| certificate = Some(certify(folder)));
    (server, certificate.expect("launching prepares the folder"))
}

fn ask(
    server: &Server,
    trusted: &CertificateDer<'static>,
    request: &str,
) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).expect("a certificate");
    let config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("visor.example").expect("a name");
    let connection = ClientConnection::new(Arc::new(config), name).expect("a client");
    let stream = TcpStream::connect(server.address).expect("the server accepts");
    let mut stream = StreamOwned::new(connection, stream);
    stream.write_all(request.as_bytes())?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
}

#[test]
fn with_a_certificate_everything_is_sealed() {
    let (server, certificate) = sealed();
    until("it is ready", || {
        let said = ask(&server, &certificate, &get("/ready")).expect("a proper end");
        said.starts_with("HTTP/1.1 200").then_some(())
    });
    let body = with(chat(&[text("hello")]), json!({"stream": true})).to_string();
    let post = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let said = ask(&server, &certificate, &post).expect("a proper end");
    assert!(said.contains("data: [DONE]"), "{said}");

    let folder = tempfile::tempdir().expect("a folder");
    let stranger = certify(folder.path());
    let refused = ask(&server, &stranger, &get("/health")).expect_err("not who it says");
    assert!(refused.to_string().contains("certificate"), "{refused}");
}

#[test]
fn what_does_not_speak_tls_is_sent_away() {
    let (server, certificate) = sealed();
    for says in [get("/health").as_bytes(), b"", b"\x16\x03\x01"] {
        let mut stream = TcpStream::connect(server.address).expect("the server accepts");
        let patience = Some(Duration::from_secs(8));
        stream.set_read_timeout(patience).expect("set");
        stream.write_all(says).expect("sent");
        let mut said = Vec::new();
        match stream.read_to_end(&mut said) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
        assert!(!said.starts_with(b"HTTP"), "{said:?}");
    }
    ask(&server, &certificate, &get("/health")).expect("the next client is served");
}

#[test]
fn a_certificate_that_cannot_be_used_is_told_at_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str| folder.path().join(name);
    fs::write(file("visor.toml"), KEYS).expect("written");
    let said = || {
        let run = Command::new(env!("CARGO_BIN_EXE_visor"))
            .args(["serve", "--listen", "127.0.0.1:0"])
            .current_dir(folder.path())
            .output()
            .expect("it runs");
        assert!(!run.status.success());
        String::from_utf8_lossy(&run.stderr).into_owned()
    };
    assert!(
        said().contains("server.tls_cert_file = cert.pem"),
        "{}",
        said()
    );
    certify(folder.path());
    fs::remove_file(file("key.pem")).expect("it was there");
    assert!(
        said().contains("server.tls_key_file = key.pem"),
        "{}",
        said()
    );
    let other = tempfile::tempdir().expect("a folder");
    certify(other.path());
    fs::copy(other.path().join("key.pem"), file("key.pem")).expect("copied");
    assert!(said().contains("cannot be used"), "{}", said());
    fs::write(
        file("visor.toml"),
        "[server]\ntls_cert_file = \"cert.pem\"\n",
    )
    .expect("written");
    assert!(said().contains("together, or neither"), "{}", said());
}
