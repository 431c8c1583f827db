//! What a debugger asks of a CPU: where it is to stop, and why it did.

/// What a hardware breakpoint or watchpoint waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// An instruction is about to be executed.
    Execute,
    /// Memory is written.
    Write,
    /// Memory is read.
    Read,
    /// Memory is read or written.
    ReadWrite,
}

/// A hardware breakpoint or watchpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// The first address, guest-virtual.
    pub address: u64,
    /// How many bytes from there; 0 for a breakpoint.
    pub length: u64,
    /// What it waits for.
    pub access: Access,
}

impl Point {
    /// Returns whether an access at `address` is one that it waits for, up to the 8 bytes that a CPU tells
    /// watched addresses apart by.
    #[must_use]
    pub fn is_near(&self, address: u64) -> bool {
        let first = self.address & !7;
        let last = self.address.saturating_add(self.length.max(1) - 1) | 7;
        (first..=last).contains(&address)
    }
}

/// How many hardware breakpoints and watchpoints a CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Breakpoints.
    pub breakpoints: usize,
    /// Watchpoints.
    pub watchpoints: usize,
    /// All of them together.
    pub all: usize,
}

impl Limits {
    /// Returns whether there are registers for all of these.
    #[must_use]
    pub fn hold(&self, points: &[Point]) -> bool {
        let is_break = |point: &&Point| point.access == Access::Execute;
        let breaks = points.iter().filter(is_break).count();
        let watches = points.len() - breaks;
        breaks <= self.breakpoints && watches <= self.watchpoints && points.len() <= self.all
    }
}

/// Why a CPU stopped for the debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hit {
    /// It has executed one instruction, as asked.
    Step,
    /// It is about to execute a breakpoint instruction, of the debugger or of the guest's own.
    Instruction,
    /// It met a hardware breakpoint.
    Breakpoint,
    /// It met this watchpoint, at this address.
    Watchpoint(Point, u64),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_counted_by_what_they_can_do() {
        let point = |access| Point {
            address: 0x1000,
            length: 4,
            access,
        };
        let (run, write) = (point(Access::Execute), point(Access::Write));
        let arm = Limits {
            breakpoints: 2,
            watchpoints: 1,
            all: 3,
        };
        assert!(arm.hold(&[run, run, write]));
        assert!(!arm.hold(&[write, write]) && !arm.hold(&[run, run, run]));
        let pc = Limits {
            breakpoints: 4,
            watchpoints: 4,
            all: 4,
        };
        assert!(pc.hold(&[run, run, write, write]) && !pc.hold(&[run; 5]));
        assert!(write.is_near(0x1007) && !write.is_near(0x1008) && !write.is_near(0xfff));
    }
}
