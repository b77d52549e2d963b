//! The loop on the engine thread: the only file that decides what runs next.
//!
//! First come, first served, one sequence at a time. A step is one picture, one chunk of pending
//! positions or one token; between steps the loop takes in what has arrived, so that whatever
//! wakes it is one variant of [`Wake`], matched in [`Scheduler::serve`]. Running several sequences
//! changes `running` and [`Scheduler::step`], and nothing outside this file.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};

use visor_model::Tokenizer;

use crate::error::EngineError;
use crate::features::FeatureStore;
use crate::guard::{self, Trouble, guarded};
use crate::job::{Interrupt, Job};
use crate::model::{Model, ModelLoader};
use crate::request::Finish;
use crate::sequence::{Bench, Progress, Sequence};
use crate::shared::{EngineState, Shared};
use crate::slot::{ModelSlot, chain};

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

type Features<L> = <<L as ModelLoader>::Model as Model>::Features;

pub(crate) struct Scheduler<L: ModelLoader> {
    slot: ModelSlot<L>,
    features: FeatureStore<Features<L>>,
    tokenizer: Arc<Tokenizer>,
    inbox: Receiver<Wake>,
    chunk_tokens: usize,
    /// `None` before loading, and when no device works any more.
    model: Option<L::Model>,
    waiting: VecDeque<Job>,
    running: Option<Sequence<L::Model>>,
    is_orphaned: bool,
}

impl<L: ModelLoader> Scheduler<L> {
    pub(crate) fn new(
        slot: ModelSlot<L>,
        features: FeatureStore<Features<L>>,
        tokenizer: Arc<Tokenizer>,
        inbox: Receiver<Wake>,
        chunk_tokens: usize,
    ) -> Self {
        Self {
            slot,
            features,
            tokenizer,
            inbox,
            chunk_tokens,
            model: None,
            waiting: VecDeque::new(),
            running: None,
            is_orphaned: false,
        }
    }

    /// The engine thread.
    pub(crate) fn run(self) {
        let shared = Arc::clone(&self.slot.shared);
        // Whatever a bug here leaves behind is dropped; receivers then see the engine's end.
        let ended = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let mut stats = shared.stats();
        (stats.waiting, stats.running, stats.running_tokens) = (0, 0, 0);
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
        while let Some(wake) = self.next_wake() {
            match wake {
                Wake::Submit(job) => self.waiting.push_back(*job),
                // `next_wake` and `sweep` look at the time.
                Wake::Stop => (),
                Wake::Orphaned => self.is_orphaned = true,
                Wake::Step => self.step(),
            }
        }
        self.turn_away();
    }

    /// What to do next; `None` when there is nothing and nothing will come.
    fn next_wake(&mut self) -> Option<Wake> {
        self.model.as_ref()?;
        let has_work = self.running.is_some() || !self.waiting.is_empty();
        let is_ending = self.is_orphaned || self.shared().is_stopping();
        match self.inbox.try_recv() {
            Ok(wake) => Some(wake),
            Err(TryRecvError::Disconnected) if !self.is_orphaned => Some(Wake::Orphaned),
            Err(_) if has_work => Some(Wake::Step),
            Err(_) if is_ending => None,
            Err(_) => Some(self.inbox.recv().unwrap_or(Wake::Orphaned)),
        }
    }

    /// One unit of work for whoever is next.
    fn step(&mut self) {
        self.sweep();
        if self.running.is_none() {
            self.running = self.admit();
        }
        let Some(mut sequence) = self.running.take() else {
            return;
        };
        if let Some(interrupt) = self.interrupt(&sequence) {
            return self.interrupted(sequence, interrupt);
        }
        let tokens_before = sequence.usage().completion_tokens;
        let result = {
            let Some(model) = &self.model else { return };
            let shared = self.shared();
            sequence.step(&Bench {
                model,
                features: &self.features,
                chunk_tokens: self.chunk_tokens,
                is_stop_due: &|| shared.is_stop_due(),
            })
        };
        let usage = sequence.usage();
        let mut stats = self.shared().stats();
        stats.completion_tokens += u64::from(usage.completion_tokens - tokens_before);
        stats.running_tokens = u64::from(usage.prompt_tokens + usage.completion_tokens);
        drop(stats);
        match result {
            Ok(Progress::More) => self.running = Some(sequence),
            Ok(Progress::Done(reason, stop)) => {
                self.close(&sequence, Outcome::Finished);
                sequence.finish(reason, stop);
            }
            Err(trouble) => self.troubled(sequence, trouble),
        }
    }

    /// Ends waiting requests that need not wait any more.
    fn sweep(&mut self) {
        let is_stop_due = self.shared().is_stop_due();
        let mut kept = VecDeque::with_capacity(self.waiting.len());
        for job in std::mem::take(&mut self.waiting) {
            let interrupt = job.outlet.interrupt(&job.request);
            match interrupt.or(is_stop_due.then_some(Interrupt::Stopped)) {
                None => kept.push_back(job),
                Some(interrupt) => {
                    self.count_out(Outcome::from(interrupt), |stats| stats.waiting -= 1);
                    job.end(interrupt);
                }
            }
        }
        self.waiting = kept;
    }

    fn admit(&mut self) -> Option<Sequence<L::Model>> {
        let job = self.waiting.pop_front()?;
        let usage = job.request.prompt_usage();
        let mut stats = self.shared().stats();
        stats.waiting -= 1;
        stats.running += 1;
        stats.prompt_tokens += u64::from(usage.prompt_tokens);
        stats.image_tokens += u64::from(usage.image_tokens);
        stats.running_tokens = u64::from(usage.prompt_tokens);
        drop(stats);
        Some(Sequence::admit(job, &self.tokenizer))
    }

    fn interrupt(&self, sequence: &Sequence<L::Model>) -> Option<Interrupt> {
        let interrupt = sequence.outlet.interrupt(&sequence.request);
        let stopped = || self.shared().is_stop_due().then_some(Interrupt::Stopped);
        interrupt.or_else(stopped)
    }

    fn interrupted(&self, sequence: Sequence<L::Model>, interrupt: Interrupt) {
        self.close(&sequence, Outcome::from(interrupt));
        match interrupt {
            Interrupt::Cancelled | Interrupt::Stopped => sequence.finish(Finish::Cancelled, None),
            Interrupt::Deadline => {
                let error = sequence.outlet.deadline_passed();
                sequence.fail(error);
            }
        }
    }

    /// A step went wrong: the request's own doing, or the device's.
    fn troubled(&mut self, sequence: Sequence<L::Model>, trouble: Trouble) {
        if matches!(trouble, Trouble::Panicked(_)) {
            self.shared().stats().model_panics += 1;
        }
        match (trouble, self.interrupt(&sequence)) {
            (Trouble::Cancelled, Some(interrupt)) => self.interrupted(sequence, interrupt),
            (Trouble::Refused(error), _) => self.fail(sequence, EngineError::Refused(error)),
            (trouble, _) => {
                let error = trouble.into_error();
                tracing::error!(error = chain(&*error), "forward pass failed");
                self.broken(sequence, error);
            }
        }
    }

    /// The device may be broken: the CPU does the sequence's work again, if it can take over.
    fn broken(
        &mut self,
        mut sequence: Sequence<L::Model>,
        error: Box<dyn std::error::Error + Send + Sync>,
    ) {
        let device = self.model.as_ref().map(Model::device);
        let takes_over = device.is_some_and(|device| self.slot.can_fall_back(device));
        let Some(old) = self.model.take_if(|_| takes_over) else {
            return self.fail(sequence, EngineError::Forward(error));
        };
        // What lives on the broken device goes before its model does, and may panic going.
        let freed = guarded(|| {
            sequence.rewind();
            self.features.invalidate_all();
            Ok(())
        });
        if let Err(trouble) = freed {
            tracing::warn!(?trouble, "cannot free what the broken device holds");
        }
        self.model = self.slot.fall_back(old, &self.tokenizer);
        match self.model {
            Some(_) => self.running = Some(sequence),
            None => self.fail(sequence, EngineError::Forward(error)),
        }
    }

    fn fail(&self, sequence: Sequence<L::Model>, error: EngineError) {
        self.close(&sequence, Outcome::Failed);
        sequence.fail(error);
    }

    /// Counts a sequence out, before its client hears of the end: whoever asks next finds room.
    fn close(&self, sequence: &Sequence<L::Model>, outcome: Outcome) {
        self.count_out(outcome, |stats| {
            stats.running -= 1;
            stats.running_tokens = 0;
            stats.add_timings(&sequence.timings());
        });
    }

    fn count_out(&self, outcome: Outcome, change: impl FnOnce(&mut crate::stats::EngineStats)) {
        let mut stats = self.shared().stats();
        change(&mut stats);
        match outcome {
            Outcome::Finished => stats.finished += 1,
            Outcome::Aborted => stats.aborted += 1,
            Outcome::Failed => stats.failed += 1,
        }
    }

    /// Ends what arrived too late to be served.
    fn turn_away(&mut self) {
        while let Ok(wake) = self.inbox.try_recv() {
            if let Wake::Submit(job) = wake {
                self.waiting.push_back(*job);
            }
        }
        for job in std::mem::take(&mut self.waiting) {
            self.count_out(Outcome::Failed, |stats| stats.waiting -= 1);
            job.end(Interrupt::Stopped);
        }
    }

    fn shared(&self) -> &Shared {
        &self.slot.shared
    }
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
