//! Reads the body of a chat completion: what the client wants, checked, in the contract's terms.
//!
//! Pure: nothing here calls the host, so the tests below need none. Images stay where they are;
//! what comes out says which lifted string, or which URL, each of them is.

use serde_json::Value;
use visor_plugin_body::{Field, Format, IsNeutral, Picture, Place, Tools, Wrong, is_url, lifted};

use crate::options::{self, Options};
use crate::tools;
use crate::visor::plugin::types::{Extensions, Message, Part, Role};

/// Most alternatives per token, as OpenAI has it.
const TOP_LOGPROBS_MAX: u8 = 20;
const NO_FUNCTIONS: &str = "functions are offered as 'tools'";

/// A request as far as it can be understood without the host.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub(crate) messages: Vec<Message>,
    /// In the order the messages refer to.
    pub(crate) images: Vec<Picture>,
    /// Hints for the other plugins.
    pub(crate) extensions: Extensions,
    pub(crate) options: Options,
    /// `response_format`
    pub(crate) format: Format,
    pub(crate) tools: Tools,
}

/// Reads a body. `marker` is the word the host put in place of long base64 strings.
///
/// # Errors
/// What is wrong, and the path to it.
pub(crate) fn parse(text: &str, marker: &str) -> Result<ChatRequest, Wrong> {
    let body = Field::json(text)?;
    let body = Field::body(&body)?;
    refuse_unsupported(&body)?;
    let mut reader = Reader {
        marker,
        images: Vec::new(),
        extensions: Vec::new(),
    };
    let messages = reader.messages(&body.get("messages"))?;
    reader.num_crops(&body)?;
    let tools = tools::parse(&body, text)?;
    reader.extensions.extend(tools.hints());
    let format = Format::read(&body.get("response_format"), text, Some("json_schema"))?;
    reader.extensions.extend(format.hints());
    Ok(ChatRequest {
        messages,
        images: reader.images,
        extensions: reader.extensions,
        options: options::parse(&body, logprobs(&body)?)?,
        format,
        tools,
    })
}

/// Collects images and hints while it reads the messages.
struct Reader<'a> {
    marker: &'a str,
    images: Vec<Picture>,
    extensions: Extensions,
}

impl Reader<'_> {
    fn messages(&mut self, messages: &Field) -> Result<Vec<Message>, Wrong> {
        let items = messages.items()?;
        if items.is_empty() {
            return Err(messages.wrong_value("an array with at least one message"));
        }
        items
            .iter()
            .map(|item| self.message(item.object()?))
            .collect()
    }

    fn message(&mut self, message: &Field) -> Result<Message, Wrong> {
        let role = message.get("role");
        let role = match role.string()? {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" => Role::Tool,
            "function" => return Err(role.unsupported(NO_FUNCTIONS)),
            _ => return Err(role.wrong_value("system, developer, user, assistant or tool")),
        };
        let old: [(&str, &str, IsNeutral); 1] =
            [("function_call", NO_FUNCTIONS, |field| field.is_empty())];
        message.refuse(&old)?;
        let content = message.get("content");
        let mut parts = match content.value() {
            Some(Value::String(text)) => vec![Part::Text(text.clone())],
            Some(Value::Array(_)) => self.parts(&content, &role)?,
            None if matches!(role, Role::Assistant) => vec![Part::Text(String::new())],
            _ => return Err(content.wrong_type("a string or an array of parts")),
        };
        match role {
            Role::Assistant => parts.extend(tools::calls(message)?),
            Role::Tool => parts = vec![tools::result(message, parts)?],
            _ => {}
        }
        Ok(Message { role, parts })
    }

    fn parts(&mut self, content: &Field, role: &Role) -> Result<Vec<Part>, Wrong> {
        let items = content.items()?;
        if items.is_empty() {
            return Err(content.wrong_value("an array with at least one part"));
        }
        items
            .iter()
            .map(|item| self.part(item.object()?, role))
            .collect()
    }

    fn part(&mut self, part: &Field, role: &Role) -> Result<Part, Wrong> {
        let kind = part.get("type");
        match kind.string()? {
            "text" => Ok(Part::Text(part.get("text").string()?.to_owned())),
            "refusal" => Ok(Part::Text(part.get("refusal").string()?.to_owned())),
            "image_url" if matches!(role, Role::User) => self.image(&part.get("image_url")),
            "image_url" => {
                Err(kind.invalid("Images are allowed in messages of the user only.".to_owned()))
            }
            _ => Err(kind.unsupported("this server reads parts of type text and image_url")),
        }
    }

    /// `{"url": …, "detail": …}`, or the URL alone.
    fn image(&mut self, image: &Field) -> Result<Part, Wrong> {
        let bare = image.value().is_some_and(Value::is_string);
        let url = if bare {
            image.clone()
        } else {
            image.object()?.get("url")
        };
        let place = self.place(&url)?;
        let index = u32::try_from(self.images.len()).unwrap_or(u32::MAX);
        self.hint(&format!("image.{index}.param"), &image.path);
        if let Some(detail) = image.get("detail").given() {
            let known = match detail.string()? {
                // As finely as it is to be had.
                "high" | "original" => "high",
                known @ ("auto" | "low") => known,
                _ => return Err(detail.wrong_value("auto, low, high or original")),
            };
            self.hint(&format!("image.{index}.detail"), known);
        }
        self.images.push(Picture {
            param: image.path.clone(),
            place,
        });
        Ok(Part::Image(index))
    }

    fn place(&self, url: &Field) -> Result<Place, Wrong> {
        let text = url.string()?;
        if let Some(index) = lifted(text, self.marker) {
            return Ok(Place::Lifted(index));
        }
        if is_url(text) {
            return Ok(Place::Url(text.to_owned()));
        }
        Err(url
            .wrong_value("a data: URL with the image in base64, such as data:image/png;base64,..."))
    }

    /// The crop count of all images: ours at the top level, or where vLLM has it.
    fn num_crops(&mut self, body: &Field) -> Result<(), Wrong> {
        for place in [body.clone(), body.get("mm_processor_kwargs")] {
            if let Some(crops) = place.get("num_crops").given() {
                let crops = crops.count(1)?;
                self.hint("num_crops", &crops.to_string());
                break;
            }
        }
        Ok(())
    }

    fn hint(&mut self, key: &str, value: &str) {
        self.extensions.push((key.to_owned(), value.to_owned()));
    }
}

/// What is asked to be told of every token: nothing, or so many alternatives.
fn logprobs(body: &Field) -> Result<Option<u8>, Wrong> {
    let wanted = body.get("logprobs").flag()?;
    let top = body.get("top_logprobs");
    let count = top.optional_count_to(TOP_LOGPROBS_MAX)?;
    if !wanted && count.is_some_and(|count| count > 0) {
        return Err(top.invalid("'top_logprobs' needs 'logprobs' to be true.".to_owned()));
    }
    Ok(wanted.then(|| count.unwrap_or(0)))
}

fn refuse_unsupported(body: &Field) -> Result<(), Wrong> {
    let table: [(&str, &str, IsNeutral); 3] = [
        ("functions", NO_FUNCTIONS, |field| field.is_empty()),
        ("function_call", NO_FUNCTIONS, |field| {
            field.is_one_of(&["none", "auto"])
        }),
        ("modalities", "answers are text", |field| {
            field
                .items()
                .is_ok_and(|items| items.iter().all(|item| item.is_one_of(&["text"])))
        }),
    ];
    body.refuse(&table)
}

#[cfg(test)]
mod tests;
