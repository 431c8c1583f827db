//! Creates the KVM objects and devices of a plan. Nothing is decided here.

use crate::kernel::{Initrd, Kernel};
use crate::kvm::KvmArch;
use crate::kvm::interrupts::Interrupts;
use crate::kvm::stats::Statistics;
use crate::memory::{self, IdleMemory};
use crate::sandbox::{Role, Sandbox};
use crate::slots::{Slots, Workers};
use crate::stats::Counters;
use crate::vcpu::{self, Buses, NotHeld, OffCheck, Shared, Traps, VcpuEvent, Vcpus};
use anyhow::{Context, Result};
use armlet_arch::Plan;
use armlet_backends::backend::Backend;
use armlet_backends::pmem::PmemImage;
use armlet_backends::reactor::Reactor;
use armlet_devices::sync::lock;
use armlet_system::deadline::Deadline;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

mod devices;
mod held;
mod pci;
mod saved;

use devices::attach;
pub use devices::{Devices, Wires};
use held::Held;
pub use saved::{DevicesState, MachineState, StateOf};

/// A machine: the single owner of its KVM objects and devices.
pub struct Machine<A: KvmArch> {
    /// Quiesces the virtio devices. Dropped first.
    held: Held,
    /// Where the guest's clocks stand while the machine is paused.
    time: Mutex<Option<A::Time>>,
    vm: Arc<VmFd>,
    /// The vCPUs by index, until they run.
    idle: Vec<VcpuFd>,
    /// The running vCPUs.
    pub vcpus: Vcpus,
    /// Set when output to the console must no longer wait for a reader.
    pub stopping: Arc<AtomicBool>,
    /// The devices by address.
    pub buses: Arc<Buses>,
    /// The devices that are not virtio.
    pub devices: Devices,
    /// The virtio devices that the event loop serves.
    pub light: Reactor,
    /// The virtio devices with worker threads of their own.
    pub workers: Workers,
    /// Its counters.
    pub counters: Counters,
    /// What its threads may do.
    sandbox: Arc<Sandbox>,
    /// Kept for as long as the machine lives.
    chip: Arc<A::Chip>,
}

/// Creates the planned machine on `memory`, with the backends in the order of their windows. Its threads
/// will be confined by `sandbox`. `saved` are the states of the vCPUs that it will be restored with; none if
/// it boots.
///
/// # Errors
/// The step that failed, and KVM's error.
pub fn assemble<A: KvmArch>(
    kvm: &Kvm,
    plan: &Plan<A>,
    memory: &Arc<GuestMemoryMmap>,
    backends: &[Box<dyn Backend>],
    wires: Wires,
    sandbox: &Arc<Sandbox>,
    saved: &[A::VcpuState],
) -> Result<Machine<A>> {
    let vm = Arc::new(A::create_vm(kvm, &plan.width)?);
    memory::give(memory, &vm)?;
    let images = backends.iter().filter_map(|backend| backend.pmem());
    for (index, (image, range)) in images.zip(&plan.layout.pmem).enumerate() {
        memory::give_pmem(image, *range, index, &vm)?;
    }
    let stopping = Arc::clone(&wires.stopping);
    let (vcpus, chip) = A::populate(kvm, &vm, plan, saved)?;
    let images = backends.iter().filter_map(|backend| backend.pmem());
    let images: Vec<_> = images.zip(plan.layout.pmem.iter().copied()).collect();
    let whole = match images.is_empty() {
        true => Arc::clone(memory),
        false => Arc::new(memory::with_pmem(memory, images)?),
    };
    let interrupts = Interrupts::new(&vm, A::pins(plan));
    let mut slots = Slots::new(&vm, &interrupts, [memory, &whole], plan, sandbox)?;
    let kvm = (&vm, &interrupts);
    let (mut buses, devices) =
        attach::<A>(kvm, vcpus.first(), memory, plan, wires, |placed, slot| {
            let backend = match (&plan.layout.pci, &placed.name) {
                // Those over PCI have no slot.
                (Some(_), Some(name)) => pci::named(backends, name)?,
                _ => {
                    let backend = backends.get(slot as usize);
                    &**backend.with_context(|| format!("{placed} has no backend"))?
                }
            };
            Ok(slots.fill::<A>(placed, backend)?)
        })?;
    let images = backends.iter().filter_map(|backend| backend.pmem());
    buses.files = images.map(PmemImage::memory).collect();
    let pci = plan.layout.pci.as_ref();
    let functions = match pci {
        None => Vec::new(),
        Some(placed) => pci::attach(
            &mut buses,
            placed,
            &mut slots,
            &interrupts,
            backends,
            A::irq_number,
        )?,
    };
    let buses = Arc::new(buses);
    if let Some(placed) = pci {
        pci::follow(functions, placed, &vm, &buses);
    }
    let (light, workers) = slots.finish();
    let counters = Counters {
        exits: vcpus.iter().map(|_| Arc::default()).collect(),
        ..Counters::default()
    };
    Ok(Machine {
        held: Held::default(),
        time: Mutex::default(),
        vm,
        counters,
        idle: vcpus,
        vcpus: Vcpus::default(),
        stopping,
        buses,
        devices,
        light,
        workers,
        sandbox: Arc::clone(sandbox),
        chip: Arc::new(chip),
    })
}

impl<A: KvmArch> Machine<A> {
    /// Opens KVM's statistics, where it has them.
    pub fn count(&mut self) {
        let no_vm = |error| log::warn!("KVM does not show its counters ({error})");
        self.counters.vm = Statistics::of(&*self.vm).map_err(no_vm).ok();
        let vcpus = self.idle.iter().map(Statistics::of);
        self.counters.vcpus = vcpus.filter_map(Result::ok).collect();
    }

    /// Loads kernel, initrd and blobs where the plan says.
    ///
    /// # Errors
    /// When a file has changed since it was opened, or its data is damaged.
    pub fn load(
        &mut self,
        memory: &GuestMemoryMmap,
        plan: &Plan<A>,
        kernel: Option<&Kernel>,
        initrd: Option<&Initrd>,
    ) -> Result<()> {
        let payload = &plan.layout.payload;
        // SAFETY: no driver has started a device of this machine yet, and the devices of the
        // previous life ended with its machine.
        let mut idle = unsafe { IdleMemory::new(memory, &mut self.idle) };
        if let (Some(kernel), Some(range)) = (kernel, payload.kernel) {
            kernel.load_into(idle.slice_mut(range)?)?;
        }
        if let (Some(initrd), Some(range)) = (initrd, payload.initrd) {
            initrd.load_into(idle.slice_mut(range)?)?;
        }
        for blob in &plan.blobs {
            memory
                .write_slice(&blob.bytes, GuestAddress(blob.address))
                .with_context(|| {
                    format!("cannot write the {} at {:#x}", blob.name, blob.address)
                })?;
        }
        Ok(())
    }

    /// Starts the vCPUs, each on a thread of its own, called `names` and its number, and pinned to
    /// `cpus(index)` unless that is empty. Each reports events by a closure that `tell`
    /// returns, and where it stopped for a debugger to `traps`. A machine that was restored is paused.
    ///
    /// # Errors
    /// When the host cannot create another thread.
    pub fn start<T: Fn(VcpuEvent) + Send + 'static>(
        &mut self,
        names: &'static str,
        cpus: impl Fn(usize) -> Vec<u32>,
        traps: Option<&Arc<Traps>>,
        tell: impl Fn() -> T,
    ) -> Result<()> {
        let off = Arc::new(OffCheck::new(self.idle.len()));
        let shared = Shared {
            buses: Arc::clone(&self.buses),
            off: Arc::clone(&off),
            sandbox: Arc::clone(&self.sandbox),
            names,
            traps: traps.cloned(),
            is_paused: self.held.is_on(),
        };
        let idle = std::mem::take(&mut self.idle).into_iter();
        for (index, (vcpu, exits)) in idle.zip(&self.counters.exits).enumerate() {
            let (shared, exits) = (shared.clone(), Arc::clone(exits));
            let vcpu = vcpu::start::<A>(index, vcpu, shared, cpus(index), exits, tell())?;
            self.vcpus.add(vcpu, &off);
        }
        Ok(())
    }

    /// What a thread of a role is to begin with, so that it is confined.
    pub fn entrance(&self, role: Role) -> impl FnOnce() -> Result<()> + Send + 'static {
        self.sandbox.entrance(role)
    }

    /// Pauses the machine: no vCPU runs and no virtio device works until [`Self::resume`]. Each
    /// device has completed or put back the requests that it popped. The guest's clocks stand still.
    ///
    /// # Errors
    /// What took longer than `limit`, as a sentence; the machine then keeps running.
    pub fn pause(&self, limit: Duration) -> Result<(), String> {
        let deadline = Deadline::after(limit);
        self.vcpus.pause(limit).map_err(|error| match error {
            NotHeld::Busy(..) => format!("{error}{}", self.what_is_waited_for()),
            NotHeld::Ended(_) => error.to_string(),
        })?;
        self.stop_time();
        // vCPUs first: their requests to a device are then done, or still in its queues.
        let held = self.held.hold(self.workers.devices(), deadline.left());
        match held.is_ok() {
            true => (0..self.vcpus.count()).for_each(|index| {
                // It has not ended, because it is paused.
                let _ = self.vcpus.ask(index, |vcpu| A::note_pause(vcpu));
            }),
            false => {
                self.start_time();
                self.vcpus.resume();
            }
        }
        held
    }

    /// Has vCPU `index` run `task` on its own thread, and returns what comes of it.
    fn on_vcpu<T: Send + 'static>(
        &self,
        index: usize,
        task: impl FnOnce(&VcpuFd) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (sender, answer) = sync_channel(1);
        let asked = self.vcpus.ask(index, move |vcpu| {
            // Nobody waits if the machine ends.
            let _ = sender.try_send(task(vcpu));
        });
        let answer = asked.then(|| answer.recv().ok()).flatten();
        let done = answer.context("it has ended").and_then(|done| done);
        done.with_context(|| format!("vCPU {index}"))
    }

    /// Has the clocks of the guest of a paused machine stand still from now on, unless they do.
    pub fn stop_time(&self) {
        let mut time = lock(&self.time);
        if time.is_none() {
            let vm = Arc::clone(&self.vm);
            match self.on_vcpu(0, move |vcpu| A::time(&vm, vcpu)) {
                Ok(now) => *time = Some(now),
                Err(error) => log::warn!("the guest's clocks go on while it is paused: {error:#}"),
            }
        }
    }

    /// Has the guest's clocks go on from where they stood when it was paused.
    fn start_time(&self) {
        let Some(to) = lock(&self.time).take() else {
            return;
        };
        let count = self.vcpus.count();
        let vm = Arc::clone(&self.vm);
        let started = self
            .on_vcpu(0, move |vcpu| A::time(&vm, vcpu))
            .and_then(|from| {
                (0..count).try_for_each(|index| {
                    let vm = Arc::clone(&self.vm);
                    self.on_vcpu(index, move |vcpu| {
                        A::set_time(&vm, vcpu, (index, count), &from, &to)
                    })
                })
            });
        if let Err(error) = started {
            log::warn!("the guest's clocks went on while it was paused: {error:#}");
        }
    }

    /// Holds the vCPUs for a debugger. Devices keep working.
    ///
    /// # Errors
    /// What took longer than `limit`, as a sentence; the machine then keeps running.
    pub fn hold(&self, limit: Duration) -> Result<(), String> {
        self.vcpus.hold(limit).map_err(|error| match error {
            NotHeld::Busy(..) => format!("{error}{}", self.what_is_waited_for()),
            NotHeld::Ended(_) => error.to_string(),
        })?;
        for index in 0..self.vcpus.count() {
            let _ = self.vcpus.ask(index, |vcpu| A::note_pause(vcpu));
        }
        Ok(())
    }

    /// Resumes a paused machine, devices first.
    pub fn resume(&self) {
        self.held.release(self.workers.devices());
        self.start_time();
        self.vcpus.resume();
    }

    /// Stops all vCPUs, even if the machine is paused.
    ///
    /// # Errors
    /// What took longer than `limit`, for a message. The request stands: call again to wait longer.
    pub fn stop(&self, limit: Duration) -> Result<(), String> {
        self.stopping.store(true, Ordering::Release);
        self.vcpus
            .stop(limit)
            .map_err(|index| format!("vCPU {index} to stop{}", self.what_is_waited_for()))
    }

    /// Returns what a vCPU may be waiting for, as the end of a sentence.
    fn what_is_waited_for(&self) -> String {
        let devices = self.workers.at_work();
        match devices.is_empty() {
            true => String::new(),
            false => format!(", which waits for {devices}"),
        }
    }
}
