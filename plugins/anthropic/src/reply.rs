//! Writes answers: one message, or the events of one; a count; and every kind of error.
//!
//! Pure: events in, bytes out.

use serde_json::{Value, json};

use crate::exports::visor::plugin::adapter::{Event, Frame, Next, Progress, Response};
use crate::visor::plugin::types::{Error, ErrorCode, FinishReason, ToolCall, Usage};

/// Why an answer ended that is as long as it may be: as the client has it, or the operator.
const LENGTH: &str = "max_tokens";

/// How the client wants the answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Shape {
    Whole,
    Stream,
    /// Only the size of the prompt.
    Count,
}

/// What ends an answer that does not end itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Most tokens of the answer, as the client has it.
    pub(crate) max_tokens: u32,
    /// Most tokens of prompt and answer together, as the model has it.
    pub(crate) context_tokens: u32,
}

/// An answer in the making.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) shape: Shape,
    pub(crate) id: String,
    pub(crate) model: String,
    /// The client's, to tell them from the template's.
    pub(crate) stop_sequences: Vec<String>,
    limits: Limits,
    /// Whether the first event is out.
    begun: bool,
    /// Blocks of a stream so far.
    blocks: u32,
    /// Whether they are calls, each complete, and not a text that is open to the end.
    called: bool,
    /// All text so far, when the answer is one piece.
    text: String,
    /// Blocks of calls, likewise.
    calls: Vec<Value>,
    /// Why it ended, and the client's string that ended it.
    stop: Option<(&'static str, Option<String>)>,
}

impl Reply {
    pub(crate) fn new(
        shape: Shape,
        id: String,
        model: String,
        stop_sequences: Vec<String>,
        limits: Limits,
    ) -> Self {
        Self {
            shape,
            id,
            model,
            stop_sequences,
            limits,
            begun: false,
            blocks: 0,
            called: false,
            text: String::new(),
            calls: Vec::new(),
            stop: None,
        }
    }

    /// Takes what happened; gives the bytes to write now.
    ///
    /// # Errors
    /// What went wrong before anything was written, for `render-error`. Later it is an event of the
    /// stream.
    pub(crate) fn advance(&mut self, events: Vec<Event>) -> Result<Progress, Error> {
        let mut bytes = Vec::new();
        let progress = |bytes, next, frame| Ok(Progress { bytes, next, frame });
        // The first text opens its block, too.
        let framed = matches!(events[..], [Event::Delta(_)]) && self.blocks > 0;
        for event in events {
            match self.event(event, &mut bytes) {
                Ok(Next::More) => {}
                Ok(next) => return progress(bytes, next, None),
                Err(error) if self.begun => {
                    bytes.extend(error_event(&error));
                    return progress(bytes, Next::End, None);
                }
                Err(error) => return Err(error),
            }
        }
        let framed = framed && self.shape == Shape::Stream;
        progress(bytes, Next::More, framed.then(frame))
    }

    fn event(&mut self, event: Event, bytes: &mut Vec<u8>) -> Result<Next, Error> {
        match event {
            Event::Started((_, usage)) => self.begin(&usage, bytes),
            Event::Delta(delta) if self.shape == Shape::Stream => {
                self.open_text(bytes);
                bytes.extend(text_delta(&delta.text));
            }
            Event::Delta(delta) => self.text.push_str(&delta.text),
            Event::ToolCall(call) => self.call(call.call, bytes),
            Event::Finish(finish) => {
                self.stop = Some(self.stop(finish.reason, finish.matched_stop)?);
            }
            Event::Done(total) => {
                self.name_limit(&total.usage);
                self.done(&total.usage, bytes);
                return Ok(Next::End);
            }
            Event::Failed((_, error)) => return Err(error),
        }
        Ok(Next::More)
    }

    fn begin(&mut self, usage: &Usage, bytes: &mut Vec<u8>) {
        if self.shape != Shape::Stream || self.begun {
            return;
        }
        self.begun = true;
        let message = self.message(json!([]), usage);
        bytes.extend(named("message_start", json!({ "message": message })));
    }

    /// An answer that is text is one block.
    fn open_text(&mut self, bytes: &mut Vec<u8>) {
        if self.blocks == 0 {
            self.blocks = 1;
            let block = json!({ "type": "text", "text": "" });
            bytes.extend(named(
                "content_block_start",
                json!({ "index": 0, "content_block": block }),
            ));
        }
    }

    /// A call is whole when it comes, and a block of its own.
    fn call(&mut self, call: ToolCall, bytes: &mut Vec<u8>) {
        let id = format!("toolu_{}", call.id);
        let block = |input: Value| json!({ "type": "tool_use", "id": id, "name": call.name, "input": input });
        if self.shape != Shape::Stream {
            let input = serde_json::from_str(&call.arguments);
            self.calls.push(block(input.unwrap_or_else(|_| json!({}))));
            return;
        }
        let index = self.blocks;
        self.blocks += 1;
        let delta = json!({ "type": "input_json_delta", "partial_json": call.arguments });
        let start = json!({ "index": index, "content_block": block(json!({})) });
        bytes.extend(named("content_block_start", start));
        bytes.extend(named(
            "content_block_delta",
            json!({ "index": index, "delta": delta }),
        ));
        bytes.extend(named("content_block_stop", json!({ "index": index })));
        self.called = true;
    }

    /// An answer can be cut by the end of the context before it is as long as the client lets it be.
    fn name_limit(&mut self, usage: &Usage) {
        let Limits {
            max_tokens,
            context_tokens,
        } = self.limits;
        let tokens = usage.prompt_tokens.saturating_add(usage.completion_tokens);
        let fills = tokens >= context_tokens && usage.completion_tokens < max_tokens;
        if let Some((reason, _)) = &mut self.stop
            && *reason == LENGTH
            && fills
        {
            *reason = "model_context_window_exceeded";
        }
    }

    fn done(&mut self, usage: &Usage, bytes: &mut Vec<u8>) {
        match self.shape {
            Shape::Count => {
                let count = json!({ "input_tokens": usage.prompt_tokens });
                bytes.extend(count.to_string().into_bytes());
            }
            Shape::Whole => {
                let content = match &self.calls[..] {
                    [] => json!([{ "type": "text", "text": self.text }]),
                    calls => json!(calls),
                };
                let message = self.message(content, usage);
                bytes.extend(message.to_string().into_bytes());
            }
            Shape::Stream => {
                self.begin(usage, bytes);
                let (reason, sequence) = self.stop.clone().unzip();
                if !self.called {
                    self.open_text(bytes);
                    bytes.extend(named("content_block_stop", json!({ "index": 0 })));
                }
                let delta = json!({ "stop_reason": reason, "stop_sequence": sequence.flatten() });
                let message = json!({ "delta": delta, "usage": counts(usage) });
                bytes.extend(named("message_delta", message));
                bytes.extend(named("message_stop", json!({})));
            }
        }
    }

    fn message(&self, content: Value, usage: &Usage) -> Value {
        let (reason, sequence) = self.stop.clone().unzip();
        json!({
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence.flatten(),
            "usage": counts(usage),
        })
    }

    fn stop(
        &self,
        reason: FinishReason,
        matched: Option<String>,
    ) -> Result<(&'static str, Option<String>), Error> {
        match reason {
            FinishReason::Stop => {
                let own = matched.filter(|stop| self.stop_sequences.contains(stop));
                let word = if own.is_some() {
                    "stop_sequence"
                } else {
                    "end_turn"
                };
                Ok((word, own))
            }
            FinishReason::Length => Ok((LENGTH, None)),
            FinishReason::ToolCalls => Ok(("tool_use", None)),
            // The API has no word for this, and half an answer must not look like a whole one.
            FinishReason::Cancelled => Err(Error {
                code: ErrorCode::Internal,
                message: "The server ended the answer early.".to_owned(),
                param: None,
                retry_after: None,
            }),
        }
    }
}

/// Tokens as this API adds them up: those from a cache are not part of the input.
fn counts(usage: &Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens.saturating_sub(usage.cached_tokens),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    })
}

fn text_delta(text: &str) -> Vec<u8> {
    let delta = json!({ "type": "text_delta", "text": text });
    let data = json!({ "index": 0, "delta": delta });
    named("content_block_delta", data)
}

/// Texts differ in nothing else.
fn frame() -> Frame {
    let event = text_delta("");
    const TEXT: &[u8] = br#""text":"""#;
    let at = event.windows(TEXT.len()).position(|bytes| bytes == TEXT);
    let at = at.expect("a text has that key") + TEXT.len() - 2;
    Frame {
        generation: 0,
        choice: 0,
        before: event[..at].to_vec(),
        after: event[at + 2..].to_vec(),
    }
}

/// One event of a stream: its data says its name again.
fn named(name: &str, mut data: Value) -> Vec<u8> {
    data["type"] = json!(name);
    format!("event: {name}\ndata: {data}\n\n").into_bytes()
}

/// An event that says nothing: proxies see that the connection lives.
pub(crate) fn ping() -> Vec<u8> {
    named("ping", json!({}))
}

fn error_event(error: &Error) -> Vec<u8> {
    format!("event: error\ndata: {}\n\n", error_object(error)).into_bytes()
}

/// Any error, as a response of its own or, `mid_stream`, as the last event of one.
pub(crate) fn render_error(error: &Error, mid_stream: bool) -> Response {
    let (status, _) = words(error.code);
    if mid_stream {
        return Response {
            status,
            headers: Vec::new(),
            body: error_event(error),
        };
    }
    let retry_after = error
        .retry_after
        .map(|seconds| ("retry-after".to_owned(), seconds.to_string()));
    let mut headers = headers("application/json");
    headers.extend(retry_after);
    Response {
        status,
        headers,
        body: error_object(error).to_string().into_bytes(),
    }
}

/// The headers of a body of that type.
pub(crate) fn headers(content_type: &str) -> Vec<(String, String)> {
    vec![("content-type".to_owned(), content_type.to_owned())]
}

/// The API has no key for the parameter at fault, so it stands before the message.
fn error_object(error: &Error) -> Value {
    let (_, kind) = words(error.code);
    let message = match &error.param {
        Some(param) if !error.message.contains(param.as_str()) => {
            format!("{param}: {}", error.message)
        }
        _ => error.message.clone(),
    };
    json!({ "type": "error", "error": { "type": kind, "message": message } })
}

/// Status and type.
fn words(code: ErrorCode) -> (u16, &'static str) {
    match code {
        ErrorCode::InvalidRequest | ErrorCode::Unsupported | ErrorCode::ContextOverflow => {
            (400, "invalid_request_error")
        }
        ErrorCode::NotFound => (404, "not_found_error"),
        ErrorCode::TooLarge => (413, "request_too_large"),
        ErrorCode::Unauthorized => (401, "authentication_error"),
        ErrorCode::RateLimited => (429, "rate_limit_error"),
        ErrorCode::Overloaded => (529, "overloaded_error"),
        ErrorCode::Timeout => (504, "timeout_error"),
        ErrorCode::Internal => (500, "api_error"),
    }
}

#[cfg(test)]
mod tests;
