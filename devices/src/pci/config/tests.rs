//! Registers, sized and written as a guest does it, and as none should.

use proptest::prelude::*;

use super::*;

fn function() -> Config {
    let mut config = Config::new(Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_0000,
        subsystem: (0x1af4, 0x40),
    });
    config.add_bar(0x4000, 0x1_2345_8000);
    config.add_capability(0x11, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], &[(3, 0xc0)]);
    config.add_capability(0x09, &[16, 1], &[]);
    config
}

fn read<const N: usize>(config: &Config, register: usize) -> [u8; N] {
    let mut data = [0xee; N];
    config.read(register, &mut data);
    data
}

#[test]
fn the_header_says_what_the_function_is() {
    let config = function();
    assert_eq!(read(&config, 0), [0xf4, 0x1a, 0x42, 0x10]);
    assert_eq!(read(&config, 8), [1, 0, 0, 1], "revision and class");
    assert_eq!(read(&config, 0x0e), [0], "type 0, one function");
    assert_eq!(read(&config, 0x2c), [0xf4, 0x1a, 0x40, 0]);
    assert_eq!(read(&config, 0x100), [0; 4], "no extended capability");
}

#[test]
fn a_bar_tells_its_size_and_moves() {
    let mut config = function();
    assert_eq!(config.bar(), None, "not decoded yet");
    config.write(COMMAND, &MEMORY.to_le_bytes());
    assert_eq!(config.bar(), Some(0x1_2345_8000));
    config.write(BAR, &[0xff; 4]);
    config.write(BAR + 4, &[0xff; 4]);
    assert_eq!(read(&config, BAR), 0xffff_c004_u32.to_le_bytes());
    assert_eq!(read(&config, BAR + 4), [0xff; 4]);
    config.write(BAR, &0x8000_4321_u32.to_le_bytes());
    config.write(BAR + 4, &[0; 4]);
    assert_eq!(config.bar(), Some(0x8000_4000));
    for other in [BAR + 8, BAR + 12, BAR + 16, BAR + 20, 0x30] {
        config.write(other, &[0xff; 4]);
        assert_eq!(read(&config, other), [0; 4], "{other:#x} is no BAR");
    }
}

#[test]
fn capabilities_are_a_list() {
    let config = function();
    let [status] = read(&config, STATUS);
    assert_eq!(status & HAS_CAPABILITIES, HAS_CAPABILITIES);
    let mut found = Vec::new();
    let [mut at] = read(&config, CAPABILITIES);
    while at != 0 {
        assert_eq!(at % 4, 0);
        let [id, next] = read(&config, at.into());
        found.push((id, at));
        at = next;
    }
    assert_eq!(found, [(0x11, 0x40), (0x09, 0x4c)]);
    assert_eq!(read(&config, 0x42), [1, 2, 3, 4]);
}

#[test]
fn registers_of_another_function_are_refused() {
    let mut config = function();
    config.write(BAR, &[0xff; 8]);
    config.write(0x42, &[0xff; 2]);
    let saved = config.save();
    let restored = function().restored(&saved).expect("its own");
    assert_eq!(restored.save(), saved);
    for place in [0, 0x2d, 0x41, 0x42, 0xff] {
        let mut other = saved.clone();
        other[place] ^= 1;
        let error = function()
            .restored(&other)
            .expect_err("another")
            .to_string();
        assert!(error.contains("another function"), "{error}");
    }
    assert!(function().restored(&saved[..255]).is_err());
    assert!(
        function()
            .restored(&[saved.clone(), vec![0]].concat())
            .is_err()
    );
}

proptest! {
    #[test]
    fn any_access_is_harmless(
        accesses in prop::collection::vec((0_usize..0x1100, prop::collection::vec(any::<u8>(), 0..9)), 0..64),
    ) {
        let fresh = function();
        let mut config = function();
        for (register, data) in accesses {
            config.write(register, &data);
            let mut back = vec![0xee; data.len()];
            config.read(register, &mut back);
            let beyond = back.iter().enumerate().skip(SIZE.saturating_sub(register));
            prop_assert!(beyond.into_iter().all(|(_, byte)| *byte == 0));
        }
        for at in 0..SIZE {
            let fixed = !config.writable[at];
            prop_assert_eq!(config.bytes[at] & fixed, fresh.bytes[at] & fixed);
        }
        prop_assert_eq!(function().restored(&config.save()).expect("its own").save(), config.save());
    }
}
