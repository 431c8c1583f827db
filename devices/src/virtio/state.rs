//! What devices have of their own beside their queues: plain data, by which another device goes on.

use super::vsock::packet::HEADER;
use crate::persist::RestoreError;

/// What a device has of its own beside its queues: plain data, by which another device goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// Nothing.
    Plain,
    /// A memory balloon's.
    Balloon(Box<BalloonState>),
    /// A disk's.
    Block(BlockState),
    /// A console's.
    Console(ConsoleState),
    /// A file system's.
    Fs(FsState),
    /// A network card's.
    Net(NetState),
    /// A socket device's.
    Vsock(VsockState),
}

impl RestoreError {
    /// The state is that of another kind of device.
    #[must_use]
    pub fn kind(state: &DeviceState) -> RestoreError {
        let kind = match state {
            DeviceState::Plain => "a device without one",
            DeviceState::Balloon(_) => "a balloon",
            DeviceState::Block(_) => "a disk",
            DeviceState::Console(_) => "a console",
            DeviceState::Fs(_) => "a shared folder",
            DeviceState::Net(_) => "a network card",
            DeviceState::Vsock(_) => "a socket device",
        };
        RestoreError(format!("the state is that of {kind}"))
    }
}

/// What a balloon has of its own beside its queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalloonState {
    /// Its configuration: the pages that it should hold and holds, the command of hinting, and what
    /// free pages are filled with.
    pub target: u32,
    /// As [`Self::target`].
    pub actual: u32,
    /// As [`Self::target`].
    pub command: u32,
    /// As [`Self::target`].
    pub poison: u32,
    /// What the guest last said of its memory.
    pub statistics: Option<Statistics>,
    /// What it said of free pages.
    pub hints: Hints,
    /// The command of the last round of hints.
    pub round: u32,
    /// Whether the guest takes part in it.
    pub hinting: bool,
    /// Pages of 4 KiB in the balloon, where the host's are larger: by bank of memory its address,
    /// and a bit for each page.
    pub inside: Option<Vec<(u64, Vec<u64>)>>,
}

/// What the guest last said of its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics(pub(super) [Option<u64>; STATISTICS.len()]);

/// By tag (section 5.5.6.4, and include/uapi/linux/virtio_balloon.h from 10 on): bytes, or counts
/// where the name is of events.
const STATISTICS: [&str; 16] = [
    "swapped-in",
    "swapped-out",
    "major-faults",
    "minor-faults",
    "free",
    "total",
    "available",
    "disk-caches",
    "hugetlb-allocations",
    "hugetlb-failures",
    "oom-kills",
    "allocation-stalls",
    "async-scanned",
    "direct-scanned",
    "async-reclaimed",
    "direct-reclaimed",
];

impl Statistics {
    /// The statistics that the guest gave, by name: "free", "available".
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let named = STATISTICS.into_iter().zip(self.0);
        named.filter_map(|(name, value)| value.map(|value| (name, value)))
    }
}

/// Pages that the guest said were free, after a call of [`Balloon::ask_for_hints`](super::balloon::Balloon::ask_for_hints).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Guest-physical address and bytes of each range, in the order of their coming. What of it
    /// was written since the call is in use.
    pub ranges: Vec<(u64, u64)>,
    /// Bytes of all hints, those of the ranges that were too many to keep among them.
    pub bytes: u64,
    /// Whether the guest has said all.
    pub complete: bool,
}

/// What a disk has of its own beside its queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockState {
    /// Its size in bytes, in whole sectors.
    pub capacity: u64,
    /// Whether a write may be done before it reached stable storage.
    pub writeback: bool,
}

/// What a console has of its own beside its queues.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsoleState {
    /// Emergency characters for which there was no room.
    pub late: Vec<u8>,
    /// Bytes of the next request for output that were written already.
    pub sent: usize,
    /// Whether a driver has the console in use.
    pub in_use: bool,
}

/// What a file system device has of its own beside its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FsState {
    /// Who answers the driver's requests, where one uses the device.
    pub served: Option<Served>,
}

/// Who answers requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// The server.
    Well,
    /// This device, with errors, as the server ended.
    Alone,
    /// Nobody yet: the driver had stopped all queues and has not set up all of them again.
    Later,
}

/// What a network card has of its own beside its queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetState {
    /// The MAC address that the driver sees.
    pub mac: [u8; 6],
    /// What the driver asked for, where one uses the card.
    pub session: Option<NetSession>,
    /// Frames that came and wait for the driver's buffers, with virtio's header: at most one a pair
    /// of queues, by the pair's number.
    pub frames: Vec<(u16, Vec<u8>)>,
}

/// What a driver asked a card for by the control queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetSession {
    /// Pairs of queues in use.
    pub pairs: u16,
    /// Of the offloads that the driver agreed to take ([`GUEST_OFFLOADS`](super::net::feature::GUEST_OFFLOADS)), those that it
    /// wants now.
    pub offloads: u64,
}

/// What a socket device has of its own beside its queues. Connections are not among it: their ends
/// are those of this host's processes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VsockState {
    /// Whether a driver has the device in use.
    pub in_use: bool,
    /// Whether there were connections, or the guest has not heard of the end of earlier ones.
    pub had_connections: bool,
    /// Packets without data for which the guest had no buffers, as they stand in one: that there is
    /// no such connection.
    pub packets: Vec<[u8; HEADER]>,
}
