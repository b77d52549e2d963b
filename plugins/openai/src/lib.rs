//! Request adapter: chats and completions of the OpenAI API.
//!
//! An adapter translates one HTTP dialect. It is a protocol machine without I/O: the host accepts
//! the connection, reads the body, runs the model, notices a client that went away and writes the
//! bytes; the adapter maps one representation to the other.
//!
//! ```text
//! request ──start──▶ respond(whole response)                 models, errors
//!                    generate(head, [generation])            a chat
//!                        │ events in batches: started, delta…, finish, done
//!                        ▼
//!                    advance ──▶ bytes to write now, more or end
//! ```
//!
//! One exchange serves one request in an instance of its own, so its state is a field and nothing
//! is global. Images never come in here: the host has replaced long base64 strings of the body by
//! short tokens, and we pass the handle of such a string on.
//!
//! - `request`, `completion`: body → what is wanted (`options`: what both may ask for; `tools`)
//! - `reply`: events → one answer or chunks of it (`logprobs`: of its tokens); `error`: error objects
//! - `tokens`: text to token ids and back
//! - `anthropic`: the models as another client reads them
//! - here: the exports, and everything that asks the host.

#![expect(missing_docs, reason = "what `generate!` makes is documented in wit/")]

mod anthropic;
mod completion;
mod error;
mod logprobs;
mod options;
mod reply;
mod request;
mod tokens;
mod tools;

use std::cell::RefCell;

use serde_json::{Value, json};
use visor_plugin_body::{Picture, Tools, into_bindings, sources};

wit_bindgen::generate!({ world: "adapter-plugin", path: "../../wit" });

use error::{headers, json_response};
use exports::visor::plugin::adapter::{
    self, Event, Exchange, Generation, GuestExchange, Head, Input, OutputFormat, Progress,
    Response, Route, Step, ToolChoice,
};
use exports::visor::plugin::lifecycle;
use options::Options;
use reply::{Reply, Shape};
use visor::plugin::adapter_input::Request;
use visor::plugin::media::Source;
use visor::plugin::types::{Error, ErrorCode, Extensions, ToolSpec};
use visor::plugin::{clock, model};

/// A comment: clients skip it, proxies see that the connection lives.
const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// What every prompt begins with.
const BEGIN: &str = "<s>";
/// Answers that the most generous host gives to one request.
const ANSWERS_MAX: u32 = 128;

/// The type the exports hang on.
struct OpenAi;

#[cfg(target_arch = "wasm32")]
export!(OpenAi);

impl lifecycle::Guest for OpenAi {
    fn describe() -> lifecycle::Info {
        lifecycle::Info {
            name: "openai".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            description: env!("CARGO_PKG_DESCRIPTION").to_owned(),
            config_schema: Some(
                r#"{ "type": "object", "additionalProperties": false }"#.to_owned(),
            ),
        }
    }

    fn configure(_config: String) -> Result<(), Vec<lifecycle::Issue>> {
        Ok(())
    }
}

impl adapter::Guest for OpenAi {
    type Exchange = Chat;

    fn routes() -> Vec<Route> {
        let route = |method: &str, path: &str| Route {
            method: method.to_owned(),
            path: path.to_owned(),
            max_body: None,
        };
        // Model ids may contain slashes, so the last one takes the rest of the path.
        vec![
            route("POST", "/chat/completions"),
            route("POST", "/completions"),
            route("POST", "/tokenize"),
            route("POST", "/detokenize"),
            route("GET", "/models"),
            route("GET", "/models/{id...}"),
        ]
    }

    fn render_error(error: Error, mid_stream: bool) -> Response {
        error::render_error(&error, mid_stream)
    }
}

/// One request and the answer to it; `None` is one that was answered at once.
struct Chat(RefCell<Option<Reply>>);

impl GuestExchange for Chat {
    fn start(request: Request) -> Result<(Exchange, Step), Error> {
        let respond = |response| (None, Step::Respond(response));
        let tell = |body: &Value| respond(json_response(200, body));
        let (reply, step) = match (
            request.path().trim_end_matches('/'),
            request.path_param("id"),
        ) {
            (_, id @ Some(_)) | ("/models", id) => respond(models(&request, id.as_deref())?),
            ("/chat/completions", None) => chat(&request)?,
            ("/completions", None) => complete(&request)?,
            ("/tokenize", None) => tell(&tokenize(&request)?),
            ("/detokenize", None) => tell(&detokenize(&request)?),
            (path, None) => return Err(not_found(&format!("There is nothing at {path}."), None)),
        };
        Ok((Exchange::new(Self(RefCell::new(reply))), step))
    }

    fn advance(&self, events: Vec<Event>) -> Result<Progress, Error> {
        let mut reply = self.0.borrow_mut();
        let reply = reply.as_mut().expect("only generations have events");
        reply.advance(events)
    }

    fn keep_alive(&self) -> Vec<u8> {
        KEEP_ALIVE.to_vec()
    }
}

/// Reads a chat request and says what is to be generated for it.
fn chat(request: &Request) -> Result<(Option<Reply>, Step), Error> {
    let chat = request::parse(&request.text()?, &request.marker())?;
    let images = pictures(chat.images, request)?;
    let task = Task {
        input: Input::Chat(chat.messages),
        images,
        format: chat.format.into(),
        tools: chat.tools,
        extensions: chat.extensions,
    };
    generate(Shape::Chat, chat.options, vec![task])
}

/// The same for texts to go on with.
fn complete(request: &Request) -> Result<(Option<Reply>, Step), Error> {
    let completion = completion::parse(&request.text()?)?;
    // Too many answers are the fault of `n`, unless there are many for each.
    let blamed = (completion.prompts.len() > 1).then_some(("count.param", "prompt"));
    let blamed = blamed.map(|(key, name)| (key.to_owned(), name.to_owned()));
    let task = |prompt| Task {
        input: Input::Text(prompt),
        images: Vec::new(),
        format: OutputFormat::Text,
        tools: Tools::default(),
        extensions: blamed.clone().into_iter().collect(),
    };
    let tasks = completion.prompts.into_iter().map(task).collect();
    generate(Shape::Completion, completion.options, tasks)
}

/// What is to be answered, beside the options that all kinds of request share.
struct Task {
    input: Input,
    images: Vec<Source>,
    format: OutputFormat,
    tools: Tools,
    extensions: Extensions,
}

/// Each task is a generation of its own.
fn generate(
    shape: Shape,
    options: Options,
    tasks: Vec<Task>,
) -> Result<(Option<Reply>, Step), Error> {
    let model = served(options.model.as_deref())?.id();
    let id = match shape {
        Shape::Chat => format!("chatcmpl-{}", clock::unique(12)),
        Shape::Completion => format!("cmpl-{}", clock::unique(12)),
    };
    // The host refuses more answers than it gives; none is told before it has.
    let each = options.count.min(ANSWERS_MAX) as usize;
    let mut reply = Reply::new(shape, id, clock::now() / 1000, (tasks.len(), each));
    reply.model = model.clone();
    reply.stream = options.stream;
    reply.include_usage = options.include_usage;
    reply.logprobs = options.sampling.logprobs.is_some();
    let generation = |task: Task| Generation {
        model: Some(model.clone()),
        input: task.input,
        images: task.images,
        sampling: options.sampling.clone(),
        max_tokens: options.max_tokens,
        stop: options.stop.clone(),
        format: task.format,
        tools: task.tools.tools.into_iter().map(ToolSpec::from).collect(),
        tool_choice: task.tools.choice.into(),
        parallel_tools: task.tools.parallel,
        count: options.count,
        extensions: task.extensions,
    };
    let generations = tasks.into_iter().map(generation).collect();
    let step = Step::Generate((head(options.stream), generations));
    Ok((Some(reply), step))
}

fn tokenize(request: &Request) -> Result<Value, Error> {
    let wanted = tokens::parse_tokenize(&request.text()?)?;
    let model = served(wanted.model.as_deref())?;
    let tokenizer = model.tokenizer();
    let begin = tokenizer.control_token(BEGIN).filter(|_| wanted.begin);
    let text = tokenizer.encode(&wanted.prompt, false);
    let ids: Vec<u32> = begin.into_iter().chain(text).collect();
    Ok(tokens::tokenized(&ids, model.context_length()))
}

fn detokenize(request: &Request) -> Result<Value, Error> {
    let wanted = tokens::parse_detokenize(&request.text()?)?;
    let model = served(wanted.model.as_deref())?;
    Ok(json!({ "prompt": model.tokenizer().decode(&wanted.tokens) }))
}

fn head(stream: bool) -> Head {
    let mut headers = headers(if stream {
        "text/event-stream"
    } else {
        "application/json"
    });
    if stream {
        headers.push(("cache-control".to_owned(), "no-cache".to_owned()));
    }
    Head {
        status: 200,
        headers,
        incremental: stream,
    }
}

/// Takes the pictures from where they are.
fn pictures(pictures: Vec<Picture>, request: &Request) -> Result<Vec<Source>, Error> {
    let blob = |index| request.blob(index).map(Source::Blob);
    let found = sources(pictures, Source::Url, blob);
    found.map_err(|mut wrong| {
        let param = wrong.param.as_deref().unwrap_or_default();
        wrong.message = format!("Invalid value for '{param}': {}.", wrong.message);
        wrong.into()
    })
}

/// The model of that name, or the first there is.
fn served(name: Option<&str>) -> Result<model::Handle, Error> {
    match name {
        Some(name) => find(name),
        None => {
            let first = model::available().into_iter().next();
            first.ok_or_else(|| not_found("No model is served.", Some("model")))
        }
    }
}

fn find(name: &str) -> Result<model::Handle, Error> {
    model::find(name).ok_or_else(|| {
        not_found(
            &format!("The model '{name}' does not exist."),
            Some("model"),
        )
    })
}

/// The model of that name, or all of them, as whoever asks reads them.
fn models(request: &Request, id: Option<&str>) -> Result<Response, Error> {
    let others = request.header(anthropic::HEADER).is_some();
    let body = match id {
        Some(id) if others => match model::find(id) {
            Some(model) => describe_otherwise(&model),
            None => return Ok(json_response(404, &anthropic::not_found(id))),
        },
        Some(id) => describe(&find(id)?),
        None if others => {
            let all: Vec<Value> = model::available().iter().map(describe_otherwise).collect();
            anthropic::page(&all)
        }
        None => {
            let all: Vec<Value> = model::available().iter().map(describe).collect();
            json!({ "object": "list", "data": all })
        }
    };
    Ok(json_response(200, &body))
}

/// A model, as Anthropic's client reads it.
fn describe_otherwise(model: &model::Handle) -> Value {
    anthropic::model(&model.id(), model.created(), model.context_length())
}

/// A model, with what clients of other servers look for as well.
fn describe(model: &model::Handle) -> Value {
    let sees = model.vision().is_some();
    let details: serde_json::Map<_, _> = model
        .details()
        .into_iter()
        .map(|(key, value)| (key, Value::String(value)))
        .collect();
    json!({
        "id": model.id(),
        "object": "model",
        "created": model.created(),
        "owned_by": "visor",
        "aliases": model.aliases(),
        "max_model_len": model.context_length(),
        "input_modalities": if sees { vec!["text", "image"] } else { vec!["text"] },
        "capabilities": { "vision": sees },
        "details": details,
    })
}

fn not_found(message: &str, param: Option<&str>) -> Error {
    let param = param.map(str::to_owned);
    Error {
        code: ErrorCode::NotFound,
        message: message.to_owned(),
        param,
        retry_after: None,
    }
}

into_bindings!(Format);
into_bindings!(Tool);
into_bindings!(Choice);
into_bindings!(Wrong);
