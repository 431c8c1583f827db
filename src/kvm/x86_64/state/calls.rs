//! Requests to KVM that its crate does not have.

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_sregs2};
use kvm_ioctls::VcpuFd;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref, ioctl_with_ref};

const SREGS2_BYTES: u32 = size_of::<kvm_sregs2>() as u32;
const ATTRIBUTE_BYTES: u32 = size_of::<kvm_device_attr>() as u32;
const KVM_GET_SREGS2: libc::c_ulong = ioctl_expr(_IOC_READ, KVMIO, 0xcc, SREGS2_BYTES);
const KVM_SET_SREGS2: libc::c_ulong = ioctl_expr(_IOC_WRITE, KVMIO, 0xcd, SREGS2_BYTES);
const KVM_SET_DEVICE_ATTR: libc::c_ulong = ioctl_expr(_IOC_WRITE, KVMIO, 0xe1, ATTRIBUTE_BYTES);
const KVM_GET_DEVICE_ATTR: libc::c_ulong = ioctl_expr(_IOC_WRITE, KVMIO, 0xe2, ATTRIBUTE_BYTES);

fn result(returned: libc::c_int) -> io::Result<()> {
    match returned {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn descriptor(vcpu: &VcpuFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the vCPU's, which is borrowed for as long.
    unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) }
}

/// Returns the system registers, with the entries of the page-directory pointer table that the CPU has
/// loaded (Documentation/virt/kvm/api.rst, KVM_GET_SREGS2; since Linux 5.14).
pub(super) fn system_registers(vcpu: &VcpuFd) -> io::Result<kvm_sregs2> {
    let mut system = kvm_sregs2::default();
    // SAFETY: the request writes a structure of this type, which outlives the call.
    result(unsafe { ioctl_with_mut_ref(&descriptor(vcpu), KVM_GET_SREGS2, &mut system) })?;
    Ok(system)
}

/// Sets the system registers.
pub(super) fn set_system_registers(vcpu: &VcpuFd, system: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: the request reads a structure of this type, which outlives the call.
    result(unsafe { ioctl_with_ref(&descriptor(vcpu), KVM_SET_SREGS2, system) })
}

/// Returns what KVM adds to the host's TSC, scaled to the guest's frequency, for the guest's
/// (Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET; since Linux 5.16).
pub(super) fn tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0_u64;
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: KVM writes eight bytes to where the attribute points, which outlives the call.
    result(unsafe { ioctl_with_ref(&descriptor(vcpu), KVM_GET_DEVICE_ATTR, &attribute) })?;
    Ok(offset)
}

/// Sets it.
pub(super) fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> io::Result<()> {
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: KVM reads eight bytes from where the attribute points, which outlives the call.
    result(unsafe { ioctl_with_ref(&descriptor(vcpu), KVM_SET_DEVICE_ATTR, &attribute) })
}

fn tsc_attribute(place: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: place as u64,
        flags: 0,
    }
}
