//! What the engine counts, for `/stats` and `/metrics`.

use crate::request::Timings;

/// Upper bounds of [`EngineStats::step_sizes`]; more sequences run in no step.
pub const STEP_SIZES: [u64; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];

/// How often a stage ran and how long it took in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StageStats {
    /// Requests that went through the stage.
    pub count: u64,
    /// Microseconds, summed over them.
    pub sum_us: u64,
}

impl StageStats {
    fn add(&mut self, us: u64) {
        self.count += 1;
        self.sum_us = self.sum_us.saturating_add(us);
    }
}

/// Figures since the start, and some of this moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Requests waiting now.
    pub waiting: u64,
    /// Positions of their prompts.
    pub waiting_tokens: u64,
    /// Sequences being computed now.
    pub running: u64,
    /// Positions of the running sequences now: prompts and what was generated.
    pub running_tokens: u64,
    /// Requests taken in.
    pub submitted: u64,
    /// Requests refused because the queue was full.
    pub rejected: u64,
    /// Answers that ended by a stop or by their length.
    pub finished: u64,
    /// Requests ended by their cancel token, a dropped receiver or the engine's end.
    pub aborted: u64,
    /// Requests that failed, passed deadlines included.
    pub failed: u64,
    /// Prompt positions of admitted requests.
    pub prompt_tokens: u64,
    /// Image tokens among them.
    pub image_tokens: u64,
    /// Prompt positions of admitted requests whose KV values were there when the first of the others ran.
    pub cached_tokens: u64,
    /// Generated tokens.
    pub completion_tokens: u64,
    /// Tokens that were drafted and run.
    pub drafted_tokens: u64,
    /// Those of them that came.
    pub accepted_tokens: u64,
    /// Steps of the model.
    pub steps: u64,
    /// Sequences that took part in a step, summed over the steps.
    pub step_sequences: u64,
    /// Steps by the sequences that took part: so many of at most [`STEP_SIZES`], each and above the one before.
    pub step_sizes: [u64; STEP_SIZES.len()],
    /// Positions that ran, summed over the steps.
    pub step_positions: u64,
    /// Times that a sequence gave up its KV blocks for others and waited.
    pub preempted: u64,
    /// KV blocks alive now, those of cached prefixes included.
    pub kv_blocks_used: u64,
    /// KV blocks that can be alive at once.
    pub kv_blocks_max: u64,
    /// Memory of one.
    pub kv_block_bytes: u64,
    /// Devices given up: at load, or in the middle of a request.
    pub device_fallbacks: u64,
    /// Panics of the model that were survived.
    pub model_panics: u64,
    /// Waiting, per admitted request.
    pub queue: StageStats,
    /// Vision tower, per request that ran it.
    pub vision: StageStats,
    /// Prefill, per request that began it.
    pub prefill: StageStats,
    /// Decode, per request that got a first token.
    pub decode: StageStats,
}

impl EngineStats {
    /// A request of so many prompt positions begins to wait.
    pub(crate) fn wait(&mut self, prompt_tokens: usize) {
        self.waiting += 1;
        self.waiting_tokens += prompt_tokens as u64;
    }

    /// A step of so many sequences ran so many positions.
    pub(crate) fn add_step(&mut self, sequences: usize, positions: usize) {
        let sequences = sequences as u64;
        self.steps += 1;
        self.step_sequences += sequences;
        self.step_positions += positions as u64;
        let size = STEP_SIZES.partition_point(|size| *size < sequences);
        self.step_sizes[size.min(STEP_SIZES.len() - 1)] += 1;
    }

    /// A step led to so many tokens of a sequence that had drafted some, of which some came.
    pub(crate) fn add_tokens(&mut self, tokens: u32, (drafted, accepted): (usize, usize)) {
        self.completion_tokens += u64::from(tokens);
        self.drafted_tokens += drafted as u64;
        self.accepted_tokens += accepted as u64;
    }

    /// It waits no more.
    pub(crate) fn unwait(&mut self, prompt_tokens: usize) {
        self.waiting -= 1;
        self.waiting_tokens = self.waiting_tokens.saturating_sub(prompt_tokens as u64);
    }

    /// Adds the times of an admitted request that has ended.
    pub(crate) fn add_timings(&mut self, timings: &Timings) {
        self.queue.add(timings.queue_us);
        for (stage, us) in [
            (&mut self.vision, timings.vision_us),
            (&mut self.prefill, timings.prefill_us),
            (&mut self.decode, timings.decode_us),
        ] {
            if us > 0 {
                stage.add(us);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_counted_by_its_size() {
        let mut stats = EngineStats::default();
        for sequences in [1, 1, 2, 3, 4, 5, 256, 300] {
            stats.add_step(sequences, 10);
        }
        assert_eq!(stats.step_sizes, [2, 1, 2, 1, 0, 0, 0, 0, 2]);
        assert_eq!((stats.steps, stats.step_positions), (8, 80));
    }
}
