use std::path::{Path, PathBuf};

/// The path of a program that a test needs beside armlet. `None` where it is missing; this was said
/// then.
///
/// The rig's hosts have Debian's programs with ARMLET_RIG_TOOLS=1, which `cargo xtask test` sets for
/// the first one.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).map(|folder| folder.join(name));
    let others = ["/tools/usr/sbin", "/usr/sbin", "/sbin", "/usr/libexec"];
    let others = others.map(|folder| Path::new(folder).join(name));
    // Busybox has programs of the same names that can do less.
    let is_it = |path: &PathBuf| {
        let real = path.canonicalize();
        real.is_ok_and(|real| real.is_file() && real.file_name() != Some("busybox".as_ref()))
    };
    let found = others.into_iter().chain(folders).find(is_it);
    if found.is_none() {
        println!("skipped: this host has no {name}; ARMLET_RIG_TOOLS=1 gives it to the rig's");
    }
    found
}

/// The block device that holds Debian's programs, which a guest may mount read-only. `None` where
/// there is none; this was said then.
pub(crate) fn tools_disk() -> Option<&'static Path> {
    let disk = Path::new("/dev/tools");
    if disk.exists() {
        return Some(disk);
    }
    println!("skipped: needs the rig's disk of programs (ARMLET_RIG_TOOLS=1)");
    None
}
