//! What a fuzz target says of its device and of the world around it.

use std::sync::Mutex;

use armlet_devices::virtio::VirtioDevice;
use armlet_devices::virtio::mmio::Mmio;

use super::super::input::Input;
use super::lock;

/// A device and the world around it.
pub trait Subject {
    type Device: VirtioDevice + 'static;

    /// Bytes that a driver would write for a request in this queue.
    fn payload(&mut self, queue: usize, input: &mut Input<'_>) -> Vec<u8>;

    /// Something happens in the world.
    fn event(&mut self, device: &Mutex<Self::Device>, input: &mut Input<'_>);

    /// The device is called for its kicks, as long as there are any. Returns whether it was.
    fn kicks(&mut self, guest: &mut Mmio, device: &Mutex<Self::Device>) -> bool {
        let mut was_kicked = false;
        for (queue, kick) in guest.kicks().to_vec().iter().enumerate() {
            if kick.read().is_ok() {
                lock(device).kicked(queue);
                was_kicked = true;
            }
        }
        was_kicked
    }

    /// Nothing keeps the device from its work any more; it is called as often as it takes.
    fn finish(&mut self, device: &Mutex<Self::Device>) {
        let _ = device;
    }

    /// Whether a queue is empty then, if the driver did not break it.
    fn is_drained(&self, queue: usize) -> bool;

    /// Whether nothing holds the device up now: then what it was kicked for is done.
    fn is_idle(&self) -> bool {
        false
    }

    /// Nothing stands in the way of a device that starts again.
    fn heal(&mut self, device: &Mutex<Self::Device>) {
        let _ = device;
    }

    /// Another device of the same kind, that no driver has touched, in the same world.
    fn fresh(&mut self) -> Option<Self::Device>;

    /// Whether another process works on the rings now.
    fn has_other_worker(&self) -> bool {
        false
    }

    /// Guest memory that the world was told to change: address, bytes.
    fn touched(&mut self) -> Vec<(u64, u64)> {
        Vec::new()
    }
}
