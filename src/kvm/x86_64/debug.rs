//! Debugging an x86_64 vCPU: registers as gdb numbers them, breakpoints and steps by KVM_SET_GUEST_DEBUG.

use crate::kvm::stops::{Masked, Stops};
use anyhow::{Context, Result};
use armlet_arch::debug::{Hit, Limits, Point};
use armlet_arch::x86_64::debug;
use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_debug_exit_arch, kvm_fpu, kvm_guest_debug,
    kvm_guest_debug_arch, kvm_regs, kvm_sregs,
};
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::GuestMemoryMmap;

pub use debug::BREAK;

/// The architecture, as gdb calls it.
pub const ARCHITECTURE: &str = "i386:x86-64";
/// Its features with their registers, in the order of their numbers: name, bits, type.
pub const FEATURES: &[(&str, &str, &str)] = &[
    (
        "org.gnu.gdb.i386.core",
        "",
        "rax:64 rbx:64 rcx:64 rdx:64 rsi:64 rdi:64 rbp:64:data_ptr rsp:64:data_ptr r8-15:64 \
         rip:64:code_ptr eflags:32 cs:32 ss:32 ds:32 es:32 fs:32 gs:32 st0-7:80:i387_ext fctrl:32 \
         fstat:32 ftag:32 fiseg:32 fioff:32 foseg:32 fooff:32 fop:32",
    ),
    (
        "org.gnu.gdb.i386.sse",
        "<vector id=\"v4f\" type=\"ieee_single\" count=\"4\"/>\
         <vector id=\"v2d\" type=\"ieee_double\" count=\"2\"/>\
         <vector id=\"v16b\" type=\"uint8\" count=\"16\"/>\
         <vector id=\"v4w\" type=\"uint32\" count=\"4\"/>\
         <vector id=\"v2q\" type=\"uint64\" count=\"2\"/>\
         <union id=\"xmm\"><field name=\"v4_float\" type=\"v4f\"/>\
         <field name=\"v2_double\" type=\"v2d\"/><field name=\"v16_int8\" type=\"v16b\"/>\
         <field name=\"v4_int32\" type=\"v4w\"/><field name=\"v2_int64\" type=\"v2q\"/>\
         <field name=\"uint128\" type=\"uint128\"/></union>",
        "xmm0-15:128:xmm mxcsr:32",
    ),
    ("org.gnu.gdb.i386.segments", "", "fs_base:64 gs_base:64"),
    (
        "org.armlet.system",
        "",
        "cr0:64 cr2:64:data_ptr cr3:64 cr4:64 efer:64",
    ),
];

/// EFER.LMA.
const LONG_MODE: u64 = 1 << 10;
/// KVM_CAP_SET_GUEST_DEBUG2: which controls KVM knows (Documentation/virt/kvm/api.rst).
const KVM_CAP_SET_GUEST_DEBUG2: u64 = 195;

/// The registers by which vCPUs are debugged; whether KVM keeps interrupts out of single steps.
pub fn limits(kvm: &Kvm) -> (Limits, bool) {
    let known = kvm.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2);
    let limits = Limits {
        breakpoints: debug::POINTS,
        watchpoints: debug::POINTS,
        all: debug::POINTS,
    };
    (limits, known as u32 & KVM_GUESTDBG_BLOCKIRQ != 0)
}

/// Writes values one after the other.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn long(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn word(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }
}

/// Reads them back.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn long(&mut self) -> u64 {
        let bytes = self.take(8);
        bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn word(&mut self) -> u32 {
        let bytes = self.take(4);
        bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u32::from(*byte))
    }
}

/// Returns the registers, as [`FEATURES`] has them.
///
/// # Errors
/// What KVM says.
pub fn registers(vcpu: &VcpuFd) -> Result<Vec<u8>> {
    let general = vcpu.get_regs().context("KVM_GET_REGS")?;
    let system = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    let fpu = vcpu.get_fpu().context("KVM_GET_FPU")?;
    let mut out = Writer::default();
    for value in [
        general.rax,
        general.rbx,
        general.rcx,
        general.rdx,
        general.rsi,
        general.rdi,
        general.rbp,
        general.rsp,
        general.r8,
        general.r9,
        general.r10,
        general.r11,
        general.r12,
        general.r13,
        general.r14,
        general.r15,
        general.rip,
    ] {
        out.long(value);
    }
    out.word(general.rflags as u32);
    for segment in [
        system.cs, system.ss, system.ds, system.es, system.fs, system.gs,
    ] {
        out.word(segment.selector.into());
    }
    for register in fpu.fpr {
        out.0.extend_from_slice(&register[..10]);
    }
    // Each register's two bits, of which FXSAVE's form of the tag word has one: whether it is in use.
    let tags = (0..8).fold(0, |tags, at| match fpu.ftwx >> at & 1 {
        0 => tags | 0b11 << (2 * at),
        _ => tags,
    });
    let state = [
        fpu.fcw.into(),
        fpu.fsw.into(),
        tags,
        0,
        fpu.last_ip as u32,
        0,
        fpu.last_dp as u32,
        fpu.last_opcode.into(),
    ];
    for value in state {
        out.word(value);
    }
    for register in fpu.xmm {
        out.0.extend_from_slice(&register);
    }
    out.word(fpu.mxcsr);
    out.long(system.fs.base);
    out.long(system.gs.base);
    for value in [system.cr0, system.cr2, system.cr3, system.cr4, system.efer] {
        out.long(value);
    }
    Ok(out.0)
}

/// Sets the registers. A segment's selector changes its descriptor in no mode but that of 8086; it is kept.
///
/// # Errors
/// What KVM says, for instance of control registers that do not go together.
pub fn set_registers(vcpu: &VcpuFd, bytes: &[u8]) -> Result<()> {
    let mut system: kvm_sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    let mut fpu: kvm_fpu = vcpu.get_fpu().context("KVM_GET_FPU")?;
    let mut general: kvm_regs = vcpu.get_regs().context("KVM_GET_REGS")?;
    let was = system;
    let mut from = Reader(bytes);
    for value in [
        &mut general.rax,
        &mut general.rbx,
        &mut general.rcx,
        &mut general.rdx,
        &mut general.rsi,
        &mut general.rdi,
        &mut general.rbp,
        &mut general.rsp,
        &mut general.r8,
        &mut general.r9,
        &mut general.r10,
        &mut general.r11,
        &mut general.r12,
        &mut general.r13,
        &mut general.r14,
        &mut general.r15,
        &mut general.rip,
    ] {
        *value = from.long();
    }
    general.rflags = from.word().into();
    from.take(6 * 4);
    for register in &mut fpu.fpr {
        register[..10].copy_from_slice(from.take(10));
    }
    fpu.fcw = from.word() as u16;
    fpu.fsw = from.word() as u16;
    let tags = from.word();
    let in_use = |at: u32| tags >> (2 * at) & 0b11 != 0b11;
    fpu.ftwx = (0..8).fold(0, |word, at| word | u8::from(in_use(at)) << at);
    from.take(4);
    fpu.last_ip = from.word().into();
    from.take(4);
    fpu.last_dp = from.word().into();
    fpu.last_opcode = from.word() as u16;
    for register in &mut fpu.xmm {
        register.copy_from_slice(from.take(16));
    }
    fpu.mxcsr = from.word();
    for value in [
        &mut system.fs.base,
        &mut system.gs.base,
        &mut system.cr0,
        &mut system.cr2,
        &mut system.cr3,
        &mut system.cr4,
        &mut system.efer,
    ] {
        *value = from.long();
    }
    vcpu.set_regs(&general).context("KVM_SET_REGS")?;
    vcpu.set_fpu(&fpu).context("KVM_SET_FPU")?;
    if system != was {
        vcpu.set_sregs(&system).context("KVM_SET_SREGS")?;
    }
    Ok(())
}

/// Returns where the vCPU is, as a virtual address.
///
/// # Errors
/// What KVM says.
pub fn position(vcpu: &VcpuFd) -> Result<u64> {
    Ok(vcpu.get_regs().context("KVM_GET_REGS")?.rip)
}

/// Returns the guest-physical address of a virtual one, and how many bytes from there on are in its page;
/// `None` where nothing is mapped.
///
/// # Errors
/// What KVM says.
pub fn translate(vcpu: &VcpuFd, address: u64, _: &GuestMemoryMmap) -> Result<Option<(u64, u64)>> {
    let system = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    // KVM_TRANSLATE looks at no bit above those of the tables.
    if system.efer & LONG_MODE != 0 && !debug::is_canonical(address, system.cr4) {
        return Ok(None);
    }
    let found = vcpu.translate_gva(address).context("KVM_TRANSLATE")?;
    let left = 0x1000 - address % 0x1000;
    Ok((found.valid != 0).then_some((found.physical_address, left)))
}

/// Returns why the vCPU stopped.
#[must_use]
pub fn hit(exit: &kvm_debug_exit_arch, points: &[Point]) -> Option<Hit> {
    debug::hit(exit.exception, exit.dr6, points)
}

/// Whether there are debug registers for these points.
#[must_use]
pub fn is_possible(points: &[Point]) -> bool {
    debug::registers(points).is_some()
}

/// Sets where the vCPU stops.
///
/// # Errors
/// What KVM says.
pub fn apply(vcpu: &VcpuFd, stops: &Stops) -> Result<()> {
    set(vcpu, stops, 0)
}

fn set(vcpu: &VcpuFd, stops: &Stops, more: u32) -> Result<()> {
    let mut wanted = kvm_guest_debug {
        control: more,
        ..Default::default()
    };
    if stops.software {
        wanted.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP;
    }
    if !stops.points.is_empty() {
        wanted.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
        let debugreg = debug::registers(&stops.points).context("impossible watchpoints")?;
        wanted.arch = kvm_guest_debug_arch { debugreg };
    }
    if stops.step {
        wanted.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
        if stops.keeps_interrupts_out {
            wanted.control |= KVM_GUESTDBG_BLOCKIRQ;
        }
    }
    if more != 0 {
        wanted.control |= KVM_GUESTDBG_ENABLE;
    }
    vcpu.set_guest_debug(&wanted).context("KVM_SET_GUEST_DEBUG")
}

/// Gives the guest the exception of its own breakpoint instruction.
///
/// # Errors
/// What KVM says.
pub fn pass_on(vcpu: &VcpuFd, _: &kvm_debug_exit_arch, stops: &Stops) -> Result<()> {
    set(vcpu, stops, KVM_GUESTDBG_INJECT_BP)
}

/// Interrupts are kept out of a step by KVM.
///
/// # Errors
/// None.
pub fn begin_step(_: &VcpuFd, _: &GuestMemoryMmap) -> Result<Masked> {
    Ok(Masked(0))
}

/// Nothing was changed for the step.
///
/// # Errors
/// None.
pub fn end_step(_: &VcpuFd, _: Masked) -> Result<()> {
    Ok(())
}

/// Has vCPUs execute what was written: their caches are coherent.
///
/// # Safety
/// None is needed here.
pub(in crate::kvm) unsafe fn publish(_: *const u8, _: usize) {}
