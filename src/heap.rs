//! The memory that the program itself uses.

use armlet_devices::sync::lock;
use dlmalloc::Dlmalloc;
use std::alloc::{GlobalAlloc, Layout};
use std::sync::{Mutex, MutexGuard};

/// An allocator for the whole program.
///
/// musl's allocator maps and unmaps a page for nearly every small allocation, which takes a third of
/// the time from exec to the guest's first instruction. The lock is a futex, as dlmalloc's default,
/// musl's mutex, takes more instructions than the allocation that it guards.
pub struct Heap(Mutex<Dlmalloc>);

impl Heap {
    /// Creates an empty allocator, which gets memory from the system on demand.
    #[must_use]
    pub const fn new() -> Heap {
        Heap(Mutex::new(Dlmalloc::new()))
    }

    fn lock(&self) -> MutexGuard<'_, Dlmalloc> {
        lock(&self.0)
    }
}

impl Default for Heap {
    fn default() -> Heap {
        Heap::new()
    }
}

// SAFETY: dlmalloc keeps the contract, one call at a time, and its callers' promises are passed on.
// The lock allocates nothing: it is a futex.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { self.lock().malloc(layout.size(), layout.align()) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { self.lock().calloc(layout.size(), layout.align()) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { self.lock().free(start, layout.size(), layout.align()) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe {
            let mut heap = self.lock();
            heap.realloc(start, layout.size(), layout.align(), size)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_keep_what_they_put_there() {
        let heap = Heap::new();
        std::thread::scope(|scope| {
            for thread in 0..4_u8 {
                let heap = &heap;
                scope.spawn(move || {
                    for round in 1..2000_usize {
                        let layout = Layout::array::<u8>(round).expect("a layout");
                        // SAFETY: what was allocated is used within its size and freed once.
                        unsafe {
                            let start = heap.alloc(layout);
                            start.write_bytes(thread, round);
                            let start = heap.realloc(start, layout, round * 2);
                            let bytes = std::slice::from_raw_parts(start, round);
                            assert!(bytes.iter().all(|byte| *byte == thread));
                            let layout = Layout::array::<u8>(round * 2).expect("a layout");
                            heap.dealloc(start, layout);
                        }
                    }
                });
            }
        });
    }
}
