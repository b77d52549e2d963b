//! The engine's handle: checks a request, counts it in, and hands it to the thread.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use visor_model::{DeviceKind, Prompt, Tokenizer};

use crate::caches::Caches;
use crate::error::EngineError;
use crate::features::FeatureStore;
use crate::job::Job;
use crate::model::ModelLoader;
use crate::prefix_cache::{PrefixBlock, PrefixStore};
use crate::request::{EventReceiver, GenerateRequest};
use crate::scheduler::{Block, Features, Scheduler, Slices, Stores, Wake};
use crate::shared::{EngineState, Shared};
use crate::slot::{KvLimit, ModelSlot};
use crate::stats::EngineStats;

/// How long [`Engine::stop`] waits beyond the drain for the step under way.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// The engine's limits, all of them the operator's.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Devices in order of preference. When one breaks in the middle of a request, the CPU takes
    /// over if it is among them.
    pub devices: Vec<DeviceKind>,
    /// Requests that may wait while others run.
    pub queue_requests_max: usize,
    /// Prompt positions that may wait, all together; one request may wait whatever its length.
    pub queue_tokens_max: u64,
    /// Longest prompt and answer together, tokens.
    pub context_tokens_max: u32,
    /// Sequences that run at once.
    pub sequences_max: usize,
    /// Memory for the keys and values of running sequences and cached prefixes, bytes. One sequence of `context_tokens_max` fits
    /// whatever this says.
    pub kv_bytes: u64,
    /// Prompt positions of a step beside which no sequence decodes.
    pub prefill_chunk_tokens: usize,
    /// What pictures and prompts may add to the time between two tokens of sequences that decode.
    pub slice: Duration,
    /// Tokens that a step may check beside those that come, of all its sequences together; 0 for none. See
    /// [`crate::EngineStats::accepted_tokens`].
    pub draft_tokens_max: usize,
    /// Stop strings of one request.
    pub stop_strings_max: usize,
    /// Digest of the checkpoint: part of every feature's key.
    pub model_digest: String,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            devices: vec![DeviceKind::Cpu],
            queue_requests_max: 64,
            queue_tokens_max: 1 << 18,
            context_tokens_max: 4096,
            sequences_max: 8,
            kv_bytes: 2 << 30,
            prefill_chunk_tokens: 128,
            slice: Duration::from_millis(500),
            draft_tokens_max: 7,
            stop_strings_max: 80,
            model_digest: String::new(),
        }
    }
}

/// A handle to the engine thread: cheap to clone, usable from any thread. When the last one is
/// gone, the thread finishes what it has and ends.
#[derive(Clone)]
pub struct Engine {
    wakes: Sender<Wake>,
    shared: Arc<Shared>,
    limits: Arc<Limits>,
}

struct Limits {
    queue_requests_max: usize,
    queue_tokens_max: u64,
    sequences_max: usize,
    context_tokens_max: u32,
    stop_strings_max: usize,
}

impl Engine {
    /// Starts the thread, which loads the model; returns at once.
    pub fn start<L: ModelLoader, R>(
        loader: L,
        tokenizer: Arc<Tokenizer>,
        caches: &Caches<Features<L>, PrefixBlock<Block<L>>, R>,
        options: EngineOptions,
    ) -> Self {
        let shared = Arc::new(Shared::new());
        let limits = Limits {
            queue_requests_max: options.queue_requests_max,
            queue_tokens_max: options.queue_tokens_max,
            sequences_max: options.sequences_max.max(1),
            context_tokens_max: options.context_tokens_max,
            stop_strings_max: options.stop_strings_max,
        };
        let (wakes, inbox) = channel();
        let kv_limit = KvLimit {
            bytes: options.kv_bytes,
            context_tokens_max: options.context_tokens_max,
        };
        let digest = &options.model_digest;
        let stores = Stores {
            features: FeatureStore::new(Arc::clone(&caches.features), digest),
            prefixes: PrefixStore::new(Arc::clone(&caches.prefixes), digest),
        };
        let slices = Slices {
            sequences_max: limits.sequences_max,
            chunk_tokens: options.prefill_chunk_tokens.max(1),
            slice: options.slice,
            draft_tokens_max: options.draft_tokens_max,
        };
        let slot = ModelSlot::new(loader, options.devices, kv_limit, Arc::clone(&shared));
        let scheduler = Scheduler::new(slot, stores, tokenizer, inbox, slices);
        let thread = std::thread::Builder::new().name("engine".into());
        if let Err(error) = thread.spawn(move || scheduler.run()) {
            shared.set_state(EngineState::Failed(format!(
                "the engine thread does not start: {error}"
            )));
        }
        Self {
            wakes,
            shared,
            limits: Arc::new(limits),
        }
    }

    /// Whether it can serve.
    pub fn state(&self) -> EngineState {
        self.shared.state()
    }

    /// Waits until loading has ended one way or the other, at most `timeout`; the state then.
    pub fn wait_ready(&self, timeout: Duration) -> EngineState {
        let loading = |state: &EngineState| *state == EngineState::Loading;
        self.shared.wait_while(timeout, loading)
    }

    /// Takes a request in, or refuses it at once.
    ///
    /// # Errors
    /// [`EngineError`] `Invalid` and `PromptTooLong` for the request's own faults, `QueueFull`,
    /// `NotReady`, `NoModel` and `Stopped` for the engine's state.
    pub fn submit(&self, request: GenerateRequest) -> Result<EventReceiver, EngineError> {
        self.limits.check(&request)?;
        let prompt_tokens = request.prompt.ids.len();
        let (job, events) = Job::new(request, self.limits.context_tokens_max);
        if let Some(refusal) = self.shared.refusal() {
            return Err(refusal);
        }
        self.count_in(prompt_tokens)?;
        if self.wakes.send(Wake::Submit(Box::new(job))).is_err() {
            return Err(EngineError::Stopped);
        }
        Ok(events)
    }

    fn count_in(&self, prompt_tokens: usize) -> Result<(), EngineError> {
        let Limits {
            queue_requests_max,
            queue_tokens_max,
            ..
        } = *self.limits;
        let mut stats = self.shared.stats();
        let present = stats.waiting + stats.running;
        if present >= queue_requests_max.saturating_add(self.limits.sequences_max) as u64 {
            stats.rejected += 1;
            return Err(EngineError::QueueFull { queue_requests_max });
        }
        let tokens = stats.waiting_tokens + prompt_tokens as u64;
        if stats.waiting > 0 && tokens > queue_tokens_max {
            stats.rejected += 1;
            return Err(EngineError::QueueTokensFull { queue_tokens_max });
        }
        stats.submitted += 1;
        stats.wait(prompt_tokens);
        Ok(())
    }

    /// Figures of this moment.
    pub fn stats(&self) -> EngineStats {
        *self.shared.stats()
    }

    /// Refuses new requests, gives those in flight `drain` to finish, cancels the rest, and waits
    /// for the thread's end, a few seconds beyond the drain at most. Called again with a shorter
    /// time, it brings the end forward.
    pub fn stop(&self, drain: Duration) {
        let far = Duration::from_secs(u64::from(u32::MAX));
        self.shared.stop_at(Instant::now() + drain.min(far));
        // A thread that is gone needs no waking.
        let _gone = self.wakes.send(Wake::Stop);
        let running =
            |state: &EngineState| matches!(state, EngineState::Loading | EngineState::Ready { .. });
        self.shared
            .wait_while(drain.saturating_add(STOP_GRACE), running);
    }
}

impl Limits {
    /// What can be seen to be wrong without the model.
    fn check(&self, request: &GenerateRequest) -> Result<(), EngineError> {
        let prompt_tokens = u32::try_from(request.prompt.ids.len()).unwrap_or(u32::MAX);
        if prompt_tokens >= self.context_tokens_max {
            return Err(EngineError::PromptTooLong {
                prompt_tokens,
                context_tokens_max: self.context_tokens_max,
            });
        }
        let checks = [
            (prompt_tokens == 0).then(|| "the prompt is empty".to_string()),
            request.sampling.fault(),
            bad_slots(request),
            (request.stop_strings.len() > self.stop_strings_max)
                .then(|| format!("more than {} stop strings", self.stop_strings_max)),
        ];
        match checks.into_iter().flatten().next() {
            Some(message) => Err(EngineError::Invalid(message)),
            None => Ok(()),
        }
    }
}

/// Every picture has exactly the slots it needs, and every slot a picture.
fn bad_slots(request: &GenerateRequest) -> Option<String> {
    let Prompt { ids, image_tokens } = &request.prompt;
    let mut slots = vec![0_u32; request.images.len()];
    for id in ids.iter().filter(|id| **id < 0) {
        let index = usize::try_from(-(id + 1)).unwrap_or(usize::MAX);
        match slots.get_mut(index) {
            Some(count) => *count += 1,
            None => return Some(format!("a slot of picture {index}, of {}", slots.len())),
        }
    }
    let total: u32 = slots.iter().sum();
    if total != *image_tokens {
        return Some(format!("{total} image slots, {image_tokens} announced"));
    }
    for (index, (slots, pixels)) in slots.iter().zip(&request.images).enumerate() {
        let tokens = pixels.image_tokens();
        if *slots != tokens {
            return Some(format!(
                "picture {index} has {slots} slots and {tokens} image tokens"
            ));
        }
    }
    None
}
