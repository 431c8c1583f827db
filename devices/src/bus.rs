//! The bus: which device answers at an address.

use crate::sync::lock;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::Device;
use crate::action::Action;

/// Windows of addresses and the devices behind them.
///
/// It is filled while the machine is built, and vCPU threads share it in an [`Arc`]. Windows that stay
/// where they are are read-only from then on and need no lock; only the devices are locked. Those that
/// move are looked for where none of the others is, so that accesses to the others cost what they cost
/// without them.
#[derive(Default)]
pub struct Bus {
    /// Those that stay, sorted by `start`; no two overlap.
    windows: Vec<Window>,
    /// Those that move.
    moving: RwLock<Vec<Moving>>,
}

/// A window that moves: its length, its device, and where it is now, if it is anywhere.
struct Moving {
    len: u64,
    device: Arc<Mutex<dyn Device>>,
    place: Option<Window>,
}

/// Which of the windows that move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MovingWindow(usize);

/// Why a window could not be put on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The window has no bytes.
    #[error("the device window at {start:#x} has no bytes; give it a length")]
    Empty {
        /// First address of the window.
        start: u64,
    },
    /// The window reaches beyond the end of the address space.
    #[error("the device window at {start:#x} of {len:#x} bytes passes the last 64-bit address")]
    Wraps {
        /// First address of the window.
        start: u64,
        /// Length of the window in bytes.
        len: u64,
    },
    /// The window overlaps one that is already on the bus.
    #[error(
        "the device window at {start:#x} of {len:#x} bytes overlaps the one at \
         {other_start:#x} of {other_len:#x} bytes; move either"
    )]
    Overlaps {
        /// First address of the window.
        start: u64,
        /// Length of the window in bytes.
        len: u64,
        /// First address of the other window.
        other_start: u64,
        /// Length of the other window in bytes.
        other_len: u64,
    },
}

impl Bus {
    /// Creates an empty bus.
    pub fn new() -> Bus {
        Bus::default()
    }

    /// Maps `device` at the `len` bytes from `start`.
    ///
    /// # Errors
    /// When the window is empty, passes the last address, or overlaps another.
    pub fn insert(
        &mut self,
        start: u64,
        len: u64,
        device: Arc<Mutex<dyn Device>>,
    ) -> Result<(), BusError> {
        let window = Window::new(start, len, device)?;
        let place = self.windows.partition_point(|other| other.start < start);
        // Windows are sorted and disjoint, so only the two neighbours can overlap the new one.
        let before = place
            .checked_sub(1)
            .and_then(|index| self.windows.get(index));
        let after = self.windows.get(place);
        for other in before.into_iter().chain(after) {
            window.check_apart(other)?;
        }
        self.windows.insert(place, window);
        Ok(())
    }

    /// Adds a window of `len` bytes that moves. It is nowhere until [`Self::place`] says where.
    pub fn insert_moving(&mut self, len: u64, device: Arc<Mutex<dyn Device>>) -> MovingWindow {
        let moving = self.moving.get_mut();
        let moving = moving.unwrap_or_else(PoisonError::into_inner);
        moving.push(Moving {
            len,
            device,
            place: None,
        });
        MovingWindow(moving.len() - 1)
    }

    /// Has a window begin at `start` from now on, or be nowhere. Other threads may read and write
    /// meanwhile: each access finds the window at its old place or at its new one.
    ///
    /// # Errors
    /// As [`Self::insert`], after which the window is nowhere: a guest may place a window as it likes.
    pub fn place(&self, window: MovingWindow, start: Option<u64>) -> Result<(), BusError> {
        let moving = self.moving.write();
        let mut moving = moving.unwrap_or_else(PoisonError::into_inner);
        let Some(Moving { len, device, place }) = moving.get_mut(window.0) else {
            return Ok(());
        };
        *place = None;
        let Some(start) = start else {
            return Ok(());
        };
        let new = Window::new(start, *len, Arc::clone(device))?;
        let places = moving.iter().filter_map(|moving| moving.place.as_ref());
        for other in self.windows.iter().chain(places) {
            new.check_apart(other)?;
        }
        moving[window.0].place = Some(new);
        Ok(())
    }

    /// Reads `data.len()` bytes at `address` from the device there.
    ///
    /// Returns what the access means for the machine, or `None` when no single device covers all of
    /// the bytes: `data` is then zeroed, and the caller counts and logs the access.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Option<Action> {
        data.fill(0);
        if let Some((window, offset)) = find(&self.windows, address, data.len()) {
            return Some(window.lock().read(offset, data));
        }
        let (device, offset) = self.find_moving(address, data.len())?;
        Some(lock(&device).read(offset, data))
    }

    /// Writes `data` at `address` to the device there.
    ///
    /// Returns what the access means for the machine, or `None` when no single device covers all of
    /// the bytes: nothing is then written, and the caller counts and logs the access.
    pub fn write(&self, address: u64, data: &[u8]) -> Option<Action> {
        if let Some((window, offset)) = find(&self.windows, address, data.len()) {
            return Some(window.lock().write(offset, data));
        }
        let (device, offset) = self.find_moving(address, data.len())?;
        Some(lock(&device).write(offset, data))
    }

    /// Finds the device that all `size` bytes from `address` are of, among the windows that move.
    /// Nothing is locked when this returns: what the device does may be to move its window.
    #[cold]
    fn find_moving(&self, address: u64, size: usize) -> Option<(Arc<Mutex<dyn Device>>, u64)> {
        let moving = self.moving.read();
        let moving = moving.unwrap_or_else(PoisonError::into_inner);
        moving.iter().find_map(|moving| {
            let (window, offset) = find(moving.place.as_slice(), address, size)?;
            Some((Arc::clone(&window.device), offset))
        })
    }
}

/// Finds the window that covers all `size` bytes from `address`, among windows that are sorted, and the
/// offset into it.
fn find(windows: &[Window], address: u64, size: usize) -> Option<(&Window, u64)> {
    let more = u64::try_from(size).ok()?.checked_sub(1)?;
    let last = address.checked_add(more)?;
    let next = windows.partition_point(|other| other.start <= address);
    let window = windows.get(next.checked_sub(1)?)?;
    (last <= window.last).then(|| (window, address - window.start))
}

/// One device's addresses. The bounds are inclusive, because a window may end at 2^64 - 1.
struct Window {
    start: u64,
    last: u64,
    device: Arc<Mutex<dyn Device>>,
}

impl Window {
    fn new(start: u64, len: u64, device: Arc<Mutex<dyn Device>>) -> Result<Window, BusError> {
        let more = len.checked_sub(1).ok_or(BusError::Empty { start })?;
        let last = start
            .checked_add(more)
            .ok_or(BusError::Wraps { start, len })?;
        Ok(Window {
            start,
            last,
            device,
        })
    }

    /// Checks that the windows have no address in common.
    fn check_apart(&self, other: &Window) -> Result<(), BusError> {
        if self.start > other.last || other.start > self.last {
            return Ok(());
        }
        Err(BusError::Overlaps {
            start: self.start,
            len: self.last - self.start + 1,
            other_start: other.start,
            other_len: other.last - other.start + 1,
        })
    }

    /// Locks the device, even after another thread panicked in it: its registers are plain data,
    /// and the other vCPUs go on.
    fn lock(&self) -> MutexGuard<'_, dyn Device + 'static> {
        lock(&self.device)
    }
}

/// Answers a read of at most four bytes with the low bytes of `value`.
pub(crate) fn answer(data: &mut [u8], value: u32) {
    for (byte, source) in data.iter_mut().zip(value.to_le_bytes()) {
        *byte = source;
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    /// Answers reads with its name, and records what was written and where.
    #[derive(Default)]
    struct Probe {
        name: u8,
        reads: Vec<(u64, usize)>,
        writes: Vec<(u64, Vec<u8>)>,
    }

    impl Device for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) -> Action {
            self.reads.push((offset, data.len()));
            data.fill(self.name);
            Action::None
        }

        fn write(&mut self, offset: u64, data: &[u8]) -> Action {
            assert_ne!(data, b"panic", "asked to");
            self.writes.push((offset, data.to_vec()));
            match data {
                b"reset" => Action::Reset,
                _ => Action::None,
            }
        }
    }

    fn probe(name: u8) -> Arc<Mutex<Probe>> {
        Arc::new(Mutex::new(Probe {
            name,
            ..Probe::default()
        }))
    }

    fn bus(windows: &[(u64, u64)]) -> Bus {
        let mut bus = Bus::new();
        for (name, &(start, len)) in (1..).zip(windows) {
            bus.insert(start, len, probe(name))
                .expect("windows are apart");
        }
        bus
    }

    #[test]
    fn an_access_reaches_its_device_at_its_offset() {
        let (first, second) = (probe(1), probe(2));
        let mut bus = Bus::new();
        bus.insert(0x2000, 0x1000, second.clone()).expect("free");
        bus.insert(0x1000, 0x1000, first.clone()).expect("free");

        let mut data = [9; 4];
        assert_eq!(bus.read(0x1ffc, &mut data), Some(Action::None));
        assert_eq!(data, [1; 4]);
        assert_eq!(bus.read(0x2000, &mut data), Some(Action::None));
        assert_eq!(data, [2; 4]);
        assert_eq!(bus.write(0x2010, b"ab"), Some(Action::None));

        assert_eq!(first.lock().expect("sound").reads, [(0xffc, 4)]);
        assert_eq!(second.lock().expect("sound").reads, [(0, 4)]);
        assert_eq!(
            second.lock().expect("sound").writes,
            [(0x10, b"ab".to_vec())]
        );
    }

    #[test]
    fn what_an_access_means_for_the_machine_is_passed_on() {
        let bus = bus(&[(0x1000, 0x1000)]);
        assert_eq!(bus.write(0x1000, b"reset"), Some(Action::Reset));
        assert_eq!(bus.write(0x1000, b"no"), Some(Action::None));
    }

    #[test]
    fn an_unmapped_address_reads_as_zeros() {
        let bus = bus(&[(0x1000, 0x1000)]);
        for address in [0, 0xfff, 0x2000, u64::MAX] {
            let mut data = [9; 1];
            assert_eq!(bus.read(address, &mut data), None, "{address:#x}");
            assert_eq!(data, [0]);
            assert_eq!(bus.write(address, &[1]), None);
        }
        assert_eq!(Bus::new().read(0, &mut [0]), None);
    }

    #[test]
    fn an_access_across_the_end_of_a_window_reaches_no_device() {
        let bus = bus(&[(0x1000, 0x1000), (0x2000, 0x1000)]);
        let mut data = [9; 4];
        assert_eq!(bus.read(0x1ffe, &mut data), None);
        assert_eq!(data, [0; 4]);
        assert_eq!(bus.write(0x1ffe, &[1; 4]), None);
        assert_eq!(bus.read(0xffe, &mut data), None);
        assert_eq!(bus.read(u64::MAX - 1, &mut data), None);
    }

    #[test]
    fn an_access_of_no_bytes_reaches_no_device() {
        let bus = bus(&[(0, 0x1000)]);
        assert_eq!(bus.read(0, &mut []), None);
        assert_eq!(bus.write(0, &[]), None);
    }

    #[test]
    fn a_window_may_end_at_the_last_address() {
        let mut bus = Bus::new();
        assert_eq!(bus.insert(u64::MAX - 3, 4, probe(7)), Ok(()));
        let mut data = [0; 4];
        assert_eq!(bus.read(u64::MAX - 3, &mut data), Some(Action::None));
        assert_eq!(data, [7; 4]);
    }

    #[test]
    fn invalid_windows_are_refused_with_their_bounds() {
        let mut bus = bus(&[(0x1000, 0x1000)]);
        assert_eq!(
            bus.insert(0x5000, 0, probe(2)),
            Err(BusError::Empty { start: 0x5000 })
        );
        assert_eq!(
            bus.insert(u64::MAX, 2, probe(2)),
            Err(BusError::Wraps {
                start: u64::MAX,
                len: 2
            })
        );
        for (start, len) in [
            (0x1000, 0x1000),
            (0x0, 0x1001),
            (0x1fff, 1),
            (0x1800, 0x10),
            (0, 0x10000),
        ] {
            assert_eq!(
                bus.insert(start, len, probe(2)),
                Err(BusError::Overlaps {
                    start,
                    len,
                    other_start: 0x1000,
                    other_len: 0x1000
                })
            );
        }
        assert_eq!(bus.insert(0, 0x1000, probe(2)), Ok(()));
        assert_eq!(bus.insert(0x2000, 1, probe(3)), Ok(()));
    }

    #[test]
    fn errors_give_addresses() {
        let error = BusError::Overlaps {
            start: 0x1000,
            len: 0x100,
            other_start: 0x1080,
            other_len: 0x10,
        };
        assert_eq!(
            error.to_string(),
            "the device window at 0x1000 of 0x100 bytes overlaps the one at 0x1080 of 0x10 \
             bytes; move either"
        );
    }

    #[test]
    fn a_thread_that_panicked_in_a_device_does_not_stop_the_others() {
        let bus = Arc::new(bus(&[(0x1000, 0x1000)]));
        let victim = bus.clone();
        let thread = thread::spawn(move || victim.write(0x1000, b"panic"));
        assert!(thread.join().is_err());
        let mut data = [0; 1];
        assert_eq!(bus.read(0x1000, &mut data), Some(Action::None));
        assert_eq!(data, [1]);
    }

    #[test]
    fn a_window_moves_and_answers_where_it_is_alone() {
        let (fixed, moves) = (probe(1), probe(2));
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x1000, fixed).expect("free");
        let window = bus.insert_moving(0x100, moves.clone());
        let other = bus.insert_moving(0x100, probe(3));
        let at = |address| {
            let mut data = [9; 1];
            bus.read(address, &mut data).map(|_| data[0])
        };
        assert_eq!(at(0x3000), None, "it is nowhere");
        for start in [0x3000, 0x4000, 0xf00, 0x2000, u64::MAX - 0xff] {
            bus.place(window, Some(start)).expect("free");
            assert_eq!([at(start), at(start + 0xff)], [Some(2); 2]);
            assert_eq!(at(0x1000), Some(1));
            assert_eq!(at(start - 1).filter(|name| *name == 2), None);
        }
        assert_eq!(bus.write(u64::MAX, b"a"), Some(Action::None));
        assert_eq!(moves.lock().expect("sound").writes, [(0xff, b"a".to_vec())]);
        bus.place(other, Some(0x5000)).expect("free");
        // A place that is taken, or is none: then it is nowhere, and all others stay.
        for start in [0x1fff, 0xf01, 0x50ff, u64::MAX] {
            bus.place(window, Some(0x3000)).expect("free");
            bus.place(window, Some(start)).expect_err("taken");
            assert_eq!(
                [at(0x3000), at(0x1fff), at(0x50ff)],
                [None, Some(1), Some(3)]
            );
        }
        bus.place(window, Some(0x3000)).expect("free");
        bus.place(window, None).expect("always");
        assert_eq!(at(0x3000), None);
    }

    #[test]
    fn a_window_moves_while_others_look_and_is_never_in_two_places() {
        let mut bus = Bus::new();
        let window = bus.insert_moving(0x100, probe(1));
        let bus = Arc::new(bus);
        thread::scope(|scope| {
            let looks = (0..2).map(|_| {
                scope.spawn(|| {
                    let mut seen = [0_u32; 2];
                    while seen.iter().any(|times| *times < 100) {
                        for (times, start) in seen.iter_mut().zip([0x1000, 0x2000]) {
                            let mut data = [0; 4];
                            if bus.read(start, &mut data).is_some() {
                                assert_eq!(data, [1; 4]);
                                *times += 1;
                            }
                        }
                    }
                })
            });
            let looks: Vec<_> = looks.collect();
            let mut places = [0x1000, 0x2000].into_iter().cycle();
            while !looks.iter().all(|look| look.is_finished()) {
                bus.place(window, places.next()).expect("free");
                thread::yield_now();
            }
            for look in looks {
                look.join().expect("no panic");
            }
        });
    }

    proptest! {
        /// The bus finds the same window as a linear search.
        #[test]
        fn search_agrees_with_a_list(
            wanted in prop::collection::vec((0u64..200, 0u64..20), 0..20),
            accesses in prop::collection::vec((0u64..230, 1usize..9), 1..50),
        ) {
            let mut bus = Bus::new();
            let mut list: Vec<(u64, u64, u8)> = Vec::new();
            for (name, (start, len)) in (1..).zip(wanted) {
                let free = len > 0
                    && list.iter().all(|&(s, l, _)| start + len <= s || s + l <= start);
                prop_assert_eq!(bus.insert(start, len, probe(name)).is_ok(), free);
                if free {
                    list.push((start, len, name));
                }
            }
            for (address, size) in accesses {
                let end = address + size as u64;
                let there = list.iter().find(|&&(s, l, _)| s <= address && end <= s + l);
                let mut data = vec![0xff; size];
                prop_assert_eq!(bus.read(address, &mut data).is_some(), there.is_some());
                prop_assert_eq!(data, vec![there.map_or(0, |w| w.2); size]);
            }
        }
    }
}
