//! Reads the bodies of chats and generations: what the client wants, checked, in the contract's
//! terms.
//!
//! Pure: nothing here calls the host.

use serde_json::Value;
use visor_plugin_body::{
    Field, Format, IsNeutral, Kind, Picture, Place, Tools, Wrong, is_url, lifted,
};

use crate::exports::visor::plugin::adapter::{Input, Sampling};
use crate::tools::{self, Pending};
use crate::visor::plugin::types::{Extensions, Message, Part, Role};

/// Strings that may end an answer; the host takes as many.
const STOPS_MAX: usize = 64;
/// Most alternatives per token.
const TOP_LOGPROBS_MAX: u8 = 20;

/// A request as far as it can be understood without the host.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) model: String,
    /// None asks for nothing but a model that is there.
    pub(crate) input: Option<Input>,
    /// Whether the model need not stay. Here it stays; clients wait to be told otherwise.
    pub(crate) unloads: bool,
    /// In the order the input refers to.
    pub(crate) images: Vec<Picture>,
    pub(crate) sampling: Sampling,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) stop: Vec<String>,
    pub(crate) format: Format,
    pub(crate) tools: Tools,
    pub(crate) stream: bool,
    /// Hints for the other plugins.
    pub(crate) extensions: Extensions,
}

/// Reads the body of a chat. `marker` is the word the host put in place of long base64 strings.
///
/// # Errors
/// What is wrong, and the path to it.
pub(crate) fn parse_chat(text: &str, marker: &str) -> Result<Wanted, Wrong> {
    let body = Field::json(text)?;
    let body = Field::body(&body)?;
    let mut pictures = Pictures::new(marker);
    let messages = match body.get("messages").given() {
        Some(messages) => messages.items()?,
        None => Vec::new(),
    };
    let mut pending = Pending::default();
    let read = messages
        .iter()
        .map(|item| message((item.object()?, text), &mut pictures, &mut pending));
    let read = read.collect::<Result<Vec<_>, _>>()?;
    let input = (!read.is_empty()).then_some(Input::Chat(read));
    let tools = tools::parse(&body, text)?;
    pictures.extensions.extend(tools.hints());
    Ok(Wanted {
        tools,
        ..wanted((&body, text), input, pictures)?
    })
}

/// Reads the body of a generation: a prompt to be answered, or with `raw` one to go on with.
///
/// # Errors
/// What is wrong, and the path to it.
pub(crate) fn parse_generate(text: &str, marker: &str) -> Result<Wanted, Wrong> {
    let body = Field::json(text)?;
    let body = Field::body(&body)?;
    let table: [(&str, &str, IsNeutral); 4] = [
        ("tools", "send the conversation to /api/chat", |field| {
            field.is_empty()
        }),
        ("suffix", "this model only writes at the end", |field| {
            field.is_empty()
        }),
        ("template", "the prompt template is the server's", |field| {
            field.is_empty()
        }),
        ("context", "send the conversation to /api/chat", |field| {
            field.is_empty()
        }),
    ];
    body.refuse(&table)?;
    let mut pictures = Pictures::new(marker);
    let prompt = body.get("prompt").text()?.unwrap_or_default();
    let images = pictures.take(&body.get("images"))?;
    // Said twice, by a system prompt and by a raw one, it is an error with Ollama, too.
    let system = body.get("system").text()?.filter(|text| !text.is_empty());
    let raw = body.get("raw");
    let is_raw = raw.flag()?;
    if is_raw && system.is_some() {
        return Err(raw.invalid("'raw' does not support 'system'.".to_owned()));
    }
    if prompt.is_empty() && images.is_empty() {
        return wanted((&body, text), None, pictures);
    }
    if is_raw {
        return wanted((&body, text), Some(Input::Text(prompt)), pictures);
    }
    let mut messages = Vec::new();
    messages.extend(system.map(|text| Message {
        role: Role::System,
        parts: vec![Part::Text(text)],
    }));
    let mut parts = images;
    parts.push(Part::Text(prompt));
    let role = Role::User;
    messages.push(Message { role, parts });
    wanted((&body, text), Some(Input::Chat(messages)), pictures)
}

fn wanted(
    (body, text): (&Field, &str),
    input: Option<Input>,
    mut pictures: Pictures,
) -> Result<Wanted, Wrong> {
    let model = model(body)?;
    refuse_thinking(body, &model)?;
    let options = body.get("options");
    let options = match options.clone().given() {
        Some(given) => given.object()?.clone(),
        None => options,
    };
    let stream = body.get("stream").given();
    let format = format(&body.get("format"), text)?;
    if format != Format::Text {
        let hint = ("format.param".to_owned(), "format".to_owned());
        pictures.extensions.push(hint);
    }
    // `num_predict` is the most there may be, whatever the prompt leaves room for.
    let at_most = ("max-tokens".to_owned(), "at-most".to_owned());
    pictures.extensions.push(at_most);
    Ok(Wanted {
        model,
        input,
        unloads: is_no_time(&body.get("keep_alive")),
        images: pictures.images,
        sampling: sampling(&options, logprobs(body)?)?,
        max_tokens: max_tokens(&options.get("num_predict"))?,
        stop: options.get("stop").strings(STOPS_MAX)?,
        format,
        tools: Tools::default(),
        stream: stream.map_or(Ok(true), |field| field.boolean())?,
        extensions: pictures.extensions,
    })
}

/// `json`, or a schema.
fn format(field: &Field, text: &str) -> Result<Format, Wrong> {
    match field.value() {
        Some(Value::Object(_)) => Format::schema(field, text, false),
        None => Ok(Format::Text),
        Some(Value::String(word)) if word.is_empty() => Ok(Format::Text),
        Some(Value::String(word)) if word == "json" => Ok(Format::Json),
        Some(_) => Err(field.wrong_value("json or a JSON schema")),
    }
}

/// The name of the model a body asks for; `name` is what it was called once.
pub(crate) fn model(body: &Field) -> Result<String, Wrong> {
    let older = body.get("name").given();
    let field = body.get("model").given().or(older);
    let field = field.unwrap_or_else(|| body.get("model"));
    field.string().map(str::to_owned)
}

/// `text` is the whole body.
fn message(
    (message, text): (&Field, &str),
    pictures: &mut Pictures,
    pending: &mut Pending,
) -> Result<Message, Wrong> {
    let role = message.get("role");
    let role = match role.string()? {
        // What OpenAI calls the system's of late: Ollama leaves roles to the template.
        "system" | "developer" => Role::System,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        "tool" => {
            let parts = vec![pending.result(message)?];
            let role = Role::Tool;
            return Ok(Message { role, parts });
        }
        _ => return Err(role.wrong_value("system, developer, user, assistant or tool")),
    };
    let images = message.get("images");
    if !matches!(role, Role::User) && images.value().is_some() && !images.is_empty() {
        return Err(images.invalid("Images are allowed in messages of the user only.".to_owned()));
    }
    let mut parts = pictures.take(&images)?;
    let content = message.get("content").text()?;
    parts.push(Part::Text(content.unwrap_or_default()));
    if matches!(role, Role::Assistant) {
        parts.extend(pending.calls(message, text)?);
    }
    Ok(Message { role, parts })
}

/// Collects images over all messages.
struct Pictures<'a> {
    marker: &'a str,
    images: Vec<Picture>,
    extensions: Extensions,
}

impl<'a> Pictures<'a> {
    fn new(marker: &'a str) -> Self {
        let (images, extensions) = (Vec::new(), Vec::new());
        Self {
            marker,
            images,
            extensions,
        }
    }

    /// The parts that an array of base64 strings makes.
    fn take(&mut self, images: &Field) -> Result<Vec<Part>, Wrong> {
        let Some(images) = images.clone().given() else {
            return Ok(Vec::new());
        };
        images
            .items()?
            .iter()
            .map(|image| self.image(image))
            .collect()
    }

    fn image(&mut self, image: &Field) -> Result<Part, Wrong> {
        let text = image.string()?;
        let place = match lifted(text, self.marker) {
            Some(index) => Place::Lifted(index),
            None if is_url(text) => Place::Url(text.to_owned()),
            // Short images stay in the body; the host takes them as the URL they are not.
            None => Place::Url(format!("data:;base64,{text}")),
        };
        let index = u32::try_from(self.images.len()).unwrap_or(u32::MAX);
        let hint = format!("image.{index}.param");
        self.extensions.push((hint, image.path.clone()));
        let param = image.path.clone();
        self.images.push(Picture { param, place });
        Ok(Part::Image(index))
    }
}

/// Options that only say how Ollama is to run a model (`num_ctx`, `num_gpu`, `repeat_last_n` and the
/// like) are passed over: how this server runs one is its operator's business.
fn sampling(options: &Field, logprobs: Option<u8>) -> Result<Sampling, Wrong> {
    let number =
        |key: &str, what: &str, fits: fn(f64) -> bool| options.get(key).optional_number(what, fits);
    let penalty = |key| number(key, "a number from -2 to 2", |p| (-2.0..=2.0).contains(&p));
    Ok(Sampling {
        temperature: number("temperature", "a number of at least 0", |t| t >= 0.0)?,
        // Ollama brings what is out of range into it.
        top_p: number("top_p", "a number", |_| true)?.map(|p| p.clamp(0.0, 1.0)),
        top_k: top_k(&options.get("top_k"))?,
        min_p: number("min_p", "a number from 0 to 1", |p| {
            (0.0..=1.0).contains(&p)
        })?,
        // The host's range, for an answer or none: options are looked at whatever is asked for.
        repetition_penalty: number("repeat_penalty", "a number from 0.01 to 100", |p| {
            (0.01..=100.0).contains(&p)
        })?,
        presence_penalty: penalty("presence_penalty")?,
        frequency_penalty: penalty("frequency_penalty")?,
        logit_bias: Vec::new(),
        seed: options.get("seed").seed()?,
        logprobs,
    })
}

fn logprobs(body: &Field) -> Result<Option<u8>, Wrong> {
    let wanted = body.get("logprobs").flag()?;
    let count = body
        .get("top_logprobs")
        .optional_count_to(TOP_LOGPROBS_MAX)?;
    Ok(wanted.then_some(count.unwrap_or(0)))
}

/// What is not above zero keeps all tokens, as in Ollama.
fn top_k(field: &Field) -> Result<Option<u32>, Wrong> {
    let boundless = |n: f64| n <= 0.0 && n.fract() == 0.0;
    match field.value().and_then(Value::as_f64) {
        Some(number) if boundless(number) => Ok(Some(0)),
        _ => field.optional_count(0),
    }
}

/// What is not above zero leaves it to the server, as in Ollama, which stops at a number above zero only.
fn max_tokens(field: &Field) -> Result<Option<u32>, Wrong> {
    let boundless = |n: f64| n <= 0.0 && n.fract() == 0.0;
    match field.value().and_then(Value::as_f64) {
        Some(number) if boundless(number) => Ok(None),
        _ => field.optional_count(1),
    }
}

/// Whether a duration is none: a number of seconds, or a text as Go writes durations (`0`, `0s`, `0h0m`).
fn is_no_time(field: &Field) -> bool {
    match field.value() {
        Some(Value::String(text)) => {
            let mut digits = text.chars().filter(char::is_ascii_digit).peekable();
            digits.peek().is_some() && digits.all(|digit| digit == '0')
        }
        Some(value) => value.as_f64() == Some(0.0),
        None => false,
    }
}

/// The model answers at once. In Ollama's words, by which clients know to ask without.
fn refuse_thinking(body: &Field, model: &str) -> Result<(), Wrong> {
    let think = body.get("think");
    if think.value().is_none() || think.is_false() {
        return Ok(());
    }
    let message = format!("{model:?} does not support thinking");
    Err(Wrong {
        kind: Kind::Unsupported,
        ..think.invalid(message)
    })
}

#[cfg(test)]
mod tests;
