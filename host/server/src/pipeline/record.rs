//! What one exchange did: written once when it ends, read by metrics and stats.

use std::time::Duration;

/// How an exchange ended, as metrics tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The client got what it asked for.
    Ok,
    /// The client has to change its request (4xx).
    ClientError,
    /// A plugin broke its contract: trap, deadline, memory, nonsense.
    GuestFault,
    /// The server could not do it (5xx).
    ServerError,
    /// Refused because the server is full, draining or not ready.
    Rejected,
    /// The client left before the end.
    Aborted,
}

impl Outcome {
    /// The word used as a label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::ClientError => "client_error",
            Self::GuestFault => "guest_fault",
            Self::ServerError => "server_error",
            Self::Rejected => "rejected",
            Self::Aborted => "aborted",
        }
    }
}

/// The stages of a request whose time is kept, in the order a request meets them: those of the table in `host/ARCHITECTURE.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Reading the body and waiting for a thread.
    Accept,
    /// Calls of the adapter, `start` and `advance` together.
    Adapter,
    /// Fetching and decoding pictures, and waiting for the memory they take.
    Images,
    /// Calls of the image policy.
    ImagePolicy,
    /// Calls of the template, and tokenizing what it gave.
    Template,
    /// Asking the cache strategy for a scope.
    Cache,
    /// Running the recorded operations into crops.
    Preprocess,
    /// Waiting for the engine.
    Queue,
    /// The vision tower.
    Vision,
    /// Prompt positions.
    Prefill,
    /// Generated positions.
    Decode,
    /// Waiting for a slow client.
    Stream,
}

impl Stage {
    /// Every stage, in order.
    pub const ALL: [Self; 12] = [
        Self::Accept,
        Self::Adapter,
        Self::Images,
        Self::ImagePolicy,
        Self::Template,
        Self::Cache,
        Self::Preprocess,
        Self::Queue,
        Self::Vision,
        Self::Prefill,
        Self::Decode,
        Self::Stream,
    ];

    /// The word used as a label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Adapter => "adapter",
            Self::Images => "images",
            Self::ImagePolicy => "image_policy",
            Self::Template => "template",
            Self::Cache => "cache",
            Self::Preprocess => "preprocess",
            Self::Queue => "queue",
            Self::Vision => "vision",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Stream => "stream",
        }
    }
}

/// Time spent per stage in microseconds, indexed by [`Stage`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StageTimes([u64; Stage::ALL.len()]);

impl StageTimes {
    /// Adds time to a stage.
    pub fn add(&mut self, stage: Stage, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.add_us(stage, micros);
    }

    /// Adds microseconds to a stage.
    pub fn add_us(&mut self, stage: Stage, micros: u64) {
        let slot = &mut self.0[stage as usize];
        *slot = slot.saturating_add(micros);
    }

    /// Microseconds spent in a stage.
    pub fn get_us(&self, stage: Stage) -> u64 {
        self.0[stage as usize]
    }
}

/// Tokens of one exchange, summed over its generations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TokenTotals {
    /// Positions of the prompts, image tokens included.
    pub prompt: u64,
    /// Positions that came from pictures.
    pub image: u64,
    /// Prompt positions that were not computed again.
    pub cached: u64,
    /// Generated tokens.
    pub completion: u64,
}

/// What one exchange did.
#[derive(Debug, Clone)]
pub struct RequestRecord {
    /// The mount prefix that served it.
    pub prefix: String,
    /// HTTP status of the head (499 when the client left before one was sent).
    pub status: u16,
    /// How it ended.
    pub outcome: Outcome,
    /// Whether pieces were sent as they came.
    pub incremental: bool,
    /// Tokens.
    pub tokens: TokenTotals,
    /// `stop`, `length`, .. one per choice that finished.
    pub finishes: Vec<&'static str>,
    /// Whether the whole answer came from the response cache.
    pub response_cached: bool,
    /// Number of pictures.
    pub images: u32,
    /// Stage times.
    pub stages: StageTimes,
    /// From the accepted request to the first text, if any.
    pub first_text_us: Option<u64>,
    /// From the accepted request to the end.
    pub total_us: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_architecture_tells_of_these_stages_in_this_order() {
        let architecture = include_str!("../../../ARCHITECTURE.md");
        let rows = architecture.lines().filter_map(|line| {
            let mut cells = line.strip_prefix("| ")?.split(" | ");
            cells.next()?.parse::<usize>().ok()?;
            cells.next()
        });
        let stages = Stage::ALL.map(Stage::as_str);
        assert_eq!(rows.collect::<Vec<_>>(), stages);
        assert!(
            Stage::ALL
                .iter()
                .enumerate()
                .all(|(at, stage)| *stage as usize == at)
        );
    }
}
