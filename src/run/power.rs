//! The guest's power key: when it is pressed, released and pressed again, and when the guest is
//! stopped.

use super::ending::Ending;
use crate::machine::Devices;
use crate::shutdown::{Due, Shutdown};
use armlet_devices::sync::lock;
use armlet_system::messages;
use std::time::{Duration, Instant};

/// How long the power key is held: longer than gpio-keys' debouncing of 5 ms.
const KEY_HELD: Duration = Duration::from_millis(100);

/// The power key, and the state of a request to power off.
pub(super) struct Power {
    /// When the key is released.
    release: Option<Instant>,
    /// Whether all vCPUs of this life are off, so that none sees the key.
    pub(super) all_off: bool,
    /// How long the guest may take to power off when asked; `None` for no limit.
    patience: Option<Duration>,
    /// The request to power off, if there is one.
    shutdown: Option<Shutdown>,
}

impl Power {
    /// Creates the key of a guest that may take `patience` to power off.
    pub(super) fn new(patience: Option<Duration>) -> Power {
        Power {
            release: None,
            all_off: false,
            patience,
            shutdown: None,
        }
    }

    /// Begins a new life of the guest. A request to power off stays in force.
    pub(super) fn begin_life(&mut self) {
        (self.release, self.all_off) = (None, false);
    }

    /// Returns when to call [`Self::pass`] again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let asked = self.shutdown.map(|shutdown| shutdown.next());
        [self.release, asked].into_iter().flatten().min()
    }

    /// Returns whether the guest was asked to power off.
    pub(super) fn was_asked(&self) -> bool {
        self.shutdown.is_some()
    }

    /// Asks the guest to power off, after a signal. Returns the guest's end if it cannot be asked,
    /// because it has no power key or all of its vCPUs are off.
    pub(super) fn ask(&mut self, devices: &Devices) -> Option<Ending> {
        if self.all_off {
            messages::say("stopped by a signal: all of its CPUs are off");
            return Some(Ending::Stopped);
        }
        if !self.press(devices) {
            messages::say("stopped by a signal: this board has no power key");
            return Some(Ending::Stopped);
        }
        self.shutdown = Some(Shutdown::new(Instant::now(), self.patience));
        messages::say("pressed the guest's power key; a second signal stops it at once");
        None
    }

    /// Releases the key when it is due. While the guest has not complied with a request to power
    /// off, presses it again, and finally returns the end of a guest that took too long.
    pub(super) fn pass(&mut self, now: Instant, devices: &Devices) -> Option<Ending> {
        if self.release.is_some_and(|release| release <= now) {
            self.release = None;
            if let Some(key) = &devices.power_key {
                lock(&**key).set_pressed(false);
            }
        }
        match self.shutdown.as_mut()?.due(now) {
            Due::Nothing => None,
            Due::Press => {
                self.press(devices);
                None
            }
            Due::GiveUp => {
                let seconds = self.patience.unwrap_or_default().as_secs();
                messages::say(&format!(
                    "stopped: the guest did not power off within {seconds} s (--stop-timeout)"
                ));
                Some(Ending::Stopped)
            }
        }
    }

    /// Presses the guest's power key; returns whether it has one.
    pub(super) fn press(&mut self, devices: &Devices) -> bool {
        let Some(key) = &devices.power_key else {
            return false;
        };
        lock(&**key).set_pressed(true);
        self.release = Some(Instant::now() + KEY_HELD);
        true
    }
}
