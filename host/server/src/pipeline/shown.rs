//! What strangers wrote, fit for a line of the log: no character of it moves a cursor, ends a line or
//! looks like another, and it is so long and no longer.

use std::fmt::{self, Write as _};

/// Longest piece that is shown, in characters.
const CHARS_MAX: usize = 256;

/// A text of a client's.
pub(super) struct Shown<'a>(pub(super) &'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut chars = self.0.chars();
        for c in chars.by_ref().take(CHARS_MAX) {
            match c {
                ' '..='~' if !matches!(c, ' ' | '\\' | '"') => f.write_char(c)?,
                ' ' => f.write_str("\\u{20}")?,
                c => write!(f, "{}", c.escape_default())?,
            }
        }
        match chars.as_str().len() {
            0 => Ok(()),
            more => write!(f, "... ({more} bytes more)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_plain_characters_reaches_the_log() {
        for (text, shown) in [
            ("/v1/chat/completions", "/v1/chat/completions"),
            ("/a?b=1&c=%41", "/a?b=1&c=%41"),
            ("/a\nINFO served", "/a\\nINFO\\u{20}served"),
            ("/\u{1b}[31m\r\t", "/\\u{1b}[31m\\r\\t"),
            ("/\u{9b}2J\u{7f}", "/\\u{9b}2J\\u{7f}"),
            ("/\u{202e}\u{2028}é", "/\\u{202e}\\u{2028}\\u{e9}"),
            ("\\\"'", "\\\\\\\"'"),
            ("", ""),
        ] {
            assert_eq!(Shown(text).to_string(), shown);
        }
    }

    #[test]
    fn a_long_text_is_cut_and_says_so() {
        let long = "é".repeat(CHARS_MAX + 3);
        let shown = Shown(&long).to_string();
        assert!(shown.ends_with("\\u{e9}... (6 bytes more)"), "{shown}");
        assert_eq!(shown.matches("\\u{e9}").count(), CHARS_MAX);
    }
}
