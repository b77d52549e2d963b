//! What is wrong with the head of a request, whatever it asks for.

use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, Response, Version, header};
use axum::middleware::Next;

use super::error;
use super::routes::whole;
use crate::pipeline::Failure;

/// Bytes of a line that are neither name nor value.
const LINE_BYTES: usize = 4;
/// Bytes of a request line that are neither method nor target.
const VERSION_BYTES: usize = 12;

/// Refuses a head of more than so many bytes, and one without the name of a host. The library that reads heads has limits as well,
/// but takes twice as much before it looks.
pub(super) async fn check(
    State(bytes_max): State<u64>,
    request: Request<Body>,
    next: Next,
) -> Response<Body> {
    match wrong(&request, bytes_max) {
        None => next.run(request).await,
        Some(failure) => whole(error::fallback_response(&failure)),
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
    (request.version() == Version::HTTP_11 && hosts != 1).then(|| {
        Failure::invalid(format!(
            "a request has one Host header, and this one has {hosts}"
        ))
    })
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
}
