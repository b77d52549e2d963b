//! Reads the body of a chat completion: what the client wants, checked, in the contract's terms.
//!
//! Pure: nothing here calls the host, so the tests below need none. Images stay where they are;
//! what comes out says which lifted string, or which URL, each of them is.

use serde_json::Value;

use crate::exports::visor::plugin::adapter::Sampling;
use crate::field::Field;
use crate::visor::plugin::types::{Error, ErrorCode, Extensions, Message, Part, Role};

/// Strings that may end an answer; OpenAI allows as many.
const STOPS_MAX: usize = 4;

/// A request as far as it can be understood without the host.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub(crate) model: Option<String>,
    pub(crate) messages: Vec<Message>,
    /// In the order the messages refer to.
    pub(crate) images: Vec<Picture>,
    pub(crate) sampling: Sampling,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) stop: Vec<String>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// Hints for the other plugins.
    pub(crate) extensions: Extensions,
}

/// One image of the request.
#[derive(Debug, PartialEq)]
pub(crate) struct Picture {
    /// What the client calls it: `messages[0].content[1].image_url`.
    pub(crate) param: String,
    pub(crate) place: Place,
}

/// Where an image is.
#[derive(Debug, PartialEq)]
pub(crate) enum Place {
    /// A string that the host lifted out of the body.
    Lifted(u32),
    /// A URL for the host to resolve: `data:` when it was too short to be lifted.
    Url(String),
}

/// Reads a body. `marker` is the word the host put in place of long base64 strings.
///
/// # Errors
/// What is wrong, and the path to it.
pub(crate) fn parse(text: &str, marker: &str) -> Result<ChatRequest, Error> {
    let body: Value = serde_json::from_str(text).map_err(|error| Error {
        code: ErrorCode::InvalidRequest,
        message: format!("The body is not valid JSON: {error}."),
        param: None,
        retry_after: None,
    })?;
    let body = Field::body(&body)?;
    refuse_unsupported(&body)?;
    let mut reader = Reader {
        marker,
        images: Vec::new(),
        extensions: Vec::new(),
    };
    let messages = reader.messages(&body.get("messages"))?;
    reader.num_crops(&body)?;
    Ok(ChatRequest {
        model: body
            .get("model")
            .given()
            .map(|model| model.string().map(str::to_owned))
            .transpose()?,
        messages,
        images: reader.images,
        sampling: sampling(&body)?,
        max_tokens: max_tokens(&body)?,
        stop: stop(&body.get("stop"))?,
        stream: flag(&body.get("stream"))?,
        include_usage: flag(&body.get("stream_options").get("include_usage"))?,
        extensions: reader.extensions,
    })
}

/// Collects images and hints while it reads the messages.
struct Reader<'a> {
    marker: &'a str,
    images: Vec<Picture>,
    extensions: Extensions,
}

impl Reader<'_> {
    fn messages(&mut self, messages: &Field) -> Result<Vec<Message>, Error> {
        let items = messages.items()?;
        if items.is_empty() {
            return Err(messages.wrong_value("an array with at least one message"));
        }
        items
            .iter()
            .map(|item| self.message(item.object()?))
            .collect()
    }

    fn message(&mut self, message: &Field) -> Result<Message, Error> {
        let role = message.get("role");
        let role = match role.string()? {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" | "function" => return Err(role.unsupported("this server does not call tools")),
            _ => return Err(role.wrong_value("system, developer, user or assistant")),
        };
        for key in ["tool_calls", "function_call"] {
            if let Some(calls) = message.get(key).given().filter(|calls| !is_empty(calls)) {
                return Err(calls.unsupported("this server does not call tools"));
            }
        }
        let content = message.get("content");
        let parts = match content.value() {
            Some(Value::String(text)) => vec![Part::Text(text.clone())],
            Some(Value::Array(_)) => self.parts(&content, &role)?,
            None if matches!(role, Role::Assistant) => vec![Part::Text(String::new())],
            _ => return Err(content.wrong_type("a string or an array of parts")),
        };
        Ok(Message { role, parts })
    }

    fn parts(&mut self, content: &Field, role: &Role) -> Result<Vec<Part>, Error> {
        let items = content.items()?;
        if items.is_empty() {
            return Err(content.wrong_value("an array with at least one part"));
        }
        items
            .iter()
            .map(|item| self.part(item.object()?, role))
            .collect()
    }

    fn part(&mut self, part: &Field, role: &Role) -> Result<Part, Error> {
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
    fn image(&mut self, image: &Field) -> Result<Part, Error> {
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
            let known = ["auto", "low", "high"]
                .into_iter()
                .find(|known| is_one_of(&detail, &[*known]));
            let known = known.ok_or_else(|| detail.wrong_value("auto, low or high"))?;
            self.hint(&format!("image.{index}.detail"), known);
        }
        self.images.push(Picture {
            param: image.path.clone(),
            place,
        });
        Ok(Part::Image(index))
    }

    fn place(&self, url: &Field) -> Result<Place, Error> {
        let text = url.string()?;
        let number = text
            .strip_prefix(self.marker)
            .filter(|_| !self.marker.is_empty());
        if let Some(index) = number.and_then(|rest| rest.strip_prefix(':')?.parse().ok()) {
            return Ok(Place::Lifted(index));
        }
        let starts_with = |scheme: &str| {
            text.get(..scheme.len())
                .is_some_and(|start| start.eq_ignore_ascii_case(scheme))
        };
        // Whether the host fetches, and from where, is its decision; what is no URL at all is ours.
        if ["data:", "https://", "http://"]
            .into_iter()
            .any(starts_with)
        {
            return Ok(Place::Url(text.to_owned()));
        }
        Err(url
            .wrong_value("a data: URL with the image in base64, such as data:image/png;base64,..."))
    }

    /// The crop count of all images: ours at the top level, or where vLLM has it.
    fn num_crops(&mut self, body: &Field) -> Result<(), Error> {
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

/// Wishes the model cannot fulfil are in here too: the host knows, and refuses them by name.
fn sampling(body: &Field) -> Result<Sampling, Error> {
    let number = |key: &str, what: &str, fits: fn(f64) -> bool| {
        let field = body.get(key).given();
        field.map(|field| field.number(what, fits)).transpose()
    };
    let penalty = |key| number(key, "a number from -2 to 2", |p| (-2.0..=2.0).contains(&p));
    Ok(Sampling {
        temperature: number("temperature", "a number from 0 to 2", |t| {
            (0.0..=2.0).contains(&t)
        })?,
        top_p: number("top_p", "a number above 0, at most 1", |p| {
            p > 0.0 && p <= 1.0
        })?,
        top_k: body
            .get("top_k")
            .given()
            .map(|field| field.count(0))
            .transpose()?,
        min_p: number("min_p", "a number from 0 to 1", |p| {
            (0.0..=1.0).contains(&p)
        })?,
        repetition_penalty: number("repetition_penalty", "a number above 0", |p| p > 0.0)?,
        presence_penalty: penalty("presence_penalty")?,
        frequency_penalty: penalty("frequency_penalty")?,
        seed: body
            .get("seed")
            .given()
            .map(|field| seed(&field))
            .transpose()?,
        logprobs: None,
    })
}

/// Any 64-bit integer; negative ones are as good as others.
fn seed(field: &Field) -> Result<u64, Error> {
    let value = field.value();
    let unsigned = value.and_then(Value::as_u64);
    let signed = value.and_then(Value::as_i64).map(i64::cast_unsigned);
    unsigned
        .or(signed)
        .ok_or_else(|| field.wrong_type("an integer"))
}

/// The newer name wins where both are given.
fn max_tokens(body: &Field) -> Result<Option<u32>, Error> {
    let [newer, older] = ["max_completion_tokens", "max_tokens"].map(|key| body.get(key).given());
    let older = older.map(|field| field.count(1)).transpose()?;
    let newer = newer.map(|field| field.count(1)).transpose()?;
    Ok(newer.or(older))
}

fn stop(stop: &Field) -> Result<Vec<String>, Error> {
    let strings = match stop.value() {
        None => return Ok(Vec::new()),
        Some(Value::String(_)) => vec![stop.clone()],
        Some(Value::Array(_)) => stop.items()?,
        Some(_) => return Err(stop.wrong_type("a string or an array of strings")),
    };
    if strings.len() > STOPS_MAX {
        return Err(stop.wrong_value(&format!("at most {STOPS_MAX} strings")));
    }
    let string = |field: &Field| match field.string()? {
        "" => Err(field.wrong_value("a string that is not empty")),
        text => Ok(text.to_owned()),
    };
    strings.iter().map(string).collect()
}

fn flag(field: &Field) -> Result<bool, Error> {
    field
        .clone()
        .given()
        .map_or(Ok(false), |field| field.boolean())
}

/// Fields that would change the answer and that we cannot honour: better refused than ignored.
/// Each with the values that ask for nothing.
fn refuse_unsupported(body: &Field) -> Result<(), Error> {
    type IsNeutral = fn(&Field) -> bool;
    let table: [(&str, &str, IsNeutral); 9] = [
        ("n", "one answer per request", |field| is_number(field, 1.0)),
        ("logprobs", "log probabilities are not computed", is_false),
        (
            "top_logprobs",
            "log probabilities are not computed",
            |field| is_number(field, 0.0),
        ),
        ("tools", "this server does not call tools", is_empty),
        ("functions", "this server does not call tools", is_empty),
        ("tool_choice", "this server does not call tools", |field| {
            is_one_of(field, &["none", "auto"])
        }),
        ("response_format", "answers are text", |field| {
            is_one_of(&field.get("type"), &["text"])
        }),
        ("modalities", "answers are text", |field| {
            field
                .items()
                .is_ok_and(|items| items.iter().all(|item| is_one_of(item, &["text"])))
        }),
        ("logit_bias", "tokens cannot be biased", is_empty),
    ];
    for (key, message, is_neutral) in table {
        if let Some(field) = body.get(key).given().filter(|field| !is_neutral(field)) {
            return Err(field.unsupported(message));
        }
    }
    Ok(())
}

fn is_number(field: &Field, number: f64) -> bool {
    field.value().and_then(Value::as_f64) == Some(number)
}

fn is_false(field: &Field) -> bool {
    field.boolean().is_ok_and(|value| !value)
}

fn is_one_of(field: &Field, words: &[&str]) -> bool {
    field.string().is_ok_and(|word| words.contains(&word))
}

fn is_empty(field: &Field) -> bool {
    match field.value() {
        Some(Value::Array(items)) => items.is_empty(),
        Some(Value::Object(members)) => members.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
