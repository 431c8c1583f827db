//! Sockets that the host's kernel passes on (drivers/vhost/vsock.c): processes of the host use
//! AF_VSOCK with the guest's address, and the guest's kicks and interrupts do not come by us.

use crate::backend::Backend;
use crate::broker::{Broker, Service, ServiceId};
use crate::vhost::Vhost;
use anyhow::{Context, Result, anyhow, bail};
use armlet_devices::sync::{self, lock, ring};
use armlet_devices::virtio::vsock::{EVENTS, Events, VsockState};
use armlet_devices::virtio::{
    ConfigSpace, DeviceState, Driver, Link, Positions, RestoreError, Source, StartError,
    VirtioDevice, Virtqueue, quiesced,
};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

pub(super) const PATH: &str = "/dev/vhost-vsock";
/// Device ID (virtio 1.2, section 5.10).
const ID: u32 = 19;
/// VIRTIO_VSOCK_F_SEQPACKET, the one feature of its own that the kernel may have.
const FEATURE_SEQPACKET: u64 = 1 << 1;
/// Entries of the queues to and from the guest, and of the one for events. That one stays ours: its
/// one event is for guests that go on elsewhere.
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
    broker: Arc<Broker>,
    /// The broker's: opens the device.
    device: ServiceId,
    vhost: Mutex<Option<Vhost>>,
}

impl KernelVsock {
    pub(super) fn open(cid: u32, broker: &Arc<Broker>) -> Result<KernelVsock> {
        let vhost = claim(cid, Vhost::open(PATH))?;
        let features = vhost
            .features()
            .with_context(|| format!("cannot use {PATH}"))?;
        Ok(KernelVsock {
            cid,
            features: features & FEATURE_SEQPACKET,
            claim: Arc::new(Claim {
                cid,
                broker: Arc::clone(broker),
                device: broker.offer(Service::Device(PATH.into()))?,
                vhost: Mutex::new(Some(vhost)),
            }),
        })
    }
}

/// Takes the address.
fn claim(cid: u32, opened: io::Result<Vhost>) -> Result<Vhost> {
    let vhost = opened.map_err(|error| match error.kind() {
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
    fn claim(&self) -> Result<Vhost> {
        let opened = self.broker.get(self.device, 0);
        claim(self.cid, opened.map(Vhost::from))
    }

    /// The kernel's device for a driver that starts.
    fn take(&self) -> Result<Vhost> {
        let kept = lock(&self.vhost).take();
        kept.map_or_else(|| self.claim(), Ok)
    }

    /// Holds the address until the next driver starts.
    fn renew(&self) {
        match self.claim() {
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
        let errors = sync::bell().context("cannot make an eventfd")?;
        Ok(Arc::new(Mutex::new(KernelDevice {
            config: ConfigSpace::new(u64::from(self.cid).to_le_bytes().to_vec()),
            features: self.features,
            claim: Arc::clone(&self.claim),
            errors,
            running: None,
            held: None,
            events: Events::default(),
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
    /// While a driver has the device in use and the machine is held: the kernel's device with the
    /// guest's connections, if they are here.
    held: Option<Option<Vhost>>,
    events: Events,
}

struct Running {
    vhost: Vhost,
    link: Arc<Link>,
    /// Those of [`RINGS`] that the driver has set up; the kernel works on both or on none.
    queues: [Option<Virtqueue>; 2],
}

impl Running {
    /// Has the kernel work on both rings, if both are there.
    fn run(&self) -> Result<()> {
        let [Some(first), Some(second)] = &self.queues else {
            return Ok(());
        };
        self.vhost.set_vsock_running(true)?;
        // The kernel takes kicks of the other ring while it does not work, and forgets them
        // (drivers/vhost/vsock.c: vhost_vsock_handle_tx_kick).
        ring(first.kick());
        ring(second.kick());
        Ok(())
    }
}

impl KernelDevice {
    /// Begins the work, or goes on with the kernel's device that was `held`.
    fn run(&self, driver: &mut Driver, held: Option<Option<Vhost>>) -> Result<Running> {
        let goes_on = held.is_some();
        let vhost = match held.flatten() {
            Some(vhost) => vhost,
            None => {
                let vhost = self.claim.take()?;
                vhost.set_features(driver.features & vhost.features()?)?;
                vhost.set_memory(&driver.memory)?;
                vhost
            }
        };
        let queues = RINGS.map(|index| driver.take(index));
        for (queue, index) in queues.iter().zip(RINGS) {
            match queue {
                Some(queue) => self.set_ring(&vhost, queue)?,
                // It may have stopped one since.
                None if goes_on => {}
                None => bail!("the driver left queue {index} out"),
            }
        }
        let link = Arc::clone(&driver.link);
        let running = Running {
            vhost,
            link,
            queues,
        };
        running.run()?;
        Ok(running)
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
        let held = self.held.take();
        match self.run(&mut driver, held) {
            Ok(running) => {
                self.running = Some(running);
                self.events.set_queue(driver.take(EVENTS));
                self.events.tell();
                Ok(())
            }
            Err(error) => {
                self.claim.renew();
                Err(StartError(format!("{error:#}")))
            }
        }
    }

    fn quiesce(&mut self) -> Positions {
        let Some(mut running) = self.running.take() else {
            return Positions::new();
        };
        let mut stopped = running.vhost.set_vsock_running(false);
        for queue in running.queues.iter_mut().flatten() {
            let base = running.vhost.clear_ring(queue.index().into());
            queue.adopt(base.as_ref().ok().copied());
            stopped = stopped.and(base.map(drop));
        }
        let mut positions = quiesced(running.queues.iter_mut().flatten());
        positions.extend(self.events.quiesce());
        self.held = Some(match stopped {
            Ok(()) => Some(running.vhost),
            Err(error) => {
                log::warn!("vsock: the kernel does not stop: {error:#}; connections are lost");
                // Without its device it is out of guest memory for sure.
                drop(running.vhost);
                self.claim.renew();
                self.events.owe_reset(true);
                None
            }
        });
        positions
    }

    fn save(&self) -> DeviceState {
        let in_use = self.held.is_some();
        DeviceState::Vsock(VsockState {
            in_use,
            // The kernel does not tell.
            had_connections: in_use,
            packets: Vec::new(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Vsock(state) = state else {
            return Err(RestoreError::kind(state));
        };
        // Packets that wait are about connections that are not here.
        self.events.owe_reset(state.had_connections);
        self.held = state.in_use.then_some(None);
        Ok(())
    }

    fn reset(&mut self) {
        self.events = Events::default();
        let running = self.running.take().map(|running| running.vhost);
        let vhost = running.or_else(|| self.held.take().flatten());
        if let Some(vhost) = vhost {
            // When this returns the kernel is out of guest memory, and the address is free.
            drop(vhost);
            self.claim.renew();
        }
        self.held = None;
    }

    fn stop_queue(&mut self, queue: usize) {
        let Some(running) = &mut self.running else {
            return;
        };
        let Some(place) = running.queues.get_mut(queue) else {
            self.events.set_queue(None);
            return;
        };
        *place = None;
        let stopped = running.vhost.set_vsock_running(false);
        let cleared = stopped.and_then(|()| running.vhost.clear_ring(queue as u32));
        if let Err(error) = cleared {
            running.link.broken(format_args!(
                "the kernel does not stop queue {queue}: {error:#}"
            ));
            // Without its device it is out of guest memory for sure.
            self.reset();
        }
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Result<(), StartError> {
        let index = usize::from(queue.index());
        let Some(running) = &self.running else {
            return Ok(());
        };
        if !RINGS.contains(&index) {
            self.events.set_queue(Some(queue));
            self.events.tell();
            return Ok(());
        }
        let set = self.set_ring(&running.vhost, &queue);
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        running.queues[index] = set.is_ok().then_some(queue);
        set.and_then(|()| running.run())
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
        let Err(error) = KernelVsock::open(
            3,
            &Broker::fork(Some(&crate::broker::tests::native())).expect("a process"),
        ) else {
            println!("skipped: this host has {PATH}");
            return;
        };
        assert!(error.to_string().contains("uds=PATH"), "{error:#}");
    }
}
