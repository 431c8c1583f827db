//! A file that is mapped as the guest's memory.

use super::options::{ALIGN, FLAG, PmemOptions, size_of};
use crate::locks::{self, Use};
use crate::pages;
use anyhow::{Context, Result, bail};
use armlet_devices::limit::RateLimit;
use armlet_devices::rate::Throttle;
use armlet_devices::sync::lock;
use armlet_devices::virtio::pmem::Pmem;
use armlet_system::eintr::uninterrupted;
use armlet_system::files::{self, Accepted};
use armlet_system::messages::shell_word;
use armlet_system::status::{Fault, Status};
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vm_memory::{GuestAddress, GuestRegionMmap};

/// A file as the guest's memory.
pub struct PmemImage {
    name: String,
    pub(super) image: Arc<FileMemory>,
    readonly: bool,
    address: usize,
    size: u64,
    /// Where the guest has it; 0 before that is decided.
    start: AtomicU64,
    pub(super) throttle: Option<Arc<Throttle>>,
}

/// A file that is the guest's memory, mapped until the process ends.
pub struct FileMemory {
    name: String,
    path: PathBuf,
    file: File,
    readonly: bool,
    address: usize,
    size: u64,
    /// Whether writes were lost on their way to storage.
    pub(super) lost: &'static AtomicBool,
    /// Flushes that failed.
    failures: RateLimit,
    /// Where memory has taken the file's place.
    detached: Mutex<Detached>,
}

/// What a file may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// Its end, which was cut off.
    End,
    /// Blocks for what was never written, on a disk that is full.
    Blocks,
}

/// Parts of the mapping that are the file's no more.
#[derive(Default)]
struct Detached {
    /// Where they begin and end.
    parts: Vec<(u64, u64)>,
    /// How often some were added.
    times: u64,
}

impl PmemImage {
    /// Opens, locks and maps an image: the `index`th of the machine's.
    ///
    /// # Errors
    /// An image that cannot be used.
    pub fn open(options: &PmemOptions, index: usize) -> Result<PmemImage> {
        let PmemOptions { path, readonly, .. } = options.clone();
        let shown = path.display();
        let opened = files::open(&path, Accepted::FileOrDisk, !readonly);
        let file = opened.with_context(|| match readonly {
            true => format!("{FLAG}: cannot open {shown} to read"),
            false => format!("{FLAG}: cannot open {shown} to read and write"),
        })?;
        let size = size_of(&file).with_context(|| format!("{FLAG}: {shown}"))?;
        if size == 0 || !size.is_multiple_of(ALIGN) {
            bail!(
                "{FLAG}: {shown} has {size} bytes, not a multiple of 2 MiB; 'truncate -s {}M {}' makes it one",
                size.next_multiple_of(ALIGN).max(ALIGN) >> 20,
                shell_word(&path)
            );
        }
        let used = match readonly {
            true => Use::ReadRaw,
            false => Use::WriteRaw,
        };
        let locked = locks::lock(&file, used);
        if locked
            .with_context(|| format!("{FLAG}: cannot lock {shown}"))?
            .is_err()
        {
            bail!("{FLAG}: {shown} is in use by another program; only one may write it")
        }
        let address = usize::try_from(size)
            .map_err(anyhow::Error::from)
            .and_then(|size| pages::map_file(&file, size, readonly))
            .with_context(|| format!("{FLAG}: cannot map {size} bytes of {shown}"))
            .fault(Status::Host)?;
        let (name, address) = (format!("pmem{index}"), address as usize);
        let lost = pages::survive_missing(address, size as usize, &file, readonly);
        Ok(PmemImage {
            name: name.clone(),
            readonly,
            address,
            size,
            start: AtomicU64::new(0),
            throttle: None,
            image: Arc::new(FileMemory {
                name,
                path,
                file,
                readonly,
                address,
                size,
                lost,
                failures: RateLimit::default(),
                detached: Mutex::default(),
            }),
        })
    }

    /// The mapping, for whoever hears that the host has no page for the guest.
    #[must_use]
    pub fn memory(&self) -> Arc<FileMemory> {
        Arc::clone(&self.image)
    }

    /// Address of the mapping in this process, which stays until the process ends: what the
    /// memslot needs.
    #[must_use]
    pub fn address(&self) -> usize {
        self.address
    }

    /// The mapping as a part of guest memory at `start`, for devices.
    ///
    /// # Errors
    /// A process without room for another descriptor.
    pub fn region(&self, start: GuestAddress) -> Result<GuestRegionMmap> {
        let file = self.image.file.try_clone();
        let file = file.with_context(|| format!("cannot share the file of {}", self.name))?;
        let size = usize::try_from(self.size)?;
        pages::region(start, self.address, size, file, self.readonly)
    }

    /// Bytes of the mapping: a multiple of [`ALIGN`].
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the mapping is for reading only; then the memslot has to be so too.
    #[must_use]
    pub fn is_readonly(&self) -> bool {
        self.readonly
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// A device for the guest that starts now.
    pub(super) fn new_device(&self) -> Pmem {
        let start = self.start.load(Ordering::Relaxed);
        let (image, name) = (Arc::clone(&self.image), self.name.clone());
        let flush = move || match image.flush() {
            Ok(()) => true,
            Err(error) => {
                image.failures.log(log::Level::Warn, |held| {
                    let path = image.path.display();
                    format!(
                        "{name}: cannot flush {path}: {error:#}; the guest gets an I/O error{held}"
                    )
                });
                false
            }
        };
        Pmem::new(start, self.size, Box::new(flush)).held_to(self.throttle.clone())
    }

    /// The image, whose flushes are held to the limits of `throttle`, if there is one.
    pub(super) fn held_to(mut self, throttle: Option<Arc<Throttle>>) -> PmemImage {
        self.throttle = throttle;
        self
    }

    /// The guest has it at this guest-physical address, a multiple of [`ALIGN`]: to be said before
    /// each [`Backend::device`](crate::backend::Backend::device).
    pub fn place(&self, start: u64) {
        self.start.store(start, Ordering::Relaxed);
    }
}

impl FileMemory {
    /// The host had no page for the guest's access. If it is this file that lacks it, memory takes
    /// its place there: the guest goes on with that, and its flushes fail from then on.
    ///
    /// `seen` is how often that was done when the access was made. Returns whether to try again.
    pub fn detach_missing(&self, missing: Missing, seen: &mut u64) -> bool {
        let mut detached = lock(&self.detached);
        let before = std::mem::replace(seen, detached.times);
        if before < detached.times {
            // Another vCPU met it first.
            return true;
        }
        let size = size_of(&self.file).map_or(0, |size| size.min(self.size));
        let (parts, why) = match missing {
            Missing::End => (
                // The page in which the file ends is still there.
                vec![(pages::whole(size), self.size)],
                format!("was cut to {size} of {} bytes", self.size),
            ),
            Missing::Blocks => (
                self.holes(size),
                "finds no room on the host for what was never written of it".to_owned(),
            ),
        };
        let parts = parts.into_iter();
        let added: u64 = parts.map(|part| self.detach(&mut detached, part)).sum();
        if added == 0 {
            return false;
        }
        detached.times += 1;
        *seen = detached.times;
        self.lost.store(true, Ordering::Relaxed);
        log::error!(
            "{}: {} {why}; the guest goes on with memory in place of {added} bytes, which is lost when armlet ends, and its flushes fail",
            self.name,
            self.path.display(),
        );
        true
    }

    /// Detaches a part unless it is so already; returns its bytes.
    fn detach(&self, detached: &mut Detached, (start, end): (u64, u64)) -> u64 {
        let mut parts = detached.parts.iter();
        if start >= end || parts.any(|part| part.0 <= start && end <= part.1) {
            return 0;
        }
        match pages::detach(self.address, &self.file, start, end, self.readonly) {
            Ok(()) => {
                detached.parts.push((start, end));
                end - start
            }
            Err(error) => {
                let (name, size) = (&self.name, end - start);
                log::error!("{name}: no memory in place of {size} bytes: {error}");
                0
            }
        }
    }

    /// Where the file has no blocks, if the host has none for it.
    fn holes(&self, size: u64) -> Vec<(u64, u64)> {
        use rustix::fs::SeekFrom;
        let seek = |from| rustix::fs::seek(&self.file, from).ok();
        let mut holes = Vec::new();
        let mut at = 0;
        while at < size
            && let Some(start) = seek(SeekFrom::Hole(at)).filter(|start| *start < size)
        {
            // Another file may be what lacks pages: this one is if it gets none.
            if holes.is_empty() && pages::has_page(self.address, start, !self.readonly) {
                break;
            }
            at = seek(SeekFrom::Data(start)).map_or(size, |end| end.min(size));
            holes.push((start, at));
        }
        holes
    }

    pub(super) fn flush(&self) -> Result<()> {
        if self.readonly {
            return Ok(());
        }
        // What Linux could not write it drops, and says so once; a later flush that succeeds does
        // not bring it back (Documentation/filesystems/vfs.rst, "Handling errors during
        // writeback").
        if self.lost.load(Ordering::Relaxed) {
            bail!("writes were lost before");
        }
        let size = size_of(&self.file)?;
        if size < self.size {
            bail!("it was cut to {size} bytes");
        }
        uninterrupted(|| rustix::fs::fdatasync(&self.file)).inspect_err(|_| {
            self.lost.store(true, Ordering::Relaxed);
        })?;
        Ok(())
    }
}
