//! From a wish to a grammar at its beginning: work that a stranger asks for, on a thread of its own, with so much time.
//!
//! The library compiles a grammar in one go that nothing interrupts; what ends it is its own limits on work and size. So a request
//! whose compile takes too long is answered, and the thread is left to come to its end: it holds its place among those that may
//! compile at once until then, and that is all it can take from others.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use llguidance::api::{GrammarInit, ParserLimits, TopLevelGrammar};
use llguidance::toktrie::InferenceCapabilities;
use llguidance::{Logger, TokenParser};
use visor_sandbox::{OutputFormat, ToolChoice};

use super::follow::Compiled;
use super::vocabulary::Vocabulary;
use super::{Bounds, Follow, FormatError, Wish, calls, explained, grammar};
use crate::calls::Calls;
use crate::config::FormatsConfig;

/// The library calls itself for every step into a schema, and a schema can be as deep as it is long: steps lead on through `$ref`s. A
/// thread that runs out of stack ends the process, so it has more than any text of that length takes: with an eighth of this the test
/// below passes, with a thirtieth it does not. It is address space; what is not used takes no memory.
const STACK_BYTES_EACH: usize = 2 << 10;
const STACK_BYTES_MIN: usize = 4 << 20;

/// Where grammars are compiled: so many at once.
#[derive(Debug, Default)]
pub(super) struct Places {
    taken: Mutex<usize>,
    left: Condvar,
}

/// One place, given back when dropped.
struct Place(Arc<Places>);

impl Drop for Place {
    fn drop(&mut self) {
        *self.0.lock() -= 1;
        self.0.left.notify_one();
    }
}

impl Places {
    fn lock(&self) -> std::sync::MutexGuard<'_, usize> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place among so many, waited for so long.
    fn enter(self: &Arc<Self>, places_max: usize, patience: Duration) -> Option<Place> {
        let full = |taken: &mut usize| *taken >= places_max;
        let waited = self.left.wait_timeout_while(self.lock(), patience, full);
        let (mut taken, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if full(&mut taken) {
            return None;
        }
        *taken += 1;
        Some(Place(Arc::clone(self)))
    }

    /// Runs a job on a thread of its own with so much of a stack, once there is a place for it; both may take so long. The job is told
    /// when nobody waits for it any more.
    fn run<T: Send + 'static>(
        self: &Arc<Self>,
        (places_max, patience): (usize, Duration),
        stack_bytes: usize,
        job: impl FnOnce(&AtomicBool) -> Result<T, FormatError> + Send + 'static,
    ) -> Result<T, FormatError> {
        let place = self.enter(places_max, patience).ok_or(FormatError::Busy)?;
        let (tell, told) = mpsc::sync_channel(1);
        let abandoned = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name("format".to_owned());
        let thread = thread.stack_size(stack_bytes);
        let spawned = thread.spawn({
            let abandoned = Arc::clone(&abandoned);
            move || {
                let _place = place;
                // Nobody is there to be told of what came too late.
                _ = tell.send(job(&abandoned));
            }
        });
        spawned.map_err(|_| FormatError::Busy)?;
        told.recv_timeout(patience).unwrap_or_else(|ended| {
            abandoned.store(true, Relaxed);
            Err(match ended {
                RecvTimeoutError::Timeout => FormatError::Slow {
                    compile_ms_max: u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
                },
                RecvTimeoutError::Disconnected => FormatError::Unusable(explained("panic")),
            })
        })
    }
}

/// Compiles what is wished, within the time of the operator's limits.
///
/// # Errors
/// As [`super::Formats::compile`].
pub(super) fn compile(
    places: &Arc<Places>,
    vocabulary: Arc<Vocabulary>,
    wish: Arc<Wish>,
) -> Result<Compiled, FormatError> {
    let limits = &wish.limits;
    let patience = Duration::from_millis(limits.compile_ms_max);
    let stack_bytes = STACK_BYTES_MIN + STACK_BYTES_EACH * wish.text_bytes();
    places.run(
        (limits.compiles_max, patience),
        stack_bytes,
        move |abandoned| {
            let Wish {
                format,
                follow,
                calls,
                bounds,
                limits,
            } = &*wish;
            let Some(calls) = calls else {
                return build(
                    &vocabulary,
                    grammar(format, *follow)?,
                    bounds.clone(),
                    limits,
                );
            };
            let built = calls::grammar(calls, (format, *follow))
                .and_then(|grammar| build(&vocabulary, grammar, bounds.clone(), limits));
            built.map_err(|error| blame(&vocabulary, (error, calls), limits, abandoned))
        },
    )
}

fn build(
    vocabulary: &Arc<Vocabulary>,
    grammar: TopLevelGrammar,
    bounds: Bounds,
    limits: &FormatsConfig,
) -> Result<Compiled, FormatError> {
    let parser = parser(vocabulary, grammar, limits)?;
    Compiled::new(parser, Arc::clone(vocabulary), bounds)
}

/// Which tool it is that makes a grammar of several fail: the first that also fails alone.
fn blame(
    vocabulary: &Arc<Vocabulary>,
    (error, calls): (FormatError, &Calls),
    limits: &FormatsConfig,
    abandoned: &AtomicBool,
) -> FormatError {
    let alone = |name: &str| Calls {
        choice: ToolChoice::Named(name.to_owned()),
        count_max: 1,
        ..calls.clone()
    };
    let bare = |index: usize| {
        let schema = serde_json::Value::Object(calls::arguments(calls, index)?);
        let grammar = TopLevelGrammar::from_json_schema(schema);
        build(vocabulary, grammar, Bounds::default(), limits)
    };
    let mut offered = calls.offered().take_while(|_| !abandoned.load(Relaxed));
    let failing = offered.find_map(|(index, tool)| {
        // Outside of a call, all that the library can complain of is what the client wrote.
        let built = bare(index).and_then(|_| {
            let grammar =
                calls::grammar(&alone(&tool.name), (&OutputFormat::Text, Follow::Strictly))?;
            build(vocabulary, grammar, Bounds::default(), limits)
        });
        Some(built.err()?.of_tool(index, tool))
    });
    failing.unwrap_or(error)
}

fn parser(
    vocabulary: &Vocabulary,
    grammar: TopLevelGrammar,
    config: &FormatsConfig,
) -> Result<TokenParser, FormatError> {
    let limits = ParserLimits {
        initial_lexer_fuel: config.compile_work_max,
        max_grammar_size: config.symbols_max,
        step_lexer_fuel: config.step_work_max,
        step_max_items: config.step_items_max,
        max_lexer_states: config.states_max,
        verbose_errors: false,
        ..ParserLimits::default()
    };
    let made = vocabulary.factory.create_parser_from_init_ext(
        GrammarInit::Serialized(grammar),
        Logger::new(0, 0),
        InferenceCapabilities::default(),
        limits,
    );
    made.map_err(|error| FormatError::Unusable(explained(&error.to_string())))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use serde_json::{Value, json};

    use super::super::tests::{bounds, formats, said_within, schema_of};
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_job_that_takes_too_long_is_left_alone_and_keeps_its_place_until_it_ends() {
        let places = Arc::new(Places::default());
        let (go, wait) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let soon = Duration::from_millis(20);
        let slow = places.run((1, soon), STACK_BYTES_MIN, move |abandoned| {
            _ = wait.recv();
            tell.send(abandoned.load(Relaxed)).unwrap();
            Ok(())
        });
        assert_eq!(slow, Err(FormatError::Slow { compile_ms_max: 20 }));
        let refused = places.run((1, soon), STACK_BYTES_MIN, |_| Ok(()));
        assert_eq!(refused, Err(FormatError::Busy));
        assert_eq!(
            places.run((2, LONG), STACK_BYTES_MIN, |_| Ok(2)),
            Ok(2),
            "another place"
        );
        go.send(()).unwrap();
        assert_eq!(told.recv(), Ok(true), "it knows that nobody waits");
        assert_eq!(
            places.run((1, LONG), STACK_BYTES_MIN, |_| Ok(1)),
            Ok(1),
            "it has ended"
        );
    }

    #[test]
    fn a_job_that_panics_gives_its_place_back() {
        let places = Arc::new(Places::default());
        let failed = places.run((1, LONG), STACK_BYTES_MIN, |_| -> Result<(), _> {
            panic!("on purpose")
        });
        assert!(matches!(failed, Err(FormatError::Unusable(_))));
        assert_eq!(places.run((1, LONG), STACK_BYTES_MIN, |_| Ok(1)), Ok(1));
    }

    #[test]
    fn a_schema_that_need_not_be_followed_to_the_letter_is_as_far_as_it_can_be() {
        let properties = json!({
            "a": { "type": "array", "items": { "type": "boolean" }, "uniqueItems": true, "minItems": 1, "maxItems": 2 },
            "b": { "type": "string", "format": "binary", "maxLength": 3 },
        });
        let schema = json!({ "type": "object", "properties": properties, "required": ["a", "b"], "additionalProperties": false });
        let format = schema_of(&schema);
        let limits = FormatsConfig::default();
        let compile = |follow| formats().compile((&format, follow), None, bounds(), &limits);
        let strict = compile(Follow::Strictly).err();
        assert!(
            matches!(strict, Some(FormatError::Unusable(_))),
            "{strict:?}"
        );
        let grammar = compile(Follow::Leniently).unwrap().expect("no free text");
        let (texts, _) = said_within(&grammar);
        assert!(!texts.is_empty());
        for text in texts {
            let said: Value = serde_json::from_str(&text).unwrap();
            let flags = said["a"].as_array().unwrap();
            assert!((1..=2).contains(&flags.len()) && flags.iter().all(Value::is_boolean));
            assert!(said["b"].as_str().unwrap().chars().count() <= 3, "{said}");
        }
    }

    /// As long a way through definitions as there is room for, each but a step into the next.
    #[test]
    fn a_schema_that_is_as_deep_as_it_is_long_ends_no_process() {
        let limits = FormatsConfig::default();
        for step in [
            r##"{"items":R}"##,
            r##"{"type":"array","items":R}"##,
            r##"{"properties":{"a":R}}"##,
            r##"{"additionalProperties":R}"##,
            r##"{"prefixItems":[R]}"##,
            r##"{"anyOf":[R]}"##,
            r##"{"oneOf":[R,{"type":"null"}]}"##,
            r##"{"allOf":[R]}"##,
            r##"{"items":{"items":{"items":{"items":{"items":{"items":R}}}}}}"##,
            "R",
        ] {
            let mut text = r##"{"$ref":"#/$defs/0","$defs":{"##.to_owned();
            let mut number = 0;
            while text.len() + step.len() + 80 < limits.bytes_max as usize {
                number += 1;
                let next = step.replace('R', &format!(r##"{{"$ref":"#/$defs/{number}"}}"##));
                let before = number - 1;
                let _ = write!(text, r#""{before}":{next},"#);
            }
            let _ = write!(text, r#""{number}":{{"type":"null"}}}}}}"#);
            let format = OutputFormat::JsonSchema(text);
            for follow in [Follow::Strictly, Follow::Leniently] {
                let compiled = formats().compile((&format, follow), None, bounds(), &limits);
                if let Err(error) = compiled {
                    assert!(
                        !matches!(error, FormatError::TooLarge { .. }),
                        "{step}: {error}"
                    );
                }
            }
        }
    }

    #[test]
    fn numbers_near_the_ends_of_64_bits_are_no_literals() {
        let limits = FormatsConfig::default();
        for schema in [
            json!({ "const": i64::MIN }),
            json!({ "enum": [1, [i64::MIN + 1]] }),
            json!({ "properties": { "a": { "const": { "b": u64::MAX } } } }),
        ] {
            let format = schema_of(&schema);
            let compiled = formats().compile((&format, Follow::Leniently), None, bounds(), &limits);
            let error = compiled.map(drop).expect_err("refused").to_string();
            assert!(error.contains("between -2^53 and 2^53"), "{error}");
        }
        let bounded = json!({ "type": "integer", "minimum": i64::MIN, "maximum": u64::MAX });
        let known = json!({ "enum": [(1_u64 << 53), -(1_i64 << 53)] });
        for schema in [bounded, known] {
            let format = schema_of(&schema);
            let compiled = formats().compile((&format, Follow::Leniently), None, bounds(), &limits);
            assert!(!matches!(compiled, Err(FormatError::Slow { .. })));
        }
    }
}
