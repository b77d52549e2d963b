//! The model's tokens as bytes, in the shape in which a grammar is laid over all of them at once.

use llguidance::ParserFactory;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use std::sync::Arc;
use visor_model::Tokenizer;

/// Bytes of every token, and what is derived from them once.
pub(super) struct Vocabulary {
    /// Makes parsers over these tokens.
    pub(super) factory: ParserFactory,
    /// By id; empty for what no answer may contain.
    pub(super) pieces: Vec<Vec<u8>>,
    /// Tokens that begin with a space.
    pub(super) spaced: SimpleVob,
    /// A token for every byte: whatever has to be said can be said with these.
    pub(super) byte_ids: [u32; 256],
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vocabulary({} tokens)", self.pieces.len())
    }
}

impl Vocabulary {
    /// # Errors
    /// A tokenizer that lacks a byte, or says nothing at its end.
    pub(super) fn new(tokenizer: &Tokenizer, stop_ids: &[u32]) -> Result<Self, String> {
        let mut pieces = tokenizer.pieces();
        let byte_ids = byte_ids(&mut pieces)?;
        let vocab_size = tokenizer.vocab_size();
        let first_stop = stop_ids.iter().find(|id| **id < vocab_size);
        let stop = *first_stop.ok_or("it has no token that ends an answer")?;
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size, stop), &pieces);
        let mut spaced = trie.alloc_token_set();
        for (id, piece) in (0_u32..).zip(&pieces) {
            if piece.first() == Some(&b' ') {
                spaced.allow_token(id);
            }
        }
        // Its tokenizer is never asked for the one right way to write a text: the model finds it.
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let factory = ParserFactory::new_simple(&env).map_err(|error| error.to_string())?;
        Ok(Self {
            factory,
            pieces,
            spaced,
            byte_ids,
        })
    }
}

/// A token for every byte. Where there are two, the vocabulary's own piece is the one that texts are written with; its byte token
/// is taken out.
fn byte_ids(pieces: &mut [Vec<u8>]) -> Result<[u32; 256], String> {
    let mut ids = [None; 256];
    for id in 0..pieces.len() {
        let [byte] = pieces[id][..] else { continue };
        if let Some(before) = ids[usize::from(byte)].replace(id) {
            // Byte tokens come before all others in every vocabulary of this kind.
            let before: &mut Vec<u8> = &mut pieces[before];
            before.clear();
        }
    }
    let mut found = [0; 256];
    for (byte, id) in ids.into_iter().enumerate() {
        let id = id.ok_or_else(|| format!("it has no token for the byte {byte:#04x}"))?;
        // A vocabulary is counted in u32.
        found[byte] = id as u32;
    }
    Ok(found)
}
