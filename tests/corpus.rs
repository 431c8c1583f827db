//! Inputs of the fuzz targets that are kept (`fuzz/corpus`), once more and by the same code, with
//! neither a fuzzer nor its compiler's options. `cargo xtask fuzz` finds new ones.
#![cfg(feature = "qcow2")]

use std::fs;
use std::path::Path;

#[path = "../fuzz/src/lib.rs"]
#[allow(unreachable_pub, reason = "it is a crate of its own elsewhere")]
mod fuzz;

/// Gives a target each of its inputs.
fn replay(target: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let folder = folder.join(target);
    let inputs = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    let mut count = 0;
    for input in inputs {
        let path = input.expect("an entry").path();
        // Shown with what a target says when it falls.
        println!("{path:?}");
        let input = fs::read(&path).expect("an input");
        fuzz::run(target, &input);
        for every in [1, 3] {
            println!("{path:?}, held after every {every}");
            fuzz::run_held(target, &input, every);
        }
        count += 1;
    }
    assert!(count > 0, "{folder:?} has no inputs");
}

macro_rules! replay {
    ($($name:ident: $target:literal),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                replay($target);
            }
        )*

        #[test]
        fn every_target_is_replayed() {
            let named: &[&str] = &[$($target),*];
            let all: Vec<&str> = fuzz::TARGETS.iter().map(|(name, _)| *name).collect();
            assert_eq!(named, all);
        }
    };
}

replay! {
    api: "api",
    balloon: "balloon",
    block: "block",
    board: "board",
    console: "console",
    fs: "fs",
    kernel: "kernel",
    metadata: "metadata",
    net: "net",
    passt: "passt",
    pci: "pci",
    pmem: "pmem",
    qcow2: "qcow2",
    rng: "rng",
    snapshot: "snapshot",
    transport: "transport",
    vhost_user: "vhost-user",
    vsock: "vsock",
}
