//! `[access]` and `[admin]`: who may ask, how much, and who runs the server.

use serde::{Deserialize, Serialize};

/// `[access]`. Without keys everybody may ask who can reach the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AccessConfig {
    /// Requests one key may begin in a minute, unless it says otherwise; 0 sets no limit.
    pub requests_per_minute: u32,
    /// Requests of one key worked on at once, unless it says otherwise; 0 sets no limit.
    pub requests_in_flight_max: u32,
    /// Whether `/stats` and `/metrics` need a key as well, once there are any.
    pub stats_need_key: bool,
    /// Origins whose web pages may ask, such as `https://app.example.org`; `*` is all.
    pub cors_origins: Vec<String>,
    /// Names by which this server may be asked, beside those of this machine, while it listens on loopback and has no keys; `*` is
    /// any.
    pub hosts: Vec<String>,
    /// Keys, by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<KeyConfig>,
}

impl Default for AccessConfig {
    fn default() -> Self {
        Self {
            requests_per_minute: 0,
            requests_in_flight_max: 0,
            stats_need_key: true,
            cors_origins: Vec::new(),
            hosts: Vec::new(),
            keys: Vec::new(),
        }
    }
}

/// `[admin]`: a listener of its own for whoever runs the server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdminConfig {
    /// IP address and port to listen on; empty opens none. Needs a restart.
    pub listen: String,
}

/// One `[[access.keys]]` entry. The key itself is written nowhere.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyConfig {
    /// Whom the key is for: what logs say and plugins see as the principal.
    pub name: String,
    /// SHA-256 of the key, in 64 hexadecimal digits.
    pub sha256: String,
    /// Whether the key opens the admin listener.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub admin: bool,
    /// Requests this key may begin in a minute; 0 sets no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
    /// Requests of this key worked on at once; 0 sets no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_in_flight_max: Option<u32>,
}

impl KeyConfig {
    /// The digest in bytes; none when it is not 64 hexadecimal digits.
    #[must_use]
    pub fn digest(&self) -> Option<[u8; 32]> {
        let text = self.sha256.as_bytes();
        let mut digest = [0; 32];
        if text.len() != 2 * digest.len() {
            return None;
        }
        for (byte, pair) in digest.iter_mut().zip(text.chunks_exact(2)) {
            let high = char::from(pair[0]).to_digit(16)?;
            let low = char::from(pair[1]).to_digit(16)?;
            *byte = u8::try_from(high << 4 | low).ok()?;
        }
        Some(digest)
    }
}
