//! `visor ask`: one answer, written as it comes.

use std::io::Write;

use super::client::{Client, Question};
use super::start::{private_config, read_picture, ready_house, start_log};
use super::{AskArgs, EXIT_DONE, Failure, progress};

pub(super) fn run(args: &AskArgs) -> Result<u8, Failure> {
    let files = std::iter::once(&args.image).chain(&args.more);
    let (config, _) = private_config(&args.overrides)?;
    let images = files
        .map(|file| read_picture(file, &config))
        .collect::<Result<_, _>>()?;
    let question = Question {
        text: args.question.clone(),
        system: args.system.clone(),
        detail: args.detail.clone(),
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        seed: args.seed,
        images,
        ..Question::default()
    };
    start_log(&config)?;
    let house = ready_house(config)?;
    if house.model_is_demo() {
        progress::line(
            "note: this is the small demo model inside the binary; it knows simple pictures (see --model)",
        );
    }
    let client = Client::new(&house).map_err(Failure::start)?;
    let mut written = Ok(());
    let asked = client.ask(&question, &mut |piece| {
        if written.is_ok() {
            let mut out = std::io::stdout().lock();
            written = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
        }
    });
    house.stop();
    let ending = asked.map_err(Failure::no)?;
    written?;
    writeln!(std::io::stdout().lock())?;
    if ending.finish_reason.as_deref() == Some("length") {
        progress::line("note: cut at the token limit (see --max-tokens)");
    }
    Ok(EXIT_DONE)
}
