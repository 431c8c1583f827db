//! A file of metadata.

use super::MmdsOptions;
use anyhow::{Context, Result, bail};
use armlet_system::files;
use serde_json::Value;
use std::io::Read;
use std::path::Path;

/// The most bytes of a file.
const MOST_BYTES: u64 = 64 << 10;

/// Sets the data from the file that `options` name, if they do.
///
/// # Errors
/// What is wrong with it.
pub(super) fn load(options: &MmdsOptions) -> Result<()> {
    if let Some(file) = &options.file {
        let data = read(file);
        let data = data.with_context(|| format!("metadata={}", file.display()))?;
        options.data.set(data);
    }
    Ok(())
}

fn read(path: &Path) -> Result<Value> {
    let (file, _) = files::open_regular(path)?;
    let mut bytes = Vec::new();
    file.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        bail!("it is too long; metadata have {MOST_BYTES} bytes at most");
    }
    serde_json::from_slice(&bytes).context("it is not JSON")
}
