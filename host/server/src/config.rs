//! The one configuration: what a key is called, its unit and its default.
//!
//! `Default` is the truth; `config/visor.toml` repeats it with reasons and a test holds the two
//! equal. This room knows TOML and numbers. It must not know sockets, plugins or the model:
//! [`check`] says whether the numbers make sense together, [`change`] what differs between two.

pub mod access;
pub mod change;
pub mod check;
pub mod formats;
pub mod images;
pub mod plugins;
pub mod report;
pub mod sandbox;
pub mod telemetry;

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use access::{AccessConfig, AdminConfig, KeyConfig};
pub use formats::FormatsConfig;
pub use images::{FetchConfig, ImagesConfig};
pub use plugins::{PluginConfig, PluginLimits, PluginsConfig};
pub use report::{ConfigError, Issue};
pub use sandbox::SandboxConfig;
pub use telemetry::TelemetryConfig;
use visor_model::{Activations, DeviceChoice, Quantization};

/// The embedded copy of `config/visor.toml`: every key, its unit, its default and why.
pub const DOCUMENTED: &str = include_str!("../../../config/visor.toml");

/// Longest configuration file, in bytes: the documented one has 30 KiB. Fixed, because it is read before any key is.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// Everything an operator can set. Read once, checked once, then passed down by part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The HTTP side: address, sizes, counts, times.
    pub server: ServerConfig,
    /// Who may ask, and how much.
    pub access: AccessConfig,
    /// Where the server is administered.
    pub admin: AdminConfig,
    /// Who is told of requests besides the log.
    pub telemetry: TelemetryConfig,
    /// Which weights, on which device, with how much context.
    pub model: ModelSection,
    /// What a request gets that does not say, and the most it may ask for.
    pub generation: GenerationConfig,
    /// Limits on the formats that clients hold answers to.
    pub formats: FormatsConfig,
    /// Limits on the pictures clients send, and which are fetched.
    pub images: ImagesConfig,
    /// Sizes of the host's caches.
    pub cache: CacheConfig,
    /// Where plugins are found, and a table per plugin.
    pub plugins: PluginsConfig,
    /// What a plugin may use.
    pub sandbox: SandboxConfig,
    /// Which plugins serve which path prefix.
    pub routes: Vec<RouteConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            server: ServerConfig::default(),
            access: AccessConfig::default(),
            admin: AdminConfig::default(),
            telemetry: TelemetryConfig::default(),
            model: ModelSection::default(),
            generation: GenerationConfig::default(),
            formats: FormatsConfig::default(),
            images: ImagesConfig::default(),
            cache: CacheConfig::default(),
            plugins: PluginsConfig::default(),
            sandbox: SandboxConfig::default(),
            routes: RouteConfig::of_shipped_adapters(),
        }
    }
}

impl Config {
    /// Reads and checks one TOML text; `file` only names it in errors.
    ///
    /// # Errors
    /// Every mistake with line, column, key, what is wrong and what is allowed.
    pub fn parse(text: &str, file: &Path) -> Result<Self, ConfigError> {
        let config: Self = report::deserialize(text, file)?;
        let issues = check::check(&config);
        if issues.is_empty() {
            return Ok(config);
        }
        Err(ConfigError::semantic(text, file, issues))
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// As [`Config::parse`], and when the file cannot be read.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        Self::parse(&Self::read(file)?, file)
    }

    /// What a file says, unchecked.
    ///
    /// # Errors
    /// When it cannot be read, or is no text.
    pub fn read(file: &Path) -> Result<String, ConfigError> {
        let unreadable = |source| ConfigError::unreadable(file, &source);
        let bytes = read_at_most(file, FILE_BYTES_MAX).map_err(unreadable)?;
        String::from_utf8(bytes).map_err(|_| unreadable(io::Error::other("it is not UTF-8 text")))
    }

    /// This configuration as TOML, every key written out.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("every field of Config is a TOML value")
    }
}

/// Reads a file to its end, however it is made: a device or a pipe that never ends is given up after `bytes_max`.
///
/// # Errors
/// What the system says, or that there is more.
pub(crate) fn read_at_most(file: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let opened = File::open(file)?;
    opened
        .take(bytes_max.saturating_add(1))
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        let more = format!("it has more than {bytes_max} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, more));
    }
    Ok(bytes)
}

/// `[server]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Address and port to listen on. Port 0 takes a free one. Needs a restart.
    pub listen: String,
    /// File with the certificate chain in PEM, the server's own first; empty serves without TLS. Needs a
    /// restart.
    pub tls_cert_file: PathBuf,
    /// File with the certificate's private key in PEM. Needs a restart.
    pub tls_key_file: PathBuf,
    /// Connections open at once; more are closed at once.
    pub connections_max: usize,
    /// Largest request head (request line and headers), in bytes. Needs a restart.
    pub request_head_bytes_max: u64,
    /// Largest request body, in bytes.
    pub request_body_bytes_max: u64,
    /// Deepest nesting of a JSON body.
    pub json_depth_max: u32,
    /// Base64 strings of a JSON body from this length on, in bytes, stay in the host as blobs.
    pub lift_bytes_min: u64,
    /// Requests worked on at once; more are answered 503.
    pub requests_in_flight_max: usize,
    /// Requests that may wait for the model; more are answered 503. Needs a restart.
    pub queue_requests_max: usize,
    /// Prompt tokens that may wait for the model, all together. Needs a restart.
    pub queue_tokens_max: u64,
    /// Answers one request may ask for (`n` of the OpenAI dialect, prompts of a batch).
    pub generations_per_request_max: u32,
    /// Seconds that requests in flight get to finish after Ctrl-C, SIGTERM or SIGHUP.
    pub drain_s: u64,
    /// Seconds one request may take from its head to its last byte.
    pub request_timeout_s: u64,
    /// Seconds a client may take to send the head of a request, and be silent between two. Needs a restart.
    pub head_read_timeout_s: u64,
    /// Seconds a client may take to send the body of a request.
    pub body_read_timeout_s: u64,
    /// Least a body brings in a second on average, in bytes, once `head_read_timeout_s` seconds of it are over.
    pub body_bytes_per_s_min: u64,
    /// Bodies on their way, of all requests together, in bytes; more are answered 503.
    pub arriving_bytes_max: u64,
    /// Seconds a client may take nothing of its answer. Needs a restart.
    pub write_timeout_s: u64,
    /// Least a client takes of its answer in a second on average, in bytes, once it has kept the server waiting for
    /// `write_timeout_s`. Needs a restart.
    pub write_bytes_per_s_min: u64,
    /// Seconds of silence in a stream after which a keep-alive is sent; 0 sends none.
    pub keep_alive_s: u64,
    /// Pieces of a stream that may wait for a slow client before its request waits too.
    pub stream_buffer_pieces: usize,
    /// Times in a second that `/stats` is made anew, and `/metrics` in each of its two formats.
    pub stats_per_s_max: u32,
    /// How log lines are written. Needs a restart.
    pub log_format: LogFormat,
    /// Which log lines are written: `off|error|warn|info|debug|trace`, or directives such as
    /// `info,visor_engine=debug`. Needs a restart.
    pub log_filter: String,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8080".to_owned(),
            tls_cert_file: PathBuf::new(),
            tls_key_file: PathBuf::new(),
            connections_max: 1024,
            request_head_bytes_max: 64 << 10,
            request_body_bytes_max: 32 << 20,
            json_depth_max: 64,
            lift_bytes_min: 1024,
            requests_in_flight_max: 64,
            queue_requests_max: 64,
            queue_tokens_max: 262_144,
            generations_per_request_max: 20,
            drain_s: 25,
            request_timeout_s: 600,
            head_read_timeout_s: 10,
            body_read_timeout_s: 60,
            body_bytes_per_s_min: 1024,
            arriving_bytes_max: 512 << 20,
            write_timeout_s: 60,
            write_bytes_per_s_min: 1024,
            keep_alive_s: 15,
            stream_buffer_pieces: 32,
            stats_per_s_max: 100,
            log_format: LogFormat::Text,
            log_filter: "info".to_owned(),
        }
    }
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One readable line per event.
    Text,
    /// One JSON object per event.
    Json,
}

/// `[model]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSection {
    /// Folder of a Hugging Face checkpoint; empty is the embedded demo. Needs a restart.
    pub path: PathBuf,
    /// `auto`, `cpu`, `metal` or `cuda`. Needs a restart.
    #[serde(with = "choice_text")]
    pub device: DeviceChoice,
    /// `int8` or `float`: what INT4 and INT8 weights are multiplied with on the CPU. Needs a restart.
    #[serde(with = "choice_text")]
    pub activations: Activations,
    /// `none` or `int4`: what becomes of weights stored as floats. Needs a restart.
    #[serde(with = "choice_text")]
    pub quantization: Quantization,
    /// Folder where quantized weights are kept; empty is `visor/quantized` in the user's cache folder. Needs a restart.
    pub quantized_folder: PathBuf,
    /// Longest prompt plus answer, in tokens. Needs a restart.
    pub context_tokens: u32,
    /// Name clients use; empty takes the checkpoint's. Needs a restart.
    pub served_name: String,
    /// Further names clients may use. Needs a restart.
    pub aliases: Vec<String>,
    /// Requests computed at once. Needs a restart.
    pub sequences_max: usize,
    /// Memory for keys and values, of running requests and cached prefixes together, in MiB. Needs a restart.
    pub kv_cache_mib: u64,
    /// Prompt positions of a step while nobody waits for a token. Needs a restart.
    pub prefill_chunk_tokens: usize,
    /// Milliseconds that pictures and prompts may add to the time between two tokens of others. Needs a restart.
    pub slice_ms: u64,
    /// Tokens that a step may check ahead of time, of all its requests together; 0 for none. Needs a restart.
    pub draft_tokens_max: usize,
}

impl Default for ModelSection {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            device: DeviceChoice::Auto,
            activations: Activations::Int8,
            quantization: Quantization::None,
            quantized_folder: PathBuf::new(),
            context_tokens: 4096,
            served_name: String::new(),
            aliases: Vec::new(),
            sequences_max: 8,
            kv_cache_mib: 2048,
            prefill_chunk_tokens: 128,
            slice_ms: 500,
            draft_tokens_max: 7,
        }
    }
}

/// `[generation]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerationConfig {
    /// Output tokens of a request that does not say, cut to what the context leaves.
    pub max_tokens: u32,
    /// Most output tokens a request may ask for.
    pub max_tokens_limit: u32,
    /// Longest prompt, in tokens, images included; 0 allows what the context holds.
    pub prompt_tokens_max: u32,
    /// Sampling temperature of a request that does not say; 0 is greedy.
    pub temperature: f32,
    /// Nucleus sampling share of a request that does not say, in (0, 1].
    pub top_p: f32,
    /// Most likely tokens sampling chooses among when a request does not say; 0 means all.
    pub top_k: u32,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            max_tokens: 512,
            max_tokens_limit: 4096,
            prompt_tokens_max: 0,
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
        }
    }
}

/// `[cache]`: sizes in MiB; 0 turns a cache off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheConfig {
    /// Preprocessed pixels, in MiB.
    pub pixels_mib: u64,
    /// Image features (what the vision tower made), in MiB.
    pub features_mib: u64,
    /// Whole answers to identical requests at temperature 0, in MiB.
    pub responses_mib: u64,
    /// Keys and values of prompts and answers so far, in MiB; counted in `model.kv_cache_mib`, too.
    pub prefixes_mib: u64,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            pixels_mib: 256,
            features_mib: 512,
            responses_mib: 32,
            prefixes_mib: 1024,
        }
    }
}

/// One `[[routes]]` entry: which plugins serve the paths below `prefix`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouteConfig {
    /// Path prefix, starting with `/` and not ending with one (except `/` itself).
    pub prefix: String,
    /// Plugin id of the request adapter.
    pub adapter: String,
    /// Plugin id of the prompt template.
    pub template: String,
    /// Plugin id of the image policy.
    pub image_policy: String,
    /// Plugin id of the cache strategy; empty is the host's own LRU.
    pub cache_strategy: String,
}

impl Default for RouteConfig {
    fn default() -> Self {
        Self {
            prefix: "/v1".to_owned(),
            adapter: "openai".to_owned(),
            template: "phi3".to_owned(),
            image_policy: "hd".to_owned(),
            cache_strategy: "lru".to_owned(),
        }
    }
}

impl RouteConfig {
    /// Every shipped dialect where its clients look for it. The first steers the caches.
    fn of_shipped_adapters() -> Vec<Self> {
        let mounts = [
            ("/v1", "openai"),
            ("/v1/responses", "responses"),
            ("/v1/messages", "anthropic"),
            ("/api", "ollama"),
        ];
        let route = |(prefix, adapter): (&str, &str)| Self {
            prefix: prefix.to_owned(),
            adapter: adapter.to_owned(),
            ..Self::default()
        };
        mounts.map(route).into()
    }
}

/// Choices of the model crate as their text, so that it needs no serde here.
mod choice_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<T: Display, S: Serializer>(value: &T, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(value)
    }

    pub(super) fn deserialize<'de, T, D>(d: D) -> Result<T, D::Error>
    where
        T: FromStr<Err = String>,
        D: Deserializer<'de>,
    {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests;
