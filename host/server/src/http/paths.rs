//! Matching a path below a mount prefix against the routes an adapter asks for.

use visor_sandbox::Route;

const GET: &str = "GET";
const HEAD: &str = "HEAD";

/// What a method and a path are to an adapter.
#[derive(Debug, PartialEq, Eq)]
pub enum Match {
    /// Served: how the adapter is asked, the values of `{name}` segments, and the route's own body limit.
    Found {
        /// Upper-case method of the route.
        method: String,
        /// Name and decoded value of each parameter.
        params: Vec<(String, String)>,
        /// Largest body in bytes, if the route has an opinion.
        body_bytes_max: Option<u64>,
    },
    /// The path exists; these are its methods.
    WrongMethod(Vec<String>),
    /// No such path.
    NotFound,
}

/// Finds the first route that fits. Literal segments win over parameters when both fit. Where there is a GET, there is a HEAD: what the
/// adapter answers to the one is the answer to the other, and hyper leaves its body out.
pub fn find(routes: &[Route], method: &str, path: &str) -> Match {
    let mut best: Option<((usize, bool), Match)> = None;
    let mut methods = Vec::new();
    for route in routes {
        let Some(params) = fit(&route.path, path) else {
            continue;
        };
        let is_head_of = method == HEAD && route.method.eq_ignore_ascii_case(GET);
        if !is_head_of && !route.method.eq_ignore_ascii_case(method) {
            methods.push(route.method.to_ascii_uppercase());
            continue;
        }
        let rank = (params.len(), is_head_of);
        if best.as_ref().is_none_or(|(least, _)| rank < *least) {
            let body_bytes_max = route.body_bytes_max;
            best = Some((
                rank,
                Match::Found {
                    method: route.method.to_ascii_uppercase(),
                    params,
                    body_bytes_max,
                },
            ));
        }
    }
    match best {
        Some((_, found)) => found,
        None if methods.is_empty() => Match::NotFound,
        None => {
            if methods.iter().any(|method| method == GET) {
                methods.push(HEAD.to_owned());
            }
            methods.sort_unstable();
            methods.dedup();
            Match::WrongMethod(methods)
        }
    }
}

fn fit(pattern: &str, path: &str) -> Option<Vec<(String, String)>> {
    let mut params = Vec::new();
    let mut rest = path.trim_start_matches('/');
    let mut segments = pattern.trim_start_matches('/').split('/').peekable();
    while let Some(segment) = segments.next() {
        let name = segment
            .strip_prefix('{')
            .and_then(|name| name.strip_suffix('}'));
        if let Some(name) = name.and_then(|name| name.strip_suffix("...")) {
            params.push((name.to_owned(), percent_decode(rest)?));
            return Some(params);
        }
        let (value, after) = match rest.split_once('/') {
            Some((value, after)) => (value, Some(after)),
            None => (rest, None),
        };
        match name {
            Some(_) if value.is_empty() => return None,
            Some(name) => params.push((name.to_owned(), percent_decode(value)?)),
            None if percent_decode(value)? == segment => {}
            None => return None,
        }
        match (after, segments.peek()) {
            (Some(after), Some(_)) => rest = after,
            (None, None) => return Some(params),
            _ => return None,
        }
    }
    None
}

/// Percent-decodes one path segment or query value; none when it is not UTF-8 or an escape is broken.
pub fn percent_decode(text: &str) -> Option<String> {
    if !text.contains('%') {
        return Some(text.to_owned());
    }
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('%') {
        out.extend_from_slice(before.as_bytes());
        let digits = after.get(..2)?;
        if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        out.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &after[2..];
    }
    out.extend_from_slice(rest.as_bytes());
    String::from_utf8(out).ok()
}

/// Name and value pairs of a query string, decoded; broken pairs are left out.
pub fn query_pairs(query: &str) -> Vec<(String, String)> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .filter_map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let decode = |text: &str| percent_decode(&text.replace('+', " "));
            Some((decode(name)?, decode(value)?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(specs: &[(&str, &str)]) -> Vec<Route> {
        let route = |(method, path): &(&str, &str)| Route {
            method: (*method).to_owned(),
            path: (*path).to_owned(),
            body_bytes_max: None,
        };
        specs.iter().map(route).collect()
    }

    fn params(found: Match) -> Vec<(String, String)> {
        match found {
            Match::Found { params, .. } => params,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn literals_parameters_and_tails_match() {
        let routes = routes(&[
            ("POST", "/chat/completions"),
            ("GET", "/models"),
            ("GET", "/models/{id}"),
            ("GET", "/models/list"),
            ("GET", "/files/{path...}"),
        ]);
        assert!(params(find(&routes, "POST", "/chat/completions")).is_empty());
        assert!(params(find(&routes, "GET", "/models/list")).is_empty());
        assert_eq!(
            params(find(&routes, "GET", "/models/a%20b")),
            [("id".into(), "a b".into())]
        );
        assert_eq!(
            params(find(&routes, "GET", "/files/a/b")),
            [("path".into(), "a/b".into())]
        );
    }

    #[test]
    fn near_misses_do_not_match() {
        let routes = routes(&[
            ("GET", "/models"),
            ("POST", "/models"),
            ("GET", "/models/{id}"),
        ]);
        for path in [
            "/",
            "",
            "/model",
            "/models/",
            "/models/a/b",
            "/models/%GG",
            "/Models",
        ] {
            assert_eq!(find(&routes, "GET", path), Match::NotFound, "{path}");
        }
        let methods = ["GET", "HEAD", "POST"].map(str::to_owned).to_vec();
        assert_eq!(find(&routes, "PUT", "/models"), Match::WrongMethod(methods));
    }

    #[test]
    fn head_is_asked_as_get_where_no_route_is_for_it() {
        let asked = |routes: &[Route], path: &str| match find(routes, "HEAD", path) {
            Match::Found { method, .. } => method,
            other => panic!("{other:?}"),
        };
        let mut routes = routes(&[
            ("get", "/models"),
            ("GET", "/models/{id}"),
            ("POST", "/chat"),
        ]);
        assert_eq!(asked(&routes, "/models"), "GET");
        assert_eq!(params(find(&routes, "HEAD", "/models/a"))[0].1, "a");
        let methods = vec!["POST".to_owned()];
        assert_eq!(find(&routes, "HEAD", "/chat"), Match::WrongMethod(methods));
        assert_eq!(find(&routes, "HEAD", "/nothing"), Match::NotFound);
        routes.push(Route {
            method: "HEAD".to_owned(),
            path: "/models".to_owned(),
            body_bytes_max: None,
        });
        assert_eq!(asked(&routes, "/models"), "HEAD");
    }

    #[test]
    fn query_strings_are_decoded() {
        let pairs = query_pairs("a=1&b=x+y%21&flag&=v&bad=%G1");
        let expected = [("a", "1"), ("b", "x y!"), ("flag", ""), ("", "v")];
        let expected: Vec<_> = expected
            .iter()
            .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
            .collect();
        assert_eq!(pairs, expected);
    }
}
