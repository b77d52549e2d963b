//! One generation in the words of the contract: the engine's events of all its choices, as the
//! adapter is told them.

use std::sync::Arc;

use visor_engine::{Answer, EngineError, Event as EngineEvent, Finish, Timings};
use visor_sandbox::{Event, FinishReason, TokenChance, TokenInfo, Usage};

use super::generate::{self, Keep};
use super::record::Stage;
use super::work::{Stop, Work};
use crate::calls::{Calls, Reader, Said};

/// What an adapter was told of one generation, and what it is to be told next.
pub(super) struct Told {
    /// Its number within the exchange.
    index: u32,
    /// Text every answer begins with.
    prefill: Option<String>,
    choices: Vec<Choice>,
    started: bool,
    /// The prompt once, the answers together, as far as they came.
    usage: visor_engine::Usage,
    /// What of it is in the notes of the exchange.
    noted: visor_engine::Usage,
    timings: Timings,
    /// Not yet handed over.
    events: Vec<Event>,
    /// The last event was told.
    over: bool,
}

/// One of its answers.
#[derive(Debug, Clone, Default)]
struct Choice {
    /// All of its text so far, as the model said it.
    text: String,
    reader: Reader,
    /// Of text that is held back until it is told from a call.
    tokens: Vec<TokenInfo>,
    /// Generated so far.
    completion_tokens: u32,
    over: bool,
}

impl Told {
    /// Nothing was told yet of so many choices, which may be calls.
    pub(super) fn new(
        index: u32,
        prefill: Option<String>,
        (choices, calls): (usize, Option<Arc<Calls>>),
    ) -> Self {
        let choice = Choice {
            reader: Reader::new(calls),
            ..Choice::default()
        };
        Self {
            index,
            prefill,
            choices: vec![choice; choices],
            started: false,
            usage: visor_engine::Usage::default(),
            noted: visor_engine::Usage::default(),
            timings: Timings::default(),
            events: Vec::new(),
            over: false,
        }
    }

    /// Whether the last event was told.
    pub(super) fn over(&self) -> bool {
        self.over
    }

    /// Whether the last event of a choice was told.
    pub(super) fn choice_over(&self, choice: usize) -> bool {
        self.over || self.choices[choice].over
    }

    /// Whether something is to be handed over.
    pub(super) fn pending(&self) -> bool {
        !self.events.is_empty()
    }

    /// What is to be handed over now.
    pub(super) fn take(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// An event of a choice.
    ///
    /// # Errors
    /// A choice that cannot be completed: the generation has failed.
    pub(super) fn event(
        &mut self,
        work: &mut Work,
        choice: usize,
        event: EngineEvent,
        keep: &mut Option<Keep>,
    ) -> Result<(), Stop> {
        self.count(work, choice, &event);
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
                if let Some(prefill) = self.prefill.clone() {
                    self.delta(choice, prefill, Vec::new());
                }
            }
            EngineEvent::Delta { text, infos, .. } => {
                // The time between two texts is that of one answer.
                if choice == 0 {
                    work.text_came();
                }
                self.delta(choice, text, infos.into_iter().map(info).collect());
            }
            EngineEvent::Finished {
                reason: Finish::Cancelled,
                ..
            } => {
                // Only the client's leaving, the deadline and the engine's end cancel.
                work.check()?;
                return Err(generate::refused(work, &EngineError::Stopped).into());
            }
            EngineEvent::Finished {
                reason,
                matched_stop,
                usage,
                timings,
            } => {
                let answer = Answer {
                    text: std::mem::take(&mut self.choices[choice].text),
                    reason,
                    matched_stop,
                    usage,
                };
                self.finish(work, choice, &answer, timings);
                if let Some(keep) = keep.take() {
                    keep_answer(work, keep, answer);
                }
            }
            EngineEvent::Failed(error) => return Err(generate::refused(work, &error).into()),
        }
        Ok(())
    }

    /// Counts what an event says was used, whether or not anybody is told of it.
    pub(super) fn count(&mut self, work: &mut Work, choice: usize, event: &EngineEvent) {
        let usage = match event {
            EngineEvent::Started {
                prompt_tokens,
                image_tokens,
                cached_tokens,
            } if !self.started => visor_engine::Usage {
                prompt_tokens: *prompt_tokens,
                image_tokens: *image_tokens,
                cached_tokens: *cached_tokens,
                completion_tokens: self.choices[choice].completion_tokens,
            },
            EngineEvent::Delta { tokens, .. } => visor_engine::Usage {
                completion_tokens: self.choices[choice].completion_tokens + tokens,
                ..self.usage
            },
            // It may have waited to its end, and then nothing of the prompt was used.
            EngineEvent::Finished {
                reason: Finish::Cancelled,
                usage,
                ..
            } => visor_engine::Usage {
                completion_tokens: usage.completion_tokens,
                ..self.usage
            },
            EngineEvent::Finished { usage, .. } => *usage,
            EngineEvent::Started { .. } | EngineEvent::Failed(_) => return,
        };
        self.used(work, choice, usage);
    }

    /// The generation failed after the head was out.
    pub(super) fn failed(&mut self, error: visor_sandbox::GuestError) {
        self.events.push(Event::Failed {
            generation: self.index,
            error,
        });
        self.over = true;
    }

    /// A prompt that was only counted.
    pub(super) fn counted(&mut self, work: &mut Work, usage: visor_engine::Usage) {
        self.started(told_usage(usage));
        self.usage = usage;
        self.note(work);
        self.done();
    }

    /// A whole answer from the cache, told as if it were made now.
    pub(super) fn answer(&mut self, work: &mut Work, choice: usize, answer: &Answer) {
        // Nothing of the prompt was computed for this request.
        let usage = visor_engine::Usage {
            cached_tokens: answer.usage.prompt_tokens,
            ..answer.usage
        };
        self.started(Usage {
            completion_tokens: 0,
            ..told_usage(usage)
        });
        if choice == 0 {
            work.text_came();
        }
        self.used(work, choice, usage);
        // The kept text has the prefill in it already.
        self.said(choice, &answer.text, Vec::new());
        let answer = Answer {
            usage,
            ..answer.clone()
        };
        self.finish(work, choice, &answer, Timings::default());
    }

    fn started(&mut self, usage: Usage) {
        if !self.started {
            self.started = true;
            self.events.push(Event::Started {
                generation: self.index,
                usage,
            });
        }
    }

    fn delta(&mut self, choice: usize, text: String, tokens: Vec<TokenInfo>) {
        self.choices[choice].text.push_str(&text);
        self.said(choice, &text, tokens);
    }

    /// What the model said becomes text or calls, as far as it can be told. Of calls no tokens are told.
    fn said(&mut self, choice: usize, text: &str, tokens: Vec<TokenInfo>) {
        let own = &mut self.choices[choice];
        own.tokens.extend(tokens);
        for said in own.reader.take(text) {
            let tokens = std::mem::take(&mut self.choices[choice].tokens);
            match said {
                Said::Text(text) => self.push_delta(choice, text, tokens),
                Said::Call(call) => self.events.push(Event::ToolCall {
                    generation: self.index,
                    choice: number(choice),
                    call,
                }),
            }
        }
    }

    /// What was held back to the end.
    fn rest(&mut self, choice: usize, whole: bool) {
        let own = &mut self.choices[choice];
        if let Some(text) = own.reader.finish(whole) {
            let tokens = std::mem::take(&mut own.tokens);
            self.push_delta(choice, text, tokens);
        }
    }

    /// Neighbouring deltas of a choice become one.
    fn push_delta(&mut self, choice: usize, text: String, tokens: Vec<TokenInfo>) {
        if text.is_empty() {
            return;
        }
        let choice = number(choice);
        match self.events.last_mut() {
            Some(Event::Delta {
                choice: last,
                text: before,
                tokens: told,
                ..
            }) if *last == choice => {
                before.push_str(&text);
                told.extend(tokens);
            }
            _ => self.events.push(Event::Delta {
                generation: self.index,
                choice,
                text,
                tokens,
            }),
        }
    }

    fn finish(&mut self, work: &mut Work, choice: usize, answer: &Answer, timings: Timings) {
        let whole = answer.reason == Finish::Stop && answer.matched_stop.is_none();
        self.rest(choice, whole);
        let called = self.choices[choice].reader.calls() > 0;
        let (reason, word) = match answer.reason {
            Finish::Stop if called => (FinishReason::ToolCalls, "stop"),
            Finish::Stop => (FinishReason::Stop, "stop"),
            Finish::Length => (FinishReason::Length, "length"),
            Finish::Cancelled => (FinishReason::Cancelled, "cancelled"),
        };
        work.trace.finishes.push(word);
        self.events.push(Event::Finish {
            generation: self.index,
            choice: number(choice),
            reason,
            matched_stop: answer.matched_stop.clone(),
        });
        let stages = &mut work.trace.stages;
        stages.add_us(Stage::Queue, timings.queue_us);
        stages.add_us(Stage::Vision, timings.vision_us);
        stages.add_us(Stage::Prefill, timings.prefill_us);
        stages.add_us(Stage::Decode, timings.decode_us);
        self.timings.queue_us += timings.queue_us;
        self.timings.vision_us += timings.vision_us;
        self.timings.prefill_us += timings.prefill_us;
        self.timings.decode_us += timings.decode_us;
        self.choices[choice].over = true;
        if self.choices.iter().all(|choice| choice.over) {
            self.done();
        }
    }

    /// What the prompt and one of the answers came to so far.
    fn used(&mut self, work: &mut Work, choice: usize, usage: visor_engine::Usage) {
        let own = &mut self.choices[choice].completion_tokens;
        let before = std::mem::replace(own, usage.completion_tokens);
        let answers = self.usage.completion_tokens - before + usage.completion_tokens;
        self.usage = visor_engine::Usage {
            completion_tokens: answers,
            ..usage
        };
        self.note(work);
    }

    /// Notes what was used so far, in place of what was noted before: whenever the exchange ends, its notes have it once.
    fn note(&mut self, work: &mut Work) {
        let now = self.usage;
        let before = std::mem::replace(&mut self.noted, now);
        let tokens = &mut work.trace.tokens;
        for (total, before, now) in [
            (&mut tokens.prompt, before.prompt_tokens, now.prompt_tokens),
            (&mut tokens.image, before.image_tokens, now.image_tokens),
            (&mut tokens.cached, before.cached_tokens, now.cached_tokens),
            (
                &mut tokens.completion,
                before.completion_tokens,
                now.completion_tokens,
            ),
        ] {
            *total = *total - u64::from(before) + u64::from(now);
        }
    }

    fn done(&mut self) {
        let (usage, timings) = (self.usage, self.timings);
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

/// Choices are counted in u32, by the contract.
fn number(choice: usize) -> u32 {
    u32::try_from(choice).unwrap_or(u32::MAX)
}

fn info(info: visor_engine::TokenInfo) -> TokenInfo {
    TokenInfo {
        chosen: chance(info.chosen),
        alternatives: info.alternatives.into_iter().map(chance).collect(),
    }
}

fn chance(chance: visor_engine::TokenChance) -> TokenChance {
    TokenChance {
        token: chance.token,
        bytes: chance.bytes,
        logprob: chance.logprob,
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
fn keep_answer(work: &Work, keep: Keep, mut answer: Answer) {
    let tokens = answer
        .usage
        .prompt_tokens
        .saturating_add(answer.usage.completion_tokens);
    answer.text.shrink_to_fit();
    let bytes = answer.bytes();
    let entry = keep.sharing.entry(bytes, keep.began.elapsed(), tokens);
    work.call
        .house
        .responses
        .insert(keep.key, Arc::new(answer), &entry);
}
