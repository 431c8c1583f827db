//! The devices' own state beside their queues, as plain data from which another device can resume.

use super::vsock::packet::HEADER;
use crate::persist::RestoreError;
use serde::{Deserialize, Serialize};

/// A device's own state beside its queues, as plain data from which another device can resume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Returns the error for a state of another kind of device.
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

/// A balloon's own state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// The fields of its configuration space: target and actual size in pages, the free page
    /// hinting command, and the poison value.
    pub target: u32,
    /// As [`Self::target`].
    pub actual: u32,
    /// As [`Self::target`].
    pub command: u32,
    /// As [`Self::target`].
    pub poison: u32,
    /// The guest's latest memory statistics.
    pub statistics: Option<Statistics>,
    /// The guest's free page hints.
    pub hints: Hints,
    /// The command ID of the latest round of hints.
    pub round: u32,
    /// Whether the guest is taking part in it.
    pub hinting: bool,
    /// The 4 KiB pages in the balloon, where the host's are larger: for each bank of memory its
    /// address and a bitmap of its pages.
    pub inside: Option<Vec<(u64, Vec<u64>)>>,
}

/// The guest's latest memory statistics.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics(pub(super) [Option<u64>; STATISTICS.len()]);

/// The names of statistics by tag (section 5.5.6.4; from 10 on,
/// include/uapi/linux/virtio_balloon.h). Values are bytes, or counts where the name is of events.
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
    /// Returns the statistics that the guest supplied, by name: "free", "available".
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let named = STATISTICS.into_iter().zip(self.0);
        named.filter_map(|(name, value)| value.map(|value| (name, value)))
    }
}

/// The pages that the guest reported free after a call of
/// [`Balloon::ask_for_hints`](super::balloon::Balloon::ask_for_hints).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hints {
    /// The guest-physical address and length in bytes of each range, in the order of arrival. Pages
    /// written since the call are in use.
    pub ranges: Vec<(u64, u64)>,
    /// The bytes of all hints, including ranges that were too many to keep.
    pub bytes: u64,
    /// Whether the round is complete.
    pub complete: bool,
}

/// A disk's own state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Its size in bytes, in whole sectors.
    pub capacity: u64,
    /// Whether a write may complete before it has reached stable storage.
    pub writeback: bool,
}

/// A console's own state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Emergency characters for which there was no room.
    pub late: Vec<u8>,
    /// How many bytes of the next output request were written already.
    pub sent: usize,
    /// Whether a driver uses the console.
    pub in_use: bool,
}

/// A file system device's own state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// Who answers the driver's requests; `None` while no driver uses the device.
    pub served: Option<Served>,
}

/// Who answers requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Served {
    /// The server.
    Well,
    /// This device, with errors, because the server has ended.
    Alone,
    /// Nobody yet: the driver stopped all queues and has not set all of them up again.
    Later,
}

/// A network card's own state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The MAC address that the driver sees.
    pub mac: [u8; 6],
    /// What the driver requested; `None` while no driver uses the card.
    pub session: Option<NetSession>,
    /// Received frames that wait for the driver's buffers, with virtio's header: at most one for
    /// each queue pair, with the pair's number.
    pub frames: Vec<(u16, Vec<u8>)>,
}

/// What a driver requested by the control queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSession {
    /// The number of queue pairs in use.
    pub pairs: u16,
    /// Of the negotiated offloads ([`GUEST_OFFLOADS`](super::net::feature::GUEST_OFFLOADS)), those
    /// that the driver has enabled.
    pub offloads: u64,
}

/// A socket device's own state. It does not include connections, whose other ends belong to
/// processes of this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// Whether a driver uses the device.
    pub in_use: bool,
    /// Whether there were connections, or the guest has not yet been told that earlier ones ended.
    pub had_connections: bool,
    /// Reset packets ("no such connection") for which the guest had no buffers, in wire format.
    #[serde(with = "packets")]
    pub packets: Vec<[u8; HEADER]>,
}

/// Packets as byte strings: serde has no arrays of this length.
mod packets {
    use super::HEADER;
    use serde::de::{Deserializer, Error};
    use serde::{Deserialize, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        packets: &[[u8; HEADER]],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        let packets: Vec<&[u8]> = packets.iter().map(|packet| &packet[..]).collect();
        packets.serialize(to)
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(
        from: D,
    ) -> Result<Vec<[u8; HEADER]>, D::Error> {
        let packets = Vec::<Vec<u8>>::deserialize(from)?.into_iter();
        let packet = |bytes: Vec<u8>| {
            let wrong = |bytes: Vec<u8>| D::Error::invalid_length(bytes.len(), &"44 bytes");
            bytes.try_into().map_err(wrong)
        };
        packets.map(packet).collect()
    }
}
