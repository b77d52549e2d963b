//! Lines for a person on standard error, and a bar while something takes long.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing_appender::non_blocking::NonBlocking;
use visor_model::{LoadProgress, LoadStage};

/// Between two log lines when there is no terminal to draw on.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// Where lines go while a log is written on standard error, too.
static BESIDE: Mutex<Option<Beside>> = Mutex::new(None);

/// Where lines go beside a log.
#[derive(Clone)]
pub(super) enum Beside {
    /// Between its lines, by the thread that writes them.
    Between(NonBlocking),
    /// Into it: whoever reads it reads nothing else.
    Inside,
}

/// One line on standard error. Nobody to read it is no reason to stop.
pub(super) fn line(text: &str) {
    let beside = BESIDE.lock().ok().and_then(|beside| beside.clone());
    let written = format!("{text}\n");
    let _ = match beside {
        Some(Beside::Between(mut writer)) => writer.write_all(written.as_bytes()),
        Some(Beside::Inside) => {
            tracing::info!("{text}");
            Ok(())
        }
        None => std::io::stderr().lock().write_all(written.as_bytes()),
    };
}

/// From now on lines go beside a log; with none, to standard error.
pub(super) fn write_beside(log: Option<Beside>) {
    if let Ok(mut beside) = BESIDE.lock() {
        *beside = log;
    }
}

/// How a model's bytes on their way are shown: a bar on a terminal, else a line now and then.
pub(super) struct Loading {
    /// Lines are for a person, not for the log.
    command: bool,
    bar: Option<ProgressBar>,
    shown: Mutex<Shown>,
}

struct Shown {
    stage: Option<LoadStage>,
    logged: Instant,
}

impl Loading {
    pub(super) fn new() -> Self {
        Self::shown(false)
    }

    /// The same for a command that has no log.
    pub(super) fn by_command() -> Self {
        Self::shown(true)
    }

    fn shown(command: bool) -> Self {
        Self {
            command,
            bar: bar(0, "{bar:40}"),
            shown: Mutex::new(Shown {
                stage: None,
                logged: Instant::now(),
            }),
        }
    }

    /// Shows one step; the bar goes away with the last of a stage.
    pub(super) fn step(&self, progress: LoadProgress) {
        let Ok(mut shown) = self.shown.lock() else {
            return;
        };
        let stage = progress.stage;
        let new = shown.stage.replace(stage) != Some(stage);
        if let Some(bar) = &self.bar {
            let template = format!("{stage} {{bar:40}} {{bytes}}/{{total_bytes}} {{eta}}");
            if let Some(style) = ProgressStyle::with_template(&template).ok().filter(|_| new) {
                bar.reset();
                bar.set_style(style);
            }
            bar.set_length(progress.bytes_total);
            bar.set_position(progress.bytes_done);
            if progress.bytes_done >= progress.bytes_total {
                bar.finish_and_clear();
            }
            return;
        }
        // A model is loaded in an instant as a rule; what takes minutes is said when it begins.
        let begins = new && stage == LoadStage::Quantizing && !self.command;
        if begins || shown.logged.elapsed() >= LOG_INTERVAL {
            shown.logged = Instant::now();
            let (done, percent) = (progress.bytes_done, progress.percent());
            if self.command {
                line(&format!("{stage}: {percent} %"));
            } else {
                let total = progress.bytes_total;
                tracing::info!(bytes_done = done, bytes_total = total, percent, "{stage}");
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
