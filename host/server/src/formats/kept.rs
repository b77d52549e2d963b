//! Grammars that were compiled, for whoever holds an answer to the same again: programs send one schema with every request.
//!
//! They are found by all they depend on, compared in full. Who finds one gets a copy, because following fills it with what was found
//! out of it: that is the request's own, and within the request's limits.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::Wish;
use super::follow::Compiled;

/// The last used is the last to go.
#[derive(Debug, Default)]
pub(super) struct Kept(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Used last, last.
    entries: VecDeque<Entry>,
    bytes: u64,
    reused: u64,
}

#[derive(Debug)]
struct Entry {
    wish: Arc<Wish>,
    grammar: Arc<Compiled>,
    bytes: u64,
}

/// Figures of this moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeptStats {
    /// Kept grammars.
    pub entries: u64,
    /// Memory they take, in bytes.
    pub bytes: u64,
    /// Times that one was found.
    pub reused: u64,
}

impl Kept {
    /// The grammar of a wish, if it is kept.
    pub(super) fn find(&self, wish: &Wish) -> Option<Compiled> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.shrink(bytes_max(wish));
        let mut entries = state.entries.iter();
        let place = entries.position(|entry| *entry.wish == *wish)?;
        let entry = state.entries.remove(place)?;
        let grammar = Arc::clone(&entry.grammar);
        state.entries.push_back(entry);
        state.reused += 1;
        drop(state);
        Some(grammar.copy())
    }

    /// Keeps a grammar, if there is room for it at all, and gives one to follow.
    pub(super) fn keep(&self, wish: Arc<Wish>, grammar: Compiled) -> Compiled {
        let bytes = grammar.bytes() + wish.bytes();
        let bytes_max = bytes_max(&wish);
        if bytes > bytes_max {
            return grammar;
        }
        let copy = grammar.copy();
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Several may have compiled the same at once.
        if state.entries.iter().all(|entry| *entry.wish != *wish) {
            state.bytes += bytes;
            state.entries.push_back(Entry {
                wish,
                grammar: Arc::new(grammar),
                bytes,
            });
            state.shrink(bytes_max);
        }
        copy
    }

    pub(super) fn stats(&self) -> KeptStats {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        KeptStats {
            entries: state.entries.len() as u64,
            bytes: state.bytes,
            reused: state.reused,
        }
    }
}

impl State {
    fn shrink(&mut self, bytes_max: u64) {
        while self.bytes > bytes_max {
            let Some(oldest) = self.entries.pop_front() else {
                return;
            };
            self.bytes -= oldest.bytes;
        }
    }
}

fn bytes_max(wish: &Wish) -> u64 {
    wish.limits.kept_mib << 20
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use visor_engine::Grammar;
    use visor_sandbox::OutputFormat;

    use super::super::tests::{formats, walk};
    use super::super::{Bounds, Follow, Formats};
    use crate::config::FormatsConfig;
    use crate::stats::Memory;
    use std::sync::Arc;

    fn fresh() -> Formats {
        let known = formats();
        Formats::new(Arc::clone(&known.tokenizer), known.stop_ids.clone())
    }

    fn limits(kept_mib: u64) -> FormatsConfig {
        FormatsConfig {
            kept_mib,
            compile_ms_max: 60_000,
            ..FormatsConfig::default()
        }
    }

    fn compile(formats: &Formats, format: &OutputFormat, kept_mib: u64) -> Arc<dyn Grammar> {
        let bounds = Bounds {
            stop_ids: formats.stop_ids.clone(),
            ..Bounds::default()
        };
        let compiled = formats.compile((format, Follow::Strictly), None, bounds, &limits(kept_mib));
        compiled.unwrap().expect("no free text")
    }

    fn object(number: u32, members: usize) -> OutputFormat {
        let member = |index| (format!("{number}_{index}"), json!({ "type": "string" }));
        let properties: serde_json::Map<_, _> = (0..members).map(member).collect();
        let schema = json!({ "type": "object", "properties": properties });
        OutputFormat::JsonSchema(schema.to_string())
    }

    #[test]
    fn the_same_is_compiled_once_and_followed_as_if_for_the_first_time() {
        let formats = fresh();
        let format = OutputFormat::Regex("[a-c]{200}".to_owned());
        let walks = |kept_mib| -> Vec<_> {
            let seeds = 0..4;
            seeds
                .map(|seed| walk(&compile(&formats, &format, kept_mib), seed, 200))
                .map(|walk| (walk.tokens, walk.failed))
                .collect()
        };
        let kept = walks(32);
        assert_eq!((formats.compiled(), formats.kept().reused), (1, 3));
        assert!(kept.iter().any(|(tokens, _)| tokens.len() > 10));
        assert_eq!(kept, walks(0), "each compiled for itself");
        assert_eq!(formats.compiled(), 5);
        let begun = Bounds {
            prefill: Some("ab".to_owned()),
            ..Bounds::default()
        };
        let begun = formats.compile((&format, Follow::Strictly), None, begun, &limits(32));
        assert!(begun.is_ok());
        assert_eq!(formats.compiled(), 6, "another beginning");
    }

    #[test]
    fn what_is_kept_has_its_memory_and_no_more() {
        let formats = fresh();
        for number in 0..20 {
            compile(&formats, &object(number, 20), 1);
            let kept = formats.kept();
            assert!(kept.bytes <= 1 << 20 && kept.entries > 0, "{kept:?}");
        }
        assert!(formats.kept().entries < 20);
        compile(&formats, &object(19, 20), 1);
        assert_eq!(formats.kept().reused, 1, "the last one is there");
        compile(&formats, &object(19, 20), 0);
        assert_eq!((formats.kept().entries, formats.kept().bytes), (0, 0));
        assert_eq!(formats.compiled(), 21);
    }

    /// Prints what kept grammars take: `cargo test --release -p visor --lib what_kept_grammars_take -- --ignored --nocapture`.
    #[test]
    #[ignore = "tells sizes and times, judges nothing"]
    fn what_kept_grammars_take() {
        let formats = fresh();
        compile(&formats, &object(0, 1), 1 << 10);
        for (name, count, format) in [
            ("json", 40, (|_| OutputFormat::Json) as fn(u32) -> _),
            ("20 members", 40, |number| object(number, 20)),
            ("700 members", 10, |number| object(number, 700)),
            ("a large expression", 10, |number| {
                OutputFormat::Regex(format!(r"{number}(\w|\p{{Greek}}|\d){{1,2000}}"))
            }),
        ] {
            let ask_all = || {
                let began = std::time::Instant::now();
                for number in 0..count {
                    // Other ends make another wish.
                    let bounds = Bounds {
                        stop_ids: (0..2 + number).collect(),
                        ..Bounds::default()
                    };
                    let compiled = formats.compile(
                        (&format(number), Follow::Strictly),
                        None,
                        bounds,
                        &limits(1 << 10),
                    );
                    compiled.unwrap();
                }
                began.elapsed() / count
            };
            let before = (formats.kept().bytes, Memory::now().resident_bytes);
            let compiled = ask_all();
            let after = (formats.kept().bytes, Memory::now().resident_bytes);
            let copied = ask_all();
            let resident = after.1.unwrap_or(0).saturating_sub(before.1.unwrap_or(0));
            let count = u64::from(count);
            println!(
                "{name}: {} bytes counted, {} resident, compiled in {compiled:.1?}, copied in {copied:.1?}",
                (after.0 - before.0) / count,
                resident / count
            );
        }
    }
}
