use crate::attack::Random;
use crate::software::{Image, Program};
use crate::steps::Steps;

/// The vCPU that attacks beside the first one: its affinity.
pub(crate) const SECOND: u64 = 1;

/// Where the rings and buffers of a guest's drivers are: in its RAM, far from its kernel.
pub(crate) const RINGS: u64 = 0x4800_0000;

/// The board that all addresses here are of.
pub(crate) const BOARD: &str = "virt";

/// The board's other devices and the interrupt controller's windows, with their sizes.
pub(crate) const WINDOWS: [(u64, u64); 5] = [
    // PL011, PL031, PL061.
    (0x0900_0000, 0x1000),
    (0x0901_0000, 0x1000),
    (0x0903_0000, 0x1000),
    // Distributor, and all that may be redistributors or CPU interface.
    (0x0800_0000, 0x2_0000),
    (0x080a_0000, 0x4_0000),
];

const UARTDR: u64 = 0x0900_0000;

/// Arm DEN 0022, section 5.1.
const SYSTEM_OFF: u64 = 0x8400_0008;
const SYSTEM_RESET: u64 = 0x8400_0009;

/// Where the steps are, from the image's start; where the words below begin in it.
const STEPS: usize = 0x1000;
const CODE: usize = 0x100;
/// Vectors, each of 128 bytes, and the table of translations, from [`CODE`].
const VECTORS: usize = 0x700;
const TABLE: usize = 0xec0;
/// Where the next step is taken, from [`CODE`].
const NEXT: usize = 0x4c;

/// Turns on an MMU that maps the first four GiB to themselves, the first as devices, and floating
/// point; then takes the next step: X9 is its number, W10, X4, X2 and X3 are its operands (Arm DDI
/// 0487, sections C6.2 and D24.2: MAIR_EL1, TCR_EL1, CPACR_EL1, SCTLR_EL1).
const START: [u32; 32] = [
    // adr x0, steps; second: mov x19, x0; adr x5, vectors; msr vbar_el1, x5
    0x1000_7800,
    0xaa00_03f3,
    0x1000_37c5,
    0xd518_c005,
    // adr x5, table; msr ttbr0_el1, x5; mov x5, #0xff04; msr mair_el1, x5
    0x1000_7585,
    0xd518_2005,
    0xd29f_e085,
    0xd518_a205,
    // mov x5, #0x803520; msr tcr_el1, x5; mov x5, #0x300000; msr cpacr_el1, x5; isb
    0xd286_a405,
    0xf2a0_1005,
    0xd518_2045,
    0xd2a0_0605,
    0xd518_1045,
    0xd503_3fdf,
    // mrs x5, sctlr_el1; mov x6, #0x1005; orr x5, x5, x6; msr sctlr_el1, x5; isb
    0xd538_1005,
    0xd282_00a6,
    0xaa06_00a5,
    0xd518_1005,
    0xd503_3fdf,
    // next: ldp w9, w10, [x19]; ldp x4, x2, [x19, #8]; ldr x3, [x19, #24]; add x19, x19, #32
    0x2940_2a69,
    0xa940_8a64,
    0xf940_0e63,
    0x9100_8273,
    // adr x5, operations; add x5, x5, x9, lsl #5; br x5
    0x1000_0125,
    0x8b09_14a5,
    0xd61f_00a0,
    // failed: mov x5, #0x9000000; mov w6, #'!'; str w6, [x5]; b next
    0xd2a1_2005,
    0x5280_0426,
    0xb900_00a6,
    0x17ff_fff6,
    // slot: nop; b next
    0xd503_201f,
    0x17ff_fff4,
];

/// What each operation of [`Steps`] does, in its order. A branch to the next step follows.
const OPERATIONS: [&[u32]; 16] = [
    // dsb sy; strb w2, [x4], and the other widths
    &[0xd503_3f9f, 0x3900_0082],
    &[0xd503_3f9f, 0x7900_0082],
    &[0xd503_3f9f, 0xb900_0082],
    &[0xd503_3f9f, 0xf900_0082],
    // ldrb w5, [x4], and the other widths
    &[0x3940_0085],
    &[0x7940_0085],
    &[0xb940_0085],
    &[0xf940_0085],
    // mov x0, x4; mov x1, x2; mov x2, x3; mov x3, x10; hvc #0
    &[
        0xaa04_03e0,
        0xaa02_03e1,
        0xaa03_03e2,
        0xaa0a_03e3,
        0xd400_0002,
    ],
    // The same with smc #0.
    &[
        0xaa04_03e0,
        0xaa02_03e1,
        0xaa03_03e2,
        0xaa0a_03e3,
        0xd400_0003,
    ],
    // ldr w5, [x4]; and w5, w5, w2; cmp w5, w3; b.eq next; subs w10, w10, #1; b.ne to the start;
    // b failed
    &[
        0xb940_0085,
        0x0a02_00a5,
        0x6b03_00bf,
        0x54ff_f400,
        0x7100_054a,
        0x54ff_ff61,
        0x17ff_ffa4,
    ],
    // add x19, x19, x4
    &[0x8b04_0273],
    // ldr w5, [x4]; subs w5, w5, #1; str w5, [x4]; b.eq next; add x19, x19, x2
    &[
        0xb940_0085,
        0x7100_04a5,
        0xb900_0085,
        0x54ff_f200,
        0x8b02_0273,
    ],
    // dsb sy; str w2, [x4]; subs w10, w10, #1; b.ne to the store
    &[0xd503_3f9f, 0xb900_0082, 0x7100_054a, 0x54ff_ffc1],
    // adr x5, slot; str w10, [x5]; dc cvau, x5; dsb ish; ic ivau, x5; dsb ish; isb; b slot
    &[
        0x10ff_f1c5,
        0xb900_00aa,
        0xd50b_7b25,
        0xd503_3b9f,
        0xd50b_7525,
        0xd503_3b9f,
        0xd503_3fdf,
        0x17ff_ff87,
    ],
    // mov x1, x4; add x3, x19, x2; adr x2, second; mov x0, #0xc4000003 (CPU_ON); hvc #0
    &[
        0xaa04_03e1,
        0x8b02_0263,
        0x10ff_ece2,
        0xd280_0060,
        0xf2b8_8000,
        0xd400_0002,
    ],
];

/// Where an exception is taken: mrs x5, elr_el1; add x5, x5, #4; msr elr_el1, x5; eret.
const BEHIND: [u32; 4] = [0xd538_4025, 0x9100_10a5, 0xd518_4025, 0xd69f_03e0];

/// Blocks of 1 GiB at level 1: devices, which nothing is fetched from, and memory (Arm DDI 0487,
/// section D8.3.1).
const BLOCKS: [u64; 4] = [0x0060_0000_0000_0401, 0x4000_0705, 0x8000_0705, 0xc000_0705];

/// A kernel that does `steps`. What a step's access or instruction raises is passed over.
pub(crate) fn image(steps: &Steps) -> Vec<u8> {
    let mut words = START.to_vec();
    for body in OPERATIONS {
        let end = words.len() + 8;
        words.extend(body);
        if words.len() < end {
            let back = (NEXT / 4).wrapping_sub(words.len()) as u32;
            words.push(0x1400_0000 | back & 0x03ff_ffff);
        }
        words.resize(end, 0);
    }
    assert!(words.len() * 4 <= VECTORS, "too many operations");
    words.resize((STEPS - CODE) / 4, 0);
    for vector in 0..16 {
        let at = (VECTORS + 0x80 * vector) / 4;
        words[at..at + BEHIND.len()].copy_from_slice(&BEHIND);
    }
    for (index, block) in BLOCKS.into_iter().enumerate() {
        let at = TABLE / 4 + 2 * index;
        words[at] = block as u32;
        words[at + 1] = (block >> 32) as u32;
    }
    let size = (STEPS + steps.bytes().len()).next_multiple_of(0x1000);
    let header = Image {
        memory: size as u64,
        ..Image::default()
    };
    let mut image = header.holding(&Program::of(words));
    image.extend(steps.bytes());
    image.resize(size, 0);
    image
}

impl Steps {
    /// Lets the console send, whatever was written to it: UARTCR.{UARTEN, TXE, RXE} (Arm DDI 0183,
    /// section 3.3.8).
    pub(crate) fn enable_console(&mut self) {
        self.write(4, UARTDR + 0x30, 0x301);
    }

    /// Prints `text` on the console.
    pub(crate) fn print(&mut self, text: &str) {
        for byte in text.bytes() {
            self.write(4, UARTDR, u64::from(byte));
        }
    }

    /// Powers the machine off.
    pub(crate) fn power_off(&mut self) {
        self.hypercall([SYSTEM_OFF, 0, 0, 0]);
    }

    /// Resets the machine.
    pub(crate) fn reset(&mut self) {
        self.hypercall([SYSTEM_RESET, 0, 0, 0]);
    }
}

/// Instructions whose accesses KVM cannot describe to armlet, or that are no loads and stores: with
/// the address in X4 (Arm DDI 0487, section C6.2).
const ODD: [u32; 14] = [
    // ldp w2, w3, [x4]; stp w2, w3, [x4]; ldp x2, x3, [x4]; stp x2, x3, [x4]
    0x2940_0c82,
    0x2900_0c82,
    0xa940_0c82,
    0xa900_0c82,
    // ldxr w2, [x4]; stxr w5, w2, [x4]; ldar w2, [x4]; stlr w2, [x4]
    0x885f_7c82,
    0x8805_7c82,
    0x88df_fc82,
    0x889f_fc82,
    // ldr w2, [x4], #4; str w2, [x4, #4]!; ldr q2, [x4]; str q2, [x4]
    0xb840_4482,
    0xb800_4c82,
    0x3dc0_0082,
    0x3d80_0082,
    // ldadd w2, w3, [x4]; dc zva, x4
    0xb822_0083,
    0xd50b_7424,
];

/// Calls of PSCI that end the guest, or a vCPU until an interrupt that never comes (Arm DEN 0022,
/// section 5.1), by the lower five bits of their numbers; CPU_ON, which would start a vCPU anywhere.
const ENDING: [u64; 9] = [0x01, 0x02, 0x03, 0x08, 0x09, 0x0c, 0x0e, 0x12, 0x13];

/// Adds attacks that only this architecture has.
pub(crate) fn strike(steps: &mut Steps, random: &mut Random, count: usize) {
    for _ in 0..count {
        let (start, size) = random.of(&WINDOWS);
        let address = match random.below(8) {
            0 => 0x0a00_0000 + random.below(0x4000),
            // Nothing is there, or the wrong half of RAM.
            1 => random.below(0x3fff_ffff),
            _ => start + random.below(size),
        };
        let (width, value) = (random.width(), random.value());
        match random.below(6) {
            0 | 1 => steps.read(width, address),
            // No character, or the console would hold nothing else.
            2 if address == UARTDR => steps.write_many(UARTDR, u32::from(b'x'), 500),
            2 => steps.write(width, address, value),
            3 => {
                let group = random.of(&[
                    0x8400_0000,
                    0xc400_0000,
                    0x8000_0000,
                    0x8600_0000,
                    0xc500_0000,
                    0xc600_0000,
                ]);
                let function = match random.below(4) {
                    0 => random.next() & 0xffff,
                    _ => random.below(0x40),
                };
                if group & 0x3f00_0000 == 0x0400_0000 && ENDING.contains(&function) {
                    continue;
                }
                let call = [group + function, random.value(), random.value(), value];
                match random.below(2) {
                    0 => steps.hypercall(call),
                    _ => steps.secure_call(call),
                }
            }
            4 => {
                let instruction = random.of(&ODD);
                steps.execute(instruction, [address & !7, value, value]);
            }
            _ => system_register(steps, random, value),
        }
    }
}

/// Reads any system register, or writes one of the interrupt controller, of the timers or of the
/// performance counters: MRS or MSR with X2.
fn system_register(steps: &mut Steps, random: &mut Random, value: u64) {
    let (read, op1, crn, crm) = match random.below(4) {
        0 => (1, random.below(8), random.below(16), random.below(16)),
        1 => (random.below(2), 0, 12, 8 + random.below(5)),
        2 => (random.below(2), 3, 14, random.below(4)),
        _ => (random.below(2), 3, 9, 12 + random.below(3)),
    };
    let op2 = random.below(8);
    let register = 3 << 19 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5;
    let instruction = 0xd500_0000 | read << 21 | register | 2;
    steps.execute(instruction as u32, [0, value, value]);
}
