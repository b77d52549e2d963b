//! API keys: who is asking, and whether they asked for too much.
//!
//! Keys are known by their SHA-256 only. A plain hash is enough for what nobody can guess: keys are
//! random, not passwords.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use visor_sandbox::ErrorCode;

use super::allowance::Allowance;
use super::gate::{Gate, Permit};
use crate::config::AccessConfig;
use crate::pipeline::Failure;

/// Headers that may carry a key, in lower case, and others that are nobody else's business: plugins
/// never see them.
pub const SECRET_HEADERS: [&str; 4] = [
    "authorization",
    "x-api-key",
    "cookie",
    "proxy-authorization",
];
/// Those of them that a key is looked for in.
const SHOWN_IN: [&str; 2] = ["authorization", "x-api-key"];
const MINUTE: Duration = Duration::from_secs(60);
/// Seconds after which a client with too many requests at once may come back.
const BUSY_RETRY_AFTER_S: u32 = 1;

/// The keys in force.
#[derive(Debug, Default)]
pub struct KeyRing {
    keys: Vec<Arc<Key>>,
}

/// One key: whose it is and what it may do.
#[derive(Debug)]
pub struct Key {
    /// Its name in the configuration.
    pub name: String,
    /// Whether it opens the admin listener.
    admin: bool,
    digest: [u8; 32],
    requests_per_minute: u32,
    requests_in_flight_max: u32,
    usage: Arc<Usage>,
}

/// What a key is doing; it outlives changes of the configuration.
#[derive(Debug, Default)]
struct Usage {
    in_flight: Arc<Gate>,
    /// Bytes of its bodies on their way.
    arriving: Arc<AtomicU64>,
    allowance: Mutex<Allowance>,
}

impl KeyRing {
    /// The keys of a configuration; those that `previous` has by the same name go on counting.
    #[must_use]
    pub fn new(access: &AccessConfig, previous: Option<&Self>) -> Self {
        let usage = |name: &str| {
            let known = previous.into_iter().flat_map(|ring| &ring.keys);
            let known = known.into_iter().find(|key| key.name == name);
            known.map_or_else(Arc::default, |key| Arc::clone(&key.usage))
        };
        // The configuration was checked: every digest is one.
        let keys = access.keys.iter().filter_map(|key| {
            Some(Arc::new(Key {
                name: key.name.clone(),
                admin: key.admin,
                digest: key.digest()?,
                requests_per_minute: key
                    .requests_per_minute
                    .unwrap_or(access.requests_per_minute),
                requests_in_flight_max: key
                    .requests_in_flight_max
                    .unwrap_or(access.requests_in_flight_max),
                usage: usage(&key.name),
            }))
        });
        Self {
            keys: keys.collect(),
        }
    }

    /// Whether everybody may ask.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// The key that a request shows; none when the server has no keys and everybody may ask.
    ///
    /// # Errors
    /// A key is needed and there is none, or not this one.
    pub fn find(&self, headers: &HeaderMap) -> Result<Option<Arc<Key>>, Failure> {
        if self.keys.is_empty() {
            return Ok(None);
        }
        // Whoever passed the request on may have looked at the other one.
        if SHOWN_IN.iter().any(|name| is_doubled(headers, name)) {
            return Err(unauthorized(
                "this request shows more than one key: send one `Authorization` header, or one `x-api-key`",
            ));
        }
        let Some(shown) = shown(headers) else {
            return Err(unauthorized(
                "this server needs an API key: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
            ));
        };
        let digest: [u8; 32] = Sha256::digest(shown).into();
        // All are compared, all in the same time: how long it takes tells nothing.
        let mut found = None;
        for key in &self.keys {
            if bool::from(key.digest.ct_eq(&digest)) {
                found = Some(Arc::clone(key));
            }
        }
        found
            .map(Some)
            .ok_or_else(|| unauthorized("this API key is not known here"))
    }

    /// Whether a request may administer the server: with an admin key, or without any from this
    /// machine while there is none. A key that only asks may not.
    ///
    /// # Errors
    /// An admin key is needed, and none is shown that is known here.
    pub fn may_administer(&self, headers: &HeaderMap, local: bool) -> Result<bool, Failure> {
        if local && !self.keys.iter().any(|key| key.admin) {
            return Ok(true);
        }
        Ok(self.find(headers)?.is_some_and(|key| key.admin))
    }
}

impl Key {
    /// Counts the bytes of its bodies on their way.
    pub fn arriving(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.usage.arriving)
    }

    /// Whether there is a place for one more request of this key, before anything of its body is read.
    ///
    /// # Errors
    /// Too many at once.
    pub fn has_place(&self) -> Result<(), Failure> {
        if self.usage.in_flight.is_full(self.places()) {
            return Err(self.busy());
        }
        Ok(())
    }

    fn places(&self) -> usize {
        match self.requests_in_flight_max {
            0 => usize::MAX,
            max => max as usize,
        }
    }

    fn busy(&self) -> Failure {
        let message = format!(
            "{} requests of this key are in flight already",
            self.places()
        );
        too_many(message, BUSY_RETRY_AFTER_S)
    }

    /// A place for one more request of this key.
    ///
    /// # Errors
    /// Too many at once, or too many in the last minute; when to come back is said.
    pub fn enter(&self) -> Result<Permit, Failure> {
        let entered = self.usage.in_flight.enter(self.places());
        let permit = entered.ok_or_else(|| self.busy())?;
        self.usage
            .take(self.requests_per_minute, Instant::now())
            .map_err(|wait_s| {
                let message = format!(
                    "this key may begin {} requests a minute",
                    self.requests_per_minute
                );
                too_many(message, wait_s)
            })?;
        Ok(permit)
    }
}

impl Usage {
    /// Takes one request out of the minute's; on an error, the seconds until there is one.
    fn take(&self, per_minute: u32, now: Instant) -> Result<(), u32> {
        if per_minute == 0 {
            return Ok(());
        }
        let allowance = self.allowance.lock();
        let mut allowance = allowance.unwrap_or_else(PoisonError::into_inner);
        allowance.take(per_minute, MINUTE, now).map_err(|wait| {
            // A minute at most, for one request a minute.
            u32::try_from(wait.as_millis().div_ceil(1000)).unwrap_or(60)
        })
    }
}

/// The key of a request, from either of the two headers that carry one.
fn shown(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let value = value.as_bytes();
        let (scheme, key) = value.split_at_checked(b"Bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"Bearer ").then_some(key)
    });
    let plain = || headers.get("x-api-key").map(|value| value.as_bytes());
    bearer
        .or_else(plain)
        .map(<[u8]>::trim_ascii)
        .filter(|key| !key.is_empty())
}

fn is_doubled(headers: &HeaderMap, name: &str) -> bool {
    headers.get_all(name).iter().count() > 1
}

fn unauthorized(message: &str) -> Failure {
    Failure::new(ErrorCode::Unauthorized, message)
}

fn too_many(message: String, retry_after_s: u32) -> Failure {
    Failure::new(ErrorCode::RateLimited, message).retry_after(retry_after_s)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::KeyConfig;

    fn key(name: &str, secret: &str) -> KeyConfig {
        let digest: [u8; 32] = Sha256::digest(secret).into();
        KeyConfig {
            name: name.to_owned(),
            sha256: digest.iter().map(|byte| format!("{byte:02X}")).collect(),
            ..KeyConfig::default()
        }
    }

    fn ring(keys: Vec<KeyConfig>) -> KeyRing {
        let access = AccessConfig {
            keys,
            ..AccessConfig::default()
        };
        KeyRing::new(&access, None)
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs.iter();
        pairs
            .map(|(name, value)| {
                (
                    header::HeaderName::from_static(name),
                    value.parse().expect("a value"),
                )
            })
            .collect()
    }

    fn name(ring: &KeyRing, pairs: &[(&'static str, &str)]) -> Result<Option<String>, String> {
        let found = ring.find(&headers(pairs));
        found
            .map(|key| key.map(|key| key.name.clone()))
            .map_err(|failure| failure.error.message)
    }

    #[test]
    fn a_key_is_found_in_either_header_and_names_its_owner() {
        let ring = ring(vec![key("alice", "one"), key("bob", "two")]);
        for pairs in [
            &[("authorization", "Bearer two")][..],
            &[("authorization", "bearer  two ")],
            &[("x-api-key", "two")],
            &[("authorization", "Basic eDp5"), ("x-api-key", "two")],
        ] {
            assert_eq!(name(&ring, pairs), Ok(Some("bob".to_owned())), "{pairs:?}");
        }
        for pairs in [
            &[][..],
            &[("authorization", "Bearer ")],
            &[("authorization", "two")],
            &[("x-api-key", "")],
        ] {
            assert!(name(&ring, pairs).unwrap_err().contains("needs an API key"));
        }
        for wrong in ["Bearer three", "Bearer tw", "Bearer two2", "Bearer Two"] {
            let message = name(&ring, &[("authorization", wrong)]).unwrap_err();
            assert!(message.contains("not known"), "{message}");
            assert!(!message.contains(&wrong[7..]), "{message}");
        }
    }

    #[test]
    fn two_keys_in_one_kind_of_header_are_none() {
        let ring = ring(vec![key("alice", "one"), key("bob", "two")]);
        for pairs in [
            [
                ("authorization", "Bearer one"),
                ("authorization", "Bearer two"),
            ],
            [
                ("authorization", "Bearer one"),
                ("authorization", "Bearer one"),
            ],
            [
                ("authorization", "Bearer one"),
                ("authorization", "Basic x"),
            ],
            [("x-api-key", "one"), ("x-api-key", "two")],
        ] {
            let message = name(&ring, &pairs).unwrap_err();
            assert!(message.contains("more than one key"), "{message}");
            let may = ring.may_administer(&headers(&pairs), false);
            assert_eq!(may.unwrap_err().error.code, ErrorCode::Unauthorized);
        }
    }

    #[test]
    fn only_admin_keys_administer_and_nobody_from_afar_without_one() {
        let plain = [("x-api-key", "one")];
        let may = |ring: &KeyRing, pairs: &[(&'static str, &str)], local| {
            matches!(ring.may_administer(&headers(pairs), local), Ok(true))
        };
        let none = KeyRing::default();
        assert!(may(&none, &[], true) && !may(&none, &plain, false));
        let clients = ring(vec![key("alice", "one")]);
        assert!(may(&clients, &[], true) && !may(&clients, &plain, false));
        let root = KeyConfig {
            admin: true,
            ..key("root", "two")
        };
        let both = ring(vec![key("alice", "one"), root]);
        for local in [true, false] {
            assert!(!may(&both, &[], local) && !may(&both, &plain, local));
            assert!(may(&both, &[("x-api-key", "two")], local));
        }
    }

    #[test]
    fn without_keys_everybody_may_ask() {
        let anyone = [("authorization", "Bearer x")];
        assert_eq!(name(&KeyRing::default(), &anyone), Ok(None));
    }

    #[test]
    fn who_asked_too_often_is_told_in_whole_seconds_when_to_come_back() {
        let (usage, start) = (Usage::default(), Instant::now());
        let at = |millis| usage.take(6, start + Duration::from_millis(millis));
        for _ in 0..6 {
            assert_eq!(at(0), Ok(()));
        }
        assert_eq!(at(0), Err(10), "one every ten seconds");
        assert_eq!(at(4500), Err(6));
        assert_eq!(at(10_000), Ok(()));
        assert_eq!(usage.take(0, start), Ok(()), "no limit");
    }

    #[test]
    fn requests_at_once_are_counted_across_a_change_of_the_configuration() {
        let access = |max| AccessConfig {
            requests_in_flight_max: max,
            keys: vec![key("alice", "one")],
            ..AccessConfig::default()
        };
        let shown = headers(&[("x-api-key", "one")]);
        let old = KeyRing::new(&access(1), None);
        let held = old.find(&shown).unwrap().unwrap().enter().unwrap();
        let new = KeyRing::new(&access(1), Some(&old));
        let busy = new.find(&shown).unwrap().unwrap().enter().unwrap_err();
        assert_eq!(busy.error.code, ErrorCode::RateLimited);
        assert_eq!(busy.error.retry_after_s, Some(1));
        drop(held);
        assert!(new.find(&shown).unwrap().unwrap().enter().is_ok());
    }
}
