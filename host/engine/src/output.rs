//! Tokens of one answer to the text its client sees.

use std::sync::Arc;

use visor_model::Tokenizer;

use crate::detokenizer::Detokenizer;
use crate::request::TokenInfo;
use crate::sampler::Sampled;
use crate::stop::StopMatcher;
use crate::token_infos::TokenInfos;

pub(crate) struct Output {
    detokenizer: Detokenizer,
    stops: StopMatcher,
    infos: TokenInfos,
}

/// What one more token means for the client.
pub(crate) struct Passed {
    /// Text it releases.
    pub(crate) text: String,
    /// Tokens that begin in the text released so far, if their chances are told.
    pub(crate) infos: Vec<TokenInfo>,
    /// The stop string it completed; the answer ends before it.
    pub(crate) stop: Option<String>,
}

impl Output {
    /// `continues` as in [`crate::GenerateRequest`].
    pub(crate) fn new(
        tokenizer: Arc<Tokenizer>,
        stop_strings: Vec<String>,
        continues: bool,
    ) -> Self {
        Self {
            infos: TokenInfos::new(Arc::clone(&tokenizer), continues),
            detokenizer: Detokenizer::new(tokenizer, continues),
            stops: StopMatcher::new(stop_strings),
        }
    }

    /// Text that one more token releases, and the stop string it completed.
    pub(crate) fn push(&mut self, sampled: Sampled) -> Passed {
        let settled = self.detokenizer.push(sampled.token);
        let passed = self.stops.push(&settled, self.detokenizer.tentative());
        self.infos.push(sampled);
        Passed {
            infos: self.infos.release(&passed.text),
            text: passed.text,
            stop: passed.stop,
        }
    }

    /// Text that was held back, when no token will follow, and all tokens not told of yet.
    pub(crate) fn finish(&mut self) -> (String, Vec<TokenInfo>) {
        let settled = self.detokenizer.finish();
        // A run that ends here reads as it did tentatively, or is broken: no stop string is new.
        let passed = self.stops.push(&settled, "");
        (passed.text + &self.stops.finish(), self.infos.rest())
    }
}
