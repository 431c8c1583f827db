//! A vCPU's thread: a loop of KVM_RUN and exit handling.
//!
//! `answer` decodes an exit; the thread takes requests by its `control`, and reports
//! [`VcpuEvent`]s.

use crate::affinity;
use crate::kvm::internal::describe_internal_error;
use crate::kvm::kick::{self, Kickable, Target};
use crate::kvm::{Hypercall, KvmArch, RawExit};
use crate::sandbox::{Role, Sandbox};
use crate::stats::{Exits, Reason};
use answer::{answer, reason};
use anyhow::{Context, Result};
use armlet_devices::limit::{Admitted, RateLimit};
use armlet_system::eintr::CallError;
use control::Control;
use kvm_ioctls::VcpuFd;
use std::sync::Arc;

mod all;
mod answer;
mod control;
mod event;
mod off;
mod running;
mod traps;

pub use all::{NotHeld, Vcpus};
pub use answer::{Buses, Next};
pub use event::VcpuEvent;
pub use off::OffCheck;
pub use running::RunningVcpu;
pub use traps::{Happened, Trap, Traps};

/// Small, so that a huge page never backs it: the deepest call is a device's register access.
const STACK_BYTES: usize = 128 << 10;

/// What all vCPUs of a machine share.
#[derive(Clone)]
pub struct Shared {
    /// Who answers the guest.
    pub buses: Arc<Buses>,
    /// The check whether all vCPUs are off.
    pub off: Arc<OffCheck>,
    /// What they may still do.
    pub sandbox: Arc<Sandbox>,
    /// What stands before a vCPU's number in its thread's name.
    pub names: &'static str,
    /// The debugger, if there is to be one.
    pub traps: Option<Arc<Traps>>,
    /// Whether they begin paused.
    pub is_paused: bool,
}

/// Starts vCPU `index` on a thread of its own, pinned to these CPUs of the host, or unpinned if
/// there are none. It runs until it is asked to stop, or reports an event that ends it.
///
/// # Errors
/// When the host cannot create another thread.
pub fn start<A: KvmArch>(
    index: usize,
    mut vcpu: VcpuFd,
    shared: Shared,
    cpus: Vec<u32>,
    exits: Arc<Exits>,
    tell: impl Fn(VcpuEvent) + Send + 'static,
) -> Result<RunningVcpu> {
    // The handler must exist before any thread can be kicked.
    kick::install();
    let control = Arc::new(Control::default());
    if shared.traps.as_ref().is_some_and(|traps| traps.holds()) {
        control.hold();
    }
    if shared.is_paused {
        control.pause();
    }
    let asked = Arc::clone(&control);
    let target = Target::default();
    let kicked = target.clone();
    let thread = std::thread::Builder::new()
        .name(format!("{}{index}", shared.names))
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let _end = asked.until_end();
            let _kickable = Kickable::new(&mut vcpu, kicked);
            if !cpus.is_empty()
                && let Err(error) = affinity::run_on(&cpus)
            {
                tell(VcpuEvent::Failed(format!("vCPU {index} {error:#}")));
                return;
            }
            if let Err(error) = shared.sandbox.enter_as(Role::Vcpu) {
                tell(VcpuEvent::Failed(format!("vCPU {index}: {error:#}")));
                return;
            }
            if let Some(told) = run::<A>(index, &mut vcpu, &asked, &shared, &exits, &tell) {
                tell(told);
            }
        })
        .with_context(|| format!("cannot start a thread for vCPU {index}"))?;
    Ok(RunningVcpu::new(thread, target, control))
}

fn run<A: KvmArch>(
    index: usize,
    vcpu: &mut VcpuFd,
    control: &Control<VcpuFd>,
    shared: &Shared,
    exits: &Exits,
    tell: &impl Fn(VcpuEvent),
) -> Option<VcpuEvent> {
    let Shared { buses, off, .. } = shared;
    let faults = Faults::of(index);
    let empty_ports = Faults::of(index);
    let mut seen = Vec::new();
    // A request may have come before the thread could be kicked.
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
                // Cleared first: a kick that follows is for a request that `obey` may not see.
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
                // PC kernels probe many ports for devices: that is no fault.
                Ok(access) => {
                    empty_ports.note(vcpu, A::position, log::Level::Info, || {
                        let act = if access.write { "wrote" } else { "read" };
                        format!("{act} port {:#x}, where there is no device", access.port)
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
                    format!("{act} {size} bytes at {address:#x}, where there is no device")
                });
            }
            Next::Raw(reason) => match A::answer_raw(vcpu, reason) {
                Ok(RawExit::Aborted { address }) => faults.report(vcpu, A::position, || {
                    format!("got an abort for an access at {address:#x} that cannot be emulated")
                }),
                Err(error) => return Some(failed::<A>(index, vcpu, &format!("{error:#}"))),
            },
            Next::Trap(exit) => match &shared.traps {
                Some(traps) => {
                    control.hold();
                    traps.tell(index, *exit);
                    if !control.obey(vcpu) {
                        return None;
                    }
                }
                None => {
                    let cause = "KVM stopped it for a debugger, which there is not";
                    return Some(failed::<A>(index, vcpu, cause));
                }
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
