//! What a token does to a text that is decoded piece by piece.

use super::Tokenizer;

/// A text that is one piece of every vocabulary.
const BEFORE: &str = "a";

/// How a token takes part in [`Tokenizer::decode`] without special tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// A piece of text of its own.
    Text,
    /// One byte of UTF-8. What a run of them reads is known when the run ends: it is decoded as a
    /// whole, and one wrong byte makes all of its characters replacement characters.
    Byte(u8),
    /// Left out: a special token, or an id the vocabulary does not have.
    Skipped,
}

impl Tokenizer {
    /// How a token takes part in [`Self::decode`] without special tokens.
    pub fn kind(&self, id: u32) -> TokenKind {
        let Some(piece) = self.with_control.id_to_token(id) else {
            return TokenKind::Skipped;
        };
        if self
            .with_control
            .get_added_vocabulary()
            .is_special_token(&piece)
        {
            return TokenKind::Skipped;
        }
        match byte(&piece) {
            Some(byte) => TokenKind::Byte(byte),
            None => TokenKind::Text,
        }
    }

    /// What each token adds behind other text, as [`Self::decode`] has it, by id. Control tokens and ids the vocabulary does
    /// not have add nothing.
    pub fn pieces(&self) -> Vec<Vec<u8>> {
        // The decoder strips the first space of a text, so every piece is decoded behind another.
        let mut ids = self.encode_text(BEFORE);
        let before_bytes = self.decode(&ids, true).len();
        let last = ids.len();
        ids.push(0);
        let mut piece = |id: u32| {
            let name = self.with_control.id_to_token(id).unwrap_or_default();
            match self.kind(id) {
                _ if self.control_tokens.contains_key(&name) => Vec::new(),
                TokenKind::Skipped => Vec::new(),
                TokenKind::Byte(byte) => vec![byte],
                TokenKind::Text => {
                    ids[last] = id;
                    let text = self.decode(&ids, true);
                    text.as_bytes()
                        .get(before_bytes..)
                        .unwrap_or_default()
                        .to_vec()
                }
            }
        };
        (0..self.vocab_size).map(&mut piece).collect()
    }
}

/// The byte of a piece spelled `<0xE2>`.
fn byte(piece: &str) -> Option<u8> {
    let hex = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = hex.len() == 2 && hex.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}
