//! Whether the numbers of a configuration make sense, alone and together.
//!
//! TOML and types are checked while reading; this is what only a reader of the meaning can see.

mod images;
mod log;

use std::collections::HashMap;
use std::net::{SocketAddr, ToSocketAddrs};

use super::report::Issue;
use super::{
    AccessConfig, Config, FormatsConfig, PluginLimits, RouteConfig, ServerConfig, TelemetryConfig,
};

/// Positions of the longest context Phi-3.5 was trained for.
const CONTEXT_TOKENS_MAX: u32 = 131_072;
/// A picture in one crop (313 tokens), a question and a short answer; plugins are tried with it.
const CONTEXT_TOKENS_MIN: u32 = 512;

/// Reads for each pixel of the largest picture; the shipped image policy takes at most 17.
const WORK_READS_MIN: u64 = 20;

/// Highest value of `server.generations_per_request_max`.
pub const GENERATIONS_PER_REQUEST_MAX: u32 = 128;

/// Every mistake of meaning, in the order of the file's sections. Empty when there is none.
#[must_use]
pub fn check(config: &Config) -> Vec<Issue> {
    let mut found = Found::default();
    check_server(config, &mut found);
    check_access(&config.access, &mut found);
    check_admin(config, &mut found);
    check_telemetry(&config.telemetry, &mut found);
    check_model(config, &mut found);
    check_generation(config, &mut found);
    check_formats(&config.formats, &mut found);
    images::check(&config.images, &mut found);
    check_sandbox(config, &mut found);
    check_plugins(config, &mut found);
    check_routes(&config.routes, &mut found);
    found.0
}

#[derive(Default)]
struct Found(Vec<Issue>);

impl Found {
    fn add(&mut self, key: impl Into<String>, message: impl Into<String>, allowed: &str) {
        self.0.push(Issue::at_key(key, message, allowed));
    }

    fn range<T: PartialOrd + std::fmt::Display>(&mut self, key: &str, value: T, low: T, high: T) {
        if value < low || value > high {
            self.add(
                key,
                format!("{value} is out of range"),
                &format!("{low} to {high}"),
            );
        }
    }
}

fn check_listener(server: &ServerConfig, found: &mut Found) {
    if server.listen.parse::<SocketAddr>().is_err() && server.listen.to_socket_addrs().is_err() {
        found.add(
            "server.listen",
            format!("`{}` is not an address with a port", server.listen),
            "IP:PORT, [IPV6]:PORT or HOST:PORT, such as 127.0.0.1:8080",
        );
    }
    if server.tls_cert_file.as_os_str().is_empty() != server.tls_key_file.as_os_str().is_empty() {
        found.add(
            "server.tls_cert_file",
            "a certificate without its key, or a key without its certificate",
            "server.tls_cert_file and server.tls_key_file together, or neither",
        );
    }
}

/// What clients may take their time with.
fn check_pace(server: &ServerConfig, found: &mut Found) {
    let rows = [
        ("head_read_timeout_s", server.head_read_timeout_s, 1, 600),
        ("body_read_timeout_s", server.body_read_timeout_s, 1, 3600),
        (
            "body_bytes_per_s_min",
            server.body_bytes_per_s_min,
            1,
            1 << 30,
        ),
        (
            "arriving_bytes_max",
            server.arriving_bytes_max,
            server.request_body_bytes_max,
            1 << 40,
        ),
        ("write_timeout_s", server.write_timeout_s, 1, 3600),
        (
            "write_bytes_per_s_min",
            server.write_bytes_per_s_min,
            1,
            1 << 30,
        ),
    ];
    for (name, value, low, high) in rows {
        found.range(&format!("server.{name}"), value, low, high);
    }
}

/// How many may ask at once, and for how long.
fn check_requests(server: &ServerConfig, found: &mut Found) {
    let rows = [
        (
            "requests_in_flight_max",
            server.requests_in_flight_max as u64,
            1,
            4096,
        ),
        (
            "queue_requests_max",
            server.queue_requests_max as u64,
            1,
            4096,
        ),
        ("queue_tokens_max", server.queue_tokens_max, 1, 1 << 32),
        (
            "generations_per_request_max",
            server.generations_per_request_max.into(),
            1,
            GENERATIONS_PER_REQUEST_MAX.into(),
        ),
        ("drain_s", server.drain_s, 0, 3600),
        ("request_timeout_s", server.request_timeout_s, 1, 86_400),
    ];
    for (name, value, low, high) in rows {
        found.range(&format!("server.{name}"), value, low, high);
    }
}

fn check_server(config: &Config, found: &mut Found) {
    let server = &config.server;
    check_listener(server, found);
    check_pace(server, found);
    check_requests(server, found);
    let rows = [
        ("connections_max", server.connections_max as u64, 1, 65_536),
        (
            "request_head_bytes_max",
            server.request_head_bytes_max,
            8192,
            1 << 20,
        ),
        (
            "request_body_bytes_max",
            server.request_body_bytes_max,
            1024,
            4 << 30,
        ),
        ("json_depth_max", server.json_depth_max.into(), 4, 127),
        ("lift_bytes_min", server.lift_bytes_min, 64, 1 << 20),
        ("keep_alive_s", server.keep_alive_s, 0, 3600),
        (
            "stream_buffer_pieces",
            server.stream_buffer_pieces as u64,
            1,
            65_536,
        ),
        ("stats_per_s_max", server.stats_per_s_max.into(), 1, 10_000),
    ];
    for (name, value, low, high) in rows {
        found.range(&format!("server.{name}"), value, low, high);
    }
    log::check(&server.log_filter, found);
}

/// What is meant by a host that is written in another way than URLs have it (lower case, punycode, addresses in their one
/// spelling), or is none; nothing where it is written so.
fn misnamed(name: &str) -> Option<String> {
    let canonical = url::Host::parse(name).map(|host| host.to_string());
    match canonical {
        Ok(canonical) if canonical == name && !name.contains('*') => None,
        Ok(canonical) if canonical != name => {
            Some(format!("`{canonical}`, as it is written in a URL"))
        }
        _ => Some("a host name without scheme, port or path".to_owned()),
    }
}

fn check_access(access: &AccessConfig, found: &mut Found) {
    for (index, listed) in access.hosts.iter().enumerate() {
        let meant = misnamed(&listed.to_ascii_lowercase()).filter(|_| listed != "*");
        if let Some(meant) = meant {
            found.add(
                format!("access.hosts.{index}"),
                format!("`{listed}` is not a host"),
                &format!("{meant}; `*` for any"),
            );
        }
    }
    for (index, listed) in access.cors_origins.iter().enumerate() {
        // As a browser writes it: scheme, host, and a port that is not the scheme's own.
        let origin = url::Url::parse(listed).map(|url| url.origin().ascii_serialization());
        if listed != "*" && origin.as_deref() != Ok(listed) {
            found.add(
                format!("access.cors_origins.{index}"),
                format!("`{listed}` is no origin"),
                "scheme and host, such as https://app.example.org, without a path; `*` for all",
            );
        }
    }
    for (index, key) in access.keys.iter().enumerate() {
        let at = |name: &str| format!("access.keys.{index}.{name}");
        let before = &access.keys[..index];
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
        let shaped = (1..=64).contains(&key.name.len()) && key.name.chars().all(plain);
        if !shaped || before.iter().any(|other| other.name == key.name) {
            found.add(
                at("name"),
                format!("`{}` is no name, or the name of another key", key.name),
                "one name each: 1 to 64 letters, digits, `-`, `_`, `.`, `@`",
            );
        }
        // The wrong text may be the key itself, so it is not repeated.
        let digest = key.digest();
        if digest.is_none() || before.iter().any(|other| other.digest() == digest) {
            found.add(
                at("sha256"),
                "no SHA-256, or that of another key",
                "64 hexadecimal digits: printf %s \"$KEY\" | sha256sum",
            );
        }
    }
}

fn check_admin(config: &Config, found: &mut Found) {
    let listen = &config.admin.listen;
    if listen.is_empty() {
        return;
    }
    let has_key = config.access.keys.iter().any(|key| key.admin);
    match listen.parse::<SocketAddr>() {
        Err(_) => found.add(
            "admin.listen",
            format!("`{listen}` is not an IP address with a port"),
            "IP:PORT or [IPV6]:PORT, such as 127.0.0.1:8081; empty opens none",
        ),
        Ok(address) if !address.ip().is_loopback() && !has_key => found.add(
            "admin.listen",
            format!("{address} is reached from other machines, and no key guards it"),
            "a loopback address, or a key with admin = true in [[access.keys]]",
        ),
        Ok(address) if takes_listener(&config.server.listen, address) => found.add(
            "admin.listen",
            format!("{address} is where server.listen is"),
            "another port",
        ),
        Ok(_) => {}
    }
}

/// Whether a listener at `listen` leaves no room for one at `address`: all addresses of a machine take the port of each.
fn takes_listener(listen: &str, address: SocketAddr) -> bool {
    let takes = |one: SocketAddr, other: SocketAddr| {
        let all = one.ip().is_unspecified() && (one.is_ipv6() || other.is_ipv4());
        one.port() != 0 && one.port() == other.port() && (all || one.ip() == other.ip())
    };
    let listens = listen.to_socket_addrs().into_iter().flatten();
    listens
        .into_iter()
        .any(|listen| takes(listen, address) || takes(address, listen))
}

fn check_telemetry(telemetry: &TelemetryConfig, found: &mut Found) {
    found.range("telemetry.timeout_s", telemetry.timeout_s, 1, 60);
    let endpoint = &telemetry.otlp_endpoint;
    let bare = |url: url::Url| {
        url.scheme() == "http" && url.has_host() && url.path() == "/" && url.query().is_none()
    };
    if !endpoint.is_empty() && !url::Url::parse(endpoint).is_ok_and(bare) {
        found.add(
            "telemetry.otlp_endpoint",
            format!("`{endpoint}` is not the address of a collector"),
            "http://HOST:PORT, such as http://127.0.0.1:4318, without a path; empty sends nothing",
        );
    }
}

fn check_model(config: &Config, found: &mut Found) {
    let model = &config.model;
    let tokens = model.context_tokens;
    found.range(
        "model.context_tokens",
        tokens,
        CONTEXT_TOKENS_MIN,
        CONTEXT_TOKENS_MAX,
    );
    found.range(
        "model.prefill_chunk_tokens",
        model.prefill_chunk_tokens,
        1,
        131_072,
    );
    found.range("model.sequences_max", model.sequences_max, 1, 256);
    found.range("model.kv_cache_mib", model.kv_cache_mib, 1, 1 << 20);
    found.range("model.slice_ms", model.slice_ms, 1, 60_000);
    found.range("model.draft_tokens_max", model.draft_tokens_max, 0, 64);
    for (index, alias) in model.aliases.iter().enumerate() {
        let repeated = model.aliases[..index].contains(alias) || *alias == model.served_name;
        if alias.is_empty() || repeated {
            let key = format!("model.aliases.{index}");
            found.add(
                key,
                format!("`{alias}` is empty or used twice"),
                "one new name each",
            );
        }
    }
}

fn check_generation(config: &Config, found: &mut Found) {
    let generation = &config.generation;
    found.range(
        "generation.max_tokens",
        generation.max_tokens,
        1,
        generation.max_tokens_limit,
    );
    found.range(
        "generation.max_tokens_limit",
        generation.max_tokens_limit,
        1,
        CONTEXT_TOKENS_MAX,
    );
    if generation.prompt_tokens_max >= config.model.context_tokens {
        found.add(
            "generation.prompt_tokens_max",
            format!(
                "{} leaves no room for an answer in model.context_tokens = {}",
                generation.prompt_tokens_max, config.model.context_tokens
            ),
            "less than model.context_tokens; 0 allows what the context holds",
        );
    }
    found.range("generation.temperature", generation.temperature, 0.0, 2.0);
    if !(generation.top_p > 0.0 && generation.top_p <= 1.0) {
        found.add(
            "generation.top_p",
            format!("{} is out of range", generation.top_p),
            "above 0, at most 1",
        );
    }
    if !generation.temperature.is_finite() {
        found.add("generation.temperature", "not a number", "0 to 2");
    }
}

fn check_formats(formats: &FormatsConfig, found: &mut Found) {
    let rows = [
        ("bytes_max", formats.bytes_max, 64, 16 << 20),
        (
            "compile_work_max",
            formats.compile_work_max,
            10_000,
            1_000_000_000,
        ),
        ("compile_ms_max", formats.compile_ms_max, 1, 60_000),
        ("compiles_max", formats.compiles_max as u64, 1, 1024),
        ("kept_mib", formats.kept_mib, 0, 1 << 20),
        ("symbols_max", formats.symbols_max as u64, 1000, 10_000_000),
        ("step_work_max", formats.step_work_max, 1000, 100_000_000),
        (
            "step_items_max",
            formats.step_items_max as u64,
            100,
            10_000_000,
        ),
        ("states_max", formats.states_max as u64, 1000, 1_000_000),
        ("tools_max", u64::from(formats.tools_max), 0, 1024),
        ("tools_bytes_max", formats.tools_bytes_max, 64, 16 << 20),
        ("calls_max", u64::from(formats.calls_max), 1, 1024),
    ];
    for (name, value, low, high) in rows {
        found.range(&format!("formats.{name}"), value, low, high);
    }
}

fn check_sandbox(config: &Config, found: &mut Found) {
    let sandbox = &config.sandbox;
    let work_mpx_min = config.images.pixels_max.saturating_mul(WORK_READS_MIN) / 1_000_000;
    let work_mpx = sandbox.image_work_mpx_max;
    let rows = [
        ("instances_max", sandbox.instances_max.into(), 8, 10_000),
        ("instance_wait_ms", sandbox.instance_wait_ms, 0, 60_000),
        ("component_mib_max", sandbox.component_mib_max, 1, 1024),
        ("setup_ms", sandbox.setup_ms, 1, 60_000),
        ("image_work_mpx_max", work_mpx, work_mpx_min, 1_000_000),
        (
            "metric_series_max",
            sandbox.metric_series_max.into(),
            0,
            100_000,
        ),
        ("store_mib_max", sandbox.store_mib_max, 1, 4096),
        (
            "store_entries_max",
            sandbox.store_entries_max.into(),
            1,
            10_000_000,
        ),
    ];
    for (name, value, low, high) in rows {
        found.range(&format!("sandbox.{name}"), value, low, high);
    }
    for (role, limits) in sandbox.roles() {
        let key = |name: &str| format!("sandbox.{role}.{name}");
        found.range(&key("memory_mib_max"), limits.memory_mib_max, 1, 4096);
        found.range(
            &key("table_elements_max"),
            limits.table_elements_max,
            16,
            10_000_000,
        );
        found.range(
            &key("hostcall_kib_max"),
            limits.hostcall_kib_max,
            1,
            1 << 20,
        );
        found.range(&key("handles_max"), limits.handles_max, 4, 1_000_000);
        found.range(&key("log_lines_per_s"), limits.log_lines_per_s, 0, 100_000);
        found.range(
            &key("log_line_bytes_max"),
            limits.log_line_bytes_max,
            64,
            1 << 20,
        );
        for (function, ms) in &limits.call_ms {
            found.range(
                &format!("sandbox.{role}.call_ms.{function}"),
                *ms,
                1,
                60_000,
            );
        }
    }
}

fn check_plugins(config: &Config, found: &mut Found) {
    found.range("plugins.poll_s", config.plugins.poll_s, 0, 3600);
    for (id, plugin) in &config.plugins.by_id {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if id.is_empty() || !id.chars().all(plain) {
            found.add(
                format!("plugins.{id}"),
                format!("`{id}` is not a plugin id"),
                "the file name without .wasm: letters, digits, `-`, `_`, `.`",
            );
        }
        check_plugin_limits(config, id, &plugin.limits, found);
    }
}

/// A plugin's limits may only lower the role's: one above every role's can only be a mistake.
fn check_plugin_limits(config: &Config, id: &str, limits: &PluginLimits, found: &mut Found) {
    let roles: Vec<_> = config
        .sandbox
        .roles()
        .into_iter()
        .map(|(_, limits)| limits)
        .collect();
    let highest =
        |of: &dyn Fn(&super::sandbox::RoleView) -> u64| roles.iter().map(of).max().unwrap_or(0);
    let call_ms = highest(&|role| role.call_ms.iter().map(|(_, ms)| *ms).max().unwrap_or(0));
    let rows = [
        ("call_ms", limits.call_ms, call_ms),
        (
            "memory_mib_max",
            limits.memory_mib_max,
            highest(&|role| role.memory_mib_max),
        ),
        (
            "hostcall_kib_max",
            limits.hostcall_kib_max,
            highest(&|role| role.hostcall_kib_max),
        ),
        (
            "handles_max",
            limits.handles_max.map(u64::from),
            highest(&|role| role.handles_max.into()),
        ),
        (
            "log_lines_per_s",
            limits.log_lines_per_s.map(u64::from),
            highest(&|role| role.log_lines_per_s.into()),
        ),
    ];
    for (name, value, high) in rows {
        let Some(value) = value else { continue };
        let low = u64::from(name != "log_lines_per_s");
        if value < low || value > high {
            found.add(
                format!("plugins.{id}.limits.{name}"),
                format!("{value} is out of range: a plugin's limits only lower those of [sandbox]"),
                &format!("{low} to {high}"),
            );
        }
    }
}

/// Paths the server answers itself; an adapter there would never be asked.
const NATIVE_PATHS: [&str; 5] = ["/health", "/ready", "/stats", "/metrics", "/openapi.json"];

fn check_routes(routes: &[RouteConfig], found: &mut Found) {
    if routes.is_empty() {
        found.add(
            "routes",
            "no route: every request would be a 404",
            "at least one [[routes]]",
        );
    }
    let mut seen: HashMap<&str, usize> = HashMap::new();
    for (index, route) in routes.iter().enumerate() {
        let key = |name: &str| format!("routes.{index}.{name}");
        let prefix = route.prefix.as_str();
        let plain = |c: char| c.is_ascii_alphanumeric() || "/-_.~".contains(c);
        let shaped = prefix == "/" || (prefix.starts_with('/') && !prefix.ends_with('/'));
        if !shaped || prefix.contains("//") || !prefix.chars().all(plain) {
            found.add(
                key("prefix"),
                format!("`{prefix}` is not a path prefix"),
                "a path such as /v1: starts with `/`, does not end with one",
            );
        }
        if NATIVE_PATHS.contains(&prefix) {
            found.add(
                key("prefix"),
                format!("`{prefix}` is the server's own"),
                "another prefix",
            );
        }
        if let Some(first) = seen.insert(prefix, index) {
            found.add(
                key("prefix"),
                format!("`{prefix}` is also the prefix of route {}", first + 1),
                "one route per prefix",
            );
        }
        for (name, id) in [
            ("adapter", &route.adapter),
            ("template", &route.template),
            ("image_policy", &route.image_policy),
        ] {
            if id.is_empty() {
                found.add(key(name), "empty", "the id of a plugin");
            }
        }
    }
}
