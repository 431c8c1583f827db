//! Opens `/dev/kvm`, and diagnoses why it cannot be opened.

use anyhow::{Result, anyhow};
use kvm_ioctls::Kvm;
use std::ffi::CString;
use std::os::unix::fs::MetadataExt;

/// The version of the KVM interface, the same since 2007 (Documentation/virt/kvm/api.rst, 4.1).
const KVM_API: i32 = 12;

/// Opens `/dev/kvm` and checks its version.
///
/// # Errors
/// When there is no KVM, or no permission, with the fix.
pub fn open() -> Result<Kvm> {
    let access = access();
    match access {
        Access::Open(kvm) => Ok(kvm),
        Access::Missing => Err(anyhow!("cannot open /dev/kvm: {}", missing())),
        Access::Denied => Err(anyhow!(
            "cannot open /dev/kvm: permission denied: {}",
            denied()
        )),
        Access::Broken(cause) => Err(anyhow!("cannot use /dev/kvm: {cause}")),
    }
}

/// Returns why `/dev/kvm` is missing, and what helps.
#[must_use]
pub fn missing() -> String {
    let drivers = std::fs::read_to_string("/proc/misc").unwrap_or_default();
    missing_with(&drivers)
}

/// Like [`missing`], on a kernel with these drivers (/proc/misc: a number and a name on each line).
fn missing_with(drivers: &str) -> String {
    let mut drivers = drivers
        .lines()
        .filter_map(|line| line.trim().split_once(' '));
    match drivers.find(|(_, name)| *name == "kvm") {
        Some((minor, _)) => format!(
            "this kernel has KVM, but its file is not here: give it to the container ('--device /dev/kvm'), or as root 'mknod -m 660 /dev/kvm c 10 {minor}'"
        ),
        None => NO_KVM.to_owned(),
    }
}

const NO_KVM: &str = "this kernel has no KVM, or it did not start in a mode with virtualisation: it must enter at EL2 (see 'dmesg | grep -i kvm'; on a board, firmware or boot loader may drop to EL1), and on x86 VMX or SVM must be on in the firmware and the module kvm_intel or kvm_amd loaded";

/// Returns what helps where permission to open it is missing.
#[must_use]
pub fn denied() -> String {
    let process = Process {
        is_root: rustix::process::geteuid().is_root(),
        groups: rustix::process::getgroups()
            .unwrap_or_default()
            .into_iter()
            .chain([rustix::process::getegid()])
            .map(|group| group.as_raw())
            .collect(),
    };
    let file = std::fs::metadata("/dev/kvm").map(|file| (file.mode(), file.gid()));
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    match file {
        Ok((mode, group)) => process.what_helps(mode, group, &groups),
        Err(_) => ANOTHER_REASON.to_owned(),
    }
}

const ANOTHER_REASON: &str = "its mode is not the reason, so a container's rules for devices ('--device /dev/kvm' gives it) or a security module are";

/// The identity of this process.
struct Process {
    is_root: bool,
    groups: Vec<u32>,
}

impl Process {
    /// Returns what helps for a file with this mode and group; `groups` is the content of
    /// /etc/group.
    fn what_helps(&self, mode: u32, group: u32, groups: &str) -> String {
        const READ_WRITE: u32 = 0o6;
        let group_may = mode >> 3 & READ_WRITE == READ_WRITE;
        let all_may = mode & READ_WRITE == READ_WRITE;
        if self.is_root || all_may || group_may && self.groups.contains(&group) {
            return ANOTHER_REASON.to_owned();
        }
        let mut named = groups.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let (name, number) = (fields.next()?, fields.nth(1)?);
            (number.parse() == Ok(group)).then_some(name)
        });
        match named.next() {
            // Joining root's group would grant far too much.
            Some(name) if group_may && group != 0 => format!(
                "join the group that owns it ('sudo usermod -aG {name} $USER', then log in again), or run as root"
            ),
            _ => "run as root, or let others open it until the next boot: as root, 'chmod 666 /dev/kvm'".to_owned(),
        }
    }
}

/// The result of opening `/dev/kvm`.
pub enum Access {
    /// KVM.
    Open(Kvm),
    /// There is none.
    Missing,
    /// Permission is denied.
    Denied,
    /// It has an unknown version or does not work: why.
    Broken(String),
}

/// Tries to open it.
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

#[cfg(test)]
mod tests {
    use super::*;

    const GROUPS: &str = "root:x:0:\nvirt:x:109:someone\nkvm:x:992:\n";

    fn of(groups: &[u32]) -> Process {
        Process {
            is_root: false,
            groups: groups.to_vec(),
        }
    }

    #[test]
    fn the_group_that_may_open_kvm_is_named_and_no_other() {
        let helps = |mode, group| of(&[1000]).what_helps(mode, group, GROUPS);
        assert!(helps(0o660, 992).contains("usermod -aG kvm "));
        assert!(helps(0o660, 109).contains("usermod -aG virt "));
        // No group has access, or only root's, or one that is not listed.
        for (mode, group) in [
            (0o600, 992),
            (0o600, 0),
            (0o660, 0),
            (0o640, 992),
            (0o660, 5),
        ] {
            let text = helps(mode, group);
            assert!(
                text.contains("chmod 666") && !text.contains("usermod"),
                "{text}"
            );
        }
    }

    #[test]
    fn who_may_open_kvm_by_its_mode_is_told_to_look_elsewhere() {
        let root = Process {
            is_root: true,
            groups: vec![0],
        };
        for text in [
            root.what_helps(0o600, 0, GROUPS),
            of(&[992]).what_helps(0o660, 992, GROUPS),
            of(&[]).what_helps(0o666, 0, GROUPS),
        ] {
            assert!(
                text.contains("container") && !text.contains("usermod"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_kernel_with_kvm_and_no_file_for_it_is_told_apart() {
        let text = missing_with("235 autofs\n232 kvm\n 59 udmabuf\n");
        assert!(text.contains("mknod -m 660 /dev/kvm c 10 232"), "{text}");
        assert!(missing_with("235 autofs\n").contains("EL2"));
        assert!(missing_with("").contains("EL2"));
    }
}
