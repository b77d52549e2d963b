//! Pictures over HTTP, without letting a client choose what this server talks to.
//!
//! One hop is: check the URL, look its host up once, check every address, connect to one of exactly
//! these, ask, read under limits. A redirect starts over with the first check. There is no proxy, no
//! cookie, no connection kept for later: what is not there cannot be led astray.

use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{self, HeaderValue};
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tokio_util::task::AbortOnDropHandle;
use url::Host;

use super::address;
use super::lookup::Names;
use super::permit::{self, Target};
use crate::config::FetchConfig;

/// Largest head of an answer, in bytes: what hyper needs at least, and room for long cookies.
const HEAD_BYTES_MAX: usize = 32 << 10;
/// Most headers of an answer.
const HEADERS_MAX: usize = 100;
/// How long one address may take to accept, so that the next one gets its turn.
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// How often a fetch looks whether its client has left.
const CLIENT_LOOK: Duration = Duration::from_millis(100);

/// What fetching needs of the world. The server has one, [`Fetcher::system`].
pub struct Fetcher {
    /// One for each image being fetched.
    places: Semaphore,
    /// Addresses of a name.
    names: Names,
    /// Whether an address may be connected to, or what it is instead.
    judge: Box<dyn Fn(SocketAddr) -> Result<(), &'static str> + Send + Sync>,
    /// Reads who is believed to be who they say.
    load_trust: Box<dyn Fn() -> Result<Arc<ClientConfig>, String> + Send + Sync>,
    /// What was read, when the first `https:` image came. A failure is not kept: certificates may be
    /// mounted or installed while the server runs.
    trust: OnceLock<Arc<ClientConfig>>,
}

/// Why there is no picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FetchError {
    /// A key forbids it, or a server that was reached has something else; the client is told.
    Refused(String),
    /// No server was reached, for whatever reason. The client is told that much: whether a name
    /// exists, where it leads and what listens there is what it might have asked for.
    Unreached {
        /// Which host, as an error calls it.
        host: String,
        /// What happened, for the log.
        why: String,
    },
    /// It is longer than `images.bytes_max`.
    TooLarge(String),
    /// So many were being fetched all the while that this one's turn did not come.
    Busy,
    /// The client has left.
    Gone,
}

/// When a fetch has to be over, whatever the server at the other end does.
pub struct Patience<'a> {
    /// The end of the request's own time.
    pub deadline: Instant,
    /// Whether the client has left.
    pub gone: &'a (dyn Fn() -> bool + Sync),
}

enum Hop {
    Picture(Bytes),
    Elsewhere(String),
}

impl Fetcher {
    /// Looks names up as the system does and connects to public addresses only.
    #[must_use]
    pub fn system(config: &FetchConfig) -> Self {
        Self {
            places: Semaphore::new(config.at_once_max),
            names: Names::system(config.lookups_max),
            judge: Box::new(|address| address::public(address.ip())),
            load_trust: Box::new(system_trust),
            trust: OnceLock::new(),
        }
    }

    /// The bytes behind a URL, at most `bytes_max` and not looked at. Blocks the thread, which must
    /// belong to a runtime.
    ///
    /// # Errors
    /// What is refused or went wrong, and which key it is about.
    pub fn fetch(
        &self,
        url: &str,
        (config, bytes_max): (&FetchConfig, u64),
        patience: &Patience<'_>,
    ) -> Result<Bytes, FetchError> {
        let target = permit::parse(url, config).map_err(FetchError::Refused)?;
        let host = target.name();
        let own = Duration::from_secs(config.timeout_s);
        let left = patience
            .deadline
            .saturating_duration_since(Instant::now())
            .min(own);
        let end = tokio::time::Instant::now() + left;
        let fetching = async {
            let place = tokio::time::timeout_at(end, self.places.acquire()).await;
            let _place = place.map_err(|_| FetchError::Busy)?;
            let followed =
                tokio::time::timeout_at(end, self.follow(target, config, bytes_max)).await;
            followed.unwrap_or_else(|_| {
                let seconds = left.as_secs();
                let why = format!("not done within {seconds} s (images.fetch.timeout_s)");
                Err(FetchError::Unreached { host, why })
            })
        };
        Handle::current().block_on(async {
            tokio::select! {
                got = fetching => got,
                () = until(patience.gone) => Err(FetchError::Gone),
            }
        })
    }

    async fn follow(
        &self,
        mut target: Target,
        config: &FetchConfig,
        bytes_max: u64,
    ) -> Result<Bytes, FetchError> {
        for _ in 0..=config.redirects_max {
            match self.hop(&target, config, bytes_max).await? {
                Hop::Picture(bytes) => return Ok(bytes),
                Hop::Elsewhere(location) => {
                    target = redirected(&target, &location, config)?;
                }
            }
        }
        Err(FetchError::Refused(format!(
            "the image URL redirects more than {} times (images.fetch.redirects_max)",
            config.redirects_max
        )))
    }

    async fn hop(
        &self,
        target: &Target,
        config: &FetchConfig,
        bytes_max: u64,
    ) -> Result<Hop, FetchError> {
        let addresses = self.addresses(target, config).await?;
        let stream = connect(target, &addresses).await?;
        if !target.tls {
            return ask(stream, target, bytes_max).await;
        }
        let connector = TlsConnector::from(self.trust().map_err(|why| unreached(target, why))?);
        let tls = connector.connect(server_name(target)?, stream).await;
        let stream =
            tls.map_err(|error| unreached(target, format!("no trusted connection: {error}")))?;
        ask(stream, target, bytes_max).await
    }

    fn trust(&self) -> Result<Arc<ClientConfig>, String> {
        if let Some(trust) = self.trust.get() {
            return Ok(Arc::clone(trust));
        }
        // Two at once read it twice; the first is kept.
        let trust = (self.load_trust)()?;
        Ok(Arc::clone(self.trust.get_or_init(|| trust)))
    }

    /// Every address of the host, all of which must be good: one bad one is a name that plays games.
    async fn addresses(
        &self,
        target: &Target,
        config: &FetchConfig,
    ) -> Result<Vec<SocketAddr>, FetchError> {
        let patience = Duration::from_secs(config.lookup_timeout_s);
        let found = match &target.host {
            Host::Ipv4(address) => vec![IpAddr::V4(*address)],
            Host::Ipv6(address) => vec![IpAddr::V6(*address)],
            Host::Domain(domain) => {
                let found = self.names.addresses(domain, patience).await;
                found.map_err(|error| unreached(target, format!("no address: {error}")))?
            }
        };
        if found.is_empty() {
            return Err(unreached(target, "no address"));
        }
        let with_port = found.into_iter().map(|ip| SocketAddr::new(ip, target.port));
        let found: Vec<SocketAddr> = with_port.collect();
        for address in &found {
            (self.judge)(*address)
                .map_err(|kind| unreached(target, format!("{address} is not public ({kind})")))?;
            let refused = &config.refused_networks;
            if let Some(network) = refused
                .iter()
                .find(|network| network.contains(&address.ip()))
            {
                let why = format!("{address} is in {network} (images.fetch.refused_networks)");
                return Err(unreached(target, why));
            }
        }
        Ok(found)
    }
}

fn unreached(target: &Target, why: impl Into<String>) -> FetchError {
    FetchError::Unreached {
        host: target.name(),
        why: why.into(),
    }
}

pub(super) async fn until(gone: &(dyn Fn() -> bool + Sync)) {
    while !gone() {
        tokio::time::sleep(CLIENT_LOOK).await;
    }
}

fn redirected(from: &Target, location: &str, config: &FetchConfig) -> Result<Target, FetchError> {
    let name = from.name();
    let url = from
        .url
        .join(location)
        .map_err(|error| FetchError::Refused(format!("{name} redirects to no URL: {error}")))?;
    permit::check(url, config)
        .map_err(|why| FetchError::Refused(format!("{name} redirects where it may not: {why}")))
}

/// Connects to one of these very addresses: nothing is looked up again.
async fn connect(target: &Target, addresses: &[SocketAddr]) -> Result<TcpStream, FetchError> {
    let mut why = "took too long to accept".to_owned();
    for address in addresses {
        match tokio::time::timeout(CONNECT_MAX, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => why = error.to_string(),
            Err(_) => {}
        }
    }
    let port = target.port;
    Err(unreached(
        target,
        format!("no connection to port {port}: {why}"),
    ))
}

fn server_name(target: &Target) -> Result<ServerName<'static>, FetchError> {
    match &target.host {
        Host::Domain(name) => ServerName::try_from(name.clone())
            .map_err(|_| unreached(target, "the host cannot have a certificate")),
        Host::Ipv4(address) => Ok(IpAddr::V4(*address).into()),
        Host::Ipv6(address) => Ok(IpAddr::V6(*address).into()),
    }
}

/// The certificates that the system trusts, so that an operator's own authority counts too.
fn system_trust() -> Result<Arc<ClientConfig>, String> {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "a trusted certificate of the system cannot be read");
    }
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        return Err(
            "this machine trusts no certificates: install ca-certificates, or name a file in \
                    the environment variable SSL_CERT_FILE"
                .to_owned(),
        );
    }
    Ok(trusting(roots))
}

fn trusting(roots: RootCertStore) -> Arc<ClientConfig> {
    let client = ClientConfig::builder().with_root_certificates(roots);
    Arc::new(client.with_no_client_auth())
}

/// One request on a fresh connection, which ends with it.
async fn ask(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    target: &Target,
    bytes_max: u64,
) -> Result<Hop, FetchError> {
    let name = target.name();
    let broken =
        |error: hyper::Error| unreached(target, format!("no answer in proper HTTP: {error}"));
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(broken)?;
    // Ends with this function, however it ends.
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let response = sender
        .send_request(request(target)?)
        .await
        .map_err(broken)?;
    if let Some(location) = location(&response) {
        return Ok(Hop::Elsewhere(location));
    }
    if response.status() != StatusCode::OK {
        let status = response.status().as_u16();
        return Err(FetchError::Refused(format!(
            "{name} answered the request for the image with {status}"
        )));
    }
    let encoding = response.headers().get(header::CONTENT_ENCODING);
    if encoding.is_some_and(|encoding| encoding != "identity") {
        return Err(FetchError::Refused(format!(
            "{name} sent the image compressed once more, which it was not asked to"
        )));
    }
    read(response.into_body(), bytes_max)
        .await
        .map_err(|error| match error {
            ReadError::Broken(error) => broken(error),
            ReadError::TooLong => FetchError::TooLarge(format!(
                "the image at {name} is larger than {bytes_max} bytes (images.bytes_max, images.named_bytes_max)"
            )),
        })
        .map(Hop::Picture)
}

fn request(target: &Target) -> Result<Request<String>, FetchError> {
    let url = &target.url;
    let host = match url.port() {
        Some(port) => format!("{}:{port}", target.host),
        None => target.host.to_string(),
    };
    let path = match url.query() {
        Some(query) => format!("{}?{query}", url.path()),
        None => url.path().to_owned(),
    };
    let unsent = || FetchError::Refused("the image URL cannot be asked for".to_owned());
    Request::get(path.parse::<Uri>().map_err(|_| unsent())?)
        .header(header::HOST, host)
        .header(header::ACCEPT, "image/jpeg, image/png, image/webp")
        .header(header::ACCEPT_ENCODING, "identity")
        .header(
            header::USER_AGENT,
            concat!("visor/", env!("CARGO_PKG_VERSION")),
        )
        .header(header::CONNECTION, "close")
        .body(String::new())
        .map_err(|_| unsent())
}

fn location(response: &Response<Incoming>) -> Option<String> {
    const REDIRECTS: [StatusCode; 5] = [
        StatusCode::MOVED_PERMANENTLY,
        StatusCode::FOUND,
        StatusCode::SEE_OTHER,
        StatusCode::TEMPORARY_REDIRECT,
        StatusCode::PERMANENT_REDIRECT,
    ];
    if !REDIRECTS.contains(&response.status()) {
        return None;
    }
    let location: &HeaderValue = response.headers().get(header::LOCATION)?;
    std::str::from_utf8(location.as_bytes())
        .ok()
        .map(str::to_owned)
}

enum ReadError {
    Broken(hyper::Error),
    TooLong,
}

/// The whole body, given up at the first byte too many; an announced length is believed only when
/// it is too long.
async fn read(mut body: Incoming, bytes_max: u64) -> Result<Bytes, ReadError> {
    if body.size_hint().lower() > bytes_max {
        return Err(ReadError::TooLong);
    }
    let mut whole = Vec::new();
    while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        let frame = frame.map_err(ReadError::Broken)?;
        let Ok(piece) = frame.into_data() else {
            continue;
        };
        if (whole.len() + piece.len()) as u64 > bytes_max {
            return Err(ReadError::TooLong);
        }
        whole.extend_from_slice(&piece);
    }
    Ok(Bytes::from(whole))
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod told;
