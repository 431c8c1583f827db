//! A snapshot from which a machine is to go on.

use super::head::Head;
use super::{pagemap, pieces};
use crate::kvm::KvmArch;
use crate::machine::StateOf;
use crate::memory::Image;
use anyhow::{Context, Result, bail, ensure};
use armlet_snapshot::faults::{Handler, Mapping};
use armlet_snapshot::prefetch::{Prefetch, recorder};
use armlet_snapshot::{Id, Paths, Snapshot};
use std::fs::File;
use std::path::PathBuf;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Where a restored guest's memory comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum MemoryFrom {
    /// The snapshot's file is mapped: a page is read when the guest first needs it, and copied when
    /// the guest writes to it.
    #[default]
    Private,
    /// The snapshot's file is read as a whole before the guest goes on.
    Copy,
    /// A process that listens at this socket gives each page at the guest's first access.
    Handler(PathBuf),
}

impl MemoryFrom {
    /// Reads the option's value; none is the default.
    ///
    /// # Errors
    /// Another word.
    pub fn parse(text: Option<&str>) -> Result<MemoryFrom> {
        Ok(match text {
            // What is shared is the host's page cache: the file stays as it is.
            None | Some("private" | "shared") => MemoryFrom::Private,
            Some("copy") => MemoryFrom::Copy,
            Some(text) => match text.strip_prefix("uffd=") {
                Some(socket) if !socket.is_empty() => MemoryFrom::Handler(socket.into()),
                _ => bail!(
                    "--memory-from '{text}' is not known; use private, shared, copy or uffd=SOCKET"
                ),
            },
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
    body: Vec<u8>,
    /// The file with guest memory; `None` where a process gives it.
    memory: Option<File>,
    /// How it becomes the guest's.
    from: MemoryFrom,
    /// Whether the machine stays paused until it is resumed.
    pub stays_paused: bool,
    /// The pages that the guest needs first.
    prefetch: Option<Prefetch>,
    /// Where they are to be recorded, if that has not been done.
    recorder: Option<File>,
}

impl Restore {
    /// Opens a whole snapshot. Of its state, only the head is looked at. `prefetches` says whether the
    /// pages that the guest needs first are brought before it goes on, and recorded the first time.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn open(
        paths: &Paths,
        from: MemoryFrom,
        stays_paused: bool,
        prefetches: bool,
    ) -> Result<Restore> {
        let (state, memory) = match from {
            MemoryFrom::Handler(_) => (Snapshot::state(paths)?, None),
            MemoryFrom::Private | MemoryFrom::Copy => {
                let Snapshot { state, memory } = Snapshot::open(paths)?;
                (state, Some(memory))
            }
        };
        Snapshot::check_whole(&state)?;
        let (id, size) = (state.id, state.memory_size());
        let is_mapped = prefetches && from == MemoryFrom::Private;
        let prefetch = match is_mapped {
            true => Prefetch::read(paths, id, size),
            false => None,
        };
        let recorder = match is_mapped && prefetch.is_none() {
            true => recorder(paths, id, size),
            false => None,
        };
        Ok(Restore {
            id,
            head: Head::from_bytes(&state.head)?,
            body: state.body,
            memory,
            from,
            stays_paused,
            prefetch,
            recorder,
        })
    }

    /// Guest memory as it is to be mapped; `None` where a process gives it.
    #[must_use]
    pub fn image(&self) -> Option<Image<'_>> {
        Some(Image {
            file: self.memory.as_ref()?,
            is_copied: self.from == MemoryFrom::Copy,
        })
    }

    /// Has guest memory that was just mapped filled by the process that gives it, if there is one: its handle is
    /// to be kept for as long as the memory is used.
    ///
    /// # Errors
    /// A process that is not there, and a host where none can.
    pub fn fill(&self, memory: &GuestMemoryMmap, page_size: u64) -> Result<Option<Handler>> {
        if let MemoryFrom::Handler(socket) = &self.from {
            let mut offset = 0;
            let mappings = memory.iter().map(|region| {
                let size = region.len();
                offset += size;
                Mapping {
                    address: region.as_ptr() as u64,
                    size,
                    offset: offset - size,
                    page_size,
                }
            });
            let mappings: Vec<Mapping> = mappings.collect();
            let handler = Handler::ask(socket, &mappings);
            let what = || format!("--memory-from uffd={}", socket.display());
            return handler.map(Some).with_context(what);
        }
        Ok(None)
    }

    /// Whether the pages that the guest needs first are to be recorded.
    #[must_use]
    pub fn records(&self) -> bool {
        self.recorder.is_some()
    }

    /// Takes what brings the pages that the guest needs first, or records them, if either is to be done.
    pub fn first_pages(&mut self) -> Option<FirstPages> {
        let memory = self.memory.as_ref()?.try_clone().ok()?;
        if let Some(list) = self.prefetch.take() {
            return Some(FirstPages::Known { list, memory });
        }
        Some(FirstPages::Recorded {
            pagemap: pagemap()?,
            file: self.recorder.take()?,
            memory,
            id: self.id,
        })
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

/// The pages that a guest needs first after it was restored.
#[derive(Debug)]
pub enum FirstPages {
    /// They are known.
    Known {
        /// Which they are.
        list: Prefetch,
        /// What the guest's memory is mapped from.
        memory: File,
    },
    /// They are to be recorded.
    Recorded {
        /// Which pages of this process there are.
        pagemap: File,
        /// Where to.
        file: File,
        /// As above.
        memory: File,
        /// The snapshot.
        id: Id,
    },
}

impl FirstPages {
    /// Brings those that are known; writes the list of those that the guest has used up to now if not.
    ///
    /// # Errors
    /// What the system says.
    pub fn handle(self, guest: &GuestMemoryMmap) -> Result<()> {
        match self {
            FirstPages::Known { list, memory } => list.bring(&pieces(guest, Some(&memory))?),
            FirstPages::Recorded {
                pagemap,
                file,
                memory,
                id,
            } => Prefetch::of(&pieces(guest, Some(&memory))?, &pagemap)?.write(&file, id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_from_where_the_option_says() {
        let parse = |text: &str| MemoryFrom::parse(Some(text)).map_err(|error| error.to_string());
        assert_eq!(parse("private"), Ok(MemoryFrom::Private));
        assert_eq!(parse("shared"), Ok(MemoryFrom::Private));
        assert_eq!(parse("copy"), Ok(MemoryFrom::Copy));
        assert_eq!(parse("uffd=a"), Ok(MemoryFrom::Handler("a".into())));
        for text in ["", "uffd=", "share"] {
            let why = parse(text).expect_err(text);
            assert!(
                why.contains("private, shared, copy or uffd=SOCKET"),
                "{why}"
            );
        }
    }
}
