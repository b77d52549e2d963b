//! `[telemetry]`: who is told of requests besides the log.

use serde::{Deserialize, Serialize};

/// `[telemetry]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// Address of an OTLP collector, `http://HOST:PORT`; empty sends nothing. Needs a restart.
    pub otlp_endpoint: String,
    /// Name by which the collector knows this server. Needs a restart.
    pub service_name: String,
    /// Seconds that one batch of spans may take to be sent. Needs a restart.
    pub timeout_s: u64,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            otlp_endpoint: String::new(),
            service_name: "visor".to_owned(),
            timeout_s: 10,
        }
    }
}
