//! A vCPU's thread: run, answer the exit, again.

use crate::affinity;
use crate::eintr::CallError;
use crate::kvm::internal::describe_internal_error;
use crate::kvm::kick::{self, Kickable};
use crate::kvm::{Hypercall, KvmArch, RawExit};
use crate::stats::{Exits, Reason};
use crate::virtio::pmem::{FileMemory, Missing};
use anyhow::{Context, Result};
use armlet_devices::action::{Action, Panic};
use armlet_devices::bus::Bus;
use armlet_devices::limit::{Admitted, RateLimit};
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::sync::Arc;
use std::thread::JoinHandle;

mod all;
mod control;
mod off;

pub use all::{NotHeld, Vcpus};
use control::Control;
pub use off::OffCheck;

/// Small, so that a huge page never backs it: the deepest call is a device's register access.
const STACK_BYTES: usize = 128 << 10;

/// Why KVM did not enter the guest: the vCPU's PMU is that of another kind of core
/// (KVM_EXIT_FAIL_ENTRY_CPU_UNSUPPORTED; arch/arm64/kvm/arm.c: kvm_arch_vcpu_load).
const UNSUPPORTED_CPU: u64 = 1;

/// Who answers the guest, in both spaces of addresses.
#[derive(Default)]
pub struct Buses {
    /// At guest-physical addresses.
    pub memory: Bus,
    /// At I/O ports; empty where the architecture has none.
    pub ports: Bus,
    /// Files that are the guest's memory.
    pub files: Vec<Arc<FileMemory>>,
}

impl Buses {
    /// The host had no page for the guest's access; returns whether it has one now. `seen` is of
    /// the files' own, each for one vCPU.
    fn find_page(&self, seen: &mut Vec<u64>) -> bool {
        seen.resize(self.files.len(), 0);
        // KVM does not tell which of them it was. That one was cut is known for sure.
        [Missing::End, Missing::Blocks].into_iter().any(|missing| {
            let files = self.files.iter().zip(&mut *seen);
            files.fold(false, |found, (file, seen)| {
                file.detach_missing(missing, seen) || found
            })
        })
    }
}

/// What a vCPU's exit means for the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Go on.
    Run,
    /// Go on; nothing answers at this guest-physical address.
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
    /// An access to an I/O port, yet to be answered: kvm-ioctls does not tell how wide it was.
    Port,
    /// A hypercall that KVM was told to leave to us, by its function number.
    Hypercall(u64),
    /// The host has no page of memory for the guest's access.
    NoPage,
    /// KVM met an error of its own, yet to be described: kvm-ioctls does not tell what it says.
    InternalError,
    /// A fault in the handler of a double fault, which resets a PC.
    TripleFault,
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// Go on; the guest's kernel printed that it panicked.
    Panicked(Box<Panic>),
    /// The guest cannot go on: what happened.
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

/// Answers an exit: a function over data, apart from any vCPU.
#[must_use]
pub fn answer(exit: VcpuExit<'_>, bus: &Bus) -> Next {
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
        VcpuExit::FailEntry(UNSUPPORTED_CPU, cpu) => Next::Failed(format!(
            "KVM cannot run it on CPU {cpu}, which is of another kind than its performance counters; keep it on one kind of core by --pin"
        )),
        VcpuExit::FailEntry(reason, cpu) => Next::Failed(format!(
            "KVM cannot enter the guest on CPU {cpu} (hardware reason {reason:#x})"
        )),
        VcpuExit::InternalError => Next::InternalError,
        VcpuExit::Unsupported(reason) => Next::Raw(reason),
        other => Next::Failed(format!("KVM stopped it with an unexpected exit: {other:?}")),
    }
}

fn reason(exit: &VcpuExit<'_>) -> Reason {
    match exit {
        VcpuExit::MmioRead(..) => Reason::MemoryRead,
        VcpuExit::MmioWrite(..) => Reason::MemoryWrite,
        VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => Reason::Port,
        VcpuExit::Intr => Reason::Signal,
        _ => Reason::Other,
    }
}

/// What a vCPU tells the event loop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuEvent {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU cannot go on: which, where and why, in a sentence.
    Failed(String),
    /// The guest's kernel said that it panicked: which vCPU, where and why, in a sentence.
    Panicked(String),
    /// A vCPU is asked whether it is off: [`OffCheck::asked`] says which.
    Asked,
    /// All vCPUs are off, for good.
    AllOff,
}

impl VcpuEvent {
    /// What an action of the guest's is told as, where no vCPU made the access: output that was
    /// collected is handed on by other threads, too.
    #[must_use]
    pub fn by(action: Action) -> Option<VcpuEvent> {
        match action {
            Action::None => None,
            Action::Reset => Some(VcpuEvent::Reset),
            Action::PowerOff => Some(VcpuEvent::PowerOff),
            Action::Panicked(panic) => Some(VcpuEvent::panicked(&panic, "")),
        }
    }

    /// `place` says where, with a space before it.
    fn panicked(panic: &Panic, place: &str) -> VcpuEvent {
        let reason = &panic.reason;
        VcpuEvent::Panicked(format!("the guest's kernel panicked{place}: {reason}"))
    }
}

/// What all vCPUs of a machine share.
#[derive(Clone)]
pub struct Shared {
    /// Who answers the guest.
    pub buses: Arc<Buses>,
    /// Whether they are all off.
    pub off: Arc<OffCheck>,
}

/// A running vCPU.
pub struct RunningVcpu {
    thread: JoinHandle<()>,
    control: Arc<Control<VcpuFd>>,
}

impl RunningVcpu {
    /// Starts vCPU `index` on a thread of its own, on these CPUs of the host, or on any where there
    /// are none. It runs until it is asked to stop, or until it has something to tell that ends it.
    ///
    /// # Errors
    /// A host without room for another thread.
    pub fn start<A: KvmArch>(
        index: usize,
        mut vcpu: VcpuFd,
        shared: Shared,
        cpus: Vec<u32>,
        exits: Arc<Exits>,
        tell: impl Fn(VcpuEvent) + Send + 'static,
    ) -> Result<RunningVcpu> {
        // Before there is a thread that may be kicked.
        kick::install();
        let control = Arc::new(Control::default());
        let asked = Arc::clone(&control);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let _end = asked.until_end();
                let _kickable = Kickable::new(&mut vcpu);
                if !cpus.is_empty()
                    && let Err(error) = affinity::run_on(&cpus)
                {
                    tell(VcpuEvent::Failed(format!("vCPU {index} {error:#}")));
                    return;
                }
                if let Some(told) = run::<A>(index, &mut vcpu, &asked, &shared, &exits, &tell) {
                    tell(told);
                }
            })
            .with_context(|| format!("cannot start a thread for vCPU {index}"))?;
        Ok(RunningVcpu { thread, control })
    }

    /// Makes the vCPU leave the guest soon, wherever it is.
    pub fn kick(&self) {
        kick::kick(&self.thread);
    }

    /// Waits for the end of its thread.
    pub fn join(self) {
        // A panic in it has been reported where it happened.
        let _ = self.thread.join();
    }
}

fn run<A: KvmArch>(
    index: usize,
    vcpu: &mut VcpuFd,
    control: &Control<VcpuFd>,
    shared: &Shared,
    exits: &Exits,
    tell: &impl Fn(VcpuEvent),
) -> Option<VcpuEvent> {
    let Shared { buses, off } = shared;
    let faults = Faults::of(index);
    let empty_ports = Faults::of(index);
    let mut seen = Vec::new();
    // It may have been asked before it could be kicked.
    if !control.obey(vcpu) {
        return None;
    }
    loop {
        let next = match vcpu.run() {
            Ok(exit) => {
                exits.count(reason(&exit));
                answer(exit, &buses.memory)
            }
            Err(error) if error.is_interrupted() => {
                exits.count(Reason::Signal);
                // First, as the next kick is for what is asked after the look at it.
                vcpu.set_kvm_immediate_exit(0);
                if let Some(told) = off.answer(index, || A::is_off(vcpu)) {
                    tell(told);
                }
                if !control.obey(vcpu) {
                    return None;
                }
                continue;
            }
            Err(error) if error.errno() == libc::EAGAIN => continue,
            Err(error) if error.errno() == libc::ENOSYS => Next::Failed(
                "the guest accessed a device by an instruction that KVM cannot take apart (a load or store pair, or one with writeback)".to_owned(),
            ),
            Err(error) if error.errno() == libc::EFAULT => Next::NoPage,
            Err(error) => Next::Failed(format!("KVM cannot run it: {error}")),
        };
        let next = match next {
            Next::Port => match A::answer_ports(vcpu, &buses.ports) {
                Ok(access) if access.found => access.action.into(),
                // Kernels of PCs look at many a port to see what there is: that is no fault.
                Ok(access) => {
                    empty_ports.note(vcpu, A::position, log::Level::Info, || {
                        let act = if access.write { "wrote" } else { "read" };
                        format!("{act} port {:#x}, where nothing is", access.port)
                    });
                    Next::Run
                }
                Err(error) => Next::Failed(format!("{error:#}")),
            },
            Next::Hypercall(function) => match A::answer_hypercall(vcpu, function) {
                Ok(Hypercall::WentOff) => {
                    tell(off.begin(index));
                    Next::Run
                }
                Err(error) => Next::Failed(format!("{error:#}")),
            },
            Next::InternalError => Next::Failed(describe_internal_error(vcpu)),
            Next::NoPage => match buses.find_page(&mut seen) {
                true => Next::Run,
                false => Next::Failed("the host has no page of memory for it".to_owned()),
            },
            next => next,
        };
        match next {
            Next::Run | Next::Port | Next::Hypercall(_) | Next::NoPage | Next::InternalError => {}
            Next::Panicked(panic) => {
                let place = format!(" on vCPU {index} at {}", A::position(vcpu));
                tell(VcpuEvent::panicked(&panic, &place));
            }
            Next::TripleFault => {
                let place = A::position(vcpu);
                log::warn!(
                    "vCPU {index} at {place} faulted in the handler of a double fault: the machine resets"
                );
                return Some(VcpuEvent::Reset);
            }
            Next::Nowhere {
                address,
                size,
                write,
            } => {
                let act = if write { "wrote" } else { "read" };
                faults.report(vcpu, A::position, || {
                    format!("{act} {size} bytes at {address:#x}, where nothing is")
                });
            }
            Next::Raw(reason) => match A::answer_raw(vcpu, reason) {
                Ok(RawExit::Aborted { address }) => faults.report(vcpu, A::position, || {
                    format!("got an abort for an access at {address:#x} that cannot be emulated")
                }),
                Err(error) => return Some(failed::<A>(index, vcpu, &format!("{error:#}"))),
            },
            Next::PowerOff => return Some(VcpuEvent::PowerOff),
            Next::Reset => return Some(VcpuEvent::Reset),
            Next::Failed(cause) => return Some(failed::<A>(index, vcpu, &cause)),
        }
    }
}

fn failed<A: KvmArch>(index: usize, vcpu: &VcpuFd, cause: &str) -> VcpuEvent {
    VcpuEvent::Failed(format!("vCPU {index} at {}: {cause}", A::position(vcpu)))
}

/// The guest's faults on one vCPU: all counted, few logged.
struct Faults {
    index: usize,
    limit: RateLimit,
}

impl Faults {
    fn of(index: usize) -> Faults {
        Faults {
            index,
            limit: RateLimit::default(),
        }
    }

    fn report(&self, vcpu: &VcpuFd, position: fn(&VcpuFd) -> String, what: impl Fn() -> String) {
        self.note(vcpu, position, log::Level::Warn, what);
    }

    fn note(
        &self,
        vcpu: &VcpuFd,
        position: fn(&VcpuFd) -> String,
        level: log::Level,
        what: impl Fn() -> String,
    ) {
        self.limit.log(level, |Admitted { count, .. }| {
            let (index, place, what) = (self.index, position(vcpu), what());
            format!("vCPU {index} at {place} {what} (fault {count} of this vCPU)")
        });
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
