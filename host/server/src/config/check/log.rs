//! Whether a log filter says what was meant: a misspelt level could be the name of a crate, and would silence everything else.

use std::str::FromStr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use super::Found;
use crate::config::report::near;

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

pub(super) fn check(filter: &str, found: &mut Found) {
    let mut mistaken = |message| {
        found.add(
            "server.log_filter",
            message,
            "off, error, warn, info, debug, trace, or directives such as info,visor_engine=debug",
        )
    };
    if let Err(error) = EnvFilter::try_new(filter) {
        mistaken(error.to_string());
        return;
    }
    for word in filter.split(',').filter(|word| is_strange(word)) {
        let meant = meant(word).map_or(String::new(), |level| format!("; did you mean `{level}`?"));
        mistaken(format!("`{word}` is no level{meant}"));
    }
}

/// Whether a word stands alone that is neither a level nor a target of ours: the filter takes it for that of some other crate.
fn is_strange(word: &str) -> bool {
    let is_directive = word.is_empty() || word.contains(['=', '[']);
    let is_target = word.starts_with("visor") || word.contains("::");
    !is_directive && !is_target && LevelFilter::from_str(word).is_err()
}

fn meant(word: &str) -> Option<&'static str> {
    let word = word.to_ascii_lowercase();
    let begun = LEVELS.into_iter().find(|level| word.starts_with(level));
    begun.or_else(|| near(&word, LEVELS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(filter: &str) -> Vec<String> {
        let mut found = Found::default();
        check(filter, &mut found);
        assert!(found.0.iter().all(|issue| issue.key == "server.log_filter"));
        found.0.into_iter().map(|issue| issue.message).collect()
    }

    #[test]
    fn levels_targets_and_directives_are_taken() {
        for good in [
            "info",
            "WARN",
            "Off",
            "3",
            "",
            "visor",
            "visor_engine",
            "visor::plugin",
            "hyper::proto",
            "info,visor_engine=debug",
            "warn,hyper=trace,",
            "[step]",
            "[step]=debug",
        ] {
            assert!(told(good).is_empty(), "{good}: {:?}", told(good));
        }
    }

    #[test]
    fn a_word_that_is_no_level_is_a_mistake_and_a_near_one_is_named() {
        for (wrong, message) in [
            ("inof", "`inof` is no level; did you mean `info`?"),
            ("warm", "`warm` is no level; did you mean `warn`?"),
            ("WARNING", "`WARNING` is no level; did you mean `warn`?"),
            (" info", "` info` is no level; did you mean `info`?"),
            (
                "visor_engine=debug,eror",
                "`eror` is no level; did you mean `error`?",
            ),
            ("wasmtime", "`wasmtime` is no level"),
        ] {
            assert_eq!(told(wrong), [message], "{wrong}");
        }
        assert_eq!(told("visor_engine=loud").len(), 1);
    }
}
