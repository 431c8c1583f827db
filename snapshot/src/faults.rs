//! Guest memory whose pages another process gives, at the guest's first access to each: a handler of page
//! faults, as those made for Firecracker.
//!
//! The handler listens at a Unix socket. It gets a userfaultfd (userfaultfd(2)) in which the guest's memory is
//! registered, and in the same message a JSON list of the banks: their addresses in this process, sizes,
//! offsets in the memory file, and pages. From then on it serves faults, and is told of memory that is given
//! back to the host (UFFD_EVENT_REMOVE), which is zero at the next access.

use anyhow::{Context, Result, bail, ensure};
use armlet_system::eintr::uninterrupted;
use armlet_system::sockets::connect_at_once;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{PidfdFlags, pidfd_open};
use std::ffi::c_void;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The group of a userfaultfd's ioctls (include/uapi/linux/userfaultfd.h), and the version of its interface.
const GROUP: u8 = 0xaa;
const VERSION: u64 = 0xaa;
/// Says when memory is given back to the host.
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// Faults on pages that are missing are served.
const MODE_MISSING: u64 = 1 << 0;
/// What a handler does with a range: give it a page.
const CAN_COPY: u64 = 1 << 3;

/// struct uffdio_api.
#[repr(C)]
struct Api {
    version: u64,
    features: u64,
    ioctls: u64,
}

/// struct uffdio_register.
#[repr(C)]
struct Register {
    start: u64,
    size: u64,
    mode: u64,
    ioctls: u64,
}

const API: Opcode = opcode::read_write::<Api>(GROUP, 0x3f);
const REGISTER: Opcode = opcode::read_write::<Register>(GROUP, 0x00);

/// A bank of memory that a handler fills. Nobody has used it yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its address in this process.
    pub address: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Where its content begins in the memory file.
    pub offset: u64,
    /// The size of its pages.
    pub page_size: u64,
}

/// A process that gives the pages of guest memory. It is to be kept for as long as the memory is used: once
/// nobody has the userfaultfd any more, pages that were never given read as zeros, and a guest is better
/// off waiting for a handler that is gone.
#[derive(Debug)]
pub struct Handler {
    _faults: OwnedFd,
    socket: UnixStream,
    /// Its process, as far as that is known.
    process: Option<OwnedFd>,
}

impl Handler {
    /// Connects to the handler at a socket, and has it fill these banks: anonymous memory of this
    /// process that has no pages yet, or shared memory that has none in its file.
    ///
    /// # Errors
    /// Nobody at the socket; a kernel or a user without userfaultfd, with what would help; other memory.
    pub fn ask(socket: &Path, mappings: &[Mapping]) -> Result<Handler> {
        let shown = || socket.display().to_string();
        let stream = connect_at_once(socket).with_context(|| {
            format!(
                "{}: cannot connect to the handler of page faults; start it first",
                shown()
            )
        })?;
        let faults = open()?;
        let mut api = Api {
            version: VERSION,
            features: FEATURE_EVENT_REMOVE,
            ioctls: 0,
        };
        // SAFETY: the ioctl reads and writes the structure that its number is for.
        uninterrupted(|| unsafe { ioctl(&faults, Updater::<API, Api>::new(&mut api)) })
            .context("this kernel's userfaultfd does not tell of memory that is given back")?;
        for mapping in mappings {
            register(&faults, mapping)?;
        }
        send(&stream, mappings, &faults).with_context(shown)?;
        Ok(Handler {
            process: process(&stream),
            _faults: faults,
            socket: stream,
        })
    }

    /// Waits until the handler has ended. One that closes its connection and lives on has not: what it serves
    /// is the userfaultfd.
    ///
    /// # Errors
    /// A failed wait.
    pub fn wait_for_end(&self) -> Result<()> {
        wait(&self.socket, PollFlags::RDHUP)?;
        match &self.process {
            Some(process) => wait(process, PollFlags::IN),
            None => Ok(()),
        }
    }
}

/// Waits for an event.
fn wait(what: &impl AsFd, event: PollFlags) -> Result<()> {
    let polled = uninterrupted(|| poll(&mut [PollFd::new(what, event)], None));
    polled.context("cannot wait for the handler of page faults")?;
    Ok(())
}

/// Opens the process that listens at a socket; `None` where it is not known, or has others listen in its place, as
/// the first process of a system does.
fn process(stream: &UnixStream) -> Option<OwnedFd> {
    let listener = socket_peercred(stream).ok()?.pid;
    match listener.is_init() || listener.as_raw_pid() == 0 {
        true => None,
        false => pidfd_open(listener, PidfdFlags::empty()).ok(),
    }
}

/// Opens a userfaultfd that serves faults of the kernel too: those of KVM.
fn open() -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let device = uninterrupted(|| openat(CWD, "/dev/userfaultfd", flags, Mode::empty()));
    let opened = match device {
        // SAFETY: the ioctl takes flags, and no memory of this process.
        Ok(device) => unsafe { ioctl(device, New) },
        // SAFETY: the descriptor goes to the handler that the user names, to fill the memory that is
        // registered, and no other.
        Err(_) => unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) },
    };
    opened.map_err(|error| match error {
        Errno::PERM => anyhow::anyhow!(
            "this user may not handle page faults of KVM; give access to /dev/userfaultfd, or set sysctl vm.unprivileged_userfaultfd=1"
        ),
        Errno::NOSYS => anyhow::anyhow!("this kernel has no userfaultfd (CONFIG_USERFAULTFD)"),
        error => anyhow::Error::new(error).context("cannot make a userfaultfd"),
    })
}

/// USERFAULTFD_IOC_NEW, which returns a descriptor.
struct New;

// SAFETY: the argument is a number, and what is returned is a descriptor that nobody else has.
unsafe impl Ioctl for New {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(GROUP, 0x00)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        flags.bits() as usize as *mut c_void
    }

    unsafe fn output_from_ptr(made: IoctlOutput, _: *mut c_void) -> Result<OwnedFd, Errno> {
        // SAFETY: it was made by this call.
        Ok(unsafe { OwnedFd::from_raw_fd(made) })
    }
}

fn register(faults: &OwnedFd, mapping: &Mapping) -> Result<()> {
    let mut range = Register {
        start: mapping.address,
        size: mapping.size,
        mode: MODE_MISSING,
        ioctls: 0,
    };
    // SAFETY: the ioctl reads and writes the structure that its number is for. That pages of the range
    // come from the handler is what the caller asks for.
    let registered =
        uninterrupted(|| unsafe { ioctl(faults, Updater::<REGISTER, Register>::new(&mut range)) });
    match registered {
        Err(Errno::INVAL) => bail!(
            "a bank of {} bytes cannot be filled by a handler of page faults: it is not memory without pages yet",
            mapping.size
        ),
        registered => registered.context("cannot register guest memory for page faults")?,
    }
    ensure!(
        range.ioctls & CAN_COPY != 0,
        "this kernel's userfaultfd cannot fill memory of this kind"
    );
    Ok(())
}

/// Sends the list of banks with the userfaultfd, in one message.
fn send(stream: &UnixStream, mappings: &[Mapping], faults: &OwnedFd) -> Result<()> {
    let text = json(mappings);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut with = SendAncillaryBuffer::new(&mut space);
    let descriptors = [faults.as_fd()];
    ensure!(
        with.push(SendAncillaryMessage::ScmRights(&descriptors)),
        "there is no room for the userfaultfd in a message"
    );
    let bytes = [IoSlice::new(text.as_bytes())];
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let sent = uninterrupted(|| sendmsg(stream, &bytes, &mut with, flags));
    let sent = sent.context("cannot send guest memory to the handler of page faults")?;
    ensure!(
        sent == text.len(),
        "the handler of page faults takes no messages of {} bytes",
        text.len()
    );
    Ok(())
}

/// The list as Firecracker writes it: `page_size_kib` has bytes there, too.
fn json(mappings: &[Mapping]) -> String {
    let mappings = mappings.iter().map(|mapping| {
        format!(
            "{{\"base_host_virt_addr\":{},\"size\":{},\"offset\":{},\"page_size\":{page},\"page_size_kib\":{page}}}",
            mapping.address,
            mapping.size,
            mapping.offset,
            page = mapping.page_size
        )
    });
    format!("[{}]", mappings.collect::<Vec<_>>().join(","))
}
