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

/// Drafts of one sequence.
pub(crate) struct Drafter {
    /// The prompt, and what was generated.
    tokens: Vec<u32>,
    /// Tokens of the next draft, at most.
    length: usize,
    /// Tokens to generate before the next draft, and what the next draft that is all wrong makes of that.
    waiting: u32,
    pause: u32,
}

impl Drafter {
    /// `prompt` as in [`visor_model::Prompt`].
    pub(crate) fn new(prompt: &[i64]) -> Self {
        let token = |id: &i64| u32::try_from(*id).unwrap_or(SLOT);
        Self {
            tokens: prompt.iter().map(token).collect(),
            length: FIRST,
            waiting: 0,
            pause: 1,
        }
    }

    /// One more token was generated.
    pub(crate) fn push(&mut self, token: u32) {
        self.tokens.push(token);
        self.waiting = self.waiting.saturating_sub(1);
    }

    /// What is likely to come next, `most` tokens or fewer; nothing where nothing is.
    pub(crate) fn draft(&self, most: usize) -> Vec<u32> {
        if most == 0 || self.waiting > 0 {
            return Vec::new();
        }
        let all = &self.tokens;
        let mut best = (AGREEING_MIN - 1, 0);
        for end in (1..all.len()).rev() {
            let agreeing = agreeing(all, end);
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
        let after = all[from..].iter().cycle();
        let tokens = after.take_while(|token| **token != SLOT);
        tokens.take(self.length.min(most)).copied().collect()
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

/// Tokens before `end` that are the last ones, too, at most [`AGREEING_MAX`].
fn agreeing(all: &[u32], end: usize) -> usize {
    let pairs = all[..end].iter().rev().zip(all.iter().rev());
    let equal = |(a, b): &(&u32, &u32)| a == b && **a != SLOT;
    pairs.take(AGREEING_MAX).take_while(equal).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(tokens: &[i64]) -> Drafter {
        Drafter::new(tokens)
    }

    #[test]
    fn what_came_after_the_same_tokens_comes_again() {
        let mut drafter = of(&[9, 1, 2, 3, 4, 5, 6, 8, 1, 2, 3]);
        assert_eq!(drafter.draft(8), [4]);
        drafter.note(1, 1);
        assert_eq!(drafter.draft(8), [4, 5]);
        assert_eq!(drafter.draft(1), [4]);
        assert_eq!(drafter.draft(0), [0; 0]);
        assert_eq!(of(&[1, 2, 4, 1, 2]).draft(8), [0; 0], "two agree by chance");
        assert_eq!(of(&[]).draft(8), [0; 0]);
    }

    #[test]
    fn the_longest_agreement_counts_and_the_latest_of_equals() {
        let longest = of(&[7, 1, 2, 3, 40, 1, 2, 3, 50, 7, 1, 2, 3]);
        assert_eq!(longest.draft(1), [40]);
        let latest = of(&[1, 2, 3, 40, 1, 2, 3, 50, 1, 2, 3]);
        assert_eq!(latest.draft(1), [50]);
        let mut run = of(&[5; 30]);
        run.note(1, 1);
        assert_eq!(run.draft(2), [5, 5], "a run goes on");
    }

    #[test]
    fn pictures_are_no_tokens() {
        let slots = of(&[-1, -1, -1, -1, 7, -1, -1, -1]);
        assert_eq!(slots.draft(8), [0; 0]);
        assert_eq!(of(&[1, 2, 3, 4, -1, 1, 2, 3]).draft(8), [4]);
    }

    #[test]
    fn drafts_grow_while_they_are_right_and_pause_when_they_are_wrong() {
        let mut drafter = of(&[5; 40]);
        for length in [1, 2, 4, 8] {
            assert_eq!(drafter.draft(8).len(), length);
            drafter.note(length, length);
        }
        drafter.note(8, 3);
        assert_eq!(drafter.draft(8).len(), 3);
        for pause in [1, 2, 4, 8] {
            drafter.note(3, 0);
            for _ in 0..pause {
                assert_eq!(drafter.draft(8), [0; 0]);
                drafter.push(5);
            }
            assert_eq!(drafter.draft(8).len(), 1);
        }
        drafter.note(2, 1);
        drafter.note(2, 0);
        drafter.push(5);
        assert_eq!(drafter.draft(8).len(), 1, "one that was right ends it");
    }
}
