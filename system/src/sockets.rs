//! Unix sockets at paths that users name.

use anyhow::{Context, Result, bail};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// The most connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Who may connect to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Those whom the umask lets.
    Umask,
    /// Its owner alone.
    Owner,
}

/// Listens at a path where nobody else listens. A socket that nobody listens at is replaced.
///
/// # Errors
/// A path where something else is, or where nothing can be made; with what would work.
pub fn listen(path: &Path, access: Access) -> Result<UnixListener> {
    match bind(path, access) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {}
        bound => return Ok(bound?),
    }
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if !is_socket {
        bail!("there is something else; choose another path");
    }
    match connect_at_once(path) {
        // What a process leaves behind that did not end by itself.
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).context("cannot remove the socket that nobody listens at")?;
        }
        _ => bail!("another process listens there; choose another path"),
    }
    Ok(bind(path, access)?)
}

fn socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    let kind = SocketType::STREAM;
    let flags = SocketFlags::CLOEXEC | flags;
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        kind,
        flags,
        None,
    )?)
}

/// Listens at a path where nothing is.
///
/// # Errors
/// What the system says.
pub fn bind(path: &Path, access: Access) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket(SocketFlags::empty())?;
    if access == Access::Owner {
        // The file gets the socket's mode (net/unix/af_unix.c: unix_bind_bsd): there is no moment at
        // which others may connect.
        rustix::fs::fchmod(&socket, rustix::fs::Mode::from(0o600))?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

/// Connects to a path, without waiting for a listener that has too many to accept already.
///
/// # Errors
/// What the system says.
pub fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket(SocketFlags::NONBLOCK)?;
    rustix::net::connect(&socket, &address)?;
    Ok(UnixStream::from(socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_listener_with_too_many_waiting_is_not_waited_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("busy");
        let _listener = listen(&path, Access::Umask).expect("a free path");
        let mut streams = Vec::new();
        let error = loop {
            match connect_at_once(&path) {
                Ok(stream) => streams.push(stream),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn a_socket_may_be_for_its_owner_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        let _listener = listen(&path, Access::Owner).expect("a free path");
        let mode = fs::metadata(&path).expect("a socket").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(&path).expect("it listens");
    }
}
