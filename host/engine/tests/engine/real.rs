//! The engine around the real forward pass: nothing it does changes the tokens.

use std::sync::Arc;

use visor_engine::{
    CacheBytes, Caches, CheckpointLoader, Engine, EngineOptions, EngineState, GenerateRequest,
    PrefixBlock,
};
use visor_model::image::PixelValues;
use visor_model::{Activations, Checkpoint, DeviceKind, ImageFeatures, KvBlock, Phi3V, Prompt};

use crate::heard::ask;
use crate::scripted::PATIENCE;

fn picture() -> Arc<PixelValues> {
    let samples = 2_u64 * 3 * 336 * 336;
    Arc::new(PixelValues {
        crops: (0..samples)
            .map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0)
            .collect(),
        crop_count: 2,
        columns: 1,
        rows: 1,
        key: [7; 32],
    })
}

fn request(checkpoint: &Checkpoint, with_picture: bool, tokens_max: u32) -> GenerateRequest {
    let tokenizer = checkpoint.tokenizer().unwrap();
    let mut ids = vec![1];
    let mut images = Vec::new();
    if with_picture {
        images.push(picture());
        ids.extend(std::iter::repeat_n(-1, images[0].image_tokens() as usize));
    }
    let image_tokens = ids.len() as u32 - 1;
    let text = tokenizer.encode_text("What is shown in this picture?");
    ids.extend(text.into_iter().map(i64::from));
    let mut request = GenerateRequest::new(Prompt { ids, image_tokens }, tokens_max);
    request.images = images;
    request
}

/// The answer as the model alone gives it, the prompt in one piece.
fn greedy(model: &Phi3V, request: &GenerateRequest) -> Vec<u32> {
    let encode =
        |pixels: &Arc<PixelValues>| Arc::new(model.encode_image(pixels, &|| true).unwrap());
    let features: Vec<_> = request.images.iter().map(encode).collect();
    let mut state = model.begin(&request.prompt, &features).unwrap();
    let mut tokens = Vec::new();
    while tokens.len() < request.tokens_max as usize {
        let logits = model.advance(&mut state, usize::MAX).unwrap().unwrap();
        let best = logits.iter().copied().fold(f32::MIN, f32::max);
        let token = logits.iter().position(|logit| *logit == best).unwrap() as u32;
        model.push(&mut state, token).unwrap();
        tokens.push(token);
    }
    tokens
}

#[test]
fn the_engine_says_what_the_model_says() {
    let drafted = engine_and_model_agree(Activations::Float, 12);
    assert_eq!(drafted, 0, "sums of several rows may differ");
}

/// Nothing stops these answers: they come to repeat themselves.
#[test]
fn it_says_the_same_with_drafts() {
    assert!(engine_and_model_agree(Activations::Int8, 150) > 50);
}

/// How many tokens were drafted and came.
fn engine_and_model_agree(activations: Activations, tokens_max: u32) -> u64 {
    let checkpoint = Arc::new(Checkpoint::embedded().unwrap());
    let tokenizer = Arc::new(checkpoint.tokenizer().unwrap());
    let model = Phi3V::load_with(&checkpoint, DeviceKind::Cpu, activations, &|_| ()).unwrap();
    let megabytes = 64 << 20;
    let caches: Caches<ImageFeatures, PrefixBlock<KvBlock>> = Caches::new(CacheBytes {
        features: megabytes,
        ..CacheBytes::default()
    });
    let options = EngineOptions {
        prefill_chunk_tokens: 100,
        model_digest: checkpoint.facts().digest,
        ..EngineOptions::default()
    };
    let loader = CheckpointLoader::new(Arc::clone(&checkpoint), activations, |_| true);
    let engine = Engine::start(loader, Arc::clone(&tokenizer), &caches, options);
    let device = DeviceKind::Cpu;
    assert_eq!(engine.wait_ready(PATIENCE), EngineState::Ready { device });
    for with_picture in [false, true, true] {
        let request = request(&checkpoint, with_picture, tokens_max);
        let want = greedy(&model, &request);
        let heard = ask(&engine, request);
        assert_eq!(
            heard.text,
            tokenizer.decode(&want, true),
            "picture: {with_picture}"
        );
        assert_eq!(heard.usage().completion_tokens, tokens_max);
    }
    let stats = caches.features.stats();
    assert_eq!((stats.hits, stats.misses), (1, 1));
    assert!(stats.saved_us > 0 && stats.used_bytes > 0);
    engine.stats().accepted_tokens
}
