//! The tokens of one answer as bytes with their chances, each with the text it begins in.

use std::collections::VecDeque;
use std::sync::Arc;

use visor_model::{TokenKind, Tokenizer};

use crate::request::{TokenChance, TokenInfo};
use crate::sampler::Sampled;

/// Collects what is told of tokens until their text is.
pub(crate) struct TokenInfos {
    tokenizer: Arc<Tokenizer>,
    /// Not told yet, each with where its bytes begin in the answer.
    waiting: VecDeque<(usize, TokenInfo)>,
    /// Whether a token has begun the text.
    begun: bool,
    /// Bytes of all tokens so far.
    bytes: usize,
    /// Bytes of the text told so far.
    told_bytes: usize,
}

impl TokenInfos {
    /// `continues` a text that came before: its first space is kept.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, continues: bool) -> Self {
        Self {
            tokenizer,
            waiting: VecDeque::new(),
            begun: continues,
            bytes: 0,
            told_bytes: 0,
        }
    }

    /// Takes a token. One that adds nothing to the text is not told of, nor is any whose chances
    /// nobody wants.
    pub(crate) fn push(&mut self, sampled: Sampled) {
        let Some(chances) = sampled.chances else {
            return;
        };
        if *self.tokenizer.kind(sampled.token) == TokenKind::Skipped {
            return;
        }
        let chance = |token: u32, logprob: f32| TokenChance {
            token,
            bytes: self.bytes_of(token),
            logprob,
        };
        let info = TokenInfo {
            chosen: chance(sampled.token, chances.logprob),
            alternatives: chances
                .alternatives
                .into_iter()
                .map(|(token, logprob)| chance(token, logprob))
                .collect(),
        };
        self.begun = true;
        let begin = self.bytes;
        self.bytes += info.chosen.bytes.len();
        self.waiting.push_back((begin, info));
    }

    /// The tokens that begin in the text which ends with this piece.
    pub(crate) fn release(&mut self, text: &str) -> Vec<TokenInfo> {
        self.told_bytes += text.len();
        let told = self
            .waiting
            .partition_point(|(begin, _)| *begin < self.told_bytes);
        self.waiting.drain(..told).map(|(_, info)| info).collect()
    }

    /// All that are left, when no text will follow.
    pub(crate) fn rest(&mut self) -> Vec<TokenInfo> {
        self.waiting.drain(..).map(|(_, info)| info).collect()
    }

    /// What a token would add to the text here. The decoder strips the first space of a text.
    fn bytes_of(&self, token: u32) -> Vec<u8> {
        match self.tokenizer.kind(token) {
            TokenKind::Byte(byte) => vec![*byte],
            TokenKind::Skipped => self.tokenizer.decode(&[token], false).into_bytes(),
            TokenKind::Text(text) if self.begun => text.as_bytes().to_vec(),
            TokenKind::Text(_) => self.tokenizer.decode(&[token], true).into_bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detokenizer::tests::{byte_token, tokenizer};
    use crate::output::Output;
    use crate::sampler::Chances;

    fn sampled(token: u32) -> Sampled {
        let chances = Chances {
            logprob: -1.0,
            alternatives: vec![(token, -1.0), (byte_token(0xF0), -2.0), (32007, -3.0)],
        };
        let chances = Some(chances);
        Sampled {
            token,
            chances,
            is_last: false,
        }
    }

    /// Text and tokens as told, up to a stop string.
    fn told(tokens: &[u32], stops: &[&str]) -> Vec<(String, Vec<TokenInfo>)> {
        told_behind(false, tokens, stops)
    }

    fn told_behind(
        continues: bool,
        tokens: &[u32],
        stops: &[&str],
    ) -> Vec<(String, Vec<TokenInfo>)> {
        let stops = stops.iter().map(ToString::to_string).collect();
        let mut output = Output::new(tokenizer(), stops, continues);
        let mut told = Vec::new();
        for token in tokens {
            let passed = output.push(sampled(*token));
            told.push((passed.text, passed.infos));
            if passed.stop.is_some() {
                return told;
            }
        }
        told.push(output.finish());
        told
    }

    #[test]
    fn the_bytes_of_all_tokens_are_the_bytes_of_the_text() {
        for text in [
            "Hello, world!",
            "  two spaces\n\n\tand a tab  ",
            "naïve café, 日本語",
            "🦀🦀 family: 👨‍👩‍👧‍👦!",
        ] {
            for continues in [false, true] {
                let told = told_behind(continues, &tokenizer().encode_text(text), &[]);
                let infos = told.iter().flat_map(|(_, infos)| infos);
                let bytes: Vec<u8> = infos.flat_map(|info| info.chosen.bytes.clone()).collect();
                let whole: String = told.iter().map(|(text, _)| text.as_str()).collect();
                assert_eq!(String::from_utf8(bytes).unwrap(), whole, "{text}");
                assert_eq!(whole.starts_with(' '), continues || text.starts_with(' '));
            }
        }
    }

    #[test]
    fn only_the_first_space_of_a_text_is_no_byte_of_it() {
        let space = 29871;
        let told = told(&[space, space, byte_token(b'x')], &[]);
        let bytes = told.iter().flat_map(|(_, infos)| infos);
        let bytes: Vec<Vec<u8>> = bytes.map(|info| info.chosen.bytes.clone()).collect();
        assert_eq!(bytes, [b"".to_vec(), b" ".to_vec(), b"x".to_vec()]);
    }

    #[test]
    fn alternatives_have_the_bytes_they_would_have_added() {
        let hello = tokenizer().encode_text("Hello Hello");
        let told = told(&hello, &[]);
        let infos: Vec<&TokenInfo> = told.iter().flat_map(|(_, infos)| infos).collect();
        let bytes = |at: usize, of: usize| infos[at].alternatives[of].bytes.clone();
        assert_eq!(bytes(0, 0), b"Hello");
        assert_eq!(bytes(1, 0), b" Hello");
        assert_eq!(bytes(1, 1), [0xF0]);
        assert_eq!(bytes(1, 2), b"<|end|>");
    }

    #[test]
    fn tokens_come_with_their_text_and_those_of_a_stop_string_never() {
        let tokens = tokenizer().encode_text("one two three");
        let told = told(&tokens, &[" three"]);
        for (text, infos) in &told {
            assert_eq!(text.is_empty(), infos.is_empty(), "{text:?} {infos:?}");
        }
        let bytes: Vec<u8> = told
            .iter()
            .flat_map(|(_, infos)| infos)
            .flat_map(|info| info.chosen.bytes.clone())
            .collect();
        assert_eq!(bytes, b"one two");
    }

    #[test]
    fn nothing_is_told_of_control_tokens_or_unasked() {
        let mut infos = TokenInfos::new(tokenizer(), false);
        infos.push(sampled(32007));
        infos.push(Sampled {
            is_last: false,
            token: byte_token(b'a'),
            chances: None,
        });
        assert!(infos.rest().is_empty());
    }
}
