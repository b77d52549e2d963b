//! Whether an answer is right: a few strict rules over words, and nothing that guesses.
//!
//! No stemming, no plurals, no synonyms, no numbers spelled out: what is to be accepted is listed in
//! the case, so that a figure means the same today and next year. Told in `tests/suite/README.md`.

use serde::Serialize;

/// How an answer is held against what is accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// Has one of the accepted phrases, as whole words.
    #[default]
    Words,
    /// Has every accepted phrase, as whole words.
    All,
    /// Is one of the accepted phrases, and not a word more.
    Exact,
    /// Has one of the accepted texts as it is written, letter case included.
    Text,
    /// Its first word is the accepted one of yes and no.
    YesNo,
}

impl Rule {
    /// Every rule, with its name in a suite.
    pub const ALL: [(&'static str, Self); 5] = [
        ("words", Self::Words),
        ("all", Self::All),
        ("exact", Self::Exact),
        ("text", Self::Text),
        ("yes-no", Self::YesNo),
    ];

    /// The rule of that name.
    #[must_use]
    pub fn find(name: &str) -> Option<Self> {
        let found = Self::ALL.into_iter().find(|(known, _)| *known == name);
        found.map(|(_, rule)| rule)
    }

    /// Whether `answer` is right.
    #[must_use]
    pub fn is_right(self, answer: &str, accept: &[String], reject: &[String]) -> bool {
        let answer_parts = self.parts(answer);
        let has = |phrase: &String| has_phrase(&answer_parts, &self.parts(phrase));
        if reject.iter().any(has) {
            return false;
        }
        match self {
            Self::Words | Self::Text => accept.iter().any(has),
            Self::All => accept.iter().all(has),
            Self::Exact => accept
                .iter()
                .any(|phrase| self.parts(phrase) == answer_parts),
            Self::YesNo => accept
                .iter()
                .any(|word| answer_parts.first() == self.parts(word).first()),
        }
    }

    /// Why a phrase of a case can never be found, if it cannot.
    #[must_use]
    pub fn why_unusable(self, phrase: &str) -> Option<&'static str> {
        let parts = self.parts(phrase);
        if parts.is_empty() {
            return Some(match self {
                Self::Text => "has nothing but blanks, quotes and punctuation",
                _ => "has no letters or digits",
            });
        }
        let is_word = parts.len() == 1 && ["yes", "no"].contains(&parts[0].as_str());
        (self == Self::YesNo && !is_word).then_some("is neither \"yes\" nor \"no\"")
    }

    /// What of a text is compared.
    fn parts(self, text: &str) -> Vec<String> {
        match self {
            Self::Text => tokens(text),
            _ => words(text),
        }
    }
}

/// The words of a text: runs of letters and digits in lower case. An apostrophe between letters and
/// `. , : / -` between digits belong to their word: "3.5" has no 5 in it.
fn words(text: &str) -> Vec<String> {
    let chars: Vec<char> = text
        .chars()
        .map(|c| if c == '\u{2019}' { '\'' } else { c })
        .collect();
    let mut words = Vec::new();
    let mut word = String::new();
    for (index, &c) in chars.iter().enumerate() {
        let before = index.checked_sub(1).map(|at| chars[at]);
        let between = |class: fn(char) -> bool| {
            before.is_some_and(class) && chars.get(index + 1).copied().is_some_and(class)
        };
        let joins = match c {
            '\'' => between(char::is_alphabetic),
            '.' | ',' | ':' | '/' | '-' => between(char::is_numeric),
            _ => false,
        };
        if c.is_alphanumeric() || joins {
            word.extend(c.to_lowercase());
        } else if !word.is_empty() {
            words.push(std::mem::take(&mut word));
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// The tokens of a text as they are written: split at blanks, without quotes, brackets and
/// punctuation at their ends. Signs that a text on a picture may mean (`$ % + # & @ -`) stay.
fn tokens(text: &str) -> Vec<String> {
    const AROUND: &str = ".,;:!?…\"'`´“”„‘’‚«»‹›()[]{}<>*_";
    let bare = text
        .split_whitespace()
        .map(|token| token.trim_matches(|c| AROUND.contains(c)));
    bare.filter(|token| !token.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Whether the words of `phrase` stand in `answer`, in order, side by side.
fn has_phrase(answer: &[String], phrase: &[String]) -> bool {
    !phrase.is_empty() && answer.windows(phrase.len()).any(|run| run == phrase)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(phrases: &[&str]) -> Vec<String> {
        phrases.iter().map(|phrase| (*phrase).to_owned()).collect()
    }

    #[track_caller]
    fn check(rule: Rule, accept: &[&str], reject: &[&str], answers: &[(&str, bool)]) {
        for (answer, right) in answers {
            assert_eq!(
                rule.is_right(answer, &owned(accept), &owned(reject)),
                *right,
                "{rule:?} {accept:?} not {reject:?}: {answer:?}"
            );
        }
    }

    #[test]
    fn words_are_whole_and_no_more_is_guessed() {
        let rows = [
            ("It is RED.", true),
            ("(red)", true),
            ("dark-red", true),
            ("reddish", false),
            ("two reds", false),
            ("re d", false),
            ("", false),
        ];
        check(Rule::Words, &["red"], &[], &rows);
        let rows = [
            ("A fire truck!", true),
            ("a Fire-Truck", true),
            ("a fire, truck", true),
            ("a truck on fire", false),
            ("fire", false),
        ];
        check(Rule::Words, &["fire truck", "lorry"], &[], &rows);
        check(Rule::Words, &["ÄPFEL"], &[], &[("zwei Äpfel", true)]);
    }

    #[test]
    fn numbers_and_apostrophes_keep_together() {
        let rows = [
            ("There are 5.", true),
            ("5, I think", true),
            ("3.5", false),
            ("5,000", false),
            ("at 12:5", false),
            ("5/8 of it", false),
            ("2024-5-1", false),
            ("15", false),
        ];
        check(Rule::Words, &["5"], &[], &rows);
        let rows = [("I don’t know", true), ("don t", false), ("'don't'", true)];
        check(Rule::Words, &["don't"], &[], &rows);
    }

    #[test]
    fn a_rejected_phrase_makes_any_answer_wrong() {
        let rows = [("red", true), ("not red", false), ("red or blue", false)];
        check(Rule::Words, &["red"], &["not red", "blue"], &rows);
        let rows = [
            ("EXIT", true),
            ("EXIT or EXIT2", false),
            ("exit2 EXIT", true),
        ];
        check(Rule::Text, &["EXIT"], &["EXIT2"], &rows);
        check(Rule::Exact, &["a b"], &["b"], &[("a b", false)]);
    }

    #[test]
    fn all_of_them_have_to_be_named() {
        let rows = [
            ("I see a cat and a red ball.", true),
            ("a red ball, then a cat", true),
            ("I see a cat.", false),
            ("a cat, a ball, red", false),
        ];
        check(Rule::All, &["cat", "red ball"], &[], &rows);
    }

    #[test]
    fn exact_is_that_and_nothing_else() {
        let rows = [
            ("Blue.", true),
            ("  \"BLUE\"\n", true),
            ("light blue", false),
            ("It is blue", false),
        ];
        check(Rule::Exact, &["blue", "azure"], &[], &rows);
    }

    #[test]
    fn text_is_read_as_it_is_written() {
        let rows = [
            ("It says \"K7\".", true),
            ("“K7”", true),
            ("**K7**", true),
            ("k7", false),
            ("K77", false),
            ("K 7", false),
            ("K7%", false),
        ];
        check(Rule::Text, &["K7"], &[], &rows);
        let rows = [("The sign: EXIT ONLY!", true), ("EXIT, only", false)];
        check(Rule::Text, &["EXIT ONLY"], &[], &rows);
        check(
            Rule::Text,
            &["$5"],
            &[],
            &[("for $5.", true), ("for 5", false)],
        );
        check(Rule::Text, &["(C++)"], &[], &[("C++", true), ("C", false)]);
    }

    #[test]
    fn the_first_word_says_yes_or_no() {
        let rows = [
            ("Yes, the cup is red.", true),
            ("yes", true),
            ("No, not yes.", false),
            ("I think yes", false),
            ("Yesterday", false),
            ("", false),
        ];
        check(Rule::YesNo, &["yes"], &[], &rows);
        check(Rule::YesNo, &["yes"], &["no"], &[("Yes and no.", false)]);
    }

    #[test]
    fn a_phrase_that_nothing_can_match_is_known() {
        for (rule, phrase, usable) in [
            (Rule::Words, "a", true),
            (Rule::Words, " ?! ", false),
            (Rule::Text, "?!", false),
            (Rule::Text, "%", true),
            (Rule::YesNo, "Yes", true),
            (Rule::YesNo, "yes indeed", false),
            (Rule::YesNo, "maybe", false),
        ] {
            assert_eq!(rule.why_unusable(phrase).is_none(), usable, "{phrase:?}");
        }
        for (name, rule) in Rule::ALL {
            assert_eq!(serde_json::to_value(rule).unwrap(), name);
            assert_eq!(Rule::find(name), Some(rule));
        }
    }
}
