//! What the server counts, in Prometheus' terms.
//!
//! vLLM's names where one exists (label `model_name`), because dashboards, autoscalers and routers
//! already know them; `visor_*` for the rest. Events of a request are recorded as they happen; what
//! other rooms count themselves (engine, caches, plugins) is copied in at each scrape from a
//! [`Sample`]. This room must not know HTTP, wasm or tensors.

mod families;
mod guest;
mod sampled;
mod steps;
mod text;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use families::{Families, FinishLabels, StageLabels};
pub use sampled::{CacheSample, EngineSample, PluginSample, ReloadSample, Sample};
pub use text::{OPENMETRICS, PROMETHEUS};

use crate::pipeline::{Outcome, RequestRecord, Stage};

/// Every way an exchange can end, as `/stats` lists them.
const OUTCOMES: [Outcome; 6] = [
    Outcome::Ok,
    Outcome::ClientError,
    Outcome::GuestFault,
    Outcome::ServerError,
    Outcome::Rejected,
    Outcome::Aborted,
];

/// Every counter, gauge and histogram of one server.
pub struct Metrics {
    registry: prometheus_client::registry::Registry,
    families: Families,
}

/// Counts a request as in flight while it lives.
pub struct InFlight(Arc<Metrics>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.families.in_flight.dec();
    }
}

impl Metrics {
    /// Metrics whose `model_name` label is the served model's id.
    #[must_use]
    pub fn new(model_name: &str) -> Arc<Self> {
        let (registry, families) = Families::register(model_name);
        Arc::new(Self { registry, families })
    }

    /// One more request in flight until the answer is dropped.
    #[must_use]
    pub fn in_flight(self: &Arc<Self>) -> InFlight {
        self.families.in_flight.inc();
        InFlight(self.clone())
    }

    /// Requests in flight now.
    #[must_use]
    pub fn in_flight_count(&self) -> u64 {
        u64::try_from(self.families.in_flight.get()).unwrap_or(0)
    }

    /// Time between two tokens (or pieces of several) of one answer.
    pub fn inter_token(&self, time: Duration) {
        self.families.inter_token.observe(time.as_secs_f64());
    }

    /// Everything one finished exchange did.
    pub fn record(&self, record: &RequestRecord) {
        let families = &self.families;
        let labels = families::RequestLabels {
            prefix: record.prefix.clone(),
            outcome: record.outcome.as_str().to_owned(),
            status: record.status,
        };
        families.requests.get_or_create(&labels).inc();
        if let Some(index) = OUTCOMES
            .iter()
            .position(|outcome| *outcome == record.outcome)
        {
            families.tally.outcomes[index].fetch_add(1, Relaxed);
        }
        families.e2e.observe(seconds(record.total_us));
        families.prompt_tokens.inc_by(record.tokens.prompt);
        families.image_tokens.inc_by(record.tokens.image);
        families.cached_tokens.inc_by(record.tokens.cached);
        families.generation_tokens.inc_by(record.tokens.completion);
        families.images.inc_by(record.images.into());
        for finish in &record.finishes {
            let labels = FinishLabels {
                finished_reason: (*finish).to_owned(),
            };
            families.success.get_or_create(&labels).inc();
        }
        match record.outcome {
            Outcome::Rejected => _ = families.rejections.inc(),
            Outcome::Aborted => _ = families.aborts.inc(),
            Outcome::Ok | Outcome::ClientError | Outcome::GuestFault | Outcome::ServerError => {}
        }
        if let Some(first) = record.first_text_us {
            families.first_token.observe(seconds(first));
        }
        for stage in Stage::ALL {
            let micros = record.stages.get_us(stage);
            if micros > 0 {
                let name = StageLabels::new(stage.as_str());
                families
                    .stages
                    .get_or_create(&name)
                    .observe(seconds(micros));
                families.tally.stages[stage as usize].add(micros);
            }
        }
        if !record.finishes.is_empty() && record.tokens.completion > 0 && !record.response_cached {
            families
                .queue_time
                .observe(seconds(record.stages.get_us(Stage::Queue)));
            families
                .prefill_time
                .observe(seconds(record.stages.get_us(Stage::Prefill)));
            families
                .decode_time
                .observe(seconds(record.stages.get_us(Stage::Decode)));
        }
    }

    /// Everything as text: OpenMetrics when the scraper asked for it, else the Prometheus format.
    #[must_use]
    pub fn encode(&self, sample: Sample, openmetrics: bool) -> String {
        self.families.take(sample);
        let mut text = String::with_capacity(16 << 10);
        prometheus_client::encoding::text::encode(&mut text, &self.registry)
            .expect("writing to a string cannot fail");
        if openmetrics {
            text
        } else {
            text::to_prometheus(&text)
        }
    }

    /// Totals for `/stats`.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let families = &self.families;
        let mut totals = Totals {
            prompt_tokens: families.prompt_tokens.get(),
            image_tokens: families.image_tokens.get(),
            cached_tokens: families.cached_tokens.get(),
            completion_tokens: families.generation_tokens.get(),
            images: families.images.get(),
            in_flight: self.in_flight_count(),
            ..Totals::default()
        };
        for (outcome, count) in OUTCOMES.iter().zip(&families.tally.outcomes) {
            let count = count.load(Relaxed);
            totals.requests += count;
            totals.outcomes.push((outcome.as_str(), count));
        }
        for (stage, tally) in Stage::ALL.iter().zip(&families.tally.stages) {
            totals.stages.push(StageTotal {
                stage: stage.as_str(),
                count: tally.count.load(Relaxed),
                seconds: seconds(tally.sum_us.load(Relaxed)),
                buckets: tally.buckets(),
            });
        }
        totals
    }
}

/// Sums since the start, for the JSON view.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Totals {
    /// Finished exchanges.
    pub requests: u64,
    /// Finished exchanges by outcome.
    pub outcomes: Vec<(&'static str, u64)>,
    /// Exchanges in flight now.
    pub in_flight: u64,
    /// Prompt positions, pictures included.
    pub prompt_tokens: u64,
    /// Prompt positions that came from pictures.
    pub image_tokens: u64,
    /// Prompt positions that were not computed again.
    pub cached_tokens: u64,
    /// Generated tokens.
    pub completion_tokens: u64,
    /// Pictures.
    pub images: u64,
    /// Time by stage.
    pub stages: Vec<StageTotal>,
}

/// Time spent in one stage since the start.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StageTotal {
    /// Name of the stage.
    pub stage: &'static str,
    /// Exchanges that spent time there.
    pub count: u64,
    /// Seconds they spent, together.
    pub seconds: f64,
    /// How many of them spent at most so many seconds there, for each bound; the rest spent more.
    pub buckets: Vec<(f64, u64)>,
}

#[expect(clippy::cast_precision_loss, reason = "2^53 us is 285 years")]
fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

#[cfg(test)]
mod tests;
