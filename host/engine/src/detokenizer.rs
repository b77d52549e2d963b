//! Tokens to text as they come: whole characters, and in sum exactly the decode of all tokens.
//!
//! A text token's piece is settled at once. Byte tokens are held until their run ends, because one
//! wrong byte changes how the whole run decodes; what the run reads so far is tentative. The
//! tokenizer strips the first space of a text, so a run is decoded behind the text token before
//! it and that token's own text is cut off.

use std::sync::Arc;

use visor_model::{TokenKind, Tokenizer};

pub(crate) struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    /// The last text token, or whatever stands for it, then the run of byte tokens since.
    window: Vec<u32>,
    /// Tokens at the beginning of the window that are told already; 0 while there is no text.
    told: usize,
    /// The run as bytes.
    run: Vec<u8>,
}

impl Detokenizer {
    /// `continues` a text that came before: its first space is kept.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, continues: bool) -> Self {
        let window = if continues {
            tokenizer.before().to_vec()
        } else {
            Vec::new()
        };
        Self {
            tokenizer,
            told: window.len(),
            window,
            run: Vec::new(),
        }
    }

    /// Takes a token; the text that is settled by it.
    pub(crate) fn push(&mut self, token: u32) -> String {
        let settled = match self.tokenizer.kind(token) {
            TokenKind::Skipped => return String::new(),
            TokenKind::Byte(byte) => {
                self.window.push(token);
                self.run.push(*byte);
                return String::new();
            }
            TokenKind::Text(text) if self.run.is_empty() && self.told > 0 => text.to_string(),
            TokenKind::Text(_) => {
                self.window.push(token);
                self.settle()
            }
        };
        self.window.clear();
        self.window.push(token);
        self.told = 1;
        settled
    }

    /// What the open run reads so far: its whole characters, if none of its bytes is wrong.
    pub(crate) fn tentative(&self) -> &str {
        match std::str::from_utf8(&self.run) {
            Ok(text) => text,
            // Only the last character is incomplete.
            Err(error) if error.error_len().is_none() => {
                let whole = &self.run[..error.valid_up_to()];
                std::str::from_utf8(whole).unwrap_or_default()
            }
            Err(_) => "",
        }
    }

    /// What is left when no token will follow.
    pub(crate) fn finish(&mut self) -> String {
        let settled = self.settle();
        self.window.clear();
        self.told = 0;
        settled
    }

    /// The text of the window behind what is told.
    fn settle(&mut self) -> String {
        self.run.clear();
        let told = self.tokenizer.decode(&self.window[..self.told], true);
        let mut text = self.tokenizer.decode(&self.window, true);
        // `get` for a tokenizer whose decoder is none of ours; Phi-3's always has what is told first.
        let settled = text.get(told.len()..).map(str::to_string);
        settled.unwrap_or_else(|| std::mem::take(&mut text))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::OnceLock;

    pub(crate) fn tokenizer() -> Arc<Tokenizer> {
        static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
        let load = || {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../model/phi3/tokenizer.json");
            Arc::new(Tokenizer::from_file(path.as_ref()).unwrap())
        };
        Arc::clone(TOKENIZER.get_or_init(load))
    }

    /// Byte `b` as a token: `<0x00>` is 3 in the Phi-3 vocabulary.
    pub(crate) fn byte_token(byte: u8) -> u32 {
        3 + u32::from(byte)
    }

    fn deltas(tokens: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(tokenizer(), false);
        let mut deltas: Vec<String> = tokens.iter().map(|t| detokenizer.push(*t)).collect();
        deltas.push(detokenizer.finish());
        deltas
    }

    fn check(tokens: &[u32]) {
        let want = tokenizer().decode(tokens, true);
        assert_eq!(deltas(tokens).concat(), want, "{tokens:?}");
    }

    /// xorshift64*, so that a failure can be run again.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % bound
        }
    }

    #[test]
    fn deltas_sum_to_the_decode_of_texts() {
        for text in [
            "Hello, world!",
            "  two spaces\n\n\tand a tab  ",
            "naïve café, 日本語, Ελληνικά, עברית",
            "🦀🦀 family: 👨‍👩‍👧‍👦!",
            "ဘာသာစကား ဘာသာ",
            "",
        ] {
            check(&tokenizer().encode_text(text));
        }
    }

    #[test]
    fn deltas_sum_to_the_decode_of_any_tokens() {
        let mut random = Random(0x5EED);
        for _ in 0..400 {
            let length = random.below(24);
            let token = |random: &mut Random| match random.below(6) {
                0 => byte_token(random.below(128) as u8),
                1 => byte_token(random.below(256) as u8),
                // Lone and double spaces.
                2 => [29871, 259, 268][random.below(3) as usize],
                // Special, stop and unknown ids.
                3 => [0, 1, 2, 32000, 32001, 32007, 32010, 32063][random.below(8) as usize],
                _ => random.below(32011) as u32,
            };
            let tokens: Vec<u32> = (0..length).map(|_| token(&mut random)).collect();
            check(&tokens);
        }
    }

    #[test]
    fn what_goes_on_with_a_text_keeps_its_first_space() {
        let ids = tokenizer().encode_text("the end");
        for (continues, text) in [(false, "the end"), (true, " the end")] {
            let mut detokenizer = Detokenizer::new(tokenizer(), continues);
            let deltas: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
            assert_eq!(deltas + &detokenizer.finish(), text);
        }
    }

    #[test]
    fn a_character_over_several_tokens_comes_whole() {
        let mut detokenizer = Detokenizer::new(tokenizer(), false);
        let crab = "🦀".as_bytes();
        for byte in &crab[..3] {
            assert_eq!(detokenizer.push(byte_token(*byte)), "");
            assert_eq!(detokenizer.tentative(), "");
        }
        assert_eq!(detokenizer.push(byte_token(crab[3])), "");
        assert_eq!(detokenizer.tentative(), "🦀");
        let x = tokenizer().encode_text("x").pop().unwrap();
        assert_eq!(detokenizer.push(x).replace(' ', ""), "🦀x");
        assert_eq!(detokenizer.tentative(), "");
    }

    #[test]
    fn a_broken_run_is_never_taken_back() {
        let tokens = [byte_token(b'a'), byte_token(0xFF)];
        let mut detokenizer = Detokenizer::new(tokenizer(), false);
        detokenizer.push(tokens[0]);
        assert_eq!(detokenizer.tentative(), "a");
        detokenizer.push(tokens[1]);
        assert_eq!(detokenizer.tentative(), "");
        assert_eq!(detokenizer.finish(), "\u{FFFD}\u{FFFD}");
        check(&tokens);
    }

    #[test]
    fn special_tokens_do_not_end_a_run() {
        let e_acute = "é".as_bytes();
        check(&[byte_token(e_acute[0]), 32007, byte_token(e_acute[1])]);
    }
}
