//! Images that are empty, and are filled while a guest has them.
//!
//! Whoever fills one closes it then, which inotify(7) tells (IN_CLOSE_WRITE). Guests' writes make no
//! such event. Only empty images are watched: a user may have 128 instances of inotify in all
//! (fs.inotify.max_user_instances), which other programs need too.

use armlet_system::eintr::uninterrupted;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// Hears of it when somebody who had a file open to write has closed it.
#[derive(Debug)]
pub(super) struct GrowthWatch(OwnedFd);

impl GrowthWatch {
    /// Watches this very file, whatever comes to lie at its path.
    ///
    /// # Errors
    /// A host without /proc or inotify, or one that has no more instances of it for this user.
    pub(super) fn new(file: &File) -> Result<GrowthWatch, Errno> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        inotify::add_watch(&fd, path, WatchFlags::CLOSE_WRITE)?;
        Ok(GrowthWatch(fd))
    }

    /// The descriptor that is readable when the file may have grown.
    pub(super) fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Takes note of what was heard.
    pub(super) fn drain(&self) {
        // Events of a file that is watched by itself have no name. One that is there still makes it
        // readable again.
        let mut events = [0; 1024];
        let _ = uninterrupted(|| rustix::io::read(&self.0, &mut events));
    }
}
