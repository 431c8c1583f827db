//! [`Arch`]: what planning must know of an instruction set, with the values that pass between it
//! and the plan: [`Request`] in, [`Layout`] and [`Plan`] out.

use crate::architecture::Architecture;
use crate::board::Board;
use crate::cores::Topology;
use crate::error::PlanError;
use crate::image::{Header, ImageError};
use crate::irq::GicChoice;
use crate::machine::{Blob, Payload, Placed, PlacedGeneration, PlacedPorts};
use crate::pci::{Msi, PlacedPci};
use crate::range::{Range, Region};
use crate::switch::Switch;
use crate::width::{Width, WidthPolicy};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::{self, Debug};

/// What planning must know of an instruction set. [`crate::plan()`] calls the functions in the order in
/// which they stand here.
pub trait Arch: Sized + Clone + Debug + 'static {
    /// The name that boards and messages use.
    const ARCHITECTURE: Architecture;
    /// What KVM said of the host, or a board assumes of it, as plain data.
    type Host: Clone + Debug + PartialEq + Serialize;
    /// The facts of a kernel file's header.
    type Kernel: Clone + Debug + PartialEq + Serialize + DeserializeOwned;
    /// The interrupt controller with its windows placed.
    type Irqchip: Clone + Debug + PartialEq + Serialize;
    /// The optional features that the user asked for.
    type FeatureRequest: Clone + Debug + PartialEq + Default;
    /// The features that the guest gets.
    type Features: Clone + Debug + PartialEq + Serialize;
    /// A vCPU before its first instruction.
    type Vcpu: Clone + Debug + PartialEq + Serialize;

    /// Returns the header of a kernel for this architecture.
    ///
    /// # Errors
    /// A kernel for another one.
    fn kernel(header: &Header) -> Result<Self::Kernel, ImageError>;

    /// Returns the host that a board assumes.
    fn assumed_host(board: &Board) -> Self::Host;

    /// Describes each way in which a host differs from the one that the board is for, as far as
    /// that is known. A host that only has more pages or memory does not differ.
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

    /// Returns the controller's windows.
    fn irqchip_regions(irqchip: &Self::Irqchip) -> Vec<Region>;

    /// Decides what takes the MSIs of PCI functions; its registers lie in `room`.
    ///
    /// # Errors
    /// A controller that has no interrupts left for it.
    fn msi(
        board: &Board,
        request: &Request<Self>,
        irqchip: &Self::Irqchip,
        room: Range,
    ) -> Result<Msi, PlanError>;

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

    /// Reads the options that ask for optional features.
    ///
    /// # Errors
    /// An unknown feature, or an option for another architecture.
    fn feature_request(options: &FeatureOptions<'_>) -> Result<Self::FeatureRequest, String>;

    /// Decides which features the guest gets on this host.
    ///
    /// # Errors
    /// A required feature that the host does not offer.
    fn features(request: &Request<Self>, host: &Self::Host) -> Result<Self::Features, PlanError>;

    /// Returns the options, with their values, by which another host gives a guest the same interrupt
    /// controller and features, or refuses to.
    fn pinned(_: &Plan<Self>) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// Returns the private interrupts of each vCPU that the plan numbers: INTID and source.
    fn private_interrupts(_: &Self::Features) -> Vec<(u32, &'static str)> {
        Vec::new()
    }

    /// Returns the initial state of vCPU `index`.
    fn vcpu(
        index: u32,
        payload: &Payload,
        features: &Self::Features,
        request: &Request<Self>,
    ) -> Self::Vcpu;

    /// Returns the part of RAM that is reserved for KVM: neither loaded nor free for the guest to
    /// use.
    fn reserved(_: &[Self::Vcpu]) -> Option<Region> {
        None
    }

    /// Returns the pages for VMGenID and VMClock, neighbours in RAM that the guest does not use.
    fn generation(payload: &Payload, request: &Request<Self>) -> Option<[Range; 2]>;

    /// Returns what the guest reads at its start: the device tree, or the zero page.
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

/// The options about optional features, from the command line or the board.
#[derive(Clone, Copy, Debug, Default)]
pub struct FeatureOptions<'a> {
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

/// What the user asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Request<A: Arch> {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Guest memory in bytes.
    pub memory: u64,
    /// How to choose the address width.
    pub width: WidthPolicy,
    /// The interrupt controller; only aarch64 has a choice.
    pub gic: GicChoice,
    /// The kernel's header; a plan without a kernel shows the machine alone.
    pub kernel: Option<A::Kernel>,
    /// The initrd's size in bytes.
    pub initrd: Option<u64>,
    /// The kernel command line.
    pub cmdline: String,
    /// Random numbers for the guest; without them its tree is the same each time.
    pub seeds: Option<Seeds>,
    /// Names of the virtio devices over MMIO ("disk0"), in the order of their slots.
    pub virtio: Vec<String>,
    /// Names of those over PCI, in the order of their device numbers.
    pub pci: Vec<String>,
    /// Bytes of each persistent memory, in the order of their devices.
    pub pmem: Vec<u64>,
    /// Whether the guest goes on from a snapshot: nothing is written to its memory.
    pub goes_on: bool,
    /// The optional features that the user asked for.
    pub features: A::FeatureRequest,
    /// What the guest is told of its cores.
    pub topology: Topology,
    /// Whether the guest has VMGenID and VMClock.
    pub vmgenid: bool,
}

impl<A: Arch> Request<A> {
    /// Creates the request for a machine with only vCPUs and memory: without kernel, initrd, seeds
    /// and virtio devices, and with the default policies.
    pub fn new(cpus: u32, memory: u64) -> Request<A> {
        Request {
            cpus,
            memory,
            width: WidthPolicy::default(),
            gic: GicChoice::default(),
            kernel: None,
            initrd: None,
            cmdline: String::new(),
            seeds: None,
            virtio: Vec::new(),
            pci: Vec::new(),
            pmem: Vec::new(),
            goes_on: false,
            features: A::FeatureRequest::default(),
            topology: Topology::default(),
            vmgenid: false,
        }
    }
}

/// Fresh random numbers for one start of the guest.
#[derive(Clone, PartialEq, Eq)]
pub struct Seeds {
    /// `/chosen/kaslr-seed`: 64 bits that place the kernel in its address space.
    pub kaslr: u64,
    /// `/chosen/rng-seed`: credited to the guest's random number generator.
    pub rng: [u8; 64],
}

impl fmt::Debug for Seeds {
    /// Hides the numbers: they are secrets of the guest.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seeds(hidden)")
    }
}

/// Everything that is decided about a machine before KVM is asked to make it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(bound = "")]
pub struct Plan<A: Arch> {
    /// The board's name.
    pub board: String,
    /// Where everything lies.
    pub layout: Layout<A>,
    /// The address width, with its reason.
    pub width: Width,
    /// The optional features that the guest gets.
    pub features: A::Features,
    /// The vCPUs, by index.
    pub vcpus: Vec<A::Vcpu>,
    /// What the VMM writes to guest memory beside kernel and initrd.
    #[serde(skip)]
    pub blobs: Vec<Blob>,
}

/// Where everything lies.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(bound = "")]
pub struct Layout<A: Arch> {
    /// Banks of RAM, by address.
    pub ram: Vec<Range>,
    /// Devices with their windows and interrupts, in the board's order.
    pub devices: Vec<Placed>,
    /// Devices at I/O ports, in the board's order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PlacedPorts>,
    /// The interrupt controller.
    pub irqchip: A::Irqchip,
    /// Persistent memory, in the order of its devices.
    pub pmem: Vec<Range>,
    /// PCI, where a device is over it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci: Option<PlacedPci>,
    /// Kernel, initrd and blobs.
    pub payload: Payload,
    /// VMGenID and VMClock, where the guest has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<PlacedGeneration>,
}

impl<A: Arch> Layout<A> {
    /// Every region of the machine, by address: RAM, devices and interrupt controller.
    #[must_use]
    pub fn regions(&self) -> Vec<Region> {
        let pci = self.pci.as_ref();
        regions::<A>(&self.ram, &self.devices, &self.irqchip, &self.pmem, pci)
    }

    /// Returns the ranges of all regions, in no order: what needs no names makes none.
    pub fn ranges(&self) -> impl Iterator<Item = Range> {
        let irqchip = A::irqchip_regions(&self.irqchip).into_iter();
        let windows = self.devices.iter().map(|device| device.window);
        let memory = self.ram.iter().chain(&self.pmem).copied();
        let pci = self.pci.iter().flat_map(PlacedPci::regions);
        let pci = pci.map(|region| region.range);
        memory
            .chain(windows)
            .chain(pci)
            .chain(irqchip.map(|region| region.range))
    }
}

/// Every region, by address.
pub(crate) fn regions<A: Arch>(
    ram: &[Range],
    devices: &[Placed],
    irqchip: &A::Irqchip,
    pmem: &[Range],
    pci: Option<&PlacedPci>,
) -> Vec<Region> {
    let mut regions = ram_regions(ram);
    regions.extend(devices.iter().map(|device| Region {
        name: device.title(),
        range: device.window,
    }));
    regions.extend(A::irqchip_regions(irqchip));
    regions.extend(pmem.iter().enumerate().map(|(index, range)| Region {
        name: format!("persistent memory {index}").into(),
        range: *range,
    }));
    regions.extend(pci.into_iter().flat_map(PlacedPci::regions));
    regions.sort_by_key(|region| region.range);
    regions
}

fn ram_regions(ram: &[Range]) -> Vec<Region> {
    ram.iter()
        .enumerate()
        .map(|(index, range)| Region {
            name: match ram.len() {
                1 => "guest RAM".into(),
                _ => format!("RAM bank {index}").into(),
            },
            range: *range,
        })
        .collect()
}
