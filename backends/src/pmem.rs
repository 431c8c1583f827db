//! Persistent memory (`--pmem`): a file that the guest has as memory, and mounts without a page
//! cache of its own.

use super::locks::{self, Use};
use super::options::{Options, path_first};
use super::pages;
use crate::backend::Backend;
use anyhow::{Context, Result, bail};
use armlet_devices::limit::RateLimit;
use armlet_devices::sync::lock;
use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::pmem::Pmem;
use armlet_system::eintr::uninterrupted;
use armlet_system::files::{self, Accepted};
use armlet_system::messages::shell_word;
use armlet_system::status::{Fault, Status};
use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vm_memory::{GuestAddress, GuestRegionMmap};

const FLAG: &str = "--pmem";

/// What an image's size is a multiple of, and its place in the guest's memory too, in bytes: the
/// guest adds memory in such pieces (Linux: include/linux/mmzone.h, SUBSECTION_SIZE).
pub const ALIGN: u64 = 2 << 20;

/// A file as the guest's memory.
pub struct PmemImage {
    name: String,
    image: Arc<FileMemory>,
    readonly: bool,
    address: usize,
    size: u64,
    /// Where the guest has it; 0 before that is decided.
    start: AtomicU64,
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
    lost: &'static AtomicBool,
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
    /// Opens, locks and maps the image that the value of `--pmem` names: the `index`th of the
    /// machine's.
    ///
    /// # Errors
    /// A value that makes no sense, an image that cannot be used.
    pub fn open(text: &str, index: usize) -> Result<PmemImage> {
        let (path, readonly) = read_options(text)?;
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

    /// The guest has it at this guest-physical address, a multiple of [`ALIGN`]: to be said before
    /// each [`Backend::device`].
    pub fn place(&self, start: u64) {
        self.start.store(start, Ordering::Relaxed);
    }
}

/// Bytes of the image that the value of `--pmem` names, for a plan: it is neither locked nor kept
/// open.
///
/// # Errors
/// A value that makes no sense, an image that cannot be opened.
pub fn planned_size(text: &str) -> Result<u64> {
    let (path, _) = read_options(text)?;
    let shown = path.display();
    let file = files::open(&path, Accepted::FileOrDisk, false)
        .with_context(|| format!("{FLAG}: cannot open {shown}"))?;
    size_of(&file).with_context(|| format!("{FLAG}: {shown}"))
}

/// The image's path, and whether it is for reading only.
fn read_options(text: &str) -> Result<(PathBuf, bool)> {
    let text = &path_first(text, &["readonly"]);
    let mut options = Options::parse(FLAG, text, &[])?;
    options.refuse("file", "path=")?;
    let path = PathBuf::from(options.require("path")?);
    let readonly = options.switch("readonly")?;
    options.finish()?;
    Ok((path, readonly))
}

/// The size of a file or block device in bytes.
fn size_of(file: &File) -> Result<u64> {
    let metadata = file.metadata().context("cannot be looked at")?;
    if metadata.file_type().is_block_device() {
        let size = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0));
        return size.context("its size cannot be found");
    }
    Ok(metadata.len())
}

impl Backend for PmemImage {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
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
        Ok(Arc::new(Mutex::new(Pmem::new(
            start,
            self.size,
            Box::new(flush),
        ))))
    }

    fn pmem(&self) -> Option<&PmemImage> {
        Some(self)
    }

    /// A flush takes as long as the storage takes.
    fn is_busy(&self) -> bool {
        true
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

    fn flush(&self) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::FileExt;
    use tempfile::TempDir;

    struct Folder(TempDir);

    impl Folder {
        fn new() -> Folder {
            Folder(tempfile::tempdir().expect("a folder"))
        }

        fn path(&self, name: &str) -> String {
            self.0.path().join(name).to_string_lossy().into_owned()
        }

        fn image(&self, size: u64) -> String {
            let path = self.path("image");
            let file = File::create(&path).expect("a file");
            file.set_len(size).expect("room");
            path
        }
    }

    fn refused(text: &str) -> String {
        let error = PmemImage::open(text, 0).map(|_| ()).expect_err(text);
        format!("{error:#}")
    }

    #[test]
    fn an_image_is_mapped_whole() {
        let folder = Folder::new();
        let path = folder.image(4 << 20);
        let image = PmemImage::open(&format!("path={path}"), 3).expect("an image");
        assert_eq!((image.size(), image.is_readonly()), (4 << 20, false));
        assert!((image.address() as u64).is_multiple_of(ALIGN) && image.address() != 0);
        assert_eq!(image.name(), "pmem3");
        image.place(0x1_0000_0000);
        let device = image.device().expect("a device");
        let config = device.lock().expect("sound").config();
        let mut bytes = [0; 16];
        config.read(0, &mut bytes);
        assert_eq!(bytes[..8], 0x1_0000_0000_u64.to_le_bytes());
        assert_eq!(bytes[8..], (4_u64 << 20).to_le_bytes());
    }

    #[test]
    fn only_one_writes_an_image() {
        let folder = Folder::new();
        let path = folder.image(2 << 20);
        let first = PmemImage::open(&format!("path={path}"), 0).expect("an image");
        assert!(refused(&format!("path={path}")).contains("is in use by another program"));
        assert!(refused(&format!("path={path},readonly")).contains("is in use"));
        // Not even when it is dropped: the mapping stays, and the lock with it.
        drop(first);
        assert!(refused(&format!("path={path}")).contains("is in use"));
        let folder = Folder::new();
        let path = folder.image(2 << 20);
        for index in [0, 1] {
            let reader = PmemImage::open(&format!("path={path},readonly"), index);
            assert!(reader.expect("readers share").is_readonly());
        }
        assert!(refused(&format!("path={path}")).contains("is in use"));
    }

    #[test]
    fn what_is_wrong_is_said_with_what_would_work() {
        let folder = Folder::new();
        let missing = folder.path("missing");
        assert!(refused("readonly").contains("lacks path="));
        assert!(refused(&format!("path={missing}")).contains("No such file"));
        let directory = folder.path("directory");
        fs::create_dir(&directory).expect("a folder");
        for switch in ["", ",readonly"] {
            assert!(refused(&format!("path={directory}{switch}")).contains("directory"));
        }
        for (size, advice) in [(0, "-s 2M"), (1, "-s 2M"), ((4 << 20) + 512, "-s 6M")] {
            let path = folder.image(size);
            let error = refused(&format!("path={path}"));
            assert!(
                error.contains(advice) && error.contains("multiple of 2 MiB"),
                "{error}"
            );
        }
        assert!(refused("path=/dev/null").contains("neither a file nor a block device"));
        assert!(refused("path=a,size=3").contains("use path, readonly"));
    }

    #[test]
    fn what_is_advised_can_be_followed_whatever_the_path() {
        let folder = Folder::new();
        for name in ["a b", "it's $HOME", "say \"hi\"", "grün"] {
            let path = folder.path(name);
            fs::write(&path, b"short").expect("a file");
            let error = refused(&format!("path={path}"));
            let (_, advice) = error.split_once("'truncate ").expect("advice");
            let (command, _) = advice.rsplit_once("' makes it one").expect("its end");
            let done = std::process::Command::new("sh")
                .args(["-c", &format!("truncate {command}")])
                .status();
            assert!(done.expect("a shell").success(), "{error}");
            PmemImage::open(&format!("path={path}"), 0).expect("an image now");
        }
    }

    #[test]
    fn a_flush_of_an_image_that_was_cut_fails() {
        let folder = Folder::new();
        let path = folder.image(4 << 20);
        let image = PmemImage::open(&format!("path={path}"), 0).expect("an image");
        image.image.flush().expect("nothing is wrong");
        let file = File::options().write(true).open(&path).expect("a file");
        file.set_len(2 << 20).expect("it is cut");
        let error = image.image.flush().expect_err("half of it is gone");
        assert!(error.to_string().contains("cut to 2097152 bytes"));
        file.set_len(4 << 20).expect("room");
        image.image.flush().expect("nothing was lost");
        image.image.lost.store(true, Ordering::Relaxed);
        assert!(image.image.flush().is_err());
    }

    #[test]
    fn memory_takes_the_place_of_what_was_cut_off() {
        let folder = Folder::new();
        let path = folder.path("image");
        fs::write(&path, vec![7; 4 << 20]).expect("a file");
        let image = PmemImage::open(&format!("path={path}"), 0).expect("an image");
        let memory = image.memory();
        let (mut first, mut second) = (0, 0);
        assert!(
            !memory.detach_missing(Missing::End, &mut first),
            "all there"
        );
        let file = File::options().write(true).open(&path).expect("a file");
        // In the middle of a page, of which the rest reads as zero.
        file.set_len((3 << 20) - 100).expect("it is cut");
        assert!(memory.detach_missing(Missing::End, &mut first));
        assert!(
            memory.detach_missing(Missing::End, &mut second),
            "another saw it too"
        );
        for seen in [&mut first, &mut second] {
            assert!(
                !memory.detach_missing(Missing::End, seen),
                "it is another's fault"
            );
        }
        let mut data = vec![1; 4 << 20];
        let all = File::open("/proc/self/mem").expect("our memory");
        all.read_exact_at(&mut data, image.address() as u64)
            .expect("no fault");
        let wanted = |at: usize| if at < (3 << 20) - 100 { 7 } else { 0 };
        assert!(
            data.iter()
                .enumerate()
                .all(|(at, byte)| *byte == wanted(at))
        );
        file.set_len(4 << 20).expect("room");
        let error = memory
            .flush()
            .expect_err("what was written there is nowhere");
        assert!(error.to_string().contains("lost before"));
    }

    /// A mapping whose file was cut, as devices have it.
    #[test]
    fn devices_survive_what_was_cut_off() {
        use vm_memory::{Bytes, GuestMemoryMmap};
        let folder = Folder::new();
        let path = folder.path("image");
        fs::write(&path, vec![7; 4 << 20]).expect("a file");
        let image = PmemImage::open(&format!("path={path}"), 0).expect("an image");
        let start = GuestAddress(0x1_0000_0000);
        let region = image.region(start).expect("a region");
        let memory = GuestMemoryMmap::from_regions(vec![region]).expect("memory");
        let at = |offset: u64| GuestAddress(start.0 + offset);
        memory.write_slice(&[1; 512], at(512)).expect("memory");
        image.image.flush().expect("nothing is wrong");
        assert_eq!(fs::read(&path).expect("a file")[512..1024], [1; 512]);
        let file = File::options().write(true).open(&path).expect("a file");
        file.set_len(2 << 20).expect("it is cut");
        memory.write_slice(&[2; 512], at(3 << 20)).expect("memory");
        let mut data = [1; 1024];
        memory.read_slice(&mut data, at(3 << 20)).expect("memory");
        assert_eq!(data, [[2; 512], [0; 512]].concat()[..], "until it is gone");
        // Where the file still is nothing changed.
        memory.read_slice(&mut data, at(2048)).expect("memory");
        assert_eq!(data, [7; 1024]);
        assert!(image.image.flush().is_err());
        file.set_len(4 << 20).expect("room");
        assert!(image.image.flush().is_err(), "what was written is nowhere");
        let size = file.metadata().expect("a size").len();
        assert_eq!(size, 4 << 20);
    }

    #[test]
    fn devices_only_read_what_is_for_reading() {
        let folder = Folder::new();
        let path = folder.image(2 << 20);
        let image = PmemImage::open(&format!("path={path},readonly"), 0).expect("an image");
        let region = image.region(GuestAddress(0)).expect("a region");
        assert_eq!(region.prot(), libc::PROT_READ);
        assert!(pages::is_persistent(&region));
    }

    #[test]
    fn holes_that_the_host_has_room_for_stay_the_files() {
        let folder = Folder::new();
        let path = folder.image(4 << 20);
        let image = PmemImage::open(&format!("path={path}"), 0).expect("an image");
        assert!(!image.memory().detach_missing(Missing::Blocks, &mut 0));
        image.image.flush().expect("nothing was lost");
    }
}
