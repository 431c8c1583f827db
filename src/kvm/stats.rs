//! KVM's statistics, read through a descriptor (Documentation/virt/kvm/api.rst, 4.133,
//! KVM_GET_STATS_FD; since Linux 5.15).

use armlet_system::eintr::uninterrupted;
use kvm_bindings::{KVMIO, kvm_stats_header};
use rustix::io::pread;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use vmm_sys_util::ioctl::{_IOC_NONE, ioctl, ioctl_expr};

const KVM_GET_STATS_FD: libc::c_ulong = ioctl_expr(_IOC_NONE, KVMIO, 0xce, 0);

/// Bytes of a statistics descriptor before its name (struct kvm_stats_desc).
const DESCRIPTOR: usize = 16;
/// A bound on what is read, more than any kernel has.
const MOST_BYTES: usize = 1 << 20;

/// How a counter counts (KVM_STATS_TYPE_*, bits 3:0 of its flags).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Cumulative: the values of several vCPUs add up.
    Cumulative,
    /// An instantaneous value.
    Instant,
    /// A peak value.
    Peak,
}

/// One counter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counter {
    /// Its name in the kernel.
    pub name: String,
    /// How it counts.
    pub kind: Kind,
    /// Its value, in the unit that the name implies.
    pub value: u64,
}

/// The counters of a VM or of a vCPU.
pub struct Statistics {
    fd: OwnedFd,
}

impl Statistics {
    /// Opens the statistics of the VM or vCPU with this descriptor. They stay readable even after
    /// it is closed.
    ///
    /// # Errors
    /// When the kernel does not offer them.
    pub fn of(fd: &impl AsRawFd) -> std::io::Result<Statistics> {
        // SAFETY: the call takes no argument, and the descriptor is open during the call.
        let fd = unsafe { ioctl(&BorrowedFd::borrow_raw(fd.as_raw_fd()), KVM_GET_STATS_FD) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Statistics { fd })
    }

    /// Reads all counters that are single numbers; histograms are left out.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn read(&self) -> std::io::Result<Vec<Counter>> {
        let mut header = [0; size_of::<kvm_stats_header>()];
        self.fill(&mut header, 0)?;
        let word = |at: usize| u32_at(&header, at) as usize;
        let (name, count) = (word(4), word(8));
        let (descriptors, data) = (word(16), word(20));
        let size = DESCRIPTOR.saturating_add(name).saturating_mul(count);
        let mut table = vec![0; size.min(MOST_BYTES)];
        self.fill(&mut table, descriptors as u64)?;
        let mut counters = Vec::new();
        for entry in table.chunks_exact(DESCRIPTOR + name) {
            let Some((name, kind, offset)) = described(entry) else {
                continue;
            };
            let mut value = [0; 8];
            self.fill(&mut value, data as u64 + u64::from(offset))?;
            let value = u64::from_le_bytes(value);
            counters.push(Counter { name, kind, value });
        }
        Ok(counters)
    }

    fn fill(&self, mut bytes: &mut [u8], mut offset: u64) -> std::io::Result<()> {
        while !bytes.is_empty() {
            let count = uninterrupted(|| pread(&self.fd, &mut *bytes, offset))?;
            if count == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            bytes = &mut bytes[count..];
            offset += count as u64;
        }
        Ok(())
    }
}

/// Returns name, kind and data offset of a counter that is a single number.
fn described(entry: &[u8]) -> Option<(String, Kind, u32)> {
    let kind = match u32_at(entry, 0) & 0xf {
        0 => Kind::Cumulative,
        1 => Kind::Instant,
        2 => Kind::Peak,
        _ => return None,
    };
    let size = entry.get(6..8)?;
    if u16::from_le_bytes([size[0], size[1]]) != 1 {
        return None;
    }
    let name = entry.get(DESCRIPTOR..)?.split(|byte| *byte == 0).next()?;
    Some((
        String::from_utf8_lossy(name).into_owned(),
        kind,
        u32_at(entry, 8),
    ))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    word.map_or(0, |word| u32::from_le_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(flags: u32, size: u16, offset: u32, name: &[u8]) -> Vec<u8> {
        let mut entry = flags.to_le_bytes().to_vec();
        entry.extend([0, 0]);
        entry.extend(size.to_le_bytes());
        entry.extend(offset.to_le_bytes());
        entry.extend([0; 4]);
        entry.extend(name);
        entry.resize(DESCRIPTOR + 48, 0);
        entry
    }

    #[test]
    fn single_numbers_are_read_and_histograms_are_not() {
        let exits = described(&entry(0x10, 1, 24, b"exits"));
        assert_eq!(exits, Some(("exits".to_owned(), Kind::Cumulative, 24)));
        let peak = described(&entry(2, 1, 0, b"max_mmu_rmap_size"));
        assert_eq!(peak.map(|found| found.1), Some(Kind::Peak));
        assert_eq!(described(&entry(4, 32, 0, b"halt_wait_hist")), None);
        assert_eq!(described(&entry(0, 20, 0, b"several")), None);
        assert_eq!(described(b"short"), None);
    }
}
