//! Lines for a person on standard error, and a bar while something takes long.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use visor_model::LoadProgress;

/// Between two log lines when there is no terminal to draw on.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// One line on standard error. Nobody to read it is no reason to stop.
pub(super) fn line(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// How a loading model is shown: a bar on a terminal, else a log line now and then.
pub(super) struct Loading {
    command: Option<&'static str>,
    bar: Option<ProgressBar>,
    logged: Mutex<Instant>,
}

impl Loading {
    pub(super) fn new() -> Self {
        Self::shown("loading model", None)
    }

    /// The same for a command that goes through a model's bytes and has no log.
    pub(super) fn by_command(doing: &'static str) -> Self {
        Self::shown(doing, Some(doing))
    }

    fn shown(doing: &str, command: Option<&'static str>) -> Self {
        let template = format!("{doing} {{bar:40}} {{bytes}}/{{total_bytes}} {{eta}}");
        Self {
            command,
            bar: bar(0, &template),
            logged: Mutex::new(Instant::now()),
        }
    }

    /// Shows one step; the bar goes away with the last.
    pub(super) fn step(&self, progress: LoadProgress) {
        let LoadProgress {
            bytes_done,
            bytes_total,
        } = progress;
        if let Some(bar) = &self.bar {
            bar.set_length(bytes_total);
            bar.set_position(bytes_done);
            if bytes_done >= bytes_total {
                bar.finish_and_clear();
            }
            return;
        }
        let Ok(mut logged) = self.logged.lock() else {
            return;
        };
        if logged.elapsed() >= LOG_INTERVAL {
            *logged = Instant::now();
            let percent = bytes_done.saturating_mul(100) / bytes_total.max(1);
            match self.command {
                Some(doing) => line(&format!("{doing}: {percent} %")),
                None => tracing::info!(bytes_done, bytes_total, percent, "loading model"),
            }
        }
    }
}

/// How far a list of questions is: a bar on a terminal, else a line now and then.
pub(super) struct Counting {
    bar: Option<ProgressBar>,
    total: usize,
    said: Instant,
}

impl Counting {
    pub(super) fn new(total: usize) -> Self {
        Self {
            bar: bar(total as u64, "asking {bar:40} {pos}/{len} {eta}"),
            total,
            said: Instant::now(),
        }
    }

    /// Shows how many are done.
    pub(super) fn step(&mut self, done: usize) {
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
        } else if self.said.elapsed() >= LOG_INTERVAL {
            self.said = Instant::now();
            line(&format!("asked {done} of {}", self.total));
        }
    }

    /// Takes the bar away.
    pub(super) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A bar on standard error where that is a terminal.
fn bar(length: u64, template: &str) -> Option<ProgressBar> {
    let style = ProgressStyle::with_template(template).ok()?;
    let target = ProgressDrawTarget::stderr();
    std::io::stderr()
        .is_terminal()
        .then(|| ProgressBar::with_draw_target(Some(length), target).with_style(style))
}
