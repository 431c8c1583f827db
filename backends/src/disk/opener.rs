//! How another image is opened for a disk while its guest runs.

use super::opened::Opened;
use crate::broker::{Broker, Service, ServiceId};
use crate::kind::Place;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Opens images.
#[derive(Clone, Debug)]
pub(super) enum Opener {
    /// This process, which is not confined.
    Here,
    /// The broker, which only opens images, and only to read if the disk is read-only. A path is relative
    /// to the folder that was this process's at the start.
    Broker(Arc<Broker>, ServiceId, PathBuf),
    /// Nobody: no client was to change this guest's devices.
    Nobody,
}

impl Opener {
    /// The one of a disk that is opened at `place`.
    ///
    /// # Errors
    /// A broker that takes no more services; no current folder.
    pub(super) fn of(place: &Place<'_>, writable: bool) -> Result<Opener> {
        Ok(match place.broker {
            _ if !place.changes => Opener::Nobody,
            None => Opener::Here,
            Some(broker) => {
                let service = broker.offer(Service::Images { writable })?;
                let folder = std::env::current_dir().context("cannot find the current folder")?;
                Opener::Broker(Arc::clone(broker), service, folder)
            }
        })
    }

    /// Opens an image, as [`Opened::open`] does.
    ///
    /// # Errors
    /// As there; that nobody can open one.
    pub(super) fn open(&self, path: &Path, writable: bool) -> Result<Opened> {
        match self {
            Opener::Here => Opened::open(path, writable),
            Opener::Broker(broker, service, folder) => {
                let opened = broker.open(*service, &folder.join(path));
                let cannot = || format!("cannot open disk image {}", path.display());
                Opened::of(opened.with_context(cannot)?.into()).with_context(cannot)
            }
            Opener::Nobody => bail!("no client was to change this guest's devices"),
        }
    }
}
