//! Registers of vCPUs and attributes of the GIC, one at a time.

use anyhow::{Result, anyhow};
use kvm_bindings::kvm_device_attr;
use kvm_ioctls::{DeviceFd, VcpuFd};

/// Sets an attribute whose value KVM reads through a pointer during the call.
pub(super) fn set_attribute<T>(chip: &DeviceFd, group: u32, attr: u64, value: &T) -> Result<()> {
    let attribute = kvm_device_attr {
        flags: 0,
        group,
        attr,
        addr: std::ptr::from_ref(value) as u64,
    };
    Ok(chip.set_device_attr(&attribute)?)
}

pub(super) fn read_register(vcpu: &VcpuFd, id: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    vcpu.get_one_reg(id, &mut bytes)
        .map_err(|error| anyhow!("cannot read register {id:#x}: {error}"))?;
    Ok(u64::from_le_bytes(bytes))
}

pub(super) fn write_register(vcpu: &VcpuFd, id: u64, value: u64) -> Result<()> {
    vcpu.set_one_reg(id, &value.to_le_bytes())
        .map_err(|error| anyhow!("cannot set register {id:#x} to {value:#x}: {error}"))?;
    Ok(())
}
