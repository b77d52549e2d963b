//! Tool calls: how one is written, and how what a model wrote is read back.
//!
//! The template says what stands around calls ([`CallSyntax`]); a call itself is spelled here and nowhere else. `formats` makes a
//! grammar of it, so that nothing else can be said; [`Reader`] turns the text of an answer into calls as they are completed.

use std::collections::BTreeSet;
use std::sync::Arc;

use rand::RngCore;
use serde::Deserialize;
use serde_json::value::RawValue;
use visor_sandbox::{CallSyntax, ToolCall, ToolChoice, ToolSpec};

/// What the model may or must call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Calls {
    /// What stands around calls.
    pub syntax: CallSyntax,
    /// The tools, of which there is one at least.
    pub tools: Vec<ToolSpec>,
    /// Numbers of those whose parameters are followed to the letter or refused. Of the others, what cannot be followed is left out.
    pub strict: BTreeSet<usize>,
    /// Whether one is called.
    pub choice: ToolChoice,
    /// Most calls in one answer.
    pub count_max: u32,
}

impl Calls {
    /// The tools that may be called, with their numbers.
    pub fn offered(&self) -> impl Iterator<Item = (usize, &ToolSpec)> {
        let named = match &self.choice {
            ToolChoice::Named(name) => Some(name),
            ToolChoice::Auto | ToolChoice::Required => None,
        };
        let tools = self.tools.iter().enumerate();
        tools.filter(move |(_, tool)| named.is_none_or(|name| *name == tool.name))
    }
}

/// What stands before the arguments of a call; `}` stands behind them.
pub fn call_begin(name: &str) -> String {
    let name = serde_json::Value::from(name);
    format!(r#"{{"name": {name}, "arguments": "#)
}

/// What was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// Text for the client.
    Text(String),
    /// A whole call.
    Call(ToolCall),
}

/// Reads one answer: text, or calls.
#[derive(Debug, Clone, Default)]
pub struct Reader {
    /// None where no calls are possible: all is text.
    possible: Option<Arc<Calls>>,
    state: State,
    /// What cannot be told yet.
    held: String,
    calls: u32,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum State {
    /// It may still be either.
    #[default]
    Beginning,
    Text,
    Call,
    BehindCall,
}

#[derive(Deserialize)]
struct Written<'a> {
    name: String,
    #[serde(borrow)]
    arguments: &'a RawValue,
}

impl Reader {
    /// For an answer that may be those calls.
    pub fn new(possible: Option<Arc<Calls>>) -> Self {
        Self {
            possible,
            ..Self::default()
        }
    }

    /// How many calls there were.
    pub fn calls(&self) -> u32 {
        self.calls
    }

    /// Takes more of the answer; gives what can be told now.
    pub fn take(&mut self, text: &str) -> Vec<Said> {
        let Some(possible) = self.possible.clone() else {
            return vec![Said::Text(text.to_owned())];
        };
        let syntax = &possible.syntax;
        self.held.push_str(text);
        let mut said = Vec::new();
        loop {
            self.state = match self.state {
                State::Beginning if self.held.starts_with(&syntax.open) => {
                    self.held.drain(..syntax.open.len());
                    State::Call
                }
                State::Beginning if !syntax.open.starts_with(&self.held) => State::Text,
                State::BehindCall if self.held.starts_with(&syntax.between) => {
                    self.held.drain(..syntax.between.len());
                    State::Call
                }
                State::Call => match self.call() {
                    Some(call) => {
                        said.push(Said::Call(call));
                        State::BehindCall
                    }
                    None => break,
                },
                State::Text => {
                    said.push(Said::Text(std::mem::take(&mut self.held)));
                    break;
                }
                State::Beginning | State::BehindCall => break,
            }
        }
        said
    }

    /// What is left at the end; `whole` says that nothing cut the answer off. Half a call is nobody's to act on; what only began
    /// like one, where there could be text, is text.
    pub fn finish(&mut self, whole: bool) -> Option<String> {
        let held = std::mem::take(&mut self.held);
        let possible = self.possible.as_ref()?;
        let text = match self.state {
            State::Beginning if possible.choice == ToolChoice::Auto => held,
            State::Call if whole && self.calls == 0 => format!("{}{held}", possible.syntax.open),
            _ => String::new(),
        };
        Some(text).filter(|text| !text.is_empty())
    }

    /// The call that the text begins with, if it is whole.
    fn call(&mut self) -> Option<ToolCall> {
        // Nothing is parsed again before another object may have ended.
        if !self.held.ends_with('}') && !self.held.contains("}}") {
            return None;
        }
        let mut values = serde_json::Deserializer::from_str(&self.held).into_iter::<Written>();
        let written = values.next()?.ok()?;
        let call = ToolCall {
            id: random_id(),
            name: written.name,
            arguments: written.arguments.get().to_owned(),
        };
        let end = values.byte_offset();
        self.held.drain(..end);
        self.calls += 1;
        Some(call)
    }
}

/// Nobody can guess which results belong to which call.
fn random_id() -> String {
    let mut random = [0_u8; 16];
    rand::rng().fill_bytes(&mut random[..12]);
    format!("{:024x}", u128::from_le_bytes(random))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader() -> Reader {
        reader_of(ToolChoice::Auto)
    }

    fn reader_of(choice: ToolChoice) -> Reader {
        let syntax = CallSyntax {
            open: "call[".to_owned(),
            between: ", ".to_owned(),
            close: "]".to_owned(),
        };
        Reader::new(Some(Arc::new(Calls {
            syntax,
            tools: Vec::new(),
            strict: BTreeSet::new(),
            choice,
            count_max: 2,
        })))
    }

    /// What is said when the text comes in pieces of that many characters.
    fn said(text: &str, piece: usize, whole: bool) -> Vec<String> {
        let mut reader = reader();
        let characters: Vec<char> = text.chars().collect();
        let mut told = Vec::new();
        let mut words = String::new();
        for piece in characters.chunks(piece) {
            for said in reader.take(&piece.iter().collect::<String>()) {
                match said {
                    Said::Text(text) => words.push_str(&text),
                    Said::Call(call) => told.push(format!("{}({})", call.name, call.arguments)),
                }
            }
        }
        words.extend(reader.finish(whole));
        told.extend(Some(words).filter(|words| !words.is_empty()));
        told
    }

    #[test]
    fn calls_are_read_however_they_are_cut() {
        let two = r#"call[{"name": "a_1", "arguments": {"x": "}}, {\"", "y": {"z": [1.50, {}]}}}, {"name": "b", "arguments": {}}]"#;
        for piece in 1..two.len() {
            assert_eq!(
                said(two, piece, true),
                [r#"a_1({"x": "}}, {\"", "y": {"z": [1.50, {}]}})"#, "b({})"],
                "{piece}"
            );
            for text in [
                "", "c", "call", "calls", "Call[", "call me", "ca{}}", " call[",
            ] {
                let expected: Vec<&str> =
                    Some(text).filter(|t| !t.is_empty()).into_iter().collect();
                assert_eq!(said(text, piece, true), expected);
            }
        }
    }

    #[test]
    fn half_a_call_is_not_told() {
        let cut = r#"call[{"name": "a", "arguments": {"x": 1}}, {"name": "a", "argum"#;
        assert_eq!(said(cut, 3, false), [r#"a({"x": 1})"#]);
        assert!(said(r#"call[{"name": "a", "argum"#, 3, false).is_empty());
        // Nothing cut this one off, so it never was a call.
        assert_eq!(said("call[ing]", 3, true), ["call[ing]"]);
        assert_eq!(said("cal", 3, false), ["cal"]);
        let mut must = reader_of(ToolChoice::Required);
        assert!(must.take("cal").is_empty() && must.finish(false).is_none());
    }

    #[test]
    fn every_call_has_an_id_of_its_own() {
        let mut reader = reader();
        let said =
            reader.take(r#"call[{"name": "a", "arguments": {}}, {"name": "a", "arguments": {}}]"#);
        let ids: Vec<&str> = said
            .iter()
            .filter_map(|said| match said {
                Said::Call(call) => Some(call.id.as_str()),
                Said::Text(_) => None,
            })
            .collect();
        assert_eq!(ids.len(), 2);
        assert!(ids[0] != ids[1] && ids.iter().all(|id| id.len() == 24));
    }

    #[test]
    fn without_tools_all_is_text() {
        let mut reader = Reader::new(None);
        let text = r#"call[{"name": "a", "arguments": {}}]"#;
        assert_eq!(reader.take(text), [Said::Text(text.to_owned())]);
        assert_eq!(reader.finish(true), None);
    }

    #[test]
    fn a_call_begins_as_it_is_read() {
        let text = format!("call[{}{{}}}}]", call_begin("a\"b"));
        let mut reader = reader();
        let said = reader.take(&text);
        assert!(
            matches!(&said[..], [Said::Call(call)] if call.name == "a\"b"),
            "{said:?}"
        );
    }
}
