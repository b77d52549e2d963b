//! A client that shows the raw bytes: no library stands between the tests and the socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// Longest any single read or write may take before a test is called hung.
const PATIENCE: Duration = Duration::from_secs(120);

/// A body that is more than sockets hold: a server that reads none of it breaks off who writes all of it first.
pub const MUCH: &[u8] = &[b' '; 24 << 20];

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// Body, transfer encoding undone.
    pub body: Vec<u8>,
}

impl Answer {
    /// Value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    /// Body as text.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("the body is UTF-8")
    }

    /// Body as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| {
            panic!(
                "status {}: {error}: {}",
                self.status,
                String::from_utf8_lossy(&self.body)
            )
        })
    }

    /// The body as JSON, when the status is 200.
    #[track_caller]
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }

    /// The error object, after checking that it has the status and all four keys.
    #[track_caller]
    pub fn error(&self, status: u16) -> Value {
        assert_eq!(
            self.status,
            status,
            "{}",
            String::from_utf8_lossy(&self.body)
        );
        let json = self.json();
        let error = json["error"]
            .as_object()
            .unwrap_or_else(|| panic!("no error object: {json}"));
        for key in ["message", "type", "param", "code"] {
            assert!(error.contains_key(key), "{key} is missing: {json}");
        }
        assert!(!error["message"].as_str().expect("a message").is_empty());
        let content_type = self.header("content-type").unwrap_or("");
        assert!(
            content_type.starts_with("application/json"),
            "{content_type}"
        );
        json["error"].clone()
    }
}

fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers
        .iter()
        .find(|(key, _)| key == name)
        .map(|(_, value)| value.as_str())
}

/// One request on a connection of its own.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// Method.
    pub method: &'a str,
    /// Path and query.
    pub path: &'a str,
    /// Headers beside Host and Content-Length.
    pub headers: &'a [(&'a str, &'a str)],
    /// Body.
    pub body: &'a [u8],
}

/// An answer whose body is still coming.
pub struct Incoming {
    reader: BufReader<TcpStream>,
    /// Status code.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    chunked: bool,
    /// Bytes still to come of a body with a length.
    left: usize,
    ended: bool,
}

/// Sends a request and reads the head of its answer.
pub fn open(address: SocketAddr, request: &Request<'_>) -> Incoming {
    // A server that has seen enough may answer before the body is through; the answer counts.
    let (stream, _) = write(address, request);
    Incoming::read_head(stream)
}

/// Sends a request and reads its whole answer.
pub fn send(address: SocketAddr, request: &Request<'_>) -> Answer {
    open(address, request).finish()
}

/// As [`send`], by a client that reads nothing before all of its body is taken, as most do.
#[track_caller]
pub fn send_all(address: SocketAddr, request: &Request<'_>) -> Answer {
    let (stream, sent) = write(address, request);
    sent.expect("the whole body is taken");
    Incoming::read_head(stream).finish()
}

/// Writes a request to a connection of its own, and how far its body came.
fn write(address: SocketAddr, request: &Request<'_>) -> (TcpStream, std::io::Result<()>) {
    let mut stream = TcpStream::connect(address).expect("the server accepts");
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("a timeout can be set");
    stream
        .set_write_timeout(Some(PATIENCE))
        .expect("a timeout can be set");
    stream.set_nodelay(true).expect("TCP_NODELAY can be set");
    let mut head = format!(
        "{} {} HTTP/1.1\r\nhost: {address}\r\n",
        request.method, request.path
    );
    for (name, value) in request.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if !request.body.is_empty() || request.method == "POST" {
        head.push_str(&format!("content-length: {}\r\n", request.body.len()));
    }
    head.push_str("connection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("the head is sent");
    let sent = stream.write_all(request.body);
    (stream, sent)
}

impl Incoming {
    /// Reads the head of whatever the server says next on a connection.
    pub fn read_head(stream: TcpStream) -> Self {
        let mut reader = BufReader::new(stream);
        let status_line = line(&mut reader);
        let status = status_line
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status line: {status_line:?}"));
        let mut headers = Vec::new();
        loop {
            let line = line(&mut reader);
            let Some((name, value)) = line.split_once(':') else {
                break;
            };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let chunked = header(&headers, "transfer-encoding") == Some("chunked");
        let left = header(&headers, "content-length")
            .map_or(0, |length| length.parse().expect("a length"));
        Self {
            reader,
            status,
            headers,
            chunked,
            left,
            ended: false,
        }
    }

    /// The next piece of the body as the server wrote it, or none at its proper end.
    ///
    /// Panics when the connection ends before the body does: that is a torn response.
    pub fn piece(&mut self) -> Option<Vec<u8>> {
        if self.ended {
            return None;
        }
        let length = if self.chunked {
            let size = line(&mut self.reader);
            usize::from_str_radix(&size, 16)
                .unwrap_or_else(|_| panic!("torn in the middle: {size:?}"))
        } else {
            std::mem::take(&mut self.left)
        };
        let mut piece = vec![0; length];
        self.reader
            .read_exact(&mut piece)
            .expect("the body is whole");
        if self.chunked {
            assert_eq!(line(&mut self.reader), "", "a chunk ends with a line break");
        }
        self.ended = length == 0 || !self.chunked;
        (length > 0).then_some(piece)
    }

    /// The rest of the body.
    pub fn finish(mut self) -> Answer {
        let mut body = Vec::new();
        while let Some(piece) = self.piece() {
            body.extend(piece);
        }
        Answer {
            status: self.status,
            headers: self.headers,
            body,
        }
    }
}

fn line(reader: &mut impl BufRead) -> String {
    let mut line = String::new();
    reader
        .read_line(&mut line)
        .expect("the server goes on talking");
    line.trim_end_matches("\r\n").to_owned()
}

/// The `data:` lines of a stream of server-sent events, after checking their framing.
#[track_caller]
pub fn events(answer: &Answer) -> Vec<String> {
    let text = answer.text();
    assert!(
        text.ends_with("\n\n"),
        "the last event is not ended: {text:?}"
    );
    text.trim_end_matches('\n')
        .split("\n\n")
        .filter(|event| !event.starts_with(':'))
        .map(|event| {
            let data = event
                .strip_prefix("data: ")
                .unwrap_or_else(|| panic!("not a data event: {event:?}"));
            assert!(!data.contains('\n'), "two lines in one event: {event:?}");
            data.to_owned()
        })
        .collect()
}

/// The JSON chunks of a finished chat stream, `[DONE]` checked and taken off.
#[track_caller]
pub fn chunks(answer: &Answer) -> Vec<Value> {
    let mut events = events(answer);
    assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{}", answer.text());
    events
        .iter()
        .map(|event| serde_json::from_str(event).expect("a chunk is JSON"))
        .collect()
}

/// The text that the deltas of a stream add up to.
pub fn joined(chunks: &[Value]) -> String {
    chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect()
}
