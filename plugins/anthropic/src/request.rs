//! Reads the body of a message request: what the client wants, checked, in the contract's terms.
//!
//! Pure: nothing here calls the host. What comes out says which lifted string, or which URL, each
//! image is.

use serde_json::Value;
use visor_plugin_body::{Field, Format, IsNeutral, Picture, Place, Tools, Wrong, lifted};

use crate::exports::visor::plugin::adapter::Sampling;
use crate::tools;
use crate::visor::plugin::types::{Extensions, Message, Part, Role};

/// Strings that may end an answer; the host takes as many.
const STOPS_MAX: usize = 64;

/// A request as far as it can be understood without the host.
#[derive(Debug)]
pub(crate) struct MessagesRequest {
    pub(crate) model: String,
    pub(crate) messages: Vec<Message>,
    /// In the order the messages refer to.
    pub(crate) images: Vec<Picture>,
    pub(crate) sampling: Sampling,
    /// 0 only counts.
    pub(crate) max_tokens: u32,
    pub(crate) stop: Vec<String>,
    pub(crate) stream: bool,
    pub(crate) tools: Tools,
    /// `output_config.format`
    pub(crate) format: Format,
    /// Hints for the other plugins.
    pub(crate) extensions: Extensions,
}

/// Reads a body. `marker` is the word the host put in place of long base64 strings; with `counts`
/// only the size of the prompt is wanted.
///
/// # Errors
/// What is wrong, and the path to it.
pub(crate) fn parse(text: &str, marker: &str, counts: bool) -> Result<MessagesRequest, Wrong> {
    let body = Field::json(text)?;
    let body = Field::body(&body)?;
    refuse_unsupported(&body)?;
    let mut reader = Reader {
        text,
        marker,
        images: Vec::new(),
        extensions: Vec::new(),
    };
    let system = body.get("system").given();
    let system = system.map(|system| instruction(&system)).transpose()?;
    let mut messages = Vec::from_iter(system);
    messages.extend(reader.messages(&body.get("messages"))?);
    let tools = tools::parse(&body, text)?;
    reader.extensions.extend(tools.hints());
    let format = format(&body, text, &mut reader.extensions)?;
    // `max_tokens` is the most there may be, whatever the prompt leaves room for.
    let at_most = ("max-tokens".to_owned(), "at-most".to_owned());
    reader.extensions.push(at_most);
    Ok(MessagesRequest {
        model: body.get("model").string()?.to_owned(),
        messages,
        images: reader.images,
        sampling: sampling(&body)?,
        max_tokens: if counts {
            0
        } else {
            body.get("max_tokens").count(1)?
        },
        stop: body.get("stop_sequences").strings(STOPS_MAX)?,
        stream: body.get("stream").flag()?,
        tools,
        format,
        extensions: reader.extensions,
    })
}

/// What the answer is held to. Where it stood at first, it is still said by some.
fn format(body: &Field, text: &str, hints: &mut Extensions) -> Result<Format, Wrong> {
    let config = body.get("output_config");
    if config.value().is_some() {
        config.object()?;
    }
    let older = body.get("output_format");
    let Some(field) = config.get("format").given().or_else(|| older.given()) else {
        return Ok(Format::Text);
    };
    let kind = field.object()?.get("type");
    if kind.string()? != "json_schema" {
        return Err(kind.wrong_value("json_schema"));
    }
    hints.push(("format.param".to_owned(), field.path.clone()));
    let format = Format::schema(&field.get("schema"), text, true)?;
    hints.extend(format.hints());
    Ok(format)
}

/// What the system says: a string, or blocks of text.
fn instruction(content: &Field) -> Result<Message, Wrong> {
    let parts = match content.value() {
        Some(Value::Array(_)) => {
            let text = |block: &Field| {
                let kind = block.object()?.get("type");
                match kind.string()? {
                    "text" => Ok(Part::Text(block.get("text").string()?.to_owned())),
                    _ => Err(kind.unsupported("a system prompt is text")),
                }
            };
            content
                .items()?
                .iter()
                .map(text)
                .collect::<Result<_, _>>()?
        }
        _ => vec![Part::Text(content.string()?.to_owned())],
    };
    let role = Role::System;
    Ok(Message { role, parts })
}

/// Collects images and hints while it reads the messages.
struct Reader<'a> {
    /// The whole body.
    text: &'a str,
    marker: &'a str,
    images: Vec<Picture>,
    extensions: Extensions,
}

impl Reader<'_> {
    fn messages(&mut self, messages: &Field) -> Result<Vec<Message>, Wrong> {
        let items = messages.items()?;
        let Some(last) = items.last() else {
            return Err(messages.wrong_value("an array with at least one message"));
        };
        let read = items.iter().map(|item| self.message(item.object()?));
        let read = read.collect::<Result<Vec<_>, _>>()?;
        // The template closes every turn, so an answer that the client began cannot be gone on with.
        if last.get("role").is_one_of(&["assistant"]) {
            return Err(last.unsupported("the last message cannot be the assistant's"));
        }
        Ok(read)
    }

    fn message(&mut self, message: &Field) -> Result<Message, Wrong> {
        let role = message.get("role");
        let content = message.get("content");
        let role = match role.string()? {
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "system" => return instruction(&content),
            _ => return Err(role.wrong_value("user, assistant or system")),
        };
        let parts = match content.value() {
            Some(Value::String(text)) => vec![Part::Text(text.clone())],
            Some(Value::Array(_)) => {
                let blocks = content.items()?;
                if blocks.is_empty() {
                    return Err(content.wrong_value("an array with at least one block"));
                }
                let parts = blocks
                    .iter()
                    .map(|block| self.block(block.object()?, &role));
                parts.collect::<Result<Vec<_>, _>>()?.concat()
            }
            _ => return Err(content.wrong_type("a string or an array of blocks")),
        };
        Ok(Message { role, parts })
    }

    fn block(&mut self, block: &Field, role: &Role) -> Result<Vec<Part>, Wrong> {
        let kind = block.get("type");
        let (word, is_user) = (kind.string()?, matches!(role, Role::User));
        match word {
            "text" => Ok(vec![Part::Text(block.get("text").string()?.to_owned())]),
            "image" if is_user => Ok(vec![self.image(&block.get("source"))?]),
            "document" if is_user => Ok(vec![document(block)?]),
            "image" | "document" => {
                let message = "Images and documents are allowed in messages of the user only.";
                Err(kind.invalid(message.to_owned()))
            }
            // What the model thought before it spoke is no part of what it said.
            "thinking" | "redacted_thinking" if !is_user => Ok(Vec::new()),
            "tool_use" if !is_user => Ok(vec![tools::call(block, self.text)?]),
            "tool_result" if is_user => self.result(block),
            "tool_use" | "tool_result" => {
                let message = "The assistant uses tools, and the user has their results.";
                Err(kind.invalid(message.to_owned()))
            }
            _ => Err(kind.unsupported(
                "this server reads blocks of type text, image, document, tool_use and tool_result",
            )),
        }
    }

    /// What came of a call: text, and pictures behind it.
    fn result(&mut self, block: &Field) -> Result<Vec<Part>, Wrong> {
        let content = block.get("content");
        let inner = match content.value() {
            None => Vec::new(),
            Some(Value::String(text)) => vec![Part::Text(text.clone())],
            Some(_) => {
                let user = Role::User;
                let blocks = content.items()?;
                let blocks = blocks.iter().map(|block| match block.object()? {
                    nested if nested.get("type").is_one_of(&["tool_result"]) => {
                        Err(nested.wrong_value("text, image or document"))
                    }
                    nested => self.block(nested, &user),
                });
                blocks.collect::<Result<Vec<_>, _>>()?.concat()
            }
        };
        tools::result(block, inner)
    }

    fn image(&mut self, source: &Field) -> Result<Part, Wrong> {
        let kind = source.object()?.get("type");
        let place = match kind.string()? {
            "base64" => self.base64(source)?,
            "url" => Place::Url(source.get("url").string()?.to_owned()),
            _ => return Err(kind.unsupported("an image is given as base64 or url")),
        };
        let index = u32::try_from(self.images.len()).unwrap_or(u32::MAX);
        self.extensions
            .push((format!("image.{index}.param"), source.path.clone()));
        self.images.push(Picture {
            param: source.path.clone(),
            place,
        });
        Ok(Part::Image(index))
    }

    /// Short images stay in the body; the host takes them as the URL they are not.
    fn base64(&self, source: &Field) -> Result<Place, Wrong> {
        let media_type = source.get("media_type");
        let kind = media_type.string()?;
        if !kind.starts_with("image/") || kind.contains([',', ';']) {
            return Err(media_type.wrong_value("a media type of images, such as image/png"));
        }
        let data = source.get("data").string()?;
        Ok(lifted(data, self.marker).map_or_else(
            || Place::Url(format!("data:{kind};base64,{data}")),
            Place::Lifted,
        ))
    }
}

/// A document that is text: what it is called, what is said about it, itself, and a line break, for a text of its own follows.
fn document(block: &Field) -> Result<Part, Wrong> {
    let cited: [(&str, &str, IsNeutral); 1] = [("citations", "answers cite nothing", |field| {
        let enabled = field.object().map(|citations| citations.get("enabled"));
        enabled.is_ok_and(|enabled| enabled.flag() == Ok(false))
    })];
    block.refuse(&cited)?;
    let source = block.get("source");
    let kind = source.object()?.get("type");
    if kind.string()? != "text" {
        return Err(kind.unsupported("a document is given as text"));
    }
    let media_type = source.get("media_type");
    if media_type.string()? != "text/plain" {
        return Err(media_type.wrong_value("text/plain"));
    }
    let mut text = String::new();
    let words = [block.get("title").text()?, block.get("context").text()?];
    let words = words
        .into_iter()
        .flatten()
        .filter(|words| !words.is_empty());
    for words in words.chain([source.get("data").string()?.to_owned()]) {
        text.push_str(&words);
        text.push('\n');
    }
    Ok(Part::Text(text))
}

fn sampling(body: &Field) -> Result<Sampling, Wrong> {
    let number =
        |key: &str, what: &str, fits: fn(f64) -> bool| body.get(key).optional_number(what, fits);
    Ok(Sampling {
        temperature: number("temperature", "a number from 0 to 1", |t| {
            (0.0..=1.0).contains(&t)
        })?,
        top_p: number("top_p", "a number from 0 to 1", |p| {
            (0.0..=1.0).contains(&p)
        })?,
        top_k: body.get("top_k").optional_count(0)?,
        min_p: None,
        repetition_penalty: None,
        presence_penalty: None,
        frequency_penalty: None,
        logit_bias: Vec::new(),
        seed: None,
        logprobs: None,
    })
}

fn refuse_unsupported(body: &Field) -> Result<(), Wrong> {
    let table: [(&str, &str, IsNeutral); 2] = [
        ("mcp_servers", "tools are the client's to run", |field| {
            field.is_empty()
        }),
        ("thinking", "the model answers at once", |field| {
            field.get("type").is_one_of(&["disabled", "adaptive"])
        }),
    ];
    body.refuse(&table)
}

#[cfg(test)]
mod tests;
