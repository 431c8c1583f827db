//! Debugging an ARM64 CPU from outside, by the Arm Architecture Reference Manual (DDI 0487): debug registers
//! (D2), syndromes (D24.2.40), the translation of addresses at EL1 (D8), and the entry of exceptions (D1.3).

use crate::debug::{Access, Hit, Point};

/// The breakpoint instruction, `brk #0`.
pub const BREAK: [u8; 4] = 0xd420_0000_u32.to_le_bytes();

/// PSTATE.{I, F}: interrupts are masked.
pub const MASKED: u64 = 0xc0;
/// The bytes of a table of exception vectors.
const VECTORS: u64 = 0x800;

/// DBGBCR_EL1: enabled, at EL0 and EL1, for a whole instruction.
const BREAK_CONTROL: u64 = 1 | 0b11 << 1 | 0xf << 5;
/// DBGWCR_EL1: enabled, at EL0 and EL1.
const WATCH_CONTROL: u64 = 1 | 0b11 << 1;

/// Returns the control and value registers of a breakpoint or watchpoint; `None` if the CPU has none like
/// that: up to 8 bytes within 8 that are aligned, or a power of two up to 2 GiB that is aligned.
#[must_use]
pub fn registers(point: &Point) -> Option<(u64, u64)> {
    let load_store = match point.access {
        Access::Execute => {
            return point
                .address
                .is_multiple_of(4)
                .then_some((BREAK_CONTROL, point.address));
        }
        Access::Read => 0b01,
        Access::Write => 0b10,
        Access::ReadWrite => 0b11,
    };
    let control = WATCH_CONTROL | load_store << 3;
    let offset = point.address % 8;
    match point.length {
        length @ 1..=8 if offset + length <= 8 => {
            let bytes = ((1 << length) - 1) << offset;
            Some((control | bytes << 5, point.address - offset))
        }
        length
            if length.is_power_of_two()
                && length <= 1 << 31
                && point.address.is_multiple_of(length) =>
        {
            let mask = u64::from(length.trailing_zeros());
            Some((control | 0xff << 5 | mask << 24, point.address))
        }
        _ => None,
    }
}

/// Returns why the CPU stopped, by the syndrome and fault address that KVM reports; `None` for what no debugger
/// asked for.
#[must_use]
pub fn hit(syndrome: u32, address: u64, points: &[Point]) -> Option<Hit> {
    match syndrome >> 26 {
        0x30 => Some(Hit::Breakpoint),
        0x32 => Some(Hit::Step),
        0x34 => {
            let mut watches = points
                .iter()
                .filter(|point| point.access != Access::Execute);
            let point = watches.find(|point| point.is_near(address))?;
            Some(Hit::Watchpoint(*point, address))
        }
        0x38 | 0x3c => Some(Hit::Instruction),
        _ => None,
    }
}

/// The registers that an exception changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exception {
    /// PC.
    pub pc: u64,
    /// PSTATE.
    pub pstate: u64,
    /// ELR_EL1.
    pub link: u64,
    /// SPSR_EL1.
    pub saved: u64,
}

/// Returns the registers once the guest's own breakpoint instruction, at `pc`, has led to its handler at EL1.
#[must_use]
pub fn take_breakpoint(pc: u64, pstate: u64, vectors: u64, sctlr: u64) -> Exception {
    // From a lower level in AArch32 or AArch64, or from EL1 with the stack of EL0 or its own.
    let entry = match pstate & 0x1f {
        mode if mode & 0x10 != 0 => 0x600,
        0b00000 => 0x400,
        0b00100 => 0,
        _ => 0x200,
    };
    // The flags N, Z, C, V, TCO, DIT and PAN stay; PAN is set unless SCTLR_EL1.SPAN; SSBS is SCTLR_EL1.DSSBS.
    let kept = pstate & (0xf << 28 | 1 << 25 | 1 << 24 | 1 << 22);
    let pan = if sctlr & 1 << 23 == 0 { 1 << 22 } else { 0 };
    let ssbs = (sctlr >> 44 & 1) << 12;
    // D, A, I and F, at EL1 with its own stack.
    let masked = 0x3c5;
    Exception {
        pc: (vectors & !(VECTORS - 1)) + entry,
        pstate: kept | pan | ssbs | masked,
        link: pc,
        saved: pstate,
    }
}

/// Returns whether `pc` is in the guest's table of exception vectors.
#[must_use]
pub fn is_vector(pc: u64, vectors: u64) -> bool {
    let start = vectors & !(VECTORS - 1);
    pc.wrapping_sub(start) < VECTORS
}

/// Returns whether interrupts can be masked for a step over this instruction, which neither shows nor
/// changes the mask: no system instruction but hints and barriers, no exception and no return from one.
#[must_use]
pub fn is_maskable(instruction: u32) -> bool {
    if instruction & 0xffff_e01f == 0xd503_201f {
        return true;
    }
    !matches!(instruction >> 24, 0xd4 | 0xd5) && instruction >> 16 != 0xd69f
}

/// The registers by which EL1 translates addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Translation {
    /// SCTLR_EL1.
    pub sctlr: u64,
    /// TCR_EL1.
    pub tcr: u64,
    /// TTBR0_EL1 and TTBR1_EL1.
    pub tables: [u64; 2],
}

impl Translation {
    /// Returns the guest-physical address of `address`, and how many bytes from there on are mapped like it,
    /// as the tables say without regard to permissions; `None` where nothing is mapped. `read` reads 8 bytes
    /// of a table.
    pub fn translate(
        &self,
        address: u64,
        mut read: impl FnMut(u64) -> Option<[u8; 8]>,
    ) -> Option<(u64, u64)> {
        if self.sctlr & 1 == 0 {
            return Some((address, 0x1000 - address % 0x1000));
        }
        let upper = address >> 55 & 1;
        let field = |low: u64, high: u64, bits: u32| {
            let at = if upper == 1 { high } else { low };
            self.tcr >> at & ((1 << bits) - 1)
        };
        // EPD0, EPD1.
        if field(7, 23, 1) == 1 {
            return None;
        }
        let bits = 64 - field(0, 16, 6);
        // The granule, whose code differs between the halves.
        let page_bits = match (upper, field(14, 30, 2)) {
            (0, 0) | (1, 2) => 12,
            (0, 2) | (1, 1) => 14,
            (0, 1) | (1, 3) => 16,
            _ => return None,
        };
        if !(16..=52).contains(&bits) || bits <= page_bits {
            return None;
        }
        // TBI0, TBI1: the upper byte is a tag.
        let significant = if field(37, 38, 1) == 1 { 55 } else { 63 };
        let mask = |bits: u64| u64::MAX >> (64 - bits);
        let sign = (address & mask(significant)) >> bits;
        let all = mask(significant) >> bits;
        if sign != if upper == 1 { all } else { 0 } {
            return None;
        }
        // TCR_EL1.DS is FEAT_LPA2, and an IPS of 52 bits with pages of 64 KiB FEAT_LPA.
        let is_lpa2 = page_bits < 16 && self.tcr >> 59 & 1 == 1;
        let is_lpa = page_bits == 16 && self.tcr >> 32 & 7 == 6;
        let stride = page_bits - 3;
        let levels = (bits - page_bits).div_ceil(stride);
        let mut shift = page_bits + stride * (levels - 1);
        let base = self.tables[upper as usize];
        let mut table = base & mask(48) & !1;
        if is_lpa2 || is_lpa {
            table = base & mask(48) & !mask(6) | (base >> 2 & 0xf) << 48;
        }
        table &= !mask(3 + bits - shift);
        let mut index = (address & mask(bits)) >> shift;
        let mut level = 4 - levels as i64;
        loop {
            let bytes = read(table + 8 * index)?;
            // SCTLR_EL1.EE.
            let entry = match self.sctlr >> 25 & 1 {
                1 => u64::from_be_bytes(bytes),
                _ => u64::from_le_bytes(bytes),
            };
            if entry & 1 == 0 {
                return None;
            }
            let is_table = entry & 2 != 0 && level < 3;
            let is_block = entry & 2 == 0 && level < 3;
            let is_page = entry & 2 != 0 && level == 3;
            let lowest = if is_table { page_bits } else { shift };
            let mut output = entry & mask(48) & !mask(lowest);
            if is_lpa2 {
                output = entry & mask(50) & !mask(lowest) | (entry >> 8 & 3) << 50;
            } else if is_lpa {
                output |= (entry >> 12 & 0xf) << 48;
            }
            if is_page || is_block && level > 0 {
                let offset = address & mask(shift);
                return Some((output + offset, (1 << shift) - offset));
            }
            if !is_table {
                return None;
            }
            table = output;
            shift -= stride;
            level += 1;
            index = address >> shift & mask(stride);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    #[test]
    fn debug_registers_are_written_as_the_manual_has_them() {
        let point = |address, length, access| Point {
            address,
            length,
            access,
        };
        let is = |point: Point| registers(&point);
        let run = point(0xffff_8000_8000_0010, 0, Access::Execute);
        assert_eq!(is(run), Some((0x1e7, 0xffff_8000_8000_0010)));
        assert_eq!(is(point(0x1002, 0, Access::Execute)), None);
        assert_eq!(
            is(point(0x1004, 4, Access::Write)),
            Some((0xf0 << 5 | 0b1_0111, 0x1000))
        );
        assert_eq!(
            is(point(0x1000, 8, Access::ReadWrite)),
            Some((0xff << 5 | 0b1_1111, 0x1000))
        );
        assert_eq!(
            is(point(0x1000, 64, Access::Read)),
            Some((6 << 24 | 0xff << 5 | 0b0_1111, 0x1000))
        );
        for (address, length) in [(0x1006, 4), (0x1008, 16), (0x1000, 12), (0x1000, 0)] {
            assert_eq!(
                is(point(address, length, Access::Read)),
                None,
                "{address:x} {length}"
            );
        }
    }

    #[test]
    fn syndromes_are_told_apart() {
        let watch = Point {
            address: 0x2004,
            length: 4,
            access: Access::Write,
        };
        let hit = |class: u32, address| hit(class << 26 | 1 << 25, address, &[watch]);
        assert_eq!(hit(0x30, 0), Some(Hit::Breakpoint));
        assert_eq!(hit(0x32, 0), Some(Hit::Step));
        assert_eq!(hit(0x34, 0x2000), Some(Hit::Watchpoint(watch, 0x2000)));
        assert_eq!(hit(0x34, 0x3000), None);
        assert_eq!(hit(0x3c, 0), Some(Hit::Instruction));
        assert_eq!(hit(0x20, 0), None);
    }

    #[test]
    fn a_breakpoint_of_the_guest_leads_to_its_handler() {
        // EL1 with its own stack, Z set, interrupts on; SCTLR_EL1.SPAN set.
        let taken = take_breakpoint(0x4000, 0x4000_0005, 0x8_0800, 1 << 23);
        let expected = Exception {
            pc: 0x8_0a00,
            pstate: 0x4000_03c5,
            link: 0x4000,
            saved: 0x4000_0005,
        };
        assert_eq!(taken, expected);
        // EL0, and PAN is set.
        let taken = take_breakpoint(0x4000, 0, 0x8_0800, 0);
        assert_eq!((taken.pc, taken.pstate), (0x8_0c00, 0x40_03c5));
        assert_eq!(take_breakpoint(0, 0x10, 0x800, 0).pc, 0xe00);
        assert_eq!(take_breakpoint(0, 4, 0x800, 0).pc, 0x800);
        assert!(is_vector(0x8_0a00, 0x8_0800) && !is_vector(0x8_1000, 0x8_0800));
        assert!(!is_vector(0x800, 0x8_0800));
    }

    #[test]
    fn interrupts_are_masked_over_what_does_not_see_it() {
        // add, b, ldr, ret, blr x1; paciasp, wfi, dsb sy.
        for plain in [
            0x9100_0400,
            0x1400_0001,
            0xf940_0020,
            0xd65f_03c0,
            0xd63f_0020,
            0xd503_233f,
            0xd503_207f,
            0xd503_3f9f,
        ] {
            assert!(is_maskable(plain), "{plain:#x}");
        }
        // mrs x0, daif; msr daifset, #2; svc #0; brk #0; eret; eretaa.
        for system in [
            0xd53b_4220,
            0xd503_42df,
            0xd400_0001,
            0xd420_0000,
            0xd69f_03e0,
            0xd69f_0bff,
        ] {
            assert!(!is_maskable(system), "{system:#x}");
        }
    }

    /// Tables in memory.
    #[derive(Default)]
    struct Tables(HashMap<u64, u64>);

    impl Tables {
        fn translate(&self, how: &Translation, address: u64) -> Option<(u64, u64)> {
            how.translate(address, |at| {
                self.0.get(&at).map(|entry| entry.to_le_bytes())
            })
        }
    }

    const UPPER: u64 = 0xffff_0000_0000_0000;

    /// Linux's setup with pages of 4 KiB and 48 bits in both halves.
    fn four_kib() -> Translation {
        Translation {
            sctlr: 1,
            tcr: 16 | 16 << 16 | 2 << 30,
            tables: [0x10_0000, 0x20_0000],
        }
    }

    #[test]
    fn without_the_mmu_an_address_is_itself() {
        let off = Translation::default();
        assert_eq!(
            off.translate(0x4008_0123, |_| None),
            Some((0x4008_0123, 0xedd))
        );
    }

    #[test]
    fn pages_of_4_kib_are_found_in_four_levels() {
        let address = UPPER | 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12 | 0x678;
        let mut tables = Tables::default();
        for (at, entry) in [
            (0x20_0008, 0x30_0003),
            (0x30_0010, 0x40_0003),
            (0x40_0018, 0x50_0003),
            (0x50_0020, 0x0068_0000_4567_8703),
        ] {
            tables.0.insert(at, entry);
        }
        let how = four_kib();
        assert_eq!(tables.translate(&how, address), Some((0x4567_8678, 0x988)));
        // The lower half has tables of its own, and what is between has none.
        assert_eq!(tables.translate(&how, address & !UPPER), None);
        assert_eq!(tables.translate(&how, address & !(1 << 52)), None);
        // A block of 2 MiB, and one of 1 GiB.
        tables.0.insert(0x40_0018, 0x8060_0701);
        let block = tables.translate(&how, address).expect("mapped");
        assert_eq!(block, (0x8060_4678, (1 << 21) - 0x4678));
        tables
            .0
            .insert(0x30_0010, 0x1_0000_0000_0701 & !0xfff | 0x701);
        assert!(tables.translate(&how, address).is_some());
        // None at level 0, and none that are reserved at level 3.
        tables.0.insert(0x20_0008, 0x30_0001);
        assert_eq!(tables.translate(&how, address), None);
        // Walks of the upper half are off.
        let off = Translation {
            tcr: how.tcr | 1 << 23,
            ..how
        };
        assert_eq!(tables.translate(&off, address), None);
        // Big-endian tables are read as such.
        let big = Translation {
            sctlr: how.sctlr | 1 << 25,
            ..how
        };
        assert_eq!(tables.translate(&big, address), None);
    }

    #[test]
    fn the_upper_byte_may_be_a_tag() {
        let mut tables = Tables::default();
        tables.0.insert(0x10_0000, 0x30_0003);
        tables.0.insert(0x30_0000, 0x4000_0701);
        let how = four_kib();
        let tagged = 0x5a00_0000_0000_1234;
        assert_eq!(tables.translate(&how, tagged), None);
        let tags = Translation {
            tcr: how.tcr | 1 << 37,
            ..how
        };
        let found = tables.translate(&tags, tagged).map(|(at, _)| at);
        assert_eq!(found, Some(0x4000_1234));
    }

    #[test]
    fn pages_of_16_kib_begin_with_a_table_of_two_entries() {
        // 48 bits: level 0 has bit 47 alone, then 11 bits a level.
        let how = Translation {
            sctlr: 1,
            tcr: 16 << 16 | 1 << 30,
            tables: [0, 0x20_0000],
        };
        let address = UPPER | 1 << 47 | 5 << 36 | 6 << 25 | 7 << 14 | 0x3210;
        let mut tables = Tables::default();
        for (at, entry) in [
            (0x20_0008, 0x30_0003),
            (0x30_0028, 0x40_0003),
            (0x40_0030, 0x50_0003),
            (0x50_0038, 0x7654_0703),
        ] {
            tables.0.insert(at, entry);
        }
        let found = tables.translate(&how, address);
        assert_eq!(found, Some((0x7654_0000 + 0x3210, 0x4000 - 0x3210)));
    }

    #[test]
    fn pages_of_64_kib_have_physical_addresses_of_52_bits() {
        // 52 bits of virtual addresses (FEAT_LVA), IPS 52 bits: level 1 has 10 bits.
        let how = Translation {
            sctlr: 1,
            tcr: 12 << 16 | 3 << 30 | 6 << 32,
            tables: [0, 0x20_0000 | 0x3 << 2],
        };
        let address = 0xfff0_0000_0000_0000 | 9 << 42 | 8 << 29 | 7 << 16 | 0x4321;
        let mut tables = Tables::default();
        for (at, entry) in [
            (0x3_0000_0020_0000 + 9 * 8, 0x30_0003),
            (0x30_0000 + 8 * 8, 0x40_0003),
            // Bits 15 to 12 are bits 51 to 48.
            (0x40_0000 + 7 * 8, 0x1234_5670_a703),
        ] {
            tables.0.insert(at, entry);
        }
        let found = tables.translate(&how, address).map(|(at, _)| at);
        assert_eq!(found, Some(0xa_1234_5670_0000 + 0x4321));
    }

    #[test]
    fn lpa2_has_five_levels_and_moves_the_upper_bits() {
        let how = Translation {
            sctlr: 1,
            tcr: 12 << 16 | 2 << 30 | 6 << 32 | 1 << 59,
            tables: [0, 0x20_0000],
        };
        // Level -1 has bits 51 to 48.
        let address = 0xfff0_0000_0000_0000 | 3 << 48 | 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12 | 5;
        let mut tables = Tables::default();
        for (at, entry) in [
            (0x20_0018, 0x25_0003),
            (0x25_0008, 0x30_0003),
            (0x30_0010, 0x40_0003),
            (0x40_0018, 0x50_0003),
            // Bits 9 and 8 are bits 51 and 50.
            (0x50_0020, 0x3_1234_5678_9203 | 1 << 8),
        ] {
            tables.0.insert(at, entry);
        }
        let found = tables.translate(&how, address).map(|(at, _)| at);
        assert_eq!(found, Some(0xf_1234_5678_9005));
    }

    proptest! {
        #[test]
        fn no_registers_and_tables_make_it_panic_or_go_on_for_ever(
            sctlr: u64, tcr: u64, tables: [u64; 2], address: u64, entries: [u64; 4]
        ) {
            let how = Translation { sctlr: sctlr | 1, tcr, tables };
            let mut reads = 0_usize;
            let _ = how.translate(address, |at| {
                reads += 1;
                assert!(reads <= 8);
                Some(entries[(at >> 3) as usize % 4].to_ne_bytes())
            });
        }

        #[test]
        fn no_point_makes_it_panic(address: u64, length: u64, near: u64) {
            for access in [Access::Execute, Access::Read, Access::Write, Access::ReadWrite] {
                let point = Point { address, length, access };
                let _ = (registers(&point), point.is_near(near));
            }
        }
    }
}
