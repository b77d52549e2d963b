//! Conversions of an adapter's plain data between `wit/` and this crate.

use wasmtime::component::{ResourceTable, ResourceTableError};

use crate::adapter::types::{
    Event, Frame, Generation, Head, Input, Next, OutputFormat, Progress, Response, Route, Sampling,
    Source, Step, TokenChance, TokenInfo, ToolChoice,
};
use crate::bindings::adapter::exports::visor::plugin::adapter as wit;
use crate::bindings::adapter::visor::plugin::media;

impl From<wit::Route> for Route {
    fn from(route: wit::Route) -> Self {
        Self {
            method: route.method,
            path: route.path,
            body_bytes_max: route.max_body,
        }
    }
}

impl From<wit::Response> for Response {
    fn from(response: wit::Response) -> Self {
        Self {
            status: response.status,
            headers: response.headers,
            body: response.body,
        }
    }
}

impl From<wit::Head> for Head {
    fn from(head: wit::Head) -> Self {
        Self {
            status: head.status,
            headers: head.headers,
            incremental: head.incremental,
        }
    }
}

/// Takes the blobs that a step hands over out of the instance's table.
pub(crate) fn step(step: wit::Step, table: &mut ResourceTable) -> Result<Step, ResourceTableError> {
    Ok(match step {
        wit::Step::Respond(response) => Step::Respond(response.into()),
        wit::Step::Generate((head, plans)) => {
            Step::Generate(head.into(), generations(plans, table)?)
        }
    })
}

/// Takes the blobs that a progress hands over out of the instance's table.
pub(crate) fn progress(
    progress: wit::Progress,
    table: &mut ResourceTable,
) -> Result<Progress, ResourceTableError> {
    let next = match progress.next {
        wit::Next::More => Next::More,
        wit::Next::End => Next::End,
        wit::Next::Generate(plans) => Next::Generate(generations(plans, table)?),
    };
    Ok(Progress {
        bytes: progress.bytes,
        next,
        frame: progress.frame.map(Into::into),
    })
}

impl From<wit::Frame> for Frame {
    fn from(frame: wit::Frame) -> Self {
        Self {
            generation: frame.generation,
            choice: frame.choice,
            before: frame.before,
            after: frame.after,
        }
    }
}

fn generations(
    plans: Vec<wit::Generation>,
    table: &mut ResourceTable,
) -> Result<Vec<Generation>, ResourceTableError> {
    plans
        .into_iter()
        .map(|plan| generation(plan, table))
        .collect()
}

fn generation(
    plan: wit::Generation,
    table: &mut ResourceTable,
) -> Result<Generation, ResourceTableError> {
    let mut images = Vec::with_capacity(plan.images.len());
    for image in plan.images {
        images.push(match image {
            media::Source::Blob(handle) => Source::Blob(table.delete(handle)?),
            media::Source::Url(url) => Source::Url(url),
        });
    }
    Ok(Generation {
        model: plan.model,
        input: match plan.input {
            wit::Input::Chat(messages) => {
                Input::Chat(messages.into_iter().map(Into::into).collect())
            }
            wit::Input::Text(text) => Input::Text(text),
        },
        images,
        sampling: plan.sampling.into(),
        tokens_max: plan.max_tokens,
        stop: plan.stop,
        format: plan.format.into(),
        tools: plan.tools.into_iter().map(Into::into).collect(),
        tool_choice: plan.tool_choice.into(),
        parallel_tools: plan.parallel_tools,
        count: plan.count,
        extensions: plan.extensions,
    })
}

impl From<wit::Sampling> for Sampling {
    fn from(sampling: wit::Sampling) -> Self {
        Self {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: sampling.logit_bias,
            seed: sampling.seed,
            logprobs: sampling.logprobs,
        }
    }
}

impl From<wit::OutputFormat> for OutputFormat {
    fn from(format: wit::OutputFormat) -> Self {
        match format {
            wit::OutputFormat::Text => Self::Text,
            wit::OutputFormat::Json => Self::Json,
            wit::OutputFormat::JsonSchema(schema) => Self::JsonSchema(schema),
            wit::OutputFormat::Regex(pattern) => Self::Regex(pattern),
        }
    }
}

impl From<wit::ToolChoice> for ToolChoice {
    fn from(choice: wit::ToolChoice) -> Self {
        match choice {
            wit::ToolChoice::Auto => Self::Auto,
            wit::ToolChoice::Required => Self::Required,
            wit::ToolChoice::Named(name) => Self::Named(name),
        }
    }
}

impl From<TokenChance> for wit::TokenChance {
    fn from(chance: TokenChance) -> Self {
        Self {
            token: chance.token,
            bytes: chance.bytes,
            logprob: chance.logprob,
        }
    }
}

impl From<TokenInfo> for wit::TokenInfo {
    fn from(info: TokenInfo) -> Self {
        Self {
            chosen: info.chosen.into(),
            alternatives: info.alternatives.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<Event> for wit::Event {
    fn from(event: Event) -> Self {
        match event {
            Event::Started { generation, usage } => Self::Started((generation, usage.into())),
            Event::Delta {
                generation,
                choice,
                text,
                tokens,
            } => Self::Delta(wit::Delta {
                generation,
                choice,
                text,
                tokens: tokens.into_iter().map(Into::into).collect(),
            }),
            Event::ToolCall {
                generation,
                choice,
                call,
            } => Self::ToolCall(wit::Call {
                generation,
                choice,
                call: call.into(),
            }),
            Event::Finish {
                generation,
                choice,
                reason,
                matched_stop,
            } => {
                let reason = reason.into();
                Self::Finish(wit::Finish {
                    generation,
                    choice,
                    reason,
                    matched_stop,
                })
            }
            Event::Done {
                generation,
                usage,
                queue_us,
                prefill_us,
                decode_us,
            } => Self::Done(wit::Total {
                generation,
                usage: usage.into(),
                queue_micros: queue_us,
                prefill_micros: prefill_us,
                decode_micros: decode_us,
            }),
            Event::Failed { generation, error } => Self::Failed((generation, error.into())),
        }
    }
}
