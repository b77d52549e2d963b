//! Where a picture of a body is: lifted out by the host, or a URL.

/// Where an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A string that the host lifted out of the body, by its number.
    Lifted(u32),
    /// A URL for the host to resolve: `data:` when it was too short to be lifted.
    Url(String),
}

/// One image of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// What the client calls it: `messages[0].content[1].image_url`.
    pub param: String,
    /// Where it is.
    pub place: Place,
}

/// The number of a lifted string, if `text` stands for one. `marker` is the word the host puts in
/// place of long base64 strings, random per request.
#[must_use]
pub fn lifted(text: &str, marker: &str) -> Option<u32> {
    let number = text.strip_prefix(marker).filter(|_| !marker.is_empty())?;
    number.strip_prefix(':')?.parse().ok()
}

/// Whether a text is a URL of a kind that may lead to an image. Whether the host fetches, and from
/// where, is its decision.
#[must_use]
pub fn is_url(text: &str) -> bool {
    let starts_with = |scheme: &str| {
        text.get(..scheme.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(scheme))
    };
    ["data:", "https://", "http://"]
        .into_iter()
        .any(starts_with)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_counts_only_when_it_is_the_hosts() {
        assert_eq!(lifted("blob-7f:12", "blob-7f"), Some(12));
        for wrong in [
            "blob-7e:1",
            "blob-7f:",
            "blob-7f:x",
            "blob-7f:-1",
            "blob-7f",
        ] {
            assert_eq!(lifted(wrong, "blob-7f"), None, "{wrong}");
        }
        assert_eq!(lifted(":0", ""), None);
    }

    #[test]
    fn paths_and_other_schemes_are_no_urls() {
        assert!(is_url("DATA:,") && is_url("https://a") && is_url("http://a"));
        assert!(!is_url("file:///etc/passwd") && !is_url("a.png") && !is_url(""));
    }
}
