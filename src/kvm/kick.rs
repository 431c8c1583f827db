//! Kicks: a signal that makes a vCPU's thread leave KVM_RUN, or not enter it.

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use std::cell::Cell;
use std::ptr::null_mut;
use std::thread::JoinHandle;
use vmm_sys_util::signal::{Killable, register_signal_handler};

thread_local! {
    /// This thread's `struct kvm_run`, while it has one.
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(null_mut()) };
}

/// A thread that can be kicked, for as long as this value lives on it.
pub struct Kickable(());

impl Kickable {
    /// Makes this thread kickable: the signal interrupts KVM_RUN, and its handler sets
    /// `immediate_exit`, so that a KVM_RUN that is about to begin returns as well
    /// (Documentation/virt/kvm/api.rst, section 5).
    #[must_use]
    pub fn new(vcpu: &mut VcpuFd) -> Kickable {
        KVM_RUN.set(std::ptr::from_mut(vcpu.get_kvm_run()));
        Kickable(())
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        KVM_RUN.set(null_mut());
    }
}

/// Installs the signal handler for kicks. Call it before the first [`kick`]: without a handler the
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

/// Kicks a thread. This has no effect on one that has ended or is not [`Kickable`].
pub fn kick<T>(thread: &JoinHandle<T>) {
    let _ = thread.kill(signal());
}

/// Returns the signal for kicks, a real-time one, which no library uses.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}
