//! The one map from failures to statuses, and the error body for when no adapter can speak.

use serde_json::json;
use visor_sandbox::{ErrorCode, Response};

use crate::pipeline::Failure;

/// The status a failure has when no adapter has an opinion.
pub fn status_of(failure: &Failure) -> u16 {
    if !failure.allow.is_empty() {
        return 405;
    }
    if let Some(status) = failure.status {
        return status;
    }
    match failure.error.code {
        ErrorCode::InvalidRequest | ErrorCode::Unsupported | ErrorCode::ContextOverflow => 400,
        ErrorCode::NotFound => 404,
        ErrorCode::TooLarge => 413,
        ErrorCode::Unauthorized => 401,
        ErrorCode::RateLimited => 429,
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
    if failure.error.code == ErrorCode::Unauthorized {
        headers.push(("www-authenticate".to_owned(), "Bearer".to_owned()));
    }
    if !failure.allow.is_empty() {
        headers.push(("allow".to_owned(), failure.allow.join(", ")));
    }
    headers
}

/// The error object of the OpenAI API with all four keys: the dialect of last resort.
pub fn fallback_body(failure: &Failure) -> Vec<u8> {
    let (kind, code) = match failure.error.code {
        ErrorCode::InvalidRequest => ("invalid_request_error", None),
        ErrorCode::Unsupported => ("invalid_request_error", Some("unsupported_value")),
        ErrorCode::ContextOverflow => ("invalid_request_error", Some("context_length_exceeded")),
        ErrorCode::NotFound => ("invalid_request_error", Some("not_found")),
        ErrorCode::TooLarge => ("invalid_request_error", Some("request_too_large")),
        ErrorCode::Unauthorized => ("invalid_request_error", Some("invalid_api_key")),
        ErrorCode::RateLimited => ("rate_limit_error", Some("rate_limit_exceeded")),
        ErrorCode::Overloaded => ("overloaded_error", Some("overloaded")),
        ErrorCode::Timeout => ("server_error", Some("timeout")),
        ErrorCode::Internal => ("server_error", Some("internal_error")),
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

/// What an adapter made of a failure, with what is not its to say: a status that is none of a failure, and the one that a caller
/// who is turned away gets.
pub fn completed(mut response: Response, failure: &Failure) -> Response {
    let code = failure.error.code;
    let ours = matches!(code, ErrorCode::Unauthorized | ErrorCode::RateLimited);
    let named = !failure.allow.is_empty() || failure.status.is_some();
    if ours || named || !(400..=599).contains(&response.status) {
        response.status = status_of(failure);
    }
    for (name, value) in headers_of(failure) {
        let mut named = response.headers.iter();
        if named.all(|(have, _)| !have.eq_ignore_ascii_case(&name)) {
            response.headers.push((name, value));
        }
    }
    response
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
    fn who_is_turned_away_gets_the_hosts_status_and_headers() {
        let rendered = |status| Response {
            status,
            headers: vec![("Retry-After".to_owned(), "9".to_owned())],
            body: Vec::new(),
        };
        let stranger = Failure::new(ErrorCode::Unauthorized, "no key");
        let response = completed(rendered(200), &stranger);
        assert_eq!(response.status, 401);
        assert_eq!(header(&response, "www-authenticate"), "Bearer");
        let busy = Failure::new(ErrorCode::RateLimited, "too many").retry_after(3);
        let response = completed(rendered(503), &busy);
        assert_eq!((response.status, response.headers.len()), (429, 1));
        let slow = Failure::invalid("too slow").with_status(408);
        assert_eq!(completed(rendered(400), &slow).status, 408);
        assert_eq!(fallback_response(&slow).status, 408);
        let missing = Failure::new(ErrorCode::NotFound, "no such thing");
        assert_eq!(completed(rendered(410), &missing).status, 410);
        assert_eq!(completed(rendered(302), &missing).status, 404);
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
