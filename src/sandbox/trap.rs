//! What happens at a system call that is not allowed: SIGSYS, a line that says which, and the end.

use super::calls::{argument_of, request_name};
use super::names::name;
use crate::kvm::{HostArch, KvmArch};
use armlet_system::status::Status;
use armlet_system::{messages, terminal};
use std::ffi::c_void;

/// Has a forbidden call end armlet, with a line on standard error and [`Status::Forbidden`].
pub(super) fn install() {
    // SAFETY: all fields are numbers or sets of them, for which zero is a value, and the handler has
    // the type that a sigaction with SA_SIGINFO asks for.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = forbidden as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut());
    }
}

/// Where siginfo_t has the number of the call, in bytes (include/uapi/asm-generic/siginfo.h: after
/// three numbers, padding to eight bytes, and an address).
const CALL_OFFSET: usize = 24;

extern "C" fn forbidden(_: i32, info: *const libc::siginfo_t, context: *mut c_void) {
    let mut line = Line::default();
    let mut thread = [0_u8; 16];
    // SAFETY: the kernel hands over a siginfo_t, which has the number there for SIGSYS; prctl writes
    // 16 bytes; it and _exit are safe in handlers (signal-safety(7)).
    unsafe {
        let number = info.byte_add(CALL_OFFSET).cast::<i32>().read_unaligned();
        libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr());
        line.add(b"armlet: thread ");
        line.add(thread.split(|byte| *byte == 0).next().unwrap_or_default());
        line.add(b" made system call ");
        if let Some(name) = name(number.into(), HostArch::OTHER_CALLS.known) {
            line.add(name.as_bytes());
            line.add(b" (");
            line.number(number);
            line.add(b")");
        } else {
            line.number(number);
        }
        if let Some(index) = argument_of(number.into()) {
            let argument = HostArch::call_argument(context, index);
            match i64::from(number) {
                libc::SYS_ioctl => {
                    line.add(b" with request ");
                    if let Some(name) = request_name(argument) {
                        line.add(name.as_bytes());
                        line.add(b" ");
                    }
                }
                _ => {
                    line.add(b" with argument ");
                    line.number(index as i32 + 1);
                    line.add(b" of ");
                }
            }
            line.hexadecimal(argument);
        }
        line.add(b", which the sandbox forbids; --sandbox log has the kernel's log tell of all\n");
        terminal::restore();
        messages::say_from_handler(&line.bytes[..line.length]);
        libc::_exit(i32::from(Status::Forbidden.code()));
    }
}

/// A line that is made without memory of the heap.
struct Line {
    bytes: [u8; 256],
    length: usize,
}

impl Default for Line {
    fn default() -> Line {
        Line {
            bytes: [0; 256],
            length: 0,
        }
    }
}

impl Line {
    fn add(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = *byte;
                self.length += 1;
            }
        }
    }

    fn hexadecimal(&mut self, number: u64) {
        self.add(b"0x");
        let digits = (64 - number.leading_zeros()).div_ceil(4).max(1);
        for digit in (0..digits).rev() {
            let digit = (number >> (4 * digit) & 15) as usize;
            self.add(&[b"0123456789abcdef"[digit]]);
        }
    }

    fn number(&mut self, number: i32) {
        if number < 0 {
            self.add(b"-");
        }
        let number = number.unsigned_abs();
        let mut power = 1_000_000_000;
        while power > 0 {
            if number >= power || power == 1 {
                self.add(&[b'0' + (number / power % 10) as u8]);
            }
            power /= 10;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_numbers_and_ends_where_it_is_full() {
        let mut line = Line::default();
        for number in [0, 7, 100, -1, i32::MIN] {
            line.number(number);
            line.add(b" ");
        }
        assert_eq!(&line.bytes[..line.length], b"0 7 100 -1 -2147483648 ");
        line.length = 0;
        for number in [0, 0x5412, 0x100, u64::MAX] {
            line.hexadecimal(number);
            line.add(b" ");
        }
        let numbers = b"0x0 0x5412 0x100 0xffffffffffffffff ";
        assert_eq!(&line.bytes[..line.length], numbers);
        line.add(&[b'x'; 300]);
        assert_eq!(line.length, line.bytes.len());
    }
}
