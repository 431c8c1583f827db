use crate::software::{BASE, POWER_OFF, RESET_CONTROL, SLEEP_CONTROL, UART, bz_image};
use crate::steps::Steps;

/// Where the rings and buffers of a guest's drivers are: in its RAM, far from its kernel.
pub(crate) const RINGS: u64 = 0x0800_0000;

/// The board that all addresses here are of.
pub(crate) const BOARD: &str = "pc";

/// Where things are, from [`BASE`]: code, what LIDT reads, interrupt descriptors, steps. The stack
/// ends before what LIDT reads.
const CODE: usize = 0x200;
const IDTR: usize = 0x2ff0;
const IDT: usize = 0x3000;
const STEPS: usize = 0x4000;

/// The code segment that the guest starts with.
const CODE_SELECTOR: u64 = 0x10;

/// From the code's start: where the next step is taken, where an exception is, the operations.
const NEXT: usize = 0x13;
const HANDLER: usize = 0x44;
const OPERATIONS_AT: usize = 0x60;

/// Takes the next step: EAX is its number, ECX, R8, RDX and R10 are its operands (Intel SDM
/// volume 2).
const START: [u8; 75] = [
    // mov r15d, steps; mov esp, stack; lidt [idtr]
    0x41, 0xbf, 0x00, 0x40, 0x00, 0x01, 0xbc, 0x00, 0x2f, 0x00, 0x01, 0x0f, 0x01, 0x1c, 0x25, 0xf0,
    0x2f, 0x00, 0x01,
    // next: mov eax, [r15]; mov ecx, [r15 + 4]; mov r8, [r15 + 8]; mov rdx, [r15 + 16]
    0x41, 0x8b, 0x07, 0x41, 0x8b, 0x4f, 0x04, 0x4d, 0x8b, 0x47, 0x08, 0x49, 0x8b, 0x57, 0x10,
    // mov r10, [r15 + 24]; add r15, 32; shl eax, 5; lea r9, operations; add r9, rax; jmp r9
    0x4d, 0x8b, 0x57, 0x18, 0x49, 0x83, 0xc7, 0x20, 0xc1, 0xe0, 0x05, 0x4c, 0x8d, 0x0d, 0x2c, 0x00,
    0x00, 0x00, 0x49, 0x01, 0xc1, 0x41, 0xff, 0xe1,
    // failed: mov edx, UART; mov al, '!'; out dx, al; jmp next
    0xba, 0xf8, 0x03, 0x00, 0x00, 0xb0, 0x21, 0xee, 0xeb, 0xcf,
    // handler: mov esp, stack; jmp next
    0xbc, 0x00, 0x2f, 0x00, 0x01, 0xeb, 0xc8,
];

/// What each operation of [`Steps`] does, in its order. A jump to the next step follows.
const OPERATIONS: [&[u8]; 24] = [
    // mov [r8], dl, and the other widths
    &[0x41, 0x88, 0x10],
    &[0x66, 0x41, 0x89, 0x10],
    &[0x41, 0x89, 0x10],
    &[0x49, 0x89, 0x10],
    // mov al, [r8], and the other widths
    &[0x41, 0x8a, 0x00],
    &[0x66, 0x41, 0x8b, 0x00],
    &[0x41, 0x8b, 0x00],
    &[0x49, 0x8b, 0x00],
    // mov rax, r8; mov rbx, rdx; mov edx, ecx; mov rcx, r10; vmcall
    &[
        0x4c, 0x89, 0xc0, 0x48, 0x89, 0xd3, 0x89, 0xca, 0x4c, 0x89, 0xd1, 0x0f, 0x01, 0xc1,
    ],
    // There is no secure monitor.
    &[],
    // mov eax, [r8]; and eax, edx; cmp eax, r10d; je next; dec ecx; jne to the start; jmp failed
    &[
        0x41, 0x8b, 0x00, 0x21, 0xd0, 0x44, 0x39, 0xd0, 0x0f, 0x84, 0x65, 0xfe, 0xff, 0xff, 0xff,
        0xc9, 0x75, 0xee, 0xe9, 0x83, 0xfe, 0xff, 0xff,
    ],
    // add r15, r8
    &[0x4d, 0x01, 0xc7],
    // dec dword [r8]; je next; add r15, rdx
    &[
        0x41, 0xff, 0x08, 0x0f, 0x84, 0x2a, 0xfe, 0xff, 0xff, 0x49, 0x01, 0xd7,
    ],
    // mov [r8], edx; dec ecx; jne to the start
    &[0x41, 0x89, 0x10, 0xff, 0xc9, 0x75, 0xf9],
    // Instructions and further vCPUs are ARM64's.
    &[],
    &[],
    // mov eax, edx; mov edx, r8d; out dx, al, and the other widths
    &[0x89, 0xd0, 0x44, 0x89, 0xc2, 0xee],
    &[0x89, 0xd0, 0x44, 0x89, 0xc2, 0x66, 0xef],
    &[0x89, 0xd0, 0x44, 0x89, 0xc2, 0xef],
    // mov edx, r8d; in al, dx, and the other widths
    &[0x44, 0x89, 0xc2, 0xec],
    &[0x44, 0x89, 0xc2, 0x66, 0xed],
    &[0x44, 0x89, 0xc2, 0xed],
    // mov ecx, r8d; mov eax, edx; mov edx, r10d; wrmsr
    &[0x44, 0x89, 0xc1, 0x89, 0xd0, 0x44, 0x89, 0xd2, 0x0f, 0x30],
    // mov ecx, r8d; rdmsr
    &[0x44, 0x89, 0xc1, 0x0f, 0x32],
];

/// A kernel that does `steps`. What a step raises is passed over.
pub(crate) fn image(steps: &Steps) -> Vec<u8> {
    let mut code = START.to_vec();
    code.resize(OPERATIONS_AT, 0);
    for body in OPERATIONS {
        let end = code.len() + 32;
        code.extend(body);
        // JMP NEXT, counted from behind it.
        let back = NEXT.wrapping_sub(code.len() + 5) as u32;
        code.push(0xe9);
        code.extend(back.to_le_bytes());
        assert!(code.len() <= end, "an operation is too long");
        code.resize(end, 0);
    }
    let size = (STEPS + steps.bytes().len()).next_multiple_of(0x1000);
    let mut memory = vec![0; size];
    let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
    put(CODE, &code);
    put(IDTR, &0x1ff_u16.to_le_bytes());
    put(IDTR + 2, &(BASE + IDT as u64).to_le_bytes());
    // Gates of all exceptions (Intel SDM volume 3, section 6.14.1): present, 64-bit interrupt gate.
    let handler = BASE + (CODE + HANDLER) as u64;
    let gate = handler & 0xffff | CODE_SELECTOR << 16 | 0x8e << 40 | (handler >> 16) << 48;
    for vector in 0..32 {
        put(IDT + 16 * vector, &gate.to_le_bytes());
    }
    put(STEPS, steps.bytes());
    bz_image(&memory)
}

impl Steps {
    /// Prints `text` on the console.
    pub(crate) fn print(&mut self, text: &str) {
        for byte in text.bytes() {
            self.out(1, UART, u32::from(byte));
        }
    }

    /// Powers the machine off.
    pub(crate) fn power_off(&mut self) {
        self.out(1, SLEEP_CONTROL, u32::from(POWER_OFF));
    }

    /// Resets the machine.
    pub(crate) fn reset(&mut self) {
        self.out(1, RESET_CONTROL, 6);
    }
}
