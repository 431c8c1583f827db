//! A snapshot from which a machine is to go on.

use super::head::Head;
use crate::kvm::KvmArch;
use crate::machine::StateOf;
use crate::memory::Image;
use anyhow::{Context, Result, bail, ensure};
use armlet_snapshot::{Id, Paths, Snapshot};
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

impl MemoryFrom {
    /// Reads the option's value; none is the default.
    ///
    /// # Errors
    /// Another word.
    pub fn parse(text: Option<&str>) -> Result<MemoryFrom> {
        Ok(match text {
            None | Some("private") => MemoryFrom::Private,
            Some("copy") => MemoryFrom::Copy,
            Some(other) => bail!("--memory-from '{other}' is not known; use private or copy"),
        })
    }
}

/// A snapshot, open.
#[derive(Debug)]
pub struct Restore {
    /// What it is called.
    pub id: Id,
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
    /// Opens a whole snapshot. Of its state, only the head is looked at.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn open(paths: &Paths, from: MemoryFrom, stays_paused: bool) -> Result<Restore> {
        let Snapshot { state, memory } = Snapshot::open(paths)?;
        Snapshot::check_whole(&state)?;
        Ok(Restore {
            id: state.id,
            head: Head::from_bytes(&state.head)?,
            body: state.body,
            memory,
            from,
            stays_paused,
        })
    }

    /// Guest memory as it is to be mapped.
    #[must_use]
    pub fn image(&self) -> Image<'_> {
        Image {
            file: &self.memory,
            is_copied: self.from == MemoryFrom::Copy,
        }
    }

    /// Reads the machine's state.
    ///
    /// # Errors
    /// Bytes that are none.
    pub fn state<A: KvmArch>(&self) -> Result<StateOf<A>> {
        let (state, rest) = postcard::take_from_bytes(&self.body)
            .context("the snapshot's state of the machine is damaged")?;
        ensure!(
            rest.is_empty(),
            "the snapshot's state of the machine is damaged: {} bytes too many",
            rest.len()
        );
        Ok(state)
    }
}
