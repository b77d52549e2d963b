//! What differs between two configurations, and what of it waits for a restart.

use std::net::ToSocketAddrs;

use super::{Config, Issue};

/// Keys that are read once, at start. Everything else is applied live.
const RESTART_KEYS: [&str; 22] = [
    "server.listen",
    "server.tls_cert_file",
    "server.tls_key_file",
    "server.request_head_bytes_max",
    "server.queue_requests_max",
    "server.queue_tokens_max",
    "server.head_read_timeout_s",
    "server.write_timeout_s",
    "server.write_bytes_per_s_min",
    "server.log_format",
    "server.log_filter",
    "admin",
    "telemetry",
    "model",
    "images.decoded_mib_max",
    "images.crops_mib_max",
    "images.canvases_mib_max",
    "images.fetch.at_once_max",
    "images.fetch.lookups_max",
    "plugins.folder",
    "plugins.poll_s",
    "sandbox",
];

/// The keys in which two configurations differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Applied at once, as dotted keys.
    pub live: Vec<String>,
    /// Take effect at the next start, as dotted keys.
    pub restart: Vec<String>,
}

impl Change {
    /// Compares every key.
    #[must_use]
    pub fn between(old: &Config, new: &Config) -> Self {
        let mut keys = Vec::new();
        let table = |config: &Config| toml::Value::try_from(config).ok();
        differing("", table(old).as_ref(), table(new).as_ref(), &mut keys);
        let (restart, live) = keys.into_iter().partition(|key| needs_restart(key));
        Self { live, restart }
    }

    /// Whether nothing differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.live.is_empty() && self.restart.is_empty()
    }
}

/// `new` with the keys that need a restart put back to what is running.
#[must_use]
pub fn keep_restart_keys(running: &Config, new: &Config) -> Config {
    let mut applied = new.clone();
    let server = &running.server;
    applied.server.listen.clone_from(&server.listen);
    applied
        .server
        .tls_cert_file
        .clone_from(&server.tls_cert_file);
    applied.server.tls_key_file.clone_from(&server.tls_key_file);
    applied.server.request_head_bytes_max = server.request_head_bytes_max;
    applied.server.queue_requests_max = server.queue_requests_max;
    applied.server.queue_tokens_max = server.queue_tokens_max;
    applied.server.head_read_timeout_s = server.head_read_timeout_s;
    applied.server.write_timeout_s = server.write_timeout_s;
    applied.server.write_bytes_per_s_min = server.write_bytes_per_s_min;
    applied.server.log_format = server.log_format;
    applied.server.log_filter.clone_from(&server.log_filter);
    applied.admin = running.admin.clone();
    applied.telemetry = running.telemetry.clone();
    applied.model = running.model.clone();
    applied.images.decoded_mib_max = running.images.decoded_mib_max;
    applied.images.crops_mib_max = running.images.crops_mib_max;
    applied.images.canvases_mib_max = running.images.canvases_mib_max;
    applied.images.fetch.at_once_max = running.images.fetch.at_once_max;
    applied.images.fetch.lookups_max = running.images.fetch.lookups_max;
    applied.plugins.folder.clone_from(&running.plugins.folder);
    applied.plugins.poll_s = running.plugins.poll_s;
    applied.sandbox = running.sandbox.clone();
    applied
}

/// The one step that only a start takes: without any key where other machines reach the server. A file that was cut short, or is being
/// written, looks like one without keys.
#[must_use]
pub fn opens_to_all(running: &Config, applied: &Config) -> Option<Issue> {
    let listen = &running.server.listen;
    let gives_up_keys = !running.access.keys.is_empty() && applied.access.keys.is_empty();
    if !gives_up_keys || is_loopback(listen) {
        return None;
    }
    let message = format!(
        "{listen} is reached from other machines, and no key would be left; keep one, or restart the server without"
    );
    let allowed = "at least one [[access.keys]]";
    Some(Issue::at_key("access.keys", message, allowed))
}

/// Whether only this machine reaches what listens there. What cannot be told is reached by others.
fn is_loopback(listen: &str) -> bool {
    let addresses = listen.to_socket_addrs();
    addresses.is_ok_and(|mut all| all.all(|address| address.ip().is_loopback()))
}

fn needs_restart(key: &str) -> bool {
    RESTART_KEYS.iter().any(|restart| {
        key == *restart
            || key
                .strip_prefix(restart)
                .is_some_and(|rest| rest.starts_with('.'))
    })
}

fn differing(
    path: &str,
    old: Option<&toml::Value>,
    new: Option<&toml::Value>,
    keys: &mut Vec<String>,
) {
    if let (Some(toml::Value::Table(old)), Some(toml::Value::Table(new))) = (old, new) {
        let mut names: Vec<&String> = old.keys().chain(new.keys()).collect();
        names.sort();
        names.dedup();
        for name in names {
            let below = if path.is_empty() {
                name.clone()
            } else {
                format!("{path}.{name}")
            };
            differing(&below, old.get(name), new.get(name), keys);
        }
    } else if old != new {
        keys.push(path.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_says_which_keys_wait_for_a_restart() {
        let old = Config::default();
        let mut new = old.clone();
        new.server.listen = "0.0.0.0:80".to_owned();
        new.model.context_tokens = 8192;
        new.images.count_max = 2;
        new.cache.pixels_mib = 1;
        let change = Change::between(&old, &new);
        assert_eq!(change.live, ["cache.pixels_mib", "images.count_max"]);
        assert_eq!(change.restart, ["model.context_tokens", "server.listen"]);
    }

    #[test]
    fn the_last_key_goes_only_where_nobody_else_reaches_the_server() {
        let listening = |listen: &str, names: &[&str]| {
            let mut config = Config::default();
            config.server.listen = listen.to_owned();
            let key = |name: &&str| super::super::KeyConfig {
                name: (*name).to_owned(),
                ..Default::default()
            };
            config.access.keys = names.iter().map(key).collect();
            config
        };
        let opens = |listen: &str, before: &[&str], after: &[&str]| {
            opens_to_all(&listening(listen, before), &listening(listen, after))
        };
        for open in ["0.0.0.0:8080", "[::]:8080", "192.168.0.7:1", "nowhere"] {
            let issue = opens(open, &["alice"], &[]).expect("everybody could ask");
            assert_eq!(issue.key, "access.keys");
            assert!(issue.message.contains(open), "{issue:?}");
            assert_eq!(opens(open, &["alice", "bob"], &["bob"]), None);
            assert_eq!(opens(open, &["alice"], &["bob"]), None);
            assert_eq!(opens(open, &[], &[]), None);
            assert_eq!(opens(open, &[], &["alice"]), None);
        }
        for local in ["127.0.0.1:8080", "[::1]:0", "localhost:8080"] {
            assert_eq!(opens(local, &["alice"], &[]), None, "{local}");
        }
    }

    #[test]
    fn keys_that_need_a_restart_keep_their_running_value() {
        let old = Config::default();
        let mut new = old.clone();
        new.model.context_tokens = 8192;
        new.sandbox.adapter.call_ms.start = 1;
        new.server.request_timeout_s = 7;
        let applied = keep_restart_keys(&old, &new);
        assert_eq!(
            Change::between(&old, &applied).live,
            ["server.request_timeout_s"]
        );
        assert!(Change::between(&old, &applied).restart.is_empty());
    }

    /// The list of names and the function that puts values back must agree.
    #[test]
    fn every_restart_key_is_put_back() {
        let old = Config::default();
        let mut new = old.clone();
        new.server.listen = "0.0.0.0:1".to_owned();
        new.server.tls_cert_file = "cert.pem".into();
        new.server.tls_key_file = "key.pem".into();
        new.server.request_head_bytes_max += 1;
        new.server.queue_requests_max += 1;
        new.server.queue_tokens_max += 1;
        new.server.head_read_timeout_s += 1;
        new.server.write_timeout_s += 1;
        new.server.write_bytes_per_s_min += 1;
        new.server.log_format = super::super::LogFormat::Json;
        new.server.log_filter = "debug".to_owned();
        new.admin.listen = "127.0.0.1:1".to_owned();
        new.telemetry.timeout_s += 1;
        new.model.aliases.push("x".to_owned());
        new.images.decoded_mib_max += 1;
        new.images.crops_mib_max += 1;
        new.images.canvases_mib_max += 1;
        new.images.fetch.at_once_max += 1;
        new.images.fetch.lookups_max += 1;
        new.plugins.folder = "other".into();
        new.plugins.poll_s += 1;
        new.sandbox.instances_max += 1;
        new.sandbox.component_mib_max += 1;
        new.sandbox.image_work_mpx_max += 1;
        new.sandbox.template.call_ms.render += 1;
        let change = Change::between(&old, &new);
        assert_eq!(change.live, Vec::<String>::new());
        let changed = |key: &str| {
            let below = format!("{key}.");
            let mut keys = change.restart.iter();
            keys.any(|changed| changed == key || changed.starts_with(&below))
        };
        let forgotten: Vec<_> = RESTART_KEYS.iter().filter(|key| !changed(key)).collect();
        assert!(forgotten.is_empty(), "change them here: {forgotten:?}");
        assert_eq!(keep_restart_keys(&old, &new), old);
    }
}
