//! Devices whose rings another process works on, by the vhost-user protocol (QEMU's
//! docs/interop/vhost-user.rst): the frontend's side, with what devices need that keep no state.
//!
//! The other process is not trusted to answer: answers are bounded in size and checked, and all of
//! a conversation has one deadline.

use crate::pages::is_persistent;
use anyhow::{Context, Result, anyhow, bail};
use armlet_devices::virtio::Virtqueue;
use armlet_system::deadline::Deadline;
use armlet_system::eintr::uninterrupted;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// VHOST_USER_F_PROTOCOL_FEATURES, a feature bit of the connection and not of the device.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VHOST_USER_PROTOCOL_F_MQ: the other process says how many queues it can work on.
const PROTOCOL_MQ: u64 = 1 << 0;
/// VHOST_USER_PROTOCOL_F_REPLY_ACK: it says whether it did what it was asked to.
const PROTOCOL_REPLY_ACK: u64 = 1 << 3;

/// Bits of a message's flags: the version of the protocol, an answer, an answer wanted.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// Bytes of a message's header.
const HEADER: usize = 12;
/// The most regions of memory that one message can tell of.
const MOST_REGIONS: usize = 8;

/// VHOST_USER_*: what is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    SetMemTable = 5,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
}

/// A connection to the process that does a device's work.
#[derive(Debug)]
pub struct VhostUser {
    socket: UnixStream,
    features: u64,
    protocol: u64,
    queues: u64,
}

impl VhostUser {
    /// Performs the handshake with the process at the other end of `socket`, which has until
    /// `deadline` for all of it.
    ///
    /// # Errors
    /// A process that ends, does not answer in time, or answers what makes no sense.
    pub fn connect(socket: UnixStream, deadline: Deadline) -> Result<VhostUser> {
        socket.set_nonblocking(true)?;
        let mut this = VhostUser {
            socket,
            features: 0,
            protocol: 0,
            queues: 1,
        };
        this.features = this.get(Request::GetFeatures, deadline)?;
        if this.features & PROTOCOL_FEATURES != 0 {
            let offered = this.get(Request::GetProtocolFeatures, deadline)?;
            let protocol = offered & (PROTOCOL_MQ | PROTOCOL_REPLY_ACK);
            this.set_number(Request::SetProtocolFeatures, protocol, deadline)?;
            this.protocol = protocol;
        }
        if this.protocol & PROTOCOL_MQ != 0 {
            this.queues = this.get(Request::GetQueueNum, deadline)?;
        }
        this.set(Request::SetOwner, &[], &[], deadline)?;
        Ok(this)
    }

    /// The virtio features that the other process can work with.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features & !PROTOCOL_FEATURES
    }

    /// The most queues that it can work on, as far as it says.
    #[must_use]
    pub fn queues(&self) -> u64 {
        self.queues
    }

    /// The descriptor that is ready to be read when [`Self::is_alive`] may have changed.
    #[must_use]
    pub fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Whether the other process still holds its end. It says nothing that it was not asked; one
    /// that does is as good as gone.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let heard = uninterrupted(|| recv(&self.socket, &mut [0_u8], flags));
        heard == Err(Errno::AGAIN)
    }

    /// Has the other process work in `memory`, on these queues with the negotiated `features`;
    /// each queue with the descriptor that interrupts the guest. It has until `deadline` for all of
    /// it.
    ///
    /// # Errors
    /// Memory that is not in files; what the other process refuses, or does not do in time.
    pub fn start(
        &self,
        features: u64,
        memory: &GuestMemoryMmap,
        queues: &[(&Virtqueue, &EventFd)],
        deadline: Deadline,
    ) -> Result<()> {
        // The bit of the connection is negotiated by being set here.
        let features = features | self.features & PROTOCOL_FEATURES;
        self.set_number(Request::SetFeatures, features, deadline)?;
        self.set_memory(memory, deadline)?;
        self.set_rings(queues, deadline)
    }

    /// Has the other process let go of the queues of these indexes and keep what it knows of the
    /// guest; it is out of guest memory when this returns. Returns which request of each it would
    /// have taken next.
    ///
    /// # Errors
    /// As of [`Self::start`].
    pub fn pause(&self, queues: &[u16], deadline: Deadline) -> Result<Vec<u16>> {
        let pause = |index: &u16| {
            let mut payload = Payload::default();
            payload.u32(u32::from(*index)).u32(0);
            let request = Request::GetVringBase;
            self.send(request, VERSION, &payload.0, &[], deadline)?;
            // struct vhost_vring_state: the index, and the number behind it.
            let state = self.answer(request, deadline)?;
            let (about, base) = (state as u32, (state >> 32) as u32);
            match u16::try_from(base) {
                Ok(base) if about == u32::from(*index) => Ok(base),
                _ => bail!("it answers {request:?} of queue {index} with {base} of queue {about}"),
            }
        };
        queues.iter().map(pause).collect()
    }

    /// Has the other process go on with queues that it let go of, each from where it stands.
    ///
    /// # Errors
    /// As of [`Self::start`].
    pub fn resume(&self, queues: &[(&Virtqueue, &EventFd)], deadline: Deadline) -> Result<()> {
        self.set_rings(queues, deadline)
    }

    fn set_rings(&self, queues: &[(&Virtqueue, &EventFd)], deadline: Deadline) -> Result<()> {
        for ((queue, call), index) in queues.iter().zip(0..) {
            self.set_ring(index, queue, call, deadline)?;
        }
        if self.features & PROTOCOL_FEATURES != 0 {
            for (_, index) in queues.iter().zip(0..) {
                self.set_state(Request::SetVringEnable, index, 1, deadline)?;
            }
        }
        Ok(())
    }

    /// Ends the connection: the other process sees it, and what it waits for here never comes.
    pub fn hang_up(&self) {
        // An error means that there is no connection any more.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn set_memory(&self, memory: &GuestMemoryMmap, deadline: Deadline) -> Result<()> {
        let regions = shared_regions(memory)?;
        let count = regions.len();
        let mut payload = Payload::default();
        payload.u32(count as u32).u32(0);
        let mut files = Vec::new();
        for region in regions {
            let start = region.start_addr().0;
            let file = region.file_offset();
            let file = file.with_context(|| {
                format!("guest memory at {start:#x} is in no file that another process could map")
            })?;
            payload.u64(start).u64(region.len());
            // "User addresses" only tell where the rings lie: the guest's do, and ours stay ours.
            payload.u64(start).u64(file.start());
            files.push(file.file().as_raw_fd());
        }
        self.set(Request::SetMemTable, &payload.0, &files, deadline)
    }

    fn set_ring(
        &self,
        index: u32,
        queue: &Virtqueue,
        call: &EventFd,
        deadline: Deadline,
    ) -> Result<()> {
        let size = u32::from(queue.size());
        self.set_state(Request::SetVringNum, index, size, deadline)?;
        let base = u32::from(queue.next_available());
        self.set_state(Request::SetVringBase, index, base, deadline)?;
        let addresses = queue.addresses();
        let mut payload = Payload::default();
        payload.u32(index).u32(0);
        payload.u64(addresses.descriptors).u64(addresses.used);
        payload.u64(addresses.available).u64(0);
        self.set(Request::SetVringAddr, &payload.0, &[], deadline)?;
        // The kick comes last: a ring that has one works.
        for (request, fd) in [
            (Request::SetVringCall, call),
            (Request::SetVringKick, &**queue.kick()),
        ] {
            let mut payload = Payload::default();
            payload.u64(u64::from(index));
            self.set(request, &payload.0, &[fd.as_raw_fd()], deadline)?;
        }
        Ok(())
    }

    fn set_state(
        &self,
        request: Request,
        index: u32,
        value: u32,
        deadline: Deadline,
    ) -> Result<()> {
        let mut payload = Payload::default();
        payload.u32(index).u32(value);
        self.set(request, &payload.0, &[], deadline)
    }

    fn set_number(&self, request: Request, value: u64, deadline: Deadline) -> Result<()> {
        self.set(request, &value.to_le_bytes(), &[], deadline)
    }

    /// Asks for something, and has it confirmed where the other process does that.
    fn set(
        &self,
        request: Request,
        payload: &[u8],
        files: &[RawFd],
        deadline: Deadline,
    ) -> Result<()> {
        let confirms = self.protocol & PROTOCOL_REPLY_ACK != 0;
        let flags = VERSION | if confirms { NEED_REPLY } else { 0 };
        self.send(request, flags, payload, files, deadline)?;
        match confirms
            .then(|| self.answer(request, deadline))
            .transpose()?
        {
            None | Some(0) => Ok(()),
            Some(error) => bail!("it refuses {request:?} with {error}"),
        }
    }

    /// Asks for a number.
    fn get(&self, request: Request, deadline: Deadline) -> Result<u64> {
        self.send(request, VERSION, &[], &[], deadline)?;
        self.answer(request, deadline)
    }

    fn send(
        &self,
        request: Request,
        flags: u32,
        payload: &[u8],
        files: &[RawFd],
        deadline: Deadline,
    ) -> Result<()> {
        let mut message = Payload::default();
        message.u32(request as u32).u32(flags);
        message.u32(payload.len() as u32).0.extend(payload);
        loop {
            match uninterrupted(|| self.socket.send_with_fds(&[&*message.0], files)) {
                Ok(sent) if sent == message.0.len() => return Ok(()),
                Ok(_) => bail!("it takes no more messages, at {request:?}"),
                Err(error) => match Errno::from_raw_os_error(error.errno()) {
                    Errno::AGAIN => self.wait(PollFlags::OUT, request, deadline)?,
                    error => return Err(explain(error, request)),
                },
            }
        }
    }

    /// Reads the answer to a request: all that are asked for here are numbers of 64 bits.
    fn answer(&self, request: Request, deadline: Deadline) -> Result<u64> {
        let mut answer = [0; HEADER + 8];
        // What comes is read to its header first: one that is too short has no more.
        let (header, number) = answer.split_at_mut(HEADER);
        self.read(header, request, deadline)?;
        let mut words = header.chunks_exact(4).map(|word| {
            let word = word.first_chunk().expect("a word of the header");
            u32::from_le_bytes(*word)
        });
        let words = [(); 3].map(|()| words.next().unwrap_or_default());
        let wanted = [request as u32, VERSION | REPLY, 8];
        if [words[0], words[1] & (VERSION | REPLY | 2), words[2]] != wanted {
            bail!(
                "it answers {request:?} with message {} of {} bytes and flags {:#x}",
                words[0],
                words[2],
                words[1]
            );
        }
        self.read(number, request, deadline)?;
        let number = number.first_chunk().expect("8 bytes");
        Ok(u64::from_le_bytes(*number))
    }

    fn read(&self, mut rest: &mut [u8], request: Request, deadline: Deadline) -> Result<()> {
        while !rest.is_empty() {
            match uninterrupted(|| recv(&self.socket, &mut *rest, RecvFlags::empty())) {
                Ok((0, _)) => return Err(hung_up(request)),
                Ok((count, _)) => rest = &mut rest[count..],
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, request, deadline)?,
                Err(error) => return Err(explain(error, request)),
            }
        }
        Ok(())
    }

    fn wait(&self, events: PollFlags, request: Request, deadline: Deadline) -> Result<()> {
        match deadline.wait(&self.socket, events) {
            Ok(true) => Ok(()),
            Ok(false) => Err(anyhow!(
                "it does not answer {request:?} within {} ms",
                deadline.patience().as_millis()
            )),
            Err(error) => Err(explain(error, request)),
        }
    }
}

fn explain(error: Errno, request: Request) -> anyhow::Error {
    match error {
        Errno::PIPE | Errno::CONNRESET => hung_up(request),
        _ => anyhow::Error::new(error).context(format!("{request:?}")),
    }
}

fn hung_up(request: Request) -> anyhow::Error {
    anyhow!("it hung up at {request:?}")
}

/// A message as it grows.
#[derive(Default)]
struct Payload(Vec<u8>);

impl Payload {
    fn u32(&mut self, value: u32) -> &mut Payload {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Payload {
        self.0.extend(value.to_le_bytes());
        self
    }
}

/// The parts of guest memory that another process gets: RAM, and persistent memory as far as there
/// are places for it. What is for reading only could not be mapped there, as all is mapped for
/// writing.
///
/// # Errors
/// More banks of RAM than there are places.
fn shared_regions(memory: &GuestMemoryMmap) -> Result<Vec<&GuestRegionMmap>> {
    let is_writable = |region: &&GuestRegionMmap| region.prot() & libc::PROT_WRITE != 0;
    let regions = memory.iter().filter(is_writable);
    let (persistent, mut shared): (Vec<_>, Vec<_>) =
        regions.partition(|region| is_persistent(region));
    let banks = shared.len();
    if banks > MOST_REGIONS {
        bail!("guest memory has {banks} banks, and vhost-user takes {MOST_REGIONS}");
    }
    for region in persistent {
        match shared.len() < MOST_REGIONS {
            true => shared.push(region),
            false => log::warn!(
                "a vhost-user daemon takes {MOST_REGIONS} pieces of guest memory: it cannot read or write persistent memory at {:#x}",
                region.start_addr().0
            ),
        }
    }
    Ok(shared)
}

#[cfg(test)]
mod tests;
