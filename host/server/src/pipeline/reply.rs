//! The way back to the client: one head, then pieces, from the exchange's thread to the HTTP side.
//!
//! The channel of pieces is bounded, so a slow client slows its own exchange and nothing else. A
//! reply that is dropped without [`Reply::end`] is torn: the HTTP side then closes the connection,
//! so that a client never takes half an answer for a whole one.

use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

/// Status and headers, and how the body comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplyHead {
    /// HTTP status, 200 to 599.
    pub status: u16,
    /// Headers, in order.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: ReplyBody,
}

/// How the body of a reply comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplyBody {
    /// All at once.
    Whole(Bytes),
    /// Piece by piece, through the channel.
    Pieces,
}

/// What travels through the channel after a head that announced pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Bytes to write now.
    Bytes(Bytes),
    /// The body is complete.
    End,
}

/// The HTTP side's ends of a reply.
#[derive(Debug)]
pub struct ReplyReceiver {
    /// Resolves to the head.
    pub head: oneshot::Receiver<ReplyHead>,
    /// The pieces after it.
    pub pieces: mpsc::Receiver<Piece>,
}

/// Why nothing more can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The client left.
    #[error("the client has gone")]
    Gone,
    /// The client did not take the bytes before the request's deadline.
    #[error("the client was too slow")]
    Slow,
}

/// The exchange's end of a reply.
pub struct Reply {
    head: Option<oneshot::Sender<ReplyHead>>,
    pieces: mpsc::Sender<Piece>,
    runtime: Handle,
    /// What the exchange holds, let go before the last of the answer is out.
    place: Option<Box<dyn Send>>,
    /// Status of the head that was sent.
    status: Option<u16>,
    /// Time spent waiting for the client.
    waited: Duration,
}

impl Reply {
    /// Both ends; at most `pieces_max` pieces wait in between. `place` is dropped before the last of
    /// the answer is sent, so that whoever has read it all finds the place free.
    pub fn new(
        pieces_max: usize,
        runtime: Handle,
        place: impl Send + 'static,
    ) -> (Self, ReplyReceiver) {
        let (head_sender, head) = oneshot::channel();
        let (piece_sender, pieces) = mpsc::channel(pieces_max.max(1));
        let reply = Self {
            head: Some(head_sender),
            pieces: piece_sender,
            runtime,
            place: Some(Box::new(place)),
            status: None,
            waited: Duration::ZERO,
        };
        (reply, ReplyReceiver { head, pieces })
    }

    /// Whether the head is out, so that no status can be chosen any more.
    pub fn head_sent(&self) -> bool {
        self.head.is_none()
    }

    /// Status of the head that was sent.
    pub fn status(&self) -> Option<u16> {
        self.status
    }

    /// Time spent waiting for the client so far.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// Sends the head. Panics when it was sent before: the caller looks at [`Self::head_sent`].
    ///
    /// # Errors
    /// The client left.
    pub fn send_head(&mut self, head: ReplyHead) -> Result<(), SendError> {
        let sender = self.head.take().expect("a head is sent once");
        self.status = Some(head.status);
        if matches!(head.body, ReplyBody::Whole(_)) {
            self.place = None;
        }
        sender.send(head).map_err(|_| SendError::Gone)
    }

    /// Writes a piece; blocks while the client is behind, at most until `deadline`.
    ///
    /// # Errors
    /// The client left, or was too slow.
    pub fn send_bytes(&mut self, bytes: Bytes, deadline: Instant) -> Result<(), SendError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.send(Piece::Bytes(bytes), deadline)
    }

    /// Ends a body that came in pieces.
    ///
    /// # Errors
    /// The client left, or was too slow.
    pub fn end(&mut self, deadline: Instant) -> Result<(), SendError> {
        self.place = None;
        self.send(Piece::End, deadline)
    }

    fn send(&mut self, piece: Piece, deadline: Instant) -> Result<(), SendError> {
        let piece = match self.pieces.try_send(piece) {
            Ok(()) => return Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(SendError::Gone),
            Err(mpsc::error::TrySendError::Full(piece)) => piece,
        };
        let began = Instant::now();
        let patience = deadline.saturating_duration_since(began);
        let sent = self
            .runtime
            .block_on(self.pieces.send_timeout(piece, patience));
        self.waited += began.elapsed();
        sent.map_err(|error| match error {
            mpsc::error::SendTimeoutError::Timeout(_) => SendError::Slow,
            mpsc::error::SendTimeoutError::Closed(_) => SendError::Gone,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pieces_arrive_in_order_and_a_slow_client_is_given_up_on() {
        let (mut reply, mut receiver) = Reply::new(2, Handle::current(), ());
        let thread = tokio::task::spawn_blocking(move || {
            let soon = Instant::now() + Duration::from_millis(50);
            let head = ReplyHead {
                status: 200,
                headers: Vec::new(),
                body: ReplyBody::Pieces,
            };
            reply.send_head(head).expect("the receiver is there");
            let sent: Vec<_> = (0..3)
                .map(|n| reply.send_bytes(Bytes::from(vec![n]), soon))
                .collect();
            assert_eq!(sent, [Ok(()), Ok(()), Err(SendError::Slow)]);
            reply
        });
        assert_eq!(receiver.head.await.expect("a head").status, 200);
        let reply = thread.await.expect("no panic");
        assert!(reply.head_sent() && reply.waited() >= Duration::from_millis(40));
        for n in 0..2 {
            assert_eq!(
                receiver.pieces.recv().await,
                Some(Piece::Bytes(Bytes::from(vec![n])))
            );
        }
        drop(reply);
        assert_eq!(receiver.pieces.recv().await, None, "torn: no end was said");
    }

    #[tokio::test]
    async fn a_client_that_left_is_noticed() {
        let (mut reply, receiver) = Reply::new(2, Handle::current(), ());
        drop(receiver);
        let deadline = Instant::now() + Duration::from_secs(5);
        assert_eq!(
            reply.send_bytes(Bytes::from_static(b"x"), deadline),
            Err(SendError::Gone)
        );
    }
}
