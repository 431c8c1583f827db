//! Why a machine cannot be planned.

use crate::architecture::Architecture;
use crate::range::{Range, Region};

/// Why a machine cannot be planned. Each message gives the numbers and what would work.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A board of another architecture.
    #[error("board '{board}' is for {has} guests; this plan is for {wants}")]
    WrongArchitecture {
        /// The board.
        board: String,
        /// Its architecture.
        has: Architecture,
        /// The plan's.
        wants: Architecture,
    },
    /// No vCPU.
    #[error("0 vCPUs were asked for; use --cpus 1 or more")]
    NoCpus,
    /// More vCPUs than the interrupt controller or the host supports.
    #[error("{asked} vCPUs were asked for; {why}; use --cpus {most} or fewer")]
    TooManyCpus {
        /// Asked for.
        asked: u32,
        /// The most.
        most: u32,
        /// What sets the limit.
        why: String,
    },
    /// No memory.
    #[error("0 bytes of memory were asked for; use --memory 512M, say")]
    NoMemory,
    /// Memory that is not a multiple of the page size.
    #[error(
        "memory of {asked} bytes is not a multiple of 64 KiB; the next that is: --memory {next}"
    )]
    UnalignedMemory {
        /// Bytes asked for.
        asked: u64,
        /// The next valid size, in the form that `--memory` takes.
        next: String,
    },
    /// A bank that is not aligned to 64 KiB.
    #[error(
        "RAM bank {bank} of board '{board}' ({range}) is not aligned to 64 KiB; change its base and size"
    )]
    UnalignedBank {
        /// The board.
        board: String,
        /// The bank, from 0.
        bank: usize,
        /// Where it lies.
        range: Range,
    },
    /// Less memory than the board's fixed-size banks.
    #[error(
        "memory of {asked} is less than the banks of fixed size on board '{board}' take ({fixed}); use --memory {fixed} or more"
    )]
    BanksNotFilled {
        /// The board.
        board: String,
        /// Asked for, as one writes it.
        asked: String,
        /// What the banks take.
        fixed: String,
    },
    /// More memory than the board's banks hold.
    #[error(
        "memory of {asked} is more than the banks of board '{board}' hold ({most}); use --memory {most} or less"
    )]
    BanksFull {
        /// The board.
        board: String,
        /// Asked for, as one writes it.
        asked: String,
        /// What the banks hold.
        most: String,
    },
    /// Persistent memory of a size that guests cannot map.
    #[error("{name} has {size} bytes, which is no multiple of 2 MiB; enlarge its file")]
    UnalignedPmem {
        /// What it is.
        name: String,
        /// Its bytes.
        size: u64,
    },
    /// A range that ends past 2^64.
    #[error(
        "{name} at {start:#x} with {size:#x} bytes ends past 2^64; use less memory or a lower base"
    )]
    Wraps {
        /// What it is.
        name: String,
        /// Its first address.
        start: u64,
        /// Its bytes.
        size: u64,
    },
    /// Memory that ends past 2^64, and so beyond the host's address bits.
    #[error("memory of {asked} does not fit into the {limit} address bits of this host; {advice}")]
    MemoryWraps {
        /// Asked for, as one writes it.
        asked: String,
        /// Bits that the host offers.
        limit: u8,
        /// What would work.
        advice: String,
    },
    /// Two regions that overlap.
    #[error(
        "{} ({}) and {} ({}) overlap on board '{board}'; {advice}",
        a.name, a.range, b.name, b.range
    )]
    Overlap {
        /// The board.
        board: String,
        /// The lower one.
        a: Box<Region>,
        /// The other.
        b: Box<Region>,
        /// What would work.
        advice: String,
    },
    /// Two devices with the same interrupt.
    #[error("{a} and {b} share {line} {spi} on board '{board}'; give each its own")]
    SharedInterrupt {
        /// The board.
        board: String,
        /// What the architecture calls an interrupt ("SPI").
        line: &'static str,
        /// One.
        a: String,
        /// The other.
        b: String,
        /// The SPI.
        spi: u32,
    },
    /// An interrupt number out of range.
    #[error(
        "{name} gets {line} {spi} on board '{board}'; {line}s are numbered 0 to {last}; change the board's file"
    )]
    NoSuchInterrupt {
        /// The board.
        board: String,
        /// What the architecture calls an interrupt ("SPI").
        line: &'static str,
        /// The highest that there is.
        last: u32,
        /// The device.
        name: String,
        /// The SPI.
        spi: u32,
    },
    /// More virtio devices than slots.
    #[error("{asked} virtio devices were asked for; board '{board}' has {slots} slots")]
    NoVirtioSlot {
        /// The board.
        board: String,
        /// Asked for.
        asked: u32,
        /// Slots.
        slots: u32,
    },
    /// More functions than a PCI bus holds.
    #[error(
        "{asked} virtio devices over PCI were asked for; the bus holds {most}; give the others transport=mmio"
    )]
    NoPciSlot {
        /// Asked for.
        asked: u32,
        /// The most.
        most: u32,
    },
    /// No room for PCI below 4 GiB.
    #[error(
        "board '{board}' leaves no {size:#x} bytes below 4 GiB for PCI; use --transport mmio, or less memory"
    )]
    NoRoomForPci {
        /// The board.
        board: String,
        /// Bytes that PCI takes.
        size: u64,
    },
    /// A machine that needs more address bits than the host offers.
    #[error("{name} ends at {last:#x} and needs {need} address bits; this host offers {limit}{only}; {advice}", only = if *fixed { " and no other number" } else { "" })]
    TooWide {
        /// The highest region.
        name: String,
        /// Its last address.
        last: u64,
        /// Bits that it needs.
        need: u8,
        /// Bits that the host offers.
        limit: u8,
        /// Whether the host offers only this width.
        fixed: bool,
        /// What would work.
        advice: String,
    },
    /// Too few `--ipa-bits` for the machine.
    #[error(
        "--ipa-bits {asked} is too few: {name} ends at {last:#x} and needs {need} bits; {advice}"
    )]
    TooNarrow {
        /// Bits asked for.
        asked: u8,
        /// The highest region.
        name: String,
        /// Its last address.
        last: u64,
        /// Bits that it needs.
        need: u8,
        /// What would work.
        advice: String,
    },
    /// An `--ipa-bits` value that the host does not offer.
    #[error("--ipa-bits {asked}: this host offers {offered}; use --ipa-bits fit")]
    WidthNotOffered {
        /// Bits asked for.
        asked: u8,
        /// What the host offers ("32 to 44 bits").
        offered: String,
    },
    /// An interrupt controller that the host does not emulate.
    #[error("{asked} is not offered by this host's KVM, which has {offered}; {advice}")]
    IrqchipNotOffered {
        /// Asked for.
        asked: String,
        /// What the host has.
        offered: String,
        /// What would work.
        advice: String,
    },
    /// A feature that KVM does not offer on this host.
    #[error("{asked} is not offered by this host's KVM, which has {offered}; leave it out")]
    FeatureNotOffered {
        /// Asked for.
        asked: String,
        /// What the host has.
        offered: String,
    },
    /// Performance counters for vCPUs whose cores do not share a PMU.
    #[error("--pmu on: {0}; pin the vCPUs to CPUs of one kind (--pin), or leave it out")]
    NoCounters(String),
    /// A board that lacks what the plan needs.
    #[error("board '{board}' has no {what}; add it to the board's file")]
    BoardLacks {
        /// The board.
        board: String,
        /// What is missing.
        what: &'static str,
    },
    /// A kernel whose page size the host's CPUs lack.
    #[error(
        "the kernel uses {kernel} pages, which this host's CPUs cannot translate for a guest (they offer {offered}); use a kernel with such pages"
    )]
    PageSize {
        /// The kernel's page size.
        kernel: String,
        /// The host's.
        offered: String,
    },
    /// Too little memory for kernel, initrd and blobs.
    #[error("guest memory of {memory} is too small: {needs}; use --memory {advice} or more")]
    TooSmall {
        /// The size of the bank that they are loaded into.
        memory: String,
        /// What needs how much.
        needs: String,
        /// Memory that would do.
        advice: String,
    },
    /// A first bank that is too small for kernel, initrd and blobs, and that more memory would not
    /// enlarge.
    #[error(
        "the first RAM bank of board '{board}' ({memory}) is too small: {needs}; more memory does not enlarge it: change the board's file"
    )]
    BankTooSmall {
        /// The board.
        board: String,
        /// What the bank holds, as one writes it.
        memory: String,
        /// What needs how much.
        needs: String,
    },
    /// A placement that the boot protocol forbids.
    #[error("{0}")]
    BootProtocol(String),
    /// A device tree that cannot be encoded.
    #[error("{0}")]
    Tree(#[from] armlet_fdt::EncodeError),
}

/// Prints the message: a derived implementation would put the names of all variants and fields,
/// which are never shown, into the binary.
impl std::fmt::Debug for PlanError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}
