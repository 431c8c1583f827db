//! The memory balloon (`--balloon`): what the guest does not need goes back to the host.

use super::Backend;
use super::options::Options;
use super::pages;
use anyhow::{Result, bail};
use armlet_arch::size::{parse_memory, show_size};
use armlet_devices::sync::lock;
use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::balloon::{Balloon, Discard, Offer};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const FLAG: &str = "--balloon";

/// A balloon for the guest, through all its starts.
pub struct GuestBalloon {
    offer: Offer,
    /// Bytes that it should hold.
    target: AtomicU64,
    /// Bytes of the guest's memory.
    memory: u64,
    /// The device of the guest that runs now.
    current: Mutex<Option<Arc<Mutex<Balloon>>>>,
}

/// A balloon as the user asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonOptions {
    offer: Offer,
    /// Bytes that it should hold at first.
    target: u64,
    /// Bytes of the guest's memory.
    memory: u64,
}

impl BalloonOptions {
    /// Reads the value of `--balloon`, for a guest with `memory` bytes.
    ///
    /// # Errors
    /// A value that makes no sense, or asks for more than there is.
    pub fn parse(text: &str, memory: u64) -> Result<BalloonOptions> {
        let mut options = Options::parse(FLAG, text, &[])?;
        // For a balloon with nothing to say of it.
        let _ = options.switch("on")?;
        let size = options.take("size")?.unwrap_or_else(|| "0".to_owned());
        let offer = Offer {
            reporting: options.toggle("reporting")?.unwrap_or(true),
            hinting: options.toggle("hinting")?.unwrap_or(false),
            deflate_on_oom: options.toggle("deflate-on-oom")?.unwrap_or(true),
        };
        options.finish()?;
        let target = match parse_memory(&size) {
            Ok(target) => target,
            Err(what) => bail!("{FLAG} '{text}': {what}"),
        };
        check_target(target, memory)?;
        Ok(BalloonOptions {
            offer,
            target,
            memory,
        })
    }

    /// The balloon.
    #[must_use]
    pub fn open(&self) -> GuestBalloon {
        GuestBalloon {
            offer: self.offer,
            target: AtomicU64::new(self.target),
            memory: self.memory,
            current: Mutex::default(),
        }
    }
}

/// Refuses a balloon of `bytes` that takes all of `memory`.
fn check_target(bytes: u64, memory: u64) -> Result<()> {
    if bytes >= memory {
        bail!(
            "{FLAG}: a balloon of {} leaves nothing of the guest's {}; use less, and leave it what it needs to run",
            show_size(bytes),
            show_size(memory)
        );
    }
    Ok(())
}

impl GuestBalloon {
    /// The balloon should hold this many bytes from now on, in this guest and those after it.
    ///
    /// # Errors
    /// As much as the guest has, or more.
    pub fn set_target(&self, bytes: u64) -> Result<()> {
        check_target(bytes, self.memory)?;
        self.target.store(bytes, Ordering::Relaxed);
        if let Some(balloon) = self.current() {
            lock(&balloon).set_target(bytes);
        }
        Ok(())
    }

    /// The device of the guest that runs now: its size, its statistics, its hints.
    #[must_use]
    pub fn current(&self) -> Option<Arc<Mutex<Balloon>>> {
        lock(&self.current).clone()
    }
}

impl Backend for GuestBalloon {
    fn name(&self) -> String {
        "balloon".to_owned()
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        let mut current = lock(&self.current);
        let target = self.target.load(Ordering::Relaxed);
        let balloon = Balloon::new(target, self.offer, Box::new(HostPages::default()));
        let balloon = Arc::new(Mutex::new(balloon));
        *current = Some(Arc::clone(&balloon));
        Ok(balloon)
    }

    fn takes_memory(&self) -> bool {
        true
    }

    /// Giving back gigabytes takes the host a while.
    fn is_busy(&self) -> bool {
        true
    }
}

/// The host's pages beneath the guest's memory.
#[derive(Debug, Default)]
struct HostPages {
    complained: AtomicBool,
}

impl Discard for HostPages {
    fn page_size(&self) -> u64 {
        rustix::param::page_size() as u64
    }

    fn discard(&self, memory: &GuestMemoryMmap, address: GuestAddress, len: u64) -> bool {
        let Err(error) = pages::discard(memory, address, len) else {
            return true;
        };
        if !self.complained.swap(true, Ordering::Relaxed) {
            log::warn!(
                "balloon: the host does not take back {len} bytes of guest memory at {:#x}: {error}",
                address.0
            );
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(text: &str) -> Result<GuestBalloon> {
        BalloonOptions::parse(text, 1 << 30).map(|options| options.open())
    }

    #[test]
    fn options_say_what_is_offered() {
        let balloon = open("on").expect("valid");
        let defaults = Offer {
            reporting: true,
            hinting: false,
            deflate_on_oom: true,
        };
        assert_eq!(balloon.offer, defaults);
        assert_eq!(balloon.target.load(Ordering::Relaxed), 0);
        let balloon = open("size=512M,reporting=off,hinting,deflate-on-oom=off").expect("valid");
        let others = Offer {
            reporting: false,
            hinting: true,
            deflate_on_oom: false,
        };
        assert_eq!(balloon.offer, others);
        assert_eq!(balloon.target.load(Ordering::Relaxed), 512 << 20);
    }

    #[test]
    fn what_is_wrong_is_said_with_what_would_work() {
        let wrong = |text| open(text).map(|_| ()).expect_err(text).to_string();
        assert!(wrong("size=1G").contains("leaves nothing of the guest's 1G"));
        assert!(wrong("size=512").contains("write 512M"));
        assert!(wrong("size=lots").contains("'size=lots'"));
        assert!(wrong("reporting=perhaps").contains("use on or off"));
        assert!(wrong("bigger").contains("use on, size, reporting, hinting, deflate-on-oom"));
        assert!(wrong("").contains("an empty part"));
    }

    #[test]
    fn the_target_outlives_a_guest() {
        let balloon = open("size=256M").expect("valid");
        assert!(balloon.current().is_none());
        balloon.device().expect("a device");
        let first = balloon.current().expect("a device");
        assert_eq!(lock(&first).target(), 256 << 20);
        balloon.set_target(512 << 20).expect("it fits");
        assert_eq!(lock(&first).target(), 512 << 20);
        assert!(balloon.set_target(1 << 30).is_err());
        balloon.device().expect("a device");
        let second = balloon.current().expect("a device");
        assert!(!Arc::ptr_eq(&first, &second));
        assert_eq!(lock(&second).target(), 512 << 20);
    }
}
