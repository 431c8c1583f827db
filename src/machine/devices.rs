//! The non-virtio devices of a machine, and the buses of all devices.

use crate::kvm::KvmArch;
use crate::kvm::burst::BurstWindow;
use crate::kvm::interrupts::Interrupts;
use crate::serial::{Serial, SerialConsole};
use crate::vcpu::Buses;
use anyhow::{Context, Result};
use armlet_arch::irq::Spi;
use armlet_arch::machine::POWER_KEY_LINE;
use armlet_arch::{DeviceKind, Placed, PlacedPorts, Plan, PortKind, Range};
use armlet_backends::console::HvcConsole;
use armlet_devices::Device;
use armlet_devices::bus::Bus;
use armlet_devices::cmos::Cmos;
use armlet_devices::console::Output;
use armlet_devices::generation::{self, Generation};
use armlet_devices::i8042::I8042;
use armlet_devices::ioapic::IoApic;
use armlet_devices::pl011::Pl011;
use armlet_devices::pl031::Pl031;
use armlet_devices::pl061::Pl061;
use armlet_devices::power::{AcpiPower, PowerKey, ResetControl};
use armlet_devices::sync::lock;
use armlet_devices::uart16550::Uart16550;
use armlet_system::page_size::page_size;
use kvm_ioctls::{VcpuFd, VmFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use vm_memory::GuestMemoryMmap;

/// The non-virtio devices of a machine; `None` where the board has none.
#[derive(Default)]
pub struct Devices {
    /// The serial console.
    pub serial: Option<Arc<Mutex<dyn SerialConsole>>>,
    /// The virtio console, if it has the terminal.
    pub hvc: Option<Arc<HvcConsole>>,
    /// The real-time clock.
    pub clock: Option<Arc<Mutex<Pl031>>>,
    /// The power key.
    pub power_key: Option<Arc<Mutex<dyn PowerKey>>>,
    /// The GPIO controller with the power key on one of its lines.
    pub gpio: Option<Arc<Mutex<Pl061>>>,
    /// ACPI's sleep registers and power button.
    pub acpi: Option<Arc<Mutex<AcpiPower>>>,
    /// CMOS memory and real-time clock.
    pub cmos: Option<Arc<Mutex<Cmos>>>,
    /// The keyboard controller, which resets a PC.
    pub i8042: Option<Arc<Mutex<I8042>>>,
    /// The reset control register.
    pub reset_control: Option<Arc<Mutex<ResetControl>>>,
    /// The I/O APIC, where KVM emulates only local APICs.
    pub io_apic: Option<Arc<Mutex<IoApic>>>,
    /// VMGenID and VMClock.
    pub generation: Option<Generation>,
}

impl Devices {
    /// Writes VMGenID and VMClock, if the machine has them, for a guest that starts from its beginning.
    ///
    /// # Errors
    /// As [`Generation::begin`].
    pub fn begin_generation(&self, random: &generation::Random) -> Result<()> {
        let begin = |generation: &Generation| generation.begin(random);
        self.generation
            .as_ref()
            .map_or(Ok(()), begin)
            .context(NOT_WRITTEN)
    }

    /// Tells the guest, if it has VMGenID and VMClock, that it is of another generation: between the
    /// restore of a machine, its interrupt controller included, and the first time that its vCPUs run.
    ///
    /// # Errors
    /// As [`Generation::renew`].
    pub fn renew_generation(&self, random: &generation::Random) -> Result<()> {
        let renew = |generation: &Generation| generation.renew(random);
        self.generation
            .as_ref()
            .map_or(Ok(()), renew)
            .context(NOT_WRITTEN)
    }
}

const NOT_WRITTEN: &str = "cannot write VMGenID and VMClock to guest memory";

/// A power key on a line of a GPIO controller.
struct GpioKey(Arc<Mutex<Pl061>>);

impl PowerKey for GpioKey {
    fn set_pressed(&mut self, pressed: bool) {
        let mut gpio = lock(&self.0);
        gpio.set_input(POWER_KEY_LINE as u8, pressed);
    }
}

/// The callbacks of devices. Each may be called on any vCPU's thread, with the device locked.
pub struct Wires {
    /// The sink of the console's output.
    pub output: Box<dyn Output>,
    /// Called when the console has room for input again.
    pub on_room: Box<dyn Fn() + Send>,
    /// Called when a burst of output begins.
    pub on_burst: Box<dyn Fn() + Send>,
    /// Called when the clock's alarm was changed.
    pub on_deadline: Box<dyn Fn() + Send>,
    /// Set when the machine stops: output must no longer wait for a reader.
    pub stopping: Arc<AtomicBool>,
}

/// Puts the planned devices on their buses, or into `memory`; `virtio` creates the one of a slot.
///
/// # Errors
/// When two devices overlap, and the errors of `virtio`.
pub(super) fn attach<A: KvmArch>(
    (vm, interrupts): (&Arc<VmFd>, &Arc<Interrupts>),
    vcpu: Option<&VcpuFd>,
    memory: &Arc<GuestMemoryMmap>,
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
            DeviceKind::Uart16550 => {
                let (output, on_room, on_burst) = console.take().context(TWO_CONSOLES)?;
                let window = vcpu
                    .map(|vcpu| BurstWindow::at_byte(Arc::clone(vm), vcpu, placed.window.start()));
                let uart = Uart16550::new(line, output, on_room);
                let serial = Serial::new(uart, window.and_then(collecting), on_burst);
                let serial = Arc::new(Mutex::new(serial));
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
                devices.gpio = Some(Arc::clone(&gpio));
                gpio
            }
            DeviceKind::VirtioMmio { slot } => virtio(placed, slot)?,
        };
        bus.insert(placed.window.start(), placed.window.size(), device)?;
    }
    devices.generation = plan.layout.generation.map(|placed| {
        let clock = (placed.clock.start(), placed.clock.size() as u32);
        let line = line(placed.irq);
        Generation::new(Arc::clone(memory), placed.id.start(), clock, line)
    });
    if let Some((window, io_apic)) = A::io_apic(interrupts, plan) {
        devices.io_apic = Some(Arc::clone(&io_apic));
        bus.insert(window.start(), window.size(), io_apic)?;
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
            PortKind::Cmos => named::<Cmos>(&mut devices.cmos, Cmos::new()),
            PortKind::I8042 => named::<I8042>(&mut devices.i8042, I8042::new()),
            PortKind::Reset => {
                named::<ResetControl>(&mut devices.reset_control, ResetControl::new())
            }
            PortKind::Acpi => {
                let acpi = named(&mut devices.acpi, AcpiPower::new(line()?));
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

/// Stores a device in its field of [`Devices`].
fn named<D>(name: &mut Option<Arc<Mutex<D>>>, device: D) -> Arc<Mutex<D>> {
    Arc::clone(name.insert(Arc::new(Mutex::new(device))))
}

const TWO_CONSOLES: &str = "the board has two serial consoles; armlet serves one";

/// Returns a window that coalesces output, where KVM supports it and no other device shares its
/// page.
fn burst_window<A: KvmArch>(
    vm: &Arc<VmFd>,
    vcpu: Option<&VcpuFd>,
    plan: &Plan<A>,
    device: &Placed,
) -> Option<BurstWindow> {
    let page = Range::new(device.window.start(), page_size() as u64)?;
    let mut ranges = plan.layout.ranges();
    if ranges.any(|other| other != device.window && other.overlaps(page)) {
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
