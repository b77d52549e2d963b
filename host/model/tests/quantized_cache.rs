//! Float checkpoints quantized when they are opened: once, by one process, whole or not at all.
#![expect(clippy::unwrap_used, reason = "helpers of tests panic like tests")]

use std::fs;
use std::path::{Path, PathBuf};

use visor_model::{
    Checkpoint, LoadStage, ModelError, QuantizeOptions, QuantizedCache, quantized_facts,
};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/golden")
        .join(name)
}

fn cache(folder: &Path) -> QuantizedCache {
    QuantizedCache {
        folder: folder.join("kept"),
        options: QuantizeOptions::default(),
    }
}

/// Opens, and tells which stages that took.
fn open(cache: &QuantizedCache, source: &Path) -> (Checkpoint, Vec<LoadStage>) {
    let mut stages = Vec::new();
    let opened = cache.open(&Checkpoint::open(source).unwrap(), &mut |progress| {
        if stages.last() != Some(&progress.stage) {
            stages.push(progress.stage);
        }
        true
    });
    (opened.unwrap().unwrap(), stages)
}

/// Folders kept, what is half done among them.
fn kept(cache: &QuantizedCache) -> Vec<PathBuf> {
    let entries = fs::read_dir(&cache.folder).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| !path.ends_with("known")).collect()
}

/// A copy of a golden checkpoint that a test may change.
fn copied(folder: &Path, name: &str) -> PathBuf {
    let copy = folder.join(name);
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
        }
    }
    copy
}

#[test]
fn weights_are_quantized_once_and_known_again_without_reading_them() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(folder.path());
    let source = golden("ckpt_mha");
    let (first, stages) = open(&cache, &source);
    assert_eq!(stages, [LoadStage::Hashing, LoadStage::Quantizing]);
    assert_eq!(first.facts().quantization, "int4 group 64");
    let (second, stages) = open(&cache, &source);
    assert_eq!(stages, []);
    assert_eq!(second.facts().digest, first.facts().digest);
    assert_eq!(kept(&cache).len(), 1);
}

#[test]
fn what_is_planned_is_what_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(folder.path());
    let source = Checkpoint::open(&golden("ckpt_mha")).unwrap();
    let planned = quantized_facts(&source, &cache.options).unwrap();
    let (made, _) = open(&cache, &golden("ckpt_mha"));
    let header = made.facts().bytes - planned.bytes;
    assert!((1..64 << 10).contains(&header), "{header} bytes of header");
    assert_eq!(planned.id, source.facts().id);
    assert_eq!(planned.quantization, "int4 group 64, from bf16");
}

#[test]
fn one_changed_weight_or_option_is_another_form() {
    let folder = tempfile::tempdir().unwrap();
    let mut cache = cache(folder.path());
    let source = copied(folder.path(), "ckpt_mha");
    open(&cache, &source);
    let file = source.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 2; // in the mantissa of the last bf16
    bytes[last] ^= 1;
    let new = source.join("new");
    fs::write(&new, bytes).unwrap();
    fs::rename(&new, &file).unwrap();
    let (_, stages) = open(&cache, &source);
    assert_eq!(stages, [LoadStage::Hashing, LoadStage::Quantizing]);
    cache.options.embeddings = visor_model::Precision::Float;
    let (_, stages) = open(&cache, &source);
    assert!(stages.contains(&LoadStage::Quantizing));
    assert_eq!(kept(&cache).len(), 3);
}

#[test]
fn a_quantized_checkpoint_is_taken_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(folder.path());
    let source = Checkpoint::open(&golden("ckpt_mha_int4")).unwrap();
    assert!(cache.open(&source, &mut |_| true).unwrap().is_none());
    let facts = quantized_facts(&source, &cache.options).unwrap();
    assert_eq!(facts, source.facts());
    assert!(!cache.folder.exists());
}

#[test]
fn of_those_who_come_at_once_one_makes_it() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(folder.path());
    let open_one = || open(&cache, &golden("ckpt_mha")).1;
    let stages: Vec<Vec<LoadStage>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(open_one)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let makers = stages
        .iter()
        .filter(|stages| stages.contains(&LoadStage::Quantizing));
    assert_eq!(makers.count(), 1, "{stages:?}");
    assert_eq!(kept(&cache).len(), 1);
}

#[test]
fn a_stopped_run_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(folder.path());
    let source = Checkpoint::open(&golden("ckpt_mha")).unwrap();
    for stop_at in [LoadStage::Hashing, LoadStage::Quantizing] {
        let mut go_on = |progress: visor_model::LoadProgress| progress.stage != stop_at;
        let stopped = cache.open(&source, &mut go_on);
        assert!(matches!(stopped, Err(ModelError::Cancelled)));
        let left = cache.folder.exists().then(|| kept(&cache));
        assert_eq!(left.unwrap_or_default(), Vec::<PathBuf>::new());
    }
}

#[test]
fn what_is_damaged_or_left_half_done_is_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(folder.path());
    let source = golden("ckpt_mha");
    open(&cache, &source);
    let target = kept(&cache).remove(0);
    let file = target.join("model.safetensors");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let mut partial = target.clone().into_os_string();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    // As a killed process leaves it.
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join(".visor-partial"), "").unwrap();
    fs::write(partial.join("model.safetensors"), "half").unwrap();
    let (_, stages) = open(&cache, &source);
    assert_eq!(stages, [LoadStage::Quantizing]);
    assert_eq!(fs::read(&file).unwrap(), whole);
    assert_eq!(kept(&cache), [target]);
}

#[test]
fn a_folder_that_cannot_be_written_is_named_with_what_helps() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(folder.path());
    fs::write(&cache.folder, "a file, not a folder").unwrap();
    let source = Checkpoint::open(&golden("ckpt_mha")).unwrap();
    let error = cache.open(&source, &mut |_| true).err().unwrap();
    let text = error.to_string();
    assert!(
        text.contains("kept") && text.contains("model.quantized_folder"),
        "{text}"
    );
}
