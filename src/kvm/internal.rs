//! Describes an internal error of KVM (KVM_EXIT_INTERNAL_ERROR).

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};
use kvm_ioctls::VcpuFd;
use std::fmt::Write;

/// Describes the error of the vCPU's last exit, which must have had this reason.
#[must_use]
pub fn describe_internal_error(vcpu: &mut VcpuFd) -> String {
    // SAFETY: the exit was KVM_EXIT_INTERNAL_ERROR, so this member of the union is the one that KVM
    // wrote; each of its bits is a number.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let count = (internal.ndata as usize).min(internal.data.len());
    describe(internal.suberror, &internal.data[..count])
}

fn describe(suberror: u32, data: &[u64]) -> String {
    let name = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => "an instruction that it cannot emulate",
        KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions at the same time",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while it delivered an event",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit for a reason that it does not know",
        _ => "unknown to armlet",
    };
    let mut text = format!("KVM met an error of its own: suberror {suberror} ({name})");
    let mut separator = ", data";
    for word in data {
        // Writing to a String cannot fail.
        let _ = write!(text, "{separator} {word:#x}");
        separator = "";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::open;

    #[test]
    fn suberror_and_data_are_told() {
        assert_eq!(
            describe(1, &[0, 0x5f, 0xc0de]),
            "KVM met an error of its own: suberror 1 (an instruction that it cannot emulate), data 0x0 0x5f 0xc0de"
        );
        assert_eq!(
            describe(99, &[]),
            "KVM met an error of its own: suberror 99 (unknown to armlet)"
        );
    }

    #[test]
    fn what_kvm_wrote_is_read_and_no_more_than_there_is() {
        let Ok(kvm) = open::open() else {
            println!("skipped: no KVM here");
            return;
        };
        let vm = kvm.create_vm().expect("a VM");
        let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
        let run = vcpu.get_kvm_run();
        // As KVM writes them, but with an impossible count.
        run.__bindgen_anon_1.internal.suberror = 4;
        run.__bindgen_anon_1.internal.ndata = u32::MAX;
        run.__bindgen_anon_1.internal.data = [7; 16];
        let text = describe_internal_error(&mut vcpu);
        assert!(text.contains("suberror 4 "), "{text}");
        assert_eq!(text.matches(" 0x7").count(), 16, "{text}");
    }
}
