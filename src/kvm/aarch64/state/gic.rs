//! Reads and writes the registers of KVM's GIC.

use crate::kvm::aarch64::access::set_attribute;
use crate::kvm::aarch64::gic::{Chip, control};
use anyhow::{Context, Result, anyhow};
use armlet_arch::aarch64::chip::{
    Access, GicState, Group, ICC_CTLR_EL1, IIDR, ItsState, Need, affinity, priorities,
};
use kvm_bindings::{
    KVM_DEV_ARM_ITS_RESTORE_TABLES, KVM_DEV_ARM_ITS_SAVE_TABLES, KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_ITS_REGS, KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
    KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES, KVM_VGIC_V3_ADDR_TYPE_DIST, kvm_device_attr,
};
use kvm_ioctls::DeviceFd;

/// Reads the state of the GIC, whose vCPUs have these affinities.
pub(super) fn save(Chip { gic: chip, its }: &Chip, affinities: &[u64]) -> Result<GicState> {
    if its.is_some() {
        control(chip, KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES)
            .context("cannot save which LPIs are pending")?;
    }
    let version = version(chip);
    let mut state = GicState {
        version,
        interrupts: interrupts(chip)?,
        iidr: read(chip, Group::Distributor, IIDR)? as u32,
        priorities: match (version, affinities.first()) {
            (3, Some(first)) => {
                let attribute = affinity(*first) | u64::from(ICC_CTLR_EL1.0);
                priorities(read(chip, Group::SystemRegisters, attribute)?)
            }
            _ => 1,
        },
        lpis: its.is_some(),
        values: Vec::new(),
    };
    let accesses = state.accesses(affinities);
    let values = accesses
        .iter()
        .map(|access| read(chip, access.group, access.attribute));
    state.values = values.collect::<Result<_>>()?;
    Ok(state)
}

/// Gives a GIC that was just initialised the state of another one.
pub(super) fn restore(
    Chip { gic: chip, its }: &Chip,
    affinities: &[u64],
    state: &GicState,
) -> Result<()> {
    state
        .check(
            version(chip),
            interrupts(chip)?,
            affinities.len(),
            its.is_some(),
        )
        .map_err(|why| anyhow!(why))?;
    let iidr = read(chip, Group::Distributor, IIDR)? as u32;
    // With a GICv2 even if it is the same: only then KVM lets user space write the groups of interrupts
    // (arch/arm64/kvm/vgic/vgic-mmio-v2.c: vgic_mmio_uaccess_write_v2_misc).
    if state.version == 2 || state.iidr != iidr {
        write(chip, Group::Distributor, IIDR, state.iidr.into()).with_context(|| {
            format!(
                "the guest's GIC is of revision {:#x}, and this host's {iidr:#x}",
                state.iidr
            )
        })?;
    }
    for (access, value) in state.accesses(affinities).iter().zip(&state.values) {
        let Access {
            group,
            attribute,
            need,
        } = *access;
        match need {
            Need::Unless(is) if *value == u64::from(is) => continue,
            Need::AfterClearing(distance) => {
                let clear = u64::from(!*value as u32);
                write(chip, group, attribute + distance, clear)?;
            }
            Need::Unless(_) | Need::Always => {}
        }
        write(chip, group, attribute, *value)?;
    }
    Ok(())
}

/// Writes the tables of an ITS to guest memory and reads its registers.
pub(super) fn save_its(its: &DeviceFd) -> Result<ItsState> {
    control(its, KVM_DEV_ARM_ITS_SAVE_TABLES).context("cannot save the tables of the ITS")?;
    let read = |offset| {
        let mut value = 0_u64;
        get_attribute(its, KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset, &mut value)
            .with_context(|| format!("cannot read the register {offset:#x} of the ITS"))?;
        anyhow::Ok(value)
    };
    let mut values = [0; ItsState::REGISTERS.len()];
    for (value, offset) in values.iter_mut().zip(ItsState::REGISTERS) {
        *value = read(offset)?;
    }
    Ok(ItsState::of(values, read(ItsState::CONTROL)?))
}

/// Gives an ITS that was just made the registers of another one, and has it read its tables in guest memory,
/// which KVM checks (Documentation/virt/kvm/devices/arm-vgic-its.rst).
pub(super) fn restore_its(its: &DeviceFd, state: &ItsState) -> Result<()> {
    let write = |offset, value: u64| {
        set_attribute(its, KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset, &value).with_context(|| {
            format!("KVM does not take {value:#x} for the register {offset:#x} of the ITS")
        })
    };
    for (offset, value) in ItsState::REGISTERS.into_iter().zip(state.values()) {
        write(offset, value)?;
    }
    control(its, KVM_DEV_ARM_ITS_RESTORE_TABLES)
        .context("cannot restore the tables of the ITS in guest memory")?;
    write(ItsState::CONTROL, state.control)
}

fn version(chip: &DeviceFd) -> u8 {
    let mut address = 0_u64;
    let group = KVM_DEV_ARM_VGIC_GRP_ADDR;
    match get_attribute(chip, group, KVM_VGIC_V3_ADDR_TYPE_DIST.into(), &mut address) {
        Ok(()) => 3,
        Err(_) => 2,
    }
}

fn interrupts(chip: &DeviceFd) -> Result<u32> {
    let mut count = 0_u32;
    get_attribute(chip, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &mut count)
        .context("cannot ask how many interrupts the GIC has")?;
    Ok(count)
}

fn read(chip: &DeviceFd, group: Group, attribute: u64) -> Result<u64> {
    let (mut short, mut long) = (0_u32, 0_u64);
    match group {
        Group::SystemRegisters => get_attribute(chip, group as u32, attribute, &mut long),
        _ => get_attribute(chip, group as u32, attribute, &mut short),
    }
    .with_context(|| format!("cannot read {}", name(group, attribute)))?;
    Ok(long | u64::from(short))
}

fn write(chip: &DeviceFd, group: Group, attribute: u64, value: u64) -> Result<()> {
    match group {
        Group::SystemRegisters => set_attribute(chip, group as u32, attribute, &value),
        _ => {
            let value = u32::try_from(value)?;
            set_attribute(chip, group as u32, attribute, &value)
        }
    }
    .with_context(|| {
        format!(
            "KVM does not take {value:#x} for {}",
            name(group, attribute)
        )
    })
}

fn name(group: Group, attribute: u64) -> String {
    let (vcpu, number) = (attribute >> 32, attribute as u32);
    match group {
        Group::Distributor => format!("the GIC distributor's register {number:#x}"),
        Group::Interface => format!("the GIC CPU interface's register {number:#x} of vCPU {vcpu}"),
        Group::Redistributor => {
            format!("register {number:#x} of the GIC redistributor {vcpu:#x}")
        }
        Group::SystemRegisters => {
            let register = chip_register(number);
            format!("the GIC's register {register} of the vCPU with affinity {vcpu:#x}")
        }
        Group::Levels => format!("the lines of the GIC from interrupt {number} on"),
    }
}

fn chip_register(number: u32) -> String {
    armlet_arch::aarch64::id::SystemRegister(number as u16).name()
}

/// Gets an attribute that KVM writes through a pointer during the call: `T` is what this attribute has, `u32`
/// or `u64`.
fn get_attribute<T>(chip: &DeviceFd, group: u32, attr: u64, value: &mut T) -> Result<()> {
    let mut attribute = kvm_device_attr {
        flags: 0,
        group,
        attr,
        addr: std::ptr::from_mut(value) as u64,
    };
    // SAFETY: KVM writes as many bytes as the group's attributes have: 8 of addresses and system registers, 4
    // of all others, for which the callers above pass a variable of that size.
    unsafe { chip.get_device_attr(&mut attribute) }?;
    Ok(())
}
