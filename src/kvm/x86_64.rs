//! KVM on x86_64. The order of the calls follows the kernel's requirements
//! (Documentation/virt/kvm/api.rst, 4.24, 4.36, 4.40).

mod cpuid;

#[cfg(feature = "gdb")]
pub(super) mod debug;
pub(super) mod state;

use super::arch::{Depth, KvmArch, OtherCalls, PortAccess, RawExit};
use super::facts::{ExitlessTimers, Virtualization, X86Facts};
use super::interrupts::{Interrupts, Pins};
use super::offers::Offers;
use anyhow::{Context, Result, bail, ensure};
use armlet_arch::irq::Spi;
use armlet_arch::x86_64::cpu::{BOOT_CS, BOOT_DS};
use armlet_arch::x86_64::{Boot, Host, X86_64};
use armlet_arch::{Plan, Range, Request, Width};
use armlet_devices::action::Action;
use armlet_devices::bus::Bus;
use armlet_devices::ioapic::{IoApic, PINS};
use armlet_system::eintr::uninterrupted;
use armlet_system::seccomp::Native;
use cpuid::Topology;
use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_CAP_X86_DISABLE_EXITS, KVM_EXIT_IO_IN,
    KVM_MAX_CPUID_ENTRIES, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    Msrs, kvm_cpuid_entry2, kvm_enable_cap, kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

/// MSRs that a guest expects its firmware to have set (Intel SDM volume 4): MTRRs enabled with
/// write-back as the default type (IA32_MTRR_DEF_TYPE), fast string instructions
/// (IA32_MISC_ENABLE).
const FIRMWARE_MSRS: [(u32, u64); 2] = [(0x2ff, 1 << 11 | 6), (0x1a0, 1)];

impl KvmArch for X86_64 {
    type Chip = state::Chip;
    type VcpuState = state::VcpuState;
    type ChipState = state::ChipState;
    type Time = state::Time;

    const PORTS: bool = true;

    const LATE_INTERRUPTS: bool = true;

    const OTHER_CALLS: OtherCalls = OtherCalls {
        native: Native {
            // AUDIT_ARCH_X86_64
            architecture: 0xc000_003e,
            calls: &[
                libc::SYS_alarm,
                libc::SYS_epoll_wait,
                libc::SYS_getpgrp,
                libc::SYS_poll,
            ],
            files: &[
                libc::SYS_lstat,
                libc::SYS_open,
                libc::SYS_readlink,
                libc::SYS_stat,
            ],
        },
        vcpu: &[
            ("KVM_SET_GSI_ROUTING", 0xae6a),
            ("KVM_GET_REGS", 0xae81),
            ("KVM_GET_SREGS", 0xae83),
            ("KVM_GET_MP_STATE", 0xae98),
            ("KVM_KVMCLOCK_CTRL", 0xaead),
        ],
        debug: &[
            ("KVM_SET_REGS", 0xae82),
            ("KVM_SET_SREGS", 0xae84),
            ("KVM_TRANSLATE", 0xae85),
            ("KVM_GET_FPU", 0xae8c),
            ("KVM_SET_FPU", 0xae8d),
            ("KVM_SET_GUEST_DEBUG", 0xae9b),
        ],
        machine: &[
            ("KVM_GET_SUPPORTED_CPUID", 0xae05),
            ("KVM_SET_TSS_ADDR", 0xae47),
            ("KVM_SET_IDENTITY_MAP_ADDR", 0xae48),
            ("KVM_CREATE_IRQCHIP", 0xae60),
            ("KVM_CREATE_PIT2", 0xae77),
            ("KVM_SET_REGS", 0xae82),
            ("KVM_SET_SREGS", 0xae84),
            ("KVM_SET_MSRS", 0xae89),
            ("KVM_SET_CPUID2", 0xae90),
        ],
        save: &[
            ("KVM_GET_MSR_INDEX_LIST", 0xae02),
            ("KVM_CHECK_EXTENSION", 0xae03),
            ("KVM_SET_CLOCK", 0xae7b),
            ("KVM_GET_CLOCK", 0xae7c),
            ("KVM_GET_MSRS", 0xae88),
            ("KVM_SET_MSRS", 0xae89),
            ("KVM_GET_LAPIC", 0xae8e),
            ("KVM_GET_CPUID2", 0xae91),
            ("KVM_GET_VCPU_EVENTS", 0xae9f),
            ("KVM_GET_DEBUGREGS", 0xaea1),
            // KVM_ENABLE_CAP is another of this number.
            ("KVM_GET_TSC_KHZ", 0xaea3),
            ("KVM_GET_XCRS", 0xaea6),
            ("KVM_GET_NESTED_STATE", 0xaebe),
            ("KVM_GET_SREGS2", 0xaecc),
            ("KVM_GET_XSAVE2", 0xaecf),
            ("KVM_SET_DEVICE_ATTR", 0xaee1),
            ("KVM_GET_DEVICE_ATTR", 0xaee2),
        ],
        restore: &[
            ("KVM_GET_IRQCHIP", 0xae62),
            ("KVM_SET_IRQCHIP", 0xae63),
            ("KVM_SET_LAPIC", 0xae8f),
            ("KVM_SET_MP_STATE", 0xae99),
            ("KVM_SET_VCPU_EVENTS", 0xaea0),
            // KVM_SET_DEBUGREGS has the same number.
            ("KVM_SET_TSC_KHZ", 0xaea2),
            ("KVM_SET_XSAVE", 0xaea5),
            ("KVM_SET_XCRS", 0xaea7),
            ("KVM_SET_NESTED_STATE", 0xaebf),
            ("KVM_SET_SREGS2", 0xaecd),
        ],
        unknown: &[],
        known: NAMES,
    };

    unsafe fn call_argument(context: *const c_void, index: usize) -> u64 {
        const ARGUMENTS: [libc::c_int; 6] = [
            libc::REG_RDI,
            libc::REG_RSI,
            libc::REG_RDX,
            libc::REG_R10,
            libc::REG_R8,
            libc::REG_R9,
        ];
        // SAFETY: the caller's promise: it is a ucontext_t, which need not be aligned as Rust has it.
        let registers =
            unsafe { &raw const (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
        let register = ARGUMENTS[index.min(5)] as usize;
        // SAFETY: as above; there are 23, of which these are six.
        unsafe { registers.cast::<u64>().add(register).read_unaligned() }
    }

    fn depth(_: &Request<Self>) -> Depth {
        Depth::Quick
    }

    fn probe(kvm: &Kvm, _: Depth) -> Result<Host> {
        let cpuid = supported_cpuid(kvm)?;
        let offers = |cap: u32| u32::try_from(kvm.check_extension_raw(cap.into())).unwrap_or(0);
        Ok(Host {
            phys_bits: physical_bits(&cpuid),
            max_vcpus: kvm.get_max_vcpus() as u32,
            paravirtual: leaf(&cpuid, 0x4000_0001).map_or(0, |leaf| leaf.eax),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            wide_apic_ids: offers(KVM_CAP_SPLIT_IRQCHIP) != 0
                && offers(KVM_CAP_X2APIC_API) & WIDE_APIC_IDS == WIDE_APIC_IDS,
            exits_off: offers(KVM_CAP_X86_DISABLE_EXITS),
        })
    }

    fn facts(kvm: &Kvm) -> Result<Virtualization> {
        Ok(Virtualization::X86(X86Facts {
            host: Self::probe(kvm, Depth::Full)?,
            timers: ExitlessTimers::look(),
            hardware: cpu_virtualizes(),
            offers: Offers::ask(|cap| kvm.check_extension_raw(cap.into())),
        }))
    }

    fn create_vm(kvm: &Kvm, _: &Width) -> Result<VmFd> {
        // The width comes from CPUID; a VM has none here.
        uninterrupted(|| kvm.create_vm()).context("cannot create a VM")
    }

    fn populate(
        kvm: &Kvm,
        vm: &VmFd,
        plan: &Plan<Self>,
        _: &[state::VcpuState],
    ) -> Result<(Vec<VcpuFd>, state::Chip)> {
        let chip = &plan.layout.irqchip;
        vm.set_identity_map_address(chip.identity_map.start())
            .context("cannot place KVM's identity map")?;
        vm.set_tss_address(chip.task_state.start() as usize)
            .context("cannot place KVM's task state")?;
        if plan.features.exits_off != 0 {
            enable(vm, KVM_CAP_X86_DISABLE_EXITS, plan.features.exits_off)
                .context("cannot disable exits for instructions")?;
        }
        match chip.messages {
            false => vm
                .create_irq_chip()
                .context("cannot create the interrupt controllers")?,
            true => {
                enable(vm, KVM_CAP_X2APIC_API, WIDE_APIC_IDS)
                    .context("cannot enable 32-bit APIC IDs")?;
                enable(vm, KVM_CAP_SPLIT_IRQCHIP, PINS as u32)
                    .context("cannot create a split interrupt controller")?;
            }
        }
        let vcpus = (0..plan.vcpus.len() as u64)
            .map(|id| {
                vm.create_vcpu(id)
                    .with_context(|| format!("cannot create vCPU {id} of {}", plan.vcpus.len()))
            })
            .collect::<Result<Vec<_>>>()?;
        let supported = supported_cpuid(kvm)?;
        for (vcpu, planned) in vcpus.iter().zip(&plan.vcpus) {
            let topology = Topology {
                apic_id: planned.apic_id,
                vcpus: plan.vcpus.len() as u32,
                phys_bits: plan.width.bits,
                features: plan.features,
                messages: chip.messages,
            };
            let leaves = cpuid::fitted(supported.as_slice(), topology);
            initialise(vcpu, &leaves, planned.boot.as_ref())
                .and_then(|()| match chip.messages {
                    true => widen_apic(vcpu),
                    false => Ok(()),
                })
                .with_context(|| format!("cannot initialise vCPU {}", planned.apic_id))?;
        }
        Ok((vcpus, state::Chip::new(kvm, !chip.messages)?))
    }

    fn io_apic(
        interrupts: &Arc<Interrupts>,
        plan: &Plan<Self>,
    ) -> Option<(Range, Arc<Mutex<IoApic>>)> {
        let chip = &plan.layout.irqchip;
        chip.messages.then(|| {
            let interrupts = Arc::clone(interrupts);
            let apic = IoApic::new(Box::new(move |messages| {
                if let Err(error) = interrupts.send((0..).zip(messages.iter().copied())) {
                    log::error!("cannot update the I/O APIC's routes: {error:#}");
                }
            }));
            (chip.ioapic, Arc::new(Mutex::new(apic)))
        })
    }

    fn pins(plan: &Plan<Self>) -> Pins {
        match plan.layout.irqchip.messages {
            true => Pins::None,
            false => Pins::Pc,
        }
    }

    fn irq_number(spi: Spi) -> u32 {
        spi.0
    }

    fn gsi(spi: Spi) -> u32 {
        spi.0
    }

    fn answer_raw(_: &mut VcpuFd, reason: u32) -> Result<RawExit> {
        bail!("KVM stopped it with an unknown exit reason ({reason})")
    }

    fn answer_ports(vcpu: &mut VcpuFd, ports: &Bus) -> Result<PortAccess> {
        let run = vcpu.get_kvm_run();
        let start: *mut u8 = std::ptr::from_mut(run).cast();
        // SAFETY: this is called for exits of this kind only, for which the kernel fills in this
        // member of the union.
        let io = unsafe { run.__bindgen_anon_1.io };
        let (size, bytes) = (
            usize::from(io.size),
            usize::from(io.size) * io.count as usize,
        );
        // SAFETY: the kernel has stored this many bytes there, within the pages mapped for the vCPU
        // (Documentation/virt/kvm/api.rst, KVM_EXIT_IO), and nothing else refers to them.
        let data =
            unsafe { std::slice::from_raw_parts_mut(start.add(io.data_offset as usize), bytes) };
        let (port, write) = (
            u64::from(io.port),
            u32::from(io.direction) != KVM_EXIT_IO_IN,
        );
        let (mut found, mut action) = (true, Action::None);
        // A string instruction accesses one port several times.
        for unit in data.chunks_exact_mut(size.max(1)) {
            let answered = match write {
                true => ports.write(port, unit),
                false => ports.read(port, unit),
            };
            match answered {
                Some(new) => action.add(new),
                None => {
                    found = false;
                    // Reads of an undriven bus return ones.
                    if !write {
                        unit.fill(0xff);
                    }
                }
            }
        }
        Ok(PortAccess {
            port: io.port,
            write,
            found,
            action,
        })
    }

    /// Tells the guest through kvmclock, so that its watchdogs do not take the pause for a lockup
    /// (Linux, arch/x86/kernel/kvmclock.c: kvm_check_and_clear_guest_paused).
    fn note_pause(vcpu: &VcpuFd) {
        // For a guest without kvmclock, KVM returns EINVAL.
        if let Err(error) = vcpu.kvmclock_ctrl()
            && error.errno() != libc::EINVAL
        {
            log::warn!("cannot tell the guest that it was paused: {error}");
        }
    }

    fn time(vm: &VmFd, first: &VcpuFd) -> Result<state::Time> {
        state::Time::read(vm, first)
    }

    fn set_time(
        vm: &VmFd,
        vcpu: &VcpuFd,
        (index, count): (usize, usize),
        from: &state::Time,
        to: &state::Time,
    ) -> Result<()> {
        state::set_tsc(vcpu, from, to)?;
        match index + 1 == count {
            true => state::set_clock(vm, to),
            false => Ok(()),
        }
    }

    fn stop_time(to: &state::Time, vcpus: &mut [state::VcpuState], chip: &mut state::ChipState) {
        to.put(vcpus, chip);
    }

    fn save_vcpu(vcpu: &VcpuFd, chip: &state::Chip) -> Result<state::VcpuState> {
        state::save_vcpu(vcpu, chip)
    }

    fn save_chip(
        vm: &VmFd,
        chip: &state::Chip,
        _: &[state::VcpuState],
    ) -> Result<state::ChipState> {
        state::save_chip(vm, chip)
    }

    fn restore(
        vm: &VmFd,
        chip: &state::Chip,
        vcpus: &[VcpuFd],
        states: (&[state::VcpuState], &state::ChipState),
    ) -> Result<()> {
        state::restore(vm, chip, vcpus, states)
    }

    fn position(vcpu: &VcpuFd) -> String {
        match vcpu.get_regs() {
            Ok(registers) => format!("RIP {:#x}", registers.rip),
            Err(_) => "RIP unknown".to_owned(),
        }
    }
}

/// APIC IDs have 32 bits, and 255 is not the broadcast ID (Documentation/virt/kvm/api.rst,
/// KVM_CAP_X2APIC_API).
const WIDE_APIC_IDS: u32 = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;

fn enable(vm: &VmFd, cap: u32, argument: u32) -> Result<()> {
    let mut wanted = kvm_enable_cap {
        cap,
        ..Default::default()
    };
    wanted.args[0] = u64::from(argument);
    Ok(vm.enable_cap(&wanted)?)
}

/// Does nothing: caches are coherent with all memory types.
///
/// # Safety
/// None; it has the signature of its counterpart for arm64.
pub(super) unsafe fn clean_to_memory(_: *const u8) {}

/// Returns whether the CPU has VMX or SVM.
fn cpu_virtualizes() -> bool {
    let about = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = about.lines().find(|line| line.starts_with("flags"));
    let mut flags = flags.unwrap_or_default().split_whitespace();
    flags.any(|flag| flag == "vmx" || flag == "svm")
}

fn supported_cpuid(kvm: &Kvm) -> Result<CpuId> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .context("cannot ask KVM for its CPUID")
}

fn leaf(cpuid: &CpuId, function: u32) -> Option<&kvm_cpuid_entry2> {
    let mut leaves = cpuid.as_slice().iter();
    leaves.find(|leaf| leaf.function == function)
}

/// Returns the guests' physical address bits: CPUID 0x8000_0008, EAX 23:16 where given, else 7:0.
fn physical_bits(cpuid: &CpuId) -> u8 {
    leaf(cpuid, 0x8000_0008).map_or(36, |entry| match (entry.eax >> 16) as u8 {
        0 => entry.eax as u8,
        guest => guest,
    })
}

/// Initialises a vCPU; CPUID first, because KVM checks the other registers against it.
fn initialise(vcpu: &VcpuFd, leaves: &[kvm_cpuid_entry2], boot: Option<&Boot>) -> Result<()> {
    let cpuid = CpuId::from_entries(leaves).context("CPUID has too many leaves")?;
    vcpu.set_cpuid2(&cpuid).context("CPUID")?;
    let entries = FIRMWARE_MSRS.map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).context("too many MSRs")?;
    let written = vcpu.set_msrs(&msrs).context("MSRs")?;
    ensure!(
        written == FIRMWARE_MSRS.len(),
        "KVM rejects the MSR {:#x}",
        FIRMWARE_MSRS[written].0
    );
    match boot {
        Some(boot) => enter(vcpu, boot),
        None => Ok(()),
    }
}

/// Switches a local APIC to x2APIC mode, as firmware does where APIC IDs exceed 8 bits. An
/// operating system that starts in xAPIC mode ignores such CPUs (arch/x86/kernel/acpi:
/// acpi_parse_x2apic; Intel SDM volume 3, section 11.12.1, IA32_APIC_BASE.EXTD).
fn widen_apic(vcpu: &VcpuFd) -> Result<()> {
    const EXTENDED: u64 = 1 << 10;
    let mut system = vcpu.get_sregs().context("system registers")?;
    system.apic_base |= EXTENDED;
    vcpu.set_sregs(&system).context("the mode of its APIC")
}

/// Sets the boot CPU's registers for its first instruction.
fn enter(vcpu: &VcpuFd, boot: &Boot) -> Result<()> {
    let mut system = vcpu.get_sregs().context("system registers")?;
    system.cs = segment(BOOT_CS, boot.code);
    for data in [
        &mut system.ds,
        &mut system.es,
        &mut system.fs,
        &mut system.gs,
        &mut system.ss,
    ] {
        *data = segment(BOOT_DS, boot.data);
    }
    system.gdt.base = boot.gdt_base;
    system.gdt.limit = boot.gdt_limit;
    system.idt.base = 0;
    system.idt.limit = 0;
    system.cr0 = boot.cr0;
    system.cr3 = boot.cr3;
    system.cr4 = boot.cr4;
    system.efer = boot.efer;
    vcpu.set_sregs(&system).context("system registers")?;
    vcpu.set_regs(&kvm_regs {
        rip: boot.rip,
        rsi: boot.rsi,
        rbx: boot.rbx,
        rflags: boot.rflags,
        ..Default::default()
    })
    .context("registers")
}

/// Returns the segment that a descriptor describes (Intel SDM volume 3, section 3.4.5).
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let bits = |shift: u32, count: u32| (descriptor >> shift & ((1 << count) - 1)) as u8;
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        unusable: 0,
        padding: 0,
    }
}
/// The names of calls that this architecture alone has (arch/x86/entry/syscalls/syscall_64.tbl).
macro_rules! names {
    ($($name:ident),* $(,)?) => {
        const NAMES: &[(&str, i64)] = &[$((stringify!($name), libc::$name)),*];
    };
}

names! {
        SYS_access, SYS_alarm, SYS_arch_prctl, SYS_chmod, SYS_chown, SYS_creat, SYS_dup2,
        SYS_epoll_create, SYS_epoll_wait, SYS_eventfd, SYS_fork, SYS_futimesat,
        SYS_get_thread_area, SYS_getdents, SYS_getpgrp, SYS_getrlimit, SYS_inotify_init,
        SYS_ioperm, SYS_iopl, SYS_kexec_file_load, SYS_lchown, SYS_link, SYS_lstat,
        SYS_mkdir, SYS_mknod, SYS_modify_ldt, SYS_open, SYS_pause, SYS_pipe, SYS_poll,
        SYS_readlink, SYS_rename, SYS_renameat, SYS_rmdir, SYS_select, SYS_set_thread_area,
        SYS_setrlimit, SYS_signalfd, SYS_stat, SYS_symlink, SYS_sync_file_range, SYS_sysfs,
        SYS_time, SYS_unlink, SYS_uselib, SYS_ustat, SYS_utime, SYS_utimes, SYS_vfork,
}
