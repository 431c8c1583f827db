//! Target pci.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| armlet_fuzz::run("pci", data));
