//! The KVM half of an architecture, as a trait: what KVM needs to know of it.

use super::facts::Virtualization;
use super::interrupts::{Interrupts, Pins};
use anyhow::{Result, bail};
use armlet_arch::irq::Spi;
use armlet_arch::{Arch, Plan, Range, Request, Width};
use armlet_devices::action::Action;
use armlet_devices::bus::Bus;
use armlet_devices::ioapic::IoApic;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::sync::{Arc, Mutex};

/// How thoroughly a host is probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// By capabilities alone, in some microseconds: enough for the usual guest.
    Quick,
    /// With a VM made for the purpose and dropped again.
    Full,
}

/// What KVM needs to know of an architecture to make and run a planned machine.
pub trait KvmArch: Arch {
    /// The interrupt controller's handle, which must live as long as the machine.
    type Chip: Send;

    /// Whether there are I/O ports. Where there are none, a binary has no devices that stand there.
    const PORTS: bool = false;

    /// Returns how thoroughly the host must be probed for this request.
    fn depth(request: &Request<Self>) -> Depth;

    /// Asks KVM what it offers.
    ///
    /// # Errors
    /// A host that cannot run guests at all.
    fn probe(kvm: &Kvm, depth: Depth) -> Result<Self::Host>;

    /// Everything about the host that `armlet probe` shows.
    ///
    /// # Errors
    /// As [`Self::probe`].
    fn facts(kvm: &Kvm) -> Result<Virtualization>;

    /// Creates the VM with its address width.
    ///
    /// # Errors
    /// What KVM says.
    fn create_vm(kvm: &Kvm, width: &Width) -> Result<VmFd>;

    /// Creates interrupt controller and vCPUs in the order that KVM wants, and checks that KVM
    /// made what the plan says.
    ///
    /// # Errors
    /// The ioctl that failed and what KVM said, or both values where KVM and plan differ.
    fn populate(kvm: &Kvm, vm: &VmFd, plan: &Plan<Self>) -> Result<(Vec<VcpuFd>, Self::Chip)>;

    /// Returns the I/O APIC and where it stands, where KVM does not have it. Only x86_64 has one.
    fn io_apic(_: &Arc<Interrupts>, _: &Plan<Self>) -> Option<(Range, Arc<Mutex<IoApic>>)> {
        None
    }

    /// Returns the pins of the interrupt controllers that [`Self::populate`] made in KVM.
    fn pins(plan: &Plan<Self>) -> Pins;

    /// Returns the number by which KVM_IRQ_LINE knows an interrupt.
    fn irq_number(spi: Spi) -> u32;

    /// Returns the number by which an irqfd knows an interrupt (KVM's GSI).
    fn gsi(spi: Spi) -> u32;

    /// Answers an exit that kvm-ioctls has no name for, by its number.
    ///
    /// # Errors
    /// An exit that nothing is known of.
    fn answer_raw(vcpu: &mut VcpuFd, reason: u32) -> Result<RawExit>;

    /// Answers an exit for an access to I/O ports. Only x86_64 has any.
    ///
    /// # Errors
    /// An architecture without ports.
    fn answer_ports(_: &mut VcpuFd, _: &Bus) -> Result<PortAccess> {
        bail!("KVM stopped it at an I/O port, which this architecture does not have")
    }

    /// Answers a hypercall that KVM was told to leave to us, by its function number.
    ///
    /// # Errors
    /// A function that KVM was not told of, and what KVM says.
    fn answer_hypercall(_: &VcpuFd, function: u64) -> Result<Hypercall> {
        bail!("KVM stopped it at a hypercall that armlet does not know ({function:#x})")
    }

    /// Returns whether a vCPU is off, until another turns it on. It is asked on the vCPU's own
    /// thread.
    fn is_off(_: &VcpuFd) -> bool {
        false
    }

    /// Tells a guest, where it wants to hear of it, that the host has held this vCPU: time that it
    /// did not get. It is called on the vCPU's own thread, before the vCPU goes on.
    fn note_pause(_: &VcpuFd) {}

    /// Returns a vCPU's program counter, for reports about it ("PC 0xffff800080010000").
    fn position(vcpu: &VcpuFd) -> String;
}

/// An access to an I/O port, after it was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortAccess {
    /// The port.
    pub port: u16,
    /// Whether the guest wrote.
    pub write: bool,
    /// Whether a device stands there.
    pub found: bool,
    /// What the access means for the machine.
    pub action: Action,
}

/// The meaning of a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hypercall {
    /// The vCPU went off; it sleeps in KVM_RUN until another turns it on.
    WentOff,
}

/// The meaning of an exit that kvm-ioctls has no name for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RawExit {
    /// An access to `address` by an instruction that cannot be emulated; the guest gets an abort.
    Aborted {
        /// Guest-physical address.
        address: u64,
    },
}
