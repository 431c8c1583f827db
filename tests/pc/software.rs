pub(crate) use crate::archive::{archive, initrd_with_script};

/// Ports of the board `pc`.
pub(crate) const UART: u16 = 0x3f8;
pub(crate) const SLEEP_CONTROL: u16 = 0x600;
pub(crate) const POWER_OFF: u8 = 5 << 2 | 1 << 5;
pub(crate) const RESET_CONTROL: u16 = 0xcf9;
pub(crate) const I8042_COMMAND: u16 = 0x64;

/// Where the kernel is loaded, and where in it the 64-bit entry is (Linux,
/// Documentation/arch/x86/boot.rst).
pub(crate) const BASE: u64 = 0x100_0000;
const ENTRY: usize = 0x200;
/// Where in it lie the interrupt's handler, what LIDT reads, the table itself, and text.
const HANDLER: usize = 0x2000;
const IDTR: usize = 0x2ff0;
const IDT: usize = 0x3000;
const TEXT: usize = 0x3800;
const SIZE: usize = 0x4000;
/// The code segment that the guest starts with.
const CODE_SELECTOR: u64 = 0x10;

/// Registers of the local APIC and of the I/O APIC, all 32 bits (Intel SDM volume 3, section
/// 11.4.1; 82093AA datasheet, section 3).
const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;

/// Where a CPU keeps its local APIC's address and mode, and the first of the APIC's registers in
/// x2APIC mode (Intel SDM volume 3, section 11.12.1).
const APIC_BASE: u32 = 0x1b;
const X2APIC: u32 = 0x800;

/// Where code for further vCPUs lies: they start in real mode in a page below 1 MiB.
const REAL_MODE: u64 = 0x8000;

/// The one interrupt that programs take.
const VECTOR: u32 = 0x40;

/// A kernel of a few instructions (Intel SDM volume 2). Those without an address in them mean the
/// same in 32-bit and 64-bit mode.
#[derive(Clone, Debug, Default)]
pub(crate) struct Program {
    code: Vec<u8>,
    handler: Vec<u8>,
    text: Vec<u8>,
}

impl Program {
    /// Adds instructions as they are.
    pub(crate) fn bytes(mut self, code: &[u8]) -> Program {
        self.code.extend(code);
        self
    }

    /// Returns how many bytes its instructions take.
    pub(crate) fn code_size(&self) -> usize {
        self.code.len()
    }

    /// MOV DX, port.
    fn port(self, port: u16) -> Program {
        self.bytes(&[0x66, 0xba]).bytes(&port.to_le_bytes())
    }

    /// Writes a byte to a port: MOV AL, value; OUT DX, AL.
    pub(crate) fn out(self, port: u16, value: u8) -> Program {
        self.port(port).bytes(&[0xb0, value, 0xee])
    }

    /// Reads a byte from a port: IN AL, DX.
    pub(crate) fn input(self, port: u16) -> Program {
        self.port(port).bytes(&[0xec])
    }

    /// Prints `text` on the console.
    pub(crate) fn print(mut self, text: &str) -> Program {
        self = self.port(UART);
        for byte in text.bytes() {
            self = self.bytes(&[0xb0, byte, 0xee]);
        }
        self
    }

    /// Prints `text` with a look at the line status before each `count` bytes.
    pub(crate) fn print_looking(mut self, text: &str, count: usize) -> Program {
        for part in text.as_bytes().chunks(count) {
            self = self.input(UART + 5).port(UART);
            for byte in part {
                self = self.bytes(&[0xb0, *byte, 0xee]);
            }
        }
        self
    }

    /// Prints by one instruction: MOV ESI, address; MOV ECX, count; REP OUTSB.
    pub(crate) fn print_string(mut self, text: &str) -> Program {
        let address = BASE as u32 + (TEXT + self.text.len()) as u32;
        self.text.extend(text.bytes());
        let count = text.len() as u32;
        self.port(UART)
            .bytes(&[&[0xbe], &address.to_le_bytes()[..]].concat())
            .bytes(&[&[0xb9], &count.to_le_bytes()[..]].concat())
            .bytes(&[0xf3, 0x6e])
    }

    /// Goes on with `other` if AL has this value: CMP AL, value; JNE behind it.
    pub(crate) fn if_al(self, value: u8, other: &Program) -> Program {
        let length = i8::try_from(other.code.len()).expect("a short jump") as u8;
        self.bytes(&[0x3c, value, 0x75, length]).bytes(&other.code)
    }

    /// Goes on with `other` if EAX has this value: CMP EAX, value; JNE, near, behind it.
    pub(crate) fn if_eax(self, value: u32, other: &Program) -> Program {
        let length = other.code.len() as u32;
        self.bytes(&[0x3d])
            .bytes(&value.to_le_bytes())
            .bytes(&[0x0f, 0x85])
            .bytes(&length.to_le_bytes())
            .bytes(&other.code)
    }

    /// MOV R8, address.
    pub(crate) fn address(self, address: u64) -> Program {
        self.bytes(&[0x49, 0xb8]).bytes(&address.to_le_bytes())
    }

    /// Reads the word at `address`: MOV EAX, [R8].
    pub(crate) fn read(self, address: u64) -> Program {
        self.address(address).bytes(&[0x41, 0x8b, 0x00])
    }

    /// Writes `value` to the word at `address`: MOV EAX, value; MOV [R8], EAX.
    pub(crate) fn write(self, address: u64, value: u32) -> Program {
        self.address(address)
            .bytes(&[0xb8])
            .bytes(&value.to_le_bytes())
            .bytes(&[0x41, 0x89, 0x00])
    }

    /// Waits, awake, until there is input: TEST AL, 1 of the line status; JZ back to the start.
    pub(crate) fn wait_for_input(self) -> Program {
        let test = Program::default().input(UART + 5).bytes(&[0xa8, 1]);
        let wait = test.code.len() as i8 + 2;
        let test = test.bytes(&[0x74, wait.wrapping_neg() as u8]);
        self.bytes(&test.code)
    }

    /// Echoes what comes in, up to a `q`.
    pub(crate) fn echo(self) -> Program {
        let echo = Program::default()
            .wait_for_input()
            .input(UART)
            .bytes(&[0xee, 0x3c, b'q']);
        // JNE back to the start.
        let all = echo.code.len() as i8 + 2;
        let echo = echo.bytes(&[0x75, all.wrapping_neg() as u8]);
        self.bytes(&echo.code)
    }

    /// Does what `handler` says when the one interrupt comes, and does not come back.
    pub(crate) fn on_interrupt(self, handler: &Program) -> Program {
        self.handle_by(handler).write(LAPIC + 0xf0, 0x1ff)
    }

    /// As [`Self::on_interrupt`], where the local APIC is in x2APIC mode.
    pub(crate) fn on_interrupt_by_x2apic(self, handler: &Program) -> Program {
        self.handle_by(handler).write_msr(X2APIC + 0xf, 0, 0x1ff)
    }

    fn handle_by(mut self, handler: &Program) -> Program {
        self.handler.clone_from(&handler.code);
        // MOV ESP, the end of it all; LIDT [address], whose address is 32 bits here.
        let lidt = (BASE as u32 + IDTR as u32).to_le_bytes();
        let stack = (BASE as u32 + SIZE as u32).to_le_bytes();
        self.bytes(&[0xbc])
            .bytes(&stack)
            .bytes(&[0x0f, 0x01, 0x1c, 0x25])
            .bytes(&lidt)
    }

    /// Has the local APIC's timer raise the interrupt soon, once.
    pub(crate) fn start_timer(self) -> Program {
        self.write(LAPIC + 0x3e0, 0xb)
            .write(LAPIC + 0x320, VECTOR)
            .write(LAPIC + 0x380, 100_000)
    }

    /// Has the I/O APIC's pin `gsi` raise the interrupt at the first vCPU. The other controller that
    /// the line leads to, the 8259, is masked: after a reset it would raise one of its own.
    pub(crate) fn route(self, gsi: u32) -> Program {
        self.route_to(gsi, 0)
    }

    /// As [`Self::route`], at the vCPU with this number of up to 15 bits.
    pub(crate) fn route_to(self, gsi: u32, id: u32) -> Program {
        let entry = 0x10 + 2 * gsi;
        let program = self.out(0x21, 0xff).out(0xa1, 0xff);
        program
            .write(IOAPIC, entry + 1)
            .write(IOAPIC + 0x10, id << 24 | id >> 8 << 17)
            .write(IOAPIC, entry)
            .write(IOAPIC + 0x10, VECTOR)
    }

    /// Starts the second vCPU in real mode, where it prints `text`.
    pub(crate) fn start_second(self, text: &str) -> Program {
        let code = Program::default();
        // In real mode the prefix 0x66 means 32 bits, so DX is set without.
        let mut code = code.bytes(&[0xba]).bytes(&UART.to_le_bytes());
        for byte in text.bytes() {
            code = code.bytes(&[0xb0, byte, 0xee]);
        }
        self.start_second_at(&code.sleep())
    }

    /// Starts the second vCPU in real mode, where it does what `code` says.
    pub(crate) fn start_second_at(self, code: &Program) -> Program {
        // To the APIC with number 1: INIT, then SIPI with the page's number.
        self.write(LAPIC + 0xf0, 0x1ff)
            .place(&code.code)
            .write(LAPIC + 0x310, 1 << 24)
            .write(LAPIC + 0x300, 0x4500)
            .write(LAPIC + 0x310, 1 << 24)
            .write(LAPIC + 0x300, 0x4600 | (REAL_MODE >> 12) as u32)
    }

    /// Writes a register of the CPU: MOV ECX, number; MOV EAX, low; MOV EDX, high; WRMSR.
    pub(crate) fn write_msr(self, number: u32, high: u32, low: u32) -> Program {
        let load = |opcode: u8, value: u32| [&[opcode][..], &value.to_le_bytes()].concat();
        self.bytes(&load(0xb9, number))
            .bytes(&load(0xb8, low))
            .bytes(&load(0xba, high))
            .bytes(&[0x0f, 0x30])
    }

    /// Starts the vCPU with this number, which may need more than 8 bits, in real mode. There it
    /// prints `text` and takes the serial port's interrupt, prints `interrupted` and powers off.
    pub(crate) fn start_far(self, id: u32, text: &str, interrupted: &str) -> Program {
        // In real mode immediate values of 32 bits, and the ports' 16, need a prefix or none.
        let msr = |number: u32, low: u32| {
            let load =
                |opcode: u8, value: u32| [&[0x66, opcode], &value.to_le_bytes()[..]].concat();
            let loads = [load(0xb9, number), load(0xb8, low), load(0xba, 0)].concat();
            Program::default().bytes(&loads).bytes(&[0x0f, 0x30])
        };
        let out = |port: u16, bytes: &[u8]| {
            let code = Program::default().bytes(&[0xba]).bytes(&port.to_le_bytes());
            bytes
                .iter()
                .fold(code, |code, byte| code.bytes(&[0xb0, *byte, 0xee]))
        };
        // x2APIC on, and the local APIC.
        let mut code = msr(APIC_BASE, LAPIC as u32 | 0xc00).code;
        code.extend(msr(X2APIC + 0xf, 0x1ff).code);
        code.extend(out(UART, text.as_bytes()).code);
        // The transmitter is empty, so allowing its interrupt raises it. STI; HLT; JMP to it.
        code.extend(out(UART + 1, &[2]).code);
        code.extend([0xfb, 0xf4, 0xeb, 0xfd]);
        let handler = code.len() as u32;
        code.extend(out(UART, interrupted.as_bytes()).code);
        code.extend(out(SLEEP_CONTROL, &[POWER_OFF]).code);
        code.extend([0xeb, 0xfe]);
        // The interrupt's place among real mode's: offset and segment.
        let segment = (REAL_MODE >> 4) as u32;
        self.write(u64::from(VECTOR) * 4, segment << 16 | handler)
            .place(&code)
            .write_msr(APIC_BASE, 0, LAPIC as u32 | 0xd00)
            .write_msr(X2APIC + 0xf, 0, 0x1ff)
            .write_msr(X2APIC + 0x30, id, 0x4500)
            .write_msr(X2APIC + 0x30, id, 0x4600 | (REAL_MODE >> 12) as u32)
    }

    /// Puts code where further vCPUs start.
    fn place(mut self, code: &[u8]) -> Program {
        for (at, word) in (REAL_MODE..).step_by(4).zip(code.chunks(4)) {
            let mut bytes = [0; 4];
            bytes[..word.len()].copy_from_slice(word);
            self = self.write(at, u32::from_le_bytes(bytes));
        }
        self
    }

    /// Powers the machine off.
    pub(crate) fn power_off(self) -> Program {
        self.out(SLEEP_CONTROL, POWER_OFF).stay()
    }

    /// Does all of this again and again: JMP to its start.
    pub(crate) fn again(self) -> Program {
        let back = (self.code.len() as u32 + 5).wrapping_neg();
        self.bytes(&[0xe9]).bytes(&back.to_le_bytes())
    }

    /// Goes on with `other`.
    pub(crate) fn then(self, other: &Program) -> Program {
        self.bytes(&other.code)
    }

    /// Takes some time: MOV ECX, turns; LOOP to itself.
    pub(crate) fn wait_awake(self, turns: u32) -> Program {
        self.bytes(&[0xb9])
            .bytes(&turns.to_le_bytes())
            .bytes(&[0xe2, 0xfe])
    }

    /// Stays where it is, awake: JMP to itself.
    pub(crate) fn stay(self) -> Program {
        self.bytes(&[0xeb, 0xfe])
    }

    /// Stays where it is, asleep: HLT; JMP to it.
    pub(crate) fn sleep(self) -> Program {
        self.bytes(&[0xf4, 0xeb, 0xfd])
    }

    /// Sleeps until an interrupt comes: STI; HLT; JMP to it.
    pub(crate) fn wait(self) -> Program {
        self.bytes(&[0xfb]).sleep()
    }

    /// A fault without a handler, nor one for that: UD2.
    pub(crate) fn triple_fault(self) -> Program {
        self.bytes(&[0x0f, 0x0b])
    }

    /// What is loaded at [`BASE`].
    fn memory(&self) -> Vec<u8> {
        let mut memory = vec![0; SIZE];
        let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
        assert!(
            ENTRY + self.code.len() <= HANDLER,
            "the program is too long"
        );
        put(ENTRY, &self.code);
        put(HANDLER, &self.handler);
        put(TEXT, &self.text);
        put(IDTR, &(0x7ff_u16).to_le_bytes());
        put(IDTR + 2, &(BASE + IDT as u64).to_le_bytes());
        // A gate (Intel SDM volume 3, section 6.14.1): present, 64-bit interrupt gate.
        let handler = BASE + HANDLER as u64;
        let gate = handler & 0xffff | CODE_SELECTOR << 16 | 0x8e << 40 | (handler >> 16) << 48;
        put(IDT + VECTOR as usize * 16, &gate.to_le_bytes());
        memory
    }

    /// The kernel's file, a bzImage, which starts in long mode.
    pub(crate) fn image(&self) -> Vec<u8> {
        bz_image(&self.memory())
    }

    /// The kernel's file, an ELF file with the note of an entry, which starts in 32-bit mode.
    pub(crate) fn elf(&self) -> Vec<u8> {
        const NOTE: usize = 0x100;
        let mut file = vec![0; 0x1000];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(0x10, &[2, 0, 62, 0]);
        put(0x20, &0x40_u64.to_le_bytes());
        put(0x36, &[0x38, 0, 2, 0]);
        // Type, offset, address, bytes in the file and in memory.
        let segments = [
            (1_u32, 0x1000_u64, BASE, SIZE as u64),
            (4, NOTE as u64, 0, 20),
        ];
        for (index, (kind, offset, address, size)) in segments.into_iter().enumerate() {
            let at = 0x40 + index * 0x38;
            put(at, &kind.to_le_bytes());
            for (field, value) in [(8, offset), (24, address), (32, size), (40, size)] {
                put(at + field, &value.to_le_bytes());
            }
        }
        for (at, word) in [4_u32, 4, 18].into_iter().enumerate() {
            put(NOTE + 4 * at, &word.to_le_bytes());
        }
        put(NOTE + 12, b"Xen\0");
        put(NOTE + 16, &(BASE as u32 + ENTRY as u32).to_le_bytes());
        file.extend(self.memory());
        file
    }
}

/// A bzImage whose contents `memory` go to [`BASE`] and start there in long mode, at [`ENTRY`].
pub(crate) fn bz_image(memory: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 2 * 512];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    let size = memory.len() as u32;
    put(0x1f1, &[1]);
    put(0x1f4, &(size / 16).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x230, &0x20_0000_u32.to_le_bytes());
    put(0x234, &[1, 0, 1]);
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &BASE.to_le_bytes());
    put(0x260, &size.to_le_bytes());
    file.extend(memory);
    file
}
