//! Request adapter: the API of Ollama, mounted at `/api`.
//!
//! - `request`: body → what is wanted (`tools`: what may be called, and was)
//! - `reply`: events → an answer, or a line for each piece of it; errors
//! - here: the exports, and everything that asks the host.
//!
//! The first words of `plugins/openai` tell what an adapter is.

#![expect(missing_docs, reason = "what `generate!` makes is documented in wit/")]

mod reply;
mod request;
mod tools;

use std::cell::RefCell;

use serde_json::{Value, json};
use visor_plugin_body::{Field, Picture, into_bindings, rfc3339, sources};

wit_bindgen::generate!({ world: "adapter-plugin", path: "../../wit" });

use exports::visor::plugin::adapter::{
    self, Event, Exchange, Generation, GuestExchange, Head, OutputFormat, Progress, Response,
    Route, Step, ToolChoice,
};
use exports::visor::plugin::lifecycle;
use reply::{Reply, Shape, json_response};
use request::Wanted;
use visor::plugin::adapter_input::Request;
use visor::plugin::media::Source;
use visor::plugin::types::{Error, ErrorCode, ToolSpec};
use visor::plugin::{clock, model};

/// The release of Ollama whose API this is. Clients ask for a least one (Copilot Chat of VS Code for 0.6.4, others for 0.14.2) and turn
/// away what is older; a version of our own would tell them nothing.
const API_VERSION: &str = "0.14.2";

/// What clients of Ollama put behind a name that says no version.
const LATEST: &str = ":latest";

/// As long as a model stays loaded, in milliseconds: a hundred years.
const AGE_MS: u64 = 100 * 365 * 86_400_000;

/// The type the exports hang on.
struct Ollama;

#[cfg(target_arch = "wasm32")]
export!(Ollama);

impl lifecycle::Guest for Ollama {
    fn describe() -> lifecycle::Info {
        lifecycle::Info {
            name: "ollama".to_owned(),
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

impl adapter::Guest for Ollama {
    type Exchange = Answer;

    fn routes() -> Vec<Route> {
        let route = |method: &str, path: &str| Route {
            method: method.to_owned(),
            path: path.to_owned(),
            max_body: None,
        };
        vec![
            route("POST", "/chat"),
            route("POST", "/generate"),
            route("POST", "/show"),
            route("GET", "/tags"),
            route("GET", "/ps"),
            route("GET", "/version"),
        ]
    }

    fn render_error(error: Error, mid_stream: bool) -> Response {
        reply::render_error(&error, mid_stream)
    }
}

/// One request and the answer to it; `None` is one that was answered at once.
struct Answer {
    reply: RefCell<Option<Reply>>,
    /// Nanoseconds of the clock when it came.
    began_ns: u64,
}

impl GuestExchange for Answer {
    fn start(request: Request) -> Result<(Exchange, Step), Error> {
        let began_ns = clock::monotonic();
        let respond = |body: &Value| (None, Step::Respond(json_response(200, body)));
        let path = request.path();
        let (reply, step) = match path.as_str() {
            "/version" => respond(&version()),
            "/tags" => respond(&tags()),
            "/ps" => respond(&running()),
            "/show" => respond(&show(&request)?),
            "/chat" => {
                let wanted = request::parse_chat(&request.text()?, &request.marker())?;
                answer(Shape::Chat, wanted, &request)?
            }
            _ => {
                let wanted = request::parse_generate(&request.text()?, &request.marker())?;
                answer(Shape::Generate, wanted, &request)?
            }
        };
        let reply = RefCell::new(reply);
        Ok((Exchange::new(Self { reply, began_ns }), step))
    }

    fn advance(&self, events: Vec<Event>) -> Result<Progress, Error> {
        let mut reply = self.reply.borrow_mut();
        let reply = reply.as_mut().expect("only generations have events");
        reply.spent_ns = clock::monotonic().saturating_sub(self.began_ns);
        reply.advance(events, &rfc3339(clock::now()))
    }

    /// There is no line that says nothing.
    fn keep_alive(&self) -> Vec<u8> {
        Vec::new()
    }
}

fn answer(shape: Shape, wanted: Wanted, request: &Request) -> Result<(Option<Reply>, Step), Error> {
    let model = find(&wanted.model)?.id();
    let logprobs = wanted.sampling.logprobs.is_some();
    let reply = Reply::new(shape, wanted.model, wanted.stream, logprobs);
    let Some(input) = wanted.input else {
        let response = reply.loaded(wanted.unloads, &rfc3339(clock::now()));
        return Ok((None, Step::Respond(response)));
    };
    let head = Head {
        status: 200,
        headers: reply::headers(wanted.stream),
        incremental: wanted.stream,
    };
    let generation = Generation {
        model: Some(model),
        input,
        images: pictures(wanted.images, request)?,
        sampling: wanted.sampling,
        max_tokens: wanted.max_tokens,
        stop: wanted.stop,
        format: wanted.format.into(),
        tools: wanted.tools.tools.into_iter().map(ToolSpec::from).collect(),
        // The API has no word for another choice.
        tool_choice: ToolChoice::Auto,
        parallel_tools: wanted.tools.parallel,
        count: 1,
        extensions: wanted.extensions,
    };
    Ok((Some(reply), Step::Generate((head, vec![generation]))))
}

/// Takes the pictures from where they are.
fn pictures(pictures: Vec<Picture>, request: &Request) -> Result<Vec<Source>, Error> {
    let blob = |index| request.blob(index).map(Source::Blob);
    Ok(sources(pictures, Source::Url, blob)?)
}

fn version() -> Value {
    json!({ "version": API_VERSION })
}

fn tags() -> Value {
    json!({ "models": model::available().iter().map(tag).collect::<Value>() })
}

fn tag(model: &model::Handle) -> Value {
    let id = model.id();
    let size: u64 = detail(model, "weights_bytes").parse().unwrap_or(0);
    json!({
        "name": id,
        "model": id,
        "modified_at": rfc3339(model.created().saturating_mul(1000)),
        "size": size,
        "digest": detail(model, "digest"),
        "details": details(model),
    })
}

/// What is loaded: every model there is, for good.
fn running() -> Value {
    let now = clock::now();
    let running = |model: &model::Handle| resident(tag(model), model.context_length(), now);
    json!({ "models": model::available().iter().map(running).collect::<Value>() })
}

/// A tag, and what is told of a model that is loaded beside it.
fn resident(mut tag: Value, context_length: u32, now_ms: u64) -> Value {
    let for_good = now_ms.saturating_add(AGE_MS);
    tag["expires_at"] = json!(rfc3339(for_good));
    tag["size_vram"] = json!(0);
    tag["context_length"] = json!(context_length);
    tag
}

fn show(request: &Request) -> Result<Value, Error> {
    let body = Field::json(&request.text()?)?;
    let model = find(&request::model(&Field::body(&body)?)?)?;
    let mut capabilities = vec!["completion", "tools"];
    capabilities.extend(model.vision().is_some().then_some("vision"));
    let family = detail(&model, "family");
    let context_length = format!("{family}.context_length");
    Ok(json!({
        "modelfile": "",
        "parameters": "",
        "template": "",
        "modified_at": rfc3339(model.created().saturating_mul(1000)),
        "details": details(&model),
        "model_info": {
            "general.architecture": family,
            context_length: model.context_length(),
        },
        "capabilities": capabilities,
    }))
}

fn details(model: &model::Handle) -> Value {
    let family = detail(model, "family");
    json!({
        "parent_model": "",
        "format": "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": detail(model, "quantization"),
    })
}

/// A detail that the host may tell of its model, or nothing.
fn detail(model: &model::Handle, key: &str) -> String {
    let found = model.details().into_iter().find(|(own, _)| own == key);
    found.map(|(_, value)| value).unwrap_or_default()
}

fn find(name: &str) -> Result<model::Handle, Error> {
    let bare = name.strip_suffix(LATEST).unwrap_or(name);
    model::find(name)
        .or_else(|| model::find(bare))
        .ok_or_else(|| Error {
            code: ErrorCode::NotFound,
            message: format!("model '{name}' not found"),
            param: None,
            retry_after: None,
        })
}

into_bindings!(Format);
into_bindings!(Tool);
into_bindings!(Wrong);

#[cfg(test)]
mod tests {
    use super::*;

    /// Copilot Chat of VS Code and others compare it with what they need, number by number.
    #[test]
    fn the_version_is_recent_enough_for_clients() {
        let version = version()["version"].clone();
        let numbers = version.as_str().unwrap().split('.');
        let numbers: Vec<u32> = numbers.map(|number| number.parse().unwrap()).collect();
        assert!(
            numbers.len() == 3 && numbers >= vec![0, 14, 2],
            "{numbers:?}"
        );
    }

    #[test]
    fn a_loaded_model_is_told_with_its_context() {
        let loaded = resident(json!({ "name": "m" }), 4096, 0);
        let told = json!({
            "name": "m", "expires_at": "2069-12-07T00:00:00.000Z", "size_vram": 0, "context_length": 4096,
        });
        assert_eq!(loaded, told);
    }
}
