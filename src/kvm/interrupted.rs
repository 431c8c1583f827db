//! Signals while a VM is being created.

use crate::kvm::{HostArch, KvmArch, open};
use armlet_arch::{Range, Region, Width};
use vmm_sys_util::signal::{Killable, register_signal_handler};

/// Runs `call` on a thread that is sent signals until it is done.
fn under_fire(call: impl FnOnce() + Send + 'static) {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    // Not a real-time signal: those queue up, and each call would find the next one pending.
    let signal = libc::SIGUSR2;
    register_signal_handler(signal, nothing).expect("a signal of the tests' own");
    let thread = std::thread::spawn(call);
    while !thread.is_finished() {
        thread.kill(signal).expect("its handle is held");
    }
    thread.join().expect("no failure in the thread");
}

#[test]
fn signals_do_not_stop_the_making_of_a_vm() {
    let Ok(kvm) = open::open() else {
        println!("skipped: no KVM here");
        return;
    };
    let bits = 32;
    let range = Range::new(0, 1 << bits).expect("a range");
    let width = Width {
        bits,
        need: bits,
        highest: Region {
            name: "RAM".into(),
            range,
        },
        limit: bits,
        fixed: kvm.check_extension_int(kvm_ioctls::Cap::ArmVmIPASize) == 0,
        levels: 3,
        levels_at_limit: 3,
        host_page: 4096,
    };
    under_fire(move || {
        for _ in 0..300 {
            HostArch::create_vm(&kvm, &width).expect("a VM");
        }
    });
}
