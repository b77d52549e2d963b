//! Counting, and runs for the tests of what is told.

use super::*;
use Verdict::{Error, Right, Wrong};

/// A run of one case per verdict, in categories `a` and `b` by turns.
pub(in crate::eval) fn run(name: &str, verdicts: &[Verdict]) -> Run {
    let outcome = |(index, verdict): (usize, &Verdict)| Outcome {
        id: format!("case-{index}"),
        category: ["a", "b"][index % 2].to_owned(),
        verdict: *verdict,
        answer: format!("answer {index}"),
        error: (*verdict == Error).then(|| "refused".to_owned()),
        seconds: 0.5 * (index + 1) as f64,
        cut: false,
        prompt_tokens: 10,
        image_tokens: [0, 313][index % 2],
        completion_tokens: 3,
    };
    let setup = Setup {
        configuration: name.to_owned(),
        ..Setup::default()
    };
    Run::new(setup, verdicts.iter().enumerate().map(outcome).collect())
}

/// Of runs over a suite whose cases do not matter.
pub(in crate::eval) fn evaluation(runs: Vec<Run>) -> Evaluation {
    let changes = match runs.as_slice() {
        [first, second] => Some(Changes::between(first, second)),
        _ => None,
    };
    Evaluation {
        suite: "suite".to_owned(),
        cases: runs.first().map_or(0, |run| run.cases.len()),
        max_tokens: 8,
        interrupted: false,
        runs,
        changes,
        floors: Vec::new(),
    }
}

#[test]
fn verdicts_are_counted_by_category_and_in_all() {
    let run = run("x", &[Right, Wrong, Right, Right, Error]);
    let told: Vec<_> = run
        .categories
        .iter()
        .map(|tally| (tally.category.as_str(), tally.right, tally.cases))
        .collect();
    assert_eq!(told, [("a", 2, 3), ("b", 1, 2), ("all", 3, 5)]);
    assert!((run.tally("b").unwrap().percent - 50.0).abs() < 1e-9);
    assert_eq!((run.errors, run.image_tokens_mean), (1, Some(313.0)));
}

#[test]
fn times_are_measured_ones() {
    let times = |seconds: &[f64]| Times::of(seconds.to_vec());
    assert_eq!(times(&[]), Times::default());
    let one = times(&[2.0]);
    assert_eq!((one.total_s, one.median_s, one.p95_s), (2.0, 2.0, 2.0));
    let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
    let hundred = times(&hundred);
    assert_eq!((hundred.median_s, hundred.p95_s), (50.0, 95.0));
}

#[test]
fn changes_name_the_cases_of_both_directions() {
    let first = run("first", &[Right, Wrong, Right, Error]);
    let second = run("second", &[Wrong, Right, Right]);
    let changes = Changes::between(&first, &second);
    assert_eq!(changes.lost, ["case-0"]);
    assert_eq!(changes.won, ["case-1"]);
}

#[test]
fn floors_hold_every_run_and_nothing_half_done() {
    let floors: Vec<Floor> = ["a=50", "all=50", "b=0"]
        .iter()
        .map(|text| text.parse().unwrap())
        .collect();
    let good = evaluation(vec![run("x", &[Right, Wrong])]).judged(&floors);
    assert!(good.is_good() && good.floors.len() == 3);
    let runs = || vec![run("x", &[Right, Wrong]), run("y", &[Wrong, Wrong])];
    let bad = evaluation(runs()).judged(&floors);
    let missed: Vec<_> = bad
        .floors
        .iter()
        .filter(|floor| !floor.met)
        .map(|floor| (floor.configuration.as_str(), floor.category.as_str()))
        .collect();
    assert_eq!(missed, [("y", "a"), ("y", "all")]);
    assert!(!bad.is_good());
    let mut half = evaluation(runs());
    half.interrupted = true;
    assert!(half.judged(&floors).floors.is_empty());
    let refused = evaluation(vec![run("x", &[Right, Error])]);
    assert!(!refused.is_good(), "a refused question is not a good run");
}

#[test]
fn a_floor_is_a_category_and_a_percent() {
    let floor: Floor = "yes-no=87.5".parse().unwrap();
    assert_eq!(
        (floor.category.as_str(), floor.percent_min),
        ("yes-no", 87.5)
    );
    for wrong in ["", "a", "a=", "=5", "a=101", "a=-1", "a=NaN"] {
        assert!(wrong.parse::<Floor>().is_err(), "{wrong:?}");
    }
}
