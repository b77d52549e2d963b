//! Request adapter: the chat completions API of OpenAI.
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
//! - `request`: body → what is wanted (`field`: where in the body, for errors)
//! - `reply`: events → completion, chunks, error objects
//! - here: the exports, and everything that asks the host.

#![expect(missing_docs, reason = "what `generate!` makes is documented in wit/")]

mod field;
mod reply;
mod request;

use std::cell::RefCell;

use serde_json::{Value, json};

wit_bindgen::generate!({ world: "adapter-plugin", path: "../../wit" });

use exports::visor::plugin::adapter::{
    self, Event, Exchange, Generation, GuestExchange, Head, Input, OutputFormat, Progress,
    Response, Route, Step,
};
use exports::visor::plugin::lifecycle;
use reply::Reply;
use request::{ChatRequest, Place};
use visor::plugin::adapter_input::Request;
use visor::plugin::media::Source;
use visor::plugin::types::{Error, ErrorCode};
use visor::plugin::{clock, model};

/// A comment: clients skip it, proxies see that the connection lives.
const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

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
            route("GET", "/models"),
            route("GET", "/models/{id...}"),
        ]
    }

    fn render_error(error: Error, mid_stream: bool) -> Response {
        reply::render_error(&error, mid_stream)
    }
}

/// One request and the answer to it.
struct Chat(RefCell<Reply>);

impl GuestExchange for Chat {
    fn start(request: Request) -> Result<(Exchange, Step), Error> {
        let mut reply = Reply::new(
            format!("chatcmpl-{}", clock::unique(12)),
            clock::now() / 1000,
            String::new(),
        );
        let step = match (
            request.path().trim_end_matches('/'),
            request.path_param("id"),
        ) {
            (_, Some(id)) => Step::Respond(reply::json_response(200, &describe(&find(&id)?))),
            ("/models", None) => Step::Respond(reply::json_response(200, &list())),
            ("/chat/completions", None) => chat(&request, &mut reply)?,
            (path, None) => return Err(not_found(&format!("There is nothing at {path}."), None)),
        };
        Ok((Exchange::new(Self(RefCell::new(reply))), step))
    }

    fn advance(&self, events: Vec<Event>) -> Result<Progress, Error> {
        self.0.borrow_mut().advance(events)
    }

    fn keep_alive(&self) -> Vec<u8> {
        KEEP_ALIVE.to_vec()
    }
}

/// Reads a chat request and says what is to be generated for it.
fn chat(request: &Request, reply: &mut Reply) -> Result<Step, Error> {
    let chat = request::parse(&request.text()?, &request.marker())?;
    let model = match &chat.model {
        Some(name) => find(name)?,
        None => model::available()
            .into_iter()
            .next()
            .ok_or_else(|| not_found("No model is served.", Some("model")))?,
    };
    reply.model = model.id();
    reply.stream = chat.stream;
    reply.include_usage = chat.include_usage;
    let mut headers = reply::headers(if chat.stream {
        "text/event-stream"
    } else {
        "application/json"
    });
    if chat.stream {
        headers.push(("cache-control".to_owned(), "no-cache".to_owned()));
    }
    let head = Head {
        status: 200,
        headers,
        incremental: chat.stream,
    };
    Ok(Step::Generate((
        head,
        vec![generation(chat, &reply.model, request)?],
    )))
}

fn generation(chat: ChatRequest, model: &str, request: &Request) -> Result<Generation, Error> {
    let mut images = Vec::with_capacity(chat.images.len());
    for picture in chat.images {
        images.push(match picture.place {
            Place::Url(url) => Source::Url(url),
            Place::Lifted(index) => Source::Blob(request.blob(index).ok_or_else(|| Error {
                code: ErrorCode::InvalidRequest,
                message: format!(
                    "Invalid value for '{}': there is no such image.",
                    picture.param
                ),
                param: Some(picture.param.clone()),
                retry_after: None,
            })?),
        });
    }
    Ok(Generation {
        model: Some(model.to_owned()),
        input: Input::Chat(chat.messages),
        images,
        sampling: chat.sampling,
        max_tokens: chat.max_tokens,
        stop: chat.stop,
        format: OutputFormat::Text,
        tools: Vec::new(),
        count: 1,
        extensions: chat.extensions,
    })
}

fn find(name: &str) -> Result<model::Handle, Error> {
    model::find(name).ok_or_else(|| {
        not_found(
            &format!("The model '{name}' does not exist."),
            Some("model"),
        )
    })
}

fn list() -> Value {
    let data: Vec<Value> = model::available().iter().map(describe).collect();
    json!({ "object": "list", "data": data })
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
