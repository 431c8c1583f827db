//! The queues of a TAP that the host's kernel works on (vhost-net, drivers/vhost/net.c): frames
//! go between guest and TAP without armlet.

use super::tap::Tap;
use crate::vhost::Vhost;
use anyhow::{Context, Result, anyhow, bail};
use armlet_devices::sync;
use armlet_devices::virtio::net::{Network, Rings, SourceEvent, feature};
use armlet_devices::virtio::{
    FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1, Link, Source, Virtqueue,
};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// The device of vhost-net.
const PATH: &str = "/dev/vhost-net";
/// Features that are the kernel's part, all of which the driver may choose.
const FEATURES: u64 = FEATURE_VERSION_1 | FEATURE_INDIRECT | FEATURE_EVENT_IDX | feature::MRG_RXBUF;
/// A vhost-net's rings: frames for the guest, frames from the guest.
const RINGS: [u32; 2] = [0, 1];

/// A TAP of which the kernel moves the frames.
#[derive(Clone)]
pub struct VhostNet {
    tap: Arc<Tap>,
    /// One for each of the TAP's queues.
    kernel: Arc<Vec<Vhost>>,
    /// The kernel writes to it when the driver broke a ring.
    errors: Arc<EventFd>,
    /// The rings in use: pairs, and the ring of each.
    rings: Vec<(usize, u32)>,
}

impl VhostNet {
    /// Has the kernel work for `tap`.
    ///
    /// # Errors
    /// A host without vhost-net, or no right to it, and what would help.
    pub fn open(tap: &Arc<Tap>) -> Result<VhostNet> {
        let open = || -> Result<Vhost> {
            let kernel = Vhost::open(PATH).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => {
                    anyhow!("this host has no {PATH}; load it with 'modprobe vhost_net'")
                }
                io::ErrorKind::PermissionDenied => anyhow!(
                    "no permission for {PATH}; run as root or in the group that may open it"
                ),
                _ => anyhow!("cannot open {PATH}: {error}"),
            })?;
            kernel.set_owner()?;
            let features = kernel.features()?;
            if features & FEATURES != FEATURES {
                bail!("this host's vhost-net has features {features:#x} and lacks some needed");
            }
            Ok(kernel)
        };
        let kernel = tap.queues().iter().map(|_| open()).collect::<Result<_>>()?;
        let errors = sync::bell().context("cannot make an eventfd")?;
        Ok(VhostNet {
            tap: Arc::clone(tap),
            kernel: Arc::new(kernel),
            errors: Arc::new(errors),
            rings: Vec::new(),
        })
    }

    fn begin(
        &mut self,
        features: u64,
        memory: &GuestMemoryMmap,
        queues: &[Virtqueue],
    ) -> Result<()> {
        // An error of the driver before this one.
        let _ = self.errors.read();
        for kernel in &*self.kernel {
            kernel.set_features(features & FEATURES)?;
            kernel.set_memory(memory)?;
        }
        queues.iter().try_for_each(|queue| self.begin_queue(queue))
    }

    fn begin_queue(&mut self, queue: &Virtqueue) -> Result<()> {
        let (pair, ring) = place(queue.index());
        let call = queue
            .link()
            .call(queue.index())
            .context("vhost-net cannot interrupt this guest; use vhost=off")?;
        self.rings.push((pair, ring));
        let kernel = &self.kernel[pair];
        kernel.set_ring(ring, queue, &call, Some(&self.errors))?;
        kernel.set_net_backend(ring, Some(&self.tap.queues()[pair]))
    }

    /// Has the kernel out of a ring. Returns which request it would have taken next, if it tells.
    fn end_ring(&self, (pair, ring): (usize, u32)) -> Option<u16> {
        let kernel = &self.kernel[pair];
        // First the work ends, and then the ring can be cleared.
        let stopped = kernel.set_net_backend(ring, None::<&OwnedFd>);
        let cleared = kernel.clear_ring(ring);
        stopped
            .and(cleared)
            .inspect_err(|error| log::warn!("vhost-net: {error:#}"))
            .ok()
    }
}

/// The pair of a queue, and its ring in the pair's vhost-net.
fn place(queue: u16) -> (usize, u32) {
    let index = usize::from(queue);
    (index / 2, RINGS[index % 2])
}

impl Network for VhostNet {
    fn offloads(&self) -> u64 {
        self.tap.offloads()
    }

    fn pairs(&self) -> u16 {
        self.kernel.len() as u16
    }

    fn mtu(&self) -> Option<u16> {
        self.tap.mtu()
    }

    fn is_up(&self) -> bool {
        self.tap.is_up()
    }

    fn sources(&self) -> Vec<Source> {
        let errors = Source {
            fd: self.errors.as_raw_fd(),
            output: false,
            edge: false,
        };
        std::iter::once(errors).chain(self.tap.changes()).collect()
    }

    fn woken(&mut self, source: usize) -> SourceEvent {
        if source > 0 {
            return self.tap.changed();
        }
        match self.errors.read() {
            Ok(_) => SourceEvent::Broken("the kernel finds a ring wrong".to_owned()),
            Err(_) => SourceEvent::Nothing,
        }
    }

    fn configure(&mut self, pairs: u16, offloads: u64) -> Result<(), String> {
        self.tap.configure(pairs, offloads)
    }
}

impl Rings for VhostNet {
    fn start(
        &mut self,
        features: u64,
        memory: &GuestMemoryMmap,
        queues: &[Virtqueue],
        _link: &Link,
    ) -> Result<(), String> {
        self.begin(features, memory, queues).map_err(|error| {
            let _ = self.stop();
            format!("{error:#}")
        })
    }

    fn stop(&mut self) -> Vec<(u16, u16)> {
        let rings = std::mem::take(&mut self.rings).into_iter();
        let end = |(pair, ring): (usize, u32)| {
            let queue = 2 * pair as u16 + ring as u16;
            Some((queue, self.end_ring((pair, ring))?))
        };
        rings.filter_map(end).collect()
    }

    fn start_queue(&mut self, queue: &Virtqueue) -> Result<(), String> {
        self.begin_queue(queue).map_err(|error| {
            self.stop_queue(queue.index());
            format!("{error:#}")
        })
    }

    fn stop_queue(&mut self, queue: u16) {
        let place = place(queue);
        if let Some(at) = self.rings.iter().position(|known| *known == place) {
            let place = self.rings.remove(at);
            self.end_ring(place);
        }
    }
}
