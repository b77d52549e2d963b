//! Prompt lookup: where the last few tokens stood before, what came after them then is likely to come now (Saxena, "Prompt
//! Lookup Decoding", 2023). What is read off a picture, quoted or listed repeats itself; a draft costs no second model.

/// Tokens that have to agree before a draft is made. Two agree by chance too often.
const AGREEING_MIN: usize = 3;
/// More than these say nothing more.
const AGREEING_MAX: usize = 8;
/// Tokens of a first draft. A step of two rows takes a sixth longer than one of a single row, of three half as long again, of five
/// twice and of eight three times (`visor bench --shape phi-3.5-vision`, AVX2): one in six has to come, or most of several.
const FIRST: usize = 1;
/// Tokens of a draft at most.
const LONGEST: usize = 64;
/// Most tokens that are generated without a draft, after drafts that were all wrong.
const PAUSE_MAX: u32 = 64;
/// Stands for a position of a picture, which no token is.
const SLOT: u32 = u32::MAX;

/// How long the drafts of one sequence are, and when the next is due. The text is the sequence's.
pub(crate) struct Drafter {
    /// Tokens of the next draft, at most.
    length: usize,
    /// Tokens to generate before the next draft, and what the next draft that is all wrong makes of that.
    waiting: u32,
    pause: u32,
}

/// A sequence so far.
#[derive(Clone, Copy)]
pub(crate) struct Said<'a> {
    /// As in [`visor_model::Prompt`].
    pub(crate) prompt: &'a [i64],
    /// What was generated behind it.
    pub(crate) tokens: &'a [u32],
}

impl Said<'_> {
    fn len(self) -> usize {
        self.prompt.len() + self.tokens.len()
    }

    fn at(self, position: usize) -> u32 {
        match self.prompt.get(position) {
            Some(id) => u32::try_from(*id).unwrap_or(SLOT),
            None => self.tokens[position - self.prompt.len()],
        }
    }

    /// Tokens before `end` that are the last ones, too, at most [`AGREEING_MAX`].
    fn agreeing(self, end: usize) -> usize {
        let is_equal = |back: &usize| {
            let token = self.at(end - back);
            token != SLOT && token == self.at(self.len() - back)
        };
        let backs = 1..=end.min(AGREEING_MAX);
        backs.take_while(is_equal).count()
    }
}

impl Drafter {
    pub(crate) fn new() -> Self {
        Self {
            length: FIRST,
            waiting: 0,
            pause: 1,
        }
    }

    /// One more token was generated.
    pub(crate) fn count_token(&mut self) {
        self.waiting = self.waiting.saturating_sub(1);
    }

    /// What is likely to come next, `most` tokens or fewer; nothing where nothing is.
    pub(crate) fn draft(&self, said: Said<'_>, most: usize) -> Vec<u32> {
        if most == 0 || self.waiting > 0 {
            return Vec::new();
        }
        let mut best = (AGREEING_MIN - 1, 0);
        for end in (1..said.len()).rev() {
            let agreeing = said.agreeing(end);
            if agreeing > best.0 {
                best = (agreeing, end);
            }
            if agreeing == AGREEING_MAX {
                break;
            }
        }
        let (_, from) = best;
        if from == 0 {
            return Vec::new();
        }
        // Behind the last token, what comes after it: a period goes on.
        let after = (from..said.len()).cycle().map(|position| said.at(position));
        let tokens = after.take_while(|token| *token != SLOT);
        tokens.take(self.length.min(most)).collect()
    }

    /// So many tokens of a draft of `length` came.
    pub(crate) fn note(&mut self, length: usize, accepted: usize) {
        if accepted == 0 {
            self.waiting = self.pause;
            self.pause = (2 * self.pause).min(PAUSE_MAX);
        } else {
            self.pause = 1;
        }
        self.length = if accepted == length {
            (2 * self.length).min(LONGEST)
        } else {
            accepted.max(FIRST)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(prompt: &[i64]) -> Said<'_> {
        Said {
            prompt,
            tokens: &[],
        }
    }

    /// One whose first draft came.
    fn trusting() -> Drafter {
        let mut drafter = Drafter::new();
        drafter.note(1, 1);
        drafter
    }

    #[test]
    fn what_came_after_the_same_tokens_comes_again() {
        let said = prompt(&[9, 1, 2, 3, 4, 5, 6, 8, 1, 2, 3]);
        assert_eq!(Drafter::new().draft(said, 8), [4]);
        assert_eq!(trusting().draft(said, 8), [4, 5]);
        assert_eq!(trusting().draft(said, 1), [4]);
        assert_eq!(trusting().draft(said, 0), [0; 0]);
        let two = prompt(&[1, 2, 4, 1, 2]);
        assert_eq!(Drafter::new().draft(two, 8), [0; 0], "by chance");
        assert_eq!(Drafter::new().draft(prompt(&[]), 8), [0; 0]);
    }

    #[test]
    fn an_answer_goes_on_behind_its_prompt() {
        let quoted = Said {
            prompt: &[1, 2, 3, 4, 5, 6, -1],
            tokens: &[2, 3, 4],
        };
        assert_eq!(trusting().draft(quoted, 8), [5, 6]);
        let across = Said {
            prompt: &[1, 2],
            tokens: &[3, 4, 1, 2, 3],
        };
        assert_eq!(trusting().draft(across, 8), [4, 1]);
        let own = Said {
            prompt: &[8],
            tokens: &[1, 2, 3, 9, 1, 2, 3],
        };
        assert_eq!(trusting().draft(own, 8), [9, 1]);
    }

    #[test]
    fn the_longest_agreement_counts_and_the_latest_of_equals() {
        let longest = prompt(&[7, 1, 2, 3, 40, 1, 2, 3, 50, 7, 1, 2, 3]);
        assert_eq!(Drafter::new().draft(longest, 1), [40]);
        let latest = prompt(&[1, 2, 3, 40, 1, 2, 3, 50, 1, 2, 3]);
        assert_eq!(Drafter::new().draft(latest, 1), [50]);
        let run = prompt(&[5; 30]);
        assert_eq!(trusting().draft(run, 2), [5, 5], "a run goes on");
    }

    #[test]
    fn pictures_are_no_tokens() {
        let slots = prompt(&[-1, -1, -1, -1, 7, -1, -1, -1]);
        assert_eq!(Drafter::new().draft(slots, 8), [0; 0]);
        assert_eq!(trusting().draft(prompt(&[1, 2, 3, 4, -1, 1, 2, 3]), 8), [4]);
    }

    #[test]
    fn drafts_grow_while_they_are_right_and_pause_when_they_are_wrong() {
        let run = prompt(&[5; 40]);
        let mut drafter = Drafter::new();
        for length in [1, 2, 4, 8] {
            assert_eq!(drafter.draft(run, 8).len(), length);
            drafter.note(length, length);
        }
        drafter.note(8, 3);
        assert_eq!(drafter.draft(run, 8).len(), 3);
        for pause in [1, 2, 4, 8] {
            drafter.note(3, 0);
            for _ in 0..pause {
                assert_eq!(drafter.draft(run, 8), [0; 0]);
                drafter.count_token();
            }
            assert_eq!(drafter.draft(run, 8).len(), 1);
        }
        drafter.note(2, 1);
        drafter.note(2, 0);
        drafter.count_token();
        assert_eq!(drafter.draft(run, 8).len(), 1, "one that was right ends it");
    }
}
