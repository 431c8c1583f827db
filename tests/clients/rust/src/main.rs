//! Drives guests with Firecracker clients in Rust, as their users do.
//!
//! `armlet-clients NAME FOLDER` runs the client NAME. FOLDER has `firecracker`, `jailer`, the kernel
//! `guest` and the image `disk`. Network devices are made in the network namespace that this runs in.
//! The last line printed says what was done; anything that goes wrong is an error.

mod pilot;
mod sdk;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

type Done = Result<&'static str, Box<dyn Error>>;

/// What the guest prints when it listens to its power button, and when that is pressed.
const READY: &str = "guest ready";
const PRESSED: &str = "guest pressed";
/// How long a guest may take to print that, and to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// The files that clients are given, and a folder for theirs.
struct Setup {
    firecracker: PathBuf,
    jailer: PathBuf,
    guest: PathBuf,
    disk: PathBuf,
    scratch: PathBuf,
}

impl Setup {
    /// Copies what is in `folder` into `scratch`, for a client to write to.
    fn new(folder: &Path, scratch: PathBuf) -> std::io::Result<Setup> {
        let copy = |name: &str| -> std::io::Result<PathBuf> {
            let path = scratch.join(name);
            std::fs::copy(folder.join(name), &path)?;
            Ok(path)
        };
        Ok(Setup {
            firecracker: folder.join("firecracker"),
            jailer: folder.join("jailer"),
            guest: copy("guest")?,
            disk: copy("disk")?,
            scratch,
        })
    }
}

/// Waits until `condition` holds.
async fn until(what: &str, condition: impl Fn() -> bool) -> Result<(), Box<dyn Error>> {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > end {
            return Err(format!("{what}: not within {PATIENCE:?}").into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Returns whether the file has `text` in it.
fn has(path: &Path, text: &str) -> bool {
    let bytes = std::fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes).contains(text)
}

/// Returns whether the process is gone, or waits for its parent to notice that.
fn ended(pid: u32) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Err(_) => true,
        Ok(text) => text
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with('Z')),
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().collect();
    let [_, name, folder] = &words[..] else {
        return Err("armlet-clients NAME FOLDER".into());
    };
    let scratch = std::env::temp_dir().join(format!("armlet-client-{}", std::process::id()));
    std::fs::create_dir(&scratch)?;
    let setup = Setup::new(Path::new(folder), scratch.clone())?;
    let done = match name.as_str() {
        "firepilot" => pilot::drive(&setup).await,
        "firecracker-rs-sdk" => sdk::drive(&setup).await,
        "firecracker-rs-sdk-jailed" => sdk::drive_jailed(&setup).await,
        name => Err(format!("no client is called {name:?}").into()),
    };
    std::fs::remove_dir_all(scratch)?;
    println!("{}", done?);
    Ok(())
}
