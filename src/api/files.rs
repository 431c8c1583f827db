//! What requests name before a machine runs: files are opened to see whether they can be, TAPs and
//! sockets are kept.

use super::log_file::LogFile;
use super::metrics::MetricsFile;
use crate::snapshot::{MemoryFrom, Restore};
use armlet_api::model::{
    BackendType, BootSource, Drive, Logger, Metrics, NetworkInterface, SnapshotLoad, Vsock,
};
use armlet_api::{Refusal, Resources};
use armlet_backends::net::mmds::Metadata;
use armlet_backends::net::tap;
use armlet_snapshot::Paths;
use armlet_system::files::{self, Accepted};
use armlet_system::sockets::{self, Access};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

/// Files, TAPs and sockets of a microVM that is being configured.
pub(super) struct Files {
    id: String,
    /// TAPs by the IDs of their interfaces.
    taps: BTreeMap<String, (String, OwnedFd)>,
    vsock: Option<Bound>,
    /// What the guest reads of the metadata service.
    pub(super) metadata: Metadata,
    pub(super) metrics: MetricsFile,
    /// The snapshot from which the machine goes on.
    pub(super) restore: Option<Restore>,
}

/// A socket, which is removed when another takes its place.
struct Bound {
    path: PathBuf,
    _listener: UnixListener,
}

impl Files {
    pub(super) fn new(id: &str) -> Files {
        Files {
            id: id.to_owned(),
            taps: BTreeMap::new(),
            vsock: None,
            metadata: Metadata::default(),
            metrics: MetricsFile::new(id),
            restore: None,
        }
    }

    /// The descriptor of an interface's TAP.
    pub(super) fn tap(&self, interface: &str) -> Option<RawFd> {
        self.taps.get(interface).map(|(_, tap)| tap.as_raw_fd())
    }

    /// Lets go of what the machine has opened itself.
    pub(super) fn hand_over(&mut self) {
        self.taps.clear();
    }

    /// Takes the socket's path back from a machine that did not start.
    pub(super) fn take_socket_back(&mut self, vsock: &Vsock) {
        let path = PathBuf::from(&vsock.uds_path);
        // Nobody listens at what the machine left there. The next start says what else is wrong.
        if let Ok(listener) = sockets::listen(&path, Access::Umask) {
            self.vsock = Some(Bound {
                path,
                _listener: listener,
            });
        }
    }

    /// Leaves the socket's path to the machine.
    pub(super) fn leave_socket(&mut self) {
        if let Some(bound) = self.vsock.take() {
            // Whoever binds it next says what is wrong.
            drop(std::fs::remove_file(bound.path));
        }
    }
}

fn text(error: &io::Error) -> String {
    error.to_string()
}

impl Resources for Files {
    fn check_boot_source(&mut self, source: &BootSource) -> Result<(), Refusal> {
        let open = |path: &String| files::open(path.as_ref(), Accepted::FileOrDisk, false);
        open(&source.kernel_image_path)
            .map_err(|error| format!("The kernel file cannot be opened: {error:#}"))?;
        if let Some(path) = &source.initrd_path {
            let what =
                "The initrd file cannot be opened due to invalid path or invalid permissions.";
            open(path).map_err(|error| format!("{what} {error:#}"))?;
        }
        Ok(())
    }

    fn check_drive(&mut self, drive: &Drive) -> Result<(), Refusal> {
        let Some(path) = &drive.path_on_host else {
            let what = "Vhost user backend error: Vhost-user error";
            return Err(format!("{what}: disks of other processes are not offered"));
        };
        let what = "Virtio backend error: Error manipulating the backing file";
        files::open(path.as_ref(), Accepted::FileOrDisk, !drive.is_read_only)
            .map_err(|error| format!("{what}: {error:#} {path}"))?;
        Ok(())
    }

    fn open_tap(&mut self, interface: &NetworkInterface) -> Result<(), Refusal> {
        let name = &interface.host_dev_name;
        let what = "Open tap device failed";
        if tap::check_name(name).is_err() {
            return Err(format!("{what}: Invalid interface name"));
        }
        let own = self.taps.get(&interface.iface_id);
        if own.is_some_and(|(own, _)| own == name) {
            return Ok(());
        }
        let opened = tap::make(name).map_err(|error| {
            let why = format!("Error while creating ifreq structure: {}", text(&error));
            let help = "Check our documentation on setting up the network devices.";
            format!("{what}: {why}. Invalid TUN/TAP Backend provided by {name}. {help}")
        })?;
        let id = interface.iface_id.clone();
        self.taps.insert(id, (name.clone(), opened));
        Ok(())
    }

    fn bind_vsock(&mut self, vsock: &Vsock) -> Result<(), Refusal> {
        let path = PathBuf::from(&vsock.uds_path);
        self.leave_socket();
        let listener = sockets::bind(&path, Access::Umask).map_err(|error| {
            format!(
                "Error binding to the host-side Unix socket: {}",
                text(&error)
            )
        })?;
        self.vsock = Some(Bound {
            path,
            _listener: listener,
        });
        Ok(())
    }

    fn configure_logger(&mut self, logger: &Logger) -> Result<(), Refusal> {
        LogFile::configure(&self.id, logger)
            .map_err(|error| format!("Failed to open target file: {}", text(&error)))
    }

    fn configure_metrics(&mut self, metrics: &Metrics) -> Result<(), Refusal> {
        self.metrics.open(metrics).map_err(|error| text(&error))
    }

    fn open_snapshot(&mut self, load: &SnapshotLoad) -> Result<String, Refusal> {
        let (memory, from) = match (&load.mem_backend, &load.mem_file_path) {
            (Some(backend), _) if backend.backend_type == BackendType::Uffd => (
                &backend.backend_path,
                MemoryFrom::Handler(backend.backend_path.clone()),
            ),
            (Some(backend), _) => (&backend.backend_path, MemoryFrom::Private),
            (None, Some(path)) => (path, MemoryFrom::Private),
            (None, None) => return Err("no memory is named".to_owned()),
        };
        let paths = Paths::pair(&load.snapshot_path, memory);
        let what = "Failed to restore from snapshot: Failed to get snapshot state from file: Failed to open snapshot file";
        std::fs::metadata(&load.snapshot_path)
            .map_err(|error| format!("{what}: {}", text(&error)))?;
        let restore = Restore::open(&paths, from, !load.resume_vm, true);
        let restore =
            restore.map_err(|error| format!("Failed to restore from snapshot: {error:#}"))?;
        let microvm = restore.head.asked.microvm.as_ref();
        let microvm = microvm.map(ToString::to_string);
        self.restore = Some(restore);
        microvm.ok_or_else(|| {
            "Failed to restore from snapshot: it was made by 'armlet ctl'; 'armlet run --restore' goes on from it".to_owned()
        })
    }
}
