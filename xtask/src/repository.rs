//! Where the repository is, where cargo builds, and cargo itself.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result};

/// Returns the repository's root folder: where this program runs for, not where it was compiled. A
/// checkout that is moved or copied with its build keeps the program.
pub(crate) fn repository() -> PathBuf {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    let look = || {
        let said = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
        let current = std::env::current_dir().ok();
        let this = std::env::current_exe().ok();
        repository_from([said, current.clone(), this].into_iter().flatten())
            .or(current)
            .unwrap_or_default()
    };
    FOUND.get_or_init(look).clone()
}

/// Returns the first folder that is a repository of armlet among `places` and what they lie in:
/// cargo says where the package is that it runs, and else the current folder or this program lies
/// in it.
fn repository_from(places: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    let is_root = |folder: &&Path| folder.join(MARK).is_file();
    for place in places {
        if let Some(root) = place.ancestors().find(is_root) {
            return Some(root.to_owned());
        }
    }
    None
}

/// A file that armlet's repository has, and no other.
const MARK: &str = "packaging/armlet@.service";

/// Returns the folder into which cargo builds: this program lies in `debug` below it.
pub(crate) fn target_folder() -> Result<PathBuf> {
    let this = std::env::current_exe().context("cannot tell where xtask lies")?;
    let folder = this
        .parent()
        .and_then(Path::parent)
        .context("xtask lies in no target folder")?;
    Ok(folder.to_owned())
}

/// Returns the cargo that started this program, to be run in the repository.
pub(crate) fn cargo() -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(repository());
    command
}

/// Returns whether it is a checkout of armlet.
pub(crate) fn is_checkout() -> bool {
    repository().join(MARK).is_file()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_checkout_that_was_copied_with_its_build_works_on_itself() {
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("copy");
        std::fs::create_dir_all(copy.join("target/debug")).unwrap();
        std::fs::create_dir_all(copy.join("xtask/src")).unwrap();
        std::fs::create_dir_all(copy.join("packaging")).unwrap();
        std::fs::write(copy.join(MARK), "").unwrap();
        let xtask = copy.join("target/debug/xtask");
        std::fs::copy(std::env::current_exe().unwrap(), &xtask).unwrap();
        for (said, current) in [
            (Some(copy.join("xtask")), folder.path().to_owned()),
            (None, copy.join("xtask/src")),
            (None, folder.path().to_owned()),
        ] {
            let mut command = Command::new(&xtask);
            command
                .env_remove("CARGO_MANIFEST_DIR")
                .current_dir(current);
            if let Some(said) = said {
                command.env("CARGO_MANIFEST_DIR", said);
            }
            // This test program's own copy, which says where it takes the repository to be.
            let output = command
                .args([
                    "--exact",
                    "repository::tests::says_its_repository",
                    "--nocapture",
                    "--ignored",
                ])
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            let found = text
                .lines()
                .find_map(|line| line.split("repository: ").nth(1));
            assert_eq!(found, copy.to_str(), "{output:?}");
        }
    }

    #[test]
    #[ignore = "asked by the test above in a program of its own"]
    fn says_its_repository() {
        println!("repository: {}", repository().display());
    }
}
