//! Writes answers: one completion, or a stream of chunks; and every kind of error.
//!
//! Pure: events in, bytes out, so a conversation can be replayed in a test.

use serde_json::{Value, json};

use crate::exports::visor::plugin::adapter::{Event, Next, Progress, Response};
use crate::visor::plugin::types::{Error, ErrorCode, FinishReason, Usage};

/// An answer in the making.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) id: String,
    /// Unix seconds.
    pub(crate) created: u64,
    pub(crate) model: String,
    /// How the client wants it.
    pub(crate) stream: bool,
    /// Whether a stream ends with a chunk of counts.
    pub(crate) include_usage: bool,
    /// Whether the first chunk is out.
    begun: bool,
    /// All text so far, when the answer is one piece.
    text: String,
    finish_reason: Option<&'static str>,
}

impl Reply {
    pub(crate) fn new(id: String, created: u64, model: String) -> Self {
        let (stream, include_usage, begun) = (false, false, false);
        Self {
            id,
            created,
            model,
            stream,
            include_usage,
            begun,
            text: String::new(),
            finish_reason: None,
        }
    }

    /// Takes what happened; gives the bytes to write now.
    ///
    /// # Errors
    /// What went wrong before anything was written, for `render-error`. Later it is an event of the
    /// stream: the status line is out, and a torn connection would tell the client nothing.
    pub(crate) fn advance(&mut self, events: Vec<Event>) -> Result<Progress, Error> {
        let mut bytes = Vec::new();
        for event in events {
            match self.event(event, &mut bytes) {
                Ok(Next::More) => {}
                Ok(next) => return Ok(Progress { bytes, next }),
                Err(error) if self.begun => {
                    bytes.extend(error_event(&error));
                    return Ok(Progress {
                        bytes,
                        next: Next::End,
                    });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Progress {
            bytes,
            next: Next::More,
        })
    }

    fn event(&mut self, event: Event, bytes: &mut Vec<u8>) -> Result<Next, Error> {
        match event {
            Event::Started(_) => self.begin(bytes),
            Event::Delta(delta) if self.stream => {
                self.begin(bytes);
                bytes.extend(self.chunk(json!({ "content": delta.text }), None));
            }
            Event::Delta(delta) => self.text.push_str(&delta.text),
            // We offered the model no tools.
            Event::ToolCall(_) => {}
            Event::Finish(finish) => self.finish(finish_reason(finish.reason)?, bytes),
            Event::Done(total) => {
                self.finish("stop", bytes);
                self.done(&total.usage, bytes);
                return Ok(Next::End);
            }
            Event::Failed((_, error)) => return Err(error),
        }
        Ok(Next::More)
    }

    /// The first chunk of a stream says who speaks.
    fn begin(&mut self, bytes: &mut Vec<u8>) {
        if self.stream && !self.begun {
            self.begun = true;
            bytes.extend(self.chunk(
                json!({ "role": "assistant", "content": "", "refusal": null }),
                None,
            ));
        }
    }

    /// The terminal chunk. There is exactly one: the first reason stays.
    fn finish(&mut self, reason: &'static str, bytes: &mut Vec<u8>) {
        if self.finish_reason.is_none() {
            self.begin(bytes);
            self.finish_reason = Some(reason);
            if self.stream {
                bytes.extend(self.chunk(json!({}), Some(reason)));
            }
        }
    }

    fn done(&self, usage: &Usage, bytes: &mut Vec<u8>) {
        if !self.stream {
            bytes.extend(self.completion(usage).to_string().into_bytes());
            return;
        }
        if self.include_usage {
            bytes.extend(self.event_data(json!([]), Some(usage)));
        }
        bytes.extend(b"data: [DONE]\n\n");
    }

    fn completion(&self, usage: &Usage) -> Value {
        json!({
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [{
                "index": 0,
                "message": { "role": "assistant", "content": self.text, "refusal": null },
                "logprobs": null,
                "finish_reason": self.finish_reason,
            }],
            "usage": counts(usage),
        })
    }

    fn chunk(&self, delta: Value, reason: Option<&str>) -> Vec<u8> {
        let choice =
            json!({ "index": 0, "delta": delta, "logprobs": null, "finish_reason": reason });
        self.event_data(json!([choice]), None)
    }

    /// One event of the stream. `usage` is null on all but the last, and a key only when asked for.
    fn event_data(&self, choices: Value, usage: Option<&Usage>) -> Vec<u8> {
        let mut chunk = json!({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        if self.include_usage {
            chunk["usage"] = usage.map_or(Value::Null, counts);
        }
        format!("data: {chunk}\n\n").into_bytes()
    }
}

fn finish_reason(reason: FinishReason) -> Result<&'static str, Error> {
    match reason {
        FinishReason::Stop => Ok("stop"),
        FinishReason::Length => Ok("length"),
        FinishReason::ToolCalls => Ok("tool_calls"),
        FinishReason::ContentFilter => Ok("content_filter"),
        // The API has no word for these, and half an answer must not look like a whole one.
        FinishReason::Cancelled | FinishReason::Failed => Err(Error {
            code: ErrorCode::Internal,
            message: "The server ended the answer early.".to_owned(),
            param: None,
            retry_after: None,
        }),
    }
}

fn counts(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens.saturating_add(usage.completion_tokens),
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "audio_tokens": 0,
            "image_tokens": usage.image_tokens,
        },
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    })
}

/// Any error, as a response of its own or, `mid_stream`, as the last event of one.
pub(crate) fn render_error(error: &Error, mid_stream: bool) -> Response {
    let (status, _, _) = words(error);
    if mid_stream {
        return Response {
            status,
            headers: Vec::new(),
            body: error_event(error),
        };
    }
    let mut response = json_response(status, &error_object(error));
    let retry_after = error
        .retry_after
        .map(|seconds| ("retry-after".to_owned(), seconds.to_string()));
    response.headers.extend(retry_after);
    response
}

/// A whole response.
pub(crate) fn json_response(status: u16, body: &Value) -> Response {
    Response {
        status,
        headers: headers("application/json"),
        body: body.to_string().into_bytes(),
    }
}

/// The headers of a body of that type.
pub(crate) fn headers(content_type: &str) -> Vec<(String, String)> {
    vec![("content-type".to_owned(), content_type.to_owned())]
}

fn error_event(error: &Error) -> Vec<u8> {
    format!("data: {}\n\n", error_object(error)).into_bytes()
}

/// The API requires all four keys, also where there is nothing to say.
fn error_object(error: &Error) -> Value {
    let (_, kind, code) = words(error);
    json!({ "error": { "message": error.message, "type": kind, "param": error.param, "code": code } })
}

/// Status, type and code.
fn words(error: &Error) -> (u16, &'static str, Option<&'static str>) {
    match error.code {
        ErrorCode::InvalidRequest => (400, "invalid_request_error", None),
        ErrorCode::NotFound if error.param.as_deref() == Some("model") => {
            (404, "invalid_request_error", Some("model_not_found"))
        }
        ErrorCode::NotFound => (404, "invalid_request_error", Some("not_found")),
        ErrorCode::Unsupported => (400, "invalid_request_error", Some("unsupported_value")),
        ErrorCode::TooLarge => (413, "invalid_request_error", Some("request_too_large")),
        ErrorCode::ContextOverflow => (
            400,
            "invalid_request_error",
            Some("context_length_exceeded"),
        ),
        ErrorCode::Overloaded => (503, "overloaded_error", Some("overloaded")),
        ErrorCode::Timeout => (504, "server_error", Some("timeout")),
        ErrorCode::Internal => (500, "server_error", Some("internal_error")),
    }
}

#[cfg(test)]
mod tests;
