//! Ctrl-C and SIGTERM: the first asks for an end, the second makes one.

use tokio_util::sync::CancellationToken;

use super::{EXIT_STOPPED, Failure, progress};

/// Cancelled by the first Ctrl-C or SIGTERM; the second ends the process at once.
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
    signals.next().await;
    first();
    progress::line(&format!("{stopping}; once more stops at once"));
    signals.next().await;
    std::process::exit(i32::from(EXIT_STOPPED));
}

/// Ctrl-C and SIGTERM, as they come.
#[cfg(unix)]
pub(super) struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    pub(super) fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let interrupt = signal(SignalKind::interrupt())?;
        Ok(Self {
            interrupt,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(not(unix))]
pub(super) struct Signals;

#[cfg(not(unix))]
impl Signals {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        // Without a way to hear Ctrl-C the system's own handling ends the process.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
