//! The accept loop: connections in, a proper end when the server is told to stop.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use axum::Router;
use axum::middleware;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::arrivals::Arrivals;
use super::gate::{Gate, Permit};
use super::head;
use super::in_place::InPlace;
use super::patience::{Patience, Patient};
use crate::config::ServerConfig;
use crate::wiring::House;

/// Most headers of one request: more is an attack on whoever copies them.
const HEADERS_MAX: usize = 128;
/// What hyper needs at least to read a request head, in bytes.
const HEAD_BYTES_MIN: usize = 8192;
/// How long idle connections get to notice that the server is going.
const GOODBYE: Duration = Duration::from_secs(1);
/// Pause after a failed accept: running out of file descriptors must not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Without a failed accept for so long, the trouble is over: while one connection ends now and then, the next one fails again.
const ACCEPT_CALM: Duration = Duration::from_secs(5);

/// Where connections come in, sealed or not.
pub struct Listener {
    /// The socket.
    pub tcp: TcpListener,
    /// Seals connections; none speaks plain HTTP.
    pub tls: Option<TlsAcceptor>,
}

impl Listener {
    /// Whether only this machine reaches the address.
    fn is_local(&self) -> bool {
        let address = self.tcp.local_addr();
        address.is_ok_and(|address| address.ip().is_loopback())
    }
}

/// Serves the admin listener for ever; whoever drops this ends it.
pub async fn administer(listener: Listener, house: Arc<House>) {
    let router = super::admin::router(Arc::clone(&house), listener.is_local());
    let connections = Connections::new(router, listener.tls, house);
    connections.accept_from(&listener.tcp).await;
}

/// Accepts connections until `shutdown` resolves; then refuses new work, lets what is in flight
/// finish for at most `server.drain_s`, and returns.
pub async fn run(
    listener: Listener,
    house: Arc<House>,
    gate: Arc<Gate>,
    shutdown: impl Future<Output = ()>,
) {
    let arrivals = Arc::new(Arrivals::default());
    let router = super::routes::router(
        Arc::clone(&house),
        Arc::clone(&gate),
        Arc::clone(&arrivals),
        listener.is_local(),
    );
    let Listener { tcp, tls } = listener;
    let connections = Connections::new(router, tls, Arc::clone(&house));
    {
        let mut shutdown = pin!(shutdown);
        let serving = connections.accept_from(&tcp);
        tokio::select! {
            () = &mut shutdown => {}
            () = serving => {}
        }
    }
    house.drain();
    gate.close();
    let patience = Duration::from_secs(house.config().server.drain_s);
    tracing::info!(
        drain_s = patience.as_secs(),
        "draining: finishing what is in flight"
    );
    // Still accepting: probes and late clients are told to go elsewhere rather than left in the dark.
    tokio::select! {
        () = connections.accept_from(&tcp) => {}
        () = async { arrivals.none().await; gate.empty().await } => {}
        () = tokio::time::sleep(patience) => tracing::warn!("requests still in flight are cut off"),
    }
    drop(tcp);
    connections.closing.cancel();
    connections.tracker.close();
    _ = tokio::time::timeout(GOODBYE, connections.tracker.wait()).await;
}

fn builder(config: &ServerConfig) -> http1::Builder {
    let head_bytes = usize::try_from(config.request_head_bytes_max).unwrap_or(usize::MAX);
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(config.head_read_timeout_s))
        .max_headers(HEADERS_MAX)
        .max_buf_size(head_bytes.max(HEAD_BYTES_MIN));
    http
}

struct Connections {
    router: Router,
    tls: Option<TlsAcceptor>,
    /// How long a client may take until its connection is sealed.
    handshake: Duration,
    /// How slowly a client may take its answers.
    write: Patience,
    http: http1::Builder,
    /// Counts the open connections.
    open: Arc<Gate>,
    /// Whether the last connection was one too many, so that a flood is logged once.
    full: AtomicBool,
    house: Arc<House>,
    closing: CancellationToken,
    tracker: TaskTracker,
}

impl Connections {
    fn new(router: Router, tls: Option<TlsAcceptor>, house: Arc<House>) -> Self {
        let server = &house.config().server;
        Self {
            router: router.layer(middleware::from_fn_with_state(
                server.request_head_bytes_max,
                head::check,
            )),
            tls,
            handshake: Duration::from_secs(server.head_read_timeout_s),
            write: Patience {
                silence: Duration::from_secs(server.write_timeout_s),
                bytes_per_s_min: server.write_bytes_per_s_min,
            },
            http: builder(server),
            open: Arc::default(),
            full: AtomicBool::new(false),
            house,
            closing: CancellationToken::new(),
            tracker: TaskTracker::new(),
        }
    }

    async fn accept_from(&self, listener: &TcpListener) {
        let mut trouble = Trouble::default();
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    if trouble.is_over(Instant::now()) {
                        tracing::info!("connections are accepted again");
                    }
                    self.serve(stream);
                }
                Err(error) => {
                    if trouble.begins(Instant::now()) {
                        tracing::warn!(%error, "accept failed, and may for a while");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn place(&self) -> Option<Permit> {
        let connections_max = self.house.config().server.connections_max;
        let place = self.open.enter(connections_max);
        let full = place.is_none();
        if full && !self.full.swap(full, Relaxed) {
            tracing::warn!(
                connections_max,
                "connections are closed at once: server.connections_max are open"
            );
        }
        self.full.store(full, Relaxed);
        place
    }

    fn serve(&self, stream: TcpStream) {
        let Some(place) = self.place() else {
            return;
        };
        // A stream of small pieces must not wait for a full segment.
        _ = stream.set_nodelay(true);
        let stream = Patient::new(stream, self.write);
        let talk = Talk {
            router: self.router.clone(),
            http: self.http.clone(),
            closing: self.closing.clone(),
        };
        let Some(tls) = self.tls.clone() else {
            self.tracker.spawn(InPlace::new(async move {
                let _place = place;
                talk.run(stream).await;
            }));
            return;
        };
        let handshake = self.handshake;
        // Not in place: what a sealed connection reads before it has anything is bounded by the runtime's budget alone.
        self.tracker.spawn(async move {
            let _place = place;
            match tokio::time::timeout(handshake, tls.accept(stream)).await {
                Ok(Ok(sealed)) => talk.run(sealed).await,
                Ok(Err(error)) => tracing::debug!(%error, "no sealed connection"),
                Err(_) => tracing::debug!("a handshake took too long"),
            }
        });
    }
}

/// When the last accept failed that belongs to a trouble which is not over, so that all of it is logged once.
#[derive(Default)]
struct Trouble(Option<Instant>);

impl Trouble {
    /// An accept failed: whether it is the first to.
    fn begins(&mut self, now: Instant) -> bool {
        self.0.replace(now).is_none()
    }

    /// An accept did not fail: whether they did until now, and have stopped.
    fn is_over(&mut self, now: Instant) -> bool {
        self.0
            .take_if(|last| now.duration_since(*last) >= ACCEPT_CALM)
            .is_some()
    }
}

/// What one connection needs.
struct Talk {
    router: Router,
    http: http1::Builder,
    closing: CancellationToken,
}

impl Talk {
    /// Answers requests until the client has had enough or the server is going.
    async fn run(self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let service = TowerToHyperService::new(self.router);
        let mut connection = pin!(self.http.serve_connection(TokioIo::new(stream), service));
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.closing.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "connection ended early");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_begins_once_and_is_over_once() {
        let (mut trouble, start) = (Trouble::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!trouble.is_over(at(0)), "there was none");
        assert!(trouble.begins(at(0)));
        for second in 1..100 {
            assert!(!trouble.is_over(at(second)), "one place in between");
            assert!(!trouble.begins(at(second)));
        }
        assert!(!trouble.is_over(at(103)));
        assert!(trouble.is_over(at(104)));
        assert!(!trouble.is_over(at(105)));
        assert!(trouble.begins(at(105)));
    }
}
