//! Which URLs may be fetched at all, before any name is looked up.
//!
//! The URL is parsed once, as browsers do it, and what is checked here is what is connected to later:
//! no second parser can read another host out of the same text.

use url::{Host, Url};

use crate::config::FetchConfig;

/// Longest URL that is fetched, in bytes.
const URL_BYTES_MAX: usize = 8192;
/// Longest piece of a host that is repeated in an error, in characters.
const HOST_SHOWN_CHARS: usize = 80;

/// An address that the operator allows: scheme, host and port are checked, the host's addresses not yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// The whole address; it has no user and no password.
    pub url: Url,
    /// Its host, in lower case, without a final dot.
    pub host: Host<String>,
    /// Its port, written or the scheme's.
    pub port: u16,
    /// Whether it is `https:`.
    pub tls: bool,
}

impl Target {
    /// What an error calls it: never the path, which may hold a secret.
    pub(super) fn name(&self) -> String {
        shown(&self.host.to_string())
    }
}

/// Parses and checks a URL of a client.
///
/// # Errors
/// What is not allowed, and which key would allow it.
pub(super) fn parse(text: &str, config: &FetchConfig) -> Result<Target, String> {
    if text.len() > URL_BYTES_MAX {
        let length = text.len();
        return Err(format!(
            "the image URL is {length} bytes long; at most {URL_BYTES_MAX} are read"
        ));
    }
    let url = Url::parse(text).map_err(|error| format!("the image URL is malformed: {error}"))?;
    check(url, config)
}

/// Checks a URL: that of a client, or what a redirect made of it.
///
/// # Errors
/// What is not allowed, and which key would allow it.
pub(super) fn check(url: Url, config: &FetchConfig) -> Result<Target, String> {
    let (tls, on) = match url.scheme() {
        "https" => (true, config.https),
        "http" => (false, config.http),
        scheme => {
            return Err(format!(
                "{} is not a scheme images are fetched over",
                shown(scheme)
            ));
        }
    };
    if !on {
        let scheme = url.scheme();
        return Err(format!(
            "this server does not fetch images from {scheme}: URLs (images.fetch.{scheme} turns that on)"
        ));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("a user or password in an image URL is never sent; leave it out".to_owned());
    }
    let host = match url.host() {
        Some(Host::Domain(name)) => Host::Domain(name.strip_suffix('.').unwrap_or(name).to_owned()),
        Some(Host::Ipv4(address)) => Host::Ipv4(address),
        Some(Host::Ipv6(address)) => Host::Ipv6(address),
        None => return Err("the image URL has no host".to_owned()),
    };
    let shown_host = shown(&host.to_string());
    if !config.hosts.iter().any(|pattern| covers(pattern, &host)) {
        return Err(format!(
            "images are not fetched from {shown_host} (images.fetch.hosts lists from where)"
        ));
    }
    let port = url
        .port_or_known_default()
        .expect("http and https have a default port");
    if !config.ports.contains(&port) {
        return Err(format!(
            "images are not fetched from port {port} of {shown_host} (images.fetch.ports lists the ports)"
        ));
    }
    Ok(Target {
        url,
        host,
        port,
        tls,
    })
}

/// Whether a pattern of `images.fetch.hosts` covers a host. A suffix covers names, never addresses.
fn covers(pattern: &str, host: &Host<String>) -> bool {
    if pattern == "*" {
        return true;
    }
    match (pattern.strip_prefix("*."), host) {
        (Some(suffix), Host::Domain(name)) => name
            .strip_suffix(suffix)
            .and_then(|below| below.strip_suffix('.'))
            .is_some_and(|below| !below.is_empty()),
        (Some(_), _) => false,
        (None, host) => host.to_string() == pattern,
    }
}

/// A text of the client's, short enough for an error.
fn shown(text: &str) -> String {
    let cut: String = text.chars().take(HOST_SHOWN_CHARS).collect();
    format!("{cut:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> FetchConfig {
        FetchConfig {
            https: true,
            http: true,
            hosts: vec!["*".to_owned()],
            ..FetchConfig::default()
        }
    }

    fn hosts(hosts: &[&str]) -> FetchConfig {
        FetchConfig {
            hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
            ..open()
        }
    }

    #[track_caller]
    fn refused(url: &str, config: &FetchConfig, says: &str) {
        let message = parse(url, config).expect_err(url);
        assert!(message.contains(says), "{url}: {message}");
    }

    #[test]
    fn nothing_is_allowed_by_default_and_the_key_is_named() {
        let default = FetchConfig::default();
        refused("https://example.org/a.png", &default, "images.fetch.https");
        refused("http://example.org/a.png", &default, "images.fetch.http ");
        let https = FetchConfig {
            http: false,
            ..open()
        };
        refused("http://example.org/", &https, "images.fetch.http ");
        refused("gopher://example.org/", &open(), "not a scheme");
    }

    #[test]
    fn hosts_are_listed_exactly_or_by_suffix() {
        let config = hosts(&["a.example", "*.b.example", "93.184.216.34"]);
        for allowed in [
            "https://a.example/x",
            "https://A.EXAMPLE./x",
            "https://c.b.example/",
            "https://d.c.b.example/",
            "https://0x5db8d822/",
        ] {
            parse(allowed, &config).expect(allowed);
        }
        for other in [
            "https://b.example/",
            "https://xb.example/",
            "https://a.example.org/",
            "https://x.a.example/",
            "https://93.184.216.35/",
        ] {
            refused(other, &config, "images.fetch.hosts");
        }
        refused("https://1.2.3.4/", &hosts(&["*.3.4"]), "images.fetch.hosts");
    }

    #[test]
    fn one_parser_decides_which_host_is_meant() {
        let config = hosts(&["good.example"]);
        refused("https://good.example@evil.example/", &config, "a user");
        refused("https://good.example:x@evil.example/", &config, "a user");
        refused("https://evil.example/@good.example", &config, "hosts");
        refused("https://evil.example#@good.example/", &config, "hosts");
        refused("https://evil.example?good.example", &config, "hosts");
        refused(r"https://evil.example\@good.example/", &config, "hosts");
        refused("https://good.example%2eevil.example/", &config, "hosts");
        refused(
            "https://good.example%00.evil.example/",
            &config,
            "malformed",
        );
        refused("https://", &config, "malformed");
        let target = parse("https:good.example/a", &config).expect("as browsers read it");
        assert_eq!(target.host, Host::Domain("good.example".to_owned()));
    }

    #[test]
    fn every_spelling_of_an_address_is_the_same_address() {
        for spelled in [
            "127.0.0.1",
            "127.1",
            "127.0.1",
            "2130706433",
            "0x7f000001",
            "0x7f.1",
            "017700000001",
            "0177.0.0.1",
            "0x7f.0x0.0x0.0x1",
            "127.0.0.1.",
            "①②⑦.0.0.1",
            "127。0。0。1",
        ] {
            let target = parse(&format!("http://{spelled}/"), &open()).expect(spelled);
            let loopback: Host<String> = Host::Ipv4([127, 0, 0, 1].into());
            assert_eq!(target.host, loopback, "{spelled}");
        }
    }

    #[test]
    fn ports_are_listed() {
        parse("https://a.example:443/", &open()).expect("the default");
        parse("http://a.example:443/", &open()).expect("a listed port");
        refused("https://a.example:22/", &open(), "images.fetch.ports");
        refused("https://a.example:0/", &open(), "images.fetch.ports");
        refused("https://a.example:99999/", &open(), "malformed");
    }

    #[test]
    fn an_error_repeats_neither_path_nor_password() {
        let config = hosts(&["a.example"]);
        for url in [
            "https://u:secret@a.example/",
            "https://b.example/secret?secret",
        ] {
            assert!(!parse(url, &config).expect_err(url).contains("secret"));
        }
        let long = format!("https://a.example/{}", "x".repeat(9000));
        refused(&long, &config, "at most 8192");
    }
}
