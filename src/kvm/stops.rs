//! Where a vCPU stops for a debugger.

use armlet_arch::debug::Point;

/// Where a vCPU stops for the debugger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stops {
    /// At breakpoint instructions.
    pub software: bool,
    /// After the next instruction.
    pub step: bool,
    /// Whether KVM can keep interrupts out of steps.
    pub keeps_interrupts_out: bool,
    /// At these, by debug registers.
    pub points: Vec<Point>,
}

/// The mask of interrupts that was added for a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Masked(pub(super) u64);
