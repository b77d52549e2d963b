//! `multipart/form-data`, read from memory: just enough of RFC 7578 for uploads.

use bytes::Bytes;

/// One field or file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The field's name.
    pub name: String,
    /// The file's name, when it is a file.
    pub filename: Option<String>,
    /// The part's own content type, if it has one.
    pub content_type: Option<String>,
    /// The content.
    pub content: Bytes,
}

/// The boundary of a `multipart/form-data` content type, or none for any other type.
pub fn boundary(content_type: &str) -> Option<String> {
    let (kind, parameters) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    parameter(parameters, "boundary").filter(|boundary| (1..=70).contains(&boundary.len()))
}

/// The parts of a body.
///
/// # Errors
/// One sentence on what is malformed, or that there are more than `parts_max` parts.
pub fn parse(body: &Bytes, boundary: &str, parts_max: usize) -> Result<Vec<Part>, String> {
    let delimiter = format!("--{boundary}").into_bytes();
    let mut at =
        find(body, &delimiter, 0).ok_or("the form has no boundary line")? + delimiter.len();
    let mut parts = Vec::new();
    loop {
        if body[at..].starts_with(b"--") {
            return Ok(parts);
        }
        at = find(body, b"\r\n", at).ok_or("a form boundary line does not end")? + 2;
        if parts.len() == parts_max {
            return Err(format!("the form has more than {parts_max} parts"));
        }
        let head_end = if body[at..].starts_with(b"\r\n") {
            at
        } else {
            find(body, b"\r\n\r\n", at).ok_or("the head of a form part does not end")? + 2
        };
        let content = head_end + 2;
        let next = find(
            body,
            &[b"\r\n", delimiter.as_slice()].concat(),
            content.saturating_sub(2),
        )
        .ok_or("a form part does not end")?;
        parts.push(part(
            &body[at..head_end],
            body.slice(content.min(next)..next),
        )?);
        at = next + 2 + delimiter.len();
    }
}

fn part(head: &[u8], content: Bytes) -> Result<Part, String> {
    let head = std::str::from_utf8(head).map_err(|_| "the head of a form part is not UTF-8")?;
    let mut part = Part {
        name: String::new(),
        filename: None,
        content_type: None,
        content,
    };
    for line in head.split("\r\n") {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        if name.eq_ignore_ascii_case("content-disposition") {
            part.name = parameter(value, "name").unwrap_or_default();
            part.filename = parameter(value, "filename");
        } else if name.eq_ignore_ascii_case("content-type") {
            part.content_type = Some(value.trim().to_ascii_lowercase());
        }
    }
    if part.name.is_empty() {
        return Err("a form part has no name".to_owned());
    }
    Ok(part)
}

/// `key=value` or `key="value"` among parameters divided by semicolons.
fn parameter(parameters: &str, key: &str) -> Option<String> {
    let mut rest = parameters;
    loop {
        let (name, after) = rest.split_once('=')?;
        let name = name.rsplit(';').next().unwrap_or(name).trim();
        let (value, next) = match after.trim_start().strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(';').unwrap_or((after, "")),
        };
        if name.eq_ignore_ascii_case(key) {
            return Some(value.trim().to_owned());
        }
        rest = next;
    }
}

fn find(haystack: &[u8], needle: &[u8], from: usize) -> Option<usize> {
    let first = *needle.first()?;
    let mut at = from;
    loop {
        at += haystack.get(at..)?.iter().position(|byte| *byte == first)?;
        if haystack[at..].starts_with(needle) {
            return Some(at);
        }
        at += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_files_are_read() {
        let body = "preamble\r\n--XX\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nphi\r\n\
                    --XX\r\ncontent-disposition: form-data; name=\"image\"; filename=\"a;b.png\"\r\n\
                    Content-Type: image/PNG\r\n\r\n\r\n--X\r\n\r\n--XX--\r\n";
        let parts = parse(&Bytes::from(body), "XX", 8).expect("well formed");
        assert_eq!(parts.len(), 2);
        assert_eq!(
            (parts[0].name.as_str(), &parts[0].content[..]),
            ("model", &b"phi"[..])
        );
        assert_eq!(parts[1].filename.as_deref(), Some("a;b.png"));
        assert_eq!(parts[1].content_type.as_deref(), Some("image/png"));
        assert_eq!(&parts[1].content[..], b"\r\n--X\r\n");
    }

    #[test]
    fn the_boundary_is_read_quoted_or_not() {
        assert_eq!(
            boundary("multipart/form-data; charset=utf-8; boundary=\"a b\"").as_deref(),
            Some("a b")
        );
        assert_eq!(
            boundary("Multipart/Form-Data;boundary=ab").as_deref(),
            Some("ab")
        );
        assert_eq!(boundary("application/json"), None);
    }

    #[test]
    fn every_prefix_of_a_form_is_refused_or_read_and_never_panics() {
        let body = b"--XX\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nb\r\n--XX\r\n\r\n\r\n--XX--";
        for end in 0..body.len() {
            let result = parse(&Bytes::copy_from_slice(&body[..end]), "XX", 8);
            assert!(result.is_err(), "{end}");
        }
        assert!(parse(&Bytes::copy_from_slice(body), "XX", 0).is_err());
    }
}
