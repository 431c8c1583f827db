use std::fs;
use std::path::Path;

/// An archive (cpio, newc: Linux, Documentation/driver-api/early-userspace/buffer-format.rst) that
/// holds one file, to be appended to an initramfs.
pub(crate) fn archive(name: &str, data: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, mode, data) in [(name, 0o100_755, data), ("TRAILER!!!", 0, &[])] {
        // Inode, mode, uid, gid, links, time, size, two devices, length of the name, checksum.
        let (size, name_size) = (data.len() as u32, name.len() as u32 + 1);
        let fields = [1, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        archive.extend(b"070701");
        for field in fields {
            archive.extend(format!("{field:08x}").bytes());
        }
        archive.extend(name.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// Writes the initramfs at `from` with `script` added to it, for `armlet.run=script`.
pub(crate) fn initrd_with_script(from: &Path, script: &str, to: &Path) {
    let mut data = fs::read(from).unwrap_or_else(|error| panic!("cannot read {from:?}: {error}"));
    data.extend(archive("script", script.as_bytes()));
    fs::write(to, data).unwrap_or_else(|error| panic!("cannot write {to:?}: {error}"));
}
