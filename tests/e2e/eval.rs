//! `visor eval`: the real binary on suites of a few cases.
//!
//! What the embedded model answers is not looked at, only that every question is asked, judged and told.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::server::{fixture, repository};

/// A suite's folder with two pictures, and room for configurations beside it.
struct Place(tempfile::TempDir);

impl Place {
    fn new(cases: &[Value]) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(place.path().join("suite/pictures")).unwrap();
        place.write_cases(cases);
        for (name, colour) in [("red", [200, 30, 30]), ("blue", [30, 30, 200])] {
            let picture = image::RgbImage::from_pixel(40, 30, image::Rgb(colour));
            let file = place.path().join(format!("suite/pictures/{name}.png"));
            picture.save(file).unwrap();
        }
        place
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write_cases(&self, cases: &[Value]) {
        let lines: Vec<String> = cases.iter().map(Value::to_string).collect();
        fs::write(self.path().join("suite/cases.jsonl"), lines.join("\n")).unwrap();
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path().join(name), text).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_visor"));
        command
            .arg("eval")
            .args(args)
            .args(["--max-tokens", "2"])
            .current_dir(self.path());
        for name in ["MODEL", "DEVICE", "CONFIG", "PLUGINS", "LOG"] {
            command.env_remove(format!("VISOR_{name}"));
        }
        command
    }

    fn eval(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the binary runs")
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path().join(name)).unwrap()
    }
}

fn cases() -> Vec<Value> {
    vec![
        json!({"id": "one", "category": "colour", "images": ["pictures/red.png"], "question": "Which colour?",
               "accept": ["red"]}),
        json!({"id": "few", "category": "colour", "images": ["pictures/blue.png"], "question": "Which colour <b>?",
               "accept": ["blue"], "crops": 1}),
        json!({"id": "low", "category": "follow-up", "images": ["pictures/red.png", "pictures/blue.png"],
               "history": [{"question": "What is it?", "answer": "Two colours."}], "question": "Is it red?",
               "accept": ["yes"], "match": "yes-no", "detail": "low"}),
        json!({"id": "none", "category": "text-only", "images": [], "question": "Hello?", "accept": ["hello"]}),
    ]
}

fn said(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("output is UTF-8")
}

#[track_caller]
fn document(out: &Output, code: i32) -> Value {
    assert_eq!(out.status.code(), Some(code), "{}", said(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("one JSON document on standard output")
}

/// One key of every case of a run.
fn of_cases(run: &Value, key: &str) -> Vec<Value> {
    let cases = run["cases"].as_array().expect("the cases of a run");
    cases.iter().map(|case| case[key].clone()).collect()
}

#[test]
fn a_suite_is_asked_judged_and_told() {
    let place = Place::new(&cases());
    let out = place.eval(&["--suite", "suite", "--json", "--report", "page.html"]);
    let told = document(&out, 0);
    assert_eq!(
        (&told["suite"], &told["cases"]),
        (&json!("suite"), &json!(4))
    );
    assert_eq!(told["max_tokens"], 2);
    assert_eq!(
        (&told["interrupted"], &told["changes"]),
        (&json!(false), &Value::Null)
    );
    let runs = told["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 1);
    let run = &runs[0];
    assert_eq!(run["configuration"], "built-in defaults");
    assert_eq!(run["errors"], 0);
    let plugins = run["plugins"].as_str().unwrap();
    assert!(plugins.contains("image-policy=hd@"), "{plugins}");
    let names: Vec<_> = run["categories"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tally| tally["category"].clone())
        .collect();
    assert_eq!(names, ["colour", "follow-up", "text-only", "all"]);
    assert_eq!(run["categories"][0]["cases"], 2);
    assert_eq!(run["categories"][3]["cases"], 4);
    assert!(run["times"]["median_s"].as_f64().unwrap() > 0.0);
    assert_eq!(of_cases(run, "id"), ["one", "few", "low", "none"]);
    // A small 4:3 picture: 2 x 2 crops by the configuration, one where the case says so.
    assert_eq!(of_cases(run, "image_tokens"), [757, 313, 626, 0]);
    for case in run["cases"].as_array().unwrap() {
        assert!(
            ["right", "wrong"].contains(&case["verdict"].as_str().unwrap()),
            "{case}"
        );
        assert_eq!(
            case["completion_tokens"].as_u64().unwrap().max(2),
            2,
            "{case}"
        );
    }
    let page = place.read("page.html");
    assert_eq!(page.matches("src=\"data:image/png;base64,").count(), 4);
    assert!(page.contains("Which colour &lt;b&gt;?") && !page.contains("<script"));
}

#[test]
fn two_configurations_stand_side_by_side() {
    let place = Place::new(&cases()[..2]);
    place.write("b.toml", "[plugins.hd.config]\nauto_crops = 1\n");
    let told = document(
        &place.eval(&["--suite", "suite", "--json", "--against", "b.toml"]),
        0,
    );
    let runs = told["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2);
    assert_eq!(runs[1]["configuration"], "b.toml");
    assert_eq!(of_cases(&runs[0], "image_tokens"), [757, 313]);
    assert_eq!(of_cases(&runs[1], "image_tokens"), [313, 313]);
    assert_eq!(
        of_cases(&runs[0], "answer")[1],
        of_cases(&runs[1], "answer")[1]
    );
    let changed = ["lost", "won"].map(|key| told["changes"][key].as_array().unwrap().len());
    assert!(
        changed.iter().sum::<usize>() <= 1,
        "only `one` is seen in another way"
    );

    // Another image policy, the way an operator would try one.
    fs::create_dir(place.path().join("other")).unwrap();
    fs::write(
        place.path().join("other/hd.wasm"),
        fixture("tests/guests/built/hd-one.wasm"),
    )
    .unwrap();
    place.write("c.toml", "[plugins]\nfolder = \"other\"\n");
    let out = place.eval(&[
        "--suite",
        "suite",
        "--config",
        "b.toml",
        "--against",
        "c.toml",
        "--report",
        "page.html",
    ]);
    assert_eq!(out.status.code(), Some(0), "{}", said(&out.stderr));
    let told = said(&out.stdout);
    for says in [
        "A        b.toml",
        "B        c.toml",
        "B - A",
        "right under A only",
    ] {
        assert!(told.contains(says), "{says:?} in\n{told}");
    }
    let policies: Vec<_> = told
        .lines()
        .filter_map(|line| line.split_once("image-policy=hd@"))
        .collect();
    assert_eq!(policies.len(), 2, "{told}");
    assert_ne!(policies[0].1, policies[1].1, "the revisions differ");
    assert_eq!(place.read("page.html").matches("<b>B ").count(), 2);
}

#[test]
fn what_is_not_reached_or_not_answered_ends_with_1() {
    let mut cases = cases()[3..].to_vec();
    // Words that a vocabulary of tokens cannot say in two of them.
    cases[0]["accept"] = json!(["never answered like this"]);
    let place = Place::new(&cases);
    let told = document(
        &place.eval(&["--suite", "suite", "--json", "--min", "text-only=0"]),
        0,
    );
    assert_eq!(told["floors"][0]["met"], true);
    let out = place.eval(&["--suite", "suite", "--min", "all=50"]);
    assert_eq!(out.status.code(), Some(1));
    let told = said(&out.stdout);
    assert!(
        told.contains("all reached 0.0 % under built-in defaults; 50 % is asked for"),
        "{told}"
    );

    // A file that begins like a picture and is none: the server refuses it.
    fs::write(
        place.path().join("suite/pictures/red.png"),
        b"\x89PNG\r\n\x1a\n and no more",
    )
    .unwrap();
    cases[0]["images"] = json!(["pictures/red.png"]);
    place.write_cases(&cases);
    let told = document(&place.eval(&["--suite", "suite", "--json"]), 1);
    let case = &told["runs"][0]["cases"][0];
    assert_eq!(
        (&case["verdict"], &told["runs"][0]["errors"]),
        (&json!("error"), &json!(1))
    );
    assert!(case["error"].as_str().unwrap().contains("image"), "{case}");
}

#[test]
fn broken_suites_and_wrong_words_end_with_2() {
    let place = Place::new(&cases());
    let refused = |args: &[&str], says: &str| {
        let out = place.eval(args);
        assert_eq!(
            out.status.code(),
            Some(2),
            "{args:?}: {}",
            said(&out.stderr)
        );
        let said = said(&out.stderr);
        assert!(said.contains(says), "{says:?} in {said}");
        assert!(out.stdout.is_empty());
    };
    refused(&[], "no suite is named");
    refused(
        &["--suite", "nowhere"],
        "nowhere/cases.jsonl: the suite's folder cannot be read",
    );
    refused(
        &["--suite", "suite", "--min", "size=5"],
        "it has colour, follow-up, text-only and all",
    );
    refused(&["--suite", "suite", "--min", "5"], "CATEGORY=PERCENT");
    refused(
        &["--suite", "suite", "--report", "no/such/page.html"],
        "cannot be written",
    );
    refused(&["--suite", "suite", "--against", "no.toml"], "no.toml");
    let mut broken = cases();
    broken[1]["images"] = json!(["../secret.png"]);
    broken[2]["question"] = json!(3);
    place.write_cases(&broken);
    refused(
        &["--suite", "suite"],
        "suite/cases.jsonl:2 (images[0]): \"../secret.png\" has to be a relative path",
    );
    refused(
        &["--suite", "suite"],
        "suite/cases.jsonl:3 (question): has to be a string",
    );
}

#[test]
fn a_plugin_that_cannot_be_used_is_not_judged() {
    let place = Place::new(&cases()[3..]);
    fs::create_dir(place.path().join("other")).unwrap();
    fs::write(place.path().join("other/hd.wasm"), b"\0asm").unwrap();
    place.write("b.toml", "[plugins]\nfolder = \"other\"\n");
    let out = place.eval(&["--suite", "suite", "--json", "--against", "b.toml"]);
    // The other configuration's answers are told all the same.
    let told = document(&out, 3);
    assert_eq!(
        (&told["interrupted"], &told["runs"][0]["cases"][0]["id"]),
        (&json!(true), &json!("none"))
    );
    let said = said(&out.stderr);
    assert!(
        said.contains("under b.toml the plugin") && said.contains("hd.wasm is not in use"),
        "{said}"
    );
}

#[cfg(unix)]
#[test]
fn ctrl_c_tells_what_was_done() {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;

    let case = |index| {
        let mut case = cases().remove(3);
        case["id"] = json!(format!("case-{index}"));
        case
    };
    let place = Place::new(&(0..5000).map(case).collect::<Vec<_>>());
    let mut command = place.command(&["--suite", "suite", "--json"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
    let asking = log.find(|line| line.as_ref().unwrap().starts_with("asking 5000 questions"));
    assert!(asking.is_some());
    let killed = Command::new("kill")
        .arg("-INT")
        .arg(child.id().to_string())
        .status();
    assert!(killed.unwrap().success());
    let rest: Vec<String> = log.map(Result::unwrap).collect();
    let out = child.wait_with_output().unwrap();
    let told = document(&out, 130);
    assert_eq!(told["interrupted"], true);
    assert!(told["runs"][0]["cases"].as_array().unwrap().len() < 5000);
    assert!(
        rest.iter().any(|line| line.starts_with("stopping;")),
        "{rest:?}"
    );
}

#[test]
fn the_format_is_told_by_help_and_by_the_suites_folder() {
    let place = Place::new(&cases());
    let help = said(&place.eval(&["--help"]).stdout);
    let told = fs::read_to_string(repository("tests/suite/README.md")).unwrap();
    for key in [
        "id", "category", "images", "question", "accept", "reject", "match", "history", "crops",
        "detail",
    ] {
        assert!(help.contains(&format!("\n  {key} ")), "{key} in\n{help}");
        assert!(
            told.contains(&format!("| `{key}` |")),
            "{key} in tests/suite/README.md"
        );
    }
    let out = place.eval(&["--suite", "suite", "--checkpoint", "no-such-folder"]);
    assert_eq!(out.status.code(), Some(3), "--checkpoint is --model");
    assert!(said(&out.stderr).contains("no-such-folder"));
}
