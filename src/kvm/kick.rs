//! Kicks: a signal that makes a vCPU's thread leave KVM_RUN, or not enter it.

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use vmm_sys_util::signal::register_signal_handler;

thread_local! {
    /// This thread's `struct kvm_run`, while it has one.
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(null_mut()) };
}

/// The number of a thread (gettid(2)) while it can be kicked.
#[derive(Clone, Debug, Default)]
pub struct Target(Arc<AtomicI32>);

impl Target {
    /// Kicks the thread. This has no effect on one that has ended or is not [`Kickable`] yet.
    ///
    /// pthread_kill(3) of musl does so by tkill, whose number may be that of a thread of any process; the
    /// sandbox allows tgkill with this process's number only.
    pub fn kick(&self) {
        let thread = self.0.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: the call takes numbers. If the thread has ended by now, its number is that of
            // none, or of one of ours on which the handler does nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), thread, signal()) };
        }
    }
}

/// A thread that can be kicked, for as long as this value lives on it.
pub struct Kickable(Target);

impl Kickable {
    /// Makes this thread the one that is kicked by `target`: the signal interrupts KVM_RUN, and its
    /// handler sets `immediate_exit`, so that a KVM_RUN that is about to begin returns as well
    /// (Documentation/virt/kvm/api.rst, section 5).
    #[must_use]
    pub fn new(vcpu: &mut VcpuFd, target: Target) -> Kickable {
        KVM_RUN.set(std::ptr::from_mut(vcpu.get_kvm_run()));
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        target.0.store(thread, Ordering::SeqCst);
        Kickable(target)
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        self.0.0.store(0, Ordering::SeqCst);
        KVM_RUN.set(null_mut());
    }
}

/// Installs the signal handler for kicks. Call it before the first [`Target::kick`]: without a handler the
/// signal would kill the process.
pub fn install() {
    extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let run = KVM_RUN.get();
        if !run.is_null() {
            // SAFETY: the pointer is this thread's own, set while its vCPU lives; nothing
            // else writes this byte, and the kernel reads it at the next KVM_RUN.
            unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
        }
    }
    // It fails only for an invalid signal.
    let _ = register_signal_handler(signal(), kicked);
}

/// Returns the signal for kicks, a real-time one, which no library uses.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}
