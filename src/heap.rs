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
pub struct Heap;

/// What is left of it. There is one, for Rust and C.
static MEMORY: Mutex<Dlmalloc> = Mutex::new(Dlmalloc::new());

fn memory() -> MutexGuard<'static, Dlmalloc> {
    lock(&MEMORY)
}

// SAFETY: dlmalloc keeps the contract, one call at a time, and its callers' promises are passed on.
// The lock allocates nothing: it is a futex.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { memory().malloc(layout.size(), layout.align()) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { memory().calloc(layout.size(), layout.align()) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { memory().free(start, layout.size(), layout.align()) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { memory().realloc(start, layout.size(), layout.align(), size) }
    }
}

/// Has C's functions do with one heap where they are glibc's. To return memory of another, glibc's free()
/// opens a file of /proc, which a sandbox forbids. There are to be no other threads yet.
pub fn have_c_use_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a parameter of the allocator's; the only error is an unknown one.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// The same for C's functions, which the standard library calls for what belongs to a thread, and imago
/// for its buffers: musl takes these in place of its own and needs no more of them ("Replacing malloc"
/// in its documentation), which is 9 KiB of program less, and a page for each of few values.
#[cfg(any(target_env = "musl", test))]
mod c {
    use super::memory;

    // No other definition of these names is linked: the linker looks into musl for what is not there yet.

    #[cfg_attr(target_env = "musl", unsafe(no_mangle))]
    // SAFETY: callers keep C's contract, and the types are C's.
    unsafe extern "C" fn malloc(size: usize) -> *mut u8 {
        // SAFETY: any size is allowed.
        unsafe { memory().c_malloc(size) }
    }

    #[cfg_attr(target_env = "musl", unsafe(no_mangle))]
    // SAFETY: callers keep C's contract, and the types are C's.
    unsafe extern "C" fn calloc(count: usize, size: usize) -> *mut u8 {
        let Some(size) = count.checked_mul(size) else {
            return std::ptr::null_mut();
        };
        // SAFETY: any size is allowed, and so is this alignment.
        unsafe { memory().calloc(size, 1) }
    }

    #[cfg_attr(target_env = "musl", unsafe(no_mangle))]
    // SAFETY: callers keep C's contract, and the types are C's.
    unsafe extern "C" fn realloc(start: *mut u8, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { memory().c_realloc(start, size) }
    }

    #[cfg_attr(target_env = "musl", unsafe(no_mangle))]
    // SAFETY: callers keep C's contract, and the types are C's.
    unsafe extern "C" fn free(start: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { memory().c_free(start) }
    }

    #[cfg_attr(target_env = "musl", unsafe(no_mangle))]
    // SAFETY: callers keep C's contract, and the types are C's.
    unsafe extern "C" fn aligned_alloc(align: usize, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { memory().c_memalign(align, size) }
    }

    #[cfg_attr(target_env = "musl", unsafe(no_mangle))]
    // SAFETY: callers keep C's contract, and the types are C's.
    unsafe extern "C" fn posix_memalign(result: *mut *mut u8, align: usize, size: usize) -> i32 {
        // SAFETY: the caller's promise.
        let start = unsafe { memory().c_memalign(align, size) };
        if start.is_null() {
            return libc::ENOMEM;
        }
        // SAFETY: the caller's promise.
        unsafe { result.write(start) };
        0
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn c_has_its_memory_from_there_too() {
            let filled = |start: *mut u8, value: u8, length: usize| {
                // SAFETY: so much was allocated, and written before it is read.
                let bytes = unsafe { std::slice::from_raw_parts(start, length) };
                bytes.iter().all(|byte| *byte == value)
            };
            // SAFETY: what was allocated is used within its size and freed once.
            unsafe {
                let start = malloc(3000);
                start.write_bytes(5, 3000);
                let start = realloc(start, 90_000);
                assert!(filled(start, 5, 3000));
                free(start);
                let start = calloc(30, 100);
                assert!(filled(start, 0, 3000));
                free(start);
                let mut aligned = [std::ptr::null_mut(), aligned_alloc(4096, 100)];
                assert_eq!(posix_memalign(&mut aligned[0], 4096, 100), 0);
                for start in aligned {
                    assert!(start.addr().is_multiple_of(4096));
                    start.write_bytes(7, 100);
                    assert!(filled(start, 7, 100));
                    free(start);
                }
                // What there cannot be.
                assert!(calloc(usize::MAX, 2).is_null());
                assert!(malloc(usize::MAX / 2).is_null());
                assert_eq!(
                    posix_memalign(&mut aligned[0], 64, usize::MAX / 2),
                    libc::ENOMEM
                );
                free(realloc(std::ptr::null_mut(), 8));
                free(std::ptr::null_mut());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_keep_what_they_put_there() {
        std::thread::scope(|scope| {
            for thread in 0..4_u8 {
                scope.spawn(move || {
                    for round in 1..2000_usize {
                        let layout = Layout::array::<u8>(round).expect("a layout");
                        // SAFETY: what was allocated is used within its size and freed once.
                        unsafe {
                            let start = Heap.alloc(layout);
                            start.write_bytes(thread, round);
                            let start = Heap.realloc(start, layout, round * 2);
                            let bytes = std::slice::from_raw_parts(start, round);
                            assert!(bytes.iter().all(|byte| *byte == thread));
                            let layout = Layout::array::<u8>(round * 2).expect("a layout");
                            Heap.dealloc(start, layout);
                        }
                    }
                });
            }
        });
    }
}
