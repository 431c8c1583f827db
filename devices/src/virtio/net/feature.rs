//! Feature bits of a network card (virtio 1.2, section 5.1.3).

/// The device takes frames whose checksum is to be completed.
pub const CSUM: u64 = 1 << 0;
/// The driver takes frames whose checksum is to be completed.
pub const GUEST_CSUM: u64 = 1 << 1;
/// The driver may change what it takes while it runs.
pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
/// The configuration space has an MTU.
pub const MTU: u64 = 1 << 3;
/// The configuration space has a MAC address.
pub const MAC: u64 = 1 << 5;
/// The driver takes TCP over IPv4 in frames longer than the MTU.
pub const GUEST_TSO4: u64 = 1 << 7;
/// The driver takes TCP over IPv6 in frames longer than the MTU.
pub const GUEST_TSO6: u64 = 1 << 8;
/// The driver takes such frames with congestion marks.
pub const GUEST_ECN: u64 = 1 << 9;
/// The device takes TCP over IPv4 in frames longer than the MTU.
pub const HOST_TSO4: u64 = 1 << 11;
/// The device takes TCP over IPv6 in frames longer than the MTU.
pub const HOST_TSO6: u64 = 1 << 12;
/// The device takes such frames with congestion marks.
pub const HOST_ECN: u64 = 1 << 13;
/// A frame may lie in several receive buffers.
pub const MRG_RXBUF: u64 = 1 << 15;
/// The configuration space says whether the link is up.
pub const STATUS: u64 = 1 << 16;
/// There is a control queue.
pub const CTRL_VQ: u64 = 1 << 17;
/// There may be several pairs of queues.
pub const MQ: u64 = 1 << 22;
/// The driver may set the MAC address by the control queue.
pub const CTRL_MAC_ADDR: u64 = 1 << 23;
/// The driver takes UDP over IPv4 in frames longer than the MTU.
pub const GUEST_USO4: u64 = 1 << 54;
/// The driver takes UDP over IPv6 in frames longer than the MTU.
pub const GUEST_USO6: u64 = 1 << 55;
/// The device takes UDP in frames longer than the MTU.
pub const HOST_USO: u64 = 1 << 56;

/// What the driver takes over from the host.
pub const GUEST_OFFLOADS: u64 =
    GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;
/// What the host takes over from the driver.
pub const HOST_OFFLOADS: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_USO;
