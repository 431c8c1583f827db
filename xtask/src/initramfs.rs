//! Writes cpio archives in the "newc" format, which the kernel unpacks as its first root file
//! system (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Component, Path};

use anyhow::{Context, Result};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Archives are padded to this many bytes, so that one may follow another in one file.
const ARCHIVE_ALIGNMENT: u64 = 512;

/// An archive being written. Folders above an entry are added by themselves, once.
#[derive(Debug)]
pub(crate) struct Archive<W: Write> {
    out: W,
    written: u64,
    next_inode: u32,
    folders: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    /// Starts an archive that goes to `out`.
    pub(crate) fn new(out: W) -> Self {
        Self {
            out,
            written: 0,
            next_inode: 1,
            folders: BTreeSet::new(),
        }
    }

    /// Adds a folder with mode 755, and those above it.
    pub(crate) fn folder(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let name = entry_name(path.as_ref());
        self.folders_above(&name)?;
        self.one_folder(&name)
    }

    /// Adds a regular file that holds `data`; `mode` has the permission bits alone.
    pub(crate) fn file(&mut self, path: impl AsRef<Path>, mode: u32, data: &[u8]) -> Result<()> {
        let name = entry_name(path.as_ref());
        self.folders_above(&name)?;
        self.entry(
            &name,
            REGULAR | mode,
            (0, 0),
            data.len() as u64,
            &mut &data[..],
        )
    }

    /// Adds the regular file `from` of this machine as `path`, without holding it in memory.
    pub(crate) fn file_from(
        &mut self,
        path: impl AsRef<Path>,
        mode: u32,
        from: &Path,
    ) -> Result<()> {
        let name = entry_name(path.as_ref());
        self.folders_above(&name)?;
        let mut file = File::open(from).with_context(|| format!("cannot open {from:?}"))?;
        let size = file
            .metadata()
            .with_context(|| format!("cannot examine {from:?}"))?
            .len();
        self.entry(&name, REGULAR | mode, (0, 0), size, &mut file)
            .with_context(|| format!("cannot copy {from:?} into an initramfs"))
    }

    /// Adds a symbolic link at `path` that points to `target`.
    pub(crate) fn symlink(&mut self, path: impl AsRef<Path>, target: &str) -> Result<()> {
        let name = entry_name(path.as_ref());
        self.folders_above(&name)?;
        let length = target.len() as u64;
        self.entry(
            &name,
            SYMLINK | 0o777,
            (0, 0),
            length,
            &mut target.as_bytes(),
        )
    }

    /// Adds a character device with its major and minor number.
    pub(crate) fn device(
        &mut self,
        path: impl AsRef<Path>,
        mode: u32,
        number: (u32, u32),
    ) -> Result<()> {
        let name = entry_name(path.as_ref());
        self.folders_above(&name)?;
        self.entry(&name, CHARACTER_DEVICE | mode, number, 0, &mut io::empty())
    }

    /// Writes the archive's end and gives back what it was written to.
    pub(crate) fn finish(mut self) -> Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), 0, &mut io::empty())?;
        self.pad(ARCHIVE_ALIGNMENT)?;
        self.out.flush().context("cannot write an initramfs")?;
        Ok(self.out)
    }

    fn folders_above(&mut self, name: &str) -> Result<()> {
        for (slash, _) in name.match_indices('/') {
            self.one_folder(&name[..slash])?;
        }
        Ok(())
    }

    fn one_folder(&mut self, name: &str) -> Result<()> {
        if name.is_empty() || !self.folders.insert(name.to_owned()) {
            return Ok(());
        }
        self.entry(name, DIRECTORY | 0o755, (0, 0), 0, &mut io::empty())
    }

    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        device: (u32, u32),
        size: u64,
        data: &mut impl Read,
    ) -> Result<()> {
        let size32 = u32::try_from(size).context("a cpio entry holds at most 4 GiB")?;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        // The fields in order: inode, mode, uid, gid, links, time, size, the device that holds
        // the file, the device that the file is, length of the name, checksum.
        let fields = [
            self.next_inode,
            mode,
            0,
            0,
            links,
            0,
            size32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.next_inode += 1;

        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        header.push_str(name);
        header.push('\0');
        self.write(header.as_bytes())?;
        self.pad(4)?;

        let copied = io::copy(&mut data.take(size), &mut self.out).context("cannot write data")?;
        anyhow::ensure!(
            copied == size,
            "the file shrank from {size} to {copied} bytes"
        );
        self.written += copied;
        self.pad(4)
    }

    fn pad(&mut self, alignment: u64) -> Result<()> {
        let missing = self.written.next_multiple_of(alignment) - self.written;
        self.write(&vec![0; missing as usize])
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out
            .write_all(bytes)
            .context("cannot write an initramfs")?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

/// Returns the path as an archive names it: relative to the root, without `.` or `..`.
fn entry_name(path: &Path) -> String {
    let names = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
        _ => None,
    });
    names.collect::<Vec<_>>().join("/")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    /// Name, mode, device number and data.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    /// Reads an archive back.
    fn entries(mut bytes: &[u8]) -> Vec<Entry> {
        let start = bytes.len();
        let mut found = Vec::new();
        loop {
            let field = |index: usize| {
                let text = std::str::from_utf8(&bytes[6 + index * 8..14 + index * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            assert_eq!(&bytes[..6], b"070701", "at {}", start - bytes.len());
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let device = (field(9), field(10));
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            let data_at = (110 + name_size).next_multiple_of(4);
            let data = bytes[data_at..data_at + size].to_vec();
            if name == "TRAILER!!!" {
                return found;
            }
            bytes = &bytes[(data_at + size).next_multiple_of(4)..];
            found.push((name, mode, device, data));
        }
    }

    #[test]
    fn entries_come_with_their_folders_once() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/usr/bin/a", 0o755, b"abc").unwrap();
        archive.file("/usr/bin/b", 0o644, b"").unwrap();
        archive.symlink("/bin", "usr/bin").unwrap();
        archive.device("/dev/console", 0o600, (5, 1)).unwrap();
        let bytes = archive.finish().unwrap();

        assert_eq!(bytes.len() % 512, 0);
        let file = |name: &str, mode, data: &[u8]| (name.to_owned(), mode, (0, 0), data.to_vec());
        assert_eq!(
            entries(&bytes),
            [
                file("usr", 0o040_755, b""),
                file("usr/bin", 0o040_755, b""),
                file("usr/bin/a", 0o100_755, b"abc"),
                file("usr/bin/b", 0o100_644, b""),
                file("bin", 0o120_777, b"usr/bin"),
                file("dev", 0o040_755, b""),
                ("dev/console".to_owned(), 0o020_600, (5, 1), Vec::new()),
            ]
        );
    }

    #[test]
    fn a_file_of_this_machine_is_copied_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        std::fs::write(&path, vec![7; 5001]).unwrap();
        let mut archive = Archive::new(Vec::new());
        archive.file_from("/data", 0o600, &path).unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(entries(&bytes)[0].3, vec![7; 5001]);
    }

    #[test]
    fn names_are_relative_to_the_root() {
        assert_eq!(entry_name(Path::new("/a/./b/../c")), "a/b/c");
        assert_eq!(entry_name(Path::new("/")), "");
    }
}
