//! Request adapter: the Responses API of OpenAI, mounted at `/v1/responses`. Nothing is stored: a
//! response is made, told and forgotten, and a conversation comes whole with every request.
//!
//! - `request`: body → what is wanted (`tools`: what may be called, and was)
//! - `reply`: events → a response, or the events that build it; a count; errors
//! - here: the exports, and everything that asks the host.
//!
//! The first words of `plugins/openai` tell what an adapter is.

#![expect(missing_docs, reason = "what `generate!` makes is documented in wit/")]

mod reply;
mod request;
mod tools;

use std::cell::RefCell;

use visor_plugin_body::{Picture, into_bindings, sources};

wit_bindgen::generate!({ world: "adapter-plugin", path: "../../wit" });

use exports::visor::plugin::adapter::{
    self, Event, Exchange, Generation, GuestExchange, Head, Input, OutputFormat, Progress,
    Response, Route, Step, ToolChoice,
};
use exports::visor::plugin::lifecycle;
use reply::{Reply, Shape, headers};
use visor::plugin::adapter_input::Request;
use visor::plugin::media::Source;
use visor::plugin::types::{Error, ErrorCode, ToolSpec};
use visor::plugin::{clock, model};

/// A comment: clients skip it, proxies see that the connection lives.
const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// The type the exports hang on.
struct Responses;

#[cfg(target_arch = "wasm32")]
export!(Responses);

impl lifecycle::Guest for Responses {
    fn describe() -> lifecycle::Info {
        lifecycle::Info {
            name: "responses".to_owned(),
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

impl adapter::Guest for Responses {
    type Exchange = Answer;

    fn routes() -> Vec<Route> {
        let route = |path: &str| Route {
            method: "POST".to_owned(),
            path: path.to_owned(),
            max_body: None,
        };
        vec![route("/"), route("/input_tokens")]
    }

    fn render_error(error: Error, mid_stream: bool) -> Response {
        reply::render_error(&error, mid_stream)
    }
}

/// One request and the answer to it.
struct Answer(RefCell<Reply>);

impl GuestExchange for Answer {
    fn start(request: Request) -> Result<(Exchange, Step), Error> {
        let counts = request.path() == "/input_tokens";
        let wanted = request::parse(&request.text()?, &request.marker(), counts)?;
        let model = served(wanted.model.as_deref())?.id();
        let shape = match (counts, wanted.stream) {
            (true, _) => Shape::Count,
            (false, true) => Shape::Stream,
            (false, false) => Shape::Whole,
        };
        let created = clock::now() / 1000;
        let mut reply = Reply::new(shape, clock::unique(16), created, model.clone());
        reply.repeated = wanted.repeated;
        let generation = Generation {
            model: Some(model),
            input: Input::Chat(wanted.messages),
            images: pictures(wanted.images, &request)?,
            sampling: wanted.sampling,
            max_tokens: wanted.max_tokens,
            stop: Vec::new(),
            format: wanted.format.into(),
            tools: wanted.tools.tools.into_iter().map(ToolSpec::from).collect(),
            tool_choice: wanted.tools.choice.into(),
            parallel_tools: wanted.tools.parallel,
            count: 1,
            extensions: wanted.extensions,
        };
        let step = Step::Generate((head(shape), vec![generation]));
        Ok((Exchange::new(Self(RefCell::new(reply))), step))
    }

    fn advance(&self, events: Vec<Event>) -> Result<Progress, Error> {
        self.0.borrow_mut().advance(events)
    }

    fn keep_alive(&self) -> Vec<u8> {
        KEEP_ALIVE.to_vec()
    }
}

fn head(shape: Shape) -> Head {
    let stream = shape == Shape::Stream;
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
    Ok(sources(pictures, Source::Url, blob)?)
}

/// The model of that name, or the first there is.
fn served(name: Option<&str>) -> Result<model::Handle, Error> {
    let found = match name {
        Some(name) => model::find(name),
        None => model::available().into_iter().next(),
    };
    found.ok_or_else(|| Error {
        code: ErrorCode::NotFound,
        message: format!("The model '{}' does not exist.", name.unwrap_or_default()),
        param: Some("model".to_owned()),
        retry_after: None,
    })
}

into_bindings!(Format);
into_bindings!(Tool);
into_bindings!(Choice);
into_bindings!(Wrong);
