//! Writes answers: one object, or a line of JSON for each piece; and every kind of error.
//!
//! Pure: events in, bytes out.

use serde_json::{Value, json};

use crate::exports::visor::plugin::adapter::{
    Event, Next, Progress, Response, TokenChance, TokenInfo, Total,
};
use crate::visor::plugin::types::{Error, ErrorCode, FinishReason, ToolCall};

/// Which of the two calls is answered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Shape {
    Chat,
    Generate,
}

/// An answer in the making.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) shape: Shape,
    pub(crate) model: String,
    /// How the client wants it.
    pub(crate) stream: bool,
    /// Whether tokens are told with their probabilities.
    pub(crate) logprobs: bool,
    /// Nanoseconds since the request came, when it was last told of anything.
    pub(crate) spent_ns: u64,
    /// Whether the first line is out.
    begun: bool,
    /// All text and tokens so far, when the answer is one piece.
    text: String,
    tokens: Vec<TokenInfo>,
    calls: Vec<Value>,
    /// Calls so far.
    call_count: usize,
    reason: &'static str,
}

impl Reply {
    pub(crate) fn new(shape: Shape, model: String, stream: bool, logprobs: bool) -> Self {
        Self {
            shape,
            model,
            stream,
            logprobs,
            spent_ns: 0,
            begun: false,
            text: String::new(),
            tokens: Vec::new(),
            calls: Vec::new(),
            call_count: 0,
            reason: "stop",
        }
    }

    /// Takes what happened at `now`, a moment as RFC 3339; gives the bytes to write.
    ///
    /// # Errors
    /// What went wrong before anything was written, for `render-error`. Later it is a line of the
    /// stream.
    pub(crate) fn advance(&mut self, events: Vec<Event>, now: &str) -> Result<Progress, Error> {
        let mut bytes = Vec::new();
        // No frame: every line has a time of its own.
        let progress = |bytes, next| {
            Ok(Progress {
                bytes,
                next,
                frame: None,
            })
        };
        for event in events {
            match self.event(event, now, &mut bytes) {
                Ok(Next::More) => {}
                Ok(next) => return progress(bytes, next),
                Err(error) if self.begun => {
                    bytes.extend(error_line(&error));
                    return progress(bytes, Next::End);
                }
                Err(error) => return Err(error),
            }
        }
        progress(bytes, Next::More)
    }

    fn event(&mut self, event: Event, now: &str, bytes: &mut Vec<u8>) -> Result<Next, Error> {
        match event {
            Event::Started(_) => {}
            Event::ToolCall(call) => {
                let call = self.call(call.call);
                if self.stream {
                    self.begun = true;
                    let mut piece = self.piece("", &[], now);
                    piece["message"]["tool_calls"] = json!([call]);
                    bytes.extend(line(&piece));
                } else {
                    self.calls.push(call);
                }
            }
            Event::Delta(delta) if self.stream => {
                self.begun = true;
                let piece = self.piece(&delta.text, &delta.tokens, now);
                bytes.extend(line(&piece));
            }
            Event::Delta(delta) => {
                self.text.push_str(&delta.text);
                self.tokens.extend(delta.tokens);
            }
            Event::Finish(finish) => self.reason = reason(finish.reason)?,
            Event::Done(total) => {
                let mut last = self.piece(&self.text, &self.tokens, now);
                if !self.calls.is_empty() {
                    last["message"]["tool_calls"] = json!(self.calls);
                }
                self.sum_up(&mut last, &total);
                bytes.extend(if self.stream {
                    line(&last)
                } else {
                    last.to_string().into_bytes()
                });
                return Ok(Next::End);
            }
            Event::Failed((_, error)) => return Err(error),
        }
        Ok(Next::More)
    }

    fn piece(&self, text: &str, tokens: &[TokenInfo], now: &str) -> Value {
        let mut piece = json!({ "model": self.model, "created_at": now, "done": false });
        match self.shape {
            Shape::Chat => piece["message"] = json!({ "role": "assistant", "content": text }),
            Shape::Generate => piece["response"] = json!(text),
        }
        if self.logprobs && !tokens.is_empty() {
            piece["logprobs"] = tokens.iter().map(token).collect();
        }
        piece
    }

    /// A call, whose arguments are an object with this API.
    fn call(&mut self, call: ToolCall) -> Value {
        let index = self.call_count;
        self.call_count += 1;
        let arguments: Value = serde_json::from_str(&call.arguments).unwrap_or_else(|_| json!({}));
        json!({
            "id": format!("call_{}", call.id),
            "function": { "index": index, "name": call.name, "arguments": arguments },
        })
    }

    /// What the last piece has beside the others. Times are nanoseconds, and clients divide by them: where nothing was computed for an
    /// answer that is kept from before, all there is is how long it took.
    fn sum_up(&self, piece: &mut Value, total: &Total) {
        let nanos = |micros: u64| micros.saturating_mul(1000);
        let all = total.queue_micros.saturating_add(total.prefill_micros);
        let all = all.saturating_add(total.decode_micros);
        piece["done"] = json!(true);
        piece["done_reason"] = json!(self.reason);
        let all = nanos(all).max(self.spent_ns).max(1);
        let of_all = |micros: u64| match nanos(micros) {
            0 => all,
            part => part,
        };
        piece["total_duration"] = json!(all);
        piece["load_duration"] = json!(0);
        piece["prompt_eval_count"] = json!(total.usage.prompt_tokens);
        piece["prompt_eval_duration"] = json!(of_all(total.prefill_micros));
        piece["eval_count"] = json!(total.usage.completion_tokens);
        piece["eval_duration"] = json!(of_all(total.decode_micros));
    }

    /// The answer to a request that only wants the model to be there, or to be gone.
    pub(crate) fn loaded(&self, unloads: bool, now: &str) -> Response {
        let mut piece = self.piece("", &[], now);
        piece["done"] = json!(true);
        piece["done_reason"] = json!(if unloads { "unload" } else { "load" });
        Response {
            status: 200,
            headers: headers(self.stream),
            body: line(&piece),
        }
    }
}

fn token(info: &TokenInfo) -> Value {
    let mut token = chance(&info.chosen);
    token["top_logprobs"] = info.alternatives.iter().map(chance).collect();
    token
}

fn chance(chance: &TokenChance) -> Value {
    json!({
        "token": String::from_utf8_lossy(&chance.bytes),
        "logprob": chance.logprob.max(-9999.0),
        "bytes": chance.bytes,
    })
}

fn reason(reason: FinishReason) -> Result<&'static str, Error> {
    match reason {
        FinishReason::Stop | FinishReason::ToolCalls => Ok("stop"),
        FinishReason::Length => Ok("length"),
        // The API has no word for this, and half an answer must not look like a whole one.
        FinishReason::Cancelled => Err(Error {
            code: ErrorCode::Internal,
            message: "the server ended the answer early".to_owned(),
            param: None,
            retry_after: None,
        }),
    }
}

fn line(value: &Value) -> Vec<u8> {
    format!("{value}\n").into_bytes()
}

/// The headers of one object, or of a line for each piece.
pub(crate) fn headers(stream: bool) -> Vec<(String, String)> {
    let content_type = if stream {
        "application/x-ndjson"
    } else {
        "application/json; charset=utf-8"
    };
    vec![("content-type".to_owned(), content_type.to_owned())]
}

/// A whole response.
pub(crate) fn json_response(status: u16, body: &Value) -> Response {
    Response {
        status,
        headers: headers(false),
        body: body.to_string().into_bytes(),
    }
}

fn error_line(error: &Error) -> Vec<u8> {
    line(&error_object(error))
}

/// Any error, as a response of its own or, `mid_stream`, as the last line of one.
pub(crate) fn render_error(error: &Error, mid_stream: bool) -> Response {
    let mut response = json_response(status(error.code), &error_object(error));
    if mid_stream {
        response.body = error_line(error);
    }
    let retry_after = error
        .retry_after
        .map(|seconds| ("retry-after".to_owned(), seconds.to_string()));
    response.headers.extend(retry_after);
    response
}

/// The API has no key for the parameter at fault, so it stands before the message.
fn error_object(error: &Error) -> Value {
    match &error.param {
        Some(param) if !error.message.contains(param.as_str()) => {
            json!({ "error": format!("{param}: {}", error.message) })
        }
        _ => json!({ "error": error.message }),
    }
}

fn status(code: ErrorCode) -> u16 {
    match code {
        ErrorCode::InvalidRequest | ErrorCode::Unsupported | ErrorCode::ContextOverflow => 400,
        ErrorCode::NotFound => 404,
        ErrorCode::TooLarge => 413,
        ErrorCode::Unauthorized => 401,
        ErrorCode::RateLimited => 429,
        ErrorCode::Overloaded => 503,
        ErrorCode::Timeout => 504,
        ErrorCode::Internal => 500,
    }
}

#[cfg(test)]
mod tests;
