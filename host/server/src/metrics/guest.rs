//! Counters and histograms that plugins keep, as `plugin_<name>{plugin="..", ..}`.
//!
//! The sandbox keeps and caps them; here they are only written out. A guest chooses names and
//! labels, so both are cleaned before they reach the text.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use visor_sandbox::{MetricsSnapshot, Series, SeriesValue};

type Labels = Vec<(String, String)>;

/// The series of all guests as of the last scrape. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct GuestMetrics(Arc<Mutex<MetricsSnapshot>>);

impl GuestMetrics {
    /// Replaces what is written out.
    pub(super) fn take(&self, snapshot: MetricsSnapshot) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = snapshot;
    }
}

impl Collector for GuestMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let snapshot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, series) in by_name(&snapshot) {
            let kind = kind_of(series[0].1);
            let help = "Kept by a plugin.";
            let mut family = encoder.encode_descriptor(&name, help, None, kind)?;
            for (labels, series) in &series {
                encode_value(&series.value, family.encode_family(labels)?)?;
            }
        }
        let help = "Series of plugins that were not kept: too many.";
        let name = "visor_plugin_metric_overflow";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (plugin, dropped) in &snapshot.overflow {
            let labels = [("plugin", plugin.as_str())];
            ConstCounter::new(*dropped).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// Series under one name and of one kind, each label set once. The first kind seen wins: a name has
/// one TYPE, whatever plugins agree on.
fn by_name(snapshot: &MetricsSnapshot) -> BTreeMap<String, Vec<(Labels, &Series)>> {
    let mut names: BTreeMap<String, Vec<(Labels, &Series)>> = BTreeMap::new();
    for series in &snapshot.series {
        let labels = clean_labels(series);
        let same = names.entry(clean_name(&series.name)).or_default();
        let fits = same.first().is_none_or(|(_, first)| {
            std::mem::discriminant(&first.value) == std::mem::discriminant(&series.value)
        });
        if fits && same.iter().all(|(taken, _)| *taken != labels) {
            same.push((labels, series));
        }
    }
    names
}

fn kind_of(series: &Series) -> MetricType {
    match series.value {
        SeriesValue::Count(_) => MetricType::Counter,
        SeriesValue::Histogram { .. } => MetricType::Histogram,
    }
}

fn encode_value(
    value: &SeriesValue,
    mut encoder: MetricEncoder<'_>,
) -> Result<(), std::fmt::Error> {
    match value {
        SeriesValue::Count(count) => ConstCounter::new(*count).encode(encoder),
        SeriesValue::Histogram {
            bounds,
            buckets,
            sum,
            count,
        } => {
            let above = std::iter::once(f64::INFINITY);
            let pairs: Vec<(f64, u64)> = bounds
                .iter()
                .copied()
                .chain(above)
                .zip(buckets.iter().copied())
                .collect();
            encoder.encode_histogram::<NoLabelSet>(*sum, *count, &pairs, None)
        }
    }
}

/// `plugin_` and the guest's name as a Prometheus name; `_total` is the registry's to add.
fn clean_name(name: &str) -> String {
    let name = clean(name);
    let name = name.strip_suffix("_total").unwrap_or(&name);
    format!("plugin_{name}")
}

fn clean_labels(series: &Series) -> Labels {
    let mut cleaned = vec![("plugin".to_owned(), series.plugin.clone())];
    for (name, value) in &series.labels {
        let mut name = clean(name);
        if name.starts_with(|c: char| c.is_ascii_digit()) {
            name.insert(0, '_');
        }
        let reserved = matches!(name.as_str(), "" | "le" | "model_name") || name.starts_with("__");
        if !reserved && cleaned.iter().all(|(taken, _)| *taken != name) {
            cleaned.push((name, value.clone()));
        }
    }
    cleaned
}

fn clean(name: &str) -> String {
    name.chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect()
}
