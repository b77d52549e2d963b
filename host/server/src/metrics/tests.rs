//! The text format, read back line by line.

use std::collections::HashMap;
use std::time::Duration;

use visor_sandbox::{
    Function, FunctionStats, LogStats, MetricsSnapshot, PluginStats, Role, Series, SeriesValue,
};

use super::*;
use crate::pipeline::{StageTimes, TokenTotals};

fn record() -> RequestRecord {
    let mut stages = StageTimes::default();
    stages.add(Stage::Prefill, Duration::from_millis(20));
    RequestRecord {
        prefix: "/v1".to_owned(),
        status: 200,
        outcome: Outcome::Ok,
        incremental: true,
        tokens: TokenTotals {
            prompt: 300,
            image: 200,
            cached: 0,
            completion: 7,
        },
        finishes: vec!["stop"],
        response_cached: false,
        images: 1,
        stages,
        first_text_us: Some(30_000),
        total_us: 90_000,
    }
}

fn sample() -> Sample {
    Sample {
        engine: EngineSample {
            ready: true,
            running: 1,
            waiting: 2,
            ..EngineSample::default()
        },
        caches: vec![CacheSample {
            tier: "features",
            hits: 3,
            misses: 4,
            ..CacheSample::default()
        }],
        plugins: vec![PluginSample {
            id: "hd".to_owned(),
            role: "image-policy".to_owned(),
            revision: "abc".to_owned(),
            origin: "shipped",
        }],
        calls: vec![PluginStats {
            id: "hd".to_owned(),
            functions: vec![prepare()],
            log: LogStats {
                dropped: 3,
                ..LogStats::default()
            },
        }],
        instances: 2,
        reloads: vec![
            ReloadSample {
                what: "config",
                applied: 4,
                refused: 1,
            },
            ReloadSample {
                what: "plugins",
                applied: 0,
                refused: 0,
            },
        ],
        resident_bytes: 1 << 30,
        uptime_s: 1.5,
        guest: MetricsSnapshot::default(),
    }
}

fn prepare() -> FunctionStats {
    FunctionStats {
        role: Role::ImagePolicy,
        function: Function::Prepare,
        calls: 6,
        ok: 5,
        refused: 0,
        trap: 1,
        deadline: 0,
        memory: 0,
        limit: 0,
        contract: 0,
        time_us: 1_500_000,
        late: 0,
    }
}

/// Samples by series; panics on a line the Prometheus text format does not allow.
fn read(text: &str) -> HashMap<String, f64> {
    let mut typed: HashMap<String, String> = HashMap::new();
    let mut samples = HashMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(
                typed.insert(name.to_owned(), kind.to_owned()).is_none(),
                "{name} typed twice"
            );
        } else if !line.starts_with("# HELP ") {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| {
                name.strip_suffix(suffix)
                    .filter(|base| typed.contains_key(*base))
            });
            let kind = typed
                .get(base.unwrap_or(name))
                .unwrap_or_else(|| panic!("{name} has no TYPE"));
            assert_eq!(
                kind == "counter",
                name.ends_with("_total"),
                "{name} is a {kind}"
            );
            assert!(!name.contains("_total_total"), "{name}");
            let repeated = samples.insert(series.to_owned(), value.parse().unwrap());
            assert!(repeated.is_none(), "{series} twice");
        }
    }
    samples
}

#[test]
fn a_request_is_counted_under_vllms_names() {
    let metrics = Metrics::new("demo");
    metrics.record(&record());
    metrics.inter_token(Duration::from_millis(12));
    let samples = read(&metrics.encode(sample(), false));
    let model = |name: &str| samples[&format!("{name}{{model_name=\"demo\"}}")];
    assert_eq!(model("vllm:prompt_tokens_total"), 300.0);
    assert_eq!(model("vllm:generation_tokens_total"), 7.0);
    assert_eq!(model("vllm:num_requests_running"), 1.0);
    assert_eq!(model("vllm:num_requests_waiting"), 2.0);
    assert_eq!(model("vllm:mm_cache_queries_total"), 7.0);
    assert_eq!(model("vllm:mm_cache_hits_total"), 3.0);
    assert_eq!(model("vllm:time_to_first_token_seconds_count"), 1.0);
    assert_eq!(model("vllm:inter_token_latency_seconds_count"), 1.0);
    assert_eq!(model("vllm:request_prefill_time_seconds_sum"), 0.02);
    let success = "vllm:request_success_total{model_name=\"demo\",finished_reason=\"stop\"}";
    assert_eq!(samples[success], 1.0);
}

#[test]
fn calls_into_plugins_are_counted_by_outcome() {
    let samples = read(&Metrics::new("demo").encode(sample(), false));
    let calls = |outcome: &str| {
        let labels = "model_name=\"demo\",plugin=\"hd\",role=\"image-policy\",function=\"prepare\"";
        samples
            .get(&format!(
                "visor_plugin_calls_total{{{labels},outcome=\"{outcome}\"}}"
            ))
            .copied()
    };
    assert_eq!(
        (calls("ok"), calls("trap"), calls("deadline")),
        (Some(5.0), Some(1.0), None)
    );
    let seconds =
        "visor_plugin_seconds_total{model_name=\"demo\",plugin=\"hd\",function=\"prepare\"}";
    assert_eq!(samples[seconds], 1.5);
    let refused = "visor_reloads_total{model_name=\"demo\",what=\"config\",outcome=\"refused\"}";
    assert_eq!(samples[refused], 1.0);
    assert_eq!(
        samples["visor_plugin_log_dropped_total{model_name=\"demo\",plugin=\"hd\"}"],
        3.0
    );
}

#[test]
fn a_second_scrape_shows_totals_not_sums() {
    let metrics = Metrics::new("demo");
    let _ = metrics.encode(sample(), false);
    let samples = read(&metrics.encode(sample(), false));
    assert_eq!(
        samples["vllm:mm_cache_hits_total{model_name=\"demo\"}"],
        3.0
    );
}

#[test]
fn a_replaced_plugin_leaves_no_stale_revision() {
    let metrics = Metrics::new("demo");
    let _ = metrics.encode(sample(), false);
    let mut next = sample();
    next.plugins[0].revision = "def".to_owned();
    let text = metrics.encode(next, false);
    assert!(text.contains("revision=\"def\"") && !text.contains("revision=\"abc\""));
}

#[test]
fn openmetrics_ends_with_its_mark_and_prometheus_has_none() {
    let metrics = Metrics::new("demo");
    assert!(metrics.encode(sample(), true).ends_with("# EOF\n"));
    assert!(!metrics.encode(sample(), false).contains("# EOF"));
}

#[test]
fn a_guest_cannot_break_the_format() {
    let series = |name: &str, labels: &[(&str, &str)], value: SeriesValue| Series {
        plugin: "evil".to_owned(),
        name: name.to_owned(),
        labels: labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
        value,
    };
    let times = SeriesValue::Histogram {
        bounds: vec![0.1, 1.0],
        buckets: vec![1, 2, 3],
        sum: 9.5,
        count: 6,
    };
    let mut sample = sample();
    sample.guest = MetricsSnapshot {
        series: vec![
            series(
                "a b\"{}_total",
                &[("le", "x"), ("1 x", "\"\n\\")],
                SeriesValue::Count(2),
            ),
            series(
                "time",
                &[("plugin", "other"), ("model_name", "other")],
                times.clone(),
            ),
            series("time", &[], times),
            series("time", &[("k", "v")], SeriesValue::Count(1)),
        ],
        overflow: vec![("evil".to_owned(), 7)],
    };
    let text = Metrics::new("demo").encode(sample, false);
    let samples = read(&text);
    assert_eq!(
        samples["plugin_a_b____total{model_name=\"demo\",plugin=\"evil\",_1_x=\"\\\"\\n\\\\\"}"],
        2.0
    );
    assert_eq!(
        samples["plugin_time_count{model_name=\"demo\",plugin=\"evil\"}"],
        6.0
    );
    let below = "plugin_time_bucket{model_name=\"demo\",le=\"1.0\",plugin=\"evil\"}";
    assert_eq!(samples[below], 3.0, "buckets are cumulative");
    assert!(text.contains("le=\"+Inf\""));
    assert_eq!(
        samples["visor_plugin_metric_overflow_total{model_name=\"demo\",plugin=\"evil\"}"],
        7.0
    );
    assert!(!text.contains("other"));
}

#[test]
fn requests_in_flight_are_counted_while_they_live() {
    let metrics = Metrics::new("demo");
    let first = metrics.in_flight();
    let second = metrics.in_flight();
    assert_eq!(metrics.in_flight_count(), 2);
    drop(first);
    drop(second);
    assert_eq!(metrics.in_flight_count(), 0);
}

#[test]
fn steps_and_stages_are_told_by_size() {
    let metrics = Metrics::new("demo");
    metrics.record(&record());
    let mut sample = sample();
    sample.engine.steps = 7;
    sample.engine.step_sequences = 12;
    sample.engine.step_sizes[..3].copy_from_slice(&[4, 2, 1]);
    (sample.engine.kv_blocks, sample.engine.rejected) = (9, 2);
    let samples = read(&metrics.encode(sample, false));
    let value = |name: &str| samples[name];
    assert_eq!(value("visor_batch_size_count{model_name=\"demo\"}"), 7.0);
    assert_eq!(value("visor_batch_size_sum{model_name=\"demo\"}"), 12.0);
    for (bound, count) in [("1.0", 4.0), ("2.0", 6.0), ("4.0", 7.0), ("+Inf", 7.0)] {
        let name = format!("visor_batch_size_bucket{{model_name=\"demo\",le=\"{bound}\"}}");
        assert_eq!(samples[&name], count, "{bound}");
    }
    assert_eq!(value("visor_kv_blocks{model_name=\"demo\"}"), 9.0);
    assert_eq!(
        value("visor_sequences_rejected_total{model_name=\"demo\"}"),
        2.0
    );
    let totals = metrics.totals();
    let prefill = totals.stages.iter().find(|stage| stage.stage == "prefill");
    let buckets = &prefill.unwrap().buckets;
    assert!(buckets.contains(&(0.01, 0)) && buckets.contains(&(0.025, 1)));
    assert_eq!(buckets.last(), Some(&(120.0, 1)));
}
