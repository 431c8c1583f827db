//! The KVM half of an architecture, as a trait.

use super::facts::Virtualization;
use super::interrupts::{Interrupts, Pins};
use anyhow::{Result, bail};
use armlet_arch::irq::Spi;
use armlet_arch::{Arch, Plan, Range, Request, Width};
use armlet_devices::action::Action;
use armlet_devices::bus::Bus;
use armlet_devices::ioapic::IoApic;
use armlet_system::seccomp::Native;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::ffi::c_void;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

/// How thoroughly a host is probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// By capabilities alone, in microseconds: enough for the usual guest.
    Quick,
    /// With a scratch VM.
    Full,
}

/// What an architecture and its C library have that others do not.
#[derive(Clone, Copy, Debug)]
pub struct OtherCalls {
    /// How they are made; every thread may make its calls.
    pub native: Native,
    /// Requests of ioctl that vCPUs' threads make: name, and type with number (the lower 16 bits).
    pub vcpu: &'static [(&'static str, u16)],
    /// Requests that debugging vCPUs takes, on their threads.
    pub debug: &'static [(&'static str, u16)],
    /// Requests that making a machine takes.
    pub machine: &'static [(&'static str, u16)],
    /// Requests that saving vCPUs takes, on their threads.
    pub save: &'static [(&'static str, u16)],
    /// Requests that saving and restoring a machine takes besides.
    pub restore: &'static [(&'static str, u16)],
    /// Ranges of KVM's requests that other architectures have, or no kernel any more: KVM refuses them
    /// itself, so that a filter may let them pass where it is shorter.
    pub unknown: &'static [(u16, u16)],
    /// The names of calls that this architecture alone has.
    pub known: &'static [(&'static str, i64)],
}

impl OtherCalls {
    /// Whether KVM refuses all requests from one to before another.
    #[must_use]
    pub const fn are_unknown(&self, from: u32, end: u32) -> bool {
        let mut at = 0;
        while at < self.unknown.len() {
            let (first, last) = self.unknown[at];
            if first as u32 <= from && end <= last as u32 + 1 {
                return true;
            }
            at += 1;
        }
        false
    }
}

/// The operations of an architecture that create and run a planned machine with KVM.
pub trait KvmArch: Arch {
    /// The interrupt controller's handle, which must live as long as the machine, and what saving the machine
    /// takes beside its descriptors.
    type Chip: Send + Sync + 'static;
    /// The state of a vCPU, as plain data.
    type VcpuState: Clone + Debug + PartialEq + Serialize + DeserializeOwned + Send + 'static;
    /// The state of what KVM emulates beside vCPUs, as plain data.
    type ChipState: Clone + Debug + PartialEq + Serialize + DeserializeOwned + Send + 'static;
    /// Where the clocks of a guest stand.
    type Time: Copy + Debug + Send + 'static;

    /// Whether the architecture has I/O ports. Where it has none, the binary contains no port
    /// devices.
    const PORTS: bool = false;

    /// Whether KVM may raise an interrupt some time after its irqfd was signalled, by a worker of the kernel
    /// (virt/kvm/eventfd.c: irqfd_inject): one may be under way when a machine is saved, and in no state.
    const LATE_INTERRUPTS: bool = false;

    /// System calls as this architecture has them, for the sandbox.
    const OTHER_CALLS: OtherCalls;

    /// An argument of the system call at which a signal came, from 0 to 5.
    ///
    /// # Safety
    /// `context` is what the kernel handed to the handler of that signal.
    unsafe fn call_argument(context: *const c_void, index: usize) -> u64;

    /// Does what needs rights that are given up before the machine is made.
    fn before_confinement(_: &Plan<Self>) {}

    /// Returns how thoroughly the host must be probed for this request.
    fn depth(request: &Request<Self>) -> Depth;

    /// Asks KVM what it offers.
    ///
    /// # Errors
    /// When the host cannot run guests at all.
    fn probe(kvm: &Kvm, depth: Depth) -> Result<Self::Host>;

    /// Returns everything about the host that `armlet probe` shows.
    ///
    /// # Errors
    /// As for [`Self::probe`].
    fn facts(kvm: &Kvm) -> Result<Virtualization>;

    /// Creates the VM with its address width.
    ///
    /// # Errors
    /// What KVM says.
    fn create_vm(kvm: &Kvm, width: &Width) -> Result<VmFd>;

    /// Creates interrupt controller and vCPUs in the order that KVM requires, and checks that they
    /// are as planned. `saved` are the states of the vCPUs that [`Self::restore`] will give them, of which
    /// some parts are fixed now; none for a machine that boots.
    ///
    /// # Errors
    /// The ioctl that failed and KVM's error, or both values where KVM and the plan differ.
    fn populate(
        kvm: &Kvm,
        vm: &VmFd,
        plan: &Plan<Self>,
        saved: &[Self::VcpuState],
    ) -> Result<(Vec<VcpuFd>, Self::Chip)>;

    /// Returns the I/O APIC and its window, where KVM does not emulate one. Only x86_64 has it.
    fn io_apic(_: &Arc<Interrupts>, _: &Plan<Self>) -> Option<(Range, Arc<Mutex<IoApic>>)> {
        None
    }

    /// Returns the pins of the interrupt controllers that [`Self::populate`] made in KVM.
    fn pins(plan: &Plan<Self>) -> Pins;

    /// Returns an interrupt's number for KVM_IRQ_LINE.
    fn irq_number(spi: Spi) -> u32;

    /// Returns an interrupt's number for irqfds (KVM's GSI).
    fn gsi(spi: Spi) -> u32;

    /// Handles an exit that kvm-ioctls has no name for, by its number.
    ///
    /// # Errors
    /// When the exit is unknown.
    fn answer_raw(vcpu: &mut VcpuFd, reason: u32) -> Result<RawExit>;

    /// Handles an exit for an access to I/O ports. Only x86_64 has any.
    ///
    /// # Errors
    /// On an architecture without ports.
    fn answer_ports(_: &mut VcpuFd, _: &Bus) -> Result<PortAccess> {
        bail!("KVM reported an access to an I/O port, which this architecture does not have")
    }

    /// Handles a hypercall that KVM was configured to forward, by its function number.
    ///
    /// # Errors
    /// When the function was not configured, and KVM's errors.
    fn answer_hypercall(_: &VcpuFd, function: u64) -> Result<Hypercall> {
        bail!("KVM forwarded an unknown hypercall ({function:#x})")
    }

    /// Returns whether a vCPU is off, until another one turns it on. Called on the vCPU's own
    /// thread.
    fn is_off(_: &VcpuFd) -> bool {
        false
    }

    /// Tells the guest, if it supports that, that the host has paused this vCPU, so that it
    /// accounts for the missing time. Called on the vCPU's own thread, before it resumes.
    fn note_pause(_: &VcpuFd) {}

    /// Returns where the clocks of a guest stand, none of whose vCPUs runs. Called where its first vCPU may be
    /// used: on that one's own thread, once there is one.
    ///
    /// # Errors
    /// KVM's error.
    fn time(vm: &VmFd, first: &VcpuFd) -> Result<Self::Time>;

    /// Sets the clocks of a guest, none of whose vCPUs runs, back to where they stood, which is `from` now. Called
    /// on the thread of each vCPU, in their order; `which` is its index, and how many there are.
    ///
    /// # Errors
    /// KVM's error.
    fn set_time(
        vm: &VmFd,
        vcpu: &VcpuFd,
        which: (usize, usize),
        from: &Self::Time,
        to: &Self::Time,
    ) -> Result<()>;

    /// Has clocks that were saved stand where they stood before.
    fn stop_time(to: &Self::Time, vcpus: &mut [Self::VcpuState], chip: &mut Self::ChipState);

    /// Returns the state of a vCPU, while the machine is paused. Called on the vCPU's own thread.
    ///
    /// # Errors
    /// The register that cannot be read, and KVM's error.
    fn save_vcpu(vcpu: &VcpuFd, chip: &Self::Chip) -> Result<Self::VcpuState>;

    /// Returns the state of what KVM emulates beside vCPUs, while the machine is paused. `vcpus` are
    /// the states of its vCPUs.
    ///
    /// # Errors
    /// What cannot be read, and KVM's error.
    fn save_chip(
        vm: &VmFd,
        chip: &Self::Chip,
        vcpus: &[Self::VcpuState],
    ) -> Result<Self::ChipState>;

    /// Gives a machine that [`Self::populate`] made, and that has not run, the state of one that was
    /// saved: `vcpus` by index, and the rest. The guest's clocks continue from where they stood. The
    /// states come from files, which anybody may have written: what could do harm is checked before
    /// KVM gets it.
    ///
    /// # Errors
    /// A state that is not valid, or what this host cannot have, by its name; KVM's error.
    fn restore(
        vm: &VmFd,
        chip: &Self::Chip,
        vcpus: &[VcpuFd],
        states: (&[Self::VcpuState], &Self::ChipState),
    ) -> Result<()>;

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
    /// Whether there is a device.
    pub found: bool,
    /// What the access means for the machine.
    pub action: Action,
}

/// The meaning of a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hypercall {
    /// The vCPU went off; it sleeps in KVM_RUN until another one turns it on.
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
