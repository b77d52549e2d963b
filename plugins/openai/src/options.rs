//! What every kind of request may ask of the answer: how it is drawn, how long it is, what ends it,
//! how many there are and how they come.

use visor_plugin_body::{Field, Wrong};

use crate::exports::visor::plugin::adapter::Sampling;

/// Strings that may end an answer; OpenAI allows as many.
const STOPS_MAX: usize = 4;

/// The fields that chats and completions share.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) model: Option<String>,
    pub(crate) sampling: Sampling,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) stop: Vec<String>,
    /// `n`
    pub(crate) count: u32,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
}

/// Reads them; `logprobs` is how many alternatives per token are to be told, each dialect asks for
/// that in its own way.
///
/// # Errors
/// What is wrong, and the path to it.
pub(crate) fn parse(body: &Field, logprobs: Option<u8>) -> Result<Options, Wrong> {
    Ok(Options {
        model: body.get("model").text()?,
        sampling: sampling(body, logprobs)?,
        max_tokens: max_tokens(body)?,
        stop: body.get("stop").strings(STOPS_MAX)?,
        count: body.get("n").optional_count(1)?.unwrap_or(1),
        stream: body.get("stream").flag()?,
        include_usage: include_usage(&body.get("stream_options"))?,
    })
}

fn include_usage(options: &Field) -> Result<bool, Wrong> {
    match options.clone().given() {
        Some(options) => options.object()?.get("include_usage").flag(),
        None => Ok(false),
    }
}

/// The most of some ranges are the host's to judge, and it names them as clients do.
fn sampling(body: &Field, logprobs: Option<u8>) -> Result<Sampling, Wrong> {
    let number =
        |key: &str, what: &str, fits: fn(f64) -> bool| body.get(key).optional_number(what, fits);
    let penalty = |key| number(key, "a number from -2 to 2", |p| (-2.0..=2.0).contains(&p));
    Ok(Sampling {
        temperature: number("temperature", "a number from 0 to 2", |t| {
            (0.0..=2.0).contains(&t)
        })?,
        top_p: number("top_p", "a number from 0 to 1", |p| {
            (0.0..=1.0).contains(&p)
        })?,
        top_k: body.get("top_k").optional_count(0)?,
        min_p: number("min_p", "a number from 0 to 1", |p| {
            (0.0..=1.0).contains(&p)
        })?,
        repetition_penalty: number("repetition_penalty", "a number above 0", |p| p > 0.0)?,
        presence_penalty: penalty("presence_penalty")?,
        frequency_penalty: penalty("frequency_penalty")?,
        logit_bias: logit_bias(&body.get("logit_bias"))?,
        seed: body.get("seed").seed()?,
        logprobs,
    })
}

/// Token ids as strings, for JSON has no other keys, and a bias for each.
fn logit_bias(bias: &Field) -> Result<Vec<(u32, f32)>, Wrong> {
    let Some(members) = bias.clone().given() else {
        return Ok(Vec::new());
    };
    let member = |(key, field): (&str, Field)| {
        let token = key.parse().map_err(|_| {
            members.wrong_value("an object whose keys are token ids, such as {\"1234\": -100}")
        })?;
        let what = "a number from -100 to 100";
        let bias = field.number(what, |bias| (-100.0..=100.0).contains(&bias))?;
        Ok((token, bias))
    };
    members.members()?.into_iter().map(member).collect()
}

/// The newer name wins where both are given.
fn max_tokens(body: &Field) -> Result<Option<u32>, Wrong> {
    let newer = body.get("max_completion_tokens").optional_count(1)?;
    let older = body.get("max_tokens").optional_count(1)?;
    Ok(newer.or(older))
}
