//! What a token does to a text that is decoded piece by piece.

use std::collections::HashSet;
use std::sync::OnceLock;

use super::Tokenizer;

/// A text that is one piece of every vocabulary: what stands behind it keeps its first space, which the decoder strips from a text.
const BEFORE: &str = "a";

/// How a token takes part in [`Tokenizer::decode`] without special tokens.
#[derive(Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// A piece of text of its own, as it reads behind other text.
    Text(Box<str>),
    /// One byte of UTF-8. What a run of them reads is known when the run ends: it is decoded as a
    /// whole, and one wrong byte makes all of its characters replacement characters.
    Byte(u8),
    /// Left out: a special token, or an id the vocabulary does not have.
    Skipped,
}

/// The kinds of all tokens, each found when it is first asked for: decoding takes tens of thousands of instructions, and a model says
/// the same tokens again.
#[derive(Default)]
pub(super) struct Kinds {
    kinds: Box<[OnceLock<TokenKind>]>,
    /// Ids of [`BEFORE`], and the length of their text in bytes.
    before: (Vec<u32>, usize),
}

impl Tokenizer {
    /// How a token takes part in [`Self::decode`] without special tokens.
    pub fn kind(&self, id: u32) -> &TokenKind {
        match self.kinds.kinds.get(id as usize) {
            Some(kind) => kind.get_or_init(|| self.find_kind(id)),
            None => &TokenKind::Skipped,
        }
    }

    fn find_kind(&self, id: u32) -> TokenKind {
        let Some(name) = self.with_control.id_to_token(id) else {
            return TokenKind::Skipped;
        };
        let added = self.with_control.get_added_vocabulary();
        if added.is_special_token(&name) {
            return TokenKind::Skipped;
        }
        if let Some(byte) = byte(&name) {
            return TokenKind::Byte(byte);
        }
        let (before, before_bytes) = &self.kinds.before;
        let text = self.decode(&[before.as_slice(), &[id]].concat(), true);
        // `get` for a tokenizer whose decoder is none of ours; Phi-3's always has what stands before first.
        TokenKind::Text(text.get(*before_bytes..).unwrap_or(&text).into())
    }

    /// Knows of no token yet.
    pub(super) fn new_kinds(&self) -> Kinds {
        let ids = self.encode_text(BEFORE);
        let bytes = self.decode(&ids, true).len();
        Kinds {
            kinds: (0..self.vocab_size).map(|_| OnceLock::new()).collect(),
            before: (ids, bytes),
        }
    }

    /// Tokens of a text that stands in for what came before.
    pub fn before(&self) -> &[u32] {
        &self.kinds.before.0
    }

    /// What each token adds behind other text, as [`Self::decode`] has it, by id. Control tokens and ids the vocabulary does
    /// not have add nothing.
    pub fn pieces(&self) -> Vec<Vec<u8>> {
        let control: HashSet<u32> = self.control_tokens.values().map(|token| token.id).collect();
        let piece = |id: u32| match self.kind(id) {
            _ if control.contains(&id) => Vec::new(),
            TokenKind::Skipped => Vec::new(),
            TokenKind::Byte(byte) => vec![*byte],
            TokenKind::Text(text) => text.as_bytes().to_vec(),
        };
        (0..self.vocab_size).map(piece).collect()
    }
}

/// The byte of a piece spelled `<0xE2>`.
fn byte(piece: &str) -> Option<u8> {
    let hex = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = hex.len() == 2 && hex.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}
