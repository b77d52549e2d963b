//! Where loading stands, told from the engine's thread to whoever asks, and the wish to stop the other way.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use visor_model::{LoadProgress, LoadStage};

/// Shared by the house and the engine's thread.
#[derive(Debug, Default)]
pub(super) struct Load {
    stopping: AtomicBool,
    progress: Mutex<Option<LoadProgress>>,
}

impl Load {
    /// Notes how far it is; whether to go on.
    pub(super) fn note(&self, progress: LoadProgress) -> bool {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress);
        !self.stopping.load(Relaxed)
    }

    /// What takes minutes is given up at its next step.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Relaxed);
    }

    /// Why the model is not ready yet.
    pub(super) fn told(&self) -> String {
        let progress = *self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        match progress {
            Some(progress) if progress.stage != LoadStage::Loading => {
                let (stage, percent) = (progress.stage, progress.percent());
                format!("the model is still loading ({stage}, {percent} %)")
            }
            _ => "the model is still loading".to_owned(),
        }
    }
}
