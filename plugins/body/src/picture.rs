//! Where a picture of a body is: lifted out by the host, or a URL.

use crate::wrong::{Kind, Wrong};

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

/// Where the host finds each picture: behind its URL, or in the lifted string that `blob` takes.
///
/// # Errors
/// A lifted string that is not there any more.
pub fn sources<S>(
    pictures: Vec<Picture>,
    url: impl Fn(String) -> S,
    blob: impl Fn(u32) -> Option<S>,
) -> Result<Vec<S>, Wrong> {
    let source = |picture: Picture| match picture.place {
        Place::Url(text) => Ok(url(text)),
        Place::Lifted(index) => blob(index).ok_or_else(|| Wrong {
            kind: Kind::Invalid,
            message: "there is no such image".to_owned(),
            param: Some(picture.param),
        }),
    };
    pictures.into_iter().map(source).collect()
}

/// The number of a lifted string, if `text` stands for one. `marker` is the word the host puts in
/// place of long base64 strings, random per request.
#[must_use]
pub fn lifted(text: &str, marker: &str) -> Option<u32> {
    let number = text.strip_prefix(marker).filter(|_| !marker.is_empty())?;
    number.strip_prefix(':')?.parse().ok()
}

/// Whether a text is a URL of a kind that may lead to an image. Whether the host fetches or reads files,
/// and from where, is its decision.
#[must_use]
pub fn is_url(text: &str) -> bool {
    let starts_with = |scheme: &str| {
        text.get(..scheme.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(scheme))
    };
    ["data:", "https://", "http://", "file:"]
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
    fn a_picture_is_taken_from_where_it_is() {
        let at = |place| Picture {
            param: "images[0]".to_owned(),
            place,
        };
        let take = |place| {
            let blob = |index| (index == 1).then(|| "blob".to_owned());
            sources(vec![at(place)], |url| url, blob)
        };
        assert_eq!(take(Place::Lifted(1)), Ok(vec!["blob".to_owned()]));
        assert_eq!(take(Place::Url("data:,".into())), Ok(vec!["data:,".into()]));
        let wrong = take(Place::Lifted(2)).expect_err("it is not there");
        assert_eq!(wrong.param.as_deref(), Some("images[0]"));
        assert_eq!(wrong.message, "there is no such image");
    }

    #[test]
    fn paths_and_other_schemes_are_no_urls() {
        for url in ["DATA:,", "https://a", "http://a", "file:///a.png"] {
            assert!(is_url(url), "{url}");
        }
        for other in ["a.png", "/a.png", "ftp://a/b.png", ""] {
            assert!(!is_url(other), "{other}");
        }
    }
}
