//! The ioctl requests that threads may make: type and number of each, its lower 16 bits. The upper
//! ones have the direction and the size, which differ between architectures.

/// A request: its name, type and number.
pub type Request = (&'static str, u16);

/// The request that runs a vCPU.
pub(super) const RUN: u16 = 0xae80;

/// What a vCPU's thread asks of its vCPU, and of its machine for devices that start and stop there and for
/// registers that the guest reads without an exit for a while
/// (include/uapi/linux/kvm.h).
pub(super) const VCPU: &[Request] = &[
    ("KVM_RUN", RUN),
    ("KVM_SET_USER_MEMORY_REGION", 0xae46),
    ("KVM_IRQ_LINE", 0xae61),
    ("KVM_REGISTER_COALESCED_MMIO", 0xae67),
    ("KVM_UNREGISTER_COALESCED_MMIO", 0xae68),
    ("KVM_IRQFD", 0xae76),
];

/// What making another machine takes, after a reset.
pub(super) const MACHINE: &[Request] = &[
    ("KVM_CREATE_VM", 0xae01),
    ("KVM_CHECK_EXTENSION", 0xae03),
    ("KVM_GET_VCPU_MMAP_SIZE", 0xae04),
    ("KVM_CREATE_VCPU", 0xae41),
    ("KVM_SET_GSI_ROUTING", 0xae6a),
    ("KVM_IOEVENTFD", 0xae79),
    ("KVM_ENABLE_CAP", 0xaea3),
    ("KVM_GET_STATS_FD", 0xaece),
    ("KVM_CREATE_DEVICE", 0xaee0),
    ("KVM_SET_DEVICE_ATTR", 0xaee1),
];

/// What a driver has a vCPU's thread change when it sets up a PCI function.
pub(super) const PCI: &[Request] = &[("KVM_SET_GSI_ROUTING", 0xae6a), ("KVM_IOEVENTFD", 0xae79)];

/// Terminal modes, which are restored by whatever thread ends armlet (include/uapi/asm-generic/ioctls.h).
/// TIOCSTI, which types on the terminal, is not here.
pub(super) const TERMINAL: &[Request] = &[
    ("TCGETS", 0x5401),
    ("TCSETS", 0x5402),
    ("TIOCGPGRP", 0x540f),
    ("TIOCGWINSZ", 0x5413),
    ("TCGETS2", 0x542a),
    ("TCSETS2", 0x542b),
];

/// Sockets, and pipes in glibc's standard library.
pub(super) const SOCKETS: &[Request] = &[("FIONBIO", 0x5421)];

/// A TAP, not TUNSETIFF, which opens another (include/uapi/linux/if_tun.h, sockios.h).
pub(super) const TAP: &[Request] = &[
    ("TUNSETOFFLOAD", 0x54d0),
    ("TUNGETIFF", 0x54d2),
    ("TUNSETVNETHDRSZ", 0x54d8),
    ("TUNSETQUEUE", 0x54d9),
    ("SIOCGIFFLAGS", 0x8913),
    ("SIOCGIFMTU", 0x8921),
];

/// Block devices (include/uapi/linux/fs.h).
pub(super) const BLOCK: &[Request] = &[("BLKDISCARD", 0x1277)];

/// vhost (include/uapi/linux/vhost.h).
pub(super) const VHOST: &[Request] = &[
    ("VHOST_GET_FEATURES", 0xaf00),
    ("VHOST_SET_OWNER", 0xaf01),
    ("VHOST_RESET_OWNER", 0xaf02),
    ("VHOST_SET_MEM_TABLE", 0xaf03),
    ("VHOST_SET_VRING_NUM", 0xaf10),
    ("VHOST_SET_VRING_ADDR", 0xaf11),
    ("VHOST_SET_VRING_BASE", 0xaf12),
    ("VHOST_SET_VRING_KICK", 0xaf20),
    ("VHOST_SET_VRING_CALL", 0xaf21),
    ("VHOST_SET_VRING_ERR", 0xaf22),
    ("VHOST_SET_BACKEND_FEATURES", 0xaf25),
    ("VHOST_GET_BACKEND_FEATURES", 0xaf26),
    ("VHOST_NET_SET_BACKEND", 0xaf30),
    ("VHOST_VSOCK_SET_GUEST_CID", 0xaf60),
    ("VHOST_VSOCK_SET_RUNNING", 0xaf61),
];

/// All of them, but for those of one architecture.
pub(super) const ALL: &[&[Request]] = &[VCPU, MACHINE, TERMINAL, SOCKETS, TAP, BLOCK, VHOST];
