//! One answer, held to its grammar token by token.

use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::TokenParser;
use llguidance::api::StopReason;
use visor_engine::{Constraint, ConstraintError, Grammar};

use super::vocabulary::Vocabulary;
use super::{Bounds, FormatError, explained};

/// Expressions are held by the grammar and by the lexer made of it.
const LEXER_COPIES: u64 = 2;
/// Bytes of memory for each character of a grammar's rules: the library tells no size, but prints all there is. Measured.
const RULE_BYTES: u64 = 18;

/// A grammar at its beginning. Every answer starts from a copy; what the copies find out of the grammar they share.
pub(super) struct Compiled {
    first: Mutex<Follower>,
}

impl std::fmt::Debug for Compiled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compiled")
    }
}

impl Compiled {
    /// # Errors
    /// A grammar that the answer's beginning does not fit, or nothing does.
    pub(super) fn new(
        mut parser: TokenParser,
        vocabulary: Arc<Vocabulary>,
        bounds: Bounds,
    ) -> Result<Self, FormatError> {
        parser.start_without_prompt();
        let mut first = Follower {
            parser,
            vocabulary,
            stop_ids: bounds.stop_ids.into(),
            at_start: !bounds.continues,
            is_over: false,
        };
        if let Some(text) = &bounds.prefill {
            let taken = first.take_bytes(text.as_bytes());
            taken.map_err(|_| FormatError::Beginning)?;
            first.at_start = false;
        }
        // A language without a first token is found here, not by the engine. What it takes to find the first tokens is known
        // to all copies from now on.
        let mut logits = vec![0.0; first.vocabulary.pieces.len()];
        let masked = first.clone().mask(&mut logits);
        masked.map_err(|error| FormatError::Unusable(error.0))?;
        if logits.iter().all(|logit| *logit == f32::NEG_INFINITY) {
            return Err(FormatError::Unusable("no text fits it".into()));
        }
        Ok(Self {
            first: Mutex::new(first),
        })
    }

    /// The same at its beginning, sharing nothing that is found out while it is followed.
    pub(super) fn copy(&self) -> Self {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        let parser = first.parser.deep_clone();
        let copy = Follower {
            parser,
            vocabulary: Arc::clone(&first.vocabulary),
            stop_ids: Arc::clone(&first.stop_ids),
            ..*first
        };
        Self {
            first: Mutex::new(copy),
        }
    }

    /// Memory it takes, in bytes, rather too many than too few.
    pub(super) fn bytes(&self) -> u64 {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        let parser = &first.parser.parser;
        // Writing into a count cannot fail.
        let mut printed = Length(0);
        _ = write!(printed, "{:?}", parser.grammar());
        LEXER_COPIES * parser.lexer_stats().num_bytes as u64 + RULE_BYTES * printed.0
    }
}

/// Counts what is written.
struct Length(u64);

impl Write for Length {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0 += text.len() as u64;
        Ok(())
    }
}

impl Grammar for Compiled {
    fn follow(&self) -> Box<dyn Constraint> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        Box::new(first.clone())
    }
}

#[derive(Clone)]
struct Follower {
    parser: TokenParser,
    vocabulary: Arc<Vocabulary>,
    stop_ids: Arc<[u32]>,
    /// The decoder strips a space that begins an answer, and the model's words begin with one: what comes first is judged
    /// without it.
    at_start: bool,
    /// Nothing can follow.
    is_over: bool,
}

impl Follower {
    fn take_bytes(&mut self, bytes: &[u8]) -> Result<(), ConstraintError> {
        for byte in bytes {
            self.take_token(self.vocabulary.byte_ids[usize::from(*byte)])?;
        }
        self.look_for_end()
    }

    fn take_token(&mut self, token: u32) -> Result<(), ConstraintError> {
        let taken = self.parser.consume_token(token);
        taken.map(drop).map_err(|error| self.explain(&error))
    }

    fn look_for_end(&mut self) -> Result<(), ConstraintError> {
        let over = self.parser.check_stop();
        self.is_over = over.map_err(|error| self.explain(&error))?;
        Ok(())
    }

    fn explain(&self, error: &impl ToString) -> ConstraintError {
        explain(self.parser.stop_reason(), &error.to_string())
    }
}

/// An error of the parser, in the operator's words where it met a limit of theirs.
fn explain(reason: StopReason, message: &str) -> ConstraintError {
    ConstraintError(match reason {
        StopReason::LexerTooComplex | StopReason::ParserTooComplex => {
            "it takes more work at one token than this server does".to_owned()
        }
        StopReason::NoExtensionBias => "no text fits it".to_owned(),
        _ => explained(message),
    })
}

impl Constraint for Follower {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), ConstraintError> {
        let mut allowed = if self.is_over {
            self.parser.token_env.tok_trie().alloc_token_set()
        } else {
            let allowed = self.parser.compute_mask();
            allowed.map_err(|error| self.explain(&error))?
        };
        if self.at_start && !self.is_over {
            allowed.sub(&self.vocabulary.spaced);
            let bias = Arc::clone(&self.parser.bias_computer);
            allowed.or(&self.parser.parser.compute_bias(&*bias, b" "));
            if let Some(error) = self.parser.parser.get_error() {
                return Err(explain(error.stop_reason(), &error.message()));
            }
        }
        if self.is_over || self.parser.is_accepting() {
            for id in self.stop_ids.iter() {
                if (*id as usize) < self.vocabulary.pieces.len() {
                    allowed.allow_token(*id);
                }
            }
        }
        let known = allowed.len().min(logits.len());
        let (known, unknown) = logits.split_at_mut(known);
        unknown.fill(f32::NEG_INFINITY);
        for (word, logits) in allowed.as_slice().iter().zip(known.chunks_mut(32)) {
            if *word != u32::MAX {
                for (bit, logit) in logits.iter_mut().enumerate() {
                    if word & (1 << bit) == 0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<bool, ConstraintError> {
        if self.stop_ids.contains(&token) {
            return Ok(true);
        }
        let vocabulary = Arc::clone(&self.vocabulary);
        let piece = vocabulary.pieces.get(token as usize);
        match piece.and_then(|piece| piece.strip_prefix(b" ")) {
            Some(rest) if std::mem::take(&mut self.at_start) => self.take_bytes(rest)?,
            _ => {
                self.at_start = false;
                self.take_token(token)?;
                self.look_for_end()?;
            }
        }
        Ok(self.is_over)
    }
}
