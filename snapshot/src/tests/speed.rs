//! How long a guest stands still for its memory to be written.

use super::{pagemap, to, unused};
use crate::PAGE;
use crate::pages::{Piece, write, write_diff};
use std::fs::File;
use vm_memory::{Bytes, MemoryRegionAddress};

#[test]
#[ignore = "is a measurement: cargo test --release -p armlet-snapshot speed -- --ignored --nocapture"]
fn speed() {
    const SIZE: usize = 1 << 30;
    let map = pagemap();
    let region = unused(SIZE);
    let base = rustix::fs::memfd_create("base", rustix::fs::MemfdFlags::CLOEXEC);
    let base = File::from(base.expect("a file"));
    for at in (0..SIZE as u64).step_by(2 * PAGE as usize) {
        region
            .write_slice(&[at as u8 | 1; PAGE as usize], MemoryRegionAddress(at))
            .expect("memory");
        region
            .write_slice(&[0; PAGE as usize], MemoryRegionAddress(at + PAGE))
            .expect("memory");
    }
    let piece = [Piece::of(&region).expect("mapped")];
    let begun = std::time::Instant::now();
    let written = write(&piece, Some(&map), &base, &mut |_| Ok(())).expect("written");
    println!(
        "whole: {:?} for {} MiB of 1024",
        begun.elapsed(),
        written.bytes >> 20
    );
    let file = tempfile::tempfile().expect("a file");
    let begun = std::time::Instant::now();
    let written = write_diff(&piece, Some(&map), &to(&base), &file, &mut |_| Ok(()));
    println!(
        "diff: {:?} for {:?}",
        begun.elapsed(),
        written.expect("written").bytes
    );
    let begun = std::time::Instant::now();
    let region = unused(SIZE);
    let piece = [Piece::of(&region).expect("mapped")];
    write(&piece, Some(&map), &file, &mut |_| Ok(())).expect("written");
    println!("nothing used: {:?}", begun.elapsed());
}
