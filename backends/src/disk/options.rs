//! Disks as they are asked for.

use crate::backend::Backend;
use crate::kind::{DeviceOptions, Identity, Kind, Need, Place};
use crate::options::{Options, path_first};
use crate::root;
use anyhow::{Context, Result, bail};
use armlet_devices::rate::Limits;
use std::path::PathBuf;

/// Disks.
pub static KIND: Kind = Kind {
    name: "disk",
    letter: Some("-d"),
    value: "DISK",
    help: "disk, /dev/vda and on: PATH, or\n\
        path=IMG[,readonly][,id=SERIAL][,format=raw|qcow2]\n\
        [,backing=IMG][,cache=writeback|none|unsafe][,queues=N]\n\
        [,engine=auto|io_uring|sync][,block-size=N][,bps=SIZE]\n\
        [,iops=N]; may be repeated",
    repeats: true,
    slot: 0,
    default: None,
    parse: |text, _| Ok(Some(Box::new(DiskOptions::parse(text)?))),
};

/// The flag.
pub(super) const FLAG: &str = "--disk";
/// The most bytes of a serial number (virtio 1.2, section 5.2.6).
const SERIAL: usize = 20;
/// The most queues of a disk.
const QUEUES: u64 = 16;
/// The unit of a disk's size, in bytes.
pub(super) const SECTOR: u64 = 512;
/// The least and most bytes of a block of a disk: Linux takes up to its page.
const BLOCKS: std::ops::RangeInclusive<u64> = SECTOR..=4096;
/// What a qcow2 image begins with (QEMU's docs/interop/qcow2.txt).
pub(super) const QCOW2: [u8; 4] = *b"QFI\xfb";

/// A disk as the user asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// The image, or a block device of the host.
    pub path: PathBuf,
    /// Whether the guest only reads it.
    pub readonly: bool,
    /// Its serial number: up to 20 ASCII characters without blanks.
    pub id: Option<String>,
    /// What kind of image it is.
    pub format: Format,
    /// The images behind a qcow2 image, the nearest first; those that it names itself are not opened.
    pub backing: Vec<PathBuf>,
    /// Whether I/O goes through the host's page cache.
    pub cache: Cache,
    /// Queues of the device: 1 to 16.
    pub queues: u16,
    /// How the host does its I/O.
    pub engine: EngineChoice,
    /// What the guest sees of a last sector that the image has only a part of.
    pub tail: Tail,
    /// How much may be read and written in how much time.
    pub limits: Limits,
    /// Bytes of the guest's blocks, a power of two from 512 to 4096; the host's choice where there is
    /// none.
    pub block_size: Option<u32>,
}

/// How the bytes of an image stand for those of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Raw, unless it looks like something else, which is for the user to decide.
    Auto,
    /// The bytes of the disk.
    Raw,
    /// QEMU's format.
    Qcow2,
}

/// Whether I/O goes through the host's page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// It does.
    Writeback,
    /// It goes around the cache (O_DIRECT).
    None,
    /// It does, and nothing that the guest does brings data to stable storage: what it wrote is lost when
    /// the host fails, and the guest is not told that it may be.
    Unsafe,
}

/// What the guest sees of a last sector that an image has only a part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// All of it: what is not there reads as zeroes, and the image grows to whole sectors when it is
    /// written. An image without any bytes is looked at again when somebody has filled it.
    Filled,
    /// Nothing, as with Firecracker. An image without any bytes stays a disk without any, until it is
    /// looked at again or replaced.
    Hidden,
}

/// How the host does its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineChoice {
    /// By io_uring, where the host has it and it is of use.
    Auto,
    /// By io_uring, or not at all.
    IoUring,
    /// One call at a time.
    Sync,
}

impl DiskOptions {
    /// Reads what stands behind `--disk`: `path=IMG` and more, or an image's name and more.
    ///
    /// # Errors
    /// What is not known or does not go together.
    pub fn parse(text: &str) -> Result<DiskOptions> {
        let text = &path_first(text, &["readonly"]);
        let mut options = Options::parse(FLAG, text, &["backing"])?;
        options.refuse("file", "path=")?;
        options.refuse("serial", "id=")?;
        let parsed = DiskOptions {
            path: options.require("path")?.into(),
            readonly: options.switch("readonly")?,
            id: options.take("id")?,
            format: options.choice(
                "format",
                &[
                    ("auto", Format::Auto),
                    ("raw", Format::Raw),
                    ("qcow2", Format::Qcow2),
                ],
            )?,
            backing: options
                .take_all("backing")?
                .into_iter()
                .map(PathBuf::from)
                .collect(),
            cache: options.choice(
                "cache",
                &[
                    ("writeback", Cache::Writeback),
                    ("none", Cache::None),
                    ("unsafe", Cache::Unsafe),
                ],
            )?,
            queues: options.number("queues", 1..=QUEUES)?.unwrap_or(1) as u16,
            engine: options.choice(
                "engine",
                &[
                    ("auto", EngineChoice::Auto),
                    ("io_uring", EngineChoice::IoUring),
                    ("sync", EngineChoice::Sync),
                ],
            )?,
            tail: Tail::Filled,
            limits: options.limits("bps", "iops")?,
            block_size: options
                .number("block-size", BLOCKS)?
                .map(|size| size as u32),
        };
        options.finish()?;
        parsed.check().with_context(|| format!("{FLAG} '{text}'"))?;
        Ok(parsed)
    }

    /// A disk on an image, with nothing else said of it.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> DiskOptions {
        DiskOptions {
            path: path.into(),
            readonly: false,
            id: None,
            format: Format::Auto,
            backing: Vec::new(),
            cache: Cache::Writeback,
            queues: 1,
            engine: EngineChoice::Auto,
            tail: Tail::Filled,
            limits: Limits::default(),
            block_size: None,
        }
    }

    /// Checks what has bounds and what excludes one another; whoever opens the disk does so, too.
    ///
    /// # Errors
    /// What is wrong, and what would be right.
    pub fn check(&self) -> Result<()> {
        if !(1..=QUEUES).contains(&u64::from(self.queues)) {
            bail!("queues={} is not a number from 1 to {QUEUES}", self.queues);
        }
        if let Some(id) = &self.id
            && (id.len() > SERIAL || !id.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            bail!(
                "id={id} is no serial number; use up to {SERIAL} ASCII characters without blanks"
            );
        }
        if let Some(size) = self.block_size
            && !(size.is_power_of_two() && BLOCKS.contains(&u64::from(size)))
        {
            bail!("block-size={size} is no power of two; use 512 to 4096");
        }
        if self.format != Format::Qcow2 && !self.backing.is_empty() {
            bail!("only format=qcow2 has backing files");
        }
        if self.format == Format::Qcow2 && self.engine == EngineChoice::IoUring {
            bail!("format=qcow2 works with engine=sync only");
        }
        Ok(())
    }
}

impl DeviceOptions for DiskOptions {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn identity(&self) -> Option<Identity<'_>> {
        Some(Identity {
            name: "id",
            value: self.id.as_deref()?,
            path: &self.path,
        })
    }

    /// The root file system on the first disk.
    fn cmdline(&self, number: usize) -> Option<&'static str> {
        (number == 0).then(|| root::words(&self.path)).flatten()
    }

    fn needs(&self) -> Vec<Need> {
        let mut needs = vec![Need::Thread, Need::Storage];
        if self.engine != EngineChoice::Sync && self.format != Format::Qcow2 {
            needs.push(Need::Ring);
        }
        if !self.readonly {
            needs.push(Need::Discards);
        }
        needs
    }

    fn needs_for_changes(&self) -> Vec<Need> {
        vec![Need::Broker, Need::Images]
    }

    fn open_backend(&self, place: &Place<'_>) -> Result<Box<dyn Backend>> {
        Ok(Box::new(self.open_in(place)?))
    }
}
