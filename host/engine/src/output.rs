//! Tokens of one answer to the text its client sees.

use std::sync::Arc;

use visor_model::Tokenizer;

use crate::detokenizer::Detokenizer;
use crate::stop::{Passed, StopMatcher};

pub(crate) struct Output {
    detokenizer: Detokenizer,
    stops: StopMatcher,
}

impl Output {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, stop_strings: Vec<String>) -> Self {
        Self {
            detokenizer: Detokenizer::new(tokenizer),
            stops: StopMatcher::new(stop_strings),
        }
    }

    /// Text that one more token releases, and the stop string it completed.
    pub(crate) fn push(&mut self, token: u32) -> Passed {
        let settled = self.detokenizer.push(token);
        self.stops.push(&settled, self.detokenizer.tentative())
    }

    /// Text that was held back, when no token will follow.
    pub(crate) fn finish(&mut self) -> String {
        let settled = self.detokenizer.finish();
        // A run that ends here reads as it did tentatively, or is broken: no stop string is new.
        let passed = self.stops.push(&settled, "");
        passed.text + &self.stops.finish()
    }
}
