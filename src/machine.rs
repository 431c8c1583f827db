//! From a plan to KVM's objects and our devices. Nothing is decided here.

use crate::kernel::{Initrd, Kernel};
use crate::kvm::KvmArch;
use crate::kvm::burst::BurstWindow;
use crate::kvm::interrupts::Interrupts;
use crate::kvm::stats::Statistics;
use crate::memory::{self, IdleMemory};
use crate::serial::Serial;
use crate::slots::{Slots, Workers};
use crate::stats::Counters;
use crate::vcpu::{self, Buses, NotHeld, OffCheck, Shared, VcpuEvent, Vcpus};
use anyhow::{Context, Result};
use armlet_arch::irq::Spi;
use armlet_arch::machine::POWER_KEY_LINE;
use armlet_arch::{DeviceKind, PortKind, Range};
use armlet_arch::{Placed, PlacedPorts, Plan};
use armlet_backends::backend::Backend;
use armlet_backends::console::HvcConsole;
use armlet_backends::pmem::PmemImage;
use armlet_backends::reactor::Reactor;
use armlet_devices::Device;
use armlet_devices::bus::Bus;
use armlet_devices::cmos::Cmos;
use armlet_devices::console::{Console, Output};
use armlet_devices::i8042::I8042;
use armlet_devices::pl011::Pl011;
use armlet_devices::pl031::Pl031;
use armlet_devices::pl061::Pl061;
use armlet_devices::power::{AcpiPower, PowerKey, ResetControl};
use armlet_devices::sync::lock;
use armlet_devices::uart16550::Uart16550;
use armlet_system::deadline::Deadline;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

mod held;

use held::Held;

/// A machine as KVM has it, with its devices: the one owner of all of them.
pub struct Machine<A: KvmArch> {
    /// Whether the virtio devices are held. It ends first.
    held: Held,
    vm: Arc<VmFd>,
    /// vCPUs, by index, until they run.
    idle: Vec<VcpuFd>,
    /// vCPUs that run.
    pub vcpus: Vcpus,
    /// Set when no reader of the console is waited for any more.
    pub stopping: Arc<AtomicBool>,
    /// Who answers at which address.
    pub buses: Arc<Buses>,
    /// The devices that the event loop talks to.
    pub devices: Devices,
    /// The virtio devices that the event loop serves.
    pub light: Reactor,
    /// The others, at work as long as the machine lives.
    pub workers: Workers,
    /// What it counts.
    pub counters: Counters,
    /// Kept for as long as the machine lives.
    _chip: A::Chip,
}

/// The devices that the event loop talks to, where the board has them.
#[derive(Default)]
pub struct Devices {
    /// The serial console.
    pub serial: Option<Arc<Mutex<dyn Console>>>,
    /// The virtio console, where the terminal is there.
    pub hvc: Option<Arc<HvcConsole>>,
    /// The clock, for its alarm.
    pub clock: Option<Arc<Mutex<Pl031>>>,
    /// The power key.
    pub power_key: Option<Arc<Mutex<dyn PowerKey>>>,
}

/// The power key on its line of a GPIO.
struct GpioKey(Arc<Mutex<Pl061>>);

impl PowerKey for GpioKey {
    fn set_pressed(&mut self, pressed: bool) {
        let mut gpio = lock(&self.0);
        gpio.set_input(POWER_KEY_LINE as u8, pressed);
    }
}

/// What the devices call when something happens. Each may be called by any vCPU's thread, with
/// the device locked.
pub struct Wires {
    /// Takes the console's output.
    pub output: Box<dyn Output>,
    /// The console takes input again.
    pub on_room: Box<dyn Fn() + Send>,
    /// A burst of output began.
    pub on_burst: Box<dyn Fn() + Send>,
    /// The clock's alarm was set anew.
    pub on_deadline: Box<dyn Fn() + Send>,
    /// Set by the machine when it stops: no reader of the output is to be waited for any more.
    pub stopping: Arc<AtomicBool>,
}

/// Makes the planned machine on `memory`, with the backends in the order of their slots.
///
/// # Errors
/// The step that failed and what KVM said.
pub fn assemble<A: KvmArch>(
    kvm: &Kvm,
    plan: &Plan<A>,
    memory: &Arc<GuestMemoryMmap>,
    backends: &[Box<dyn Backend>],
    wires: Wires,
) -> Result<Machine<A>> {
    let vm = Arc::new(A::create_vm(kvm, &plan.width)?);
    memory::give(memory, &vm)?;
    let images = backends.iter().filter_map(|backend| backend.pmem());
    for (index, (image, range)) in images.zip(&plan.layout.pmem).enumerate() {
        memory::give_pmem(image, *range, index, &vm)?;
    }
    let stopping = Arc::clone(&wires.stopping);
    let (vcpus, chip) = A::populate(kvm, &vm, plan)?;
    let images = backends.iter().filter_map(|backend| backend.pmem());
    let images: Vec<_> = images.zip(plan.layout.pmem.iter().copied()).collect();
    let whole = match images.is_empty() {
        true => Arc::clone(memory),
        false => Arc::new(memory::with_pmem(memory, images)?),
    };
    let interrupts = Interrupts::new(&vm, A::pins(plan));
    let mut slots = Slots::new(&vm, &interrupts, [memory, &whole], plan)?;
    let kvm = (&vm, &interrupts);
    let (mut buses, devices) = attach::<A>(kvm, vcpus.first(), plan, wires, |placed, slot| {
        let backend = backends
            .get(slot as usize)
            .with_context(|| format!("{placed} has no backend"))?;
        Ok(slots.fill::<A>(placed, &**backend)?)
    })?;
    let images = backends.iter().filter_map(|backend| backend.pmem());
    buses.files = images.map(PmemImage::memory).collect();
    let (light, workers) = slots.finish();
    let counters = Counters {
        exits: vcpus.iter().map(|_| Arc::default()).collect(),
        ..Counters::default()
    };
    Ok(Machine {
        held: Held::default(),
        vm,
        counters,
        idle: vcpus,
        vcpus: Vcpus::default(),
        stopping,
        buses: Arc::new(buses),
        devices,
        light,
        workers,
        _chip: chip,
    })
}

fn attach<A: KvmArch>(
    (vm, interrupts): (&Arc<VmFd>, &Arc<Interrupts>),
    vcpu: Option<&VcpuFd>,
    plan: &Plan<A>,
    wires: Wires,
    mut virtio: impl FnMut(&Placed, u32) -> Result<Arc<Mutex<dyn Device>>>,
) -> Result<(Buses, Devices)> {
    let line = |spi: Spi| interrupts.line(A::irq_number(spi));
    let mut bus = Bus::new();
    let mut devices = Devices::default();
    let Wires {
        output,
        on_room,
        on_burst,
        on_deadline,
        stopping: _,
    } = wires;
    let mut console = Some((output, on_room, on_burst));
    let mut on_deadline = Some(on_deadline);
    for placed in &plan.layout.devices {
        let line = line(placed.spi);
        let device: Arc<Mutex<dyn Device>> = match placed.kind {
            DeviceKind::Pl011 => {
                let (output, on_room, on_burst) = console.take().context(TWO_CONSOLES)?;
                let window = burst_window(vm, vcpu, plan, placed);
                let uart = Pl011::new(line, output, on_room);
                let serial = Arc::new(Mutex::new(Serial::new(uart, window, on_burst)));
                devices.serial = Some(Arc::clone(&serial) as _);
                serial
            }
            DeviceKind::Pl031 => {
                let on_deadline = on_deadline.take().unwrap_or_else(|| Box::new(|| {}));
                let clock = Arc::new(Mutex::new(Pl031::new(line, on_deadline)));
                devices.clock = Some(Arc::clone(&clock));
                clock
            }
            DeviceKind::Pl061 => {
                let gpio = Arc::new(Mutex::new(Pl061::new(line)));
                devices.power_key = Some(Arc::new(Mutex::new(GpioKey(Arc::clone(&gpio)))));
                gpio
            }
            DeviceKind::VirtioMmio { slot } => virtio(placed, slot)?,
        };
        bus.insert(placed.window.start(), placed.window.size(), device)?;
    }
    if let Some((window, device)) = A::chip_device(interrupts, plan) {
        bus.insert(window.start(), window.size(), device)?;
    }
    let mut ports = Bus::new();
    let placed_ports = match A::PORTS {
        true => plan.layout.ports.as_slice(),
        false => &[],
    };
    for placed in placed_ports {
        let PlacedPorts { kind, irq, .. } = *placed;
        let line = || {
            irq.map(line)
                .with_context(|| format!("the {kind} has no interrupt"))
        };
        let device: Arc<Mutex<dyn Device>> = match kind {
            PortKind::Uart16550 => {
                let (output, on_room, on_burst) = console.take().context(TWO_CONSOLES)?;
                let window = vcpu
                    .map(|vcpu| BurstWindow::at_ports(Arc::clone(vm), vcpu, placed.ports.start()));
                let uart = Uart16550::new(line()?, output, on_room);
                let serial = Serial::new(uart, window.and_then(collecting), on_burst);
                let serial = Arc::new(Mutex::new(serial));
                devices.serial = Some(Arc::clone(&serial) as _);
                serial
            }
            PortKind::Cmos => Arc::new(Mutex::new(Cmos::new())),
            PortKind::I8042 => Arc::new(Mutex::new(I8042::new())),
            PortKind::Reset => Arc::new(Mutex::new(ResetControl::new())),
            PortKind::Acpi => {
                let acpi = Arc::new(Mutex::new(AcpiPower::new(line()?)));
                devices.power_key = Some(Arc::clone(&acpi) as _);
                acpi
            }
        };
        ports.insert(placed.ports.start(), placed.ports.size(), device)?;
    }
    let buses = Buses {
        memory: bus,
        ports,
        files: Vec::new(),
    };
    Ok((buses, devices))
}

const TWO_CONSOLES: &str = "the board has two serial consoles; armlet serves one";

/// A window for bursts of output, where KVM has it and no other device shares its page.
fn burst_window<A: KvmArch>(
    vm: &Arc<VmFd>,
    vcpu: Option<&VcpuFd>,
    plan: &Plan<A>,
    device: &Placed,
) -> Option<BurstWindow> {
    let page = Range::new(device.window.start(), rustix::param::page_size() as u64)?;
    let mut regions = plan.layout.regions().into_iter();
    if regions.any(|other| other.range != device.window && other.range.overlaps(page)) {
        return None;
    }
    collecting(BurstWindow::new(
        Arc::clone(vm),
        vcpu?,
        device.window.start(),
    ))
}

fn collecting(window: Result<BurstWindow>) -> Option<BurstWindow> {
    window
        .inspect_err(|error| log::info!("each byte of output is an exit: {error:#}"))
        .ok()
}

impl<A: KvmArch> Machine<A> {
    /// Opens KVM's counters, where it has them.
    pub fn count(&mut self) {
        let no_vm = |error| log::warn!("KVM does not show its counters ({error})");
        self.counters.vm = Statistics::of(&*self.vm).map_err(no_vm).ok();
        let vcpus = self.idle.iter().map(Statistics::of);
        self.counters.vcpus = vcpus.filter_map(Result::ok).collect();
    }

    /// Puts kernel, initrd and blobs where the plan says.
    ///
    /// # Errors
    /// A file that changed since it was opened, or damaged data.
    pub fn load(
        &mut self,
        memory: &GuestMemoryMmap,
        plan: &Plan<A>,
        kernel: Option<&Kernel>,
        initrd: Option<&Initrd>,
    ) -> Result<()> {
        let payload = &plan.layout.payload;
        // SAFETY: no driver has started a device of this machine yet, and those of the guest before
        // ended with its machine.
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

    /// Lets the vCPUs run, each on a thread of its own: the one with an index on `cpus(index)`, or
    /// anywhere where there are none. Each tells by what `tell` makes.
    ///
    /// # Errors
    /// A host without room for another thread.
    pub fn start<T: Fn(VcpuEvent) + Send + 'static>(
        &mut self,
        cpus: impl Fn(usize) -> Vec<u32>,
        tell: impl Fn() -> T,
    ) -> Result<()> {
        let off = Arc::new(OffCheck::new(self.idle.len()));
        let shared = Shared {
            buses: Arc::clone(&self.buses),
            off: Arc::clone(&off),
        };
        let idle = std::mem::take(&mut self.idle).into_iter();
        for (index, (vcpu, exits)) in idle.zip(&self.counters.exits).enumerate() {
            let (shared, exits) = (shared.clone(), Arc::clone(exits));
            let vcpu = vcpu::start::<A>(index, vcpu, shared, cpus(index), exits, tell())?;
            self.vcpus.add(vcpu, &off);
        }
        Ok(())
    }

    /// Holds the machine: no vCPU runs and no virtio device works until [`Self::resume`]. Each device
    /// has finished or handed back what it took. The guest's clocks and timers go on.
    ///
    /// # Errors
    /// What is waited for longer than `limit`, in a sentence, after which the machine runs on.
    pub fn pause(&self, limit: Duration) -> Result<(), String> {
        let deadline = Deadline::after(limit);
        self.vcpus.pause(limit).map_err(|error| match error {
            NotHeld::Busy(..) => format!("{error}{}", self.what_is_waited_for()),
            NotHeld::Ended(_) => error.to_string(),
        })?;
        // vCPUs first: what they ask of a device is done, or still in its queues.
        let held = self.held.hold(self.workers.devices(), deadline.left());
        match held.is_ok() {
            true => (0..self.vcpus.count()).for_each(|index| {
                // It has not ended, as it is held.
                let _ = self.vcpus.ask(index, |vcpu| A::note_pause(vcpu));
            }),
            false => self.vcpus.resume(),
        }
        held
    }

    /// Lets a machine that is held go on, devices first.
    pub fn resume(&self) {
        self.held.release(self.workers.devices());
        self.vcpus.resume();
    }

    /// Has all vCPUs end, also of a machine that is held.
    ///
    /// # Errors
    /// What is waited for longer than `limit`, for a message. It is to end still: ask again.
    pub fn stop(&self, limit: Duration) -> Result<(), String> {
        self.stopping.store(true, Ordering::Release);
        self.vcpus
            .stop(limit)
            .map_err(|index| format!("vCPU {index} to stop{}", self.what_is_waited_for()))
    }

    /// What a vCPU may wait for, as the end of a sentence.
    fn what_is_waited_for(&self) -> String {
        let devices = self.workers.at_work();
        match devices.is_empty() {
            true => String::new(),
            false => format!(", which waits for {devices}"),
        }
    }
}
