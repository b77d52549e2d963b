//! How the C library hands out memory. Here because it takes a foreign call, and this is the home of unsafe.

#![cfg_attr(
    all(target_os = "linux", target_env = "gnu"),
    expect(unsafe_code, reason = "mallopt and malloc_trim are functions of C")
)]

/// Large blocks come from the system and go back to it, and small ones from two arenas.
///
/// Left to itself, glibc learns from the first large block that is freed to take such blocks from its arenas, of which it has
/// eight for each core. Crops, features and rows of all sizes then leave holes in every one of them, and a process whose caches
/// are long full goes on to grow. Call it first thing in `main`, before there are threads. Elsewhere it does nothing.
pub fn return_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    glibc::set();
}

/// Gives the system what the allocator holds and nobody uses: holes between blocks that are in use, as large as a page. It takes
/// some milliseconds, and whoever needs memory next faults it in again, so call it when there is nothing to do. Elsewhere it does
/// nothing.
pub fn return_free_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    glibc::trim();
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod glibc {
    use std::ffi::c_int;

    // Source: glibc's malloc.h.
    const M_MMAP_THRESHOLD: c_int = -3;
    const M_ARENA_MAX: c_int = -8;

    /// Blocks of at least so many bytes are the system's. Below, a page fault for every 4 KiB costs more than it gives back.
    const LARGE_BYTES: c_int = 1 << 20;
    /// Threads that compute take little, and seldom at once.
    const ARENAS: c_int = 2;

    unsafe extern "C" {
        fn mallopt(param: c_int, value: c_int) -> c_int;
        fn malloc_trim(pad: usize) -> c_int;
    }

    pub(super) fn set() {
        for (param, value) in [(M_MMAP_THRESHOLD, LARGE_BYTES), (M_ARENA_MAX, ARENAS)] {
            // SAFETY: two numbers go in and one comes out; what mallopt writes, it writes under the allocator's own lock.
            let _accepted = unsafe { mallopt(param, value) };
        }
    }

    pub(super) fn trim() {
        // SAFETY: a number goes in and one comes out; it takes the allocator's own locks.
        let _returned = unsafe { malloc_trim(0) };
    }
}
