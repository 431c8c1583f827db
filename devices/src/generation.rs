//! VMGenID and VMClock: by them the guest learns that it was cloned, or goes on from an earlier state.
//!
//! Both are memory that the guest reads, and raise one interrupt when that has changed. VMGenID holds a
//! number that no other generation of the guest has (Microsoft, Virtual Machine Generation ID). VMClock
//! (UAPI.13; Linux, include/uapi/linux/vmclock-abi.h) holds two more, by which programs that map its page
//! see that clocks or the guest as a whole are no longer what they were. It tells no time: nothing here
//! knows how exact the host's is.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::IrqLine;

/// Random bytes that make a generation: 16 of the ID, 8 of the clock's generation, 8 of its disruption
/// marker. None of the three repeats, not even among clones of one snapshot.
pub type Random = [u8; 32];

/// Offsets of what changes in the page of VMClock.
mod offset {
    /// `seq_count`, 32 bits: odd while the rest is being changed.
    pub(super) const SEQUENCE: u64 = 0x0c;
    /// `disruption_marker`, 64 bits.
    pub(super) const DISRUPTION: u64 = 0x10;
    /// `vm_generation_counter`, 64 bits.
    pub(super) const GENERATION: u64 = 0x68;
}

/// Bytes of `struct vmclock_abi`.
const CLOCK_SIZE: usize = 0x70;
/// `magic`: "VCLK".
const MAGIC: [u8; 4] = *b"VCLK";
/// `version`.
const VERSION: u16 = 1;
/// `counter_id`: the structure tells no time by any counter.
const NO_COUNTER: u8 = 0xff;
/// `flags`: VMCLOCK_FLAG_VM_GEN_COUNTER_PRESENT and VMCLOCK_FLAG_NOTIFICATION_PRESENT. These are the bits of
/// Linux's header; the table of UAPI.13 1.0 lacks bit 7 (TIME_MONOTONIC) and counts both one lower.
const FLAGS: u64 = 1 << 8 | 1 << 9;

/// VMGenID and VMClock of a machine.
pub struct Generation {
    memory: Arc<GuestMemoryMmap>,
    id: GuestAddress,
    clock: GuestAddress,
    /// `size`: bytes of the clock's page.
    clock_size: u32,
    line: Arc<dyn IrqLine>,
}

impl Generation {
    /// Creates the two at these guest-physical addresses, the clock in a page of `clock_size` bytes.
    /// Guest memory is not written before [`Self::begin`] or [`Self::renew`].
    pub fn new(
        memory: Arc<GuestMemoryMmap>,
        id: u64,
        (clock, clock_size): (u64, u32),
        line: Arc<dyn IrqLine>,
    ) -> Generation {
        Generation {
            memory,
            id: GuestAddress(id),
            clock: GuestAddress(clock),
            clock_size,
            line,
        }
    }

    /// Writes both for a guest that starts from its beginning. A guest that is reset stays of one
    /// generation, by the same `random`.
    ///
    /// # Errors
    /// Addresses that are not the guest's memory.
    pub fn begin(&self, random: &Random) -> Result<(), GuestMemoryError> {
        let (id, generation, disruption) = parts(random);
        let mut clock = [0; CLOCK_SIZE];
        let mut put = |at: u64, bytes: &[u8]| {
            clock[at as usize..][..bytes.len()].copy_from_slice(bytes);
        };
        put(0, &MAGIC);
        put(4, &self.clock_size.to_le_bytes());
        put(8, &VERSION.to_le_bytes());
        put(0x0a, &[NO_COUNTER]);
        put(offset::DISRUPTION, disruption);
        put(0x18, &FLAGS.to_le_bytes());
        put(offset::GENERATION, generation);
        self.memory.write_slice(&clock, self.clock)?;
        self.memory.write_slice(id, self.id)
    }

    /// Makes the guest, which goes on from an earlier state, one of another generation: changes what is in
    /// its memory, and raises the interrupt. No vCPU should have run since the machine was made: without
    /// FEAT_S2FWB, KVM brings what was written into reach of uncached reads, which are those of VMGenID's
    /// driver with a device tree, only as it maps the page for the guest (arch/arm64/kvm/mmu.c:
    /// user_mem_abort).
    ///
    /// # Errors
    /// Addresses that are not the guest's memory.
    pub fn renew(&self, random: &Random) -> Result<(), GuestMemoryError> {
        let (id, generation, disruption) = parts(random);
        self.memory.write_slice(id, self.id)?;
        let at = |offset| GuestAddress(self.clock.0 + offset);
        let sequence = at(offset::SEQUENCE);
        // The guest may have written anything there; it harms itself alone.
        let last: u32 = self.memory.load(sequence, Ordering::Relaxed)?;
        let busy = u32::from_le(last) | 1;
        self.memory
            .store(busy.to_le(), sequence, Ordering::Relaxed)?;
        fence(Ordering::Release);
        self.memory
            .write_slice(disruption, at(offset::DISRUPTION))?;
        self.memory
            .write_slice(generation, at(offset::GENERATION))?;
        let done = busy.wrapping_add(1).to_le();
        self.memory.store(done, sequence, Ordering::Release)?;
        self.line.pulse();
        Ok(())
    }
}

/// ID, generation and disruption marker.
fn parts(random: &Random) -> (&[u8], &[u8], &[u8]) {
    let (id, rest) = random.split_at(16);
    let (generation, disruption) = rest.split_at(8);
    (id, generation, disruption)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeLine;

    const ID: u64 = 0x1000;
    const CLOCK: u64 = 0x2000;

    fn machine() -> (Generation, Arc<GuestMemoryMmap>, Arc<FakeLine>) {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x3000)]);
        let memory = Arc::new(memory.expect("memory"));
        let line = FakeLine::new();
        let clock = (CLOCK, 0x1000);
        let generation = Generation::new(Arc::clone(&memory), ID, clock, line.clone());
        (generation, memory, line)
    }

    fn random(first: u8) -> Random {
        std::array::from_fn(|index| first + index as u8)
    }

    fn bytes<const N: usize>(memory: &GuestMemoryMmap, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        memory
            .read_slice(&mut bytes, GuestAddress(at))
            .expect("memory");
        bytes
    }

    #[test]
    fn a_guest_that_begins_finds_an_id_and_a_clock_that_tells_no_time() {
        let (generation, memory, line) = machine();
        generation.begin(&random(0x40)).expect("memory");
        assert_eq!(bytes::<16>(&memory, ID), random(0x40)[..16]);
        // By the header of Linux 7.0: magic, size, version, no counter, an even sequence, flags.
        let clock: [u8; 0x70] = bytes(&memory, CLOCK);
        assert_eq!(clock[..4], 0x4b4c_4356_u32.to_le_bytes());
        assert_eq!(clock[4..0x10], [0, 0x10, 0, 0, 1, 0, 0xff, 0, 0, 0, 0, 0]);
        assert_eq!(clock[0x10..0x18], random(0x40)[24..]);
        assert_eq!(clock[0x18..0x20], 0x300_u64.to_le_bytes());
        // The clock's status is unknown, and no other field says anything.
        assert_eq!(clock[0x20..0x68], [0; 0x48]);
        assert_eq!(clock[0x68..], random(0x40)[16..24]);
        assert_eq!(line.history(), []);
    }

    #[test]
    fn a_reset_guest_is_of_the_generation_that_it_was() {
        let (generation, memory, _) = machine();
        generation.begin(&random(1)).expect("memory");
        let first: [u8; 0x2000] = bytes(&memory, ID);
        generation.begin(&random(1)).expect("memory");
        assert_eq!(bytes(&memory, ID), first);
    }

    #[test]
    fn a_new_generation_differs_in_id_generation_and_marker_and_is_told() {
        let (generation, memory, line) = machine();
        generation.begin(&random(1)).expect("memory");
        let before: [u8; 0x70] = bytes(&memory, CLOCK);
        generation.renew(&random(0x80)).expect("memory");
        assert_eq!(bytes::<16>(&memory, ID), random(0x80)[..16]);
        let after: [u8; 0x70] = bytes(&memory, CLOCK);
        assert_eq!(after[..0x0c], before[..0x0c]);
        assert_eq!(after[0x0c..0x10], [2, 0, 0, 0]);
        assert_eq!(after[0x10..0x18], random(0x80)[24..]);
        assert_eq!(after[0x18..0x68], before[0x18..0x68]);
        assert_eq!(after[0x68..], random(0x80)[16..24]);
        assert_eq!(line.history(), [true, false]);
    }

    #[test]
    fn whatever_the_guest_wrote_the_sequence_ends_even_and_differs() {
        let (generation, memory, _) = machine();
        let sequence = GuestAddress(CLOCK + offset::SEQUENCE);
        for (written, wanted) in [(0, 2), (1, 2), (6, 8), (u32::MAX, 0), (u32::MAX - 1, 0)] {
            memory.write_obj(written, sequence).expect("memory");
            generation.renew(&random(0)).expect("memory");
            let found: u32 = memory.read_obj(sequence).expect("memory");
            assert_eq!(found, wanted, "{written:#x}");
        }
    }

    #[test]
    fn pages_outside_of_guest_memory_are_an_error() {
        let (_, memory, line) = machine();
        let outside = Generation::new(memory, ID, (0x9000, 0x1000), line.clone());
        assert!(outside.begin(&random(0)).is_err());
        assert!(outside.renew(&random(0)).is_err());
        assert_eq!(line.history(), []);
    }
}
