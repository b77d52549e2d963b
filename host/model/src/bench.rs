//! What this machine does with a checkpoint, stage by stage, beside what it could do at best ([`Ceilings`]) or just then.
//!
//! The stages are those of a request, called as the engine calls them, on the CPU: load, vision, prefill, decode. Pictures
//! and prompts are made up, so the answers mean nothing and the times do not depend on what is asked.

mod ceilings;
mod work;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::device::{Activations, DeviceKind};
use crate::error::ModelError;
use crate::image::{CROP_SIDE_PX, PixelValues};
use crate::model::{ImageFeatures, Phi3V};
use crate::quantize::Precision;
use crate::sequence::SequenceState;
use crate::step::StepPart;
use crate::tokenizer::Prompt;
use crate::weights::StoredTensor;

use ceilings::Reader;
pub use ceilings::{Ceilings, IntegerProducts, Products};
use work::{Work, step_weights};

/// Sides of the grids that are encoded: an overview and one crop, an overview and four.
const GRIDS: [u32; 2] = [1, 2];
/// Of those that are asked about: four crops, and when asked for sixteen.
const QUESTION_GRIDS: [u32; 2] = [2, 4];
/// Prompts that are run; the last takes its time and is run when asked for.
const PROMPTS: [usize; 3] = [128, 757, 2509];
/// The prompt that decoding goes on from: an image of four crops has as many tokens.
const DECODED_AFTER: usize = PROMPTS[1];
const DECODE_STEPS: usize = 24;
/// Sequences that decode together, each behind a prompt of so many tokens.
const BATCHES: [usize; 4] = [1, 2, 4, 8];
const BATCH_PROMPT_TOKENS: usize = 16;
const BATCH_STEPS: usize = 12;
/// Drafts that are checked beside a token.
const DRAFTS: [usize; 4] = [1, 2, 4, 7];
/// Runs whose median is told, of what takes seconds.
const RUNS: usize = 3;
/// Text tokens before and behind the image of a question, as "What is shown in this image?" has them.
const QUESTION_TOKENS: [usize; 2] = [4, 14];

/// How to measure.
pub struct BenchOptions<'a> {
    /// What INT4 and INT8 weights are multiplied with.
    pub activations: Activations,
    /// How the tower and the projector are stored; the language model is in INT4.
    pub vision: Precision,
    /// Prompt positions computed at a time.
    pub prefill_chunk_tokens: usize,
    /// The longest prompt and the largest picture too.
    pub long: bool,
    /// Hears what is measured next.
    pub say: &'a dyn Fn(&str),
    /// Answers whether to go on.
    pub keep_going: &'a (dyn Fn() -> bool + Sync),
}

/// What was measured. A share is of what bounds the stage: the rate of its weights' products of [`Ceilings`], or what memory gave beside
/// it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchReport {
    /// `int4 group 64`, `int8 group 64`, `bf16`, `f16` or `f32`.
    pub quantization: String,
    /// Bytes of the weight files.
    pub weight_bytes: u64,
    /// Opening and loading; on the CPU weights are mapped, and read when they are first used.
    pub load_s: f64,
    /// The same once more in the same process: all that loading reads is in the page cache.
    pub warm_load_s: f64,
    /// Encoding an image, by crops.
    pub vision: Vec<Vision>,
    /// Prompts of text, by length.
    pub prefill: Vec<Prefill>,
    /// Tokens behind a prompt.
    pub decode: Decode,
    /// Tokens of several sequences at once, behind short prompts.
    pub batches: Vec<Batch>,
    /// One token with drafts behind it, as short a prompt before it.
    pub drafts: Vec<Drafts>,
    /// Questions about an image of four crops, and of sixteen.
    pub first_tokens: Vec<FirstToken>,
}

/// Encoding one image: tower and projector, the median of a few runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Vision {
    /// The overview included.
    pub crops: u32,
    /// All of them.
    pub seconds: f64,
    /// One of them.
    pub seconds_per_crop: f64,
    /// One of them through the tower alone.
    pub tower_seconds_per_crop: f64,
    /// 10^9 operations that the image needs.
    pub gop: f64,
    /// Of the product rate.
    pub product_share: f64,
}

/// Running one prompt of text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prefill {
    /// Positions.
    pub tokens: usize,
    /// All of them, with the logits of the last.
    pub seconds: f64,
    /// `tokens / seconds`.
    pub tokens_per_s: f64,
    /// 10^9 operations that the prompt needs.
    pub gop: f64,
    /// Of the product rate.
    pub product_share: f64,
}

/// One token after the other.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Decode {
    /// Positions before the first.
    pub after_tokens: usize,
    /// Tokens measured.
    pub steps: usize,
    /// Their median.
    pub step_ms: f64,
    /// Of the median.
    pub tokens_per_s: f64,
    /// Weights that a step reads.
    pub weight_bytes: u64,
    /// Keys and values that the step in the middle reads.
    pub kv_bytes: u64,
    /// Reading the same weights from one to the next, 10^9 bytes a second: the median of readings before, between and after the steps.
    /// What a machine that others use too can read changes within a minute.
    pub read_gb_per_s: f64,
    /// Median over the steps: the bytes a second of a step, of the mean of the readings right before and after it.
    pub read_share: f64,
}

/// One token of each of several sequences after the other.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Batch {
    /// How many.
    pub sequences: usize,
    /// Positions of each before the first.
    pub after_tokens: usize,
    /// The median step, which gives each a token.
    pub step_ms: f64,
    /// Of all together.
    pub tokens_per_s: f64,
}

/// A step of one sequence that checks drafts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Drafts {
    /// How many; fewer than asked for where the model takes none.
    pub drafts: usize,
    /// The median step, which gives one token, and one more for each draft that comes.
    pub step_ms: f64,
}

/// From crops to the logits of the first token.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FirstToken {
    /// The overview included.
    pub crops: u32,
    /// Image tokens and text.
    pub prompt_tokens: usize,
    /// Encoding the image.
    pub vision_s: f64,
    /// Running the prompt.
    pub prefill_s: f64,
    /// Both.
    pub seconds: f64,
}

/// Loads the checkpoint in `folder` and measures it. Ceilings are for the same activations.
///
/// # Errors
/// A [`ModelError`]: the folder is no checkpoint, the model has not enough positions, a device fails, or
/// [`ModelError::Cancelled`] once `keep_going` says no.
pub fn measure(
    folder: &Path,
    ceilings: &Ceilings,
    options: &BenchOptions<'_>,
) -> Result<BenchReport, ModelError> {
    (options.say)("load");
    let (_, load_s) = load(folder, options)?;
    let ((checkpoint, model), warm_load_s) = load(folder, options)?;
    let bench = Bench {
        work: Work::new(model.config()),
        step_weights: step_weights(&checkpoint),
        model: &model,
        ceilings,
        options,
    };
    let vision = GRIDS.map(|side| bench.vision(side));
    let vision = vision.into_iter().collect::<Result<_, _>>()?;
    let (prefill, decode) = bench.text()?;
    let grids = QUESTION_GRIDS
        .into_iter()
        .take(1 + usize::from(options.long));
    let facts = checkpoint.facts();
    Ok(BenchReport {
        quantization: facts.quantization,
        weight_bytes: facts.bytes,
        load_s,
        warm_load_s,
        vision,
        prefill,
        decode,
        batches: bench.batches()?,
        drafts: bench.drafts()?,
        first_tokens: grids
            .map(|side| bench.first_token(side))
            .collect::<Result<_, _>>()?,
    })
}

fn load(
    folder: &Path,
    options: &BenchOptions<'_>,
) -> Result<((Checkpoint, Phi3V), f64), ModelError> {
    let start = Instant::now();
    let checkpoint = Checkpoint::open(folder)?;
    let model = Phi3V::load_with(&checkpoint, DeviceKind::Cpu, options.activations, &|_| ())?;
    Ok(((checkpoint, model), seconds_since(start)))
}

struct Bench<'a> {
    model: &'a Phi3V,
    work: Work,
    step_weights: Vec<&'a StoredTensor>,
    ceilings: &'a Ceilings,
    options: &'a BenchOptions<'a>,
}

impl Bench<'_> {
    fn vision(&self, side: u32) -> Result<Vision, ModelError> {
        let pixels = picture(side);
        let crops = pixels.crop_count;
        (self.options.say)(&format!("vision, {crops} crops"));
        let mut tower = Vec::with_capacity(RUNS);
        let seconds = median_s(RUNS, || {
            let start = Instant::now();
            let keep_going = self.options.keep_going;
            let patches = self.model.tower_features(&pixels, keep_going)?;
            tower.push(seconds_since(start));
            self.model.project(&patches, &pixels).map(|_| ())
        })?;
        let gop = self.work.vision(crops, pixels.image_tokens()) / 1e9;
        let rate = self.ceilings.products.of(self.options.vision);
        Ok(Vision {
            crops,
            seconds,
            seconds_per_crop: seconds / f64::from(crops),
            tower_seconds_per_crop: median(tower) / f64::from(crops),
            gop,
            product_share: gop / seconds / rate,
        })
    }

    /// Every prompt of text, and decoding behind one of them.
    fn text(&self) -> Result<(Vec<Prefill>, Decode), ModelError> {
        let mut decode = None;
        let mut prefill = Vec::new();
        for tokens in PROMPTS {
            if tokens > DECODED_AFTER && !self.options.long {
                continue;
            }
            (self.options.say)(&format!("prefill, {tokens} tokens"));
            let mut last = None;
            let runs = if tokens < DECODED_AFTER { RUNS } else { 1 };
            let seconds = median_s(runs, || {
                last = Some(self.prefill(&self.text_ids(tokens), &[])?);
                Ok(())
            })?;
            let gop = self.work.prefill(tokens) / 1e9;
            let rate = self.ceilings.products.of(Precision::Int4);
            prefill.push(Prefill {
                tokens,
                seconds,
                tokens_per_s: tokens as f64 / seconds,
                gop,
                product_share: gop / seconds / rate,
            });
            if let (DECODED_AFTER, Some((state, logits))) = (tokens, last) {
                decode = Some(self.decode(state, logits)?);
            }
        }
        let decode = decode.expect("one of the prompts is the one decoded after");
        Ok((prefill, decode))
    }

    fn decode(&self, mut state: SequenceState, mut logits: Vec<f32>) -> Result<Decode, ModelError> {
        let after_tokens = state.len();
        (self.options.say)(&format!("decode, after {after_tokens} tokens"));
        let mut reader = Reader::new(self.step_weights.iter().map(|tensor| tensor.bytes()));
        let mut reads = vec![reader.gb_per_s()];
        let mut steps = Vec::with_capacity(DECODE_STEPS);
        for _ in 0..DECODE_STEPS {
            let start = Instant::now();
            self.model.push(&mut state, largest(&logits))?;
            logits = self.run(&mut state)?;
            steps.push(seconds_since(start));
            reads.push(reader.gb_per_s());
        }
        let value_bytes = self.model.kv_pool().value_bytes();
        let kv_bytes = |step: usize| self.work.kv_bytes(after_tokens + step + 1, value_bytes);
        let weights = self.step_weights.iter();
        let weight_bytes: u64 = weights.map(|tensor| tensor.bytes().len() as u64).sum();
        let beside = reads.windows(2).map(|two| (two[0] + two[1]) / 2.0);
        let shares = steps.iter().zip(beside).enumerate();
        let shares = shares.map(|(step, (step_s, gb_per_s))| {
            (weight_bytes + kv_bytes(step)) as f64 / step_s / 1e9 / gb_per_s
        });
        let read_share = median(shares.collect());
        let step_s = median(steps);
        Ok(Decode {
            after_tokens,
            steps: DECODE_STEPS,
            step_ms: 1e3 * step_s,
            tokens_per_s: 1.0 / step_s,
            weight_bytes,
            kv_bytes: kv_bytes(DECODE_STEPS / 2),
            read_gb_per_s: median(reads),
            read_share,
        })
    }

    fn batches(&self) -> Result<Vec<Batch>, ModelError> {
        let batch = |sequences| self.batch(sequences);
        BATCHES.into_iter().map(batch).collect()
    }

    fn batch(&self, sequences: usize) -> Result<Batch, ModelError> {
        (self.options.say)(&format!("decode, {sequences} at once"));
        let mut states = Vec::with_capacity(sequences);
        for _ in 0..sequences {
            states.push(self.prefill(&self.text_ids(BATCH_PROMPT_TOKENS), &[])?);
        }
        let step_s = median_s(BATCH_STEPS, || {
            for (state, logits) in &mut states {
                self.model.push(state, largest(logits))?;
            }
            let mut parts: Vec<_> = states
                .iter_mut()
                .map(|(state, _)| StepPart {
                    state,
                    positions_max: 1,
                    drafts: 0,
                })
                .collect();
            let logits = self.model.step(&mut parts, self.options.keep_going)?;
            for ((_, last), logits) in states.iter_mut().zip(logits) {
                *last = logits.unwrap_or_default();
            }
            Ok(())
        })?;
        Ok(Batch {
            sequences,
            after_tokens: BATCH_PROMPT_TOKENS,
            step_ms: 1e3 * step_s,
            tokens_per_s: sequences as f64 / step_s,
        })
    }

    fn drafts(&self) -> Result<Vec<Drafts>, ModelError> {
        let (mut state, logits) = self.prefill(&self.text_ids(BATCH_PROMPT_TOKENS), &[])?;
        let token = largest(&logits);
        let checked = |count| self.checked(&mut state, vec![token; count]);
        DRAFTS.into_iter().map(checked).collect()
    }

    /// None of the drafts comes.
    fn checked(&self, state: &mut SequenceState, drafts: Vec<u32>) -> Result<Drafts, ModelError> {
        (self.options.say)(&format!("decode, {} drafts", drafts.len()));
        let mut taken = 0;
        let step_s = median_s(BATCH_STEPS, || {
            self.model.push(state, 0)?;
            taken = self.model.push_drafts(state, &drafts);
            let part = StepPart {
                state,
                positions_max: usize::MAX,
                drafts: taken,
            };
            self.model.step(&mut [part], self.options.keep_going)?;
            self.model.drop_drafts(state, taken);
            Ok(())
        })?;
        Ok(Drafts {
            drafts: taken,
            step_ms: 1e3 * step_s,
        })
    }

    fn first_token(&self, side: u32) -> Result<FirstToken, ModelError> {
        let pixels = picture(side);
        (self.options.say)(&format!("first token, {} crops", pixels.crop_count));
        let [before, behind] = QUESTION_TOKENS;
        let mut ids = self.text_ids(before);
        ids.extend((0..pixels.image_tokens()).map(|_| -1));
        ids.extend(self.text_ids(behind));
        let start = Instant::now();
        let features = Arc::new(self.encode(&pixels)?);
        let vision_s = seconds_since(start);
        self.prefill(&ids, &[features])?;
        let seconds = seconds_since(start);
        Ok(FirstToken {
            crops: pixels.crop_count,
            prompt_tokens: ids.len(),
            vision_s,
            prefill_s: seconds - vision_s,
            seconds,
        })
    }

    fn encode(&self, pixels: &PixelValues) -> Result<ImageFeatures, ModelError> {
        self.model.encode_image(pixels, self.options.keep_going)
    }

    /// A sequence that has run all of a prompt, and the logits of its last position.
    fn prefill(
        &self,
        ids: &[i64],
        features: &[Arc<ImageFeatures>],
    ) -> Result<(SequenceState, Vec<f32>), ModelError> {
        let prompt = Prompt {
            ids: ids.to_vec(),
            image_tokens: features.iter().map(|image| image.tokens()).sum(),
        };
        let mut state = self.model.begin(&prompt, features)?;
        let logits = self.run(&mut state)?;
        Ok((state, logits))
    }

    /// Runs whatever is pending, in chunks.
    fn run(&self, state: &mut SequenceState) -> Result<Vec<f32>, ModelError> {
        loop {
            if !(self.options.keep_going)() {
                return Err(ModelError::Cancelled);
            }
            let chunk = self.options.prefill_chunk_tokens;
            if let Some(logits) = self.model.advance(state, chunk)? {
                return Ok(logits);
            }
        }
    }

    /// Token ids all over the vocabulary.
    fn text_ids(&self, count: usize) -> Vec<i64> {
        let vocabulary = self.model.config().vocab_size;
        let id = |index: usize| (1 + index * 7919) % vocabulary;
        (0..count).map(|index| id(index) as i64).collect()
    }
}

/// Crops of a square grid and their overview, with values as normalized pixels have them.
fn picture(side: u32) -> PixelValues {
    let crop_count = 1 + side * side;
    let values = crop_count as usize * 3 * (CROP_SIDE_PX * CROP_SIDE_PX) as usize;
    PixelValues {
        crops: (0..values)
            .map(|index| (index * 31 % 251) as f32 / 64.0 - 1.9)
            .collect(),
        crop_count,
        columns: side,
        rows: side,
        key: [0; 32],
    }
}

fn largest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(index, _)| index as u32)
}

/// Seconds of the median run.
fn median_s(
    runs: usize,
    mut run: impl FnMut() -> Result<(), ModelError>,
) -> Result<f64, ModelError> {
    let mut times = Vec::with_capacity(runs);
    for _ in 0..runs {
        let start = Instant::now();
        run()?;
        times.push(seconds_since(start));
    }
    Ok(median(times))
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    let (low, high) = (figures[(figures.len() - 1) / 2], figures[figures.len() / 2]);
    (low + high) / 2.0
}

fn seconds_since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64()
}
