//! What may be shared between requests: scopes, keys, and whole answers at temperature 0.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use visor_engine::{CacheKey, Lookup, NewEntry, Sampling, Scope, Scoping};
use visor_model::Prompt;
use visor_sandbox::{CallSyntax, OutputFormat, ToolChoice};

use super::record::Stage;
use super::work::Work;
use crate::calls::Calls;
use crate::wiring::Pinned;

pub use visor_engine::Answer;

/// Who shares with whom, for one generation: the cache strategy's decision.
#[derive(Debug, Clone)]
pub(super) struct Sharing {
    scope: Scope,
    /// The decision itself.
    pub scoping: Scoping,
}

impl Sharing {
    /// Asks the strategy of the pinned wiring. Once per generation, before any lookup.
    pub(super) fn ask(work: &mut Work, lookup: &Lookup) -> Self {
        let began = Instant::now();
        let scoping = work.call.pinned.cache.scope(lookup);
        work.trace.stages.add(Stage::Cache, began.elapsed());
        Self {
            scope: Scope::named(&scoping.scope),
            scoping,
        }
    }

    /// A key that only requests of this scope find.
    pub(super) fn key(&self, digest: [u8; 32]) -> CacheKey {
        CacheKey {
            scope: self.scope,
            digest,
        }
    }

    /// What a cache is told of a value that this request made.
    pub(super) fn entry(&self, bytes: u64, time: Duration, tokens: u32) -> NewEntry {
        NewEntry {
            bytes,
            cost_us: u64::try_from(time.as_micros()).unwrap_or(u64::MAX),
            tokens,
            ttl: self
                .scoping
                .ttl_s
                .map(|seconds| Duration::from_secs(seconds.into())),
            weight: self.scoping.weight,
        }
    }
}

/// Everything that decides what a greedy model answers, and by whom it was shaped.
pub(super) struct AnswerKey<'a> {
    /// The wiring: template and policy shape the prompt, and their revisions are part of the key.
    pub pinned: &'a Pinned,
    /// Digest of the weights.
    pub model_digest: &'a str,
    /// The prompt.
    pub prompt: &'a Prompt,
    /// Whether the answer goes on with the prompt's text.
    pub continues: bool,
    /// Keys of its pictures, in order.
    pub image_keys: &'a [[u8; 32]],
    /// Most output tokens.
    pub tokens_max: u32,
    /// Strings that end the output.
    pub stop_strings: &'a [String],
    /// Tokens that end the output.
    pub stop_ids: &'a [u32],
    /// What the answer is held to, and whether to the letter.
    pub format: (&'a OutputFormat, bool),
    /// What it may call.
    pub calls: Option<&'a Calls>,
    /// What is done to logits before the likeliest is taken.
    pub sampling: &'a Sampling,
}

impl AnswerKey<'_> {
    /// SHA-256 over all of it, every part with its length before it.
    pub(super) fn digest(&self) -> [u8; 32] {
        let mut sha = Sha256::new();
        sha.update(b"visor answer 6\0");
        let pinned = self.pinned;
        for plugin in [&pinned.adapter, &pinned.template, &pinned.image_policy] {
            text(&mut sha, plugin.revision());
        }
        text(&mut sha, self.model_digest);
        count(&mut sha, self.prompt.ids.len());
        self.prompt
            .ids
            .iter()
            .for_each(|id| sha.update(id.to_le_bytes()));
        sha.update([u8::from(self.continues)]);
        count(&mut sha, self.image_keys.len());
        self.image_keys.iter().for_each(|key| sha.update(key));
        sha.update(self.tokens_max.to_le_bytes());
        count(&mut sha, self.stop_strings.len());
        self.stop_strings
            .iter()
            .for_each(|stop| text(&mut sha, stop));
        count(&mut sha, self.stop_ids.len());
        self.stop_ids
            .iter()
            .for_each(|id| sha.update(id.to_le_bytes()));
        shape(&mut sha, self.format);
        tools(&mut sha, self.calls);
        adjustments(&mut sha, self.sampling);
        sha.finalize().into()
    }
}

/// What moves the likeliest token. A greedy draw looks at neither the shares kept (`top_p`,
/// `top_k`, `min_p`) nor the seed.
fn adjustments(sha: &mut Sha256, sampling: &Sampling) {
    let penalties = [
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
    ];
    penalties
        .iter()
        .for_each(|penalty| sha.update(penalty.to_le_bytes()));
    count(sha, sampling.logit_bias.len());
    for (token, bias) in &sampling.logit_bias {
        sha.update(token.to_le_bytes());
        sha.update(bias.to_le_bytes());
    }
}

fn shape(sha: &mut Sha256, (format, is_strict): (&OutputFormat, bool)) {
    let (kind, written) = match format {
        OutputFormat::Text => (0, ""),
        OutputFormat::Json => (1, ""),
        OutputFormat::JsonSchema(schema) => (2, schema.as_str()),
        OutputFormat::Regex(pattern) => (3, pattern.as_str()),
    };
    sha.update([kind, u8::from(is_strict)]);
    text(sha, written);
}

/// The prompt tells of the tools as the template pleases; what an answer is held to is theirs.
fn tools(sha: &mut Sha256, calls: Option<&Calls>) {
    count(sha, calls.map_or(0, |calls| calls.tools.len()));
    let Some(calls) = calls else { return };
    for (index, tool) in calls.tools.iter().enumerate() {
        sha.update([u8::from(calls.strict.contains(&index))]);
        text(sha, &tool.name);
        text(sha, &tool.description);
        text(sha, &tool.parameters);
    }
    let (choice, name) = match &calls.choice {
        ToolChoice::Auto => (0, ""),
        ToolChoice::Required => (1, ""),
        ToolChoice::Named(name) => (2, name.as_str()),
    };
    sha.update([choice]);
    text(sha, name);
    sha.update(calls.count_max.to_le_bytes());
    let CallSyntax {
        open,
        between,
        close,
    } = &calls.syntax;
    for part in [open, between, close] {
        text(sha, part);
    }
}

fn count(sha: &mut Sha256, count: usize) {
    sha.update((count as u64).to_le_bytes());
}

fn text(sha: &mut Sha256, text: &str) {
    count(sha, text.len());
    sha.update(text);
}

/// Looks for the whole answer of a greedy generation.
pub(super) fn find(work: &Work, sharing: &Sharing, key: &CacheKey) -> Option<Arc<Answer>> {
    sharing
        .scoping
        .response
        .read
        .then(|| work.call.house.responses.get(key))
        .flatten()
}
