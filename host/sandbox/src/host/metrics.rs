//! Import `metrics`: counters and histograms of plugins, with a cap on their number.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::bindings::adapter::visor::plugin::metrics::Host;
use crate::chat::Extensions;
use crate::guest::GuestState;

// What Prometheus and its users can bear, so no keys: the number of series is one.
const NAME_BYTES_MAX: usize = 64;
const LABELS_MAX: usize = 8;
const LABEL_VALUE_BYTES_MAX: usize = 128;
/// Upper bounds of histogram buckets: a plugin measures anything, so powers of ten and their
/// halves from a millionth up.
const BOUNDS: [f64; 16] = [
    1e-6, 1e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0, 5.0, 10.0, 100.0, 1e3, 1e6,
];

/// One series of a plugin.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Plugin id.
    pub plugin: String,
    /// Name as the plugin gave it; matches `[a-z_][a-z0-9_]*`.
    pub name: String,
    /// Labels, sorted by key; keys match the same.
    pub labels: Vec<(String, String)>,
    /// Its value.
    pub value: SeriesValue,
}

/// Value of a series.
#[derive(Clone, Debug, PartialEq)]
pub enum SeriesValue {
    /// Sum of all deltas.
    Count(u64),
    /// Observations.
    Histogram {
        /// Upper bounds; the last bucket has none.
        bounds: Vec<f64>,
        /// Observations per bucket, not cumulative; one more than bounds.
        buckets: Vec<u64>,
        /// Sum of the values.
        sum: f64,
        /// Number of observations.
        count: u64,
    },
}

/// All series of all plugins.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MetricsSnapshot {
    /// Sorted by plugin, name and labels.
    pub series: Vec<Series>,
    /// Plugin id and updates that were dropped: over the cap, badly named, or of the wrong kind.
    pub overflow: Vec<(String, u64)>,
}

type Key = (String, Vec<(String, String)>);

/// The series of one plugin id.
#[derive(Default)]
pub(crate) struct SeriesTable {
    series: Mutex<BTreeMap<Key, SeriesValue>>,
    overflow: AtomicU64,
}

impl SeriesTable {
    fn update(
        &self,
        key: Option<Key>,
        series_max: usize,
        empty: impl FnOnce() -> SeriesValue,
        change: impl FnOnce(&mut SeriesValue) -> bool,
    ) {
        if !key.is_some_and(|key| self.try_update(key, series_max, empty, change)) {
            self.overflow.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn try_update(
        &self,
        key: Key,
        series_max: usize,
        empty: impl FnOnce() -> SeriesValue,
        change: impl FnOnce(&mut SeriesValue) -> bool,
    ) -> bool {
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let count = series.len();
        match series.entry(key) {
            Entry::Occupied(mut entry) => change(entry.get_mut()),
            Entry::Vacant(entry) if count < series_max => change(entry.insert(empty())),
            Entry::Vacant(_) => false,
        }
    }

    pub(crate) fn read_into(&self, plugin: &str, snapshot: &mut MetricsSnapshot) {
        let series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        snapshot
            .series
            .extend(series.iter().map(|((name, labels), value)| Series {
                plugin: plugin.to_owned(),
                name: name.clone(),
                labels: labels.clone(),
                value: value.clone(),
            }));
        let overflow = self.overflow.load(Ordering::Relaxed);
        if overflow > 0 {
            snapshot.overflow.push((plugin.to_owned(), overflow));
        }
    }
}

impl Host for GuestState {
    fn count(&mut self, name: String, delta: u64, labels: Extensions) -> wasmtime::Result<()> {
        self.on_time()?;
        self.core.kept.series.update(
            key(name, labels),
            self.core.shared.options.metric_series_max,
            || SeriesValue::Count(0),
            |value| match value {
                SeriesValue::Count(sum) => {
                    *sum = sum.saturating_add(delta);
                    true
                }
                SeriesValue::Histogram { .. } => false,
            },
        );
        Ok(())
    }

    fn observe(&mut self, name: String, value: f64, labels: Extensions) -> wasmtime::Result<()> {
        self.on_time()?;
        let observed = value;
        let key = if observed.is_finite() {
            key(name, labels)
        } else {
            None
        };
        self.core.kept.series.update(
            key,
            self.core.shared.options.metric_series_max,
            || SeriesValue::Histogram {
                bounds: BOUNDS.to_vec(),
                buckets: vec![0; BOUNDS.len() + 1],
                sum: 0.0,
                count: 0,
            },
            |value| match value {
                SeriesValue::Histogram {
                    bounds,
                    buckets,
                    sum,
                    count,
                } => {
                    let index = bounds.partition_point(|&bound| bound < observed);
                    buckets[index] += 1;
                    *sum += observed;
                    *count += 1;
                    true
                }
                SeriesValue::Count(_) => false,
            },
        );
        Ok(())
    }
}

/// A key that is fit for Prometheus, or none.
fn key(name: String, mut labels: Extensions) -> Option<Key> {
    let fit = is_name(&name)
        && labels.len() <= LABELS_MAX
        && labels.iter().all(|(key, value)| {
            is_name(key) && key != "plugin" && value.len() <= LABEL_VALUE_BYTES_MAX
        });
    if !fit {
        return None;
    }
    labels.sort();
    let distinct = labels.windows(2).all(|pair| pair[0].0 != pair[1].0);
    distinct.then_some((name, labels))
}

fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes
        .next()
        .is_some_and(|b| b.is_ascii_lowercase() || b == b'_')
        && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        && name.len() <= NAME_BYTES_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(table: &SeriesTable, name: &str, series_max: usize) {
        table.update(
            key(name.to_owned(), Vec::new()),
            series_max,
            || SeriesValue::Count(0),
            |value| match value {
                SeriesValue::Count(sum) => {
                    *sum += 1;
                    true
                }
                SeriesValue::Histogram { .. } => false,
            },
        );
    }

    #[test]
    fn series_beyond_the_cap_are_counted_as_overflow() {
        let table = SeriesTable::default();
        for name in ["a", "b", "c", "a"] {
            count(&table, name, 2);
        }
        count(&table, "Not a name", 2);
        let mut snapshot = MetricsSnapshot::default();
        table.read_into("p", &mut snapshot);
        let counted: Vec<_> = snapshot
            .series
            .iter()
            .map(|s| (s.name.as_str(), &s.value))
            .collect();
        assert_eq!(
            counted,
            [("a", &SeriesValue::Count(2)), ("b", &SeriesValue::Count(1))]
        );
        assert_eq!(snapshot.overflow, [("p".to_owned(), 2)]);
    }

    #[test]
    fn label_keys_must_be_distinct_names_and_not_ours() {
        let labels = |keys: &[&str]| {
            keys.iter()
                .map(|k| ((*k).to_owned(), String::new()))
                .collect()
        };
        assert!(key("n".to_owned(), labels(&["b", "a"])).is_some());
        assert!(key("n".to_owned(), labels(&["a", "a"])).is_none());
        assert!(key("n".to_owned(), labels(&["plugin"])).is_none());
        assert!(key("n".to_owned(), labels(&["a-b"])).is_none());
    }
}
