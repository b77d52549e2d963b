//! `traceparent`: which trace of the caller's a request belongs to.
//!
//! Source: W3C Trace Context, 2021-11-23, section 3.2.

use axum::http::HeaderMap;

/// The trace a request belongs to, when the header is well formed; what is not is ignored, as the
/// specification asks.
pub(super) fn parent(headers: &HeaderMap) -> Option<String> {
    let mut values = headers.get_all("traceparent").iter();
    let value = values.next()?.to_str().ok()?;
    if values.next().is_some() {
        return None;
    }
    let mut fields = value.split('-');
    let version = fields.next().filter(|field| hex(field, 2))?;
    let trace = fields.next().filter(|field| hex(field, 32))?;
    let parent = fields.next().filter(|field| hex(field, 16))?;
    fields.next().filter(|field| hex(field, 2))?;
    let zero = |field: &str| field.bytes().all(|byte| byte == b'0');
    // Later versions may say more; version ff is forbidden.
    let more = fields.next().is_some();
    let bad = version == "ff" || (version == "00" && more) || zero(trace) || zero(parent);
    (!bad && value.len() <= VALUE_BYTES_MAX).then(|| value.to_owned())
}

/// Longest value that is taken over, in bytes; version 00 has 55.
const VALUE_BYTES_MAX: usize = 128;

fn hex(field: &str, length: usize) -> bool {
    let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    field.len() == length && field.bytes().all(digit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parent_of(values: &[&str]) -> Option<String> {
        let values = values.iter().map(|value| {
            let name = axum::http::HeaderName::from_static("traceparent");
            (name, value.parse().expect("a value"))
        });
        parent(&values.collect())
    }

    #[test]
    fn only_a_well_formed_parent_counts() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(parent_of(&[good]).as_deref(), Some(good));
        let later = "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more";
        assert_eq!(parent_of(&[later]).as_deref(), Some(later));
        for bad in [
            "",
            "00",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-0af7651916cd43dd8448eb211c80319-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-x1",
        ] {
            assert_eq!(parent_of(&[bad]), None, "{bad}");
        }
        assert_eq!(parent_of(&[]), None);
        assert_eq!(parent_of(&[good, good]), None, "whose child would it be?");
    }
}
