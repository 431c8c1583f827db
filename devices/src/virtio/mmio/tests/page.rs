//! The register page compared with what reads return, whatever the driver does.

use super::*;
use crate::virtio::mailbox::direct;

/// An event at a window.
#[derive(Clone, Debug)]
enum Act {
    Write(u32, u32),
    /// A complete start, as a correct driver performs it.
    Start(u32),
    /// The device changes its configuration.
    Change(usize, u8),
    /// The device reports the driver broken.
    Break,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let register = prop_oneof![
        6 => prop::sample::select(vec![
            DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL, QUEUE_SEL, QUEUE_SIZE,
            QUEUE_READY, QUEUE_NOTIFY as u32, INTERRUPT_ACK as u32, STATUS, STATUS, QUEUE_DESC,
            QUEUE_DRIVER, QUEUE_DEVICE, QUEUE_DESC + 4,
        ]),
        1 => (0..0x80_u32).prop_map(|word| word * 4),
        1 => 0..WINDOW_SIZE as u32,
    ];
    let value = prop_oneof![
        3 => 0..5_u32,
        2 => prop::sample::select(vec![0, 3, 11, 15, 8, 64, 128, OFFERED as u32]),
        1 => (BASE as u32..BASE as u32 + 0x1000).prop_map(|address| address & !0xf),
        1 => any::<u32>(),
    ];
    let act = prop_oneof![
        12 => (register, value).prop_map(|(register, value)| Act::Write(register, value)),
        2 => (0..4_u32).prop_map(Act::Start),
        2 => (0..10_usize, any::<u8>()).prop_map(|(at, byte)| Act::Change(at, byte)),
        1 => Just(Act::Break),
    ];
    prop::collection::vec(act, 1..40)
}

/// Returns a window with this page, and its device.
fn paged(page: &Arc<impl RegisterPage + 'static>) -> (Mmio, Arc<Mutex<Keeper>>) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(BASE), 0x1_0000)]);
    let device = Arc::new(Mutex::new(Keeper::new()));
    let mmio = Mmio::new(
        "device".to_owned(),
        direct(device.clone()),
        Arc::new(memory.expect("memory")),
        FakeLine::new(),
        None,
        page.clone(),
    );
    (mmio.expect("descriptors"), device)
}

fn perform(mmio: &mut Mmio, device: &Mutex<Keeper>, act: Act) {
    let mut write = |offset: u32, value: u32| {
        let action = mmio.write(offset.into(), &value.to_le_bytes());
        assert_eq!(action, Action::None);
    };
    match act {
        Act::Write(offset, value) => write(offset, value),
        Act::Start(queues) => {
            for (register, value) in [
                (STATUS, 0),
                (STATUS, 3),
                (DRIVER_FEATURES_SEL, 1),
                (DRIVER_FEATURES, 1),
                (STATUS, 11),
            ] {
                write(register, value);
            }
            for queue in 0..queues {
                for (register, value) in [
                    (QUEUE_SEL, queue),
                    (QUEUE_DESC, BASE as u32 + 0x4000 * queue),
                    (QUEUE_DRIVER, BASE as u32 + 0x4000 * queue + 0x1000),
                    (QUEUE_DEVICE, BASE as u32 + 0x4000 * queue + 0x2000),
                    (QUEUE_READY, 1),
                ] {
                    write(register, value);
                }
            }
            write(STATUS, 15);
        }
        Act::Change(at, byte) => {
            let device = lock(device);
            device.config.change(|bytes| bytes[at] = byte);
            if let Some(link) = &device.link {
                link.config_changed();
            }
        }
        Act::Break => {
            if let Some(link) = &lock(device).link {
                link.broken(format_args!("it makes no sense"));
            }
        }
    }
}

proptest! {
    /// The guest may read the page in place of the registers, so it must never differ.
    #[test]
    fn the_page_shows_what_a_read_returns(acts in acts()) {
        let page = Arc::new(RecordingPage::default());
        let (mut mmio, device) = paged(&page);
        for step in std::iter::once(None).chain(acts.into_iter().map(Some)) {
            if let Some(act) = step.clone() {
                perform(&mut mmio, &device, act);
            }
            for offset in (0..WINDOW_SIZE).step_by(4) {
                let mut data = [0; 4];
                let _ = mmio.read(offset as u64, &mut data);
                let read = u32::from_le_bytes(data);
                prop_assert_eq!(page.load(offset), read, "{:#x} after {:?}", offset, step);
            }
        }
    }

    /// Whatever came before, a correct driver gets a working device.
    #[test]
    fn nothing_survives_a_reset(acts in acts()) {
        let mut guest = guest();
        for act in acts {
            let Guest { mmio, device, .. } = &mut guest;
            perform(mmio, device, act);
        }
        guest.start(0);
        guest.request(0, &[b"x"], &[6]);
        guest.kick(0);
        lock(&guest.device).answer_all();
        prop_assert_eq!(&guest.used(0)[0].1, b"answer");
        prop_assert_eq!(guest.read(QUEUE_SEL.into()), 0, "write-only registers read as zero");
        prop_assert_eq!(guest.read(INTERRUPT_STATUS.into()), USED);
    }
}

#[test]
fn a_reader_of_the_page_sees_that_the_configuration_changed() {
    /// The stores, in order.
    #[derive(Default)]
    struct Log(Mutex<Vec<(usize, u32)>>);
    impl RegisterPage for Log {
        fn store(&self, offset: usize, value: u32) {
            lock(&self.0).push((offset, value));
        }
    }
    let page = Arc::new(Log::default());
    let (_mmio, device) = paged(&page);
    let config = lock(&device).config();
    lock(&page.0).clear();
    config.change(|bytes| bytes.fill(0xaa));
    let stored = lock(&page.0).clone();
    // A driver reads the generation, the bytes, and the generation again. One that began before
    // the first new byte, or ends after the last, must find two different generations.
    let generations: Vec<usize> = (0..stored.len())
        .filter(|index| stored[*index].0 == CONFIG_GENERATION as usize)
        .collect();
    let is_new = |(offset, value): (usize, u32)| offset == CONFIG && value == 0xaaaa_aaaa;
    let first = stored
        .iter()
        .position(|store| is_new(*store))
        .expect("new bytes");
    let [before, after] = generations[..] else {
        panic!("two generations, not {generations:?}");
    };
    assert!(before < first && after == stored.len() - 1, "{stored:x?}");
    assert_ne!(stored[before].1, stored[after].1);
}

#[test]
fn a_reader_of_the_page_never_sees_a_torn_field() {
    /// The stores to the configuration space, with words stored together as one entry.
    #[derive(Default)]
    struct Words(Mutex<Vec<(usize, Vec<u8>)>>);
    impl RegisterPage for Words {
        fn store(&self, offset: usize, value: u32) {
            if offset >= CONFIG {
                lock(&self.0).push((offset - CONFIG, value.to_le_bytes().to_vec()));
            }
        }

        fn store_two(&self, offset: usize, value: u64) {
            lock(&self.0).push((offset - CONFIG, value.to_le_bytes().to_vec()));
        }
    }
    let page = Arc::new(Words::default());
    let (_mmio, device) = paged(&page);
    let config = lock(&device).config();
    lock(&page.0).clear();
    // A field of 8 bytes, and one of 6, which is stored with its neighbours as 8.
    config.change(|bytes| bytes[..8].fill(0xaa));
    config.change(|bytes| bytes[..6].fill(0xbb));
    let stored = lock(&page.0).clone();
    let expected = [[0xaa; 8], [0xbb, 0xbb, 0xbb, 0xbb, 0xbb, 0xbb, 0xaa, 0xaa]];
    for words in expected {
        assert!(stored.contains(&(0, words.to_vec())), "{stored:x?}");
    }
    let whole = stored
        .iter()
        .all(|(offset, words)| *offset % 8 == 0 && words.len() == 8);
    assert!(whole, "{stored:x?}");
}
