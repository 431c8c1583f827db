//! The memory balloon (`--balloon`): what the guest does not need goes back to the host.

mod target;

pub use target::BalloonTarget;

use crate::backend::Backend;
use crate::kind::{DeviceOptions, Guest, Kind, Need, Place};
use crate::options::Options;
use crate::pages;
use anyhow::{Result, bail};
use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::balloon::{Balloon, Discard, Offer};
use armlet_system::page_size::page_size;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const FLAG: &str = "--balloon";

/// The memory balloon.
pub static KIND: Kind = Kind {
    name: "balloon",
    letter: None,
    value: "BALLOON",
    help: "memory balloon: on, or\n[size=SIZE][,reporting=on|off][,deflate-on-oom=on|off]",
    repeats: false,
    slot: 5,
    default: None,
    parse: |text, guest| {
        let balloon = BalloonOptions::parse(text, guest.parse_size)?;
        Ok(Some(Box::new(balloon)))
    },
};

/// A balloon for the guest, through all its starts.
pub struct GuestBalloon {
    offer: Offer,
    target: BalloonTarget,
}

/// A balloon as the user asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonOptions {
    /// Bytes that it takes from the guest, which is to have more than that.
    pub target: u64,
    /// Whether the guest says which pages are free.
    pub reporting: bool,
    /// Whether the guest may take pages back before it runs out of memory.
    pub deflate_on_oom: bool,
}

impl BalloonOptions {
    /// Reads the value of `--balloon`; `parse_size` reads a size.
    ///
    /// # Errors
    /// A value that makes no sense.
    pub fn parse(
        text: &str,
        parse_size: impl Fn(&str) -> Result<u64, String>,
    ) -> Result<BalloonOptions> {
        let mut options = Options::parse(FLAG, text, &[])?;
        // For a balloon with nothing to say of it.
        let _ = options.switch("on")?;
        let size = options.take("size")?.unwrap_or_else(|| "0".to_owned());
        let reporting = options.toggle("reporting")?.unwrap_or(true);
        let deflate_on_oom = options.toggle("deflate-on-oom")?.unwrap_or(true);
        options.finish()?;
        let target = match parse_size(&size) {
            Ok(target) => target,
            Err(what) => bail!("{FLAG} '{text}': {what}"),
        };
        Ok(BalloonOptions {
            target,
            reporting,
            deflate_on_oom,
        })
    }

    /// The balloon.
    #[must_use]
    pub fn open(&self, memory: u64) -> GuestBalloon {
        GuestBalloon {
            offer: Offer {
                reporting: self.reporting,
                // It is made for migration.
                hinting: false,
                deflate_on_oom: self.deflate_on_oom,
            },
            target: BalloonTarget::new(self.target, memory),
        }
    }
}

impl DeviceOptions for BalloonOptions {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn check_for(&self, guest: &Guest) -> Result<()> {
        if self.target >= guest.memory {
            let (target, memory) = (self.target, guest.memory);
            let what = target::too_large((guest.show_size)(target), (guest.show_size)(memory));
            bail!("{FLAG}: {what}");
        }
        Ok(())
    }

    fn needs(&self) -> Vec<Need> {
        vec![Need::Thread, Need::Storage]
    }

    fn open_backend(&self, place: &Place<'_>) -> Result<Box<dyn Backend>> {
        Ok(Box::new(self.open(place.memory)))
    }
}

impl Backend for GuestBalloon {
    fn name(&self) -> String {
        "balloon".to_owned()
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        let pages = Box::new(HostPages::default());
        let balloon = Balloon::new(self.target.get(), self.offer, pages);
        Ok(Arc::new(Mutex::new(balloon)))
    }

    fn takes_memory(&self) -> bool {
        true
    }

    fn balloon(&self) -> Option<&BalloonTarget> {
        Some(&self.target)
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
        page_size() as u64
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
        let parse_size = |text: &str| match text.strip_suffix('M') {
            Some(number) => number
                .parse()
                .map(|number: u64| number << 20)
                .map_err(|_| text.into()),
            None => text.parse().map_err(|_| format!("size '{text}'")),
        };
        BalloonOptions::parse(text, parse_size).map(|options| options.open(1 << 30))
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
        assert_eq!(balloon.target.get(), 0);
        let balloon = open("size=512M,reporting=off,deflate-on-oom=off").expect("valid");
        let others = Offer {
            reporting: false,
            hinting: false,
            deflate_on_oom: false,
        };
        assert_eq!(balloon.offer, others);
        assert_eq!(balloon.target.get(), 512 << 20);
    }

    #[test]
    fn what_is_wrong_is_said_with_what_would_work() {
        let wrong = |text| open(text).map(|_| ()).expect_err(text).to_string();
        assert!(wrong("size=lots").contains("'size=lots'"));
        assert!(wrong("reporting=perhaps").contains("use on or off"));
        assert!(wrong("bigger").contains("use on, size, reporting, deflate-on-oom"));
        assert!(wrong("").contains("an empty part"));
    }

    #[test]
    fn what_nobody_hears_is_not_offered() {
        // Free page hints (VIRTIO_BALLOON_F_FREE_PAGE_HINT, bit 3) are asked for by migration.
        let error = open("hinting=on")
            .map(|_| ())
            .expect_err("it has no effect");
        assert!(error.to_string().contains("hinting"), "{error}");
        let balloon = open("size=256M").expect("valid");
        let device = balloon.device().expect("a device");
        assert_eq!(device.lock().expect("sound").features() & 1 << 3, 0);
    }
}
