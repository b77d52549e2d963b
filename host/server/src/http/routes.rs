//! From a path to who serves it: six native pages, and the adapters below their prefixes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header, request};
use axum::middleware::{self, Next};
use axum::routing::get;
use tokio::runtime::Handle;
use visor_engine::CancelToken;
use visor_sandbox::ErrorCode;

use super::arrivals::Arrivals;
use super::body::{self, Held, Pace};
use super::gate::{Gate, Permit};
use super::keys::{Key, SECRET_HEADERS};
use super::page::Page;
use super::{cors, error, in_place, openapi, paths, trace};
use crate::config::ServerConfig;
use crate::metrics::{OPENMETRICS, PROMETHEUS};
use crate::pipeline::{self, Call, CancelOnDrop, Failure, Incoming, Reply, ReplyReceiver};
use crate::wiring::{House, Pinned, Wiring};

/// Refusals rendered by a plugin at once; beyond, the host speaks itself.
const REFUSALS_MAX: usize = 8;
/// Longest request id taken over from a client, in bytes.
const REQUEST_ID_BYTES_MAX: usize = 128;
/// The adapter whose clients look for a greeting.
const OLLAMA: &str = "ollama";
const JSON: &str = "application/json";
/// The status of a body in a coding that is not undone.
const UNSUPPORTED_MEDIA_TYPE: u16 = 415;
/// Longest piece of a coding's name that is repeated, in characters.
const CODING_SHOWN_CHARS: usize = 60;
/// Seconds after which a client that met a full server may come back.
const RETRY_AFTER_S: u32 = 1;

#[derive(Clone)]
struct Http {
    house: Arc<House>,
    gate: Arc<Gate>,
    arrivals: Arc<Arrivals>,
    refusals: Arc<Gate>,
    stats: Arc<Page>,
    /// In the Prometheus format, and as OpenMetrics.
    metrics: Arc<[Page; 2]>,
    /// Only this machine reaches the address.
    is_local: bool,
}

/// Every path the server answers. `is_local`: nobody but this machine reaches the address it is bound to.
pub fn router(
    house: Arc<House>,
    gate: Arc<Gate>,
    arrivals: Arc<Arrivals>,
    is_local: bool,
) -> Router {
    let http = Http {
        house,
        gate,
        arrivals,
        refusals: Arc::default(),
        stats: Arc::default(),
        metrics: Arc::default(),
        is_local,
    };
    Router::new()
        .route("/", get(greeting))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/stats", get(stats))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(described))
        .method_not_allowed_fallback(wrong_method)
        .fallback(exchange)
        .layer(middleware::from_fn_with_state(http.clone(), pages))
        .with_state(http)
}

/// Around every path: which web pages may ask.
async fn pages(State(http): State<Http>, request: Request<Body>, next: Next) -> Response<Body> {
    let origin = cors::origin(request.headers(), &http.house.config().access.cors_origins);
    let answered = cors::preflight(request.method(), request.headers(), &origin);
    let config = http.house.config();
    // Where anybody on this machine may ask and nobody else can, the name in a request says who asks: this machine, or a page whose
    // name leads here.
    let asks_by_name = http.is_local && config.access.keys.is_empty();
    let hosts = asks_by_name.then_some(&config.access.hosts[..]);
    let refusal = cors::refusal(&origin, request.headers(), hosts);
    let mut response = match (answered, refusal) {
        (Some(response), _) => response,
        (None, Some(why)) => forbid(&http, request, why).await,
        (None, None) => next.run(request).await,
    };
    cors::grant(&mut response, origin);
    response
}

/// Answers a page that may not ask, or whoever asks by a name that a page may have.
async fn forbid(http: &Http, request: Request<Body>, why: &str) -> Response<Body> {
    let accepted = Instant::now();
    let (head, body) = request.into_parts();
    turn_back(&http.house.config().server, &head.headers, body);
    let failure = Failure::invalid(why).with_status(StatusCode::FORBIDDEN.as_u16());
    let id = request_id(&head.headers);
    let mut response = match http.house.pin(head.uri.path()) {
        Some(pinned) => {
            let incoming = incoming(&head, &pinned, id.clone(), accepted);
            turn_away(http, pinned, &incoming, failure).await
        }
        None => whole(error::fallback_response(&failure)),
    };
    identify(&mut response, &id);
    response
}

/// What clients of Ollama look for before they ask anything, where its API is mounted.
async fn greeting(State(http): State<Http>, request: Request<Body>) -> Response<Body> {
    if greets(&http.house.wiring()) {
        return page("Ollama is running".into(), "text/plain; charset=utf-8");
    }
    exchange(State(http), request).await
}

/// Whether there are clients of Ollama to greet.
pub(super) fn greets(wiring: &Wiring) -> bool {
    let mut routes = wiring.routes.iter();
    routes.any(|route| route.adapter.id() == OLLAMA)
}

/// One of the server's own pages, by a method that none of them has.
async fn wrong_method(State(http): State<Http>, request: Request<Body>) -> Response<Body> {
    let (head, body) = request.into_parts();
    turn_back(&http.house.config().server, &head.headers, body);
    let allowed = vec!["GET".to_owned(), "HEAD".to_owned()];
    let failure = Failure::method_not_allowed(head.method.as_str(), head.uri.path(), allowed);
    whole(error::fallback_response(&failure))
}

/// Alive: the process answers.
async fn health() -> Response<Body> {
    json(StatusCode::OK, &serde_json::json!({ "status": "alive" }))
}

/// Able to serve: the model is loaded and warm, and nobody asked the server to stop.
async fn ready(State(http): State<Http>) -> Response<Body> {
    match http.house.ready() {
        Ok(()) => json(StatusCode::OK, &serde_json::json!({ "status": "ready" })),
        Err(reason) => {
            let body = serde_json::json!({ "status": "not ready", "reason": reason });
            json(StatusCode::SERVICE_UNAVAILABLE, &body)
        }
    }
}

async fn stats(State(http): State<Http>, headers: HeaderMap) -> Response<Body> {
    if let Err(failure) = may_look(&http, &headers) {
        return whole(error::fallback_response(&failure));
    }
    let per_s_max = http.house.config().server.stats_per_s_max;
    let make = || http.house.stats_json().to_string();
    page(http.stats.get(per_s_max, make), JSON)
}

async fn metrics(State(http): State<Http>, headers: HeaderMap) -> Response<Body> {
    if let Err(failure) = may_look(&http, &headers) {
        return whole(error::fallback_response(&failure));
    }
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("");
    let openmetrics = accept.contains("application/openmetrics-text");
    let content_type = if openmetrics { OPENMETRICS } else { PROMETHEUS };
    let per_s_max = http.house.config().server.stats_per_s_max;
    let make = || http.house.metrics_text(openmetrics);
    let format = &http.metrics[usize::from(openmetrics)];
    page(format.get(per_s_max, make), content_type)
}

/// What is mounted, for clients that read it. It names plugins, so strangers do not get it once there is
/// a key.
async fn described(State(http): State<Http>, headers: HeaderMap) -> Response<Body> {
    let wiring = http.house.wiring();
    if let Err(failure) = wiring.keys.find(&headers) {
        return whole(error::fallback_response(&failure));
    }
    let make = || openapi::document(&wiring, &http.house.model).to_string();
    let document = wiring.described.get_or_init(|| make().into());
    page(document.clone(), JSON)
}

/// Whether a caller may see what is counted.
fn may_look(http: &Http, headers: &HeaderMap) -> Result<(), Failure> {
    let wiring = http.house.wiring();
    if wiring.config.access.stats_need_key {
        wiring.keys.find(headers)?;
    }
    Ok(())
}

pub(super) fn json(status: StatusCode, value: &serde_json::Value) -> Response<Body> {
    let mut response = page(value.to_string().into(), JSON);
    *response.status_mut() = status;
    response
}

fn page(text: Bytes, content_type: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    let content_type = HeaderValue::from_static(content_type);
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, content_type);
    response
}

/// Everything below the mount prefixes.
async fn exchange(State(http): State<Http>, request: Request<Body>) -> Response<Body> {
    let accepted = Instant::now();
    let (head, body) = request.into_parts();
    let id = request_id(&head.headers);
    let mut response = match http.house.pin(head.uri.path()) {
        Some(pinned) => {
            let plugins = pipeline::plugins_header(&pinned);
            let mut incoming = incoming(&head, &pinned, id.clone(), accepted);
            match pinned.keys.find(&head.headers) {
                Ok(key) => {
                    incoming.principal = key.as_ref().map(|key| key.name.clone());
                    let mut response = serve(&http, pinned, (incoming, key), body).await;
                    body::add_header(&mut response, "x-visor-plugins", &plugins);
                    response
                }
                // What runs here is nothing that strangers are told.
                Err(failure) => {
                    turn_back(&pinned.config.server, &head.headers, body);
                    turn_away(&http, pinned, &incoming, failure).await
                }
            }
        }
        None => {
            turn_back(&http.house.config().server, &head.headers, body);
            let message = format!("no route serves {}", head.uri.path());
            let known = http.house.wiring().keys.find(&head.headers);
            let failure = known
                .err()
                .unwrap_or_else(|| Failure::new(ErrorCode::NotFound, message));
            whole(error::fallback_response(&failure))
        }
    };
    identify(&mut response, &id);
    response
}

/// Names a request to its client. The second header is where those of Anthropic look.
fn identify(response: &mut Response<Body>, id: &str) {
    for name in ["x-request-id", "request-id"] {
        body::add_header(response, name, id);
    }
}

/// One request that has a mount: matched, its body read, in through the gate, then worked on.
async fn serve(
    http: &Http,
    pinned: Pinned,
    (mut incoming, key): (Incoming, Option<Arc<Key>>),
    body: Body,
) -> Response<Body> {
    let config = Arc::clone(&pinned.config);
    let in_flight_max = config.server.requests_in_flight_max;
    let waits = incoming.header("expect").is_some();
    let paced = |body_bytes_max| pace(&config.server, body_bytes_max, waits);
    if let Err(failure) = may_come(http, in_flight_max, key.as_deref()) {
        body::discard_behind(body, &paced(None));
        return refuse(http, pinned, incoming, failure).await;
    }
    let mut arriving = http.arrivals.begin(key.as_deref().map(Key::arriving));
    let checked = match find(&pinned, &mut incoming) {
        Ok(body_bytes_max) => body::read(body, &paced(body_bytes_max), &mut arriving).await,
        Err(failure) => {
            body::discard_behind(body, &paced(None));
            Err(failure)
        }
    };
    let permit = match enter(http, in_flight_max, key.as_deref()) {
        Ok(permit) => permit,
        Err(failure) => return refuse(http, pinned, incoming, failure).await,
    };
    // Until here the request had no place that another could miss.
    drop(arriving);
    match checked {
        Ok(bytes) => work(http, pinned, incoming, bytes, permit).await,
        Err(failure) => reject(http, pinned, incoming, failure, permit).await,
    }
}

/// Whether a request's body is taken in at all. By the time all of it is here, nothing is likely to have changed.
fn may_come(http: &Http, in_flight_max: usize, key: Option<&Key>) -> Result<(), Failure> {
    if http.gate.is_closed() {
        let failure = Failure::new(ErrorCode::Overloaded, "the server is stopping");
        return Err(failure.retry_after(RETRY_AFTER_S));
    }
    if http.gate.is_full(in_flight_max) {
        return Err(full(in_flight_max));
    }
    key.map_or(Ok(()), Key::has_place)
}

/// Finds the route of a request, whose method and parameters the request then has, and the longest body that it takes; none takes a
/// coding.
fn find(pinned: &Pinned, incoming: &mut Incoming) -> Result<Option<u64>, Failure> {
    match paths::find(pinned.adapter.routes(), &incoming.method, &incoming.path) {
        paths::Match::Found {
            method,
            params,
            body_bytes_max,
        } => {
            if let Some(failure) = unreadable(incoming) {
                return Err(failure);
            }
            incoming.method = method;
            incoming.params = params;
            Ok(body_bytes_max)
        }
        paths::Match::WrongMethod(allowed) => Err(Failure::method_not_allowed(
            &incoming.method,
            &incoming.full_path,
            allowed,
        )),
        paths::Match::NotFound => {
            let message = format!("nothing is served at {}", incoming.full_path);
            Err(Failure::new(ErrorCode::NotFound, message))
        }
    }
}

/// A place among the requests in flight. The key's own limits come first: who is over them takes no
/// place from anybody else.
fn enter(http: &Http, in_flight_max: usize, key: Option<&Key>) -> Result<Permit, Failure> {
    let own = key.map(Key::enter).transpose()?;
    let permit = http.gate.enter(in_flight_max);
    let permit = permit.ok_or_else(|| full(in_flight_max))?;
    Ok(own.into_iter().fold(permit, Permit::with))
}

/// A body that is not as it says it is: none is unpacked here, for a small one may unpack to any size.
fn unreadable(incoming: &Incoming) -> Option<Failure> {
    let coding = incoming.header("content-encoding")?;
    let coded = !["", "identity"].contains(&coding.trim().to_ascii_lowercase().as_str());
    coded.then(|| {
        let shown: String = coding.chars().take(CODING_SHOWN_CHARS).collect();
        let message =
            format!("a body with `Content-Encoding: {shown}` is not read; send it as it is");
        Failure::invalid(message).with_status(UNSUPPORTED_MEDIA_TYPE)
    })
}

fn full(in_flight_max: usize) -> Failure {
    let message = format!("{in_flight_max} requests are in flight already");
    Failure::new(ErrorCode::Overloaded, message).retry_after(RETRY_AFTER_S)
}

/// How a body may come, on a route that may have an opinion on its length.
fn pace(server: &ServerConfig, route_bytes_max: Option<u64>, waits: bool) -> Pace {
    let operator_max = server.request_body_bytes_max;
    Pace {
        bytes_max: route_bytes_max.map_or(operator_max, |max| max.min(operator_max)),
        whole: Duration::from_secs(server.body_read_timeout_s),
        grace: Duration::from_secs(server.head_read_timeout_s),
        bytes_per_s_min: server.body_bytes_per_s_min,
        arriving_bytes_max: server.arriving_bytes_max,
        waits,
    }
}

/// Lets a client that is turned away finish writing.
fn turn_back(server: &ServerConfig, headers: &HeaderMap, body: Body) {
    let waits = headers.contains_key(header::EXPECT);
    body::discard_behind(body, &pace(server, None, waits));
}

/// Hands the exchange to a thread of its own and passes on what comes back.
async fn work(
    http: &Http,
    pinned: Pinned,
    incoming: Incoming,
    body: Bytes,
    permit: Permit,
) -> Response<Body> {
    let pieces_max = pinned.config.server.stream_buffer_pieces;
    let (reply, receiver) = Reply::new(pieces_max, Handle::current(), permit.clone());
    let cancel = CancelToken::default();
    let held = Held {
        permit,
        cancel: CancelOnDrop::new(cancel.clone()),
    };
    let call = Call {
        house: Arc::clone(&http.house),
        pinned,
        incoming,
        cancel,
    };
    tokio::task::spawn_blocking(|| in_place::serve(|| pipeline::run(call, body, reply)));
    pass_on(receiver, held).await
}

/// Answers with an error in the client's dialect.
async fn reject(
    http: &Http,
    pinned: Pinned,
    incoming: Incoming,
    failure: Failure,
    permit: Permit,
) -> Response<Body> {
    let (reply, receiver) = Reply::new(1, Handle::current(), permit.clone());
    let cancel = CancelToken::default();
    let held = Held {
        permit,
        cancel: CancelOnDrop::new(cancel.clone()),
    };
    let call = Call {
        house: Arc::clone(&http.house),
        pinned,
        incoming,
        cancel,
    };
    tokio::task::spawn_blocking(|| in_place::serve(|| pipeline::reject(call, failure, reply)));
    pass_on(receiver, held).await
}

/// As [`reject`], for a request that has no place: it gets one of a few others, or the host's words.
async fn refuse(
    http: &Http,
    pinned: Pinned,
    incoming: Incoming,
    failure: Failure,
) -> Response<Body> {
    if let Some(permit) = http.refusals.enter(REFUSALS_MAX) {
        return reject(http, pinned, incoming, failure, permit).await;
    }
    pipeline::record_refusal(&http.house, &pinned, &incoming, &failure);
    whole(error::fallback_response(&failure))
}

/// Answers somebody without a key, or who may not ask at all. See [`super::strangers`].
async fn turn_away(
    http: &Http,
    pinned: Pinned,
    incoming: &Incoming,
    failure: Failure,
) -> Response<Body> {
    pipeline::record_refusal(&http.house, &pinned, incoming, &failure);
    if let Some(known) = pinned.strangers.known(&failure) {
        return whole(known);
    }
    let fallback = error::fallback_response(&failure);
    let Some(permit) = http.refusals.enter(REFUSALS_MAX) else {
        return whole(fallback);
    };
    let rendered = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        pinned.strangers.render(&pinned.adapter, &failure)
    });
    whole(rendered.await.unwrap_or(fallback))
}

async fn pass_on(receiver: ReplyReceiver, held: Held) -> Response<Body> {
    match receiver.head.await {
        Ok(head) => body::respond(head, receiver.pieces, held),
        // The thread died before it said anything: a bug, logged where it happened.
        Err(_) => whole(error::fallback_response(&Failure::internal())),
    }
}

pub(super) fn whole(response: visor_sandbox::Response) -> Response<Body> {
    let mut answer = Response::new(Body::from(response.body));
    *answer.status_mut() =
        StatusCode::from_u16(response.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    for (name, value) in response.headers {
        body::add_header(&mut answer, &name, &value);
    }
    answer
}

fn incoming(head: &request::Parts, pinned: &Pinned, id: String, accepted: Instant) -> Incoming {
    let full_path = head.uri.path();
    let below = full_path
        .strip_prefix(pinned.prefix.trim_end_matches('/'))
        .unwrap_or(full_path);
    let shared = head
        .headers
        .iter()
        .filter(|(name, _)| !SECRET_HEADERS.contains(&name.as_str()));
    let headers = shared.filter_map(|(name, value)| {
        Some((name.as_str().to_owned(), value.to_str().ok()?.to_owned()))
    });
    Incoming {
        method: head.method.as_str().to_owned(),
        path: below.to_owned(),
        full_path: full_path.to_owned(),
        params: Vec::new(),
        query: paths::query_pairs(head.uri.query().unwrap_or("")),
        principal: None,
        traceparent: trace::parent(&head.headers),
        headers: headers.collect(),
        id,
        accepted,
    }
}

/// The client's own request id when it is printable and short, else a fresh one.
fn request_id(headers: &HeaderMap) -> String {
    let theirs = headers
        .get("x-request-id")
        .and_then(|value| value.to_str().ok());
    let usable = |id: &&str| {
        (1..=REQUEST_ID_BYTES_MAX).contains(&id.len())
            && id.bytes().all(|byte| byte.is_ascii_graphic())
    };
    theirs.filter(usable).map_or_else(
        || format!("req-{:016x}", rand::random::<u64>()),
        str::to_owned,
    )
}
