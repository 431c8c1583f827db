//! Disks for guests (`--disk`): image files and block devices of the host.
//!
//! An image stays open and locked as long as armlet lives; each guest that starts gets a new
//! device on it.

mod complaints;
mod growth;
mod handle;
mod image;
mod lent;
mod opened;
mod opener;
mod options;
#[cfg(feature = "qcow2")]
pub mod qcow2;
mod replacement;
mod sys;
mod table;
mod uring;

pub use handle::DiskHandle;
pub use options::{Cache, DiskOptions, EngineChoice, Format, KIND, Tail};

use crate::backend::{Backend, Flow};
use crate::kind::Place;
use crate::locks::Use;
use crate::timer;
use anyhow::{Context, Result, bail};
use armlet_devices::counts::{Counts, Tally};
use armlet_devices::rate::Throttle;
use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::block::{Block, Engine, Shape};
use armlet_system::messages::shell_word;
use complaints::Complaints;
use handle::{Measured, Replace};
use image::{Alignment, Current, Image, PlainEngine};
use lent::Home;
use opened::Opened;
use opener::Opener;
use options::{FLAG, QCOW2, SECTOR};
use replacement::Replacement;
use rustix::fs::OFlags;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use uring::UringEngine;

impl DiskOptions {
    /// Opens and locks the image of the disk with this number; its name is "disk" and the number.
    ///
    /// # Errors
    /// An image that is not there, not to be had, in use or not what the user says it is.
    pub fn open(&self, number: usize) -> Result<Disk> {
        self.open_as(number, Opener::Here, true)
    }

    /// As [`Self::open`], for a guest's slot.
    fn open_in(&self, place: &Place<'_>) -> Result<Disk> {
        let opener = Opener::of(place, !self.readonly)?;
        self.open_as(place.number, opener, place.changes)
    }

    /// As [`Self::open`]; `opener` opens other images, and `changes` says whether limits may come.
    fn open_as(&self, number: usize, opener: Opener, changes: bool) -> Result<Disk> {
        self.check()
            .with_context(|| format!("{FLAG} {}", self.path.display()))?;
        let name = format!("disk{number}");
        let opened = Opened::open(&self.path, !self.readonly)?;
        let (storage, shape) = match self.is_qcow2(&self.path, &opened.file)? {
            true => self.qcow2(&name, opened)?,
            false => self.raw(&name, opened)?,
        };
        self.check_sectors(shape.size, &self.path)?;
        let throttle = timer::throttle(&self.limits, changes);
        let throttle = throttle.with_context(|| format!("cannot make the timer of {name}"))?;
        Ok(Disk {
            name,
            storage,
            shape,
            throttle,
            counts: Arc::default(),
            options: self.clone(),
            opener,
        })
    }

    fn is_qcow2(&self, path: &Path, file: &File) -> Result<bool> {
        let mut magic = [0; QCOW2.len()];
        let looks_so = match file.read_exact_at(&mut magic, 0) {
            Ok(()) => magic == QCOW2,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => false,
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot read disk image {}", path.display()));
            }
        };
        match self.format {
            Format::Raw => Ok(false),
            Format::Qcow2 if looks_so => Ok(true),
            Format::Qcow2 => bail!(
                "disk image {} is no qcow2 image; leave format= out for a raw one",
                path.display()
            ),
            // A guest can write such a beginning into its raw disk, and name files of the host in
            // it as backing files: so nothing is guessed.
            Format::Auto if looks_so => bail!(
                "disk image {} begins like a qcow2 image; say format=qcow2, or format=raw if its guest wrote that",
                path.display()
            ),
            Format::Auto => Ok(false),
        }
    }

    fn raw(&self, name: &str, opened: Opened) -> Result<(Storage, Shape)> {
        let path = &self.path;
        let context = || format!("cannot look at disk image {}", path.display());
        let (size, direct) = self.prepare(path, &opened)?;
        let mut shape = self.shape(size);
        opened
            .limits(&mut shape, self.block_size)
            .with_context(context)?;
        if let Some(direct) = direct {
            shape.physical_block_size = shape.physical_block_size.max(direct.offset as u32);
        }
        let is_device = opened.is_device;
        let mut image = self.image(name, path, opened, direct, shape.block_size);
        shape.size = image.set_len(size);
        if size == 0
            && !is_device
            && self.tail == Tail::Filled
            && let Err(error) = image.watch_growth()
        {
            log::warn!(
                "{name}: disk image {} is empty, and this host does not tell when it is filled ({error}); the guest sees that after its next reset",
                path.display()
            );
        }
        let image = Current::new(image);
        let ring = self.ring(name, &image)?;
        let storage = Storage::Raw { image, ring };
        Ok((storage, shape))
    }

    /// Locks a raw image, and takes the page cache out of the way if that is wanted. Returns its bytes, and
    /// what direct I/O asks for.
    fn prepare(&self, path: &Path, opened: &Opened) -> Result<(u64, Option<Alignment>)> {
        opened.lock(path, self.used(Use::ReadRaw, Use::WriteRaw))?;
        let size = (&opened.file)
            .seek(SeekFrom::End(0))
            .with_context(|| format!("cannot look at disk image {}", path.display()))?;
        let direct = match self.cache {
            Cache::Writeback | Cache::Unsafe => None,
            Cache::None => Some(self.bypass_cache(path, opened, size)?),
        };
        Ok((size, direct))
    }

    /// The raw image at `path`, for a guest that has blocks of `block` bytes.
    fn image(
        &self,
        name: &str,
        path: &Path,
        opened: Opened,
        direct: Option<Alignment>,
        block: u32,
    ) -> Image {
        let complaints = Complaints::new(name.to_owned(), path.to_owned());
        let Opened {
            file, is_device, ..
        } = opened;
        let image = Image::new(file, is_device, self.readonly, direct, block, complaints);
        match self.tail {
            Tail::Filled => image,
            Tail::Hidden => image.without_tail(),
        }
    }

    /// A ring for the first guest, where the user wants one and the host has it.
    fn ring(&self, name: &str, image: &Current) -> Result<Option<Home>> {
        let error = match self.engine {
            EngineChoice::Sync => return Ok(None),
            // The ring would have a thread do each read.
            EngineChoice::Auto if is_in_memory(&image.get()) => return Ok(None),
            _ => {
                let home = Home::default();
                match UringEngine::new(image, &home) {
                    // Dropped, it leaves its ring at home.
                    Ok(_) => return Ok(Some(home)),
                    Err(error) => error,
                }
            }
        };
        let why = match error.kind() {
            io::ErrorKind::PermissionDenied => {
                " (kernel.io_uring_disabled or a seccomp filter forbids it)"
            }
            io::ErrorKind::OutOfMemory => " (see 'ulimit -l')",
            _ => "",
        };
        match self.engine {
            EngineChoice::IoUring => Err(error).with_context(|| {
                format!("{name}: no io_uring on this host{why}; engine=sync works without")
            }),
            _ => {
                log::info!("{name}: no io_uring on this host{why}: {error}; using engine=sync");
                Ok(None)
            }
        }
    }

    /// Takes the host's page cache out of the way.
    fn bypass_cache(&self, path: &Path, opened: &Opened, size: u64) -> Result<Alignment> {
        let shown = path.display();
        let refused = || format!("disk image {shown} does not do cache=none; use cache=writeback");
        let alignment = opened.direct_alignment().with_context(refused)?;
        // What is only read can end anywhere.
        if !self.readonly && !size.is_multiple_of(alignment.offset as u64) {
            bail!(
                "disk image {shown} has {size} bytes; cache=none needs a multiple of {align} here: 'truncate -s %{align} {}', or use cache=writeback",
                shell_word(path),
                align = alignment.offset,
            );
        }
        let flags = rustix::fs::fcntl_getfl(&opened.file)
            .and_then(|flags| rustix::fs::fcntl_setfl(&opened.file, flags | OFlags::DIRECT));
        flags.with_context(refused)?;
        Ok(alignment)
    }

    #[cfg(feature = "qcow2")]
    fn qcow2(&self, name: &str, opened: Opened) -> Result<(Storage, Shape)> {
        let path = &self.path;
        opened.lock(path, self.used(Use::ReadFormat, Use::WriteFormat))?;
        let mut chain = Vec::new();
        for path in &self.backing {
            let behind = Opened::open(path, false)?;
            behind.lock(path, Use::ReadFormat)?;
            chain.push(qcow2::Behind::new(path.clone(), behind.file)?);
        }
        let complaints = Complaints::new(name.to_owned(), path.clone());
        // Direct I/O reads in blocks, which it does not end with.
        let header = qcow2::look_at_header(path, &opened.file, self.readonly)?;
        if self.cache == Cache::None {
            self.bypass_cache(path, &opened, 0)?;
        }
        let image =
            qcow2::Unread::new(path, opened.file, header, self.readonly, chain, complaints)?;
        let mut shape = self.shape(image.size());
        shape.block_size = self.block_size.unwrap_or(shape.block_size);
        shape.physical_block_size = 4096;
        shape.discard_granularity = 4096;
        Ok((Storage::Unread(Some(Box::new(image))), shape))
    }

    #[cfg(not(feature = "qcow2"))]
    fn qcow2(&self, _name: &str, _opened: Opened) -> Result<(Storage, Shape)> {
        bail!(
            "disk image {}: this armlet was built without qcow2; 'qemu-img convert -O raw {} NEW' makes a raw image of it",
            self.path.display(),
            shell_word(&self.path)
        )
    }

    /// Refuses a disk that ends with a part of a sector; those of files are filled up, or do without it.
    fn check_sectors(&self, size: u64, path: &Path) -> Result<()> {
        if !size.is_multiple_of(SECTOR) {
            let more = SECTOR - size % SECTOR;
            bail!(
                "disk image {} has {size} bytes, which are no whole sectors; 'qemu-img resize {} +{more}' fills up the last one",
                path.display(),
                shell_word(path)
            );
        }
        Ok(())
    }

    fn used(&self, to_read: Use, to_write: Use) -> Use {
        match self.readonly {
            true => to_read,
            false => to_write,
        }
    }

    fn shape(&self, size: u64) -> Shape {
        Shape {
            size,
            readonly: self.readonly,
            serial: self.id.clone().unwrap_or_default(),
            queues: self.queues,
            flushes: self.cache != Cache::Unsafe,
            block_size: SECTOR as u32,
            physical_block_size: SECTOR as u32,
            optimal_io_size: 0,
            discard_granularity: SECTOR as u32,
        }
    }
}

/// Whether no request to an image has to wait for storage.
fn is_in_memory(image: &Image) -> bool {
    image.direct.is_none() && opened::is_in_memory(&image.file)
}

/// A disk of the host, open and locked.
pub struct Disk {
    name: String,
    storage: Storage,
    shape: Shape,
    throttle: Option<Arc<Throttle>>,
    counts: Arc<Counts>,
    options: DiskOptions,
    opener: Opener,
}

enum Storage {
    Raw {
        image: Current,
        /// The ring, where its work is done by one.
        ring: Option<Home>,
    },
    /// What is to become the next, once the process is confined.
    #[cfg(feature = "qcow2")]
    Unread(Option<Box<qcow2::Unread>>),
    #[cfg(feature = "qcow2")]
    Qcow2(Arc<qcow2::Image>),
}

impl Storage {
    /// Reads what the disk holds now; says whether it could.
    fn peek(&self, offset: u64, bytes: &mut [u8]) -> bool {
        match self {
            Storage::Raw { image, .. } => image.get().peek(offset, bytes).is_ok(),
            #[cfg(feature = "qcow2")]
            Storage::Unread(_) => false,
            #[cfg(feature = "qcow2")]
            Storage::Qcow2(image) => image.peek(offset, bytes).is_ok(),
        }
    }
}

impl Disk {
    fn handle(&self) -> DiskHandle {
        DiskHandle {
            name: self.name.clone(),
            replace: self.replace(),
            image: match &self.storage {
                Storage::Raw { image, .. } => Measured::Raw(image.clone()),
                #[cfg(feature = "qcow2")]
                Storage::Unread(_) | Storage::Qcow2(_) => Measured::Fixed(self.shape.size),
            },
        }
    }

    fn replace(&self) -> Option<Replace> {
        match &self.storage {
            Storage::Raw { image, .. } => {
                let replacement = Replacement {
                    name: self.name.clone(),
                    options: self.options.clone(),
                    opener: self.opener.clone(),
                    block: self.shape.block_size,
                    current: image.clone(),
                };
                Some(Box::new(move |path| replacement.open(path)))
            }
            #[cfg(feature = "qcow2")]
            Storage::Unread(_) | Storage::Qcow2(_) => None,
        }
    }

    fn engine(&self) -> Result<Box<dyn Engine>> {
        match &self.storage {
            Storage::Raw {
                image,
                ring: Some(home),
            } => {
                let engine = UringEngine::new(image, home);
                Ok(Box::new(engine.context("cannot make another io_uring")?))
            }
            Storage::Raw { image, .. } => Ok(Box::new(PlainEngine::new(image))),
            #[cfg(feature = "qcow2")]
            Storage::Unread(_) => bail!("{} was not examined", self.options.path.display()),
            #[cfg(feature = "qcow2")]
            Storage::Qcow2(image) => Ok(Box::new(qcow2::Qcow2Engine::new(Arc::clone(image)))),
        }
    }
}

impl Backend for Disk {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn examine(&mut self) -> Result<()> {
        #[cfg(feature = "qcow2")]
        if let Storage::Unread(unread) = &mut self.storage
            && let Some(unread) = unread.take()
        {
            self.storage = Storage::Qcow2(Arc::new(unread.read()?));
        }
        let read = |offset, bytes: &mut [u8]| self.storage.peek(offset, bytes);
        if let Some(sector) = table::other_sector(self.shape.block_size, read) {
            log::warn!(
                "{}: the partition table of {} is for sectors of {sector} bytes, and the guest gets {}; block-size={sector} gives it those",
                self.name,
                self.options.path.display(),
                self.shape.block_size
            );
        }
        Ok(())
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        let mut shape = self.shape.clone();
        shape.size = self.handle().look()?;
        let device = Block::new(&shape, self.engine()?)
            .held_to(self.throttle.clone())
            .counted_by(Arc::clone(&self.counts));
        Ok(Arc::new(Mutex::new(device)))
    }

    fn disk(&self) -> Option<DiskHandle> {
        Some(self.handle())
    }

    fn throttle(&self, flow: Flow) -> Option<&Throttle> {
        self.throttle.as_deref().filter(|_| flow == Flow::All)
    }

    fn tally(&self) -> Option<Tally> {
        Some(self.counts.tally())
    }

    fn is_busy(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;
