//! One request inside the engine, as a state machine. A step is one picture, one chunk of pending
//! positions, or one token; the scheduler decides when it happens.

use std::sync::Arc;
use std::time::Instant;

use visor_model::{ModelError, Tokenizer};

use crate::error::EngineError;
use crate::features::FeatureStore;
use crate::guard::{Trouble, guarded};
use crate::job::{Job, Outlet, count, micros};
use crate::model::Model;
use crate::output::Output;
use crate::request::{Event, Finish, GenerateRequest, Timings, TokenInfo, Usage};
use crate::sampler::{Sampled, Sampler};

/// What is being computed.
enum Phase<M: Model> {
    /// The pictures, in order; those so far.
    Vision(Vec<Arc<M::Features>>),
    /// Positions: the prompt's, then one per token.
    Forward(M::State),
}

/// What a step led to.
pub(crate) enum Progress {
    /// There is more to compute.
    More,
    /// The answer is complete; the stop string that was met.
    Done(Finish, Option<String>),
}

/// What a step needs besides the sequence.
pub(crate) struct Bench<'a, M: Model> {
    pub(crate) model: &'a M,
    pub(crate) features: &'a FeatureStore<M::Features>,
    pub(crate) chunk_tokens: usize,
    pub(crate) is_stop_due: &'a (dyn Fn() -> bool + Sync),
}

/// An admitted request.
pub(crate) struct Sequence<M: Model> {
    pub(crate) request: GenerateRequest,
    pub(crate) outlet: Outlet,
    phase: Phase<M>,
    sampler: Sampler,
    output: Output,
    /// Generated so far. What a fallback needs to go on where it was.
    tokens: Vec<u32>,
    tokens_unsent: u32,
    timings: Timings,
}

impl<M: Model> Sequence<M> {
    /// Admits a request and tells its client so.
    pub(crate) fn admit(job: Job, tokenizer: &Arc<Tokenizer>) -> Self {
        let Job {
            mut request,
            outlet,
        } = job;
        let stop_strings = std::mem::take(&mut request.stop_strings);
        let timings = Timings {
            queue_us: micros(outlet.submitted.elapsed()),
            ..Timings::default()
        };
        let sequence = Self {
            phase: Phase::Vision(Vec::new()),
            sampler: Sampler::new(&request.sampling, &request.prompt.ids),
            output: Output::new(Arc::clone(tokenizer), stop_strings, request.continues),
            tokens: Vec::new(),
            tokens_unsent: 0,
            timings,
            request,
            outlet,
        };
        let usage = sequence.usage();
        sequence.outlet.send(Event::Started {
            prompt_tokens: usage.prompt_tokens,
            image_tokens: usage.image_tokens,
            cached_tokens: usage.cached_tokens,
        });
        sequence
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage {
            completion_tokens: count(self.tokens.len()),
            ..self.request.prompt_usage()
        }
    }

    pub(crate) fn timings(&self) -> Timings {
        self.timings
    }

    /// Forgets everything that was computed, not what was generated: the next steps compute it
    /// again, on another model, and go on behind the last token.
    pub(crate) fn rewind(&mut self) {
        self.phase = Phase::Vision(Vec::new());
    }

    /// One step. After trouble the sequence can only be rewound or ended.
    pub(crate) fn step(&mut self, bench: &Bench<'_, M>) -> Result<Progress, Trouble> {
        if self.request.tokens_max == 0 {
            return Ok(Progress::Done(Finish::Length, None));
        }
        let began = Instant::now();
        let is_prefill = self.tokens.is_empty();
        let mut phase = std::mem::replace(&mut self.phase, Phase::Vision(Vec::new()));
        let (result, is_vision) = match &mut phase {
            Phase::Vision(features) if features.len() < self.request.images.len() => {
                (self.encode(features, bench), true)
            }
            Phase::Vision(features) => {
                let begun = self.begin(features, bench.model);
                let begun = begun.map(|state| {
                    phase = Phase::Forward(state);
                    Progress::More
                });
                (begun, false)
            }
            Phase::Forward(state) => (self.forward(state, bench), false),
        };
        self.phase = phase;
        let spent = micros(began.elapsed());
        match (is_vision, is_prefill) {
            // `encode` counts what the tower took, not the lookup.
            (true, _) => (),
            (false, true) => self.timings.prefill_us += spent,
            (false, false) => self.timings.decode_us += spent,
        }
        result
    }

    /// The next picture's features: an earlier picture's of this request, cached, or computed.
    fn encode(
        &mut self,
        features: &mut Vec<Arc<M::Features>>,
        bench: &Bench<'_, M>,
    ) -> Result<Progress, Trouble> {
        let images = &self.request.images;
        let pixels = &images[features.len()];
        let earlier = images[..features.len()]
            .iter()
            .position(|p| p.key == pixels.key);
        if let Some(earlier) = earlier {
            features.push(Arc::clone(&features[earlier]));
            return Ok(Progress::More);
        }
        let keep_going =
            || self.outlet.interrupt(&self.request).is_none() && !(bench.is_stop_due)();
        let encoded =
            bench
                .features
                .find_or_encode(bench.model, pixels, &self.request.cache, &keep_going)?;
        features.push(encoded.features);
        self.timings.vision_us += micros(encoded.time);
        Ok(Progress::More)
    }

    /// The prompt, and behind it whatever was generated before a fallback.
    fn begin(&self, features: &[Arc<M::Features>], model: &M) -> Result<M::State, Trouble> {
        guarded(|| {
            let mut state = model.begin(&self.request.prompt, features)?;
            for token in &self.tokens {
                model.push(&mut state, *token)?;
            }
            Ok(state)
        })
    }

    fn forward(&mut self, state: &mut M::State, bench: &Bench<'_, M>) -> Result<Progress, Trouble> {
        let logits = guarded(|| bench.model.advance(state, bench.chunk_tokens))?;
        let Some(logits) = logits else {
            return Ok(Progress::More);
        };
        let sampled = self.sampler.sample(logits);
        let sampled = sampled.map_err(|error| Trouble::Broken(Box::new(error)))?;
        let token = sampled.token;
        let progress = self.accept(sampled);
        if matches!(progress, Progress::More) {
            match guarded(|| bench.model.push(state, token)) {
                // The model's own end comes before the one that was asked for.
                Err(Trouble::Refused(ModelError::TooLong { .. })) => {
                    return Ok(Progress::Done(Finish::Length, None));
                }
                pushed => pushed?,
            }
        }
        Ok(progress)
    }

    /// Takes a generated token: text to the client, and whether the answer ends with it.
    fn accept(&mut self, sampled: Sampled) -> Progress {
        let token = sampled.token;
        self.tokens.push(token);
        self.tokens_unsent += 1;
        if self.request.stop_ids.contains(&token) {
            return Progress::Done(Finish::Stop, None);
        }
        let passed = self.output.push(sampled);
        self.send_delta(passed.text, passed.infos);
        if passed.stop.is_some() {
            return Progress::Done(Finish::Stop, passed.stop);
        }
        if count(self.tokens.len()) >= self.request.tokens_max {
            return Progress::Done(Finish::Length, None);
        }
        Progress::More
    }

    fn send_delta(&mut self, text: String, infos: Vec<TokenInfo>) {
        if !text.is_empty() {
            let tokens = std::mem::take(&mut self.tokens_unsent);
            self.outlet.send(Event::Delta {
                text,
                tokens,
                infos,
            });
        }
    }

    /// The terminal event of an answer, behind the text that was held back for a stop string.
    pub(crate) fn finish(mut self, reason: Finish, matched_stop: Option<String>) {
        if matched_stop.is_none() {
            let (rest, infos) = self.output.finish();
            self.send_delta(rest, infos);
        }
        self.outlet.send(Event::Finished {
            reason,
            matched_stop,
            usage: self.usage(),
            timings: self.timings,
        });
    }

    /// The terminal event of a request that cannot be completed.
    pub(crate) fn fail(self, error: EngineError) {
        self.outlet.send(Event::Failed(error));
    }
}
