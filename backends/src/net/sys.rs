//! System calls for network cards that no library has in a safe form: vectors of guest memory,
//! the ioctls of TAPs, descriptors that go from process to process.

use armlet_devices::virtio::net::Pieces;
use armlet_system::eintr::uninterrupted;
use rustix::io::FdFlags;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::raw::{c_int, c_ulong};
use vm_memory::VolatileSlice;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

// include/uapi/linux/if_tun.h. Most sizes there are not those of what the kernel reads.
const TUNSETIFF: c_ulong = ioctl_expr(_IOC_WRITE, b'T' as u32, 202, 4);
const TUNSETOFFLOAD: c_ulong = ioctl_expr(_IOC_WRITE, b'T' as u32, 208, 4);
const TUNGETIFF: c_ulong = ioctl_expr(_IOC_READ, b'T' as u32, 210, 4);
const TUNSETVNETHDRSZ: c_ulong = ioctl_expr(_IOC_WRITE, b'T' as u32, 216, 4);
const TUNSETQUEUE: c_ulong = ioctl_expr(_IOC_WRITE, b'T' as u32, 217, 4);
// include/uapi/linux/sockios.h.
const SIOCGIFFLAGS: c_ulong = 0x8913;
const SIOCGIFMTU: c_ulong = 0x8921;

/// Bytes of an interface's name with its end (IFNAMSIZ).
pub(super) const NAME_BYTES: usize = 16;

/// struct ifreq.
#[repr(C)]
struct Request {
    name: [u8; NAME_BYTES],
    value: RequestValue,
}

/// Its union, as far as it is used here.
#[repr(C)]
union RequestValue {
    flags: i16,
    number: c_int,
    all: [u64; 3],
}

impl Request {
    fn new(name: &str) -> io::Result<Request> {
        let mut request = Request {
            name: [0; NAME_BYTES],
            value: RequestValue { all: [0; 3] },
        };
        // With a zero at the end.
        if name.len() >= NAME_BYTES {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        Ok(request)
    }

    fn flags(&self) -> u32 {
        // SAFETY: all of the union is initialised, and each value is one of these numbers.
        u32::from(unsafe { self.value.flags } as u16)
    }
}

// What pieces are is what the system takes.
const _: () = assert!(size_of::<libc::iovec>() == size_of::<[usize; 2]>());
const _: () = assert!(std::mem::offset_of!(libc::iovec, iov_len) == size_of::<usize>());

/// Reads into memory, piece by piece, as readv(2) does.
///
/// # Errors
/// As readv(2); EINVAL for more than 1024 pieces.
pub(super) fn read_pieces(fd: BorrowedFd<'_>, pieces: Pieces<'_>) -> io::Result<usize> {
    let vector = pieces.vector();
    let (pointer, count) = (vector.as_ptr().cast(), vector.len() as c_int);
    // SAFETY: the pieces are memory that may be written to as long as they are borrowed. Others may
    // change it meanwhile, so nobody has references to it.
    moved(|| unsafe { libc::readv(fd.as_raw_fd(), pointer, count) })
}

/// Writes memory, piece by piece, as writev(2) does.
///
/// # Errors
/// As writev(2); EINVAL for more than 1024 pieces.
pub(super) fn write_pieces(fd: BorrowedFd<'_>, pieces: Pieces<'_>) -> io::Result<usize> {
    let vector = pieces.vector();
    let (pointer, count) = (vector.as_ptr().cast(), vector.len() as c_int);
    // SAFETY: the pieces are memory that may be read as long as they are borrowed.
    moved(|| unsafe { libc::writev(fd.as_raw_fd(), pointer, count) })
}

/// The bytes that a call moved, which is made again where a signal came between.
fn moved(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    uninterrupted(|| usize::try_from(call()).map_err(|_| io::Error::last_os_error()))
}

/// Writes `head` and then memory, piece by piece, as writev(2) does.
///
/// # Errors
/// As writev(2); EINVAL for more than 1024 pieces.
pub(super) fn write_from<'a>(
    fd: BorrowedFd<'_>,
    head: &[u8],
    pieces: impl Iterator<Item = VolatileSlice<'a>>,
) -> io::Result<usize> {
    let head = [head.as_ptr() as usize, head.len()];
    let pieces = pieces.map(|piece| [piece.ptr_guard_mut().as_ptr() as usize, piece.len()]);
    let vector: Vec<[usize; 2]> = std::iter::once(head).chain(pieces).collect();
    let (pointer, count) = (vector.as_ptr().cast(), vector.len() as c_int);
    // SAFETY: the head is borrowed, and the pieces are memory that may be read as long as `'a` lasts.
    moved(|| unsafe { libc::writev(fd.as_raw_fd(), pointer, count) })
}

/// Makes `tun` a queue of the interface `name`, with the flags IFF_... of TUNSETIFF.
///
/// # Errors
/// What the kernel says (drivers/net/tun.c: tun_set_iff).
pub(super) fn set_interface(tun: &OwnedFd, name: &str, flags: c_int) -> io::Result<()> {
    let mut request = Request::new(name)?;
    request.value.flags = flags as i16;
    // SAFETY: TUNSETIFF reads and writes a struct ifreq.
    done(|| unsafe { ioctl_with_mut_ref(tun, TUNSETIFF, &mut request) })
}

/// The name of a TAP's interface, and its flags IFF_... .
///
/// # Errors
/// ENOTTY and the like where it is no TAP; EBADFD where the interface is gone.
pub(super) fn interface(tun: &OwnedFd) -> io::Result<(String, u32)> {
    let mut request = Request::new("")?;
    // SAFETY: TUNGETIFF writes a struct ifreq.
    done(|| unsafe { ioctl_with_mut_ref(tun, TUNGETIFF, &mut request) })?;
    let name = request.name.split(|byte| *byte == 0).next();
    let name = String::from_utf8_lossy(name.unwrap_or_default());
    Ok((name.into_owned(), request.flags()))
}

/// Has each frame begin with a header of so many bytes.
///
/// # Errors
/// What the kernel says.
pub(super) fn set_header_size(tun: &OwnedFd, bytes: usize) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads an int.
    done(|| unsafe { ioctl_with_ref(tun, TUNSETVNETHDRSZ, &(bytes as c_int)) })
}

/// Says which work (TUN_F_...) may be left to the reader of a TAP's frames.
///
/// # Errors
/// EINVAL where the kernel does not know one of the bits.
pub(super) fn set_offload(tun: &OwnedFd, offload: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes a number.
    done(|| unsafe { ioctl_with_val(tun, TUNSETOFFLOAD, c_ulong::from(offload)) })
}

/// Puts a queue of a TAP into use or takes it out.
///
/// # Errors
/// EINVAL where it is so already, or the TAP has one queue only.
pub(super) fn set_queue(tun: &OwnedFd, used: bool) -> io::Result<()> {
    let mut request = Request::new("")?;
    request.value.flags = match used {
        true => libc::IFF_ATTACH_QUEUE,
        false => libc::IFF_DETACH_QUEUE,
    } as i16;
    // SAFETY: TUNSETQUEUE reads a struct ifreq.
    done(|| unsafe { ioctl_with_ref(tun, TUNSETQUEUE, &request) })
}

/// The MTU of an interface in bytes. `socket` is any socket, in whose namespace it is looked for.
///
/// # Errors
/// ENODEV where it is not there.
pub(super) fn mtu(socket: &OwnedFd, name: &str) -> io::Result<u32> {
    let mut request = Request::new(name)?;
    // SAFETY: SIOCGIFMTU reads and writes a struct ifreq.
    done(|| unsafe { ioctl_with_mut_ref(socket, SIOCGIFMTU, &mut request) })?;
    // SAFETY: all of the union is initialised, and each value is one of these numbers.
    let mtu = unsafe { request.value.number };
    Ok(u32::try_from(mtu).unwrap_or_default())
}

/// The flags IFF_... of an interface, such as IFF_UP. `socket` as for [`mtu`].
///
/// # Errors
/// ENODEV where it is not there.
pub(super) fn flags(socket: &OwnedFd, name: &str) -> io::Result<u32> {
    let mut request = Request::new(name)?;
    // SAFETY: SIOCGIFFLAGS reads and writes a struct ifreq.
    done(|| unsafe { ioctl_with_mut_ref(socket, SIOCGIFFLAGS, &mut request) })?;
    Ok(request.flags())
}

/// A descriptor that this process was started with, as one of ours. Programs that we start do not
/// get it.
///
/// # Errors
/// EBADF where it is not open.
pub(super) fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: it is not -1, and used for two system calls only, which say so if it is not open.
    let theirs = unsafe { BorrowedFd::borrow_raw(number.max(0)) };
    let ours = rustix::io::fcntl_dupfd_cloexec(theirs, 3)?;
    rustix::io::fcntl_setfd(theirs, FdFlags::CLOEXEC)?;
    Ok(ours)
}

/// What an ioctl returns, as a result. Those of a TAP wait for the lock of all interfaces.
fn done(mut call: impl FnMut() -> c_int) -> io::Result<()> {
    uninterrupted(|| match call() {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn structures_and_requests_are_the_kernels() {
        assert_eq!(size_of::<Request>(), size_of::<libc::c_long>() * 5);
        assert_eq!(TUNSETIFF, 0x4004_54ca);
        assert_eq!(TUNGETIFF, 0x8004_54d2);
        assert_eq!(TUNSETQUEUE, 0x4004_54d9);
    }

    #[test]
    fn memory_is_written_in_pieces_of_any_number() {
        for size in [1, 47, 500] {
            let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
            let mut source: Vec<u8> = (0..size * 3).map(|index| index as u8).collect();
            let expected = [b"head", &source[..]].concat();
            let pieces = source.chunks_mut(3).map(VolatileSlice::from);
            let written = write_from(writer.as_fd(), b"head", pieces).expect("room");
            assert_eq!(written, 4 + size * 3);
            let mut target = vec![0; 4 + size * 3];
            let read = rustix::io::read(&reader, &mut target).expect("bytes");
            assert_eq!(read, written);
            assert_eq!(target, expected);
        }
    }

    #[test]
    fn an_inherited_descriptor_is_ours_and_not_our_childrens() {
        let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
        let ours = inherited(writer.as_raw_fd()).expect("it is open");
        for descriptor in [&ours, &writer] {
            let flags = rustix::io::fcntl_getfd(descriptor).expect("flags");
            assert!(flags.contains(FdFlags::CLOEXEC));
        }
        drop(writer);
        rustix::io::write(&ours, b"x").expect("room");
        let mut byte = [0];
        assert_eq!(rustix::io::read(&reader, &mut byte), Ok(1));
        let closed = inherited(1_000_000).expect_err("not open");
        assert_eq!(closed.raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn what_is_no_tap_says_so() {
        let (reader, _writer) = rustix::pipe::pipe().expect("a pipe");
        assert!(interface(&reader).is_err());
        assert!(set_interface(&reader, "a name that is too long", 0).is_err());
    }
}
