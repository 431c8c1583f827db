//! What fuzz targets do with their input. `tests/corpus.rs` does the same with the kept corpus.

mod api;
mod balloon;
mod block;
mod console;
mod files;
mod fs;
mod guest;
mod input;
mod memory;
mod metadata;
mod net;
mod pci;
mod qcow2;
mod ring;
mod small;
mod snapshot;
mod streams;
mod transport;
mod vsock;

use vmm_sys_util::signal::block_signal;

/// A broken pipe (signal(7)).
const SIGPIPE: i32 = 13;

/// A target's name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] = &[
    ("api", api::api),
    ("balloon", balloon::balloon),
    ("block", block::block),
    ("board", files::board),
    ("console", console::console),
    ("fs", fs::fs),
    ("kernel", files::kernel),
    ("metadata", metadata::metadata),
    ("net", net::net),
    ("passt", streams::passt),
    ("pci", pci::pci),
    ("pmem", small::pmem),
    ("qcow2", qcow2::qcow2),
    ("rng", small::rng),
    ("snapshot", snapshot::snapshot),
    ("transport", transport::transport),
    ("vhost-user", streams::vhost_user),
    ("vsock", vsock::vsock),
];

/// As [`run`], with a machine that is held after every so many steps of its guest, and goes on with
/// the same device or another in its stead.
///
/// # Panics
/// What a target finds.
#[allow(dead_code, reason = "tests/corpus.rs does it, and a fuzzer does not")]
pub fn run_held(name: &str, data: &[u8], every: usize) {
    guest::holding(every, || run(name, data));
}

/// Does what the target of this name does with an input.
///
/// # Panics
/// What a target finds.
pub fn run(name: &str, data: &[u8]) {
    thread_local! {
        /// Broken pipes are errors, and no signals, as in any program of Rust with a main function.
        static PIPES: () = {
            let _ = block_signal(SIGPIPE);
        };
    }
    PIPES.with(|()| ());
    let target = TARGETS.iter().find(|(known, _)| *known == name);
    let (_, target) = target.unwrap_or_else(|| panic!("there is no target {name}"));
    target(data);
}
