//! Stop strings: found across token boundaries, and never seen by the client.
//!
//! What ends an answer does not depend on how the text was cut into tokens: the stop string that
//! is complete first wins, the longest of those that are complete at the same character.

/// Looks for stop strings in a text that comes in pieces.
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string. Holds no whole one.
    held: String,
}

/// What a piece of text means for the client.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Passed {
    /// Text no stop string can be part of any more.
    pub(crate) text: String,
    /// The stop string that was met; the answer ends before it.
    pub(crate) stop: Option<String>,
}

impl StopMatcher {
    /// Empty stop strings would end everything; they are left out.
    pub(crate) fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self {
            stops,
            held: String::new(),
        }
    }

    /// Takes settled text, and tentative text behind it: that can complete a stop string, but is
    /// not passed on, and comes again.
    pub(crate) fn push(&mut self, settled: &str, tentative: &str) -> Passed {
        self.held.push_str(settled);
        let settled_bytes = self.held.len();
        self.held.push_str(tentative);
        if let Some((start, stop)) = self.find() {
            self.held.truncate(start);
            return Passed {
                text: std::mem::take(&mut self.held),
                stop: Some(stop),
            };
        }
        self.held.truncate(settled_bytes);
        let keep = self.undecided_bytes();
        let rest = self.held.split_off(settled_bytes - keep);
        Passed {
            text: std::mem::replace(&mut self.held, rest),
            stop: None,
        }
    }

    /// What was held back, when no text will follow.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the first complete stop string starts, and which it is.
    fn find(&self) -> Option<(usize, String)> {
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, stop))
        });
        let (_, start, stop) = found.min()?;
        Some((start, stop.clone()))
    }

    /// Length in bytes of the longest end of the held text that a stop string begins with.
    fn undecided_bytes(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        let from = self.held.ceil_char_boundary(from);
        let ends = self.held[from..].char_indices();
        let undecided = |end: &str| self.stops.iter().any(|stop| stop.starts_with(end));
        ends.map(|(start, _)| &self.held[from + start..])
            .find(|end| undecided(end))
            .map_or(0, str::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops.iter().map(ToString::to_string).collect());
        let mut text = String::new();
        for piece in pieces {
            let passed = matcher.push(piece, "");
            text.push_str(&passed.text);
            if passed.stop.is_some() {
                return (text, passed.stop);
            }
        }
        (text + &matcher.finish(), None)
    }

    fn stopped(text: &str, stop: &str) -> (String, Option<String>) {
        (text.into(), Some(stop.into()))
    }

    #[test]
    fn a_stop_string_over_several_pieces_ends_the_text_before_it() {
        assert_eq!(run(&["END"], &["a E", "N", "D b"]), stopped("a ", "END"));
        assert_eq!(
            run(&["END"], &["E", "N", "E", "END"]),
            stopped("ENE", "END")
        );
        assert_eq!(run(&["aab"], &["aa", "ab"]), stopped("a", "aab"));
        assert_eq!(run(&["é!"], &["caf", "é", "!"]), stopped("caf", "é!"));
    }

    #[test]
    fn what_only_looked_like_a_stop_string_is_passed_on() {
        let mut matcher = StopMatcher::new(vec!["\n\nUser:".into()]);
        assert_eq!(matcher.push("hello\n", "").text, "hello");
        assert_eq!(matcher.push("\nUs", "").text, "");
        assert_eq!(matcher.push("age", "").text, "\n\nUsage");
        assert_eq!(matcher.push("\n", "").text, "");
        assert_eq!(matcher.finish(), "\n");
    }

    #[test]
    fn the_first_complete_stop_string_wins() {
        assert_eq!(run(&["cd", "b"], &["abcd"]), stopped("a", "b"));
        assert_eq!(run(&["abcd", "c"], &["abcd"]), stopped("ab", "c"));
        assert_eq!(run(&["c", "bc"], &["abc"]), stopped("a", "bc"));
        assert_eq!(run(&["x", "y"], &["none"]), ("none".into(), None));
        assert_eq!(run(&["", "n"], &["one"]), stopped("o", "n"));
    }

    #[test]
    fn tentative_text_can_stop_but_is_not_passed_on() {
        let mut matcher = StopMatcher::new(vec!["\n".into()]);
        assert_eq!(
            matcher.push("a", "b"),
            Passed {
                text: "a".into(),
                stop: None
            }
        );
        let passed = matcher.push("", "b\n");
        assert_eq!(
            (passed.text.as_str(), passed.stop.as_deref()),
            ("b", Some("\n"))
        );
    }

    /// However the text is cut, the result is that of the uncut text.
    #[test]
    fn the_cut_into_pieces_does_not_matter() {
        let stops = ["aba", "bb", "abab"];
        for number in 0_u32..1 << 10 {
            let text: String = (0..10)
                .map(|bit| if number >> bit & 1 == 1 { 'a' } else { 'b' })
                .collect();
            let whole = run(&stops, &[&text]);
            let singles: Vec<&str> = (0..10).map(|at| &text[at..=at]).collect();
            assert_eq!(run(&stops, &singles), whole, "{text}");
            let pieces = [&text[..3], &text[3..4], &text[4..]];
            assert_eq!(run(&stops, &pieces), whole, "{text}");
            assert!(whole.1.is_some() || stops.iter().all(|stop| !text.contains(stop)));
        }
    }
}
