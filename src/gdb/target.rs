//! What gdb can do to the guest: the requests of its protocol, as gdbstub hands them on.

use super::description::{self, Described, Number, Values};
use super::guest::Guest;
use super::patches::Patches;
use crate::kvm::debug::{self, BREAK, Masked, Stops};
use crate::vcpu::{Happened, Trap};
use anyhow::Result;
use armlet_arch::debug::{Access, Hit, Limits, Point};
use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{
    SingleRegisterAccess, SingleRegisterAccessOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps,
    SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::target_description_xml_override::{
    TargetDescriptionXmlOverride, TargetDescriptionXmlOverrideOps,
};
use gdbstub::target::{Target as GdbTarget, TargetError, TargetResult};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

/// Why the guest stopped, for gdb.
pub(super) type Reason = MultiThreadStopReason<u64>;

/// How long vCPUs may take to stand still.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a vCPU does when the guest is resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Continue,
    Step,
    /// Whatever all do that nothing was said of.
    Default,
}

/// The guest, with what the debugger has done to it.
pub(super) struct Target {
    pub(super) guest: Guest,
    patches: Patches,
    points: Vec<Point>,
    limits: Limits,
    keeps_interrupts_out: bool,
    actions: Vec<Action>,
    /// Whether vCPUs without an action stay where they are.
    is_locked: bool,
    /// What each vCPU stops at, as far as it was told.
    applied: Vec<Option<Stops>>,
    /// vCPUs whose interrupts are masked for a step.
    masked: Vec<(usize, Masked)>,
    /// Watchpoints that were met while another stop was told of.
    pending: Vec<Reason>,
    description: String,
}

fn tid(index: usize) -> Tid {
    // Counted from 1.
    Tid::MIN.saturating_add(index)
}

fn index(tid: Tid) -> usize {
    tid.get() - 1
}

/// An error that gdb is told of, and goes on from; the messages say which.
fn failed(error: &anyhow::Error) -> TargetError<Infallible> {
    log::debug!("gdb: {error:#}");
    TargetError::NonFatal
}

impl Target {
    pub(super) fn new(guest: Guest, (limits, keeps_interrupts_out): (Limits, bool)) -> Target {
        let vcpus = guest.vcpus;
        Target {
            guest,
            patches: Patches::default(),
            points: Vec::new(),
            limits,
            keeps_interrupts_out,
            actions: vec![Action::Default; vcpus],
            is_locked: false,
            applied: vec![None; vcpus],
            masked: Vec::new(),
            pending: Vec::new(),
            description: description::xml(),
        }
    }

    /// Stops the guest for a client that has come.
    ///
    /// # Errors
    /// Why it does not stand still.
    pub(super) fn attach(&mut self, patience: Duration) -> Result<()> {
        self.guest.hold(patience)
    }

    /// Undoes what the debugger has done, and has the guest go on.
    pub(super) fn detach(&mut self) {
        let undone = self.hold().and_then(|()| {
            self.patches.clear(&BREAK, &self.guest);
            self.points.clear();
            for index in 0..self.guest.vcpus {
                self.apply(index, false)?;
            }
            Ok(())
        });
        // A guest that has ended is no error.
        if let Err(error) = undone.and_then(|()| self.guest.release(None)) {
            log::debug!("gdb: {error:#}");
        }
        self.pending.clear();
    }

    /// Stops the guest, as Ctrl-C at gdb does.
    pub(super) fn interrupt(&mut self) -> Reason {
        if let Err(error) = self.hold() {
            log::warn!("gdb: {error:#}");
        }
        Reason::SignalWithThread {
            tid: tid(0),
            signal: Signal::SIGINT,
        }
    }

    /// Holds all vCPUs, and unmasks interrupts that were masked for a step.
    fn hold(&mut self) -> Result<()> {
        self.guest.hold(PATIENCE)?;
        for (index, masked) in std::mem::take(&mut self.masked) {
            self.guest
                .with(index, move |vcpu| debug::end_step(vcpu, masked))?;
        }
        Ok(())
    }

    /// Whether there is more to tell of the last stop.
    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// The guest's vCPUs are new.
    pub(super) fn begin_life(&mut self) {
        self.applied.fill(None);
        self.masked.clear();
        self.pending.clear();
    }

    /// Returns why the guest has stopped, if it has, and stops all of it then.
    pub(super) fn stopped(&mut self, happened: Happened) -> Option<Reason> {
        let mut reasons: Vec<Reason> = self.pending.drain(..).collect();
        if happened.is_new_life {
            self.begin_life();
            reasons.push(Reason::SignalWithThread {
                tid: tid(0),
                signal: Signal::SIGTRAP,
            });
        }
        for trap in happened.traps {
            match self.reason(trap) {
                Ok(reason) => reasons.extend(reason),
                Err(error) => log::warn!("gdb: {error:#}"),
            }
        }
        if reasons.is_empty() {
            return None;
        }
        if let Err(error) = self.hold() {
            log::warn!("gdb: {error:#}");
        }
        let reason = reasons.remove(0);
        // What else was met is met again, but for accesses that are done: where a CPU stops after them.
        let is_after = BREAK.len() == 1;
        reasons.retain(|reason| is_after && matches!(reason, Reason::Watch { .. }));
        self.pending = reasons;
        Some(reason)
    }

    /// Returns why a vCPU stopped; `None`, and it goes on, where that is the guest's own affair.
    fn reason(&mut self, (index, exit): Trap) -> Result<Option<Reason>> {
        let tid = tid(index);
        let trapped = Reason::SignalWithThread {
            tid,
            signal: Signal::SIGTRAP,
        };
        Ok(Some(match debug::hit(&exit, &self.points) {
            Some(Hit::Breakpoint) => Reason::HwBreak(tid),
            Some(Hit::Watchpoint(point, address)) => Reason::Watch {
                tid,
                kind: match point.access {
                    Access::Read => WatchKind::Read,
                    Access::ReadWrite => WatchKind::ReadWrite,
                    Access::Write | Access::Execute => WatchKind::Write,
                },
                addr: match address.wrapping_sub(point.address) < point.length {
                    true => address,
                    false => point.address,
                },
            },
            Some(Hit::Instruction) => {
                let position = self.guest.with(index, |vcpu| debug::position(vcpu))?;
                if self.patches.has(position) {
                    Reason::SwBreak(tid)
                } else {
                    let stops = self
                        .applied
                        .get(index)
                        .cloned()
                        .flatten()
                        .unwrap_or_default();
                    let pass_on = move |vcpu: &mut _| debug::pass_on(vcpu, &exit, &stops);
                    self.guest.with(index, pass_on)?;
                    self.guest.release(Some(index))?;
                    return Ok(None);
                }
            }
            Some(Hit::Step) | None => trapped,
        }))
    }

    /// Tells a vCPU where to stop.
    fn apply(&mut self, index: usize, step: bool) -> Result<()> {
        let stops = Stops {
            software: !self.patches.is_empty(),
            step,
            keeps_interrupts_out: self.keeps_interrupts_out,
            points: self.points.clone(),
        };
        let Some(applied) = self.applied.get_mut(index) else {
            return Ok(());
        };
        // A step is over once it was made.
        if applied.as_ref() == Some(&stops) && !step {
            return Ok(());
        }
        *applied = Some(stops.clone());
        self.guest
            .with(index, move |vcpu| debug::apply(vcpu, &stops))
    }

    fn resume_all(&mut self) -> Result<()> {
        for index in 0..self.guest.vcpus {
            let step = self.actions[index] == Action::Step;
            self.apply(index, step)?;
            if step {
                let memory = Arc::clone(&self.guest.memory);
                let begin = move |vcpu: &mut _| debug::begin_step(vcpu, &memory);
                let masked = self.guest.with(index, begin)?;
                self.masked.push((index, masked));
            }
        }
        if !self.is_locked {
            return self.guest.release(None);
        }
        for index in 0..self.guest.vcpus {
            if self.actions[index] != Action::Default {
                self.guest.release(Some(index))?;
            }
        }
        Ok(())
    }

    fn set_action(&mut self, tid: Tid, action: Action) {
        if let Some(own) = self.actions.get_mut(index(tid)) {
            *own = action;
        }
    }

    fn add_point(&mut self, point: Point) -> bool {
        self.points.push(point);
        let is_possible = self.limits.hold(&self.points) && debug::is_possible(&self.points);
        if !is_possible {
            self.points.pop();
        }
        is_possible
    }

    fn remove_point(&mut self, point: Point) -> bool {
        let at = self.points.iter().position(|own| *own == point);
        at.map(|at| self.points.remove(at)).is_some()
    }
}

impl GdbTarget for Target {
    type Arch = Described;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, Described, Infallible> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_target_description_xml_override(
        &mut self,
    ) -> Option<TargetDescriptionXmlOverrideOps<'_, Self>> {
        Some(self)
    }

    // Breakpoint instructions are written here, not by gdb.
    fn guard_rail_implicit_sw_breakpoints(&self) -> bool {
        true
    }
}

impl TargetDescriptionXmlOverride for Target {
    fn target_description_xml(
        &self,
        annex: &[u8],
        offset: u64,
        length: usize,
        buf: &mut [u8],
    ) -> TargetResult<usize, Self> {
        if annex != b"target.xml" {
            return Err(TargetError::NonFatal);
        }
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = self
            .description
            .as_bytes()
            .get(offset..)
            .unwrap_or_default();
        let count = rest.len().min(length).min(buf.len());
        buf[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }
}

impl MultiThreadBase for Target {
    fn read_registers(&mut self, regs: &mut Values, tid: Tid) -> TargetResult<(), Self> {
        let read = self.guest.with(index(tid), |vcpu| debug::registers(vcpu));
        regs.0 = read.map_err(|error| failed(&error))?;
        Ok(())
    }

    fn write_registers(&mut self, regs: &Values, tid: Tid) -> TargetResult<(), Self> {
        let bytes = regs.0.clone();
        let set = self
            .guest
            .with(index(tid), move |vcpu| debug::set_registers(vcpu, &bytes));
        set.map_err(|error| failed(&error))
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let mut done = 0;
        while done < data.len() {
            let found = self
                .guest
                .translate(index(tid), start.wrapping_add(done as u64));
            let Some((physical, left)) = found.map_err(|error| failed(&error))? else {
                break;
            };
            let count = (data.len() - done).min(usize::try_from(left).unwrap_or(usize::MAX));
            let part = &mut data[done..done + count];
            if !super::patches::Memory::read(&self.guest, physical, part) {
                break;
            }
            done += count;
        }
        match done {
            0 if !data.is_empty() => Err(TargetError::NonFatal),
            done => Ok(done),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let mut done = 0;
        while done < data.len() {
            let found = self
                .guest
                .translate(index(tid), start.wrapping_add(done as u64));
            let found = found.map_err(|error| failed(&error))?;
            let (physical, left) = found.ok_or(TargetError::NonFatal)?;
            let count = (data.len() - done).min(usize::try_from(left).unwrap_or(usize::MAX));
            let part = &data[done..done + count];
            if !super::patches::Memory::write(&self.guest, physical, part) {
                return Err(TargetError::NonFatal);
            }
            done += count;
        }
        Ok(())
    }

    fn list_active_threads(&mut self, active: &mut dyn FnMut(Tid)) -> Result<(), Infallible> {
        (0..self.guest.vcpus).map(tid).for_each(active);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for Target {
    fn read_register(
        &mut self,
        tid: Tid,
        reg: Number,
        buf: &mut [u8],
    ) -> TargetResult<usize, Self> {
        let mut all = Values::default();
        self.read_registers(&mut all, tid)?;
        let place = description::place(reg.0).ok_or(TargetError::NonFatal)?;
        let value = all.0.get(place).ok_or(TargetError::NonFatal)?;
        let room = buf.get_mut(..value.len()).ok_or(TargetError::NonFatal)?;
        room.copy_from_slice(value);
        Ok(value.len())
    }

    fn write_register(&mut self, tid: Tid, reg: Number, val: &[u8]) -> TargetResult<(), Self> {
        let mut all = Values::default();
        self.read_registers(&mut all, tid)?;
        let place = description::place(reg.0).ok_or(TargetError::NonFatal)?;
        let own = all.0.get_mut(place).ok_or(TargetError::NonFatal)?;
        if own.len() != val.len() {
            return Err(TargetError::NonFatal);
        }
        own.copy_from_slice(val);
        self.write_registers(&all, tid)
    }
}

impl MultiThreadResume for Target {
    fn resume(&mut self) -> Result<(), Infallible> {
        // A guest that has ended, or begins another life, is told of as that.
        if let Err(error) = self.resume_all() {
            log::debug!("gdb: {error:#}");
        }
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Infallible> {
        self.actions.fill(Action::Default);
        self.is_locked = false;
        Ok(())
    }

    fn set_resume_action_continue(
        &mut self,
        tid: Tid,
        _: Option<Signal>,
    ) -> Result<(), Infallible> {
        self.set_action(tid, Action::Continue);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Target {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Infallible> {
        self.set_action(tid, Action::Step);
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Target {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Infallible> {
        self.is_locked = true;
        Ok(())
    }
}

impl Breakpoints for Target {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Target {
    fn add_sw_breakpoint(&mut self, addr: u64, kind: usize) -> TargetResult<bool, Self> {
        if kind != BREAK.len() || !addr.is_multiple_of(BREAK.len() as u64) {
            return Ok(false);
        }
        // By the tables of the first vCPU that has the address: kernels have it on all.
        for index in 0..self.guest.vcpus {
            let found = self
                .guest
                .translate(index, addr)
                .map_err(|error| failed(&error))?;
            if let Some((physical, _)) = found {
                return Ok(self.patches.add(addr, physical, &BREAK, &self.guest));
            }
        }
        Err(TargetError::NonFatal)
    }

    fn remove_sw_breakpoint(&mut self, addr: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.patches.remove(addr, &BREAK, &self.guest))
    }
}

impl HwBreakpoint for Target {
    fn add_hw_breakpoint(&mut self, addr: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.add_point(breakpoint(addr)))
    }

    fn remove_hw_breakpoint(&mut self, addr: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.remove_point(breakpoint(addr)))
    }
}

fn breakpoint(address: u64) -> Point {
    Point {
        address,
        length: 0,
        access: Access::Execute,
    }
}

impl HwWatchpoint for Target {
    fn add_hw_watchpoint(
        &mut self,
        addr: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        Ok(self.add_point(watchpoint(addr, len, kind)))
    }

    fn remove_hw_watchpoint(
        &mut self,
        addr: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        Ok(self.remove_point(watchpoint(addr, len, kind)))
    }
}

fn watchpoint(address: u64, length: u64, kind: WatchKind) -> Point {
    let access = match kind {
        WatchKind::Write => Access::Write,
        WatchKind::Read => Access::Read,
        WatchKind::ReadWrite => Access::ReadWrite,
    };
    Point {
        address,
        length,
        access,
    }
}
