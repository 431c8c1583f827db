//! Entropy from the host's kernel (`--rng`).

use crate::backend::Backend;
use crate::kind::{DeviceOptions, Kind, Place};
use anyhow::{Result, bail};
use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::rng::Rng;
use rustix::rand::{GetRandomFlags, getrandom};
use std::sync::{Arc, Mutex};

/// Random numbers.
pub static KIND: Kind = Kind {
    name: "rng",
    letter: None,
    value: "on|off",
    help: "entropy for the guest: on (default) or off",
    repeats: false,
    slot: 7,
    default: Some("on"),
    parse: |text, _| match text {
        "on" => Ok(Some(Box::new(RngOptions))),
        "off" => Ok(None),
        other => bail!("--rng '{other}' is not known; use on or off"),
    },
};

/// Random numbers as they are asked for: there is nothing to say of them.
#[derive(Clone, Copy, Debug)]
pub struct RngOptions;

impl DeviceOptions for RngOptions {
    fn kind(&self) -> &'static Kind {
        &KIND
    }

    fn open_backend(&self, _place: &Place<'_>) -> Result<Box<dyn Backend>> {
        Ok(Box::new(HostEntropy))
    }
}

/// The host's random number generator.
#[derive(Clone, Copy, Debug)]
pub struct HostEntropy;

impl Backend for HostEntropy {
    fn name(&self) -> String {
        "rng".to_owned()
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        Ok(Arc::new(Mutex::new(Rng::new(Box::new(fill)))))
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
