//! One generation, from the adapter's plan to the engine's queue: decode, policy, template, count,
//! cache, crops, submit. Everything a client can have done wrong is found before the queue.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use visor_engine::{
    CacheAccess, CacheKey, EngineError, EventReceiver, GenerateRequest, Grammar, Lookup, Sampling,
    Usage, chain,
};
use visor_model::{ModelError, Prompt};
use visor_sandbox::{
    CallSyntax, ErrorCode, Extensions, Generation, OutputFormat, ToolChoice, ToolSpec,
};

use super::cached::{self, Answer, AnswerKey, Sharing};
use super::failure::Failure;
use super::plan::{self, Wish};
use super::prompt::{self, Task};
use super::vision::{self, Decoded, Planned, Rendered};
use super::work::{Stop, Work};
use crate::calls::Calls;
use crate::formats::{Bounds, Follow, FormatError};

/// Seconds after which a client that met a full queue may come back.
const RETRY_AFTER_S: u32 = 2;

/// A generation that needs nothing but time.
pub(super) struct Running {
    /// Its number within the exchange.
    pub index: u32,
    /// Where its events come from.
    pub origin: Origin,
    /// Text the answer begins with, not yet told.
    pub prefill: Option<String>,
    /// What it may call.
    pub calls: Option<Arc<Calls>>,
    /// Where to keep the whole answer, if it may be kept.
    pub keep: Option<Keep>,
}

/// Where events come from.
pub(super) enum Origin {
    /// The engine, one answer each.
    Engine(Vec<EventReceiver>),
    /// An earlier answer to the same request, so many times.
    Cache(Arc<Answer>, usize),
    /// Nowhere: only the size of the prompt was asked for.
    Counted(Usage),
}

/// Where a whole answer is kept once it is known.
pub(super) struct Keep {
    /// Its key.
    pub key: CacheKey,
    /// Who shares it.
    pub sharing: Sharing,
    /// When the work on it began.
    pub began: Instant,
}

/// Takes one generation as far as the engine's queue.
pub(super) fn start(work: &mut Work, generation: Generation, index: u32) -> Result<Running, Stop> {
    let began = Instant::now();
    let choices = generation.count;
    let only_count = generation.tokens_max == Some(0);
    let mut counted = count(work, generation)?;
    let prefill = counted.prefill.take();
    let calls = counted.calls.clone();
    let known = |origin| Running {
        index,
        origin,
        prefill: None,
        calls: calls.clone(),
        keep: None,
    };
    if only_count {
        return Ok(known(Origin::Counted(counted.prompt_usage())));
    }
    let (sharing, key) = share(work, &mut counted);
    if let Some(answer) = key.and_then(|key| cached::find(work, &sharing, &key)) {
        return Ok(known(Origin::Cache(answer, choices as usize)));
    }
    let grammar = grammar(work, &counted, prefill.as_deref())?;
    let origin = Origin::Engine(submit(work, (counted, grammar), &sharing, choices)?);
    let key = key.filter(|_| sharing.scoping.response.write);
    let keep = key.map(|key| Keep {
        key,
        sharing,
        began,
    });
    Ok(Running {
        index,
        origin,
        prefill,
        calls,
        keep,
    })
}

/// A generation in the model's terms, with every limit checked and no pixel computed.
struct Counted {
    planned: Vec<Planned>,
    prompt: Prompt,
    continues: bool,
    sampling: Sampling,
    tokens_max: u32,
    stop_strings: Vec<String>,
    stop_ids: Vec<u32>,
    prefill: Option<String>,
    format: OutputFormat,
    calls: Option<Arc<Calls>>,
    names: Names,
    extensions: Extensions,
}

impl Counted {
    fn prompt_usage(&self) -> Usage {
        Usage {
            prompt_tokens: u32::try_from(self.prompt.ids.len()).unwrap_or(u32::MAX),
            image_tokens: self.prompt.image_tokens,
            ..Usage::default()
        }
    }
}

fn count(work: &mut Work, generation: Generation) -> Result<Counted, Stop> {
    let config = Arc::clone(&work.call.pinned.config);
    let model = Arc::clone(&work.call.house.model);
    let wish = plan::check(&generation, &config, &model)?;
    let sources = vision::decode(work, &generation.images, &generation.extensions)?;
    let tokens_max = plan::prompt_tokens_max(&config, &model);
    let text_tokens = prompt::text_tokens(work, &generation.input, tokens_max);
    plan::check_least(&generation.input, text_tokens, tokens_max)?;
    let names = Names::read(&generation.extensions);
    let mut task = Task {
        input: generation.input,
        tools: generation.tools.clone(),
        image_tokens: vec![1; sources.len()],
        budget_tokens: prompt_budget(work, &wish),
        extensions: generation.extensions.clone(),
    };
    let planned = pictures(work, sources, &task, tokens_max)?;
    task.image_tokens = planned.iter().map(|image| image.tokens).collect();
    work.check()?;
    let rendered = prompt::render(work, task)?;
    let wanted = (generation.tool_choice, generation.parallel_tools);
    let calls_max = config.formats.calls_max;
    let strict = names.strict.clone();
    let calls = calls(
        (generation.tools, strict, rendered.calls),
        wanted,
        calls_max,
    )?;
    Ok(Counted {
        tokens_max: plan::output_tokens(&rendered.prompt, &wish, &config, &model)?,
        planned,
        prompt: rendered.prompt,
        continues: rendered.continues,
        sampling: wish.sampling,
        stop_strings: wish.stop.into_iter().chain(rendered.stop_strings).collect(),
        stop_ids: rendered.stop_ids,
        prefill: rendered.prefill,
        format: generation.format,
        calls,
        names,
        extensions: generation.extensions,
    })
}

/// Asks the policy about the pictures. What the prompt takes beside them is known for certain when it is rendered, so it is, with
/// pictures of a token each.
fn pictures(
    work: &mut Work,
    sources: Vec<Decoded>,
    task: &Task,
    tokens_max: u32,
) -> Result<Vec<Planned>, Stop> {
    if sources.is_empty() {
        return Ok(Vec::new());
    }
    let bare = prompt::render(work, task.clone())?.prompt;
    let length = u32::try_from(bare.ids.len()).unwrap_or(u32::MAX);
    let text_tokens = length.saturating_sub(bare.image_tokens);
    let left = task.budget_tokens.saturating_sub(text_tokens);
    let most = tokens_max.saturating_sub(text_tokens);
    vision::plan(work, sources, &task.extensions, (left, most))
}

/// What the model may call, if it is offered tools.
fn calls(
    (tools, strict, syntax): (Vec<ToolSpec>, BTreeSet<usize>, Option<CallSyntax>),
    (choice, parallel): (ToolChoice, bool),
    calls_max: u32,
) -> Result<Option<Arc<Calls>>, Failure> {
    if tools.is_empty() {
        return Ok(None);
    }
    let syntax = syntax.ok_or_else(|| {
        Failure::unsupported("tools", "this prompt template writes no calls of tools")
    })?;
    let once = !parallel || matches!(choice, ToolChoice::Named(_));
    Ok(Some(Arc::new(Calls {
        syntax,
        tools,
        strict,
        choice,
        count_max: if once { 1 } else { calls_max },
    })))
}

/// What the client calls what its answer is held to: the adapter says it in extensions.
struct Names {
    format: String,
    /// Whether a schema of the answer is followed to the letter or not at all.
    is_strict: bool,
    /// By number; those that were not named are missing.
    tools: BTreeMap<usize, String>,
    /// Numbers of the tools that are strict.
    strict: BTreeSet<usize>,
}

impl Names {
    fn read(extensions: &Extensions) -> Self {
        let number = |key: &str, of: &str| {
            let number = key.strip_prefix("tool.")?.strip_suffix(of)?;
            number.parse().ok()
        };
        let tools = extensions.iter();
        let tools = tools.filter_map(|(key, name)| Some((number(key, ".param")?, name.clone())));
        let strict = extensions.iter().filter(|(_, value)| value == "true");
        let strict = strict.filter_map(|(key, _)| number(key, ".strict"));
        let mut format = extensions.iter().filter(|(key, _)| key == "format.param");
        let is_strict = |(key, value): &(String, String)| key == "format.strict" && value == "true";
        Self {
            is_strict: extensions.iter().any(is_strict),
            format: format
                .next()
                .map_or_else(|| "response_format".to_owned(), |(_, name)| name.clone()),
            tools: tools.collect(),
            strict: strict.collect(),
        }
    }

    /// What is wrong, as the client calls it.
    fn of(&self, error: &FormatError) -> String {
        let FormatError::Tool { index, .. } = error else {
            return self.format.clone();
        };
        let named = self.tools.get(index).cloned();
        named.unwrap_or_else(|| format!("tools[{index}]"))
    }
}

/// The grammar of an answer that is not free.
fn grammar(
    work: &mut Work,
    counted: &Counted,
    prefill: Option<&str>,
) -> Result<Option<Arc<dyn Grammar>>, Stop> {
    let bounds = Bounds {
        prefill: prefill.map(str::to_owned),
        continues: counted.continues,
        stop_ids: counted.stop_ids.clone(),
    };
    let limits = &work.call.pinned.config.formats;
    let formats = &work.call.house.formats;
    let format = (&counted.format, Follow::strictly(counted.names.is_strict));
    let compiled = formats.compile(format, counted.calls.as_deref(), bounds, limits);
    Ok(compiled.map_err(|error| match error {
        FormatError::Busy => {
            Failure::new(ErrorCode::Overloaded, error.to_string()).retry_after(RETRY_AFTER_S)
        }
        _ => Failure::invalid(error.to_string()).at(counted.names.of(&error)),
    })?)
}

/// Who shares what this generation makes, and the key of its whole answer if that has one: only
/// greedy answers repeat. One that tells its tokens is not kept: each takes as much as a sentence.
fn share(work: &mut Work, counted: &mut Counted) -> (Sharing, Option<CacheKey>) {
    let lookup = Lookup {
        principal: work.call.incoming.principal.clone(),
        model: work.call.house.model.id.clone(),
        route: work.call.pinned.prefix.clone(),
        prompt_tokens: counted.prompt_usage().prompt_tokens,
        image_count: u32::try_from(counted.planned.len()).unwrap_or(u32::MAX),
        #[expect(clippy::cast_possible_truncation, reason = "it came as an f32")]
        temperature: counted.sampling.temperature as f32,
        extensions: std::mem::take(&mut counted.extensions),
    };
    let sharing = Sharing::ask(work, &lookup);
    let greedy = counted.sampling.temperature == 0.0;
    let repeats = greedy && counted.sampling.logprobs.is_none();
    let key = repeats.then(|| {
        let image_keys: Vec<[u8; 32]> = counted.planned.iter().map(|image| image.key).collect();
        let key = AnswerKey {
            pinned: &work.call.pinned,
            model_digest: &work.call.house.model.facts.digest,
            prompt: &counted.prompt,
            continues: counted.continues,
            image_keys: &image_keys,
            tokens_max: counted.tokens_max,
            stop_strings: &counted.stop_strings,
            stop_ids: &counted.stop_ids,
            format: (&counted.format, counted.names.is_strict),
            calls: counted.calls.as_deref(),
            sampling: &counted.sampling,
        };
        sharing.key(key.digest())
    });
    (sharing, key)
}

/// Submits one request per choice. Where the queue has no room for all of them, none is served.
fn submit(
    work: &mut Work,
    (counted, grammar): (Counted, Option<Arc<dyn Grammar>>),
    sharing: &Sharing,
    choices: u32,
) -> Result<Vec<EventReceiver>, Stop> {
    let seed = counted.sampling.seed;
    let Rendered { pixels, room } = vision::render(work, counted.planned, sharing)?;
    work.check()?;
    let mut request = GenerateRequest {
        prompt: counted.prompt,
        images: pixels,
        continues: counted.continues,
        sampling: counted.sampling,
        grammar,
        tokens_max: counted.tokens_max,
        stop_ids: counted.stop_ids,
        stop_strings: counted.stop_strings,
        cancel: work.call.cancel.clone(),
        deadline: Some(work.deadline),
        cache: CacheAccess::from(&sharing.scoping),
        held: room.map(|room| Arc::new(room) as _),
    };
    let submitted = (0..choices).map(|choice| {
        request.sampling.seed = plan::seed_of(seed, choice);
        let submitted = work.call.house.engine.submit(request.clone());
        Ok(submitted.map_err(|error| refused(work, &error))?)
    });
    submitted.collect()
}

/// Tokens a prompt should take: the limit, less room for the answer.
fn prompt_budget(work: &Work, wish: &Wish) -> u32 {
    let prompt_max = plan::prompt_tokens_max(&work.call.pinned.config, &work.call.house.model);
    let context = work.call.house.model.context_tokens;
    let answer = plan::answer_room(wish, &work.call.pinned.config);
    let beside_answer = context.saturating_sub(answer);
    prompt_max.min(beside_answer).max(1)
}

/// An error of the engine, as the client is told.
pub(super) fn refused(work: &Work, error: &EngineError) -> Failure {
    let busy =
        |message: &str| Failure::new(ErrorCode::Overloaded, message).retry_after(RETRY_AFTER_S);
    match error {
        EngineError::PromptTooLong { .. } | EngineError::KvFull { .. } => {
            Failure::new(ErrorCode::ContextOverflow, error.to_string())
        }
        EngineError::QueueFull { .. } | EngineError::QueueTokensFull { .. } => {
            busy("too many requests wait for the model")
        }
        EngineError::NotReady => busy("the model is still loading"),
        EngineError::Stopped => busy("the server is stopping"),
        EngineError::DeadlinePassed { .. } => work.late(),
        EngineError::Refused(ModelError::TooLong { .. }) => Failure::new(
            ErrorCode::ContextOverflow,
            "prompt and answer are longer than the model can run",
        ),
        EngineError::Constraint(_) => Failure::invalid(error.to_string()),
        EngineError::Refused(_)
        | EngineError::Invalid(_)
        | EngineError::NoModel(_)
        | EngineError::Forward(_) => {
            tracing::error!(request = %work.call.incoming.id, error = %chain(error), "the engine failed a request");
            Failure::internal()
        }
    }
}
