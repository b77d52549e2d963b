//! An evaluation as text for a terminal: one column per configuration, and what changed between two.

use std::io::{self, Write};

use super::score::{Changes, Evaluation, Run, Tally};

/// Names of the runs where there are two.
const LETTERS: [&str; 2] = ["A", "B"];

/// Writes everything but the single answers.
///
/// # Errors
/// What the writer says.
pub fn write(out: &mut impl Write, evaluation: &Evaluation) -> io::Result<()> {
    let Evaluation { suite, cases, .. } = evaluation;
    writeln!(out, "suite    {suite}, {cases} cases")?;
    let two = evaluation.runs.len() == 2;
    for (run, letter) in evaluation.runs.iter().zip(LETTERS) {
        let letter = if two { letter } else { "config" };
        let setup = &run.setup;
        let (model, device) = (&setup.model, &setup.device);
        writeln!(
            out,
            "{letter:<8} {}: {model} on {device}",
            setup.configuration
        )?;
        writeln!(out, "         {}", setup.plugins)?;
    }
    writeln!(out)?;
    accuracy(out, evaluation)?;
    writeln!(out)?;
    for (run, letter) in evaluation.runs.iter().zip(LETTERS) {
        costs(out, run, if two { letter } else { "" })?;
    }
    if let Some(changes) = &evaluation.changes {
        tell_changes(out, changes)?;
    }
    verdict(out, evaluation)
}

fn accuracy(out: &mut impl Write, evaluation: &Evaluation) -> io::Result<()> {
    let Some(first) = evaluation.runs.first() else {
        return writeln!(out, "nothing was asked");
    };
    let second = evaluation.runs.get(1);
    let widths = first
        .categories
        .iter()
        .map(|tally| tally.category.chars().count());
    let width = widths.max().unwrap_or(0).max("category".len());
    write!(out, "{:width$}  {:>9}       %", "category", "right")?;
    match second {
        Some(_) => writeln!(out, "  {:>9}       %  {:>7}", "B right", "B - A")?,
        None => writeln!(out)?,
    }
    for tally in &first.categories {
        write!(out, "{:width$}  {}", tally.category, cells(Some(tally)))?;
        if let Some(second) = second {
            let other = second.tally(&tally.category);
            write!(out, "  {}", cells(other))?;
            if let Some(other) = other {
                write!(out, "  {:>+7.1}", other.percent - tally.percent)?;
            }
        }
        writeln!(out)?;
    }
    Ok(())
}

fn cells(tally: Option<&Tally>) -> String {
    tally.map_or_else(
        || format!("{:>9}  {:>6}", "-", "-"),
        |tally| {
            let share = format!("{}/{}", tally.right, tally.cases);
            format!("{share:>9}  {:>6.1}", tally.percent)
        },
    )
}

fn costs(out: &mut impl Write, run: &Run, letter: &str) -> io::Result<()> {
    let lead = if letter.is_empty() {
        String::new()
    } else {
        format!("{letter}  ")
    };
    let times = run.times;
    writeln!(
        out,
        "{lead}seconds       {:.1} for all, {:.3} median, {:.3} at 95 %; loaded in {:.2}",
        times.total_s, times.median_s, times.p95_s, run.setup.load_s
    )?;
    if let Some(mean) = run.image_tokens_mean {
        writeln!(
            out,
            "{lead}image tokens  {mean:.0} a question with pictures"
        )?;
    }
    match run.setup.peak_resident_mib {
        Some(mib) => writeln!(out, "{lead}peak memory   {mib} MiB resident"),
        None => writeln!(out, "{lead}peak memory   unknown: this system does not say"),
    }
}

fn tell_changes(out: &mut impl Write, changes: &Changes) -> io::Result<()> {
    writeln!(out)?;
    for (what, ids) in [
        ("right under A only", &changes.lost),
        ("right under B only", &changes.won),
    ] {
        let colon = if ids.is_empty() { "" } else { ": " };
        writeln!(out, "{what}  {}{colon}{}", ids.len(), ids.join(", "))?;
    }
    Ok(())
}

/// What decides the exit code.
fn verdict(out: &mut impl Write, evaluation: &Evaluation) -> io::Result<()> {
    for run in &evaluation.runs {
        if run.errors > 0 {
            let (errors, name) = (run.errors, &run.setup.configuration);
            let first = run.cases.iter().find_map(|case| {
                let error = case.error.as_deref()?;
                Some(format!("{}: {}", case.id, error.escape_debug()))
            });
            let first = first.unwrap_or_default();
            writeln!(out, "{errors} not answered under {name}, such as {first}")?;
        }
    }
    for floor in evaluation.floors.iter().filter(|floor| !floor.met) {
        writeln!(
            out,
            "{} reached {:.1} % under {}; {} % is asked for",
            floor.category, floor.percent, floor.configuration, floor.percent_min
        )?;
    }
    if evaluation.interrupted {
        let asked: usize = evaluation.runs.iter().map(|run| run.cases.len()).sum();
        writeln!(
            out,
            "interrupted after {asked} questions: the figures are of those"
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::score::Verdict::{Error, Right, Wrong};
    use super::super::score::tests::{evaluation, run};
    use super::*;

    fn told(evaluation: &Evaluation) -> String {
        let mut out = Vec::new();
        write(&mut out, evaluation).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn one_run_is_a_table() {
        let told = told(&evaluation(vec![run("visor.toml", &[Right, Wrong, Right])]));
        for says in [
            "suite    suite, 3 cases",
            "config   visor.toml: ",
            "category      right       %\n",
            "a               2/2   100.0\n",
            "b               0/1     0.0\n",
            "all             2/3    66.7\n",
            "image tokens  313 a question",
        ] {
            assert!(told.contains(says), "{says:?} in\n{told}");
        }
        assert!(!told.contains("B right") && !told.contains("not answered"));
    }

    #[test]
    fn two_runs_stand_side_by_side() {
        let runs = vec![
            run("a.toml", &[Right, Wrong, Right, Error]),
            run("b.toml", &[Wrong, Right, Right, Right]),
        ];
        let floors = ["a=60".parse().unwrap()];
        let told = told(&evaluation(runs).judged(&floors));
        for says in [
            "A        a.toml: ",
            "B        b.toml: ",
            "a               2/2   100.0        1/2    50.0    -50.0\n",
            "b               0/2     0.0        2/2   100.0   +100.0\n",
            "right under A only  1: case-0\n",
            "right under B only  2: case-1, case-3\n",
            "1 not answered under a.toml, such as case-3: refused\n",
            "a reached 50.0 % under b.toml; 60 % is asked for\n",
        ] {
            assert!(told.contains(says), "{says:?} in\n{told}");
        }
    }

    #[test]
    fn a_second_run_that_was_stopped_leaves_gaps() {
        let mut half = evaluation(vec![run("a", &[Right, Right]), run("b", &[Right])]);
        half.interrupted = true;
        let told = told(&half);
        assert!(
            told.contains("b               1/1   100.0          -       -\n"),
            "{told}"
        );
        assert!(told.contains("interrupted after 3 questions"), "{told}");
    }
}
