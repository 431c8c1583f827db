//! Runs a program built for ARM64: what cargo calls for `cargo test --target aarch64-...`; or one
//! for x86_64, where `ARMLET_RIG_ARCH` says so.
//!
//! A machine of that kind with KVM runs it as it is. Any other boots an emulated host, puts the program
//! where it lies here, together with armlet, the repository's files and the test assets, and runs
//! it there. The variables `ARMLET_RIG_*` choose the host; see [`HostSpec::from_environment`].

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::assets::{self, Choice};
use crate::host::{Ended, HostFile, HostSpec, Job};
use crate::isa::Isa;
use crate::packages::Store;
use crate::rig;

/// Files above this size are no sources or golden files, so the host does without them.
const LARGEST_REPOSITORY_FILE: u64 = 4 << 20;

/// The variables that the program gets to see in an emulated host.
const PASSED_ON: [&str; 3] = ["ARMLET_", "CARGO_", "RUST_"];

/// Runs `binary` with `arguments` and gives its exit status.
pub(crate) fn run(binary: &Path, arguments: &[String]) -> Result<i32> {
    let store = Store::open()?;
    let choice = Choice::from_environment()?;
    let isa = Isa::from_environment()?;
    let prepared = assets::prepare(&store, isa, choice)?;
    if isa.is_native() {
        let mut command = Command::new(binary);
        command.args(arguments).env(assets::VARIABLE, &prepared);
        return Err(command.exec()).with_context(|| format!("cannot run {binary:?}"));
    }

    let binary = fs::canonicalize(binary).with_context(|| format!("cannot find {binary:?}"))?;
    let folder = std::env::current_dir().context("cannot tell the current folder")?;
    let mut files = vec![HostFile {
        from: binary.clone(),
        to: binary.clone(),
        mode: 0o755,
    }];
    files.extend(armlet_beside(&binary));
    let repository = crate::repository::repository();
    files.extend(repository_files(&repository)?);
    // Hundreds of small files, which one test reads and each host would have to unpack.
    let corpus = repository.join("fuzz/corpus");
    let name = binary.file_name().unwrap_or_default().to_string_lossy();
    files.retain(|file| name.starts_with("corpus-") || !file.to.starts_with(&corpus));
    files.extend(asset_files(&prepared, isa, choice));
    files.extend(released(&crate::repository::target_folder()?, isa));

    let mut environment = std::env::vars()
        .filter(|(name, _)| PASSED_ON.iter().any(|start| name.starts_with(start)))
        .collect::<Vec<_>>();
    environment.push((
        assets::VARIABLE.to_owned(),
        assets::FOLDER_IN_HOST.to_owned(),
    ));

    let mut command = vec![binary.to_string_lossy().into_owned()];
    command.extend_from_slice(arguments);
    let job = Job {
        files,
        command,
        environment,
        folder,
        limit: limit()?,
        ..Job::default()
    };
    let mut out = std::io::stdout();
    let mut print = |bytes: &[u8]| {
        out.write_all(bytes)
            .and_then(|()| out.flush())
            .context("cannot write standard output")
    };
    match rig::run(
        &store,
        &HostSpec::from_environment()?,
        &job,
        None,
        &mut print,
    )? {
        Ended::Exit(status) => Ok(status),
        Ended::Signal(signal) => Ok(128 + signal),
        Ended::Left => bail!("left the emulated host"),
    }
}

/// Returns the armlet that was built with the test program, which lies in `deps` below it.
fn armlet_beside(binary: &Path) -> Option<HostFile> {
    let armlet = binary.parent()?.parent()?.join("armlet");
    armlet.is_file().then(|| HostFile {
        from: armlet.clone(),
        to: armlet,
        mode: 0o755,
    })
}

/// Returns what the repository holds, without what is built or hidden.
fn repository_files(root: &Path) -> Result<Vec<HostFile>> {
    let mut files = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {folder:?}"))? {
            let entry = entry?;
            let name = entry.file_name();
            if name.to_string_lossy().starts_with('.') || name == "target" {
                continue;
            }
            let path = entry.path();
            let metadata = entry
                .metadata()
                .with_context(|| format!("cannot examine {path:?}"))?;
            if metadata.is_dir() {
                folders.push(path);
            } else if metadata.is_file() && metadata.len() <= LARGEST_REPOSITORY_FILE {
                files.push(HostFile {
                    from: path.clone(),
                    to: path,
                    mode: 0o644,
                });
            }
        }
    }
    files.sort_by(|a, b| a.to.cmp(&b.to));
    Ok(files)
}

/// Returns the assets in `folder`, as files of an emulated host.
pub(crate) fn asset_files(folder: &Path, isa: Isa, choice: Choice) -> Vec<HostFile> {
    let in_host = PathBuf::from(assets::FOLDER_IN_HOST);
    let file = |name: &&str| HostFile {
        from: folder.join(name),
        to: in_host.join(name),
        mode: 0o644,
    };
    assets::names(isa, choice).iter().map(file).collect()
}

/// Returns the Debian package of `cargo xtask dist`, where there is one, for the tests that install
/// it.
fn released(target: &Path, isa: Isa) -> Option<HostFile> {
    let ending = match isa {
        Isa::Arm64 => "_arm64.deb",
        Isa::X86 => "_amd64.deb",
    };
    let mut entries = fs::read_dir(target.join("dist")).ok()?.flatten();
    let entry = entries.find(|entry| entry.file_name().to_string_lossy().ends_with(ending))?;
    Some(HostFile {
        from: entry.path(),
        to: PathBuf::from(assets::FOLDER_IN_HOST).join("armlet.deb"),
        mode: 0o644,
    })
}

/// Returns how long a program may run: `ARMLET_RIG_TIMEOUT` seconds, or 15 minutes.
fn limit() -> Result<Option<Duration>> {
    let seconds = match std::env::var("ARMLET_RIG_TIMEOUT") {
        Ok(seconds) => seconds
            .parse()
            .context("ARMLET_RIG_TIMEOUT is no number of seconds")?,
        Err(_) => 900,
    };
    Ok(Some(Duration::from_secs(seconds)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_repository_comes_without_what_is_built_or_hidden() {
        let root = tempfile::tempdir().unwrap();
        for path in [
            "tests/golden/a.dts",
            "target/debug/x",
            ".git/config",
            "boards/virt.toml",
        ] {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        let files = repository_files(root.path()).unwrap();
        let names = files
            .iter()
            .map(|file| file.to.strip_prefix(root.path()).unwrap());
        let names = names.map(|name| name.to_str().unwrap()).collect::<Vec<_>>();
        assert_eq!(names, ["boards/virt.toml", "tests/golden/a.dts"]);
    }

    #[test]
    fn armlet_is_found_above_deps() {
        let folder = tempfile::tempdir().unwrap();
        let test = folder.path().join("deps/boot-123");
        assert!(armlet_beside(&test).is_none());
        fs::write(folder.path().join("armlet"), "x").unwrap();
        assert_eq!(
            armlet_beside(&test).unwrap().to,
            folder.path().join("armlet")
        );
    }
}
