//! Entropy from the host's kernel (`--rng`).

use crate::backend::{Backend, Flow};
use crate::kind::{DeviceOptions, Kind, Place};
use crate::options::Options;
use crate::timer;
use anyhow::{Context, Result, bail};
use armlet_devices::rate::{Limits, Throttle};
use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::rng::Rng;
use rustix::rand::{GetRandomFlags, getrandom};
use std::sync::{Arc, Mutex};

/// Random numbers.
pub static KIND: Kind = Kind {
    name: "rng",
    letter: None,
    value: "on|off",
    help: "entropy for the guest: on (default), off, or limits:\n\
        bps=SIZE[,iops=N]",
    repeats: false,
    slot: 7,
    default: Some("on"),
    parse: |text, _| match text {
        "on" => Ok(Some(Box::new(RngOptions::default()))),
        "off" => Ok(None),
        other => {
            let mut options = Options::parse("--rng", other, &[])?;
            let limits = options.limits("bps", "iops")?;
            if limits == Limits::default() {
                bail!("--rng '{other}' is not known; use on, off or limits: bps=SIZE, iops=N");
            }
            options.finish()?;
            Ok(Some(Box::new(RngOptions { limits })))
        }
    },
};

/// Random numbers as they are asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct RngOptions {
    /// How many bytes, and in how many requests, the guest gets in how much time.
    pub limits: Limits,
}

impl DeviceOptions for RngOptions {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn open_backend(&self, place: &Place<'_>) -> Result<Box<dyn Backend>> {
        let throttle = timer::throttle(&self.limits, place.changes);
        let throttle = throttle.context("cannot make the timer of rng")?;
        Ok(Box::new(HostEntropy { throttle }))
    }
}

/// The host's random number generator.
struct HostEntropy {
    throttle: Option<Arc<Throttle>>,
}

impl Backend for HostEntropy {
    fn name(&self) -> String {
        "rng".to_owned()
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        let device = Rng::new(Box::new(fill)).held_to(self.throttle.clone());
        Ok(Arc::new(Mutex::new(device)))
    }

    fn throttle(&self, flow: Flow) -> Option<&Throttle> {
        self.throttle.as_deref().filter(|_| flow == Flow::All)
    }
}

/// Up to 256 bytes come whole and at once, once the host has started
/// (drivers/char/random.c: getrandom).
fn fill(buffer: &mut [u8]) -> bool {
    getrandom(&mut *buffer, GetRandomFlags::NONBLOCK).is_ok_and(|count| count == buffer.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_fill_the_buffer_and_differ_each_time() {
        let (mut first, mut second) = ([0; 256], [0; 256]);
        assert!(fill(&mut first) && fill(&mut second));
        assert_ne!(first, second);
        // The last bytes too: 16 zeros in a row come once in 2^128 times.
        assert_ne!(first[240..], [0; 16]);
        assert!(fill(&mut []), "nothing is wanted");
    }
}
