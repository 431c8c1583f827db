//! Debugging an x86_64 CPU from outside, by the Intel 64 and IA-32 Architectures Software Developer's Manual,
//! volume 3, chapter 18: debug registers.

use crate::debug::{Access, Hit, Point};

/// The breakpoint instruction, `int3`.
pub const BREAK: [u8; 1] = [0xcc];
/// How many addresses the debug registers hold.
pub const POINTS: usize = 4;

/// The exception of debug registers and single steps, and the one of the breakpoint instruction.
const DEBUG: u32 = 1;
const BREAKPOINT: u32 = 3;
/// DR6.BS: a single step.
const SINGLE_STEP: u64 = 1 << 14;
/// DR7: GE, and the bit that is always 1.
const CONTROL: u64 = 0x600;

/// Returns the debug registers for up to four points; `None` if the CPU has none like that: 1, 2, 4 or 8 bytes
/// that are aligned, written, or read or written.
#[must_use]
pub fn registers(points: &[Point]) -> Option<[u64; 8]> {
    let mut registers = [0; 8];
    if points.len() > POINTS {
        return None;
    }
    registers[7] = CONTROL;
    for (at, point) in points.iter().enumerate() {
        let (kind, length) = match (point.access, point.length) {
            (Access::Execute, _) => (0b00, 0b00),
            (Access::Read, _) => return None,
            (access, length) => {
                let code = match length {
                    1 => 0b00,
                    2 => 0b01,
                    4 => 0b11,
                    8 => 0b10,
                    _ => return None,
                };
                if !point.address.is_multiple_of(length) {
                    return None;
                }
                (if access == Access::Write { 0b01 } else { 0b11 }, code)
            }
        };
        registers[at] = point.address;
        registers[7] |= 0b10 << (2 * at) | kind << (16 + 4 * at) | length << (18 + 4 * at);
    }
    Some(registers)
}

/// Returns why the CPU stopped, by the exception and DR6 that KVM reports; `None` for what no debugger asked
/// for.
#[must_use]
pub fn hit(exception: u32, dr6: u64, points: &[Point]) -> Option<Hit> {
    if exception == BREAKPOINT {
        return Some(Hit::Instruction);
    }
    let at = (dr6 & 0xf).trailing_zeros() as usize;
    let point = points.get(at).filter(|_| exception == DEBUG);
    match point {
        Some(point) if point.access == Access::Execute => Some(Hit::Breakpoint),
        Some(point) => Some(Hit::Watchpoint(*point, point.address)),
        None => (exception == DEBUG && dr6 & SINGLE_STEP != 0).then_some(Hit::Step),
    }
}

/// Returns whether a virtual address is one in long mode: its upper bits are copies of the highest that
/// tables translate, bit 56 with CR4.LA57 and 47 without (SDM volume 1, section 3.3.7.1).
#[must_use]
pub fn is_canonical(address: u64, cr4: u64) -> bool {
    let upper = if cr4 >> 12 & 1 == 1 { 7 } else { 16 };
    ((address << upper) as i64 >> upper) as u64 == address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_tables_do_not_reach_are_none() {
        for address in [0, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, u64::MAX] {
            assert!(is_canonical(address, 0), "{address:#x}");
        }
        for address in [
            0x8000_0000_0000,
            0xf000_0000_0000_0000,
            0xff00_0000_0000_0000,
        ] {
            assert!(!is_canonical(address, 0), "{address:#x}");
        }
        assert!(is_canonical(0xff00_0000_0000_0000, 1 << 12));
        assert!(!is_canonical(0xf000_0000_0000_0000, 1 << 12));
    }

    #[test]
    fn debug_registers_are_written_as_the_manual_has_them() {
        let point = |address, length, access| Point {
            address,
            length,
            access,
        };
        let run = point(0xffff_ffff_8100_0001, 0, Access::Execute);
        let write = point(0x1004, 4, Access::Write);
        let access = point(0x2000, 8, Access::ReadWrite);
        let written = registers(&[run, write, access]).expect("possible");
        assert_eq!(written[..4], [run.address, 0x1004, 0x2000, 0]);
        assert_eq!(written[7], 0x600 | 0b10_1010 | 0b1101 << 20 | 0b1011 << 24);
        for (address, length, access) in [
            (0x1000, 4, Access::Read),
            (0x1002, 4, Access::Write),
            (0x1000, 3, Access::Write),
            (0x1000, 16, Access::Write),
            (0x1000, 0, Access::Write),
        ] {
            assert_eq!(registers(&[point(address, length, access)]), None);
        }
        assert_eq!(registers(&[run; 5]), None);

        let points = [run, write];
        assert_eq!(hit(1, 0xffff_0ff1, &points), Some(Hit::Breakpoint));
        assert_eq!(
            hit(1, 0xffff_0ff2, &points),
            Some(Hit::Watchpoint(write, 0x1004))
        );
        assert_eq!(hit(1, 0xffff_4ff0, &points), Some(Hit::Step));
        assert_eq!(hit(1, 0xffff_0ff4, &points), None);
        assert_eq!(hit(3, 0, &points), Some(Hit::Instruction));
        assert_eq!(hit(6, 0, &points), None);
    }
}
