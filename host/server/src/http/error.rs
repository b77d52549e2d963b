//! The one map from failures to statuses, and the error body for when no adapter can speak.

use serde_json::json;
use visor_sandbox::{ErrorCode, Response};

use crate::pipeline::{Denied, Failure};

/// The status a failure has when no adapter has an opinion.
pub fn status_of(failure: &Failure) -> u16 {
    if !failure.allow.is_empty() {
        return 405;
    }
    match failure.denied {
        Some(Denied::Unknown) => return 401,
        Some(Denied::TooMany) => return 429,
        None => {}
    }
    match failure.error.code {
        ErrorCode::InvalidRequest | ErrorCode::Unsupported | ErrorCode::ContextOverflow => 400,
        ErrorCode::NotFound => 404,
        ErrorCode::TooLarge => 413,
        ErrorCode::Overloaded => 503,
        ErrorCode::Timeout => 504,
        ErrorCode::Internal => 500,
    }
}

/// Headers that a failure has in every dialect.
pub fn headers_of(failure: &Failure) -> Vec<(String, String)> {
    let mut headers = Vec::new();
    if let Some(seconds) = failure.error.retry_after_s {
        headers.push(("retry-after".to_owned(), seconds.to_string()));
    }
    if failure.denied == Some(Denied::Unknown) {
        headers.push(("www-authenticate".to_owned(), "Bearer".to_owned()));
    }
    if !failure.allow.is_empty() {
        headers.push(("allow".to_owned(), failure.allow.join(", ")));
    }
    headers
}

/// The error object of the OpenAI API with all four keys: the dialect of last resort.
pub fn fallback_body(failure: &Failure) -> Vec<u8> {
    let by_code = match failure.error.code {
        ErrorCode::InvalidRequest => ("invalid_request_error", None),
        ErrorCode::Unsupported => ("invalid_request_error", Some("unsupported_value")),
        ErrorCode::ContextOverflow => ("invalid_request_error", Some("context_length_exceeded")),
        ErrorCode::NotFound => ("invalid_request_error", Some("not_found")),
        ErrorCode::TooLarge => ("invalid_request_error", Some("request_too_large")),
        ErrorCode::Overloaded => ("overloaded_error", Some("overloaded")),
        ErrorCode::Timeout => ("server_error", Some("timeout")),
        ErrorCode::Internal => ("server_error", Some("internal_error")),
    };
    let (kind, code) = match failure.denied {
        Some(Denied::Unknown) => ("invalid_request_error", Some("invalid_api_key")),
        Some(Denied::TooMany) => ("rate_limit_error", Some("rate_limit_exceeded")),
        None => by_code,
    };
    let error = json!({
        "message": failure.error.message,
        "type": kind,
        "param": failure.error.param,
        "code": code,
    });
    json!({ "error": error }).to_string().into_bytes()
}

/// The same as an event of a stream that has begun.
pub fn fallback_event(failure: &Failure) -> Vec<u8> {
    let mut event = b"data: ".to_vec();
    event.extend(fallback_body(failure));
    event.extend(b"\n\n");
    event
}

/// A whole response in that dialect.
pub fn fallback_response(failure: &Failure) -> Response {
    let mut headers = vec![("content-type".to_owned(), "application/json".to_owned())];
    headers.extend(headers_of(failure));
    Response {
        status: status_of(failure),
        headers,
        body: fallback_body(failure),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(response: &Response, name: &str) -> String {
        let found = response.headers.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.clone()).unwrap_or_default()
    }

    #[test]
    fn the_fallback_body_has_all_four_keys() {
        let response = fallback_response(&Failure::new(ErrorCode::NotFound, "no such thing"));
        let body: serde_json::Value = serde_json::from_slice(&response.body).expect("JSON");
        let error = body["error"].as_object().expect("an object");
        let mut keys: Vec<_> = error.keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["code", "message", "param", "type"]);
        assert!(error["param"].is_null());
        assert_eq!(response.status, 404);
    }

    #[test]
    fn a_wrong_method_says_which_ones_are_right() {
        let allowed = vec!["GET".to_owned(), "POST".to_owned()];
        let response = fallback_response(&Failure::method_not_allowed("PUT", "/v1/x", allowed));
        assert_eq!(
            (response.status, header(&response, "allow").as_str()),
            (405, "GET, POST")
        );
    }

    #[test]
    fn overload_says_when_to_come_back() {
        let failure = Failure::new(ErrorCode::Overloaded, "full").retry_after(3);
        let response = fallback_response(&failure);
        assert_eq!(
            (response.status, header(&response, "retry-after").as_str()),
            (503, "3")
        );
    }
}
