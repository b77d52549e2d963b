//! A step: who takes part in it, room for it, and what it leads to.

use std::time::{Duration, Instant};

use super::{Scheduler, take};
use crate::guard::{self, Trouble, guarded};
use crate::job::Watch;
use crate::model::{Model, ModelLoader};
use crate::sequence::{Progress, Sequence, Taken};

impl<L: ModelLoader> Scheduler<L> {
    /// A step of all sequences that have positions to run.
    pub(super) fn forward(&mut self) {
        let plan = self.plan();
        let planned = self.make_room(plan);
        let Some(model) = self.model.as_ref().filter(|_| !planned.is_empty()) else {
            return;
        };
        // What takes part leaves `running` for the step.
        let mut taken: Vec<(Sequence<L::Model>, usize)> = Vec::with_capacity(planned.len());
        for (order, positions) in planned {
            taken.extend(take(&mut self.running, order).map(|sequence| (sequence, positions)));
        }
        let watches: Vec<Watch> = taken.iter().map(|(sequence, _)| sequence.watch()).collect();
        let shared = &self.slot.shared;
        let keep_going = || {
            let is_wanted = |watch: &Watch| watch.interrupt().is_none();
            !shared.is_stop_due() && watches.iter().any(is_wanted)
        };
        let positions: usize = taken.iter().map(|(_, positions)| positions).sum();
        let decodes = |(sequence, _): &&(Sequence<L::Model>, usize)| sequence.is_decoding();
        let decoding = taken.iter().filter(decodes).count();
        let drafted = if positions == decoding {
            draft(&mut taken, self.slices.draft_tokens_max, model)
        } else {
            0
        };
        let mut parts: Vec<_> = taken
            .iter_mut()
            .filter_map(|(sequence, positions)| sequence.part(*positions))
            .collect();
        let began = Instant::now();
        let logits = guarded(|| model.step(&mut parts, &keep_going));
        drop(parts);
        let time = began.elapsed();
        let mut taken: Vec<_> = taken.into_iter().map(|(sequence, _)| sequence).collect();
        if matches!(logits, Err(Trouble::Cancelled)) {
            let drop_drafts = |sequence: &mut Sequence<_>| sequence.drop_drafts(0, model);
            taken.iter_mut().for_each(drop_drafts);
        }
        match logits {
            Ok(logits) => {
                match drafted {
                    0 => self.pace.note(decoding, positions - decoding, time),
                    drafted => self.pace.note_drafts(decoding, drafted, time),
                }
                self.note_step(taken.len(), positions + drafted);
                self.stepped(taken, logits, time);
            }
            // All of them end in the next sweep.
            Err(Trouble::Cancelled) => taken.into_iter().for_each(|it| self.put_back(it)),
            Err(trouble) => self.troubled(taken, trouble),
        }
    }

    /// Which sequences take part in a step, by their order, and with how many positions.
    fn plan(&mut self) -> Vec<(u64, usize)> {
        let ready = self
            .running
            .iter()
            .filter(|sequence| sequence.pending() > 0);
        // Whoever has to run alone takes turns with all others: these have streams that wait.
        let (suspects, ready): (Vec<_>, Vec<_>) = ready.partition(|sequence| sequence.is_suspect);
        self.ran_alone = !suspects.is_empty() && (ready.is_empty() || !self.ran_alone);
        let ready = if self.ran_alone {
            suspects.into_iter().take(1).collect()
        } else {
            ready
        };
        // The others wait for this step, whether they take part in it or not.
        let decoding = self
            .running
            .iter()
            .filter(|sequence| sequence.is_decoding());
        let decoding = decoding.count();
        let sees = self.running.iter().any(Sequence::needs_vision);
        let mut budget = self.slices.chunk_tokens;
        if decoding > 0 {
            let slice = self.slices.slice / if sees { 2 } else { 1 };
            budget = budget.min(self.pace.positions(slice));
        }
        let mut plan = Vec::with_capacity(ready.len());
        for sequence in ready {
            if sequence.is_decoding() {
                plan.push((sequence.order, 1));
                continue;
            }
            let positions = sequence.pending().min(budget);
            budget -= positions;
            if positions > 0 {
                plan.push((sequence.order, positions));
            }
        }
        plan
    }

    /// Reserves the KV blocks of a plan. Where there are none left, those that came last give up theirs; what is left of the
    /// plan is the answer.
    fn make_room(&mut self, plan: Vec<(u64, usize)>) -> Vec<(u64, usize)> {
        let mut kept = Vec::with_capacity(plan.len());
        for (order, positions) in plan {
            // It may be the one to give up its blocks.
            while let Some(mut sequence) = take(&mut self.running, order) {
                let mut fewer = positions;
                let cached = sequence.usage().cached_tokens;
                let reserved = self.with_room(|bench| {
                    sequence.look_again(bench)?;
                    fewer = positions.min(sequence.pending());
                    sequence.reserve(fewer, bench.model)
                });
                self.count_cached(&sequence, cached);
                match reserved {
                    Ok(()) => {
                        self.put_back(sequence);
                        kept.push((order, fewer));
                        break;
                    }
                    Err(Trouble::Full) if !self.running.is_empty() => {
                        self.put_back(sequence);
                        self.preempt_last();
                    }
                    Err(trouble) => self.troubled(vec![sequence], trouble),
                }
            }
        }
        kept.retain(|(order, _)| self.running.iter().any(|sequence| sequence.order == *order));
        kept
    }

    /// The sequence that came last gives up its blocks and waits.
    fn preempt_last(&mut self) {
        let Some(mut sequence) = self.running.pop() else {
            return;
        };
        sequence.rewind();
        self.shared().stats().preempted += 1;
        self.wait_again(sequence);
    }

    /// Gives sequences the logits of a step.
    fn stepped(
        &mut self,
        taken: Vec<Sequence<L::Model>>,
        logits: Vec<Option<Vec<f32>>>,
        time: Duration,
    ) {
        let mut failed: Vec<(Sequence<L::Model>, Trouble)> = Vec::new();
        for (mut sequence, logits) in taken.into_iter().zip(logits) {
            sequence.count_step(time);
            let (Some(logits), Some(model)) = (logits, &self.model) else {
                self.put_back(sequence);
                continue;
            };
            let mut bench = self.stores.bench(model);
            let tokens_before = sequence.usage().completion_tokens;
            let drafted = sequence.drafted();
            let taken = guard::alone(|| sequence.take(logits, &mut bench));
            sequence.send_delta();
            let tokens = sequence.usage().completion_tokens - tokens_before;
            let (progress, accepted) = match taken {
                Ok(Taken { progress, accepted }) => (Ok(progress), accepted),
                Err(trouble) => (Err(trouble), 0),
            };
            if let Ok(Progress::Done(..)) = &progress {
                sequence.share(&mut bench, true);
            }
            // What its prompt leaves to others may be all that the first that waits is short of.
            self.is_full &= tokens_before > 0;
            self.shared()
                .stats()
                .add_tokens(tokens, (drafted, accepted));
            match progress {
                Ok(Progress::More) => self.put_back(sequence),
                Ok(Progress::Done(reason, stop)) => self.end(sequence, reason, stop),
                Err(trouble) => failed.push((sequence, trouble)),
            }
        }
        // A device that breaks takes all with it: those that did not fail are back in their places by now. Of several that did,
        // each runs again alone.
        let (refused, mut broken): (Vec<_>, Vec<_>) = failed
            .into_iter()
            .partition(|(_, trouble)| trouble.is_own());
        for (sequence, trouble) in refused {
            self.troubled(vec![sequence], trouble);
        }
        let Some((last, trouble)) = broken.pop() else {
            return;
        };
        let mut sequences: Vec<_> = broken.into_iter().map(|(sequence, _)| sequence).collect();
        sequences.push(last);
        self.troubled(sequences, trouble);
    }
}

/// Lets sequences that decode draft so many tokens in all, as many each; how many they did. One whose last step failed goes step by
/// step.
fn draft<M: Model>(taken: &mut [(Sequence<M>, usize)], most: usize, model: &M) -> usize {
    let each = most / taken.len().max(1);
    let mut all = 0;
    for (sequence, positions) in taken {
        if !sequence.is_suspect {
            let drafted = sequence.draft(each, model);
            *positions += drafted;
            all += drafted;
        }
    }
    all
}
