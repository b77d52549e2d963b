//! The plugin folder: watched, loaded in the background, swapped in as a whole.
//!
//! One thread looks, compiles and swaps, one file at a time. A file that does not load changes
//! nothing; why is kept in the status until the file changes. Neither does a folder that cannot be
//! read: only what is not found is gone.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::options::PluginSettings;
use crate::registry::{PluginSet, Registry};
use crate::sandbox::Sandbox;

#[cfg(test)]
pub(crate) mod heard;
pub(crate) mod keeper;
pub(crate) mod look;

use keeper::Keeper;
use look::SETTLE;

/// A plugin embedded in the binary.
#[derive(Clone, Copy, Debug)]
pub struct Shipped {
    /// Its id; a file `<id>.wasm` in the folder shadows it.
    pub id: &'static str,
    /// The component.
    pub bytes: &'static [u8],
}

/// Settings of a plugin id.
pub type SettingsFor = Arc<dyn Fn(&str) -> PluginSettings + Send + Sync>;

/// Builds and swaps the server's wiring for a new set. `Err` refuses the set: the old one stays
/// and the reason is kept.
pub type OnChange = Box<dyn Fn(&Arc<PluginSet>) -> Result<(), String> + Send + Sync>;

/// What to watch.
pub struct FolderOptions {
    /// The folder; it need not exist yet.
    pub folder: PathBuf,
    /// Time between two looks beside the system's events; zero trusts the events while there are any.
    pub poll: Duration,
    /// Plugins that are there without a file.
    pub shipped: Vec<Shipped>,
    /// Settings by id.
    pub settings: SettingsFor,
    /// Told of every new set before it becomes current.
    pub on_change: OnChange,
}

/// Why a file of the folder is not in use, or why nobody knows what is in the folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileError {
    /// The file, or the folder.
    pub path: PathBuf,
    /// Id it would have; the folder has none.
    pub id: String,
    /// What is wrong.
    pub message: String,
    /// Unix milliseconds.
    pub at_ms: u64,
}

/// State of the folder, for `/stats`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FolderStatus {
    /// The folder if it cannot be read, then files that are not in use, and why.
    pub last_errors: Vec<FileError>,
    /// Why the server refused the last set it was offered, if it did.
    pub refused: Option<String>,
    /// Sets swapped in, the first one included.
    pub reloads: u64,
    /// Files and sets that were not taken, and times that the folder became unreadable.
    pub failures: u64,
}

/// Why plugins could not be loaded at start, or again with other settings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReloadError {
    /// A shipped plugin does not load, which is a mistake in its settings.
    #[error("shipped plugin `{id}`: {message}")]
    Shipped {
        /// Its id.
        id: String,
        /// What is wrong.
        message: String,
    },
    /// A plugin in use does not take its new settings.
    #[error("plugin `{id}`: {message}")]
    Settings {
        /// Its id.
        id: String,
        /// What is wrong.
        message: String,
    },
    /// The server refused the set.
    #[error("{0}")]
    Refused(String),
    /// The watcher thread is not there.
    #[error("the plugin watcher does not run")]
    Stopped,
}

pub(crate) enum Command {
    /// Something happened in the folder.
    Look,
    /// Look until all is settled, or long enough, then answer.
    Scan(SyncSender<()>),
    /// Other settings.
    Apply(SettingsFor, SyncSender<Result<(), ReloadError>>),
    Stop,
}

/// The watcher. Dropping it ends its thread.
pub struct PluginFolder {
    commands: Sender<Command>,
    status: Arc<Mutex<FolderStatus>>,
    thread: Option<JoinHandle<()>>,
}

impl PluginFolder {
    /// Loads what is shipped and what lies in the folder, hands the first set to `on_change`, and
    /// goes on watching. Returns once the first set is current. When that set is refused, the
    /// shipped plugins alone are tried.
    ///
    /// # Errors
    /// When a shipped plugin fails or the first set is refused. A bad file is not an error: it is
    /// listed in the status.
    pub fn watch(
        sandbox: Sandbox,
        registry: Arc<Registry>,
        options: FolderOptions,
    ) -> Result<Self, ReloadError> {
        let (commands, inbox) = channel();
        let status = Arc::new(Mutex::new(FolderStatus::default()));
        let events = commands.clone();
        let mut keeper = Keeper::new(sandbox, registry, options, Arc::clone(&status));
        keeper.watch_with(events);
        keeper.start()?;
        let thread = thread::Builder::new()
            .name("plugin-folder".to_owned())
            .spawn(move || keep(keeper, &inbox))
            .map_err(|_| ReloadError::Stopped)?;
        Ok(Self {
            commands,
            status,
            thread: Some(thread),
        })
    }

    /// Gives all plugins new settings and swaps once all of them took theirs; else nothing
    /// changes. `on_change` is asked even if no plugin changes. Blocks until it is done.
    ///
    /// # Errors
    /// Which plugin or wiring refused.
    pub fn apply(&self, settings: SettingsFor) -> Result<(), ReloadError> {
        let (reply, answer) = sync_channel(1);
        let sent = self.commands.send(Command::Apply(settings, reply));
        sent.map_err(|_| ReloadError::Stopped)?;
        answer.recv().unwrap_or(Err(ReloadError::Stopped))
    }

    /// Looks at the folder now and returns when what it found is loaded or refused. A file that keeps changing is
    /// not waited for beyond a few seconds.
    pub fn scan(&self) {
        let (reply, answer) = sync_channel(1);
        if self.commands.send(Command::Scan(reply)).is_ok() {
            // Without an answer the thread has ended, and there is nothing to wait for.
            let _ = answer.recv();
        }
    }

    /// Files not in use, and counts.
    #[must_use]
    pub fn status(&self) -> FolderStatus {
        self.status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for PluginFolder {
    fn drop(&mut self) {
        let stopped = self.commands.send(Command::Stop);
        if let (Ok(()), Some(thread)) = (stopped, self.thread.take()) {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

fn keep(mut keeper: Keeper, inbox: &Receiver<Command>) {
    let mut is_settled = false;
    loop {
        let wait = if is_settled {
            keeper.poll()
        } else {
            Some(SETTLE)
        };
        let command = match wait {
            Some(wait) => inbox.recv_timeout(wait),
            None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match command {
            Ok(Command::Look) | Err(RecvTimeoutError::Timeout) => {}
            Ok(Command::Scan(reply)) => {
                keeper.settle();
                // Whoever asked may have gone.
                let _ = reply.send(());
            }
            Ok(Command::Apply(settings, reply)) => {
                let _ = reply.send(keeper.apply(settings));
            }
            Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => return,
        }
        is_settled = keeper.look();
    }
}
