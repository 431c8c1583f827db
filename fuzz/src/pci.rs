//! Virtio over PCI: a guest that writes anything to the configuration space and the BAR, and a machine
//! that checks what it is told.

use armlet_devices::virtio::mailbox::direct;
use std::sync::{Arc, Mutex};

use armlet_devices::Device;
use armlet_devices::pci::{Message, MsiVector, MsiVectors, Placement, Root};
use armlet_devices::sync::bell;
use armlet_devices::virtio::pci::{BAR_SIZE, NOTIFY, Pci, Wires};
use armlet_devices::virtio::{Registers, RegistersState, VirtioDevice};
use vmm_sys_util::eventfd::EventFd;

use super::guest::lock;
use super::input::Input;
use super::memory::{BASE, Memory};
use super::transport::{Probe, probe};

/// Queues of the device.
const SIZES: [u16; 3] = [8, 4, 1];
/// The offset of the function in the window of configuration spaces: it is device 1.
const FUNCTION: u64 = 1 << 15;

/// A vector that does as KVM does.
struct Vector {
    call: Arc<EventFd>,
    refuses: u32,
}

impl MsiVector for Vector {
    fn call(&self) -> Arc<EventFd> {
        Arc::clone(&self.call)
    }

    fn route(&self, message: Option<Message>) -> Result<(), String> {
        let Some(message) = message else {
            return Ok(());
        };
        assert!(message.address.is_multiple_of(4), "{message:?}");
        match message.data == self.refuses {
            true => Err("no such message".to_owned()),
            false => Ok(()),
        }
    }
}

/// Vectors, as many as there are events.
struct Machine {
    made: Mutex<usize>,
    most: usize,
}

impl MsiVectors for Machine {
    fn make(&self) -> Result<Box<dyn MsiVector>, String> {
        let mut made = lock(&self.made);
        if *made == self.most {
            return Err("no room".to_owned());
        }
        *made += 1;
        assert!(*made <= 1 + SIZES.len(), "more vectors than events");
        let call = Arc::new(bell().map_err(|error| error.to_string())?);
        Ok(Box::new(Vector { call, refuses: 13 }))
    }
}

/// Where the BAR is.
struct Place(Arc<Mutex<Option<u64>>>);

impl Placement for Place {
    fn moved(&self, bar: Option<u64>) -> Result<(), String> {
        assert!(bar.is_none_or(|bar| bar.is_multiple_of(BAR_SIZE)));
        *lock(&self.0) = bar;
        match bar {
            Some(bar) if bar >> 40 != 0 => Err("too far".to_owned()),
            _ => Ok(()),
        }
    }
}

/// A function on a bus of its own.
struct Board {
    device: Arc<Mutex<Probe>>,
    pci: Arc<Mutex<Pci>>,
    root: Root,
    bar: Arc<Mutex<Option<u64>>>,
}

impl Board {
    fn new(memory: &Memory, room: usize) -> Board {
        let device = Arc::new(Mutex::new(probe(&SIZES)));
        let machine = Machine {
            made: Mutex::new(0),
            most: room,
        };
        let access = direct(device.clone());
        let wires = Wires::Msix(Arc::new(machine));
        let guest = Arc::clone(&memory.guest);
        let mut pci =
            Pci::new("device".to_owned(), access, guest, wires, BASE).expect("descriptors");
        let bar = Arc::default();
        pci.follow(Box::new(Place(Arc::clone(&bar))));
        let (pci, mut root) = (Arc::new(Mutex::new(pci)), Root::new());
        assert!(root.add(1, pci.clone()));
        Board {
            device,
            pci,
            root,
            bar,
        }
    }

    /// Has the device serve what was kicked.
    fn serve(&self) {
        let kicks = lock(&self.pci).kicks().to_vec();
        for (queue, kick) in kicks.iter().enumerate() {
            if kick.read().is_ok() {
                lock(&self.device).kicked(queue);
            }
        }
    }

    /// Goes on as another board.
    fn follow(&mut self, memory: &Memory, input: &mut Input<'_>) {
        lock(&self.pci).quiesce();
        let state = lock(&self.pci).save().expect("it is paused");
        let other = Board::new(memory, 4);
        lock(&other.pci).quiesce();
        if input.rarely(4) {
            let mut wrong = state.clone();
            spoil(&mut wrong, input);
            // Refused, or taken as another state that is valid.
            if lock(&other.pci).restore(&wrong).is_ok() {
                lock(&other.pci).resume();
                other.serve();
            }
            lock(&self.pci).resume();
            return;
        }
        let restored = lock(&other.pci).restore(&state);
        restored.expect("its own state");
        *self = other;
        lock(&self.pci).resume();
    }
}

/// Damages a state, as a file may be.
fn spoil(state: &mut RegistersState, input: &mut Input<'_>) {
    let RegistersState::Pci(state) = state else {
        panic!("it is over PCI");
    };
    match input.below(8) {
        0 => {
            let at = input.below(state.config.len());
            state.config[at] = input.u8();
        }
        1 => state.config.truncate(input.below(257)),
        2 => state.msix = None,
        3 => state.isr = input.u8(),
        4 => state.queue_select = input.u16(),
        5 => state.transport.status = input.u32(),
        part => {
            let Some(msix) = &mut state.msix else { return };
            let at = input.below(4);
            match part {
                6 => msix.mapped[at] = input.u16(),
                _ => msix.table[at].address = input.u64(),
            }
            msix.pending.push(input.u16());
        }
    }
}

/// The function and its bus.
pub fn pci(data: &[u8]) {
    let mut input = Input::new(data);
    let memory = Memory::new();
    let mut board = Board::new(&memory, input.below(6));
    while !input.is_empty() {
        let what = input.u8();
        let size = [1, 2, 4, 8, 0, 3, 5, 7][usize::from(what >> 4 & 7)];
        let mut value = input.u64().to_le_bytes();
        match what & 15 {
            0..=2 => {
                let register = u64::from(input.u8());
                let _ = board.root.write(FUNCTION + register, &value[..size]);
            }
            3 => {
                let _ = board.root.read(input.u64() >> 40, &mut value[..size]);
                let register = u64::from(input.u8());
                let _ = board.root.read(FUNCTION + register, &mut value[..size]);
            }
            part @ 4..=11 => {
                let first = [0, 0, 0, 0x800, NOTIFY, 0x2000, 0x2000, 0x3000];
                let offset = first[usize::from(part - 4)] + u64::from(input.u8());
                let mut pci = lock(&board.pci);
                match what & 0x80 {
                    0 => drop(pci.write(offset, &value[..size])),
                    _ => drop(pci.read(offset, &mut value[..size])),
                }
            }
            12 => {
                let offset = u64::from(input.u16()) % BAR_SIZE;
                let _ = lock(&board.pci).write(offset, &value[..size]);
            }
            13 => {
                let link = lock(&board.pci).link();
                match value[0] {
                    0..=127 => link.queue_used(u16::from(value[1] & 3)),
                    128..=240 => link.config_changed(),
                    _ => link.broken(format_args!("the world wants it so")),
                }
            }
            14 => board.serve(),
            _ => board.follow(&memory, &mut input),
        }
        // The window is where the registers say.
        let mut bytes = [0; 8];
        let _ = board.root.read(FUNCTION + 0x10, &mut bytes);
        let mut command = [0; 2];
        let _ = board.root.read(FUNCTION + 4, &mut command);
        let shown = (command[0] & 2 != 0).then_some(u64::from_le_bytes(bytes) & !0xf);
        assert_eq!(*lock(&board.bar), shown);
    }
}
