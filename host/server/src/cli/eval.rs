//! `visor eval`: a suite through the server's own path, under one configuration or two.
//!
//! This room asks; what a suite is, when an answer is right and how it is told is `crate::eval`'s.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::anyhow;
use tokio_util::sync::CancellationToken;

use super::client::{Client, Question};
use super::progress::{self, Counting};
use super::signals::stop_signal;
use super::start::{private_config, ready_house, start_log};
use super::{EXIT_DONE, EXIT_NO, EXIT_STOPPED, EvalArgs, Failure};
use crate::config::Config;
use crate::eval::case::ALL_CATEGORIES;
use crate::eval::{Case, Evaluation, Outcome, Run, Setup, Suite, Verdict, page, table};
use crate::pipeline;
use crate::stats::Memory;
use crate::wiring::House;

/// Looked for when no suite is named: where Visor's repository keeps its own.
const OWN_SUITE: &str = "tests/suite";
/// Told when there is none.
const NO_SUITE: &str = "no suite is named, and there is no tests/suite here: --suite DIR takes a folder with \
    cases.jsonl and pictures (`visor eval --help` shows the format)";

/// Shown by `visor eval --help`.
pub(super) const HELP: &str = "\
A suite is a folder with pictures and a file cases.jsonl, one JSON object a line:

  {\"id\": \"cup-1\", \"category\": \"colour\", \"images\": [\"pictures/cup.png\"],
   \"question\": \"Which colour is the cup?\", \"accept\": [\"red\", \"dark red\"]}

  id        unique; letters, digits and - _ . /
  category  what it is counted under
  images    JPEG, PNG or WebP by path inside the folder; [] asks without a picture
  question  what is asked
  accept    accepted answers, at least one
  reject    optional: with any of these in it an answer is wrong
  match     optional: how answers are compared
              words   has one accepted phrase as whole words, letter case apart (the default)
              all     has every accepted phrase
              exact   is one accepted phrase and no more
              text    has one accepted text as it is written, letter case included
              yes-no  its first word is the accepted yes or no
  history   optional: earlier turns, [{\"question\": .., \"answer\": ..}]; the pictures belong to the first
  crops     optional: most crops of each picture, as a client asks with num_crops
  detail    optional, instead of crops: low, auto or high

A case without crops and detail is looked at as the configuration says: to compare one crop with four,
run with --against a file that says [plugins.hd.config] auto_crops = 1; to judge an image policy, with one
that says [plugins] folder = \"other-plugins\". Flags and environment hold for both configurations.

Answers are greedy and never taken from the response cache. Exit code 1: a question was refused, or a
--min was missed. 130: stopped by Ctrl-C; what was done is told.";

/// A configuration under its name.
struct Candidate {
    name: String,
    config: Config,
}

pub(super) fn run(args: &EvalArgs) -> Result<u8, Failure> {
    let own = Path::new(OWN_SUITE);
    let folder = args.suite.as_deref().or(own.is_dir().then_some(own));
    let folder = folder.ok_or_else(|| Failure::usage(anyhow!(NO_SUITE)))?;
    let candidates = candidates(args)?;
    let picture_bytes = candidates.iter().map(|one| one.config.images.bytes_max);
    let suite = Suite::load(folder, picture_bytes.max().unwrap_or(0)).map_err(Failure::usage)?;
    check_floors(args, &suite)?;
    let report = args.report.as_deref().map(create).transpose()?;
    if let Some(first) = candidates.first() {
        start_log(&first.config)?;
    }
    let stop = stop_signal()?;
    let mut runs = Vec::new();
    let failed = candidates
        .into_iter()
        .try_for_each(|candidate| {
            if !stop.is_cancelled() {
                runs.push(measure(&suite, candidate, args.max_tokens, &stop)?);
            }
            Ok(())
        })
        .err();
    if runs.is_empty() {
        return failed.map_or(Ok(EXIT_STOPPED), Err);
    }
    // What was measured is told even when the other configuration cannot start.
    let halted = failed.is_some() || stop.is_cancelled();
    let evaluation = Evaluation::new(&suite, args.max_tokens, halted, runs).judged(&args.min);
    tell(args, &evaluation, &suite, report)?;
    match failed {
        Some(failure) => Err(failure),
        None if halted => Ok(EXIT_STOPPED),
        None if evaluation.is_good() => Ok(EXIT_DONE),
        None => Ok(EXIT_NO),
    }
}

/// The configuration in force, and the one it is held against.
fn candidates(args: &EvalArgs) -> Result<Vec<Candidate>, Failure> {
    let mut all = vec![args.overrides.clone()];
    if let Some(against) = &args.against {
        let mut other = args.overrides.clone();
        other.config = Some(against.clone());
        all.push(other);
    }
    let read = |overrides| {
        let (mut config, file): (Config, Option<PathBuf>) = private_config(&overrides)?;
        config.cache.responses_mib = 0;
        let name = file.map_or("built-in defaults".to_owned(), |file| {
            file.display().to_string()
        });
        Ok(Candidate { name, config })
    };
    let candidates: Vec<Candidate> = all.into_iter().map(read).collect::<Result<_, Failure>>()?;
    if let [first, second] = candidates.as_slice()
        && first.config == second.config
    {
        progress::line(
            "note: both configurations come to the same; flags and environment win over both files",
        );
    }
    Ok(candidates)
}

/// A floor under a category that is not there would never be missed.
fn check_floors(args: &EvalArgs, suite: &Suite) -> Result<(), Failure> {
    let categories = suite.categories();
    for floor in &args.min {
        let category = floor.category.as_str();
        if category != ALL_CATEGORIES && !categories.contains(category) {
            let known: Vec<&str> = categories.iter().copied().collect();
            return Err(Failure::usage(anyhow!(
                "--min {category:?}: the suite has no such category, it has {} and {ALL_CATEGORIES}",
                known.join(", ")
            )));
        }
    }
    Ok(())
}

/// Made before anything is measured, so that a wrong path costs nothing.
fn create(path: &Path) -> Result<File, Failure> {
    File::create(path)
        .map_err(|error| Failure::usage(anyhow!("{} cannot be written: {error}", path.display())))
}

/// Asks every question under one configuration, or as many as there is time for.
fn measure(
    suite: &Suite,
    candidate: Candidate,
    max_tokens: u32,
    stop: &CancellationToken,
) -> Result<Run, Failure> {
    let Candidate { name, config } = candidate;
    Memory::forget_peak();
    let loading = Instant::now();
    let house = ready_house(config)?;
    let load_s = loading.elapsed().as_secs_f64();
    check_plugins(&house, &name)?;
    if house.model_is_demo() {
        progress::line("note: this is the small demo model inside the binary (see --model)");
    }
    let client = Client::new(&house).map_err(Failure::start)?;
    let total = suite.cases.len();
    progress::line(&format!("asking {total} questions under {name}"));
    let mut counting = Counting::new(total);
    let mut outcomes = Vec::with_capacity(total);
    for case in &suite.cases {
        let Some(outcome) = ask(&client, &question(suite, case, max_tokens), case, stop) else {
            break;
        };
        outcomes.push(outcome);
        counting.step(outcomes.len());
    }
    counting.finish();
    let plugins = house.pin(client.path());
    let setup = Setup {
        configuration: name,
        model: house.model.id.clone(),
        device: house.device_name(),
        plugins: plugins.map_or(String::new(), |pinned| pipeline::plugins_header(&pinned)),
        load_s,
        peak_resident_mib: Memory::now().peak_bytes.map(|bytes| bytes >> 20),
    };
    house.stop();
    Ok(Run::new(setup, outcomes))
}

/// A plugin that was refused would leave the shipped one to be judged in its place.
fn check_plugins(house: &House, name: &str) -> Result<(), Failure> {
    match house.plugin_errors().first() {
        None => Ok(()),
        Some(error) => {
            house.stop();
            Err(Failure::start(anyhow!(
                "under {name} the plugin {} is not in use: {}",
                error.path.display(),
                error.message
            )))
        }
    }
}

/// The question a client would send; why not, when a picture has gone since the suite was checked.
fn question(suite: &Suite, case: &Case, max_tokens: u32) -> Result<Question, String> {
    let images = case.images.iter().map(|image| {
        let named = |error| format!("{image:?} {error}");
        suite.picture(image).map_err(named)
    });
    Ok(Question {
        text: case.question.clone(),
        images: images.collect::<Result<_, _>>()?,
        history: case
            .history
            .iter()
            .map(|turn| (turn.question.clone(), turn.answer.clone()))
            .collect(),
        detail: case.detail.clone(),
        crops: case.crops,
        max_tokens: Some(max_tokens),
        temperature: Some(0.0),
        ..Question::default()
    })
}

/// Asks one question; nothing when it was stopped before the answer was through.
fn ask(
    client: &Client,
    question: &Result<Question, String>,
    case: &Case,
    stop: &CancellationToken,
) -> Option<Outcome> {
    let began = Instant::now();
    let mut answer = String::new();
    let asked = match question {
        Err(why) => Err(anyhow!("{why}")),
        Ok(question) => client
            .ask_unless(
                question,
                &mut |piece| answer.push_str(piece),
                stop.cancelled(),
            )
            .transpose()?,
    };
    let seconds = began.elapsed().as_secs_f64();
    let (verdict, error, ending) = match asked {
        Err(error) => (Verdict::Error, Some(format!("{error:#}")), None),
        Ok(ending) if case.rule.is_right(&answer, &case.accept, &case.reject) => {
            (Verdict::Right, None, Some(ending))
        }
        Ok(ending) => (Verdict::Wrong, None, Some(ending)),
    };
    let ending = ending.unwrap_or_default();
    Some(Outcome {
        id: case.id.clone(),
        category: case.category.clone(),
        verdict,
        answer,
        error,
        seconds,
        cut: ending.finish_reason.as_deref() == Some("length"),
        prompt_tokens: ending.prompt_tokens,
        image_tokens: ending.image_tokens,
        completion_tokens: ending.completion_tokens,
    })
}

/// Writes the page, then the table or the document.
fn tell(
    args: &EvalArgs,
    evaluation: &Evaluation,
    suite: &Suite,
    report: Option<File>,
) -> Result<(), Failure> {
    if let Some(file) = report {
        let mut file = BufWriter::new(file);
        page::write(&mut file, evaluation, suite)?;
        file.flush()?;
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer(&mut out, evaluation).map_err(std::io::Error::from)?;
        writeln!(out)?;
    } else {
        table::write(&mut out, evaluation)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Args, Command};

    fn parsed(words: &[&str]) -> EvalArgs {
        let words = ["visor", "eval"].iter().chain(words);
        match Args::try_parse_from(words).unwrap().command {
            Some(Command::Eval(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_hold_for_both_configurations_and_no_answer_is_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let file = folder.path().join(name);
            std::fs::write(&file, text).unwrap();
            file.to_str().unwrap().to_owned()
        };
        let first = file("a.toml", "[cache]\nresponses_mib = 8\n");
        let second = file(
            "b.toml",
            "[cache]\nresponses_mib = 9\npixels_mib = 1\n[model]\nserved_name = \"b\"\n",
        );
        let words = ["--config", &first, "--against", &second, "--model", "m"];
        let both = candidates(&parsed(&words)).unwrap();
        let names: Vec<_> = both.iter().map(|one| one.name.as_str()).collect();
        assert_eq!(names, [first.as_str(), second.as_str()]);
        for one in &both {
            assert_eq!(one.config.cache.responses_mib, 0);
            assert_eq!(one.config.model.path, Path::new("m"));
        }
        assert_eq!(both[0].config.model.served_name, "");
        assert_eq!(both[1].config.model.served_name, "b");
        assert_eq!(both[1].config.cache.pixels_mib, 1, "the rest is as it says");
    }

    #[test]
    fn a_wrong_floor_is_a_wrong_command_line() {
        let words = ["visor", "eval", "--min", "colour=many"];
        let error = Args::try_parse_from(words).unwrap_err().to_string();
        assert!(error.contains("CATEGORY=PERCENT"), "{error}");
        let args = parsed(&["--min", "all=5", "--min", "a-b=99.5"]);
        assert_eq!(args.min.len(), 2);
    }
}
