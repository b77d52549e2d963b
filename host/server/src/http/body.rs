//! Bodies in under limits, bodies out piece by piece.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderName, HeaderValue, Response, StatusCode};
use http_body::Frame;
use tokio::sync::mpsc;
use tokio::time::Instant;
use visor_sandbox::ErrorCode;

use super::arrivals::Arriving;
use super::gate::Permit;
use crate::pipeline::{CancelOnDrop, Failure, Piece, ReplyBody, ReplyHead};

/// Of a body that is too long, this many times its limit is read and thrown away.
const DISCARD_FACTOR: u64 = 4;
/// The status of a client that is too slow: its own doing, unlike a 504.
const REQUEST_TIMEOUT: u16 = 408;
/// Seconds after which a client that met no room for its body may come back.
const RETRY_AFTER_S: u32 = 1;
/// Room for a body before the first of it is here, bytes.
const FIRST_BYTES: usize = 256 << 10;

/// How a body may come.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Longest it may be, in bytes.
    pub bytes_max: u64,
    /// How long all of it may take.
    pub whole: Duration,
    /// How long it may take before it is measured.
    pub grace: Duration,
    /// Least it may bring in a second from then on, on average, in bytes.
    pub bytes_per_s_min: u64,
    /// What all bodies on their way may have here, in bytes.
    pub arriving_bytes_max: u64,
    /// Whether the client sends nothing before it is told to go on.
    pub waits: bool,
}

impl Pace {
    /// When something more has to have come after so many bytes, counted from the beginning.
    fn patience(&self, seen: u64) -> Duration {
        let paid = Duration::from_secs(seen / self.bytes_per_s_min.max(1));
        self.whole.min(self.grace + paid)
    }

    fn late(&self, patience: Duration) -> Failure {
        let message = if patience == self.whole {
            format!("the body did not arrive within {} s", self.whole.as_secs())
        } else {
            let least = self.bytes_per_s_min;
            format!("the body comes slower than {least} bytes a second")
        };
        Failure::invalid(message).with_status(REQUEST_TIMEOUT)
    }
}

/// Reads a whole body.
///
/// # Errors
/// Too long, too slow, cut off by the client, or more than all bodies on their way may have here.
pub async fn read(mut body: Body, pace: &Pace, arriving: &mut Arriving) -> Result<Bytes, Failure> {
    let began = Instant::now();
    let announced = HttpBody::size_hint(&body).lower();
    let bytes_max = pace.bytes_max;
    let too_long = || {
        let message = format!("the body is larger than {bytes_max} bytes");
        Failure::new(ErrorCode::TooLarge, message)
    };
    let too_long_pace = Pace {
        bytes_max: bytes_max.saturating_mul(DISCARD_FACTOR),
        ..*pace
    };
    if announced > bytes_max {
        discard_behind(body, &too_long_pace);
        return Err(too_long());
    }
    let mut whole = Vec::new();
    let mut seen: u64 = 0;
    loop {
        let patience = pace.patience(seen);
        let piece = tokio::time::timeout_at(began + patience, next(&mut body)).await;
        let Some(piece) = piece.map_err(|_| pace.late(patience))? else {
            break;
        };
        let piece = piece.map_err(|_| Failure::invalid("the body was cut off"))?;
        seen = seen.saturating_add(piece.len() as u64);
        if seen > bytes_max {
            discard_behind(body, &too_long_pace);
            return Err(too_long());
        }
        if !arriving.grow(piece.len() as u64, pace.arriving_bytes_max) {
            discard_behind(body, pace);
            let message = "the bodies on their way take all the memory there is for them, or for those of one key";
            let failure = Failure::new(ErrorCode::Overloaded, message);
            return Err(failure.retry_after(RETRY_AFTER_S));
        }
        if whole.is_empty() {
            // Promised is not sent: a longer one grows as it comes.
            let expected = usize::try_from(announced).unwrap_or(usize::MAX);
            whole.reserve_exact(expected.min(FIRST_BYTES));
        }
        whole.extend_from_slice(&piece);
    }
    Ok(Bytes::from(whole))
}

/// Reads and throws away a body that nobody wants, or the rest of it, behind the answer, for as long as a body may take before it is
/// measured: a client which writes before it reads still sees why it was refused. One that is longer than it may be is left where it is.
pub fn discard_behind(body: Body, pace: &Pace) {
    let fits = HttpBody::size_hint(&body).lower() <= pace.bytes_max;
    // Asked for any of it, who waits would be told to send it.
    if !pace.waits && fits && !HttpBody::is_end_stream(&body) {
        tokio::spawn(discard(body, pace.bytes_max, pace.grace));
    }
}

async fn discard(mut body: Body, bytes_max: u64, patience: Duration) {
    let reading = async {
        let mut seen: u64 = 0;
        while let Some(Ok(piece)) = next(&mut body).await {
            seen = seen.saturating_add(piece.len() as u64);
            if seen > bytes_max {
                break;
            }
        }
    };
    // Whether it ended or not, the answer is the same.
    _ = tokio::time::timeout(patience, reading).await;
}

async fn next(body: &mut Body) -> Option<Result<Bytes, axum::Error>> {
    loop {
        let frame =
            std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await?;
        match frame {
            Ok(frame) => {
                if let Ok(bytes) = frame.into_data() {
                    return Some(Ok(bytes));
                }
            }
            Err(error) => return Some(Err(error)),
        }
    }
}

/// Turns a head and its pieces into a response. What the exchange holds (its permit, its cancel
/// token) lives until the last byte is written or the client has gone.
pub fn respond(head: ReplyHead, pieces: mpsc::Receiver<Piece>, held: Held) -> Response<Body> {
    let body = match head.body {
        ReplyBody::Whole(bytes) => {
            held.cancel.disarm();
            Body::from(bytes)
        }
        ReplyBody::Pieces => Body::new(PieceBody {
            pieces,
            held: Some(held),
        }),
    };
    let mut response = Response::new(body);
    *response.status_mut() =
        StatusCode::from_u16(head.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    for (name, value) in head.headers {
        add_header(&mut response, &name, &value);
    }
    response
}

/// Adds a header unless it is malformed or HTTP's own: framing belongs to the server.
pub fn add_header(response: &mut Response<Body>, name: &str, value: &str) {
    const OURS: [&str; 8] = [
        "connection",
        "content-length",
        "date",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    let parsed = (
        HeaderName::from_bytes(name.as_bytes()),
        HeaderValue::from_str(value),
    );
    match parsed {
        (Ok(name), Ok(value)) if !OURS.contains(&name.as_str()) => {
            response.headers_mut().append(name, value);
        }
        _ => tracing::warn!(name, "header of a plugin left out"),
    }
}

/// What an exchange holds until its response is through.
#[derive(Debug)]
pub struct Held {
    /// Its place among the requests in flight.
    pub permit: Permit,
    /// Cancels the work when the client leaves.
    pub cancel: CancelOnDrop,
}

struct PieceBody {
    pieces: mpsc::Receiver<Piece>,
    held: Option<Held>,
}

impl HttpBody for PieceBody {
    type Data = Bytes;
    type Error = Torn;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Torn>>> {
        if self.held.is_none() {
            return Poll::Ready(None);
        }
        match self.pieces.poll_recv(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Piece::Bytes(bytes))) => Poll::Ready(Some(Ok(Frame::data(bytes)))),
            Poll::Ready(Some(Piece::End)) => {
                if let Some(held) = self.held.take() {
                    held.cancel.disarm();
                }
                Poll::Ready(None)
            }
            Poll::Ready(None) => {
                self.held = None;
                Poll::Ready(Some(Err(Torn)))
            }
        }
    }
}

/// An exchange ended without ending its body.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the exchange ended in the middle of its body")]
struct Torn;
