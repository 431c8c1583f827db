//! KVM on x86_64: it can be probed and planned for; making guests run is not there yet.

use super::{Depth, KvmArch, RawExit};
use crate::probe::{Virtualization, X86Facts};
use anyhow::{Context, Result, bail};
use armlet_arch::irq::Spi;
use armlet_arch::x86_64::{Host, X86_64};
use armlet_arch::{Plan, Request, Width};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

const NOT_YET: &str =
    "armlet does not run x86_64 guests yet; 'armlet plan' works, and guests run on ARM64 hosts";

impl KvmArch for X86_64 {
    type Chip = ();

    fn depth(_: &Request<Self>) -> Depth {
        Depth::Quick
    }

    fn probe(kvm: &Kvm, _: Depth) -> Result<Host> {
        Ok(Host {
            phys_bits: physical_bits(kvm)?,
            max_vcpus: kvm.get_max_vcpus() as u32,
        })
    }

    fn facts(kvm: &Kvm) -> Result<Virtualization> {
        Ok(Virtualization::X86(X86Facts {
            host: Self::probe(kvm, Depth::Full)?,
        }))
    }

    fn create_vm(_: &Kvm, _: &Width) -> Result<VmFd> {
        bail!(NOT_YET)
    }

    fn populate(_: &VmFd, _: &Plan<Self>) -> Result<(Vec<VcpuFd>, ())> {
        bail!(NOT_YET)
    }

    fn irq_number(spi: Spi) -> u32 {
        spi.0
    }

    fn gsi(spi: Spi) -> u32 {
        spi.0
    }

    fn answer_raw(_: &mut VcpuFd, reason: u32) -> Result<RawExit> {
        bail!("KVM stopped it for a reason that armlet does not know (exit {reason})")
    }

    fn position(vcpu: &VcpuFd) -> String {
        match vcpu.get_regs() {
            Ok(registers) => format!("RIP {:#x}", registers.rip),
            Err(_) => "RIP unknown".to_owned(),
        }
    }
}

/// Nothing to do: caches are coherent with every kind of memory.
///
/// # Safety
/// None; it has the shape of its twin.
pub(super) unsafe fn clean_to_memory(_: *const u8) {}

/// Physical address bits of guests: CPUID 0x8000_0008, EAX 23:16 where given, else 7:0.
fn physical_bits(kvm: &Kvm) -> Result<u8> {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .context("cannot ask KVM for its CPUID")?;
    let leaf = cpuid
        .as_slice()
        .iter()
        .find(|entry| entry.function == 0x8000_0008);
    Ok(leaf.map_or(36, |entry| match (entry.eax >> 16) as u8 {
        0 => entry.eax as u8,
        guest => guest,
    }))
}
