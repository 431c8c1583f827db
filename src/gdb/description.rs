//! Registers as gdb is told of them: a target description (gdb's manual, appendix G).

use crate::kvm::debug::{ARCHITECTURE, FEATURES};
use gdbstub::arch::{Arch, Registers};
use std::fmt::Write;

/// Numbers of registers from their first to their last: `x0-30` stands for 31.
fn names(name: &str) -> (&str, std::ops::RangeInclusive<u32>) {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '-');
    let numbers = name[stem.len()..].split_once('-');
    let parsed = numbers.and_then(|(first, last)| Some(first.parse().ok()?..=last.parse().ok()?));
    match parsed {
        Some(range) => (stem, range),
        None => (name, 0..=0),
    }
}

/// Returns each register of a feature: name, bits, type.
fn registers(list: &str) -> impl Iterator<Item = (String, usize, Option<&str>)> {
    list.split_ascii_whitespace().flat_map(|register| {
        let mut parts = register.split(':');
        let (stem, range) = names(parts.next().unwrap_or_default());
        let bits = parts
            .next()
            .and_then(|bits| bits.parse().ok())
            .unwrap_or(64);
        let kind = parts.next();
        let is_one = range == (0..=0);
        range.map(move |number| match is_one {
            true => (stem.to_owned(), bits, kind),
            false => (format!("{stem}{number}"), bits, kind),
        })
    })
}

/// Returns how many bytes all registers have.
pub(super) fn bytes() -> usize {
    let lists = FEATURES.iter().flat_map(|(_, _, list)| registers(list));
    lists.map(|(_, bits, _)| bits / 8).sum()
}

/// Returns where a register is, by its number.
pub(super) fn place(number: usize) -> Option<std::ops::Range<usize>> {
    let mut at = 0;
    let lists = FEATURES.iter().flat_map(|(_, _, list)| registers(list));
    let mut places = lists.map(|(_, bits, _)| {
        let place = at..at + bits / 8;
        at = place.end;
        place
    });
    places.nth(number)
}

/// Writes the description.
pub(super) fn xml() -> String {
    let mut xml = format!(
        "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target version=\"1.0\">\
         <architecture>{ARCHITECTURE}</architecture>"
    );
    for (feature, types, list) in FEATURES {
        // Writing to a String does not fail.
        let _ = write!(xml, "<feature name=\"{feature}\">{types}");
        for (name, bits, kind) in registers(list) {
            let kind = kind.map(|kind| format!(" type=\"{kind}\""));
            let kind = kind.unwrap_or_default();
            let _ = write!(xml, "<reg name=\"{name}\" bitsize=\"{bits}\"{kind}/>");
        }
        xml.push_str("</feature>");
    }
    xml.push_str("</target>");
    xml
}

/// The architecture, for gdbstub.
#[derive(Debug)]
pub(super) enum Described {}

impl Arch for Described {
    type Usize = u64;
    type Registers = Values;
    type BreakpointKind = usize;
    type RegId = Number;
}

/// All registers of a vCPU, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Values(pub(super) Vec<u8>);

impl Registers for Values {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        0
    }

    fn gdb_serialize(&self, write_byte: impl FnMut(Option<u8>)) {
        self.0.iter().copied().map(Some).for_each(write_byte);
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.0 = bytes.to_vec();
        if bytes.len() == self::bytes() {
            Ok(())
        } else {
            Err(())
        }
    }
}

/// A register's number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Number(pub(super) usize);

impl gdbstub::arch::RegId for Number {
    fn from_raw_id(id: usize) -> Option<(Number, Option<std::num::NonZeroUsize>)> {
        let place = place(id)?;
        Some((Number(id), std::num::NonZeroUsize::new(place.len())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_have_the_numbers_that_gdb_gives_them() {
        let all: Vec<_> = registers("x0-30:64 sp:64:data_ptr cpsr:32 v0-1:128:v cr0:64").collect();
        assert_eq!(all.len(), 36);
        assert_eq!(all[30], ("x30".to_owned(), 64, None));
        assert_eq!(all[31], ("sp".to_owned(), 64, Some("data_ptr")));
        assert_eq!(all[34], ("v1".to_owned(), 128, Some("v")));
        assert_eq!(all[35].0, "cr0");
        let xml = xml();
        assert_eq!(
            xml.matches("<reg ").count(),
            (0..).take_while(|at| place(*at).is_some()).count()
        );
        assert_eq!(
            xml.matches("<feature").count(),
            xml.matches("</feature>").count()
        );
        let last = (0..).map_while(place).last().expect("registers");
        assert_eq!(last.end, bytes());
    }
}
