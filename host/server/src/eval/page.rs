//! An evaluation as one HTML file: every picture, question, answer and verdict, to be looked at.
//!
//! Pictures, questions and answers are hostile: everything is escaped, there is no script, and the page
//! itself forbids loading anything. Pictures are carried inside, up to [`PICTURES_BYTES_MAX`] in all.

use std::collections::BTreeSet;
use std::io::{self, Write};

use base64::Engine as _;

use super::case::Case;
use super::score::{Evaluation, Outcome, Run, Verdict};
use super::suite::{Suite, picture_type};

/// Encoded pictures in one page, in bytes; the others are left out by name.
pub const PICTURES_BYTES_MAX: usize = 64 << 20;

const STYLE: &str = include_str!("page.css");
/// The page may show what it carries, and nothing else.
const POLICY: &str = "default-src 'none'; img-src data:; style-src 'unsafe-inline'";
const LETTERS: [&str; 2] = ["A", "B"];

/// Writes the page.
///
/// # Errors
/// What the writer says.
pub fn write(out: &mut impl Write, evaluation: &Evaluation, suite: &Suite) -> io::Result<()> {
    let mut page = Page {
        out,
        evaluation,
        suite,
        picture_bytes_left: PICTURES_BYTES_MAX,
    };
    page.head()?;
    page.setups()?;
    page.figures()?;
    let categories: BTreeSet<&str> = suite.categories();
    for category in categories {
        writeln!(page.out, "<h2>{}</h2>", escaped(category))?;
        // A case that was not asked has nothing to show.
        let asked = evaluation.runs.first().map_or(0, |run| run.cases.len());
        for (index, case) in suite.cases.iter().enumerate().take(asked) {
            if case.category == category {
                page.case(index, case)?;
            }
        }
    }
    writeln!(page.out, "</body></html>")
}

struct Page<'a, W: Write> {
    out: &'a mut W,
    evaluation: &'a Evaluation,
    suite: &'a Suite,
    picture_bytes_left: usize,
}

impl<W: Write> Page<'_, W> {
    fn head(&mut self) -> io::Result<()> {
        let name = escaped(&self.evaluation.suite);
        writeln!(
            self.out,
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>visor eval: {name}</title>\n<style>\n{STYLE}</style></head><body>\n<h1>{name}</h1>"
        )
    }

    /// Under what it ran, and what it cost.
    fn setups(&mut self) -> io::Result<()> {
        for (run, letter) in self.evaluation.runs.iter().zip(LETTERS) {
            let setup = &run.setup;
            writeln!(
                self.out,
                "<p><b>{letter}</b> {}: {} on {}, {:.1} s for all, {:.3} s median, {:.3} s at 95 %{}\n{}</p>",
                escaped(&setup.configuration),
                escaped(&setup.model),
                escaped(&setup.device),
                run.times.total_s,
                run.times.median_s,
                run.times.p95_s,
                setup
                    .peak_resident_mib
                    .map(|mib| format!(", {mib} MiB resident at most"))
                    .unwrap_or_default(),
                escaped(&setup.plugins),
            )?;
        }
        if self.evaluation.interrupted {
            writeln!(self.out, "<p>Stopped before every question was asked.</p>")?;
        }
        Ok(())
    }

    fn figures(&mut self) -> io::Result<()> {
        let Some(first) = self.evaluation.runs.first() else {
            return Ok(());
        };
        let runs = &self.evaluation.runs;
        write!(self.out, "<table><tr><th>category</th>")?;
        for letter in LETTERS.iter().take(runs.len()) {
            write!(
                self.out,
                "<th class=n>{letter} right</th><th class=n>%</th>"
            )?;
        }
        writeln!(self.out, "</tr>")?;
        for tally in &first.categories {
            write!(self.out, "<tr><td>{}</td>", escaped(&tally.category))?;
            for run in runs {
                let cells = run.tally(&tally.category).map(|tally| {
                    let (right, cases, percent) = (tally.right, tally.cases, tally.percent);
                    format!("<td class=n>{right}/{cases}</td><td class=n>{percent:.1}</td>")
                });
                let cells = cells.unwrap_or_else(|| "<td class=n>-</td>".repeat(2));
                write!(self.out, "{cells}")?;
            }
            writeln!(self.out, "</tr>")?;
        }
        writeln!(self.out, "</table>")?;
        let Some(changes) = &self.evaluation.changes else {
            return Ok(());
        };
        for (letter, ids) in LETTERS.iter().zip([&changes.lost, &changes.won]) {
            let links = ids.iter().map(|id| {
                let id = escaped(id);
                format!(" <a href=\"#{id}\">{id}</a>")
            });
            let (count, links) = (ids.len(), links.collect::<String>());
            writeln!(self.out, "<p>right under {letter} only: {count}{links}</p>")?;
        }
        Ok(())
    }

    fn case(&mut self, index: usize, case: &Case) -> io::Result<()> {
        let id = escaped(&case.id);
        writeln!(self.out, "<article id=\"{id}\"><div class=pictures>")?;
        for image in &case.images {
            self.picture(image)?;
        }
        writeln!(self.out, "</div><div class=text><h3>{id}</h3>")?;
        for turn in &case.history {
            let (question, answer) = (escaped(&turn.question), escaped(&turn.answer));
            writeln!(self.out, "<p class=earlier>{question}\n{answer}</p>")?;
        }
        writeln!(
            self.out,
            "<p class=question>{}</p>",
            escaped(&case.question)
        )?;
        let runs: &[Run] = &self.evaluation.runs;
        for (run, letter) in runs.iter().zip(LETTERS) {
            let letter = if runs.len() == 2 { letter } else { "" };
            if let Some(outcome) = run.cases.get(index) {
                self.answer(outcome, letter)?;
            }
        }
        let list = |phrases: &[String]| escaped(&phrases.join(" | "));
        writeln!(
            self.out,
            "<p class=accepted>accepted: {}",
            list(&case.accept)
        )?;
        if !case.reject.is_empty() {
            writeln!(self.out, "not accepted: {}", list(&case.reject))?;
        }
        writeln!(self.out, "</p></div></article>")
    }

    fn answer(&mut self, outcome: &Outcome, letter: &str) -> io::Result<()> {
        let verdict = outcome.verdict.as_str();
        let said = match (&outcome.error, outcome.verdict) {
            (Some(error), Verdict::Error) => error,
            _ => outcome.answer.trim(),
        };
        let cut = if outcome.cut { " (cut)" } else { "" };
        writeln!(
            self.out,
            "<p class=\"answer {verdict}\"><b>{letter} {verdict}</b> {}{cut}\n<span class=note>{:.2} s, {} image tokens</span></p>",
            escaped(said),
            outcome.seconds,
            outcome.image_tokens,
        )
    }

    fn picture(&mut self, image: &str) -> io::Result<()> {
        let note = |why: &str| format!("<p class=note>{}: {}</p>", escaped(image), escaped(why));
        let shown = match self.suite.picture(image) {
            Err(why) => note(&why),
            Ok(bytes) if bytes.len() > self.picture_bytes_left => {
                note("left out, the page is full")
            }
            Ok(bytes) => match picture_type(&bytes) {
                None => note("is no picture"),
                Some(kind) => {
                    self.picture_bytes_left -= bytes.len();
                    let data = base64::engine::general_purpose::STANDARD.encode(bytes);
                    let name = escaped(image);
                    format!(
                        "<img alt=\"{name}\" title=\"{name}\" src=\"data:{kind};base64,{data}\">"
                    )
                }
            },
        };
        writeln!(self.out, "{shown}")
    }
}

/// A text that means nothing to a browser, in an element or in a quoted attribute.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.push('\u{FFFD}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::score::Verdict::{Right, Wrong};
    use super::super::score::tests::{evaluation, run};
    use super::super::suite::CASES_FILE;
    use super::*;

    const PNG: &[u8] = b"\x89PNG\r\n\x1a\n and the rest";
    const ATTACK: &str = "</p><script>alert(1)</script>\" onerror='x' &amp;";

    fn suite() -> (tempfile::TempDir, Suite) {
        let folder = tempfile::tempdir().unwrap();
        let case = |id: &str, category: &str, image: &str| {
            serde_json::json!({
                "id": id, "category": category, "images": [image],
                "question": ATTACK, "accept": [ATTACK], "reject": ["no"],
                "history": [{"question": ATTACK, "answer": ATTACK}],
            })
            .to_string()
        };
        let cases = [
            case("case-0", "a", "a.png"),
            case("case-1", "b", "a'<b>.png"),
        ];
        std::fs::write(folder.path().join(CASES_FILE), cases.join("\n")).unwrap();
        for name in ["a.png", "a'<b>.png"] {
            std::fs::write(folder.path().join(name), PNG).unwrap();
        }
        let suite = Suite::load(folder.path(), 64).unwrap();
        (folder, suite)
    }

    fn page(evaluation: &Evaluation, suite: &Suite) -> String {
        let mut out = Vec::new();
        write(&mut out, evaluation, suite).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn nothing_hostile_reaches_the_browser() {
        let (_folder, suite) = suite();
        let mut evaluation = evaluation(vec![run("a", &[Right, Wrong]), run("b", &[Wrong, Right])]);
        evaluation.suite = ATTACK.to_owned();
        for run in &mut evaluation.runs {
            run.setup.model = ATTACK.to_owned();
            run.cases[0].answer = ATTACK.to_owned();
        }
        let page = page(&evaluation, &suite);
        assert!(
            !page.contains("<script") && !page.contains("</p><s"),
            "{page}"
        );
        assert!(
            !page.contains("onerror='") && !page.contains("<b>.png"),
            "{page}"
        );
        assert!(page.contains("&lt;/p&gt;&lt;script&gt;alert(1)"));
        assert!(page.contains("&quot; onerror=&#39;x&#39; &amp;amp;"));
        assert!(page.contains("default-src 'none'"));
        assert_eq!(page.matches("src=\"data:image/png;base64,").count(), 2);
    }

    #[test]
    fn both_answers_stand_at_each_question() {
        let (_folder, suite) = suite();
        let two = evaluation(vec![run("a", &[Right, Wrong]), run("b", &[Wrong, Right])]);
        let page_of_two = page(&two, &suite);
        assert_eq!(page_of_two.matches("<article id=\"case-").count(), 2);
        assert!(page_of_two.contains("right under A only: 1 <a href=\"#case-0\">case-0</a>"));
        assert_eq!(page_of_two.matches("<b>A right</b> answer 0").count(), 1);
        assert_eq!(page_of_two.matches("<b>B wrong</b> answer 0").count(), 1);
        assert!(page_of_two.contains("<td class=n>1/1</td><td class=n>100.0</td>"));
        let half = evaluation(vec![run("a", &[Right])]);
        assert_eq!(page(&half, &suite).matches("<article ").count(), 1);
    }

    #[test]
    fn control_characters_are_not_passed_on() {
        assert_eq!(
            escaped("a\u{1b}[31m\0\n\tb\u{85}"),
            "a\u{FFFD}[31m\u{FFFD}\n\tb\u{FFFD}"
        );
    }

    #[test]
    fn a_picture_that_is_gone_or_too_much_is_named() {
        let (folder, suite) = suite();
        std::fs::remove_file(folder.path().join("a.png")).unwrap();
        let told = page(&evaluation(vec![run("a", &[Right, Right])]), &suite);
        assert!(told.contains("a.png: cannot be read"), "{told}");
        let mut out = Vec::new();
        let mut full = Page {
            out: &mut out,
            evaluation: &evaluation(vec![]),
            suite: &suite,
            picture_bytes_left: PNG.len() - 1,
        };
        full.picture("a'<b>.png").unwrap();
        assert!(String::from_utf8(out).unwrap().contains("the page is full"));
    }
}
