//! A virtiofsd: where it is, how it is started, what it says, and how it ends.

use super::options::{Cache, Sandbox, ShareOptions};
use crate::broker::{self, Broker, Process, Service, ServiceId};
use crate::vhost_user::VhostUser;
use anyhow::{Context, Result, anyhow, bail};
use armlet_system::deadline::Deadline;
use rustix::process::getuid;
use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Its name.
const PROGRAM: &str = "virtiofsd";
/// Where distributions put it, outside everyone's PATH; the last one had QEMU's, up to version
/// 7.2, which takes other options.
const FOLDERS: [&str; 3] = ["/usr/libexec", "/usr/lib", "/usr/lib/qemu"];

/// How long it may take to end when its connection closed, before it is killed.
const FAREWELL: Duration = Duration::from_secs(1);

/// Features that the transport offers to every driver (VERSION_1, INDIRECT_DESC, EVENT_IDX).
const WANTED_FEATURES: u64 = armlet_devices::virtio::FEATURE_VERSION_1
    | armlet_devices::virtio::FEATURE_INDIRECT
    | armlet_devices::virtio::FEATURE_EVENT_IDX;
/// Queues for requests: virtiofsd works on one.
pub(super) const REQUESTS: u16 = 1;
/// Its queues: one before all others, and one for requests.
const QUEUES: u64 = 1 + REQUESTS as u64;

/// The program: in a folder of `path` ($PATH) or where distributions put it.
///
/// # Errors
/// None, with the package that has it.
pub(super) fn find(path: Option<&OsStr>) -> Result<PathBuf> {
    broker::find(PROGRAM, path, &FOLDERS).with_context(|| {
        format!(
            "--share needs {PROGRAM}, which is neither in PATH nor in {}, or not for this user to \
             run; the package {PROGRAM} has it (Debian 12: qemu-system-common)",
            FOLDERS.join(", ")
        )
    })
}

/// How to start it.
#[derive(Debug)]
pub(super) struct Launch {
    broker: Arc<Broker>,
    program: PathBuf,
    service: ServiceId,
    sandbox: Sandbox,
}

impl Launch {
    /// For a folder, with the user's options; the broker is told of it.
    ///
    /// # Errors
    /// What QEMU's does not know; a path that is too long.
    pub(super) fn new(
        broker: &Arc<Broker>,
        program: PathBuf,
        options: &ShareOptions,
        folder: PathBuf,
    ) -> Result<Launch> {
        let arguments = match program.ends_with("qemu/virtiofsd") {
            true => qemus_arguments(options, &folder)?,
            false => arguments(options, folder),
        };
        let service = broker.offer(Service::Program {
            path: program.clone(),
            arguments,
            listens: true,
            // For a user's namespace it executes newuidmap(1), which is root's.
            gains_rights: options.sandbox == Sandbox::Namespace && !getuid().is_root(),
        });
        let service = service.with_context(|| format!("cannot start {}", program.display()))?;
        Ok(Launch {
            broker: Arc::clone(broker),
            program,
            service,
            sandbox: options.sandbox,
        })
    }

    /// Starts one and makes acquaintance with it, for the device called `name`.
    ///
    /// # Errors
    /// That it cannot be started, or ended; with what it said and what would work.
    pub(super) fn start(&self, name: &str, deadline: Deadline) -> Result<Daemon> {
        let shown = self.program.display();
        let started = self.broker.start(self.service, None);
        let (mut process, stream) = started.with_context(|| format!("cannot start {shown}"))?;
        let stream = stream.context("the broker made no connection")?;
        let failed = match VhostUser::connect(stream.into(), deadline) {
            Ok(connection) => {
                let daemon = Daemon {
                    name: name.to_owned(),
                    connection,
                    process,
                };
                return daemon
                    .check()
                    .with_context(|| format!("cannot use {shown}"));
            }
            Err(error) => error,
        };
        // It may have said why, and will say no more.
        let by_itself = process.ended(Deadline::after(FAREWELL)).map(str::to_owned);
        process.end(Duration::ZERO);
        let said = process.words().hear_all().join("; ");
        let why = match (said.is_empty(), by_itself) {
            (false, _) => anyhow!("{said}"),
            (true, Some(how)) => anyhow!("it ended at once ({how})"),
            (true, None) => failed,
        };
        Err(why.context(format!("cannot start {shown}{}", self.advice(&said))))
    }

    /// What may help, by what it said.
    fn advice(&self, said: &str) -> &'static str {
        let said = said.to_ascii_lowercase();
        let of = |words: [&str; 3]| words.iter().any(|word| said.contains(word));
        match self.sandbox {
            Sandbox::Namespace if of(["sandbox", "unshare", "namespace"]) => {
                " (sandbox=none, or chroot as root, needs no namespaces)"
            }
            Sandbox::Chroot if of(["sandbox", "chroot", "root"]) => {
                " (sandbox=none needs no rights)"
            }
            _ if said.contains("readonly") => " (readonly needs virtiofsd 1.13)",
            _ => "",
        }
    }
}

fn arguments(options: &ShareOptions, folder: PathBuf) -> Vec<OsString> {
    let sandbox = match options.sandbox {
        Sandbox::Namespace => "namespace",
        Sandbox::Chroot => "chroot",
        Sandbox::None => "none",
    };
    let cache = match options.cache {
        Cache::Auto => "auto",
        Cache::Always => "always",
        Cache::Never => "never",
        Cache::Metadata => "metadata",
    };
    let socket = broker::SOCKET.to_string();
    let mut arguments: Vec<OsString> = ["--fd", &socket].map(Into::into).into();
    arguments.extend(["--log-level", "error"].map(Into::into));
    arguments.extend(["--sandbox", sandbox, "--cache", cache].map(Into::into));
    if options.xattr {
        arguments.push("--xattr".into());
    }
    if options.readonly {
        arguments.push("--readonly".into());
    }
    arguments.push("--shared-dir".into());
    arguments.push(folder.into());
    arguments
}

/// For the one that came with QEMU (its docs/tools/virtiofsd.rst of version 7.2).
fn qemus_arguments(options: &ShareOptions, folder: &Path) -> Result<Vec<OsString>> {
    let other = "take another virtiofsd: the package virtiofsd has it";
    let sandbox = match options.sandbox {
        Sandbox::Namespace => "sandbox=namespace",
        Sandbox::Chroot => "sandbox=chroot",
        Sandbox::None => bail!("QEMU's virtiofsd has no sandbox=none; {other}"),
    };
    let cache = match options.cache {
        Cache::Auto => "cache=auto",
        Cache::Always => "cache=always",
        Cache::Never => "cache=none",
        Cache::Metadata => bail!("QEMU's virtiofsd has no cache=metadata; {other}"),
    };
    if options.readonly {
        bail!("QEMU's virtiofsd has no readonly; {other}");
    }
    let mut source = b"source=".to_vec();
    for byte in folder.as_os_str().as_bytes() {
        if b",\\".contains(byte) {
            source.push(b'\\');
        }
        source.push(*byte);
    }
    let mut arguments: Vec<OsString> = vec![format!("--fd={}", broker::SOCKET).into()];
    let mut add = |option: OsString| arguments.extend(["-o".into(), option]);
    add(OsString::from_vec(source));
    for option in [sandbox, cache, "log_level=err"] {
        add(option.into());
    }
    if options.xattr {
        add("xattr".into());
    }
    Ok(arguments)
}

/// One that runs. When it is dropped it has ended.
#[derive(Debug)]
pub(super) struct Daemon {
    name: String,
    connection: VhostUser,
    process: Process,
}

impl Daemon {
    fn check(self) -> Result<Daemon> {
        let lacks = WANTED_FEATURES & !self.connection.features();
        if lacks != 0 {
            bail!("it lacks the features {lacks:#x} of virtio");
        }
        let queues = self.connection.queues();
        if queues < QUEUES {
            bail!("it works on {queues} queues; {QUEUES} are needed");
        }
        Ok(self)
    }

    pub(super) fn connection(&self) -> &VhostUser {
        &self.connection
    }

    /// Descriptors that are ready to be read when it said something or ended.
    pub(super) fn watched(&self) -> [RawFd; 2] {
        [self.connection.as_raw_fd(), self.process.words_fd()]
    }

    /// Whether it still holds its end of the connection.
    pub(super) fn is_alive(&self) -> bool {
        self.connection.is_alive()
    }

    /// What it said since, in lines.
    pub(super) fn hear(&mut self) -> Vec<String> {
        self.process.words().hear()
    }

    /// Ends it, and says how it ended.
    pub(super) fn end(&mut self) -> String {
        self.connection.hang_up();
        self.process.end(FAREWELL)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.end();
        if self
            .process
            .ended(Deadline::after(Duration::ZERO))
            .is_none()
        {
            let name = &self.name;
            log::error!("{name}: virtiofsd does not end, and may still write to guest memory");
        }
    }
}
