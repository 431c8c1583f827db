//! The bus as a guest enumerates it.

use super::*;

/// A function that notes what reaches it.
#[derive(Default)]
struct Probe {
    writes: Vec<(usize, Vec<u8>)>,
}

impl Function for Probe {
    fn read_config(&mut self, register: usize, data: &mut [u8]) {
        data.fill(register as u8);
    }

    fn write_config(&mut self, register: usize, data: &[u8]) {
        self.writes.push((register, data.to_vec()));
    }
}

fn read(root: &mut Root, offset: u64) -> u32 {
    let mut data = [0x55; 4];
    assert_eq!(root.read(offset, &mut data), Action::None);
    u32::from_le_bytes(data)
}

#[test]
fn a_guest_finds_the_bridge_and_the_functions_and_nobody_else() {
    let mut root = Root::new();
    let probe = Arc::new(Mutex::new(Probe::default()));
    assert!(root.add(3, probe.clone()));
    assert_eq!(read(&mut root, 0), 0x0008_1b36);
    assert_eq!(read(&mut root, 8), 0x0600_0000, "a host bridge");
    assert_eq!(read(&mut root, 3 << 15 | 0x44), 0x4444_4444);
    let mut seen = 0;
    for function in 0..DEVICES as u64 * 8 {
        seen += u32::from(read(&mut root, function << 12) != u32::MAX);
    }
    assert_eq!(seen, 2, "the bridge and one function");
    let _ = root.write(3 << 15 | 0x10, &[1, 2, 3, 4]);
    let _ = root.write(3 << 15 | 1 << 12 | 0x10, &[1, 2, 3, 4]);
    let _ = root.write(4 << 15 | 0x10, &[1, 2, 3, 4]);
    assert_eq!(lock(&probe).writes, [(0x10, vec![1, 2, 3, 4])]);
}

#[test]
fn a_device_number_is_given_once() {
    let mut root = Root::new();
    let probe = || Arc::new(Mutex::new(Probe::default()));
    assert!(!root.add(0, probe()), "the bridge's");
    assert!(root.add(31, probe()));
    assert!(!root.add(31, probe()), "taken");
    assert!(!root.add(32, probe()), "there is none");
}

#[test]
fn an_access_of_any_size_anywhere_is_harmless() {
    let mut root = Root::new();
    for offset in [0, 1, 0xfff, 0x1000, WINDOW_SIZE - 1, WINDOW_SIZE, u64::MAX] {
        for size in 0..9 {
            let mut data = vec![0; size];
            let _ = root.read(offset, &mut data);
            let _ = root.write(offset, &data);
        }
    }
    assert_eq!(read(&mut root, 0), 0x0008_1b36, "the bridge is as it was");
}
