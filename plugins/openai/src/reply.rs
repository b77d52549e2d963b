//! Writes answers: one object, or a stream of chunks, for chats and for completions.
//!
//! A request may have several prompts. Each is a generation of its own, with as many answers as the
//! others; choices are numbered over all of them.
//!
//! Pure: events in, bytes out, so a conversation can be replayed in a test.

use std::ops::Range;

use serde::Serialize;
use serde_json::{Value, json};

use crate::error::error_event;
use crate::exports::visor::plugin::adapter::{Delta, Event, Frame, Next, Progress, TokenInfo};
use crate::logprobs;
use crate::visor::plugin::types::{Error, ErrorCode, FinishReason, ToolCall, Usage};

/// Which of the two APIs is answered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Shape {
    Chat,
    Completion,
}

/// An answer in the making.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) shape: Shape,
    pub(crate) id: String,
    /// Unix seconds.
    pub(crate) created: u64,
    pub(crate) model: String,
    /// How the client wants it.
    pub(crate) stream: bool,
    /// Whether a stream ends with a chunk of counts.
    pub(crate) include_usage: bool,
    /// Whether tokens are told with their probabilities.
    pub(crate) logprobs: bool,
    /// Whether the first chunk is out.
    begun: bool,
    /// Answers to each prompt.
    each: usize,
    /// Of all prompts, in their order.
    choices: Vec<Choice>,
    /// Generations that are not over.
    open: usize,
    /// Of those that are, together.
    usage: Usage,
}

/// One of several answers to the same request.
#[derive(Clone, Debug, Default)]
struct Choice {
    /// Whether its first chunk is out.
    begun: bool,
    /// All text and tokens so far, when the answer is one piece.
    text: String,
    tokens: Vec<TokenInfo>,
    /// As the API has them, when the answer is one piece.
    calls: Vec<Value>,
    /// Calls so far.
    call_count: usize,
    /// Characters of the tokens so far.
    offset: usize,
    finish_reason: Option<&'static str>,
}

/// A piece of an answer, as it goes over the wire: written as it is, since there may be one for every token.
#[derive(Serialize)]
struct Chunk<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: C,
    /// Null on all but the last, and a key only when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Value>,
}

/// What a token adds to an answer.
#[derive(Serialize)]
struct Piece<'a> {
    index: usize,
    #[serde(flatten)]
    text: Text<'a>,
    logprobs: Value,
    finish_reason: (),
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Text<'a> {
    Delta { content: &'a str },
    Text(&'a str),
}

impl Reply {
    /// Nothing is told yet of the answers to so many prompts, so many to each.
    pub(crate) fn new(
        shape: Shape,
        id: String,
        created: u64,
        (prompts, each): (usize, usize),
    ) -> Self {
        Self {
            shape,
            id,
            created,
            model: String::new(),
            stream: false,
            include_usage: false,
            logprobs: false,
            begun: false,
            each,
            choices: vec![Choice::default(); prompts * each],
            open: prompts,
            usage: Usage {
                prompt_tokens: 0,
                image_tokens: 0,
                cached_tokens: 0,
                completion_tokens: 0,
            },
        }
    }

    /// Takes what happened; gives the bytes to write now.
    ///
    /// # Errors
    /// What went wrong before anything was written, for `render-error`. Later it is an event of the
    /// stream: the status line is out, and a torn connection would tell the client nothing.
    pub(crate) fn advance(&mut self, events: Vec<Event>) -> Result<Progress, Error> {
        let mut bytes = Vec::new();
        let progress = |bytes, next, frame| Ok(Progress { bytes, next, frame });
        let framed = matches!(events[..], [Event::Delta(_)]) && self.begun;
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
        let frame = framed.then(|| self.frame()).flatten();
        progress(bytes, Next::More, frame)
    }

    fn event(&mut self, event: Event, bytes: &mut Vec<u8>) -> Result<Next, Error> {
        match event {
            Event::Started((generation, _)) => {
                for index in self.indices(generation) {
                    self.begin(index, bytes);
                }
            }
            Event::Delta(delta) => self.delta(delta, bytes),
            Event::ToolCall(call) => {
                self.call(self.index(call.generation, call.choice), call.call, bytes);
            }
            Event::Finish(finish) => {
                let index = self.index(finish.generation, finish.choice);
                self.finish(index, finish_reason(finish.reason)?, bytes);
            }
            Event::Done(total) => {
                for index in self.indices(total.generation) {
                    self.finish(index, "stop", bytes);
                }
                add(&mut self.usage, &total.usage);
                self.open = self.open.saturating_sub(1);
                if self.open == 0 {
                    self.done(bytes);
                    return Ok(Next::End);
                }
            }
            Event::Failed((_, error)) => return Err(error),
        }
        Ok(Next::More)
    }

    /// The number of a choice among those of all prompts.
    fn index(&self, generation: u32, choice: u32) -> usize {
        generation as usize * self.each + choice as usize
    }

    /// The numbers of all choices of a prompt.
    fn indices(&self, generation: u32) -> Range<usize> {
        let first = self.index(generation, 0);
        first..first + self.each
    }

    /// The first chunk of a choice in a chat says who speaks.
    fn begin(&mut self, index: usize, bytes: &mut Vec<u8>) {
        if !self.stream || self.choices[index].begun {
            return;
        }
        (self.begun, self.choices[index].begun) = (true, true);
        if self.shape == Shape::Chat {
            let delta = json!({ "role": "assistant", "content": "", "refusal": null });
            let choice = json!({
                "index": index, "delta": delta, "logprobs": null, "finish_reason": null,
            });
            self.write_chunk([choice], None, bytes);
        }
    }

    fn delta(&mut self, delta: Delta, bytes: &mut Vec<u8>) {
        let index = self.index(delta.generation, delta.choice);
        if !self.stream {
            self.choices[index].text.push_str(&delta.text);
            self.choices[index].tokens.extend(delta.tokens);
            return;
        }
        self.begin(index, bytes);
        let logprobs = self.told(&delta.tokens, self.choices[index].offset);
        let characters = |info: &TokenInfo| logprobs::characters(&info.chosen.bytes);
        self.choices[index].offset += delta.tokens.iter().map(characters).sum::<usize>();
        self.write_text(index, &delta.text, logprobs, bytes);
    }

    fn write_text(&self, index: usize, text: &str, logprobs: Value, bytes: &mut Vec<u8>) {
        let text = match self.shape {
            Shape::Chat => Text::Delta { content: text },
            Shape::Completion => Text::Text(text),
        };
        let piece = Piece {
            index,
            text,
            logprobs,
            finish_reason: (),
        };
        self.write_chunk([piece], None, bytes);
    }

    /// How the text of a stream is written that is the only choice and tells no tokens.
    fn frame(&self) -> Option<Frame> {
        if !self.stream || self.logprobs || self.choices.len() > 1 {
            return None;
        }
        let mut chunk = Vec::new();
        self.write_text(0, "", Value::Null, &mut chunk);
        let text: &[u8] = match self.shape {
            Shape::Chat => br#""content":"""#,
            Shape::Completion => br#""text":"""#,
        };
        let at = chunk.windows(text.len()).position(|bytes| bytes == text)? + text.len();
        Some(Frame {
            generation: 0,
            choice: 0,
            before: chunk[..at - 2].to_vec(),
            after: chunk[at..].to_vec(),
        })
    }

    /// A call is whole when it comes; a stream names it first, as the API does.
    fn call(&mut self, index: usize, call: ToolCall, bytes: &mut Vec<u8>) {
        let mut told = json!({
            "id": format!("call_{}", call.id),
            "type": "function",
            "function": { "name": call.name, "arguments": call.arguments },
        });
        if !self.stream {
            self.choices[index].calls.push(told);
            return;
        }
        self.begin(index, bytes);
        let number = self.choices[index].call_count;
        self.choices[index].call_count += 1;
        told["index"] = json!(number);
        let arguments = told["function"]["arguments"].take();
        told["function"]["arguments"] = json!("");
        let rest = json!({ "index": number, "function": { "arguments": arguments } });
        for call in [told, rest] {
            let delta = json!({ "tool_calls": [call] });
            let choice = json!({
                "index": index, "delta": delta, "logprobs": null, "finish_reason": null,
            });
            self.write_chunk([choice], None, bytes);
        }
    }

    /// The terminal chunk of a choice. There is exactly one: the first reason stays.
    fn finish(&mut self, index: usize, reason: &'static str, bytes: &mut Vec<u8>) {
        if self.choices[index].finish_reason.is_some() {
            return;
        }
        self.begin(index, bytes);
        self.choices[index].finish_reason = Some(reason);
        if self.stream {
            let mut choice = json!({ "index": index, "logprobs": null, "finish_reason": reason });
            match self.shape {
                Shape::Chat => choice["delta"] = json!({}),
                Shape::Completion => choice["text"] = json!(""),
            }
            self.write_chunk([choice], None, bytes);
        }
    }

    fn done(&self, bytes: &mut Vec<u8>) {
        if !self.stream {
            bytes.extend(self.whole().to_string().into_bytes());
            return;
        }
        if self.include_usage {
            self.write_chunk([(); 0], Some(&self.usage), bytes);
        }
        bytes.extend(b"data: [DONE]\n\n");
    }

    fn whole(&self) -> Value {
        let choice = |(index, choice): (usize, &Choice)| {
            let mut told = json!({
                "index": index,
                "logprobs": self.told(&choice.tokens, 0),
                "finish_reason": choice.finish_reason,
            });
            match self.shape {
                Shape::Chat => {
                    let content = Some(&choice.text);
                    let content =
                        content.filter(|text| !text.is_empty() || choice.calls.is_empty());
                    told["message"] =
                        json!({ "role": "assistant", "content": content, "refusal": null });
                    if !choice.calls.is_empty() {
                        told["message"]["tool_calls"] = json!(choice.calls);
                    }
                }
                Shape::Completion => told["text"] = json!(choice.text),
            }
            told
        };
        let object = match self.shape {
            Shape::Chat => "chat.completion",
            Shape::Completion => "text_completion",
        };
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": self.choices.iter().enumerate().map(choice).collect::<Value>(),
            "usage": counts(&self.usage),
        })
    }

    /// The probabilities of some tokens, if they were asked for.
    fn told(&self, tokens: &[TokenInfo], offset: usize) -> Value {
        match self.shape {
            _ if !self.logprobs => Value::Null,
            Shape::Chat => logprobs::chat(tokens),
            Shape::Completion => logprobs::completion(tokens, offset),
        }
    }

    /// One event of the stream.
    fn write_chunk(&self, choices: impl Serialize, usage: Option<&Usage>, bytes: &mut Vec<u8>) {
        let object = match self.shape {
            Shape::Chat => "chat.completion.chunk",
            Shape::Completion => "text_completion",
        };
        let usage = || usage.map_or(Value::Null, counts);
        let chunk = Chunk {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            choices,
            usage: self.include_usage.then(usage),
        };
        bytes.extend(b"data: ");
        serde_json::to_writer(&mut *bytes, &chunk)
            .expect("memory takes it, and its keys are texts");
        bytes.extend(b"\n\n");
    }
}

fn finish_reason(reason: FinishReason) -> Result<&'static str, Error> {
    match reason {
        FinishReason::Stop => Ok("stop"),
        FinishReason::Length => Ok("length"),
        FinishReason::ToolCalls => Ok("tool_calls"),
        // The API has no word for this, and half an answer must not look like a whole one.
        FinishReason::Cancelled => Err(Error {
            code: ErrorCode::Internal,
            message: "The server ended the answer early.".to_owned(),
            param: None,
            retry_after: None,
        }),
    }
}

/// Counts another prompt and its answers.
fn add(sum: &mut Usage, usage: &Usage) {
    *sum = Usage {
        prompt_tokens: sum.prompt_tokens.saturating_add(usage.prompt_tokens),
        image_tokens: sum.image_tokens.saturating_add(usage.image_tokens),
        cached_tokens: sum.cached_tokens.saturating_add(usage.cached_tokens),
        completion_tokens: sum
            .completion_tokens
            .saturating_add(usage.completion_tokens),
    };
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

#[cfg(test)]
mod tests;
