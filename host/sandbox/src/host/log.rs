//! Import `log`: lines of plugins, under a rate and a length limit, with who wrote them.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::bindings::adapter::visor::plugin::log::{Host, Level};
use crate::chat::{self, Extensions, cut};
use crate::faults::LogStats;
use crate::guest::GuestState;

const WINDOW: Duration = Duration::from_secs(1);

/// The log lines of one plugin id, all its instances together.
#[derive(Default)]
pub(crate) struct LogGate {
    window: Mutex<Option<(Instant, u32)>>,
    lines: AtomicU64,
    dropped: AtomicU64,
    cut: AtomicU64,
}

impl LogGate {
    /// Whether one more line may be written at `now`.
    fn admit(&self, lines_per_s: u32, now: Instant) -> bool {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, used) = match *window {
            Some((start, used)) if now.duration_since(start) < WINDOW => (start, used),
            _ => (now, 0),
        };
        let admitted = used < lines_per_s;
        *window = Some((start, used.saturating_add(1)));
        let counter = if admitted { &self.lines } else { &self.dropped };
        counter.fetch_add(1, Ordering::Relaxed);
        admitted
    }

    pub(crate) fn stats(&self) -> LogStats {
        LogStats {
            lines: self.lines.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            cut: self.cut.load(Ordering::Relaxed),
        }
    }
}

impl Host for GuestState {
    fn enabled(&mut self, level: Level) -> wasmtime::Result<bool> {
        self.on_time()?;
        Ok(match level {
            Level::Trace => tracing::enabled!(target: "visor::plugin", tracing::Level::TRACE),
            Level::Debug => tracing::enabled!(target: "visor::plugin", tracing::Level::DEBUG),
            Level::Info => tracing::enabled!(target: "visor::plugin", tracing::Level::INFO),
            Level::Warn => tracing::enabled!(target: "visor::plugin", tracing::Level::WARN),
            Level::Error => tracing::enabled!(target: "visor::plugin", tracing::Level::ERROR),
        })
    }

    fn emit(&mut self, level: Level, message: String, fields: Extensions) -> wasmtime::Result<()> {
        self.on_time()?;
        let gate = &self.core.kept.log;
        if !gate.admit(self.limits.log_lines_per_s, Instant::now()) {
            return Ok(());
        }
        let bytes_max = self.limits.log_line_bytes_max;
        let (line, was_cut) = one_line(&message, &fields, bytes_max);
        if was_cut {
            gate.cut.fetch_add(1, Ordering::Relaxed);
        }
        match level {
            Level::Trace => self.write(tracing::Level::TRACE, &line),
            Level::Debug => self.write(tracing::Level::DEBUG, &line),
            Level::Info => self.write(tracing::Level::INFO, &line),
            Level::Warn => self.write(tracing::Level::WARN, &line),
            Level::Error => self.write(tracing::Level::ERROR, &line),
        }
        Ok(())
    }
}

impl GuestState {
    fn write(&self, level: tracing::Level, line: &str) {
        // The level of an event is part of its call site, hence one site per level.
        macro_rules! event {
            ($level:ident) => {
                tracing::event!(
                    target: "visor::plugin",
                    tracing::Level::$level,
                    plugin = %self.core.id,
                    revision = %self.core.revision_short(),
                    role = %self.role,
                    request = %self.request_id,
                    "{line}"
                )
            };
        }
        match level {
            tracing::Level::TRACE => event!(TRACE),
            tracing::Level::DEBUG => event!(DEBUG),
            tracing::Level::INFO => event!(INFO),
            tracing::Level::WARN => event!(WARN),
            _ => event!(ERROR),
        }
    }
}

/// Message and fields as one line: control characters become spaces, so that a plugin cannot
/// forge lines of others, and the length is bounded.
fn one_line(message: &str, fields: &Extensions, bytes_max: usize) -> (String, bool) {
    let mut line = String::with_capacity(message.len().min(bytes_max));
    let mut was_cut = push_clean(&mut line, message, bytes_max);
    for (key, value) in fields {
        if was_cut {
            break;
        }
        let mut field = String::new();
        // Writing into a string cannot fail.
        let _ = write!(field, " {}={}", cut(key, bytes_max), cut(value, bytes_max));
        was_cut = push_clean(&mut line, &field, bytes_max);
    }
    (line, was_cut)
}

fn push_clean(line: &mut String, text: &str, bytes_max: usize) -> bool {
    let room = bytes_max.saturating_sub(line.len());
    let kept = cut(text, room);
    line.push_str(&chat::one_line(kept, room));
    kept.len() < text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_over_the_rate_are_dropped_and_counted() {
        let gate = LogGate::default();
        let start = Instant::now();
        let admitted = (0..10).filter(|_| gate.admit(3, start)).count();
        assert_eq!(admitted, 3);
        assert!(gate.admit(3, start + WINDOW));
        assert_eq!(
            gate.stats(),
            LogStats {
                lines: 4,
                dropped: 7,
                cut: 0
            }
        );
    }

    #[test]
    fn a_line_cannot_forge_another_and_has_a_length_limit() {
        let fields = vec![("key".to_owned(), "a\nb".to_owned())];
        assert_eq!(
            one_line("x\r\ny", &fields, 100),
            ("x  y key=a b".to_owned(), false)
        );
        assert_eq!(one_line("äääää", &fields, 7), ("äää".to_owned(), true));
    }
}
