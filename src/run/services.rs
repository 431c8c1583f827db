//! Who is served beside the guest: clients that control the machine, a debugger, readers of metrics.
//!
//! Sockets are opened before armlet confines itself ([`Asked::open`]), and threads start after it
//! ([`Services::start`]). All of it is out of line: most guests have none.

use super::queue::Commands;
use crate::config::Config;
use crate::control::{Control, Fixed};
use crate::gdb::{self, Debugger};
use crate::kvm::KvmArch;
use crate::metrics::{self, Metrics};
use crate::sandbox::{Role, Sandbox};
use crate::vcpu::Traps;
use anyhow::Result;
use armlet_backends::broker::Broker;
use armlet_backends::kind::Need;
use armlet_system::status::{Fault, Status};
use kvm_ioctls::Kvm;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

/// Starts a thread that serves clients while the guest runs. It calls the first argument there before
/// anything else, by which it is confined, and sends commands by the second.
pub type Service = Box<dyn FnOnce(Begin, Commands) -> Result<()>>;

/// Confines the thread that calls it.
pub type Begin = Box<dyn FnOnce() -> Result<()> + Send>;

/// Who is to be served.
pub(super) struct Asked {
    /// Where to listen for clients that control the machine.
    pub(super) control: Option<PathBuf>,
    /// Where to listen for a debugger.
    pub(super) gdb: Option<gdb::Address>,
    /// Where metrics go.
    pub(super) metrics: Option<metrics::Target>,
    /// Serves clients once armlet is confined.
    pub(super) service: Option<Service>,
    /// Whether others send commands to the event loop.
    pub(super) is_commanded: bool,
}

impl Asked {
    /// Returns whether clients may change and save the machine.
    pub(super) fn has_clients(&self) -> bool {
        self.control.is_some() || self.service.is_some() || self.is_commanded
    }

    /// Returns whether a broker has files to remove at the end.
    pub(super) fn needs_broker(&self) -> bool {
        let has_readers = matches!(self.metrics, Some(metrics::Target::Socket(_)));
        self.has_clients() || self.gdb.is_some() || has_readers
    }

    /// Returns what the threads need of the sandbox.
    pub(super) fn needs(&self) -> Vec<Need> {
        let mut needs = Vec::new();
        if self.gdb.is_some() {
            needs.extend([Need::Sockets, Need::Debugger]);
        }
        needs.extend(self.metrics.iter().flat_map(metrics::Target::needs));
        needs
    }

    /// Opens sockets and files, if anybody is to be served. `broker` removes the sockets at the end.
    ///
    /// # Errors
    /// What cannot be opened, and a debugger that KVM has no means for.
    pub(super) fn open(self, kvm: &Kvm, broker: Option<&Broker>) -> Result<Option<Services>> {
        match self {
            Asked {
                control: None,
                gdb: None,
                metrics: None,
                service: None,
                ..
            } => Ok(None),
            asked => Services::open(asked, kvm, broker).map(Some),
        }
    }
}

/// Who is served, from what was opened.
pub(super) struct Services {
    control: Option<Control>,
    debugger: Option<Debugger>,
    metrics: Option<Metrics>,
    service: Option<Service>,
}

impl Services {
    #[cold]
    #[inline(never)]
    fn open(asked: Asked, kvm: &Kvm, broker: Option<&Broker>) -> Result<Services> {
        let Asked {
            control,
            gdb,
            metrics,
            service,
            is_commanded: _,
        } = asked;
        let control = control.map(|path| listen(&path, broker));
        let control = control.transpose().fault(Status::Usage)?;
        let debugger = gdb.map(|address| listen_to_gdb(&address, kvm, broker));
        let debugger = debugger.transpose().fault(Status::Usage)?;
        let metrics = metrics.map(|target| Metrics::open(&target, broker));
        Ok(Services {
            control,
            debugger,
            metrics: metrics.transpose().fault(Status::Usage)?,
            service,
        })
    }

    /// Returns whether exits are to be counted for readers of metrics.
    pub(super) fn counts_exits(&self) -> bool {
        self.metrics.is_some()
    }

    /// Returns where the debugger's thread and the vCPUs meet.
    pub(super) fn traps(&self) -> Option<Arc<Traps>> {
        let debugger = self.debugger.as_ref();
        debugger.map(|debugger| Arc::clone(debugger.traps()))
    }

    /// Starts the threads, each confined before anything else.
    ///
    /// # Errors
    /// A thread that cannot be started.
    #[cold]
    #[inline(never)]
    pub(super) fn start<A: KvmArch>(
        self,
        commands: &Commands,
        sandbox: &Arc<Sandbox>,
        memory: &Arc<GuestMemoryMmap>,
        config: &Config<A>,
    ) -> Result<()> {
        let begin = || sandbox.entrance(Role::Device);
        let told = || {
            let commands = commands.clone();
            move |command| commands.send(command)
        };
        if let Some(service) = self.service {
            service(Box::new(begin()), commands.clone()).fault(Status::Host)?;
        }
        if let Some(metrics) = self.metrics {
            metrics.start(begin(), told()).fault(Status::Host)?;
        }
        if let Some(control) = self.control {
            let started = control.start(begin(), told(), fixed(config));
            started.fault(Status::Host)?;
        }
        if let Some(debugger) = self.debugger {
            let vcpus = config.request.cpus as usize;
            let started = debugger.start(begin(), told(), Arc::clone(memory), vcpus);
            started.fault(Status::Host)?;
        }
        Ok(())
    }
}

/// Listens at the control socket.
fn listen(path: &Path, broker: Option<&Broker>) -> Result<Control> {
    let control = Control::listen(path)?;
    if let Some(broker) = broker {
        broker.offer_removal(path)?;
    }
    Ok(control)
}

/// Listens for a debugger, by TCP or at a socket in the file system.
fn listen_to_gdb(address: &gdb::Address, kvm: &Kvm, broker: Option<&Broker>) -> Result<Debugger> {
    let debugger = Debugger::listen(address, kvm)?;
    if let (gdb::Place::Unix(path), Some(broker)) = (&address.place, broker) {
        broker.offer_removal(path)?;
    }
    Ok(debugger)
}

/// What clients are told of the machine.
fn fixed<A: KvmArch>(config: &Config<A>) -> Fixed {
    Fixed {
        vcpus: config.request.cpus,
        memory: config.request.memory,
        devices: config
            .virtio
            .iter()
            .map(|device| device.name().to_owned())
            .collect(),
    }
}
