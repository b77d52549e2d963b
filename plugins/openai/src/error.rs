//! Every kind of error as the API's error object, and whole responses.

use serde_json::{Value, json};

use crate::exports::visor::plugin::adapter::Response;
use crate::visor::plugin::types::{Error, ErrorCode};

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

pub(crate) fn error_event(error: &Error) -> Vec<u8> {
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
        ErrorCode::Unauthorized => (401, "invalid_request_error", Some("invalid_api_key")),
        ErrorCode::RateLimited => (429, "rate_limit_error", Some("rate_limit_exceeded")),
        ErrorCode::Overloaded => (503, "overloaded_error", Some("overloaded")),
        ErrorCode::Timeout => (504, "server_error", Some("timeout")),
        ErrorCode::Internal => (500, "server_error", Some("internal_error")),
    }
}
