//! What the host insists on in the answers of an adapter.

use crate::adapter::types::{Frame, Generation, Head, Input, Response, Route, Sampling};
use crate::chat::{Message, Part};

const ROUTES_MAX: usize = 64;
const HEADERS_MAX: usize = 64;
const HEADER_BYTES_MAX: usize = 8 << 10;
const METHODS: [&str; 7] = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"];
/// The host frames bodies and keeps connections, so it writes these.
const HOST_HEADERS: [&str; 8] = [
    "connection",
    "content-length",
    "date",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Most bytes that stand around a text: it is sent with each of them.
const FRAME_BYTES_MAX: usize = 8 << 10;

/// What is wrong, or nothing.
pub(crate) type Checked = Result<(), String>;

pub(crate) fn routes(routes: &[Route]) -> Checked {
    if routes.is_empty() || routes.len() > ROUTES_MAX {
        return Err(format!(
            "{} routes; 1 to {ROUTES_MAX} are possible",
            routes.len()
        ));
    }
    for (index, route) in routes.iter().enumerate() {
        check_route(route)?;
        let twice = |other: &Route| other.method == route.method && other.path == route.path;
        if routes[..index].iter().any(twice) {
            return Err(format!(
                "route `{} {}` comes twice",
                route.method, route.path
            ));
        }
    }
    Ok(())
}

fn check_route(route: &Route) -> Checked {
    let Route { method, path, .. } = route;
    if !METHODS.contains(&method.as_str()) {
        return Err(format!(
            "route method `{method}` is none of {}",
            METHODS.join(", ")
        ));
    }
    let Some(rest) = path.strip_prefix('/') else {
        return Err(format!("route path `{path}` does not begin with `/`"));
    };
    let mut segments = rest.split('/').peekable();
    let mut names: Vec<&str> = Vec::new();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none();
        let name =
            check_segment(segment, is_last).map_err(|e| format!("route path `{path}`: {e}"))?;
        if let Some(name) = name {
            if names.contains(&name) {
                return Err(format!("route path `{path}`: `{name}` comes twice"));
            }
            names.push(name);
        }
    }
    Ok(())
}

/// The parameter name of a segment, if it is one.
fn check_segment(segment: &str, is_last: bool) -> Result<Option<&str>, String> {
    let Some(inner) = segment.strip_prefix('{') else {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@%".contains(&b);
        let fine = segment.bytes().all(legal) && (is_last || !segment.is_empty());
        return if fine {
            Ok(None)
        } else {
            Err(format!("`{segment}` is no legal segment"))
        };
    };
    let Some(name) = inner.strip_suffix('}') else {
        return Err(format!("`{segment}` lacks its `}}`"));
    };
    let (name, takes_rest) = match name.strip_suffix("...") {
        Some(name) => (name, true),
        None => (name, false),
    };
    if takes_rest && !is_last {
        return Err(format!("`{segment}` is only possible at the end"));
    }
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    if name.is_empty() || !name.bytes().all(legal) {
        return Err(format!("`{segment}` names no parameter"));
    }
    Ok(Some(name))
}

pub(crate) fn response(response: &Response) -> Checked {
    status(response.status)?;
    headers(&response.headers)
}

pub(crate) fn head(head: &Head) -> Checked {
    status(head.status)?;
    headers(&head.headers)
}

pub(crate) fn frame(frame: &Frame) -> Checked {
    let bytes = frame.before.len() + frame.after.len();
    match bytes {
        0..=FRAME_BYTES_MAX => Ok(()),
        _ => Err(format!(
            "a frame of {bytes} bytes; {FRAME_BYTES_MAX} are allowed"
        )),
    }
}

fn status(status: u16) -> Checked {
    match status {
        // 1xx are interim; a final response needs one of the others.
        200..=599 => Ok(()),
        _ => Err(format!("status {status}; 200 to 599 are possible")),
    }
}

fn headers(headers: &[(String, String)]) -> Checked {
    if headers.len() > HEADERS_MAX {
        return Err(format!(
            "{} headers; at most {HEADERS_MAX} are allowed",
            headers.len()
        ));
    }
    for (name, value) in headers {
        let name_legal = !name.is_empty() && name.bytes().all(is_token);
        if !name_legal || name.len() > HEADER_BYTES_MAX {
            return Err(format!("header name {name:?} is not legal"));
        }
        if HOST_HEADERS.contains(&name.to_ascii_lowercase().as_str()) {
            return Err(format!("header `{name}` is the host's to write"));
        }
        let value_legal = value
            .bytes()
            .all(|b| b == b'\t' || (b >= b' ' && b != 0x7f));
        if !value_legal || value.len() > HEADER_BYTES_MAX {
            return Err(format!("value of header `{name}` is not legal"));
        }
    }
    Ok(())
}

/// `tchar` of RFC 9110, section 5.6.2.
fn is_token(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b)
}

/// Checks the generations of one step, of which the exchange may have `left` more.
pub(crate) fn generations(generations: &[Generation], left: u32) -> Checked {
    if generations.is_empty() {
        return Err("asks to generate, but lists no generation".to_owned());
    }
    if generations.len() > left as usize {
        return Err(format!(
            "asks for {} generations; {left} are left to this exchange",
            generations.len()
        ));
    }
    generations.iter().try_for_each(check_generation)
}

fn check_generation(generation: &Generation) -> Checked {
    if generation.count == 0 {
        return Err("a generation with no alternative".to_owned());
    }
    check_sampling(&generation.sampling)?;
    match &generation.input {
        Input::Text(_) => Ok(()),
        Input::Chat(messages) => check_images(messages, generation.images.len()),
    }
}

fn check_images(messages: &[Message], image_count: usize) -> Checked {
    let parts = messages.iter().flat_map(|message| &message.parts);
    for part in parts {
        if let Part::Image(index) = part
            && *index as usize >= image_count
        {
            return Err(format!(
                "a message shows image {index}; the generation has {image_count}"
            ));
        }
    }
    Ok(())
}

fn check_sampling(sampling: &Sampling) -> Checked {
    let numbers = [
        ("temperature", sampling.temperature),
        ("top-p", sampling.top_p),
        ("min-p", sampling.min_p),
        ("repetition-penalty", sampling.repetition_penalty),
        ("presence-penalty", sampling.presence_penalty),
        ("frequency-penalty", sampling.frequency_penalty),
    ];
    for (name, number) in numbers {
        if let Some(number) = number
            && !number.is_finite()
        {
            return Err(format!("sampling value `{name}` is {number}"));
        }
    }
    let bias = sampling.logit_bias.iter();
    match bias.map(|(_, bias)| bias).find(|bias| !bias.is_finite()) {
        Some(bias) => Err(format!("a `logit-bias` is {bias}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::types::{OutputFormat, ToolChoice};
    use crate::chat::ChatRole;

    fn route(method: &str, path: &str) -> Route {
        Route {
            method: method.to_owned(),
            path: path.to_owned(),
            body_bytes_max: None,
        }
    }

    #[test]
    fn routes_are_literals_parameters_and_a_final_rest() {
        let good = [
            "/",
            "/v1/chat/completions",
            "/models/{id}",
            "/files/{name...}",
            "/a/{b}/c:d",
        ];
        for path in good {
            routes(&[route("GET", path)]).unwrap();
        }
        let bad = [
            "",
            "v1",
            "/a//b",
            "/{}",
            "/{a",
            "/{a...}/b",
            "/{a-b}",
            "/a b",
            "/{x}/{x}",
            "/ä",
        ];
        for path in bad {
            assert!(routes(&[route("GET", path)]).is_err(), "{path}");
        }
        assert!(routes(&[route("get", "/")]).is_err());
        assert!(routes(&[route("GET", "/"), route("GET", "/")]).is_err());
        assert!(routes(&[]).is_err());
    }

    #[test]
    fn headers_cannot_split_a_response_or_frame_a_body() {
        let with = |name: &str, value: &str| Response {
            status: 200,
            headers: vec![(name.to_owned(), value.to_owned())],
            body: Vec::new(),
        };
        response(&with("content-type", "text/plain; charset=utf-8")).unwrap();
        for (name, value) in [
            ("x", "a\r\nset-cookie: b"),
            ("x\r\ny", "a"),
            ("", "a"),
            ("x y", "a"),
            ("x", "\u{7f}"),
            ("Content-Length", "5"),
            ("transfer-encoding", "chunked"),
        ] {
            assert!(response(&with(name, value)).is_err(), "{name:?}: {value:?}");
        }
        for status in [0, 99, 101, 600, u16::MAX] {
            let answer = Response {
                status,
                headers: Vec::new(),
                body: Vec::new(),
            };
            assert!(response(&answer).is_err(), "{status}");
        }
    }

    #[test]
    fn generations_have_known_images_finite_numbers_and_a_number() {
        let message = Message {
            role: ChatRole::User,
            parts: vec![Part::Text("x".to_owned()), Part::Image(0)],
        };
        let good = Generation {
            model: None,
            input: Input::Chat(vec![message]),
            images: vec![crate::adapter::types::Source::Url("https://a".to_owned())],
            sampling: Sampling::default(),
            tokens_max: None,
            stop: Vec::new(),
            format: OutputFormat::Text,
            tools: Vec::new(),
            tool_choice: ToolChoice::Auto,
            parallel_tools: false,
            count: 1,
            extensions: Vec::new(),
        };
        generations(std::slice::from_ref(&good), 1).unwrap();
        assert!(generations(&[good.clone(), good.clone()], 1).is_err());
        assert!(generations(&[], 1).is_err());
        assert!(
            generations(
                &[Generation {
                    images: Vec::new(),
                    ..good.clone()
                }],
                1
            )
            .is_err()
        );
        assert!(
            generations(
                &[Generation {
                    count: 0,
                    ..good.clone()
                }],
                1
            )
            .is_err()
        );
        let sampling = Sampling {
            top_p: Some(f32::NAN),
            ..Sampling::default()
        };
        let bias = Sampling {
            logit_bias: vec![(1, f32::INFINITY)],
            ..Sampling::default()
        };
        for sampling in [sampling, bias] {
            let bad = Generation {
                sampling,
                ..good.clone()
            };
            assert!(generations(&[bad], 1).is_err());
        }
    }
}
