//! Snapshots: what a machine is at a moment, in two files, and machines that go on from there.
//!
//! `head` is what is known of a snapshot before anything of it is restored: how the machine was asked
//! for, its plan, and the host that it ran on. `create` writes one while the machine is paused.
//! `restore` reads one; whether this host can hold the machine is decided before KVM makes anything.
//! `inspect` is `armlet snapshot`. The crate `armlet-snapshot` has the files.

mod create;
mod head;
mod inspect;
mod restore;

pub use armlet_snapshot::VERSION;
pub use create::{Base, Outcome, Savers, Wanted, Written};
pub use head::Head;
pub use inspect::{inspect, version};
pub use restore::{FirstPages, MemoryFrom, Restore};

use anyhow::Result;
use armlet_snapshot::pages::{Backing, Piece};
use armlet_system::files::open_regular;
use std::fs::File;
use std::path::Path;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// What is behind a guest's memory: `image` where it is small pages of this process alone, and mapped from
/// there.
fn pieces<'a>(memory: &'a GuestMemoryMmap, image: Option<&'a File>) -> Result<Vec<Piece<'a>>> {
    let mut offset = 0;
    let mut pieces = Vec::new();
    for region in memory.iter() {
        pieces.push(match image {
            // The file was read into memory of other kinds.
            Some(file) if region.flags() & (libc::MAP_SHARED | libc::MAP_ANONYMOUS) == 0 => {
                Piece::new(region.as_volatile_slice()?, Backing::Copied(file, offset))
            }
            _ => Piece::of(region)?,
        });
        offset += region.len();
    }
    Ok(pieces)
}

/// Opens what tells which pages of this process there are, where /proc does.
fn pagemap() -> Option<File> {
    let opened = open_regular(Path::new("/proc/self/pagemap"));
    opened.ok().map(|(file, _)| file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use armlet_snapshot::pages;
    use std::os::unix::fs::FileExt;
    use vm_memory::GuestAddress;

    /// Huge pages are: pages that their guest gave back are zero, and not the file's again.
    #[test]
    fn memory_that_a_file_was_read_into_is_not_the_files() {
        const SIZE: usize = 1 << 20;
        let image = tempfile::tempfile().expect("a file");
        image.write_all_at(&[1; SIZE], 0).expect("room");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0x4000_0000), SIZE)]);
        let memory = memory.expect("memory");
        let pieces = pieces(&memory, Some(&image)).expect("pieces");
        let into = tempfile::tempfile().expect("a file");
        let map = pagemap();
        let written = pages::write(&pieces, map.as_ref(), &into, &mut |_| Ok(()));
        assert_eq!(written.expect("written").bytes, 0);
    }
}
