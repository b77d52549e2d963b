//! What a token does to a text that is decoded piece by piece.

use super::Tokenizer;

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
}

/// The byte of a piece spelled `<0xE2>`.
fn byte(piece: &str) -> Option<u8> {
    let hex = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = hex.len() == 2 && hex.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}
