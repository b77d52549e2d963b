//! A request on its way from the handle to the scheduler, and the engine's end of its events.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use crate::error::EngineError;
use crate::request::{CancelToken, Event, EventReceiver, GenerateRequest, Usage};

/// Where a request's events go, and how its client can be seen to have left.
pub(crate) struct Outlet {
    events: Sender<Event>,
    abandoned: Arc<AtomicBool>,
    pub(crate) submitted: Instant,
}

impl Outlet {
    /// Sends an event. A receiver that is gone has set `abandoned`, which is looked at anyway.
    pub(crate) fn send(&self, event: Event) {
        let _gone = self.events.send(event);
    }

    /// What tells that the request has to end.
    pub(crate) fn watch(&self, request: &GenerateRequest) -> Watch {
        Watch {
            cancel: request.cancel.clone(),
            abandoned: Arc::clone(&self.abandoned),
            deadline: request.deadline,
        }
    }

    /// The error of a request whose deadline has passed.
    pub(crate) fn deadline_passed(&self) -> EngineError {
        EngineError::DeadlinePassed {
            waited: self.submitted.elapsed(),
        }
    }
}

/// Whether a request still has somebody who waits for it.
pub(crate) struct Watch {
    cancel: CancelToken,
    abandoned: Arc<AtomicBool>,
    deadline: Option<Instant>,
}

impl Watch {
    /// Why the request has to end now, if it has to.
    pub(crate) fn interrupt(&self) -> Option<Interrupt> {
        if self.cancel.is_cancelled() || self.abandoned.load(Ordering::Acquire) {
            return Some(Interrupt::Cancelled);
        }
        let late = |deadline: Instant| deadline <= Instant::now();
        let late = self.deadline.is_some_and(late);
        late.then_some(Interrupt::Deadline)
    }
}

/// Why a request ends before its answer is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interrupt {
    /// By its own side.
    Cancelled,
    /// Its deadline passed.
    Deadline,
    /// The engine ends.
    Stopped,
}

/// A request that waits.
pub(crate) struct Job {
    pub(crate) request: GenerateRequest,
    pub(crate) outlet: Outlet,
}

impl Job {
    /// A checked request, its answer cut to what the context leaves.
    pub(crate) fn new(
        mut request: GenerateRequest,
        context_tokens_max: u32,
    ) -> (Self, EventReceiver) {
        let left = context_tokens_max.saturating_sub(count(request.prompt.ids.len()));
        request.tokens_max = request.tokens_max.min(left);
        let (events, receiver) = channel();
        let abandoned = Arc::new(AtomicBool::new(false));
        let receiver = EventReceiver::new(receiver, Arc::clone(&abandoned));
        let outlet = Outlet {
            events,
            abandoned,
            submitted: Instant::now(),
        };
        (Self { request, outlet }, receiver)
    }
}

impl GenerateRequest {
    /// The usage before the first token.
    pub(crate) fn prompt_usage(&self) -> Usage {
        Usage {
            prompt_tokens: count(self.prompt.ids.len()),
            image_tokens: self.prompt.image_tokens,
            cached_tokens: 0,
            completion_tokens: 0,
        }
    }
}

pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Tokens of a prompt or an answer: fewer than `context_tokens_max`, a u32.
pub(crate) fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}
