//! The function as a driver finds and uses it.

use proptest::prelude::*;
use std::sync::Mutex;

use super::space::*;
use super::*;
use crate::fake::FakeLine;
use crate::pci::fake::{Follower, Machine};
use crate::pci::{Root, msix};
use crate::virtio::VirtioDevice;
use crate::virtio::fake::Guest;
use crate::virtio::fake::kept::{Keeper, OFFERED};
use crate::virtio::mailbox::direct;

/// Where the BAR lies at first.
const BAR: u64 = 0x1_0000_4000;
/// Offsets in the configuration space.
const COMMAND: usize = 4;
const MSIX: usize = 0x40;

/// A function whose registers are reached by the offsets of those over MMIO, for the fake driver.
struct Translated {
    pci: Pci,
    machine: Arc<Machine>,
}

impl Translated {
    fn common(&mut self, offset: u64, value: u32, width: usize) {
        let _ = self.pci.write(offset, &value.to_le_bytes()[..width]);
    }

    fn look(&mut self, offset: u64, width: usize) -> u32 {
        let mut data = [0; 4];
        let _ = self.pci.read(offset, &mut data[..width]);
        u32::from_le_bytes(data)
    }

    fn config(&mut self, register: usize) -> u32 {
        let mut data = [0; 4];
        self.pci.read_config(register, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_config(&mut self, register: usize, value: u32, width: usize) {
        self.pci
            .write_config(register, &value.to_le_bytes()[..width]);
    }

    /// Returns the data of the messages that arrived.
    fn messages(&self) -> Vec<u32> {
        let messages = self.machine.messages();
        messages.iter().map(|message| message.data).collect()
    }

    fn faults(&self) -> u64 {
        self.pci.link().faults()
    }
}

impl Device for Translated {
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
        let value = match offset {
            0x10 => self.look(0x04, 4),
            0x34 => self.look(0x18, 2),
            0x44 => self.look(0x1c, 2),
            0x70 => self.look(0x14, 1),
            0xfc => self.look(0x15, 1),
            0x100.. => return self.pci.read(DEVICE + offset - 0x100, data),
            _ => panic!("the fake driver reads {offset:#x}"),
        };
        data.copy_from_slice(&value.to_le_bytes());
        Action::None
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let value = u32::from_le_bytes(data.try_into().expect("4 bytes"));
        match offset {
            0x14 => self.common(0x00, value, 4),
            0x20 => self.common(0x0c, value, 4),
            0x24 => self.common(0x08, value, 4),
            0x30 => self.common(0x16, value, 2),
            0x38 => self.common(0x18, value, 2),
            0x44 => {
                let queue = self.look(0x16, 2);
                self.common(0x1a, queue + 1, 2);
                self.common(0x1c, value, 2);
            }
            0x50 => {
                let at = NOTIFY + NOTIFY_STEP * u64::from(value);
                self.common(at, value, 2);
            }
            0x70 => {
                self.common(0x14, value, 1);
                if value == 3 {
                    self.common(0x10, 0, 2);
                }
            }
            0x80 | 0x84 => self.common(0x20 + (offset & 4), value, 4),
            0x90 | 0x94 => self.common(0x28 + (offset & 4), value, 4),
            0xa0 | 0xa4 => self.common(0x30 + (offset & 4), value, 4),
            0x100.. => return self.pci.write(DEVICE + offset - 0x100, data),
            _ => panic!("the fake driver writes {offset:#x}"),
        }
        Action::None
    }
}

impl Registers for Translated {
    fn kicks(&self) -> &[Arc<EventFd>] {
        self.pci.kicks()
    }

    fn link(&self) -> Arc<Link> {
        self.pci.link()
    }

    fn is_driven(&self) -> bool {
        self.pci.is_driven()
    }

    fn quiesce(&mut self) {
        self.pci.quiesce();
    }

    fn resume(&mut self) {
        self.pci.resume();
    }

    fn save(&self) -> Result<RegistersState, RestoreError> {
        self.pci.save()
    }

    fn restore(&mut self, state: &RegistersState) -> Result<(), RestoreError> {
        self.pci.restore(state)
    }
}

type Over<D> = Guest<D, Translated>;

fn function<D: VirtioDevice + 'static>(
    device: Arc<Mutex<D>>,
    memory: Arc<GuestMemoryMmap>,
    machine: Arc<Machine>,
) -> Translated {
    let access = direct(device);
    let wires = Wires::Msix(machine.clone());
    let mut pci = Pci::new("device".to_owned(), access, memory, wires, BAR).expect("descriptors");
    pci.follow(Box::new(Follower(machine.clone())));
    Translated { pci, machine }
}

/// A guest that has found the function, with MSI-X on and each entry's message in the table.
fn guest<D: VirtioDevice + 'static>(device: D) -> Over<D> {
    let mut guest = Guest::over(device, |device, memory, _| {
        function(device, memory, Machine::new())
    });
    let mmio = &mut guest.mmio;
    mmio.set_config(COMMAND, u32::from(config::MEMORY | config::MASTER), 2);
    mmio.set_config(MSIX + 2, u32::from(msix::ENABLE), 2);
    for entry in 0..=mmio.kicks().len() as u64 {
        let at = TABLE + entry * msix::ENTRY as u64;
        for (offset, value) in [(0, 0xfee0_0000), (4, 0), (8, 0x40 + entry as u32), (12, 0)] {
            mmio.common(at + offset, value, 4);
        }
    }
    guest
}

fn started() -> Over<Keeper> {
    let mut guest = guest(Keeper::new());
    guest.start(OFFERED);
    guest
}

#[test]
fn a_driver_finds_its_capabilities_in_the_bar() {
    let mut guest = guest(Keeper::new());
    let mmio = &mut guest.mmio;
    assert_eq!(mmio.config(0), (0x1040 + 42) << 16 | 0x1af4);
    assert_eq!(mmio.config(8) & 0xff, 1, "modern only");
    assert_eq!(mmio.config(0x3c) >> 8, 0, "MSI-X leaves no pin");
    let mut at = mmio.config(0x34) as usize & 0xff;
    let mut found = Vec::new();
    while at != 0 {
        let head = mmio.config(at);
        let (id, next) = (head as u8, (head >> 8) as u8);
        match id {
            msix::CAPABILITY => {
                assert_eq!(head >> 16 & 0x7ff, 2, "entries, less 1");
                assert_eq!(mmio.config(at + 4), TABLE as u32);
                assert_eq!(mmio.config(at + 8), PENDING as u32);
            }
            0x09 => {
                assert_eq!(mmio.config(at + CAP_BAR) & 0xff, 0, "BAR 0");
                let [offset, length] = [CAP_OFFSET, CAP_LENGTH].map(|word| mmio.config(at + word));
                found.push(((head >> 24) as u8, head >> 16 & 0xff, offset, length));
            }
            _ => panic!("capability {id:#x}"),
        }
        at = next.into();
    }
    let notify = (2, 20, 0x1000, 8);
    let device = (4, 16, 0x800, 0x100);
    // By type, as in section 4.1.4.
    let wanted = [
        (1, 16, 0, 0x38),
        (3, 16, 0x400, 1),
        device,
        notify,
        (5, 20, 0, 0),
    ];
    assert_eq!(found, wanted);
}

#[test]
fn requests_are_answered_and_each_queue_has_its_message() {
    let mut guest = started();
    assert_eq!(lock(&guest.device).features.len(), 1);
    for queue in 0..2 {
        guest.request(queue, &[b"x"], &[8]);
        guest.kick(queue);
        lock(&guest.device).answer_all();
        assert_eq!(guest.used(queue)[0].1, b"answer");
        assert_eq!(guest.mmio.messages(), [0x41 + queue as u32]);
    }
    guest.mmio.pci.link().config_changed();
    assert_eq!(guest.mmio.messages(), [0x40]);
    assert_eq!(guest.mmio.look(ISR, 1), 0, "ISR is for INTx");
    assert_eq!(guest.mmio.faults(), 0);
}

#[test]
fn the_common_configuration_reads_back() {
    let mut guest = guest(Keeper::new());
    guest.negotiate(OFFERED);
    guest.set_up_queue(1);
    let [descriptors, available, used] = guest.rings(1);
    let mmio = &mut guest.mmio;
    let wide = |mmio: &mut Translated, at| {
        u64::from(mmio.look(at, 4)) | u64::from(mmio.look(at + 4, 4)) << 32
    };
    assert_eq!(mmio.look(0x12, 2), 2, "queues");
    assert_eq!(
        [0x18, 0x1a, 0x1c, 0x1e].map(|at| mmio.look(at, 2)),
        [4, 2, 1, 1]
    );
    assert_eq!(
        [0x20, 0x28, 0x30].map(|at| wide(mmio, at)),
        [descriptors, available, used]
    );
    assert_eq!(mmio.look(0x10, 2), 0, "configuration changes go to entry 0");
    mmio.common(0x08, 0, 4);
    assert_eq!(mmio.look(0x0c, 4), OFFERED as u32);
    mmio.common(0x16, 2, 2);
    assert_eq!(mmio.look(0x18, 2), 0, "there is no queue 2");
    mmio.common(0x14, 0, 1);
    assert_eq!(mmio.look(0x14, 1), 0);
    assert_eq!(mmio.look(0x10, 2), u32::from(NO_VECTOR));
    mmio.common(0x16, 1, 2);
    assert_eq!(mmio.look(0x1a, 2), u32::from(NO_VECTOR));
}

#[test]
fn a_masked_queue_interrupts_when_it_is_unmasked() {
    let mut guest = started();
    let control = TABLE + msix::ENTRY as u64 + 12;
    guest.mmio.common(control, 1, 4);
    guest.request(0, &[b"x"], &[8]);
    guest.kick(0);
    lock(&guest.device).answer_all();
    assert_eq!(guest.mmio.messages(), [0; 0]);
    assert_eq!(guest.mmio.look(PENDING, 4), 1 << 1);
    guest.mmio.common(control, 0, 4);
    assert_eq!(guest.mmio.messages(), [0x41]);
}

#[test]
fn the_bar_is_followed_where_it_goes() {
    let mut guest = guest(Keeper::new());
    let mmio = &mut guest.mmio;
    let places = |mmio: &Translated| std::mem::take(&mut *lock(&mmio.machine.places));
    assert_eq!(places(mmio), [Some(BAR)]);
    mmio.set_config(COMMAND, 0, 2);
    for register in [config::BAR, config::BAR + 4] {
        mmio.set_config(register, u32::MAX, 4);
    }
    assert_eq!(mmio.config(config::BAR), 0xffff_c004);
    mmio.set_config(config::BAR, 0x2000_0000, 4);
    mmio.set_config(config::BAR + 4, 0, 4);
    assert_eq!(places(mmio), [None]);
    mmio.set_config(COMMAND, u32::from(config::MEMORY), 2);
    assert_eq!(places(mmio), [Some(0x2000_0000)]);
    assert_eq!(mmio.faults(), 0);
    mmio.set_config(config::BAR, 0xbad_0000, 4);
    assert_eq!((places(mmio), mmio.faults()), (vec![Some(0xbad_0000)], 1));
    mmio.set_config(config::BAR, 0x2000_0000, 4);
    assert_eq!((places(mmio), mmio.faults()), (vec![Some(0x2000_0000)], 1));
}

#[test]
fn the_bar_is_reached_through_the_configuration_space() {
    let mut guest = started();
    let mmio = &mut guest.mmio;
    mmio.set_config(COMMAND, 0, 2);
    let at = mmio.pci.access_at;
    let select = |mmio: &mut Translated, offset: u64, length: u32| {
        mmio.set_config(at + CAP_BAR, 0, 1);
        mmio.set_config(at + CAP_OFFSET, offset as u32, 4);
        mmio.set_config(at + CAP_LENGTH, length, 4);
    };
    select(mmio, 0x14, 1);
    assert_eq!(mmio.config(at + CAP_DATA), 15, "device_status");
    select(mmio, 0x16, 2);
    mmio.set_config(at + CAP_DATA, 1, 2);
    assert_eq!(mmio.look(0x16, 2), 1, "queue_select");
    select(mmio, NOTIFY + NOTIFY_STEP, 2);
    mmio.set_config(at + CAP_DATA, 1, 4);
    assert!(mmio.kicks()[1].read().is_ok());
    for (offset, length) in [
        (0x14, 3),
        (0x15, 2),
        (BAR_SIZE, 4),
        (u64::MAX, 1),
        (0x14, 0),
    ] {
        select(mmio, offset, length);
        mmio.set_config(at + CAP_DATA, 0, 4);
        assert_eq!(mmio.config(at + CAP_DATA), 0, "nothing is selected");
        assert_eq!(mmio.look(0x14, 1), 15, "{offset:#x} in {length} bytes");
    }
    mmio.set_config(at + CAP_BAR, 1, 1);
    mmio.set_config(at + CAP_OFFSET, 0x14, 4);
    mmio.set_config(at + CAP_LENGTH, 1, 4);
    mmio.set_config(at + CAP_DATA, 0, 1);
    assert_eq!(mmio.look(0x14, 1), 15, "BAR 1 is none of its own");
}

#[test]
fn writes_that_mean_nothing_are_faults() {
    let mut guest = guest(Keeper::new());
    let wrong: [(u64, u32, usize); 9] = [
        (0x04, 1, 4),
        (0x12, 1, 2),
        (0x14, 1, 4),
        (0x16, 1, 4),
        (0x1c, 0, 2),
        (0x22, 1, 4),
        (0x38, 1, 4),
        (ISR, 1, 1),
        (PENDING, 1, 4),
    ];
    for (index, (offset, value, width)) in (1..).zip(wrong) {
        guest.mmio.common(offset, value, width);
        assert_eq!(guest.mmio.faults(), index, "{offset:#x}");
    }
}

#[test]
fn a_pin_is_high_until_isr_is_read() {
    let line = FakeLine::new();
    let mut guest = Guest::over(Keeper::new(), |device, memory, _| {
        let wires = Wires::Pin {
            line: line.clone(),
            call: None,
        };
        let access = direct(device);
        let pci = Pci::new("device".to_owned(), access, memory, wires, BAR).expect("descriptors");
        let machine = Machine::new();
        Translated { pci, machine }
    });
    guest.start(OFFERED);
    assert_eq!(guest.mmio.config(0x3c) >> 8, 1, "INTA");
    guest.request(0, &[b"x"], &[8]);
    guest.kick(0);
    lock(&guest.device).answer_all();
    assert!(line.is_high());
    assert_eq!(guest.mmio.config(COMMAND) >> 16 & 8, 8, "Status shows it");
    guest
        .mmio
        .set_config(COMMAND, u32::from(config::NO_INTX), 2);
    assert!(!line.is_high(), "disabled");
    guest.mmio.set_config(COMMAND, 0, 2);
    assert!(line.is_high());
    guest.mmio.pci.link().config_changed();
    assert_eq!(guest.mmio.look(ISR, 1), 3);
    assert!(!line.is_high());
    assert_eq!(guest.mmio.look(ISR, 1), 0);
    assert_eq!(guest.mmio.look(0x10, 2), u32::from(NO_VECTOR));
}

/// Another function like the guest's, in another machine.
fn other(guest: &Over<Keeper>) -> Translated {
    let device = Arc::new(Mutex::new(Keeper::new()));
    let mut other = function(device, guest.memory.clone(), Machine::new());
    other.quiesce();
    other
}

#[test]
fn a_restored_function_is_as_the_one_before() {
    let mut guest = started();
    guest.mmio.set_config(config::BAR + 4, 3, 4);
    guest.mmio.common(TABLE + 12, 1, 4);
    guest.mmio.pci.link().config_changed();
    guest.mmio.quiesce();
    let state = guest.mmio.save().expect("it is paused");
    let mut other = other(&guest);
    other.restore(&state).expect("its own");
    assert_eq!(other.save().as_ref(), Ok(&state));
    let places = lock(&other.machine.places).clone();
    assert_eq!(places.last(), Some(&Some(0x3_0000_4000)));
    assert_eq!(other.messages(), [0x41, 0x42], "an edge too many");
    other.common(TABLE + 12, 0, 4);
    assert_eq!(other.messages(), [0x40], "the pending one");
    for offset in 0..0x38 {
        assert_eq!(
            other.look(offset, 1),
            guest.mmio.look(offset, 1),
            "{offset:#x}"
        );
    }
}

#[test]
fn invalid_states_change_nothing() {
    let mut guest = started();
    guest.mmio.quiesce();
    let Ok(RegistersState::Pci(state)) = guest.mmio.save() else {
        panic!("it is paused");
    };
    type Wrong = (fn(&mut PciState), &'static str);
    let wrongs: [Wrong; 6] = [
        (|state| state.config[0] = 0, "another function"),
        (|state| state.config.truncate(10), "another function"),
        (|state| state.msix = None, "another kind of interrupt"),
        (|state| state.isr = 4, "ISR status"),
        (|state| state.transport.id = 1, "device ID 1"),
        (
            |state| state.msix.as_mut().expect("it has MSI-X").mapped[0] = 9,
            "MSI-X table",
        ),
    ];
    for (wrong, reason) in wrongs {
        let mut other = other(&guest);
        let before = other.save();
        let mut state = state.clone();
        wrong(&mut state);
        let error = other
            .restore(&RegistersState::Pci(state))
            .expect_err(reason);
        assert!(error.0.contains(reason), "{error}");
        assert_eq!(other.save(), before);
    }
    let over_mmio = Guest::started(Keeper::new(), OFFERED);
    let mut mmio = over_mmio.mmio;
    mmio.quiesce();
    let other_kind = Registers::save(&mmio).expect("it is paused");
    assert!(other(&guest).restore(&other_kind).is_err());
    assert!(Registers::restore(&mut mmio, &RegistersState::Pci(state)).is_err());
}

/// An access of a guest: to the configuration space or the BAR, to read or to write.
#[derive(Clone, Debug)]
struct Wild {
    to_config: bool,
    offset: u64,
    data: Vec<u8>,
    write: bool,
}

fn wild() -> impl Strategy<Value = Wild> {
    let offset = prop_oneof![
        0_u64..0x48,
        0x40_u64..0x100,
        0x3f8_u64..0x410,
        0x7f8_u64..0x910,
        0xff8_u64..0x1020,
        0x1ff8_u64..0x2040,
        0x2ff8_u64..0x3010,
        0x3ff0_u64..0x4010,
    ];
    let data = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..9),
        (0_u32..20).prop_map(|value| value.to_le_bytes().to_vec()),
        (0_u16..4).prop_map(|value| value.to_le_bytes().to_vec()),
        (0_u8..16).prop_map(|value| vec![value]),
    ];
    (any::<bool>(), offset, data, any::<bool>()).prop_map(|(to_config, offset, data, write)| Wild {
        to_config,
        offset,
        data,
        write,
    })
}

proptest! {
    #[test]
    fn a_guest_gone_wild_is_contained(accesses in prop::collection::vec(wild(), 0..200)) {
        let mut guest = started();
        let machine = guest.mmio.machine.clone();
        for access in accesses {
            let pci = &mut guest.mmio.pci;
            let Wild { to_config, offset, mut data, write } = access;
            match (to_config, write) {
                (true, true) => pci.write_config(offset as usize, &data),
                (true, false) => pci.read_config(offset as usize, &mut data),
                (false, true) => drop(pci.write(offset, &data)),
                (false, false) => drop(pci.read(offset, &mut data)),
            }
            for kick in 0..2 {
                if pci.kicks()[kick].read().is_ok() {
                    lock(&guest.device).kicked(kick);
                }
            }
        }
        lock(&guest.device).answer_all();
        prop_assert!(machine.made() <= 3);
        // It can be saved and restored wherever it is, and works again after a reset.
        guest.mmio.quiesce();
        let state = guest.mmio.save().expect("it is paused");
        let mut other = other(&guest);
        other.restore(&state).expect("its own");
        prop_assert_eq!(other.save(), Ok(state));
        guest.mmio.resume();
        guest.mmio.set_config(COMMAND, u32::from(config::MASTER), 2);
        guest.mmio.set_config(MSIX + 2, u32::from(msix::ENABLE), 2);
        guest.start(OFFERED);
        prop_assert!(!guest.is_broken());
    }
}

#[test]
fn a_function_is_on_the_bus() {
    let guest = guest(Keeper::new());
    let pci = Arc::new(Mutex::new(guest.mmio.pci));
    let mut root = Root::new();
    assert!(root.add(1, pci.clone()));
    let mut id = [0; 4];
    let _ = root.read(1 << 15, &mut id);
    assert_eq!(id, [0xf4, 0x1a, 0x40 + 42, 0x10]);
    let held: Arc<Mutex<dyn Registers>> = pci;
    assert_eq!(lock(&held).kicks().len(), 2);
}
