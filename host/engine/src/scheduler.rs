//! The loop on the engine thread: only it and its two rooms decide what runs next (`forward`: a step; `trouble`: what became of one).
//!
//! Sequences are admitted first come, first served, as long as there are KV blocks for them, and run together: a step takes one
//! token of each that decodes, and of the others as many prompt positions as fit beside them; the pictures of the first that
//! needs some get a slice of time before. Where nobody waits for a token, prompts run in larger chunks. Between steps the
//! loop takes in what has arrived, so that whatever wakes it is one variant of [`Wake`], matched in [`Scheduler::serve`].
//!
//! When KV blocks run out, cached ones go first; then the sequence that came last gives up its own and waits in front of all
//! that wait. It loses nothing but time.

mod forward;
mod trouble;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use visor_model::Tokenizer;

use crate::features::FeatureStore;
use crate::guard::{self, Trouble};
use crate::job::{Interrupt, Job};
use crate::model::{Model, ModelLoader};
use crate::pace::Pace;
use crate::prefix_cache::PrefixStore;
use crate::request::Finish;
use crate::sequence::{Bench, Sequence};
use crate::shared::{EngineState, Shared};
use crate::slot::ModelSlot;
use crate::stats::EngineStats;

/// How long nothing has to arrive before free memory goes back: whoever asks again and again does not wait for it to come back.
const RESTED: Duration = Duration::from_secs(2);

/// Whatever can wake the loop.
pub(crate) enum Wake {
    /// A request has arrived.
    Submit(Box<Job>),
    /// The engine is to end; when, is in [`Shared`].
    Stop,
    /// The last handle is gone: nothing will arrive any more.
    Orphaned,
    /// Nothing has arrived and there is work.
    Step,
}

pub(crate) type Features<L> = <<L as ModelLoader>::Model as Model>::Features;
pub(crate) type Block<L> = <<L as ModelLoader>::Model as Model>::Block;

/// How the loop shares out its time.
pub(crate) struct Slices {
    /// Sequences that run at once.
    pub(crate) sequences_max: usize,
    /// Prompt positions of a step beside which nobody decodes.
    pub(crate) chunk_tokens: usize,
    /// What pictures and prompts may add to the time between two tokens of a sequence that decodes.
    pub(crate) slice: Duration,
    /// Draft tokens of a step, of all its sequences together.
    pub(crate) draft_tokens_max: usize,
}

/// What sequences leave for others.
pub(crate) struct Stores<F, B> {
    pub(crate) features: FeatureStore<F>,
    pub(crate) prefixes: PrefixStore<B>,
}

impl<F, B> Stores<F, B> {
    /// These, and a model to compute with.
    fn bench<'a, M: Model<Features = F, Block = B>>(&'a mut self, model: &'a M) -> Bench<'a, M> {
        Bench {
            model,
            features: &self.features,
            prefixes: &mut self.prefixes,
        }
    }
}

pub(crate) struct Scheduler<L: ModelLoader> {
    slot: ModelSlot<L>,
    stores: Stores<Features<L>, Block<L>>,
    tokenizer: Arc<Tokenizer>,
    inbox: Receiver<Wake>,
    slices: Slices,
    pace: Pace,
    /// `None` before loading, and when no device works any more.
    model: Option<L::Model>,
    /// Those that were admitted before and had to give up their blocks, then those that were not.
    waiting: VecDeque<Sequence<L::Model>>,
    /// In the order of their admission.
    running: Vec<Sequence<L::Model>>,
    /// Sequences so far.
    admitted: u64,
    /// There were no KV blocks for the first that waits; there will be none before a sequence leaves.
    is_full: bool,
    /// Whether a sequence that has to run alone ran in the last step: the others are next.
    ran_alone: bool,
    is_orphaned: bool,
}

impl<L: ModelLoader> Scheduler<L> {
    pub(crate) fn new(
        slot: ModelSlot<L>,
        stores: Stores<Features<L>, Block<L>>,
        tokenizer: Arc<Tokenizer>,
        inbox: Receiver<Wake>,
        slices: Slices,
    ) -> Self {
        Self {
            slot,
            stores,
            tokenizer,
            inbox,
            slices,
            pace: Pace::default(),
            model: None,
            waiting: VecDeque::new(),
            running: Vec::new(),
            admitted: 0,
            is_full: false,
            ran_alone: false,
            is_orphaned: false,
        }
    }

    /// The engine thread.
    pub(crate) fn run(self) {
        let shared = Arc::clone(&self.slot.shared);
        // Whatever a bug here leaves behind is dropped; receivers then see the engine's end.
        let ended = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let mut stats = shared.stats();
        (stats.waiting, stats.waiting_tokens) = (0, 0);
        (stats.running, stats.running_tokens) = (0, 0);
        drop(stats);
        match ended {
            Err(panic) => {
                let why = format!("the engine thread panicked: {}", guard::message(&*panic));
                tracing::error!(why);
                shared.set_state(EngineState::Failed(why));
            }
            Ok(()) if matches!(shared.state(), EngineState::Failed(_)) => (),
            Ok(()) => shared.set_state(EngineState::Stopped),
        }
    }

    fn serve(mut self) {
        self.model = self.slot.load(&self.tokenizer);
        self.reset_prefixes();
        while let Some(wake) = self.next_wake() {
            match wake {
                Wake::Submit(job) => self.wait(*job),
                // `next_wake` and `sweep` look at the time.
                Wake::Stop => (),
                Wake::Orphaned => self.is_orphaned = true,
                Wake::Step => self.step(),
            }
        }
        self.turn_away();
    }

    fn wait(&mut self, job: Job) {
        self.waiting.push_back(Sequence::new(job, &self.tokenizer));
    }

    /// What to do next; `None` when there is nothing and nothing will come.
    fn next_wake(&mut self) -> Option<Wake> {
        self.model.as_ref()?;
        let has_work = !self.running.is_empty() || !self.waiting.is_empty();
        let is_ending = self.is_orphaned || self.shared().is_stopping();
        match self.inbox.try_recv() {
            Ok(wake) => Some(wake),
            Err(TryRecvError::Disconnected) if !self.is_orphaned => Some(Wake::Orphaned),
            Err(_) if has_work => Some(Wake::Step),
            Err(_) if is_ending => None,
            Err(_) => Some(self.rest()),
        }
    }

    /// Waits for what comes next. After a while, memory that the work has left free goes back to the system.
    fn rest(&self) -> Wake {
        match self.inbox.recv_timeout(RESTED) {
            Err(RecvTimeoutError::Timeout) => {
                if let Some(model) = &self.model {
                    model.return_spare_memory();
                }
                visor_model::return_free_memory();
                self.inbox.recv().unwrap_or(Wake::Orphaned)
            }
            woken => woken.unwrap_or(Wake::Orphaned),
        }
    }

    /// One round: whoever ends early ends, whoever fits comes in, pictures get a slice, and positions run.
    fn step(&mut self) {
        self.sweep();
        self.admit();
        self.note_kv();
        self.see();
        self.forward();
        self.note_kv();
    }

    /// Ends sequences that need not go on or wait any more.
    fn sweep(&mut self) {
        let is_stop_due = self.shared().is_stop_due();
        let interrupt = |sequence: &Sequence<L::Model>| {
            let interrupt = sequence.watch().interrupt();
            interrupt.or(is_stop_due.then_some(Interrupt::Stopped))
        };
        for sequence in std::mem::take(&mut self.waiting) {
            match interrupt(&sequence) {
                None => self.waiting.push_back(sequence),
                Some(interrupt) => self.interrupt(sequence, interrupt),
            }
        }
        for sequence in std::mem::take(&mut self.running) {
            match interrupt(&sequence) {
                None => self.running.push(sequence),
                Some(interrupt) => self.interrupt(sequence, interrupt),
            }
        }
    }

    /// Starts those in front as long as there is room.
    fn admit(&mut self) {
        // Whoever runs alone has all blocks there are.
        self.is_full &= !self.running.is_empty();
        while self.running.len() < self.slices.sequences_max
            && !self.is_full
            && self.model.is_some()
            && let Some(mut sequence) = self.waiting.pop_front()
        {
            let (is_first, cached) = (!sequence.was_admitted(), sequence.usage().cached_tokens);
            match self.start(&mut sequence) {
                Err(Trouble::Full) if !self.running.is_empty() => {
                    self.is_full = true;
                    self.waiting.push_front(sequence);
                }
                started => {
                    self.count_in(&mut sequence, is_first);
                    self.count_cached(&sequence, cached);
                    match started {
                        Ok(()) if sequence.request.tokens_max == 0 => {
                            self.end(sequence, Finish::Length, None);
                        }
                        Ok(()) => self.put_back(sequence),
                        Err(trouble) => self.troubled(vec![sequence], trouble),
                    }
                }
            }
        }
    }

    /// Starts a sequence.
    fn start(&mut self, sequence: &mut Sequence<L::Model>) -> Result<(), Trouble> {
        let Some(model) = &self.model else {
            return Err(Trouble::Cancelled);
        };
        let size = model.kv().block_positions.max(1);
        let growth = self.running.iter().map(|other| other.growth_blocks(size));
        let growth = growth.sum();
        sequence.start(&mut self.stores.bench(model), growth)
    }

    /// Does what needs KV blocks, giving up cached ones until it succeeds or there are none left.
    fn with_room(
        &mut self,
        mut work: impl FnMut(&mut Bench<'_, L::Model>) -> Result<(), Trouble>,
    ) -> Result<(), Trouble> {
        let Some(model) = &self.model else {
            return Err(Trouble::Cancelled);
        };
        let mut bench = self.stores.bench(model);
        let mut is_last = false;
        loop {
            match work(&mut bench) {
                Err(Trouble::Full) if bench.prefixes.evict() => is_last = false,
                // A cache may have dropped the last of its own in the meantime.
                Err(Trouble::Full) if !is_last => is_last = true,
                result => return result,
            }
        }
    }

    fn count_in(&mut self, sequence: &mut Sequence<L::Model>, is_first: bool) {
        if is_first {
            self.admitted += 1;
            sequence.order = self.admitted;
        }
        let usage = sequence.usage();
        let mut stats = self.shared().stats();
        stats.unwait(sequence.request.prompt.ids.len());
        stats.running += 1;
        if is_first {
            stats.prompt_tokens += u64::from(usage.prompt_tokens);
            stats.image_tokens += u64::from(usage.image_tokens);
        }
    }

    /// What a sequence has adopted was counted as so many tokens `before`.
    fn count_cached(&self, sequence: &Sequence<L::Model>, before: u32) {
        let mut stats = self.shared().stats();
        stats.cached_tokens += u64::from(sequence.usage().cached_tokens);
        stats.cached_tokens -= u64::from(before);
    }

    /// A slice of time for the pictures of the first sequence that needs some.
    fn see(&mut self) {
        let Some(index) = self.running.iter().position(Sequence::needs_vision) else {
            return;
        };
        let (Some(model), shared) = (&self.model, &self.slot.shared) else {
            return;
        };
        // Where prompts wait, too, they and the pictures share the slice.
        let is_shared = self.running.iter().any(|sequence| sequence.pending() > 1);
        let until = Instant::now() + self.slices.slice / if is_shared { 2 } else { 1 };
        let mut sequence = self.running.remove(index);
        let watch = sequence.watch();
        let keep_going =
            || Instant::now() < until && watch.interrupt().is_none() && !shared.is_stop_due();
        let mut bench = self.stores.bench(model);
        let seen = sequence.see(&mut bench, &keep_going);
        match seen {
            Ok(()) => self.put_back(sequence),
            Err(trouble) => self.troubled(vec![sequence], trouble),
        }
    }

    /// One that ran and holds nothing any more waits in front of all others.
    fn wait_again(&mut self, sequence: Sequence<L::Model>) {
        self.is_full = false;
        let mut stats = self.shared().stats();
        stats.running -= 1;
        stats.wait(sequence.request.prompt.ids.len());
        drop(stats);
        self.waiting.push_front(sequence);
    }

    /// Among those that run, to its place in the order of admission.
    fn put_back(&mut self, sequence: Sequence<L::Model>) {
        let before = |other: &Sequence<L::Model>| other.order < sequence.order;
        let place = self.running.partition_point(before);
        self.running.insert(place, sequence);
    }

    fn end(&mut self, mut sequence: Sequence<L::Model>, reason: Finish, stop: Option<String>) {
        self.close(&mut sequence, Outcome::Finished);
        sequence.finish(reason, stop);
    }

    fn interrupt(&mut self, mut sequence: Sequence<L::Model>, interrupt: Interrupt) {
        let outcome = match interrupt {
            Interrupt::Stopped if !sequence.was_admitted() => Outcome::Failed,
            interrupt => Outcome::from(interrupt),
        };
        if sequence.is_idle() {
            // Another may be the first that waits.
            self.is_full = false;
            let prompt_tokens = sequence.request.prompt.ids.len();
            let timings = sequence.was_admitted().then(|| sequence.timings());
            self.count_out(outcome, |stats| {
                stats.unwait(prompt_tokens);
                if let Some(timings) = &timings {
                    stats.add_timings(timings);
                }
            });
        } else {
            self.close(&mut sequence, outcome);
        }
        sequence.interrupt(interrupt);
    }

    /// Counts a running sequence and its KV blocks out, before its client hears of the end: whoever asks next finds room, and hears so.
    fn close(&mut self, sequence: &mut Sequence<L::Model>, outcome: Outcome) {
        self.is_full = false;
        let (tokens, timings) = (sequence.len() as u64, sequence.timings());
        sequence.rewind();
        let kv = self.model.as_ref().map(Model::kv);
        self.count_out(outcome, |stats| {
            stats.running -= 1;
            stats.running_tokens = stats.running_tokens.saturating_sub(tokens);
            stats.add_timings(&timings);
            if let Some(kv) = kv {
                stats.kv_blocks_used = kv.blocks_used as u64;
            }
        });
    }

    fn count_out(&self, outcome: Outcome, change: impl FnOnce(&mut EngineStats)) {
        let mut stats = self.shared().stats();
        change(&mut stats);
        match outcome {
            Outcome::Finished => stats.finished += 1,
            Outcome::Aborted => stats.aborted += 1,
            Outcome::Failed => stats.failed += 1,
        }
    }

    fn note_step(&self, sequences: usize, positions: usize) {
        self.shared().stats().add_step(sequences, positions);
    }

    fn note_kv(&self) {
        let Some(model) = &self.model else { return };
        let kv = model.kv();
        let tokens: usize = self.running.iter().map(Sequence::len).sum();
        let mut stats = self.shared().stats();
        stats.running_tokens = tokens as u64;
        stats.kv_blocks_used = kv.blocks_used as u64;
        stats.kv_blocks_max = kv.blocks_max as u64;
        stats.kv_block_bytes = kv.block_bytes;
    }

    /// Ends what arrived too late to be served.
    fn turn_away(&mut self) {
        while let Ok(wake) = self.inbox.try_recv() {
            if let Wake::Submit(job) = wake {
                self.wait(*job);
            }
        }
        for sequence in std::mem::take(&mut self.waiting) {
            self.interrupt(sequence, Interrupt::Stopped);
        }
    }

    fn shared(&self) -> &Shared {
        &self.slot.shared
    }
}

/// Takes a sequence out by its order.
fn take<M: Model>(running: &mut Vec<Sequence<M>>, order: u64) -> Option<Sequence<M>> {
    let place = running
        .iter()
        .position(|sequence| sequence.order == order)?;
    Some(running.remove(place))
}

/// How a request is counted.
#[derive(Clone, Copy)]
enum Outcome {
    Finished,
    Aborted,
    Failed,
}

impl From<Interrupt> for Outcome {
    fn from(interrupt: Interrupt) -> Self {
        match interrupt {
            Interrupt::Cancelled | Interrupt::Stopped => Self::Aborted,
            Interrupt::Deadline => Self::Failed,
        }
    }
}
