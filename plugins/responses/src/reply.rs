//! Writes answers: one response, or the events that build it; a count; and every kind of error.
//!
//! Pure: events in, bytes out.

use serde_json::{Map, Value, json};

use crate::exports::visor::plugin::adapter::{
    Delta, Event, Next, Progress, Response, TokenChance, TokenInfo,
};
use crate::visor::plugin::types::{Error, ErrorCode, FinishReason, ToolCall, Usage};

/// How the client wants the answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Shape {
    Whole,
    Stream,
    /// Only the size of the prompt.
    Count,
}

/// An answer in the making.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) shape: Shape,
    /// What the identifiers of the response and its message have in common.
    pub(crate) id: String,
    /// Unix seconds.
    pub(crate) created: u64,
    pub(crate) model: String,
    /// What is repeated of the request.
    pub(crate) repeated: Map<String, Value>,
    /// Events of the stream so far; each has its number.
    sequence: u64,
    /// Whether the message is open in a stream.
    opened: bool,
    text: String,
    tokens: Vec<TokenInfo>,
    /// Items of calls, each complete.
    calls: Vec<Value>,
    status: Status,
}

/// How far the response is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Status {
    InProgress,
    Completed,
    /// As many tokens as were asked for.
    Incomplete,
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
        }
    }
}

impl Reply {
    pub(crate) fn new(shape: Shape, id: String, created: u64, model: String) -> Self {
        Self {
            shape,
            id,
            created,
            model,
            repeated: Map::new(),
            sequence: 0,
            opened: false,
            text: String::new(),
            tokens: Vec::new(),
            calls: Vec::new(),
            status: Status::InProgress,
        }
    }

    /// Takes what happened; gives the bytes to write now.
    ///
    /// # Errors
    /// What went wrong before anything was written, for `render-error`. Later it is an event of the
    /// stream.
    pub(crate) fn advance(&mut self, events: Vec<Event>) -> Result<Progress, Error> {
        let mut bytes = Vec::new();
        // No frame: every event has a number of its own, and the last ones have all text.
        let progress = |bytes, next| {
            Ok(Progress {
                bytes,
                next,
                frame: None,
            })
        };
        for event in events {
            match self.event(event, &mut bytes) {
                Ok(Next::More) => {}
                Ok(next) => return progress(bytes, next),
                Err(error) if self.sequence > 0 => {
                    bytes.extend(error_event(&error, self.sequence));
                    return progress(bytes, Next::End);
                }
                Err(error) => return Err(error),
            }
        }
        progress(bytes, Next::More)
    }

    fn event(&mut self, event: Event, bytes: &mut Vec<u8>) -> Result<Next, Error> {
        match event {
            Event::Started(_) => self.begin(bytes),
            Event::Delta(delta) => self.delta(delta, bytes),
            Event::ToolCall(call) => self.call(&call.call, bytes),
            Event::Finish(finish) => self.status = status(finish.reason)?,
            Event::Done(total) => {
                self.done(&total.usage, bytes);
                return Ok(Next::End);
            }
            Event::Failed((_, error)) => return Err(error),
        }
        Ok(Next::More)
    }

    /// The events that open the response.
    fn begin(&mut self, bytes: &mut Vec<u8>) {
        if self.shape != Shape::Stream || self.sequence > 0 {
            return;
        }
        let response = self.response(None);
        self.tell("response.created", json!({ "response": response }), bytes);
        self.tell(
            "response.in_progress",
            json!({ "response": response }),
            bytes,
        );
    }

    /// The events that open its message and the message's text.
    fn open(&mut self, bytes: &mut Vec<u8>) {
        self.begin(bytes);
        if std::mem::replace(&mut self.opened, true) {
            return;
        }
        let item = self.message(json!([]));
        let added = json!({ "output_index": 0, "item": item });
        self.tell("response.output_item.added", added, bytes);
        let mut added = self.place();
        added["part"] = output_text("", &[]);
        self.tell("response.content_part.added", added, bytes);
    }

    fn delta(&mut self, delta: Delta, bytes: &mut Vec<u8>) {
        self.text.push_str(&delta.text);
        if self.shape == Shape::Stream {
            self.open(bytes);
            let mut told = self.place();
            told["delta"] = json!(delta.text);
            told["logprobs"] = logprobs(&delta.tokens);
            self.tell("response.output_text.delta", told, bytes);
        }
        self.tokens.extend(delta.tokens);
    }

    fn done(&mut self, usage: &Usage, bytes: &mut Vec<u8>) {
        if self.shape == Shape::Count {
            let count =
                json!({ "object": "response.input_tokens", "input_tokens": usage.prompt_tokens });
            bytes.extend(count.to_string().into_bytes());
            return;
        }
        if self.status == Status::InProgress {
            self.status = Status::Completed;
        }
        if self.shape == Shape::Whole {
            bytes.extend(self.response(Some(usage)).to_string().into_bytes());
            return;
        }
        if self.calls.is_empty() {
            self.close(bytes);
        }
        let response = json!({ "response": self.response(Some(usage)) });
        let name = format!("response.{}", self.status.word());
        self.tell(&name, response, bytes);
    }

    /// A call is whole when it comes, and an item of its own.
    fn call(&mut self, call: &ToolCall, bytes: &mut Vec<u8>) {
        let id = format!("fc_{}", call.id);
        let item = |arguments: &str, status: Status| {
            json!({
                "id": id,
                "type": "function_call",
                "status": status.word(),
                "call_id": format!("call_{}", call.id),
                "name": call.name,
                "arguments": arguments,
            })
        };
        let index = self.calls.len();
        let done = item(&call.arguments, Status::Completed);
        self.calls.push(done.clone());
        if self.shape != Shape::Stream {
            return;
        }
        self.begin(bytes);
        let started = item("", Status::InProgress);
        let added = json!({ "output_index": index, "item": started });
        self.tell("response.output_item.added", added, bytes);
        let told = json!({ "item_id": id, "output_index": index, "delta": call.arguments });
        self.tell("response.function_call_arguments.delta", told, bytes);
        let told = json!({ "item_id": id, "output_index": index, "name": call.name, "arguments": call.arguments });
        self.tell("response.function_call_arguments.done", told, bytes);
        let told = json!({ "output_index": index, "item": done });
        self.tell("response.output_item.done", told, bytes);
    }

    /// The events that end the message.
    fn close(&mut self, bytes: &mut Vec<u8>) {
        self.open(bytes);
        let part = output_text(&self.text, &self.tokens);
        let mut told = self.place();
        told["text"] = part["text"].clone();
        told["logprobs"] = part["logprobs"].clone();
        self.tell("response.output_text.done", told, bytes);
        let mut told = self.place();
        told["part"] = part.clone();
        self.tell("response.content_part.done", told, bytes);
        let item = self.message(json!([part]));
        let told = json!({ "output_index": 0, "item": item });
        self.tell("response.output_item.done", told, bytes);
    }

    /// One event of the stream: its data says its name again, and its number.
    fn tell(&mut self, name: &str, mut data: Value, bytes: &mut Vec<u8>) {
        data["type"] = json!(name);
        data["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        bytes.extend(format!("event: {name}\ndata: {data}\n\n").into_bytes());
    }

    /// Where the text stands: in the first part of the first item.
    fn place(&self) -> Value {
        json!({ "item_id": self.message_id(), "output_index": 0, "content_index": 0 })
    }

    fn message_id(&self) -> String {
        format!("msg_{}", self.id)
    }

    fn message(&self, content: Value) -> Value {
        json!({
            "id": self.message_id(),
            "type": "message",
            "status": self.status.word(),
            "role": "assistant",
            "content": content,
        })
    }

    /// The response as it is now; with `usage` it is over.
    fn response(&self, usage: Option<&Usage>) -> Value {
        let over = usage.is_some();
        let text = || json!([output_text(&self.text, &self.tokens)]);
        let output = match (over, &self.calls[..]) {
            (false, _) => json!([]),
            (true, []) => json!([self.message(text())]),
            (true, calls) => json!(calls),
        };
        let incomplete =
            (self.status == Status::Incomplete).then(|| json!({ "reason": "max_output_tokens" }));
        let mut response = json!({
            "id": format!("resp_{}", self.id),
            "object": "response",
            "created_at": self.created,
            "status": self.status.word(),
            "background": false,
            "error": null,
            "incomplete_details": incomplete,
            "model": self.model,
            "output": output,
            "previous_response_id": null,
            "usage": usage.map(counts),
        });
        for (key, value) in &self.repeated {
            response[key] = value.clone();
        }
        response
    }
}

fn output_text(text: &str, tokens: &[TokenInfo]) -> Value {
    json!({
        "type": "output_text",
        "text": text,
        "annotations": [],
        "logprobs": logprobs(tokens),
    })
}

fn logprobs(tokens: &[TokenInfo]) -> Value {
    let token = |info: &TokenInfo| {
        let mut token = chance(&info.chosen);
        token["top_logprobs"] = info.alternatives.iter().map(chance).collect();
        token
    };
    tokens.iter().map(token).collect()
}

fn chance(chance: &TokenChance) -> Value {
    json!({
        "token": String::from_utf8_lossy(&chance.bytes),
        "logprob": chance.logprob.max(-9999.0),
        "bytes": chance.bytes,
    })
}

fn counts(usage: &Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
            "image_tokens": usage.image_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": { "reasoning_tokens": 0 },
        "total_tokens": usage.prompt_tokens.saturating_add(usage.completion_tokens),
    })
}

fn status(reason: FinishReason) -> Result<Status, Error> {
    match reason {
        FinishReason::Stop | FinishReason::ToolCalls => Ok(Status::Completed),
        FinishReason::Length => Ok(Status::Incomplete),
        // Half an answer must not look like a whole one.
        FinishReason::Cancelled => Err(Error {
            code: ErrorCode::Internal,
            message: "The server ended the answer early.".to_owned(),
            param: None,
            retry_after: None,
        }),
    }
}

/// The headers of a body of that type.
pub(crate) fn headers(content_type: &str) -> Vec<(String, String)> {
    vec![("content-type".to_owned(), content_type.to_owned())]
}

/// The last event of a stream that failed. `render-error` does not know the number, nor does any
/// client miss it.
fn error_event(error: &Error, sequence: u64) -> Vec<u8> {
    let (_, kind, code) = words(error);
    let data = json!({
        "type": "error",
        "code": code.unwrap_or(kind),
        "message": error.message,
        "param": param(error),
        "sequence_number": sequence,
    });
    format!("event: error\ndata: {data}\n\n").into_bytes()
}

/// Any error, as a response of its own or, `mid_stream`, as the last event of one.
pub(crate) fn render_error(error: &Error, mid_stream: bool) -> Response {
    let (status, kind, code) = words(error);
    if mid_stream {
        return Response {
            status,
            headers: Vec::new(),
            body: error_event(error, 0),
        };
    }
    let retry_after = error
        .retry_after
        .map(|seconds| ("retry-after".to_owned(), seconds.to_string()));
    let mut headers = headers("application/json");
    headers.extend(retry_after);
    let object = json!({ "error": {
        "message": error.message, "type": kind, "param": param(error), "code": code,
    }});
    Response {
        status,
        headers,
        body: object.to_string().into_bytes(),
    }
}

/// What is at fault, as this API calls it: the host names it as chats do.
fn param(error: &Error) -> Option<&str> {
    match error.param.as_deref() {
        Some("messages") => Some("input"),
        Some("max_tokens") => Some("max_output_tokens"),
        param => param,
    }
}

/// Status, type and code.
fn words(error: &Error) -> (u16, &'static str, Option<&'static str>) {
    const INVALID: &str = "invalid_request_error";
    match error.code {
        ErrorCode::InvalidRequest => (400, INVALID, None),
        ErrorCode::NotFound if error.param.as_deref() == Some("model") => {
            (404, INVALID, Some("model_not_found"))
        }
        ErrorCode::NotFound => (404, INVALID, Some("not_found")),
        ErrorCode::Unsupported => (400, INVALID, Some("unsupported_value")),
        ErrorCode::TooLarge => (413, INVALID, Some("request_too_large")),
        ErrorCode::ContextOverflow => (400, INVALID, Some("context_length_exceeded")),
        ErrorCode::Unauthorized => (401, INVALID, Some("invalid_api_key")),
        ErrorCode::RateLimited => (429, "rate_limit_error", Some("rate_limit_exceeded")),
        ErrorCode::Overloaded => (503, "overloaded_error", Some("overloaded")),
        ErrorCode::Timeout => (504, "server_error", Some("timeout")),
        ErrorCode::Internal => (500, "server_error", Some("internal_error")),
    }
}

#[cfg(test)]
mod tests;
