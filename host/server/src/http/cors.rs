//! Which web pages may ask: none, unless their origin is listed.
//!
//! A browser asks before it lets a page of another origin read an answer, but not before it lets it send a plain request: one
//! from an origin that is not listed is refused. Where there are no keys, neither does a page get in whose own name resolves to
//! this machine. Nobody else minds these headers, so this keeps out pages, not programs; keys do that.

use std::net::IpAddr;

use axum::body::Body;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};

/// What a page may send, whatever the adapters serve.
const METHODS: HeaderValue = HeaderValue::from_static("GET, POST, PUT, PATCH, DELETE");
/// What a page may read of an answer's head.
const EXPOSED: HeaderValue =
    HeaderValue::from_static("retry-after, request-id, x-request-id, x-visor-plugins");
/// Seconds that a browser may keep the answer to its question.
const MAX_AGE_S: HeaderValue = HeaderValue::from_static("600");
/// Longest list of headers that is granted, in bytes.
const HEADERS_BYTES_MAX: usize = 1024;

/// What the origin of a request gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// The request names none: it comes from no page, or from one of this server's.
    None,
    /// It may read the answer.
    Listed(HeaderValue),
    /// It may not.
    Unlisted,
}

/// Looks an origin up in `access.cors_origins`.
pub(super) fn origin(headers: &HeaderMap, listed: &[String]) -> Origin {
    let Some(origin) = headers.get(header::ORIGIN) else {
        return Origin::None;
    };
    let covers = |listed: &String| listed == "*" || listed.as_bytes() == origin.as_bytes();
    if listed.iter().any(covers) {
        Origin::Listed(origin.clone())
    } else {
        Origin::Unlisted
    }
}

/// Whether the origin is the very server that is asked.
fn is_own(origin: &HeaderValue, headers: &HeaderMap) -> bool {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    let origin = origin.to_str().ok();
    let named = origin.and_then(|origin| origin.split_once("://"));
    named.is_some_and(|(_, name)| Some(name) == host)
}

/// Why a request may not be served, going by who sent its page and by what name it asks: for a server on loopback without keys
/// that has to be one of this machine's, or `hosts`.
pub(super) fn refusal(
    origin: &Origin,
    headers: &HeaderMap,
    hosts: Option<&[String]>,
) -> Option<&'static str> {
    let from = headers.get(header::ORIGIN);
    if *origin == Origin::Unlisted && !from.is_some_and(|from| is_own(from, headers)) {
        return Some(
            "web pages of this origin may not ask; access.cors_origins lists those that may",
        );
    }
    let hosts = hosts?;
    let is_known = asks_this_machine(headers)
        || hosts
            .iter()
            .any(|host| host == "*" || is_named(headers, host));
    (!is_known).then_some("this server is not asked by that name; access.hosts lists further ones")
}

fn is_named(headers: &HeaderMap, host: &str) -> bool {
    let asked = headers.get(header::HOST);
    let authority = asked.and_then(|asked| Authority::try_from(asked.as_bytes()).ok());
    authority.is_some_and(|authority| authority.host().eq_ignore_ascii_case(host))
}

/// Whether the `Host` is one that no page can have for its own and make resolve to this machine: an address here or in a network like
/// a home's, or a name that no public name server has, as `host.docker.internal`, by which containers ask. Programs may leave it out.
pub(super) fn asks_this_machine(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(header::HOST) else {
        return true;
    };
    let Ok(authority) = Authority::try_from(host.as_bytes()) else {
        return false;
    };
    let host = authority.host().to_ascii_lowercase();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse();
    host == "localhost"
        || host.ends_with(".localhost")
        || host.ends_with(".internal")
        || address.is_ok_and(is_near)
}

/// Whether an address is this machine's or of a network that is not public.
fn is_near(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            v4.is_loopback() || v4.is_unspecified() || v4.is_private() || v4.is_link_local()
        }
        IpAddr::V6(v6) => {
            v6.is_loopback()
                || v6.is_unspecified()
                || v6.is_unique_local()
                || v6.is_unicast_link_local()
        }
    }
}

/// The answer to a browser's question whether a page may ask; none when this is no such question.
pub(super) fn preflight(
    method: &Method,
    headers: &HeaderMap,
    origin: &Origin,
) -> Option<Response<Body>> {
    let asks = headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    if *method != Method::OPTIONS || !asks || *origin == Origin::None {
        return None;
    }
    let mut response = Response::new(Body::empty());
    if *origin == Origin::Unlisted {
        // Without the headers below the answer is no, whatever the status.
        *response.status_mut() = StatusCode::FORBIDDEN;
        return Some(response);
    }
    *response.status_mut() = StatusCode::NO_CONTENT;
    let granted = response.headers_mut();
    granted.insert(header::ACCESS_CONTROL_ALLOW_METHODS, METHODS);
    granted.insert(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE_S);
    let asked = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS);
    if let Some(asked) = asked.filter(|asked| asked.len() <= HEADERS_BYTES_MAX) {
        granted.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
    }
    Some(response)
}

/// Lets a listed origin read the answer.
pub(super) fn grant(response: &mut Response<Body>, origin: Origin) {
    let headers = response.headers_mut();
    if let Origin::Listed(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    }
    headers.append(header::VARY, HeaderValue::from_static("origin"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(header::HeaderName, &'static str)]) -> HeaderMap {
        let pairs = pairs.iter().cloned();
        pairs
            .map(|(name, value)| (name, HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn origins_are_compared_whole() {
        let listed = vec!["https://a.example".to_owned()];
        let of = |text| origin(&headers(&[(header::ORIGIN, text)]), &listed);
        let granted = HeaderValue::from_static("https://a.example");
        assert_eq!(of("https://a.example"), Origin::Listed(granted));
        for other in [
            "http://a.example",
            "https://a.example:8443",
            "https://a.example.evil.example",
            "https://b.a.example",
            "null",
        ] {
            assert_eq!(of(other), Origin::Unlisted, "{other}");
        }
        assert_eq!(origin(&HeaderMap::new(), &listed), Origin::None);
        let any = origin(&headers(&[(header::ORIGIN, "null")]), &["*".to_owned()]);
        assert_eq!(any, Origin::Listed(HeaderValue::from_static("null")));
    }

    #[test]
    fn only_a_browsers_question_is_answered_here() {
        let asks = headers(&[
            (header::ACCESS_CONTROL_REQUEST_METHOD, "POST"),
            (
                header::ACCESS_CONTROL_REQUEST_HEADERS,
                "authorization, x-stainless-os",
            ),
        ]);
        let listed = Origin::Listed(HeaderValue::from_static("https://a.example"));
        let granted = preflight(&Method::OPTIONS, &asks, &listed).expect("a question");
        assert_eq!(granted.status(), StatusCode::NO_CONTENT);
        let allowed = &granted.headers()[header::ACCESS_CONTROL_ALLOW_HEADERS];
        assert_eq!(allowed, "authorization, x-stainless-os");
        let refused = preflight(&Method::OPTIONS, &asks, &Origin::Unlisted).expect("a question");
        assert_eq!(refused.status(), StatusCode::FORBIDDEN);
        assert!(refused.headers().is_empty());
        assert!(preflight(&Method::POST, &asks, &listed).is_none());
        assert!(preflight(&Method::OPTIONS, &HeaderMap::new(), &listed).is_none());
        assert!(preflight(&Method::OPTIONS, &asks, &Origin::None).is_none());
    }
}
