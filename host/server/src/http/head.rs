//! What is wrong with the head of a request, whatever it asks for.

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Request, Response, Version, header};
use axum::middleware::Next;

use super::error;
use super::routes::whole;
use crate::pipeline::Failure;

/// Bytes of a line that are neither name nor value.
const LINE_BYTES: usize = 4;
/// Bytes of a request line that are neither method nor target.
const VERSION_BYTES: usize = 12;
/// The status of a transfer coding that is not undone.
const NOT_IMPLEMENTED: u16 = 501;

/// Refuses a head of more than so many bytes, one without the name of a host, and one whose body others may cut off elsewhere; what
/// comes behind it is not read. The library that reads heads has limits as well, but takes twice as much before it looks.
pub(super) async fn check(
    State(bytes_max): State<u64>,
    request: Request<Body>,
    next: Next,
) -> Response<Body> {
    match wrong(&request, bytes_max) {
        None => next.run(request).await,
        Some(failure) => {
            let mut response = whole(error::fallback_response(&failure));
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
            response
        }
    }
}

fn wrong(request: &Request<Body>, bytes_max: u64) -> Option<Failure> {
    let headers = request.headers();
    let lines = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + LINE_BYTES);
    let target = request
        .uri()
        .path_and_query()
        .map_or(0, |t| t.as_str().len());
    let first = request.method().as_str().len() + target + VERSION_BYTES;
    let bytes = first + lines.sum::<usize>();
    if bytes as u64 > bytes_max {
        let message = format!("the head is {bytes} bytes; {bytes_max} are allowed");
        return Some(Failure::invalid(message).with_status(431));
    }
    let hosts = headers.get_all(header::HOST).iter().count();
    // RFC 9112, 3.2.
    if request.version() == Version::HTTP_11 && hosts != 1 {
        let message = format!("a request has one Host header, and this one has {hosts}");
        return Some(Failure::invalid(message));
    }
    coded(headers)
}

/// A body that comes in anything but chunks, once (RFC 9112, 6.1). The library undoes the chunks and overlooks what else is named,
/// which whoever passed the request on may have gone by. Of a length beside the chunks it tells nothing: it takes the chunks, answers,
/// and closes.
fn coded(headers: &HeaderMap) -> Option<Failure> {
    let codings: Vec<_> = headers.get_all(header::TRANSFER_ENCODING).iter().collect();
    let is_chunked = |coding: &[u8]| coding.trim_ascii().eq_ignore_ascii_case(b"chunked");
    match codings[..] {
        [] => return None,
        [coding] if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => return None,
        _ => {}
    }
    let mut named = codings
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    if named.all(is_chunked) {
        return Some(Failure::invalid("a body is chunked once"));
    }
    let message = "a body comes in chunks, without another transfer coding";
    Some(Failure::invalid(message).with_status(NOT_IMPLEMENTED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_has_a_size_and_the_name_of_a_host() {
        let status = |version, hosts: usize, long: usize| {
            let mut request = Request::get("/health").version(version);
            for _ in 0..hosts {
                request = request.header("host", "a");
            }
            let request = request.header("x", "y".repeat(long));
            let failure = wrong(&request.body(Body::empty()).unwrap(), 1000);
            failure.map(|failure| error::status_of(&failure))
        };
        assert_eq!(status(Version::HTTP_11, 1, 900), None);
        assert_eq!(status(Version::HTTP_11, 1, 1000), Some(431));
        assert_eq!(status(Version::HTTP_11, 0, 1), Some(400));
        assert_eq!(status(Version::HTTP_11, 2, 1), Some(400));
        assert_eq!(status(Version::HTTP_10, 0, 1), None);
    }

    #[test]
    fn a_body_is_chunked_once_or_not_at_all() {
        let status = |codings: &[&str]| {
            let mut request = Request::post("/").header("host", "a");
            for coding in codings {
                request = request.header("transfer-encoding", *coding);
            }
            let failure = wrong(&request.body(Body::empty()).unwrap(), 1000);
            failure.map(|failure| error::status_of(&failure))
        };
        assert_eq!(status(&[]), None);
        assert_eq!(status(&["chunked"]), None);
        assert_eq!(status(&["Chunked"]), None);
        assert_eq!(status(&["chunked, chunked"]), Some(400));
        assert_eq!(status(&["chunked", "CHUNKED"]), Some(400));
        for unknown in [
            &["gzip, chunked"][..],
            &["gzip", "chunked"],
            &["identity", "chunked"],
            &["identity"],
            &["chunked, identity"],
            &[",chunked"],
            &["chunked;a=b"],
            &["x chunked"],
            &[""],
        ] {
            assert_eq!(status(unknown), Some(501), "{unknown:?}");
        }
    }
}
