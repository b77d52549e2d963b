//! Conversions of a strategy's plain data between `wit/` and this crate, checks included.

use crate::bindings::cache_strategy::exports::visor::plugin::cache_strategy as wit;
use crate::strategy::{
    Access, Algorithm, CacheEntry, CacheEvent, Interests, RemovalCause, Scoping, StrategyPlan, Tier,
};

const SCOPE_BYTES_MAX: usize = 256;

impl From<Tier> for wit::Tier {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Prefix => Self::Prefix,
            Tier::Embedding => Self::Embedding,
            Tier::Pixels => Self::Pixels,
            Tier::Response => Self::Response,
        }
    }
}

impl From<wit::Algorithm> for Algorithm {
    fn from(algorithm: wit::Algorithm) -> Self {
        match algorithm {
            wit::Algorithm::Lru => Self::Lru,
            wit::Algorithm::Lfu => Self::Lfu,
            wit::Algorithm::Fifo => Self::Fifo,
            wit::Algorithm::Sieve => Self::Sieve,
            wit::Algorithm::Gdsf => Self::Gdsf,
        }
    }
}

impl From<wit::Interests> for Interests {
    fn from(interests: wit::Interests) -> Self {
        let has = |interest| interests.contains(interest);
        Self {
            scope: has(wit::Interests::SCOPE),
            inserts: has(wit::Interests::INSERTS),
            hits: has(wit::Interests::HITS),
            misses: has(wit::Interests::MISSES),
            removals: has(wit::Interests::REMOVALS),
            victims: has(wit::Interests::VICTIMS),
            admission: has(wit::Interests::ADMISSION),
        }
    }
}

impl TryFrom<wit::Plan> for StrategyPlan {
    type Error = String;

    fn try_from(plan: wit::Plan) -> Result<Self, String> {
        if plan.hit_sampling == 0 {
            return Err("plans a hit sampling of 0; 1 reports all".to_owned());
        }
        if plan.max_entry_permille > 1000 {
            return Err(format!(
                "plans entries of {} permille",
                plan.max_entry_permille
            ));
        }
        Ok(Self {
            base: plan.base.into(),
            interests: plan.interests.into(),
            hit_sampling: plan.hit_sampling,
            ttl_s: plan.ttl,
            entry_permille_max: plan.max_entry_permille,
        })
    }
}

impl From<CacheEntry> for wit::Entry {
    fn from(entry: CacheEntry) -> Self {
        Self {
            id: entry.id,
            tier: entry.tier.into(),
            scope: entry.scope,
            bytes: entry.bytes,
            cost_micros: entry.cost_us,
            tokens: entry.tokens,
        }
    }
}

impl From<RemovalCause> for wit::RemovalCause {
    fn from(cause: RemovalCause) -> Self {
        match cause {
            RemovalCause::Evicted => Self::Evicted,
            RemovalCause::Expired => Self::Expired,
            RemovalCause::Replaced => Self::Replaced,
            RemovalCause::Invalidated => Self::Invalidated,
        }
    }
}

impl From<CacheEvent> for wit::Event {
    fn from(event: CacheEvent) -> Self {
        match event {
            CacheEvent::Inserted(entry) => Self::Inserted(entry.into()),
            CacheEvent::Hit { id, count } => Self::Hit((id, count)),
            CacheEvent::Missed { tier, key } => Self::Missed((tier.into(), key)),
            CacheEvent::Removed { id, cause } => Self::Removed((id, cause.into())),
        }
    }
}

impl From<wit::Access> for Access {
    fn from(access: wit::Access) -> Self {
        Self {
            read: access.contains(wit::Access::READ),
            write: access.contains(wit::Access::WRITE),
        }
    }
}

impl TryFrom<wit::Scoping> for Scoping {
    type Error = String;

    fn try_from(scoping: wit::Scoping) -> Result<Self, String> {
        let bytes = scoping.scope.len();
        if bytes > SCOPE_BYTES_MAX {
            return Err(format!(
                "a scope of {bytes} bytes; at most {SCOPE_BYTES_MAX} are allowed"
            ));
        }
        Ok(Self {
            scope: scoping.scope,
            prefix: scoping.prefix.into(),
            embedding: scoping.embedding.into(),
            pixels: scoping.pixels.into(),
            response: scoping.response.into(),
            ttl_s: scoping.ttl,
            weight: scoping.weight,
        })
    }
}

/// Victims are at most as many as asked for, and none twice. Whether they exist is for whoever
/// holds the cache to say: it may have changed meanwhile.
pub(crate) fn check_victims(victims: &[u64], at_most: u32) -> Result<(), String> {
    if victims.len() > at_most as usize {
        return Err(format!(
            "{} victims; at most {at_most} were asked for",
            victims.len()
        ));
    }
    let mut sorted = victims.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("victim {} comes twice", pair[0])),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn victims_come_once_and_not_more_than_asked_for() {
        check_victims(&[3, 1, 2], 3).unwrap();
        assert!(check_victims(&[3, 1, 3], 3).is_err());
        assert!(check_victims(&[3, 1, 2], 2).is_err());
    }
}
