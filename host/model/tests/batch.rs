//! Several sequences in one step, and KV blocks that they share: nothing of it changes a bit of what a sequence gives.
#![expect(clippy::unwrap_used, reason = "every function here is part of a test")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use visor_model::image::{ImageLimits, PixelValues, decode, hd_plan, render_view};
use visor_model::{
    Activations, Checkpoint, DeviceKind, ImageFeatures, ImagePass, ModelError, Phi3V, Prompt,
    SequenceState, StepPart,
};

fn demo() -> Phi3V {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("demo");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    Phi3V::load_with(&checkpoint, DeviceKind::Cpu, Activations::Int8, &|_| ()).unwrap()
}

fn pixels() -> PixelValues {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/golden/images/sq_512.png"
    );
    let bytes = std::fs::read(path).unwrap();
    let image = decode(&bytes, &ImageLimits::default(), false).unwrap();
    render_view(&image, &hd_plan(512, 512, 1).unwrap()).unwrap()
}

fn text(count: usize, seed: usize) -> Prompt {
    Prompt {
        ids: (0..count)
            .map(|index| ((index * 7919 + 13 * seed + 1) % 300) as i64)
            .collect(),
        image_tokens: 0,
    }
}

/// An image, then so many tokens.
fn about_image(features: &ImageFeatures, count: usize) -> Prompt {
    let tokens = features.tokens();
    let mut ids = vec![1];
    ids.extend(std::iter::repeat_n(-1, tokens as usize));
    ids.extend(text(count, 7).ids);
    Prompt {
        ids,
        image_tokens: tokens,
    }
}

/// The prompt in chunks, then tokens one by one; the bits of all logits.
fn alone(model: &Phi3V, mut state: SequenceState, chunk: usize, tokens: &[u32]) -> Vec<Vec<u32>> {
    let mut all = Vec::new();
    let mut run = |state: &mut SequenceState| {
        loop {
            if let Some(logits) = model.advance(state, chunk).unwrap() {
                return all.push(bits(&logits));
            }
        }
    };
    run(&mut state);
    for token in tokens {
        model.push(&mut state, *token).unwrap();
        run(&mut state);
    }
    all
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

#[test]
fn a_sequence_gives_the_same_alone_and_among_others() {
    let model = demo();
    let features = Arc::new(model.encode_image(&pixels(), &|| true).unwrap());
    let image = [Arc::clone(&features)];
    let prompts = [
        (text(3, 1), &[][..], 512),
        (text(200, 2), &[], 64),
        (about_image(&features, 9), &image[..], 50),
        (text(65, 3), &[], 13),
        (text(1, 4), &[], 1),
    ];
    let tokens: Vec<u32> = (0..9).map(|index| 20 + 31 * index).collect();
    let begin = |(prompt, features, _): &(Prompt, &[Arc<ImageFeatures>], usize)| {
        model.begin(prompt, features).unwrap()
    };
    let want: Vec<_> = prompts
        .iter()
        .map(|prompt| alone(&model, begin(prompt), usize::MAX, &tokens))
        .collect();
    // Sequences join one step after the other and leave when they have all of their tokens.
    let mut have = vec![Vec::new(); prompts.len()];
    let mut states: Vec<_> = prompts.iter().map(begin).collect();
    for step in 0.. {
        let present = |index: usize, have: &[Vec<Vec<u32>>]| {
            step >= index && have[index].len() <= tokens.len()
        };
        let indices: Vec<usize> = (0..prompts.len())
            .filter(|index| present(*index, &have))
            .collect();
        if indices.is_empty() && step > prompts.len() {
            break;
        }
        let mut parts: Vec<StepPart<'_>> = states
            .iter_mut()
            .enumerate()
            .filter(|(index, _)| indices.contains(index))
            .map(|(index, state)| StepPart {
                state,
                positions_max: prompts[index].2,
                drafts: 0,
            })
            .collect();
        let answers = model.step(&mut parts, &|| true).unwrap();
        for (index, logits) in indices.into_iter().zip(answers) {
            let Some(logits) = logits else { continue };
            have[index].push(bits(&logits));
            if let Some(token) = tokens.get(have[index].len() - 1) {
                model.push(&mut states[index], *token).unwrap();
            }
        }
    }
    for (index, (have, want)) in have.iter().zip(&want).enumerate() {
        assert!(have == want, "sequence {index} differs");
    }
}

#[test]
fn what_was_generated_gives_the_same_when_it_runs_again() {
    let model = demo();
    let tokens: Vec<u32> = (0..80).map(|index| 20 + index).collect();
    let want = alone(
        &model,
        model.begin(&text(70, 1), &[]).unwrap(),
        512,
        &tokens,
    );
    let mut again = model.begin(&text(70, 1), &[]).unwrap();
    for token in &tokens {
        model.push(&mut again, *token).unwrap();
    }
    let have = alone(&model, again, 33, &[]);
    assert!(have.last() == want.last());
}

#[test]
fn a_sequence_goes_on_behind_what_another_has_run() {
    let model = demo();
    let pool = model.kv_pool();
    let features = Arc::new(model.encode_image(&pixels(), &|| true).unwrap());
    let image = [Arc::clone(&features)];
    let (first, second) = (about_image(&features, 20), {
        let mut prompt = about_image(&features, 11);
        prompt.ids.extend(text(9, 5).ids);
        prompt
    });
    let common = first
        .ids
        .iter()
        .zip(&second.ids)
        .take_while(|(a, b)| a == b)
        .count();
    assert!(common % pool.block_positions() > 0, "a block is split");
    let want = alone(
        &model,
        model.begin(&second, &image).unwrap(),
        512,
        &[30, 31],
    );
    let mut donor = model.begin(&first, &image).unwrap();
    model.advance(&mut donor, usize::MAX).unwrap();
    for positions in [common, common - 1, pool.block_positions(), 1] {
        let before = pool.blocks_used();
        // Its image is wanted by positions that are adopted alone.
        let mut state = model.begin_without(&second, &[features.tokens()]).unwrap();
        model.adopt(&mut state, donor.share(), positions).unwrap();
        assert_eq!(state.pending(), second.ids.len() - positions);
        let split = usize::from(!positions.is_multiple_of(pool.block_positions()));
        assert_eq!(
            pool.blocks_used(),
            before + split,
            "whole blocks are shared"
        );
        if positions < common - 20 {
            model
                .set_features(&mut state, 0, Arc::clone(&features))
                .unwrap();
        }
        assert!(
            alone(&model, state, 512, &[30, 31]) == want,
            "{positions} positions adopted"
        );
        assert_eq!(pool.blocks_used(), before, "everything was given back");
    }
    // The donor was not written to, and goes on.
    let mut fresh = model.begin(&first, &image).unwrap();
    let fresh_logits = alone_from(&model, &mut fresh);
    model.push(&mut donor, 9).unwrap();
    model.push(&mut fresh, 9).unwrap();
    assert!(!fresh_logits.is_empty());
    assert!(alone_from(&model, &mut donor) == alone_from(&model, &mut fresh));
}

fn alone_from(model: &Phi3V, state: &mut SequenceState) -> Vec<u32> {
    bits(&model.advance(state, usize::MAX).unwrap().unwrap())
}

#[test]
fn a_shared_block_is_copied_before_it_is_written() {
    let model = demo();
    let mut first = model.begin(&text(70, 1), &[]).unwrap();
    model.advance(&mut first, usize::MAX).unwrap();
    let held = first.share().to_vec();
    model.push(&mut first, 9).unwrap();
    model.advance(&mut first, 1).unwrap();
    assert!(Arc::ptr_eq(&held[0], &first.share()[0]));
    assert!(!Arc::ptr_eq(&held[1], &first.share()[1]));
}

#[test]
fn blocks_are_counted_and_limited() {
    let model = demo();
    let pool = model.kv_pool();
    assert!(pool.can_share() && pool.block_bytes() > 0);
    pool.set_blocks_max(2);
    let mut state = model.begin(&text(129, 1), &[]).unwrap();
    assert!(matches!(
        model.advance(&mut state, usize::MAX),
        Err(ModelError::KvFull { blocks_max: 2 })
    ));
    assert_eq!(state.pending(), 129, "nothing has run");
    assert!(model.advance(&mut state, 128).unwrap().is_none());
    let mut other = model.begin(&text(1, 1), &[]).unwrap();
    assert!(matches!(
        model.reserve(&mut other, 1),
        Err(ModelError::KvFull { .. })
    ));
    drop(state);
    assert_eq!(pool.blocks_used(), 0);
    model.reserve(&mut other, 100).unwrap();
    assert_eq!(pool.blocks_used(), 2);
    assert!(model.advance(&mut other, 1).unwrap().is_some());
}

#[test]
fn what_cannot_be_adopted_is_refused() {
    let model = demo();
    let mut donor = model.begin(&text(70, 1), &[]).unwrap();
    model.advance(&mut donor, usize::MAX).unwrap();
    let mut same = model.begin(&text(70, 1), &[]).unwrap();
    for (blocks, positions) in [(donor.share(), 70), (&donor.share()[..1], 65)] {
        let refused = model.adopt(&mut same, blocks, positions);
        assert!(matches!(refused, Err(ModelError::Prompt(_))));
    }
    let mut missing = model
        .begin_without(
            &Prompt {
                ids: vec![1, -1],
                image_tokens: 1,
            },
            &[1],
        )
        .unwrap();
    assert!(matches!(
        model.advance(&mut missing, 9),
        Err(ModelError::Prompt(_))
    ));
}

#[test]
fn drafts_are_told_what_comes_behind_them_to_the_bit() {
    let model = demo();
    let tokens: Vec<u32> = (0..12).map(|index| 20 + 31 * index).collect();
    // The block that is written ends among the drafts.
    let begin = || model.begin(&text(61, 5), &[]).unwrap();
    let want = alone(&model, begin(), 512, &tokens);
    let mut state = begin();
    model.advance(&mut state, usize::MAX).unwrap();
    let mut at = 0;
    for right in [0, 1, 3, 2] {
        model.push(&mut state, tokens[at]).unwrap();
        let mut drafts = tokens[at + 1..at + 1 + right].to_vec();
        drafts.extend([7, 8]);
        assert_eq!(model.push_drafts(&mut state, &drafts), drafts.len());
        let part = StepPart {
            state: &mut state,
            positions_max: usize::MAX,
            drafts: drafts.len(),
        };
        let logits = model.step(&mut [part], &|| true).unwrap().remove(0);
        let logits = bits(&logits.unwrap());
        let rows: Vec<&[u32]> = logits.chunks(logits.len() / (drafts.len() + 1)).collect();
        for row in 0..=right {
            assert!(rows[row] == want[at + 1 + row], "row {row} from {at}");
        }
        model.drop_drafts(&mut state, 2);
        at += right + 1;
    }
    assert_eq!((state.len(), state.pending()), (61 + at, 0));
}

#[test]
fn no_draft_changes_the_rope_regime_or_takes_more_blocks_than_there_are() {
    let model = demo();
    let mut state = model.begin(&text(4094, 5), &[]).unwrap();
    assert!(!model.is_long(4096) && model.is_long(4097));
    assert_eq!(model.push_drafts(&mut state, &[1, 2, 3, 4]), 2);
    model.drop_drafts(&mut state, 2);
    assert_eq!(state.len(), 4094);
    drop(state);
    model.kv_pool().set_blocks_max(1);
    let mut state = model.begin(&text(62, 5), &[]).unwrap();
    assert_eq!(model.push_drafts(&mut state, &[1, 2, 3, 4]), 2);
    assert_eq!(model.push_drafts(&mut state, &[u32::MAX]), 0, "no token");
    let float = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("demo");
    let float = Checkpoint::open(&float).unwrap();
    let float = Phi3V::load_with(&float, DeviceKind::Cpu, Activations::Float, &|_| ()).unwrap();
    let mut state = float.begin(&text(62, 5), &[]).unwrap();
    assert_eq!(float.push_drafts(&mut state, &[1]), 0, "sums may differ");
}

#[test]
fn an_image_that_is_encoded_in_pieces_is_the_same() {
    let model = demo();
    let pixels = pixels();
    let whole = model.encode_image(&pixels, &|| true).unwrap();
    for layers in [1, 2, 5] {
        let (mut pass, mut calls) = (ImagePass::default(), 0);
        let pieces = loop {
            let asked = AtomicUsize::new(0);
            let keep_going = || asked.fetch_add(1, Ordering::Relaxed) + 1 < layers;
            calls += 1;
            let features = model.advance_image(&mut pass, &pixels, &keep_going);
            if let Some(features) = features.unwrap() {
                break features;
            }
        };
        assert!(calls > 1, "{layers} layers at a time");
        assert!(pieces.to_rows().unwrap() == whole.to_rows().unwrap());
    }
}
