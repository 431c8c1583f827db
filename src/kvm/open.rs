//! `/dev/kvm`, and what stands in the way where it does not open.

use anyhow::{Result, anyhow};
use kvm_ioctls::Kvm;
use std::ffi::CString;

/// The version of the KVM interface, the same since 2007 (Documentation/virt/kvm/api.rst, 4.1).
const KVM_API: i32 = 12;

/// Opens `/dev/kvm` and checks that it is what we know.
///
/// # Errors
/// No KVM, or no permission: with the fix in words.
pub fn open() -> Result<Kvm> {
    let access = access();
    match access {
        Access::Open(kvm) => Ok(kvm),
        Access::Missing => Err(anyhow!("cannot open /dev/kvm: {}", NO_KVM)),
        Access::Denied => Err(anyhow!("cannot open /dev/kvm: {}", NO_PERMISSION)),
        Access::Broken(cause) => Err(anyhow!("cannot use /dev/kvm: {cause}")),
    }
}

/// Why there is none, and what helps.
pub const NO_KVM: &str = "this kernel has no KVM, or it did not start in a mode with virtualisation: it must enter at EL2 (see 'dmesg | grep -i kvm'; on a board, firmware or boot loader may drop to EL1), and on x86 VMX or SVM must be on in the firmware and the module kvm_intel or kvm_amd loaded";
/// What helps where it may not be opened.
pub const NO_PERMISSION: &str = "permission denied: join the group that owns it ('sudo usermod -aG kvm $USER', then log in again), or run as root";

/// What came of opening `/dev/kvm`.
pub enum Access {
    /// KVM.
    Open(Kvm),
    /// There is none.
    Missing,
    /// It may not be opened.
    Denied,
    /// It is not what we know, or does not answer: why.
    Broken(String),
}

/// Opens it, and tells what came of that.
#[must_use]
pub fn access() -> Access {
    let opened = CString::new("/dev/kvm")
        .map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))
        .and_then(Kvm::new_with_path);
    match opened.map_err(|error| (error.errno(), error)) {
        Ok(kvm) if kvm.get_api_version() != KVM_API => Access::Broken(format!(
            "its interface has version {}, armlet knows {KVM_API}",
            kvm.get_api_version()
        )),
        Ok(kvm) => Access::Open(kvm),
        Err((libc::ENOENT | libc::ENXIO | libc::ENODEV, _)) => Access::Missing,
        Err((libc::EACCES | libc::EPERM, _)) => Access::Denied,
        Err((_, error)) => Access::Broken(error.to_string()),
    }
}
