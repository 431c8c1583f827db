//! KVM's table of interrupts: messages beside the pins that it had from the start.

use crate::rig;
use armlet::kvm::interrupts::{Interrupts, Lead, Pins, Route};
use armlet_devices::ioapic::Message;
use armlet_devices::sync::ring;
use kvm_bindings::{kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3};
use kvm_ioctls::{DeviceFd, Kvm, VmFd};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Groups of a GIC's attributes, and what is in them (arch/arm64/include/uapi/asm/kvm.h): this test is
/// compiled for other hosts too.
const ADDRESS: u32 = 0;
const REGISTERS: u32 = 1;
const COUNT: u32 = 3;
const CONTROL: u32 = 4;
const INIT: u64 = 0;
const DISTRIBUTOR: u64 = 2;
const REDISTRIBUTORS: u64 = 3;

/// SPIs of the GIC here, and the one that is used.
const SPIS: u32 = 32;
const SPI: u32 = 5;
/// Registers of the distributor for SPIs 0 to 31, and 0 to 15 (GICv3, IHI 0069, sections 12.9.23 and
/// 12.9.9): which are pending, which are edges.
const PENDING: u64 = 0x200 + 4;
const EDGES: u64 = 0xc00 + 8;

fn attribute<T>(group: u32, attr: u64, value: &T) -> kvm_device_attr {
    kvm_device_attr {
        group,
        attr,
        addr: std::ptr::from_ref(value) as u64,
        ..Default::default()
    }
}

fn gic(vm: &VmFd) -> DeviceFd {
    let mut device = kvm_create_device {
        type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
        ..Default::default()
    };
    let gic = vm.create_device(&mut device).expect("a GICv3");
    let set = |group, attr, value: u64| {
        let attribute = attribute(group, attr, &value);
        gic.set_device_attr(&attribute).expect("taken");
    };
    set(ADDRESS, DISTRIBUTOR, 0x0800_0000);
    set(ADDRESS, REDISTRIBUTORS, 0x080a_0000);
    let count = 32 + SPIS;
    let count = attribute(COUNT, 0, &count);
    gic.set_device_attr(&count).expect("taken");
    set(CONTROL, INIT, 0);
    gic
}

fn write(gic: &DeviceFd, register: u64, value: u32) {
    let attribute = attribute(REGISTERS, register, &value);
    gic.set_device_attr(&attribute).expect("a register");
}

fn read(gic: &DeviceFd, register: u64) -> u32 {
    let mut value = 0_u32;
    let mut attribute = kvm_device_attr {
        group: REGISTERS,
        attr: register,
        addr: std::ptr::from_mut(&mut value) as u64,
        ..Default::default()
    };
    // SAFETY: KVM writes the 32 bits of a register to where the attribute points to, a variable of
    // that size that lives until after the call.
    unsafe { gic.get_device_attr(&mut attribute) }.expect("a register");
    value
}

#[test]
fn messages_stand_beside_the_pins_and_change_with_no_new_descriptor() {
    let Some(rig) = rig::any() else { return };
    if !rig.has_gic_v3() {
        return;
    }
    let kvm = Kvm::new().expect("KVM");
    let vm = Arc::new(kvm.create_vm().expect("a VM"));
    let _vcpu = vm.create_vcpu(0).expect("a vCPU");
    let gic = gic(&vm);
    write(&gic, EDGES, 2 << (2 * SPI));
    let interrupts = Interrupts::new(&vm, Pins::Spis(SPIS));
    let pin = interrupts.edge(Lead::Pin(SPI)).expect("an irqfd");
    let arrives = |when: &str| {
        write(&gic, PENDING, 0);
        assert_eq!(read(&gic, PENDING), 0, "{when}");
        ring(&pin.call());
        let deadline = Instant::now() + Duration::from_secs(20);
        while read(&gic, PENDING) != 1 << SPI {
            assert!(Instant::now() < deadline, "{when}: the SPI does not arrive");
            sleep(Duration::from_millis(10));
        }
    };
    arrives("at first");
    let route = |data, device| {
        Some(Route {
            // GITS_TRANSLATER, if there were an ITS.
            message: Message {
                address: 0x0809_0040,
                data,
            },
            device,
        })
    };
    let messages = [(); 2].map(|()| interrupts.edge(Lead::Msi).expect("an irqfd"));
    for (data, device) in [(0, Some(8)), (1, Some(8)), (1, None)] {
        for message in &messages {
            message.send(route(data, device)).expect("KVM takes it");
            // It goes nowhere.
            ring(&message.call());
        }
        arrives("beside messages");
    }
    messages[0].send(None).expect("KVM takes it");
    arrives("beside a message that is masked");
    drop(messages);
    arrives("after messages");
    // Their numbers are free again.
    let again = interrupts.edge(Lead::Msi).expect("an irqfd");
    again.send(route(2, Some(9))).expect("KVM takes it");
    pin.send(route(0, None))
        .expect_err("a pin sends no messages");
    arrives("beside another message");
}
