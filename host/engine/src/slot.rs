//! The place of the model: loads it on the first device that works, and moves to the CPU when an
//! accelerator breaks.

use std::sync::Arc;

use visor_model::{DeviceKind, ModelError, Prompt, Tokenizer};

use crate::guard::{Trouble, guarded};
use crate::model::{Model, ModelLoader};
use crate::sampler;
use crate::shared::{EngineState, Shared};

/// What the warm-up computes; any text will do.
const WARM_UP_TEXT: &str = "Hello";

pub(crate) struct ModelSlot<L: ModelLoader> {
    loader: L,
    devices: Vec<DeviceKind>,
    pub(crate) shared: Arc<Shared>,
}

impl<L: ModelLoader> ModelSlot<L> {
    pub(crate) fn new(loader: L, devices: Vec<DeviceKind>, shared: Arc<Shared>) -> Self {
        Self {
            loader,
            devices,
            shared,
        }
    }

    /// The model, loaded and warm, on the first device that works. The engine's state tells the
    /// outcome; `None` when no device does or the engine is stopping.
    pub(crate) fn load(&mut self, tokenizer: &Tokenizer) -> Option<L::Model> {
        let mut reasons = Vec::new();
        for (index, device) in self.devices.clone().into_iter().enumerate() {
            if self.shared.is_stopping() {
                self.shared.set_state(EngineState::Stopped);
                return None;
            }
            match self.load_on(device, tokenizer) {
                Ok(model) => return Some(model),
                Err(why) => {
                    let next = self.devices.get(index + 1);
                    tracing::warn!(%device, %why, next = ?next, "device cannot be used");
                    if next.is_some() {
                        self.shared.stats().device_fallbacks += 1;
                    }
                    reasons.push(format!("{device}: {why}"));
                }
            }
        }
        if reasons.is_empty() {
            reasons.push("no device is allowed".into());
        }
        self.fail(&reasons.join("; "));
        None
    }

    /// Whether the CPU can take over from a device.
    pub(crate) fn can_fall_back(&self, from: DeviceKind) -> bool {
        from != DeviceKind::Cpu && self.devices.contains(&DeviceKind::Cpu)
    }

    /// The model on the CPU, after the device of `old` broke in the middle of a request. `None`,
    /// and the engine has failed, when the CPU cannot be used either.
    pub(crate) fn fall_back(&mut self, old: L::Model, tokenizer: &Tokenizer) -> Option<L::Model> {
        let device = old.device();
        self.shared.stats().device_fallbacks += 1;
        tracing::warn!(%device, "device broke in the middle of a request; going on on the CPU");
        // First, so that two models need not fit at once. A broken driver may panic here as well.
        let freed = guarded(|| {
            drop(old);
            Ok(())
        });
        if let Err(trouble) = freed {
            tracing::warn!(%device, ?trouble, "cannot free the broken device's model");
        }
        match self.load_on(DeviceKind::Cpu, tokenizer) {
            Ok(model) => Some(model),
            Err(why) => {
                self.fail(&format!(
                    "{device} broke, and the CPU cannot be used: {why}"
                ));
                None
            }
        }
    }

    fn load_on(&mut self, device: DeviceKind, tokenizer: &Tokenizer) -> Result<L::Model, String> {
        let explain = |trouble: Trouble| chain(&*trouble.into_error());
        let model = guarded(|| self.loader.load(device)).map_err(explain)?;
        warm_up(&model, tokenizer).map_err(explain)?;
        tracing::info!(%device, "model ready");
        self.shared.set_state(EngineState::Ready { device });
        Ok(model)
    }

    fn fail(&self, why: &str) {
        tracing::error!(why, "no model");
        self.shared.set_state(EngineState::Failed(why.to_string()));
    }
}

/// A few positions, so that the first client does not pay for page faults and kernel builds, and
/// a device that starts but cannot compute is found out now.
fn warm_up<M: Model>(model: &M, tokenizer: &Tokenizer) -> Result<(), Trouble> {
    let ids: Vec<i64> = tokenizer
        .encode_text(WARM_UP_TEXT)
        .into_iter()
        .map(i64::from)
        .collect();
    let logits = guarded(|| {
        let prompt = Prompt {
            image_tokens: 0,
            ids,
        };
        let mut state = model.begin(&prompt, &[])?;
        model.advance(&mut state, prompt.ids.len())
    })?;
    let incomplete = || ModelError::Prompt("the warm-up prompt was not completed".into());
    let logits = logits.ok_or_else(incomplete)?;
    sampler::check(&logits).map_err(|error| Trouble::Broken(Box::new(error)))
}

/// An error and its causes, in one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let causes: Vec<String> = causes.map(ToString::to_string).collect();
    causes.join(": ")
}
