//! Reads the body of a response request: what the client wants, checked, in the contract's terms.
//!
//! Pure: nothing here calls the host.

use serde_json::{Map, Value, json};
use visor_plugin_body::{Field, Format, IsNeutral, Picture, Place, Tools, Wrong, is_url, lifted};

use crate::exports::visor::plugin::adapter::Sampling;
use crate::tools;
use crate::visor::plugin::types::{Extensions, Message, Part, Role};

/// Most alternatives per token, as OpenAI has it.
const TOP_LOGPROBS_MAX: u8 = 20;
const NO_STORE: &str = "this server keeps no responses; send the whole conversation as 'input'";

/// A request as far as it can be understood without the host.
#[derive(Debug)]
pub(crate) struct ResponseRequest {
    pub(crate) model: Option<String>,
    pub(crate) messages: Vec<Message>,
    /// In the order the messages refer to.
    pub(crate) images: Vec<Picture>,
    pub(crate) sampling: Sampling,
    pub(crate) max_tokens: Option<u32>,
    /// `text.format`
    pub(crate) format: Format,
    pub(crate) tools: Tools,
    pub(crate) stream: bool,
    /// Hints for the other plugins.
    pub(crate) extensions: Extensions,
    /// What the answer repeats of the request.
    pub(crate) repeated: Map<String, Value>,
}

/// Reads a body. `marker` is the word the host put in place of long base64 strings; with `counts`
/// only the size of the prompt is wanted.
///
/// # Errors
/// What is wrong, and the path to it.
pub(crate) fn parse(text: &str, marker: &str, counts: bool) -> Result<ResponseRequest, Wrong> {
    let body = Field::json(text)?;
    let body = Field::body(&body)?;
    refuse_unsupported(&body)?;
    let mut reader = Reader {
        marker,
        images: Vec::new(),
        extensions: Vec::new(),
    };
    let mut messages = Vec::new();
    let instructions = body.get("instructions").text()?;
    messages.extend(instructions.map(|text| message(Role::System, vec![Part::Text(text)])));
    messages.extend(reader.input(&body.get("input"))?);
    let tools = tools::parse(&body, text)?;
    reader.extensions.extend(tools.hints());
    let max_tokens = body.get("max_output_tokens").optional_count(1)?;
    let settings = body.get("text");
    if settings.value().is_some() {
        settings.object()?;
    }
    let format = Format::read(&settings.get("format"), text, None)?;
    if format != Format::Text {
        reader.hint("format.param", "text.format");
    }
    reader.extensions.extend(format.hints());
    Ok(ResponseRequest {
        model: body.get("model").text()?,
        messages,
        images: reader.images,
        sampling: sampling(&body)?,
        max_tokens: if counts { Some(0) } else { max_tokens },
        format,
        tools,
        stream: body.get("stream").flag()?,
        extensions: reader.extensions,
        repeated: repeated(&body)?,
    })
}

/// The settings an answer shows again, with what OpenAI shows where nothing was said.
fn repeated(body: &Field) -> Result<Map<String, Value>, Wrong> {
    let said = |key: &str| body.get(key).value().cloned();
    let format = body.get("text").get("format").value().cloned();
    let mut text = json!({ "format": format.unwrap_or_else(|| json!({ "type": "text" })) });
    if let Some(verbosity) = body.get("text").get("verbosity").text()? {
        text["verbosity"] = json!(verbosity);
    }
    let thought = body.get("reasoning");
    if thought.value().is_some() {
        thought.object()?;
    }
    let reasoning = json!({ "effort": thought.get("effort").text()?, "summary": null });
    let stored = body.get("store").flag()?;
    let defaults: [(&str, Value); 12] = [
        ("instructions", Value::Null),
        ("max_output_tokens", Value::Null),
        ("metadata", Value::Object(Map::new())),
        ("parallel_tool_calls", Value::from(true)),
        ("store", Value::from(stored)),
        ("temperature", Value::Null),
        ("tool_choice", Value::from("auto")),
        ("tools", Value::Array(Vec::new())),
        ("top_logprobs", Value::Null),
        ("top_p", Value::Null),
        ("truncation", Value::from("disabled")),
        ("user", Value::Null),
    ];
    let filled = defaults.into_iter().map(|(key, default)| {
        let value = said(key).unwrap_or(default);
        (key.to_owned(), value)
    });
    let built = [("text", text), ("reasoning", reasoning)];
    let built = built.map(|(key, value)| (key.to_owned(), value));
    Ok(filled.chain(built).collect())
}

fn message(role: Role, parts: Vec<Part>) -> Message {
    Message { role, parts }
}

/// Collects images and hints while it reads the input.
struct Reader<'a> {
    marker: &'a str,
    images: Vec<Picture>,
    extensions: Extensions,
}

impl Reader<'_> {
    /// A question, or the items of a conversation.
    fn input(&mut self, input: &Field) -> Result<Vec<Message>, Wrong> {
        match input.value() {
            Some(Value::String(text)) => {
                Ok(vec![message(Role::User, vec![Part::Text(text.clone())])])
            }
            Some(Value::Array(_)) => {
                let mut messages = Vec::new();
                for item in &input.items()? {
                    self.item(item.object()?, &mut messages)?;
                }
                if messages.is_empty() {
                    let what = "an array with at least one item that is no reasoning";
                    return Err(input.wrong_value(what));
                }
                Ok(messages)
            }
            _ => Err(input.wrong_type("a string or an array of items")),
        }
    }

    fn item(&mut self, item: &Field, messages: &mut Vec<Message>) -> Result<(), Wrong> {
        let kind = item.get("type");
        let word = kind.clone().given().map_or(Ok("message"), |k| k.string())?;
        match word {
            "message" => messages.push(self.message(item)?),
            "function_call" => tools::call(item, messages)?,
            "function_call_output" => messages.push(tools::result(item)?),
            // Clients send back all of an answer, and another model's may have had some.
            "reasoning" => {}
            "item_reference" => return Err(kind.unsupported(NO_STORE)),
            _ => {
                let what = "this server reads items of type message, function_call, function_call_output and reasoning";
                return Err(kind.unsupported(what));
            }
        }
        Ok(())
    }

    fn message(&mut self, item: &Field) -> Result<Message, Wrong> {
        let role = item.get("role");
        let role = match role.string()? {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            _ => return Err(role.wrong_value("system, developer, user or assistant")),
        };
        let content = item.get("content");
        let parts = match content.value() {
            Some(Value::String(text)) => vec![Part::Text(text.clone())],
            Some(Value::Array(_)) => {
                let items = content.items()?;
                if items.is_empty() {
                    return Err(content.wrong_value("an array with at least one part"));
                }
                let parts = items.iter().map(|part| self.part(part.object()?, &role));
                parts.collect::<Result<_, _>>()?
            }
            _ => return Err(content.wrong_type("a string or an array of parts")),
        };
        Ok(message(role, parts))
    }

    fn part(&mut self, part: &Field, role: &Role) -> Result<Part, Wrong> {
        let kind = part.get("type");
        match kind.string()? {
            "input_text" | "output_text" => Ok(Part::Text(part.get("text").string()?.to_owned())),
            "refusal" => Ok(Part::Text(part.get("refusal").string()?.to_owned())),
            "input_image" if matches!(role, Role::User) => self.image(part),
            "input_image" => {
                Err(kind.invalid("Images are allowed in messages of the user only.".to_owned()))
            }
            _ => {
                Err(kind.unsupported("this server reads parts of type input_text and input_image"))
            }
        }
    }

    fn image(&mut self, part: &Field) -> Result<Part, Wrong> {
        if let Some(file) = part.get("file_id").given() {
            return Err(file.unsupported("this server keeps no files; send the image itself"));
        }
        let url = part.get("image_url");
        let text = url.string()?;
        let place = match lifted(text, self.marker) {
            Some(index) => Place::Lifted(index),
            None if is_url(text) => Place::Url(text.to_owned()),
            None => {
                let what =
                    "a data: URL with the image in base64, such as data:image/png;base64,...";
                return Err(url.wrong_value(what));
            }
        };
        let index = u32::try_from(self.images.len()).unwrap_or(u32::MAX);
        self.hint(&format!("image.{index}.param"), &url.path);
        if let Some(detail) = part.get("detail").given() {
            let known = match detail.string()? {
                // As finely as it is to be had.
                "high" | "original" => "high",
                known @ ("auto" | "low") => known,
                _ => return Err(detail.wrong_value("auto, low, high or original")),
            };
            self.hint(&format!("image.{index}.detail"), known);
        }
        let param = url.path.clone();
        self.images.push(Picture { param, place });
        Ok(Part::Image(index))
    }

    fn hint(&mut self, key: &str, value: &str) {
        self.extensions.push((key.to_owned(), value.to_owned()));
    }
}

fn sampling(body: &Field) -> Result<Sampling, Wrong> {
    let number =
        |key: &str, what: &str, fits: fn(f64) -> bool| body.get(key).optional_number(what, fits);
    Ok(Sampling {
        temperature: number("temperature", "a number from 0 to 2", |t| {
            (0.0..=2.0).contains(&t)
        })?,
        top_p: number("top_p", "a number from 0 to 1", |p| {
            (0.0..=1.0).contains(&p)
        })?,
        top_k: None,
        min_p: None,
        repetition_penalty: None,
        presence_penalty: None,
        frequency_penalty: None,
        logit_bias: Vec::new(),
        seed: None,
        logprobs: logprobs(body)?,
    })
}

/// Tokens are told where `include` names them; `top_logprobs` says with how many alternatives.
fn logprobs(body: &Field) -> Result<Option<u8>, Wrong> {
    let include = body.get("include");
    let mut wanted = false;
    for field in include
        .clone()
        .given()
        .map_or(Ok(Vec::new()), |f| f.items())?
    {
        match field.string()? {
            "message.output_text.logprobs" => wanted = true,
            // What there is none of is included as it is.
            "reasoning.encrypted_content" | "message.input_image.image_url" => {}
            _ => return Err(field.unsupported("there is no such output here")),
        }
    }
    let count = body
        .get("top_logprobs")
        .optional_count_to(TOP_LOGPROBS_MAX)?;
    Ok(wanted.then_some(count.unwrap_or(0)))
}

fn refuse_unsupported(body: &Field) -> Result<(), Wrong> {
    let table: [(&str, &str, IsNeutral); 4] = [
        ("previous_response_id", NO_STORE, |_| false),
        ("conversation", NO_STORE, |_| false),
        ("background", NO_STORE, |field| field.is_false()),
        ("prompt", "this server keeps no prompts", |_| false),
    ];
    body.refuse(&table)?;
    // Nothing is left out of a prompt that does not fit, and whoever allows that is told as well.
    match body.get("truncation").given() {
        Some(field) if !field.is_one_of(&["auto", "disabled"]) => {
            Err(field.wrong_value("auto or disabled"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
