//! `[plugins]`: the folder, and one table per plugin id.
//!
//! The table mixes two fixed keys with ids the operator chooses, so it is read by hand: serde's
//! `flatten` would lose the line numbers of every mistake inside.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};

/// `[plugins]`.
#[derive(Clone, Debug, PartialEq)]
pub struct PluginsConfig {
    /// Folder watched for `*.wasm`, relative to the working directory. It need not exist.
    /// Needs a restart.
    pub folder: PathBuf,
    /// Seconds between two looks at the folder beside the system's own events, for file
    /// systems that send none; 0 trusts the events. Needs a restart.
    pub poll_s: u64,
    /// `[plugins.<id>]`: settings of single plugins.
    pub by_id: BTreeMap<String, PluginConfig>,
}

impl Default for PluginsConfig {
    fn default() -> Self {
        Self {
            folder: PathBuf::from("visor-plugins"),
            poll_s: 2,
            by_id: BTreeMap::new(),
        }
    }
}

impl PluginsConfig {
    /// `[plugins.<id>.config]` as the JSON text a plugin's `configure` gets; `{}` when absent.
    #[must_use]
    pub fn config_json(&self, id: &str) -> String {
        self.by_id
            .get(id)
            .and_then(|plugin| serde_json::to_string(&plugin.config).ok())
            .unwrap_or_else(|| "{}".to_owned())
    }

    /// `[plugins.<id>] stores`: shared store buckets it may open.
    #[must_use]
    pub fn stores(&self, id: &str) -> Vec<String> {
        self.by_id
            .get(id)
            .map(|plugin| plugin.stores.clone())
            .unwrap_or_default()
    }

    /// `[plugins.<id>.limits]`, empty when absent.
    #[must_use]
    pub fn limits(&self, id: &str) -> PluginLimits {
        self.by_id
            .get(id)
            .map(|plugin| plugin.limits.clone())
            .unwrap_or_default()
    }
}

/// `[plugins.<id>]`.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PluginConfig {
    /// Shared store buckets it may open besides its private one.
    pub stores: Vec<String>,
    /// Handed to the plugin's `configure` as JSON; what is allowed is the plugin's business.
    pub config: toml::Table,
    /// Limits of this plugin; they only ever lower those of its role.
    pub limits: PluginLimits,
}

/// `[plugins.<id>.limits]`: absent keys keep the limit of the role.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PluginLimits {
    /// Milliseconds any one call may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub call_ms: Option<u64>,
    /// Linear memory of one instance, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mib_max: Option<u64>,
    /// Data one call may hand to the host, in KiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostcall_kib_max: Option<u64>,
    /// Host objects one instance may hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handles_max: Option<u32>,
    /// Log lines a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_lines_per_s: Option<u32>,
}

impl Serialize for PluginsConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("folder", &self.folder)?;
        map.serialize_entry("poll_s", &self.poll_s)?;
        for (id, plugin) in &self.by_id {
            map.serialize_entry(id, plugin)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for PluginsConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(PluginsVisitor)
    }
}

struct PluginsVisitor;

impl<'de> Visitor<'de> for PluginsVisitor {
    type Value = PluginsConfig;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table with `folder`, `poll_s` and one table per plugin id")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<PluginsConfig, A::Error> {
        let mut plugins = PluginsConfig::default();
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "folder" => plugins.folder = map.next_value()?,
                "poll_s" => plugins.poll_s = map.next_value()?,
                _ => {
                    plugins.by_id.insert(key, map.next_value()?);
                }
            }
        }
        Ok(plugins)
    }
}
