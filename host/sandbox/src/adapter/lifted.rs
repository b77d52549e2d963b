//! What was lifted out of a body: which strings its tokens stand for.

use bytes::Bytes;

/// Long strings that an adapter sees as short tokens, `<marker>:<n>`.
///
/// Whatever is not told them has to be shown the strings themselves: a tokenizer, the model, the
/// client. The marker is random, so no text but one that was made of this body has it.
#[derive(Clone, Debug, Default)]
pub struct Lifted {
    marker: String,
    originals: Vec<Bytes>,
}

/// A piece of a text that an adapter made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// As the adapter wrote it.
    pub written: &'a str,
    /// What it stands for, where it is a token.
    pub original: Option<&'a str>,
}

impl<'a> Piece<'a> {
    /// What it is to be read as.
    #[must_use]
    pub fn shown(&self) -> &'a str {
        self.original.unwrap_or(self.written)
    }
}

impl Lifted {
    /// Strings by the number that their tokens have. A marker that is empty stands for nothing.
    #[must_use]
    pub fn new(marker: String, originals: Vec<Bytes>) -> Self {
        Self { marker, originals }
    }

    /// The word that tokens begin with.
    #[must_use]
    pub fn marker(&self) -> &str {
        &self.marker
    }

    /// Length of all the strings together, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.originals.iter().map(Bytes::len).sum()
    }

    /// Whether a text may have tokens. Free where nothing was lifted.
    #[must_use]
    pub fn is_in(&self, text: &str) -> bool {
        !self.originals.is_empty() && !self.marker.is_empty() && text.contains(&self.marker)
    }

    /// A text cut at its tokens, in order; nothing of it is left out.
    pub fn pieces<'a>(&'a self, text: &'a str) -> impl Iterator<Item = Piece<'a>> {
        let mut rest = text;
        std::iter::from_fn(move || {
            let piece = (!rest.is_empty()).then(|| self.piece(rest))?;
            rest = &rest[piece.written.len()..];
            Some(piece)
        })
    }

    /// Length of what an adapter wrote of a text, of which so many bytes fit as it is shown. A token
    /// fits whole or not at all.
    pub(crate) fn written_bytes(&self, text: &str, mut shown_bytes: usize) -> usize {
        let mut written = 0;
        for piece in self.pieces(text) {
            let bytes = piece.shown().len();
            if bytes > shown_bytes {
                let part = piece.original.map_or(shown_bytes, |_| 0);
                return written + part;
            }
            shown_bytes -= bytes;
            written += piece.written.len();
        }
        written
    }

    /// What a text that is not empty begins with: a token, or all that stands before the next.
    fn piece<'a>(&'a self, text: &'a str) -> Piece<'a> {
        let found = self.is_in(text).then(|| text.find(&self.marker)).flatten();
        let plain = |bytes: usize| Piece {
            written: &text[..bytes],
            original: None,
        };
        match found {
            None => plain(text.len()),
            Some(0) => self.token(text).unwrap_or_else(|| plain(self.marker.len())),
            Some(at) => plain(at),
        }
    }

    /// The token that a text begins with; it has as many digits as a number of a string can have.
    fn token<'a>(&'a self, text: &'a str) -> Option<Piece<'a>> {
        let number = text.strip_prefix(&self.marker)?.strip_prefix(':')?;
        let mut index: Option<usize> = None;
        let mut digits = 0;
        for byte in number.bytes().take_while(u8::is_ascii_digit) {
            let next = index.unwrap_or(0) * 10 + usize::from(byte - b'0');
            if index == Some(0) || next >= self.originals.len() {
                break;
            }
            index = Some(next);
            digits += 1;
        }
        let original = std::str::from_utf8(&self.originals[index?]).ok()?;
        Some(Piece {
            written: &text[..self.marker.len() + 1 + digits],
            original: Some(original),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lifted(count: usize) -> Lifted {
        let original = |index: usize| Bytes::from(format!("<{index}>"));
        Lifted::new("M".to_owned(), (0..count).map(original).collect())
    }

    fn shown(lifted: &Lifted, text: &str) -> String {
        let pieces = lifted.pieces(text);
        pieces.map(|piece| piece.shown().to_owned()).collect()
    }

    #[test]
    fn tokens_are_shown_as_what_they_stand_for() {
        let few = lifted(2);
        for (text, says) in [
            ("", ""),
            ("no token", "no token"),
            ("M:0", "<0>"),
            ("a M:1 b M:0M:1", "a <1> b <0><1>"),
            ("M M: M:x M:2", "M M: M:x M:2"),
            ("M:05 apples", "<0>5 apples"),
            ("M:12", "<1>2"),
        ] {
            assert_eq!(shown(&few, text), says, "{text}");
        }
        assert_eq!(shown(&lifted(13), "M:12 M:13"), "<12> <1>3");
        let nothing = Lifted::new("M".to_owned(), Vec::new());
        assert_eq!(shown(&nothing, "M:0"), "M:0");
        let unmarked = Lifted::new(String::new(), vec![Bytes::from_static(b"x")]);
        assert_eq!(shown(&unmarked, ":0"), ":0");
    }

    #[test]
    fn what_fits_as_it_is_shown_is_told_as_it_was_written() {
        let lifted = lifted(1);
        for (shown_bytes, written) in [(0, 0), (2, 2), (3, 2), (4, 2), (5, 5), (6, 6), (9, 7)] {
            assert_eq!(lifted.written_bytes("a M:0 b", shown_bytes), written);
        }
    }
}
