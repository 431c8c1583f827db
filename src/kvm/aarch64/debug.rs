//! Debugging an ARM64 vCPU: registers as gdb numbers them, breakpoints and steps by KVM_SET_GUEST_DEBUG.

use super::{PC, X0, sysreg};
use crate::kvm::stops::{Masked, Stops};
use anyhow::{Context, Result, ensure};
use armlet_arch::aarch64::debug::{self, MASKED, Translation};
use armlet_arch::debug::{Access, Hit, Limits, Point};
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW, KVM_GUESTDBG_USE_SW_BP,
    kvm_debug_exit_arch, kvm_guest_debug,
};
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub use debug::BREAK;

/// The architecture, as gdb calls it.
pub const ARCHITECTURE: &str = "aarch64";
/// Its features with their registers, in the order of their numbers: name, bits, type.
pub const FEATURES: &[(&str, &str, &str)] = &[
    (
        "org.gnu.gdb.aarch64.core",
        "",
        "x0-30:64 sp:64:data_ptr pc:64:code_ptr cpsr:32",
    ),
    (
        "org.gnu.gdb.aarch64.fpu",
        "<vector id=\"v2d\" type=\"ieee_double\" count=\"2\"/>\
         <vector id=\"v4f\" type=\"ieee_single\" count=\"4\"/>\
         <vector id=\"v16b\" type=\"uint8\" count=\"16\"/>\
         <vector id=\"v4w\" type=\"uint32\" count=\"4\"/>\
         <vector id=\"v2q\" type=\"uint64\" count=\"2\"/>\
         <union id=\"v\"><field name=\"d\" type=\"v2d\"/><field name=\"f\" type=\"v4f\"/>\
         <field name=\"b\" type=\"v16b\"/><field name=\"w\" type=\"v4w\"/>\
         <field name=\"u\" type=\"v2q\"/><field name=\"q\" type=\"uint128\"/></union>",
        "v0-31:128:v fpsr:32 fpcr:32",
    ),
    (
        "org.armlet.system",
        "",
        "SP_EL0:64:data_ptr SP_EL1:64:data_ptr ELR_EL1:64:code_ptr SPSR_EL1:64 SCTLR_EL1:64 \
         TTBR0_EL1:64 TTBR1_EL1:64 TCR_EL1:64 ESR_EL1:64 FAR_EL1:64 VBAR_EL1:64 TPIDR_EL0:64 \
         TPIDR_EL1:64 MPIDR_EL1:64",
    ),
];

/// The fields of `struct kvm_regs` (arch/arm64/include/uapi/asm/kvm.h).
const SP_EL0: u64 = X0 + 2 * 31;
const PSTATE: u64 = X0 + 0x42;
const SP_EL1: u64 = X0 + 0x44;
const ELR_EL1: u64 = X0 + 0x46;
const SPSR_EL1: u64 = X0 + 0x48;
const V0: u64 = 0x6040_0000_0010_0054;
const FPSR: u64 = 0x6020_0000_0010_00d4;
const FPCR: u64 = 0x6020_0000_0010_00d5;
/// KVM_REG_ARM64_SVE_ZREG(0, 0), of which the first 16 bytes are V0.
const Z0: u64 = 0x6080_0000_0015_0000;

const SCTLR_EL1: u64 = sysreg(3, 0, 1, 0, 0);
const TTBR0_EL1: u64 = sysreg(3, 0, 2, 0, 0);
const TTBR1_EL1: u64 = sysreg(3, 0, 2, 0, 1);
const TCR_EL1: u64 = sysreg(3, 0, 2, 0, 2);
const ESR_EL1: u64 = sysreg(3, 0, 5, 2, 0);
const VBAR_EL1: u64 = sysreg(3, 0, 12, 0, 0);
/// Registers of 64 bits that follow those that gdb knows.
const SYSTEM: [u64; 14] = [
    SP_EL0,
    SP_EL1,
    ELR_EL1,
    SPSR_EL1,
    SCTLR_EL1,
    TTBR0_EL1,
    TTBR1_EL1,
    TCR_EL1,
    ESR_EL1,
    // FAR_EL1
    sysreg(3, 0, 6, 0, 0),
    VBAR_EL1,
    // TPIDR_EL0
    sysreg(3, 3, 13, 0, 2),
    // TPIDR_EL1
    sysreg(3, 0, 13, 0, 4),
    super::MPIDR_EL1,
];

fn get(vcpu: &VcpuFd, register: u64) -> Result<u64> {
    super::read_register(vcpu, register)
}

fn set(vcpu: &VcpuFd, register: u64, value: u64) -> Result<()> {
    let set = vcpu.set_one_reg(register, &value.to_le_bytes());
    set.with_context(|| format!("KVM_SET_ONE_REG of {register:#x}"))?;
    Ok(())
}

/// The registers by which vCPUs are debugged; whether KVM keeps interrupts out of single steps.
pub fn limits(kvm: &Kvm) -> (Limits, bool) {
    let count = |count: i32| usize::try_from(count).unwrap_or(0).min(16);
    let breakpoints = count(kvm.get_guest_debug_hw_bps());
    let watchpoints = count(kvm.get_guest_debug_hw_wps());
    let limits = Limits {
        breakpoints,
        watchpoints,
        all: breakpoints + watchpoints,
    };
    (limits, false)
}

/// The register that is SP: that of EL1, if PSTATE.SP says so and this is EL1.
fn stack(pstate: u64) -> u64 {
    match pstate & 0b1_1111 {
        0b0_0101 => SP_EL1,
        _ => SP_EL0,
    }
}

/// Reads a vector register; with SVE it is the first part of another.
fn vector(vcpu: &VcpuFd, number: u64) -> Result<[u8; 16]> {
    let mut short = [0; 16];
    if vcpu.get_one_reg(V0 + 4 * number, &mut short).is_ok() {
        return Ok(short);
    }
    let mut long = [0; 256];
    vcpu.get_one_reg(Z0 + (number << 5), &mut long)
        .context("KVM_GET_ONE_REG of a vector")?;
    short.copy_from_slice(&long[..16]);
    Ok(short)
}

fn set_vector(vcpu: &VcpuFd, number: u64, value: &[u8]) -> Result<()> {
    if vector(vcpu, number)? == value || vcpu.set_one_reg(V0 + 4 * number, value).is_ok() {
        return Ok(());
    }
    let mut long = [0; 256];
    let id = Z0 + (number << 5);
    vcpu.get_one_reg(id, &mut long)
        .context("KVM_GET_ONE_REG of a vector")?;
    long[..16].copy_from_slice(value);
    vcpu.set_one_reg(id, &long)
        .context("KVM_SET_ONE_REG of a vector")?;
    Ok(())
}

/// Returns the registers, as [`FEATURES`] has them.
///
/// # Errors
/// What KVM says.
pub fn registers(vcpu: &VcpuFd) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(1024);
    let pstate = get(vcpu, PSTATE)?;
    for number in 0..31 {
        out.extend_from_slice(&get(vcpu, X0 + 2 * number)?.to_le_bytes());
    }
    out.extend_from_slice(&get(vcpu, stack(pstate))?.to_le_bytes());
    out.extend_from_slice(&get(vcpu, PC)?.to_le_bytes());
    out.extend_from_slice(&(pstate as u32).to_le_bytes());
    for number in 0..32 {
        out.extend_from_slice(&vector(vcpu, number)?);
    }
    for register in [FPSR, FPCR] {
        let mut value = [0; 4];
        vcpu.get_one_reg(register, &mut value)
            .context("KVM_GET_ONE_REG of FPSR and FPCR")?;
        out.extend_from_slice(&value);
    }
    for register in SYSTEM {
        out.extend_from_slice(&get(vcpu, register)?.to_le_bytes());
    }
    Ok(out)
}

/// Sets the registers that differ.
///
/// # Errors
/// What KVM says, for instance of MPIDR_EL1, which it does not change.
pub fn set_registers(vcpu: &VcpuFd, bytes: &[u8]) -> Result<()> {
    let was = registers(vcpu)?;
    ensure!(
        bytes.len() == was.len(),
        "{} bytes of registers",
        bytes.len()
    );
    let mut at = 0;
    let mut next = |count: usize| {
        let range = at..at + count;
        at += count;
        let new = &bytes[range.clone()];
        (new != &was[range]).then_some(new)
    };
    let long = |new: &[u8]| {
        new.iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    let mut general = Vec::new();
    for number in 0..31 {
        general.push((X0 + 2 * number, next(8)));
    }
    let (sp, pc, cpsr) = (next(8), next(8), next(4));
    let pstate = match cpsr {
        Some(cpsr) => long(cpsr),
        None => get(vcpu, PSTATE)?,
    };
    general.extend([(PSTATE, cpsr), (stack(pstate), sp), (PC, pc)]);
    for number in 0..32 {
        if let Some(value) = next(16) {
            set_vector(vcpu, number, value)?;
        }
    }
    for register in [FPSR, FPCR] {
        if let Some(value) = next(4) {
            vcpu.set_one_reg(register, value)
                .context("KVM_SET_ONE_REG of FPSR and FPCR")?;
        }
    }
    general.extend(SYSTEM.map(|register| (register, next(8))));
    for (register, new) in general {
        if let Some(new) = new {
            set(vcpu, register, long(new))?;
        }
    }
    Ok(())
}

/// Returns where the vCPU is, as a virtual address.
///
/// # Errors
/// What KVM says.
pub fn position(vcpu: &VcpuFd) -> Result<u64> {
    get(vcpu, PC)
}

/// Returns the guest-physical address of a virtual one, and how many bytes from there on are in its page or
/// block; `None` where nothing is mapped.
///
/// # Errors
/// What KVM says.
pub fn translate(
    vcpu: &VcpuFd,
    address: u64,
    memory: &GuestMemoryMmap,
) -> Result<Option<(u64, u64)>> {
    let how = Translation {
        sctlr: get(vcpu, SCTLR_EL1)?,
        tcr: get(vcpu, TCR_EL1)?,
        tables: [get(vcpu, TTBR0_EL1)?, get(vcpu, TTBR1_EL1)?],
    };
    let read = |at| {
        let mut entry = [0; 8];
        memory.read_slice(&mut entry, GuestAddress(at)).ok()?;
        Some(entry)
    };
    Ok(how.translate(address, read))
}

/// Returns why the vCPU stopped.
#[must_use]
pub fn hit(exit: &kvm_debug_exit_arch, points: &[Point]) -> Option<Hit> {
    debug::hit(exit.hsr, exit.far, points)
}

/// Whether there are debug registers for these points.
#[must_use]
pub fn is_possible(points: &[Point]) -> bool {
    points.iter().all(|point| debug::registers(point).is_some())
}

/// Sets where the vCPU stops.
///
/// # Errors
/// What KVM says.
pub fn apply(vcpu: &VcpuFd, stops: &Stops) -> Result<()> {
    let mut wanted = kvm_guest_debug::default();
    if stops.software {
        wanted.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP;
    }
    if stops.step {
        wanted.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
    }
    let (mut breaks, mut watches) = (0, 0);
    for point in &stops.points {
        wanted.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW;
        let (control, value) = debug::registers(point).context("an impossible watchpoint")?;
        let (controls, values, at) = match point.access {
            Access::Execute => (
                &mut wanted.arch.dbg_bcr,
                &mut wanted.arch.dbg_bvr,
                &mut breaks,
            ),
            _ => (
                &mut wanted.arch.dbg_wcr,
                &mut wanted.arch.dbg_wvr,
                &mut watches,
            ),
        };
        ensure!(*at < controls.len(), "too many watchpoints");
        (controls[*at], values[*at]) = (control, value);
        *at += 1;
    }
    vcpu.set_guest_debug(&wanted).context("KVM_SET_GUEST_DEBUG")
}

/// Gives the guest the exception of its own breakpoint instruction. KVM has no request for that.
///
/// # Errors
/// What KVM says.
pub fn pass_on(vcpu: &VcpuFd, exit: &kvm_debug_exit_arch, stops: &Stops) -> Result<()> {
    let (vectors, sctlr) = (get(vcpu, VBAR_EL1)?, get(vcpu, SCTLR_EL1)?);
    let taken = debug::take_breakpoint(get(vcpu, PC)?, get(vcpu, PSTATE)?, vectors, sctlr);
    set(vcpu, ESR_EL1, exit.hsr.into())?;
    set(vcpu, ELR_EL1, taken.link)?;
    set(vcpu, SPSR_EL1, taken.saved)?;
    set(vcpu, PSTATE, taken.pstate)?;
    set(vcpu, PC, taken.pc)?;
    apply(vcpu, stops)
}

/// Masks interrupts for a step, so that it does not lead into a handler of one that is pending since the guest
/// stands still.
///
/// # Errors
/// What KVM says.
pub fn begin_step(vcpu: &VcpuFd, memory: &GuestMemoryMmap) -> Result<Masked> {
    let pc = get(vcpu, PC)?;
    let pstate = get(vcpu, PSTATE)?;
    let mut instruction = [0; 4];
    let is_maskable = match translate(vcpu, pc, memory)? {
        Some((at, _))
            if memory
                .read_slice(&mut instruction, GuestAddress(at))
                .is_ok() =>
        {
            debug::is_maskable(u32::from_le_bytes(instruction))
        }
        _ => false,
    };
    let added = if is_maskable { MASKED & !pstate } else { 0 };
    if added != 0 {
        set(vcpu, PSTATE, pstate | added)?;
    }
    Ok(Masked(added))
}

/// Unmasks them: in the registers that an exception has saved, if the step led to one.
///
/// # Errors
/// What KVM says.
pub fn end_step(vcpu: &VcpuFd, masked: Masked) -> Result<()> {
    if masked.0 == 0 {
        return Ok(());
    }
    let register = match debug::is_vector(get(vcpu, PC)?, get(vcpu, VBAR_EL1)?) {
        true => SPSR_EL1,
        false => PSTATE,
    };
    set(vcpu, register, get(vcpu, register)? & !masked.0)
}

/// Has vCPUs execute what was written here, whatever their caches hold.
///
/// # Safety
/// These bytes must be mapped.
pub(in crate::kvm) unsafe fn publish(start: *const u8, length: usize) {
    // The shortest line that the architecture allows (CTR_EL0.DminLine, IminLine).
    const LINE: usize = 4;
    let first = start as usize & !(LINE - 1);
    for line in (first..start as usize + length).step_by(LINE) {
        // SAFETY: the instructions change no data, and the caller promises a mapping. Linux allows them in
        // user space (arch/arm64/kernel/cpufeature.c: SCTLR_EL1.UCI is set). A guest whose caches are off
        // reads memory, thus to the point of coherency.
        unsafe {
            std::arch::asm!("dc cvac, {0}", "dsb ish", "ic ivau, {0}", in(reg) line, options(nostack, preserves_flags));
        }
    }
    // SAFETY: barriers.
    unsafe { std::arch::asm!("dsb ish", "isb", options(nostack, preserves_flags)) };
}
