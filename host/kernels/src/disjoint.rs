//! One slice whose parts several threads write.

#![expect(
    unsafe_code,
    reason = "the type system does not know which part is whose"
)]

use std::marker::PhantomData;

/// Values of which every thread writes others.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    count: usize,
    values: PhantomData<&'a mut [T]>,
}

// SAFETY: `part` is told to be called by one thread for one place, and nobody else reads or writes while the borrow lasts.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(values: &'a mut [T]) -> Self {
        Self {
            start: values.as_mut_ptr(),
            count: values.len(),
            values: PhantomData,
        }
    }

    /// Where a value is, if it is inside.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn place(&self, at: usize) -> Option<*const T> {
        (at < self.count).then(|| self.start.cast_const().wrapping_add(at))
    }

    /// So many values from a place on.
    ///
    /// # Panics
    /// When they are not all inside.
    ///
    /// # Safety
    /// While the part is borrowed, no other part has any of these values.
    #[expect(clippy::mut_from_ref, reason = "every caller has values of its own")]
    pub(crate) unsafe fn part(&self, at: usize, count: usize) -> &mut [T] {
        let inside = at.checked_add(count).is_some_and(|end| end <= self.count);
        assert!(inside, "inside the slice");
        // SAFETY: inside the slice, as was asserted.
        let start = unsafe { self.start.add(at) };
        // SAFETY: as many values from there are in it, and the caller alone has them.
        unsafe { std::slice::from_raw_parts_mut(start, count) }
    }
}
