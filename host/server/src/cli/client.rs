//! A chat client inside the process: the same routes, plugins and pipeline as over HTTP, without a
//! socket.

use std::pin::Pin;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response, header};
use base64::Engine as _;
use http_body::Body as _;
use serde_json::{Value, json};
use tower::Service;

use crate::wiring::House;

/// Path, below its prefix, of the dialect spoken here.
const CHAT_PATH: &str = "/chat/completions";

/// Most of an error's body that is looked at, in bytes.
const ERROR_BYTES_MAX: usize = 1 << 20;

/// Speaks to the house as an HTTP client would.
pub(super) struct Client {
    router: Router,
    runtime: tokio::runtime::Runtime,
    path: String,
}

/// One question.
#[derive(Clone, Debug, Default)]
pub(super) struct Question {
    pub(super) text: String,
    /// Encoded pictures, in order.
    pub(super) images: Vec<Vec<u8>>,
    pub(super) system: Option<String>,
    /// Earlier turns, question and answer; the pictures belong to the first.
    pub(super) history: Vec<(String, String)>,
    pub(super) detail: Option<String>,
    /// Most crops of each picture.
    pub(super) crops: Option<u32>,
    pub(super) max_tokens: Option<u32>,
    pub(super) temperature: Option<f32>,
    pub(super) seed: Option<u64>,
}

/// How an answer ended.
#[derive(Clone, Debug, Default)]
pub(super) struct Ending {
    pub(super) finish_reason: Option<String>,
    pub(super) prompt_tokens: u64,
    /// Those of the prompt that came from pictures.
    pub(super) image_tokens: u64,
    pub(super) completion_tokens: u64,
}

impl Client {
    /// # Errors
    /// When no route speaks the OpenAI dialect, or the runtime cannot start.
    pub(super) fn new(house: &Arc<House>) -> anyhow::Result<Self> {
        let path = house.find_path("POST", CHAT_PATH).ok_or_else(|| {
            anyhow!("no route serves POST {CHAT_PATH}: this command speaks the OpenAI dialect, so one route needs an adapter for it")
        })?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let router =
            crate::http::routes::router(Arc::clone(house), Arc::default(), Arc::default(), false);
        Ok(Self {
            router,
            runtime,
            path,
        })
    }

    /// The path it asks on.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// Asks, and hands over every piece of the answer as it comes.
    ///
    /// # Errors
    /// What the server answered when it refused, or when the answer broke off.
    pub(super) fn ask(
        &self,
        question: &Question,
        piece: &mut dyn FnMut(&str),
    ) -> anyhow::Result<Ending> {
        let asked = self.ask_unless(question, piece, std::future::pending())?;
        Ok(asked.expect("a question that nothing stops comes to an end"))
    }

    /// As [`Client::ask`]; leaves as a client does, and gives none, once `stop` resolves.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub(super) fn ask_unless(
        &self,
        question: &Question,
        piece: &mut dyn FnMut(&str),
        stop: impl Future<Output = ()>,
    ) -> anyhow::Result<Option<Ending>> {
        let request = Request::post(&self.path)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "text/event-stream")
            .body(Body::from(question.to_json().to_string()))
            .context("the request cannot be built")?;
        self.runtime.block_on(async {
            let mut router = self.router.clone();
            let answered = async {
                let response = Service::call(&mut router, request)
                    .await
                    .unwrap_or_else(|never| match never {});
                read_answer(response, piece).await
            };
            tokio::select! {
                biased;
                () = stop => Ok(None),
                ending = answered => ending.map(Some),
            }
        })
    }
}

impl Question {
    fn to_json(&self) -> Value {
        let image = |bytes: &Vec<u8>| {
            // The server sniffs the content, so any image type will do here.
            let data = base64::engine::general_purpose::STANDARD.encode(bytes);
            let mut part = json!({ "url": format!("data:image/jpeg;base64,{data}") });
            if let Some(detail) = &self.detail {
                part["detail"] = json!(detail);
            }
            json!({ "type": "image_url", "image_url": part })
        };
        let mut content: Vec<Value> = self.images.iter().map(image).collect();
        let mut user = |text: &str| {
            content.push(json!({ "type": "text", "text": text }));
            json!({ "role": "user", "content": std::mem::take(&mut content) })
        };
        let mut messages = Vec::new();
        if let Some(system) = &self.system {
            messages.push(json!({ "role": "system", "content": system }));
        }
        for (question, answer) in &self.history {
            messages.push(user(question));
            messages.push(json!({ "role": "assistant", "content": answer }));
        }
        messages.push(user(&self.text));
        let mut body = json!({
            "messages": messages, "stream": true, "stream_options": { "include_usage": true },
        });
        let settings = [
            ("num_crops", self.crops.map(Value::from)),
            ("max_tokens", self.max_tokens.map(Value::from)),
            ("temperature", self.temperature.map(Value::from)),
            ("seed", self.seed.map(Value::from)),
        ];
        for (key, value) in settings {
            if let Some(value) = value {
                body[key] = value;
            }
        }
        body
    }
}

async fn read_answer(
    response: Response<Body>,
    piece: &mut dyn FnMut(&str),
) -> anyhow::Result<Ending> {
    let status = response.status();
    let mut body = response.into_body();
    if !status.is_success() {
        let bytes = axum::body::to_bytes(body, ERROR_BYTES_MAX)
            .await
            .unwrap_or_default();
        bail!(
            "{}",
            error_message(&bytes).unwrap_or_else(|| format!("the server answered {status}"))
        );
    }
    let mut ending = Ending::default();
    let mut waiting = Vec::new();
    while let Some(frame) = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let frame = frame.map_err(|error| anyhow!("the answer broke off: {error}"))?;
        if let Ok(data) = frame.into_data() {
            waiting.extend_from_slice(&data);
        }
        while let Some(end) = waiting.windows(2).position(|two| two == b"\n\n") {
            let event: Vec<u8> = waiting.drain(..end + 2).collect();
            take_event(&event, &mut ending, piece)?;
        }
    }
    Ok(ending)
}

/// One server-sent event; comments and `[DONE]` say nothing.
fn take_event(
    event: &[u8],
    ending: &mut Ending,
    piece: &mut dyn FnMut(&str),
) -> anyhow::Result<()> {
    let text = String::from_utf8_lossy(event);
    let Some(data) = text.lines().find_map(|line| line.strip_prefix("data: ")) else {
        return Ok(());
    };
    if data == "[DONE]" {
        return Ok(());
    }
    if let Some(message) = error_message(data.as_bytes()) {
        bail!("{message}");
    }
    let chunk: Value = serde_json::from_str(data).context("the answer is not JSON")?;
    let choice = &chunk["choices"][0];
    if let Some(text) = choice["delta"]["content"]
        .as_str()
        .filter(|text| !text.is_empty())
    {
        piece(text);
    }
    if let Some(reason) = choice["finish_reason"].as_str() {
        ending.finish_reason = Some(reason.to_owned());
    }
    if let Some(usage) = chunk["usage"].as_object() {
        ending.prompt_tokens = usage
            .get("prompt_tokens")
            .and_then(Value::as_u64)
            .unwrap_or(0);
        let details = usage.get("prompt_tokens_details");
        ending.image_tokens = details
            .and_then(|details| details["image_tokens"].as_u64())
            .unwrap_or(0);
        ending.completion_tokens = usage
            .get("completion_tokens")
            .and_then(Value::as_u64)
            .unwrap_or(0);
    }
    Ok(())
}

fn error_message(body: &[u8]) -> Option<String> {
    let value: Value = serde_json::from_slice(body).ok()?;
    let message = value["error"]["message"].as_str()?;
    let param = value["error"]["param"]
        .as_str()
        .map(|param| format!(" ({param})"));
    Some(format!("{message}{}", param.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_become_pieces_and_an_ending() {
        let mut ending = Ending::default();
        let mut text = String::new();
        let mut pieces = 0;
        let events = [
            ": keep-alive\n\n",
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"A cat\"},\"finish_reason\":null}]}\n\n",
            "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":2,\"prompt_tokens_details\":{\"image_tokens\":5}}}\n\n",
            "data: [DONE]\n\n",
        ];
        for event in events {
            take_event(event.as_bytes(), &mut ending, &mut |piece| {
                pieces += 1;
                text.push_str(piece);
            })
            .unwrap();
        }
        assert_eq!((text.as_str(), pieces), ("A cat", 1));
        assert_eq!(ending.finish_reason.as_deref(), Some("stop"));
        assert_eq!((ending.prompt_tokens, ending.completion_tokens), (9, 2));
        assert_eq!(ending.image_tokens, 5);
    }

    #[test]
    fn an_error_inside_a_stream_is_an_error() {
        let event = b"data: {\"error\":{\"message\":\"broke\",\"param\":\"messages\"}}\n\n";
        let error = take_event(event, &mut Ending::default(), &mut |_| {}).unwrap_err();
        assert_eq!(error.to_string(), "broke (messages)");
    }

    #[test]
    fn a_question_is_one_user_message_with_its_pictures_first() {
        let question = Question {
            text: "what?".to_owned(),
            images: vec![vec![1], vec![2]],
            detail: Some("low".to_owned()),
            max_tokens: Some(3),
            ..Question::default()
        };
        let body = question.to_json();
        assert_eq!(body["messages"].as_array().unwrap().len(), 1);
        let content = body["messages"][0]["content"].as_array().unwrap();
        assert_eq!(content.len(), 3);
        assert_eq!(
            content[0]["image_url"]["url"],
            "data:image/jpeg;base64,AQ=="
        );
        assert_eq!(content[1]["image_url"]["detail"], "low");
        assert_eq!(content[2]["text"], "what?");
        assert_eq!(body["max_tokens"], 3);
        assert!(body.get("temperature").is_none() && body.get("num_crops").is_none());
    }

    #[test]
    fn a_follow_up_has_its_pictures_in_the_first_turn() {
        let question = Question {
            text: "and now?".to_owned(),
            images: vec![vec![1]],
            history: vec![("what?".to_owned(), "a cup".to_owned())],
            crops: Some(4),
            ..Question::default()
        };
        let body = question.to_json();
        let messages = body["messages"].as_array().unwrap();
        let roles: Vec<_> = messages.iter().map(|message| &message["role"]).collect();
        assert_eq!(roles, ["user", "assistant", "user"]);
        assert_eq!(messages[0]["content"][0]["type"], "image_url");
        assert_eq!(messages[1]["content"], "a cup");
        assert_eq!(
            messages[2]["content"],
            json!([{ "type": "text", "text": "and now?" }])
        );
        assert_eq!(body["num_crops"], 4);
    }
}
