//! Entropy from the host's kernel (`--rng`).

use crate::backend::Backend;
use anyhow::Result;
use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::rng::Rng;
use rustix::rand::{GetRandomFlags, getrandom};
use std::sync::{Arc, Mutex};

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
