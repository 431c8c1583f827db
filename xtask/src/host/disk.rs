//! Disks of an emulated host.

use std::path::PathBuf;
use std::process::Command;

/// A disk of the emulated host.
#[derive(Clone)]
pub(crate) struct Disk {
    pub(crate) image: PathBuf,
    pub(crate) serial: String,
    pub(crate) access: Access,
}

/// What becomes of what is written to a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Refused,
    /// Kept until the host ends.
    Forgotten,
    Kept,
}

impl Disk {
    /// Adds the options of the disk with this index.
    pub(super) fn attach(&self, command: &mut Command, index: usize) {
        let options = match self.access {
            Access::Refused => "readonly=on",
            Access::Forgotten => "snapshot=on",
            Access::Kept => "readonly=off",
        };
        // Who would lose data is the emulated host, and it ends with us.
        let drive = format!(
            "if=none,id=disk{index},format=raw,cache=unsafe,discard=unmap,{options},file={}",
            self.image.display()
        );
        let device = format!("virtio-blk-pci,drive=disk{index},serial={}", self.serial);
        command.args(["-drive", &drive, "-device", &device]);
    }
}
