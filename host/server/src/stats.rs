//! The JSON view of the server: what `/stats` answers. Numbers are the metrics' own; this adds what
//! has no number, such as revisions and reasons.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use visor_engine::STEP_SIZES;
use visor_sandbox::{FolderStatus, Origin, Plugin, PluginStats};

use crate::config::change::Change;
use crate::metrics::{CacheSample, Totals};
use crate::wiring::Wiring;

/// Memory of this process as the system tells it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Resident now, in bytes.
    pub resident_bytes: Option<u64>,
    /// Most that was ever resident, in bytes.
    pub peak_bytes: Option<u64>,
}

impl Memory {
    /// Asks the system.
    #[must_use]
    pub fn now() -> Self {
        if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
            return Self::parse(&status);
        }
        // No /proc (macOS): ps knows the size of now, nobody the peak.
        let pid = std::process::id().to_string();
        let listed = std::process::Command::new("ps")
            .args(["-o", "rss=", "-p", &pid])
            .output();
        let kib = listed.ok().and_then(|out| {
            String::from_utf8(out.stdout)
                .ok()?
                .trim()
                .parse::<u64>()
                .ok()
        });
        Self {
            resident_bytes: kib.map(|kib| kib << 10),
            peak_bytes: None,
        }
    }

    /// Lets the peak start again from what is resident now, where the system can.
    pub fn forget_peak() {
        // Linux since 4.0; elsewhere, or where it is not allowed, the peak is that of the process.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
    }

    fn parse(status: &str) -> Self {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
            Some(kib << 10)
        };
        Self {
            resident_bytes: field("VmRSS:"),
            peak_bytes: field("VmHWM:"),
        }
    }
}

/// How the last attempt to apply a changed configuration went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReloadState {
    /// Attempts that were applied.
    pub applied: u64,
    /// Attempts that were refused.
    pub refused: u64,
    /// Why the file as it is now is not in force; none when it is.
    pub last_error: Option<String>,
    /// Keys whose new values wait for a restart.
    pub waiting_for_restart: Vec<String>,
    /// Unix milliseconds of the last attempt; 0 before the first.
    pub at_ms: u64,
}

impl ReloadState {
    /// Notes one attempt and logs it: what changed, what waits, or why it was refused. A file
    /// that says what is in force already only clears the last error.
    pub fn note(&mut self, outcome: Result<Change, String>) {
        self.at_ms = now_ms();
        match outcome {
            Ok(change) => {
                let mended = self.last_error.take().is_some();
                if !change.restart.is_empty() && change.restart != self.waiting_for_restart {
                    let keys = change.restart.join(", ");
                    tracing::warn!(target: "visor::config", %keys, "these configuration keys take effect at the next start");
                }
                if !change.live.is_empty() {
                    self.applied += 1;
                    let keys = change.live.join(", ");
                    tracing::info!(target: "visor::config", %keys, "configuration changed");
                } else if mended {
                    tracing::info!(target: "visor::config", "the configuration file is good again");
                }
                self.waiting_for_restart = change.restart;
            }
            Err(reason) => {
                self.refused += 1;
                tracing::error!(target: "visor::config", %reason, "the changed configuration is refused; the old one stays");
                self.last_error = Some(reason);
            }
        }
    }

    /// As JSON.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "applied": self.applied,
            "refused": self.refused,
            "last_error": self.last_error,
            "waiting_for_restart": self.waiting_for_restart,
            "at_ms": self.at_ms,
        })
    }
}

/// Milliseconds since 1970.
#[must_use]
pub fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Requests, tokens and stage times.
#[must_use]
pub fn requests_json(totals: &Totals) -> Value {
    let outcomes: serde_json::Map<String, Value> = totals
        .outcomes
        .iter()
        .map(|(name, count)| ((*name).to_owned(), json!(count)))
        .collect();
    let stages: serde_json::Map<String, Value> = totals
        .stages
        .iter()
        .map(|stage| {
            let mean_ms = stage.seconds * 1e3 * ratio(1, stage.count);
            let buckets: Vec<Value> = stage
                .buckets
                .iter()
                .map(|(le_s, count)| json!({ "le_s": le_s, "count": count }))
                .collect();
            let value = json!({
                "count": stage.count, "seconds": stage.seconds, "mean_ms": mean_ms,
                "buckets": buckets,
            });
            (stage.stage.to_owned(), value)
        })
        .collect();
    json!({
        "requests": { "finished": totals.requests, "in_flight": totals.in_flight, "outcomes": outcomes },
        "tokens": {
            "prompt": totals.prompt_tokens,
            "image": totals.image_tokens,
            "cached": totals.cached_tokens,
            "completion": totals.completion_tokens,
        },
        "images": totals.images,
        "stages": stages,
    })
}

/// Steps of the model by how many sequences ran in each, each size up to the next counted together.
#[must_use]
pub fn step_sizes_json(counts: &[u64; STEP_SIZES.len()]) -> Value {
    let sizes = STEP_SIZES.iter().zip(counts);
    sizes
        .map(|(sequences_max, steps)| json!({ "sequences_max": sequences_max, "steps": steps }))
        .collect()
}

/// One cache tier.
#[must_use]
pub fn cache_json(cache: &CacheSample) -> Value {
    let lookups = cache.hits + cache.misses;
    json!({
        "hits": cache.hits,
        "misses": cache.misses,
        "hit_rate": ratio(cache.hits, lookups),
        "saved_s": micros_s(cache.saved_us),
        "saved_us": cache.saved_us,
        "strategy_faults": cache.strategy_faults,
        "inserted": cache.inserted,
        "evicted": cache.evicted,
        "entries": cache.entries,
        "bytes": cache.bytes,
        "capacity_bytes": cache.capacity_bytes,
    })
}

/// One plugin in service, with the calls of its id.
#[must_use]
pub fn plugin_json(plugin: &Plugin, stats: Option<&PluginStats>) -> Value {
    let (origin, path) = match plugin.origin() {
        Origin::Shipped => ("shipped", None),
        Origin::File(path) => ("file", Some(path.display().to_string())),
    };
    let functions: serde_json::Map<String, Value> = stats
        .into_iter()
        .flat_map(|stats| &stats.functions)
        .map(|function| {
            let faults = function.calls - function.ok - function.refused;
            let value = json!({
                "calls": function.calls, "ok": function.ok, "refused": function.refused,
                "faults": faults, "late": function.late,
                "mean_us": function.time_us.checked_div(function.calls).unwrap_or(0),
            });
            (function.function.as_str().to_owned(), value)
        })
        .collect();
    json!({
        "id": plugin.id(),
        "name": plugin.info().name,
        "version": plugin.info().version,
        "roles": plugin.roles().iter().map(|served| served.role.interface()).collect::<Vec<_>>(),
        "revision": plugin.revision(),
        "origin": origin,
        "path": path,
        "bytes": plugin.bytes(),
        "functions": functions,
        "log": stats.map(|stats| json!({
            "lines": stats.log.lines, "dropped": stats.log.dropped, "cut": stats.log.cut,
        })),
    })
}

/// Which plugins serve which prefix.
#[must_use]
pub fn routes_json(wiring: &Wiring) -> Value {
    let name = |plugin: &Plugin| format!("{}@{}", plugin.id(), plugin.revision_short());
    let route = |route: &crate::wiring::WiredRoute| {
        json!({
            "prefix": route.prefix,
            "adapter": name(&route.adapter),
            "template": name(&route.template),
            "image_policy": name(&route.image_policy),
            "cache_strategy": route.strategy.as_ref().map(|strategy| name(strategy.plugin())),
        })
    };
    wiring.routes.iter().map(route).collect()
}

/// What the plugin folder holds that is not in use, and why.
#[must_use]
pub fn folder_json(status: &FolderStatus) -> Value {
    let errors: Vec<Value> = status
        .last_errors
        .iter()
        .map(|error| {
            json!({
                "id": error.id, "path": error.path.display().to_string(),
                "message": error.message, "at_ms": error.at_ms,
            })
        })
        .collect();
    json!({
        "reloads": status.reloads,
        "failures": status.failures,
        "refused": status.refused,
        "load_errors": errors,
    })
}

/// `part` of `whole`; nothing of nothing is 0.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
pub fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

#[expect(clippy::cast_precision_loss, reason = "2^53 us is 285 years")]
fn micros_s(micros: u64) -> f64 {
    micros as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_the_kernels_words() {
        let status = "Name:\tvisor\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n";
        let memory = Memory::parse(status);
        assert_eq!(memory.peak_bytes, Some(2 << 20));
        assert_eq!(memory.resident_bytes, Some(1 << 20));
        assert_eq!(Memory::parse("nothing"), Memory::default());
    }

    #[test]
    fn a_refused_file_is_told_until_it_is_mended() {
        let mut state = ReloadState::default();
        state.note(Err("line 3, images.count: unknown key".to_owned()));
        assert_eq!((state.applied, state.refused), (0, 1));
        assert!(
            state.to_json()["last_error"]
                .as_str()
                .is_some_and(|reason| reason.contains("line 3"))
        );
        state.note(Ok(Change {
            live: vec![],
            restart: vec!["server.listen".to_owned()],
        }));
        assert_eq!(state.last_error, None);
        assert_eq!(state.waiting_for_restart, ["server.listen"]);
        state.note(Ok(Change {
            live: vec!["images.count_max".to_owned()],
            restart: vec![],
        }));
        assert_eq!((state.applied, state.refused), (1, 1));
        assert!(state.waiting_for_restart.is_empty());
    }

    #[test]
    fn a_cache_without_lookups_has_no_hit_rate() {
        assert_eq!(cache_json(&CacheSample::default())["hit_rate"], 0.0);
        let cache = CacheSample {
            hits: 1,
            misses: 3,
            ..CacheSample::default()
        };
        assert_eq!(cache_json(&cache)["hit_rate"], 0.25);
    }
}
