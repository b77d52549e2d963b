//! What becomes of sequences whose step went wrong, and of all of them when the device did.

use crate::error::{EngineError, chain};
use crate::guard::{Trouble, freed};
use crate::job::count;
use crate::model::{Model, ModelLoader};
use crate::sequence::Sequence;

use super::{Outcome, Scheduler};

impl<L: ModelLoader> Scheduler<L> {
    /// A step went wrong: the request's own doing, or the device's. Of several sequences nobody knows whose it is: they run
    /// again, each alone.
    pub(super) fn troubled(&mut self, mut sequences: Vec<Sequence<L::Model>>, trouble: Trouble) {
        if matches!(trouble, Trouble::Panicked(_)) {
            self.shared().stats().model_panics += 1;
        }
        if sequences.len() > 1 {
            for sequence in &mut sequences {
                sequence.is_suspect = true;
            }
            return self.again(sequences);
        }
        let Some(sequence) = sequences.pop() else {
            return;
        };
        match trouble {
            Trouble::Refused(error) => self.fail(sequence, EngineError::Refused(error)),
            // Nobody is left to give up blocks, and the device is as good as before.
            Trouble::Full => {
                let error = self.kv_full(&sequence);
                tracing::warn!(%error, "a request does not fit");
                self.fail(sequence, error);
            }
            Trouble::Spoiled(_) => {
                let error = trouble.into_error();
                tracing::error!(error = chain(&*error), "a request failed");
                self.fail(sequence, EngineError::Forward(error));
            }
            Trouble::Constraint(error) => self.fail(sequence, EngineError::Constraint(error)),
            trouble => {
                let error = trouble.into_error();
                tracing::error!(error = chain(&*error), "forward pass failed");
                self.broken(sequence, error);
            }
        }
    }

    fn kv_full(&self, sequence: &Sequence<L::Model>) -> EngineError {
        let kv = self.model.as_ref().map(Model::kv).unwrap_or_default();
        EngineError::KvFull {
            tokens: count(sequence.len()),
            kv_tokens_max: (kv.blocks_max as u64).saturating_mul(kv.block_positions as u64),
        }
    }

    /// Sequences that have to be computed again wait for their turn, in front of all others.
    fn again(&mut self, sequences: Vec<Sequence<L::Model>>) {
        for mut sequence in sequences.into_iter().rev() {
            freed("a sequence", || sequence.rewind());
            self.wait_again(sequence);
        }
    }

    /// The device may be broken: the CPU does all sequences' work again, if it can take over.
    fn broken(
        &mut self,
        sequence: Sequence<L::Model>,
        error: Box<dyn std::error::Error + Send + Sync>,
    ) {
        let device = self.model.as_ref().map(Model::device);
        let takes_over = device.is_some_and(|device| self.slot.can_fall_back(device));
        let Some(old) = self.model.take_if(|_| takes_over) else {
            return self.fail(sequence, EngineError::Forward(error));
        };
        // What lives on the broken device goes before its model does, and may panic going.
        let mut sequences = std::mem::take(&mut self.running);
        sequences.insert(0, sequence);
        self.again(sequences);
        freed("image features", || self.stores.features.invalidate_all());
        self.reset_prefixes();
        self.model = self.slot.fall_back(old, &self.tokenizer);
        self.reset_prefixes();
        if self.model.is_none()
            && let Some(sequence) = self.waiting.pop_front()
        {
            let prompt_tokens = sequence.request.prompt.ids.len();
            self.count_out(Outcome::Failed, |stats| stats.unwait(prompt_tokens));
            sequence.fail(EngineError::Forward(error));
        }
    }

    /// Nothing of an earlier model is of use to this one.
    pub(super) fn reset_prefixes(&mut self) {
        let positions = self.model.as_ref().map(|model| model.kv().block_positions);
        let prefixes = &mut self.stores.prefixes;
        freed("cached prefixes", || prefixes.reset(positions.unwrap_or(1)));
    }

    fn fail(&mut self, mut sequence: Sequence<L::Model>, error: EngineError) {
        freed("a sequence", || sequence.rewind());
        self.close(&mut sequence, Outcome::Failed);
        sequence.fail(error);
    }
}
