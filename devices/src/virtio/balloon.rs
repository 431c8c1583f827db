//! The memory balloon (virtio 1.2, section 5.5): memory that the guest lends back to the host.
//!
//! It does so in three ways. It puts pages into the balloon, as many as the [target](
//! Balloon::set_target) says, and does not use them until it takes them out. It reports pages that
//! are free, and waits with using them until we are done with them. Both kinds go back to the host
//! at once, by [`Discard`]. Where it is asked to, it hints at pages that were free when it looked;
//! those it may have in use again before we see the hint (drivers/virtio/virtio_balloon.c:
//! virtio_balloon_register_shrinker), so hints are only collected, for whoever copies the guest's
//! memory and knows what was written since.
//!
//! Pages are of 4 KiB here, whatever the guest's and the host's are. Where the host's are larger,
//! one goes back when all its parts are in the balloon.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use self::pages::{Inside, PAGE, runs};
use self::statistics::read_statistics;
use self::working::{
    FEATURE_DEFLATE_ON_OOM, FEATURE_HINTING, FEATURE_MUST_TELL, FEATURE_POISON, FEATURE_REPORTING,
    FEATURE_STATISTICS, Role, Working, roles,
};
use super::{
    Chain, Change, ConfigSpace, DeviceState, Driver, Positions, RestoreError, StartError,
    VirtioDevice, Virtqueue, quiesced,
};

mod pages;
mod statistics;
mod working;

pub use super::state::{BalloonState, Hints, Statistics};

/// Device ID.
const ID: u32 = 5;
/// Entries of each queue: Linux wants 32 for reports (mm/page_reporting.h:
/// PAGE_REPORTING_CAPACITY).
const ENTRIES: u16 = 64;
/// Ranges of hints that are kept; the bytes of the others are counted.
const MOST_HINTS: usize = 1 << 16;

/// Offsets in the configuration space in bytes (section 5.5.4): what the balloon should hold and
/// what it holds in pages, the command of hinting, what free pages are filled with; and its size.
const TARGET: usize = 0;
const ACTUAL: usize = 4;
const COMMAND: usize = 8;
const POISON: usize = 12;
const CONFIG_BYTES: usize = 16;

/// Commands of hinting; other numbers start a round.
const STOP: u32 = 0;
const DONE: u32 = 1;

/// Gives pages back to the host.
pub trait Discard: Send {
    /// Returns the host's page size in bytes: a power of two, 4 KiB to 256 KiB.
    fn page_size(&self) -> u64;

    /// Gives back whole pages of the host: `len` bytes from `address`, all of them guest memory.
    /// They read as zero from then on. Returns whether it could.
    fn discard(&self, memory: &GuestMemoryMmap, address: GuestAddress, len: u64) -> bool;
}

/// What a balloon offers to the driver beside the balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Whether the guest may tell which pages are free.
    pub reporting: bool,
    /// Whether it may be asked for hints.
    pub hinting: bool,
    /// Whether it may take pages out rather than end a program.
    pub deflate_on_oom: bool,
}

/// A memory balloon.
pub struct Balloon {
    offer: Offer,
    discard: Box<dyn Discard>,
    config: Arc<ConfigSpace>,
    statistics: Option<Statistics>,
    hints: Hints,
    /// The command of the last round of hints.
    round: u32,
    /// Bytes given back to the host, ever.
    discarded: u64,
    working: Option<Working>,
    /// What the driver's use of it left, while the machine is held.
    paused: Option<Paused>,
}

/// What a driver's use of the balloon leaves while the machine is held.
#[derive(Default)]
struct Paused {
    hinting: bool,
    inside: Option<Inside>,
}

impl Balloon {
    /// Creates a balloon that should hold `target` bytes.
    #[must_use]
    pub fn new(target: u64, offer: Offer, discard: Box<dyn Discard>) -> Balloon {
        let mut config = vec![0; CONFIG_BYTES];
        put(&mut config, TARGET, pages_of(target));
        Balloon {
            offer,
            discard,
            config: ConfigSpace::new(config),
            statistics: None,
            hints: Hints::default(),
            round: DONE,
            discarded: 0,
            working: None,
            paused: None,
        }
    }

    /// The balloon should hold this many bytes from now on; the guest moves there as fast as it
    /// can.
    pub fn set_target(&mut self, bytes: u64) {
        self.tell(TARGET, pages_of(bytes));
    }

    /// Bytes that the balloon should hold.
    #[must_use]
    pub fn target(&self) -> u64 {
        self.field(TARGET) * PAGE
    }

    /// Bytes that it holds, as the driver says.
    #[must_use]
    pub fn actual(&self) -> u64 {
        self.field(ACTUAL) * PAGE
    }

    /// Bytes that were given back to the host so far, by balloon and by reports; the guest may
    /// have taken them again since.
    #[must_use]
    pub fn discarded(&self) -> u64 {
        self.discarded
    }

    /// Returns what the guest last said of its memory; `None` if it said nothing yet.
    #[must_use]
    pub fn statistics(&self) -> Option<&Statistics> {
        self.statistics.as_ref()
    }

    /// Has the guest say anew how its memory is; the answer is in [`Self::statistics`] a moment
    /// later. False where its driver does not take part, or was asked and has not answered yet.
    pub fn ask_for_statistics(&mut self) -> bool {
        let Some(working) = &mut self.working else {
            return false;
        };
        let Some(chain) = working.asked.take() else {
            return false;
        };
        if let Some(queue) = working.queue(Role::Statistics) {
            queue.complete(chain, 0);
            queue.signal();
        }
        true
    }

    /// Has the guest say which pages are free now. False where its driver does not take part.
    pub fn ask_for_hints(&mut self) -> bool {
        let Some(working) = &mut self.working else {
            return false;
        };
        if working.features & FEATURE_HINTING == 0 {
            return false;
        }
        working.hinting = false;
        self.hints = Hints::default();
        // STOP and DONE are no rounds.
        self.round = self.round.checked_add(1).unwrap_or(DONE + 1);
        self.tell(COMMAND, self.round);
        true
    }

    /// Returns what the guest said of free pages since it was last asked.
    #[must_use]
    pub fn hints(&self) -> &Hints {
        &self.hints
    }

    /// Changes a number of the configuration and tells the driver.
    fn tell(&mut self, offset: usize, value: u32) {
        self.config.change(|config| put(config, offset, value));
        if let Some(working) = &self.working {
            working.link.config_changed();
        }
    }

    fn field(&self, offset: usize) -> u64 {
        let mut bytes = [0; 4];
        self.config.read(offset, &mut bytes);
        u32::from_le_bytes(bytes).into()
    }

    /// Serves a queue, by its index.
    fn serve(&mut self, index: usize) {
        let Some(working) = &mut self.working else {
            return;
        };
        let Some((role, queue)) = working.queues.get_mut(index) else {
            return;
        };
        // Taken out, so that the rest can be used beside it.
        let (role, Some(mut ring)) = (*role, queue.take()) else {
            return;
        };
        ring.serve(|ring, chain| self.answer(role, ring, chain));
        if let Some(working) = &mut self.working {
            working.queues[index].1 = Some(ring);
        }
    }

    fn answer(&mut self, role: Role, ring: &mut Virtqueue, chain: Chain) {
        let Some(working) = &mut self.working else {
            return;
        };
        match role {
            // Pages of which not all are told, or not all are memory, stay as they are.
            Role::Inflate | Role::Deflate | Role::Reports if !chain.is_whole() => {}
            Role::Inflate | Role::Deflate => {
                if let Err(what) = working.take_pages(&chain) {
                    ring.break_ring(format_args!("{what}"));
                }
                match role {
                    Role::Inflate => self.inflate(),
                    _ => working.deflate(),
                }
            }
            Role::Statistics => {
                self.statistics = Some(read_statistics(&chain, &working.memory));
                let Some(earlier) = working.asked.replace(chain) else {
                    return;
                };
                ring.complete(earlier, 0);
                return;
            }
            Role::Hints => self.take_hints(&chain),
            Role::Reports => self.take_report(&chain),
        }
        ring.complete(chain, 0);
    }

    /// Gives back the pages that came into the balloon.
    fn inflate(&mut self) {
        let Some(working) = &mut self.working else {
            return;
        };
        let host_page = self.discard.page_size();
        let memory = &working.memory;
        let mut discard = |address: u64, len: u64| {
            if self.discard.discard(memory, GuestAddress(address), len) {
                self.discarded += len;
            }
        };
        match &mut working.inside {
            None => runs(&working.pages, PAGE, discard),
            Some(inside) => {
                let mut full: Vec<u64> = Vec::new();
                for page in &working.pages {
                    if inside.insert(*page, host_page) {
                        full.push(page - page % host_page);
                    }
                }
                runs(&full, host_page, &mut discard);
            }
        }
    }

    fn take_hints(&mut self, chain: &Chain) {
        let current = self.field(COMMAND);
        let Some(working) = &mut self.working else {
            return;
        };
        let mut command = [0; 4];
        if chain.read(&working.memory, 0, &mut command) == command.len() {
            let command = u32::from_le_bytes(command);
            if command == STOP && working.hinting {
                working.hinting = false;
                self.hints.complete = true;
                // The guest keeps the pages until it hears this.
                self.tell(COMMAND, DONE);
                return;
            }
            // The round before this one may not have ended yet. After a reset there is none: STOP.
            working.hinting = command > DONE && u64::from(command) == current;
        }
        if !working.hinting {
            return;
        }
        for segment in chain.writable() {
            let (start, len) = (segment.address.0, segment.len as u64);
            self.hints.bytes += len;
            let ranges = &mut self.hints.ranges;
            let has_room = ranges.len() < MOST_HINTS;
            match ranges.last_mut() {
                Some((last, bytes)) if *last + *bytes == start => *bytes += len,
                _ if has_room => ranges.push((start, len)),
                _ => {}
            }
        }
    }

    /// Gives back pages that the guest does not use, and will not before it has its answer.
    fn take_report(&mut self, chain: &Chain) {
        let Some(working) = &self.working else {
            return;
        };
        // It may expect to find what it filled them with, and discarded pages hold zeros.
        if working.features & FEATURE_POISON != 0 && self.field(POISON) != 0 {
            return;
        }
        let host_page = self.discard.page_size();
        for segment in chain.writable() {
            // A segment lies in memory, so its end is an address.
            let end = segment.address.0 + segment.len as u64;
            let first = segment.address.0.next_multiple_of(host_page);
            let len = (end - end % host_page).saturating_sub(first);
            let address = GuestAddress(first);
            if len > 0 && self.discard.discard(&working.memory, address, len) {
                self.discarded += len;
            }
        }
    }
}

fn pages_of(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE).unwrap_or(u32::MAX)
}

fn put(config: &mut [u8], offset: usize, value: u32) {
    config[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

impl VirtioDevice for Balloon {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        let Offer {
            reporting,
            hinting,
            deflate_on_oom,
        } = self.offer;
        // A page that goes back with its neighbours must not be in use without our knowing.
        let larger = self.discard.page_size() > PAGE;
        [
            (FEATURE_STATISTICS, true),
            (FEATURE_MUST_TELL, larger),
            (FEATURE_DEFLATE_ON_OOM, deflate_on_oom),
            (FEATURE_HINTING, hinting),
            // Without it Linux does not report where it fills free pages, be it with zeros
            // (virtballoon_validate).
            (FEATURE_POISON, reporting || hinting),
            (FEATURE_REPORTING, reporting),
        ]
        .into_iter()
        .filter(|(_, offered)| *offered)
        .fold(0, |all, (feature, _)| all | feature)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        roles(self.features()).map(|_| ENTRIES).collect()
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn change(&mut self, change: Change) -> bool {
        match change {
            Change::BalloonTarget(bytes) => self.set_target(bytes),
            Change::BalloonStatistics => {
                self.ask_for_statistics();
                return self.working.is_some();
            }
            Change::DiskSize(_) | Change::DiskStorage(_) => return false,
        }
        true
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let end = offset.saturating_add(data.len());
        let is_drivers = [ACTUAL, POISON]
            .iter()
            .any(|field| offset >= *field && end <= field + 4);
        match &self.working {
            _ if is_drivers => self.config.change(|config| {
                config[offset..end].copy_from_slice(data);
            }),
            Some(working) => working.link.fault(format_args!(
                "the driver writes {} bytes of its configuration at {offset}",
                data.len()
            )),
            None => {}
        }
    }

    fn start(&mut self, mut driver: Driver) -> Result<(), StartError> {
        let roles = roles(driver.features).enumerate();
        let queues = roles.map(|(index, role)| (role, driver.take(index)));
        let queues: Vec<_> = queues.collect();
        let larger = self.discard.page_size() > PAGE;
        let count = queues.len();
        let Paused { hinting, inside } = self.paused.take().unwrap_or_default();
        let inside = match inside {
            // Banks of other memory would tell of other pages.
            Some(inside) if larger && inside.is_of(&driver.memory) => Some(inside),
            _ => larger.then(|| Inside::new(&driver.memory)),
        };
        self.working = Some(Working {
            inside,
            memory: driver.memory,
            link: driver.link,
            features: driver.features,
            queues,
            asked: None,
            hinting,
            pages: Vec::new(),
        });
        for index in 0..count {
            self.serve(index);
        }
        Ok(())
    }

    fn quiesce(&mut self) -> Positions {
        let Some(mut working) = self.working.take() else {
            return Positions::new();
        };
        // The last one that was taken from its queue.
        if let Some(asked) = working.asked.take()
            && let Some(queue) = working.queue(Role::Statistics)
        {
            queue.hand_back([asked]);
        }
        self.paused = Some(Paused {
            hinting: working.hinting,
            inside: working.inside,
        });
        quiesced(
            working
                .queues
                .iter_mut()
                .filter_map(|(_, queue)| queue.as_mut()),
        )
    }

    fn save(&self) -> DeviceState {
        let field = |offset| self.field(offset) as u32;
        let paused = self.paused.as_ref();
        let inside = paused.and_then(|paused| paused.inside.as_ref());
        DeviceState::Balloon(Box::new(BalloonState {
            target: field(TARGET),
            actual: field(ACTUAL),
            command: field(COMMAND),
            poison: field(POISON),
            statistics: self.statistics.clone(),
            hints: self.hints.clone(),
            round: self.round,
            hinting: paused.is_some_and(|paused| paused.hinting),
            inside: inside.map(Inside::save),
        }))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Balloon(state) = state else {
            return Err(RestoreError::kind(state));
        };
        if state.hints.ranges.len() > MOST_HINTS {
            return Err(RestoreError(format!(
                "{} ranges of hints, of which {MOST_HINTS} are kept",
                state.hints.ranges.len()
            )));
        }
        let is_range = |range: &(u64, u64)| range.0.checked_add(range.1).is_some();
        if state.hints.bytes > i64::MAX as u64 || !state.hints.ranges.iter().all(is_range) {
            let what = "hints of more bytes than there are addresses";
            return Err(RestoreError(what.to_owned()));
        }
        self.config.change(|config| {
            for (offset, value) in [
                (TARGET, state.target),
                (ACTUAL, state.actual),
                (COMMAND, state.command),
                (POISON, state.poison),
            ] {
                put(config, offset, value);
            }
        });
        self.statistics.clone_from(&state.statistics);
        self.hints.clone_from(&state.hints);
        self.round = state.round;
        self.paused = Some(Paused {
            hinting: state.hinting,
            inside: state.inside.clone().map(Inside::restore),
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.working = None;
        self.paused = None;
        self.statistics = None;
        self.hints = Hints::default();
        // All pages are the guest's again.
        self.config.change(|config| {
            for offset in [ACTUAL, POISON, COMMAND] {
                put(config, offset, 0);
            }
        });
    }

    fn stop_queue(&mut self, queue: usize) {
        let Some(working) = &mut self.working else {
            return;
        };
        if let Some((role, ring)) = working.queues.get_mut(queue) {
            *ring = None;
            if *role == Role::Statistics {
                working.asked = None;
            }
        }
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError> {
        let index = usize::from(queue.index());
        let working = self.working.as_mut();
        if let Some((_, ring)) = working.and_then(|working| working.queues.get_mut(index)) {
            *ring = Some(queue);
        }
        Ok(())
    }

    fn kicked(&mut self, queue: usize) {
        self.serve(queue);
    }
}

#[cfg(test)]
mod tests;
