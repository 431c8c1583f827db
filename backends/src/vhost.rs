//! Devices whose rings the host's kernel works on (drivers/vhost): what vhost-net and vhost-vsock
//! have in common, as ioctls of include/uapi/linux/vhost.h.

use anyhow::{Context, Result, anyhow, bail};
use armlet_devices::virtio::Virtqueue;
use armlet_system::eintr::uninterrupted;
use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::raw::c_ulong;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE};
use vmm_sys_util::ioctl::{ioctl, ioctl_expr, ioctl_with_mut_ref, ioctl_with_ref};

/// VHOST_VIRTIO, the type of all ioctls of vhost.
const TYPE: u32 = 0xaf;
const GET_FEATURES: c_ulong = ioctl_expr(_IOC_READ, TYPE, 0x00, 8);
const SET_FEATURES: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x00, 8);
const SET_OWNER: c_ulong = ioctl_expr(_IOC_NONE, TYPE, 0x01, 0);
/// Its size is that of struct vhost_memory without regions.
const SET_MEM_TABLE: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x03, 8);
const SET_VRING_NUM: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x10, 8);
const SET_VRING_ADDR: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x11, 40);
const SET_VRING_BASE: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x12, 8);
const GET_VRING_BASE: c_ulong = ioctl_expr(_IOC_READ | _IOC_WRITE, TYPE, 0x12, 8);
const SET_VRING_KICK: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x20, 8);
const SET_VRING_CALL: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x21, 8);
const SET_VRING_ERR: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x22, 8);
const NET_SET_BACKEND: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x30, 8);
const VSOCK_SET_GUEST_CID: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x60, 8);
const VSOCK_SET_RUNNING: c_ulong = ioctl_expr(_IOC_WRITE, TYPE, 0x61, 4);

/// The most regions of memory that the kernel takes, unless its module was told otherwise
/// (drivers/vhost/vhost.c: max_mem_regions).
const MOST_REGIONS: usize = 64;
/// The descriptor that stands for "none any more".
const NONE: i32 = -1;

/// struct vhost_vring_state and struct vhost_vring_file.
#[repr(C)]
#[derive(Clone, Copy)]
struct RingValue<T> {
    index: u32,
    value: T,
}

/// struct vhost_vring_addr. The addresses are this process's.
#[repr(C)]
struct RingAddresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// struct vhost_memory, with room for as many regions as the kernel takes.
#[repr(C)]
struct MemoryTable {
    count: u32,
    padding: u32,
    regions: [MemoryRegion; MOST_REGIONS],
}

/// struct vhost_memory_region.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MemoryRegion {
    guest: u64,
    size: u64,
    host: u64,
    flags: u64,
}

/// An open vhost device.
#[derive(Debug)]
pub struct Vhost {
    fd: OwnedFd,
}

impl From<OwnedFd> for Vhost {
    fn from(fd: OwnedFd) -> Vhost {
        Vhost { fd }
    }
}

impl Vhost {
    /// Opens a vhost device, such as `/dev/vhost-net`.
    ///
    /// # Errors
    /// What the system says: not there (ENOENT), no right to it (EACCES).
    pub fn open(path: &str) -> io::Result<Vhost> {
        let fd = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Vhost { fd })
    }

    /// Binds the device to this process, whose memory it then works in. Comes before all else,
    /// once.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn set_owner(&self) -> Result<()> {
        // SAFETY: the ioctl takes no argument.
        done(|| unsafe { ioctl(&self.fd, SET_OWNER) }).context("VHOST_SET_OWNER")
    }

    /// The feature bits of virtio that the kernel's device can work with.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn features(&self) -> Result<u64> {
        let mut features = 0_u64;
        // SAFETY: the ioctl writes a u64.
        done(|| unsafe { ioctl_with_mut_ref(&self.fd, GET_FEATURES, &mut features) })
            .context("VHOST_GET_FEATURES")?;
        Ok(features)
    }

    /// Sets the negotiated feature bits, which must be among [`Self::features`].
    ///
    /// # Errors
    /// A bit that the kernel does not know; a device that runs.
    pub fn set_features(&self, features: u64) -> Result<()> {
        self.set(SET_FEATURES, &features)
            .with_context(|| format!("VHOST_SET_FEATURES {features:#x}"))
    }

    /// Tells where guest memory lies.
    ///
    /// # Errors
    /// More regions than the kernel takes; no owner.
    pub fn set_memory(&self, memory: &GuestMemoryMmap) -> Result<()> {
        let mut table = MemoryTable {
            count: 0,
            padding: 0,
            regions: [MemoryRegion::default(); MOST_REGIONS],
        };
        for region in memory.iter() {
            let Some(slot) = table.regions.get_mut(table.count as usize) else {
                bail!("guest memory has more than the {MOST_REGIONS} regions that vhost takes");
            };
            *slot = MemoryRegion {
                guest: region.start_addr().0,
                size: region.len(),
                host: region.as_ptr() as u64,
                flags: 0,
            };
            table.count += 1;
        }
        self.set(SET_MEM_TABLE, &table)
            .context("VHOST_SET_MEM_TABLE")
    }

    /// Tells the device where a queue's ring lies and which descriptors it is kicked by and
    /// interrupts the guest by. Its number `index` is the vhost device's, not the queue's: each
    /// vhost-net has 0 and 1 only. Features and memory come before; then what makes the device
    /// run, [`Self::set_net_backend`] or [`Self::set_vsock_running`].
    ///
    /// `errors` is written to when the kernel finds the ring wrong; it then leaves it alone.
    ///
    /// # Errors
    /// A ring that is not in one piece of memory of this process; what the kernel refuses.
    pub fn set_ring(
        &self,
        index: u32,
        queue: &Virtqueue,
        call: &EventFd,
        errors: Option<&EventFd>,
    ) -> Result<()> {
        let addresses = ring_addresses(index, queue)?;
        let what = |name: &str| format!("{name} of ring {index}");
        let number = |value: u16| RingValue {
            index,
            value: u32::from(value),
        };
        self.set(SET_VRING_NUM, &number(queue.size()))
            .with_context(|| what("VHOST_SET_VRING_NUM"))?;
        self.set(SET_VRING_BASE, &number(queue.next_available()))
            .with_context(|| what("VHOST_SET_VRING_BASE"))?;
        self.set(SET_VRING_ADDR, &addresses)
            .with_context(|| what("VHOST_SET_VRING_ADDR"))?;
        let file = |fd: i32| RingValue { index, value: fd };
        let errors = errors.map_or(NONE, EventFd::as_raw_fd);
        self.set(SET_VRING_ERR, &file(errors))
            .with_context(|| what("VHOST_SET_VRING_ERR"))?;
        self.set(SET_VRING_CALL, &file(call.as_raw_fd()))
            .with_context(|| what("VHOST_SET_VRING_CALL"))?;
        // The last, as it has the kernel look for kicks.
        self.set(SET_VRING_KICK, &file(queue.kick().as_raw_fd()))
            .with_context(|| what("VHOST_SET_VRING_KICK"))
    }

    /// Takes kick and call from a ring whose device was stopped, and returns where it would go
    /// on in the available ring.
    ///
    /// # Errors
    /// What the kernel refuses; everything that can be taken is.
    pub fn clear_ring(&self, index: u32) -> Result<u16> {
        let none = RingValue { index, value: NONE };
        let kick = self.set(SET_VRING_KICK, &none);
        let call = self.set(SET_VRING_CALL, &none);
        let errors = self.set(SET_VRING_ERR, &none);
        let mut state = RingValue {
            index,
            value: 0_u32,
        };
        // SAFETY: the ioctl reads and writes a struct vhost_vring_state.
        let base = done(|| unsafe { ioctl_with_mut_ref(&self.fd, GET_VRING_BASE, &mut state) });
        kick.and(call)
            .and(errors)
            .and(base)
            .with_context(|| format!("cannot clear ring {index} of vhost"))?;
        // The upper half is for packed rings.
        Ok(state.value as u16)
    }

    /// Has vhost-net work on a ring with this TAP or socket; without one it stops, and is out of
    /// guest memory when this returns.
    ///
    /// # Errors
    /// A ring that was not set up; a descriptor that is no TAP; what else the kernel refuses.
    pub fn set_net_backend(&self, index: u32, socket: Option<&impl AsFd>) -> Result<()> {
        let fd = socket.map_or(NONE, |socket| socket.as_fd().as_raw_fd());
        self.set(NET_SET_BACKEND, &RingValue { index, value: fd })
            .with_context(|| format!("VHOST_NET_SET_BACKEND of ring {index}"))
    }

    /// Gives the guest of a vhost-vsock its address.
    ///
    /// # Errors
    /// An address that another guest has (EADDRINUSE) or that cannot be had (EINVAL).
    pub fn set_vsock_cid(&self, cid: u32) -> io::Result<()> {
        self.set(VSOCK_SET_GUEST_CID, &u64::from(cid))
    }

    /// Has vhost-vsock work on its rings, or stop; then it is out of guest memory when this
    /// returns.
    ///
    /// # Errors
    /// A ring that was not set up, or is in no memory of the guest.
    pub fn set_vsock_running(&self, running: bool) -> Result<()> {
        self.set(VSOCK_SET_RUNNING, &i32::from(running))
            .with_context(|| format!("VHOST_VSOCK_SET_RUNNING {}", u8::from(running)))
    }

    /// Calls an ioctl that reads a `T`.
    fn set<T>(&self, request: c_ulong, value: &T) -> io::Result<()> {
        // SAFETY: each request of this file is called with what it reads, as the structures and
        // the sizes in the requests say; the kernel checks all addresses in them before use.
        done(|| unsafe { ioctl_with_ref(&self.fd, request, value) })
    }
}

/// What an ioctl returns, as a result. VHOST_SET_OWNER starts a thread, which a signal stops.
fn done(mut call: impl FnMut() -> i32) -> io::Result<()> {
    uninterrupted(|| match call() {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    })
}

/// Where a queue's rings lie in this process. The kernel takes each ring for one piece of our
/// memory, so one that goes on in another mapping is refused.
fn ring_addresses(index: u32, queue: &Virtqueue) -> Result<RingAddresses> {
    let [descriptors, available, used] = ring_parts(queue)?;
    Ok(RingAddresses {
        index,
        flags: 0,
        descriptors,
        used,
        available,
        log: 0,
    })
}

/// The addresses of a queue's descriptor table, available and used ring in this process.
///
/// # Errors
/// A part that is not within one region of guest memory.
pub fn ring_parts(queue: &Virtqueue) -> Result<[u64; 3]> {
    let addresses = queue.addresses();
    let count = usize::from(queue.size());
    let host = |address: u64, bytes: usize| -> Result<u64> {
        let slice = queue.memory().get_slice(GuestAddress(address), bytes);
        let slice = slice.map_err(|_| {
            anyhow!(
                "queue {} has a ring at {address:#x} that is not in one bank of memory",
                queue.index()
            )
        })?;
        Ok(slice.ptr_guard().as_ptr() as u64)
    };
    // Sizes: virtio 1.2, section 2.7; both rings with the word of EVENT_IDX.
    Ok([
        host(addresses.descriptors, 16 * count)?,
        host(addresses.available, 6 + 2 * count)?,
        host(addresses.used, 6 + 8 * count)?,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::size_of;

    #[test]
    fn structures_have_the_sizes_in_the_requests() {
        assert_eq!(size_of::<RingValue<u32>>(), 8);
        assert_eq!(size_of::<RingValue<i32>>(), 8);
        assert_eq!(size_of::<RingAddresses>(), 40);
        assert_eq!(size_of::<MemoryRegion>(), 32);
        assert_eq!(size_of::<MemoryTable>(), 8 + 32 * MOST_REGIONS);
    }

    #[test]
    fn requests_have_the_kernels_numbers() {
        // As the C macros give them on x86 and arm64.
        assert_eq!(GET_FEATURES, 0x8008_af00);
        assert_eq!(SET_OWNER, 0xaf01);
        assert_eq!(SET_MEM_TABLE, 0x4008_af03);
        assert_eq!(SET_VRING_ADDR, 0x4028_af11);
        assert_eq!(GET_VRING_BASE, 0xc008_af12);
        assert_eq!(VSOCK_SET_RUNNING, 0x4004_af61);
    }

    #[test]
    fn what_is_not_there_is_an_error_of_the_system() {
        let error = Vhost::open("/dev/vhost-none").expect_err("no such device");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
