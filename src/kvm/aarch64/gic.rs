//! Creates KVM's GIC.

use super::access::set_attribute;
use anyhow::{Context, Result};
use armlet_arch::aarch64::gic::Gic;
use kvm_bindings::{
    KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_NR_IRQS, KVM_VGIC_V2_ADDR_TYPE_CPU, KVM_VGIC_V2_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
};
use kvm_ioctls::{DeviceFd, VmFd};

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
    let init = kvm_device_attr {
        group: KVM_DEV_ARM_VGIC_GRP_CTRL,
        attr: u64::from(KVM_DEV_ARM_VGIC_CTRL_INIT),
        ..Default::default()
    };
    chip.set_device_attr(&init)
        .context("cannot initialise the GIC")
}
