//! The guest that clients drive: a kernel of a few instructions for the board `pc`, which starts where a
//! KVM has no help of the CPU, too. It says that it is there, polls for its power button, says that this
//! was pressed, and resets.

/// What it prints first, and when its power button was pressed.
const READY: &str = "guest ready\r\n";
const PRESSED: &str = "guest pressed\r\n";

/// Ports: the serial port's data, the two interrupt controllers' masks, the keyboard controller's
/// commands.
const UART: u16 = 0x3f8;
const MASKS: [u16; 2] = [0x21, 0xa1];
const I8042: u16 = 0x64;
/// The command that resets.
const RESET: u8 = 0xfe;

/// Registers of the local APIC and of the I/O APIC, all 32 bits (Intel SDM volume 3, section 11.4.1;
/// 82093AA datasheet, section 3): spurious vector, the requests for vectors 64 to 95, and the I/O
/// APIC's index and data.
const SPURIOUS: u32 = 0xfee0_00f0;
const REQUESTS: u32 = 0xfee0_0220;
const INDEX: u32 = 0xfec0_0000;
const DATA: u32 = 0xfec0_0010;
/// The power button's interrupt, and the vector that it gets: the first one of `REQUESTS`.
const BUTTON: u32 = 9;
const VECTOR: u32 = 64;

/// Where it lies, where in that it starts, and how much it takes, in bytes.
const BASE: u32 = 0x100_0000;
const ENTRY: u32 = 0x200;
const SIZE: usize = 0x1000;
/// Where the note lies in the file.
const NOTE: usize = 0x100;

/// Writes a byte to a port: MOV DX, port; MOV AL, value; OUT DX, AL.
fn out(code: &mut Vec<u8>, port: u16, value: u8) {
    code.extend([0x66, 0xba]);
    code.extend(port.to_le_bytes());
    code.extend([0xb0, value, 0xee]);
}

/// Writes a word by MOV.
fn write(code: &mut Vec<u8>, address: u32, value: u32) {
    code.extend([0xc7, 0x05]);
    code.extend(address.to_le_bytes());
    code.extend(value.to_le_bytes());
}

/// Its instructions (Intel SDM volume 2), in 32-bit mode.
fn code() -> Vec<u8> {
    let mut code = Vec::new();
    for port in MASKS {
        out(&mut code, port, 0xff);
    }
    write(&mut code, SPURIOUS, 0x1ff);
    let entry = 0x10 + 2 * BUTTON;
    for (index, value) in [(entry + 1, 0), (entry, VECTOR)] {
        write(&mut code, INDEX, index);
        write(&mut code, DATA, value);
    }
    READY.bytes().for_each(|byte| out(&mut code, UART, byte));
    // PAUSE; MOV EAX, [address]; TEST AL, 1; JZ back.
    code.extend([0xf3, 0x90, 0xa1]);
    code.extend(REQUESTS.to_le_bytes());
    code.extend([0xa8, 1, 0x74, 0xf5]);
    PRESSED.bytes().for_each(|byte| out(&mut code, UART, byte));
    out(&mut code, I8042, RESET);
    // HLT; JMP back.
    code.extend([0xf4, 0xeb, 0xfd]);
    code
}

/// The kernel's file: ELF with the note of a 32-bit entry (Xen's public/elfnote.h,
/// XEN_ELFNOTE_PHYS32_ENTRY).
pub(super) fn elf() -> Vec<u8> {
    let mut file = vec![0; 0x1000 + SIZE];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(0x10, &[2, 0, 62, 0, 1]);
    put(0x20, &0x40_u64.to_le_bytes());
    put(0x36, &[0x38, 0, 2, 0]);
    // Type, offset, address, bytes in the file and in memory.
    let segments = [
        (1_u32, 0x1000_u64, u64::from(BASE), SIZE as u64),
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
    put(NOTE + 16, &(BASE + ENTRY).to_le_bytes());
    put(0x1000 + ENTRY as usize, &code());
    file
}
