//! A span for each request, sent to a collector that speaks OTLP over HTTP; nothing is sent anywhere unless `[telemetry]` names one.
//!
//! The span belongs to the trace that the caller's `traceparent` tells, and is left out when that says so. It is made from the record
//! of a request that is over: nothing is measured for it alone.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderValue};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{Span as _, SpanKind, Status, TracerProvider as _};
use opentelemetry::trace::{SpanBuilder, Tracer as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio_util::task::AbortOnDropHandle;

use crate::config::TelemetryConfig;
use crate::pipeline::{Incoming, Outcome, RequestRecord, Stage};

/// Where collectors take spans, below the configured address.
const TRACES_PATH: &str = "/v1/traces";
/// Largest answer of a collector that is read, in bytes: it has nothing to say but what it left out.
const ANSWER_BYTES_MAX: usize = 64 << 10;
/// Most of a path that is told, in bytes.
const PATH_BYTES_MAX: usize = 256;
/// How long what is not sent yet may take when the server stops.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// Makes the spans of requests and sends them, many at once, from a thread of its own.
pub struct Telemetry {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Telemetry {
    /// Nothing when no collector is named, or outside of a runtime: a command that asks once tells nobody.
    ///
    /// # Errors
    /// An address that is none.
    pub fn start(config: &TelemetryConfig) -> anyhow::Result<Option<Self>> {
        let Ok(runtime) = Handle::try_current() else {
            return Ok(None);
        };
        if config.otlp_endpoint.is_empty() {
            return Ok(None);
        }
        let timeout = Duration::from_secs(config.timeout_s);
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Post { runtime, timeout })
            .with_endpoint(config.otlp_endpoint.trim_end_matches('/').to_owned() + TRACES_PATH)
            .with_timeout(timeout)
            .build()?;
        let resource = Resource::builder_empty()
            .with_service_name(config.service_name.clone())
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource)
            .build();
        let tracer = provider.tracer("visor");
        Ok(Some(Self { provider, tracer }))
    }

    /// Tells of a request that is over.
    pub(crate) fn tell(&self, incoming: &Incoming, record: &RequestRecord) {
        let end = SystemTime::now();
        let begin = end - Duration::from_micros(record.total_us);
        let traced = ["traceparent", "tracestate"].map(|name| {
            let value = match name {
                "traceparent" => incoming.traceparent.as_deref(),
                _ => incoming.header(name),
            };
            (name.to_owned(), value.unwrap_or_default().to_owned())
        });
        let carrier = HashMap::from(traced);
        let caller = TraceContextPropagator::new().extract_with_context(&Context::new(), &carrier);
        let name = format!("{} {}", method(&incoming.method), record.prefix);
        let span = SpanBuilder::from_name(name)
            .with_kind(SpanKind::Server)
            .with_start_time(begin)
            .with_attributes(attributes(incoming, record));
        let mut span = self.tracer.build_with_context(span, &caller);
        if matches!(record.outcome, Outcome::GuestFault | Outcome::ServerError) {
            span.set_status(Status::error(record.outcome.as_str()));
        }
        span.end_with_timestamp(end);
    }

    /// Sends what is left.
    pub fn stop(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(LAST_WORDS) {
            tracing::warn!(%error, "not every span was sent");
        }
    }
}

/// A method that HTTP knows, as the conventions have it: a client may invent others, and as many as it likes.
fn method(method: &str) -> String {
    const KNOWN: [&str; 9] = [
        "CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE",
    ];
    let known = KNOWN.contains(&method);
    if known { method } else { "_OTHER" }.to_owned()
}

/// Under the names of OpenTelemetry's conventions where there is one.
fn attributes(incoming: &Incoming, record: &RequestRecord) -> Vec<KeyValue> {
    let count = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    let path = &incoming.full_path;
    let path = &path[..path.floor_char_boundary(PATH_BYTES_MAX)];
    let mut attributes = vec![
        KeyValue::new("http.request.method", method(&incoming.method)),
        KeyValue::new("http.route", record.prefix.clone()),
        KeyValue::new("url.path", path.to_owned()),
        KeyValue::new("http.response.status_code", i64::from(record.status)),
        KeyValue::new("gen_ai.usage.input_tokens", count(record.tokens.prompt)),
        KeyValue::new(
            "gen_ai.usage.output_tokens",
            count(record.tokens.completion),
        ),
        KeyValue::new("visor.request", incoming.id.clone()),
        KeyValue::new("visor.outcome", record.outcome.as_str()),
        KeyValue::new("visor.images", i64::from(record.images)),
    ];
    if let Some(micros) = record.first_text_us {
        attributes.push(KeyValue::new("visor.first_text_us", count(micros)));
    }
    let stages = Stage::ALL
        .into_iter()
        .map(|stage| (stage, record.stages.get_us(stage)));
    attributes.extend(
        stages.filter(|(_, micros)| *micros > 0).map(|(stage, us)| {
            KeyValue::new(format!("visor.stage.{}_us", stage.as_str()), count(us))
        }),
    );
    attributes
}

/// The way to the collector: one connection for each batch.
#[derive(Debug)]
struct Post {
    /// The thread that sends spans has none of its own.
    runtime: Handle,
    timeout: Duration,
}

#[async_trait]
impl HttpClient for Post {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let timeout = self.timeout;
        let posting = async move { tokio::time::timeout(timeout, post(request)).await };
        let posted = match self.runtime.spawn(posting).await {
            Ok(Ok(posted)) => posted,
            Ok(Err(late)) => Err(late.into()),
            Err(panicked) => Err(panicked.into()),
        };
        posted.inspect_err(|error| tracing::warn!(%error, "spans were not sent"))
    }
}

async fn post(request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
    let (mut head, body) = request.into_parts();
    let authority = head.uri.authority().ok_or("no host")?.clone();
    let host = authority.host().trim_matches(['[', ']']);
    let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(80))).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with this function, however it ends.
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    head.headers
        .insert(HOST, HeaderValue::from_str(authority.as_str())?);
    let path = head.uri.path_and_query().ok_or("no path")?.as_str();
    head.uri = path.parse()?;
    let request = Request::from_parts(head, Full::new(body));
    let (head, body) = sender.send_request(request).await?.into_parts();
    let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await?;
    let response = Response::from_parts(head, body.to_bytes());
    if !response.status().is_success() {
        return Err(format!("the collector answered {}", response.status()).into());
    }
    Ok(response)
}
