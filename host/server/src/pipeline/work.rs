//! What one exchange carries from room to room: its call, its deadline, its notes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use visor_engine::CancelToken;

use super::failure::Failure;
use super::record::{Outcome, Stage, StageTimes, TokenTotals};
use super::restore::Restorer;
use crate::wiring::{House, Pinned};

/// A request as it came in, before its body was looked at.
#[derive(Debug, Clone)]
pub struct Incoming {
    /// Upper-case method.
    pub method: String,
    /// Path below the mount prefix, with its leading slash.
    pub path: String,
    /// The whole path.
    pub full_path: String,
    /// Values of `{name}` segments.
    pub params: Vec<(String, String)>,
    /// Decoded query parameters.
    pub query: Vec<(String, String)>,
    /// The caller's `traceparent`, well formed.
    pub traceparent: Option<String>,
    /// Name of the key it was asked with; none is anybody.
    pub principal: Option<String>,
    /// Header names in lower case, and values, without those that carry secrets.
    pub headers: Vec<(String, String)>,
    /// Request id, the client's or ours.
    pub id: String,
    /// When its head was read.
    pub accepted: Instant,
}

impl Incoming {
    /// First value of a header, whose name is given in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

/// A request and everything it is served with, pinned for its whole life.
pub struct Call {
    /// The house.
    pub house: Arc<House>,
    /// One revision of configuration and plugins.
    pub pinned: Pinned,
    /// The request.
    pub incoming: Incoming,
    /// Set when the client has gone.
    pub cancel: CancelToken,
}

/// Notes for the record.
#[derive(Debug, Default)]
pub(super) struct Trace {
    /// Time by stage.
    pub stages: StageTimes,
    /// Tokens.
    pub tokens: TokenTotals,
    /// How choices ended.
    pub finishes: Vec<&'static str>,
    /// Whether an answer came from the cache.
    pub response_cached: bool,
    /// Pictures.
    pub images: u32,
    /// Whether pieces were sent as they came.
    pub incremental: bool,
    /// How a generation failed that the adapter was told of in the middle of its response.
    pub failed: Option<Outcome>,
    /// From the accepted request to the first text.
    pub first_text: Option<Duration>,
    last_text: Option<Instant>,
}

/// Why an exchange ends before its answer does.
#[derive(Debug)]
pub(super) enum Stop {
    /// The client is told why.
    Failed(Failure),
    /// The client has gone: there is nobody to tell.
    Gone,
}

impl<F: Into<Failure>> From<F> for Stop {
    fn from(failure: F) -> Self {
        Self::Failed(failure.into())
    }
}

/// One exchange at work.
pub(super) struct Work {
    /// What it was called with.
    pub call: Call,
    /// Its notes.
    pub trace: Trace,
    /// Puts back what was lifted out of its body.
    pub restorer: Restorer,
    /// When it has to be over.
    pub deadline: Instant,
    /// Pictures that were asked of other servers so far.
    pub fetched: u32,
    /// Encoded bytes of pictures that did not come with the request, so far.
    pub named_bytes: u64,
}

impl Work {
    /// Begins: the time since the request was accepted went into reading and waiting.
    pub(super) fn new(call: Call) -> Self {
        let accepted = call.incoming.accepted;
        let deadline = accepted + Duration::from_secs(call.pinned.config.server.request_timeout_s);
        let mut trace = Trace::default();
        trace.stages.add(Stage::Accept, accepted.elapsed());
        Self {
            call,
            trace,
            restorer: Restorer::default(),
            deadline,
            fetched: 0,
            named_bytes: 0,
        }
    }

    /// Between two steps: is anybody still waiting, and is there time left?
    ///
    /// # Errors
    /// The client has gone, or the request's time is over.
    pub(super) fn check(&self) -> Result<(), Stop> {
        if self.call.cancel.is_cancelled() {
            return Err(Stop::Gone);
        }
        if Instant::now() >= self.deadline {
            return Err(self.late().into());
        }
        Ok(())
    }

    /// The failure of a request whose time is over.
    pub(super) fn late(&self) -> Failure {
        Failure::timeout(self.call.pinned.config.server.request_timeout_s)
    }

    /// Notes that text came, for the time to the first and the time between two.
    pub(super) fn text_came(&mut self) {
        let now = Instant::now();
        match self.trace.last_text.replace(now) {
            Some(before) => self.call.house.metrics.inter_token(now - before),
            None => self.trace.first_text = Some(now - self.call.incoming.accepted),
        }
    }
}
