//! Running generations: the engine's events to the adapter, the adapter's bytes to the client.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use visor_engine::{Answer, Event as EngineEvent, EventReceiver, Finish, RecvError, Timings};
use visor_sandbox::{Event, Exchange, FinishReason, Generation, Head, Next, Usage};

use super::failure::Failure;
use super::generate::{self, Keep, Origin, Running};
use super::output::Output;
use super::record::Stage;
use super::reply::Reply;
use super::request::LiftedBlobs;
use super::work::{Stop, Work};

/// Longest wait before the deadline is looked at again.
const TICK: Duration = Duration::from_secs(1);

/// Runs the generations of an exchange, and those it asks for later, to the end of its response.
///
/// # Errors
/// What any of them is refused or stopped by; the caller tells the client.
pub(super) fn run(
    work: &mut Work,
    reply: &mut Reply,
    exchange: Exchange,
    lifted: &LiftedBlobs,
    (head, generations): (Head, Vec<Generation>),
) -> Result<(), Stop> {
    work.trace.incremental = head.incremental;
    let mut drive = Drive {
        exchange,
        lifted,
        queue: VecDeque::new(),
        started: 0,
        output: Output::new(reply, head),
        ended: false,
    };
    drive.start(work, generations)?;
    while let Some(running) = drive.queue.pop_front() {
        drive.follow(work, running)?;
    }
    drive.output.finish(work)
}

struct Drive<'a> {
    exchange: Exchange,
    lifted: &'a LiftedBlobs,
    /// Submitted and not yet followed. The engine serves in order, so they are followed in order.
    queue: VecDeque<Running>,
    started: u32,
    output: Output<'a>,
    /// The adapter said that its response is complete.
    ended: bool,
}

impl Drive<'_> {
    /// Takes generations as far as the engine's queue.
    fn start(&mut self, work: &mut Work, generations: Vec<Generation>) -> Result<(), Stop> {
        let count_max = work.call.pinned.config.server.generations_per_request_max;
        for mut generation in generations {
            if self.started == count_max {
                let message = format!("the request needs more than {count_max} generations");
                return Err(Failure::unsupported("n", message).into());
            }
            self.lifted.restore(&mut generation);
            let running = generate::start(work, generation, self.started)?;
            self.queue.push_back(running);
            self.started += 1;
        }
        Ok(())
    }

    /// Follows one generation to its last event.
    fn follow(&mut self, work: &mut Work, running: Running) -> Result<(), Stop> {
        let Running {
            index,
            origin,
            prefill,
            keep,
        } = running;
        let mut told = Told {
            index,
            prefill,
            text: String::new(),
            events: Vec::new(),
            over: false,
        };
        match origin {
            Origin::Cache(answer) => {
                work.trace.response_cached = true;
                told.answer(work, &answer);
                self.advance(work, &mut told)
            }
            Origin::Engine(events) => {
                self.listen(work, &events, &mut told, keep)?;
                Ok(())
            }
        }
    }

    fn listen(
        &mut self,
        work: &mut Work,
        events: &EventReceiver,
        told: &mut Told,
        keep: Option<Keep>,
    ) -> Result<(), Stop> {
        let mut keep = keep;
        while !told.over && !self.ended {
            work.check()?;
            match events.recv_timeout(self.patience(work)) {
                Ok(event) => self.tell(work, told, event, &mut keep)?,
                Err(RecvError::Timeout) => {
                    self.keep_alive(work)?;
                    continue;
                }
                Err(RecvError::Ended) => return Err(Failure::internal().into()),
            }
            // Whatever else has come by now goes along: one call of the adapter for all of it.
            while !told.over
                && let Ok(event) = events.recv_timeout(Duration::ZERO)
            {
                self.tell(work, told, event, &mut keep)?;
            }
            self.advance(work, told)?;
        }
        Ok(())
    }

    /// Tells one event. A failure before the head ends the exchange with its proper status; after
    /// it, the adapter hears of it as the generation's last event.
    fn tell(
        &mut self,
        work: &mut Work,
        told: &mut Told,
        event: EngineEvent,
        keep: &mut Option<Keep>,
    ) -> Result<(), Stop> {
        match told.event(work, event, keep) {
            Err(Stop::Failed(failure)) if self.output.head_sent() => {
                work.trace.failed = Some(failure.outcome);
                told.events.push(Event::Failed {
                    generation: told.index,
                    error: failure.error,
                });
                told.over = true;
                Ok(())
            }
            told => told,
        }
    }

    /// Hands over the events told so far and does what the adapter wants.
    fn advance(&mut self, work: &mut Work, told: &mut Told) -> Result<(), Stop> {
        let events = std::mem::take(&mut told.events);
        if events.is_empty() || self.ended {
            return Ok(());
        }
        let began = Instant::now();
        let progress = self.exchange.advance(events);
        work.trace.stages.add(Stage::Adapter, began.elapsed());
        let progress = progress.map_err(Failure::from)?;
        self.output.write(work, progress.bytes)?;
        match progress.next {
            Next::More => Ok(()),
            Next::End => {
                self.ended = true;
                // Whatever else runs for this exchange has nobody left to talk to.
                self.queue.clear();
                Ok(())
            }
            Next::Generate(generations) => self.start(work, generations),
        }
    }

    /// Until the next keep-alive, the deadline, or the next look at both.
    fn patience(&self, work: &Work) -> Duration {
        let left = work.deadline.saturating_duration_since(Instant::now());
        left.min(self.until_keep_alive(work).unwrap_or(TICK))
            .min(TICK)
    }

    fn until_keep_alive(&self, work: &Work) -> Option<Duration> {
        let every = Duration::from_secs(work.call.pinned.config.server.keep_alive_s);
        let wanted = self.output.incremental() && !every.is_zero();
        wanted.then(|| every.saturating_sub(self.output.written.elapsed()))
    }

    fn keep_alive(&mut self, work: &mut Work) -> Result<(), Stop> {
        if self
            .until_keep_alive(work)
            .is_some_and(|left| left.is_zero())
        {
            let bytes = self.exchange.keep_alive().map_err(Failure::from)?;
            self.output.written = Instant::now();
            self.output.write(work, bytes)?;
        }
        Ok(())
    }
}

/// One generation in the words of the contract.
struct Told {
    index: u32,
    prefill: Option<String>,
    /// All of its text so far.
    text: String,
    /// Not yet handed over.
    events: Vec<Event>,
    /// The last event was told.
    over: bool,
}

impl Told {
    fn event(
        &mut self,
        work: &mut Work,
        event: EngineEvent,
        keep: &mut Option<Keep>,
    ) -> Result<(), Stop> {
        match event {
            EngineEvent::Started {
                prompt_tokens,
                image_tokens,
                cached_tokens,
            } => {
                self.started(Usage {
                    prompt_tokens,
                    image_tokens,
                    cached_tokens,
                    completion_tokens: 0,
                });
            }
            EngineEvent::Delta { text, .. } => {
                work.text_came();
                self.delta(&text);
            }
            EngineEvent::Finished {
                reason: Finish::Cancelled,
                ..
            } => {
                // Only the client's leaving and the deadline cancel.
                work.check()?;
                return Err(Stop::Gone);
            }
            EngineEvent::Finished {
                reason,
                matched_stop,
                usage,
                timings,
            } => {
                let stages = &mut work.trace.stages;
                stages.add_us(Stage::Queue, timings.queue_us);
                stages.add_us(Stage::Vision, timings.vision_us);
                stages.add_us(Stage::Prefill, timings.prefill_us);
                stages.add_us(Stage::Decode, timings.decode_us);
                let answer = Answer {
                    text: std::mem::take(&mut self.text),
                    reason,
                    matched_stop,
                    usage,
                };
                self.finish(work, &answer, timings);
                if let Some(keep) = keep.take() {
                    keep_answer(work, keep, answer);
                }
            }
            EngineEvent::Failed(error) => return Err(generate::refused(work, &error).into()),
        }
        Ok(())
    }

    /// A whole answer from the cache, told as if it were made now.
    fn answer(&mut self, work: &mut Work, answer: &Answer) {
        // Nothing of the prompt was computed for this request.
        let usage = visor_engine::Usage {
            cached_tokens: answer.usage.prompt_tokens,
            ..answer.usage
        };
        // The kept text has the prefill in it already.
        self.prefill = None;
        self.started(Usage {
            completion_tokens: 0,
            ..told_usage(usage)
        });
        work.text_came();
        self.push_delta(answer.text.clone());
        self.finish(
            work,
            &Answer {
                usage,
                ..answer.clone()
            },
            Timings::default(),
        );
    }

    fn started(&mut self, usage: Usage) {
        self.events.push(Event::Started {
            generation: self.index,
            usage,
        });
        if let Some(prefill) = self.prefill.take() {
            self.delta(&prefill);
        }
    }

    fn delta(&mut self, text: &str) {
        self.text.push_str(text);
        self.push_delta(text.to_owned());
    }

    /// Neighbouring deltas become one.
    fn push_delta(&mut self, text: String) {
        if text.is_empty() {
            return;
        }
        if let Some(Event::Delta { text: before, .. }) = self.events.last_mut() {
            before.push_str(&text);
            return;
        }
        self.events.push(Event::Delta {
            generation: self.index,
            choice: 0,
            text,
            tokens: Vec::new(),
        });
    }

    fn finish(&mut self, work: &mut Work, answer: &Answer, timings: Timings) {
        let usage = answer.usage;
        let tokens = &mut work.trace.tokens;
        tokens.prompt += u64::from(usage.prompt_tokens);
        tokens.image += u64::from(usage.image_tokens);
        tokens.cached += u64::from(usage.cached_tokens);
        tokens.completion += u64::from(usage.completion_tokens);
        let (reason, word) = match answer.reason {
            Finish::Stop => (FinishReason::Stop, "stop"),
            Finish::Length => (FinishReason::Length, "length"),
            Finish::Cancelled => (FinishReason::Cancelled, "cancelled"),
        };
        work.trace.finishes.push(word);
        self.events.push(Event::Finish {
            generation: self.index,
            choice: 0,
            reason,
            matched_stop: answer.matched_stop.clone(),
        });
        self.events.push(Event::Done {
            generation: self.index,
            usage: told_usage(usage),
            queue_us: timings.queue_us,
            prefill_us: timings.vision_us.saturating_add(timings.prefill_us),
            decode_us: timings.decode_us,
        });
        self.over = true;
    }
}

fn told_usage(usage: visor_engine::Usage) -> Usage {
    Usage {
        prompt_tokens: usage.prompt_tokens,
        image_tokens: usage.image_tokens,
        cached_tokens: usage.cached_tokens,
        completion_tokens: usage.completion_tokens,
    }
}

/// Keeps a whole answer for whoever asks the same.
fn keep_answer(work: &Work, keep: Keep, answer: Answer) {
    let tokens = answer
        .usage
        .prompt_tokens
        .saturating_add(answer.usage.completion_tokens);
    let bytes = answer.bytes();
    let entry = keep.sharing.entry(bytes, keep.began.elapsed(), tokens);
    work.call
        .house
        .responses
        .insert(keep.key, Arc::new(answer), &entry);
}
