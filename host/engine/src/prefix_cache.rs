//! KV blocks of what has run, found by everything their values depend on.
//!
//! A prompt is a chain of SHA-256 digests, one per position: each covers the one before it and what fills the position, a token
//! or one row of a picture. The first covers the model, the device, the rope regime; the scope is part of every key. A block is
//! kept under the digest of its last position, so blocks of equal prompts meet, and a block of which only the first positions
//! are common is found beside its siblings and used in part. Nothing is compared that is shorter than 256 bits.
//!
//! Not covered: whether a token was generated or came in a prompt. Attention sums the two in another order, so the next turn of a
//! conversation can differ in the last bits from one that computes the answer before it again.

use std::collections::HashMap;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use visor_model::DeviceKind;

use crate::cache::{Cache, CacheKey, NewEntry, Scope};
use crate::request::{CacheAccess, GenerateRequest};

pub(crate) type Digest = [u8; 32];

/// Memory of one child's key: in a list that has room for four, under a key of its own in a map that may be two thirds empty.
const CHILD_BYTES: usize =
    4 * size_of::<CacheKey>() + 3 * (size_of::<CacheKey>() + size_of::<Vec<CacheKey>>());
/// Children that are remembered for each block that is there, most of which may be gone, and in all where there are few.
const CHILDREN_MAX: usize = 2;
const CHILDREN_LEAST: usize = 64;

/// A block with the digest of each position it holds.
pub struct PrefixBlock<B> {
    block: Arc<B>,
    digests: Vec<Digest>,
}

impl<B> PrefixBlock<B> {
    /// Whether no sequence holds the block.
    fn is_alone(&self) -> bool {
        Arc::strong_count(&self.block) == 1
    }
}

/// What fills the positions of one sequence, as a chain of digests.
pub(crate) struct Chain {
    is_long: bool,
    seed: Digest,
    digests: Vec<Digest>,
}

/// What the values of a whole sequence depend on.
pub(crate) struct Ground<'a> {
    pub(crate) model_digest: &'a str,
    pub(crate) device: DeviceKind,
    pub(crate) is_long: bool,
}

impl Chain {
    /// The chain of a prompt and of what was generated behind it.
    pub(crate) fn new(ground: &Ground<'_>, request: &GenerateRequest, tokens: &[u32]) -> Self {
        let mut sha = Sha256::new();
        sha.update(b"visor prefix 1\0");
        sha.update((ground.model_digest.len() as u64).to_le_bytes());
        sha.update(ground.model_digest.as_bytes());
        sha.update(ground.device.to_string().as_bytes());
        sha.update([0, u8::from(ground.is_long)]);
        let mut chain = Self {
            is_long: ground.is_long,
            seed: sha.finalize().into(),
            digests: Vec::with_capacity(request.prompt.ids.len() + tokens.len()),
        };
        let mut rows = vec![0_u64; request.images.len()];
        for id in &request.prompt.ids {
            let index = usize::try_from(-(id + 1)).ok();
            match index.and_then(|index| Some((request.images.get(index)?, index))) {
                Some((pixels, index)) => {
                    chain.extend(&[&[1], &pixels.key[..], &rows[index].to_le_bytes()]);
                    rows[index] += 1;
                }
                None => chain.extend(&[&[0], &id.to_le_bytes()]),
            }
        }
        for token in tokens {
            chain.push(*token);
        }
        chain
    }

    /// Positions.
    pub(crate) fn len(&self) -> usize {
        self.digests.len()
    }

    /// The rope regime it is about.
    pub(crate) fn is_long(&self) -> bool {
        self.is_long
    }

    /// One generated token more.
    pub(crate) fn push(&mut self, token: u32) {
        self.extend(&[&[0], &i64::from(token).to_le_bytes()]);
    }

    fn extend(&mut self, parts: &[&[u8]]) {
        let mut sha = Sha256::new();
        sha.update(self.before(self.digests.len()));
        for part in parts {
            sha.update(part);
        }
        self.digests.push(sha.finalize().into());
    }

    /// The digest of everything before a position.
    fn before(&self, position: usize) -> Digest {
        position
            .checked_sub(1)
            .map_or(self.seed, |last| self.digests[last])
    }
}

/// Blocks that hold the first positions of a chain.
pub(crate) struct Found<B> {
    pub(crate) blocks: Vec<Arc<B>>,
    pub(crate) positions: usize,
    keys: Vec<CacheKey>,
}

impl<B> Found<B> {
    /// Blocks that are shared as they are; one that is used in part is copied.
    pub(crate) fn whole_blocks(&self, block_positions: usize) -> usize {
        self.positions / block_positions
    }
}

/// What storing is to say of the blocks.
pub(crate) struct Worth {
    pub(crate) block_bytes: u64,
    /// Microseconds that one position took.
    pub(crate) position_us: u64,
}

pub(crate) struct PrefixStore<B> {
    cache: Arc<Cache<PrefixBlock<B>>>,
    pub(crate) model_digest: String,
    block_positions: usize,
    /// By the key before a block, the keys of blocks that go on from there. Some may be gone from the cache.
    children: HashMap<CacheKey, Vec<CacheKey>>,
}

impl<B: Send + Sync + 'static> PrefixStore<B> {
    pub(crate) fn new(cache: Arc<Cache<PrefixBlock<B>>>, model_digest: &str) -> Self {
        Self {
            cache,
            model_digest: model_digest.to_string(),
            block_positions: 1,
            children: HashMap::new(),
        }
    }

    /// Another model: nothing of the old one is of use.
    pub(crate) fn reset(&mut self, block_positions: usize) {
        self.block_positions = block_positions.max(1);
        self.children.clear();
        self.cache.invalidate_all();
    }

    /// The longest run of first positions that is there, at most `positions_max`, if longer than `more_than`.
    pub(crate) fn find(
        &mut self,
        chain: &Chain,
        access: &CacheAccess,
        (more_than, positions_max): (usize, usize),
    ) -> Option<Found<B>> {
        if !access.prefix.read {
            return None;
        }
        let size = self.block_positions;
        let key = |digest| key(access.scope, digest);
        let mut found = Found {
            blocks: Vec::new(),
            positions: 0,
            keys: Vec::new(),
        };
        while found.positions + size <= positions_max {
            let whole = key(chain.digests[found.positions + size - 1]);
            let Some(block) = self.cache.peek(&whole) else {
                break;
            };
            found.blocks.push(Arc::clone(&block.block));
            found.positions += size;
            found.keys.push(whole);
        }
        let rest = &chain.digests[found.positions..positions_max];
        if let Some((sibling, block, common)) =
            self.in_part(&key(chain.before(found.positions)), rest)
        {
            found.blocks.push(block);
            found.positions += common;
            found.keys.push(sibling);
        }
        (found.positions > more_than).then_some(found)
    }

    /// Counts what was found for a chain and is used, or that nothing was.
    pub(crate) fn count(&self, chain: &Chain, access: &CacheAccess, found: Option<&Found<B>>) {
        let Some(found) = found else {
            let first = self.block_positions.min(chain.len());
            if access.prefix.read && first > 0 {
                let _missed = self.cache.get(&key(access.scope, chain.digests[first - 1]));
            }
            return;
        };
        // The end first, as in `keep`.
        for key in found.keys.iter().rev() {
            let _counted = self.cache.get(key);
        }
    }

    /// Of the blocks that go on from a key, the one with most positions in common with `rest`.
    fn in_part(&mut self, parent: &CacheKey, rest: &[Digest]) -> Option<(CacheKey, Arc<B>, usize)> {
        let children = self.children.get_mut(parent)?;
        let mut best: Option<(CacheKey, Arc<B>, usize)> = None;
        children.retain(|child| {
            let Some(block) = self.cache.peek(child) else {
                return false;
            };
            let pairs = block.digests.iter().zip(rest);
            let common = pairs.take_while(|(a, b)| a == b).count();
            if common > best.as_ref().map_or(0, |(.., common)| *common) {
                best = Some((*child, Arc::clone(&block.block), common));
            }
            true
        });
        if children.is_empty() {
            self.children.remove(parent);
        }
        best
    }

    /// Keeps the blocks of a sequence's first positions, those that are not there yet. Only whole ones, unless the sequence
    /// has ended.
    pub(crate) fn keep(
        &mut self,
        chain: &Chain,
        blocks: &[Arc<B>],
        positions: usize,
        (access, worth): (&CacheAccess, &Worth),
    ) {
        if !access.prefix.write || self.cache.stats().capacity_bytes == 0 {
            return;
        }
        let size = self.block_positions;
        // The end first: it is the first to go when room is needed. Nothing finds a block whose beginning is gone.
        for (index, block) in blocks.iter().enumerate().rev() {
            let span = index * size..positions.min((index + 1) * size);
            if span.is_empty() {
                continue;
            }
            let child = key(access.scope, chain.digests[span.end - 1]);
            if self.cache.peek(&child).is_some() {
                self.cache.touch(&child);
                continue;
            }
            let parent = key(access.scope, chain.before(span.start));
            let digests = chain.digests[span.clone()].to_vec();
            self.supersede(&parent, &digests);
            let entry = NewEntry {
                bytes: worth.block_bytes + own_bytes(span.len()),
                cost_us: worth.position_us.saturating_mul(span.len() as u64),
                tokens: span.len() as u32,
                ttl: access.ttl,
                weight: access.weight,
            };
            let block = Arc::new(PrefixBlock {
                block: Arc::clone(block),
                digests,
            });
            if !self.cache.insert(child, block, &entry) {
                break;
            }
            self.children.entry(parent).or_default().push(child);
        }
        self.prune();
    }

    /// Drops siblings that hold nothing but a beginning of `digests`.
    fn supersede(&mut self, parent: &CacheKey, digests: &[Digest]) {
        let Some(children) = self.children.get_mut(parent) else {
            return;
        };
        children.retain(|child| {
            let Some(block) = self.cache.peek(child) else {
                return false;
            };
            let is_older = digests.starts_with(&block.digests);
            if is_older {
                self.cache.remove(child);
            }
            !is_older
        });
    }

    /// Forgets children that are gone, once there are many of them.
    fn prune(&mut self) {
        let entries = self.cache.stats().entries as usize;
        let children: usize = self.children.values().map(Vec::len).sum();
        if children <= CHILDREN_LEAST + CHILDREN_MAX * entries {
            return;
        }
        self.children.retain(|_, children| {
            children.retain(|child| self.cache.peek(child).is_some());
            !children.is_empty()
        });
    }

    /// Gives up one block for others to use. False when there is none left that nobody else holds, and so none that would
    /// free memory.
    pub(crate) fn evict(&self) -> bool {
        self.cache.evict(PrefixBlock::is_alone)
    }

    /// Blocks that can be given up.
    pub(crate) fn evictable(&self) -> usize {
        self.cache.count(PrefixBlock::is_alone)
    }
}

/// What a block of so many positions takes here, beside what it takes itself.
fn own_bytes(positions: usize) -> u64 {
    (positions * size_of::<Digest>() + CHILDREN_MAX * CHILD_BYTES) as u64
}

fn key(scope: Scope, digest: Digest) -> CacheKey {
    CacheKey { scope, digest }
}

#[cfg(test)]
mod tests {
    use visor_model::Prompt;

    use super::*;
    use crate::cache::Tier;

    fn store(capacity_bytes: u64) -> PrefixStore<()> {
        let cache = Arc::new(Cache::new(Tier::Prefix, capacity_bytes));
        let mut store = PrefixStore::new(cache, "model");
        store.reset(64);
        store
    }

    /// Keeps a prompt of these ids, in blocks that take nothing.
    fn keep(store: &mut PrefixStore<()>, ids: std::ops::Range<i64>) {
        let prompt = Prompt {
            ids: ids.collect(),
            image_tokens: 0,
        };
        let request = GenerateRequest::new(prompt, 1);
        let ground = Ground {
            model_digest: "model",
            device: DeviceKind::Cpu,
            is_long: false,
        };
        let chain = Chain::new(&ground, &request, &[]);
        let blocks: Vec<_> = (0..chain.len().div_ceil(64))
            .map(|_| Arc::new(()))
            .collect();
        let worth = Worth {
            block_bytes: 0,
            position_us: 1,
        };
        store.keep(&chain, &blocks, chain.len(), (&request.cache, &worth));
    }

    #[test]
    fn what_finds_a_block_is_counted_with_it() {
        let [mut short, mut long] = [1 << 20, 1 << 20].map(store);
        keep(&mut short, 0..129);
        keep(&mut long, 0..192);
        let [short, long] = [short, long].map(|store| store.cache.stats());
        assert_eq!((short.entries, long.entries), (3, 3));
        assert_eq!(long.used_bytes - short.used_bytes, 63 * 32, "digests");
        let digests_and_keys = 129 * 32 + 3 * 2 * 64;
        assert!(short.used_bytes > digests_and_keys, "{short:?}");
    }

    #[test]
    fn a_block_that_is_refused_leaves_no_keys_behind() {
        // Room for the end of a prompt, not for its first block.
        let mut store = store(3000);
        for first in 0..300 {
            keep(&mut store, 1000 * first..1000 * first + 66);
        }
        let stats = store.cache.stats();
        assert_eq!((stats.entries, stats.refused), (1, 300), "{stats:?}");
        let children: usize = store.children.values().map(Vec::len).sum();
        assert!(children <= CHILDREN_LEAST + CHILDREN_MAX, "{children}");
    }
}
