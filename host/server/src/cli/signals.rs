//! Ctrl-C, SIGTERM and SIGHUP: the first asks for an end, the second makes one.
//!
//! SIGHUP is what a terminal sends that is closed, and not a wish to read the configuration again: its file is watched. It comes
//! from the terminal and from the shell, so a second one is no impatience: only Ctrl-C and SIGTERM are.

use tokio_util::sync::CancellationToken;

use super::{EXIT_STOPPED, Failure, progress};

/// Cancelled by the first Ctrl-C, SIGTERM or SIGHUP; a second Ctrl-C or SIGTERM ends the process at once.
pub(super) fn stop_signal() -> Result<CancellationToken, Failure> {
    let stop = CancellationToken::new();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Failure::start)?;
    let signals = {
        let _entered = runtime.enter();
        Signals::new().map_err(Failure::start)?
    };
    let told = stop.clone();
    // Never joined: it waits for a signal as long as the process lives.
    let listen = move || {
        runtime.block_on(obey(signals, "stopping", move || told.cancel()));
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    thread.spawn(listen).map_err(Failure::start)?;
    Ok(stop)
}

/// Says what stops and does `first` at the first signal; the second ends the process.
pub(super) async fn obey(mut signals: Signals, stopping: &str, first: impl FnOnce()) {
    signals.first().await;
    first();
    progress::line(&format!("{stopping}; once more stops at once"));
    signals.insistent().await;
    std::process::exit(i32::from(EXIT_STOPPED));
}

/// The signals that ask for an end, as they come.
#[cfg(unix)]
pub(super) struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    /// None where whoever started this process wants it to outlive the terminal, as `nohup` does.
    hangup: Option<tokio::signal::unix::Signal>,
}

#[cfg(unix)]
impl Signals {
    pub(super) fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let hangup = match std::fs::read_to_string("/proc/self/status") {
            Ok(status) if !ignores_hangup(&status) => Some(signal(SignalKind::hangup())?),
            // Where the system does not tell, its own handling stays: to listen would end what `nohup` started.
            _ => None,
        };
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup,
        })
    }

    async fn first(&mut self) {
        let Some(mut hangup) = self.hangup.take() else {
            return self.insistent().await;
        };
        tokio::select! {
            () = self.insistent() => {}
            _ = hangup.recv() => {}
        }
        // A listener that is gone leaves the signal without effect, which is what a second one is to have.
    }

    async fn insistent(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Whether this process was started with SIGHUP ignored: the lowest bit of `SigIgn` in `/proc/self/status`, which is hexadecimal.
#[cfg(unix)]
fn ignores_hangup(status: &str) -> bool {
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & 1 == 1)
}

#[cfg(not(unix))]
pub(super) struct Signals;

#[cfg(not(unix))]
impl Signals {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn first(&mut self) {
        // Without a way to hear Ctrl-C the system's own handling ends the process.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    async fn insistent(&mut self) {
        self.first().await;
    }
}
