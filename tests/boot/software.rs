pub(crate) use crate::archive::{archive, initrd_with_script};

/// Where the PL011's data register is on the board `virt`.
pub(crate) const UARTDR: u64 = 0x0900_0000;

/// PSCI's functions (Arm DEN 0022, section 5.1).
const CPU_OFF: u64 = 0x8400_0002;
const CPU_ON: u64 = 0xc400_0003;
const AFFINITY_INFO: u64 = 0xc400_0004;
const SYSTEM_OFF: u64 = 0x8400_0008;
const SYSTEM_RESET: u64 = 0x8400_0009;

/// Where in a kernel's file its instructions begin, behind the headers.
const CODE: usize = 0x100;
/// Where its exception vectors are, and in them that of an exception taken from EL1 with EL1's own
/// stack pointer (Arm DDI 0487, section D1.3.1).
const VECTORS: usize = 0x800;
const HANDLER: usize = VECTORS + 0x200;

/// A kernel of a few instructions (encodings: Arm DDI 0487, section C6.2). It starts in less time
/// than Linux needs to unpack itself, with the MMU off.
#[derive(Clone, Debug, Default)]
pub(crate) struct Program {
    code: Vec<u32>,
    handler: Option<Vec<u32>>,
}

impl Program {
    /// One that prints "it counts" where the counter of cycles runs, "it stands still" where it does
    /// not, and "undefined" where there is none.
    pub(crate) fn says_whether_cycles_count() -> Program {
        let counted = Program::default().print("it counts\n").power_off();
        Program::default()
            .if_cycles_count(&counted)
            .print("it stands still\n")
            .power_off()
            .on_exception(Program::default().print("undefined\n").power_off())
    }

    /// One of these instructions.
    pub(crate) fn of(code: Vec<u32>) -> Program {
        Program {
            code,
            handler: None,
        }
    }

    /// Sets register `Xd` to `value`: MOVZ and MOVK.
    fn load(mut self, d: u32, value: u64) -> Program {
        for part in 0..4 {
            let opcode = if part == 0 { 0xd280_0000 } else { 0xf280_0000 };
            let half = (value >> (16 * part) & 0xffff) as u32;
            self.code.push(opcode | part << 21 | half << 5 | d);
        }
        self
    }

    fn instruction(mut self, code: u32) -> Program {
        self.code.push(code);
        self
    }

    /// Prints `text` on the console.
    pub(crate) fn print(mut self, text: &str) -> Program {
        self = self.load(1, UARTDR);
        for byte in text.bytes() {
            // MOVZ W2, #byte; STR W2, [X1]
            self.code.push(0x5280_0002 | u32::from(byte) << 5);
            self.code.push(0xb900_0022);
        }
        self
    }

    /// Reads the word at `address`: LDR W2, [X4].
    pub(crate) fn read(self, address: u64) -> Program {
        self.load(4, address).instruction(0xb940_0082)
    }

    /// Writes `value` to the word at `address`: STR W2, [X4].
    pub(crate) fn write(self, address: u64, value: u64) -> Program {
        let program = self.load(2, value).load(4, address);
        program.instruction(0xb900_0082)
    }

    /// Writes the byte at `address`: STRB W2, [X4].
    pub(crate) fn write_byte(self, address: u64, value: u8) -> Program {
        let program = self.load(2, value.into()).load(4, address);
        program.instruction(0x3900_0082)
    }

    /// Goes on with `other` unless the bit is set in the word at `address`: LDR W2, [X4];
    /// TBNZ W2, #bit, behind it.
    pub(crate) fn unless_set(self, address: u64, bit: u32, other: &Program) -> Program {
        let skip = other.code.len() as u32 + 1;
        let test = 0x3700_0002 | bit << 19 | skip << 5;
        let mut program = self.read(address).instruction(test);
        program.code.extend(&other.code);
        program
    }

    /// Reads two words at once, for which the CPU does not tell KVM which registers they go to:
    /// LDP W2, W3, [X4].
    pub(crate) fn read_pair(self, address: u64) -> Program {
        self.load(4, address).instruction(0x2940_0c82)
    }

    /// Does what `handler` says where an exception is taken.
    pub(crate) fn on_exception(self, handler: Program) -> Program {
        let handler = Some(handler.code);
        Program { handler, ..self }
    }

    /// Goes on with `other` if the counter of CPU cycles counts: 1,000 turns of a loop lie between
    /// two looks at it (Arm DDI 0487, section D24.5: PMCR_EL0, PMCNTENSET_EL0, PMCCNTR_EL0).
    pub(crate) fn if_cycles_count(self, other: &Program) -> Program {
        // PMCR_EL0.{LC, C, E}: 64 bits, reset, enable; PMCNTENSET_EL0.C.
        let enabled = self.load(2, 1 << 6 | 1 << 2 | 1).instruction(0xd51b_9c02);
        let counting = enabled.load(2, 1 << 31).instruction(0xd51b_9c22);
        // ISB; MRS X6, PMCCNTR_EL0; SUBS X2, X2, #1; B.NE to it; ISB; MRS X7, PMCCNTR_EL0;
        // SUBS X7, X7, X6
        let first = counting.instruction(0xd503_3fdf).instruction(0xd53b_9d06);
        let turned = first
            .load(2, 1000)
            .instruction(0xf100_0442)
            .instruction(0x54ff_ffe1);
        let mut program = turned
            .instruction(0xd503_3fdf)
            .instruction(0xd53b_9d07)
            .instruction(0xeb06_00e7);
        // B.LS behind the other: no more cycles than before.
        let skip = other.code.len() as u32 + 1;
        program = program.instruction(0x5400_0009 | skip << 5);
        program.code.extend(&other.code);
        program
    }

    /// Powers the machine off.
    pub(crate) fn power_off(self) -> Program {
        // HVC #0
        self.load(0, SYSTEM_OFF).instruction(0xd400_0002).stay()
    }

    /// Resets the machine.
    pub(crate) fn reset(self) -> Program {
        self.load(0, SYSTEM_RESET).instruction(0xd400_0002).stay()
    }

    /// Turns this CPU off: HVC #0.
    pub(crate) fn cpu_off(self) -> Program {
        self.load(0, CPU_OFF).instruction(0xd400_0002).stay()
    }

    /// The same by SMC #0.
    pub(crate) fn cpu_off_by_smc(self) -> Program {
        self.load(0, CPU_OFF).instruction(0xd400_0003).stay()
    }

    /// Turns the CPU with this affinity on, where it does what `other` says: ADR X2, other; HVC #0;
    /// B behind it.
    pub(crate) fn cpu_on(self, affinity: u64, other: &Program) -> Program {
        let behind = other.code.len() as u32 + 1;
        let called = self.load(0, CPU_ON).load(1, affinity);
        let mut program = called
            .instruction(0x1000_0062)
            .instruction(0xd400_0002)
            .instruction(0x1400_0000 | behind);
        program.code.extend(&other.code);
        program
    }

    /// Waits, awake, until the CPU with this affinity is off: HVC #0; CMP X0, #1; B.NE to the call.
    pub(crate) fn wait_for_off(self, affinity: u64) -> Program {
        let start = self.code.len();
        let asked = self.load(0, AFFINITY_INFO).load(1, affinity).load(2, 0);
        let asked = asked.instruction(0xd400_0002).instruction(0xf100_041f);
        let back = start.wrapping_sub(asked.code.len()) as u32 & 0x7_ffff;
        asked.instruction(0x5400_0001 | back << 5)
    }

    /// Jumps to `address`: BR X4.
    pub(crate) fn jump(self, address: u64) -> Program {
        self.load(4, address).instruction(0xd61f_0080)
    }

    /// Does all of this again and again: B to its start.
    pub(crate) fn again(self) -> Program {
        let back = self.code.len().wrapping_neg() as u32 & 0x3ff_ffff;
        self.instruction(0x1400_0000 | back)
    }

    /// Goes on with `other`.
    pub(crate) fn then(mut self, other: &Program) -> Program {
        self.code.extend(&other.code);
        self
    }

    /// Takes some time: SUBS X2, X2, #1; B.NE to it.
    pub(crate) fn wait(self, turns: u64) -> Program {
        let program = self.load(2, turns).instruction(0xf100_0442);
        program.instruction(0x54ff_ffe1)
    }

    /// Stays where it is, awake: B to itself.
    pub(crate) fn stay(self) -> Program {
        self.instruction(0x1400_0000)
    }

    /// Stays where it is, asleep: WFI, B to it.
    pub(crate) fn sleep(self) -> Program {
        self.instruction(0xd503_207f).instruction(0x17ff_ffff)
    }

    /// All instructions from [`CODE`] on.
    fn words(&self) -> Vec<u32> {
        let Some(handler) = &self.handler else {
            return self.code.clone();
        };
        // ADR X5, VECTORS; MSR VBAR_EL1, X5; ISB
        let adr = 0x1000_0005 | ((VECTORS - CODE) as u32 >> 2) << 5;
        let mut words = vec![adr, 0xd518_c005, 0xd503_3fdf];
        words.extend(&self.code);
        assert!(CODE + 4 * words.len() <= VECTORS, "the program is too long");
        words.resize((HANDLER - CODE) / 4, 0);
        words.extend(handler);
        words
    }

    /// The kernel's file: an arm64 Image with the PE header of an EFI stub, as distributions'
    /// kernels have it, by which a truncated file is known.
    pub(crate) fn image(&self) -> Vec<u8> {
        Image::default().holding(self)
    }

    /// The kernel's file, with as many bytes as `size` in memory and in the file.
    pub(crate) fn image_of(&self, size: u64) -> Vec<u8> {
        let mut image = Image {
            memory: size,
            ..Image::default()
        }
        .holding(self);
        image.resize(size as usize, 0);
        image
    }
}

/// What the header of an Image says (Linux, Documentation/arch/arm64/booting.rst, section 4).
pub(crate) struct Image {
    /// Bytes that the kernel takes in memory.
    pub(crate) memory: u64,
    /// Its page size: 1 for 4 KiB, 2 for 16 KiB, 3 for 64 KiB.
    pub(crate) page: u64,
}

impl Default for Image {
    fn default() -> Image {
        Image {
            memory: 1 << 20,
            page: 1,
        }
    }
}

impl Image {
    /// The file with this header that does what `program` says.
    pub(crate) fn holding(&self, program: &Program) -> Vec<u8> {
        let mut image = vec![0; CODE];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        // CCMP X18, #0, #0xd, PL: an instruction without effect that reads "MZ".
        put(0x00, b"MZ\x40\xfa");
        // B CODE
        let branch = 0x1400_0000 | ((CODE as u32 - 4) / 4);
        put(0x04, &branch.to_le_bytes());
        put(0x10, &self.memory.to_le_bytes());
        // It may lie anywhere.
        put(0x18, &(1 << 3 | self.page << 1).to_le_bytes());
        put(0x38, b"ARM\x64");
        // The PE header at 0x40, for the machine 0xaa64, has no optional header and one section,
        // which ends with the file (Microsoft PE format, "COFF File Header", "Section Table").
        put(0x3c, &0x40_u32.to_le_bytes());
        put(0x40, b"PE\0\0\x64\xaa\x01\0");
        let code = program.words();
        put(0x58 + 16, &(4 * code.len() as u32).to_le_bytes());
        put(0x58 + 20, &(CODE as u32).to_le_bytes());
        image.extend(code.iter().flat_map(|code| code.to_le_bytes()));
        image
    }
}

/// A bzImage for x86_64, as far as its header goes (Linux, Documentation/arch/x86/boot.rst).
pub(crate) fn bz_image() -> Vec<u8> {
    let mut file = vec![0; 8 * 512];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f4, &[2]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x232, &[0x20]);
    put(0x236, &[1]);
    put(0x261, &[0x10]);
    file
}
