//! The place of the model: loads it on the first device that works, and moves to the CPU when an
//! accelerator breaks.

use std::sync::Arc;

use visor_model::{DeviceKind, ModelError, Prompt, Tokenizer};

use crate::error::chain;
use crate::guard::{Trouble, freed, guarded};
use crate::model::{KvFigures, Model, ModelLoader, Part};
use crate::sampler;
use crate::sequence::HEADROOM_BLOCKS;
use crate::shared::{EngineState, Shared};

/// What the warm-up computes; any text will do.
const WARM_UP_TEXT: &str = "Hello";

/// Memory for keys and values.
#[derive(Clone, Copy)]
pub(crate) struct KvLimit {
    /// Of all sequences and cached prefixes together.
    pub(crate) bytes: u64,
    /// Longest sequence: room for one is there whatever `bytes` says.
    pub(crate) context_tokens_max: u32,
}

impl KvLimit {
    fn blocks(self, kv: KvFigures) -> usize {
        let least = self.context_tokens_max as usize / kv.block_positions.max(1) + 1;
        let asked = self.bytes / kv.block_bytes.max(1);
        usize::try_from(asked)
            .unwrap_or(usize::MAX)
            .max(least + HEADROOM_BLOCKS)
    }
}

pub(crate) struct ModelSlot<L: ModelLoader> {
    loader: L,
    devices: Vec<DeviceKind>,
    kv_limit: KvLimit,
    pub(crate) shared: Arc<Shared>,
}

impl<L: ModelLoader> ModelSlot<L> {
    pub(crate) fn new(
        loader: L,
        devices: Vec<DeviceKind>,
        kv_limit: KvLimit,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            loader,
            devices,
            kv_limit,
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
        freed("the broken device's model", || drop(old));
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
        let kv = model.kv();
        let kv_blocks = self.kv_limit.blocks(kv);
        model.set_kv_blocks_max(kv_blocks);
        warm_up(&model, tokenizer).map_err(explain)?;
        let kv_tokens = kv_blocks.saturating_mul(kv.block_positions);
        let kv_mib = (kv_blocks as u64).saturating_mul(kv.block_bytes) >> 20;
        tracing::info!(%device, kv_tokens, kv_mib, "model ready");
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
        let part = Part {
            state: &mut state,
            positions_max: prompt.ids.len(),
            drafts: 0,
        };
        Ok(model.step(&mut [part], &|| true)?.pop().flatten())
    })?;
    let incomplete = || ModelError::Prompt("the warm-up prompt was not completed".into());
    let logits = logits.ok_or_else(incomplete)?;
    sampler::check(&logits).map_err(|error| Trouble::Broken(Box::new(error)))
}
