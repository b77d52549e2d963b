//! One request inside the engine, as a state machine: its pictures, then its positions, prompt first. The scheduler decides
//! what of it runs when.

mod answer;

use std::sync::Arc;
use std::time::{Duration, Instant};

use visor_model::Tokenizer;

use crate::drafter::Drafter;
use crate::error::EngineError;
use crate::features::FeatureStore;
use crate::guard::{Trouble, guarded};
use crate::job::{Interrupt, Job, Outlet, Watch, count, micros};
use crate::model::{Model, Part};
use crate::output::Output;
use crate::prefix_cache::{Chain, Ground, PrefixStore, Worth};
use crate::request::{Event, Finish, GenerateRequest, Timings, Usage};
use crate::sampler::Sampler;
use answer::Unsent;
pub(crate) use answer::{Progress, Taken};

/// KV blocks, beside those for what it has, that a sequence needs to go on with.
pub(crate) const HEADROOM_BLOCKS: usize = 2;
/// Of what it has, the part that one has to be able to grow by that ran before: what it computes again is to pay.
const HEADROOM_SHARE: usize = 8;

/// What is being computed.
enum Phase<M: Model> {
    /// Nothing: whatever there was is forgotten.
    Idle,
    /// Pictures, in order; the one under way.
    Vision(M::State, Box<Picture<M>>),
    /// Positions: the prompt's, then one per token.
    Forward(M::State),
}

/// A picture, perhaps half done.
struct Picture<M: Model> {
    index: usize,
    pass: M::Pass,
    /// What it has taken so far.
    time: Duration,
}

/// What sequences are computed with.
pub(crate) struct Bench<'a, M: Model> {
    pub(crate) model: &'a M,
    pub(crate) features: &'a FeatureStore<M::Features>,
    pub(crate) prefixes: &'a mut PrefixStore<M::Block>,
}

impl<M: Model> Bench<'_, M> {
    /// Gives up cached blocks until so many are free; none where that would not be enough.
    fn make_room(&self, blocks: usize) -> Result<(), Trouble> {
        let free = || {
            let kv = self.model.kv();
            kv.blocks_max.saturating_sub(kv.blocks_used)
        };
        if free() >= blocks {
            return Ok(());
        }
        // In this order: what is removed in between counts twice rather than not at all.
        let evictable = self.prefixes.evictable();
        if evictable + free() < blocks {
            return Err(Trouble::Full);
        }
        while free() < blocks && self.prefixes.evict() {}
        Ok(())
    }
}

/// An admitted request.
pub(crate) struct Sequence<M: Model> {
    pub(crate) request: GenerateRequest,
    pub(crate) outlet: Outlet,
    phase: Phase<M>,
    /// What the positions depend on; empty while idle.
    chain: Option<Chain>,
    /// Which pictures have slots that have to run.
    wanted: Vec<bool>,
    sampler: Sampler,
    output: Output,
    drafter: Drafter,
    /// Positions at its end that are drafts of the step under way.
    drafts: Vec<u32>,
    /// Generated so far. What is needed to go on where it was.
    tokens: Vec<u32>,
    /// What its client has not heard yet.
    unsent: Unsent,
    /// Prompt positions that were there when the first of the others ran; `None` before admission.
    cached_tokens: Option<u32>,
    /// Positions that it adopted when it was started, or since; those behind them are its own.
    adopted: usize,
    /// Whether a step has run any of its positions, before it was started the last time perhaps.
    has_run: bool,
    timings: Timings,
    /// A step of which it was a part failed: it runs alone until one succeeds, so that it is known whose fault it is.
    pub(crate) is_suspect: bool,
    /// Its place in the order of admission; 0 before.
    pub(crate) order: u64,
}

impl<M: Model> Sequence<M> {
    /// A request to be admitted, which is when [`Self::start`] first succeeds.
    pub(crate) fn new(job: Job, tokenizer: &Arc<Tokenizer>) -> Self {
        let Job {
            mut request,
            outlet,
        } = job;
        let stop_strings = std::mem::take(&mut request.stop_strings);
        Self {
            phase: Phase::Idle,
            chain: None,
            wanted: vec![false; request.images.len()],
            sampler: Sampler::new(&request),
            output: Output::new(Arc::clone(tokenizer), stop_strings, request.continues),
            drafter: Drafter::new(),
            drafts: Vec::new(),
            tokens: Vec::new(),
            unsent: Unsent::default(),
            cached_tokens: None,
            adopted: 0,
            has_run: false,
            timings: Timings::default(),
            is_suspect: false,
            order: 0,
            request,
            outlet,
        }
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage {
            completion_tokens: count(self.tokens.len()),
            cached_tokens: self.cached_tokens.unwrap_or(0),
            ..self.request.prompt_usage()
        }
    }

    /// What tells that it has to end.
    pub(crate) fn watch(&self) -> Watch {
        self.outlet.watch(&self.request)
    }

    pub(crate) fn timings(&self) -> Timings {
        self.timings
    }

    /// Whether it has to be started, or started again.
    pub(crate) fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Idle)
    }

    /// Whether its client has heard that it was admitted.
    pub(crate) fn was_admitted(&self) -> bool {
        self.cached_tokens.is_some()
    }

    pub(crate) fn needs_vision(&self) -> bool {
        matches!(self.phase, Phase::Vision(..))
    }

    /// Whether it generates a token with each step.
    pub(crate) fn is_decoding(&self) -> bool {
        !self.tokens.is_empty() && self.pending() == 1
    }

    /// Positions that wait to be run, once the pictures are there.
    pub(crate) fn pending(&self) -> usize {
        match &self.phase {
            Phase::Forward(state) => M::pending(state),
            Phase::Idle | Phase::Vision(..) => 0,
        }
    }

    /// Positions in all: of the prompt, and generated.
    pub(crate) fn len(&self) -> usize {
        self.request.prompt.ids.len() + self.tokens.len()
    }

    /// Forgets everything that was computed, not what was generated: started again, on this model or another, it goes on behind
    /// the last token.
    pub(crate) fn rewind(&mut self) {
        self.phase = Phase::Idle;
        self.chain = None;
        self.drafts.clear();
    }

    /// KV blocks of `size` positions that it will take before long, beside those for what it has.
    pub(crate) fn growth_blocks(&self, size: usize) -> usize {
        let left = self.request.tokens_max as usize - self.tokens.len();
        let share = if self.tokens.is_empty() {
            0
        } else {
            self.len() / HEADROOM_SHARE
        };
        let growth = left.min(share.max(HEADROOM_BLOCKS * size));
        (self.len() + growth).div_ceil(size) - self.len().div_ceil(size)
    }

    /// Takes KV blocks for all that is known of it, those of equal beginnings among them; the first time its client is told.
    /// There have to be as many as it will take before long, too, and `others_growth`: whoever comes in to lose its blocks again a
    /// few tokens later computes in vain.
    ///
    /// # Errors
    /// [`Trouble::Full`] when there are not as many; it is idle then.
    pub(crate) fn start(
        &mut self,
        bench: &mut Bench<'_, M>,
        others_growth: usize,
    ) -> Result<(), Trouble> {
        let model = bench.model;
        let image_tokens: Vec<u32> = self
            .request
            .images
            .iter()
            .map(|p| p.image_tokens())
            .collect();
        let chain = Chain::new(&self.ground(bench), &self.request, &self.tokens);
        let found = bench
            .prefixes
            .find(&chain, &self.request.cache, (0, self.len() - 1));
        let size = model.kv().block_positions.max(1);
        let shared = found.as_ref().map_or(0, |found| found.whole_blocks(size));
        let own = self.len().div_ceil(size).saturating_sub(shared) + self.growth_blocks(size);
        bench.make_room(own + others_growth)?;
        let state = guarded(|| {
            let mut state = model.begin(&self.request.prompt, &image_tokens)?;
            for token in &self.tokens {
                model.push(&mut state, *token)?;
            }
            if let Some(found) = &found {
                model.adopt(&mut state, &found.blocks, found.positions)?;
            }
            model.reserve(&mut state, self.len())?;
            Ok(state)
        })?;
        bench
            .prefixes
            .count(&chain, &self.request.cache, found.as_ref());
        let is_first = !self.was_admitted();
        self.chain = Some(chain);
        self.note_adopted(self.len() - M::pending(&state));
        self.want_pictures(self.adopted, model);
        self.phase = match self.wanted.iter().position(|wanted| *wanted) {
            Some(first) => Phase::Vision(state, Box::new(Picture::new(first))),
            None => Phase::Forward(state),
        };
        if is_first {
            self.timings.queue_us = micros(self.outlet.submitted.elapsed());
            let usage = self.usage();
            self.outlet.send(Event::Started {
                prompt_tokens: usage.prompt_tokens,
                image_tokens: usage.image_tokens,
                cached_tokens: usage.cached_tokens,
            });
        }
        Ok(())
    }

    /// It begins behind so many positions.
    fn note_adopted(&mut self, positions: usize) {
        self.adopted = positions;
        if !self.has_run {
            self.cached_tokens = Some(count(positions));
        }
    }

    fn ground<'a>(&self, bench: &'a Bench<'_, M>) -> Ground<'a> {
        Ground {
            model_digest: &bench.prefixes.model_digest,
            device: bench.model.device(),
            is_long: bench.model.is_long(self.len()),
        }
    }

    /// Pictures with a slot behind what was adopted; all of them when the sequence may grow into the other rope regime, which runs
    /// everything again.
    fn want_pictures(&mut self, adopted: usize, model: &M) {
        let most = self.request.prompt.ids.len() + self.request.tokens_max as usize;
        let may_rebuild = model.is_long(most) != model.is_long(self.len());
        self.wanted.fill(may_rebuild);
        for id in self.request.prompt.ids.iter().skip(adopted) {
            let index = usize::try_from(-(id + 1)).ok();
            if let Some(wanted) = index.and_then(|index| self.wanted.get_mut(index)) {
                *wanted = true;
            }
        }
    }

    /// Goes on with the pictures until `keep_going` says no. The next phase begins with the last of them.
    pub(crate) fn see(
        &mut self,
        bench: &mut Bench<'_, M>,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<(), Trouble> {
        let Phase::Vision(mut state, mut picture) = std::mem::replace(&mut self.phase, Phase::Idle)
        else {
            return Ok(());
        };
        while let Some(features) = self.features(&mut picture, bench, keep_going)? {
            self.fill(&mut state, picture.index, &features, bench.model)?;
            *picture = Picture::new(self.next_picture(picture.index));
            if picture.index == self.request.images.len() {
                self.phase = Phase::Forward(state);
                return Ok(());
            }
            if !keep_going() {
                break;
            }
        }
        self.phase = Phase::Vision(state, picture);
        Ok(())
    }

    /// The features of a picture: found, or made. `None` when `keep_going` said no before they were.
    fn features(
        &mut self,
        picture: &mut Picture<M>,
        bench: &Bench<'_, M>,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<Arc<M::Features>>, Trouble> {
        let (pixels, cache) = (&self.request.images[picture.index], &self.request.cache);
        if picture.time.is_zero() {
            let found = bench.features.find(bench.model.device(), pixels, cache);
            if found.is_some() {
                return Ok(found);
            }
        }
        let began = Instant::now();
        let pass = &mut picture.pass;
        let made = guarded(|| bench.model.advance_image(pass, pixels, keep_going))?.map(Arc::new);
        picture.time += began.elapsed();
        self.timings.vision_us += micros(began.elapsed());
        if let Some(made) = &made {
            let kept = (cache, made, picture.time);
            bench.features.keep(bench.model, pixels, kept);
        }
        Ok(made)
    }

    /// The next picture that is wanted and differs from all before.
    fn next_picture(&self, after: usize) -> usize {
        let images = &self.request.images;
        let is_new = |index: usize| {
            let key = images[index].key;
            images[..index]
                .iter()
                .zip(&self.wanted)
                .all(|(p, wanted)| !wanted || p.key != key)
        };
        (after + 1..images.len())
            .find(|index| self.wanted[*index] && is_new(*index))
            .unwrap_or(images.len())
    }

    /// Gives the state a picture's features, wherever the picture appears.
    fn fill(
        &self,
        state: &mut M::State,
        index: usize,
        features: &Arc<M::Features>,
        model: &M,
    ) -> Result<(), Trouble> {
        let key = self.request.images[index].key;
        for (place, pixels) in self.request.images.iter().enumerate() {
            if pixels.key == key {
                guarded(|| model.set_features(state, place, Arc::clone(features)))?;
            }
        }
        Ok(())
    }

    /// Looks for equal beginnings once more, before the first position runs: another sequence may have run them by now.
    pub(crate) fn look_again(&mut self, bench: &mut Bench<'_, M>) -> Result<(), Trouble> {
        let len = self.len();
        let (Phase::Forward(state), Some(chain)) = (&mut self.phase, &self.chain) else {
            return Ok(());
        };
        let done = len - M::pending(state);
        if done > self.adopted || !self.tokens.is_empty() {
            return Ok(());
        }
        let find = bench
            .prefixes
            .find(chain, &self.request.cache, (done.max(1), len - 1));
        let Some(found) = find else { return Ok(()) };
        // It gives up at least as many blocks as it takes.
        guarded(|| {
            bench.model.adopt(state, &found.blocks, found.positions)?;
            bench.model.reserve(state, len)
        })?;
        bench
            .prefixes
            .count(chain, &self.request.cache, Some(&found));
        self.note_adopted(found.positions);
        Ok(())
    }

    /// Makes sure that a step of so many positions has its KV blocks; a first one, after a change of the rope regime, those of all
    /// that it gave up.
    pub(crate) fn reserve(&mut self, positions: usize, model: &M) -> Result<(), Trouble> {
        let len = self.len();
        let Phase::Forward(state) = &mut self.phase else {
            return Ok(());
        };
        let done = len - M::pending(state);
        let positions = if done == 0 { len } else { done + positions };
        guarded(|| model.reserve(state, positions))
    }

    /// Its part of a step; `None` when nothing of it can run.
    pub(crate) fn part(&mut self, positions_max: usize) -> Option<Part<'_, M::State>> {
        match &mut self.phase {
            Phase::Forward(state) => Some(Part {
                state,
                positions_max,
                drafts: self.drafts.len(),
            }),
            Phase::Idle | Phase::Vision(..) => None,
        }
    }

    /// Adds the time of a step it had a part in.
    pub(crate) fn count_step(&mut self, time: Duration) {
        self.has_run = true;
        let stage = if self.tokens.is_empty() {
            &mut self.timings.prefill_us
        } else {
            &mut self.timings.decode_us
        };
        *stage += micros(time);
    }

    /// Leaves the KV blocks of what has run to sequences that begin the same: whole ones while it goes on, all of them `at_end`.
    pub(crate) fn share(&self, bench: &mut Bench<'_, M>, at_end: bool) {
        let (Phase::Forward(state), Some(chain)) = (&self.phase, &self.chain) else {
            return;
        };
        let kv = bench.model.kv();
        let blocks = M::share(state);
        let Some(positions) = chain.len().checked_sub(M::pending(state)) else {
            return;
        };
        // A rebuild in the other rope regime is not what the chain says.
        if blocks.is_empty() || chain.is_long() != bench.model.is_long(chain.len()) {
            return;
        }
        let positions = if at_end {
            positions
        } else {
            positions - positions % kv.block_positions
        };
        let ran = self
            .len()
            .saturating_sub(self.usage().cached_tokens as usize);
        let worth = Worth {
            block_bytes: kv.block_bytes,
            position_us: (self.timings.prefill_us + self.timings.decode_us) / ran.max(1) as u64,
        };
        bench
            .prefixes
            .keep(chain, blocks, positions, (&self.request.cache, &worth));
    }

    /// Ends it before its time.
    pub(crate) fn interrupt(mut self, interrupt: Interrupt) {
        let was_admitted = self.was_admitted();
        if !was_admitted {
            self.timings.queue_us = micros(self.outlet.submitted.elapsed());
        }
        match interrupt {
            Interrupt::Deadline => {
                let error = self.outlet.deadline_passed();
                self.fail(error);
            }
            Interrupt::Stopped if !was_admitted => self.fail(EngineError::Stopped),
            Interrupt::Stopped | Interrupt::Cancelled => self.finish(Finish::Cancelled, None),
        }
    }

    /// The terminal event of an answer, behind the text that was held back for a stop string.
    pub(crate) fn finish(mut self, reason: Finish, matched_stop: Option<String>) {
        if matched_stop.is_none() {
            let (rest, infos) = self.output.finish();
            self.unsent.text.push_str(&rest);
            self.unsent.infos.extend(infos);
        }
        self.send_delta();
        self.let_go();
        self.outlet.send(Event::Finished {
            reason,
            matched_stop,
            usage: self.usage(),
            timings: self.timings,
        });
    }

    /// Whoever hears of the end finds its blocks and the memory of its pictures free.
    fn let_go(&mut self) {
        self.rewind();
        self.request.images.clear();
        self.request.held = None;
    }

    /// The terminal event of a request that cannot be completed.
    pub(crate) fn fail(mut self, error: EngineError) {
        self.let_go();
        self.outlet.send(Event::Failed(error));
    }
}

impl<M: Model> Picture<M> {
    fn new(index: usize) -> Self {
        Self {
            index,
            pass: M::Pass::default(),
            time: Duration::ZERO,
        }
    }
}
