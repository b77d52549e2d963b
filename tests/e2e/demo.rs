//! The model inside the binary, on the repository's evaluation suite; and that the suite notices when a stage of the
//! vision path is broken.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::server::{fixture, repository};

/// What the demo model reaches on the suite, percent, less a margin for other machines' roundings.
const FLOORS: [(&str, u32); 16] = [
    ("all", 85),
    ("name", 83),
    ("shape", 92),
    ("colour", 93),
    ("position", 95),
    ("yes-no", 92),
    ("count", 77),
    ("read", 70),
    ("detail", 66),
    ("two-image", 75),
    ("clothing", 75),
    ("describe", 62),
    ("follow-up", 87),
    ("formats", 66),
    ("text-only", 87),
    ("cannot-know", 75),
];

/// A part of the repository's suite in a folder of its own, with room for what a test changes.
struct Place(tempfile::TempDir);

impl Place {
    /// With the cases that `wanted` picks.
    fn new(wanted: impl Fn(&Value) -> bool) -> Self {
        let place = Self(tempfile::tempdir().expect("a folder can be made"));
        let (from, to) = (repository("tests/suite"), place.path().join("suite"));
        fs::create_dir_all(to.join("pictures")).expect("a folder can be made");
        let cases = fs::read_to_string(from.join("cases.jsonl")).expect("the suite is there");
        let cases: Vec<Value> = cases
            .lines()
            .map(|line| serde_json::from_str(line).expect("a case is JSON"))
            .filter(wanted)
            .collect();
        let pictures: BTreeSet<&str> = cases
            .iter()
            .flat_map(|case| case["images"].as_array().expect("images"))
            .map(|image| image.as_str().expect("a path"))
            .collect();
        for picture in pictures {
            fs::copy(from.join(picture), to.join(picture)).expect("a picture can be copied");
        }
        let lines: Vec<String> = cases.iter().map(Value::to_string).collect();
        fs::write(to.join("cases.jsonl"), lines.join("\n")).expect("the cases can be written");
        place
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Percent of right answers.
    fn percent(&self, args: &[&str]) -> f64 {
        let output = Command::new(env!("CARGO_BIN_EXE_visor"))
            .args(["eval", "--suite", "suite", "--json"])
            .args(args)
            .current_dir(self.path())
            .output()
            .expect("the binary runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let categories = report["runs"][0]["categories"]
            .as_array()
            .expect("categories");
        let all = categories.iter().find(|row| row["category"] == "all");
        all.and_then(|row| row["percent"].as_f64())
            .expect("a total")
    }

    /// A copy of the demo's checkpoint whose bytes `change` has changed.
    fn checkpoint(&self, change: impl Fn(&Tensors<'_>, &mut [u8])) -> PathBuf {
        let (from, to) = (repository("host/model/demo"), self.path().join("changed"));
        fs::create_dir(&to).expect("a folder can be made");
        let files = fs::read_dir(from).expect("the demo is there").flatten();
        for entry in files.filter(|entry| entry.path().is_file()) {
            fs::copy(entry.path(), to.join(entry.file_name())).expect("a file can be copied");
        }
        let file = to.join("model.safetensors");
        let mut bytes = fs::read(&file).expect("weights");
        let (length, rest) = bytes.split_first_chunk_mut().expect("a header");
        let length = usize::try_from(u64::from_le_bytes(*length)).expect("a length");
        let (header, data) = rest.split_at_mut(length);
        let header = serde_json::from_slice(header).expect("a header is JSON");
        change(&Tensors(&header), data);
        fs::write(file, bytes).expect("weights can be written");
        to
    }
}

/// The header of a safetensors file.
struct Tensors<'a>(&'a Value);

impl Tensors<'_> {
    const VISION: &'static str = "model.vision_embed_tokens";

    fn numbers(&self, name: &str, key: &str) -> Vec<usize> {
        let tensor = &self.0[format!("{}.{name}", Self::VISION)];
        serde_json::from_value(tensor[key].clone()).expect("numbers")
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        self.numbers(name, "shape")
    }

    /// Where its bytes lie behind the header.
    fn bytes(&self, name: &str) -> Range<usize> {
        let place = self.numbers(name, "data_offsets");
        place[0]..place[1]
    }
}

fn is(case: &Value, category: &str) -> bool {
    case["category"] == category
}

#[test]
fn the_order_of_crops_matters() {
    // Small things that the crops alone show, half of the pictures with one in each: which lies where only the order tells.
    let place = Place::new(|case| is(case, "detail"));
    let plugins = place.path().join("plugins");
    fs::create_dir(&plugins).expect("a folder can be made");
    let backwards = fixture("tests/guests/built/hd-backwards.wasm");
    fs::write(plugins.join("hd.wasm"), backwards).expect("the guest can be written");
    let (right, wrong) = (place.percent(&[]), place.percent(&["--plugins", "plugins"]));
    assert!(wrong + 30.0 < right, "{right} %, backwards {wrong} %");
}

#[test]
fn small_things_are_seen_in_the_crops_alone() {
    let place = Place::new(|case| is(case, "detail"));
    fs::write(
        place.path().join("one.toml"),
        "[plugins.hd.config]\nauto_crops = 1\n",
    )
    .expect("a file can be written");
    let (four, one) = (place.percent(&[]), place.percent(&["--config", "one.toml"]));
    assert!(
        one + 25.0 <= four,
        "{four} % with four crops, {one} % with one"
    );
}

#[test]
fn the_order_of_channels_matters() {
    let place = Place::new(|case| is(case, "colour"));
    let swapped = place.checkpoint(|tensors, data| {
        let patches = "img_processor.vision_model.embeddings.patch_embedding.weight";
        let shape = tensors.shape(patches);
        let plane = shape[2] * shape[3] * 2;
        for filter in data[tensors.bytes(patches)].chunks_exact_mut(3 * plane) {
            let (red, rest) = filter.split_at_mut(plane);
            red.swap_with_slice(&mut rest[plane..]);
        }
    });
    let (right, wrong) = (
        place.percent(&[]),
        place.percent(&["--model", &swapped.display().to_string()]),
    );
    assert!(wrong + 30.0 < right, "{right} %, red for blue {wrong} %");
}

#[test]
fn the_separators_matter() {
    // `sub_GN` ends every row of an image's tokens, `glb_GN` parts the crops from the global view. The model counts, and
    // tells what is not there, against the latter; here every separator is the former.
    let place = Place::new(|case| is(case, "count") || is(case, "yes-no"));
    let alike = place.checkpoint(|tensors, data| {
        data.copy_within(tensors.bytes("sub_GN"), tensors.bytes("glb_GN").start);
    });
    let (right, wrong) = (
        place.percent(&[]),
        place.percent(&["--model", &alike.display().to_string()]),
    );
    assert!(
        wrong + 15.0 < right,
        "{right} %, separators alike {wrong} %"
    );
}

#[test]
fn the_suite_is_answered_as_well_as_the_card_says() {
    let place = Place::new(|_| true);
    let floors = FLOORS.map(|(category, percent)| format!("{category}={percent}"));
    let args: Vec<&str> = floors.iter().flat_map(|f| ["--min", f]).collect();
    place.percent(&args);
}
