//! What the guest says of its memory.

use vm_memory::GuestMemoryMmap;

use crate::virtio::Chain;
use crate::virtio::state::Statistics;

/// Bytes of a statistic: its tag (16 bits) and its value (64 bits).
const STATISTIC: usize = 10;
/// The most that are read of one buffer: one of each tag.
const MOST_STATISTICS: usize = 1 << 16;

/// Reads the driver's buffer of statistics.
pub(super) fn read_statistics(chain: &Chain, memory: &GuestMemoryMmap) -> Statistics {
    let mut statistics = Statistics::default();
    // Those that are not known may be anywhere among them, and there are as many as there are tags
    // (section 5.5.6.3.2).
    let mut buffer = [0; STATISTIC * 64];
    for offset in (0..MOST_STATISTICS * STATISTIC).step_by(buffer.len()) {
        let count = chain.read(memory, offset, &mut buffer);
        let (entries, _) = buffer[..count].as_chunks::<STATISTIC>();
        for [tag_low, tag_high, value @ ..] in entries {
            let tag = u16::from_le_bytes([*tag_low, *tag_high]);
            if let Some(known) = statistics.0.get_mut(usize::from(tag)) {
                *known = Some(u64::from_le_bytes(*value));
            }
        }
        if count < buffer.len() {
            break;
        }
    }
    statistics
}
