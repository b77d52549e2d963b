//! The request an adapter gets: the body without its bulk.

use std::sync::Arc;

use bytes::Bytes;
use visor_sandbox::{Blob, ErrorCode, FormPart, GuestError, HttpRequest, Lifted};

use super::failure::Failure;
use super::work::Incoming;
use crate::blobs::{self, LiftError, LiftLimits, LiftedBlob};
use crate::config::ServerConfig;
use crate::http::form;
use crate::images::data_url;

/// Most strings lifted from one body: far more than any request may have pictures.
const BLOBS_MAX: usize = 256;
/// Most values of a JSON body. An adapter hands on about 100 bytes for each message of a chat, and
/// what it may hand over at once is limited.
const JSON_VALUES_MAX: usize = 32_768;
/// Most parts of a form.
const FORM_PARTS_MAX: usize = 64;
/// Most text beside pictures that an adapter has to parse, in bytes.
const TEXT_BYTES_MAX: usize = 4 << 20;

/// Builds the request an exchange is started with.
///
/// # Errors
/// A body that nests too deeply, has too much text or too many long strings, or is a broken form.
pub(super) fn build(
    incoming: &Incoming,
    body: Bytes,
    config: &ServerConfig,
) -> Result<HttpRequest, Failure> {
    let content_type = incoming.header("content-type").unwrap_or("").to_owned();
    let form = form_parts(&content_type, &body)?;
    let marker = blobs::random_marker();
    let (text, lifted) = if form.is_empty() {
        lift(&body, marker.clone(), config)?
    } else {
        let message = "the body is a form; its parts have the content";
        (
            Err(GuestError::new(ErrorCode::InvalidRequest, message)),
            Vec::new(),
        )
    };
    let blob = |lifted: &LiftedBlob| Blob {
        bytes: lifted.bytes.clone(),
        content_type: lifted.content_type.clone(),
    };
    let originals = lifted.iter().map(|lifted| lifted.original.clone());
    Ok(HttpRequest {
        method: incoming.method.clone(),
        path: incoming.path.clone(),
        path_params: incoming.params.clone(),
        query: incoming.query.clone(),
        headers: incoming.headers.clone(),
        principal: incoming.principal.clone(),
        id: incoming.id.clone(),
        text,
        lifted: Arc::new(Lifted::new(marker, originals.collect())),
        blobs: lifted.iter().map(blob).collect(),
        raw: Blob {
            bytes: body,
            content_type,
        },
        form,
    })
}

type Text = Result<String, GuestError>;

fn lift(
    body: &Bytes,
    marker: String,
    config: &ServerConfig,
) -> Result<(Text, Vec<LiftedBlob>), Failure> {
    let limits = LiftLimits {
        lift_bytes_min: usize::try_from(config.lift_bytes_min).unwrap_or(usize::MAX),
        depth_max: config.json_depth_max as usize,
        values_max: JSON_VALUES_MAX,
        blobs_max: BLOBS_MAX,
        text_bytes_max: TEXT_BYTES_MAX,
    };
    match blobs::lift(body, marker, &limits) {
        Ok(lifted) => Ok((Ok(lifted.text), lifted.blobs)),
        // An adapter that takes raw bytes does not ask for text.
        Err(error @ LiftError::NotUtf8 { .. }) => Ok((
            Err(GuestError::new(
                ErrorCode::InvalidRequest,
                error.to_string(),
            )),
            Vec::new(),
        )),
        Err(error @ LiftError::TooDeep { .. }) => Err(Failure::invalid(error.to_string())),
        Err(error) => Err(Failure::new(ErrorCode::TooLarge, error.to_string())),
    }
}

fn form_parts(content_type: &str, body: &Bytes) -> Result<Vec<FormPart>, Failure> {
    let Some(boundary) = form::boundary(content_type) else {
        return Ok(Vec::new());
    };
    let parts = form::parse(body, &boundary, FORM_PARTS_MAX).map_err(Failure::invalid)?;
    let part = |part: form::Part| {
        let content_type = part
            .content_type
            .unwrap_or_else(|| data_url::sniff(&part.content).to_owned());
        FormPart {
            name: part.name,
            filename: part.filename,
            content: Blob {
                bytes: part.content,
                content_type,
            },
        }
    };
    Ok(parts.into_iter().map(part).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn incoming(content_type: &str) -> Incoming {
        Incoming {
            method: "POST".to_owned(),
            path: "/x".to_owned(),
            full_path: "/v1/x".to_owned(),
            params: Vec::new(),
            query: Vec::new(),
            traceparent: None,
            principal: None,
            headers: vec![("content-type".to_owned(), content_type.to_owned())],
            id: "r".to_owned(),
            accepted: Instant::now(),
        }
    }

    fn build_from(content_type: &str, body: &str) -> Result<HttpRequest, Failure> {
        build(
            &incoming(content_type),
            Bytes::from(body.to_owned()),
            &ServerConfig::default(),
        )
    }

    #[test]
    fn a_json_body_is_lifted_and_its_text_can_be_put_back() {
        let word = "abcd".repeat(1000);
        let body = format!(r#"{{"text":"{word}"}}"#);
        let request = build_from("application/json", &body).expect("a fine body");
        assert_eq!(request.blobs.len(), 1);
        assert_eq!(request.raw.bytes, body);
        let text = format!("{}:0", request.lifted.marker());
        assert_eq!(
            request.text.expect("text"),
            format!(r#"{{"text":"{text}"}}"#)
        );
        let pieces = request.lifted.pieces(&text);
        let shown: Vec<&str> = pieces.filter_map(|piece| piece.original).collect();
        assert_eq!(shown, [word]);
    }

    #[test]
    fn a_form_is_taken_apart() {
        let body = "--B\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nx\r\n--B--\r\n";
        let request = build_from("multipart/form-data; boundary=B", body).expect("a fine form");
        assert_eq!(
            (
                request.form[0].name.as_str(),
                &request.form[0].content.bytes[..]
            ),
            ("a", &b"x"[..])
        );
        assert!(request.text.is_err());
    }

    #[test]
    fn refusals_have_their_codes() {
        let deep = "[".repeat(10_000);
        let wide = format!("[\"{}\"]", "a b ".repeat(2 << 20));
        for (body, code) in [
            (deep, ErrorCode::InvalidRequest),
            (wide, ErrorCode::TooLarge),
        ] {
            assert_eq!(
                build_from("application/json", &body)
                    .expect_err("refused")
                    .error
                    .code,
                code
            );
        }
    }
}
