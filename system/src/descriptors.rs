//! Closes descriptors that nobody here owns: what was inherited, and, after a fork, what is the parent's.

use rustix::process::{Resource, getrlimit};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// The most descriptors that are tried one by one.
const MOST: u64 = 1 << 20;

/// Closes all descriptors with numbers from `first` to `last`.
///
/// # Safety
/// Nothing that is still used owns one of them.
pub unsafe fn close_range(first: u32, last: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        if libc::syscall(libc::SYS_close_range, first, last, 0) != 0 {
            close_each(first, last);
        }
    }
}

/// The same before Linux 5.9, which has no such call, and where a container's filter does not know it.
///
/// # Safety
/// As above.
unsafe fn close_each(first: u32, last: u32) {
    let listed = std::fs::read_dir("/proc/self/fd").map(|open| {
        let names = open.flatten().map(|entry| entry.file_name());
        let numbers = names.filter_map(|name| name.to_str()?.parse().ok());
        numbers.collect::<Vec<u32>>()
    });
    let open = listed.unwrap_or_else(|_| {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(MOST);
        (0..limit.min(MOST) as u32).collect()
    });
    for number in open
        .into_iter()
        .filter(|number| (first..=last).contains(number))
    {
        // SAFETY: the caller's promise. That by which the folder was read is closed already.
        unsafe { libc::close(number.cast_signed()) };
    }
}

/// Gives descriptors the numbers from `first` on, in place of what has them, and closes all others
/// above. They are closed when a program is executed.
///
/// # Safety
/// Nothing that is still used owns a descriptor from `first` on, those that are given among them.
///
/// # Errors
/// What the system refuses.
pub unsafe fn keep_only<const N: usize>(
    kept: [RawFd; N],
    first: RawFd,
) -> io::Result<[OwnedFd; N]> {
    let made = |number: RawFd| match number {
        0.. => Ok(number),
        _ => Err(io::Error::last_os_error()),
    };
    let end = first + N as RawFd;
    let mut above = [0; N];
    // SAFETY: the caller's promise; the duplicates are new.
    unsafe {
        for (above, number) in above.iter_mut().zip(kept) {
            *above = made(libc::fcntl(number, libc::F_DUPFD_CLOEXEC, end))?;
        }
        for (number, above) in (first..).zip(above) {
            made(libc::dup3(above, number, libc::O_CLOEXEC))?;
        }
        close_range(end.cast_unsigned(), u32::MAX);
        let mut number = first;
        Ok([(); N].map(|()| {
            number += 1;
            OwnedFd::from_raw_fd(number - 1)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::{AsRawFd, IntoRawFd};

    fn is_open(number: u32) -> bool {
        // SAFETY: it only asks for flags.
        unsafe { libc::fcntl(number.cast_signed(), libc::F_GETFD) >= 0 }
    }

    #[test]
    fn a_range_is_closed_with_the_call_and_without() {
        for close in [close_range, close_each] {
            let file = File::open("/dev/null").expect("a file");
            // Far above what other tests have.
            let numbers = [700, 701, 702, 703].map(|number| {
                // SAFETY: the numbers are nobody's.
                unsafe { libc::dup2(file.as_raw_fd(), number) }.cast_unsigned()
            });
            // SAFETY: as above.
            unsafe { close(701, 702) };
            assert_eq!(numbers.map(is_open), [true, false, false, true]);
            // SAFETY: as above.
            unsafe { close(700, 703) };
            assert_eq!(numbers.map(is_open), [false; 4]);
        }
    }

    #[test]
    fn only_what_is_kept_is_left_in_the_order_that_is_asked_for() {
        let [one, other] = ["/dev/null", "/dev/zero"].map(|path| File::open(path).expect(path));
        let kept = [other.as_raw_fd(), one.as_raw_fd()];
        // SAFETY: the copy ends at once, and has closed what others have in it.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: as above.
            let made = unsafe { keep_only(kept, 3) };
            let numbers = made.map(|made| made.map(IntoRawFd::into_raw_fd));
            let names = [3, 4].map(|number| std::fs::read_link(format!("/proc/self/fd/{number}")));
            let are_right = matches!(&names, [Ok(a), Ok(b)]
                if a.ends_with("zero") && b.ends_with("null"));
            let is_right = matches!(numbers, Ok([3, 4])) && are_right && !is_open(5);
            // SAFETY: it ends the copy.
            unsafe { libc::_exit(i32::from(!is_right)) };
        }
        let mut status = -1;
        // SAFETY: the kernel writes the status to where it is told to.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        assert_eq!(status, 0);
    }
}
