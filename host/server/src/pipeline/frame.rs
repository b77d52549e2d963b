//! Texts that are written without the adapter, in the frame it gave for them. They come one token at a time, and calling the adapter
//! for one takes longer than all else that is done to it.

use visor_sandbox::{Event, Frame};

/// Room for the text of a token with its quotes.
const TEXT_BYTES: usize = 32;

/// A delta that is text and nothing else.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Text<'a> {
    generation: u32,
    choice: u32,
    text: &'a str,
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
                text,
            }),
            _ => None,
        }
    }
}

/// The frame that texts are written in, if there is one.
#[derive(Debug, Default)]
pub(super) struct Framing(Option<Frame>);

impl Framing {
    /// The frame that came with `bytes`, if it gives them.
    pub(super) fn checked(frame: Option<Frame>, text: Option<Text<'_>>, bytes: &[u8]) -> Self {
        let framing = Self(frame);
        match text.and_then(|text| framing.write(text)) {
            Some(framed) if framed == bytes => framing,
            _ => Self::default(),
        }
    }

    /// A text as the adapter would write it.
    pub(super) fn write(&self, text: Text<'_>) -> Option<Vec<u8>> {
        let frame = self.0.as_ref()?;
        if (frame.generation, frame.choice) != (text.generation, text.choice) {
            return None;
        }
        let room = frame.before.len() + text.text.len() + TEXT_BYTES + frame.after.len();
        let mut bytes = Vec::with_capacity(room);
        bytes.extend_from_slice(&frame.before);
        serde_json::to_writer(&mut bytes, text.text).ok()?;
        bytes.extend_from_slice(&frame.after);
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn a_text_is_written_as_the_adapter_wrote_the_one_before() {
        let first = [delta(2, "a\"\n")];
        let framing = Framing::checked(frame(), Text::of(&first), br#"<"a\"\n">"#);
        let next = [delta(2, "\u{e9}\\")];
        let written = Text::of(&next).and_then(|text| framing.write(text));
        assert_eq!(written.unwrap(), "<\"\u{e9}\\\\\">".as_bytes());
    }

    #[test]
    fn what_the_frame_is_not_for_goes_to_the_adapter() {
        let first = [delta(2, "a")];
        let framing = Framing::checked(frame(), Text::of(&first), br#"<"a">"#);
        let other = [delta(1, "a")];
        assert!(
            Text::of(&other)
                .and_then(|text| framing.write(text))
                .is_none()
        );
        let two = [delta(2, "a"), delta(1, "b")];
        assert_eq!(Text::of(&two), None);
        assert_eq!(Text::of(&[]), None);
    }

    #[test]
    fn a_frame_that_gives_other_bytes_than_the_adapter_is_not_used() {
        let events = [delta(2, "a")];
        let text = Text::of(&events);
        for (text, bytes) in [(text, &br#"<"b">"#[..]), (text, b""), (None, br#"<"a">"#)] {
            let framing = Framing::checked(frame(), text, bytes);
            assert!(framing.0.is_none(), "{bytes:?}");
        }
        assert!(Framing::checked(None, text, br#"<"a">"#).0.is_none());
    }
}
