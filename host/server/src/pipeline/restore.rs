//! Puts back what was lifted out of a body, wherever an adapter passes it on: in what it wants of the
//! model, in what it answers, in what it says is wrong. Nobody but an adapter sees a token.

use std::sync::Arc;

use serde_json::Value;
use visor_sandbox::{
    ErrorCode, Generation, GuestError, Input, Lifted, Message, OutputFormat, Part, Source,
};

use super::failure::Failure;

/// How often all that was lifted may come back in one generation: a text is in one place, or told to the model twice.
const RESTORED_TIMES_MAX: usize = 2;
/// Most bytes of what was lifted that one answer may say again: settings that are repeated are short.
const ANSWER_BYTES_MAX: usize = 8 << 20;
/// Longest message that something was put back into, in bytes; as long as a plugin's own may be.
const MESSAGE_BYTES_MAX: usize = 1024;

/// An adapter put a client's strings back more often than a client could mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it repeats what was lifted from the body over and over")]
pub(super) struct Repeated;

/// What was lifted out of one body, and how much of it was told.
#[derive(Debug, Default)]
pub(super) struct Restorer {
    lifted: Arc<Lifted>,
    answered_bytes: usize,
}

impl Restorer {
    /// Nothing was told yet.
    pub(super) fn new(lifted: Arc<Lifted>) -> Self {
        Self {
            lifted,
            answered_bytes: 0,
        }
    }

    /// Puts back, in all text of a generation, the strings that were lifted and are no pictures. Names stay:
    /// there is none that long, and a complaint about one is an answer.
    ///
    /// # Errors
    /// What would come back is more than [`RESTORED_TIMES_MAX`] times what was lifted.
    pub(super) fn generation(&self, generation: &mut Generation) -> Result<(), Repeated> {
        let mut bytes_left = self.lifted.bytes().saturating_mul(RESTORED_TIMES_MAX);
        let mut restore = |text: &mut String| self.text(text, &mut bytes_left);
        match &mut generation.input {
            Input::Text(text) => restore(text)?,
            Input::Chat(messages) => messages
                .iter_mut()
                .flat_map(texts_of)
                .try_for_each(&mut restore)?,
        }
        for source in &mut generation.images {
            if let Source::Url(url) = source {
                restore(url)?;
            }
        }
        generation.stop.iter_mut().try_for_each(&mut restore)?;
        match &mut generation.format {
            OutputFormat::JsonSchema(text) | OutputFormat::Regex(text) => restore(text)?,
            OutputFormat::Text | OutputFormat::Json => {}
        }
        for tool in &mut generation.tools {
            restore(&mut tool.description)?;
            restore(&mut tool.parameters)?;
        }
        Ok(())
    }

    fn text(&self, text: &mut String, bytes_left: &mut usize) -> Result<(), Repeated> {
        if !self.lifted.is_in(text) {
            return Ok(());
        }
        let mut restored = String::with_capacity(text.len());
        for piece in self.lifted.pieces(text) {
            let bytes = piece.original.map_or(0, str::len);
            *bytes_left = bytes_left.checked_sub(bytes).ok_or(Repeated)?;
            restored.push_str(piece.shown());
        }
        *text = restored;
        Ok(())
    }

    /// Puts back what an adapter says again in bytes of its answer: in JSON, where that is what it
    /// writes, and no string of it is cut by the end of the bytes.
    ///
    /// # Errors
    /// More than [`ANSWER_BYTES_MAX`] in one answer.
    pub(super) fn answer(&mut self, bytes: Vec<u8>, is_json: bool) -> Result<Vec<u8>, Failure> {
        let Ok(text) = std::str::from_utf8(&bytes) else {
            return Ok(bytes);
        };
        if !self.lifted.is_in(text) {
            return Ok(bytes);
        }
        let lifted = Arc::clone(&self.lifted);
        let mut restored = Vec::with_capacity(bytes.len());
        for piece in lifted.pieces(text) {
            self.answered_bytes += piece.original.map_or(0, str::len);
            if self.answered_bytes > ANSWER_BYTES_MAX {
                let message = format!(
                    "the answer would repeat more than {ANSWER_BYTES_MAX} bytes of the request"
                );
                return Err(Failure::new(ErrorCode::TooLarge, message));
            }
            match piece.original {
                Some(original) if is_json => {
                    let quoted = Value::from(original).to_string();
                    restored.extend_from_slice(&quoted.as_bytes()[1..quoted.len() - 1]);
                }
                _ => restored.extend_from_slice(piece.shown().as_bytes()),
            }
        }
        Ok(restored)
    }

    /// Puts back what an error repeats, as far as an error is read.
    pub(super) fn error(&self, error: &mut GuestError) {
        for text in [Some(&mut error.message), error.param.as_mut()]
            .into_iter()
            .flatten()
        {
            if self.lifted.is_in(text) {
                let mut said = String::new();
                for piece in self.lifted.pieces(text) {
                    let room = MESSAGE_BYTES_MAX.saturating_sub(said.len());
                    let shown = piece.shown();
                    said.push_str(&shown[..shown.floor_char_boundary(room)]);
                }
                *text = said;
            }
        }
    }
}

/// Whether bytes under these headers are JSON, or lines and events of it.
pub(super) fn is_json(headers: &[(String, String)]) -> bool {
    headers.iter().any(|(name, value)| {
        let is = |word: &str| value.contains(word);
        name.eq_ignore_ascii_case("content-type") && (is("json") || is("event-stream"))
    })
}

fn texts_of(message: &mut Message) -> impl Iterator<Item = &mut String> {
    message.parts.iter_mut().filter_map(|part| match part {
        Part::Text(text) => Some(text),
        Part::ToolCall(call) => Some(&mut call.arguments),
        Part::ToolResult { content, .. } => Some(content),
        Part::Image(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn restorer(originals: &[&str]) -> Restorer {
        let originals = originals.iter().map(|text| Bytes::from((*text).to_owned()));
        Restorer::new(Arc::new(Lifted::new("M".to_owned(), originals.collect())))
    }

    #[test]
    fn an_answer_says_again_what_the_client_wrote() {
        let original = "data:text/plain,\"a\\b\n\u{e9}\"";
        let mut restorer = restorer(&[original]);
        let json = restorer.answer(br#"{"a":"M:0","b":"x"}"#.to_vec(), true);
        let json: Value = serde_json::from_slice(&json.unwrap()).unwrap();
        assert_eq!((&json["a"], &json["b"]), (&original.into(), &"x".into()));
        let plain = restorer.answer(b"say M:0".to_vec(), false).unwrap();
        assert_eq!(plain, format!("say {original}").into_bytes());
        assert_eq!(restorer.answer(vec![0xff], true).unwrap(), [0xff]);
        assert!(is_json(&[(
            "Content-Type".into(),
            "text/event-stream".into()
        )]));
        assert!(!is_json(&[("content-type".into(), "text/plain".into())]));
    }

    #[test]
    fn what_is_said_again_has_an_end() {
        let long = "x".repeat(ANSWER_BYTES_MAX / 2);
        let mut restorer = restorer(&[&long]);
        for _ in 0..2 {
            restorer.answer(b"\"M:0\"".to_vec(), true).unwrap();
        }
        let failure = restorer.answer(b"\"M:0\"".to_vec(), true).unwrap_err();
        assert_eq!(failure.error.code, ErrorCode::TooLarge);
        let mut error = GuestError::new(ErrorCode::NotFound, "no model 'M:0', and no M:0");
        restorer.error(&mut error);
        assert!(error.message.starts_with("no model 'xxx"));
        assert_eq!(error.message.len(), MESSAGE_BYTES_MAX);
        let (mut text, mut left) = ("M:0M:0".to_owned(), long.len());
        assert_eq!(restorer.text(&mut text, &mut left), Err(Repeated));
    }
}
