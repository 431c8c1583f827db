//! The rig as tests, benches and people use it: an emulated host with the disks that its
//! description asks for, which are made where they are missing.

use std::path::Path;

use anyhow::Result;

use crate::assets;
use crate::host::{self, Access, Disk, Ended, HostSpec, Job};
use crate::packages::Store;
use crate::terminal::RawTerminal;

/// As [`host::run`], with the disks that `spec` names.
pub(crate) fn run(
    store: &Store,
    spec: &HostSpec,
    job: &Job,
    terminal: Option<&RawTerminal>,
    print: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<Ended> {
    let disks = disks(store, spec)?;
    host::run(store, spec, job, disks, terminal, print)
}

/// Returns the disks that a host needs beside those of a job.
fn disks(store: &Store, spec: &HostSpec) -> Result<Vec<Disk>> {
    let mut disks = Vec::new();
    let mut add = |image: &Path, serial: &str, access| {
        disks.push(Disk {
            image: image.to_owned(),
            serial: serial.to_owned(),
            access,
        });
    };
    if spec.tools {
        add(&assets::tools(store, spec.isa)?, "tools", Access::Refused);
    }
    if spec.system {
        add(&assets::system(store)?, "data", Access::Forgotten);
    } else if let Some(data) = &spec.data {
        add(data, "data", Access::Forgotten);
    }
    Ok(disks)
}
