//! Decodes a vCPU's exit: a pure function, independent of any vCPU.

use crate::stats::Reason;
use armlet_backends::pmem::{FileMemory, Missing};
use armlet_devices::action::{Action, Panic};
use armlet_devices::bus::Bus;
use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_debug_exit_arch,
};
use kvm_ioctls::VcpuExit;
use std::sync::Arc;

/// Why KVM did not enter the guest: the vCPU's PMU belongs to another kind of core
/// (KVM_EXIT_FAIL_ENTRY_CPU_UNSUPPORTED; arch/arm64/kvm/arm.c: kvm_arch_vcpu_load).
const UNSUPPORTED_CPU: u64 = 1;

/// The devices and files that answer the guest's accesses.
#[derive(Default)]
pub struct Buses {
    /// The devices at guest-physical addresses.
    pub memory: Bus,
    /// The devices at I/O ports; empty where the architecture has none.
    pub ports: Bus,
    /// The files that are mapped as guest memory.
    pub files: Vec<Arc<FileMemory>>,
}

impl Buses {
    /// Backs a page whose file no longer holds it, after the host could not give it to the guest's
    /// access; returns whether there was one. `seen` is kept by the caller, one for each vCPU.
    pub(super) fn find_page(&self, seen: &mut Vec<u64>) -> bool {
        seen.resize(self.files.len(), 0);
        // KVM does not report the address. A file that was truncated is certain to be a cause, so
        // it is checked first.
        [Missing::End, Missing::Blocks].into_iter().any(|missing| {
            let files = self.files.iter().zip(&mut *seen);
            files.fold(false, |found, (file, seen)| {
                file.detach_missing(missing, seen) || found
            })
        })
    }
}

/// What a vCPU's exit means for the machine.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    /// Continue.
    Run,
    /// Continue; there is no device at this guest-physical address.
    Nowhere {
        /// The address.
        address: u64,
        /// Bytes accessed.
        size: usize,
        /// Whether the guest wrote.
        write: bool,
    },
    /// An exit that kvm-ioctls has no name for.
    Raw(u32),
    /// An access to an I/O port, not answered yet: kvm-ioctls does not tell its width.
    Port,
    /// A hypercall that KVM was configured to forward, by its function number.
    Hypercall(u64),
    /// The host has no page of memory for the guest's access.
    NoPage,
    /// An internal error of KVM, not described yet: kvm-ioctls does not tell its details.
    InternalError,
    /// A fault in the handler of a double fault, which resets a PC.
    TripleFault,
    /// It stopped for a debugger.
    Trap(Box<kvm_debug_exit_arch>),
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// Continue; the guest's kernel printed that it panicked.
    Panicked(Box<Panic>),
    /// The guest cannot continue, for this reason.
    Failed(String),
}

impl From<Action> for Next {
    fn from(action: Action) -> Next {
        match action {
            Action::None => Next::Run,
            Action::Reset => Next::Reset,
            Action::PowerOff => Next::PowerOff,
            Action::Panicked(panic) => Next::Panicked(panic),
        }
    }
}

/// Decodes an exit, and answers MMIO accesses by the devices on `bus`.
#[must_use]
pub(super) fn answer(exit: VcpuExit<'_>, bus: &Bus) -> Next {
    match exit {
        VcpuExit::MmioRead(address, data) => match bus.read(address, data) {
            Some(action) => action.into(),
            None => Next::Nowhere {
                address,
                size: data.len(),
                write: false,
            },
        },
        VcpuExit::MmioWrite(address, data) => match bus.write(address, data) {
            Some(action) => action.into(),
            None => Next::Nowhere {
                address,
                size: data.len(),
                write: true,
            },
        },
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Next::PowerOff,
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Next::Reset,
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => {
            Next::Failed("the guest reported a crash".to_owned())
        }
        VcpuExit::SystemEvent(kind, _) => Next::Failed(format!(
            "KVM reported a system event of unknown type {kind}"
        )),
        VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => Next::Port,
        VcpuExit::Hypercall(call) => Next::Hypercall(call.nr),
        VcpuExit::MemoryFault { .. } => Next::NoPage,
        VcpuExit::Shutdown => Next::TripleFault,
        VcpuExit::Intr => Next::Run,
        VcpuExit::Debug(exit) => Next::Trap(Box::new(exit)),
        VcpuExit::FailEntry(UNSUPPORTED_CPU, cpu) => Next::Failed(format!(
            "KVM cannot run it on CPU {cpu}, whose performance counters are of another kind than its own; keep it on one kind of core with --pin"
        )),
        VcpuExit::FailEntry(reason, cpu) => Next::Failed(format!(
            "KVM cannot enter the guest on CPU {cpu} (hardware reason {reason:#x})"
        )),
        VcpuExit::InternalError => Next::InternalError,
        VcpuExit::Unsupported(reason) => Next::Raw(reason),
        other => Next::Failed(format!("KVM stopped it with an unexpected exit: {other:?}")),
    }
}

/// Returns the reason by which an exit is counted.
pub(super) fn reason(exit: &VcpuExit<'_>) -> Reason {
    match exit {
        VcpuExit::MmioRead(..) => Reason::MemoryRead,
        VcpuExit::MmioWrite(..) => Reason::MemoryWrite,
        VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => Reason::Port,
        VcpuExit::Intr => Reason::Signal,
        _ => Reason::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use armlet_devices::Device;
    use std::sync::Mutex;

    struct Register(u8);

    impl Device for Register {
        fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
            data.fill(self.0 + offset as u8);
            Action::None
        }

        fn write(&mut self, _: u64, data: &[u8]) -> Action {
            self.0 = data[0];
            match data {
                b"off" => Action::PowerOff,
                b"reset" => Action::Reset,
                b"panic" => Action::panicked("asked to".to_owned()),
                _ => Action::None,
            }
        }
    }

    fn bus() -> Bus {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x100, Arc::new(Mutex::new(Register(7))))
            .expect("an empty bus");
        bus
    }

    #[test]
    fn device_accesses_are_answered_by_the_bus() {
        let bus = bus();
        let mut data = [0; 4];
        assert_eq!(
            answer(VcpuExit::MmioRead(0x1002, &mut data), &bus),
            Next::Run
        );
        assert_eq!(data, [9; 4]);
        assert_eq!(answer(VcpuExit::MmioWrite(0x1000, &[1]), &bus), Next::Run);
        assert_eq!(
            answer(VcpuExit::MmioRead(0x1000, &mut data), &bus),
            Next::Run
        );
        assert_eq!(data, [1; 4]);
    }

    #[test]
    fn what_an_access_means_for_the_machine_is_what_comes_next() {
        let bus = bus();
        let next = |data| answer(VcpuExit::MmioWrite(0x1000, data), &bus);
        assert_eq!(next(b"off"), Next::PowerOff);
        assert_eq!(next(b"reset"), Next::Reset);
        let reason = "asked to".to_owned();
        assert_eq!(next(b"panic"), Next::Panicked(Box::new(Panic { reason })));
    }

    #[test]
    fn an_access_to_nowhere_reads_zero_and_is_told() {
        let mut data = [0xff; 2];
        let next = answer(VcpuExit::MmioRead(0x5000, &mut data), &bus());
        assert_eq!(
            next,
            Next::Nowhere {
                address: 0x5000,
                size: 2,
                write: false
            }
        );
        assert_eq!(data, [0; 2]);
    }

    #[test]
    fn system_events_are_what_psci_means_by_them() {
        let bus = bus();
        assert_eq!(answer(VcpuExit::SystemEvent(1, &[]), &bus), Next::PowerOff);
        assert_eq!(answer(VcpuExit::SystemEvent(2, &[0]), &bus), Next::Reset);
        assert!(matches!(
            answer(VcpuExit::SystemEvent(3, &[]), &bus),
            Next::Failed(_)
        ));
        assert!(matches!(
            answer(VcpuExit::SystemEvent(99, &[]), &bus),
            Next::Failed(_)
        ));
    }

    #[test]
    fn unknown_exits_end_the_guest_in_a_sentence() {
        let bus = bus();
        assert_eq!(answer(VcpuExit::Unsupported(28), &bus), Next::Raw(28));
        assert!(matches!(answer(VcpuExit::Hlt, &bus), Next::Failed(_)));
        assert!(
            matches!(answer(VcpuExit::FailEntry(1, 2), &bus), Next::Failed(cause) if cause.contains("CPU 2") && cause.contains("--pin"))
        );
        assert!(
            matches!(answer(VcpuExit::FailEntry(5, 2), &bus), Next::Failed(cause) if cause.contains("0x5"))
        );
    }
}
