//! Running sequences: pending positions in, logits out, for several sequences in one pass over the weights.

use candle_core::{DType, Tensor};

use crate::decoder::Run;
use crate::device::DeviceKind;
use crate::error::ModelError;
use crate::model::Phi3V;
use crate::sequence::{SequenceState, Slot};

/// A sequence's part of a step.
pub struct StepPart<'a> {
    /// Whose.
    pub state: &'a mut SequenceState,
    /// Pending positions to run at most; at least one is.
    pub positions_max: usize,
    /// Of the pending positions, the last ones that are drafts: logits are wanted of each, and of the one before them.
    pub drafts: usize,
}

impl Phi3V {
    /// Runs pending positions of several sequences, and gives for each, once nothing of it is pending, the logits of its last
    /// position and of as many before it as are asked for, one after the other. With eight-bit activations and INT4 weights every weight is read once for all of them. What a sequence gets
    /// depends, to the bit, neither on the others nor on how its prompt is cut into steps; only where weights are stored as
    /// floats, sums of a prompt may be added in another order when it is cut otherwise.
    ///
    /// The rotary regime is that of a whole sequence, pending positions included.
    ///
    /// `keep_going` is asked between layers.
    ///
    /// # Errors
    /// [`ModelError::Prompt`] when nothing is pending or an image is missing, [`ModelError::KvFull`] when a block is needed
    /// that was not reserved, [`ModelError::Cancelled`] once `keep_going` says no, [`ModelError::Forward`] when the device
    /// fails. What the step ran of a sequence is then lost or done; one sequence alone is as it was.
    pub fn step(
        &self,
        parts: &mut [StepPart<'_>],
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Option<Vec<f32>>>, ModelError> {
        if self.device() == DeviceKind::Cpu {
            return visor_kernels::on_pool(|| self.step_here(parts, keep_going));
        }
        self.step_here(parts, keep_going)
    }

    /// A step of one sequence.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn advance(
        &self,
        state: &mut SequenceState,
        positions_max: usize,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let part = StepPart {
            state,
            positions_max,
            drafts: 0,
        };
        Ok(self.step(&mut [part], &|| true)?.pop().flatten())
    }

    fn step_here(
        &self,
        parts: &mut [StepPart<'_>],
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Option<Vec<f32>>>, ModelError> {
        if self.decoder.is_joint() {
            return self.step_together(parts, keep_going);
        }
        let mut logits = Vec::with_capacity(parts.len());
        for part in parts {
            logits.extend(self.step_together(std::slice::from_mut(part), keep_going)?);
        }
        Ok(logits)
    }

    fn step_together(
        &self,
        parts: &mut [StepPart<'_>],
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Option<Vec<f32>>>, ModelError> {
        let counts: Vec<usize> = parts.iter().map(count_of).collect();
        let hidden = self.run_parts(parts, keep_going)?;
        let ends = counts.iter().scan(0, |end, count| {
            *end += count;
            Some(*end as u32)
        });
        let told = |(part, end): (&StepPart<'_>, u32)| end - logits_of_part(part) as u32..end;
        let lasts: Vec<u32> = parts.iter().zip(ends).flat_map(told).collect();
        if lasts.is_empty() {
            // Nothing is read that would wait for the device.
            self.settle()?;
            return Ok(vec![None; parts.len()]);
        }
        let [hidden, logits] = self.finish(&hidden, &lasts)?;
        let mut each = hidden.into_iter().zip(logits);
        let finish = |part: &mut StepPart<'_>| {
            let (mut hidden, logits): (Vec<_>, Vec<_>) =
                each.by_ref().take(logits_of_part(part)).unzip();
            part.state.last_hidden = hidden.pop()?;
            Some(logits.concat())
        };
        Ok(parts.iter_mut().map(finish).collect())
    }

    /// Normalized hidden states of some rows, and their logits.
    fn finish(&self, hidden: &Tensor, rows: &[u32]) -> Result<[Vec<Vec<f32>>; 2], ModelError> {
        let index = Tensor::from_slice(rows, rows.len(), hidden.device())?;
        let last = self.decoder.normalize(&hidden.index_select(&index, 0)?)?;
        let logits = self.decoder.logits(&last)?.to_vec2()?;
        Ok([last.to_dtype(DType::F32)?.to_vec2()?, logits])
    }

    /// Logits of the last row of [`Self::run`]'s answer; its normalized hidden state stays in the sequence.
    pub(crate) fn finish_one(
        &self,
        state: &mut SequenceState,
        hidden: &Tensor,
    ) -> Result<Vec<f32>, ModelError> {
        let [mut last, mut logits] = self.finish(hidden, &[hidden.dim(0)? as u32 - 1])?;
        state.last_hidden = last.pop().unwrap_or_default();
        Ok(logits.pop().unwrap_or_default())
    }

    /// Logits of some rows of [`Self::run`]'s answer.
    pub(crate) fn logits_of(
        &self,
        hidden: &Tensor,
        rows: &[u32],
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        let [_, logits] = self.finish(hidden, rows)?;
        Ok(logits)
    }

    /// Runs pending positions of one sequence and gives their hidden states before the last norm, (positions, hidden).
    pub(crate) fn run(
        &self,
        state: &mut SequenceState,
        positions_max: usize,
    ) -> Result<Tensor, ModelError> {
        let part = StepPart {
            state,
            positions_max,
            drafts: 0,
        };
        self.run_parts(&mut [part], &|| true)
    }

    /// The same for several, one after the other in the answer.
    fn run_parts(
        &self,
        parts: &mut [StepPart<'_>],
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Tensor, ModelError> {
        let mut embeddings = Vec::new();
        let mut runs = Vec::with_capacity(parts.len());
        for part in parts {
            let count = count_of(part);
            let state = &mut *part.state;
            if count == 0 {
                return Err(ModelError::Prompt("no position is pending".into()));
            }
            let start = state.cache.len();
            self.embed(state, start..start + count, &mut embeddings)?;
            state.cache.reserve(start + count)?;
            runs.push(Run {
                count,
                prompt_rows: state.prompt_len.saturating_sub(start).min(count),
                regime: self.decoder.rope.regime(state.slots.len()),
                cache: &mut state.cache,
            });
        }
        let embeddings = if embeddings.len() == 1 {
            embeddings.remove(0).contiguous()?
        } else {
            Tensor::cat(&embeddings, 0)?
        };
        self.decoder.forward(embeddings, &mut runs, keep_going)
    }

    /// Embeddings of some positions: runs of tokens are looked up, runs of slots are copied.
    fn embed(
        &self,
        state: &SequenceState,
        positions: std::ops::Range<usize>,
        parts: &mut Vec<Tensor>,
    ) -> Result<(), ModelError> {
        for run in state.slots[positions].chunk_by(|a, b| continues(*a, *b)) {
            parts.push(match run[0] {
                Slot::Image { index, row } => {
                    let features = state.features[index as usize].as_ref().ok_or_else(|| {
                        ModelError::Prompt(format!("image {index} is not there yet"))
                    })?;
                    features.rows.narrow(0, row as usize, run.len())?
                }
                Slot::Token(_) => {
                    let ids = run.iter().filter_map(|slot| match slot {
                        Slot::Token(token) => Some(*token),
                        Slot::Image { .. } => None,
                    });
                    self.decoder.embed(&ids.collect::<Vec<u32>>())?
                }
            });
        }
        Ok(())
    }
}

/// Positions that a part runs.
fn count_of(part: &StepPart<'_>) -> usize {
    part.state.pending().min(part.positions_max.max(1))
}

/// Positions of a part that ran of which logits are told: none while something is pending.
fn logits_of_part(part: &StepPart<'_>) -> usize {
    match part.state.pending() {
        0 => 1 + part.drafts,
        _ => 0,
    }
}

/// Whether two neighbours are copied or looked up together.
fn continues(a: Slot, b: Slot) -> bool {
    match (a, b) {
        (Slot::Token(_), Slot::Token(_)) => true,
        (
            Slot::Image { index: a, row },
            Slot::Image {
                index: b,
                row: next,
            },
        ) => a == b && next == row + 1,
        _ => false,
    }
}
