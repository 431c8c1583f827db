//! Pure planning of virtual machines: everything about a guest that can be decided without KVM.
//!
//! A [`Board`] (the machine's map), a [`Request`] (what the user asked for) and an [`Arch::Host`]
//! (what KVM said) make a [`Plan`]: address map, address width, interrupt controller, vCPUs and
//! the blobs that the guest reads at start. Both architectures are compiled and tested on every
//! host; nothing here does I/O or knows which machine it was compiled for.

pub mod aarch64;
pub mod backing;
pub mod board;
pub mod cores;
pub mod elf;
pub mod image;
pub mod irq;
pub mod plan;
pub mod range;
pub mod size;
pub mod switch;
pub mod width;
pub mod words;
pub mod x86_64;

pub use board::{Architecture, Board, PortKind};
pub use plan::{
    Blob, DeviceKind, Layout, Payload, Placed, PlacedPorts, Plan, PlanError, Request, Seeds, plan,
};
pub use range::Range;
pub use width::{Region, Width, WidthPolicy};

use serde::Serialize;
use std::fmt::Debug;
use switch::Switch;

/// What planning must know of an instruction set. [`plan()`] calls the functions in the order in
/// which they stand here.
pub trait Arch: Sized + Clone + Debug + 'static {
    /// The name that boards and messages use.
    const ARCHITECTURE: Architecture;
    /// What KVM said of the host, or a board assumes of it, as plain data.
    type Host: Clone + Debug + PartialEq;
    /// The facts of a kernel file's header.
    type Kernel: Clone + Debug + PartialEq;
    /// The interrupt controller with its windows placed.
    type Irqchip: Clone + Debug + PartialEq + Serialize;
    /// What was asked for of the things that KVM offers beside a CPU.
    type Wishes: Clone + Debug + PartialEq + Default;
    /// What the guest gets of them.
    type Features: Clone + Debug + PartialEq + Serialize;
    /// A vCPU before its first instruction.
    type Vcpu: Clone + Debug + PartialEq + Serialize;

    /// The header of a kernel for this architecture.
    ///
    /// # Errors
    /// A kernel for another one.
    fn kernel(header: &image::Header) -> Result<Self::Kernel, image::ImageError>;

    /// The host that a board assumes.
    fn assumed_host(board: &Board) -> Self::Host;

    /// How a host differs from the one that the board is for, as far as that is known, each in
    /// words. A host that only has more pages or memory does not differ.
    fn differences(board: &Board, host: &Self::Host) -> Vec<String>;

    /// Places the interrupt controller: in the board's windows, and above `ram` (in order of
    /// address) what does not fit there.
    ///
    /// # Errors
    /// A controller that the host does not offer, or more vCPUs than it serves.
    fn irqchip(
        board: &Board,
        request: &Request<Self>,
        host: &Self::Host,
        ram: &[Range],
    ) -> Result<Self::Irqchip, PlanError>;

    /// The controller's windows.
    fn irqchip_regions(irqchip: &Self::Irqchip) -> Vec<Region>;

    /// Chooses the address width for a machine whose highest address lies in `highest`.
    ///
    /// # Errors
    /// A machine wider than the host's limit, or a policy that does not hold it.
    fn width(highest: &Region, policy: WidthPolicy, host: &Self::Host) -> Result<Width, PlanError>;

    /// Places kernel and initrd in RAM, and the address of the first blob behind them.
    ///
    /// # Errors
    /// A kernel that the host's CPUs cannot run, or memory too small for what is to be loaded.
    fn payload(
        ram: &[Range],
        request: &Request<Self>,
        host: &Self::Host,
    ) -> Result<Payload, PlanError>;

    /// Reads the options about what KVM offers beside a CPU.
    ///
    /// # Errors
    /// What is not known, or an option for another architecture.
    fn wishes(words: &FeatureWords<'_>) -> Result<Self::Wishes, String>;

    /// What the guest gets of that on this host.
    ///
    /// # Errors
    /// Something that has to be there, and that the host does not offer.
    fn features(request: &Request<Self>, host: &Self::Host) -> Result<Self::Features, PlanError>;

    /// Interrupts that each vCPU has for itself and that the plan numbers: by INTID, with who raises
    /// them.
    fn private_interrupts(_: &Self::Features) -> Vec<(u32, &'static str)> {
        Vec::new()
    }

    /// The state of vCPU `index` at its start.
    fn vcpu(
        index: u32,
        payload: &Payload,
        features: &Self::Features,
        request: &Request<Self>,
    ) -> Self::Vcpu;

    /// What the guest's RAM holds that is neither loaded there nor the guest's to use.
    fn reserved(_: &[Self::Vcpu]) -> Option<Region> {
        None
    }

    /// What the guest reads at its start: the device tree, or the zero page.
    ///
    /// # Errors
    /// Memory too small to hold the blobs.
    fn blobs(
        board: &Board,
        layout: &Layout<Self>,
        vcpus: &[Self::Vcpu],
        features: &Self::Features,
        request: &Request<Self>,
    ) -> Result<Vec<Blob>, PlanError>;
}

/// What options and board say of the things that KVM offers beside a CPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct FeatureWords<'a> {
    /// `--pv`; each architecture has features of its own.
    pub paravirtual: Option<&'a str>,
    /// `--exits`, for x86_64.
    pub exits: Option<&'a str>,
    /// `--pmu`, for aarch64, as the other two.
    pub pmu: Switch,
    /// `--sve`.
    pub sve: Switch,
    /// `--pauth`.
    pub pauth: Switch,
}
