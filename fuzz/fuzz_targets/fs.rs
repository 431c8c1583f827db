//! Target fs.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| armlet_fuzz::run("fs", data));
