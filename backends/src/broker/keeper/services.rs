//! The services of a broker: what it was told before it was sealed, and how what is no program is done.

use super::super::protocol::{FileId, MOST_SERVICES, Service};
use super::drafts::Drafts;
use armlet_system::eintr::uninterrupted;
use armlet_system::files::{self, Accepted};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::ffi::OsString;
use std::fs::DirBuilder;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A service, and what belongs to it here.
#[derive(Debug)]
pub(super) enum Known {
    Program {
        path: PathBuf,
        arguments: Vec<OsString>,
        listens: bool,
        gains_rights: bool,
    },
    Device(PathBuf),
    /// Images, and whether they are opened for writing.
    Images(bool),
    /// Files of snapshots.
    Snapshots(Drafts),
    /// Sockets in a folder, whose names begin with this.
    Sockets(OwnedFd, PathBuf),
    /// A socket in a folder: its name, and what it is.
    Removal(OwnedFd, PathBuf, FileId),
    /// One that makes no sense: its number is taken all the same.
    Nothing,
}

#[derive(Debug, Default)]
pub(super) struct Services {
    known: Vec<Known>,
    is_sealed: bool,
}

impl Services {
    /// Adds a service; `folder` came with it. None is added once it is sealed.
    pub(super) fn add(&mut self, service: Service, folder: Option<OwnedFd>) {
        if self.is_sealed || self.known.len() == MOST_SERVICES {
            return;
        }
        self.known.push(match (service, folder) {
            (
                Service::Program {
                    path,
                    arguments,
                    listens,
                    gains_rights,
                },
                _,
            ) => Known::Program {
                path,
                arguments,
                listens,
                gains_rights,
            },
            (Service::Device(path), _) => Known::Device(path),
            (Service::Images { writable }, _) => Known::Images(writable),
            (Service::Snapshots, _) => Known::Snapshots(Drafts::default()),
            (Service::Sockets(name), Some(folder)) => Known::Sockets(folder, name),
            (Service::Removal(name, file), Some(folder)) => Known::Removal(folder, name, file),
            (Service::Sockets(_) | Service::Removal(..), None) => Known::Nothing,
        });
    }

    pub(super) fn seal(&mut self) {
        self.is_sealed = true;
    }

    pub(super) fn has_programs(&self) -> bool {
        let mut known = self.known.iter();
        known.any(|known| matches!(known, Known::Program { .. }))
    }

    pub(super) fn all(&self) -> &[Known] {
        &self.known
    }

    pub(super) fn get(&self, index: u32) -> Option<&Known> {
        self.known.get(index as usize)
    }

    /// Removes the sockets that are to go with the broker, unless something else took their place.
    pub(super) fn remove_sockets(&self) {
        for known in &self.known {
            if let Known::Removal(folder, name, file) = known
                && identity(folder, name) == Some(*file)
            {
                let _ = rustix::fs::unlinkat(folder, name, AtFlags::empty());
            }
        }
    }
}

fn identity(folder: &OwnedFd, name: &Path) -> Option<FileId> {
    let found = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    Some(FileId {
        device: found.st_dev,
        inode: found.st_ino,
    })
}

impl Known {
    /// The descriptor that is asked for.
    ///
    /// # Errors
    /// What the system says; a service that gives none.
    pub(super) fn get(&self, port: u32) -> io::Result<OwnedFd> {
        match self {
            Known::Device(path) => {
                let flags = OFlags::RDWR | OFlags::CLOEXEC;
                let opened = uninterrupted(|| rustix::fs::openat(CWD, path, flags, Mode::empty()));
                Ok(opened?)
            }
            Known::Sockets(folder, name) => {
                let mut name = name.clone().into_os_string();
                name.push(format!("_{port}"));
                let address = SocketAddrUnix::new(&name)?;
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
                let socket = rustix::net::socket_with(family, kind, flags, None)?;
                // The name is relative to it.
                rustix::process::fchdir(folder)?;
                let connected = rustix::net::connect(&socket, &address);
                std::env::set_current_dir("/")?;
                connected?;
                Ok(socket)
            }
            Known::Program { .. }
            | Known::Images(_)
            | Known::Snapshots(_)
            | Known::Removal(..)
            | Known::Nothing => Err(Errno::INVAL.into()),
        }
    }

    /// The file at the path that is asked for.
    ///
    /// # Errors
    /// What the system says, or the errno that says it best; a service that opens no images.
    pub(super) fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        let Known::Images(writable) = self else {
            return Err(Errno::INVAL.into());
        };
        match files::open(path, Accepted::FileOrDisk, *writable) {
            Ok(file) => Ok(file.into()),
            // It is neither file nor block device.
            Err(error) => Err(error.downcast().unwrap_or_else(|_| match path.is_dir() {
                true => Errno::ISDIR.into(),
                false => Errno::NOTBLK.into(),
            })),
        }
    }
}

/// A listening socket with one connection that is to be accepted, and the connection's other end.
/// (virtiofsd takes no connected socket.)
pub(super) fn listening_socket() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut number = [0; 16];
    let none = rustix::rand::GetRandomFlags::empty();
    uninterrupted(|| rustix::rand::getrandom(&mut number, none))?;
    let number = u128::from_ne_bytes(number);
    let folder = std::env::temp_dir().join(format!("armlet-{number:032x}"));
    // Nobody else gets in: who connects first may read and write the shared folder.
    DirBuilder::new().mode(0o700).create(&folder)?;
    // By a relative name, which is short enough for a socket wherever the folder is.
    let pair = std::env::set_current_dir(&folder).and_then(|()| {
        let listener = UnixListener::bind("s")?;
        Ok((listener.into(), UnixStream::connect("s")?.into()))
    });
    let _ = std::fs::remove_file("s");
    let _ = std::env::set_current_dir("/");
    let _ = std::fs::remove_dir(&folder);
    pair
}
