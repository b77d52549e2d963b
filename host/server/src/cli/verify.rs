//! `visor verify`: the comparison with the reference, printed stage by stage.

use std::io::Write;

use visor_model::{Outcome, StageResult, Totals, VerifyOptions};

use super::{EXIT_DONE, EXIT_NO, Failure, VerifyArgs};

pub(super) fn run(args: &VerifyArgs) -> Result<u8, Failure> {
    let options = VerifyOptions {
        golden: args.golden.clone(),
        tokenizer: args.tokenizer.clone(),
        checkpoint: args.checkpoint.clone(),
        device: args.device,
    };
    let mut printer = Printer {
        json: args.json,
        case: String::new(),
        error: None,
    };
    let totals = visor_model::verify(&options, &mut |result| printer.stage(result))
        .map_err(Failure::start)?;
    if let Some(error) = printer.error.take() {
        return Err(error.into());
    }
    print_totals(&totals, args.json)?;
    Ok(if totals.missed == 0 && totals.passed > 0 {
        EXIT_DONE
    } else {
        EXIT_NO
    })
}

struct Printer {
    json: bool,
    case: String,
    error: Option<std::io::Error>,
}

impl Printer {
    fn stage(&mut self, result: &StageResult) {
        if let Err(error) = self.print(result) {
            self.error.get_or_insert(error);
        }
    }

    fn print(&mut self, result: &StageResult) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        if self.json {
            serde_json::to_writer(&mut out, result)?;
            return writeln!(out);
        }
        if result.case != self.case {
            self.case.clone_from(&result.case);
            writeln!(out, "{}", result.case)?;
        }
        let verdict = match &result.outcome {
            Outcome::Pass => "pass",
            Outcome::Miss => "MISS",
            Outcome::Skipped(_) => "skip",
        };
        write!(out, "  {verdict}  {:<26}", result.stage)?;
        if let Outcome::Skipped(reason) = &result.outcome {
            return writeln!(out, " {reason}");
        }
        write!(
            out,
            " {:>10.3e} of {:>9.1e}",
            result.difference, result.tolerance
        )?;
        if !result.note.is_empty() {
            write!(out, "  {}", result.note)?;
        }
        writeln!(out)?;
        out.flush()
    }
}

fn print_totals(totals: &Totals, json: bool) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer(&mut out, &serde_json::json!({ "totals": totals }))?;
        return writeln!(out);
    }
    writeln!(
        out,
        "{} passed, {} missed, {} skipped; largest difference {:.3e}",
        totals.passed, totals.missed, totals.skipped, totals.difference_max
    )
}
