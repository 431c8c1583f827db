//! Opens and creates files that users name; everything else goes through this module.
//!
//! A path can lead to anything. Opening a FIFO blocks until its other end is opened, and opening a
//! device can have side effects: a watchdog starts, a tape rewinds. So a path is looked up without
//! opening the file (O_PATH), its type is checked, and then that very file is opened.

use crate::deadline::Deadline;
use crate::eintr::uninterrupted;
use anyhow::{Context, Result, bail};
use rustix::event::PollFlags;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The directory by which this process can reopen its descriptors.
const DESCRIPTORS: &str = "/proc/self/fd";
/// How long to wait for the reader of a pipe.
const PATIENCE: Duration = Duration::from_secs(10);
/// The device number of /dev/null (Documentation/admin-guide/devices.txt).
const NULL: (u32, u32) = (1, 3);

/// What a path may lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// A regular file.
    File,
    /// A regular file or a block device.
    FileOrDisk,
}

/// Opens a file for reading, and for writing too if `writable`.
///
/// # Errors
/// The system's error, as [`io::Error`], and a path that does not lead to an accepted file.
pub fn open(path: &Path, accepted: Accepted, writable: bool) -> Result<File> {
    open_by(DESCRIPTORS, path, accepted, writable)
}

/// Opens a regular file for reading. Returns it and its size in bytes.
///
/// # Errors
/// As for [`open`].
pub fn open_regular(path: &Path) -> Result<(File, u64)> {
    let (file, found) = open_found(DESCRIPTORS, path, Accepted::File, false)?;
    Ok((file, found.st_size.unsigned_abs()))
}

/// Reads a regular file of up to `most` bytes of text.
///
/// # Errors
/// As for [`open`], and one that is larger or no UTF-8.
pub fn text(path: &Path, most: u64) -> Result<String> {
    let (file, size) = open_regular(path)?;
    let mut text = String::new();
    // Files in /proc report a size of 0.
    let read = file.take(most + 1).read_to_string(&mut text)? as u64;
    if size.max(read) > most {
        bail!("it has {} bytes; use up to {most}", size.max(read));
    }
    Ok(text)
}

/// Opens a regular file to write it anew, and makes one where there is nothing.
///
/// # Errors
/// What the system says, and something that is no regular file.
pub fn rewrite(path: &Path) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let flags = flags | OFlags::NOCTTY;
    let mode = Mode::from(0o644);
    let file = File::from(uninterrupted(|| rustix::fs::open(path, flags, mode))?);
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
    if kind != FileType::RegularFile {
        return Err(io::Error::other(format!("it is a {}", name_of(kind))));
    }
    file.set_len(0)?;
    Ok(file)
}

/// Opens a file or FIFO to write at its end, and makes a file where there is nothing. Writes never wait;
/// a FIFO needs no reader, and takes what fits.
///
/// # Errors
/// What the system says.
pub fn append(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::APPEND | OFlags::NONBLOCK;
    let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
    let mode = Mode::from(0o644);
    let file = File::from(uninterrupted(|| rustix::fs::open(path, flags, mode))?);
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
    match kind {
        FileType::RegularFile | FileType::Fifo => Ok(file),
        _ => Err(io::Error::other(format!("it is a {}", name_of(kind)))),
    }
}

/// Like [`open`]; `descriptors` is the directory of this process's descriptors.
fn open_by(descriptors: &str, path: &Path, accepted: Accepted, writable: bool) -> Result<File> {
    Ok(open_found(descriptors, path, accepted, writable)?.0)
}

/// As `open_by`; returns what was found too.
fn open_found(
    descriptors: &str,
    path: &Path,
    accepted: Accepted,
    writable: bool,
) -> Result<(File, Stat)> {
    let (place, found) = look_up(path)?;
    let kind = FileType::from_raw_mode(found.st_mode);
    match (kind, accepted) {
        (FileType::RegularFile, _) | (FileType::BlockDevice, Accepted::FileOrDisk) => {}
        (FileType::Directory, _) => bail!("it is a directory"),
        (_, Accepted::File) => bail!("it is not a regular file but a {}", name_of(kind)),
        (_, Accepted::FileOrDisk) => {
            bail!(
                "it is neither a file nor a block device but a {}",
                name_of(kind)
            )
        }
    }
    let access = match writable {
        true => OFlags::RDWR,
        false => OFlags::RDONLY,
    };
    let file = reopen(descriptors, path, &place, &found, access)?;
    Ok((file.into(), found))
}

/// Looks up a path without opening the file.
fn look_up(path: &Path) -> io::Result<(OwnedFd, Stat)> {
    let place = open_once(path, OFlags::PATH | OFlags::CLOEXEC)?;
    let found = uninterrupted(|| rustix::fs::fstat(&place))?;
    Ok((place, found))
}

/// Opens a path. On FUSE and network file systems this can be interrupted.
fn open_once(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    uninterrupted(|| rustix::fs::openat(CWD, path, flags, Mode::empty()))
}

/// Opens the file that was looked up.
fn reopen(
    descriptors: &str,
    path: &Path,
    place: &OwnedFd,
    found: &Stat,
    access: OFlags,
) -> io::Result<OwnedFd> {
    let access = access | OFlags::CLOEXEC | OFlags::NOCTTY;
    let same = format!("{descriptors}/{}", place.as_raw_fd());
    match open_once(same.as_ref(), access) {
        // /proc is not mounted.
        Err(Errno::NOENT | Errno::NOTDIR) => {}
        opened => return Ok(opened?),
    }
    // Another file may have replaced it: a FIFO must not block this.
    let file = open_once(path, access | OFlags::NONBLOCK)?;
    let now = uninterrupted(|| rustix::fs::fstat(&file))?;
    if (now.st_dev, now.st_ino) != (found.st_dev, found.st_ino) {
        return Err(io::Error::other("another file took its place meanwhile"));
    }
    // With O_NONBLOCK, io_uring would fail with EAGAIN where a read has to wait.
    let flags = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, flags & !OFlags::NONBLOCK | access & OFlags::NONBLOCK)?;
    Ok(file)
}

fn name_of(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "regular file",
        FileType::Directory => "directory",
        FileType::Symlink => "symbolic link",
        FileType::Fifo => "FIFO",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        FileType::Unknown => "file of another kind",
    }
}

/// Writes a file that only its owner may read. An existing file is replaced by a new one, so that
/// processes that have the old one open do not see the contents. A symbolic link is followed if it
/// belongs to root or this user. A FIFO or pipe that has a reader is written to.
///
/// # Errors
/// The system's error, another user's link, or something that is not a file.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    let cwd = rustix::fs::CWD;
    let found = match uninterrupted(|| rustix::fs::statat(cwd, path, AtFlags::SYMLINK_NOFOLLOW)) {
        // O_EXCL does not even follow a link that appears now (open(2)).
        Err(Errno::NOENT) => return Ok(create(path)?.write_all(bytes)?),
        found => found?,
    };
    match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile => replace(path, bytes),
        FileType::Symlink => {
            let user = rustix::process::geteuid().as_raw();
            if ![0, user].contains(&found.st_uid) {
                bail!("it is a link that user {} made", found.st_uid);
            }
            match uninterrupted(|| rustix::fs::stat(path))?.st_mode {
                mode if FileType::from_raw_mode(mode) == FileType::RegularFile => {
                    replace(&std::fs::canonicalize(path)?, bytes)
                }
                _ => write_to(path, bytes),
            }
        }
        _ => write_to(path, bytes),
    }
}

/// Creates a new file that only its owner may read.
fn create(path: &Path) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    // Not repeated after EINTR: the file may exist by then.
    Ok(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?.into())
}

/// Replaces a file by a new one.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut number = [0; 8];
    uninterrupted(|| getrandom(&mut number, GetRandomFlags::empty()))?;
    let mut name = path.file_name().context("it is no file")?.to_owned();
    name.push(format!(".{:016x}", u64::from_ne_bytes(number)));
    let new: PathBuf = path.with_file_name(name);
    let mut file = create(&new)?;
    let written = file
        .write_all(bytes)
        .and_then(|()| std::fs::rename(&new, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    Ok(written?)
}

/// Writes to a FIFO, pipe or device.
fn write_to(path: &Path, bytes: &[u8]) -> Result<()> {
    let (place, found) = look_up(path)?;
    let kind = FileType::from_raw_mode(found.st_mode);
    let device = rustix::fs::major(found.st_rdev);
    let number = (device, rustix::fs::minor(found.st_rdev));
    match kind {
        FileType::Fifo => {}
        FileType::CharacterDevice if number == NULL => {}
        _ => bail!("it is a {}; name a file or a pipe", name_of(kind)),
    }
    let access = OFlags::WRONLY | OFlags::NONBLOCK;
    let mut pipe: File = match reopen(DESCRIPTORS, path, &place, &found, access) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NXIO) => {
            bail!("nobody reads this FIFO")
        }
        opened => opened?.into(),
    };
    let mut left = bytes;
    while !left.is_empty() {
        match uninterrupted(|| pipe.write(left)) {
            Ok(count) => left = &left[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if !Deadline::after(PATIENCE).wait(&pipe, PollFlags::OUT)? {
                    bail!("its reader has not read for {PATIENCE:?}");
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deadline::wait_once;
    use crate::eintr::tests::under_fire;
    use std::io::Read;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;
    use tempfile::TempDir;

    fn folder() -> TempDir {
        TempDir::new().expect("a folder")
    }

    fn fifo(path: &Path) {
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, path, FileType::Fifo, mode, 0).expect("a FIFO");
    }

    fn refused(path: &Path, accepted: Accepted) -> String {
        let error = open(path, accepted, false).expect_err("to be refused");
        format!("{error:#}")
    }

    #[test]
    fn what_is_appended_to_is_made_and_waits_for_no_reader() {
        let folder = folder();
        let path = folder.path().join("log");
        for _ in 0..2 {
            append(&path)
                .expect("made")
                .write_all(b"x\n")
                .expect("room");
        }
        assert_eq!(text(&path, 4).expect("text"), "x\nx\n");
        let error = text(&path, 3).expect_err("too large").to_string();
        assert_eq!(error, "it has 4 bytes; use up to 3");
        let path = folder.path().join("fifo");
        fifo(&path);
        let mut unread = append(&path).expect("no reader is needed");
        let full = std::iter::repeat_with(|| unread.write(&[0; 4096])).take(1000);
        let errors: Vec<_> = full.filter_map(Result::err).collect();
        assert_eq!(errors[0].kind(), io::ErrorKind::WouldBlock);
        assert!(append(Path::new("/dev/null")).is_err());
    }

    #[test]
    fn what_is_no_file_is_refused_without_being_opened() {
        let folder = folder();
        let path = |name: &str| folder.path().join(name);
        fifo(&path("fifo"));
        let _listener = UnixListener::bind(path("socket")).expect("a socket");
        for accepted in [Accepted::File, Accepted::FileOrDisk] {
            // Opening a FIFO without a writer would block here.
            assert!(refused(&path("fifo"), accepted).ends_with("but a FIFO"));
            assert!(refused(&path("socket"), accepted).ends_with("but a socket"));
            assert!(refused(Path::new("/dev/null"), accepted).ends_with("but a character device"));
            assert_eq!(refused(folder.path(), accepted), "it is a directory");
            let error = open(&path("missing"), accepted, false).expect_err("missing");
            let error = error.downcast_ref::<io::Error>().map(io::Error::kind);
            assert_eq!(error, Some(io::ErrorKind::NotFound));
        }
    }

    #[test]
    fn a_terminal_is_not_opened() {
        // A pseudo-terminal master reports a hangup once its slave was opened and closed.
        let flags = rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY;
        let master = rustix::pty::openpt(flags).expect("a terminal");
        rustix::pty::unlockpt(&master).expect("a terminal");
        let name = rustix::pty::ptsname(&master, Vec::new()).expect("a name");
        let name = name.into_string().expect("ASCII");
        let refusal = refused(Path::new(&name), Accepted::FileOrDisk);
        assert!(refusal.ends_with("a character device"), "{refusal}");
        let ready = wait_once(&master, PollFlags::IN, Some(Duration::ZERO));
        assert_eq!(ready, Ok(false), "it was opened and closed again");
    }

    #[test]
    fn a_file_is_opened_with_proc_and_without() {
        let folder = folder();
        let path = folder.path().join("file");
        std::fs::write(&path, "right").expect("a file");
        let link = folder.path().join("link");
        symlink(&path, &link).expect("a link");
        for descriptors in [DESCRIPTORS, "/nonexistent", "/dev/null"] {
            for (path, writable) in [(&path, true), (&link, false)] {
                let mut file = open_by(descriptors, path, Accepted::File, writable).expect("opens");
                let mut text = String::new();
                file.read_to_string(&mut text).expect("reads");
                assert_eq!(text, "right");
                assert_eq!(file.write(b"").is_ok(), writable);
                let flags = rustix::fs::fcntl_getfl(&file).expect("flags");
                assert!(!flags.intersects(OFlags::NONBLOCK | OFlags::PATH));
                let flags = rustix::io::fcntl_getfd(&file).expect("flags");
                assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
            }
        }
    }

    #[test]
    fn a_file_that_took_anothers_place_is_not_opened() {
        let folder = folder();
        let path = folder.path().join("file");
        std::fs::write(&path, "right").expect("a file");
        let (place, found) = look_up(&path).expect("found");
        std::fs::rename(&path, folder.path().join("other")).expect("renamed");
        fifo(&path);
        let reopen = |descriptors| reopen(descriptors, &path, &place, &found, OFlags::RDONLY);
        let error = reopen("/nonexistent").expect_err("another file");
        assert!(error.to_string().contains("took its place"), "{error}");
        let mut text = String::new();
        let mut file: File = reopen(DESCRIPTORS).expect("the file that was found").into();
        file.read_to_string(&mut text).expect("reads");
        assert_eq!(text, "right");
    }

    fn mode(path: &Path) -> u32 {
        let found = std::fs::symlink_metadata(path).expect("a file");
        assert!(found.is_file());
        found.mode() & 0o7777
    }

    #[test]
    fn what_is_written_in_private_is_for_its_owner_alone() {
        let folder = folder();
        let path = folder.path().join("tree.dtb");
        write_private(&path, b"new").expect("written");
        assert_eq!(mode(&path), 0o600);
        // A file that others may read and have opened.
        let open = std::fs::Permissions::from_mode(0o666);
        std::fs::set_permissions(&path, open).expect("a file");
        let mut before = File::open(&path).expect("a file");
        write_private(&path, b"newer").expect("written");
        assert_eq!(mode(&path), 0o600);
        assert_eq!(std::fs::read(&path).expect("a file"), b"newer");
        let mut seen = String::new();
        before.read_to_string(&mut seen).expect("reads");
        assert_eq!(seen, "new");
        // A link of our own.
        let link = folder.path().join("link");
        symlink("tree.dtb", &link).expect("a link");
        write_private(&link, b"newest").expect("written");
        assert_eq!(std::fs::read(&path).expect("a file"), b"newest");
        assert_eq!(mode(&path), 0o600);
        assert!(link.is_symlink());
        let left = std::fs::read_dir(folder.path()).expect("a folder").count();
        assert_eq!(left, 2, "nothing else is left there");
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::lchown(&link, Some(1), None).expect("root");
            let error = write_private(&link, b"no").expect_err("somebody else's link");
            assert!(error.to_string().contains("a link that user 1 made"));
            assert_eq!(std::fs::read(&path).expect("a file"), b"newest");
        }
    }

    #[test]
    fn a_pipe_is_written_to_if_somebody_reads_it() {
        let folder = folder();
        let path = folder.path().join("fifo");
        fifo(&path);
        let error = write_private(&path, b"x").expect_err("nobody reads");
        assert_eq!(error.to_string(), "nobody reads this FIFO");
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let reader = rustix::fs::open(&path, flags, Mode::empty()).expect("opens");
        write_private(&path, b"tree").expect("written");
        let mut text = [0; 8];
        let count = rustix::io::read(&reader, &mut text).expect("reads");
        assert_eq!(&text[..count], b"tree");
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let own = format!("/proc/self/fd/{}", writer.as_raw_fd());
        write_private(Path::new(&own), b"tree").expect("written");
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("reads");
        assert_eq!(text, "tree");
        write_private(Path::new("/dev/null"), b"x").expect("written");
        let error = write_private(Path::new("/dev/zero"), b"x").expect_err("a device");
        assert!(error.to_string().contains("is a character device"));
    }

    #[test]
    fn signals_do_not_stop_the_writing_to_a_pipe() {
        let folder = folder();
        let path = folder.path().join("fifo");
        fifo(&path);
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let reader = rustix::fs::open(&path, flags, Mode::empty()).expect("opens");
        let size = 1 << 20;
        let (written, done) = std::sync::mpsc::channel();
        let slow = std::thread::spawn(move || {
            let mut text = vec![0; 1 << 16];
            let mut seen = 0;
            // By little: it is waited for again and again.
            while seen < size || done.try_recv().is_err() {
                std::thread::sleep(Duration::from_millis(1));
                seen += rustix::io::read(&reader, &mut text).unwrap_or(0);
            }
            seen
        });
        under_fire(move || {
            write_private(&path, &vec![7; size]).expect("written, whatever came between");
            written.send(()).expect("a reader");
        });
        assert_eq!(slow.join().expect("no failure in the thread"), size);
    }
}
