//! `armlet jail`: confines a program before it starts, with the rights of root.
//!
//! It has the command line of Firecracker's jailer, makes the same jail, and is it when it is started
//! under the name `jailer` (docs/jail.md). `request` decides what is made and where, `cgroup` which
//! control groups; `build` makes it, and becomes the program.

mod build;
mod cgroup;
mod request;
mod sys;

use crate::cli::JailArgs;
use anyhow::{Context as _, Result, ensure};
use armlet_system::status::{Fault as _, Status};
use request::Request;
use std::convert::Infallible;
use std::path::{Path, PathBuf};

/// The name under which this program is Firecracker's jailer.
pub const JAILER: &str = "jailer";

/// Makes the jail and becomes the program in it.
///
/// # Errors
/// What is wrong with the arguments, and what the system refuses.
pub fn jail(args: &JailArgs) -> Result<Infallible> {
    // What the caller has open is not the program's, nor is its environment.
    sys::close_inherited();
    let request = request(args).fault(Status::Usage)?;
    ensure!(
        rustix::process::geteuid().is_root(),
        "'armlet jail' is for root: it mounts, makes device nodes and changes to another user; \
         'armlet run' needs no root"
    );
    build::build(&request)
}

/// Looks up what the arguments name, and decides.
fn request(args: &JailArgs) -> Result<Request> {
    let program = existing(args.exec_file.as_deref().unwrap_or("/proc/self/exe"));
    let base = existing(&args.chroot_base_dir);
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    Request::new(args, program, base, &mounts)
}

/// Returns the absolute path, without symbolic links, of what is there.
fn existing(path: &str) -> Result<PathBuf> {
    let found = Path::new(path).canonicalize();
    found.with_context(|| format!("cannot find {path}"))
}
