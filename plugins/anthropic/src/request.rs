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
    let mut messages = system(&body.get("system"))?;
    messages.extend(reader.messages(&body.get("messages"))?);
    let tools = tools::parse(&body, text)?;
    reader.extensions.extend(tools.hints());
    let format = format(&body, text, &mut reader.extensions)?;
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
    Format::schema(&field.get("schema"), text)
}

/// A string, or blocks of text.
fn system(system: &Field) -> Result<Vec<Message>, Wrong> {
    let parts = match system.value() {
        None => return Ok(Vec::new()),
        Some(Value::Array(_)) => {
            let text = |block: &Field| {
                let kind = block.object()?.get("type");
                match kind.string()? {
                    "text" => Ok(Part::Text(block.get("text").string()?.to_owned())),
                    _ => Err(kind.unsupported("a system prompt is text")),
                }
            };
            system.items()?.iter().map(text).collect::<Result<_, _>>()?
        }
        _ => vec![Part::Text(system.string()?.to_owned())],
    };
    let role = Role::System;
    Ok(vec![Message { role, parts }])
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
            return Err(last.unsupported("the last message has to be the user's"));
        }
        Ok(read)
    }

    fn message(&mut self, message: &Field) -> Result<Message, Wrong> {
        let role = message.get("role");
        let role = match role.string()? {
            "user" => Role::User,
            "assistant" => Role::Assistant,
            _ => return Err(role.wrong_value("user or assistant")),
        };
        let content = message.get("content");
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
            "image" => {
                Err(kind.invalid("Images are allowed in messages of the user only.".to_owned()))
            }
            "tool_use" if !is_user => Ok(vec![tools::call(block, self.text)?]),
            "tool_result" if is_user => self.result(block),
            "tool_use" | "tool_result" => {
                let message = "The assistant uses tools, and the user has their results.";
                Err(kind.invalid(message.to_owned()))
            }
            _ => Err(kind.unsupported(
                "this server reads blocks of type text, image, tool_use and tool_result",
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
                        Err(nested.wrong_value("text or image"))
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
mod tests {
    use super::*;
    use serde_json::json;
    use visor_plugin_body::Kind;

    const MARKER: &str = "blob-7f";

    fn parsed(body: &Value) -> Result<MessagesRequest, Wrong> {
        parse(&body.to_string(), MARKER, false)
    }

    /// A request of one user message with that content.
    fn content(content: Value) -> Value {
        json!({ "model": "m", "max_tokens": 9, "messages": [{ "role": "user", "content": content }] })
    }

    fn with(key: &str, value: Value) -> Value {
        let mut body = content(json!("hi"));
        body[key] = value;
        body
    }

    fn image(source: Value) -> Value {
        content(json!([{ "type": "text", "text": "a" }, { "type": "image", "source": source }]))
    }

    #[test]
    fn a_conversation_is_read_with_its_system_prompt_first() {
        let read = parsed(&json!({
            "model": "m", "max_tokens": 9, "system": [{ "type": "text", "text": "Be brief." }],
            "messages": [
                { "role": "user", "content": "hi" },
                { "role": "assistant", "content": [{ "type": "text", "text": "Hello." }] },
                { "role": "user", "content": [{ "type": "text", "text": "bye", "cache_control": {} }] },
            ],
            "stop_sequences": ["x"], "stream": true, "temperature": 1, "top_p": 0.5, "top_k": 3,
            "metadata": { "user_id": "u" }, "service_tier": "auto", "tools": [],
        }))
        .unwrap();
        let roles: Vec<_> = read.messages.iter().map(|m| &m.role).collect();
        assert!(matches!(
            roles[..],
            [Role::System, Role::User, Role::Assistant, Role::User]
        ));
        assert_eq!((read.max_tokens, read.stream), (9, true));
        assert_eq!(read.stop, ["x"]);
        let Sampling {
            temperature,
            top_p,
            top_k,
            ..
        } = read.sampling;
        assert_eq!((temperature, top_p, top_k), (Some(1.0), Some(0.5), Some(3)));
        assert_eq!(
            parsed(&with("system", json!("Be brief.")))
                .unwrap()
                .messages
                .len(),
            2
        );
    }

    #[test]
    fn images_are_lifted_short_or_elsewhere() {
        let place = |source: Value| parsed(&image(source)).unwrap().images[0].place.clone();
        let base64 =
            |data: &str| json!({ "type": "base64", "media_type": "image/png", "data": data });
        assert_eq!(place(base64("blob-7f:3")), Place::Lifted(3));
        let url = |url: &str| Place::Url(url.to_owned());
        assert_eq!(place(base64("AAAA")), url("data:image/png;base64,AAAA"));
        let elsewhere = json!({ "type": "url", "url": "https://a/b.png" });
        assert_eq!(place(elsewhere), url("https://a/b.png"));
        let read = parsed(&image(base64("AAAA"))).unwrap();
        assert!(matches!(
            read.messages[0].parts[..],
            [Part::Text(_), Part::Image(0)]
        ));
        let hint = (
            "image.0.param".to_owned(),
            "messages[0].content[1].source".to_owned(),
        );
        assert_eq!(read.extensions, [hint]);
    }

    #[test]
    fn calls_and_results_are_parts() {
        let read = parsed(&json!({ "model": "m", "max_tokens": 9, "messages": [
            { "role": "assistant", "content": [
                { "type": "text", "text": "a" },
                { "type": "tool_use", "id": "toolu_1", "name": "weather", "input": { "city": "Ulm" } },
            ] },
            { "role": "user", "content": [
                { "type": "tool_result", "tool_use_id": "toolu_1", "content": [
                    { "type": "text", "text": "dry" },
                    { "type": "image", "source": { "type": "url", "url": "https://a/b.png" } },
                ] },
                { "type": "tool_result", "tool_use_id": "toolu_2", "is_error": true },
            ] },
        ] }))
        .unwrap();
        let [Part::Text(_), Part::ToolCall(call)] = &read.messages[0].parts[..] else {
            panic!("{read:?}")
        };
        assert_eq!(
            (call.id.as_str(), call.name.as_str()),
            ("toolu_1", "weather")
        );
        assert_eq!(call.arguments, r#"{"city":"Ulm"}"#);
        let [
            Part::ToolResult(dry),
            Part::Image(0),
            Part::ToolResult(failed),
        ] = &read.messages[1].parts[..]
        else {
            panic!("{read:?}")
        };
        assert_eq!((dry.id.as_str(), dry.content.as_str()), ("toolu_1", "dry"));
        assert_eq!(failed.content, "error: ");
    }

    #[test]
    fn an_answer_can_be_held_to_a_schema() {
        let format = json!({ "type": "json_schema", "schema": { "type": "object" } });
        let config = json!({ "effort": "low", "format": format });
        for (body, place) in [
            (with("output_config", config), "output_config.format"),
            (with("output_format", format), "output_format"),
        ] {
            let read = parsed(&body).unwrap();
            assert_eq!(
                read.format,
                Format::Schema(r#"{"type":"object"}"#.to_owned())
            );
            let hint = ("format.param".to_owned(), place.to_owned());
            assert!(read.extensions.contains(&hint));
        }
        let effort = with("output_config", json!({ "effort": "low" }));
        assert_eq!(parsed(&effort).unwrap().format, Format::Text);
    }

    #[test]
    fn counting_needs_no_length() {
        let body = json!({ "model": "m", "messages": [{ "role": "user", "content": "hi" }] });
        assert_eq!(
            parsed(&body).unwrap_err().param.as_deref(),
            Some("max_tokens")
        );
        let read = parse(&body.to_string(), MARKER, true).unwrap();
        assert_eq!(read.max_tokens, 0);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let (invalid, unsupported) = (Kind::Invalid, Kind::Unsupported);
        let table = [
            (json!([]), invalid, ""),
            (with("model", Value::Null), invalid, "model"),
            (with("messages", json!([])), invalid, "messages"),
            (with("max_tokens", json!(0)), invalid, "max_tokens"),
            (with("temperature", json!(1.5)), invalid, "temperature"),
            (with("system", json!(5)), invalid, "system"),
            (
                with("system", json!([{ "type": "image" }])),
                unsupported,
                "system[0].type",
            ),
            (
                with("stop_sequences", json!([""])),
                invalid,
                "stop_sequences[0]",
            ),
            (
                with("output_config", json!({ "format": { "type": "xml" } })),
                invalid,
                "output_config.format.type",
            ),
            (
                with(
                    "output_config",
                    json!({ "format": { "type": "json_schema" } }),
                ),
                invalid,
                "output_config.format.schema",
            ),
            (
                with("thinking", json!({ "type": "enabled" })),
                unsupported,
                "thinking",
            ),
            (
                with("messages", json!([{ "role": "system", "content": "x" }])),
                invalid,
                "messages[0].role",
            ),
            (
                with("messages", json!([{ "role": "assistant", "content": "x" }])),
                unsupported,
                "messages[0]",
            ),
        ];
        table.into_iter().for_each(named);
    }

    #[test]
    fn blocks_that_are_wrong_are_named() {
        let (invalid, unsupported) = (Kind::Invalid, Kind::Unsupported);
        let part = "messages[0].content[1].source";
        let table = [
            (content(json!([])), invalid, "messages[0].content"),
            (
                content(json!([{ "type": "document" }])),
                unsupported,
                "messages[0].content[0].type",
            ),
            (
                content(json!([{ "type": "tool_use" }])),
                invalid,
                "messages[0].content[0].type",
            ),
            (
                content(json!([{ "type": "tool_result" }])),
                invalid,
                "messages[0].content[0].tool_use_id",
            ),
            (
                content(
                    json!([{ "type": "tool_result", "tool_use_id": "1", "content": [{ "type": "tool_result" }] }]),
                ),
                invalid,
                "messages[0].content[0].content[0]",
            ),
            (
                image(json!({ "type": "file" })),
                unsupported,
                &format!("{part}.type"),
            ),
            (
                image(json!({ "type": "base64", "data": "" })),
                invalid,
                &format!("{part}.media_type"),
            ),
            (
                image(json!({ "type": "base64", "media_type": "text/html", "data": "" })),
                invalid,
                &format!("{part}.media_type"),
            ),
        ];
        table.into_iter().for_each(named);
    }

    fn named((body, kind, param): (Value, Kind, &str)) {
        let wrong = parsed(&body).unwrap_err();
        let named = wrong.param.as_deref().unwrap_or_default();
        assert_eq!((wrong.kind, named), (kind, param), "{body}");
    }
}
