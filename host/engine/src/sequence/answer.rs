//! From the logits of a step to what a client reads: a token for each, its text, and whether the answer ends with it. Drafts are
//! made here, and taken back.

use visor_model::ModelError;

use super::{Bench, Phase, Sequence};
use crate::drafter::Said;
use crate::guard::{Trouble, guarded};
use crate::job::count;
use crate::model::Model;
use crate::request::{Event, Finish, TokenInfo};
use crate::sampler::{Sampled, SamplerError};

/// What a step led to.
pub(crate) enum Progress {
    /// There is more to compute.
    More,
    /// The answer is complete; the stop string that was met.
    Done(Finish, Option<String>),
}

/// What the logits of a step led to.
pub(crate) struct Taken {
    pub(crate) progress: Progress,
    /// Drafts that came.
    pub(crate) accepted: usize,
}

/// Text, the tokens that came since the last of it, and what is told of those whose text it is.
#[derive(Default)]
pub(super) struct Unsent {
    pub(super) text: String,
    pub(super) tokens: u32,
    pub(super) infos: Vec<TokenInfo>,
}

impl<M: Model> Sequence<M> {
    /// Appends what is likely to come next, `most` tokens or fewer, to be checked by the step that runs the last token; how many.
    /// No more than there is room for in the block of that token: what may not come takes no KV block that others may need.
    pub(crate) fn draft(&mut self, most: usize, model: &M) -> usize {
        let left = (self.request.tokens_max as usize).saturating_sub(self.tokens.len() + 1);
        let size = model.kv().block_positions.max(1);
        let room = self.len().next_multiple_of(size) - self.len();
        let Phase::Forward(state) = &mut self.phase else {
            return 0;
        };
        let said = Said {
            prompt: &self.request.prompt.ids,
            tokens: &self.tokens,
        };
        let mut draft = self.drafter.draft(said, most.min(left).min(room));
        if draft.is_empty() {
            return 0;
        }
        let taken = model.push_drafts(state, &draft);
        if taken == 0 {
            // Here none is, or not now: to look for the next can wait.
            self.drafter.note(draft.len(), 0);
        }
        draft.truncate(taken);
        self.drafts = draft;
        taken
    }

    /// Positions of the step under way that are drafts.
    pub(crate) fn drafted(&self) -> usize {
        self.drafts.len()
    }

    /// Takes back the drafts behind the first `kept`.
    pub(crate) fn drop_drafts(&mut self, kept: usize, model: &M) {
        let wrong = self.drafts.len() - kept;
        if let (Phase::Forward(state), true) = (&mut self.phase, wrong > 0) {
            model.drop_drafts(state, wrong);
        }
        self.drafts.clear();
    }

    /// Takes the logits that a step gave it: a token, its text to the client, and whether the answer ends with it. As long as the
    /// token is the one that was drafted, the next logits are those behind it, and it goes on at once.
    pub(crate) fn take(
        &mut self,
        mut logits: Vec<f32>,
        bench: &mut Bench<'_, M>,
    ) -> Result<Taken, Trouble> {
        let drafted = self.drafts.len();
        let size = logits.len() / (drafted + 1);
        let mut accepted = 0;
        loop {
            let rest = logits.split_off(size);
            let sampled = self.sampler.sample(logits);
            let sampled = sampled.map_err(|error| match error {
                SamplerError::Constraint(error) => Trouble::Constraint(error),
                error => Trouble::Broken(Box::new(error)),
            })?;
            let token = sampled.token;
            self.is_suspect = false;
            if self.tokens.is_empty() {
                self.share(bench, false);
            }
            let progress = self.accept(sampled);
            self.drafter.count_token();
            let was_drafted = self.drafts.get(accepted) == Some(&token);
            if was_drafted && matches!(progress, Progress::More) {
                accepted += 1;
                self.extend_chain(token);
                logits = rest;
                continue;
            }
            let kept = accepted;
            accepted += usize::from(was_drafted);
            if drafted > 0 {
                self.drafter.note(drafted, accepted);
                self.drop_drafts(kept, bench.model);
            }
            let progress = self.go_on(progress, token, bench.model)?;
            return Ok(Taken { progress, accepted });
        }
    }

    /// Appends the token that was taken last, where another follows.
    fn go_on(&mut self, progress: Progress, token: u32, model: &M) -> Result<Progress, Trouble> {
        let (Phase::Forward(state), Progress::More) = (&mut self.phase, &progress) else {
            return Ok(progress);
        };
        match guarded(|| model.push(state, token)) {
            // The model's own end comes before the one that was asked for.
            Err(Trouble::Refused(ModelError::TooLong { .. })) => {
                return Ok(Progress::Done(Finish::Length, None));
            }
            pushed => pushed?,
        }
        self.extend_chain(token);
        Ok(progress)
    }

    fn extend_chain(&mut self, token: u32) {
        if let Some(chain) = &mut self.chain {
            chain.push(token);
        }
    }

    /// Takes a generated token: text to the client, and whether the answer ends with it.
    fn accept(&mut self, sampled: Sampled) -> Progress {
        let (token, is_last) = (sampled.token, sampled.is_last);
        self.tokens.push(token);
        self.unsent.tokens += 1;
        if self.request.stop_ids.contains(&token) {
            return Progress::Done(Finish::Stop, None);
        }
        let passed = self.output.push(sampled);
        self.unsent.text.push_str(&passed.text);
        self.unsent.infos.extend(passed.infos);
        if passed.stop.is_some() {
            return Progress::Done(Finish::Stop, passed.stop);
        }
        if is_last {
            return Progress::Done(Finish::Stop, None);
        }
        if count(self.tokens.len()) >= self.request.tokens_max {
            return Progress::Done(Finish::Length, None);
        }
        Progress::More
    }

    /// Tells its client the text of a step, of all the tokens that it led to.
    pub(crate) fn send_delta(&mut self) {
        if !self.unsent.text.is_empty() {
            let Unsent {
                text,
                tokens,
                infos,
            } = std::mem::take(&mut self.unsent);
            self.outlet.send(Event::Delta {
                text,
                tokens,
                infos,
            });
        }
    }
}
