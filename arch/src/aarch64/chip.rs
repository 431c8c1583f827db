//! The state of a GIC, as plain data: the values of its registers, in a fixed order that follows from its
//! version and how many interrupts and vCPUs it has (Arm IHI 0048, section 4.3; Arm IHI 0069, chapter 12;
//! Documentation/virt/kvm/devices/arm-vgic.rst, arm-vgic-v3.rst).

use super::gic::{V2_MAX_VCPUS, V3_MAX_VCPUS};
use super::id::SystemRegister;
use serde::{Deserialize, Serialize};

/// Interrupts that each vCPU has for itself.
const PRIVATE: u32 = 32;
/// The most that a GIC of KVM has.
const MOST_INTERRUPTS: u32 = 1024;

/// The state of a GIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GicState {
    /// 2 or 3.
    pub version: u8,
    /// How many interrupts it has, including the 32 private ones.
    pub interrupts: u32,
    /// GICD_IIDR: the revision that says what KVM's registers mean.
    pub iidr: u32,
    /// How many registers hold a vCPU's active priorities, of each group.
    pub priorities: u8,
    /// Whether it has LPIs: there is an ITS.
    pub lpis: bool,
    /// The values of the registers that [`GicState::accesses`] lists.
    pub values: Vec<u64>,
}

impl GicState {
    /// Checks what comes from a file: whether it is that of a GIC of this version, with this many interrupts
    /// and vCPUs.
    ///
    /// # Errors
    /// How it differs.
    pub fn check(
        &self,
        version: u8,
        interrupts: u32,
        vcpus: usize,
        lpis: bool,
    ) -> Result<(), String> {
        if self.lpis != lpis {
            let with = |has| if has { "with" } else { "without" };
            return Err(format!(
                "the snapshot has the state of a GIC {} LPIs, and the machine a GIC {} them",
                with(self.lpis),
                with(lpis)
            ));
        }
        if self.version != version {
            return Err(format!(
                "the snapshot has the state of a GICv{}, and the machine a GICv{version}",
                self.version
            ));
        }
        if self.interrupts != interrupts {
            return Err(format!(
                "the snapshot's GIC has {} interrupts, and the machine's {interrupts}",
                self.interrupts
            ));
        }
        let most = match version {
            2 => V2_MAX_VCPUS,
            _ => V3_MAX_VCPUS,
        };
        if vcpus > most as usize || interrupts > MOST_INTERRUPTS {
            return Err(format!(
                "a GICv{version} cannot have {vcpus} vCPUs and {interrupts} interrupts"
            ));
        }
        if !matches!(self.priorities, 1 | 2 | 4) {
            return Err(format!(
                "the snapshot's GIC has {} registers of active priorities",
                self.priorities
            ));
        }
        let wanted = self.accesses(&vec![0; vcpus]);
        if self.values.len() != wanted.len() {
            return Err(format!(
                "the snapshot has {} registers of the GIC, which has {} for {vcpus} vCPUs and {interrupts} interrupts",
                self.values.len(),
                wanted.len()
            ));
        }
        let is_long = |(access, value): &(&Access, &u64)| {
            access.group != Group::SystemRegisters && **value > u32::MAX.into()
        };
        match wanted.iter().zip(&self.values).find(is_long) {
            Some((access, value)) => Err(format!(
                "the GIC's register {:#x} is {value:#x}, of 32 bits",
                access.attribute as u32
            )),
            None => Ok(()),
        }
    }

    /// Returns the registers whose values it has, for the vCPUs with these affinities.
    #[must_use]
    pub fn accesses(&self, affinities: &[u64]) -> Vec<Access> {
        let (version, priorities) = (self.version, self.priorities);
        let mut all = accesses(version, self.interrupts, priorities, affinities);
        if self.lpis {
            for mpidr in affinities {
                all.extend(LPI_REGISTERS.map(|offset| Access {
                    group: Group::Redistributor,
                    attribute: affinity(*mpidr) | offset,
                    need: Need::Always,
                }));
            }
        }
        all
    }
}

/// GICR_PROPBASER and GICR_PENDBASER, in halves, and GICR_CTLR, after which KVM takes neither
/// (Arm IHI 0069, section 12.11).
const LPI_REGISTERS: [u64; 5] = [0x70, 0x74, 0x78, 0x7c, 0];

/// The state of an ITS, as plain data: its registers. Its tables are in guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ItsState {
    /// GITS_IIDR: the revision of the tables' format.
    pub iidr: u64,
    /// GITS_CBASER: where commands are.
    pub commands: u64,
    /// GITS_CREADR.
    pub read: u64,
    /// GITS_CWRITER.
    pub write: u64,
    /// GITS_BASER0 and 1, of devices and collections, where KVM has them.
    pub tables: [u64; 2],
    /// GITS_CTLR.
    pub control: u64,
}

impl ItsState {
    /// The offsets of the registers (Arm IHI 0069, section 12.19) in the order in which they are written,
    /// but for GITS_CTLR: GITS_CBASER resets GITS_CREADR
    /// (Documentation/virt/kvm/devices/arm-vgic-its.rst).
    pub const REGISTERS: [u64; 6] = [0x80, 0x4, 0x90, 0x88, 0x100, 0x108];
    /// GITS_CTLR.
    pub const CONTROL: u64 = 0;

    /// Returns the values of [`Self::REGISTERS`].
    #[must_use]
    pub const fn values(&self) -> [u64; 6] {
        [
            self.commands,
            self.iidr,
            self.read,
            self.write,
            self.tables[0],
            self.tables[1],
        ]
    }

    /// Creates the state from the values of [`Self::REGISTERS`] and GITS_CTLR.
    #[must_use]
    pub const fn of(values: [u64; 6], control: u64) -> ItsState {
        let [commands, iidr, read, write, devices, collections] = values;
        ItsState {
            iidr,
            commands,
            read,
            write,
            tables: [devices, collections],
            control,
        }
    }
}

/// The group of attributes of KVM that a register is in (arch/arm64/include/uapi/asm/kvm.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// KVM_DEV_ARM_VGIC_GRP_DIST_REGS.
    Distributor = 1,
    /// KVM_DEV_ARM_VGIC_GRP_CPU_REGS, of a GICv2.
    Interface = 2,
    /// KVM_DEV_ARM_VGIC_GRP_REDIST_REGS.
    Redistributor = 5,
    /// KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, of 64 bits; all others have 32.
    SystemRegisters = 6,
    /// KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO: which lines are high.
    Levels = 7,
}

/// When a register must be written to a GIC that was just initialised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Always.
    Always,
    /// Unless its value is this, which it has.
    Unless(u32),
    /// Always, after the bits that are clear were written to the register at this distance.
    AfterClearing(u64),
}

/// A register of a GIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Its group.
    pub group: Group,
    /// Its attribute: vCPU and offset.
    pub attribute: u64,
    /// Whether it must be written.
    pub need: Need,
}

/// A register of each interrupt.
struct Block {
    offset: u32,
    /// Bits of each interrupt.
    bits: u32,
    need: Need,
}

const fn block(offset: u32, bits: u32, need: Need) -> Block {
    Block { offset, bits, need }
}

/// What must be written where something is set.
const SET: Need = Need::Unless(0);

/// GICD_IIDR.
pub const IIDR: u64 = 0x8;
const GROUP: u32 = 0x80;
const ENABLED: u32 = 0x100;
const PENDING: u32 = 0x200;
const ACTIVE: u32 = 0x300;
const PRIORITY: u32 = 0x400;
const TARGETS: u32 = 0x800;
const CONFIGURATION: u32 = 0xc00;
const SENDERS: u32 = 0xf20;
const ROUTE: u32 = 0x6000;
/// From registers that set bits to those that clear them.
const CLEARING: u64 = 0x80;
/// From the first frame of a redistributor to that of its SGIs and PPIs.
const SGI_FRAME: u32 = 0x1_0000;

/// Of SPIs. An interrupt that is pending is sent when it becomes enabled, to where it is routed by then.
const SHARED_V2: [Block; 7] = [
    // KVM lets user space write them once it has written GICD_IIDR (arch/arm64/kvm/vgic/vgic-mmio-v2.c).
    block(GROUP, 1, Need::Always),
    block(CONFIGURATION, 2, SET),
    block(TARGETS, 8, SET),
    block(PRIORITY, 8, SET),
    block(ACTIVE, 1, SET),
    block(PENDING, 1, SET),
    block(ENABLED, 1, SET),
];
const SHARED_V3: [Block; 7] = [
    block(GROUP, 1, Need::Unless(u32::MAX)),
    block(CONFIGURATION, 2, SET),
    // The upper half, Aff3, is 0 in KVM.
    block(ROUTE, 64, SET),
    block(PRIORITY, 8, SET),
    block(ACTIVE, 1, SET),
    block(PENDING, 1, SET),
    block(ENABLED, 1, SET),
];
/// Of SGIs and PPIs.
const PRIVATE_ONES: [Block; 6] = [
    block(GROUP, 1, Need::Always),
    block(CONFIGURATION, 2, Need::Always),
    block(PRIORITY, 8, SET),
    block(ACTIVE, 1, SET),
    block(PENDING, 1, SET),
    block(ENABLED, 1, Need::AfterClearing(CLEARING)),
];

/// GICC_CTLR, PMR, BPR, ABPR, APRn, in the order in which they are written.
const INTERFACE: [u64; 8] = [0, 4, 8, 0x1c, 0xd0, 0xd4, 0xd8, 0xdc];
/// ICC_SRE_EL1, CTLR, IGRPEN0, IGRPEN1, PMR, BPR0, BPR1.
const SYSTEM_REGISTERS: [SystemRegister; 7] = [
    SystemRegister::new(3, 0, 12, 12, 5),
    ICC_CTLR_EL1,
    SystemRegister::new(3, 0, 12, 12, 6),
    SystemRegister::new(3, 0, 12, 12, 7),
    SystemRegister::new(3, 0, 4, 6, 0),
    SystemRegister::new(3, 0, 12, 8, 3),
    SystemRegister::new(3, 0, 12, 12, 3),
];
/// ICC_CTLR_EL1.
pub const ICC_CTLR_EL1: SystemRegister = SystemRegister::new(3, 0, 12, 12, 4);
/// ICC_AP0R0_EL1 and ICC_AP1R0_EL1. Others follow.
const ACTIVE_PRIORITIES: [SystemRegister; 2] = [
    SystemRegister::new(3, 0, 12, 8, 4),
    SystemRegister::new(3, 0, 12, 9, 0),
];

/// Returns how many registers hold active priorities of a group, by ICC_CTLR_EL1: a bit for each of its
/// PRIbits (bits 10:8) + 1 bits' values.
#[must_use]
pub const fn priorities(icc_ctlr: u64) -> u8 {
    match (icc_ctlr >> 8 & 7) + 1 {
        7.. => 4,
        6 => 2,
        _ => 1,
    }
}

/// Returns the affinity of a vCPU as attributes of a GICv3 have it: Aff3 to Aff0, a byte each, from bit 32
/// on.
#[must_use]
pub const fn affinity(mpidr: u64) -> u64 {
    (mpidr >> 8 & 0xff00_0000 | mpidr & 0x00ff_ffff) << 32
}

/// Returns the registers of a GIC in the order in which they are written: what is on must be on before
/// interrupts become pending, because KVM looks at them then (arch/arm64/kvm/vgic/vgic.c:
/// vgic_target_oracle).
fn accesses(version: u8, interrupts: u32, priorities: u8, affinities: &[u64]) -> Vec<Access> {
    let mut all = vec![Access {
        group: Group::Distributor,
        // GICD_CTLR.
        attribute: 0,
        need: Need::Always,
    }];
    let shared = PRIVATE..interrupts.min(MOST_INTERRUPTS);
    if version != 2 {
        all.extend(shared.clone().step_by(32).map(|first| levels(0, first)));
    }
    let blocks = match version {
        2 => &SHARED_V2,
        _ => &SHARED_V3,
    };
    for block in blocks {
        add(&mut all, Group::Distributor, 0, block, shared.clone());
    }
    for (index, mpidr) in (0..).zip(affinities) {
        match version {
            2 => add_v2(&mut all, index),
            _ => add_v3(&mut all, affinity(*mpidr), priorities),
        }
    }
    all
}

fn levels(vcpu: u64, first: u32) -> Access {
    Access {
        group: Group::Levels,
        attribute: vcpu | u64::from(first),
        need: SET,
    }
}

fn add(
    all: &mut Vec<Access>,
    group: Group,
    vcpu: u64,
    block: &Block,
    interrupts: std::ops::Range<u32>,
) {
    // A word of 32 bits for several interrupts, or the lower one of one interrupt.
    let step = (32 / block.bits).max(1) as usize;
    for first in interrupts.step_by(step) {
        let offset = block.offset + first * block.bits / 8;
        all.push(Access {
            group,
            attribute: vcpu | u64::from(offset),
            need: block.need,
        });
    }
}

fn add_v2(all: &mut Vec<Access>, index: u64) {
    let vcpu = index << 32;
    for block in &PRIVATE_ONES {
        add(all, Group::Distributor, vcpu, block, 0..PRIVATE);
    }
    // Which vCPUs sent the SGIs that are pending.
    add(
        all,
        Group::Distributor,
        vcpu,
        &block(SENDERS, 8, SET),
        0..16,
    );
    all.extend(INTERFACE.map(|offset| Access {
        group: Group::Interface,
        attribute: vcpu | offset,
        need: Need::Always,
    }));
}

fn add_v3(all: &mut Vec<Access>, vcpu: u64, priorities: u8) {
    all.push(levels(vcpu, 0));
    for own in &PRIVATE_ONES {
        let own = block(SGI_FRAME + own.offset, own.bits, own.need);
        add(all, Group::Redistributor, vcpu, &own, 0..PRIVATE);
    }
    let register = |register: SystemRegister, need| Access {
        group: Group::SystemRegisters,
        attribute: vcpu | u64::from(register.0),
        need,
    };
    all.extend(SYSTEM_REGISTERS.map(|number| register(number, Need::Always)));
    for SystemRegister(first) in ACTIVE_PRIORITIES {
        let numbers = (first..).take(priorities.into());
        all.extend(numbers.map(|number| register(SystemRegister(number), SET)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(version: u8, interrupts: u32, vcpus: usize) -> GicState {
        let count = accesses(version, interrupts, 1, &vec![0; vcpus]).len();
        GicState {
            version,
            interrupts,
            iidr: 0,
            priorities: 1,
            lpis: false,
            values: vec![0; count],
        }
    }

    #[test]
    fn a_state_of_another_gic_is_refused() {
        state(3, 96, 2).check(3, 96, 2, false).expect("the same");
        state(2, 96, 8).check(2, 96, 8, false).expect("the same");
        let refused = |state: GicState, (version, interrupts, vcpus), text: &str| {
            let error = state
                .check(version, interrupts, vcpus, false)
                .expect_err(text);
            assert!(error.contains(text), "{error}");
        };
        refused(
            state(2, 96, 2),
            (3, 96, 2),
            "a GICv2, and the machine a GICv3",
        );
        refused(
            state(3, 128, 2),
            (3, 96, 2),
            "128 interrupts, and the machine's 96",
        );
        refused(state(3, 96, 3), (3, 96, 2), "for 2 vCPUs");
        refused(state(2, 96, 9), (2, 96, 9), "cannot have 9 vCPUs");
        let mut bad = state(3, 96, 2);
        bad.priorities = 255;
        refused(bad, (3, 96, 2), "255 registers of active priorities");
        let mut bad = state(3, 96, 2);
        bad.values[0] = u64::MAX;
        refused(bad, (3, 96, 2), "of 32 bits");
        let mut bad = state(3, u32::MAX, 1);
        bad.values.clear();
        refused(bad.clone(), (3, 96, 1), "4294967295 interrupts");
        refused(bad, (3, u32::MAX, 1), "cannot have 1 vCPUs");
    }

    #[test]
    fn lpis_are_registers_of_redistributors_whose_control_comes_last() {
        let mut with = state(3, 96, 2);
        let error = with.check(3, 96, 2, true).expect_err("without LPIs");
        assert!(
            error.contains("without LPIs, and the machine a GIC with them"),
            "{error}"
        );
        with.lpis = true;
        let error = with
            .check(3, 96, 2, true)
            .expect_err("registers are missing");
        assert!(error.contains("registers of the GIC"), "{error}");
        let all = with.accesses(&[0, 1]);
        with.values.resize(all.len(), 0);
        with.check(3, 96, 2, true).expect("valid");
        let last: Vec<u64> = all[all.len() - 5..].iter().map(|a| a.attribute).collect();
        let vcpu = 1 << 32;
        let wanted = [0x70, 0x74, 0x78, 0x7c, 0].map(|offset| vcpu | offset);
        assert_eq!(last, wanted);
    }

    #[test]
    fn an_its_is_its_registers_in_an_order() {
        let state = ItsState::of([1, 2, 3, 4, 5, 6], 7);
        assert_eq!((state.commands, state.iidr, state.control), (1, 2, 7));
        assert_eq!(state.values(), [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn registers_are_where_the_architecture_has_them() {
        let of = |version, group| {
            let all = accesses(version, 64, 1, &[0, 0x1_0001_0203]);
            let all = all.into_iter().filter(move |access| access.group == group);
            all.map(|access| access.attribute).collect::<Vec<_>>()
        };
        let distributor = of(3, Group::Distributor);
        // GICD_CTLR, IGROUPR1, ICFGR2 and 3, IROUTER32 to 63.
        assert_eq!(distributor[..5], [0, 0x84, 0xc08, 0xc0c, 0x6100]);
        assert_eq!(distributor[35], 0x61f8);
        assert_eq!(distributor[36], 0x420);
        assert_eq!(distributor[44..], [0x304, 0x204, 0x104]);
        assert_eq!(of(3, Group::Levels), [32, 0, 0x0101_0203_0000_0000]);
        let own = of(3, Group::Redistributor);
        assert_eq!(own[..3], [0x1_0080, 0x1_0c00, 0x1_0c04]);
        assert_eq!(own.last(), Some(&0x0101_0203_0001_0100));
        // ICC_AP0R0_EL1, ICC_AP1R0_EL1.
        assert!(
            of(3, Group::SystemRegisters)
                .ends_with(&[0x0101_0203_0000_c644, 0x0101_0203_0000_c648])
        );
        let distributor = of(2, Group::Distributor);
        assert_eq!(distributor[..5], [0, 0x84, 0xc08, 0xc0c, 0x820]);
        assert_eq!(distributor.last(), Some(&0x1_0000_0f2c));
        assert_eq!(of(2, Group::Interface).last(), Some(&0x1_0000_00dc));
    }

    #[test]
    fn priorities_follow_from_their_bits() {
        for (bits, count) in [(5, 1), (6, 2), (7, 4), (8, 4), (1, 1)] {
            assert_eq!(priorities((bits - 1) << 8), count, "{bits}");
        }
    }
}
