//! Request adapter: the Messages API of Anthropic, mounted at `/v1/messages`.
//!
//! - `request`: body → what is wanted (`tools`: what may be called, and was)
//! - `reply`: events → a message, or the events of one; a count; errors
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
use reply::{Limits, Reply, Shape, headers};
use visor::plugin::adapter_input::Request;
use visor::plugin::media::Source;
use visor::plugin::types::{Error, ErrorCode, ToolSpec};
use visor::plugin::{clock, model};

/// The type the exports hang on.
struct Anthropic;

#[cfg(target_arch = "wasm32")]
export!(Anthropic);

impl lifecycle::Guest for Anthropic {
    fn describe() -> lifecycle::Info {
        lifecycle::Info {
            name: "anthropic".to_owned(),
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

impl adapter::Guest for Anthropic {
    type Exchange = Messages;

    fn routes() -> Vec<Route> {
        let route = |path: &str| Route {
            method: "POST".to_owned(),
            path: path.to_owned(),
            max_body: None,
        };
        vec![route("/"), route("/count_tokens")]
    }

    fn render_error(error: Error, mid_stream: bool) -> Response {
        reply::render_error(&error, mid_stream)
    }
}

/// One request and the answer to it.
struct Messages(RefCell<Reply>);

impl GuestExchange for Messages {
    fn start(request: Request) -> Result<(Exchange, Step), Error> {
        let counts = request.path() == "/count_tokens";
        let wanted = request::parse(&request.text()?, &request.marker(), counts)?;
        let model = find(&wanted.model)?;
        let limits = Limits {
            max_tokens: wanted.max_tokens,
            context_tokens: model.context_length(),
        };
        let model = model.id();
        let shape = match (counts, wanted.stream) {
            (true, _) => Shape::Count,
            (false, true) => Shape::Stream,
            (false, false) => Shape::Whole,
        };
        let id = format!("msg_{}", clock::unique(12));
        let reply = Reply::new(shape, id, model.clone(), wanted.stop.clone(), limits);
        let generation = Generation {
            model: Some(model),
            input: Input::Chat(wanted.messages),
            images: pictures(wanted.images, &request)?,
            sampling: wanted.sampling,
            max_tokens: Some(wanted.max_tokens),
            stop: wanted.stop,
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
        reply::ping()
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

fn find(name: &str) -> Result<model::Handle, Error> {
    model::find(name).ok_or_else(|| Error {
        code: ErrorCode::NotFound,
        message: format!("model: {name}"),
        param: Some("model".to_owned()),
        retry_after: None,
    })
}

into_bindings!(Format);
into_bindings!(Tool);
into_bindings!(Choice);
into_bindings!(Wrong);
