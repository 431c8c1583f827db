//! A snapshot from which a machine is to go on.

use super::head::Head;
use crate::kvm::KvmArch;
use crate::machine::StateOf;
use anyhow::{Context, Result};
use std::fs::File;

/// Where a restored guest's memory comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryFrom {
    /// The snapshot's file is mapped: a page is read when the guest first needs it, and copied when
    /// the guest writes to it.
    #[default]
    Private,
    /// The snapshot's file is read as a whole before the guest goes on.
    Copy,
}

/// A snapshot, open.
#[derive(Debug)]
pub struct Restore {
    /// What it is of.
    pub head: Head,
    /// The machine's state, not looked at yet.
    pub body: Vec<u8>,
    /// Guest memory.
    pub memory: File,
    /// How it becomes the guest's.
    pub from: MemoryFrom,
    /// Whether the machine stays paused until it is resumed.
    pub stays_paused: bool,
}

impl Restore {
    /// Reads the machine's state.
    ///
    /// # Errors
    /// Bytes that are none.
    pub fn state<A: KvmArch>(&self) -> Result<StateOf<A>> {
        let (state, rest) = postcard::take_from_bytes(&self.body)
            .context("the snapshot's state of the machine is damaged")?;
        anyhow::ensure!(
            rest.is_empty(),
            "the snapshot's state of the machine is damaged: {} bytes too many",
            rest.len()
        );
        Ok(state)
    }
}
