//! An adapter that misbehaves when told to; see `misdeeds.rs`. Main function: `start`.
//!
//! Left alone, it hands the body to the model as one user message and answers in plain text.
//! Deeds of its own: `huge` (a body of 8 MiB), `lie` (an image that was not sent), `status` (9999),
//! `header` (a line break in one), `flood` (the log), `handles`, and in `advance` also `never-end`
//! and `frame` (16 KiB around a text).

#![expect(missing_docs, reason = "what `generate!` makes is documented in wit/")]

use std::cell::RefCell;

use visor_test_guests::{configure, deed, huge_string, main_deed};

wit_bindgen::generate!({ world: "adapter-plugin", path: "../../wit" });

use exports::visor::plugin::adapter::{
    self, Event, Exchange, Frame, Generation, GuestExchange, Head, Input, Next, OutputFormat,
    Progress, Response, Route, Sampling, Step, ToolChoice,
};
use exports::visor::plugin::lifecycle;
use visor::plugin::adapter_input::Request;
use visor::plugin::types::{Error, Message, Part, Role};
use visor::plugin::{log, model};

struct Bad;

#[cfg(target_arch = "wasm32")]
export!(Bad);

impl lifecycle::Guest for Bad {
    fn describe() -> lifecycle::Info {
        lifecycle::Info {
            name: "bad-adapter".to_owned(),
            version: "1".to_owned(),
            description: "misbehaves when told to".to_owned(),
            config_schema: None,
        }
    }

    fn configure(config: String) -> Result<(), Vec<lifecycle::Issue>> {
        configure(&config);
        deed("configure");
        Ok(())
    }
}

impl adapter::Guest for Bad {
    type Exchange = Echo;

    fn routes() -> Vec<Route> {
        deed("routes");
        let route = |method: &str, path: &str| Route {
            method: method.to_owned(),
            path: path.to_owned(),
            max_body: None,
        };
        vec![route("POST", "/chat/completions"), route("GET", "/models")]
    }

    fn render_error(error: Error, _mid_stream: bool) -> Response {
        deed("render-error");
        plain(500, format!("bad-adapter: {}", error.message))
    }
}

struct Echo(RefCell<String>);

impl GuestExchange for Echo {
    fn start(request: Request) -> Result<(Exchange, Step), Error> {
        let text = request.text();
        let about = text.as_deref().unwrap_or_default();
        let deed = main_deed("start", about);
        let step = match deed.as_str() {
            "huge" => Step::Respond(plain(200, huge_string())),
            "status" => Step::Respond(plain(9999, String::new())),
            "header" => {
                let mut response = plain(200, String::new());
                response
                    .headers
                    .push(("x-split".to_owned(), "a\r\nset-cookie: b".to_owned()));
                Step::Respond(response)
            }
            _ if request.method() == "GET" => Step::Respond(plain(200, "hello".to_owned())),
            _ => {
                misuse(&deed);
                generate(text?, deed == "lie")
            }
        };
        Ok((Exchange::new(Self(RefCell::default())), step))
    }

    fn advance(&self, events: Vec<Event>) -> Result<Progress, Error> {
        let deed = deed("advance");
        misuse(&deed);
        let mut next = Next::More;
        for event in events {
            match event {
                Event::Delta(delta) => self.0.borrow_mut().push_str(&delta.text),
                Event::Done(_) if deed != "never-end" => next = Next::End,
                Event::Failed((_, error)) => return Err(error),
                _ => {}
            }
        }
        let bytes = match (deed.as_str(), &next) {
            ("huge", _) => huge_string().into_bytes(),
            (_, Next::End) => self.0.take().into_bytes(),
            _ => Vec::new(),
        };
        let frame = (deed == "frame").then(|| Frame {
            generation: 0,
            choice: 0,
            before: vec![b'<'; 1 << 14],
            after: Vec::new(),
        });
        Ok(Progress { bytes, next, frame })
    }

    fn keep_alive(&self) -> Vec<u8> {
        deed("keep-alive");
        Vec::new()
    }
}

fn misuse(deed: &str) {
    match deed {
        "flood" => {
            (0..2_000).for_each(|_| log::emit(log::Level::Error, &"flood ".repeat(2_000), &[]))
        }
        "handles" => loop {
            std::mem::forget(model::available());
        },
        _ => {}
    }
}

fn generate(text: String, lie: bool) -> Step {
    let mut parts = vec![Part::Text(text)];
    if lie {
        parts.push(Part::Image(7));
    }
    let head = Head {
        status: 200,
        headers: text_headers(),
        incremental: false,
    };
    let none = None::<f32>;
    let generation = Generation {
        model: None,
        input: Input::Chat(vec![Message {
            role: Role::User,
            parts,
        }]),
        images: Vec::new(),
        sampling: Sampling {
            temperature: none,
            top_p: none,
            top_k: None,
            min_p: none,
            repetition_penalty: none,
            presence_penalty: none,
            frequency_penalty: none,
            logit_bias: Vec::new(),
            seed: None,
            logprobs: None,
        },
        max_tokens: Some(4),
        stop: Vec::new(),
        format: OutputFormat::Text,
        tools: Vec::new(),
        tool_choice: ToolChoice::Auto,
        parallel_tools: false,
        count: 1,
        extensions: Vec::new(),
    };
    Step::Generate((head, vec![generation]))
}

fn plain(status: u16, text: String) -> Response {
    Response {
        status,
        headers: text_headers(),
        body: text.into_bytes(),
    }
}

fn text_headers() -> Vec<(String, String)> {
    vec![("content-type".to_owned(), "text/plain".to_owned())]
}
