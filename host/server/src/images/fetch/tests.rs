//! What is fetched, and a list of attacks after which a listener on this machine has heard nothing.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread::{self, JoinHandle};

use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::*;
use crate::config::ImagesConfig;

pub(super) const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Spellings of this machine, and of networks a server may stand in.
const HERE_AND_INSIDE: [&str; 45] = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "017700000001",
    "0177.0.0.01",
    "0x7f.0.0.0x1",
    "127.0.0.1.",
    "①②⑦.⓪.⓪.①",
    "0",
    "0.0.0.0",
    "127.255.255.254",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "240.0.0.1",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[::127.0.0.1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:0:127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2002:7f00:0001::1]",
    "[2001:0:7f00:1::]",
    "[fe80::1]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[fec0::1]",
    "[ff02::1]",
    "[2001:db8::1]",
    "[3fff::1]",
    "[100::1]",
];

/// A listener that must not be reached.
struct Victim(TcpListener);

impl Victim {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        Self(listener)
    }

    fn port(&self) -> u16 {
        self.0.local_addr().unwrap().port()
    }

    #[track_caller]
    fn assert_untouched(&self, after: &str) {
        // A connection would be in the backlog by the time a fetch has returned.
        let heard = self.0.accept().map(|_| ()).map_err(|error| error.kind());
        assert_eq!(heard, Err(ErrorKind::WouldBlock), "{after}");
    }
}

/// A server that answers one connection after the other with these bytes, and keeps the requests.
pub(super) struct Pictures {
    pub(super) port: u16,
    serving: JoinHandle<Vec<String>>,
}

impl Pictures {
    pub(super) fn answering(answers: &[&[u8]]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let answers: Vec<Vec<u8>> = answers.iter().map(|answer| answer.to_vec()).collect();
        let serve = move |answer: &Vec<u8>| exchange(&mut listener.accept().unwrap().0, answer);
        let serving = thread::spawn(move || answers.iter().map(serve).collect());
        Self { port, serving }
    }

    pub(super) fn requests(self) -> Vec<String> {
        self.serving.join().unwrap()
    }
}

/// Reads one request head and answers it; a peer that hangs up early is no failure here.
fn exchange(stream: &mut (impl Read + Write), answer: &[u8]) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|read| read == 1) {
        head.push(byte[0]);
    }
    _ = stream.write_all(answer);
    _ = stream.flush();
    String::from_utf8(head).unwrap()
}

pub(super) fn ok(body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: {length}\r\n\r\n{body}")
        .into_bytes()
}

pub(super) fn redirect(to: &str) -> Vec<u8> {
    format!("HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n").into_bytes()
}

/// Everything that a key can allow, for these ports.
pub(super) fn open(ports: &[u16]) -> ImagesConfig {
    let fetch = FetchConfig {
        https: true,
        http: true,
        hosts: vec!["*".to_owned()],
        ports: ports.to_vec(),
        timeout_s: 5,
        ..FetchConfig::default()
    };
    ImagesConfig {
        fetch,
        ..ImagesConfig::default()
    }
}

pub(super) fn system() -> Fetcher {
    Fetcher::system(&FetchConfig::default())
}

/// A fetcher whose names all have these addresses, judged as in service.
pub(super) fn naming(addresses: &[IpAddr]) -> Fetcher {
    let addresses = addresses.to_vec();
    Fetcher {
        names: Names::new(1, move |_| Ok(addresses.clone())),
        ..system()
    }
}

/// A fetcher whose names are all this machine's, and for which this one port of it is public.
pub(super) fn trusting_port(port: u16) -> Fetcher {
    Fetcher {
        judge: Box::new(move |address| {
            let (ip, trusted) = (address.ip(), address.port() == port);
            if ip == LOOPBACK && trusted {
                Ok(())
            } else {
                address::public(ip)
            }
        }),
        ..naming(&[LOOPBACK])
    }
}

pub(super) fn fetch(
    fetcher: &Fetcher,
    url: &str,
    images: &ImagesConfig,
) -> Result<Bytes, FetchError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let _entered = runtime.enter();
    let patience = Patience {
        deadline: Instant::now() + Duration::from_secs(60),
        gone: &|| false,
    };
    fetcher.fetch(url, (&images.fetch, images.bytes_max), &patience)
}

#[track_caller]
fn refused(answer: Result<Bytes, FetchError>, says: &str) {
    match answer {
        Err(FetchError::Refused(why)) => assert!(why.contains(says), "{why}"),
        other => panic!("not refused for `{says}`: {other:?}"),
    }
}

/// The log is told; the client is not, which `images` sees to.
#[track_caller]
fn unreached(answer: Result<Bytes, FetchError>, says: &str) {
    match answer {
        Err(FetchError::Unreached { why, .. }) => assert!(why.contains(says), "{why}"),
        other => panic!("not given up for `{says}`: {other:?}"),
    }
}

#[test]
fn a_listed_host_is_asked_plainly_and_its_bytes_come_back() {
    let pictures = Pictures::answering(&[&ok("bytes")]);
    let port = pictures.port;
    let url = format!("http://Pictures.example:{port}/a%20b.png?x=1#fragment");
    let mut images = open(&[port]);
    images.fetch.hosts = vec!["*.example".to_owned()];
    assert_eq!(fetch(&trusting_port(port), &url, &images).unwrap(), "bytes");
    let requests = pictures.requests();
    let request = &requests[0];
    assert!(
        request.starts_with("GET /a%20b.png?x=1 HTTP/1.1\r\n"),
        "{request}"
    );
    assert!(
        request.contains(&format!("host: pictures.example:{port}\r\n")),
        "{request}"
    );
    for secret in ["authorization", "cookie", "referer"] {
        assert!(!request.contains(secret), "{request}");
    }
}

#[test]
fn no_spelling_of_this_machine_is_connected_to() {
    let victim = Victim::new();
    let port = victim.port();
    let images = open(&[port]);
    for host in HERE_AND_INSIDE {
        for scheme in ["http", "https"] {
            let url = format!("{scheme}://{host}:{port}/a.png");
            unreached(fetch(&system(), &url, &images), "not public");
            victim.assert_untouched(&url);
        }
    }
    for url in [
        format!("http://pictures.example@127.0.0.1:{port}/"),
        format!("http://pictures.example:80@127.0.0.1:{port}/"),
        format!("http://127.0.0.1:{port}:80/"),
        format!("http://[::1%25lo]:{port}/"),
        format!("http://[127.0.0.1]:{port}/"),
        format!("http://127.0.0.1%00.example:{port}/"),
        format!("http://0x7f.0.0.256:{port}/"),
        format!(r"http:\\127.0.0.1:{port}\"),
        format!("http:127.0.0.1:{port}/"),
        format!("http:///127.0.0.1:{port}/"),
    ] {
        let answer = fetch(&system(), &url, &images);
        assert!(
            matches!(
                answer,
                Err(FetchError::Refused(_) | FetchError::Unreached { .. })
            ),
            "{url}: {answer:?}"
        );
        victim.assert_untouched(&url);
    }
}

#[test]
fn a_name_is_as_good_as_the_worst_of_its_addresses() {
    let victim = Victim::new();
    let pictures = TcpListener::bind("127.0.0.1:0").unwrap();
    let images = open(&[victim.port()]);
    let public: IpAddr = "93.184.216.34".parse().unwrap();
    let bad = [
        "127.0.0.1",
        "0.0.0.0",
        "10.0.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "::1",
        "::ffff:127.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2001:0:7f00:1::",
        "fe80::1",
        "fd00::1",
        "ff02::1",
        "::",
    ];
    for bad in bad {
        let bad: IpAddr = bad.parse().unwrap();
        for addresses in [&[bad][..], &[public, bad], &[bad, public]] {
            let url = format!("http://localtest.example:{}/", victim.port());
            unreached(fetch(&naming(addresses), &url, &images), "not public");
            victim.assert_untouched(&url);
        }
    }
    // The system's own names too, whatever it makes of them.
    for name in ["localhost", "LOCALHOST.", "a.localhost"] {
        let url = format!("http://{name}:{}/", victim.port());
        let answer = fetch(&system(), &url, &images);
        assert!(
            matches!(answer, Err(FetchError::Unreached { .. })),
            "{answer:?}"
        );
        victim.assert_untouched(&url);
    }
    unreached(
        fetch(&naming(&[]), "http://none.example:80/", &open(&[80])),
        "no address",
    );
    drop(pictures);
}

#[test]
fn a_name_is_looked_up_once_for_each_connection_and_pinned() {
    let victim = Victim::new();
    let again = format!("http://rebind.example:{}/b.png", victim.port());
    let pictures = Pictures::answering(&[&ok("once"), &redirect(&again)]);
    let (port, looked_up) = (pictures.port, Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&looked_up);
    let fetcher = Fetcher {
        names: Names::new(1, move |_| {
            counted.fetch_add(1, SeqCst);
            Ok(vec![LOOPBACK])
        }),
        ..trusting_port(port)
    };
    let images = open(&[port, victim.port()]);
    let url = format!("http://rebind.example:{port}/a.png");
    assert_eq!(fetch(&fetcher, &url, &images).unwrap(), "once");
    assert_eq!(
        looked_up.load(SeqCst),
        1,
        "checked and connected to are one answer"
    );
    unreached(fetch(&fetcher, &url, &images), "not public");
    assert_eq!(
        looked_up.load(SeqCst),
        3,
        "every hop is looked up and judged anew"
    );
    victim.assert_untouched("rebinding");
    pictures.requests();
}

#[test]
fn every_redirect_is_checked_like_the_first_address() {
    let victim = Victim::new();
    let local = victim.port();
    let cases = [
        (format!("http://127.0.0.1:{local}/"), "not public"),
        (format!("http://2130706433:{local}/"), "not public"),
        (format!("//127.0.0.1:{local}/"), "not public"),
        (format!("http://[::1]:{local}/"), "not public"),
        (format!("https://[64:ff9b::7f00:1]:{local}/"), "not public"),
        (format!("http://inside.example:{local}/"), "not public"),
        (
            format!("http://x@inside.example:{local}/"),
            "a user or password",
        ),
        ("http://inside.example:1/".to_owned(), "images.fetch.ports"),
        ("file:///etc/passwd".to_owned(), "not a scheme"),
        ("gopher://127.0.0.1/".to_owned(), "not a scheme"),
        ("http://".to_owned(), "redirects to no URL"),
    ];
    for (location, says) in cases {
        let pictures = Pictures::answering(&[&redirect(&location)]);
        let port = pictures.port;
        let url = format!("http://pictures.example:{port}/");
        let answer = fetch(&trusting_port(port), &url, &open(&[port, local]));
        match says {
            "not public" => unreached(answer, says),
            _ => refused(answer, says),
        }
        victim.assert_untouched(&location);
        pictures.requests();
    }
}

#[test]
fn redirects_are_followed_within_their_number_and_the_list_of_hosts() {
    let moved = redirect("/elsewhere.png");
    let pictures = Pictures::answering(&[&moved, &moved, &moved, &ok("found")]);
    let port = pictures.port;
    let url = format!("http://pictures.example:{port}/a.png");
    let images = open(&[port]);
    assert_eq!(fetch(&trusting_port(port), &url, &images).unwrap(), "found");
    assert!(pictures.requests()[3].starts_with("GET /elsewhere.png "));

    let pictures = Pictures::answering(&[&moved, &moved, &moved, &moved]);
    let port = pictures.port;
    let url = format!("http://pictures.example:{port}/a.png");
    refused(
        fetch(&trusting_port(port), &url, &open(&[port])),
        "redirects more than 3 times (images.fetch.redirects_max)",
    );
    pictures.requests();

    let pictures = Pictures::answering(&[&redirect("http://other.example/")]);
    let port = pictures.port;
    let mut images = open(&[port, 80]);
    images.fetch.hosts = vec!["pictures.example".to_owned()];
    let url = format!("http://pictures.example:{port}/a.png");
    refused(
        fetch(&trusting_port(port), &url, &images),
        "images.fetch.hosts",
    );
    pictures.requests();
}

#[test]
fn the_byte_limit_holds_whatever_length_is_announced() {
    let announced = b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n".to_vec();
    let chunk = format!("800\r\n{}\r\n", "x".repeat(2048));
    let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    let endless = format!("{head}{}", chunk.repeat(10)).into_bytes();
    let unframed = [b"HTTP/1.0 200 OK\r\n\r\n".to_vec(), vec![b'x'; 10_000]].concat();
    for answer in [announced, endless, unframed] {
        let pictures = Pictures::answering(&[&answer]);
        let port = pictures.port;
        let images = ImagesConfig {
            bytes_max: 5000,
            ..open(&[port])
        };
        let url = format!("http://pictures.example:{port}/");
        let got = fetch(&trusting_port(port), &url, &images);
        assert!(matches!(got, Err(FetchError::TooLarge(_))), "{got:?}");
        pictures.requests();
    }
}

#[test]
fn what_is_no_answer_is_refused_with_the_reason() {
    let encoded = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 1\r\n\r\nx";
    let long = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "x".repeat(64 << 10));
    let cases: [(&[u8], &str); 6] = [
        (
            b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
            "with 404",
        ),
        (
            b"HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n",
            "with 302",
        ),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "proper HTTP"),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort",
            "proper HTTP",
        ),
        (encoded, "compressed"),
        (long.as_bytes(), "proper HTTP"),
    ];
    for (answer, says) in cases {
        let pictures = Pictures::answering(&[answer]);
        let port = pictures.port;
        let url = format!("http://pictures.example:{port}/");
        let answer = fetch(&trusting_port(port), &url, &open(&[port]));
        match says {
            "proper HTTP" => unreached(answer, says),
            _ => refused(answer, says),
        }
        pictures.requests();
    }
    let port = Victim::new().port();
    let url = format!("http://pictures.example:{port}/");
    unreached(
        fetch(&trusting_port(port), &url, &open(&[port])),
        "no connection to port",
    );
}

#[test]
fn a_server_that_drips_is_left_and_so_is_a_client_that_left() {
    // Accepts by itself and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let url = format!("http://pictures.example:{port}/");
    let mut images = open(&[port]);
    images.fetch.timeout_s = 1;
    let began = Instant::now();
    unreached(
        fetch(&trusting_port(port), &url, &images),
        "images.fetch.timeout_s",
    );
    assert!(began.elapsed() < Duration::from_secs(4));

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _entered = runtime.enter();
    let looks = Mutex::new(0);
    let patience = Patience {
        deadline: Instant::now() + Duration::from_secs(60),
        gone: &|| {
            let mut looks = looks.lock().unwrap();
            *looks += 1;
            *looks > 2
        },
    };
    let images = open(&[port]);
    let got = trusting_port(port).fetch(&url, (&images.fetch, 1), &patience);
    assert_eq!(got, Err(FetchError::Gone));
}

/// A server with a certificate for `pictures.example`, and a fetcher that trusts it.
pub(super) fn tls_pictures(answer: Vec<u8>) -> (u16, Fetcher, JoinHandle<()>) {
    let made = rcgen::generate_simple_self_signed(["pictures.example".to_owned()]).unwrap();
    let certificate: CertificateDer<'static> = made.cert.der().clone();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], key)
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let serving = thread::spawn(move || {
        let connection = ServerConnection::new(Arc::new(config)).unwrap();
        let stream = listener.accept().unwrap().0;
        let mut stream = StreamOwned::new(connection, stream);
        exchange(&mut stream, &answer);
        stream.conn.send_close_notify();
        _ = stream.flush();
    });
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    let fetcher = Fetcher {
        trust: OnceLock::from(trusting(roots)),
        ..trusting_port(port)
    };
    (port, fetcher, serving)
}

#[test]
fn https_needs_a_trusted_certificate_of_the_very_host() {
    let (port, fetcher, serving) = tls_pictures(ok("sealed"));
    let url = format!("https://pictures.example:{port}/");
    assert_eq!(fetch(&fetcher, &url, &open(&[port])).unwrap(), "sealed");
    serving.join().unwrap();

    let (port, fetcher, serving) = tls_pictures(ok("sealed"));
    let url = format!("https://other.example:{port}/");
    unreached(
        fetch(&fetcher, &url, &open(&[port])),
        "no trusted connection",
    );
    serving.join().unwrap();

    let (port, _, serving) = tls_pictures(ok("sealed"));
    let (_, stranger, _) = tls_pictures(Vec::new());
    let stranger = Fetcher {
        trust: stranger.trust,
        ..trusting_port(port)
    };
    let url = format!("https://pictures.example:{port}/");
    unreached(
        fetch(&stranger, &url, &open(&[port])),
        "no trusted connection",
    );
    serving.join().unwrap();
}
