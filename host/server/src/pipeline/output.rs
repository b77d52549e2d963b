//! Bytes on their way to the client, in the manner the adapter's head asks for.

use std::time::{Duration, Instant};

use bytes::Bytes;
use visor_sandbox::{Head, Response};

use super::failure::Failure;
use super::reply::{Reply, ReplyBody, ReplyHead, SendError};
use super::work::{Stop, Work};

/// Most bytes of an answer that is sent whole.
const BUFFERED_BYTES_MAX: usize = 16 << 20;

/// One response, in pieces or whole.
pub(super) struct Output<'a> {
    reply: &'a mut Reply,
    head: Option<Head>,
    incremental: bool,
    buffered: Vec<u8>,
    /// When something was last written.
    pub written: Instant,
}

impl<'a> Output<'a> {
    /// Nothing is sent before the first bytes.
    pub(super) fn new(reply: &'a mut Reply, head: Head) -> Self {
        Self {
            reply,
            incremental: head.incremental,
            head: Some(head),
            buffered: Vec::new(),
            written: Instant::now(),
        }
    }

    /// Whether pieces are sent as they come.
    pub(super) fn incremental(&self) -> bool {
        self.incremental
    }

    /// Whether the status is out, so that a failure can only be told in the body.
    pub(super) fn head_sent(&self) -> bool {
        self.head.is_none()
    }

    /// Writes, or keeps until the end.
    ///
    /// # Errors
    /// The client has gone or is too slow, or the adapter floods it.
    pub(super) fn write(&mut self, work: &Work, bytes: Vec<u8>) -> Result<(), Stop> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.written = Instant::now();
        if !self.incremental {
            if self.buffered.len() + bytes.len() > BUFFERED_BYTES_MAX {
                let what = format!("an answer of more than {BUFFERED_BYTES_MAX} bytes");
                return Err(Failure::nonsense(work.call.pinned.adapter.id(), &what).into());
            }
            self.buffered.extend_from_slice(&bytes);
            return Ok(());
        }
        self.send_head(ReplyBody::Pieces)
            .map_err(|error| stop(work, error))?;
        let sent = self.reply.send_bytes(Bytes::from(bytes), work.deadline);
        sent.map_err(|error| stop(work, error))
    }

    /// Ends the response.
    ///
    /// # Errors
    /// The client has gone or is too slow.
    pub(super) fn finish(mut self, work: &Work) -> Result<(), Stop> {
        if !self.incremental {
            let body = Bytes::from(std::mem::take(&mut self.buffered));
            return self
                .send_head(ReplyBody::Whole(body))
                .map_err(|error| stop(work, error));
        }
        let sent = self
            .send_head(ReplyBody::Pieces)
            .and_then(|()| self.reply.end(work.deadline));
        sent.map_err(|error| stop(work, error))
    }

    fn send_head(&mut self, body: ReplyBody) -> Result<(), SendError> {
        match self.head.take() {
            Some(head) => self.reply.send_head(ReplyHead {
                status: head.status,
                headers: head.headers,
                body,
            }),
            None => Ok(()),
        }
    }
}

/// A whole response that needs no generation.
///
/// # Errors
/// The client has gone.
pub(super) fn whole(work: &Work, reply: &mut Reply, response: Response) -> Result<(), Stop> {
    let head = ReplyHead {
        status: response.status,
        headers: response.headers,
        body: ReplyBody::Whole(Bytes::from(response.body)),
    };
    reply.send_head(head).map_err(|error| stop(work, error))
}

fn stop(work: &Work, error: SendError) -> Stop {
    match error {
        SendError::Gone => Stop::Gone,
        SendError::Slow => work.late().into(),
    }
}

/// How long a failure may take to reach a client that is slow or late.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(5);
