//! The PCI bus of a machine: configuration spaces, functions, and what follows their BARs.

use crate::kvm::interrupts::Interrupts;
use crate::kvm::msi::Vectors;
use crate::slots::{Kicks, Slots};
use crate::vcpu::Buses;
use anyhow::{Context, Result, ensure};
use armlet_arch::Range;
use armlet_arch::irq::Spi;
use armlet_arch::pci::{Msi, PlacedPci};
use armlet_backends::backend::Backend;
use armlet_devices::bus::MovingWindow;
use armlet_devices::gicv2m::Frame;
use armlet_devices::pci::{Placement, Root, root};
use armlet_devices::sync::lock;
use armlet_devices::virtio::pci::{BAR_SIZE, Pci};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use std::sync::{Arc, Mutex, Weak};

// What is planned is what is there.
const _: () = assert!(
    armlet_arch::pci::BAR_SIZE == BAR_SIZE
        && armlet_arch::pci::ECAM_SIZE == root::WINDOW_SIZE
        && armlet_arch::pci::MOST_FUNCTIONS + 1 == root::DEVICES
);

/// A function whose BAR has to be followed.
pub(super) struct Attached {
    pci: Arc<Mutex<Pci>>,
    window: MovingWindow,
    kicks: Kicks,
}

/// Puts configuration spaces, functions and what takes their MSIs on the bus. BARs are nowhere until
/// [`follow`].
///
/// # Errors
/// What the host refuses; two windows that overlap.
pub(super) fn attach(
    buses: &mut Buses,
    placed: &PlacedPci,
    slots: &mut Slots,
    interrupts: &Arc<Interrupts>,
    backends: &[Box<dyn Backend>],
    irq_number: fn(Spi) -> u32,
) -> Result<Vec<Attached>> {
    let bus = &mut buses.memory;
    let mut root = Root::new();
    let mut all = Vec::new();
    for function in &placed.functions {
        let name = &function.name;
        let vectors = Arc::new(Vectors::new(interrupts, placed.msi, function));
        let backend = named(backends, name)?;
        let (pci, kicks) = slots.add_function(backend, function.bar.start(), vectors)?;
        let number = function.number as usize;
        ensure!(
            root.add(number, Arc::clone(&pci) as _),
            "the PCI bus has no place {number} for {name}"
        );
        let window = bus.insert_moving(BAR_SIZE, Arc::clone(&pci) as _);
        all.push(Attached { pci, window, kicks });
    }
    let (ecam, root) = (placed.ecam, Arc::new(Mutex::new(root)));
    bus.insert(ecam.start(), ecam.size(), root)?;
    if let Msi::V2m {
        window,
        first,
        count,
    } = placed.msi
    {
        let raised = Arc::clone(interrupts);
        let raise = move |intid: u32| {
            let spi = Spi(intid - Spi(0).intid());
            raised.line(irq_number(spi)).pulse();
        };
        let frame = Frame::new(first.intid(), count, raise);
        bus.insert(window.start(), window.size(), Arc::new(Mutex::new(frame)))?;
    }
    Ok(all)
}

/// Has windows and ioeventfds follow the BARs from now on.
pub(super) fn follow(all: Vec<Attached>, placed: &PlacedPci, vm: &Arc<VmFd>, buses: &Arc<Buses>) {
    for Attached { pci, window, kicks } in all {
        let place = Place {
            vm: Arc::clone(vm),
            buses: Arc::downgrade(buses),
            windows: placed.windows().collect(),
            window,
            kicks,
            caught: Mutex::default(),
        };
        lock(&pci).follow(Box::new(place));
    }
}

/// Returns the backend of the device that is called `name`.
pub(super) fn named<'a>(backends: &'a [Box<dyn Backend>], name: &str) -> Result<&'a dyn Backend> {
    let mut all = backends.iter();
    let backend = all.find(|backend| backend.name() == name);
    let backend = backend.with_context(|| format!("{name} has no backend"))?;
    Ok(&**backend)
}

/// What follows the BAR of a function.
struct Place {
    vm: Arc<VmFd>,
    buses: Weak<Buses>,
    /// Where BARs may lie.
    windows: Vec<Range>,
    window: MovingWindow,
    kicks: Kicks,
    /// The BAR where KVM takes kicks now, and how many of them it takes.
    caught: Mutex<Option<(u64, usize)>>,
}

impl Place {
    fn release(&self, caught: &mut Option<(u64, usize)>) {
        let Some((bar, count)) = caught.take() else {
            return;
        };
        for (offset, kick) in &self.kicks[..count] {
            let address = IoEventAddress::Mmio(bar + offset);
            if let Err(error) = self.vm.unregister_ioevent(kick, &address, NoDatamatch) {
                log::error!("KVM keeps the ioeventfd at {:#x}: {error}", bar + offset);
            }
        }
    }

    /// Has KVM take kicks. What it does not take comes to the device's registers, slower.
    fn catch(&self, bar: u64) -> Option<(u64, usize)> {
        for (index, (offset, kick)) in self.kicks.iter().enumerate() {
            let address = IoEventAddress::Mmio(bar + offset);
            if let Err(error) = self.vm.register_ioevent(kick, &address, NoDatamatch) {
                log::info!(
                    "each kick at {:#x} and on is an exit: {error}",
                    bar + offset
                );
                return Some((bar, index));
            }
        }
        Some((bar, self.kicks.len()))
    }
}

impl Placement for Place {
    fn moved(&self, bar: Option<u64>) -> Result<(), String> {
        // The machine ends.
        let Some(buses) = self.buses.upgrade() else {
            return Ok(());
        };
        let mut caught = lock(&self.caught);
        self.release(&mut caught);
        let mut windows = self.windows.iter();
        let range = bar.and_then(|bar| Range::new(bar, BAR_SIZE));
        let range = range.filter(|range| windows.any(|window| window.contains(*range)));
        let placed = buses.memory.place(self.window, range.map(Range::start));
        placed.map_err(|error| error.to_string())?;
        match (bar, range) {
            (None, _) => Ok(()),
            (Some(bar), Some(_)) => {
                *caught = self.catch(bar);
                Ok(())
            }
            (Some(bar), None) => {
                let windows: Vec<String> = self.windows.iter().map(Range::to_string).collect();
                let windows = windows.join(" or ");
                Err(format!(
                    "{bar:#x} is outside of the windows for BARs, {windows}"
                ))
            }
        }
    }
}
