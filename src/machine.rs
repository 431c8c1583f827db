//! From a plan to KVM's objects and our devices. Nothing is decided here.

use crate::kernel::{Initrd, Kernel};
use crate::kvm::KvmArch;
use crate::kvm::burst::BurstWindow;
use crate::memory::{self, IdleMemory};
use crate::reactor::Reactor;
use crate::serial::Serial;
use crate::virtio::Backend;
use crate::virtio::console::HvcConsole;
use crate::virtio::slots::{Slots, Workers};
use anyhow::{Context, Result, bail};
use armlet_arch::irq::Spi;
use armlet_arch::plan::{Placed, Plan};
use armlet_arch::{DeviceKind, Range};
use armlet_devices::bus::Bus;
use armlet_devices::pl011::{Output, Pl011};
use armlet_devices::pl031::Pl031;
use armlet_devices::pl061::Pl061;
use armlet_devices::{Device, IrqLine};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// A machine as KVM has it, with its devices, before its vCPUs run.
pub struct Machine<A: KvmArch> {
    /// vCPUs, by index.
    pub vcpus: Vec<VcpuFd>,
    /// Who answers at which address.
    pub bus: Arc<Bus>,
    /// The devices that the event loop talks to.
    pub devices: Devices,
    /// The virtio devices that the event loop serves.
    pub light: Reactor,
    /// The others, at work as long as the machine lives.
    pub workers: Workers,
    /// Kept for as long as the machine lives.
    _chip: A::Chip,
}

/// The devices that the event loop talks to, where the board has them.
#[derive(Default)]
pub struct Devices {
    /// The serial console.
    pub serial: Option<Arc<Mutex<Serial>>>,
    /// The virtio console, where the terminal is there.
    pub hvc: Option<Arc<HvcConsole>>,
    /// The clock, for its alarm.
    pub clock: Option<Arc<Mutex<Pl031>>>,
    /// The power key's GPIO.
    pub power_key: Option<Arc<Mutex<Pl061>>>,
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
}

/// An interrupt line of a device: an SPI of KVM's controller.
struct SpiLine {
    vm: Arc<VmFd>,
    number: u32,
}

impl IrqLine for SpiLine {
    fn set(&self, high: bool) {
        // It fails for a number that the controller does not have, which the plan excludes.
        if let Err(error) = self.vm.set_irq_line(self.number, high) {
            log::error!("cannot set interrupt line {:#x}: {error}", self.number);
        }
    }

    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
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
    let (vcpus, chip) = A::populate(&vm, plan)?;
    let mut slots = Slots::new(&vm, memory, plan)?;
    let (bus, devices) = attach::<A>(&vm, vcpus.first(), plan, wires, |placed, slot| {
        let backend = backends
            .get(slot as usize)
            .with_context(|| format!("{placed} has no backend"))?;
        Ok(slots.fill::<A>(placed, &**backend)?)
    })?;
    let (light, workers) = slots.finish();
    Ok(Machine {
        vcpus,
        bus: Arc::new(bus),
        devices,
        light,
        workers,
        _chip: chip,
    })
}

fn attach<A: KvmArch>(
    vm: &Arc<VmFd>,
    vcpu: Option<&VcpuFd>,
    plan: &Plan<A>,
    wires: Wires,
    mut virtio: impl FnMut(&Placed, u32) -> Result<Arc<Mutex<dyn Device>>>,
) -> Result<(Bus, Devices)> {
    let line = |spi: Spi| -> Arc<dyn IrqLine> {
        Arc::new(SpiLine {
            vm: Arc::clone(vm),
            number: A::irq_number(spi),
        })
    };
    let mut bus = Bus::new();
    let mut devices = Devices::default();
    let Wires {
        output,
        on_room,
        on_burst,
        on_deadline,
    } = wires;
    let mut console = Some((output, on_room, on_burst));
    let mut on_deadline = Some(on_deadline);
    for placed in &plan.layout.devices {
        let line = line(placed.spi);
        let device: Arc<Mutex<dyn Device>> = match placed.kind {
            DeviceKind::Pl011 => {
                let Some((output, on_room, on_burst)) = console.take() else {
                    bail!("the board has two serial consoles; armlet serves one");
                };
                let window = burst_window(vm, vcpu, plan, placed);
                let uart = Pl011::new(line, output, on_room);
                let serial = Arc::new(Mutex::new(Serial::new(uart, window, on_burst)));
                devices.serial = Some(Arc::clone(&serial));
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
                devices.power_key = Some(Arc::clone(&gpio));
                gpio
            }
            DeviceKind::VirtioMmio { slot } => virtio(placed, slot)?,
        };
        bus.insert(placed.window.start(), placed.window.size(), device)?;
    }
    Ok((bus, devices))
}

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
    let window = BurstWindow::new(Arc::clone(vm), vcpu?, device.window.start());
    window
        .inspect_err(|error| log::info!("each byte of output is an exit: {error:#}"))
        .ok()
}

impl<A: KvmArch> Machine<A> {
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
        let mut idle = IdleMemory::new(memory, &mut self.vcpus);
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
}
