//! Import `clock`: time and random identifiers.

use std::sync::LazyLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use rand::RngCore;

use crate::bindings::adapter::visor::plugin::clock::Host;
use crate::guest::GuestState;

/// Zero of the monotonic clock: the first time a plugin asks.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);
const UNIQUE_BYTES_MAX: usize = 32;

impl Host for GuestState {
    fn now(&mut self) -> wasmtime::Result<u64> {
        self.on_time()?;
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Ok(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    fn monotonic(&mut self) -> wasmtime::Result<u64> {
        self.on_time()?;
        Ok(u64::try_from(START.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn unique(&mut self, bytes: u32) -> wasmtime::Result<String> {
        self.on_time()?;
        let mut random = [0_u8; UNIQUE_BYTES_MAX];
        let random = &mut random[..(bytes as usize).min(UNIQUE_BYTES_MAX)];
        rand::rng().fill_bytes(random);
        Ok(crate::load::hex(random))
    }
}
