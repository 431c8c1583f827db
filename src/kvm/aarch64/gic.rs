//! Creates KVM's GIC and ITS.

use super::access::set_attribute;
use anyhow::{Context, Result};
use armlet_arch::Range;
use armlet_arch::aarch64::gic::Gic;
use armlet_arch::pci::Msi;
use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_VGIC_ITS_ADDR_TYPE, KVM_VGIC_V2_ADDR_TYPE_CPU,
    KVM_VGIC_V2_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION,
    kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::{DeviceFd, VmFd};

/// The interrupt controller: the GIC, and the ITS where MSIs come to it.
pub struct Chip {
    /// The GIC.
    pub(super) gic: DeviceFd,
    /// The ITS.
    pub(super) its: Option<DeviceFd>,
}

pub(super) fn create(vm: &VmFd, gic: &Gic) -> Result<DeviceFd> {
    let kind = match gic {
        Gic::V2 { .. } => kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2,
        Gic::V3 { .. } => kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
    };
    vm.create_device(&mut kvm_create_device {
        type_: kind,
        fd: 0,
        flags: 0,
    })
    .with_context(|| {
        format!(
            "cannot create a GICv{} ('armlet probe' says what this host has)",
            gic.version()
        )
    })
}

pub(super) fn init(chip: &DeviceFd, gic: &Gic) -> Result<()> {
    let address = |kind: u32, value: u64, what: &str| {
        set_attribute(chip, KVM_DEV_ARM_VGIC_GRP_ADDR, u64::from(kind), &value)
            .with_context(|| format!("cannot place the {what} at {value:#x}"))
    };
    match gic {
        Gic::V2 {
            distributor,
            cpu_interface,
            ..
        } => {
            address(
                KVM_VGIC_V2_ADDR_TYPE_DIST,
                distributor.start(),
                "GICv2 distributor",
            )?;
            address(
                KVM_VGIC_V2_ADDR_TYPE_CPU,
                cpu_interface.start(),
                "GICv2 CPU interface",
            )?;
        }
        Gic::V3 {
            distributor,
            redistributors,
            ..
        } => {
            address(
                KVM_VGIC_V3_ADDR_TYPE_DIST,
                distributor.start(),
                "GICv3 distributor",
            )?;
            for (index, run) in redistributors.iter().enumerate() {
                // Number of frames in bits 63:52, address in 51:16, index in 11:0
                // (Documentation/virt/kvm/devices/arm-vgic-v3.rst).
                let region = u64::from(run.frames) << 52 | run.range.start() | index as u64;
                address(
                    KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION,
                    region,
                    "GICv3 redistributors",
                )?;
            }
        }
    }
    let interrupts = gic.interrupts();
    set_attribute(chip, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &interrupts)
        .with_context(|| format!("cannot give the GIC {interrupts} interrupts"))?;
    control(chip, KVM_DEV_ARM_VGIC_CTRL_INIT).context("cannot initialise the GIC")
}

/// Creates the ITS, if MSIs go to one. Redistributors have LPIs from then on, so this comes before the guest
/// runs (arch/arm64/kvm/vgic/vgic-mmio-v3.c: vgic_mmio_read_v3r_typer).
pub(super) fn create_its(vm: &VmFd, msi: Option<Msi>) -> Result<Option<DeviceFd>> {
    let Some(Msi::Its { window }) = msi else {
        return Ok(None);
    };
    let made = vm.create_device(&mut kvm_create_device {
        type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS,
        fd: 0,
        flags: 0,
    });
    let its = made.context("cannot create an ITS; --transport mmio does without")?;
    place_its(&its, window)?;
    control(&its, KVM_DEV_ARM_VGIC_CTRL_INIT).context("cannot initialise the ITS")?;
    Ok(Some(its))
}

fn place_its(its: &DeviceFd, window: Range) -> Result<()> {
    let (group, kind) = (KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_ITS_ADDR_TYPE);
    set_attribute(its, group, kind.into(), &window.start())
        .with_context(|| format!("cannot place the ITS at {:#x}", window.start()))
}

/// Has a device do what an attribute of its control group stands for.
pub(super) fn control(chip: &DeviceFd, what: u32) -> Result<()> {
    Ok(chip.set_device_attr(&kvm_device_attr {
        group: KVM_DEV_ARM_VGIC_GRP_CTRL,
        attr: what.into(),
        ..Default::default()
    })?)
}
