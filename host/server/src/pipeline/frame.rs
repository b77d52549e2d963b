//! Texts that are written without the adapter, in the frame it gave for them. They come one token at a time, and calling the adapter
//! for one takes longer than all else that is done to it.

use std::borrow::Cow;

use visor_sandbox::{Event, Frame};

/// Room for the quotes of a text, and for what of it is escaped.
const ESCAPES_BYTES: usize = 32;

/// A delta that is text and has no tokens.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Text<'a> {
    generation: u32,
    choice: u32,
    text: Cow<'a, str>,
}

impl<'a> Text<'a> {
    /// These events, if they are one such delta.
    pub(super) fn of(events: &'a [Event]) -> Option<Self> {
        match events {
            [
                Event::Delta {
                    generation,
                    choice,
                    text,
                    tokens,
                },
            ] if tokens.is_empty() => Some(Self {
                generation: *generation,
                choice: *choice,
                text: Cow::Borrowed(text),
            }),
            _ => None,
        }
    }

    /// The same with a text of its own.
    pub(super) fn into_owned(self) -> Text<'static> {
        Text {
            text: Cow::Owned(self.text.into_owned()),
            ..self
        }
    }
}

/// A frame gives other bytes than its adapter wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the frame does not give what the adapter writes for a text; none of this exchange is used"
)]
pub(super) struct WrongFrame;

/// The frame that texts are written in, if there is one.
#[derive(Debug, Default)]
pub(super) struct Framing {
    frame: Option<Frame>,
    /// Whether a frame was wrong: no other is used then.
    is_wrong: bool,
}

impl Framing {
    /// Takes up the frame that came with `bytes`, in place of any before, if there is a text to hold it against: all that the adapter
    /// was told.
    ///
    /// # Errors
    /// `bytes` are not what the frame gives; once.
    pub(super) fn set(
        &mut self,
        frame: Option<Frame>,
        told: Option<Text<'_>>,
        bytes: &[u8],
    ) -> Result<(), WrongFrame> {
        self.frame = frame.filter(|_| !self.is_wrong);
        let framed = told.and_then(|text| self.write(&text));
        if framed.as_ref().is_some_and(|framed| framed == bytes) {
            return Ok(());
        }
        self.frame = None;
        if framed.is_some() {
            self.is_wrong = true;
            return Err(WrongFrame);
        }
        Ok(())
    }

    /// A text as the adapter would write it.
    pub(super) fn write(&self, text: &Text<'_>) -> Option<Vec<u8>> {
        let frame = self.frame.as_ref()?;
        if (frame.generation, frame.choice) != (text.generation, text.choice) {
            return None;
        }
        let room = frame.before.len() + text.text.len() + ESCAPES_BYTES + frame.after.len();
        let mut bytes = Vec::with_capacity(room);
        bytes.extend_from_slice(&frame.before);
        serde_json::to_writer(&mut bytes, &text.text).ok()?;
        bytes.extend_from_slice(&frame.after);
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use visor_sandbox::{TokenChance, TokenInfo};

    use super::*;

    fn delta(choice: u32, text: &str) -> Event {
        Event::Delta {
            generation: 1,
            choice,
            text: text.to_owned(),
            tokens: Vec::new(),
        }
    }

    fn frame() -> Option<Frame> {
        Some(Frame {
            generation: 1,
            choice: 2,
            before: b"<".to_vec(),
            after: b">".to_vec(),
        })
    }

    /// With the frame of texts of choice 2.
    fn framing() -> Framing {
        let mut framing = Framing::default();
        let first = [delta(2, "a\"\n")];
        let set = framing.set(frame(), Text::of(&first), br#"<"a\"\n">"#);
        assert_eq!(set, Ok(()));
        framing
    }

    fn written(framing: &Framing, events: &[Event]) -> Option<Vec<u8>> {
        framing.write(&Text::of(events)?)
    }

    #[test]
    fn a_text_is_written_as_the_adapter_wrote_the_one_before() {
        let written = written(&framing(), &[delta(2, "\u{e9}\\\u{1}")]);
        assert_eq!(written.unwrap(), "<\"\u{e9}\\\\\\u0001\">".as_bytes());
    }

    #[test]
    fn what_the_frame_is_not_for_goes_to_the_adapter() {
        let mut told = delta(2, "a");
        if let Event::Delta { tokens, .. } = &mut told {
            let chosen = TokenChance {
                token: 1,
                bytes: b"a".to_vec(),
                logprob: 0.0,
            };
            tokens.push(TokenInfo {
                chosen,
                alternatives: Vec::new(),
            });
        }
        let mut other = delta(2, "a");
        if let Event::Delta { generation, .. } = &mut other {
            *generation = 0;
        }
        let two = vec![delta(2, "a"), delta(2, "b")];
        for events in [vec![told], vec![other], vec![delta(1, "a")], two, vec![]] {
            assert_eq!(written(&framing(), &events), None, "{events:?}");
        }
    }

    #[test]
    fn what_the_adapter_says_next_takes_the_frame_back() {
        let text = [delta(2, "a")];
        for (frame, events) in [(None, &text[..]), (frame(), &[])] {
            let mut framing = framing();
            let set = framing.set(frame, Text::of(events), br#"<"a">"#);
            assert_eq!((set, written(&framing, &text)), (Ok(()), None));
        }
    }

    #[test]
    fn a_frame_that_gives_other_bytes_than_the_adapter_is_the_last_of_its_exchange() {
        let text = [delta(2, "a")];
        for bytes in [&br#"<"b">"#[..], br#"[<"a">"#, b""] {
            let mut framing = framing();
            let set = framing.set(frame(), Text::of(&text), bytes);
            assert_eq!((set, written(&framing, &text)), (Err(WrongFrame), None));
            let set = framing.set(frame(), Text::of(&text), br#"<"a">"#);
            assert_eq!((set, written(&framing, &text)), (Ok(()), None));
        }
    }
}
