//! What goes into the engine and what comes out: plain data and the two ends of a request.

use std::cell::Cell;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use visor_model::Prompt;
use visor_model::image::PixelValues;

use crate::cache::{Access, Scope, Scoping};
use crate::constraint::Grammar;
use crate::error::EngineError;

/// How a token is drawn from logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token, the lowest id of equals; finite, at least 0.
    pub temperature: f64,
    /// Share of probability kept, above 0, at most 1.
    pub top_p: f64,
    /// Likeliest tokens kept; 0 keeps all.
    pub top_k: u32,
    /// Least probability kept, as a share of the likeliest token's, 0 to 1; 0 keeps all.
    pub min_p: f64,
    /// Divides the logits of tokens in the prompt or the answer; above 0, 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the answer; finite.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token as often as it is in the answer; finite.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens before anything else; finite.
    pub logit_bias: Vec<(u32, f32)>,
    /// Equal seeds draw equal tokens from equal logits; `None` draws a seed.
    pub seed: Option<u64>,
    /// Tells every token's probability, and so many of the likeliest instead of it.
    pub logprobs: Option<u8>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            logprobs: None,
        }
    }
}

impl Sampling {
    /// Which value no token can be drawn with, if there is one.
    pub(crate) fn fault(&self) -> Option<String> {
        let positive = |value: f32| value.is_finite() && value > 0.0;
        let checks = [
            (
                "temperature",
                self.temperature.is_finite() && self.temperature >= 0.0,
            ),
            ("top_p", self.top_p > 0.0 && self.top_p <= 1.0),
            ("min_p", (0.0..=1.0).contains(&self.min_p)),
            ("repetition_penalty", positive(self.repetition_penalty)),
            ("presence_penalty", self.presence_penalty.is_finite()),
            ("frequency_penalty", self.frequency_penalty.is_finite()),
            (
                "logit_bias",
                self.logit_bias.iter().all(|(_, bias)| bias.is_finite()),
            ),
        ];
        let wrong = checks.iter().find(|(_, fits)| !fits);
        wrong.map(|(name, _)| format!("{name} is out of range in {self:?}"))
    }
}

/// A token the model might say, and how likely it held it.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenChance {
    /// Its id.
    pub token: u32,
    /// What it adds to the text: a whole character or several, or some bytes of one. A control
    /// token is spelled out.
    pub bytes: Vec<u8>,
    /// Natural logarithm of its probability at temperature 1, among the tokens that may come here, before bias and penalties.
    pub logprob: f32,
}

/// A token of the answer, and what might have been in its place.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenInfo {
    /// The token that was drawn.
    pub chosen: TokenChance,
    /// The likeliest tokens, the likeliest first, perhaps with the one that was drawn; fewer where fewer may come.
    pub alternatives: Vec<TokenChance>,
}

/// What a request may read from and store in the engine's own caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheAccess {
    /// Who shares with this request.
    pub scope: Scope,
    /// Image features.
    pub features: Access,
    /// KV blocks of prompt prefixes.
    pub prefix: Access,
    /// How long what it stores lives; `None` leaves that to the cache.
    pub ttl: Option<Duration>,
    /// Weight of what it stores in percent; 100 is neutral.
    pub weight: u32,
}

impl Default for CacheAccess {
    fn default() -> Self {
        Self::from(&Scoping::default())
    }
}

impl From<&Scoping> for CacheAccess {
    fn from(scoping: &Scoping) -> Self {
        Self {
            scope: Scope::named(&scoping.scope),
            features: scoping.embedding,
            prefix: scoping.prefix,
            ttl: scoping.ttl_s.map(|s| Duration::from_secs(u64::from(s))),
            weight: scoping.weight,
        }
    }
}

/// A flag that ends a request at its next step, prefill chunk or vision crop.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A token nobody has set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the requests that carry this token; cannot be taken back.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether somebody has set it.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// One answer to be generated.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Token ids and image slots.
    pub prompt: Prompt,
    /// The pictures, by slot index.
    pub images: Vec<Arc<PixelValues>>,
    /// Whether the answer goes on with the text that ends the prompt. Then a space it begins with
    /// is part of it; otherwise a first space only begins the first word, and is left out.
    pub continues: bool,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// What the answer may say; `None` leaves it free.
    pub grammar: Option<Arc<dyn Grammar>>,
    /// Most tokens of the answer; cut to what the context leaves.
    pub tokens_max: u32,
    /// Tokens that end the answer; not part of its text.
    pub stop_ids: Vec<u32>,
    /// Strings that end the answer; neither they nor what follows is part of its text. Empty ones
    /// are ignored.
    pub stop_strings: Vec<String>,
    /// Ends the request early.
    pub cancel: CancelToken,
    /// When the request fails if it has not finished.
    pub deadline: Option<Instant>,
    /// Use of the caches.
    pub cache: CacheAccess,
    /// Goes when the engine is done with the request and its pictures, such as what the memory of these is counted by.
    pub held: Option<Arc<dyn Debug + Send + Sync>>,
}

impl GenerateRequest {
    /// A greedy request without pictures, stops or deadline.
    pub fn new(prompt: Prompt, tokens_max: u32) -> Self {
        Self {
            prompt,
            images: Vec::new(),
            continues: false,
            sampling: Sampling::default(),
            grammar: None,
            tokens_max,
            stop_ids: Vec::new(),
            stop_strings: Vec::new(),
            cancel: CancelToken::new(),
            deadline: None,
            cache: CacheAccess::default(),
            held: None,
        }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Finish {
    /// A stop token or a stop string.
    Stop,
    /// As many tokens as were asked for, or as the context holds.
    Length,
    /// The cancel token, a dropped receiver, or the engine's end.
    Cancelled,
}

/// Tokens of one answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Positions of the prompt, image tokens included.
    pub prompt_tokens: u32,
    /// Positions that are slots of pictures.
    pub image_tokens: u32,
    /// Prompt positions whose KV values were there already when the first of the others ran.
    pub cached_tokens: u32,
    /// Generated tokens, the stop token included.
    pub completion_tokens: u32,
}

/// Where the time of one answer went, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// From submission to admission.
    pub queue_us: u64,
    /// Vision tower; 0 when all features were cached.
    pub vision_us: u64,
    /// Prompt positions, up to the first token.
    pub prefill_us: u64,
    /// Everything after the first token.
    pub decode_us: u64,
}

/// What happens to a request: `Started`, deltas, and exactly one of the other two at the end. A
/// request that ends while it waits skips `Started`.
#[derive(Debug)]
pub enum Event {
    /// Admitted: the request is no longer waiting.
    Started {
        /// Positions of the prompt, image tokens included.
        prompt_tokens: u32,
        /// Positions that are slots of pictures.
        image_tokens: u32,
        /// Prompt positions whose KV values are there already. Another request may make more of them before the first runs;
        /// the usage at the end has what it was.
        cached_tokens: u32,
    },
    /// More text: whole characters, never empty.
    Delta {
        /// The text.
        text: String,
        /// Tokens since the last delta; 0 where an earlier token's text was held back until the end.
        tokens: u32,
        /// The tokens of this text, if [`Sampling::logprobs`] asks for them. A token comes with the
        /// text it begins in; the bytes of all of them are the bytes of the whole text, unless
        /// that had characters no bytes make.
        infos: Vec<TokenInfo>,
    },
    /// The answer is complete.
    Finished {
        /// Why.
        reason: Finish,
        /// The stop string that was met.
        matched_stop: Option<String>,
        /// Tokens.
        usage: Usage,
        /// Times.
        timings: Timings,
    },
    /// The answer cannot be completed.
    Failed(EngineError),
}

impl Event {
    /// Whether nothing comes after this event.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Finished { .. } | Self::Failed(_))
    }
}

/// A whole answer, as a response cache keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// All of the text.
    pub text: String,
    /// Why it ended.
    pub reason: Finish,
    /// The stop string that was met.
    pub matched_stop: Option<String>,
    /// Tokens.
    pub usage: Usage,
}

impl Answer {
    /// Memory it takes, in bytes.
    pub fn bytes(&self) -> u64 {
        let stop = self.matched_stop.as_ref().map_or(0, String::len);
        (size_of::<Self>() + self.text.len() + stop) as u64
    }
}

/// Why [`EventReceiver::recv_timeout`] has no event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecvError {
    /// Nothing happened in that time.
    #[error("no event in time")]
    Timeout,
    /// The terminal event has been taken.
    #[error("the request has ended")]
    Ended,
}

/// The events of one request. Dropping it ends the request as a cancel token would.
///
/// The channel behind it is unbounded, so that a slow reader never stalls the engine thread and
/// with it everybody else; it holds at most one event per token of `tokens_max`, and three more.
#[derive(Debug)]
pub struct EventReceiver {
    events: Receiver<Event>,
    abandoned: Arc<AtomicBool>,
    ended: Cell<bool>,
}

impl EventReceiver {
    pub(crate) fn new(events: Receiver<Event>, abandoned: Arc<AtomicBool>) -> Self {
        Self {
            events,
            abandoned,
            ended: Cell::new(false),
        }
    }

    /// The next event; `None` once the terminal one has been taken.
    pub fn recv(&self) -> Option<Event> {
        if self.ended.get() {
            return None;
        }
        Some(self.note(self.events.recv().unwrap_or_else(|_| engine_gone())))
    }

    /// The next event, if there is one within `timeout`.
    ///
    /// # Errors
    /// [`RecvError`] says whether there may be one later.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<Event, RecvError> {
        if self.ended.get() {
            return Err(RecvError::Ended);
        }
        match self.events.recv_timeout(timeout) {
            Ok(event) => Ok(self.note(event)),
            Err(RecvTimeoutError::Timeout) => Err(RecvError::Timeout),
            Err(RecvTimeoutError::Disconnected) => Ok(self.note(engine_gone())),
        }
    }

    fn note(&self, event: Event) -> Event {
        self.ended.set(event.is_terminal());
        event
    }
}

/// The terminal event of a request whose engine thread is no more.
fn engine_gone() -> Event {
    Event::Failed(EngineError::Stopped)
}

impl Iterator for EventReceiver {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.recv()
    }
}

impl Drop for EventReceiver {
    fn drop(&mut self) {
        self.abandoned.store(true, Ordering::Release);
    }
}
