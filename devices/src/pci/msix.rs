//! MSI-X (PCI Express Base 5.0, section 7.7.2): the table, the pending bits, and what a function
//! interrupts for (its sources), each of which the driver maps to an entry of the table.
//!
//! Each source has a [vector of the machine](MsiVector) of its own, made when it is first mapped: its
//! eventfd can be with vhost or another process, and stays the same when the driver maps the source to
//! another entry, changes the entry's message, or masks it. An edge that comes while it is masked stays
//! in the eventfd and is delivered when it is unmasked.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::{Message, MsiVector, MsiVectors};
use crate::persist::RestoreError;
use crate::sync::ring;

/// The capability's ID.
pub const CAPABILITY: u8 = 0x11;
/// The most entries of a table here: a page of it.
pub const MOST: usize = 256;
/// Message Control: MSI-X enable.
pub const ENABLE: u16 = 1 << 15;
/// Message Control: function mask.
pub const MASK_ALL: u16 = 1 << 14;
/// Bytes of an entry.
pub const ENTRY: usize = 16;
/// An entry's Vector Control: masked.
const MASKED: u32 = 1;
/// Not mapped to an entry (VIRTIO_MSI_NO_VECTOR).
pub const NO_VECTOR: u16 = 0xffff;

/// An entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Message Address.
    pub address: u64,
    /// Message Data.
    pub data: u32,
    /// Whether it is masked.
    pub masked: bool,
}

/// The table and the mapping, as plain data. Message Control is with the other registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// The entries.
    pub table: Vec<Entry>,
    /// By source: the entry that it is mapped to, or [`NO_VECTOR`].
    pub mapped: Vec<u16>,
    /// The sources with a pending edge.
    pub pending: Vec<u16>,
}

/// The eventfds of sources, for whoever interrupts the guest; it takes no lock.
pub(crate) struct Calls {
    enabled: AtomicBool,
    by_source: Vec<OnceLock<Arc<EventFd>>>,
}

impl Calls {
    /// Signals a source, unless MSI-X is disabled: then it returns false.
    pub(crate) fn signal(&self, source: usize) -> bool {
        let enabled = self.enabled.load(Ordering::Acquire);
        if enabled && let Some(call) = self.by_source.get(source).and_then(OnceLock::get) {
            ring(call);
        }
        enabled
    }
}

/// A function's MSI-X.
pub(crate) struct Msix {
    table: Vec<Entry>,
    sources: Vec<Source>,
    vectors: Arc<dyn MsiVectors>,
    /// Whether messages are sent: MSI-X is enabled, the function not masked and a bus master.
    sends: bool,
    calls: Arc<Calls>,
}

/// Something that the function interrupts for.
struct Source {
    /// The entry that it is mapped to, or [`NO_VECTOR`].
    entry: u16,
    vector: Option<Box<dyn MsiVector>>,
    /// What the vector is routed to.
    routed: Option<Message>,
}

impl Source {
    /// Routes it to what it is mapped to.
    fn settle(&mut self, table: &[Entry], sends: bool) -> Result<(), String> {
        let entry = table.get(usize::from(self.entry));
        let sent = entry.filter(|entry| sends && !entry.masked);
        let message = sent.map(|entry| Message {
            address: entry.address,
            data: entry.data,
        });
        match &self.vector {
            Some(vector) if message != self.routed => vector.route(message)?,
            _ => return Ok(()),
        }
        self.routed = message;
        Ok(())
    }

    /// Returns its vector, made if it was not.
    fn vector(&mut self, vectors: &dyn MsiVectors) -> Result<&dyn MsiVector, String> {
        Ok(&**match &mut self.vector {
            Some(vector) => vector,
            none => none.insert(vectors.make()?),
        })
    }

    /// Whether an edge waits in the eventfd.
    fn is_pending(&self) -> bool {
        let waiting = self.vector.as_ref().filter(|_| self.routed.is_none());
        waiting.is_some_and(|vector| {
            let call = vector.call();
            // Nobody else reads it while it is not routed; what comes in between is added.
            call.read().is_ok_and(|count| call.write(count).is_ok())
        })
    }
}

impl Msix {
    /// Creates as many entries as sources, all masked, and no mapping.
    pub(crate) fn new(sources: usize, vectors: Arc<dyn MsiVectors>) -> Msix {
        let entry = Entry {
            address: 0,
            data: 0,
            masked: true,
        };
        let source = || Source {
            entry: NO_VECTOR,
            vector: None,
            routed: None,
        };
        Msix {
            table: vec![entry; sources.min(MOST)],
            sources: (0..sources).map(|_| source()).collect(),
            vectors,
            sends: false,
            calls: Arc::new(Calls {
                enabled: AtomicBool::new(false),
                by_source: (0..sources).map(|_| OnceLock::new()).collect(),
            }),
        }
    }

    /// Returns the number of entries.
    pub(crate) fn entries(&self) -> usize {
        self.table.len()
    }

    /// Returns the eventfds.
    pub(crate) fn calls(&self) -> Arc<Calls> {
        Arc::clone(&self.calls)
    }

    /// Follows Message Control and bus master enable.
    ///
    /// # Errors
    /// As [`MsiVector::route`], the first of several.
    pub(crate) fn control(&mut self, control: u16, is_master: bool) -> Result<(), String> {
        let enabled = control & ENABLE != 0;
        self.calls.enabled.store(enabled, Ordering::Release);
        self.sends = enabled && control & MASK_ALL == 0 && is_master;
        self.settle(|_| true)
    }

    /// Returns the entry that a source is mapped to.
    pub(crate) fn mapped(&self, source: usize) -> u16 {
        self.sources
            .get(source)
            .map_or(NO_VECTOR, |source| source.entry)
    }

    /// Maps a source to an entry; to [`NO_VECTOR`] where there is none of that number, or no vector can
    /// be had of the machine (virtio 1.2, section 4.1.5.1.2.1).
    ///
    /// # Errors
    /// Why the machine has no vector, or as [`MsiVector::route`].
    pub(crate) fn map(&mut self, source: usize, entry: u16) -> Result<(), String> {
        let Some(own) = self.sources.get_mut(source) else {
            return Ok(());
        };
        let before = own.entry;
        own.entry = NO_VECTOR;
        if usize::from(entry) < self.table.len() {
            let vector = own.vector(&*self.vectors)?;
            let call = self.calls.by_source[source].get_or_init(|| vector.call());
            if before == NO_VECTOR {
                // An edge that nobody wanted to hear of.
                let _ = call.read();
            }
            own.entry = entry;
        }
        own.settle(&self.table, self.sends)
    }

    /// Returns the eventfd of a source, mapped or not: it is to be made known before a driver maps the
    /// source, or where none does because it polls. `None` where the machine has no vector.
    pub(crate) fn call(&mut self, source: usize) -> Option<Arc<EventFd>> {
        let vector = self.sources.get_mut(source)?.vector(&*self.vectors).ok()?;
        let call = self.calls.by_source[source].get_or_init(|| vector.call());
        Some(Arc::clone(call))
    }

    /// Maps all sources to nothing, at the device's reset.
    ///
    /// # Errors
    /// As [`MsiVector::route`].
    pub(crate) fn unmap(&mut self) -> Result<(), String> {
        for source in &mut self.sources {
            source.entry = NO_VECTOR;
        }
        self.settle(|_| true)
    }

    /// Reads the table.
    pub(crate) fn read_table(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset + index;
            let entry = self.table.get(at / ENTRY);
            *byte = entry.map_or(0, |entry| entry.bytes()[at % ENTRY]);
        }
    }

    /// Writes the table: 4 or 8 aligned bytes of it (section 7.7.2); others are ignored.
    ///
    /// # Errors
    /// As [`MsiVector::route`].
    pub(crate) fn write_table(&mut self, offset: usize, data: &[u8]) -> Result<(), String> {
        let number = offset / ENTRY;
        let Some(entry) = self.table.get_mut(number) else {
            return Ok(());
        };
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len()) {
            return Ok(());
        }
        let mut bytes = entry.bytes();
        bytes[offset % ENTRY..][..data.len()].copy_from_slice(data);
        *entry = Entry::of(bytes);
        self.settle(|source| usize::from(source.entry) == number)
    }

    /// Reads the pending bits.
    pub(crate) fn read_pending(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        for source in &self.sources {
            let (byte, bit) = (usize::from(source.entry) / 8, source.entry % 8);
            let shown = byte.checked_sub(offset);
            if let Some(byte) = shown.and_then(|byte| data.get_mut(byte))
                && source.is_pending()
            {
                *byte |= 1 << bit;
            }
        }
    }

    /// Routes each of these sources to what it is mapped to.
    fn settle(&mut self, is_wanted: impl Fn(&Source) -> bool) -> Result<(), String> {
        let mut result = Ok(());
        for source in self.sources.iter_mut().filter(|source| is_wanted(source)) {
            // Each is tried, also behind one that the machine refuses.
            result = result.and(source.settle(&self.table, self.sends));
        }
        result
    }

    /// Returns the state.
    pub(crate) fn save(&self) -> MsixState {
        let sources = (0_u16..).zip(&self.sources);
        let pending = sources.filter(|(_, source)| source.is_pending());
        MsixState {
            table: self.table.clone(),
            mapped: self.sources.iter().map(|source| source.entry).collect(),
            pending: pending.map(|(index, _)| index).collect(),
        }
    }

    /// Checks a state before it is used.
    ///
    /// # Errors
    /// What is not valid.
    pub(crate) fn check(&self, state: &MsixState) -> Result<(), RestoreError> {
        let entries = self.table.len();
        let is_valid = state.table.len() == entries
            && state.mapped.len() == self.sources.len()
            && state.table.iter().all(|entry| entry.address & 3 == 0)
            && state
                .mapped
                .iter()
                .all(|entry| *entry == NO_VECTOR || usize::from(*entry) < entries)
            && state
                .pending
                .iter()
                .all(|source| usize::from(*source) < self.sources.len());
        match is_valid {
            true => Ok(()),
            false => Err(RestoreError(format!(
                "the state is not that of an MSI-X table of {entries} entries for {} sources",
                self.sources.len()
            ))),
        }
    }

    /// Goes on with a state that was [checked](Self::check). Each source that is mapped is signalled
    /// once: an edge may have been on its way, and drivers do not mind one too many.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub(crate) fn restore(
        &mut self,
        state: &MsixState,
        (control, is_master): (u16, bool),
    ) -> Result<(), String> {
        self.table.clone_from(&state.table);
        for (source, entry) in state.mapped.iter().enumerate() {
            self.map(source, *entry)?;
        }
        self.control(control, is_master)?;
        for (index, source) in (0_u16..).zip(&self.sources) {
            let is_due = source.routed.is_some() || state.pending.contains(&index);
            if let Some(vector) = source.vector.as_ref().filter(|_| is_due) {
                ring(&vector.call());
            }
        }
        Ok(())
    }
}

impl Entry {
    fn bytes(self) -> [u8; ENTRY] {
        let control = if self.masked { MASKED } else { 0 };
        let high = u64::from(control) << 32 | u64::from(self.data);
        (u128::from(self.address) | u128::from(high) << 64).to_le_bytes()
    }

    fn of(bytes: [u8; ENTRY]) -> Entry {
        let all = u128::from_le_bytes(bytes);
        Entry {
            address: all as u64 & !3,
            data: (all >> 64) as u32,
            masked: (all >> 96) as u32 & MASKED != 0,
        }
    }
}

#[cfg(test)]
mod tests;
