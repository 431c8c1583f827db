//! From a backend to a device in its slot: kicks by ioeventfd, interrupts by irqfd, registers in
//! memory that the guest reads without an exit.

use crate::kvm::KvmArch;
use crate::kvm::interrupts::{Interrupts, Lead};
use crate::kvm::page::ReadOnlyPages;
use crate::sandbox::{Role, Sandbox};
use anyhow::{Context, Result};
use armlet_arch::{DeviceKind, Range};
use armlet_arch::{Placed, Plan};
use armlet_backends::backend::Backend;
use armlet_backends::reactor::{Reactor, Worker};
use armlet_devices::IrqLine;
use armlet_devices::pci::MsiVectors;
use armlet_devices::sync::{bell, lock, ring};
use armlet_devices::virtio::mailbox::{self, Access, Mailbox, direct};
use armlet_devices::virtio::mmio::{INTERRUPT_ACK, Mmio, NoPage, QUEUE_NOTIFY, RegisterPage, USED};
use armlet_devices::virtio::pci::{NOTIFY, NOTIFY_STEP, Pci, Wires};
use armlet_devices::virtio::{Link, Registers, VirtioDevice};
use armlet_system::page_size::page_size;
use armlet_system::signals;
use kvm_ioctls::{IoEventAddress, VmFd};
use std::sync::{Arc, Mutex, TryLockError};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// The memslot of the registers, behind those of RAM.
const SLOT: u32 = 1001;

/// Kicks by their offsets in the BAR of a PCI function.
pub type Kicks = Vec<(u64, Arc<EventFd>)>;

/// A device before it has registers.
struct Made {
    name: String,
    device: Arc<Mutex<dyn VirtioDevice>>,
    access: Arc<dyn Access>,
    /// That of a busy device.
    mailbox: Option<Arc<Mailbox>>,
    memory: Arc<GuestMemoryMmap>,
}

impl Made {
    /// Whether KVM is to take the kicks of a queue: what a light device answers at once has no thread.
    fn is_caught(&self, queue: usize) -> bool {
        self.mailbox.is_some() || !lock(&self.device).answers_at_once(queue)
    }
}

fn no_room(name: &str) -> String {
    format!("cannot make the registers of {name}")
}

/// The virtio slots of a machine that is being made.
pub struct Slots {
    vm: Arc<VmFd>,
    interrupts: Arc<Interrupts>,
    /// RAM, and with it persistent memory.
    ram: Arc<GuestMemoryMmap>,
    memory: Arc<GuestMemoryMmap>,
    sandbox: Arc<Sandbox>,
    pages: Option<Arc<ReadOnlyPages>>,
    /// The light devices; the event loop serves them.
    light: Reactor,
    /// The busy ones.
    workers: Vec<Worker>,
    /// What is filled, by name.
    filled: Vec<(String, Arc<Mutex<dyn Registers>>)>,
    /// Their connections to their drivers.
    links: Vec<Arc<Link>>,
}

impl Slots {
    /// The slots of the planned machine, all empty. `ram` is its RAM, and `memory` that and what else
    /// devices read and write.
    ///
    /// # Errors
    /// A process without room for more descriptors.
    pub fn new<A: KvmArch>(
        vm: &Arc<VmFd>,
        interrupts: &Arc<Interrupts>,
        [ram, memory]: [&Arc<GuestMemoryMmap>; 2],
        plan: &Plan<A>,
        sandbox: &Arc<Sandbox>,
    ) -> Result<Slots> {
        Ok(Slots {
            vm: Arc::clone(vm),
            interrupts: Arc::clone(interrupts),
            ram: Arc::clone(ram),
            memory: Arc::clone(memory),
            sandbox: Arc::clone(sandbox),
            pages: pages(plan).map(Arc::new),
            light: Reactor::new()?,
            workers: Vec::new(),
            filled: Vec::new(),
            links: Vec::new(),
        })
    }

    /// Makes the device of `backend` and puts it where the plan has placed it. What answers there
    /// is returned.
    ///
    /// # Errors
    /// What host or KVM refuses.
    pub fn fill<A: KvmArch>(
        &mut self,
        placed: &Placed,
        backend: &dyn Backend,
    ) -> Result<Arc<Mutex<Mmio>>> {
        let made = self.make(backend)?;
        let (name, window) = (made.name.clone(), placed.window);
        let call = self
            .interrupts
            .edge(Lead::Pin(A::gsi(placed.spi)))
            .with_context(|| format!("cannot give {name} its interrupt"))?
            .call();
        let page: Arc<dyn RegisterPage> = match &self.pages {
            Some(pages) => Arc::new(SlotPage {
                offset: (window.start() - pages.address()) as usize,
                pages: Arc::clone(pages),
            }),
            None => Arc::new(NoPage),
        };
        let line = Arc::new(CallLine(Arc::clone(&call)));
        let (access, memory) = (Arc::clone(&made.access), Arc::clone(&made.memory));
        let mmio = Mmio::new(name, access, memory, line, Some(call), page);
        let mmio = mmio.with_context(|| no_room(&made.name))?;
        self.catch_kicks(window, &mmio, |queue| made.is_caught(queue));
        let mmio = Arc::new(Mutex::new(mmio));
        self.keep(made, Arc::clone(&mmio) as _)?;
        Ok(mmio)
    }

    /// Makes the device of `backend` as a PCI function whose BAR is at `bar` at first, with these vectors.
    /// Returns it, and the kicks that KVM is to take.
    ///
    /// # Errors
    /// What the host refuses.
    pub fn add_function(
        &mut self,
        backend: &dyn Backend,
        bar: u64,
        vectors: Arc<dyn MsiVectors>,
    ) -> Result<(Arc<Mutex<Pci>>, Kicks)> {
        let made = self.make(backend)?;
        let (access, memory) = (Arc::clone(&made.access), Arc::clone(&made.memory));
        let pci = Pci::new(made.name.clone(), access, memory, Wires::Msix(vectors), bar);
        let pci = pci.with_context(|| no_room(&made.name))?;
        let kicks = pci.kicks().iter().enumerate();
        let caught = kicks
            .filter(|(queue, _)| made.is_caught(*queue))
            .map(|(queue, kick)| (NOTIFY + queue as u64 * NOTIFY_STEP, Arc::clone(kick)))
            .collect();
        let pci = Arc::new(Mutex::new(pci));
        self.keep(made, Arc::clone(&pci) as _)?;
        Ok((pci, caught))
    }

    /// Makes the device of `backend`, which has no registers yet.
    fn make(&self, backend: &dyn Backend) -> Result<Made> {
        let name = backend.name();
        signals::waiting_for(format_args!("{name} to be made"));
        let device = backend.device().with_context(|| name.clone())?;
        let memory = match backend.takes_memory() {
            true => &self.ram,
            false => &self.memory,
        };
        let (access, mailbox): (Arc<dyn Access>, _) = match backend.is_busy() {
            true => {
                let mailbox = Mailbox::new(Arc::clone(&device));
                let mailbox = Arc::new(mailbox.with_context(|| no_room(&name))?);
                (Arc::clone(&mailbox) as _, Some(mailbox))
            }
            false => (direct(Arc::clone(&device)), None),
        };
        Ok(Made {
            access,
            mailbox,
            memory: Arc::clone(memory),
            device,
            name,
        })
    }

    /// Has a device served, by a thread of its own if it is busy, and keeps its registers.
    fn keep(&mut self, made: Made, registers: Arc<Mutex<dyn Registers>>) -> Result<()> {
        let Made {
            name,
            device,
            mailbox,
            ..
        } = made;
        {
            let registers = lock(&registers);
            self.links.push(registers.link());
            match mailbox {
                None => self.light.add(device, registers.kicks())?,
                Some(mailbox) => {
                    let mut reactor = Reactor::new()?;
                    reactor.add(device, registers.kicks())?;
                    let begin = self.sandbox.entrance(Role::Device);
                    let worker = Worker::start(name.clone(), reactor, mailbox, begin)?;
                    self.workers.push(worker);
                }
            }
        }
        self.filled.push((name, registers));
        Ok(())
    }

    /// Has KVM take kicks of the queues that `are_caught`, and acknowledgements that nobody needs. What
    /// it does not take comes to the device's registers, slower.
    fn catch_kicks(&self, window: Range, mmio: &Mmio, are_caught: impl Fn(usize) -> bool) {
        let notify = IoEventAddress::Mmio(window.start() + QUEUE_NOTIFY);
        for (queue, kick) in (0_u32..).zip(mmio.kicks()) {
            if !are_caught(queue as usize) {
                continue;
            }
            if let Err(error) = self.vm.register_ioevent(kick, &notify, queue) {
                log::info!("each kick of queue {queue} at {window} is an exit: {error}");
            }
        }
        if self.pages.is_none() {
            return;
        }
        let acknowledge = IoEventAddress::Mmio(window.start() + INTERRUPT_ACK);
        // Nobody reads it: the page says what the guest reads next.
        let caught = bell()
            .map_err(anyhow::Error::from)
            .and_then(|nobody| Ok(self.vm.register_ioevent(&nobody, &acknowledge, USED)?));
        if let Err(error) = caught {
            log::info!("each acknowledgement at {window} is an exit: {error:#}");
        }
    }

    /// Shows the guest the registers in memory. Returns the light devices and the threads of the
    /// busy ones.
    #[must_use]
    pub fn finish(self) -> (Reactor, Workers) {
        if let Some(pages) = &self.pages
            && let Err(error) = pages.show(&self.vm)
        {
            log::info!("each read of a virtio register is an exit: {error:#}");
        }
        (
            self.light,
            Workers {
                threads: self.workers,
                devices: self.filled,
                links: self.links,
                _pages: self.pages,
            },
        )
    }
}

/// The threads of the busy devices, and what all devices need as long as they live.
pub struct Workers {
    threads: Vec<Worker>,
    devices: Vec<(String, Arc<Mutex<dyn Registers>>)>,
    links: Vec<Arc<Link>>,
    _pages: Option<Arc<ReadOnlyPages>>,
}

impl Workers {
    /// All virtio devices and their names, busy or not.
    #[must_use]
    pub fn devices(&self) -> &[(String, Arc<Mutex<dyn Registers>>)] {
        &self.devices
    }

    /// The faults of the devices' drivers, by the device's name; it waits for no device.
    pub fn faults(&self) -> impl Iterator<Item = (String, u64)> {
        let links = self.links.iter();
        links.map(|link| (link.name().to_owned(), link.faults()))
    }

    /// Has a busy device's thread do something with it; dropped where no such device is called `name`.
    pub fn post(&self, name: &str, command: mailbox::Command) {
        let mut threads = self.threads.iter();
        if let Some(thread) = threads.find(|thread| thread.name() == name) {
            thread.post(command);
        }
    }

    /// The devices whose registers someone is at now, for messages: a driver stops one of them, and
    /// what that takes is the device's.
    #[must_use]
    pub fn at_work(&self) -> String {
        let taken = |device: &&(String, Arc<Mutex<dyn Registers>>)| {
            matches!(device.1.try_lock(), Err(TryLockError::WouldBlock))
        };
        let names = self.devices.iter().filter(taken);
        let names: Vec<&str> = names.map(|(name, _)| name.as_str()).collect();
        names.join(" and ")
    }
}

/// The pages of the host that hold the slots in use, if nothing else lies in them.
fn pages<A: KvmArch>(plan: &Plan<A>) -> Option<ReadOnlyPages> {
    let is_slot = |placed: &&Placed| matches!(placed.kind, DeviceKind::VirtioMmio { .. });
    let windows: Vec<Range> = plan
        .layout
        .devices
        .iter()
        .filter(is_slot)
        .map(|placed| placed.window)
        .collect();
    let page = page_size() as u64;
    let first = windows.iter().map(|window| window.start()).min()?;
    let last = windows.iter().map(|window| window.last()).max()?;
    let start = first - first % page;
    let size = (last - start + 1).next_multiple_of(page);
    let taken = Range::new(start, size)?;
    let mut others = plan.layout.ranges();
    if others.any(|other| other.overlaps(taken) && !windows.contains(&other)) {
        return None;
    }
    ReadOnlyPages::new(SLOT, start, size as usize)
        .inspect_err(|error| log::info!("no pages for virtio registers: {error:#}"))
        .ok()
}

/// A slot's part of the pages.
struct SlotPage {
    pages: Arc<ReadOnlyPages>,
    /// Bytes.
    offset: usize,
}

impl RegisterPage for SlotPage {
    fn store(&self, offset: usize, value: u32) {
        self.pages.store(self.offset + offset, value);
    }

    fn store_two(&self, offset: usize, value: u64) {
        self.pages.store_two(self.offset + offset, value);
    }
}

/// An edge-triggered interrupt by irqfd.
struct CallLine(Arc<EventFd>);

impl IrqLine for CallLine {
    fn set(&self, high: bool) {
        if high {
            self.pulse();
        }
    }

    fn pulse(&self) {
        ring(&self.0);
    }
}
