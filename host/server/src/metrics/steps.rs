//! How many sequences run in a step, as a histogram. The engine counts; here it is only written out.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use visor_engine::STEP_SIZES;

use super::EngineSample;

/// The engine's steps as of the last scrape. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct StepSizes(Arc<Mutex<EngineSample>>);

impl StepSizes {
    /// Replaces what is written out.
    pub(super) fn take(&self, engine: &EngineSample) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = engine.clone();
    }
}

impl Collector for StepSizes {
    #[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let engine = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (name, help) = ("visor_batch_size", "Sequences in one step of the model");
        let sizes = STEP_SIZES.map(|size| size as f64).into_iter();
        let mut buckets: Vec<(f64, u64)> = sizes.zip(engine.step_sizes).collect();
        buckets.push((f64::INFINITY, 0));
        let mut histogram = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        let sum = engine.step_sequences as f64;
        histogram.encode_histogram::<NoLabelSet>(sum, engine.steps, &buckets, None)
    }
}
