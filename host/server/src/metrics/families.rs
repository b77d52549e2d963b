//! The metrics that requests count as they happen: name, help, labels, buckets.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

use super::guest::GuestMetrics;
use super::sampled::{Sample, Sampled};
use super::steps::StepSizes;
use super::{OUTCOMES, seconds};
use crate::pipeline::Stage;

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// Labels of `visor_requests`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct RequestLabels {
    pub(super) prefix: String,
    pub(super) outcome: String,
    pub(super) status: u16,
}

/// The one label of `vllm:request_success`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct FinishLabels {
    pub(super) finished_reason: String,
}

/// The one label of `visor_stage_seconds`.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct StageLabels {
    pub(super) stage: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct BuildLabels {
    version: String,
}

/// Handles to every registered metric.
pub(super) struct Families {
    pub(super) in_flight: Gauge,
    pub(super) requests: Family<RequestLabels, Counter>,
    pub(super) success: Family<FinishLabels, Counter>,
    pub(super) prompt_tokens: Counter,
    pub(super) image_tokens: Counter,
    pub(super) cached_tokens: Counter,
    pub(super) generation_tokens: Counter,
    pub(super) images: Counter,
    pub(super) rejections: Counter,
    pub(super) aborts: Counter,
    pub(super) first_token: Histogram,
    pub(super) inter_token: Histogram,
    pub(super) e2e: Histogram,
    pub(super) queue_time: Histogram,
    pub(super) prefill_time: Histogram,
    pub(super) decode_time: Histogram,
    pub(super) stages: Histograms<StageLabels>,
    pub(super) tally: Tally,
    guest: GuestMetrics,
    steps: StepSizes,
    sampled: Sampled,
}

/// What `/stats` sums, kept beside the series: families and histograms cannot be read back.
#[derive(Default)]
pub(super) struct Tally {
    /// Finished exchanges by [`OUTCOMES`].
    pub(super) outcomes: [AtomicU64; OUTCOMES.len()],
    /// Exchanges that spent time in a [`Stage`], and microseconds they spent.
    pub(super) stages: [StageTally; Stage::ALL.len()],
}

/// What is kept of one [`Stage`].
#[derive(Default)]
pub(super) struct StageTally {
    pub(super) count: AtomicU64,
    pub(super) sum_us: AtomicU64,
    /// Each counted in the first bucket it fits into.
    in_bucket: [AtomicU64; STAGE_BUCKETS.len()],
}

impl StageTally {
    /// One exchange spent so long in the stage.
    pub(super) fn add(&self, micros: u64) {
        self.count.fetch_add(1, Relaxed);
        self.sum_us.fetch_add(micros, Relaxed);
        let bucket = STAGE_BUCKETS.partition_point(|bound| *bound < seconds(micros));
        if let Some(count) = self.in_bucket.get(bucket) {
            count.fetch_add(1, Relaxed);
        }
    }

    /// By upper bound, cumulative.
    pub(super) fn buckets(&self) -> Vec<(f64, u64)> {
        let counts = self.in_bucket.iter().scan(0, |total, count| {
            *total += count.load(Relaxed);
            Some(*total)
        });
        STAGE_BUCKETS.into_iter().zip(counts).collect()
    }
}

/// vLLM's buckets for the time of whole requests and their stages, in seconds, and two below.
const REQUEST_BUCKETS: [f64; 18] = [
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0,
    240.0,
];
/// From one template call to a long prefill on a CPU, in seconds.
const STAGE_BUCKETS: [f64; 18] = [
    0.000_05, 0.0002, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0, 60.0, 120.0,
];
/// vLLM's buckets for one token, in seconds.
const TOKEN_BUCKETS: [f64; 14] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
];

impl StageLabels {
    pub(super) fn new(stage: &str) -> Self {
        Self {
            stage: stage.to_owned(),
        }
    }
}

/// Registers a metric and hands back its handle. A counter's name has no `_total`: the text has.
pub(super) fn add<M: Metric + Clone + Default>(to: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    to.register(name, help, metric.clone());
    metric
}

fn histogram(to: &mut Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    let histogram = Histogram::new(buckets.iter().copied());
    to.register(name, help, histogram.clone());
    histogram
}

fn stage_histogram() -> Histogram {
    Histogram::new(STAGE_BUCKETS)
}

impl Families {
    /// Everything registered, each series labelled with the model's name.
    pub(super) fn register(model_name: &str) -> (Registry, Self) {
        let label = ("model_name".into(), model_name.to_owned().into());
        let mut registry = Registry::with_labels(std::iter::once(label));
        let families = Self::register_in(&mut registry);
        registry.register_collector(Box::new(families.guest.clone()));
        registry.register_collector(Box::new(families.steps.clone()));
        let build: Family<BuildLabels, Gauge> =
            add(&mut registry, "visor_build_info", "Version of this server");
        let version = env!("CARGO_PKG_VERSION").to_owned();
        build.get_or_create(&BuildLabels { version }).set(1);
        (registry, families)
    }

    fn register_in(to: &mut Registry) -> Self {
        let request = &REQUEST_BUCKETS;
        let time = |to: &mut Registry, name: &str, help: &str| {
            histogram(to, &format!("vllm:{name}_seconds"), help, request)
        };
        let stages = Family::new_with_constructor(stage_histogram as fn() -> Histogram);
        let help = "Time of one exchange in one stage";
        to.register("visor_stage_seconds", help, stages.clone());
        let inter_token = histogram(
            to,
            "vllm:inter_token_latency_seconds",
            "Between two tokens of one answer",
            &TOKEN_BUCKETS,
        );
        let refused = "Requests refused because full, draining or not ready";
        Self {
            in_flight: add(to, "visor_requests_in_flight", "Exchanges in flight"),
            requests: add(to, "visor_requests", "Finished exchanges"),
            success: add(to, "vllm:request_success", "Finished answers by reason"),
            prompt_tokens: add(to, "vllm:prompt_tokens", "Prompt tokens with pictures"),
            image_tokens: add(to, "visor_image_tokens", "Prompt tokens from pictures"),
            cached_tokens: add(to, "vllm:prompt_tokens_cached", "Not computed again"),
            generation_tokens: add(to, "vllm:generation_tokens", "Generated tokens"),
            images: add(to, "visor_images", "Pictures received"),
            rejections: add(to, "vllm:admission_rejections", refused),
            aborts: add(to, "visor_requests_aborted", "Exchanges whose client left"),
            first_token: time(to, "time_to_first_token", "From request to first text"),
            inter_token,
            e2e: time(to, "e2e_request_latency", "From request to last byte"),
            queue_time: time(to, "request_queue_time", "Waiting for the model"),
            prefill_time: time(to, "request_prefill_time", "Computing the prompt"),
            decode_time: time(to, "request_decode_time", "Computing the answer"),
            stages,
            tally: Tally::default(),
            guest: GuestMetrics::default(),
            steps: StepSizes::default(),
            sampled: Sampled::register(to),
        }
    }

    /// Copies what other rooms count into our series.
    pub(super) fn take(&self, sample: Sample) {
        self.sampled.take(&sample);
        self.steps.take(&sample.engine);
        self.guest.take(sample.guest);
    }
}
