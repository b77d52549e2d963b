//! A model that says what it is told to, writes down what it is asked, and breaks on demand.

use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use visor_engine::{
    Access, CacheBytes, Caches, Engine, EngineOptions, EngineState, GenerateRequest, KvFigures,
    Model, ModelLoader, Part, PrefixBlock,
};
use visor_model::image::PixelValues;
use visor_model::{DeviceKind, ModelError, Prompt, Tokenizer};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const VOCAB: usize = 32064;
/// A token that every test request stops at, `<|end|>`.
pub(crate) const END: u32 = 32007;

/// One thing the model was asked, outside the warm-up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Call {
    Load,
    WarmUp,
    /// One crop of a picture.
    Crop {
        picture: u8,
        crop: u32,
    },
    Begin {
        positions: usize,
    },
    Push(u32),
    /// `from` positions were computed before.
    Advance {
        from: usize,
        positions: usize,
    },
}

/// How the model takes a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reply {
    Go,
    Fail,
    /// No KV block is left.
    Full,
    Panic,
    /// Logits that are not numbers.
    Nan,
}

type Hook = dyn Fn(DeviceKind, &Call) -> Reply + Send + Sync;

/// What the model says.
#[derive(Clone)]
pub(crate) enum Answer {
    /// These tokens, then `END` for ever.
    Tokens(Vec<u32>),
    /// A distribution over so many tokens that depends on every id so far.
    Hashed(u32),
    /// One that depends on the last two, mostly over so many: what is said comes again.
    Repeating(u32),
}

#[derive(Clone)]
pub(crate) struct Script {
    pub(crate) answer: Answer,
    pub(crate) calls: Arc<Mutex<Vec<(DeviceKind, Call)>>>,
    pub(crate) hook: Arc<Hook>,
    pub(crate) loads: Arc<AtomicU64>,
    /// Blocks alive.
    pub(crate) blocks_used: Arc<AtomicUsize>,
    /// How often spare memory was returned.
    pub(crate) returns: Arc<AtomicUsize>,
    /// Most sequences in a step.
    pub(crate) widest: Arc<AtomicUsize>,
    pub(crate) short_positions_max: usize,
    /// Most drafts that are taken at once.
    pub(crate) drafts_max: usize,
}

impl Script {
    pub(crate) fn new(answer: Answer) -> Self {
        Self {
            answer,
            calls: Arc::default(),
            hook: Arc::new(|_, _| Reply::Go),
            loads: Arc::default(),
            blocks_used: Arc::default(),
            returns: Arc::default(),
            widest: Arc::default(),
            short_positions_max: usize::MAX,
            drafts_max: usize::MAX,
        }
    }

    pub(crate) fn saying(text: &str) -> Self {
        Self::new(Answer::Tokens(tokenizer().encode_text(text)))
    }

    pub(crate) fn on(
        mut self,
        hook: impl Fn(DeviceKind, &Call) -> Reply + Send + Sync + 'static,
    ) -> Self {
        self.hook = Arc::new(hook);
        self
    }

    /// A model that waits where somebody has `position` positions behind it, until what is returned is dropped: whatever is
    /// submitted before that runs together, however busy the machine.
    pub(crate) fn held_at(self, position: usize) -> (Self, Sender<()>) {
        let (hold, wait) = channel();
        let wait = Mutex::new(wait);
        let hook = Arc::clone(&self.hook);
        let script = self.on(move |device, call| {
            if matches!(call, Call::Advance { from, .. } if *from >= position) {
                // Nothing is ever sent.
                let _ = wait.lock().unwrap().recv();
            }
            hook(device, call)
        });
        (script, hold)
    }

    fn call(&self, device: DeviceKind, call: Call) -> Result<Reply, ModelError> {
        self.calls.lock().unwrap().push((device, call.clone()));
        match (self.hook)(device, &call) {
            Reply::Fail => Err(ModelError::Forward(candle_core::Error::Msg(
                "scripted".into(),
            ))),
            Reply::Full => Err(ModelError::KvFull { blocks_max: 0 }),
            Reply::Panic => panic!("scripted panic at {call:?}"),
            reply => Ok(reply),
        }
    }

    pub(crate) fn crops_encoded(&self) -> usize {
        let calls = self.calls.lock().unwrap();
        calls
            .iter()
            .filter(|(_, call)| matches!(call, Call::Crop { .. }))
            .count()
    }

    fn logits(&self, ids: &[i64], pushed: usize) -> Vec<f32> {
        match &self.answer {
            Answer::Tokens(tokens) => {
                let mut logits = vec![0.0; VOCAB];
                let token = tokens.get(pushed).copied().unwrap_or(END);
                logits[token as usize] = 10.0;
                logits
            }
            Answer::Hashed(count) => {
                let logit = |id: u32| hash((ids, id)) / 200.0;
                (0..*count).map(logit).collect()
            }
            Answer::Repeating(count) => {
                let last = ids.last_chunk::<2>();
                let likely = |id: u32| hash((last, id)) / 100.0;
                let logit = |id: u32| if id < *count { likely(id) } else { -9.0 };
                (0..=100).map(logit).collect()
            }
        }
    }
}

/// 0 to 999.
fn hash(what: impl Hash) -> f32 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    (hasher.finish() % 1000) as f32
}

pub(crate) struct ScriptedModel {
    script: Script,
    device: DeviceKind,
    blocks_used: Arc<AtomicUsize>,
    blocks_max: AtomicUsize,
}

pub(crate) struct State {
    ids: Vec<i64>,
    image_tokens: Vec<u32>,
    pictures: Vec<Option<u8>>,
    done: usize,
    pushed: usize,
    is_warm_up: bool,
    blocks: Vec<Arc<Block>>,
}

/// Positions of a block.
pub(crate) const BLOCK: usize = 4;

/// What ran at its positions, on which device.
pub(crate) struct Block {
    ids: Vec<i64>,
    device: DeviceKind,
    used: Arc<AtomicUsize>,
}

impl Drop for Block {
    fn drop(&mut self) {
        self.used.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Which picture it is of, and where it lives.
pub(crate) struct ScriptedFeatures {
    picture: u8,
    device: DeviceKind,
}

impl ScriptedModel {
    fn block(&self, ids: &[i64]) -> Result<Arc<Block>, ModelError> {
        let blocks_max = self.blocks_max.load(Ordering::Relaxed);
        if self.blocks_used.load(Ordering::Relaxed) >= blocks_max {
            return Err(ModelError::KvFull { blocks_max });
        }
        self.blocks_used.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Block {
            ids: ids.to_vec(),
            device: self.device,
            used: Arc::clone(&self.blocks_used),
        }))
    }

    /// A position as it is computed: features become part of the ids, so that wrong ones change the answer.
    fn embed(&self, state: &State, position: usize) -> i64 {
        let id = state.ids[position];
        match usize::try_from(-(id + 1)) {
            Ok(index) => -1000 - i64::from(state.pictures[index].expect("the picture is there")),
            Err(_) => id,
        }
    }

    fn run(&self, part: &mut Part<'_, State>) -> Result<Option<Vec<f32>>, ModelError> {
        let Part {
            state,
            positions_max,
            drafts,
        } = part;
        let (from, pending) = (state.done, state.ids.len() - state.done);
        assert!(pending > 0, "nothing is pending");
        let positions = pending.min(*positions_max);
        let mut reply = Reply::Go;
        if !state.is_warm_up {
            reply = self
                .script
                .call(self.device, Call::Advance { from, positions })?;
        }
        self.reserve(state, from + positions)?;
        for position in from..from + positions {
            let id = self.embed(state, position);
            let block = Arc::get_mut(&mut state.blocks[position / BLOCK]);
            let block = block.expect("a block that is written is nobody else's");
            block.ids.truncate(position % BLOCK);
            block.ids.push(id);
        }
        state.done += positions;
        if state.done < state.ids.len() {
            return Ok(None);
        }
        // From what the blocks hold: a wrong one changes the answer.
        let seen: Vec<i64> = state.blocks.iter().flat_map(|b| b.ids.clone()).collect();
        assert_eq!(seen.len(), state.ids.len());
        let behind = |draft: usize| {
            let seen = &seen[..seen.len() - draft];
            self.script.logits(seen, state.pushed - draft)
        };
        let mut logits: Vec<f32> = (0..=*drafts).rev().flat_map(behind).collect();
        if reply == Reply::Nan {
            logits[3] = f32::NAN;
        }
        Ok(Some(logits))
    }
}

impl Model for ScriptedModel {
    type State = State;
    type Features = ScriptedFeatures;
    /// Crops done.
    type Pass = u32;
    type Block = Block;

    fn device(&self) -> DeviceKind {
        self.device
    }

    fn advance_image(
        &self,
        pass: &mut u32,
        pixels: &PixelValues,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Option<ScriptedFeatures>, ModelError> {
        let picture = pixels.key[0];
        while *pass < pixels.crop_count {
            let crop = *pass;
            self.script
                .call(self.device, Call::Crop { picture, crop })?;
            *pass += 1;
            if *pass < pixels.crop_count && !keep_going() {
                return Ok(None);
            }
        }
        let device = self.device;
        Ok(Some(ScriptedFeatures { picture, device }))
    }

    fn features_bytes(_: &ScriptedFeatures) -> u64 {
        1000
    }

    fn begin(&self, prompt: &Prompt, image_tokens: &[u32]) -> Result<State, ModelError> {
        // Test prompts begin with BOS, the warm-up does not.
        let is_warm_up = prompt.ids[0] != 1;
        let positions = prompt.ids.len();
        let call = if is_warm_up {
            Call::WarmUp
        } else {
            Call::Begin { positions }
        };
        self.script.call(self.device, call)?;
        Ok(State {
            ids: prompt.ids.clone(),
            image_tokens: image_tokens.to_vec(),
            pictures: vec![None; image_tokens.len()],
            done: 0,
            pushed: 0,
            is_warm_up,
            blocks: Vec::new(),
        })
    }

    fn set_features(
        &self,
        state: &mut State,
        index: usize,
        features: Arc<ScriptedFeatures>,
    ) -> Result<(), ModelError> {
        assert_eq!(features.device, self.device, "features of another device");
        assert!(state.image_tokens[index] > 0);
        state.pictures[index] = Some(features.picture);
        Ok(())
    }

    fn push(&self, state: &mut State, token: u32) -> Result<(), ModelError> {
        self.script.call(self.device, Call::Push(token))?;
        state.ids.push(i64::from(token));
        state.pushed += 1;
        let len = state.ids.len();
        if self.is_long(len) != self.is_long(len - 1) {
            state.done = 0;
            state.blocks.clear();
        }
        Ok(())
    }

    fn push_drafts(&self, state: &mut State, tokens: &[u32]) -> usize {
        let long = self.is_long(state.ids.len());
        for (index, token) in tokens.iter().enumerate() {
            let len = state.ids.len() + 1;
            if index == self.script.drafts_max
                || self.is_long(len) != long
                || self.reserve(state, len).is_err()
            {
                return index;
            }
            state.ids.push(i64::from(*token));
            state.pushed += 1;
        }
        tokens.len()
    }

    fn drop_drafts(&self, state: &mut State, count: usize) {
        state.ids.truncate(state.ids.len() - count);
        state.pushed -= count;
        state.done = state.done.min(state.ids.len());
        for (index, block) in state.blocks.iter_mut().enumerate() {
            let held = state.done.saturating_sub(index * BLOCK);
            if held < BLOCK
                && let Some(block) = Arc::get_mut(block)
            {
                block.ids.truncate(held);
            }
        }
    }

    fn pending(state: &State) -> usize {
        state.ids.len() - state.done
    }

    fn kv(&self) -> KvFigures {
        KvFigures {
            block_positions: BLOCK,
            block_bytes: 1000,
            blocks_used: self.blocks_used.load(Ordering::Relaxed),
            blocks_max: self.blocks_max.load(Ordering::Relaxed),
        }
    }

    fn set_kv_blocks_max(&self, blocks_max: usize) {
        self.blocks_max.store(blocks_max, Ordering::Relaxed);
    }

    fn return_spare_memory(&self) {
        self.script.returns.fetch_add(1, Ordering::Relaxed);
    }

    fn reserve(&self, state: &mut State, positions: usize) -> Result<(), ModelError> {
        let (tail, rest) = (state.done / BLOCK, state.done % BLOCK);
        if let Some(block) = state.blocks.get_mut(tail)
            && Arc::get_mut(block).is_none()
        {
            *block = self.block(&block.ids[..rest])?;
        }
        while state.blocks.len() * BLOCK < positions {
            state.blocks.push(self.block(&[])?);
        }
        Ok(())
    }

    fn share(state: &State) -> &[Arc<Block>] {
        &state.blocks[..state.done.div_ceil(BLOCK)]
    }

    fn adopt(
        &self,
        state: &mut State,
        blocks: &[Arc<Block>],
        positions: usize,
    ) -> Result<(), ModelError> {
        assert!(positions < state.ids.len(), "one position is left to run");
        state.blocks.clear();
        state.done = 0;
        let (whole, rest) = (positions / BLOCK, positions % BLOCK);
        for block in blocks {
            assert_eq!(block.device, self.device, "blocks of another device");
        }
        let seen = blocks.iter().flat_map(|block| block.ids.clone());
        for (seen, id) in seen.take(positions).zip(&state.ids) {
            assert!(
                seen == *id || (seen <= -1000 && *id < 0),
                "blocks of {seen} for {id}"
            );
        }
        let mut adopted = blocks[..whole].to_vec();
        if rest > 0 {
            adopted.push(self.block(&blocks[whole].ids[..rest])?);
        }
        (state.blocks, state.done) = (adopted, positions);
        Ok(())
    }

    fn is_long(&self, positions: usize) -> bool {
        positions > self.script.short_positions_max
    }

    fn step(
        &self,
        parts: &mut [Part<'_, State>],
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Option<Vec<f32>>>, ModelError> {
        if !keep_going() {
            return Err(ModelError::Cancelled);
        }
        self.script.widest.fetch_max(parts.len(), Ordering::Relaxed);
        let run = |part: &mut Part<'_, State>| self.run(part);
        parts.iter_mut().map(run).collect()
    }
}

pub(crate) struct ScriptedLoader(pub(crate) Script);

impl ModelLoader for ScriptedLoader {
    type Model = ScriptedModel;

    fn load(&mut self, device: DeviceKind) -> Result<ScriptedModel, ModelError> {
        self.0.loads.fetch_add(1, Ordering::Relaxed);
        self.0.call(device, Call::Load)?;
        let script = self.0.clone();
        Ok(ScriptedModel {
            blocks_used: Arc::clone(&script.blocks_used),
            blocks_max: AtomicUsize::new(usize::MAX),
            script,
            device,
        })
    }
}

pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    let load = || {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../model/phi3/tokenizer.json");
        Arc::new(Tokenizer::from_file(path.as_ref()).unwrap())
    };
    Arc::clone(TOKENIZER.get_or_init(load))
}

pub(crate) fn caches() -> Caches<ScriptedFeatures, PrefixBlock<Block>> {
    let megabyte = 1 << 20;
    Caches::new(CacheBytes {
        pixels: megabyte,
        features: megabyte,
        responses: megabyte,
        prefixes: megabyte,
    })
}

/// Two positions a chunk, so that every prompt takes several; one sequence at a time.
pub(crate) fn options() -> EngineOptions {
    EngineOptions {
        context_tokens_max: 400,
        prefill_chunk_tokens: 2,
        queue_requests_max: 4,
        sequences_max: 1,
        slice: PATIENCE,
        // What is counted here are steps of one token.
        draft_tokens_max: 0,
        ..EngineOptions::default()
    }
}

/// An engine that is still loading.
pub(crate) fn start_with(script: &Script, options: EngineOptions) -> Engine {
    let loader = ScriptedLoader(script.clone());
    Engine::start(loader, tokenizer(), &caches(), options)
}

/// An engine that is ready.
pub(crate) fn start(script: &Script) -> Engine {
    let engine = start_with(script, options());
    let state = engine.wait_ready(PATIENCE);
    assert!(matches!(state, EngineState::Ready { .. }), "{state:?}");
    engine
}

/// Five positions: three chunks.
pub(crate) fn request(tokens_max: u32) -> GenerateRequest {
    let prompt = Prompt {
        ids: vec![1, 100, 200, 300, 400],
        image_tokens: 0,
    };
    let mut request = GenerateRequest::new(prompt, tokens_max);
    request.stop_ids = vec![END];
    // Where a test is about shared prefixes, it says so.
    request.cache.prefix = Access::NONE;
    request
}

/// One picture of two crops.
pub(crate) fn pixels(picture: u8) -> Arc<PixelValues> {
    Arc::new(PixelValues {
        crops: Vec::new(),
        crop_count: 2,
        columns: 1,
        rows: 1,
        key: [picture; 32],
    })
}

/// BOS, then every picture's slots, then one token.
pub(crate) fn request_with(pictures: &[u8]) -> GenerateRequest {
    let mut request = request(8);
    request.images = pictures.iter().map(|picture| pixels(*picture)).collect();
    request.prompt.ids = vec![1];
    for (index, pixels) in (1_i64..).zip(&request.images) {
        let slots = pixels.image_tokens();
        request.prompt.image_tokens += slots;
        let slots = std::iter::repeat_n(-index, slots as usize);
        request.prompt.ids.extend(slots);
    }
    request.prompt.ids.push(100);
    request
}
