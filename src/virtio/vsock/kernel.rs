//! Sockets that the host's kernel passes on (drivers/vhost/vsock.c): processes of the host use
//! AF_VSOCK with the guest's address, and the guest's kicks and interrupts do not come by us.

use crate::virtio::Backend;
use crate::virtio::vhost::Vhost;
use anyhow::{Context, Result, anyhow};
use armlet_devices::sync::lock;
use armlet_devices::virtio::{
    ConfigSpace, Driver, Link, Source, StartError, VirtioDevice, Virtqueue,
};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

const PATH: &str = "/dev/vhost-vsock";
/// Device ID (virtio 1.2, section 5.10).
const ID: u32 = 19;
/// VIRTIO_VSOCK_F_SEQPACKET, the one feature of its own that the kernel may have.
const FEATURE_SEQPACKET: u64 = 1 << 1;
/// Entries of the queues to and from the guest, and of the one for events. That one stays ours
/// and has none: they are for guests that were moved to another host.
const ENTRIES: [u16; 3] = [256, 256, 8];
/// The queues that the kernel works on, by their numbers here and there.
const RINGS: [usize; 2] = [0, 1];

/// An address that is the guest's, on this host.
#[derive(Debug)]
pub(super) struct KernelVsock {
    cid: u32,
    features: u64,
    claim: Arc<Claim>,
}

/// The kernel's device that holds the address. Each driver that starts gets a new one: when it is
/// closed the kernel resets the connections of the guest that was.
#[derive(Debug)]
struct Claim {
    cid: u32,
    vhost: Mutex<Option<Vhost>>,
}

impl KernelVsock {
    pub(super) fn open(cid: u32) -> Result<KernelVsock> {
        let vhost = claim(cid)?;
        let features = vhost
            .features()
            .with_context(|| format!("cannot use {PATH}"))?;
        Ok(KernelVsock {
            cid,
            features: features & FEATURE_SEQPACKET,
            claim: Arc::new(Claim {
                cid,
                vhost: Mutex::new(Some(vhost)),
            }),
        })
    }
}

/// Takes the address.
fn claim(cid: u32) -> Result<Vhost> {
    let vhost = Vhost::open(PATH).map_err(|error| match error.kind() {
        ErrorKind::PermissionDenied => anyhow!(
            "cannot open {PATH}: {error}; become a member of the group that owns it, or use \
             uds=PATH, which needs no rights"
        ),
        // No such file, or a file whose module is not there.
        _ => anyhow!(
            "cannot open {PATH}: {error}; 'modprobe vhost_vsock' brings it where the host's \
             kernel has it, and uds=PATH does without"
        ),
    })?;
    vhost
        .set_owner()
        .with_context(|| format!("cannot use {PATH}"))?;
    vhost
        .set_vsock_cid(cid)
        .map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => {
                anyhow!(
                    "cannot take cid {cid}: another guest of this host has it; choose another cid="
                )
            }
            _ => anyhow!("cannot take cid {cid}: {error}; choose another cid="),
        })?;
    Ok(vhost)
}

impl Claim {
    /// The kernel's device for a driver that starts.
    fn take(&self) -> Result<Vhost> {
        let kept = lock(&self.vhost).take();
        kept.map_or_else(|| claim(self.cid), Ok)
    }

    /// Holds the address until the next driver starts.
    fn renew(&self) {
        match claim(self.cid) {
            Ok(vhost) => {
                *lock(&self.vhost) = Some(vhost);
            }
            // The next driver tries again, and hears it.
            Err(error) => log::warn!("vsock: {error:#}"),
        }
    }
}

impl Backend for KernelVsock {
    fn name(&self) -> String {
        "vsock".to_owned()
    }

    fn device(&self) -> Result<Arc<Mutex<dyn VirtioDevice>>> {
        let errors = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context("cannot make an eventfd")?;
        Ok(Arc::new(Mutex::new(KernelDevice {
            config: ConfigSpace::new(u64::from(self.cid).to_le_bytes().to_vec()),
            features: self.features,
            claim: Arc::clone(&self.claim),
            errors,
            running: None,
        })))
    }
}

/// The device as a guest sees it.
struct KernelDevice {
    config: Arc<ConfigSpace>,
    features: u64,
    claim: Arc<Claim>,
    /// Written by the kernel when it gives up on a ring.
    errors: EventFd,
    running: Option<Running>,
}

struct Running {
    vhost: Vhost,
    link: Arc<Link>,
    /// The kicks of those of [`RINGS`] that the driver has set up; the kernel works on both or on
    /// none.
    kicks: [Option<Arc<EventFd>>; 2],
}

impl KernelDevice {
    fn run(&self, driver: &mut Driver) -> Result<(Vhost, [Option<Arc<EventFd>>; 2])> {
        let mut kicks = [None, None];
        let vhost = self.claim.take()?;
        vhost.set_features(driver.features & vhost.features()?)?;
        vhost.set_memory(&driver.memory)?;
        for index in RINGS {
            let queue = driver.take(index);
            let queue = queue.with_context(|| format!("the driver left queue {index} out"))?;
            self.set_ring(&vhost, &queue)?;
            kicks[index] = Some(Arc::clone(queue.kick()));
        }
        vhost.set_vsock_running(true)?;
        Ok((vhost, kicks))
    }

    fn set_ring(&self, vhost: &Vhost, queue: &Virtqueue) -> Result<()> {
        let index = queue.index();
        let call = queue.link().call(index);
        let call = call.context("the kernel has no way to interrupt the guest")?;
        vhost.set_ring(index.into(), queue, &call, Some(&self.errors))
    }
}

impl VirtioDevice for KernelDevice {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        ENTRIES.to_vec()
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, mut driver: Driver) -> Result<(), StartError> {
        match self.run(&mut driver) {
            Ok((vhost, kicks)) => {
                let link = driver.link;
                self.running = Some(Running { vhost, link, kicks });
                Ok(())
            }
            Err(error) => {
                self.claim.renew();
                Err(StartError(format!("{error:#}")))
            }
        }
    }

    fn stop(&mut self) {
        if let Some(Running { vhost, .. }) = self.running.take() {
            // When this returns the kernel is out of guest memory, and the address is free.
            drop(vhost);
            self.claim.renew();
        }
    }

    fn stop_queue(&mut self, queue: usize) {
        let Some(running) = &mut self.running else {
            return;
        };
        let Some(kick) = running.kicks.get_mut(queue) else {
            return;
        };
        *kick = None;
        let stopped = running.vhost.set_vsock_running(false);
        let cleared = stopped.and_then(|()| running.vhost.clear_ring(queue as u32));
        if let Err(error) = cleared {
            running.link.broken(format_args!(
                "the kernel does not stop queue {queue}: {error:#}"
            ));
            // Without its device it is out of guest memory for sure.
            self.stop();
        }
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError> {
        let index = usize::from(queue.index());
        let Some(running) = self.running.as_ref().filter(|_| RINGS.contains(&index)) else {
            return Ok(());
        };
        let set = self.set_ring(&running.vhost, &queue);
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        set.and_then(|()| {
            running.kicks[index] = Some(Arc::clone(queue.kick()));
            let [Some(first), Some(second)] = &running.kicks else {
                return Ok(());
            };
            running.vhost.set_vsock_running(true)?;
            // The kernel takes kicks of the other ring while it does not work, and forgets them
            // (drivers/vhost/vsock.c: vhost_vsock_handle_tx_kick). The counters cannot overflow.
            let _ = (first.write(1), second.write(1));
            Ok(())
        })
        .map_err(|error| StartError(format!("{error:#}")))
    }

    fn kicked(&mut self, _queue: usize) {}

    fn takes_kicks(&self) -> bool {
        false
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: self.errors.as_raw_fd(),
            output: false,
            edge: false,
        }]
    }

    fn ready(&mut self, _source: usize) {
        if self.errors.read().is_ok()
            && let Some(running) = &self.running
        {
            running
                .link
                .broken(format_args!("the host's kernel finds a ring wrong"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_it_says_what_would_work() {
        let Err(error) = KernelVsock::open(3) else {
            println!("skipped: this host has {PATH}");
            return;
        };
        assert!(error.to_string().contains("uds=PATH"), "{error:#}");
    }
}
